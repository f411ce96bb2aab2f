"""``fedllm compare``: every algorithm and both baselines on the same data, seeds and budget."""
