"""Division of a step into micro-batches, and the forms in which they reach the model."""

from itertools import combinations, pairwise

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm_flwr.data.encode import Encoded, EncodeReport
from fedllm_flwr.models.inputs import IGNORED, collate_packed, collate_padded, needed_logits
from fedllm_flwr.training.batches import round_batches, split_step
from fedllm_flwr.training.group import Group

LENGTHS = st.lists(st.integers(2, 60), min_size=1, max_size=9)


def encoded(lengths: list[int], seed: int) -> Encoded:
    """Random examples; each has at least one supervised token after the first."""
    rng = np.random.default_rng(seed)
    total, count = sum(lengths), len(lengths)
    masks = [np.append(rng.random(length - 1) < 0.5, True) for length in lengths]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    supervised = np.concatenate(masks)
    report = EncodeReport(count, count, 0, 0, total, int(supervised.sum()))
    tokens = rng.integers(1, 1000, total).astype(np.int32)
    return Encoded(tokens, supervised, offsets, np.arange(count), report)


def padded_size(batches: list[list[int]], lengths: list[int]) -> int:
    return sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)


def allowed_divisions(lengths: list[int], count: int) -> list[list[list[int]]]:
    """All divisions of the sorted examples into `count` parts, none beyond the memory bound."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    bound = -(-len(order) // count) * max(lengths)
    divisions = []
    for cuts in combinations(range(1, len(order)), count - 1):
        edges = [0, *cuts, len(order)]
        parts = [order[a:b] for a, b in pairwise(edges)]
        if all(len(part) * lengths[part[-1]] <= bound for part in parts):
            divisions.append(parts)
    return divisions


@given(LENGTHS, st.integers(1, 10))
@settings(deadline=None, max_examples=150)
def test_the_division_is_complete_bounded_and_the_best_of_all(
    lengths: list[int], count: int
) -> None:
    array = np.array(lengths, np.int64)
    batches = split_step(range(len(lengths)), array, count)

    count = min(count, len(lengths))
    assert len(batches) == count
    assert all(batches)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    in_order = [lengths[i] for batch in batches for i in batch]
    assert in_order == sorted(in_order)
    best = min(padded_size(parts, lengths) for parts in allowed_divisions(lengths, count))
    assert padded_size(batches, lengths) == best


@given(st.integers(1, 30), st.integers(1, 8))
@settings(deadline=None)
def test_equal_lengths_never_make_a_micro_batch_larger_than_asked(count: int, size: int) -> None:
    lengths = np.full(count, 512, np.int64)
    batches = split_step(range(count), lengths, -(-count // size))
    assert max(map(len, batches)) <= size


@given(LENGTHS, st.integers(0, 99))
@settings(deadline=None)
def test_padded_and_packed_hold_the_same_predictions(lengths: list[int], seed: int) -> None:
    examples = encoded(lengths, seed)
    batch = list(range(len(lengths)))[::-1]
    expected = [
        (tuple(examples[i][0][:t].tolist()), int(examples[i][0][t]))
        for i in batch
        for t in range(1, lengths[i])
        if examples[i][1][t]
    ]
    assert predictions(collate_padded(examples, batch, pad_id=0)) == expected
    packed = collate_packed(examples, batch)
    assert predictions(packed) == expected
    assert packed["input_ids"].shape == (1, sum(lengths))


def predictions(inputs: dict[str, torch.Tensor]) -> list[tuple[tuple[int, ...], int]]:
    """(context, next token) of every label, as a causal model with this mask sees them."""
    found = []
    ids, labels = inputs["input_ids"], inputs["labels"]
    for row in range(ids.shape[0]):
        for t in range(1, ids.shape[1]):
            if labels[row, t] == IGNORED:
                continue
            start = (
                t - 1 - int(inputs["position_ids"][row, t - 1]) if "position_ids" in inputs else 0
            )
            if "attention_mask" in inputs:
                assert inputs["attention_mask"][row, : t + 1].all()
            found.append((tuple(ids[row, start:t].tolist()), int(labels[row, t])))
    return found


@given(LENGTHS, st.integers(0, 99))
@settings(deadline=None)
def test_needed_logits_keeps_every_label_and_no_empty_position(
    lengths: list[int], seed: int
) -> None:
    inputs = collate_padded(encoded(lengths, seed), list(range(len(lengths))), pad_id=0)
    needed = needed_logits(inputs)
    kept, wanted = needed["logits_to_keep"], needed["shift_labels"]

    whole = torch.full_like(inputs["labels"], IGNORED)
    whole[:, kept + 1] = wanted
    assert torch.equal(whole[:, 1:], inputs["labels"][:, 1:])
    assert (wanted != IGNORED).any(0).all()


@given(
    st.lists(st.integers(1, 50), min_size=12, max_size=12),
    st.integers(1, 12),
    st.sampled_from([1, 2, 3, 6]),
)
@settings(deadline=None)
def test_processes_divide_every_step_among_them(
    lengths: list[int], size: int, processes: int
) -> None:
    drawn = np.arange(12, dtype=np.int64)  # two steps of six
    whole = round_batches(drawn, np.array(lengths, np.int64), 2, size, False, processes)
    shares = [whole.share(Group(rank, processes)) for rank in range(processes)]

    assert {(share.num_steps, share.items_per_step) for share in shares} == {(2, 6)}
    for step in (0, 1):
        parts = [
            i
            for share in shares
            for batch in share.batches[step * share.per_step : (step + 1) * share.per_step]
            for i in batch
        ]
        assert sorted(parts) == list(range(6 * step, 6 * step + 6))
    assert {share.num_tokens for share in shares} == {sum(lengths)}


@given(st.lists(st.integers(1, 50), min_size=8, max_size=8), st.integers(1, 8))
@settings(deadline=None)
def test_a_round_counts_its_tokens(lengths: list[int], size: int) -> None:
    drawn = np.array([3, 1, 4, 1, 5, 0, 2, 6], np.int64)  # two steps of four
    array = np.array(lengths, np.int64)
    padded, packed = (round_batches(drawn, array, 2, size, packed) for packed in (False, True))

    real = sum(lengths[i] for i in drawn)
    assert padded.num_tokens == packed.num_tokens == packed.computed_tokens == real
    assert padded.computed_tokens == padded_size(padded.batches, lengths)
    assert padded.per_step == -(-4 // min(size, 4))
    steps = [padded.batches[i : i + padded.per_step] for i in (0, padded.per_step)]
    assert [sorted(i for part in step for i in part) for step in steps] == [
        [1, 1, 3, 4],
        [0, 2, 5, 6],
    ]
