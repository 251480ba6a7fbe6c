"""What is declared in pyproject.toml is what is imported."""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import packages_distributions
from pathlib import Path
from re import match

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Starlette imports it to read a form.
THROUGH_OTHERS = {"python-multipart"}
OURS = {"runner", "toolkit", "scripts", "tests"}


def declared(requirements: Iterable[str]) -> set[str]:
    """Names of the distributions in requirements such as "torch>=2.13"."""
    return {match(r"[\w.-]+", requirement)[0].lower().replace("_", "-") for requirement in requirements}


def imported(*folders: str) -> set[str]:
    """Names of the distributions that the files of these folders import anywhere, in functions too."""
    modules = set()
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                modules.add(node.module.split(".")[0])
    known = packages_distributions()
    outside = modules - OURS - set(sys.stdlib_module_names)
    return {known[module][0].lower().replace("_", "-") for module in outside}


def test_the_product_imports_what_it_declares_and_nothing_else() -> None:
    extras = PROJECT["optional-dependencies"]
    integrations, grammar = declared(extras["transformers"]), declared(extras["grammar"])
    serve = declared(extras["serve"])
    assert imported("runner", "toolkit") == (
        declared(PROJECT["dependencies"]) | integrations | grammar | serve - THROUGH_OTHERS
    )
    # The command starts uvicorn.
    assert imported("runner/server") & serve == serve - THROUGH_OTHERS - {"uvicorn"}
    assert imported("runner/integrations") & integrations == integrations
    assert imported("runner/generation") & grammar == grammar


def test_the_tests_import_what_they_declare() -> None:
    extra = declared(PROJECT["optional-dependencies"]["test"])
    assert imported("tests") <= declared(PROJECT["dependencies"]) | extra


def test_every_dependency_is_pinned() -> None:
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    )
    wanted = declared(PROJECT["dependencies"]).union(
        *map(declared, PROJECT["optional-dependencies"].values())
    )
    assert wanted <= declared(pins)
