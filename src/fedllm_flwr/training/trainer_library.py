"""What this package uses of transformers' Trainer, imported without what it can do without.

The Trainer imports datasets, and with it pyarrow and pandas, only to check types: 1 second and
110 MB in every process that trains.
"""

# Before transformers imports PEFT in its own way.
import fedllm_flwr.models.peft_library  # noqa: F401
from fedllm_flwr.environment import hidden

with hidden("datasets"):
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

__all__ = ["PrinterCallback", "Trainer", "TrainerCallback", "TrainingArguments"]
