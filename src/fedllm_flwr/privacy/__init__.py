"""Differential privacy: clipping, noise and accounting. Uses NumPy, neither torch nor Flower."""
