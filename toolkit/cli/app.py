"""The `bloomdesk` command: all commands, in the order of --help, and what happens to each of them."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand
from typer.exceptions import TyperException

from runner.cli.guard import Guard, empty_argument, end_process, require_current_directory
from runner.errors import BloomdeskError
from toolkit.cli import preparing, running

# Set by the script that `bloomdesk --install-completion` gives to a shell.
COMPLETION = "_BLOOMDESK_COMPLETE"
DEBUG = "--debug"


class _Command(TyperCommand):
    """A command that refuses an empty argument, but for PROMPT, and takes --debug, as `bloomdesk` itself does."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        # What follows "--" is text.
        options = args[: args.index("--")] if "--" in args else args
        if DEBUG in options:
            args = [*(word for word in options if word != DEBUG), *args[len(options) :]]
            ctx.obj.debug = True
        given, _, _ = self.make_parser(ctx).parse_args(args=list(args))
        names = {
            param.name: param.metavar if param.param_type_name == "argument" else param.opts[0]
            for param in self.get_params(ctx)
        }
        empty = empty_argument({names[name]: value for name, value in given.items() if name != "prompt"})
        if empty is not None:
            ctx.fail(empty)
        return super().parse_args(ctx, args)


class _Commands(typer.Typer):
    def command(self, name: str | None = None, **options: Any) -> Callable[..., Any]:
        return super().command(name, cls=_Command, **options)


app = _Commands(
    help="Run BLOOM-176B, or any smaller BLOOM, on a desktop: prepare the checkpoint once, then generate from disk.",
    no_args_is_help=True,
    rich_markup_mode=None,  # drawing boxes costs more than all the rest of --help
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"bloomdesk {importlib.metadata.version('bloomdesk')}")
        raise typer.Exit


@app.callback()
def common_options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option(DEBUG, help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    context.obj.debug = debug
    # 1 says that verify found damage, 2 that it could not check.
    context.obj.failure = 2 if context.invoked_subcommand == "verify" else 1
    require_current_directory()


for command in (
    preparing.download,
    preparing.prepare,
    preparing.convert,
    preparing.spread,
    preparing.verify,
    preparing.repair,
    preparing.export,
    preparing.info,
    running.generate,
    running.score,
    running.serve,
    running.bench,
    running.plan,
):
    app.command()(command)


def run(arguments: Sequence[str]) -> int:
    """Exit status of the command with these arguments."""
    guard = Guard()

    def invoke() -> int:
        if COMPLETION in os.environ:
            # The shell's Tab key: the words come in the environment, too.
            app(prog_name="bloomdesk")
        try:
            with typer.main.get_command(app).make_context("bloomdesk", list(arguments), obj=guard) as context:
                return context.command.invoke(context) or 0
        except typer.Exit as done:
            return done.exit_code
        except TyperException as error:  # of what was typed
            where = getattr(error, "ctx", None)
            hint = f"{where.command_path if where else 'bloomdesk'} --help"
            help_or_error = BloomdeskError(error.format_message(), hint).worded()
            print(help_or_error if arguments else error.format_message(), file=sys.stderr)
            return error.exit_code

    return guard.run(invoke)


def main() -> NoReturn:
    """Run the command of this process, and end with its exit status."""
    end_process(lambda: run(sys.argv[1:]))


if __name__ == "__main__":
    main()
