"""``fedllm status``: state of a run or a federation, read from its directory."""
