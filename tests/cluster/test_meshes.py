import jax
import pytest

from m3jax.cluster.meshes import parse_mesh
from m3jax.errors import M3Error


def test_axes_and_devices() -> None:
    mesh = parse_mesh(" fsdp=2, tp=3 ")
    assert dict(mesh.shape) == {"fsdp": 2, "tp": 3}
    assert list(mesh.devices.flat) == jax.devices()[:6]
    assert list(parse_mesh("x=2", jax.devices()[4:]).devices.flat) == jax.devices()[4:6]


@pytest.mark.parametrize("axes", ["", "fsdp", "fsdp=", "fsdp=0", "fsdp=-1", "fsdp=2,fsdp=2", "2=2", "a b=2", "x=2.0"])
def test_text_that_is_no_mesh(axes) -> None:
    with pytest.raises(M3Error, match="must be such as fsdp=4,tp=2"):
        parse_mesh(axes)


def test_axes_without_a_meaning() -> None:
    with pytest.raises(M3Error, match="must be such as"):
        parse_mesh("data=2", names=("fsdp", "tp"))


def test_too_few_devices() -> None:
    with pytest.raises(M3Error, match="needs 9 devices, but there are 8"):
        parse_mesh("fsdp=3,tp=3")
