"""medssl eval: predictions against the truth, metrics with intervals over patients and a report out."""

from pathlib import Path
from typing import Annotated, Literal

import typer


def run(
    out: Annotated[Path, typer.Option(help="Folder for the results; made if missing.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="How images are computed: batch_size, digest. Of masks: lesion_threshold, worst_cases, ...",
        ),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            help="Run folder of a head or of a segmentation network; default: MEDSSL_MODEL, then the newest finished "
            "run under ./runs."
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Features of `medssl extract`, or images: case tree, image tree, series table.")
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(help="Part of the data: test, val, train or all. [default: test, or all where no split is known]"),
    ] = None,
    predictions: Annotated[
        Path | None,
        typer.Option(help="Instead of a model: CSV of predictions, one row a case, or folder (or file) of label maps."),
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(help="The truth for --predictions: CSV, or folder (or file) of label maps.")
    ] = None,
    probabilities: Annotated[
        Path | None, typer.Option(help="Folder of probability maps beside the label maps, for lesion candidates.")
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(help="Structures in the values 1, 2, ... of label maps, NAME[,NAME], or lesion=2+3,ignore=255."),
    ] = None,
    label: Annotated[
        str | None, typer.Option(help="Name, without suffix, of the label map in the folder of a case.")
    ] = None,
    tolerance_mm: Annotated[
        float | None, typer.Option(help="Tolerance of the surface Dice; in pixels for pictures. [default: 2]")
    ] = None,
    hd_empty: Annotated[
        str | None, typer.Option(help="HD95 where a mask is empty: nan, or the image's diagonal. [default: nan]")
    ] = None,
    lesions: Annotated[bool, typer.Option("--lesions", help="Also judge single lesions: FROC, precision.")] = False,
    save_predictions: Annotated[
        bool, typer.Option("--save-predictions", help="Keep the label maps of the model in OUT/predictions.")
    ] = False,
    group_pattern: Annotated[
        str | None, typer.Option(help="Regular expression whose first group is the patient in names of masks.")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="What --predictions are: binary, multiclass, multilabel or regression.")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Probability from which on a class counts as present. [default: the head's]")
    ] = None,
    labels: Annotated[Path | None, typer.Option(help="CSV of labels; default: those of the data.")] = None,
    target: Annotated[
        str | None, typer.Option(help="Columns of the labels, COL[,COL]; default: those the head was trained on.")
    ] = None,
    splits: Annotated[Path | None, typer.Option(help="Folder of `medssl split`, for images.")] = None,
    split_csv: Annotated[
        Path | None, typer.Option(help="One list of cases to evaluate, of images or label maps.")
    ] = None,
    subgroup: Annotated[
        list[str] | None, typer.Option(help="Column whose values are evaluated apart; may be repeated.")
    ] = None,
    subgroups: Annotated[Path | None, typer.Option(help="CSV with the columns of --subgroup or --group-by.")] = None,
    group_by: Annotated[
        str | None, typer.Option(help="Column that the bootstrap draws by. [default: patient_id]")
    ] = None,
    compare: Annotated[Path | None, typer.Option(help="Folder of another evaluation of the same cases.")] = None,
    missing_sequences: Annotated[
        bool, typer.Option("--missing-sequences", help="Also evaluate with sequences left out.")
    ] = False,
    sequence: Annotated[str | None, typer.Option(help="The one sequence to read of images.")] = None,
    draws: Annotated[int, typer.Option(min=1, help="Draws of the bootstrap and of the permutation test.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Of every draw.")] = 42,
    backbone: Annotated[Path | None, typer.Option(help="Where the head's backbone lies, if it was moved.")] = None,
    cache: Annotated[
        Path | None,
        typer.Option(help="Where vectors of images are kept. [default: MEDSSL_CACHE, then ~/.cache/medssl]"),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    on_error: Annotated[
        Literal["stop", "skip"], typer.Option(help="A case that cannot be read: stop (exit 3), or list it (exit 4).")
    ] = "stop",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a folder that holds something else.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout, nothing else.")] = False,
) -> None:
    """Measure predictions against the truth, with intervals over patients."""
    from medssl_cli.commands.progress import progress_bar
    from medssl_cli.services.evaluate import EvaluateRequest, evaluate

    request = EvaluateRequest(
        out=out,
        model=model,
        data=data,
        split=split,
        predictions=predictions,
        reference=reference,
        task=task,
        threshold=threshold,
        subgroup=tuple(subgroup or ()),
        subgroups=subgroups,
        compare=compare,
        draws=draws,
        seed=seed,
        labels=labels,
        target=tuple(name.strip() for name in (target or "").split(",") if name.strip()),
        splits=splits,
        split_csv=split_csv,
        group_by=group_by,
        sequence=sequence,
        missing_sequences=missing_sequences,
        backbone=backbone,
        cache=cache,
        device=device,
        on_error=on_error,
        overwrite=overwrite,
        overrides=tuple(overrides or ()),
        tolerance_mm=tolerance_mm,
        hd_empty=hd_empty,
        lesions=lesions,
        probabilities=probabilities,
        group_pattern=group_pattern,
        classes=tuple(name.strip() for name in (classes or "").split(",") if name.strip()),
        label=label,
        save_predictions=save_predictions,
    )
    with progress_bar("eval") as progress:
        result = evaluate(request, progress=progress)
    typer.echo(result.to_json() if json else result.summary())
    if result.error is not None:
        raise result.error
