"""Inner products of long vectors in float64, on the host, which do not depend on where the vectors are cut.

Vectors are cut into segments of one size. Within one, products are rounded to multiples of a unit, 2⁻⁴¹ of a power of
two above all of them: sums of these are exact in float64, so that any order gives them. The sums of segments are to be
added with `math.fsum`, which is exact too.

References:
    Demmel & Nguyen, Parallel reproducible summation, 2015.
"""

import numpy as np
import numpy.typing as npt

SEGMENT_BITS = 12
SEGMENT = 2**SEGMENT_BITS
"""Entries of a segment: as many terms as 53 bits hold beside the 41 of each."""

Floats = npt.NDArray[np.float64]


def largest(rows: Floats) -> Floats:
    """The largest magnitude of each row, float64[rows]; NaN or infinite where an entry is."""
    found: Floats = np.maximum(rows.max(axis=-1), -rows.min(axis=-1))
    return found


def sums_of(products: Floats) -> Floats:
    """The sum of each row of products; the array is used up.

    Args:
        products: float64[rows, segment], finite, with at most `SEGMENT` columns.

    Returns:
        float64[rows].

    Example:
        >>> sums_of(0.5 * np.array([[1.0, 2.0, -4.0]]))
        array([-0.5])
    """
    _, exponents = np.frexp(largest(products))
    anchors = np.ldexp(1.5, exponents + SEGMENT_BITS - 1)[:, None]  # its last place is the unit
    products += anchors
    products -= anchors
    found: Floats = products.sum(axis=-1)
    return found
