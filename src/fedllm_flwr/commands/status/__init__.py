"""How a run or a federation stands, from its directory: ``fedllm status``."""
