"""A seccomp filter of system calls that bubblewrap installs for a program.

It rejects calls that allocate memory outside of processes (message queues, semaphores, shared
memory, memory files, rings), which the limits on address space and resident memory do not cover,
and calls that create further namespaces, which expose much of the kernel.
"""

import errno
import os
import struct

# shmget, msgget, semget, mq_open, memfd_create, memfd_secret, io_uring_setup, unshare, setns
_GENERIC = (194, 186, 190, 180, 279, 447, 425, 97, 268)
_X86_64 = (29, 68, 64, 240, 319, 447, 425, 272, 308)
# Machine name -> its audit architecture, and its numbers of these calls and of clone.
_MACHINES = {
    "x86_64": (0xC000003E, _X86_64, 56),
    "aarch64": (0xC00000B7, _GENERIC, 220),
    "riscv64": (0xC00000F3, _GENERIC, 220),
}
_CLONE3 = 435  # on all machines; the C library falls back to clone where it is not implemented
_CLONE_NEWUSER = 0x10000000
_ANOTHER_ABI = 0x40000000  # x32, which numbers its calls differently
_LOAD, _RETURN = 0x20, 0x06  # instructions of a filter
_EQUAL, _AT_LEAST, _ANY_BIT = 0x15, 0x35, 0x45  # jumps
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16  # offsets of struct seccomp_data
_ALLOW, _FAIL = 0x7FFF0000, 0x00050000


def call_filter(machine: str = os.uname().machine) -> bytes:
    """The filter in the kernel's format (``struct sock_filter``s); rejected calls fail with EPERM.

    Raises:
        OSError: the machine's architecture is not supported.
    """
    if machine not in _MACHINES:
        raise OSError(f"no filter of system calls is known for {machine}")
    architecture, calls, clone = _MACHINES[machine]
    allow = len(calls) + 8  # index of each return instruction
    refuse, absent = allow + 1, allow + 2
    program: list[tuple[int, int, int, int]] = []

    def jump(kind: int, value: int, true: int | None = None, false: int | None = None) -> None:
        here = len(program) + 1  # jumps are relative to the next instruction
        offsets = [0 if place is None else place - here for place in (true, false)]
        program.append((kind, *offsets, value))  # type: ignore[arg-type]

    program.append((_LOAD, 0, 0, _ARCHITECTURE))
    jump(_EQUAL, architecture, false=refuse)
    program.append((_LOAD, 0, 0, _NUMBER))
    jump(_AT_LEAST, _ANOTHER_ABI, true=refuse)
    for number in calls:
        jump(_EQUAL, number, true=refuse)
    jump(_EQUAL, _CLONE3, true=absent)
    jump(_EQUAL, clone, false=allow)
    program.append((_LOAD, 0, 0, _FIRST_ARGUMENT))
    jump(_ANY_BIT, _CLONE_NEWUSER, true=refuse)
    program.append((_RETURN, 0, 0, _ALLOW))
    program.append((_RETURN, 0, 0, _FAIL | errno.EPERM))
    program.append((_RETURN, 0, 0, _FAIL | errno.ENOSYS))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
