"""Float8 models as quantisers write them, and the numbers that they stand for, in numpy alone."""

import ml_dtypes
import numpy as np

E4M3, E5M2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2


def quantised(weight, block, dtype=E4M3):
    """A weight as float8 and its scales: of blocks of rows and columns, ends of the weight included."""
    rows, columns = (-(-length // size) for length, size in zip(weight.shape, block, strict=True))
    scales = np.empty((rows, columns), np.float32)
    numbers = np.empty(weight.shape, dtype)
    for i in range(rows):
        for j in range(columns):
            here = np.s_[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
            scales[i, j] = np.abs(weight[here]).max() / np.float32(ml_dtypes.finfo(dtype).max)
            numbers[here] = (weight[here] / scales[i, j]).astype(dtype)
    return numbers, scales


def numbers_of(weight, scales, block):
    """float32(weight) · float32(its scale), entry by entry (float32[rows, columns])."""
    found = np.empty(weight.shape, np.float32)
    for i in range(weight.shape[0]):
        for j in range(weight.shape[1]):
            found[i, j] = np.float32(weight[i, j]) * np.float32(scales[i // block[0], j // block[1]])
    return found
