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
    """The nearest float32."""
    return struct.unpack("f", struct.pack("f", value))[0]


def bfloat16(value: float, away: bool = False) -> float:
    """A float32 rounded to the nearest bfloat16, ties to even, or away from zero."""
    (bits,) = struct.unpack("I", struct.pack("f", value))
    bits += 0xFFFF if away else 0x7FFF + (bits >> 16 & 1)
    return struct.unpack("f", struct.pack("I", bits >> 16 << 16))[0]


def as_dtype(value: float, dtype: str) -> float:
    """A float32 rounded to a dtype of weights."""
    if dtype == "F32":
        return value
    return bfloat16(value) if dtype == "BF16" else struct.unpack("e", struct.pack("e", value))[0]


def nearest(value: float, low: int, top: int) -> int:
    return round(min(max(value, low), top))


def int8(weights: Sequence[float]) -> tuple[bytes, bytes]:
    """The integers and scales of a row, in groups of 64."""
    data, scales = b"", b""
    for start in range(0, len(weights), 64):
        group = [*weights[start : start + 64], *[0.0] * 64][:64]
        most = max(map(abs, group))
        scale = bfloat16(single(most / 127), away=True) if most >= single(1e-30) else 0.0
        data += struct.pack("64b", *(nearest(single(w / scale), -127, 127) if scale else 0 for w in group))
        scales += struct.pack("f", scale)[2:]
    return data, scales


def int8_weights(data: bytes, scales: bytes, columns: int, dtype: str) -> list[float]:
    """The weights of a row that `int8` has made."""
    units = [struct.unpack("f", bytes(2) + scales[at : at + 2])[0] for at in range(0, len(scales), 2)]
    integers = struct.unpack(f"{len(data)}b", data)[:columns]
    return [as_dtype(single(q * units[k // 64]), dtype) for k, q in enumerate(integers)]


def summed(values: Sequence[float]) -> float:
    """In 8 lanes, which are folded in halves."""
    lanes = [0.0] * LANES
    for k, value in enumerate(values):
        lanes[k % LANES] = single(lanes[k % LANES] + value)
    while len(lanes) > 1:
        half = len(lanes) // 2
        lanes = [single(low + high) for low, high in zip(lanes[:half], lanes[half:], strict=True)]
    return lanes[0]


def best_line(group: Sequence[float], top: int) -> tuple[float, float]:
    """The scale and the minimum, with its sign turned, of a group of up to 32 weights."""
    low, total, n = min(0.0, *group, 0.0), summed(group), len(group)
    reach = single(max(group) - low)
    if reach < single(1e-30):
        return 0.0, 0.0 - low
    best, least_error = (single(reach / top), 0.0 - low), math.inf
    for step in range(11):
        inverse = single(single(top - 1 + single(step * single(0.2))) / reach)
        q = [nearest(single(single(w - low) * inverse), 0, top) for w in group]
        one, square = summed(q), summed([each * each for each in q])
        product = summed([single(each * w) for each, w in zip(q, group, strict=True)])
        determinant = single(single(n * square) - single(one * one))
        if determinant <= 0:
            continue
        scale = single(single(single(n * product) - single(total * one)) / determinant)
        least = single(single(single(one * product) - single(square * total)) / determinant)
        if least < 0:
            scale, least = single(product / square), 0.0
        off = [single(single(single(each * scale) - least) - w) for each, w in zip(q, group, strict=True)]
        error = summed([single(each * each) for each in off])
        if scale >= 0 and error < least_error:
            best, least_error = (scale, least), error
    return best


def int45(weights: Sequence[float], bits: int) -> tuple[bytes, bytes]:
    """The integers and scales of a row, in groups of 32 and super-groups of 256."""
    data, scales, top = b"", b"", 2**bits - 1
    for start in range(0, len(weights), 256):
        own = weights[start : start + 256]
        groups = [own[at : at + 32] for at in range(0, len(own), 32)]
        lines = [best_line(group, top) for group in groups]
        units = [bfloat16(single(max(each[i] for each in lines) / 63)) for i in (0, 1)]
        sixes = [
            [nearest(single(line[i] / units[i]), 0, 63) if units[i] else 0 for line in lines] for i in (0, 1)
        ]
        for group, six, least_six in zip(groups, *sixes, strict=True):
            scale, least = single(units[0] * six), single(units[1] * least_six)
            q = [nearest(single(single(w + least) / scale), 0, top) if scale else 0 for w in group]
            q += [0] * (32 - len(q))
            data += bytes(q[k] & 15 | (q[k + 16] & 15) << 4 for k in range(16))
            if bits == 5:
                data += struct.pack("<I", sum((each >> 4) << k for k, each in enumerate(q)))
        scales += b"".join(struct.pack("f", unit)[2:] for unit in units)
        scales += b"".join(
            sum(six << 6 * g for g, six in enumerate(of)).to_bytes(6, "little") for of in sixes
        )
    return data, scales


def int45_weights(data: bytes, scales: bytes, columns: int, bits: int, dtype: str) -> list[float]:
    """The weights of a row that `int45` has made."""
    found, size = [], 16 if bits == 4 else 20
    for k in range(columns):
        entry, group, place = scales[k // 256 * 16 :], data[k // 32 * size :], k % 32
        units = [struct.unpack("f", bytes(2) + entry[at : at + 2])[0] for at in (0, 2)]
        sixes = [int.from_bytes(entry[at : at + 6], "little") >> k % 256 // 32 * 6 & 63 for at in (4, 10)]
        q = group[place % 16] >> place // 16 * 4 & 15
        if bits == 5:
            q |= (int.from_bytes(group[16:20], "little") >> place & 1) << 4
        scale, least = (single(unit * six) for unit, six in zip(units, sixes, strict=True))
        found.append(as_dtype(single(single(q * scale) - least), dtype))
    return found
