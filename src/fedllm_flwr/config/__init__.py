"""Configuration: the typed schema, its composition from ``conf/`` and its validation."""

from fedllm_flwr.config.schema import Config, changed

__all__ = ["Config", "changed"]
