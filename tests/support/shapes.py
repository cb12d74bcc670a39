"""The type checker of tests/conftest.py: shapes and dtypes of arrays, as annotated, in every call."""

import typing
from collections.abc import Callable
from typing import Any

from beartype import beartype
from jaxtyping import AbstractArray


def of_arrays(hint: Any) -> bool:
    """Whether an annotation says a shape, itself or in what it is made of."""
    return any(of_arrays(part) for part in typing.get_args(hint)) or (
        isinstance(hint, type) and issubclass(hint, AbstractArray)
    )


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, checked by beartype where its annotations speak of arrays.

    Plain types are the type checker's, before anything runs; and a test must be able to hand over a wrong one, to see
    what is said of it.
    """
    function.__annotations__ = {name: hint for name, hint in function.__annotations__.items() if of_arrays(hint)}
    return beartype(function)
