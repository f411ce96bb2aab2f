"""A byte-level BPE tokenizer of the demo's text; lossless on any text."""

from collections.abc import Iterable

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from fedllm_flwr.data.templates import TEXT_TEMPLATES

VOCABULARY_SIZE = 2048
PAD, BOS, EOS = "<pad>", "<s>", "</s>"
CONTEXT = 512  # tokens
# Words of the demo's task, which the pretraining text seldom has; repeated, they become tokens.
TASK_TEXTS = [
    "What is the sentiment of this news?",
    "Is this headline negative, neutral or positive?",
    "Classify the sentiment of the headline.",
]
TASK_REPEATS = 200

# The layout of the alpaca template, so that a chat reads like the text of the pretraining.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ messages[0].content }}"
    "{% else %}PREAMBLE{% endif %}"
    "{% for message in messages %}"
    "{% if message.role == 'user' %}"
    "{{ '\\n\\n### Instruction:\\n' + message.content + ' \\n\\n### Response:' }}"
    "{% elif message.role == 'assistant' %}{{ ' ' + message.content + eos_token }}"
    "{% endif %}{% endfor %}"
)


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Learn the merges from ``texts``. The alpaca preamble, in every prompt, is one token."""
    preamble = TEXT_TEMPLATES["alpaca"].preamble
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE - 1,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator((text.replace(preamble, "") for text in texts), trainer)
    backend.add_tokens([AddedToken(preamble, normalized=False)])
    backend.post_processor = TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, backend.token_to_id(BOS))],
    )
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE.replace("PREAMBLE", preamble),
    )
    return tokenizer
