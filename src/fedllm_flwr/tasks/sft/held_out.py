"""Scores on held-out instructions: loss, token accuracy, and classification by likelihood."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedllm_flwr.config import Config
from fedllm_flwr.data.choices import EncodedChoices, encode_choices
from fedllm_flwr.data.encode import Encoded
from fedllm_flwr.data.poison import target_of, triggered
from fedllm_flwr.data.records import Messages
from fedllm_flwr.data.templates import Tokenizer
from fedllm_flwr.models.adapted_model import AdaptedModel
from fedllm_flwr.models.scoring import Question, score, score_examples
from fedllm_flwr.params import Params
from fedllm_flwr.tasks.base import Scores


@dataclass(frozen=True)
class Backdoor:
    """Held-out records with a backdoor's trigger; none of them has the target answer."""

    choices: EncodedChoices
    target: int  # index into data.labels


@dataclass(frozen=True)
class EvaluationSet:
    """Encoded held-out records; with ``choices`` and ``targets`` if answers are classes."""

    examples: Encoded
    choices: EncodedChoices | None
    targets: NDArray[np.int64]  # (scored records,): index into data.labels
    backdoor: Backdoor | None = None

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def metrics(self) -> tuple[str, ...]:
        """The main scores, most important first."""
        if self.choices is None:
            return ("loss",)
        attack = () if self.backdoor is None else ("attack_success",)
        return ("loss", "accuracy", "macro_f1", *attack)

    @property
    def num_prompts(self) -> int:
        """No answers are generated."""
        return 0

    def side_by_side(self, model: AdaptedModel, params: Params, label: str) -> str:
        """Nothing."""
        return ""

    def score(self, model: AdaptedModel, batch_tokens: int) -> Scores:
        """Scores of the model with its current adapter.

        These are loss (nats per answer token), perplexity and token_accuracy; with classes also
        accuracy and macro_f1 of the most likely label; with a backdoor attack_success, the fraction
        of triggered records for which the target is most likely.
        """
        tokens = score_examples(model, self.examples, batch_tokens)
        scores: Scores = {
            "loss": tokens.loss,
            "perplexity": math.exp(min(tokens.loss, 700.0)),
            "token_accuracy": tokens.token_accuracy,
        }
        if self.choices is not None:
            scores |= classification_scores(
                _chosen(model, self.choices, batch_tokens), self.targets
            )
        if self.backdoor is not None:
            chosen = _chosen(model, self.backdoor.choices, batch_tokens)
            scores["attack_success"] = float((chosen == self.backdoor.target).mean())
        return scores


def _chosen(model: AdaptedModel, choices: EncodedChoices, batch_tokens: int) -> NDArray[np.int64]:
    """Index of the most likely label of each record."""
    questions = map(Question, choices.prompts, choices.answers)
    found = score(model, [*questions], batch_tokens)
    likelihoods = np.array([[answer.log_prob for answer in some] for some in found])
    return np.asarray(likelihoods.argmax(-1))


def make_evaluation_set(
    config: Config, tokenizer: Tokenizer, records: object, encoded: Encoded
) -> EvaluationSet:
    """Encode the candidate labels; records whose answer is not a known label are not scored.

    Args:
        records: a data set with columns messages and choice.
        encoded: the same records, encoded for training.
    """
    chosen = np.array(records["choice"][:], np.int64)  # type: ignore[index]
    scored = np.flatnonzero(chosen >= 0)
    if not config.data.labels or not len(scored):
        return EvaluationSet(encoded, None, np.empty(0, np.int64))
    messages = records["messages"][:]  # type: ignore[index]

    def choices_of(conversations: list[Messages]) -> EncodedChoices:
        data, length = config.data, config.training.max_length
        return encode_choices(conversations, data.labels, tokenizer, data.template, length)

    backdoor = None
    if config.attack.name == "backdoor":
        target = config.data.labels.index(target_of(config))
        others = [triggered(messages[i], config.attack) for i in scored if chosen[i] != target]
        backdoor = Backdoor(choices_of(others), target) if others else None
    return EvaluationSet(
        encoded, choices_of([messages[i] for i in scored]), chosen[scored], backdoor
    )


def classification_scores(predicted: NDArray[np.int64], targets: NDArray[np.int64]) -> Scores:
    """Accuracy, and F1 averaged over the classes that occur, as in scikit-learn."""
    right = predicted == targets
    classes = np.union1d(predicted, targets)[:, None]
    is_target, is_predicted = targets == classes, predicted == classes
    f1 = 2 * (is_target & right).sum(1) / (is_target.sum(1) + is_predicted.sum(1))
    return {"accuracy": float(right.mean()), "macro_f1": float(f1.mean())}
