"""Matrices into fewer bits and back; docs/format.md describes the bytes.

A weight is a small integer times a scale, or less a minimum, rounded to the model's dtype. That is the value that a
product uses and that an export has.
"""

from __future__ import annotations

import ctypes

from runner.format.quantised import Coding
from runner.format.safetensors import BYTES_PER_ELEMENT, tensor_nbytes
from runner.kernel.decode import as_array
from runner.kernel.library import load_kernel

# The numbers of kernel.c for the dtypes of a model.
KINDS = {"BF16": 0, "F16": 1, "F32": 2}


def quantise_rows(rows: object, columns: int, coding: Coding, dtype: str) -> tuple[bytearray, bytearray]:
    """The integers and the scales of whole rows of `dtype` in the buffer `rows`.

    The same rows always give the same bytes, in any company and on every processor. Raises ValueError if the buffer
    does not hold whole rows, or some weights are infinite, not numbers, or too large. The interpreter's lock is free
    meanwhile.
    """
    source = as_array(rows)
    count, rest = divmod(len(source), columns * BYTES_PER_ELEMENT[dtype])
    if rest or not count:
        raise ValueError(f"{len(source):,} bytes are no rows of {columns:,} weights")
    shape = count, columns
    data = bytearray(tensor_nbytes(coding.dtype, coding.shape(shape)))
    scales = bytearray(tensor_nbytes(coding.scale_dtype, coding.scales_shape(shape)))
    kernel = load_kernel()
    if kernel.encode_quantised(
        coding.number, KINDS[dtype], source, count, columns, as_array(data), as_array(scales)
    ):
        raise ValueError("weights are infinite, not numbers, or too large")
    return data, scales


def dequantise_rows(
    data: object, scales: object, shape: tuple[int, int], coding: Coding, dtype: str, out: object
) -> None:
    """Decode a matrix of that shape, or some of its rows, into the buffer `out` of weights of `dtype`.

    Raises ValueError if the buffers do not fit. The interpreter's lock is free meanwhile.
    """
    integers, own_scales, target = as_array(data), as_array(scales), as_array(out)
    sizes = (
        tensor_nbytes(coding.dtype, coding.shape(shape)),
        tensor_nbytes(coding.scale_dtype, coding.scales_shape(shape)),
        tensor_nbytes(dtype, shape),
    )
    if sizes != (len(integers), len(own_scales), len(target)):
        raise ValueError(f"{len(integers):,} and {len(own_scales):,} bytes do not hold weights {[*shape]}")
    kernel = load_kernel()
    scratch = (ctypes.c_ubyte * kernel.scratch_bytes_of_decoder())()
    rows, columns = shape
    kernel.decode_quantised(coding.number, KINDS[dtype], integers, own_scales, rows, columns, target, scratch)
