"""``fedllm watch``: a live report of a run in a browser."""
