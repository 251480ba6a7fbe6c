"""Hostile `.bin` files: pickles that would run code or take the machine, and zips that lie."""

from __future__ import annotations

import io
import pickle
import re
import struct
import sys
import tarfile
import zipfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from tempfile import NamedTemporaryFile

import pytest
import torch

from scripts.fakehub.bin_shard import write_bin
from scripts.fakehub.checkpoint import from_state
from scripts.torture.mutations import zip_of
from tests.support.bounded import Bounded
from toolkit.source.shards import read_shard

# A process of its own reads the hostile files.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="limits of memory as Linux has them"),
]


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def storage(kind: bytes = name("torch", "FloatStorage"), elements: int = 16, record: str = "0") -> bytes:
    return b"(" + text("storage") + kind + text(record) + text("cpu") + number(elements) + b"tQ"


def tensor(
    of: bytes | None = None, offset: int = 0, shape: tuple[int, ...] = (16,), strides: tuple[int, ...] = (1,)
) -> bytes:
    sizes = (b"(" + b"".join(map(number, each)) + b"t" for each in (shape, strides))
    rest = b"\x89" + name("collections", "OrderedDict") + b")R"
    rebuild = name("torch._utils", "_rebuild_tensor_v2")
    return (
        rebuild + b"(" + (storage() if of is None else of) + number(offset) + b"".join(sizes) + rest + b"tR"
    )


def state(value: bytes, key: bytes = text("a")) -> bytes:
    return b"\x80\2}" + key + value + b"s."


def called(module: str, attribute: str, *arguments: bytes) -> bytes:
    return state(name(module, attribute) + b"(" + b"".join(arguments) + b"tR")


STATE = {"ln_f.weight": torch.arange(64.0), "ln_f.bias": torch.ones(64)}


class Evil:
    def __reduce__(self):
        return exec, ("import os; os.mkdir('made')",)


class Greedy:
    """torch lets this call through, and it would allocate a terabyte."""

    def __reduce__(self):
        return bytearray, (2**40,)


