"""Maps of differences: what is drawn, what is hatched, what is left blank."""

import math

import pytest

from m3jax import M3Error
from m3jax.laboratory.maps import _limits, _matrix, _panels, check_picture, save_map
from m3jax.streaming.differences import Differences, Sums, TensorSums

TUNED = Sums(4, 0, 4, 0, 4, 3, 4.0, 9.0, 3.0, 7.0, 3.5, 1.75, 16.0)
SAME = Sums(4, 4, 4, base=16.0)


def differences(*tensors, base="base", merge="merge"):
    return Differences("a", "b", base, merge, False, tensors, len(tensors), 4 * len(tensors), (), ())


@pytest.fixture
def found():
    layers = [TensorSums(f"layers.{i}.mlp", "model", i, "mlp", TUNED) for i in range(2)]
    return differences(
        TensorSums("embed$", "model", -1, "embedding", TUNED), *layers, TensorSums("n", "model", 1, "norm", SAME)
    )


def test_what_is_not_defined_is_told_from_what_is_not_there(found):
    panels = {panel.title.split(" ")[0]: panel for panel in _panels(found)}
    rows, modules = ["before layers", "layer 0", "layer 1"], ["embedding", "mlp", "norm"]
    drawn = _matrix(found.cells(), rows, modules, panels["cosine"])
    assert drawn.undefined == [(2, 2)]
    assert drawn.values[1][1] == drawn.values[0][0] == 0.5
    assert all(math.isnan(drawn.values[row][column]) for row, column in ((0, 1), (1, 2), (2, 2)))
    assert _matrix(found.cells(), rows, modules, panels["equal"]).values[1][1] == 75.0
    assert _matrix(found.cells(), rows, modules, panels["λ"]).values[1][1] == 0.5
    assert _limits(panels["cosine"], [0.5, 0.25]) == (-0.5, 0.5)
    assert _limits(panels["λ"], [0.5]) == (0.25, 0.75)


def test_a_picture_is_written_whole_as_its_name_says(tmp_path):
    deep = [TensorSums(f"{i}", "model", i, "mlp", TUNED) for i in range(40)]
    assert save_map(differences(*deep, base=None, merge=None), tmp_path / "map.svg")
    assert b"<svg" in (tmp_path / "map.svg").read_bytes()
    check_picture(tmp_path / "map.svg")
    (tmp_path / "mine.svg").write_text("<svg/>")
    with pytest.raises(M3Error, match=r"mine.svg is no picture of m3jax's"):
        check_picture(tmp_path / "mine.svg")
    (tmp_path / "mine.svg").unlink()
    assert not save_map(differences(), tmp_path / "none.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["map.svg"]
    for name, said in (("map.jpg", "as .png or .svg"), ("none/map.png", "its directory does not exist")):
        with pytest.raises(M3Error, match=said):
            check_picture(tmp_path / name)
