"""The kernel in a program beside this process: for another processor, under an emulator, or with sanitizers in it.

`RemoteKernel` has the functions of the library and takes the same addresses. It sends the memory that a function may
touch, and nothing more, to remote.c, and brings back what the function has made of it.
"""

from __future__ import annotations

import ctypes
import math
import os
import shlex
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from runner.format import quantised
from runner.format.coded import row_group_count
from runner.format.safetensors import BYTES_PER_ELEMENT
from runner.kernel import compiler
from runner.kernel.threads import ARGUMENTS, SHARE, WORDS

PROGRAM = Path(__file__).with_suffix(".c")
# The environment variable that has the command of a remote kernel: the tests of this folder then run with it.
ENVIRONMENT = "BLOOMDESK_TEST_REMOTE_KERNEL"
CODED, KINDS, WORD = 3, 4, 8
CODINGS = {coding.number: coding for coding in quantised.CODINGS.values()}
# How many shares a task has, from its arguments.
Shares = Callable[[Sequence[int]], int]
ELEMENT = {0: 2, 1: 2, 2: 4}


def compile_for_aarch64(folder: Path) -> Path:
    """The program for Linux on aarch64. Needs no C library, and so nothing but the compiler."""
    whole, command = folder / "remote-neon", compiler.find_compiler()
    triple, cpu = compiler.TARGETS["linux-aarch64"][0], compiler.VARIANTS["aarch64"]["neon"]
    target = ["-target", triple, f"-mcpu={cpu}", "-fno-sanitize=all", "-fno-stack-protector"]
    run([*command, *target, *compiler.OPTIONS, *_SOURCE, "-c", "-o", whole.with_suffix(".o")])
    run([*command, "-target", triple, "-nostdlib", "-static", whole.with_suffix(".o"), "-o", whole])
    return whole


# The variants of this machine in the words of clang alone, which the compiler's own front leaves sanitizers out of.
SANITIZED = {
    "sse2": ("-march=x86-64",),
    "avx2": ("-march=x86-64-v3",),
    "avx512": ("-march=x86-64-v4", "-mavx512vbmi", "-mavx512vbmi2"),
}


def compile_with_sanitizers(folder: Path, variant: str) -> Path:
    """The program for this machine with sanitizers of addresses and undefined behaviour, whose library is gcc's."""
    whole, sanitizers = folder / f"remote-{variant}", "-fsanitize=address,undefined"
    # gcc's library does not know the types of functions.
    checks = [sanitizers, "-fno-sanitize=function", "-fno-sanitize-recover=all"]
    headers = Path(find_spec("ziglang").origin).with_name("lib") / "include"
    options = [*SANITIZED[variant], *compiler.OPTIONS, "-O1", "-g", *checks, "-isystem", headers, *_SOURCE]
    clang = [sys.executable, "-m", "ziglang", "clang", "-target", "x86_64-linux-gnu"]
    run([*clang, *options, "-c", "-o", whole.with_suffix(".o")])
    run(["gcc", sanitizers, whole.with_suffix(".o"), "-o", whole])
    return whole


_SOURCE = (*compiler.WARNINGS, f"-I{compiler.SOURCE.parent}", PROGRAM)


