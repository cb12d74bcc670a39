"""The Linux calls that Python's standard library lacks, through ctypes to libc.

Runs inside the launcher, which sees the standard library only.
"""

import ctypes
import errno
import os
import platform
import struct
import sys
from collections.abc import Iterable
from typing import NamedTuple

CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_NOEXEC = 0x8
MS_BIND = 0x1000
MS_REC = 0x4000
MS_PRIVATE = 0x40000
MNT_DETACH = 0x2

_SYS_MOUNT_SETATTR = 442  # one number on every architecture
_AT_FDCWD = -100
_AT_RECURSIVE = 0x8000
_MOUNT_ATTR_RDONLY = 0x1
_MOUNT_ATTR_NOSUID = 0x2

_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_SET_SECCOMP = 22
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NO_NEW_PRIVS = 38
_SECCOMP_MODE_FILTER = 2
_SECCOMP_RET_ALLOW = 0x7FFF0000
_SECCOMP_RET_EPERM = 0x00050001

# The system calls refused everywhere: memory that no limit counts (memfd_create, shmget, msgget, semget, memfd_secret),
# looking into other processes (ptrace, process_vm_*), and wide kernel surface no solution needs (add_key, request_key,
# keyctl, perf_event_open, bpf, userfaultfd, io_uring_*).
_ANYWHERE = (425, 426, 427, 447)


class Machine(NamedTuple):
    """The numbers of a machine.

    Attributes:
        architecture: Its AUDIT_ARCH.
        refused: Calls that are refused whatever their arguments.
        mmap: The call that maps memory.
        sockets: The calls that make sockets.
        setsockopt: The call that sets an option of a socket.
        fcntl: The call that, among much else, sets the size of a pipe.
    """

    architecture: int
    refused: tuple[int, ...]
    mmap: int
    sockets: tuple[int, ...]
    setsockopt: int
    fcntl: int


MACHINES = {
    "x86_64": Machine(
        0xC000003E, (29, 64, 68, 101, 248, 249, 250, 298, 310, 311, 319, 321, 323, *_ANYWHERE), 9, (41, 53), 54, 72
    ),
    "aarch64": Machine(
        0xC00000B7,
        (117, 186, 190, 194, 217, 218, 219, 241, 270, 271, 279, 280, 282, *_ANYWHERE),
        222,
        (198, 199),
        208,
        25,
    ),
}
_FAMILIES = (1, 2, 10)  # of sockets: AF_UNIX, AF_INET, AF_INET6; AF_VSOCK, for one, leads out of every namespace
_MAP_SHARED = 0x1  # a bit of MAP_SHARED and of MAP_SHARED_VALIDATE: memory that stays when no process has it in sight
# What makes the kernel hold more for a socket or a pipe, which no limit counts: SO_SNDBUF, SO_RCVBUF and both by force.
_BUFFER_SIZES = (7, 8, 32, 33)
_F_SETPIPE_SZ = 1031
_X32_BIT = 0x40000000

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, call: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")


def unshare(flags: int) -> None:
    """Move this process (for a PID namespace: its future children) into new namespaces."""
    _checked(_libc.unshare(flags), "unshare")


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    """Mount a file system, or bind one place to another."""
    _checked(
        _libc.mount(
            source.encode(),
            target.encode(),
            kind.encode(),
            ctypes.c_ulong(flags),
            options.encode() if options else None,
        ),
        f"mount {target}",
    )


def unmount(target: str) -> None:
    """Detach a mount, busy or not."""
    _checked(_libc.umount2(target.encode(), MNT_DETACH), f"umount {target}")


def pivot_root(new: str, old: str) -> None:
    """Make `new` the root of the mount namespace and hang the present root at `old`."""
    _checked(_libc.pivot_root(new.encode(), old.encode()), "pivot_root")


def make_read_only(place: str) -> None:
    """Make a mount and everything mounted below it read-only and without set-uid programs (Linux 5.12)."""
    attributes = struct.pack("=QQQQ", _MOUNT_ATTR_RDONLY | _MOUNT_ATTR_NOSUID, 0, 0, 0)
    result = _libc.syscall(
        ctypes.c_long(_SYS_MOUNT_SETATTR),
        ctypes.c_int(_AT_FDCWD),
        place.encode(),
        ctypes.c_uint(_AT_RECURSIVE),
        attributes,
        ctypes.c_size_t(len(attributes)),
    )
    _checked(result, "mount_setattr")


def drop_capabilities() -> None:
    """Give up every capability of this process."""
    header = struct.pack("=Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    _checked(_libc.capset(header, bytes(24)), "capset")


def _prctl(option: int, value: int, call: str) -> None:
    _checked(_libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0), call)


