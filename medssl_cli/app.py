"""The medssl program: the list of commands, --verbose and --version; errors become three lines and an exit code."""

from __future__ import annotations

import functools
import importlib
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from medssl_cli.core.errors import ConfigError, Interrupted, MedsslError

COMMANDS = (
    "convert",
    "split",
    "check-data",
    "pretrain",
    "extract",
    "train-head",
    "segment",
    "infer",
    "eval",
    "phantom",
    "download",
    "info",
    "doctor",
)
"""Order of the help page. Each module of ``commands/`` has one function ``run``, or an ``app`` with several."""

EXIT_CODES = """Exit codes: 0 done · 1 internal error · 2 usage or configuration · 3 data rejected · 4 some failed ·
5 non-finite loss · 6 resource missing · 7 checkpoint rejected · 75 interrupted, run the same command again."""

UsageError: type[Exception] = typer.BadParameter.__bases__[0]
"""Base of all that is wrong with the words typed; Typer carries its own copy of click and names only this leaf."""


class SpeakingGroup(TyperGroup):
    """The group of commands; words that cannot be parsed end in three lines too."""

    def list_commands(self, ctx: Any) -> list[str]:
        """In the order in which they are used."""
        return [name for name in COMMANDS if name in self.commands]

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the program; see ``typer.core.TyperGroup.main``."""
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
        try:
            code = super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
        except UsageError as error:
            typer.echo(_usage_text(error), err=True)
            sys.exit(ConfigError.exit_code)
        except typer.Abort:
            sys.exit(Interrupted.exit_code)
        sys.exit(code if isinstance(code, int) else 0)


def _usage_text(error: Any) -> str:
    message = error.format_message().strip()
    where = error.ctx.command_path if error.ctx is not None else "medssl"
    if type(error).__name__ == "NoArgsIsHelpError":  # its message is the help page
        return message
    if not message.endswith((".", "?")):
        message += "."
    return str(ConfigError(message, where=where, fix=f"see `{where} --help`", code="usage"))


app = typer.Typer(
    name="medssl",
    cls=SpeakingGroup,
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
    """Self-supervised learning on medical images, from DICOM to a number with a confidence interval."""
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO,
        format="%(message)s",
        stream=sys.stderr,
        force=True,
    )
    for noisy in (
        "matplotlib",
        "PIL",
        "nibabel",
        "pydicom",
        "dicom2nifti",
        "numexpr",
        "xformers",
        "urllib3",
        "highdicom",
    ):
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
        app.add_typer(module.app, name=name, short_help=_first_line(module.app.info.help))
    else:
        app.command(name, short_help=_first_line(module.run.__doc__))(speak_errors(module.run))


def _first_line(text: Any) -> str:
    return str(text).strip().splitlines()[0]


for _name in COMMANDS:
    _register(_name)


def main() -> None:
    """Entry point of the console script."""
    try:
        app()
    except SystemExit as end:
        _leave_group(end.code)
        raise


def _leave_group(code: object) -> None:
    """End at once where an error left a process group behind: a peer may be gone, and then the group's threads, which
    cannot be ended in order, abort the process instead of giving its exit code.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)
