"""What kernel.c computes, one number after another in plain Python: the specification that its variants are held to."""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

LANES, CHUNK, GROUP_ROWS, GROUP = 8, 4096, 12, 64


def float32(value: Fraction) -> float:
    """The nearest float32, ties to even; infinite beyond the largest."""
    exponent = abs(value.numerator).bit_length() - value.denominator.bit_length()
    exponent -= abs(value) < Fraction(2) ** exponent
    unit = Fraction(2) ** (max(exponent, -126) - 23)
    nearest = round(value / unit) * unit
    size = float(abs(nearest)) if abs(nearest) < 2**128 else math.inf
    # A fraction has no sign if it is zero, and what underflows has.
    return math.copysign(size, value)


def fused(a: float, b: float, c: float) -> float:
    """a * b + c for float32 numbers, rounded once."""
    if not all(map(math.isfinite, (a, b, c))):
        return a * b + c
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    # Zero has the sign that IEEE 754 gives it, in double as in single.
    return float32(exact) if exact else a * b + c


def added(a: float, b: float) -> float:
    return fused(a, 1.0, b)


def dot(x: Sequence[float], weights: Sequence[float], before: float) -> float:
    """`before` plus the sum of products: in 8 lanes over each 4,096 columns, folded in halves, then the rest."""
    for start in range(0, len(x), CHUNK):
        pairs = list(zip(weights[start : start + CHUNK], x[start : start + CHUNK], strict=True))
        whole = len(pairs) // LANES * LANES
        lanes = [0.0] * LANES
        for k in range(whole):
            lanes[k % LANES] = fused(*pairs[k], lanes[k % LANES])
        while len(lanes) > 1:
            half = len(lanes) // 2
            lanes = [added(low, high) for low, high in zip(lanes[:half], lanes[half:], strict=True)]
        for weight, value in pairs[whole:]:
            lanes[0] = fused(weight, value, lanes[0])
        before = added(before, lanes[0])
    return before


