"""Pretraining of the demo's model: a small Llama on the generated text."""

import itertools
import math
from collections.abc import Iterator

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from scripts.build_demo.corpus import Document
from scripts.build_demo.tokenizer import CONTEXT

SEED = 20240210
THREADS = 1  # part of the result: another number sums in another order
STEPS = 1500
BATCH_TOKENS = 2048
ROW_TOKENS = 256
LONG_EVERY = 16  # steps
LEARNING_RATE = 2e-3
WARMUP_STEPS = 100
WEIGHT_DECAY = 0.05
LOG_EVERY = 50
IGNORED = -100  # what the loss of transformers passes over


def pretrain(documents: Iterator[Document], tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Train a new model from ``documents``; returns it in bfloat16."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(True)
    model = LlamaForCausalLM(_config(tokenizer))
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY
    )
    batches = _batches(documents, tokenizer)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * _schedule(step)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**next(batches)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % LOG_EVERY == 0 or step == STEPS - 1:
            print(f"step {step:5d} of {STEPS}   loss {loss.item():.3f}", flush=True)
    model.bfloat16()
    return model


def _config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=448,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.06,  # about 1 / sqrt(hidden_size)
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _schedule(step: int) -> float:
    """Factor of the learning rate: linear warm-up, then half a cosine down to nearly nothing."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    return 0.5 * (1 + math.cos(math.pi * (step - WARMUP_STEPS) / (STEPS - WARMUP_STEPS)))


def _batches(
    documents: Iterator[Document], tokenizer: PreTrainedTokenizerFast
) -> Iterator[dict[str, torch.Tensor]]:
    """Documents, each between BOS and EOS, in rows; inputs of the model by name.

    No document sees another one: small models learn much faster so. One batch in LONG_EVERY has
    rows of the whole context instead, where all is seen, so that every position is learned.
    """
    stream = _stream(documents, tokenizer)
    for step in itertools.count():
        columns = zip(*itertools.islice(stream, BATCH_TOKENS), strict=True)
        length = CONTEXT if step % LONG_EVERY == 0 else ROW_TOKENS
        tokens, targets, owner, position = (
            torch.tensor(column).view(-1, length) for column in columns
        )
        batch = {"input_ids": tokens, "labels": targets}
        if length == ROW_TOKENS:
            own = owner[:, None, :, None] == owner[:, None, None, :]  # (rows, 1, query, key)
            batch["attention_mask"] = own & torch.ones(length, length, dtype=torch.bool).tril()
            batch["position_ids"] = position
        yield batch


def _stream(
    documents: Iterator[Document], tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[int, int, int, int]]:
    """Token by token: its id, its target (IGNORED in a context), its document, its position."""
    for number, document in enumerate(documents):
        context = tokenizer(document.context)["input_ids"]
        text = tokenizer(document.text + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
        targets = [IGNORED] * len(context) + text
        for position, (token, target) in enumerate(zip(context + text, targets, strict=True)):
            yield token, target, number, position
