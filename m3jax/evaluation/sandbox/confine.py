"""The walls: namespaces, a file system of its own, an unprivileged user, limits."""

import contextlib
import os
import resource
import signal
from typing import TypedDict

from m3jax.evaluation.sandbox import kernel

_SEPARATE = kernel.CLONE_NEWNS | kernel.CLONE_NEWPID | kernel.CLONE_NEWNET | kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
_INNER_USER = 1000
_FOUNDATIONS = ("/tmp", "/proc")  # nothing that is shown lies in the last


class MachineView(TypedDict):
    """What the launcher is told about the machine; see `m3jax.evaluation.sandbox.view`."""

    shown: list[str]
    hidden: list[str]


class Walls(TypedDict):
    """What the launcher is told about limits; see `m3jax.evaluation.sandbox.Limits`."""

    wall_seconds: float
    cpu_seconds: float
    memory_bytes: int
    processes: int
    file_bytes: int
    disk_bytes: int
    files: int
    open_files: int


def own_user() -> int:
    """A user that owns nothing and that no other launcher takes, so that counts per user are this program's alone."""
    return 2_000_000_000 + os.getpid()


def _leave_root(number: int) -> None:
    os.setgroups([])
    for user in (number, 65534):
        try:
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
        except OSError:
            continue  # not a number that this container maps
        return
    raise PermissionError("this process is root and the system lets it become no other user")


def separate(user_instead_of_root: int) -> None:
    """Enter new namespaces; the next child is the first process of its PID namespace.

    Args:
        user_instead_of_root: Whom root becomes where only ordinary users may do this.

    Raises:
        OSError: The kernel, or the container around us, does not allow it.
    """
    if os.geteuid() == 0:
        try:
            kernel.unshare(_SEPARATE)
        except PermissionError:
            _leave_root(user_instead_of_root)  # root of a container: try the way of ordinary users
        else:
            return
    user, group = os.geteuid(), os.getegid()
    kernel.unshare(kernel.CLONE_NEWUSER | _SEPARATE)
    kernel.set_dumpable(True)  # or /proc/self/uid_map belongs to root
    for name, line in (
        ("setgroups", "deny"),
        ("uid_map", f"{_INNER_USER} {user} 1"),
        ("gid_map", f"{_INNER_USER} {group} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(line)


def _bind(source: str, target: str) -> None:
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(target, "w"):
            pass
    kernel.mount(source, target, "", kernel.MS_BIND | kernel.MS_REC)


def _show(place: str, jail: str) -> None:
    """Let one place of the host be seen in the jail, as a link where it is a link."""
    target = jail + place
    if not os.path.lexists(place) or os.path.lexists(target):
        return
    if os.path.islink(place):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.symlink(os.readlink(place), target)
    else:
        _bind(place, target)


def _hide(place: str, jail: str, empty: str) -> None:
    """Let a directory or file of the machine be seen empty."""
    target = jail + place
    if os.path.isdir(target):
        kernel.mount(empty, target, "", kernel.MS_BIND)
    elif os.path.exists(target):
        kernel.mount(f"{empty}.file", target, "", kernel.MS_BIND)


def _foundation(seen: list[str]) -> str:
    """A directory that every host has, to mount upon where only this namespace sees it, and that hides nothing shown.

    One that was made for it would stay behind when the launcher is killed.
    """
    shown = [f"{os.path.realpath(place)}/" for place in (*seen, *_DEVICES)]
    *places, last = (os.path.realpath(place) for place in _FOUNDATIONS)
    fit = (place for place in places if os.path.isdir(place) and not any(one.startswith(f"{place}/") for one in shown))
    return next(fit, last)


def build_root(walls: Walls, seen: MachineView) -> int:
    """Replace the file system by a read-only view of the interpreter and a small, empty, writable /tmp.

    Everything that is written lives in memory that ends with the namespace, so there is nothing to clean up.

    Args:
        walls: The limits; `disk_bytes` and `files` bound /tmp.
        seen: What is seen of the machine.

    Returns:
        A descriptor of a /proc of this PID namespace that no path leads to.
    """
    kernel.mount("none", "/", "", kernel.MS_REC | kernel.MS_PRIVATE)
    directory = _foundation(seen["shown"])
    kernel.mount("tmpfs", directory, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "size=1m,nr_inodes=4096,mode=0755")
    jail = directory + "/jail"
    for name in ("/old", "/empty", "/jail", "/jail/proc", "/jail/tmp"):
        os.mkdir(directory + name)
    with open(directory + "/empty.file", "w"):
        pass
    for place in (*seen["shown"], *_DEVICES):
        _show(place, jail)
    for place in seen["hidden"]:
        _hide(place, jail, directory + "/empty")
    kernel.mount("proc", jail + "/proc", "proc", kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC)
    processes = os.open(jail + "/proc", os.O_RDONLY | os.O_DIRECTORY)
    kernel.unmount(jail + "/proc")
    kernel.pivot_root(directory, directory + "/old")
    os.chdir("/")
    kernel.unmount("/old")
    kernel.make_read_only("/")
    kernel.mount(
        "tmpfs",
        "/jail/tmp",
        "tmpfs",
        kernel.MS_NOSUID | kernel.MS_NODEV,
        f"size={walls['disk_bytes']},nr_inodes={walls['files']},mode=01777",
    )
    os.chroot("/jail")  # the kernel also refuses new user namespaces, and so fresh capabilities, below a chroot
    os.chdir("/tmp")
    return processes


def drop_privileges(user_instead_of_root: int, confined: bool) -> None:
    """Become an unprivileged process that can gain nothing and that its own kind cannot look into.

    Args:
        user_instead_of_root: Whom root becomes.
        confined: Whether system calls must be filtered; else they are where the kernel can.

    Raises:
        OSError: The kernel does not allow it.
    """
    if os.geteuid() == 0:
        _leave_root(user_instead_of_root)
    kernel.drop_capabilities()
    kernel.forbid_new_privileges()
    with contextlib.suppress(*([] if confined else [OSError])):
        kernel.refuse_system_calls()
    kernel.set_dumpable(False)
    if confined:  # and all the namespace with it
        kernel.set_death_signal(signal.SIGKILL)


def processor_seconds(walls: Walls) -> int:
    """The processor time of one process, as the kernel takes it."""
    return max(1, int(walls["cpu_seconds"]))


def limit(walls: Walls, alone: bool) -> None:
    """Set the resource limits of this process and all it starts.

    Args:
        walls: The limits.
        alone: Whether processes are counted for this sandbox alone; else the user's others come on top.
    """
    seconds = processor_seconds(walls)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))  # a signal first, for those who ignore it the end
    count = walls["processes"] + (0 if alone else _processes_of_user())
    for kind, value in (
        (resource.RLIMIT_AS, walls["memory_bytes"]),
        (resource.RLIMIT_NPROC, count),
        (resource.RLIMIT_FSIZE, walls["file_bytes"]),
        (resource.RLIMIT_NOFILE, walls["open_files"]),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_STACK, 8 << 20),
    ):
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def _processes_of_user() -> int:
    """Threads of this user on the whole machine, which is what RLIMIT_NPROC counts outside a namespace."""
    count = 0
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                if os.stat(f"/proc/{name}").st_uid == os.geteuid():
                    count += len(os.listdir(f"/proc/{name}/task"))
            except OSError:
                continue  # it ended meanwhile
    return count
