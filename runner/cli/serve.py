"""The command `serve`: one model over HTTP, until it is told to end."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import ipaddress
import os
import signal
import socket
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from runner.cli import machines
from runner.errors import BloomdeskError, refused
from runner.generation.options import GenerationOptions
from runner.units import parse_size

if TYPE_CHECKING:
    import uvicorn

    from runner.generation.model import Model
    from runner.server.engine import Engine
    from runner.server.settings import Settings

DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8000
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
KEY_VARIABLE = "BLOOMDESK_API_KEY"
# Connections beyond this get a 503 at once.
MOST_CONNECTIONS = 1024
# Seconds that clients have to read what they are told at the end.
GOODBYE = 5.0
LOOK = 0.1


@dataclass(frozen=True)
class ServeOptions:
    """What to serve, where, and to whom."""

    directory: Path
    host: str = DEFAULT_HOST
    port: int = DEFAULT_PORT
    ram: str | None = None
    keys: tuple[str, ...] = ()
    no_auth: bool = False
    model_name: str | None = None
    chat_template: Path | None = None
    max_waiting: int | None = None
    log_json: bool = False
    log_prompts: bool = False
    data: Path | None = None
    max_file_size: str | None = None
    max_lines: int | None = None
    generation: GenerationOptions = field(default_factory=GenerationOptions)
    also: tuple[Path, ...] = ()


@machines.awaited()
def serve(options: ServeOptions) -> int:
    """Exit status, after the server was told to end. Raises `BloomdeskError` if it cannot begin."""
    asked = {"command": "serve"}
    if machines.follows(options.directory):
        return machines.follow(options.directory, options.ram, asked)
    keys = keys_of(options.keys)
    if not (_is_loopback(options.host) or keys or options.no_auth):
        raise BloomdeskError(
            f"--host {options.host} lets others in, and there is no key",
            f"give --api-key KEY, set {KEY_VARIABLE}, or say --no-auth",
        )
    try:
        import uvicorn

        from runner.cli.connections import Connection
        from runner.server.app import create_app
        from runner.server.engine import Engine
        from runner.server.logs import Log
        from runner.server.routing import TOO_MANY_CONNECTIONS
    except ImportError as error:
        # pip finds the extra in what is installed, a checkout or a wheel, and asks no index for bloomdesk itself.
        raise BloomdeskError(
            f"serving needs {error.name}, which is not installed", "pip install 'bloomdesk[serve]'"
        ) from None
    held = contextlib.ExitStack()

    def open_model() -> Model:
        opened = machines.opened(options.directory, options.ram, asked, options.also, engine.give_up)
        return held.enter_context(opened)

    engine = Engine(open_model, options.generation)
    settings = _settings(options, keys)
    full = Log(TOO_MANY_CONNECTIONS, _say, as_json=settings.log_json)
    with held, _data(options.data), listening(options.host, options.port) as listener:
        config = uvicorn.Config(
            create_app(engine, settings, _say, data=options.data),
            access_log=False,
            log_level="warning",
            http=Connection.bounded(settings.read_head, MOST_CONNECTIONS, full),
            server_header=False,
        )
        host, port = listener.getsockname()[:2]
        _say(f"serving {settings.model_name} at http://{f'[{host}]' if ':' in host else host}:{port}/v1")
        _server(config, engine).run([listener])
    if engine.failure:
        raise engine.failure
    return 0


def keys_of(given: tuple[str, ...]) -> tuple[str, ...]:
    """The keys, without what surrounds them. Raises `BloomdeskError` if there is nothing else."""
    given = given or tuple(filter(None, os.environ.get(KEY_VARIABLE, "").split(",")))
    keys = tuple(filter(None, map(str.strip, given)))
    if given and not keys:
        raise BloomdeskError("the API key is blank", f"give --api-key KEY, or unset {KEY_VARIABLE}")
    return keys


def _settings(options: ServeOptions, keys: tuple[str, ...]) -> Settings:
    """Raises `BloomdeskError` for what is wrong with the directory, before anything listens."""
    from runner.server.chat_template import load_template, tokenizer_config
    from runner.server.settings import Settings

    machines.slices_of(options.directory, options.also)
    bounds = {
        "most_waiting": options.max_waiting,
        "most_file_bytes": options.max_file_size and parse_size(options.max_file_size),
        "most_lines": options.max_lines,
    }
    return Settings(
        model_name=options.model_name or options.directory.resolve().name,
        tokenizer_config=tokenizer_config(options.directory),
        chat_template=load_template(options.directory, options.chat_template),
        keys=keys,
        # A key keeps out pages in a browser, too.
        hosts=() if keys or not _is_loopback(options.host) else (*LOOPBACK_NAMES, options.host),
        log_json=options.log_json,
        log_prompts=options.log_prompts,
        **{name: most for name, most in bounds.items() if most is not None},
    )


def _data(directory: Path | None) -> contextlib.AbstractContextManager[object]:
    """Holds the data directory, if there is one."""
    from runner.server.jobs.data import data_directory

    if directory is None:
        return contextlib.nullcontext()
    if importlib.util.find_spec("python_multipart") is None:
        raise BloomdeskError(
            "--data needs python-multipart, which is not installed", "pip install 'bloomdesk[serve]'"
        )
    return data_directory(directory)


def _is_loopback(host: str) -> bool:
    """Whether only this machine can reach the name."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def listening(host: str, port: int):
    """A socket that listens there. Raises `BloomdeskError` if the port is taken."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        why = refused(error).message
        raise BloomdeskError(f"cannot listen at {host}, port {port}: {why}", "give another --port") from None
    with listener:
        # Connections inherit it. Without it the body of an answer waits 40 ms for the acknowledgement of its headers.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield listener


def _server(config: uvicorn.Config, engine: Engine) -> uvicorn.Server:
    import uvicorn

    class Server(uvicorn.Server):
        """Ends after the pass that runs; at the second signal at once."""

        def handle_exit(self, number: int, frame: FrameType | None) -> None:
            if self.should_exit:
                os._exit(128 + number)
            _say(f"{signal.Signals(number).name}: ending after this pass; once more ends at once")
            engine.stop()
            self.should_exit = True

        async def on_tick(self, counter: int) -> bool:
            # Without a model there is nothing to serve.
            return await super().on_tick(counter) or engine.failure is not None

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            hurry = asyncio.create_task(self._hurry())
            try:
                await super().shutdown(sockets)
            finally:
                hurry.cancel()

        async def _hurry(self) -> None:
            """Once everybody has been told, nobody who reads nothing holds up the end."""
            while not engine.join(0):
                await asyncio.sleep(LOOK)
            await asyncio.sleep(GOODBYE)
            for connection in list(self.server_state.connections):
                connection.transport.abort()

    return Server(config)
