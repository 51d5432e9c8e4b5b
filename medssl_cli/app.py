"""The medssl program: the list of commands, --verbose and --version; errors become three lines and an exit code."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import sys
import traceback
from collections.abc import Callable
from typing import Annotated, Any

import typer

from medssl_cli.core.errors import Interrupted, MedsslError

COMMANDS = ("convert", "split", "check-data", "pretrain", "infer", "phantom", "info", "doctor")
"""Order of the help page. Each module of ``commands/`` has one function ``run``, or an ``app`` with several."""

EXIT_CODES = """Exit codes: 0 done · 1 internal error · 2 usage or configuration · 3 data rejected · 4 some failed ·
5 non-finite loss · 6 resource missing · 7 checkpoint rejected · 75 interrupted, run the same command again."""

app = typer.Typer(
    name="medssl",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog=EXIT_CODES,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        from medssl_cli.core.run import package_version

        typer.echo(f"medssl {package_version()}")
        raise typer.Exit


@app.callback()
def root(
    verbose: Annotated[
        bool, typer.Option("--verbose", help="More log lines, and a traceback with each error.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Self-supervised learning on medical images: DICOM in, a number with its confidence interval out."""
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO,
        format="%(message)s",
        stream=sys.stderr,
        force=True,
    )
    for noisy in ("matplotlib", "PIL", "nibabel", "pydicom", "dicom2nifti", "numexpr", "xformers", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.ERROR)


def speak_errors(command: Callable[..., Any]) -> Callable[..., Any]:
    """The same command, whose errors end in three lines on stderr and their exit code."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except KeyboardInterrupt as error:
            stopped = Interrupted(
                "Interrupted; finished parts are whole.", fix="run the same command again to go on", code="interrupted"
            )
            raise _exit(stopped) from error
        except MedsslError as error:
            raise _exit(error) from error

    return run


def _exit(error: MedsslError) -> typer.Exit:
    if logging.getLogger().isEnabledFor(logging.DEBUG):
        traceback.print_exc()
    typer.echo(str(error), err=True)
    return typer.Exit(error.exit_code)


def _register(name: str) -> None:
    module = importlib.import_module(f"medssl_cli.commands.{name.replace('-', '_')}")
    if hasattr(module, "app"):
        for info in module.app.registered_commands:
            info.callback = speak_errors(info.callback)
        app.add_typer(module.app, name=name)
    else:
        app.command(name)(speak_errors(module.run))


for _name in COMMANDS:
    if importlib.util.find_spec(f"medssl_cli.commands.{_name.replace('-', '_')}"):
        _register(_name)


def main() -> None:
    """Entry point of the console script."""
    app()
