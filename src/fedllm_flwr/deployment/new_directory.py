"""Creates operators' directories, with all files or none; never overwrites anything."""

import contextlib
import getpass
import os
import shlex
import string
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedllm_flwr.config.names import shown
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.federation.messages import SITE_NAME, SITE_NAME_RULE

PUBLIC, SECRET, PROGRAM = 0o644, 0o600, 0o755  # permissions of files
_PRIVATE_DIRECTORY = 0o700
_TEMPLATES = Path(__file__).parent / "templates"
FLWR_HOME = "flwr"  # Flower's own files, inside a server's or site's directory
_NVIDIA = """\
DevicePolicy=closed
DeviceAllow=char-nvidia* rw
DeviceAllow=char-nvidia-uvm rw
"""


class _Template(string.Template):
    """A template with values ``@{name}``, which leaves the dollars of shell scripts alone."""

    delimiter = "@"


@dataclass(frozen=True)
class NewFile:
    """A file to write; `mode` are its permissions, independent of the umask."""

    content: str | bytes
    mode: int = PUBLIC


def absolute(path: str | Path) -> Path:
    """An absolute path that is safe in scripts and unit files.

    Raises:
        ConfigError: it contains a line break or another control character.
    """
    resolved = Path(path).expanduser().resolve()
    if not str(resolved).isprintable():
        raise ConfigError(f"{shown(str(resolved))}: control characters in a path; give another")
    return resolved


def filled(template: str, **values: str) -> str:
    """A file of ``templates/`` with its values filled in."""
    return _Template((_TEMPLATES / template).read_text("utf-8")).substitute(values)


def program_folder() -> str:
    """Directory of Flower's programs, next to this Python, quoted for a shell."""
    return shlex.quote(str(Path(sys.executable).parent))


def python_program() -> str:
    """This Python, quoted for a shell."""
    return shlex.quote(sys.executable)


def systemd_unit(
    folder: Path, script: str, description: str, after: str, restart_s: int, gpu: bool = False
) -> str:
    """A hardened unit that runs a script of an operator's directory.

    Args:
        gpu: whether the service may use NVIDIA devices; otherwise it can access no device.
    """
    return filled(
        "systemd.service",
        description=description,
        after=after,
        program=systemd_quoted(folder / script),
        restart_s=str(restart_s),
        user=getpass.getuser(),
        folder=_systemd_escaped(folder),
        cache=_systemd_escaped(folder / "cache"),
        devices=_NVIDIA if gpu else "PrivateDevices=yes\n",
    )


def systemd_quoted(path: Path) -> str:
    """A path as one argument in a unit file; systemd allows no quotes in a program's name."""
    return f'"{_systemd_escaped(path)}"'.replace("$", "$$")


def _systemd_escaped(path: Path) -> str:
    """Escape a path for double quotes in a unit file, without variable expansion."""
    return str(path).replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")


def check_name(name: str, option: str) -> None:
    """Reject a site's name that is not usable as a file name and as a label in tables.

    Raises:
        ConfigError: it has invalid characters or is too long.
    """
    if not SITE_NAME.fullmatch(name):
        raise ConfigError(f"{option} {shown(name)}: {SITE_NAME_RULE}")


def check_new(directory: Path) -> None:
    """Require that a directory does not exist or is empty.

    Raises:
        ConfigError: it is a file, or a directory that is not empty.
    """
    if directory.is_dir() and not any(directory.iterdir()):
        return
    if directory.exists() or directory.is_symlink():
        what = "not empty" if directory.is_dir() else "not a directory"
        raise ConfigError(
            f"{directory}: {what}; give a new directory, keys and certificates are never "
            "overwritten"
        )


def write_new(directory: Path, files: Mapping[str, NewFile]) -> None:
    """Create a directory with `files` that only its owner can enter; an error leaves nothing.

    Raises:
        ConfigError: the directory is not new, or cannot be written.
    """
    check_new(directory)
    existed = directory.exists()
    written: list[Path] = []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        directory.chmod(_PRIVATE_DIRECTORY)
        for name, file in files.items():
            path = directory / name
            for folder in reversed(path.relative_to(directory).parents[:-1]):
                if not (directory / folder).exists():
                    (directory / folder).mkdir(_PRIVATE_DIRECTORY)
                    written.append(directory / folder)
            content = file.content.encode() if isinstance(file.content, str) else file.content
            # O_EXCL: nothing is overwritten, and a key is never readable by others.
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
            descriptor = os.open(path, flags, file.mode & SECRET)
            written.append(path)
            with os.fdopen(descriptor, "wb") as stream:
                os.fchmod(descriptor, file.mode)
                stream.write(content)
    except OSError as error:
        # Remove the files, and then their folders.
        for path in reversed(written if existed else [directory, *written]):
            with contextlib.suppress(OSError):  # it was not created
                path.rmdir() if path.is_dir() else path.unlink()
        raise ConfigError(
            f"{directory}: cannot be written ({error.strerror or error}); give another directory"
        ) from error
