"""medssl info: what a run or a weight file is."""

from pathlib import Path
from typing import Annotated

import typer


def run(
    path: Annotated[
        Path | None,
        typer.Argument(metavar="[RUN|FILE]", help="Run folder or weight file; the newest finished run if not given."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout, nothing else.")] = False,
) -> None:
    """Describe a run or a weight file, without loading torch."""
    from medssl_cli.services.info import info

    answer = info(path)
    typer.echo(answer.to_json() if json else answer.summary())
