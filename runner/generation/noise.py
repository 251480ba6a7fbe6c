"""Random numbers that depend on their place alone, with the same bits on every processor.

    seed, sequence, choice, position, token id ──> Philox 4x32-10 ──> uniform number ──> Gumbel noise

A counter-based generator has no state, so the noise of a token is the same in a batch, behind a draft and in a resumed
run. `exp` and `log` are sums and products of float64 in one order, because those of libraries differ between
processors by a bit. Philox: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", 2011.
"""

from __future__ import annotations

import math

import torch

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
# ln 2 as a number with 21 zeros at its end, so that small multiples of it are exact, and what is left.
_LN2_HIGH, _LN2_LOW = 0.6931471803691238, 1.9082149292705877e-10
_MANTISSA = 2**52 - 1
_LOG_TERMS = 12
_EXP_TERMS = 15
# Below this, a number's exponential is taken as 0.
_LEAST_EXPONENT = -700.0

Words = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def philox(counter: Words, key: tuple[int, int]) -> Words:
    """Philox 4x32-10: four words of 32 bits from four words of a counter and two of a key, in int64 tensors."""
    a, b, c, d = counter
    first, second = key
    for _ in range(_ROUNDS):
        high_a, low_a = _product(_MULTIPLIERS[0], a)
        high_c, low_c = _product(_MULTIPLIERS[1], c)
        a, b, c, d = high_c ^ b ^ first, low_c, high_a ^ d ^ second, low_a
        first, second = (first + _KEY_STEPS[0]) & _WORD, (second + _KEY_STEPS[1]) & _WORD
    return a, b, c, d


def gumbel(seed: int, sequence: int, choice: int, position: int, ids: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise for the token `ids` [n] at `position` of a sequence, float64 [n]; `seed` has 64 bits.

    The argmax of logits plus noise is distributed as their softmax.
    """
    places = (position & _WORD, choice & _WORD, sequence & _WORD)
    counter = (ids >> 1, *(torch.full_like(ids, place) for place in places))
    words = philox(counter, (seed & _WORD, seed >> 32 & _WORD))
    is_odd = (ids & 1).bool()
    high, low = torch.where(is_odd, words[2], words[0]), torch.where(is_odd, words[3], words[1])
    # 52 bits and a half: never 0, never 1.
    uniform = ((high << 20 | low >> 12).double() + 0.5) * 2.0**-52
    return -log(-log(uniform))


def log(x: torch.Tensor) -> torch.Tensor:
    """Natural logarithm of positive, normal float64 numbers."""
    bits = x.view(torch.int64)
    exponent = (bits >> 52) - 1023
    mantissa = (bits & _MANTISSA | 1023 << 52).view(torch.float64)
    is_large = mantissa > math.sqrt(2)
    mantissa = torch.where(is_large, mantissa * 0.5, mantissa)
    exponent = (exponent + is_large).double()
    # log m = 2 artanh s
    s = (mantissa - 1) / (mantissa + 1)
    square = s * s
    total = torch.full_like(s, 1 / (2 * _LOG_TERMS + 1))
    for term in range(_LOG_TERMS - 1, -1, -1):
        total = total * square
        total = total + 1 / (2 * term + 1)
    return exponent * _LN2_HIGH + (exponent * _LN2_LOW + 2 * (s * total))


def exp(x: torch.Tensor) -> torch.Tensor:
    """Exponential of float64 numbers up to 700; 0 below -700."""
    bounded = x.clamp(min=_LEAST_EXPONENT)
    count = torch.round(bounded * (1 / math.log(2)))
    rest = bounded - count * _LN2_HIGH
    rest = rest - count * _LN2_LOW
    total = torch.ones_like(rest)
    for term in range(_EXP_TERMS, 0, -1):
        total = total * rest
        total = total * (1 / term) + 1
    power = (count.long() + 1023 << 52).view(torch.float64)
    return torch.where(x < _LEAST_EXPONENT, 0.0, total * power)


def _product(multiplier: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low word of a product of two words; beyond 63 bits int64 wraps around, and the bits are right."""
    product = x * multiplier
    return product >> 32 & _WORD, product & _WORD
