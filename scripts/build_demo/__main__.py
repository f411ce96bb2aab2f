"""Command line: python -m scripts.build_demo OUTPUT [--data-only]."""

import argparse
import itertools
import time
from pathlib import Path

from scripts.build_demo.dataset import build_dataset, write_dataset
from scripts.build_demo.preferences import build_preferences
from scripts.build_demo.vocabulary import load_vocabulary

SEED = 20240210
TOKENIZER_DOCUMENTS = 20_000


def main() -> None:
    """Write OUTPUT/demo/*.jsonl and OUTPUT/tiny/."""
    parser = argparse.ArgumentParser(prog="python -m scripts.build_demo", description=__doc__)
    parser.add_argument("output", type=Path, help="directory for demo/ and tiny/")
    parser.add_argument("--data-only", action="store_true", help="leave the model out")
    arguments = parser.parse_args()
    vocabulary = load_vocabulary()
    splits = {**build_dataset(vocabulary), **build_preferences(vocabulary)}
    write_dataset(splits, arguments.output / "demo")
    if not arguments.data_only:
        start = time.perf_counter()
        _build_model(arguments.output / "tiny")
        print(f"{arguments.output / 'tiny'} made in {time.perf_counter() - start:.0f} s")


def _build_model(directory: Path) -> None:
    # Imported here: the data needs none of these heavy packages.
    from scripts.build_demo.corpus import Corpus
    from scripts.build_demo.pretrain import pretrain
    from scripts.build_demo.tokenizer import TASK_REPEATS, TASK_TEXTS, train_tokenizer

    vocabulary = load_vocabulary()
    sample = Corpus(vocabulary, f"{SEED} tokenizer").documents()
    texts = ["".join(document) for document in itertools.islice(sample, TOKENIZER_DOCUMENTS)]
    tokenizer = train_tokenizer(TASK_TEXTS * TASK_REPEATS + texts)
    model = pretrain(Corpus(vocabulary, f"{SEED} pretraining").documents(), tokenizer)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


if __name__ == "__main__":
    main()
