"""What an entry of the cache of scores is found by."""

import shutil
from pathlib import Path

import pytest

import fedllm_flwr
from fedllm_flwr.evaluation.suites.score_cache import code_identity

PACKAGE = Path(fedllm_flwr.__file__).parent


@pytest.mark.parametrize(
    "module",
    [
        "data/templates.py",
        "data/tokens.py",
        "data/choices.py",
        "models/adapted_model.py",
        "models/scoring.py",
        "models/generation.py",
        "evaluation/suites/suite_model.py",
        "evaluation/suites/tasks/finance.py",
    ],
)
def test_scores_are_made_anew_when_the_code_behind_them_changes(
    module: str, tmp_path: Path
) -> None:
    """Prompts, tokens, log-probabilities and the reading of answers, in any of their modules."""
    changed = tmp_path / "package"
    for part in ("data", "models", "evaluation"):
        shutil.copytree(PACKAGE / part, changed / part)
    assert code_identity(changed) == code_identity(PACKAGE)
    code_identity.cache_clear()
    (changed / module).write_text((changed / module).read_text() + "\n# another version\n")
    assert code_identity(changed) != code_identity(PACKAGE)
