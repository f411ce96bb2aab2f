"""The model card (README.md) of an exported adapter."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedllm_flwr import __version__
from fedllm_flwr.config import Config
from fedllm_flwr.config.schema import EMBEDDED_DATA
from fedllm_flwr.data.templates import text_layout
from fedllm_flwr.reporting.metrics import name_of_start
from fedllm_flwr.reporting.text import fixed, format_bytes, format_seconds, one_line
from fedllm_flwr.tasks import task_of
from fedllm_flwr.tasks.base import TrainingTask

_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


def model_card(
    config: Config,
    summary: Mapping[str, Any],
    base_model: str,
    dtype: str = "float32",
    merged: bool = False,
) -> str:
    """A model card in Markdown with front matter for the Hugging Face hub.

    Args:
        config: the run's configuration.
        summary: from `fedllm_flwr.reporting.metrics.summarise`.
        base_model: hub id, local directory or "embedded". As the card may be published, its front
            matter contains only hub ids, and its text only the last part of a local path.
        dtype: dtype of the base model's weights in the run.
        merged: the card describes a model with the adapter merged into its weights.
    """
    is_hub_id = _HUB_ID.fullmatch(base_model) is not None and not Path(base_model).exists()
    sections = [
        _introduction(config, base_model, is_hub_id, merged),
        _usage(config, base_model, is_hub_id, dtype, merged),
        _results(task_of(config), summary, name_of_start(config.init_adapter)),
        _training(config, summary),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _introduction(config: Config, base_model: str, is_hub_id: bool, merged: bool) -> str:
    library = "transformers" if merged else "peft"
    tags = ["federated-learning", "flower", config.algorithm.name, config.task.name]
    tags = tags if merged else ["lora", "peft", *tags]
    front_matter = [
        "---",
        *([f"base_model: {json.dumps(base_model)}"] if is_hub_id else []),
        f"library_name: {library}",
        "pipeline_tag: text-generation",
        "tags:",
        *(f"- {json.dumps(tag)}" for tag in tags),
        "---",
    ]
    if base_model == "embedded":
        base = "the small demonstration model included in the package fedllm-flwr (not on a hub)"
    elif is_hub_id:
        base = f"[{base_model}](https://huggingface.co/{base_model})"
    else:
        base = f"a local copy of `{_code_free(Path(base_model).name)}`"
    front = "\n".join(front_matter)
    adapter = f"LoRA adapter (rank {config.lora.r}, alpha {config.lora.alpha})"
    made = f"{base}, with a {adapter} added to its weights" if merged else f"A {adapter} for {base}"
    return (
        f"{front}\n\n# {_code_free(config.model.name)}, fine-tuned by {config.algorithm.name} on "
        f"{_code_free(config.data.name)}\n\n"
        f"{made[0].upper()}{made[1:]}. {'The adapter' if merged else 'It'} was trained with "
        "federated learning: the data stayed with the clients, which sent only adapter weights."
    )


def _usage(config: Config, base_model: str, is_hub_id: bool, dtype: str, merged: bool) -> str:
    """Code that loads the adapter and makes the same prompts as training."""
    imports = [
        "import torch",
        *([] if merged else ["from peft import PeftModel"]),
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
    ]
    if merged:
        base = '"path/to/this/model"'
    elif base_model == "embedded":
        imports = ["from pathlib import Path", "", "import fedllm_flwr", *imports]
        base = 'str(Path(fedllm_flwr.__file__).parent / "assets" / "tiny")'
    else:
        base = json.dumps(base_model if is_hub_id else "path/to/your/copy/of/the/base/model")
    layout = text_layout(config.data.template)
    if layout is None:
        prompting = [
            'messages = [{"role": "user", "content": "..."}]',
            "prompt = tokenizer.apply_chat_template(",
            "    messages, tokenize=False, add_generation_prompt=True",
            ').rstrip(" ")',
            'with_bos = not prompt.startswith(tokenizer.bos_token or "")',
            'inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=with_bos)',
        ]
        note = (
            "Prompts and answers were formatted with the base model's chat template; "
            "spaces at the end of the prompt belong to the answer."
        )
    else:
        prompt, answer = layout
        prompting = [
            f"template = {json.dumps(prompt, ensure_ascii=False)}",
            'prompt = template.format(instruction="...")',
            'inputs = tokenizer(prompt, return_tensors="pt")',
        ]
        space = answer.removesuffix("{answer}")
        note = (
            f"This is the `{config.data.template}` template. In training, the prompt was followed "
            f"by {'one space' if space == ' ' else json.dumps(space)}, the answer and the "
            "tokenizer's end-of-sequence token, so a prompt must not end with a space. "
            "An instruction and its input are joined by a space."
        )
    loaded = ['model = PeftModel.from_pretrained(model, "path/to/this/adapter").eval()']
    loaded = ["model.eval()"] if merged else loaded
    lines = [
        *imports,
        "",
        f"base = {base}",
        "tokenizer = AutoTokenizer.from_pretrained(base)",
        f"model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.{dtype})",
        *loaded,
        "",
        *prompting,
        "written = model.generate(**inputs, max_new_tokens=64)[0, inputs.input_ids.shape[1] :]",
        "print(tokenizer.decode(written, skip_special_tokens=True))",
    ]
    code = "\n".join(["```python", *lines, "```"])
    return f"## How to use it\n\n{code}\n\n{note}"


def _results(task: TrainingTask, summary: Mapping[str, Any], start: str) -> str:
    """Table of scores on the held-out records, before training and with the adapter."""
    base, final = summary.get("base"), summary.get("final")
    if not base or not final:
        return ""
    shown = [metric for metric in task.metrics if metric.name in final]
    titles = [metric.card_title for metric in shown]
    if task.loss_unit:
        titles = [f"loss ({task.loss_unit})" if title == "loss" else title for title in titles]
    header = ["model", *titles]
    lines = [_row(header), _row(["---"] + ["---:"] * len(shown))]
    for name, metrics in ((start, base), ("with this adapter", final)):
        values = [fixed(metrics.get(metric.name), metric.card_decimals) for metric in shown]
        lines.append(_row([name, *values]))
    return "## Results on held-out records\n\n" + "\n".join(lines)


def _training(config: Config, summary: Mapping[str, Any]) -> str:
    training, federation = config.training, config.federation
    if training.max_steps > 0:
        local = f"{training.max_steps} steps"
    else:
        local = f"{training.num_epochs:g} epochs"
    variant = "" if config.algorithm.variant == "paper" else f" ({config.algorithm.variant})"
    clients = "one per value" if federation.num_clients is None else str(federation.num_clients)
    column = f" by `{_code_free(config.partition.column)}`" if config.partition.column else ""
    data = config.data
    records = _code_free(data.hub_id or data.name)
    if data.path in EMBEDDED_DATA:
        records = f"{_code_free(data.name)}, generated records included in the package fedllm-flwr"
    elif data.path is not None:
        records = f"{_code_free(data.name)}, a local file (`{_code_free(Path(data.path).name)}`)"
    rows = {
        "data": records,
        "clients": f"{config.partition.name}{column}"
        + (f", {clients}" if federation.num_clients or config.partition.name == "natural" else ""),
        "algorithm": f"{config.algorithm.name}{variant}, {summary['rounds']} rounds",
        "local training": f"{local} per round, {training.batch_size} examples per step, "
        f"{training.optimizer}, learning rate {training.learning_rate:g} to "
        f"{training.min_learning_rate:g}",
        "base weights": f"quantization {config.quantization.name}",
        "communication": f"{format_bytes(summary['bytes_up'])} up, "
        f"{format_bytes(summary['bytes_down'])} down, as {config.communication.dtype}",
        "duration": format_seconds(summary["seconds"]),
        "seed": str(config.seed),
        "software": f"fedllm-flwr {__version__}",
    }
    if "epsilon" in summary:
        unit, epsilon = config.privacy.unit, summary["epsilon"]
        bounded = epsilon is not None and math.isfinite(epsilon)
        spent = f"{epsilon:.3g}" if bounded else "unbounded (no noise)"
        rows["differential privacy"] = (
            f"per {unit}: epsilon {spent} at delta {summary['delta']:.2g}, clip "
            f"{config.privacy.clip:g}"
        )
    lines = [_row(["", ""]), _row(["---", "---"])]
    lines += [_row([name, value]) for name, value in rows.items()]
    return "## How it was made\n\n" + "\n".join(lines)


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _code_free(text: str) -> str:
    """`text` on one line, without backticks."""
    return one_line(text).replace("`", "'")
