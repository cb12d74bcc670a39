"""Every architecture of the table, as transformers writes it: towers, blocks, ties, axes of tokens, kinds."""

import json
import re

import pytest

from m3jax import naming
from m3jax.anatomy import anatomy_of, group_of
from m3jax.anatomy.families import family_of, known_ties
from m3jax.checkpoints import open_checkpoint

pytest.importorskip("torch", reason="needs torch: scripts/test --all")
architectures = pytest.importorskip("anatomy.architectures")

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]

NAMES = [row.name for row in architectures.ARCHITECTURES]
# Of these `m3jax.naming` finds no block, or stages instead of blocks: the anatomy knows better.
UNNAMED = {
    "albert",
    "xlm",
    "idefics",
    "swin",
    "swinv2",
    "convnext",
    "resnet",
    "regnet",
    "segformer",
    "poolformer",
    "funnel",
}
PARALLEL = re.compile(r"^transformer\.(attentions|ffns|layer_norm\d+)\.")  # XLM's lists of sublayers
LEARNED_BUFFERS = re.compile(r"final_logits_bias$|e_score_correction_bias$")


@pytest.fixture(scope="module", params=NAMES)
def written(request, tmp_path_factory):
    row = architectures.BY_NAME[request.param]
    place = tmp_path_factory.mktemp("model")
    model = architectures.write(row, place)
    config = json.loads((place / "config.json").read_text())
    with open_checkpoint(place) as checkpoint:
        return row, model, config, dict(checkpoint.tensors), dict(checkpoint.metadata)


def test_at_least_45_architectures_are_asked():
    assert len({row.model_type or row.name for row in architectures.ARCHITECTURES}) >= 45


def test_towers_are_as_deep_as_the_configuration_says(written):
    row, _, config, tensors, metadata = written
    found = anatomy_of(tensors, config, metadata)
    assert {tower.name: tower.depth for tower in found.towers.values()} == dict(row.towers)
    for tower in found.towers.values():
        blocks = {part.block for part in found.parts.values() if part.tower == tower.name and part.block is not None}
        assert blocks == set(range(tower.depth))


def test_names_alone_tell_the_same_blocks(written):
    _, _, config, tensors, metadata = written
    known, bare = anatomy_of(tensors, config, metadata), anatomy_of(tensors)
    assert {tower.name: tower.depth for tower in bare.towers.values()} == {
        t.name: t.depth for t in known.towers.values()
    }
    assert [part.groups for part in bare.parts.values()] == [part.groups for part in known.parts.values()]


def test_every_tensor_with_a_number_of_a_block_is_of_that_block(written):
    row, _, config, tensors, metadata = written
    found = anatomy_of(tensors, config, metadata)
    for name, part in found.parts.items():
        assert (part.canonical, part.stack_axis, part.doubt) == (name, None, None)
        assert group_of(found, name, "tensor") == name
        assert len(part.groups) == (part.block is not None)
        if not PARALLEL.search(name):
            assert all(name.startswith(f"{group}.") for group in part.groups)
    # No two blocks are one group, and no block is two.
    grouped = {(part.tower, part.block): part.groups for part in found.parts.values() if part.block is not None}
    assert len(set(grouped.values())) == len(grouped) == sum(row.towers.values())
    if row.name not in UNNAMED:
        assert {name: naming.block_of(name) for name in tensors} == {
            name: None if part.block is None else (part.groups[0], part.block) for name, part in found.parts.items()
        }


def test_positions_are_those_of_gradients(written):
    row, _, config, tensors, metadata = written
    found = anatomy_of(tensors, config, metadata)
    for name, part in found.parts.items():
        if part.block is not None:
            depth = row.towers[part.tower]
            assert part.position == (part.block / (depth - 1) if depth > 1 else 1.0)
        elif len(row.towers) == 1 and not re.search(
            "project_in|^.*downsampl|feature_|shared|transformer.w.weight", name
        ):
            known = name in (found.embedding,)
            assert part.position == (0.0 if known else naming.layer_position(name, 3)) or ".stages." in name


def test_ties_and_heads(written):
    row, model, config, tensors, metadata = written
    found = anatomy_of(tensors, config, metadata)
    assert found.ties_embeddings == row.tied
    aliases = {name: part.alias_of for name, part in found.parts.items() if part.alias_of}
    assert aliases == {}  # transformers writes one of them
    head = model.get_output_embeddings()
    if row.tied is False and head is not None:
        assert found.head is not None
        assert tensors[found.head].shape == tuple(head.weight.shape)
    if row.tied and head is not None:
        assert found.head is None


def test_a_stored_copy_is_an_alias(written):
    row, model, config, tensors, metadata = written
    if not row.tied or not model.all_tied_weights_keys:
        pytest.skip("nothing is tied")
    stored = anatomy_of(tensors, config, metadata).embedding
    heads = [
        name
        for name in model.all_tied_weights_keys
        if not re.search(r"coder\.(embed_tokens|word_embeddings)|bias$", name)
    ]
    for head in heads:
        copy = tensors[stored]._replace(name=head)
        found = anatomy_of({**tensors, head: copy}, config, metadata)
        assert found.parts[head].alias_of == stored
        assert (head, stored) in found.tied_candidates
        untied = {**config, "tie_word_embeddings": False}
        assert anatomy_of({**tensors, head: copy}, untied, metadata).parts[head].alias_of is None


def test_axes_of_tokens(written):
    _, _, config, tensors, metadata = written
    found = anatomy_of(tensors, config, metadata)
    sizes = {architectures.VOCABULARY, architectures.VOCABULARY + 8}  # Mllama's embedding has eight rows more
    truth = {name: i for name, info in tensors.items() for i, size in enumerate(info.shape) if size in sizes}
    assert {
        name: part.vocabulary_axis for name, part in found.parts.items() if part.vocabulary_axis is not None
    } == truth


def test_kinds(written):
    _, model, config, tensors, metadata = written
    found = anatomy_of(tensors, config, metadata)
    buffers = {name for name, _ in model.named_buffers() if name in tensors}
    kinds = {name: part.kind for name, part in found.parts.items()}
    assert found.quantisation is None
    for name, kind in kinds.items():
        if name.endswith(("running_mean", "running_var")):
            assert kind == "statistics"
        elif name in buffers and not LEARNED_BUFFERS.search(name):
            assert kind == "buffer"
        else:
            assert kind == "parameter"


def test_notes_only_where_there_is_something_to_say(written):
    row, _, config, tensors, metadata = written
    said = {"albert": "3 layers share 1 stored block", "mistral3": "disagree", "internvl": "disagree"}
    notes = anatomy_of(tensors, config, metadata).notes
    assert len(notes) == (row.name in said)
    assert all(said[row.name] in note for note in notes)


def test_the_table_knows_what_transformers_assumes_where_config_is_silent():
    from transformers import CONFIG_MAPPING

    known = known_ties()
    asked = [name for name in known if name in CONFIG_MAPPING]
    assert len(asked) > 250
    wrong = {}
    for name in asked:
        tied = getattr(CONFIG_MAPPING[name](), "tie_word_embeddings", None)
        if tied != family_of(name).ties:
            wrong[name] = tied
    assert wrong == {}
