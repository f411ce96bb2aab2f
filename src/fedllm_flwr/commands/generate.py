"""``fedllm generate``: answers of the base model and the adapter, side by side."""

from collections.abc import Sequence

from fedllm_flwr.data.encode import encode_prompts
from fedllm_flwr.models.adapted_model import load_model
from fedllm_flwr.models.generation import Decoding, as_text, generate
from fedllm_flwr.runs.adapter_files import load_kept
from fedllm_flwr.runs.kept_adapters import KeptAdapter


def answer_side_by_side(kept: KeptAdapter, prompts: Sequence[str], max_new_tokens: int) -> None:
    """Print the greedy answers to each prompt, using the adapter's training template.

    Raises:
        FedLLMError: the model or the adapter cannot be loaded.
    """
    config = kept.config
    model = load_model(config)
    model.load(load_kept(kept, model))
    name = {"local": "local", "centralized": "centralized"}.get(config.algorithm.name, "federated")
    for prompt in prompts:
        messages = [[{"role": "user", "content": prompt}]]
        room = config.training.max_length
        tokens = encode_prompts(messages, model.tokenizer, config.data.template, room)[0]
        with model.peft.disable_adapter():
            base = generate(model, [tokens], Decoding(max_new_tokens))[0]
        print(f"prompt     {prompt}\n{'base':<10} {as_text(model, base)}")
        answer = generate(model, [tokens], Decoding(max_new_tokens))[0]
        print(f"{name:<10} {as_text(model, answer)}\n")
