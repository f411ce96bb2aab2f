"""Directory of simulated clients' memory of a run, named by the simulation.

The directory lies in that of the run, and a note with its path goes with every message to a
simulated client: its worker process may be older than the run, or run on another machine. A site
reads no such note, see `Site.memory_folder`.
"""

from pathlib import Path

from flwr.app import ConfigRecord, RecordDict

_RECORD, _KEY = "simulation", "state_dir"


def add_state_dir(content: RecordDict, state_dir: Path) -> None:
    """Note in a message to a simulated client where clients keep their memory of the run."""
    content[_RECORD] = ConfigRecord({_KEY: str(state_dir.resolve())})


def noted_state_dir(content: RecordDict) -> Path | None:
    """The directory that is noted in a message; None where this machine does not have the run's.

    That is so on another machine of a Ray cluster without a shared file system.
    """
    if _RECORD not in content.config_records:
        return None
    state_dir = Path(str(content.config_records[_RECORD][_KEY]))
    return state_dir if state_dir.parent.is_dir() else None
