"""What a run's adapter is for: answers side by side with the base model, and the merged model."""

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fedllm_flwr.adapters import give_usual_mode, load_adapter
from fedllm_flwr.config import Config
from fedllm_flwr.config.compose import load_run
from fedllm_flwr.config.schema import QuantizationConfig
from fedllm_flwr.data.encode import encode_prompts
from fedllm_flwr.errors import ConfigError, FederationError
from fedllm_flwr.evaluation.answers import as_text, greedy_answers
from fedllm_flwr.run_directory import RunDirectory
from fedllm_flwr.training.model import AdaptedModel, forget_model, load_model


def answer_side_by_side(run: str, prompts: Sequence[str], max_new_tokens: int) -> None:
    """Print each prompt's greedy answer by the base model and by the run's adapter.

    Prompts are put into the template that the run was trained with.

    Raises:
        FedLLMError: the directory holds no finished run, or its model cannot be loaded.
    """
    if max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens must be > 0, got {max_new_tokens}.")
    config, model = _load(run)
    room = config.training.max_length
    for prompt in prompts:
        messages = [[{"role": "user", "content": prompt}]]
        tokens = encode_prompts(messages, model.tokenizer, config.data.template, room)[0]
        with model.peft.disable_adapter():
            base = greedy_answers(model, [tokens], max_new_tokens)[0]
        print(f"prompt     {prompt}\nbase       {as_text(model, base)}")
        answer = greedy_answers(model, [tokens], max_new_tokens)[0]
        print(f"federated  {as_text(model, answer)}\n")


def merge(run: str, output: str) -> str:
    """Write the base model with the run's adapter merged into its weights; returns what was done.

    The merged model is not quantized: the adapter is added to the base model's full weights.

    Raises:
        FedLLMError: the run is not finished, or the directory exists or cannot be written.
    """
    path = Path(output).expanduser()
    if path.exists():
        raise ConfigError(f"{output} exists; give a directory that does not.")
    if beside := next((p for p in path.parents if p.exists() and not p.is_dir()), None):
        raise ConfigError(f"{output}: {beside} is a file; give another directory to write.")
    _, model = _load(run, quantized=False)
    forget_model()  # merging takes the adapter out of it
    merged = model.peft.merge_and_unload()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            fresh = Path(folder) / path.name
            merged.save_pretrained(str(fresh), safe_serialization=True)
            model.tokenizer.save_pretrained(str(fresh))
            give_usual_mode(fresh, like="config.json")
            shutil.move(str(fresh), path)
    except OSError as error:
        raise FederationError(f"cannot write {output}: {error.strerror or error}.") from error
    return f"merged model written to {path}; load it with AutoModelForCausalLM.from_pretrained"


def _load(run: str, quantized: bool = True) -> tuple[Config, AdaptedModel]:
    directory = RunDirectory(Path(run).expanduser())
    config = load_run(directory.path, run)
    if not directory.adapter.is_dir():
        raise ConfigError(
            f"{run}: no adapter there, the run has not finished; go on with it: "
            f"fedllm run resume={run}"
        )
    if not quantized:
        config = replace(config, quantization=QuantizationConfig())
    model = load_model(config)
    model.load(load_adapter(directory.adapter, model))
    return config, model
