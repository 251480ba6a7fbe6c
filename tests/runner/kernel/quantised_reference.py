"""What kernel.c makes of weights in fewer bits, one number after another; docs/format.md describes the bytes."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

LANES = 8


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
