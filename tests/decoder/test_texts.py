import dataclasses
import json

import pytest
import sentencepiece
from support.decoders import CONFIGS
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing

from m3jax import M3Error
from m3jax.decoder import DecoderConfig, check_vocabulary, detokenizer, encode, prompt_room
from m3jax.decoder.texts import fit_prompt

transformers = pytest.importorskip("transformers")

CONFIG = DecoderConfig.from_dict(CONFIGS["llama"])
WORDS = ["<unk>", "<s>", "</s>", "if", "x", "!", "=", "y", ",", "do", "n't"]


def words(template=None, **settings):
    """A tokenizer of words between spaces, with what its post-processor puts around them."""
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if template:
        tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=[("<s>", 1), ("</s>", 2)])
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | settings
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.mark.parametrize(
    ("template", "begin"),
    [(None, []), ("$A </s>", []), ("<s> $A", [1]), ("<s> $A </s>", [1]), ("<s> <s> $A </s> </s>", [1, 1])],
)
def test_a_prompt_ends_where_its_text_ends(template, begin):
    tokenizer = words(template)
    assert encode(tokenizer, "if x") == [*begin, 3, 4]
    assert encode(tokenizer, "if x </s>") == [*begin, 3, 4, 2]
    assert encode(tokenizer, "</s>") == [*begin, 2]
    assert encode(tokenizer, "<s> if") == [1, 3]
    assert encode(tokenizer, "") == begin[:1]


def test_a_tokenizer_whose_end_is_its_beginning():
    tokenizer = words("</s> $A </s>", bos_token="</s>")
    assert encode(tokenizer, "if x") == [2, 3, 4]
    assert encode(tokenizer, "") == [2]


def test_code_is_not_tidied():
    tokenizer = words(clean_up_tokenization_spaces=True)
    assert tokenizer.decode([4, 5, 6, 7, 8, 9, 10], clean_up_tokenization_spaces=True) == "x! = y, don't"
    assert detokenizer(tokenizer)([4, 5, 6, 7, 8, 9, 10, 2]) == "x ! = y , do n't"


def test_ids_that_no_token_owns_stand_for_no_text():
    decode = detokenizer(words())
    assert decode([3, 63, 4, 10**6]) == "if x"
    assert decode([63]) == ""


def test_tokens_added_behind_a_gap_keep_their_text():
    tokenizer = words()
    tokenizer.get_vocab = lambda: {"late": 40}
    tokenizer.decode = lambda tokens, **_: str(tokens)
    assert detokenizer(tokenizer)([40, 41]) == "[40]"


def test_rows_without_tokens_are_noted():
    said = check_vocabulary("m", words(), CONFIG)
    assert said == (
        "m: its embedding has 64 rows, but its tokenizer only 11 tokens: the last 53 stand for no text,"
        " and are left out where the model writes one."
    )
    assert check_vocabulary("m", words(), dataclasses.replace(CONFIG, vocab_size=11)) is None
    with pytest.raises(M3Error, match="m: its tokenizer has 11 tokens, but its embedding only 10 rows: take"):
        check_vocabulary("m", words(), dataclasses.replace(CONFIG, vocab_size=10))


def test_a_prompt_leaves_room_for_its_continuation():
    assert [prompt_room(128, n) for n in (1, 40, 64, 65, 1000)] == [127, 88, 64, 64, 64]
    prompt = list(range(3, 63)) * 2
    for length, room in ((88, 88), (89, 88), (64, 64), (120, 88)):
        assert fit_prompt(prompt[:length], "prompt", CONFIG, 40, "truncate_left") == prompt[length - room : length]
    assert fit_prompt(prompt, "prompt", None, 40, "error") == prompt


def test_a_model_with_nothing_but_sentence_pieces_is_read(tmp_path):
    text = "a merge of two models is a model"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text, "def f(x): return x + 1"] * 20),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=48,
        model_type="bpe",
        minloglevel=2,
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    tokens = encode(tokenizer, text)
    assert [token for token in tokens if token != tokenizer.bos_token_id] == pieces.encode(text)
    assert detokenizer(tokenizer)(tokens) == text
