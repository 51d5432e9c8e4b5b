"""medssl download: published weights, checked before they count. The one command that uses the network."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def run(
    name: Annotated[str, typer.Argument(help="Which weights, e.g. meddinov3; see --list.", show_default=False)] = "",
    show: Annotated[bool, typer.Option("--list", help="List the names and what of them is here.")] = False,
    url: Annotated[str | None, typer.Option(help="Address of the file, in place of the known ones.")] = None,
    sha256: Annotated[str | None, typer.Option(help="Digest that the file must have.")] = None,
    check_size: Annotated[
        bool, typer.Option("--check-size", help="Only ask for the size and compare it with the file here.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Fetch again what is here.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the file; else below $MEDSSL_HOME, $MODELS_DIR or ~/.cache/medssl/weights."),
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(help="Seconds until a connection stands, and of silence; 10 and 120 if not given.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Fetch published weights, with size, content and SHA-256 checked."""
    from medssl_cli.core.errors import ConfigError
    from medssl_cli.services import download as service

    if show:
        _refuse_needless("--list", name, url, sha256, check_size, force, out, timeout)
        result = service.list_published()
        typer.echo(result.to_json() if json else result.summary())
        return
    if not name:
        raise ConfigError(
            "No weights were named.", where="medssl download", fix="see `medssl download --list`", code="usage"
        )

    def tell(done: int, total: int | None) -> None:
        share = f" of {total:,} bytes, {100 * done / total:.0f} %" if total else " bytes"
        typer.echo(f"\r{done:,}{share}", nl=done == total, err=True)

    request = service.DownloadRequest(name, url, sha256, out, force, timeout)
    if check_size:
        _refuse_needless("--check-size", sha256, force)
        result = service.check_size(request)
    else:
        result = service.download(request, progress=tell if sys.stderr.isatty() else None)
    typer.echo(result.to_json() if json else result.summary())
    if result.error is not None:
        raise result.error


def _refuse_needless(mode: str, *given: object) -> None:
    """Refuse what has no effect beside an option that only tells something."""
    from medssl_cli.core.errors import ConfigError

    if any(value not in (None, False, "") for value in given):
        raise ConfigError(
            f"{mode} only tells something: some of the other options have no effect on it.",
            where=f"medssl download {mode}",
            fix=f"leave them out, or {mode}",
            code="flags_without_effect",
        )
