"""The fit check: whether configuration, model, tokenizer, data and adapter are compatible.

Every engine and command calls it before a run directory exists: `check_fit` for a run (also for
each run of a comparison or a sweep, and on the server of a deployment), `check_site_fit` for a
site's own data and copy of the model, `check_evaluation_fit` for ``fedllm evaluate``. It reads the
model's config.json, its tokenizer, the headers of its weights and the data; weights are not loaded.
Suspicious but valid settings become warnings in the plan: `fit_warnings`.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedllm_flwr.config import Config
from fedllm_flwr.config.names import shown
from fedllm_flwr.config.schema import value_of
from fedllm_flwr.config.validation import check_client_counts
from fedllm_flwr.data.client_data import (
    SimulatedData,
    divided_data,
    encode_records,
    require_clients_examples,
    require_examples,
    simulated_data,
)
from fedllm_flwr.data.kinds import Examples
from fedllm_flwr.data.sources import Records
from fedllm_flwr.errors import ConfigError, ModelError
from fedllm_flwr.evaluation.suites.requested import requested_tasks
from fedllm_flwr.federation.mechanism import plan_budget
from fedllm_flwr.federation.rule import find_rule
from fedllm_flwr.federation.updates.transform import Chain
from fedllm_flwr.models.base_facts import BaseFacts, ModelKey, base_facts
from fedllm_flwr.models.tokenizer import load_tokenizer
from fedllm_flwr.reporting.trackers import check_trackers
from fedllm_flwr.tasks import task_of

_FEW_SCORED = 100  # held-out records below which a score needs a confidence interval
_UNKNOWN_SHARE = 0.01  # fraction of the tokens
_OVERLAP_SHARE = 0.01  # fraction of the held-out records
_ADAPTER_SETTINGS = {"r": "r", "alpha": "lora_alpha", "rslora": "use_rslora", "dora": "use_dora"}


def check_fit(config: Config) -> "SimulatedData | None":
    """Reject a run with incompatible parts, within seconds and without leaving files behind.

    Returns:
        The encoded data of a simulation; None in a deployment.

    Raises:
        FedLLMError: names the key, its value and the remedy.
    """
    from fedllm_flwr.data.templates import render

    check_trackers(config.tracking)
    if config.privacy.unit == "client" and config.federation.num_clients is not None:
        plan_budget(config, dict.fromkeys(map(str, range(config.federation.num_clients)), 1))
    _check_estimation(config)
    Chain.of(config)
    requested_tasks(config)
    adapters = {key: value_of(config, key) for key in task_of(config).adapters.values()}
    for key, path in {"init_adapter": config.init_adapter, **adapters}.items():
        if path is None:
            continue
        file = Path(path).expanduser() / "adapter_config.json"
        try:
            saved: dict[str, Any] = json.loads(file.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise ModelError(
                f"{key}={shown(path)}: no readable adapter_config.json ({error})."
            ) from error
        for name, theirs in _ADAPTER_SETTINGS.items():
            own = getattr(config.lora, name)
            if theirs in saved and saved[theirs] != own:
                raise ModelError(
                    f"lora.{name}={shown(own)}, but the adapter in {path} was made with "
                    f"lora.{name}={shown(saved[theirs])}; use that."
                )
    facts = _check_model(config)
    tokenizer = load_tokenizer(config.model)
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello"}]
    render(turns, config.data.template, tokenizer)  # rejects a template that cannot be rendered
    if config.federation.engine == "deployment":
        _check_special_ids(config, tokenizer, facts)
        return None
    kind = task_of(config).records
    check_client_counts(config, divided_data(config, kind)[1].num_clients)
    data = simulated_data(config, kind, tokenizer)
    require_clients_examples(config, data)
    check_client_counts(config, data.partition.num_clients)
    if config.privacy.unit == "client":
        plan_budget(config, dict.fromkeys(data.partition.names, 1))
    check_token_ids(config, data.encoded, facts.vocabulary)
    if config.evaluation.central and len(data.source.eval):
        task_of(config).check_held_out(config, data.source.eval)
        encoded = encode_records(config, kind, tokenizer, data.source.eval)
        require_examples(config, "the held-out records", len(encoded))
        check_token_ids(config, encoded, facts.vocabulary)
    return data


def _check_estimation(config: Config) -> None:
    """Refuse a rule without a round in which something moves, or whose start is not the base.

    Raises:
        ConfigError: names the key, its value and the remedy.
    """
    rule, name, rounds = find_rule(config.algorithm), config.algorithm.name, config.federation
    if rule.estimates(rounds.num_rounds):
        raise ConfigError(
            f"federation.num_rounds={rounds.num_rounds}: with algorithm={name} so many rounds "
            "estimate gradients and move nothing; raise it, or lower algorithm.options.estimation."
        )
    if rule.has_cores and config.init_adapter is not None:
        raise ConfigError(
            f"init_adapter={shown(config.init_adapter)}: algorithm={name} starts from a base; "
            "merge the adapter into it first (fedllm merge), and set init_adapter=null."
        )


def check_site_fit(config: Config, examples: Examples) -> None:
    """As `check_fit`, for a site's own copy of the model and its own examples.

    Raises:
        FedLLMError: names the key, its value and the remedy; does not quote the data.
    """
    facts = _check_model(config)
    check_token_ids(config, examples, facts.vocabulary)


def check_evaluation_fit(config: Config, prompt: str, template: str | None) -> None:
    """Reject a model that ``fedllm evaluate`` cannot score, or cannot prompt in this way.

    Args:
        prompt: value of ``--prompt``.
        template: value of ``--template``, if given.

    Raises:
        FedLLMError: names the option and the remedy.
    """
    facts = base_facts(ModelKey.of(config.model))
    tokenizer = load_tokenizer(config.model)
    if not tokenizer.chat_template and (prompt == "chat" or template == "chat"):
        typed = "--prompt chat" if prompt == "chat" else "--template chat"
        raise ModelError(
            f"{typed}: the tokenizer of {facts.path} has no chat template; use --prompt trained "
            "with --template alpaca or vicuna, or --prompt raw."
        )
    _check_special_ids(config, tokenizer, facts)


def _check_model(config: Config) -> BaseFacts:
    """Checks of the base model and the adapter that need no data."""
    from fedllm_flwr.models import device as devices

    device = devices.resolve_device(config.training.device)
    dtype = devices.resolve_dtype(config.training.dtype, device)
    devices.resolve_attention(config.model.attention, device, dtype)
    devices.check_kernels(config.model, device)
    facts = base_facts(ModelKey.of(config.model))
    length = config.training.max_length
    if facts.context is not None and length > facts.context:
        raise ConfigError(
            f"training.max_length={length}, but model.path={facts.path} takes {facts.context} "
            f"tokens; set training.max_length={facts.context} or less.",
            f"training.max_length={length}, but the model takes {facts.context} tokens",
        )
    rank, narrowest = config.lora.r, min(facts.layers.values())
    if config.lora.target_modules in ("auto", "all-linear") and rank <= narrowest:
        return facts
    targets = facts.targets(config.lora)  # also rejects names that match no layer
    if targets and rank > (widest := max(targets.values())):
        raise ConfigError(
            f"lora.r={rank} is above the width of the layers it adapts (at most {widest} in "
            f"model.path={facts.path}): it cannot say more than lora.r={widest}; lower it.",
            f"lora.r={rank} is above the width of all layers that it adapts, {widest}",
        )
    return facts


def check_token_ids(config: Config, examples: Examples, vocabulary: int) -> None:
    """Reject token ids for which the base model has no embedding.

    Raises:
        ModelError: names the model, the largest id and the size of the vocabulary.
    """
    largest = len(examples.token_counts) - 1
    if largest >= vocabulary:
        raise _foreign_token(config, largest, vocabulary)


def _check_special_ids(config: Config, tokenizer: Any, facts: BaseFacts) -> None:
    """As `check_token_ids`, without data: for the special tokens of every text."""
    largest = max(tokenizer("Hello.")["input_ids"] + [tokenizer.eos_token_id or 0])
    if largest >= facts.vocabulary:
        raise _foreign_token(config, largest, facts.vocabulary)


def _foreign_token(config: Config, token: int, vocabulary: int) -> ModelError:
    return ModelError(
        f"model.path={config.model.path}: its tokenizer produces token id {token}, but the model "
        f"has {vocabulary} embeddings (0 to {vocabulary - 1}); use the tokenizer that belongs to "
        "the model.",
        "its tokenizer does not belong to its base model",
    )


def fit_warnings(config: Config, data: SimulatedData | None, held_out: Records | None) -> list[str]:
    """Warnings about a run's settings, one line each, for the plan.

    Args:
        data: data of a simulation; None for a deployment, whose data are at its sites.
        held_out: records for central evaluation, if any.
    """
    lines: list[str] = []
    rank, layers = config.lora.r, base_facts(ModelKey.of(config.model))
    if rank > min(layers.layers.values()) and (
        narrow := [width for width in layers.targets(config.lora).values() if width < rank]
    ):
        lines.append(
            f"lora.r={rank} is above the width of {len(narrow)} adapted layers (down to "
            f"{min(narrow)}); a higher rank than a layer's width adds nothing"
        )
    if data is not None:
        lines += data_warnings(config, data)
    if config.evaluation.central and held_out is not None and 0 < len(held_out) < _FEW_SCORED:
        half = 0.98 / np.sqrt(len(held_out))
        lines.append(
            f"scores are of {len(held_out)} held-out record{'s' * (len(held_out) != 1)}: an "
            f"accuracy may be off by ±{half:.2f} (95 %); data.eval_path or "
            "data.validation_fraction gives more"
        )
    return lines


def data_warnings(config: Config, data: SimulatedData) -> list[str]:
    """Warnings about simulated data: unknown tokens, large steps, held-out records in training."""
    from fedllm_flwr.data.overlap import overlap

    lines: list[str] = []
    unknown, counts = load_tokenizer(config.model).unk_token_id, data.encoded.token_counts
    if unknown is not None and unknown < len(counts):
        share = counts[unknown] / counts.sum()
        if share >= _UNKNOWN_SHARE:
            lines.append(
                f"{100 * share:.1f} % of the training tokens are unknown to the tokenizer of "
                f"model.path={config.model.path} and are learnt as its unknown token; use a model "
                "that knows this text"
            )
    training = config.training
    per_step = training.batch_size * training.gradient_accumulation_steps
    largest = max(len(rows) for rows in data.partition.indices)
    if training.max_steps > 0 and per_step > largest:
        lines.append(
            f"a step takes {per_step} examples, but the largest client has {largest}: each is used "
            f"about {per_step / largest:.0f} times in one step; lower training.batch_size"
            if per_step >= 2 * largest
            else f"a step takes {per_step} examples, more than the {largest} of the largest "
            "client; lower training.batch_size"
        )
    if config.evaluation.central and len(data.source.eval):
        found = overlap(data.source.train, data.source.eval)
        if found.share >= _OVERLAP_SHARE:
            lines.append(
                f"{found.equal} of {found.num_held_out} held-out records are training records, and "
                f"{found.near} nearly so: scores count what was learnt by heart; take them out of "
                "data.eval_path or of the training records"
            )
    return lines


def scored_on_one(config: Config, sizes: Mapping[str, int]) -> list[str]:
    """A warning if clients score the adapter on a single record each.

    Args:
        sizes: training examples by client, without the held-out ones.
    """
    if not config.evaluation.clients:
        return []
    fraction = config.data.validation_fraction
    single = sorted(name for name, size in sizes.items() if round((size + 1) * fraction) <= 1)
    if not single:
        return []
    more = f" and {len(single) - 3} more" if len(single) > 3 else ""
    return [
        f"evaluation.clients: {', '.join(single[:3])}{more} score the adapter on one record each "
        f"(data.validation_fraction={fraction:g} of their own); raise it, or rely on the central "
        "scores"
    ]


def first_refusal(configs: Sequence[Config]) -> None:
    """`check_fit` for several runs, once for runs that differ only in their seed or algorithm.

    Raises:
        FedLLMError: the error of the first invalid run.
    """
    seen: set[str] = set()
    for config in configs:
        parts = [config.model, config.lora, config.quantization, config.data, config.training]
        parts += [config.partition, config.federation, config.evaluation, config.task]
        key = repr([*parts, config.init_adapter, task_of(config).adapter_paths(config)])
        if key not in seen:
            seen.add(key)
            check_fit(config)
