"""README's rooms are those of the tree, and every link in the docs leads somewhere."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def folders_in_readme() -> set[str]:
    """The folders that README lists, by their paths; two spaces of indentation are a level."""
    found, parents = set(), [""]
    for line in (ROOT / "README.md").read_text().split("## What is where")[1].splitlines():
        if row := re.match(r"    ((?:  )*)(\w+)/  ", line):
            level = len(row[1]) // 2
            parents[level + 1 :] = [f"{parents[level]}{row[2]}/"]
            found.add(parents[-1])
    return found


def test_readme_lists_every_room_and_no_other() -> None:
    rooms = {
        f"{path.parent.relative_to(ROOT)}/"
        for package in ("runner", "toolkit", "scripts")
        for path in (ROOT / package).rglob("__init__.py")
    }
    others = {"scripts/", "miniature/", "tests/", "docs/"}
    small = {"scripts/bench/peers/", "toolkit/hub/pins/"}  # parts of a room
    assert folders_in_readme() == (rooms | others) - small


def test_every_room_says_what_it_is_for() -> None:
    for package in ("runner", "toolkit"):
        for path in (ROOT / package).rglob("__init__.py"):
            if path.parent.name != "pins":
                assert path.read_text().startswith('"""'), path


def test_every_page_of_docs_is_named_and_every_link_leads_somewhere() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            assert link.startswith("https://") or (page.parent / link).exists(), f"{page.name}: {link}"
    named = (ROOT / "README.md").read_text()
    assert all(page.name in named for page in PAGES[1:])


def test_files_that_docs_name_are_there() -> None:
    for page in PAGES:
        for name in re.findall(r"`((?:runner|toolkit|scripts|tests)/[\w./]+)`", page.read_text()):
            assert (ROOT / name).exists(), f"{page.name}: {name}"
        for module in re.findall(r"python -m (scripts\.[\w.]+)", page.read_text()):
            assert (ROOT / module.replace(".", "/")).with_suffix(".py").exists(), f"{page.name}: {module}"
