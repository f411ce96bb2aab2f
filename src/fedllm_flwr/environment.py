"""Settings of the process, such as telemetry and threads; call before libraries are imported."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_VARIABLES = {
    # Idle threads sleep. With spinning threads, two processes on the same cores are up to ten times
    # slower than if they ran one after the other.
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "true",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
_CHATTY = ("bitsandbytes", "ray", "httpx", "datasets", "accelerate")


@contextmanager
def hidden(*packages: str) -> Iterator[None]:
    """Let imports in the block not find these packages, unless they have already been imported.

    Libraries import optional packages that are installed, whether or not they are going to be used.
    """
    absent = [name for name in packages if name not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


def prepare_environment() -> None:
    """Make idle threads sleep, disable telemetry, and silence verbose libraries.

    Variables that are already set are not changed.
    """
    for name, value in _VARIABLES.items():
        os.environ.setdefault(name, value)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # Under `flwr run`, nothing else reports that the engine failed.
    logging.getLogger("flwr").setLevel(logging.ERROR)
    for category in (FutureWarning, DeprecationWarning, UserWarning):
        warnings.filterwarnings("ignore", category=category)
