"""``fedllm reproduce``: a published experiment by the protocol of docs/experiments.md."""