def run(command: Sequence[str | Path]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# The tests of what the remote functions compute.
_TESTS = ("test_matmul.py", "test_operations.py", "test_panel.py", "test_quantised.py", "test_reference.py")


def run_tests(command: Sequence[str | Path]) -> None:
    """Run the tests of this folder with the program that `command` starts."""
    tests = [PROGRAM.with_name(name) for name in _TESTS]
    environment = {**os.environ, ENVIRONMENT: shlex.join(map(str, command))}
    # Not in the processes of the run that this one is a part of.
    pytest = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(pytest, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


@dataclass
class Request:
    """A function, the memory of this process that it may touch, and its arguments."""

    name: str
    memory: list[tuple[int, int]] = field(default_factory=list)
    pointers: list[tuple[int, int, int]] = field(default_factory=list)
    arguments: list[tuple[int, int]] = field(default_factory=list)

    def buffer(self, address: int, nbytes: int) -> int:
        """The number of a buffer that stands for memory of this process, if there is any."""
        self.memory.append((address, nbytes))
        return len(self.memory) - 1

    def point(self, buffer: int, word: int, address: int, nbytes: int) -> None:
        """Have word number `word` of a buffer point to memory."""
        self.pointers.append((buffer, word * WORD, self.buffer(address, nbytes)))

    def give(self, address: int, nbytes: int) -> None:
        """One more argument: the address of memory."""
        self.arguments.append((self.buffer(address, nbytes), 0))

    def give_scratch(self, nbytes: int) -> None:
        """One more argument: the address of memory that holds nothing before and after."""
        self.give(0, -nbytes)

    def give_number(self, value: int) -> None:
        self.arguments.append((-1, value))

    def to_bytes(self) -> bytes:
        parts = [struct.pack("32sq", self.name.encode(), len(self.memory))]
        for address, nbytes in self.memory:
            parts += [struct.pack("q", nbytes), ctypes.string_at(address, max(0, nbytes))]
        for numbers in (self.pointers, self.arguments):
            parts.append(struct.pack("q", len(numbers)))
            parts += [struct.pack(f"{len(each)}q", *each) for each in numbers]
        return b"".join(parts)


class RemoteKernel:
    """The functions of the library, computed by the program that `command` starts; the barrier is that of `near`."""

    def __init__(self, command: Sequence[str], near: ctypes.CDLL) -> None:
        self._program = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._one_at_a_time = threading.Lock()
        self._task = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)
        self.open_task, self.close_task = near.open_task, near.close_task
        self.spin_for_tasks, self.processor_level = near.spin_for_tasks, near.processor_level
        self.multiply = self._run("multiply", self._describe_product, lambda w: w[10] * -(-w[12] // w[14]))
        self.layer_norm = self._run("layer_norm", self._describe_norm, lambda w: w[7])
        self.attend = self._run("attend", self._describe_attention, lambda w: w[4] * w[5])
        self.store = self._run("store", self._describe_storing, lambda w: w[9])

    def close(self) -> None:
        with suppress(OSError):
            self._program.stdin.close()
        self._program.wait(30)
        self._program.stdout.close()

    def scratch_bytes_of_decoder(self) -> int:
        return self._call(Request("scratch_bytes_of_decoder"))

    def scratch_bytes_of_encoder(self) -> int:
        return self._call(Request("scratch_bytes_of_encoder"))

    def decode_rows(self, coded, offsets, rows: int, columns: int, out, scratch) -> int:
        request = Request("decode_rows")
        _give_arrays(request, coded, offsets)
        request.give_number(rows)
        request.give_number(columns)
        _give_arrays(request, out)
        request.give_scratch(ctypes.sizeof(scratch))
        return self._call(request)

    def encode_rows(self, source, count: int, columns: int, out, lengths, scratch) -> None:
        request = Request("encode_rows")
        _give_arrays(request, source)
        request.give_number(count)
        request.give_number(columns)
        _give_arrays(request, out, lengths)
        request.give_scratch(ctypes.sizeof(scratch))
        self._call(request)

    def encode_quantised(self, coding: int, kind: int, source, count: int, columns: int, data, scales) -> int:
        request = Request("encode_quantised")
        request.give_number(coding)
        request.give_number(kind)
        _give_arrays(request, source)
        request.give_number(count)
        request.give_number(columns)
        _give_arrays(request, data, scales)
        return self._call(request)

    def decode_quantised(
        self, coding: int, kind: int, data, scales, rows: int, columns: int, out, scratch
    ) -> None:
        request = Request("decode_quantised")
        request.give_number(coding)
        request.give_number(kind)
        _give_arrays(request, data, scales)
        request.give_number(rows)
        request.give_number(columns)
        _give_arrays(request, out)
        request.give_scratch(ctypes.sizeof(scratch))
        self._call(request)

    def _run(self, name: str, describe: Callable[[Request, Sequence[int]], None], shares: Shares) -> object:
        """A task function: all of a task, if no other thread has computed it; `describe` says what it may touch."""

        def run(table: int, _: int) -> None:
            words = (ctypes.c_int64 * WORDS).from_address(table)
            with self._one_at_a_time:
                # The barrier's words stay here, in which other threads count meanwhile.
                copy = (ctypes.c_int64 * WORDS)(*words)
                if copy[SHARE] >= shares(copy[ARGUMENTS:]):
                    return
                request = Request(name)
                request.give(ctypes.addressof(copy), ctypes.sizeof(copy))
                describe(request, copy[ARGUMENTS:])
                self._call(request)
                words[SHARE:ARGUMENTS] = copy[SHARE:ARGUMENTS]

        return self._task(run)

    def _describe_product(self, request: Request, words: Sequence[int]) -> None:
        # The names of `struct product` and `struct finish`.
        kind, weight, weight_step, weight_stride, x, x_step, x_stride, out, out_step, out_stride = words[:10]
        B, T, N, K, _, _, own, bias, _, _, residual, residual_stride, *_ = words[10:]
        if kind == CODED:
            places = (ctypes.c_int64 * (row_group_count(N) + 1)).from_address(weight_stride)
            request.point(0, ARGUMENTS + 1, weight, places[-1])
            request.point(0, ARGUMENTS + 3, weight_stride, ctypes.sizeof(places))
            request.give_scratch(self.scratch_bytes_of_decoder())
        elif coding := CODINGS.get(kind // KINDS):
            request.point(0, ARGUMENTS + 1, weight, math.prod(coding.shape((N, K))))
            size = BYTES_PER_ELEMENT[coding.scale_dtype] * math.prod(coding.scales_shape((N, K)))
            request.point(0, ARGUMENTS + 3, weight_stride, size)
            request.give_scratch(self.scratch_bytes_of_decoder())
        else:
            request.point(
                0, ARGUMENTS + 1, weight, ELEMENT[kind] * _extent(B, weight_step, N, weight_stride, K)
            )
            request.give_number(0)
        request.point(0, ARGUMENTS + 4, x, 4 * _extent(B, x_step, T, x_stride, K))
        request.point(0, ARGUMENTS + 7, out, 4 * _extent(B, out_step, T, out_stride, N))
        if bias:
            request.point(0, ARGUMENTS + 17, bias, ELEMENT[own] * N)
        if residual:
            request.point(0, ARGUMENTS + 20, residual, 4 * _extent(1, 0, T, residual_stride, N))

    def _describe_norm(self, request: Request, words: Sequence[int]) -> None:
        kind, x, x_stride, out, out_stride, weight, bias, rows, columns, *_ = words
        request.give_number(0)
        for place, address, stride in ((1, x, x_stride), (3, out, out_stride)):
            request.point(0, ARGUMENTS + place, address, 4 * _extent(1, 0, rows, stride, columns))
        for place, address in ((5, weight), (6, bias)):
            request.point(0, ARGUMENTS + place, address, ELEMENT[kind] * columns)

    def _describe_attention(self, request: Request, words: Sequence[int]) -> None:
        _, products, alibi, alibi_stride, H, T, S, *_ = words
        request.give_number(0)
        request.point(0, ARGUMENTS + 1, products, 4 * H * T * S)
        request.point(0, ARGUMENTS + 2, alibi, 4 * _extent(1, 0, H, alibi_stride, S))

    def _describe_storing(self, request: Request, words: Sequence[int]) -> None:
        kind, fused, fused_stride, keys, keys_step, values, values_step, values_stride, first, H, T, D, *_ = (
            words
        )
        request.give_number(0)
        request.point(0, ARGUMENTS + 1, fused, 4 * _extent(1, 0, T, fused_stride, 3 * H * D))
        request.point(0, ARGUMENTS + 3, keys, ELEMENT[kind] * _extent(H, keys_step, first + T, D, D))
        request.point(
            0, ARGUMENTS + 5, values, ELEMENT[kind] * _extent(H, values_step, D, values_stride, first + T)
        )

    def _call(self, request: Request) -> int:
        program = self._program
        try:
            program.stdin.write(request.to_bytes())
            program.stdin.flush()
            (found,) = struct.unpack("q", self._read(WORD))
            for address, nbytes in request.memory:
                ctypes.memmove(address, self._read(max(0, nbytes)), max(0, nbytes))
        except (OSError, struct.error) as error:
            raise RuntimeError(f"the remote kernel ended in {request.name}: {program.wait(30)}") from error
        return found

    def _read(self, nbytes: int) -> bytes:
        data = self._program.stdout.read(nbytes)
        if len(data) < nbytes:
            raise OSError("cut short")
        return data


def _give_arrays(request: Request, *arrays: ctypes.Array) -> None:
    for array in arrays:
        request.give(ctypes.addressof(array), ctypes.sizeof(array))


def _extent(B: int, step: int, rows: int, stride: int, columns: int) -> int:
    """Elements from the first to the last of B matrices."""
    return (B - 1) * step + (rows - 1) * stride + columns if B and rows and columns else 0
