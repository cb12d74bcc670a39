"""Merges by block of architectures as transformers writes them, against an oracle that is told the blocks by hand."""

import pytest
from safetensors.numpy import load_file

pytest.importorskip("torch", reason="needs torch: scripts/test --all")
architectures = pytest.importorskip("anatomy.architectures")
told = pytest.importorskip("anatomy.told")

pytestmark = [pytest.mark.torch, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


# One of each kind; `scripts/anatomy_table --merges` goes through all of them.
@pytest.mark.parametrize("name", ["qwen3_moe", "t5", "segformer", "llava"])
def test_merges_are_those_of_an_oracle_that_knows_the_blocks(name, tmp_path):
    row = architectures.BY_NAME[name]
    model = architectures.write(row, tmp_path / "base")
    kinds = told.kinds_by_hand(model, list(load_file(tmp_path / "base" / "model.safetensors")))
    assert told.wrong_merges(name, row.towers, kinds, tmp_path) == {}
