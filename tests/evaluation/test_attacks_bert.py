"""BERTs read from Hugging Face's files: as a source of words, as a sentence encoder, as a tagger."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from m3jax.errors import M3Error
from m3jax.evaluation import Completion, get_task
from m3jax.evaluation.attacks import Wording, make_attack
from m3jax.evaluation.attacks.bert import BertConfig, Encoder, Tagger, load_bert, masked_logits, tag_logits
from m3jax.evaluation.attacks.likeness import Bound, keeps_meaning, keeps_part_of_speech, load_encoder, load_tagger
from m3jax.evaluation.attacks.masked_lm import load_masked_words
from m3jax.evaluation.attacks.profiles import Sources
from m3jax.evaluation.attacks.trial import attack_task
from m3jax.evaluation.robustness import make_plan

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
VOCABULARY += ["film", "mood", "text", "word", "answer", "##s", "##ed", "##ing", ".", ":", "'"]
SIZES = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "type_vocab_size": 2,
}


def shapes(gamma):
    width, inner = SIZES["hidden_size"], SIZES["intermediate_size"]
    norm = ("gamma", "beta") if gamma else ("weight", "bias")

    def both(name, out, inputs):
        return {f"{name}.weight": (out, inputs), f"{name}.bias": (out,)}

    def normed(name):
        return {f"{name}.LayerNorm.{kind}": (width,) for kind in norm}

    found = {"bert.embeddings.word_embeddings.weight": (SIZES["vocab_size"], width)}
    found |= {"bert.embeddings.position_embeddings.weight": (SIZES["max_position_embeddings"], width)}
    found |= {"bert.embeddings.token_type_embeddings.weight": (2, width), **normed("bert.embeddings")}
    for layer in range(SIZES["num_hidden_layers"]):
        at = f"bert.encoder.layer.{layer}"
        for part in ("query", "key", "value"):
            found |= both(f"{at}.attention.self.{part}", width, width)
        found |= both(f"{at}.attention.output.dense", width, width) | normed(f"{at}.attention.output")
        found |= both(f"{at}.intermediate.dense", inner, width)
        found |= both(f"{at}.output.dense", width, inner) | normed(f"{at}.output")
    found |= both("cls.predictions.transform.dense", width, width) | normed("cls.predictions.transform")
    return found | {"cls.predictions.bias": (SIZES["vocab_size"],)}


def write_bert(directory, gamma=False, **config):
    """A BERT of random weights with a tokenizer, as the hub has them."""
    directory.mkdir()
    chance = np.random.default_rng(0)
    extra = {"bert.pooler.dense.weight": (4, 4), "bert.embeddings.position_ids": (1, 4)}
    drawn = {name: chance.normal(0, 0.3, shape).astype(np.float32) for name, shape in (shapes(gamma) | extra).items()}
    save_file(drawn, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"model_type": "bert", **SIZES, **config}))
    (directory / "vocab.txt").write_text("\n".join(VOCABULARY))
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return write_bert(tmp_path_factory.mktemp("bert") / "bert")


def test_words_come_from_the_file(bert):
    source = load_masked_words(str(bert))
    prompt = Wording.of("The mood of texts: {content}.", ["content"])
    six, twelve = (source(most)(prompt, 1) for most in (6, 12))
    assert 0 < len(six) <= len(twelve) <= 12
    assert six == [word for word in twelve if word in six]
    assert set(twelve) <= set(VOCABULARY) - {"mood"}
    assert source(6)(prompt, 3)  # a word of two pieces
    again = load_masked_words(str(bert))
    assert again(12)(prompt, 1) == twelve


def test_the_attack_uses_them(bert):
    attack = make_attack("bertattack", 0, sources=Sources(load_masked_words(str(bert))))
    found = attack.run(
        Wording.of("The mood of texts."), lambda prompts: np.array([float("mood" in p) for p in prompts]), 9
    )
    assert found.score == 0
    assert [change.before for change in found.changes] == ["mood"]
    assert found.changes[0].after in VOCABULARY


def test_a_run_reads_both_sources_from_their_files(tmp_path, bert):
    (tmp_path / "vectors.txt").write_text("mood 1 0\ntemper 0.9 0.1\n")
    plan = make_plan(["bertattack", "textfooler"], masked_lm=str(bert), embeddings=tmp_path / "vectors.txt")

    def generate(prompts, settings):
        return [Completion("positive" if "mood" in prompt else "?", 1, True) for prompt in prompts]

    rows = [{"sentence": "fine", "label": 1}]
    options = {"prompt": "Name its mood: {content}", "template": "none"}
    found = attack_task(get_task("sst2"), rows, generate, plan, **options)
    assert [(one.attack, one.level, one.drop.pdr) for one in found.attacks] == [
        ("bertattack", "word", 1.0),
        ("textfooler", "word", 1.0),
    ]
    assert found.attacks[0].changes[0].after in VOCABULARY
    assert found.attacks[1].prompt == "Name its temper: {content}"


def test_old_names_of_norms_are_known(tmp_path, bert):
    old = write_bert(tmp_path / "old", gamma=True)
    config = BertConfig.from_directory(bert)
    text = jnp.array([[2, 31, 7, 8, 3]]), jnp.array([5])
    new, again = (masked_logits(load_bert(place, config), *text, config=config) for place in (bert, old))
    np.testing.assert_array_equal(new, again)


def test_padding_has_no_effect(bert):
    config = BertConfig.from_directory(bert)
    params = load_bert(bert, config)
    alone = masked_logits(params, jnp.array([[2, 31, 7, 3]]), jnp.array([4]), config=config)
    padded = masked_logits(params, jnp.array([[2, 31, 7, 3, 9, 9, 9]]), jnp.array([4]), config=config)
    np.testing.assert_allclose(alone[0], padded[0, :4], atol=1e-5)


def test_models_that_will_not_do(tmp_path, bert):
    with pytest.raises(M3Error, match="of type 'llama': give the directory of a BERT"):
        load_masked_words(str(write_bert(tmp_path / "llama", model_type="llama")))
    with pytest.raises(M3Error, match=r"has num_hidden_layers: .*, not a positive whole number"):
        load_masked_words(str(write_bert(tmp_path / "none", num_hidden_layers=0)))
    with pytest.raises(M3Error, match=r"lacks layers\.3.*and 11 more; give a BERT with its masked"):
        load_masked_words(str(write_bert(tmp_path / "more", num_hidden_layers=4)))
    unmasked = write_bert(tmp_path / "unmasked")
    told = json.loads((unmasked / "tokenizer_config.json").read_text())
    (unmasked / "tokenizer_config.json").write_text(json.dumps({**told, "mask_token": None}))
    with pytest.raises(M3Error, match="no masked language model's, as it has no mask"):
        load_masked_words(str(unmasked))
    with pytest.raises(M3Error, match="only absolute positions"):
        load_masked_words(str(write_bert(tmp_path / "relative", position_embedding_type="relative_key")))
    with pytest.raises(M3Error, match="a BERT is read without an adapter"):
        load_masked_words(f"{bert}+{bert}")
    with pytest.raises(M3Error, match="sees 40 tokens, and the prompt has"):
        load_masked_words(str(bert))(4)(Wording.of("film " * 60), 0)


@pytest.mark.torch
@pytest.mark.parametrize("activation", ["gelu", "gelu_new"])
def test_logits_are_those_of_transformers(tmp_path, activation):
    torch = pytest.importorskip("torch")
    from transformers import BertConfig as TheirConfig
    from transformers import BertForMaskedLM

    torch.manual_seed(0)
    settings = SIZES | {"initializer_range": 0.3, "hidden_act": activation, "attn_implementation": "eager"}
    model = BertForMaskedLM(TheirConfig(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms begin as ones and biases as zeros, which would hide them
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "bert")
    config = BertConfig.from_directory(tmp_path / "bert")
    params = load_bert(tmp_path / "bert", config)
    tokens = np.random.default_rng(0).integers(5, len(VOCABULARY), (3, 17))
    lengths = np.array([17, 9, 4])
    seen = np.arange(17)[None] < lengths[:, None]
    with torch.no_grad():
        want = model(torch.tensor(tokens), attention_mask=torch.tensor(seen.astype(int))).logits.numpy()
    found = np.asarray(masked_logits(params, jnp.asarray(tokens), jnp.asarray(lengths), config=config))
    np.testing.assert_allclose(found[seen], want[seen], atol=1e-4, rtol=0)


def write_tagger(directory, labels=("NN", "VBD", "JJ"), bare=False):
    """A BERT of random weights that tags tokens; or a bare one."""
    write_bert(directory, id2label=dict(enumerate(labels)))
    chance = np.random.default_rng(1)
    drawn = {name: shape for name, shape in shapes(gamma=False).items() if not name.startswith("cls.")}
    if bare:
        drawn = {name.removeprefix("bert."): shape for name, shape in drawn.items()}
    else:
        drawn |= {"classifier.weight": (len(labels), SIZES["hidden_size"]), "classifier.bias": (len(labels),)}
    save_file(
        {n: chance.normal(0, 0.3, s).astype(np.float32) for n, s in drawn.items()}, directory / "model.safetensors"
    )
    return directory


def test_an_encoder_pools_and_ignores_padding(tmp_path):
    place = write_tagger(tmp_path / "encoder", bare=True)
    encode = load_encoder(str(place))
    alone, pair = encode(["film"]), encode(["the mood of a text", "film"])
    assert pair.shape == (2, SIZES["hidden_size"])
    np.testing.assert_allclose(alone[0], pair[1], atol=1e-5)
    (place / "1_Pooling").mkdir()
    (place / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    assert not np.allclose(load_encoder(str(place))(["film"]), alone, atol=1e-3)
    (place / "1_Pooling" / "config.json").write_text('{"pooling_mode_max_tokens": true}')
    with pytest.raises(M3Error, match="only the mean of tokens and the first token"):
        load_encoder(str(place))
    with pytest.raises(M3Error, match=r"lacks classifier.*give a BERT that tags tokens"):
        load_tagger(str(place))


def test_labels_are_parts_of_speech(tmp_path):
    tag = load_tagger(str(write_tagger(tmp_path / "tagger")))
    assert {tag(["the", word, "film"], 1) for word in ("mood", "text", "s")} <= {"NOUN", "VERB", "ADJ"}
    with pytest.raises(M3Error, match=r"labels \(POSITIVE, NEGATIVE\) are no parts of speech"):
        load_tagger(str(write_tagger(tmp_path / "labels", ("POSITIVE", "NEGATIVE"))))


def test_the_encoder_keeps_prompts_near():
    prompt = Wording.of("a b c d e f")
    turned = {"x": 0.0, "y": np.pi / 3, "z": np.pi / 2}
    seen = []

    def encode(texts):
        seen.extend(texts)
        angles = [next((turned[word] for word in text.split() if word in turned), 0.0) for text in texts]
        return np.array([[np.cos(angle), np.sin(angle)] for angle in angles], np.float32)

    tried = [prompt.replaced(3, word) for word in "xyz"]
    keep = keeps_meaning(encode, Bound(0.49))
    assert [one.words[3] for one in keep(prompt, prompt, 3, tried)] == ["x", "y"]
    assert seen[0] == "a b c d e f"
    # 1 - 60°/180° is 0.667, and three words around the fourth are compared
    assert [one.words[3] for one in keeps_meaning(encode, Bound(0.67, "angular", 3))(prompt, prompt, 3, tried)] == ["x"]
    assert seen[-4:] == ["c d e", "c x e", "c y e", "c z e"]
    assert len(keeps_meaning(encode, Bound(0.66, "angular", 3))(prompt, prompt, 3, tried)) == 2
    assert keeps_meaning(encode, Bound(0.99, "angular", 7))(prompt, prompt, 3, tried) == tried  # fewer words than that
    for index, window in ((0, "a b c"), (1, "a b c"), (4, "d e f"), (5, "d e f")):
        keeps_meaning(encode, Bound(0.9, "angular", 3))(prompt, prompt, index, [prompt])
        assert seen[-2:] == [window, window]


def test_the_tagger_keeps_parts_of_speech():
    prompt = Wording.of("a b c d e run g h i j")
    parts = {"run": "VERB", "walk": "VERB", "film": "NOUN", "red": "ADJ"}
    seen = set()

    def tag(words, index):
        seen.add((tuple(words), index))
        return parts[words[index]]

    tried = [prompt.replaced(5, word) for word in ("walk", "film", "red")]
    kept = keeps_part_of_speech(tag)(prompt, prompt, 5, tried)
    assert [one.words[5] for one in kept] == ["walk", "film"]
    assert (("b", "c", "d", "e", "run", "g", "h", "i"), 4) in seen


def test_a_run_is_kept_near_by_local_models(tmp_path):
    (tmp_path / "vectors.txt").write_text("mood 1 0\ntemper 0.9 0.1\n")
    encoder = str(write_tagger(tmp_path / "encoder", bare=True))
    given = {"embeddings": tmp_path / "vectors.txt", "encoder": encoder}
    rows = [{"sentence": "fine", "label": 1}]
    words = "Name its mood in the text, a word of a film or text or answer of it: {content}"

    def generate(prompts, settings):
        return [Completion("positive" if "mood" in prompt else "?", 1, True) for prompt in prompts]

    def changes(least):
        plan = make_plan(["textfooler"], **given, least_similarity=least)
        found = attack_task(get_task("sst2"), rows, generate, plan, prompt=words, template="none")
        return len(found.attacks[0].changes)

    assert (changes(-1.0), changes(1.0)) == (1, 0)
    for wrong, said in (
        ({"encoder": encoder}, "--encoder has no effect"),
        ({"tagger": encoder}, "--tagger has no effect"),
        ({"least_similarity": 0.5}, "give one with --encoder"),
    ):
        with pytest.raises(M3Error, match=said):
            make_plan(["deepwordbug"], **wrong)
    with pytest.raises(M3Error, match="must be from -1 to 1"):
        make_plan(["textfooler"], **given, least_similarity=2.0)


@pytest.mark.torch
def test_encoders_and_taggers_are_those_of_transformers(tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoTokenizer, BertForTokenClassification, BertModel

    place = write_tagger(tmp_path / "tagger")
    text = "the mood of a film"
    theirs = AutoTokenizer.from_pretrained(place)(text, return_tensors="pt")
    with torch.no_grad():
        tagged = BertForTokenClassification.from_pretrained(place).eval()(**theirs).logits.numpy()
        hidden = BertModel.from_pretrained(place, add_pooling_layer=False).eval()(**theirs).last_hidden_state.numpy()
    config = BertConfig.from_directory(place)
    tokens = jnp.asarray(theirs["input_ids"].numpy()), jnp.asarray([theirs["input_ids"].shape[1]])
    ours = tag_logits(load_bert(place, config, Tagger), *tokens, config=config)
    np.testing.assert_allclose(ours, tagged, atol=1e-4, rtol=0)
    assert load_bert(place, config, Encoder).keys() < load_bert(place, config, Tagger).keys()
    np.testing.assert_allclose(load_encoder(str(place))([text])[0], hidden[0].mean(0), atol=1e-4, rtol=0)
