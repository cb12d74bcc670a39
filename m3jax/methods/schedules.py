"""Weights of the steps of one training run that are averaged: how much each step counts. Needs no JAX.

References:
    Izmailov et al., Averaging Weights Leads to Wider Optima and Better Generalization, 2018, arXiv 1803.05407. Kaddour,
    Stop Wasting My Time! (LAWA), 2022, arXiv 2209.14981. Tian et al., WSM: Decay-Free Learning Rate Schedule via
    Checkpoint Merging, 2025, arXiv 2507.17634.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from m3jax.errors import M3Error

SHAPES = ("linear", "1-sqrt")
"""Of the decay of a learning rate, which `wsm` stands for."""


class Schedule(NamedTuple):
    """How much each step counts.

    Attributes:
        method: "uniform", "ema" or "wsm".
        decay: Of ema the factor from a step to the one before, of wsm the shape of the decay; None of uniform.
    """

    method: str
    decay: float | str | None = None

    def to_json(self) -> dict[str, Any]:
        """As a recipe says it."""
        return {"method": self.method, **({} if self.decay is None else {"decay": self.decay})}


def read_schedule(said: object) -> Schedule:
    """A schedule from what a recipe or a caller says.

    Args:
        said: "uniform", "wsm", or a mapping such as {"method": "ema", "decay": 0.9} or {"method": "wsm", "decay":
            "1-sqrt"}.

    Raises:
        M3Error: It says something else.

    Example:
        >>> read_schedule("wsm"), read_schedule({"method": "ema", "decay": 0.5}).decay
        (Schedule(method='wsm', decay='linear'), 0.5)
    """
    if isinstance(said, Schedule):
        said = said.to_json()
    told: Mapping[Any, Any] = said if isinstance(said, Mapping) else {"method": said}
    method, decay = told.get("method"), told.get("decay")
    odd = next((key for key in told if key not in ("method", "decay")), None)
    if odd is not None:
        raise M3Error(f"schedule: {odd!r} is no key of it: write method and decay")
    match method:
        case "uniform":
            if decay is not None:
                raise M3Error("schedule: uniform has no decay: remove it, or write method: ema")
            return Schedule("uniform")
        case "ema":
            number = isinstance(decay, int | float) and not isinstance(decay, bool)
            if not number or not 0.0 < float(decay) < 1.0:  # type: ignore[arg-type]
                raise M3Error(f"schedule: the decay of ema is {decay!r}: write a number between 0 and 1")
            return Schedule("ema", float(decay))  # type: ignore[arg-type]
        case "wsm":
            shape = SHAPES[0] if decay is None else decay
            if shape not in SHAPES:
                raise M3Error(f"schedule: the decay of wsm is {decay!r}: write one of {', '.join(SHAPES)}")
            return Schedule("wsm", str(shape))
        case _:
            raise M3Error(f"schedule: {method!r} is not known: write uniform, ema or wsm")


def schedule_weights(schedule: Schedule, count: int) -> tuple[float, ...]:
    """The weight of each step, the earliest first; they sum to 1.

    Of `ema`, wₖ ∝ decay^(K−k). Of `wsm` they are those under which the average is what training would have given whose
    learning rate fell to nothing over the window: with updates gᵢ between steps, Σ wₖθₖ = θ₁ + Σ aᵢgᵢ, so that
    wₖ = aₖ₋₁ − aₖ for a decay a from 1 to 0. A linear decay is the uniform average.

    Args:
        schedule: Which.
        count: How many steps.

    Example:
        >>> schedule_weights(Schedule("ema", 0.5), 2)
        (0.3333333333333333, 0.6666666666666666)
        >>> [round(w, 3) for w in schedule_weights(Schedule("wsm", "1-sqrt"), 4)]
        [0.5, 0.207, 0.159, 0.134]
    """
    match schedule.method, schedule.decay:
        case "ema", float(decay):
            shares = [decay ** (count - 1 - k) for k in range(count)]
        case "wsm", "1-sqrt":
            shares = [math.sqrt((k + 1) / count) - math.sqrt(k / count) for k in range(count)]
        case _:
            shares = [1.0] * count
    total = math.fsum(shares)
    return tuple(share / total for share in shares)
