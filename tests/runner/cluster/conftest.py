"""Slices of the small checkpoint of `prepared`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from runner.format.coded import PLAIN
from runner.format.slices import Slice
from toolkit.commands.convert import convert

Sliced = Callable[..., tuple[Path, list[Path]]]


@pytest.fixture(scope="session")
def sliced(prepared, tmp_path_factory: pytest.TempPathFactory) -> Sliced:
    """`sliced(shares, form)` -> a whole directory, and one of each slice; do not change them."""
    source, base, made = prepared()[0], tmp_path_factory.mktemp("slices"), {}

    def make(shares: Sequence[int], form: str = PLAIN) -> tuple[Path, list[Path]]:
        whole, key = base / form, (*shares, form)
        if not whole.exists():
            convert(source, whole, form=form)
        if key not in made:
            made[key] = [base / f"{key}-{index}" for index in range(len(shares))]
            for index, directory in enumerate(made[key]):
                convert(source, directory, form=form, own=Slice(index, tuple(shares)))
        return whole, made[key]

    return make