def test_the_parts_that_the_cases_are_made_of_are_sound(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(zip_of(state(tensor())))
    (found,) = read_shard(path).values()
    assert (found.shape, found.nbytes) == ((16,), 64)


RUNNING = {
    "os.system": called("os", "system", text("mkdir made")),
    "posix.system": called("posix", "system", text("mkdir made")),
    "eval": called("builtins", "eval", text("__import__('os').mkdir('made')")),
    "exec": called("builtins", "exec", text("import os; os.mkdir('made')")),
    "python 2 eval": called("__builtin__", "eval", text("1")),
    "getattr": called("builtins", "getattr", name("os", "path"), text("join")),
    "subprocess": called("subprocess", "Popen", text("mkdir made")),
    "torch.hub": called("torch.hub", "load", text("someone/repo"), text("model")),
    "torch.load": called("torch", "load", text("/etc/passwd")),
    "torch.ops": called("torch.ops", "load_library", text("x.so")),
    "rebuild qtensor": called("torch._utils", "_rebuild_qtensor", storage()),
    "rebuild wrapper": called("torch._utils", "_rebuild_wrapper_subclass", text("x")),
    "rebuild from type": called("torch._tensor", "_rebuild_from_type_v2", name("os", "system"), text("x")),
    "rebuild sparse": called("torch._utils", "_rebuild_sparse_tensor", text("x")),
    "bytearray": called("__builtin__", "bytearray", number(2**40)),
    "untyped storage": called("torch.storage", "UntypedStorage", number(2**40)),
    "typed storage": called("torch.storage", "TypedStorage", number(2**40)),
    "a storage is called": called("torch", "FloatStorage", number(2**40)),
    "a dotted name": called("torch", "FloatStorage.__init__", number(2**40)),
    "a table of arguments": called("collections", "OrderedDict", b"]"),
    "inst": state(b"(" + text("mkdir made") + b"ios\nsystem\n"),
    "obj": state(b"(" + name("os", "system") + text("mkdir made") + b"o"),
    "newobj": state(name("os", "system") + b")\x81"),
    "stack global": state(text("os") + text("system") + b"\x93" + text("mkdir made") + b"\x85R"),
    "extension": state(b"\x82\1"),
    "build on a tensor": state(tensor() + b"}" + text("requires_grad") + b"\x88sb"),
    **{f"protocol {number}": pickle.dumps({"a": Evil()}, number) for number in (0, 2, 4, 5)},
    **{f"greedy, protocol {number}": pickle.dumps({"a": Greedy()}, number) for number in (2, 4)},
}  # fmt: skip
UNSOUND = {
    "empty": b"",
    "no end": b"\x80\2}",
    "nothing on the stack": b"\x80\2.",
    "too little on the stack": b"\x80\2}s.",
    "not in the memo": b"\x80\2h\7.",
    "a value that is no tensor": state(number(7)),
    "a table in a table": state(b"}"),
    "a list": b"\x80\2].",
    "a key that is no text": state(tensor(), number(3)),
    "a key that hashes for ever": b"\x80\2})q\0" + b"h\0h\0\x86q\0" * 64 + b"h\0Ns.",
    "a key too deep to be hashed": b"\x80\2})" + b"\x85" * 600_000 + b"Ns.",
    "a million levels": b"\x80\2" + b"]" * 600_000 + b".",
    "a million marks": b"\x80\2" + b"(" * 600_000 + b"t" * 10 + b".",
    "doubled for ever": state(b"}q\0" + (text("a") + b"h\0" + text("b") + b"h\0uq\0}") * 0 + b")" + b"\x86" * 9),
    "itself": b"\x80\2}q\0" + text("a") + b"h\0s.",
    "a key that shows as something else": state(tensor(), text("ln_f\x1b[2J\n.weight")),
    "a long text": state(b"\x8d" + struct.pack("<Q", 2**62)),
    "a longer text than there is": state(b"X" + struct.pack("<I", 2**32 - 1)),
    "a long number": state(b"\x8b" + struct.pack("<i", 2**31 - 1)),
    "a long frame": b"\x80\4\x95" + struct.pack("<Q", 2**63) + b".",
    "digits": state(b"L" + b"9" * 100_000 + b"L\n"),
    "a tensor beyond its record": state(tensor(shape=(17,))),
    "an offset beyond its record": state(tensor(offset=16, shape=(1,))),
    "a negative offset": state(tensor(offset=-1, shape=(1,))),
    "a negative shape": state(tensor(shape=(-4, -4), strides=(-4, 1))),
    "a product that overflows": state(tensor(shape=(2**32, 2**32), strides=(2**32, 1))),
    "an absurd storage": state(tensor(storage(elements=2**62), shape=(2**62,))),
    "a storage larger than the record": state(tensor(storage(elements=17))),
    "a storage smaller than the record": state(tensor(storage(elements=8), shape=(8,))),
    "a record that is not there": state(tensor(storage(record="1"))),
    "a record outside": state(tensor(storage(record="../../data/0"))),
    "a record that is the pickle": state(tensor(storage(record="../data.pkl"))),
    "a storage of a function": state(tensor(storage(name("collections", "OrderedDict")))),
    "strided beyond its record": state(tensor(shape=(8,), strides=(3,))),
    "expanded beyond its record": state(tensor(shape=(16, 17), strides=(0, 1))),
    "strided by more than there is": state(tensor(shape=(2, 2), strides=(2**62, 2**62))),
    "axes without strides": state(tensor(shape=(4, 4), strides=(1,))),
    "a hundred thousand axes": state(tensor(shape=(1,) * 100_000, strides=(1,) * 100_000)),
    "shape of truths": state(tensor().replace(number(16) + b"t(", b"\x88t(")),
    "larger than any": state(tensor()) + bytes(3 * 2**20),
}  # fmt: skip


@pytest.mark.parametrize("data", RUNNING.values(), ids=RUNNING)
def test_a_pickle_that_asks_for_more_than_weights(
    tmp_path: Path, bounded: Bounded, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.bin").write_bytes(zip_of(data))
    message = bounded.refuses("shard", tmp_path / "x.bin")
    assert "not only weights" in message and "nothing of it was run" in message
    assert [path.name for path in tmp_path.iterdir()] == ["x.bin"]


@pytest.mark.parametrize("data", UNSOUND.values(), ids=UNSOUND)
def test_a_pickle_that_is_no_state(tmp_path: Path, bounded: Bounded, data: bytes) -> None:
    (tmp_path / "x.bin").write_bytes(zip_of(data))
    bounded.refuses("shard", tmp_path / "x.bin")


@cache
def shard() -> bytes:
    """A sound one of two tensors in the form of 2022."""
    with NamedTemporaryFile(suffix=".bin") as file:
        write_bin(Path(file.name), from_state(STATE))
        return Path(file.name).read_bytes()


@cache
def saved(todays_zip: bool = True) -> bytes:
    """A shard as today's torch writes it."""
    target = io.BytesIO()
    torch.save(STATE, target, _use_new_zipfile_serialization=todays_zip)
    return target.getvalue()


def records(*names: str, compression: int = zipfile.ZIP_STORED, junk: int = 0) -> bytes:
    """A zip of records by these names, each holding what the sound shard has under the name's last part."""
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(shard())) as old, zipfile.ZipFile(target, "w", compression) as new:
        known = {old_name.partition("/")[2]: old.read(old_name) for old_name in old.namelist()}
        for each in names:
            new.writestr(each, known.get(each.partition("/")[2], bytes(junk)))
    return target.getvalue()


def put(at: int, form: str, *values: int, whole: Callable[[], bytes] = shard) -> bytes:
    """A sound shard with other values at a position, counted from the end if it is negative."""
    data = bytearray(whole())
    struct.pack_into(form, data, at, *values)
    return bytes(data)


def in_directory(record: str, at: int, form: str, *values: int, whole: Callable[[], bytes] = shard) -> bytes:
    """A sound shard with other values in what the zip's directory says of a record."""
    return put(whole().rindex(record.encode()) - 46 + at, form, *values, whole=whole)


WHOLE = ("a/data.pkl", "a/data/0", "a/data/1")
ZIPS: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "one byte": lambda: b"P",
    "zeros": lambda: bytes(10_000),
    "only an end": lambda: b"PK\5\6" + bytes(18),
    "compressed": lambda: records(*WHOLE, compression=zipfile.ZIP_DEFLATED),
    "bomb": lambda: records(*WHOLE, "a/bomb", compression=zipfile.ZIP_DEFLATED, junk=50 * 2**20),
    "no pickle": lambda: records(*WHOLE[1:]),
    "a letter": lambda: records("a/letter.txt", junk=11),
    "no record": lambda: records(*WHOLE[:2]),
    "two folders": lambda: records(*WHOLE, "b/data.pkl"),
    "no folder": lambda: records("data.pkl", "data/0", "data/1"),
    "encrypted": lambda: in_directory("archive/data/0", 8, "<H", 0x809),
    "compressed by its word": lambda: in_directory("archive/data/0", 10, "<H", 8),
    "record too large": lambda: in_directory("archive/data/0", 20, "<2I", 512, 512),
    "pickle of gigabytes": lambda: in_directory("archive/data.pkl", 20, "<2I", 2**31, 2**31),
    "pickle with another checksum": lambda: in_directory("archive/data.pkl", 16, "<I", 7),
    "name of another record": lambda: shard().replace(b"archive/data/0", b"archive/data/2", 1),
    "name twice": lambda: shard().replace(b"archive/data/1", b"archive/data/0"),
    "directory far away": lambda: put(-50, "<Q", 2**64 - 1),
    "directory of nothing": lambda: put(-58, "<Q", 0),
    "junk before": lambda: b"junk" * 16 + shard(),
    "end missing": lambda: shard()[:-22],
    "old format": lambda: saved(todays_zip=False),
    "tar": lambda: _tar(),
    "bare pickle": lambda: pickle.dumps(Evil(), 2),
    "bare pickle of protocol 4": lambda: pickle.dumps(Evil(), 4),
    "safetensors": lambda: (2).to_bytes(8, "little") + b"{}",
    "a hundred thousand records": lambda: _many(100_000),
    "big endian": lambda: saved().replace(b"little", b"bigbig"),
}
for when, whole in {"2022": shard, "today": saved}.items():
    ZIPS |= {
        f"record too small, of {when}": partial(in_directory, "/data/0", 20, "<2I", 64, 64, whole=whole),
        f"record beyond the file, of {when}": partial(
            in_directory, "/data/0", 20, "<2I", 2**31, 2**31, whole=whole
        ),
        f"record over another, of {when}": partial(in_directory, "/data/0", 42, "<I", 0, whole=whole),
        f"record far away, of {when}": partial(in_directory, "/data/0", 42, "<I", 2**31, whole=whole),
        f"directory of a petabyte, of {when}": partial(put, -58, "<Q", 2**50, whole=whole),
    }


