"""``fedllm evaluate``: benchmark suites on the base model and on adapters, side by side."""
