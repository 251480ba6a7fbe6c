"""The rooms of docs/architecture.md: in which order they may import, and what a command pays for at its start."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# A room may import itself and the rooms above it.
ROOMS = (
    "runner.errors",
    "runner.units",
    "runner.system",
    "runner.format",
    "runner.kernel",
    "runner.weights",
    "runner.model",
    "runner.generation",
    "runner",  # the public face: `runner.load`
    "runner.cluster",
    "runner.estimate",
    "runner.server",
    "runner.cli",
    "runner.__main__",
    "runner.integrations",
    "toolkit",
    "toolkit.io",
    "toolkit.source",
    "toolkit.hub",
    "toolkit.parts",
    "toolkit.commands",
    "toolkit.cli",
)
# Of the runner, the toolkit uses the contract, what differs between systems, the lossless form's code, and
# its answer to whether it reads a tokenizer.
TOOLKIT_MAY_IMPORT = ("runner.errors", "runner.units", "runner.system", "runner.format")
ALSO = {"toolkit.parts": ("runner.kernel", "runner.model.tokenizer")}
# What `serve` alone needs.
SERVING = ("starlette", "uvicorn", "pydantic", "prometheus_client", "jinja2")
FILES = sorted(path for package in ("runner", "toolkit") for path in (ROOT / package).rglob("*.py"))


def module_of(path: Path) -> str:
    """`runner/format/coded.py` is "runner.format.coded"; a package's `__init__.py` is the package."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room_of(module: str) -> str:
    """The room that a module is in: the longest name of `ROOMS` that its own begins with."""
    return max((room for room in ROOMS if f"{module}.".startswith(f"{room}.")), key=len, default="")


def imports(path: Path) -> set[str]:
    """Modules that a file imports anywhere, in functions and for type checkers too, by their full names."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            found = {name for name in submodules if is_module(name)}
            names |= found if len(found) == len(submodules) else {node.module, *found}
    return names


# Public, as their libraries say: of named tuples, of ctypes' libraries, of `os`.
UNDERSCORED = ("_replace", "_name", "_exit")


def privates(path: Path) -> set[str]:
    """Private names of others that a test file uses: attributes, imports, and in code or names that are texts."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ("self", "cls"):
            found.add(node.attr)
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if re.search("runner|toolkit|scripts", node.value):
                found |= set(re.findall(r"[\w)\]]\.(_\w+)", node.value))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("setattr"):
            found |= {each.value for each in node.args[1:2] if isinstance(each, ast.Constant)}
    return {name for name in map(str, found) if re.match("_[^_]", name)} - set(UNDERSCORED)


def is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").exists()


def ours(path: Path) -> set[str]:
    return {name for name in imports(path) if name.split(".")[0] in ("runner", "toolkit")}


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_rooms_import_downwards(path: Path) -> None:
    room = room_of(module_of(path))
    assert room, f"{path} stands outside of any room"
    allowed = ROOMS[: ROOMS.index(room) + 1]
    assert {name for name in ours(path) if room_of(name) not in allowed} == set()


@pytest.mark.parametrize(
    "path", [path for path in FILES if module_of(path).startswith("toolkit.")], ids=module_of
)
def test_the_toolkit_knows_the_contract_alone(path: Path) -> None:
    room = room_of(module_of(path))
    if room == "toolkit.cli":  # the `bloomdesk` command has the runner's commands, too
        return
    allowed = TOOLKIT_MAY_IMPORT + ALSO.get(room, ())
    of_runner = {name for name in ours(path) if name.startswith("runner")}
    assert {name for name in of_runner if room_of(name) not in allowed and name not in allowed} == set()


@pytest.mark.slow
def test_no_modules_import_each_other() -> None:
    edges = {module_of(path): ours(path) for path in FILES}
    open_, done = set(), set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in open_, " -> ".join((*way[way.index(module) :], module))
        if module in done or module not in edges:
            return
        open_.add(module)
        for other in edges[module]:
            visit(other, (*way, module))
        open_.remove(module)
        done.add(module)

    for module in edges:
        visit(module, ())


def test_tests_use_no_privates() -> None:
    files = sorted((ROOT / "tests").rglob("*.py"))
    assert {path.name: names for path in files if (names := privates(path))} == {}


def test_the_contract_needs_only_the_standard_library() -> None:
    for path in (ROOT / "runner/format").rglob("*.py"):
        outside = {name for name in imports(path) if name.split(".")[0] not in sys.stdlib_module_names}
        assert {room_of(name) for name in outside} <= {"runner.errors", "runner.format"}, path.name


def loaded_by(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after `code`."""
    code += "\nimport sys; print('\\n'.join({name.split('.')[0] for name in sys.modules}), file=sys.stderr)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    return set(run.stderr.split())


@pytest.mark.slow
def test_importing_the_runner_brings_in_nothing_heavy() -> None:
    assert not loaded_by("import runner") & {
        "toolkit",
        "transformers",
        "huggingface_hub",
        "torch",
        "xxhash",
        *SERVING,
    }


@pytest.mark.slow
def test_generating_brings_in_no_toolkit() -> None:
    code = "import runner, runner.generation.model, runner.cli.generate"
    assert not loaded_by(code) & {"toolkit", "transformers", "huggingface_hub", "xxhash", *SERVING}


@pytest.mark.slow
def test_help_imports_no_torch() -> None:
    code = (
        "import sys, toolkit.cli.app; sys.argv = ['bloomdesk', '--help']\n"
        "try: toolkit.cli.app.main()\nexcept SystemExit: pass"
    )
    assert not loaded_by(code) & {"torch", "transformers", "huggingface_hub", "numpy", *SERVING}


@pytest.mark.slow
def test_preparing_compiles_nothing_before_something_is_coded() -> None:
    commands = ("prepare", "repair", "export", "info", "verify")
    code = "import toolkit.cli.app" + "".join(f", toolkit.commands.{command}" for command in commands)
    assert not loaded_by(code) & {"torch", "transformers", "numpy"}


@pytest.mark.parametrize("package", ["runner", "toolkit"])
def test_only_cli_prints_or_exits(package: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        if room_of(module_of(path)) in ("runner.cli", "toolkit.cli", "runner.__main__"):
            continue
        calls = {
            ast.unparse(node.func)
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call)
        }
        assert not calls & {"print", "sys.exit", "exit", "quit"}, path.name
