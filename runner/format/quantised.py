"""Matrices in fewer bits: how the forms int8 and int4 store each, and what its tensors are.

    int8   groups of 64 columns of a row: a bfloat16 scale and 64 integers of 8 bits; 8.25 bits a weight
    int4   groups of 32 in super-groups of 256: 6-bit scales and minimums, 32 integers of 4 bits; 4.5 bits
    int5   the same with integers of 5 bits; 5.5 bits

docs/format.md describes the bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from runner.format.coded import LOSSLESS, PLAIN
from runner.format.safetensors import Described, Shape

INT8_FORM, INT4_FORM = "int8", "int4"
QUANTISED_FORMS = (INT8_FORM, INT4_FORM)
# All forms, those that keep every bit first.
FORMS = (PLAIN, LOSSLESS, *QUANTISED_FORMS)
# In a part's __metadata__.
QUANTISED_KEY, QUANTISED_VERSION = "bloomdesk.quantised", 1
SCALES_SUFFIX = ".scales"
# Matrices that lose most by few bits. The embedding is the head, too, and looked up by row.
_SENSITIVE = ("self_attention.dense.weight", "mlp.dense_4h_to_h.weight")
_ENDS = ("word_embeddings.weight", "weight")


@dataclass(frozen=True)
class Coding:
    """How a matrix is stored; `number` is its number in kernel.c.

    Each `columns` columns of a row, filled up with zeros, are `nbytes` bytes of the tensor NAME, whose elements are
    `dtype`. Each `scale_columns` of them share `scale_elements` elements of NAME.scales, which are `scale_dtype`.
    """

    name: str
    number: int
    columns: int
    nbytes: int
    dtype: str
    scale_columns: int
    scale_elements: int
    scale_dtype: str

    def shape(self, shape: Shape) -> Shape:
        """The shape of the integers' tensor for a matrix [N, K]; its elements are bytes."""
        return shape[0], -(-shape[1] // self.columns) * self.nbytes

    def scales_shape(self, shape: Shape) -> Shape:
        """The shape of the scales' tensor for a matrix [N, K]."""
        return shape[0], -(-shape[1] // self.scale_columns) * self.scale_elements

    def stored(self, name: str, shape: Shape) -> tuple[Described, Described]:
        """The two tensors that store the matrix `name` [N, K]: its integers, then its scales."""
        scales = (name + SCALES_SUFFIX, self.scale_dtype, self.scales_shape(shape))
        return (name, self.dtype, self.shape(shape)), scales


INT8 = Coding("int8", 1, 64, 64, "I8", 64, 1, "BF16")
INT4 = Coding("int4", 2, 32, 16, "U8", 256, 16, "U8")
INT5 = Coding("int5", 3, 32, 20, "U8", 256, 16, "U8")
CODINGS = {coding.name: coding for coding in (INT8, INT4, INT5)}


def coding_of(form: str, name: str) -> Coding:
    """How the quantised `form` stores the matrix `name` of a part."""
    if form == INT8_FORM or name in _ENDS:
        return INT8
    return INT5 if name in _SENSITIVE else INT4


def coding_in(stored: Described, shape: Shape) -> Coding | None:
    """How the tensor `stored` holds a matrix of that shape in fewer bits, or None if it is losslessly coded."""
    return next((each for each in CODINGS.values() if each.stored(stored[0], shape)[0] == stored), None)
