"""Local training: the base model with its adapters, batches, and one client's round."""
