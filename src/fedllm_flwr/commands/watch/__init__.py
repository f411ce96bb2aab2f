"""``fedllm watch``: the report of a run that goes on, growing in a browser."""
