"""The arrows of docs/architecture.md: what each room may import, and what a command pays for at its start."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RUNNER_MAY_IMPORT = {"runner", "torch", "tokenizers", "llvmlite", "psutil"} | set(sys.stdlib_module_names)
PREPARED_MAY_IMPORT = {"runner.errors", "runner.header"}
TOOLKIT_MAY_IMPORT_OF_RUNNER = {
    "runner.prepared", "runner.header", "runner.errors", "runner.lock", "runner.cli", "runner.lossless"
}  # fmt: skip
ENCODER_MAY_IMPORT_TOO = {"runner.emit", "runner.panel"}


def imports(path: Path) -> set[str]:
    """Full names of everything a file imports anywhere, in functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return names


@pytest.mark.parametrize("path", sorted((ROOT / "runner").glob("*.py")), ids=lambda path: path.name)
def test_the_runner_is_lean(path: Path) -> None:
    assert {name.split(".")[0] for name in imports(path)} <= RUNNER_MAY_IMPORT


@pytest.mark.parametrize("name", ["prepared", "header", "errors"])
def test_the_contract_needs_only_the_standard_library(name: str) -> None:
    outside = {
        name
        for name in imports(ROOT / "runner" / f"{name}.py")
        if name.split(".")[0] not in sys.stdlib_module_names
    }
    assert outside <= PREPARED_MAY_IMPORT


@pytest.mark.parametrize("path", sorted((ROOT / "toolkit").glob("*.py")), ids=lambda path: path.name)
def test_the_toolkit_uses_only_the_contract_of_the_runner(path: Path) -> None:
    of_runner = {name for name in imports(path) if name.split(".")[0] == "runner"}
    allowed = TOOLKIT_MAY_IMPORT_OF_RUNNER - (set() if path.name == "cli.py" else {"runner.cli"})
    assert of_runner <= allowed | (ENCODER_MAY_IMPORT_TOO if path.name == "encoder.py" else set())


def loaded_by(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after `code`."""
    code += "\nimport sys; print('\\n'.join({name.split('.')[0] for name in sys.modules}), file=sys.stderr)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    return set(run.stderr.split())


def test_importing_the_runner_brings_in_nothing_heavy() -> None:
    assert not loaded_by("import runner") & {"toolkit", "transformers", "huggingface_hub", "torch", "xxhash"}


def test_generating_brings_in_no_toolkit() -> None:
    code = "import runner, runner.model, runner.cli, runner.terminal"
    assert not loaded_by(code) & {"toolkit", "transformers", "huggingface_hub", "xxhash"}


def test_help_imports_no_torch() -> None:
    code = (
        "import sys, toolkit.cli; sys.argv = ['bloomdesk', '--help']\n"
        "try: toolkit.cli.main()\nexcept SystemExit: pass"
    )
    assert not loaded_by(code) & {"torch", "transformers", "huggingface_hub", "numpy"}


def test_preparing_compiles_nothing_before_something_is_coded() -> None:
    code = "import toolkit.cli, toolkit.prepare, toolkit.repair, toolkit.export, toolkit.info, toolkit.verify"
    assert not loaded_by(code) & {"torch", "transformers", "numpy", "llvmlite"}


@pytest.mark.parametrize("room", ["runner", "toolkit"])
def test_only_cli_files_print_or_exit(room: str) -> None:
    for path in (ROOT / room).glob("*.py"):
        if path.name in ("cli.py", "__main__.py"):
            continue
        calls = {
            ast.unparse(node.func)
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call)
        }
        assert not calls & {"print", "sys.exit", "exit", "quit"}, path.name
