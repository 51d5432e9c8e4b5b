"""medssl infer: cases in, probabilities or embeddings, heat maps and a report out."""

from pathlib import Path
from typing import Annotated, Literal

import typer


def run(
    cases: Annotated[
        list[str],
        typer.Argument(
            metavar="CASE... [KEY=VALUE]...",
            help="NIfTI files, case folders, DICOM folders, pictures, or a CSV of paths; then overrides.",
        ),
    ],
    model: Annotated[
        Path | None,
        typer.Option(
            help="Run of a head or a backbone, or a weight file; default: MEDSSL_MODEL, then the newest finished run "
            "under ./runs."
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
            "e.g. pm,sc,seg; takes `pip install 'medssl[dicom]'`."
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
        typer.Option(help="From which probability on every class is positive, between 0 and 1; default: the head's."),
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
    """Look at cases through a head or a bare backbone: probabilities, top slices, heat map, report."""
    from medssl_cli.commands.progress import progress_bar
    from medssl_cli.services.infer import InferRequest, default_out, infer

    words = tuple(word for word in cases if not _is_override(word))
    request = InferRequest(
        cases=words,
        overrides=tuple(word for word in cases if _is_override(word)),
        model=model,
        backbone=backbone,
        threshold=threshold,
        dicom=dicom,
        heatmap=heatmap,
        out=out or default_out(words),
        top_k=top_k,
        sequence=sequence,
        device=device,
        on_error=on_error,
        overwrite=overwrite,
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
