"""medssl doctor: what this machine can run."""

from __future__ import annotations

from typing import Annotated

import typer


def run(json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False) -> None:
    """Show versions, devices, attention kernels that really ran, disk and advice."""
    from medssl_cli.services.doctor import doctor

    result = doctor()
    typer.echo(result.to_json() if json else result.summary())
    result.raise_if_broken()
