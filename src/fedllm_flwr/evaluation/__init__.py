"""Evaluation of adapters: loss on held-out text, and answers by likelihood."""
