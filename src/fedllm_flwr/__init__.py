"""Federated fine-tuning of large language models with Flower."""

__version__ = "0.1.0"
