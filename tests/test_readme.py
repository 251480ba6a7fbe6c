"""README's tree is true: every file is in it, and every name in it is a file."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("runner", "toolkit", "scripts")


def tree() -> dict[str, set[str]]:
    """The names that README lists, by room; rooms without a list have an empty set."""
    listed: dict[str, set[str]] = {}
    room = ""
    for line in (ROOT / "README.md").read_text().split("## What is where")[1].splitlines():
        if found := re.match(r"    (\S+?)/?  ", line):
            room = found[1]
            listed[room] = set()
        elif found := re.match(r"      (\S+?)/?  ", line):
            listed[room].add(found[1])
    return listed


def test_every_file_is_in_the_tree_and_every_name_is_a_file() -> None:
    listed = tree()
    for room in ROOMS:
        present = {path.name for path in (ROOT / room).iterdir() if not path.name.startswith("__")}
        assert listed[room] == present, room
    for name in listed:
        assert (ROOT / name).exists(), name


def test_every_page_of_docs_is_named_and_every_link_leads_somewhere() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    for page in pages:
        for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            assert link.startswith("https://") or (page.parent / link).exists(), f"{page.name}: {link}"
    named = (ROOT / "README.md").read_text()
    assert all(page.name in named for page in pages[1:])
