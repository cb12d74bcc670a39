"""Device meshes, from the text that people write."""

import math
from collections.abc import Collection, Sequence

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from m3jax.errors import M3Error


def parse_mesh(axes: str, devices: Sequence[jax.Device] | None = None, names: Collection[str] | None = None) -> Mesh:
    """A mesh from text such as "fsdp=4,tp=2".

    Args:
        axes: Names and sizes, by comma.
        devices: What to lay out; all devices by default. The first ones are taken.
        names: The axes that have a meaning; any by default.

    Raises:
        M3Error: The text cannot be read, or there are too few devices.

    Example:
        >>> dict(parse_mesh("fsdp=1").shape)
        {'fsdp': 1}
    """
    there = jax.devices() if devices is None else devices
    sizes: dict[str, int] = {}
    for part in axes.split(","):
        name, equals, size = (text.strip() for text in part.partition("="))
        known = name.isidentifier() if names is None else name in names
        if not (known and equals and size.isdecimal() and int(size)) or name in sizes:
            among = f", with axes among {', '.join(names)}" if names is not None else ""
            raise M3Error(f"--mesh is {axes!r}, but must be such as fsdp=4,tp=2{among}")
        sizes[name] = int(size)
    wanted = math.prod(sizes.values())
    if wanted > len(there):
        cpu = there and there[0].platform == "cpu"
        more = (
            f", or let the CPU stand for more: XLA_FLAGS=--xla_force_host_platform_device_count={wanted}" if cpu else ""
        )
        raise M3Error(f"--mesh {axes} needs {wanted} devices, but there are {len(there)}: make it smaller{more}")
    auto = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=auto, devices=there[:wanted])


def local_mesh(axes: str | None) -> Mesh | None:
    """A mesh of this process's devices; None where none is asked for.

    Args:
        axes: As of `parse_mesh`.

    Raises:
        M3Error: As of `parse_mesh`.
    """
    return None if axes is None else parse_mesh(axes, jax.local_devices())


def spread(mesh: Mesh | None, shape: Sequence[int]) -> Sharding | None:
    """Where a tensor lies that is cut over all devices along the first axis that they divide.

    Args:
        mesh: The devices; None where there is one, which needs no saying.
        shape: Of the tensor.
    """
    if mesh is None:
        return None
    axis = next((axis for axis, size in enumerate(shape) if size and size % mesh.size == 0), None)
    spec = () if axis is None else (*(None,) * axis, mesh.axis_names)
    return NamedSharding(mesh, PartitionSpec(*spec))  # type: ignore[no-untyped-call]
