"""Options and arguments that commands share, each declared once, and what their texts mean."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from runner.errors import BloomdeskError
from runner.format.coded import LOSSLESS
from runner.format.quantised import FORMS
from runner.format.slices import MOST_SLICES, Slice, even

Repo = Annotated[str, typer.Argument(metavar="REPO", help="A BLOOM or BLOOMZ on the Hub: bigscience/bloom.")]
Prepared = Annotated[Path, typer.Argument(metavar="DST", help="A prepared directory.")]
NewDirectory = Annotated[Path, typer.Argument(metavar="DST", help="The prepared directory to make.")]
Revision = Annotated[
    str | None,
    typer.Option(
        metavar="R", help="Branch, tag or commit.", show_default="for bigscience/bloom, the pinned commit"
    ),
]
Connections = Annotated[
    int, typer.Option(metavar="N", min=1, max=32, help="Ranges of a file fetched at a time.")
]
DEFAULT_CONNECTIONS = 8
Patience = Annotated[
    str,
    typer.Option(
        metavar="TIME",
        help="Wait out outages of the network or the Hub up to this long, like 90min; 0 ends after a few tries.",
    ),
]
DEFAULT_PATIENCE = "12h"
LimitRate = Annotated[
    str | None,
    typer.Option(
        "--limit-rate",
        metavar="RATE",
        help="Fetch no faster than this, like 20MB/s.",
        show_default="no limit",
    ),
]
Form = Annotated[
    str,
    typer.Option(
        "--form",
        metavar="|".join(FORMS),
        help="How to store weights: lossless keeps every bit of bfloat16 in two thirds, int8 and int4 round.",
    ),
]
# What --form lossless was called before.
Lossless = Annotated[bool, typer.Option("--lossless", hidden=True)]
Dtype = Annotated[
    str | None,
    typer.Option(
        metavar="bf16|f16|f32",
        help="Round the weights to this.",
        show_default="what transformers would choose",
    ),
]
Adapter = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="A LoRA adapter to merge into the weights.", show_default="none"),
]
SliceOption = Annotated[
    str | None,
    typer.Option(
        "--slice",
        metavar="K/N",
        help="Store only the K-th of N slices of the rows of every matrix.",
        show_default="all rows",
    ),
]
Shares = Annotated[
    str | None,
    typer.Option(
        metavar="2,1,..",
        help="How many rows each slice gets beside the others.",
        show_default="with --also the measured rates of the disks, else all the same",
    ),
]
NewAlso = Annotated[
    list[Path] | None,
    typer.Option(
        "--also",
        metavar="DIR",
        help="A directory on another disk, which gets rows of every matrix, too. Repeatable.",
    ),
]
Also = Annotated[
    list[Path] | None,
    typer.Option(metavar="DIR", help="A directory of it on another disk that has moved. Repeatable."),
]
Speculate = Annotated[
    str,
    typer.Option(metavar="HOW", help="Draft tokens from the text so far (lookup), or off. Changes no token."),
]
Draft = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="Draft tokens from a small prepared BLOOM, or DST's int4 form. Changes no token."
    ),
]
Ram = Annotated[
    str | None, typer.Option(metavar="SIZE", help="RAM to use, like 12GB.", show_default="what is free")
]
PromptTokens = Annotated[int, typer.Option(metavar="N", min=1, help="Tokens of the prompt.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def form_of(form: str, lossless: bool) -> str:
    """The form that was asked for; `BloomdeskError` if there is none of that name."""
    if lossless:
        raise BloomdeskError("--lossless is --form lossless now", f"give --form {LOSSLESS}")
    if form not in FORMS:
        raise BloomdeskError(f"unknown --form {form!r}", f"give one of {', '.join(FORMS)}")
    return form


def slice_of(text: str | None, shares: str | None) -> Slice | None:
    """ "2/4" is the second of four slices. Raises `BloomdeskError` for one that cannot be."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if found is None:
        raise BloomdeskError(f"--slice {text[:40]!r} is no slice", "write the second of four as --slice 2/4")
    index, count = map(int, found.groups())
    if not 1 <= index <= count:
        raise BloomdeskError(
            f"there is no slice {index} of {count}", f"they are 1/{count} to {count}/{count}"
        )
    given = shares_of(shares) or even(min(count, MOST_SLICES + 1))
    if len(given) != count:
        raise BloomdeskError(f"--shares has {len(given)} shares for {count} slices", "give each slice one")
    return Slice(index - 1, given)


def shares_of(text: str | None) -> tuple[int, ...]:
    """ "2,1" is twice as many rows for the first of two slices; none without a text.

    Raises `BloomdeskError` for anything but positive integers.
    """
    if text is None:
        return ()
    if not re.fullmatch(r"\d{1,10}(,\d{1,10})*", text):
        raise BloomdeskError(f"--shares {text[:40]!r} are no shares", "write them like --shares 2,1,1")
    return tuple(map(int, text.split(",")))


def dtype_of(name: str | None) -> str | None:
    """ "bf16" is BF16. Raises `BloomdeskError` for a name that is no dtype's."""
    from toolkit.source.dtype import OPTIONS

    if name is not None and name not in OPTIONS:
        raise BloomdeskError(f"unknown --dtype {name!r}", f"give one of {', '.join(OPTIONS)}")
    return OPTIONS[name] if name is not None else None


def share_of(text: str | None) -> float | None:
    """ "5%" is 0.05. Raises `BloomdeskError` for anything but a number of percent."""
    if text is None:
        return None
    try:
        share: float | None = float(text.removesuffix("%")) / 100
    except ValueError:
        share = None
    # 0.05 may be meant as 5%.
    if share is None or (share <= 0.01 and not text.endswith("%") and share > 0):
        raise BloomdeskError(
            f"a sample is a share of the bytes, in percent, found {text!r}", "give it as --sample 5%"
        )
    return share