def set_dumpable(dumpable: bool) -> None:
    """Whether processes of the same user may trace this one and read its memory and descriptors."""
    _prctl(_PR_SET_DUMPABLE, int(dumpable), "PR_SET_DUMPABLE")


def set_death_signal(signal: int) -> None:
    """Ask for a signal when the parent dies."""
    _prctl(_PR_SET_PDEATHSIG, signal, "PR_SET_PDEATHSIG")


def become_subreaper() -> None:
    """Adopt orphaned descendants, however often they forked."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1, "PR_SET_CHILD_SUBREAPER")


def forbid_new_privileges() -> None:
    """No program run from here on gains privileges, set-uid or not."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1, "PR_SET_NO_NEW_PRIVS")


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def _instruction(code: int, if_true: int, if_false: int, value: int) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _ANSWER = 0x20, 0x15, 0x35, 0x45, 0x06


class Refusal(NamedTuple):
    """System calls that are refused.

    Attributes:
        calls: Their numbers.
        argument: The argument that decides; None where all are refused.
        bits: They are refused where the argument has one of these bits.
        unless: They are refused unless the argument is one of these.
        where: They are refused where the argument is one of these.
    """

    calls: tuple[int, ...]
    argument: int | None = None
    bits: int = 0
    unless: tuple[int, ...] = ()
    where: tuple[int, ...] = ()

    def lines(self, call: int) -> list[bytes]:
        """The filter for one of the calls, whose number is loaded; behind it the number is loaded again."""
        refuse = _instruction(_ANSWER, 0, 0, _SECCOMP_RET_EPERM)
        if self.argument is None:
            return [_instruction(_EQUAL, 0, 1, call), refuse]
        tests = [_instruction(_ANY_BIT, 0, 1, self.bits)] if self.bits else []
        # One that is allowed jumps over those after it and over the refusal.
        tests += [_instruction(_EQUAL, len(self.unless) - place, 0, one) for place, one in enumerate(self.unless)]
        last = len(self.where) - 1  # one that is meant jumps to the refusal, and what is none of them over it
        tests += [_instruction(_EQUAL, last - place, int(place == last), one) for place, one in enumerate(self.where)]
        inner = [_instruction(_LOAD, 0, 0, 16 + 8 * self.argument), *tests, refuse, _instruction(_LOAD, 0, 0, 0)]
        return [_instruction(_EQUAL, 0, len(inner), call), *inner]


def filter_system_calls(refusals: Iterable[Refusal]) -> None:
    """Answer EPERM to system calls, in this process and all it starts; to all calls of a foreign architecture too.

    Args:
        refusals: Which.

    Raises:
        OSError: This kernel has no filters, or the machine's numbers are not known here.
    """
    machine = MACHINES.get(platform.machine())
    if machine is None or sys.maxsize < 2**32:
        raise OSError(errno.ENOSYS, f"system calls of {platform.machine()} are not known here")
    refuse = _instruction(_ANSWER, 0, 0, _SECCOMP_RET_EPERM)
    lines = [
        _instruction(_LOAD, 0, 0, 4),
        _instruction(_EQUAL, 1, 0, machine.architecture),
        refuse,
        _instruction(_LOAD, 0, 0, 0),
        _instruction(_AT_LEAST, 0, 1, _X32_BIT),
        refuse,
        *(line for refusal in refusals for call in refusal.calls for line in refusal.lines(call)),
        _instruction(_ANSWER, 0, 0, _SECCOMP_RET_ALLOW),
    ]
    program = _Program(len(lines), b"".join(lines))
    _checked(_libc.prctl(_PR_SET_SECCOMP, ctypes.c_ulong(_SECCOMP_MODE_FILTER), ctypes.byref(program), 0, 0), "seccomp")


def refuse_system_calls() -> None:
    """Refuse what would get round the other walls: uncounted memory, other processes, families of sockets.

    Raises:
        OSError: As `filter_system_calls`.
    """
    machine = MACHINES.get(platform.machine(), Machine(0, (), 0, (), 0, 0))
    filter_system_calls(
        (
            Refusal(machine.refused),
            Refusal((machine.mmap,), argument=3, bits=_MAP_SHARED),
            Refusal(machine.sockets, argument=0, unless=_FAMILIES),
            Refusal((machine.setsockopt,), argument=2, where=_BUFFER_SIZES),
            Refusal((machine.fcntl,), argument=1, where=(_F_SETPIPE_SZ,)),
        )
    )
