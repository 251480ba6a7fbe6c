"""Draws the pictures of docs/performance.md and docs/cluster.md from what the benchmarks wrote as JSON.

It needs matplotlib: pip install '.[plots]'.

    python -m scripts.bench.plot peers.json true_size.json growth.json batch.json --out docs

A file says itself which benchmark it is of, and draws the pictures of that one alone. The pictures are the same bytes
for the same files. Their text is text and their ground is clear, so they are read on a light page and on a dark one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")  # before pyplot chooses: no screen is needed

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

# Each has a contrast of 3 or more to white and to nearly black.
INK = "#7b8088"
BLUE, ORANGE, GREEN, RED, VIOLET = "#3b82c4", "#c9701f", "#2f9e63", "#d1495b", "#8f6bc9"
STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "bloomdesk",
    "font.family": "sans-serif",
    "font.sans-serif": ["system-ui", "Segoe UI", "Helvetica", "Arial", "DejaVu Sans"],
    "font.size": 11,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.facecolor": "none",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "grid.alpha": 0.25,
    "lines.linewidth": 2,
    "lines.markersize": 6,
    "legend.frameon": False,
}
PEER_COLOURS = {"bloomdesk": BLUE, "bloomdesk-lossless": VIOLET}
LIMIT = {"color": RED, "linestyle": "--", "linewidth": 1.5}
BESIDE = {"textcoords": "offset points"}  # of an annotation: so many from the place


@contextmanager
def picture(path: Path, width: float, height: float) -> Iterator[Axes]:
    """Axes to draw on, written to `path` as SVG with nothing in it that changes from run to run."""
    figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
    yield axes
    figure.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})
    plt.close(figure)


def peers(data: dict[str, Any], out: Path) -> list[Path]:
    """Seconds a token of each peer as bars, the limit as a line."""
    seconds = {row["point"]: row["seconds"] for row in data["measured"] if "seconds" in row}
    names, values = zip(*sorted(seconds.items(), key=lambda each: each[1], reverse=True), strict=True)
    limit, longest = data["limit"]["seconds"], values[0]
    where = "in-ram" if data["ram"] is None and data["disk"] is None else "from-disk"
    path = out / f"performance-peers-{where}.svg"
    with picture(path, 7.2, 0.5 * len(names) + 1.3) as axes:
        colours = [PEER_COLOURS.get(name, INK) for name in names]
        # Not across the line.
        ends = [limit if value < limit < 1.1 * value + 0.1 * longest else value for value in values]
        bars(axes, names, values, [f"{value:.3g} s" for value in values], ends, colours)
        axes.axvline(limit, **LIMIT)
        what = "limit of weights that are not coded," if "bloomdesk-lossless" in seconds else "limit"
        axes.text(limit, len(names) - 0.45, f" {what} {limit:.3g} s", color=RED, va="bottom")
        axes.set(ylim=(-0.6, len(names) - 0.05), xlim=(0, longest * 1.13))
        axes.set_xlabel(f"seconds a token ({conditions(data)})")
    return [path]


def bars(
    axes: Axes,
    names: Sequence[str],
    values: Sequence[float],
    texts: Sequence[str],
    ends: Sequence[float],
    colours: str | list[str] = BLUE,
) -> None:
    """A bar for each name, the first at the bottom, its text beside `ends`."""
    axes.barh(names, values, height=0.62, color=colours)
    for place, (end, text) in enumerate(zip(ends, texts, strict=True)):
        axes.text(end, place, f"  {text}", va="center", color=INK)
    axes.tick_params(axis="y", length=0)


def conditions(data: dict[str, Any]) -> str:
    if data["ram"] is None and data["disk"] is None:
        return "everything in RAM"
    ram = f"{data['ram'] / 1e9:g} GB of RAM" if data["ram"] else "all RAM"
    return f"{ram}, disk {data['disk'] / 1e9:g} GB/s" if data["disk"] else ram


def true_size(data: dict[str, Any], out: Path) -> list[Path]:
    """Seconds a pass in each amount of RAM, and what 70 blocks should take."""
    drawn = []
    path = out / "performance-true-size.svg"
    with picture(path, 7.2, 3.9) as axes:
        rows = [row for row in data["measured"] if "seconds" in row]
        disks = dict.fromkeys(row["disk"] for row in rows)
        for disk, colour in zip(disks, (BLUE, GREEN, ORANGE), strict=False):
            line = [row for row in rows if row["disk"] == disk]
            name = f"disk braked to {disk / 1e9:g} GB/s" if disk else "disk without a brake"
            measured_and_limit(axes, [row["ram"] / 1e9 for row in line], line, colour, name)
        logarithmic(axes, "x", sorted({row["ram"] / 1e9 for row in rows}))
        blocks, size = data["model"]["n_layer"], data["weights_bytes"] / 1e9
        axes.set_title(f"{blocks} true blocks and the head of BLOOM-176B, {size:.1f} GB")
        finish(axes, "RAM, GB", "seconds a pass")
    drawn.append(path)
    rows = [row for row in data["extrapolated"] if "seconds" in row]
    if rows:
        drawn.append(extrapolated(rows, out / "performance-176b.svg"))
    return drawn


def extrapolated(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    """Seconds a token of the whole model against the drive, a line for each amount of RAM."""
    with picture(path, 7.2, 3.9) as axes:
        colours = (BLUE, GREEN, ORANGE, VIOLET)
        for ram, colour in zip(dict.fromkeys(row["ram"] for row in rows), colours, strict=False):
            line = [row for row in rows if row["ram"] == ram]
            drives = [row["drive"] / 1e9 for row in line]
            seconds = [row["seconds"] for row in line]
            axes.plot(drives, seconds, "o-", color=colour, label=f"{ram / 1e9:g} GB of RAM")
        for row in (row for row in rows if row["ram"] == rows[0]["ram"]):
            place = row["drive"] / 1e9, row["seconds"]
            axes.annotate(f"{row['seconds']:.0f} s", place, (0, 8), color=INK, ha="center", **BESIDE)
        axes.plot([7], [180], "s", color=RED, clip_on=False)
        tutorial = "the tutorial, 180 s "
        axes.annotate(tutorial, (7, 180), (-6, 0), color=RED, ha="right", va="center", **BESIDE)
        logarithmic(axes, "x", sorted({row["drive"] / 1e9 for row in rows}))
        logarithmic(axes, "y", [20, 50, 100, 200, 400])
        axes.set_title("BLOOM-176B, extrapolated from true blocks")
        finish(axes, "drive, GB/s", "seconds a token", from_zero=False)
    return path


def growth(data: dict[str, Any], out: Path) -> list[Path]:
    """A picture for each line."""
    labels = {
        "blocks": ("blocks", "growth with blocks"),
        "context": ("positions in the KV cache", "growth with the context, from disk"),
        "context in RAM": ("positions in the KV cache", "growth with the context, all in RAM"),
        "ram": ("RAM, GB", "the same model in more RAM"),
    }
    drawn = []
    measured = [row for row in data["measured"] if "seconds" in row]
    for line in dict.fromkeys(row["line"] for row in measured):
        rows = [row for row in measured if row["line"] == line]
        path = out / f"performance-{line.lower().replace(' ', '-')}.svg"
        with picture(path, 5.6, 3.4) as axes:
            measured_and_limit(axes, [row["x"] for row in rows], rows, BLUE, "measured")
            x_label, title = labels[line]
            axes.set_title(f"{title}{under(rows)}")
            finish(axes, x_label, "seconds a token")
        drawn.append(path)
    return drawn


def under(rows: Sequence[dict[str, Any]]) -> str:
    """The limits that all points of a line share."""
    ram, disk = ({row[name] for row in rows} for name in ("ram", "disk"))
    shared = [f"{ram.pop() / 1e9:g} GB of RAM"] if len(ram) == 1 and None not in ram else []
    shared += [f"disk {disk.pop() / 1e9:g} GB/s"] if len(disk) == 1 and None not in disk else []
    return f" ({', '.join(shared)})" if shared else ""


def batch(data: dict[str, Any], out: Path) -> list[Path]:
    """Tokens a second of each way to use the passes."""
    path = out / "performance-batch.svg"
    rows = [row for row in reversed(data["measured"]) if "tokens_per_second" in row]
    rates = [row["tokens_per_second"] for row in rows]
    with picture(path, 7.2, 0.5 * len(rows) + 1.0) as axes:
        texts = [f"{row['tokens_per_second']:.2f} ({row['times_plain']:.1f} x)" for row in rows]
        bars(axes, [row["point"] for row in rows], rates, texts, rates)
        axes.set(xlim=(0, max(rates) * 1.3), xlabel=f"tokens a second ({conditions(data)})")
    return [path]


def cluster(data: dict[str, Any], out: Path) -> list[Path]:
    """Seconds a token on each number of machines, beside one machine's divided by their number."""
    path, one = out / "cluster.svg", data["rows"][0]["seconds_per_token"]
    counts = [int(row["machines"]) for row in data["rows"]]
    rows = [
        {
            "seconds": row["seconds_per_token"],
            "rounds": row["token_seconds"],
            "limit": counts[0] * one / count,
        }
        for row, count in zip(data["rows"], counts, strict=True)
    ]
    with picture(path, 5.6, 3.4) as axes:
        measured_and_limit(axes, counts, rows, BLUE, "measured")
        axes.get_lines()[-1].set_label("one machine's, divided by their number")
        axes.set(xticks=counts)
        wire = data["wire"].replace("gbit", " Gbit/s")
        axes.set_title(f"{data['model']}, a disk of {data['disk'] / 1e9:g} GB/s each, {wire} between")
        finish(axes, "machines", "seconds a token")
    return [path]


