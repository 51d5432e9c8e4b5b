"""medssl check-data: what is wrong with a data set, before a training finds out."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from medssl_cli.core.wording import counted

if TYPE_CHECKING:
    from collections.abc import Callable

    from medssl_cli.services.check_data import CheckResult

_LINES = 20


def run(
    source: Annotated[
        Path, typer.Argument(help="Case tree, image tree, CSV with one row for each series, or another layout.")
    ],
    task: Annotated[
        str | None,
        typer.Option(metavar="pretrain|images|classify|segment|ct-pet", help="By default what fits the source."),
    ] = None,
    sequences: Annotated[
        str | None,
        typer.Option(
            help="Sequences of each case, joined by commas; the first is the reference grid. By default those that the "
            "layout names, else ax_t2wi,ax_adc,ax_dwi."
        ),
    ] = None,
    split_csv: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="CSV of ids, or a folder with train.csv, val.csv, test.csv; may be given several times.",
        ),
    ] = None,
    labels: Annotated[Path | None, typer.Option(help="CSV with an id column, for --task classify.")] = None,
    target: Annotated[str | None, typer.Option(help="Column of the label.")] = None,
    label: Annotated[
        str,
        typer.Option(
            help="segment: stem of the label map of each case, e.g. lesion; or the folder of the labels of pictures."
        ),
    ] = "",
    classes: Annotated[
        str, typer.Option(help="segment: names of the structures, e.g. gland,lesion,ignore=255 or lesion=2+3.")
    ] = "",
    roi: Annotated[str, typer.Option(help="Stem of the mask of the region of interest.")] = "roi_Prostate",
    min_roi_pixels: Annotated[int, typer.Option(help="Smallest mask, in pixels of its largest slice.")] = 1,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="A missing sequence is a warning instead of an error.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder for check_data.json and check_data.html; without it nothing is written.")
    ] = None,
    fix_csv: Annotated[Path | None, typer.Option(help="Write a CSV of the cases without error.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what lies in --out.")] = False,
    on_error: Annotated[
        Literal["stop", "skip"],
        typer.Option(help="stop: exit code 3 when there is an error; skip: exit code 4, bad cases are listed."),
    ] = "stop",
    workers: Annotated[int | None, typer.Option(help="Processes; by default one less than there are CPUs.")] = None,
    layout: Annotated[
        Literal["auto", "cases", "images", "table", "nnunet", "decathlon", "mmdinov2", "template"],
        typer.Option(help="How the files are named; auto looks."),
    ] = "auto",
    template: Annotated[
        str, typer.Option(help="Path of a sequence, e.g. '{subject}/{sequence}.nii.gz', for --layout template.")
    ] = "",
    modality: Annotated[str, typer.Option(help="Kind of eye pictures; a folder of that name is taken.")] = "",
    window_hu: Annotated[
        list[str] | None,
        typer.Option(metavar="LOW,HIGH", help="Window in HU that training will take; may be given several times."),
    ] = None,
    stats: Annotated[
        bool, typer.Option("--stats", help="Mean and deviation of all images as training scales them.")
    ] = False,
    dataset_type: Annotated[
        Literal["auto", "flat", "presplit", "pclt", "pclt20k"],
        typer.Option(help="ct-pet: how the files lie; auto looks."),
    ] = "auto",
    patient_regex: Annotated[
        str | None,
        typer.Option(help=r"ct-pet: the first group is the patient; by default what stands before the last _slice_."),
    ] = None,
    mask_threshold: Annotated[
        int | None,
        typer.Option(
            min=0, max=254, help="ct-pet: values above it are lesion; by default masks hold 0 and 1 or 0 and 255."
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Read every case and list what is wrong with it."""
    from medssl_cli.services.check_data import check_data

    result = check_data(
        source,
        task=task,
        sequences=None if sequences is None else tuple(name.strip() for name in sequences.split(",") if name.strip()),
        split_csv=tuple(split_csv or ()),
        labels=labels,
        target=target,
        roi=roi,
        min_roi_pixels=min_roi_pixels,
        missing_allowed=allow_missing,
        out=out,
        fix_csv=fix_csv,
        overwrite=overwrite,
        on_error=on_error,
        workers=workers,
        progress=_progress(),
        layout=layout,
        template=template,
        modality=modality,
        windows_hu=[_window(text) for text in window_hu or ()],
        stats=stats,
        dataset_type=dataset_type,
        patient_regex=patient_regex,
        mask_threshold=mask_threshold,
        label=label,
        classes=tuple(name.strip() for name in classes.split(",") if name.strip()),
    )
    if json:
        typer.echo(result.to_json())
    else:
        _print(result)
    result.raise_if_bad()


def _window(text: str) -> tuple[float, float]:
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not LOW,HIGH, e.g. --window-hu=-1000,1000") from error
    return low, high


def _progress() -> Callable[[int, int], None] | None:
    """A bar on a terminal; nothing elsewhere."""
    if not sys.stderr.isatty():
        return None
    from tqdm import tqdm

    bar: list[tqdm] = []

    def show(done: int, total: int) -> None:
        if not bar:
            bar.append(tqdm(total=total, unit="case", leave=False))
        bar[0].update(done - bar[0].n)
        if done == total:
            bar[0].close()

    return show


def _print(result: CheckResult) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colours = {"error": "red", "warning": "yellow", "info": "blue"}
    if result.findings:
        table = Table("severity", "code", "findings", "cases", "for example", box=None, pad_edge=False)
        for severity, code, n, cases, first in result.counts():
            case = f"{first.case_id}: " if first.case_id else ""
            table.add_row(Text(severity, colours[severity]), code, str(n), str(cases), Text(case + first.message))
        # rich leaves bold and underline in a terminal that asks for no colour
        colour_system: Literal["auto"] | None = None if os.environ.get("NO_COLOR") else "auto"
        Console(highlight=False, soft_wrap=False, color_system=colour_system).print(table)
    errors = [f for f in result.findings if f.severity == "error"]
    for finding in errors[:_LINES]:
        typer.echo(f"error {finding.code} {finding.case_id or 'data set'}: {finding.path}: {finding.message}")
    if len(errors) > _LINES:
        typer.echo(f"and {counted(len(errors) - _LINES, 'error')} more")
    typer.echo(result.summary())
