"""One client's round: from the server's assignment to the client's update."""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fedllm_flwr.client.optimisation import Optimisation
from fedllm_flwr.client.processes import processes
from fedllm_flwr.config import Config
from fedllm_flwr.data.client_data import ClientData
from fedllm_flwr.errors import ConfigError, DataError, FederationError, ModelError, RefusedError
from fedllm_flwr.factors import folded
from fedllm_flwr.federation.client_memory import ClientMemory
from fedllm_flwr.federation.masked_round import as_decoded
from fedllm_flwr.federation.messages import FROZEN, Assignment, Update
from fedllm_flwr.federation.rule import Rule, find_rule
from fedllm_flwr.federation.updates.transform import Chain, Passage
from fedllm_flwr.models.adapted_model import AdaptedModel, load_model
from fedllm_flwr.models.device import can_pack, micro_batch_size, torch_threads
from fedllm_flwr.params import Groups, Kept, Params, add, derive_seed, digest, subtract
from fedllm_flwr.tasks import task_of
from fedllm_flwr.tasks.base import LocalWork, TrainingTask
from fedllm_flwr.training.batches import RoundBatches, round_batches
from fedllm_flwr.training.drift import DriftCorrection
from fedllm_flwr.training.local_terms import LocalResult, LocalTerms
from fedllm_flwr.training.momentum import MOMENTUM, with_momentum, worker_momentum
from fedllm_flwr.training.private import poisson_batches
from fedllm_flwr.training.schedule import draw_examples, steps_per_round
from fedllm_flwr.training.trainer import Trained

logger = logging.getLogger(__name__)

Drawn = NDArray[np.int64]


def train_locally(assignment: Assignment, data: ClientData, state_dir: Path) -> Update:
    """Train the global adapter on the client's examples and return the update.

    Args:
        state_dir: directory of this client's memory between rounds.

    Raises:
        FedLLMError: the data or the model do not allow the requested training.
    """
    with torch_threads(assignment.config.federation.threads_per_process):
        while True:
            try:
                return _train(assignment, data, state_dir)
            except torch.OutOfMemoryError:
                if not _halve(assignment.config):
                    raise
            torch.cuda.empty_cache()  # after the traceback, which holds on to tensors


def _halve(config: Config) -> bool:
    """Whether the round can be tried again, with half as many examples per forward pass."""
    model, rows = load_model(config), task_of(config).rows_per_example
    asked = micro_batch_size(config.training, model.device, model.num_base_parameters, rows)
    size = min(asked, model.most_together or asked) // 2
    if not size or config.privacy.unit == "record":
        return False
    model.most_together = size
    logger.warning("out of memory; trying again with training.micro_batch_size=%d", size)
    return True


def completed(assignment: Assignment, rule: Rule, model: AdaptedModel) -> Assignment:
    """The assignment, with the adapter tensors added that the client draws from the seed itself.

    Raises:
        FederationError: these tensors differ from the server's.
    """
    if not assignment.seeded:
        return assignment
    own = {name: value for name, value in model.initial.items() if rule.is_fixed(name)}
    if digest(own) != assignment.seeded:
        text = (
            "the initial adapter that this client draws from the run's seed differs from the "
            "server's; install the same version of torch on both, or send the adapter: "
            "init_adapter=<adapter>"
        )
        raise FederationError(text, text)
    return replace(assignment, params={**own, **assignment.params})


def check_sent(assignment: Assignment, rule: Rule, task: TrainingTask, model: AdaptedModel) -> None:
    """Reject an assignment with unexpected or missing groups of tensors, or with wrong shapes.

    Raises:
        FederationError: a group is unexpected or missing.
        ModelError: a group does not fit the adapter.
    """
    sent, own = assignment.sent.keys(), {FROZEN} if rule.freezes else set()
    wrong = [f"it lacks {name!r}, which the algorithm needs" for name in rule.sends - sent]
    wrong += [
        f"it contains {name[:100]!r}, which neither the algorithm nor the task uses"
        for name in sorted(sent - rule.sends - task.adapters.keys() - own)
    ]
    if wrong:
        raise FederationError(wrong[0], wrong[0])
    for name, params in assignment.tensors.items():
        if name == FROZEN:
            model.check_frozen(params)
        else:
            model.check(folded(params) if rule.has_cores else params, name)


