"""The room of a contained program: namespaces of its own, and a file system with little in it.

The program sees: the system's libraries, the Python installation and its packages (read-only), a
few harmless devices, and a /tmp of its own in memory. It sees no other file, no other process, no
network (not even loopback) and no /proc, has no capability and can make no further namespace.
"""

import contextlib
import os
from pathlib import Path

from fedllm_flwr.evaluation.sandbox import linux

NOBODY = 65534
_SYSTEM = ["/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32"]
_SYSTEM += ["/etc/ld.so.cache", "/etc/localtime", "/etc/alternatives", "/nix/store", "/gnu/store"]
_DEVICES = ("null", "zero", "full", "random", "urandom")
_NEW = linux.CLONE_NEWUSER | linux.CLONE_NEWNS | linux.CLONE_NEWPID | linux.CLONE_NEWNET
_NEW |= linux.CLONE_NEWIPC | linux.CLONE_NEWUTS
_HARMLESS = linux.MS_NOSUID | linux.MS_NODEV


def leave() -> None:
    """Enter new namespaces; children of this process are born in the new process namespace."""
    linux.unshare(_NEW)


def map_users(pid: int) -> int:
    """Give a process that has left the users that it may be; to be called from outside.

    Returns:
        The user id that the program should run as: nobody for root, else the user itself.
    """
    user, group = os.getuid(), os.getgid()
    process = Path("/proc", str(pid))
    if user == 0:
        try:
            for kind in ("uid_map", "gid_map"):
                (process / kind).write_text(f"0 0 1\n{NOBODY} {NOBODY} 1\n")
            return NOBODY
        except OSError:  # this root is itself a guest, with one user to give
            pass
    (process / "setgroups").write_text("deny")
    (process / "uid_map").write_text(f"{user} {user} 1\n")
    (process / "gid_map").write_text(f"{group} {group} 1\n")
    return user


def build_room(mount_point: str, readable: list[str], tmp_bytes: int) -> None:
    """Mount the program's file system at an empty directory and make it the root.

    Args:
        mount_point: an empty directory.
        readable: files and directories that the program may read, beside the system's.
        tmp_bytes: what fits into the program's /tmp.
    """
    with contextlib.suppress(OSError):  # /proc may be read-only
        Path("/proc/sys/user/max_user_namespaces").write_text("0")
    linux.mount("", "/", flags=linux.MS_REC | linux.MS_PRIVATE)
    linux.mount("tmpfs", mount_point, "tmpfs", options="mode=755,size=1m")
    root = Path(mount_point)
    (root / "tmp").mkdir()  # before what is shown, which may lie in a /tmp itself
    options = f"mode=1777,size={tmp_bytes},nr_inodes=4096"
    linux.mount("tmpfs", str(root / "tmp"), "tmpfs", _HARMLESS, options)
    for path in _outermost([*_SYSTEM, *readable]):
        _show(Path(path), root)
    for name in _DEVICES:
        if Path("/dev", name).exists():
            _bind(Path("/dev", name), root)
    (root / "dev/shm").symlink_to("/tmp")
    linux.mount("", mount_point, "", linux.MS_REMOUNT | linux.MS_RDONLY | _HARMLESS)
    linux.enter_root(mount_point)


def _outermost(paths: list[str]) -> list[str]:
    """The paths that lie below no other one, in order."""
    chosen: list[str] = []
    for path in sorted(set(paths)):
        if not any(path == other or path.startswith(f"{other}/") for other in chosen):
            chosen.append(path)
    return chosen


def _show(path: Path, root: Path) -> None:
    """The same link, or the same content read-only, below another root; nothing if it is not."""
    inside = root / path.relative_to("/")
    if path.is_symlink():
        inside.parent.mkdir(parents=True, exist_ok=True)
        inside.symlink_to(path.readlink())
    elif path.exists():
        _bind(path, root)
        linux.restrict_mount(str(inside))


def _bind(path: Path, root: Path) -> None:
    inside = root / path.relative_to("/")
    inside.parent.mkdir(parents=True, exist_ok=True)
    inside.mkdir(exist_ok=True) if path.is_dir() else inside.touch()
    linux.mount(str(path), str(inside), flags=linux.MS_BIND | linux.MS_REC)
