"""What `m3jax doctor` says: whether each device makes the bits that every machine makes."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from m3jax.text import safe_text, table

if TYPE_CHECKING:
    from m3jax.trees.reference import Examination


def examination_lines(found: "Examination", width: int | None = None) -> Iterator[str]:
    """Devices and merges, what is set otherwise than usual, and the verdict last."""
    rows = [
        [device.device, safe_text(device.kind), made.case, "right" if made.right else "WRONG", f"{made.seconds:.1f} s"]
        for device in found.devices
        for made in device.made
    ]
    yield from table(["device", "kind", "merge", "bits", "took"], rows, width, left=4)
    yield ""
    yield f"bits {found.scheme}; " + ", ".join(f"{name} {version}" for name, version in found.versions.items())
    for name, value in found.flags.items():
        yield f"set here: {name}={safe_text(value)}"
    wrong = [row for row in rows if row[3] == "WRONG"]
    if wrong:
        yield (
            f"{len(wrong)} of {len(rows)} merges have other bits than on every other machine: unset what is set here "
            "and try again, or report it with this output; what was merged on such a device is not to be trusted"
        )
    else:
        yield "every device makes the bits that every machine makes"
