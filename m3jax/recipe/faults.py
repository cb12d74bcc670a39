"""The one sentence for what is wrong with a recipe: at which dotted place, what, and the mend."""

import reprlib
from collections.abc import Mapping

from pydantic import BaseModel, ValidationError

from m3jax.recipe.settings import Place, dotted, nearest

_WANTED = {
    "string_type": "text, quoted if it looks like a number",
    "string_too_short": "a name that is not empty",
    "tuple_type": "a list",
    "too_short": "a longer list",
    "too_long": "a shorter list",
    "model_type": "'key: value' lines",
    "bool_type": "true or false",
    "int_type": "a whole number",
    "invalid_key": "keys that are text, quoted if YAML reads them as something else",
}


def say(place: Place, message: object) -> str:
    """A sentence with the place that it is about."""
    return f"{dotted(place)}: {message}" if place else str(message)


def sentence(error: ValidationError, schemas: Mapping[Place, type[BaseModel]]) -> str:
    """The one sentence for the first thing that pydantic found wrong.

    Args:
      error: pydantic's.
      schemas: what has which keys, by place without the numbers of entries.
    """
    found = error.errors(include_url=False)
    # a misspelt key is also a missing one; the misspelling says more
    first = min(found, key=lambda entry: entry["type"] != "extra_forbidden")
    place, got = first["loc"], reprlib.repr(first["input"])
    match first["type"]:
        case "value_error":
            cause = first["ctx"]["error"]
            return say((*place, *getattr(cause, "place", ())), cause)
        case "extra_forbidden":
            keys = tuple(key for key in place[:-1] if isinstance(key, str))
            schema = schemas[keys[2:] or keys[:1] if keys[:1] == ("modules",) else keys]
            return say(place, f"unknown key; {nearest(str(place[-1]), schema.model_fields)}")
        case "missing":
            return say(place, "missing; add it")
        case "literal_error":
            return say(place, f"{got} is not one of {first['ctx']['expected']}; write one of them")
        case kind:
            return say(place, f"{got} does not fit here; write {_WANTED.get(kind, 'another value')}")
