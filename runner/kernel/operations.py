"""What a pass computes between its products: LayerNorm, the weights of attention, and what goes to the KV cache.

Activations are float32 tensors with numbers that the model's dtype has: each operation rounds to it where the
reference implementation does. Sums, exponentials and roots are those of float64, in one order and of one polynomial: so
bits depend neither on the processor nor on what torch would choose for it. Bias, rounding, GELU and residual are part
of the product before them: `Finish` of matmul.py.
"""

from __future__ import annotations

import struct

import torch

from runner.kernel.matmul import LANES, Kernel

# Numbers; fewer are computed before another thread has begun.
WORTH_SHARING = 2**14


def layer_norm(
    kernel: Kernel, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, epsilon: float
) -> torch.Tensor:
    """LayerNorm of x [T, E] float32 with vectors [E] of the kernel's dtype -> [T, E]."""
    out = torch.empty(x.shape)
    if not out.numel():
        return out
    T, E = x.shape
    vectors = weight.data_ptr(), bias.data_ptr()
    places = x.data_ptr(), x.stride(0), out.data_ptr(), out.stride(0)
    arguments = (kernel.kind, *places, *vectors, T, E, bits(epsilon))
    kernel.run("layer_norm", arguments, shared=T > 1 and T * E >= WORTH_SHARING)
    return out


def attend(kernel: Kernel, products: torch.Tensor, alibi: torch.Tensor, start: int, scale: float) -> None:
    """Turn products of queries and keys [H, T, S] into the weights of the values, in their place.

    Scores are `products * scale + alibi` [H, S]; softmax goes over the positions up to `start + t` for row t, and
    others weigh nothing. S is a multiple of the lanes.
    """
    H, T, S = products.shape
    if S % LANES or not products.is_contiguous():
        raise ValueError(f"no scores of whole lanes: {[*products.shape]}")
    places = products.data_ptr(), alibi.data_ptr(), alibi.stride(0)
    arguments = (kernel.kind, *places, H, T, S, start, bits(scale))
    kernel.run("attend", arguments, shared=H * T * S >= WORTH_SHARING)


def store(kernel: Kernel, fused: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, first: int) -> None:
    """Store keys and values of `fused` [T, H, 3, D] float32 at positions `first` and following of a block's cache.

    `keys` [H, capacity, D] and `values` [H, D, capacity] are of the kernel's dtype.
    """
    T, H, _, D = fused.shape
    places = fused.data_ptr(), fused.stride(0), keys.data_ptr(), keys.stride(0)
    arguments = (kernel.kind, *places, values.data_ptr(), *values.stride()[:2], first, H, T, D)
    kernel.run("store", arguments, shared=T * H * D >= WORTH_SHARING)


def bits(number: float) -> int:
    """The word with the bits of a float64."""
    return struct.unpack("q", struct.pack("d", number))[0]
