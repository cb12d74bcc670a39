"""What a recipe says of single tokens and of padding, as in mergekit's `tokenizer`."""

import reprlib
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from m3jax.recipe.settings import Place, RecipeError, nearest

_KEYS = ("source", "tokens", "pad_to_multiple_of")
_TOKEN_KEYS = ("source", "force")
_KINDS: dict[str, tuple[str, ...]] = {"zero": ("kind",), "model_token": ("kind", "model", "token", "token_id")}


class TokenSource(NamedTuple):
    """Where a token's row comes from.

    Attributes:
      kind: "model" for the model's row of the token itself, "model_token" for that of another one, "zero" for zeros.
      model: the model; None for zeros.
      token: the other token.
      token_id: its row, in place of `token`.
    """

    kind: Literal["model", "model_token", "zero"]
    model: str | None = None
    token: str | None = None
    token_id: int | None = None


class TokenSettings(NamedTuple):
    """What is said of one token.

    Attributes:
      source: where its row comes from in models that lack it.
      force: in those that have it too.
    """

    source: TokenSource
    force: bool = False


class TokenizerSettings(NamedTuple):
    """The key `tokenizer`, but for its source.

    Attributes:
      tokens: what is said of tokens, by their texts.
      pad_to_multiple_of: what the number of rows is to be a multiple of.
    """

    tokens: Mapping[str, TokenSettings]
    pad_to_multiple_of: int | None = None


def read_tokenizer(raw: object) -> TokenizerSettings | None:
    """Reads the key `tokenizer` without its source.

    Raises:
      RecipeError: it is not as mergekit has it; the place is counted from the key.

    Example:
      >>> read_tokenizer({"tokens": {"<pad>": {"source": {"kind": "zero"}, "force": True}}}).tokens["<pad>"].force
      True
    """
    if raw is None or isinstance(raw, TokenizerSettings):
        return raw
    told = _mapping(raw, _KEYS, ())  # the source has been taken out before
    tokens = told.get("tokens") or {}
    if not isinstance(tokens, Mapping):
        raise RecipeError(f"{reprlib.repr(tokens)} is not a mapping; write a token and what its row is", "tokens")
    multiple = told.get("pad_to_multiple_of")
    if multiple is not None and (not isinstance(multiple, int) or isinstance(multiple, bool) or multiple < 1):
        raise RecipeError(f"{reprlib.repr(multiple)} is no whole number above 0; write one", "pad_to_multiple_of")
    return TokenizerSettings(
        {token: _read_token(said, ("tokens", str(token)), token) for token, said in tokens.items()}, multiple
    )


def _read_token(raw: object, place: Place, token: object) -> TokenSettings:
    if not isinstance(token, str):
        raise RecipeError("the token is not text; quote it", *place)
    told = _mapping(raw, _TOKEN_KEYS, place)
    if told.get("source") is None:
        raise RecipeError("missing; write a model, {kind: zero} or {kind: model_token, …}", *place, "source")
    force = told.get("force", False)
    if not isinstance(force, bool):
        raise RecipeError(f"{reprlib.repr(force)} is not true or false; write one of them", *place, "force")
    return TokenSettings(_read_source(told["source"], (*place, "source")), force)


def _read_source(raw: object, place: Place) -> TokenSource:
    if isinstance(raw, str) and raw.strip():
        return TokenSource("model", raw.strip())
    if not isinstance(raw, Mapping):
        raise RecipeError(f"{reprlib.repr(raw)} is not a model's name, quoted if it is a number; write one", *place)
    kind = raw.get("kind", "model_token")
    if kind not in _KINDS:
        raise RecipeError(f"{reprlib.repr(kind)} is no kind; {nearest(str(kind), _KINDS)}", *place, "kind")
    told = _mapping(raw, _KINDS[kind], place)
    if kind == "zero":
        return TokenSource("zero")
    model, token, number = told.get("model"), told.get("token"), told.get("token_id")
    if not isinstance(model, str):
        raise RecipeError("missing; name the model whose row it is", *place, "model")
    if (token is None) == (number is None):
        raise RecipeError("write either token or token_id", *place)
    if token is not None and not isinstance(token, str):
        raise RecipeError(f"{reprlib.repr(token)} is not text; quote it", *place, "token")
    if number is not None and (not isinstance(number, int) or isinstance(number, bool) or number < 0):
        raise RecipeError(f"{reprlib.repr(number)} is no row; write a whole number from 0", *place, "token_id")
    return TokenSource("model_token", model, token, number)


def _mapping(raw: object, known: tuple[str, ...], place: Place) -> Mapping[Any, Any]:
    if not isinstance(raw, Mapping):
        raise RecipeError(f"{reprlib.repr(raw)} is not a mapping; write 'key: value' lines", *place)
    for key in raw:
        if key not in known:
            raise RecipeError(f"unknown key; {nearest(str(key), known)}", *place, str(key))
    return raw


def plain_tokenizer(settings: TokenizerSettings | None) -> dict[str, Any] | None:
    """The settings in the words of YAML and JSON."""
    if settings is None:
        return None
    tokens = {
        token: {"source": _plain_source(told.source), **({"force": True} if told.force else {})}
        for token, told in settings.tokens.items()
    }
    multiple = settings.pad_to_multiple_of
    return {"tokens": tokens, **({} if multiple is None else {"pad_to_multiple_of": multiple})}


def _plain_source(source: TokenSource) -> Any:
    if source.kind == "model":
        return source.model
    return {key: value for key, value in source._asdict().items() if value is not None}
