"""medssl split: patient-level train, validation and test lists."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def run(
    source: Annotated[
        Path,
        typer.Argument(
            help="Case tree, image tree, CSV with one row for each series, folder with CT and PET side by side, or "
            "another layout."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for train.csv, val.csv, test.csv and split_summary.json.")],
    ratios: Annotated[
        tuple[float, float, float], typer.Option(help="Shares of train, val and test, three numbers.")
    ] = (0.7, 0.15, 0.15),
    seed: Annotated[int, typer.Option(help="Seed of the draw.")] = 42,
    folds: Annotated[int | None, typer.Option(help="Also fold_k/ over train and val, and splits_final.json.")] = None,
    group_by: Annotated[str | None, typer.Option(help="Column whose equal values stay on one side.")] = None,
    group_pattern: Annotated[
        str | None, typer.Option(help=r"Regular expression that takes the group from a name: '(Patient\d+)_'.")
    ] = None,
    stratify: Annotated[
        str | None, typer.Option(help="Column or columns, joined by commas, whose classes are spread evenly.")
    ] = None,
    labels: Annotated[Path | None, typer.Option(help="CSV with an id column, for the columns of a tree.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what lies in --out.")] = False,
    layout: Annotated[
        Literal["auto", "cases", "images", "table", "nnunet", "decathlon", "mmdinov2", "template", "ct-pet"],
        typer.Option(help="How the files are named; auto looks."),
    ] = "auto",
    template: Annotated[
        str, typer.Option(help="Path of a sequence, e.g. '{subject}/{sequence}.nii.gz', for --layout template.")
    ] = "",
    files: Annotated[
        Literal["none", "link", "copy"] | None,
        typer.Option(help="CT-PET: also train/, val/ and test/ with the files themselves. [default: link]"),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Split cases into train, val and test; patients stay together."""
    from medssl_cli.services.split import split

    result = split(
        source,
        out,
        ratios=ratios,
        seed=seed,
        folds=folds,
        group_by=group_by,
        group_pattern=group_pattern,
        stratify=stratify,
        labels=labels,
        overwrite=overwrite,
        layout=layout,
        template=template,
        files=files,
    )
    typer.echo(result.to_json() if json else result.summary())
