"""What a simulation notes in its messages: who the client is, and where it keeps its memory.

The server divides its own data among simulated clients, so that it knows all of them without asking
(`federation.census.known`); a node of the simulation is whichever client a message names. The
directory of the clients' memory lies in that of the run, and travels with each message: a worker
process may be older than the run, or run on another machine. A site reads no such note, see
`Site.memory_folder`.
"""

from pathlib import Path

from flwr.app import ConfigRecord, RecordDict

_RECORD, _STATE_DIR, _INDEX = "simulation", "state_dir", "client"


def add_note(content: RecordDict, state_dir: Path, index: int) -> None:
    """Note in a message which of the run's clients it is for, and where they keep their memory."""
    content[_RECORD] = ConfigRecord({_STATE_DIR: str(state_dir.resolve()), _INDEX: index})


def noted_state_dir(content: RecordDict) -> Path | None:
    """The directory that is noted in a message; None where this machine does not have the run's.

    That is so on another machine of a Ray cluster without a shared file system.
    """
    if _RECORD not in content.config_records:
        return None
    state_dir = Path(str(content.config_records[_RECORD][_STATE_DIR]))
    return state_dir if state_dir.parent.is_dir() else None


def noted_index(content: RecordDict) -> str | None:
    """Which of the run's clients a message is for; None where it does not say."""
    if _RECORD not in content.config_records:
        return None
    return str(content.config_records[_RECORD][_INDEX])
