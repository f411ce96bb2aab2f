"""The system calls that Python 3.11 has no function for; each raises OSError when it fails."""

import ctypes
import errno
import os
from typing import Any

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT = 1, 2, 4, 32
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
MNT_DETACH = 2
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 1, 2, 4

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_CAPBSET_DROP = 1, 4, 24
_PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 36, 38
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_SYS_MOUNT_SETATTR = 442  # the same number on every architecture
_SIGKILL = 9

_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2
# Calls that take memory which counts for no process: System V and POSIX message queues,
# semaphores and shared memory, files in memory, rings. By the kernel's name of the machine.
_GENERIC = (186, 190, 194, 180, 279, 447, 425)
_X86_64 = (68, 64, 29, 240, 319, 447, 425)
_MACHINES = {
    "x86_64": (0xC000003E, _X86_64),
    "aarch64": (0xC00000B7, _GENERIC),
    "riscv64": (0xC00000F3, _GENERIC),
}
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06  # instructions of a filter
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000
_ANOTHER_ABI = 0x40000000  # x32, whose calls have numbers of their own

_libc = ctypes.CDLL(None, use_errno=True)


class _MountAttributes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "userns_fd")]


class _Instruction(ctypes.Structure):
    _fields_ = [
        ("code", ctypes.c_uint16),
        ("jump_true", ctypes.c_uint8),
        ("jump_false", ctypes.c_uint8),
        ("value", ctypes.c_uint32),
    ]


class _Filter(ctypes.Structure):
    _fields_ = [("length", ctypes.c_uint16), ("instructions", ctypes.POINTER(_Instruction))]


def _call(name: str, *arguments: Any) -> int:
    result: int = getattr(_libc, name)(*arguments)
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def unshare(flags: int) -> None:
    """Leave the namespaces that the CLONE_NEW* flags name, for fresh ones."""
    _call("unshare", ctypes.c_int(flags))


def mount(source: str, target: str, kind: str = "", flags: int = 0, options: str = "") -> None:
    """mount(2); empty strings stand for none."""
    texts = [text.encode() or None for text in (source, target, kind, options)]
    _call("mount", *texts[:3], ctypes.c_ulong(flags), texts[3])


def restrict_mount(target: str) -> None:
    """Make a mount and all below it read-only, without devices and set-uid programs.

    One call does it for the whole tree since Linux 5.12; before, only the top mount changes.
    """
    flags = MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV
    wanted = _MountAttributes(set=flags)
    arguments = (target.encode(), _AT_RECURSIVE, ctypes.byref(wanted), ctypes.sizeof(wanted))
    try:
        _call("syscall", _SYS_MOUNT_SETATTR, _AT_FDCWD, *arguments)
    except OSError:
        locked = os.statvfs(target).f_flag & (0x400 | 0x800 | 0x1000)  # noatime, nodiratime, rel
        remount = MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV
        mount("", target, flags=remount | _as_mount_flags(locked))


def _as_mount_flags(statvfs_flags: int) -> int:
    """ST_NOATIME, ST_NODIRATIME and ST_RELATIME as the MS_* flags of the same names."""
    pairs = ((0x400, 1024), (0x800, 2048), (0x1000, 1 << 21))
    return sum(mount_flag for stat_flag, mount_flag in pairs if statvfs_flags & stat_flag)


def enter_root(directory: str) -> None:
    """Make a mount point the root directory and forget the old one."""
    os.chdir(directory)
    _call("pivot_root", b".", b".")
    _call("umount2", b".", MNT_DETACH)
    os.chdir("/")


def die_with_parent() -> None:
    """Get SIGKILL when the thread that started this process ends."""
    _call("prctl", _PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0)


def hide_memory() -> None:
    """No other process of this user may read or trace this one (until it executes another)."""
    _call("prctl", _PR_SET_DUMPABLE, 0, 0, 0, 0)


def adopt_orphans() -> None:
    """Descendants whose parent ends become this process's children."""
    _call("prctl", _PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def forgo_privileges() -> None:
    """No program executed from now on gains a capability or another user's rights."""
    for capability in range(64):
        try:
            _call("prctl", _PR_CAPBSET_DROP, capability, 0, 0, 0)
        except OSError:  # beyond the last one, or not allowed to, having none
            break
    _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def forbid_uncounted_memory() -> None:
    """Refuse (EPERM) calls that hold memory outside of every process, for good and for children.

    Address space and resident memory, by which a program is bounded, see nothing of it. Call it
    after `forgo_privileges`.
    """
    machine = os.uname().machine
    if machine not in _MACHINES:
        raise OSError(f"no filter of system calls is known for {machine}")
    architecture, calls = _MACHINES[machine]
    refused = len(calls) + 1  # instructions from the first comparison to the refusal
    program = [
        (_LOAD, 0, 0, 4),  # the architecture that the call is made for
        (_EQUAL, 0, refused + 2, architecture),
        (_LOAD, 0, 0, 0),  # its number
        (_AT_LEAST, refused, 0, _ANOTHER_ABI),
        *((_EQUAL, len(calls) - place, 0, number) for place, number in enumerate(calls)),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _REFUSE | errno.EPERM),
    ]
    instructions = (_Instruction * len(program))(*(_Instruction(*line) for line in program))
    filter_ = _Filter(len(program), instructions)
    _call("prctl", _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(filter_), 0, 0)