@dataclass(frozen=True)
class _LocalRound:
    """A round of one client, ready to train: what was sent, remembered and drawn.

    Attributes:
        prepared: what the task has made of the drawn examples, by kind of client memory.
    """

    assignment: Assignment
    data: ClientData
    rule: Rule
    task: TrainingTask
    memory: ClientMemory
    work: LocalWork
    prepared: Mapping[str, Kept]

    @classmethod
    def begin(cls, assignment: Assignment, data: ClientData, state_dir: Path) -> "_LocalRound":
        """Check what was sent, recall the client's memory, and draw the round's examples.

        Raises:
            FedLLMError: the data, the model or the memory cannot be used as asked.
        """
        config = assignment.config
        if not len(data.train):
            raise DataError(f"{data.name} has no usable training example")
        processes.start(config)
        model, rule, task = load_model(config), find_rule(config.algorithm), task_of(config)
        assignment = completed(assignment, rule, model)
        check_sent(assignment, rule, task, model)
        _check_fit(data, model, config)
        memory = ClientMemory.recall(assignment, state_dir, rule.remembers)
        if assignment.session is not None and memory.lost:
            text = (
                "secure aggregation: it has lost its memory of the run, and the server cannot "
                "subtract a share that it has never seen; the run continues without this client"
            )
            raise FederationError(text, text)
        drawn, batches = _drawn_batches(assignment, data, model, task)
        work = LocalWork(
            config=config,
            model=model,
            examples=data.train,
            drawn=drawn,
            batches=batches,
            # While a rule estimates, a step of size 0 leaves the adapter as it is.
            learning_rate=0.0 if rule.estimates(assignment.round) else assignment.learning_rate,
            seed=derive_seed(config.seed, "dropout", assignment.round, data.name),
            tensors=assignment.tensors,
            remembered=memory.kept,
        )
        return cls(assignment, data, rule, task, memory, work, task.prepare(work))

    def optimise(self, terms: LocalTerms) -> tuple[Params, DriftCorrection, Trained]:
        """Train with these terms; return the adapter, the drift correction and the metrics."""

        def trains(name: str) -> bool:
            chosen = terms.trains is None or terms.trains(name)
            return chosen and self.rule.trains(name, self.assignment.round)

        chosen = frozenset(filter(trains, terms.start))
        whole = Optimisation(self.work, self.prepared, terms, chosen)
        with processes.share(whole) as own:
            drift, trained = own.run()
        return self.work.model.params(), drift, trained

    def as_received(self, params: Params) -> Params:
        """Tensors as the server reads them from the wire."""
        session = self.assignment.session
        if session is not None:
            return as_decoded(params, session)
        return Chain.of(self.work.config).as_received(params)

    def leaving(self, contribution: Groups) -> tuple[dict[str, Params], dict[str, Kept]]:
        """A contribution after all update transforms, and the client memory that follows from it.

        Args:
            contribution: ``delta`` and the groups that the rule adds.
        """
        config, memory = self.work.config, self.memory.tensors
        chain = Chain.of(config)
        passage = Passage(self.data.name, self.assignment.round, config.seed, memory)
        groups, left = chain.client_end(contribution, passage)
        kept = {kind: Kept(tensors) for kind, tensors in left.items()}
        if self.rule.contributes and chain.links:  # memory changes by what arrives at the server
            received = {group: self.as_received(params) for group, params in groups.items()}
            arriving = chain.server_end(received, contribution, passage)
            for group, kind in self.rule.contributes.items():
                own = memory.get(kind) or {n: np.zeros_like(v) for n, v in arriving[group].items()}
                kept[kind] = Kept(add(own, arriving[group]))
        return dict(groups), kept


