"""The README.md of an exported adapter: a model card."""

import json
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

_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


def model_card(
    config: Config, summary: Mapping[str, Any], base_model: str, dtype: str = "float32"
) -> str:
    """Model card in Markdown with the front matter that the Hugging Face hub reads.

    Args:
        config: of the run.
        summary: as `fedllm_flwr.reporting.metrics.summarise` makes it.
        base_model: hub id, local directory or "embedded". Only a hub id appears in the front
            matter, and of a local directory only its last part, as the card may be published.
        dtype: of the base model's weights in the run.
    """
    sections = [
        _front_matter(config, base_model),
        _introduction(config, base_model),
        _loading(config, base_model, dtype),
        _results(summary, name_of_start(config.init_adapter)),
        _making(config, summary),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _front_matter(config: Config, base_model: str) -> str:
    tags = ["lora", "peft", "federated-learning", "flower", config.algorithm.name, config.task.name]
    lines = ["---"]
    if _is_hub_id(base_model):
        lines.append(f"base_model: {json.dumps(base_model)}")
    lines += ["library_name: peft", "pipeline_tag: text-generation", "tags:"]
    lines += [f"- {json.dumps(tag)}" for tag in tags]
    return "\n".join([*lines, "---"])


def _introduction(config: Config, base_model: str) -> str:
    return (
        f"# {_code_free(config.model.name)}, fine-tuned by {config.algorithm.name} on "
        f"{_code_free(config.data.name)}\n\n"
        f"A LoRA adapter (rank {config.lora.r}, alpha {config.lora.alpha}) for "
        f"{_base_in_words(base_model)}. It was trained by federated learning: the data stayed with "
        "the clients, and only adapter weights travelled."
    )


def _loading(config: Config, base_model: str, dtype: str) -> str:
    kind = _kind(base_model)
    imports = [
        "import torch",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
    ]
    if kind == "embedded":
        imports = ["from pathlib import Path", "", "import fedllm_flwr", *imports]
        base = 'str(Path(fedllm_flwr.__file__).parent / "assets" / "tiny")'
    else:
        base = json.dumps(base_model if kind == "hub" else "path/to/your/copy/of/the/base/model")
    lines = [
        *imports,
        "",
        f"base = {base}",
        "tokenizer = AutoTokenizer.from_pretrained(base)",
        f"model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.{dtype})",
        'model = PeftModel.from_pretrained(model, "path/to/this/adapter").eval()',
        "",
        *_prompting(config.data.template),
        "written = model.generate(**inputs, max_new_tokens=64)[0, inputs.input_ids.shape[1] :]",
        "print(tokenizer.decode(written, skip_special_tokens=True))",
    ]
    code = "\n".join(["```python", *lines, "```"])
    return f"## How to use it\n\n{code}\n\n{_layout_in_words(config)}"


def _prompting(template: str) -> list[str]:
    """Code that makes `prompt` of an instruction, exactly as the training data were laid out."""
    layout = text_layout(template)
    if layout is not None:
        prompt = json.dumps(layout[0], ensure_ascii=False)
        return [
            f"template = {prompt}",
            'prompt = template.format(instruction="...")',
            'inputs = tokenizer(prompt, return_tensors="pt")',
        ]
    return [
        'messages = [{"role": "user", "content": "..."}]',
        "prompt = tokenizer.apply_chat_template(",
        "    messages, tokenize=False, add_generation_prompt=True",
        ').rstrip(" ")',
        'with_bos = not prompt.startswith(tokenizer.bos_token or "")',
        'inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=with_bos)',
    ]


def _layout_in_words(config: Config) -> str:
    """What follows the prompt in training."""
    layout = text_layout(config.data.template)
    if layout is None:
        return (
            "Prompts and answers were laid out by the chat template of the base model's tokenizer; "
            "spaces at the end of the prompt belong to the answer."
        )
    space = layout[1].removesuffix("{answer}")
    one = "one space" if space == " " else json.dumps(space)
    return (
        f"This is the `{config.data.template}` template. In training the prompt was followed by "
        f"{one}, the answer and the tokenizer's end token, so that a prompt ends without a space. "
        "An instruction with an input is both, joined by a space."
    )


def _results(summary: Mapping[str, Any], start: str) -> str:
    """Table of what training started from and of the adapter, on the held-out records."""
    base, final = summary.get("base"), summary.get("final")
    if not base or not final:
        return ""
    columns = [
        ("loss" if "margin" in final else "loss (nats/token)", "loss", 3),
        ("perplexity", "perplexity", 2),
        ("token accuracy", "token_accuracy", 3),
        ("accuracy", "accuracy", 3),
        ("macro F1", "macro_f1", 3),
        ("reward margin", "margin", 3),
        ("chosen log p", "chosen_log_prob", 1),
        ("rejected log p", "rejected_log_prob", 1),
        ("tokens per answer", "answer_tokens", 1),
    ]
    shown = [column for column in columns if column[1] in final]
    header = ["model", *(title for title, _, _ in shown)]
    lines = [_row(header), _row(["---"] + ["---:"] * len(shown))]
    for name, metrics in ((start, base), ("with this adapter", final)):
        lines.append(_row([name, *(fixed(metrics.get(key), digits) for _, key, digits in shown)]))
    return "## Results on held-out records\n\n" + "\n".join(lines)


def _making(config: Config, summary: Mapping[str, Any]) -> str:
    training, federation = config.training, config.federation
    if training.max_steps > 0:
        local = f"{training.max_steps} steps"
    else:
        local = f"{training.num_epochs:g} epochs"
    variant = "" if config.algorithm.variant == "paper" else f" ({config.algorithm.variant})"
    clients = "one per value" if federation.num_clients is None else str(federation.num_clients)
    column = f" by `{_code_free(config.partition.column)}`" if config.partition.column else ""
    rows = {
        "data": _data_in_words(config),
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
    lines = [_row(["", ""]), _row(["---", "---"])]
    lines += [_row([name, value]) for name, value in rows.items()]
    return "## How it was made\n\n" + "\n".join(lines)


def _kind(base_model: str) -> str:
    if base_model == "embedded":
        return "embedded"
    return "hub" if _is_hub_id(base_model) else "local"


def _is_hub_id(base_model: str) -> bool:
    """A hub id is owner/name; a directory of that name on this machine wins, as in loading."""
    return _HUB_ID.fullmatch(base_model) is not None and not Path(base_model).exists()


def _base_in_words(base_model: str) -> str:
    kind = _kind(base_model)
    if kind == "embedded":
        return "the small demonstration model inside the package fedllm-flwr, which is on no hub"
    if kind == "hub":
        return f"[{base_model}](https://huggingface.co/{base_model})"
    return f"a local copy of `{_code_free(Path(base_model).name)}`"


def _data_in_words(config: Config) -> str:
    data = config.data
    if data.path in EMBEDDED_DATA:
        return f"{_code_free(data.name)}, generated records inside the package fedllm-flwr"
    if data.path is not None:
        return f"{_code_free(data.name)}, a local file (`{_code_free(Path(data.path).name)}`)"
    return _code_free(data.hub_id or data.name)


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _code_free(text: str) -> str:
    """`text` on one line, without back quotes."""
    return one_line(text).replace("`", "'")