WORDS = {
    "compressed": "compressed",
    "no pickle": "no data.pkl",
    "a letter": "no data.pkl",
    **dict.fromkeys(("old format", "bare pickle", "bare pickle of protocol 4"), "old format"),
}


def _tar() -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as archive:
        for each in ("sys_info", "pickle", "tensors", "storages"):
            archive.addfile(tarfile.TarInfo(each))
    return target.getvalue()


def _many(count: int) -> bytes:
    directory = b"PK\1\2" + bytes(24) + b"\1\0" + bytes(16) + b"a"
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, *[count % 65536] * 2, len(directory) * count, 64, 0)
    return b"PK\3\4" + bytes(60) + directory * count + end


@pytest.mark.parametrize("kind", ZIPS)
def test_a_zip_that_lies(tmp_path: Path, bounded: Bounded, kind: str) -> None:
    (tmp_path / "x.bin").write_bytes(ZIPS[kind]())
    message = bounded.refuses("shard", tmp_path / "x.bin")
    assert "x.bin" in message and WORDS.get(kind, "") in message


def test_junk_behind_a_zip_changes_nothing(tmp_path: Path) -> None:
    """Or it is refused; the download's hash is what finds it."""
    (tmp_path / "x.bin").write_bytes(shard())
    sound = {key: (tensor.offset, tensor.nbytes) for key, tensor in read_shard(tmp_path / "x.bin").items()}
    (tmp_path / "x.bin").write_bytes(shard() + b"junk" * 16)
    found = {key: (tensor.offset, tensor.nbytes) for key, tensor in read_shard(tmp_path / "x.bin").items()}
    assert found == sound


def test_a_shard_cut_at_every_boundary(tmp_path: Path, bounded: Bounded) -> None:
    whole = shard()
    marks = [found.start() for found in re.finditer(b"PK(\3\4|\7\x08|\1\2|\6\6|\6\7|\5\6)", whole)]
    lengths = {at + step for at in marks for step in (-1, 0, 1, 4, 30)} | {*range(0, len(whole), 61)}
    for length in sorted(lengths - {-1}):
        (tmp_path / "x.bin").write_bytes(whole[: min(length, len(whole) - 1)])
        bounded.refuses("shard", tmp_path / "x.bin")
