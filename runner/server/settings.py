"""What a server is told when it starts, and its bounds on what clients may ask for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from runner.server.chat_template import ChatTemplate

MEGABYTE = 2**20


@dataclass(frozen=True)
class Settings:
    """How a server answers; all times are in seconds.

    model_name       what clients call the model
    tokenizer_config what the tokenizer's own file says of it
    keys             those that clients may come with; without any, everybody may
    hosts            names by which clients without a key may call the server; empty for any
    chat_template    of the model, or None if it has none
    chat_max_tokens  new tokens of a chat that says no number
    first_byte       a client has headers by then
    keep_alive       a client that waits hears something this often
    keep_results     a request that comes again within this time of its end gets the same result
    read_head        a connection on which no whole head of a request comes for as long as this is closed
    read_body        a client may take as long as this to send a request
    schema_check     a JSON schema that takes longer than this to check is refused
    schema_wait      one that waits longer than this, while others are compiled, is to come again
    send             a client that reads nothing for as long as this is gone
    """

    model_name: str = "bloom"
    tokenizer_config: Mapping[str, Any] = field(default_factory=dict)
    keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    chat_template: ChatTemplate | None = None
    chat_max_tokens: int = 256
    first_byte: float = 0.3
    keep_alive: float = 15.0
    keep_results: float = 3600.0
    read_head: float = 20.0
    read_body: float = 60.0
    schema_check: float = 10.0
    schema_wait: float = 30.0
    send: float = 300.0
    # Bounds: bytes of a body, prompts and continuations of a request, stop texts, requests that wait for a pass.
    most_body_bytes: int = 16 * MEGABYTE
    most_prompts: int = 2048
    most_choices: int = 128
    most_stops: int = 16
    most_logprobs: int = 100
    most_waiting: int = 4096
    # Bounds of jobs: bytes of a file, files, files that come at a time, lines of a batch, batches that are not done.
    most_file_bytes: int = 200 * MEGABYTE
    most_files: int = 10_000
    most_uploads: int = 4
    most_lines: int = 50_000
    most_batches: int = 1000
    # What a line of the log is, and whether prompts are in it.
    log_json: bool = False
    log_prompts: bool = False
