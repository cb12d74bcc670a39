"""Angles in float64 with one meaning on every machine.

The sines of mathematical libraries differ in their last bit between processors and versions. These are made of +, −, ×,
÷ and √ of numpy alone, which IEEE 754 rounds alike everywhere, and are right to about 10⁻¹⁵.
"""

import functools
import math

import numpy as np

_ARCTANGENT = [(-1) ** k / (2 * k + 1) for k in range(9)]  # to 2⁻⁵⁹ below 0.0985
_SINE = [(-1) ** k / math.factorial(2 * k + 1) for k in range(13)]  # to 2⁻⁶⁷ below π/2


def _odd(x: np.ndarray, coefficients: list[float]) -> np.ndarray:
    """x·(c₀ + c₁x² + c₂x⁴ + …)."""
    square = x * x
    result: np.ndarray = x * functools.reduce(lambda sum_, c: sum_ * square + c, reversed(coefficients))
    return result


def arccos(cosine: np.ndarray | float) -> np.ndarray:
    """The angle in [0, π] of a cosine in [−1, 1].

    Example:
        >>> float(arccos(-1.0)) == math.pi
        True
    """
    x = np.asarray(cosine, np.float64)
    near = np.abs(x)
    half = np.sqrt((1.0 - near) / (1.0 + near))  # the tangent of half the angle to the nearer pole
    for _ in range(3):
        half = half / (1.0 + np.sqrt(1.0 + half * half))
    angle = 16.0 * _odd(half, _ARCTANGENT)
    result: np.ndarray = np.where(x < 0, math.pi - angle, angle)
    return result


def sin(angle: np.ndarray | float) -> np.ndarray:
    """The sine of an angle in radians, of some turns at most.

    Example:
        >>> float(sin(math.pi / 2))
        1.0
    """
    x = np.asarray(angle, np.float64)
    x = x - 2 * math.pi * np.rint(x / (2 * math.pi))
    return _odd(np.where(np.abs(x) > math.pi / 2, np.copysign(math.pi, x) - x, x), _SINE)


def cos(angle: np.ndarray | float) -> np.ndarray:
    """The cosine of an angle in radians, of some turns at most.

    Example:
        >>> float(cos(0.0))
        1.0
    """
    half = sin(np.asarray(angle, np.float64) / 2)
    result: np.ndarray = 1.0 - 2.0 * half * half
    return result
