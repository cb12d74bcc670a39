"""The Linux calls that Python's standard library lacks, through ctypes to libc.

Runs inside the launcher, which sees the standard library only.
"""

import ctypes
import os
import platform
import struct
import sys

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

# AUDIT_ARCH of each machine, and the system calls refused there: memory that no limit counts (memfd_create, shmget,
# msgget, semget), looking into other processes (ptrace, process_vm_*), and wide kernel surface no solution needs
# (add_key, request_key, keyctl, perf_event_open, bpf, userfaultfd, io_uring_*, memfd_secret).
_ANYWHERE = (425, 426, 427, 447)
_REFUSED = {
    "x86_64": (0xC000003E, (29, 64, 68, 101, 248, 249, 250, 298, 310, 311, 319, 321, 323, *_ANYWHERE)),
    "aarch64": (0xC00000B7, (117, 186, 190, 194, 217, 218, 219, 241, 270, 271, 279, 280, 282, *_ANYWHERE)),
}
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


def refuse_system_calls() -> None:
    """Answer EPERM to the refused system calls, in this process and all it starts.

    On a machine whose numbers are not known here nothing is refused: the other walls stand without it.
    """
    known = _REFUSED.get(platform.machine())
    if known is None or sys.maxsize < 2**32:
        return
    architecture, numbers = known
    load, equal, at_least, answer = 0x20, 0x15, 0x35, 0x06
    rest = len(numbers) + 2  # instructions after the architecture test, up to the allowing answer
    lines = [
        _instruction(load, 0, 0, 4),
        _instruction(equal, 0, rest, architecture),
        _instruction(load, 0, 0, 0),
        _instruction(at_least, len(numbers) + 1, 0, _X32_BIT),
        *(_instruction(equal, len(numbers) - place, 0, number) for place, number in enumerate(numbers)),
        _instruction(answer, 0, 0, _SECCOMP_RET_ALLOW),
        _instruction(answer, 0, 0, _SECCOMP_RET_EPERM),
    ]
    # A foreign architecture's calls fall on the refusing answer, the last line.
    program = _Program(len(lines), b"".join(lines))
    _checked(_libc.prctl(_PR_SET_SECCOMP, ctypes.c_ulong(_SECCOMP_MODE_FILTER), ctypes.byref(program), 0, 0), "seccomp")
