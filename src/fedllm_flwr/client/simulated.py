"""Notes in the messages of a simulation: the client's index and the directory of client memory.

The server partitions its own data into simulated clients, so it knows all of them without asking
(`federation.census.known`). A simulated node acts as the client that a message names. Client memory
is in the run's directory, whose path is part of each message because a worker process may be older
than the run, or run on another machine. Sites ignore such notes, see `Site.memory_folder`.
"""

from pathlib import Path

from flwr.app import ConfigRecord, RecordDict

_RECORD, _STATE_DIR, _INDEX = "simulation", "state_dir", "client"


def add_note(content: RecordDict, state_dir: Path, index: int) -> None:
    """Add to a message the index of its client, and the directory of client memory."""
    content[_RECORD] = ConfigRecord({_STATE_DIR: str(state_dir.resolve()), _INDEX: index})


def noted_state_dir(content: RecordDict) -> Path | None:
    """The directory of client memory in a message; None if this machine does not have it.

    That is the case on another machine of a Ray cluster without a shared file system.
    """
    if _RECORD not in content.config_records:
        return None
    state_dir = Path(str(content.config_records[_RECORD][_STATE_DIR]))
    return state_dir if state_dir.parent.is_dir() else None


def noted_index(content: RecordDict) -> str | None:
    """The index of a message's client; None if the message has none."""
    if _RECORD not in content.config_records:
        return None
    return str(content.config_records[_RECORD][_INDEX])
