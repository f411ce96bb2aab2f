"""Differential privacy: clipping, noise, and what was spent. NumPy only; no torch, no Flower."""