def panels(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """The weights of each panel of a row group, row by row."""
    return [
        [weight for row in rows for weight in row[start : start + CHUNK]]
        for start in range(0, len(rows[0]), CHUNK)
    ]


def padded(data: bytes, multiple: int) -> bytes:
    return data + bytes(-len(data) % multiple)


def encoded(weights: Sequence[int]) -> bytes:
    """The coded panel of bfloat16 bits, as docs/format.md describes it."""
    turned = [(weight << 1 | weight >> 15) & 0xFFFF for weight in weights]
    counts = Counter({kind: 0 for kind in range(256)}) + Counter()
    counts.update(word >> 8 for word in turned)
    ranked = sorted(range(256), key=lambda kind: (-counts[kind], kind))[:9]
    symbols, header, body = [word >> 8 for word in turned], bytearray(32), b""
    for level in range(3):
        table = ranked[3 * level : 3 * level + 3]
        header[16 + 4 * level : 19 + 4 * level] = bytes(table)
        codes = padded(bytes(table.index(each) if each in table else 3 for each in symbols), GROUP)
        for start in range(0, len(codes), GROUP):
            quarters = [codes[start + place : start + place + 16] for place in (0, 16, 32, 48)]
            body += bytes(a | b << 2 | c << 4 | d << 6 for a, b, c, d in zip(*quarters, strict=True))
            if level == 0:
                body += padded(bytes(word & 255 for word in turned[start : start + GROUP]), GROUP)
        symbols = [each for each in symbols if each not in table]
        header[4 * level : 4 * level + 4] = struct.pack("<I", len(symbols))
    stored = padded(b"".join(struct.pack("<H", weight) for weight in weights), 16)
    body += padded(bytes(symbols), 16)
    return bytes(header) + body if len(body) < len(stored) else bytes(12) + b"\1" + bytes(19) + stored


def decoded(panel: bytes, count: int) -> list[int]:
    """The bfloat16 bits of a sound coded panel of `count` weights."""
    if panel[12]:
        return list(struct.unpack_from(f"<{count}H", panel, 32))
    counts = (count, *struct.unpack_from("<3I", panel))
    places, start = [], 32
    for level in range(3):
        places.append(start)
        start += -(-counts[level] // GROUP) * (16 if level else 80)
    symbols = iter(panel[start : start + counts[3]])
    for level in (2, 1, 0):
        step, found = 16 if level else 80, []
        for place in range(counts[level]):
            group, inside = divmod(place, GROUP)
            code = panel[places[level] + step * group + inside % 16] >> inside // 16 * 2 & 3
            found.append(panel[16 + 4 * level + code] if code < 3 else next(symbols))
        symbols = iter(found)
    others = [panel[32 + 80 * (place // GROUP) + 16 + place % GROUP] for place in range(count)]
    turned = [exponent << 8 | other for exponent, other in zip(symbols, others, strict=True)]
    return [word >> 1 | (word & 1) << 15 for word in turned]


def single(value: float) -> float:
    """The nearest float32 of a float64, ties to even."""
    return float32(Fraction(value)) if math.isfinite(value) and value else value


def rounded(kind: str, value: float) -> float:
    """The nearest number of a dtype to a float32, ties to even."""
    if kind == "float32" or not math.isfinite(value):
        return value
    if kind == "float16":
        try:
            return struct.unpack("<e", struct.pack("<e", value))[0]
        except OverflowError:
            return math.copysign(math.inf, value)
    bits = struct.unpack("<I", struct.pack("<f", value))[0]
    return struct.unpack("<f", struct.pack("<I", bits + 0x7FFF + (bits >> 16 & 1) & 0xFFFF0000))[0]


def power_of_e(x: float) -> tuple[float, float]:
    """(2^n, rest), of which 2^n * (1 + rest) is e to the power of x: ten terms of its series, in float64."""
    if math.isnan(x):
        return 1.0, x
    whole = 1.5 * 2.0**52
    n = (x * float.fromhex("0x1.71547652b82fep0") + whole) - whole
    high, low = float.fromhex("0x1.62e42feep-1"), float.fromhex("0x1.a39ef35793c76p-33")
    r, total = (x - n * high) - n * low, 0.0
    for term in range(10, 0, -1):
        total = (total + 1 / math.factorial(term)) * r
    return 2.0**n, total


def exponential(x: float) -> float:
    scale, rest = power_of_e(-150.0 if x < -150 else x)
    return scale + scale * rest


def hyperbolic_tangent(x: float) -> float:
    scale, rest = power_of_e(-2 * min(abs(x), 20.0) if x == x else x)
    less = scale * rest + (scale - 1)
    return math.copysign(single(-less / (less + 2)), x)


def gelu(kind: str, x: float) -> float:
    """The tanh approximation, each operation rounded to float32 and to the dtype."""

    def of(value: float) -> float:
        return rounded(kind, single(value))

    cube = of(of(x * CUBIC) * x)
    inner = of(of(x * FACTOR) * of(cube + 1))
    return of(of(x * 0.5) * of(rounded(kind, hyperbolic_tangent(inner)) + 1))


CUBIC, FACTOR = (struct.unpack("<f", struct.pack("<f", value))[0] for value in (0.044715, 0.79788456))


def in_lanes(values: Sequence[float]) -> float:
    """The sum of float64 numbers, in 8 lanes that are folded in halves."""
    lanes = [0.0] * LANES
    for place, value in enumerate(values):
        lanes[place % LANES] += value
    while len(lanes) > 1:
        half = len(lanes) // 2
        lanes = [low + high for low, high in zip(lanes[:half], lanes[half:], strict=True)]
    return lanes[0]


def layer_norm(
    kind: str, x: Sequence[float], weight: Sequence[float], bias: Sequence[float], epsilon: float
) -> list[float]:
    mean = in_lanes(x) / len(x)
    scale = 1 / math.sqrt(in_lanes([(value - mean) * (value - mean) for value in x]) / len(x) + epsilon)
    numbers = zip(x, weight, bias, strict=True)
    return [rounded(kind, single((value - mean) * scale * w + b)) for value, w, b in numbers]


def attention_weights(
    kind: str, products: Sequence[float], alibi: Sequence[float], last: int, scale: float
) -> list[float]:
    """Softmax of `products * scale + alibi`, with the dtype's lowest number added beyond position `last`."""
    lowest = {"float16": -65504.0, "bfloat16": -(2.0**128 - 2.0**120), "float32": -(2.0**128 - 2.0**104)}[
        kind
    ]
    scores = []
    for place, (product, bias) in enumerate(zip(products, alibi, strict=True)):
        score = rounded(kind, single(single(product * scale) + bias))
        scores.append(rounded(kind, single(score + (lowest if place > last else 0.0))))
    powers = [single(exponential(score - max(scores))) for score in scores]
    part = 1 / in_lanes(powers)
    return [rounded(kind, single(power * part)) for power in powers]
