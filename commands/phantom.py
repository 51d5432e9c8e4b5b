"""medssl phantom: learnable toy data, the same bytes for the same seed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def run(
    task: Annotated[
        str,
        typer.Argument(
            help="prostate (case tree of NIfTI), prostate-dicom (DICOM series), head-ct (NIfTI and a series table) or "
            "ct-pet (PNG slices with tumour masks)."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="Folder for the phantom; made if missing.")],
    cases: Annotated[int, typer.Option(help="Number of studies; some patients have two.")] = 24,
    seed: Annotated[int, typer.Option(help="Same seed, same bytes.")] = 0,
    size: Annotated[
        str,
        typer.Option(
            help="small (96 x 96 x 12 voxels; head 24; CT-PET 6 slices) or full (320 x 320 x 24; head 512 x 512 x 32; "
            "CT-PET 512 x 512 x 6)."
        ),
    ] = "small",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what OUT holds.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Write a phantom: toy images with labels that a model can learn."""
    from medssl_cli.core.run import to_json
    from medssl_cli.services.phantom import make_phantom

    def show(done: int, total: int, case_id: str) -> None:
        typer.echo(f"\r{done}/{total} {case_id:<20}", nl=done == total, err=True)

    progress = show if sys.stderr.isatty() else None
    result = make_phantom(task, out, cases=cases, seed=seed, size=size, overwrite=overwrite, progress=progress)
    typer.echo(to_json(result.json()) if json else result.summary())