def logarithmic(axes: Axes, which: str, ticks: Sequence[float]) -> None:
    """An axis, x or y, with these ticks alone."""
    names = [f"{tick:g}" for tick in ticks]
    axes.set(**{f"{which}scale": "log"})
    axes.set(**{f"{which}ticks": ticks, f"{which}ticklabels": names})
    axes.minorticks_off()


def measured_and_limit(
    axes: Axes, x: Sequence[float], rows: Sequence[dict[str, Any]], colour: str, name: str
) -> None:
    """A line with the range of its rounds, and its limit dashed."""
    seconds = [row["seconds"] for row in rows]
    below = [max(0.0, row["seconds"] - min(row["rounds"])) for row in rows]
    above = [max(0.0, max(row["rounds"]) - row["seconds"]) for row in rows]
    axes.errorbar(x, seconds, [below, above], fmt="o-", color=colour, capsize=3, elinewidth=1, label=name)
    drawn = {line.get_label() for line in axes.get_lines()}
    label = None if "limit" in drawn else "limit"
    axes.plot(x, [row["limit"] for row in rows], label=label, **LIMIT)


def finish(axes: Axes, x_label: str, y_label: str, *, from_zero: bool = True) -> None:
    axes.set(xlabel=x_label, ylabel=y_label)
    if from_zero:
        axes.set_ylim(bottom=0)
    axes.grid(True)
    axes.legend()


PICTURES: dict[str, Callable[[dict[str, Any], Path], list[Path]]] = {
    "against_peers": peers,
    "true_size": true_size,
    "growth": growth,
    "batch": batch,
    "cluster": cluster,
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Draw the pictures of measurements in docs.")
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULT.json")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).resolve().parents[2] / "docs", metavar="DIR"
    )
    given = parser.parse_args()
    for result in given.results:
        data = json.loads(result.read_text())
        draw = PICTURES.get(data.get("benchmark", ""))
        if draw is None:
            print(f"{result}: there is no picture of that", file=sys.stderr)
            return 1
        with plt.rc_context(STYLE):
            for path in draw(data, given.out):
                print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
