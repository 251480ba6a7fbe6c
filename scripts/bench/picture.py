"""Draw a command's output as a terminal in an SVG file.

scripts/demo | python -m scripts.bench.picture docs/demo.svg
"""

from __future__ import annotations

import argparse
import io
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

COLUMNS = 110


def draw(output: str, title: str) -> str:
    """An SVG that needs nothing from elsewhere; `output` may hold ANSI colours."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(Text.from_ansi(output.strip("\n")))
    svg = console.export_svg(title=title, theme=MONOKAI)
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)  # they would be fetched from the network
    return svg.replace("Fira Code, monospace", "ui-monospace, Menlo, Consolas, monospace")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Draw a command's output, from standard input, as an SVG file."
    )
    parser.add_argument("path", type=Path, metavar="OUT.svg")
    parser.parse_args().path.write_text(draw(sys.stdin.read(), "bloomdesk"), encoding="utf-8")


if __name__ == "__main__":
    main()
