"""Pretraining of the demo's model: a small Llama on the generated text."""

import math
from collections.abc import Iterator

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from scripts.build_demo.tokenizer import CONTEXT

SEED = 20240210
THREADS = 1  # part of the result: another number sums in another order
STEPS = 1500
BATCH_TOKENS = 2048
ROW_TOKENS = 256
LEARNING_RATE = 3e-3
WARMUP_STEPS = 50
WEIGHT_DECAY = 0.05
LOG_EVERY = 50


def pretrain(documents: Iterator[str], tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
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
        tokens = next(batches)
        # Some long rows, so that every position of the context has been seen.
        rows = tokens.view(-1, CONTEXT if step % 8 == 0 else ROW_TOKENS)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % LOG_EVERY == 0 or step == STEPS - 1:
            print(f"step {step:5d} of {STEPS}   loss {loss.item():.3f}", flush=True)
    model.to(torch.bfloat16).eval()
    return model


def _config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
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
    documents: Iterator[str], tokenizer: PreTrainedTokenizerFast
) -> Iterator[torch.Tensor]:
    """Documents, each between BOS and EOS, as one stream cut into (BATCH_TOKENS,)."""
    pending: list[int] = []
    while True:
        while len(pending) < BATCH_TOKENS:
            texts = [next(documents) + tokenizer.eos_token for _ in range(256)]
            for tokens in tokenizer(texts)["input_ids"]:
                pending += tokens
        yield torch.tensor(pending[:BATCH_TOKENS])
        pending = pending[BATCH_TOKENS:]