def _train(assignment: Assignment, data: ClientData, state_dir: Path) -> Update:
    started = time.monotonic()
    local = _LocalRound.begin(assignment, data, state_dir)
    assignment, rule, memory, work = local.assignment, local.rule, local.memory.tensors, local.work
    config, received = work.config, assignment.tensors

    params, drift, trained = local.optimise(rule.local_terms(received, memory))
    metrics = {"loss": trained.loss, **trained.metrics}
    kept = {kind: local.prepared[kind] for kind in local.task.remembers}
    result = LocalResult(
        params=params,
        delta=subtract(params, assignment.params),
        mean_gradient=drift.mean_gradient(),
        steps=drift.steps,
        learning_rate=assignment.learning_rate,
        optimizer=config.training.optimizer,
    )
    after = rule.finish(result, received, memory, local.as_received)
    kept |= {kind: Kept(tensors) for kind, tensors in after.memory.items()}
    personal = rule.personal_terms(received, memory)
    if personal is not None and rule.personal is not None:
        adapter, _, trained = local.optimise(personal)
        kept[rule.personal] = Kept(adapter)
        metrics["personal_loss"] = trained.loss

    delta = result.mean_gradient if rule.estimates(assignment.round) else result.delta
    if decay := worker_momentum(config):
        delta = with_momentum(delta, memory.get(MOMENTUM), decay)
        kept[MOMENTUM] = Kept(delta)
    shared = {n: v for n, v in delta.items() if rule.shares(n, assignment.round)}
    groups, left = local.leaving({"delta": shared, **after.contributions})
    ClientMemory.keep(assignment, state_dir, kept | left)
    if config.privacy.at_clients and config.federation.engine == "deployment":
        metrics = {}  # they carry no privacy guarantee
    else:
        metrics |= {
            "tokens": float(work.batches.num_tokens),
            "computed_tokens": float(work.batches.computed_tokens),
            "seconds": time.monotonic() - started,
        }
    by_record = config.privacy.unit == "record"
    return Update(
        delta=groups.pop("delta"),
        num_examples=len(data.train) if by_record else len(np.unique(work.drawn)),
        contributed=groups,
        lost=local.memory.lost,
        metrics={**metrics, "steps": float(drift.steps)},
    )


def _drawn_batches(
    assignment: Assignment, data: ClientData, model: AdaptedModel, task: TrainingTask
) -> tuple[Drawn, RoundBatches]:
    """Indices of the round's examples, in drawing order, and its batches."""
    config, training = assignment.config, assignment.config.training
    if config.privacy.unit != "record":
        drawn = _draw(assignment, data)
        return drawn, _batches(config, data, model, drawn, task)
    steps = steps_per_round(training, len(data.train))
    per_step = training.batch_size * training.gradient_accumulation_steps
    batches = poisson_batches(data.train.source, data.train.lengths, steps, per_step)
    return np.array([i for step in batches.batches for i in step], np.int64), batches


def _check_fit(data: ClientData, model: AdaptedModel, config: Config) -> None:
    """Reject token ids and positions for which the base model has no embeddings."""
    vocabulary = model.peft.get_input_embeddings().weight.shape[0]
    largest, longest = len(data.train.token_counts) - 1, int(data.train.lengths.max())
    if largest >= vocabulary:
        raise ModelError(
            f"model.path={config.model.path}: its tokenizer produces token id {largest}, but the "
            f"model has {vocabulary} embeddings; use the tokenizer that belongs to the model.",
            "its tokenizer does not belong to its base model",
        )
    context = getattr(model.peft.get_base_model().config, "max_position_embeddings", None)
    asked = (
        f"training.max_length={config.training.max_length}, but the model takes {context} tokens"
    )
    remedy = f"set training.max_length={context}"
    if context is not None and config.federation.engine == "deployment":
        # The server must not learn whether the site has an example of this length.
        if config.training.max_length > context:
            raise RefusedError(f"{asked}; {remedy}")
    elif context is not None and longest > context:
        raise ConfigError(f"{asked} and {data.name} has {longest} in an example; {remedy}")


def _draw(assignment: Assignment, data: ClientData) -> Drawn:
    """Indices of the round's examples, in training order."""
    training, count = assignment.config.training, len(data.train)
    per_step = training.batch_size * training.gradient_accumulation_steps
    total = steps_per_round(training, count) * per_step
    updates, seed = assignment.acknowledged.updates, assignment.config.seed
    return draw_examples(count, total, updates, seed, data.draw_name(total))


def _batches(
    config: Config, data: ClientData, model: AdaptedModel, drawn: Drawn, task: TrainingTask
) -> RoundBatches:
    """The round's micro-batches."""
    examples, rows = data.train, task.rows_per_example
    steps = steps_per_round(config.training, len(examples))
    size = micro_batch_size(config.training, model.device, model.num_base_parameters, rows)
    size = min(size, model.most_together or size)
    wanted = config.training.packing
    packed = task.can_pack and (can_pack(model.attention) if wanted is None else wanted)
    count = config.federation.client_processes
    batches = round_batches(drawn, examples.lengths, steps, size, packed, count)
    return replace(
        batches,
        num_tokens=examples.num_tokens_of(drawn),
        computed_tokens=rows * batches.computed_tokens,
    )
