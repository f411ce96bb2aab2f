"""What a server needs before the first message: data, model, evaluation set, initial adapter."""

from dataclasses import dataclass
from pathlib import Path

from fedllm_flwr.adapters import load_adapter
from fedllm_flwr.config import Config
from fedllm_flwr.data.client import SimulatedData, encode_records, simulated_data
from fedllm_flwr.evaluation.central import EvaluationSet, make_evaluation_set
from fedllm_flwr.params import Params
from fedllm_flwr.training.model import AdaptedModel, load_model
from fedllm_flwr.training.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Prepared:
    """Inputs of a run, loaded."""

    data: SimulatedData
    model: AdaptedModel
    evaluation: EvaluationSet | None
    initial: Params


def prepare(config: Config) -> Prepared:
    """Load everything that the configuration names; problems show here, before any training.

    Raises:
        FedLLMError: names the key, the value and the remedy.
    """
    tokenizer = load_tokenizer(config.model)
    data = simulated_data(config, tokenizer)
    records = data.source.eval
    evaluation = None
    if config.evaluation.central and len(records):
        encoded = encode_records(config, tokenizer, records)
        evaluation = make_evaluation_set(config, tokenizer, records, encoded)
    model = load_model(config)
    initial = model.initial
    if config.init_adapter is not None:
        initial = load_adapter(Path(config.init_adapter).expanduser(), model)
    return Prepared(data, model, evaluation, initial)
