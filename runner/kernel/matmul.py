"""The matrix product of a pass: float32 rows times weights in the form they are stored in.

    out[b, t, n] += sum over k of x[b, t, k] * weight[b, n, k]

Or, with a `Finish`, out[b, t, n] becomes what the model makes of that sum.

Every sum is taken in one order, whatever the number of rows, the cut of the matrix into chunks, or the number of
threads: 8 lanes over each 4,096 columns, the lanes folded in halves, these partial sums one after another, each
multiplication fused with its addition. So a row's result has the same bits alone and in company, and on every
processor. Columns beyond the last multiple of 8 come after the lanes, one by one; zeros up to it change nothing.

kernel.c computes it. A few rows and a few columns are multiplied at a time with all their sums in registers, and a
group of outputs stays in the cache until all rows have used it. Coded weights are decoded a panel at a time into memory
that stays in the cache, right before their use. One row runs at the memory's speed, many rows at that of the
multipliers; docs/performance.md has the measurements.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from itertools import pairwise

import torch

from runner.format.coded import PANEL_COLUMNS, ROW_GROUP_ROWS, row_group_count
from runner.format.quantised import Coding
from runner.kernel.library import load_kernel
from runner.kernel.threads import Workers

# Those of kernel.c: partial sums of an output; columns, rows of x and outputs that are multiplied before the next ones.
LANES = 8
COLUMN_CHUNK, ROWS_IN_CACHE, OUTPUTS_IN_CACHE = PANEL_COLUMNS, 64, ROW_GROUP_ROWS
# The names of weights in kernel.c.
_KINDS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_CODED = 3
# What its number is multiplied with if weights are in fewer bits.
_CODINGS = 4

SHARES_A_THREAD = 8
# Multiplications; fewer are done before another thread has begun.
WORTH_SHARING = 2**18


@dataclass(frozen=True)
class Finish:
    """A product that takes the place of `out`, each output finished right after its sum.

    The sum begins with the output's `bias` [N], if there is one, and is rounded to the kernel's dtype if it `rounds`.
    Then GELU is taken if it `activates`, and the `residual` [T, N] is added, float32 with numbers of that dtype. All
    that is rounded stays float32, too.
    """

    bias: torch.Tensor | None = None
    rounds: bool = True
    activates: bool = False
    residual: torch.Tensor | None = None

    def part(self, first: int, last: int) -> Finish:
        """That of the outputs `first` to `last`."""
        bias, residual = self.bias, self.residual
        return Finish(
            None if bias is None else bias[first:last],
            self.rounds,
            self.activates,
            None if residual is None else residual[:, first:last],
        )

    def words(self, kind: int) -> tuple[int, ...]:
        """`struct finish` of kernel.c."""
        bias, residual = self.bias, self.residual
        return (
            1,
            kind,
            0 if bias is None else bias.data_ptr(),
            self.rounds,
            self.activates,
            *((0, 0) if residual is None else (residual.data_ptr(), residual.stride(0))),
        )


_SUMS_ALONE = (0,) * 7


class Kernel:
    """The product for weights of one dtype, on the threads of `workers`."""

    def __init__(self, dtype: torch.dtype, workers: Workers) -> None:
        self.dtype, self.kind = dtype, _KINDS[dtype]
        self._workers = workers
        self._functions: dict[str, int] = {}

    def accumulate(
        self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, finish: Finish | None = None
    ) -> None:
        """Add `x @ weight.T` to `out`: x [T, K] float32, weight [N, K], out [T, N] float32; all dense along rows.

        With a B before each of these, B such products. Raises ValueError if rows are not dense or shapes do not fit.
        """
        *B, T, K = x.shape
        N = weight.shape[-2]
        if weight.shape != (*B, N, K) or out.shape != (*B, T, N):
            raise ValueError(f"a product of {[*x.shape]} and {[*weight.shape]} does not give {[*out.shape]}")
        if out.numel() and not (x.stride(-1) == weight.stride(-1) == out.stride(-1) == 1):
            raise ValueError("the rows of a product must be dense")
        self._run(self.kind, _laid_out(weight), x, out, finish)

    def accumulate_coded(
        self,
        x: torch.Tensor,
        coded: torch.Tensor,
        offsets: torch.Tensor,
        out: torch.Tensor,
        finish: Finish | None = None,
    ) -> None:
        """Add `x @ weight.T` to `out` [T, N], for weights [N, K] that are losslessly coded bfloat16.

        int64 `offsets` [row groups + 1] say at which byte of `coded` each row group begins, and where the last ends.
        Raises ValueError if these do not fit each other, or the coded bytes are damaged.
        """
        N = out.shape[1]
        if len(offsets) != row_group_count(N) + 1 or not _ascends(offsets, coded.numel()):
            raise ValueError(f"no offsets of {N} rows in {coded.numel():,} coded bytes")
        weight = (coded.data_ptr(), 0, offsets.data_ptr())
        if self._run(_CODED, weight, x, out, finish):
            raise ValueError("the coded weights are damaged")

    def accumulate_quantised(
        self,
        x: torch.Tensor,
        data: torch.Tensor,
        scales: torch.Tensor,
        coding: Coding,
        out: torch.Tensor,
        finish: Finish | None = None,
    ) -> None:
        """Add `x @ weight.T` to `out` [T, N], for weights [N, K] of the kernel's dtype in fewer bits.

        `data` and `scales` are their tensors as `coding` has them, dense. Raises ValueError if shapes do not fit.
        """
        shape = out.shape[1], x.shape[1]
        if (data.shape, scales.shape) != (coding.shape(shape), coding.scales_shape(shape)):
            raise ValueError(f"{[*data.shape]} and {[*scales.shape]} do not hold weights {[*shape]}")
        weight = (data.data_ptr(), 0, scales.data_ptr())
        self._run(self.kind + _CODINGS * coding.number, weight, x, out, finish)

    def run(self, name: str, arguments: tuple[int, ...], *, shared: bool) -> bool:
        """Run a task function of kernel.c, on all free threads if it is `shared`; whether it says that it failed."""
        address = self._functions.get(name)
        if address is None:
            address = ctypes.cast(getattr(load_kernel(), name), ctypes.c_void_p).value
            self._functions[name] = address
        return self._workers.run(address, arguments, shared=shared)

    def _run(
        self,
        kind: int,
        weight: tuple[int, int, int],
        x: torch.Tensor,
        out: torch.Tensor,
        finish: Finish | None,
    ) -> bool:
        """Run one product on all free threads; whether coded weights were damaged."""
        if not out.numel():
            return False
        *B, T, K = x.shape
        B, N = B[0] if B else 1, out.shape[-1]
        shared = B * T * N * K >= WORTH_SHARING
        # Outputs that a thread takes at a time: so few that all threads end at about the same time, even if some
        # cores are slower.
        share = N // (SHARES_A_THREAD * self._workers.count) if shared else N
        share = max(1, share // OUTPUTS_IN_CACHE) * OUTPUTS_IN_CACHE if share < N else N
        words = finish.words(self.kind) if finish else _SUMS_ALONE
        arguments = (kind, *weight, *_laid_out(x), *_laid_out(out), B, T, N, K, share, *words)
        return self.run("multiply", arguments, shared=shared)


def _laid_out(tensor: torch.Tensor) -> tuple[int, int, int]:
    """Address of a tensor [B, rows, columns] or [rows, columns], and its strides over B and rows."""
    strides = tensor.stride()
    return tensor.data_ptr(), strides[0] if len(strides) == 3 else 0, strides[-2]


def _ascends(offsets: torch.Tensor, end: int) -> bool:
    """Whether row groups at these offsets lie one after another within `end` bytes."""
    places = offsets.tolist()
    return all(0 <= first <= last <= end for first, last in pairwise(places))
