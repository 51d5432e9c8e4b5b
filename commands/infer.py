"""medssl infer: cases in, probabilities, label maps or embeddings, heat maps and a report out."""

from pathlib import Path
from typing import Annotated, Literal

import typer


def run(
    cases: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CASE... [KEY=VALUE]...",
            help="NIfTI files, case folders, DICOM folders, pictures, a folder of CT and one of PET slices, or a CSV "
            "of paths; then overrides.",
        ),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            help="Run of a segmentation network, a head or a backbone, or a weight file; default: MEDSSL_MODEL, then "
            "the newest finished run under ./runs."
        ),
    ] = None,
    backbone: Annotated[
        Path | None, typer.Option(help="Where the backbone of a head lies now; default: where it was in training.")
    ] = None,
    heatmap: Annotated[bool, typer.Option("--heatmap", help="Add a heat map on the grid of the input.")] = False,
    dicom: Annotated[
        str | None,
        typer.Option(
            help="Write the heat map of a DICOM folder as DICOM too: pm (parametric map), sc (picture), seg (region), "
            "e.g. pm,sc,seg; or its segmentation: seg,rtstruct; takes `pip install 'medssl[dicom]'`."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the results; one sub-folder a case if there are several. [default: out/CASE]"),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(min=1, help="Slices with the highest score that are listed and shown. [default: 5]"),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            help="From which probability on a class is positive, or a voxel belongs to the one structure, between 0 "
            "and 1; default: the model's, found on its validation data."
        ),
    ] = None,
    tta: Annotated[
        bool, typer.Option("--tta", help="Segmentation: average over the flips of each slice, at four times the work.")
    ] = False,
    save_probabilities: Annotated[
        bool,
        typer.Option("--save-probabilities", help="Segmentation: keep the probabilities too, on the input's grid."),
    ] = False,
    ct: Annotated[Path | None, typer.Option(help="CT-PET segmentation: the CT slices, a folder or a picture.")] = None,
    pet: Annotated[
        Path | None, typer.Option(help="CT-PET segmentation: the PET slices, with the same names as those of --ct.")
    ] = None,
    sequence: Annotated[
        str | None, typer.Option(help="Which of the model's sequences a single NIfTI file is; default: by its name.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    on_error: Annotated[
        Literal["stop", "skip"], typer.Option(help="A case that cannot be read: stop (exit 3), or list it (exit 4).")
    ] = "stop",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a folder that holds something else.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout, nothing else.")] = False,
) -> None:
    """Look at cases through a trained model: label maps, or probabilities, top slices and a heat map; and a report."""
    from medssl_cli.commands.progress import progress_bar
    from medssl_cli.services.infer import InferRequest, default_out, infer

    words = tuple(word for word in cases or () if not _is_override(word))
    request = InferRequest(
        cases=words,
        overrides=tuple(word for word in cases or () if _is_override(word)),
        model=model,
        backbone=backbone,
        threshold=threshold,
        dicom=dicom,
        heatmap=heatmap,
        out=out or (default_out(words) if words else Path("out")),
        top_k=top_k,
        sequence=sequence,
        device=device,
        on_error=on_error,
        overwrite=overwrite,
        tta=tta,
        save_probabilities=save_probabilities,
        ct=ct,
        pet=pet,
    )
    with progress_bar("infer") as progress:
        result = infer(request, progress=progress)
    text = result.to_json() if json else result.summary()
    if text:
        typer.echo(text)
    if result.error is not None:
        raise result.error


def _is_override(word: str) -> bool:
    return "=" in word and not Path(word).exists()
