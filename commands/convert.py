"""medssl convert: DICOM series into a case tree, sequences onto one grid, weights and layouts of other programs."""

from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer(
    name="convert",
    help="Convert DICOM series into a case tree, bring sequences onto one grid, take over weights and data sets.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.command()
def dicom(
    source: Annotated[Path, typer.Argument(help="Folder of DICOM files, searched to the bottom, or one file.")],
    out: Annotated[Path, typer.Argument(help="Folder for the case tree; made if missing.")],
    mapping: Annotated[
        str | None, typer.Option(help="YAML of sequence: tag rules, or a shipped mapping. [default: default]")
    ] = None,
    convert_all: Annotated[
        bool, typer.Option("--all", help="Convert series that no rule names, too, as <number>_<description>.")
    ] = False,
    reference: Annotated[
        str | None, typer.Option(metavar="SEQ", help="Resample every sequence to the grid of this one, e.g. ax_t2wi.")
    ] = None,
    no_align: Annotated[bool, typer.Option("--no-align", help="Keep every sequence on its own grid.")] = False,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Worker processes. [default: CPUs less one, at most 8]")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan as a table, write nothing.")] = False,
    anonymize: Annotated[
        bool, typer.Option("--anonymize", help="Pseudonyms for ids; keep no tag that tells a person.")
    ] = False,
    engine: Annotated[
        str, typer.Option(help="dcm2niix, dicom2nifti or simpleitk; the gates are the same.")
    ] = "dcm2niix",
    on_error: Annotated[
        str, typer.Option(help="After a case with a refused series: stop (exit 3), or skip and go on (exit 4).")
    ] = "stop",
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Convert everything again, and replace a folder that holds other things."),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout, nothing else.")] = False,
    list_configs: Annotated[
        bool,
        typer.Option(
            "--list-configs",
            help="List the shipped mappings and exit.",
            is_eager=True,
            callback=lambda asked: _list_mappings(asked),
        ),
    ] = False,
) -> None:
    """Convert DICOM series into OUT/<case_id>/<sequence>.nii.gz, each behind gates that refuse a wrong volume."""
    from medssl_cli.commands.progress import progress_bar
    from medssl_cli.core.run import to_json
    from medssl_cli.services.convert import ConvertRequest, convert_dicom

    request = ConvertRequest(
        source=source,
        out=out,
        mapping=mapping,
        convert_all=convert_all,
        reference=reference,
        align=not no_align,
        workers=workers,
        dry_run=dry_run,
        anonymize=anonymize,
        engine=engine,
        on_error=on_error,
        overwrite=overwrite,
    )
    with progress_bar("reading headers") as reading, progress_bar("converting cases") as converting:
        bars = {"reading": reading, "converting": converting}
        result = convert_dicom(request, lambda step, done, total: bars[step](done, total))
    if json:
        typer.echo(to_json(result.report()))
    else:
        if dry_run:
            typer.echo(_plan_table(result))
        typer.echo(result.summary())
    if result.error is not None:
        raise result.error


@app.command()
def align(
    root: Annotated[Path, typer.Argument(help="Case tree: one folder a case.")],
    out: Annotated[Path, typer.Argument(help="Folder for the mirrored tree; made if missing.")],
    reference: Annotated[str, typer.Option(metavar="SEQ", help="Sequence whose grid all others take, e.g. ax_t2wi.")],
    register: Annotated[
        bool, typer.Option("--register", help="First move each image onto the reference, by mutual information.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Worker processes. [default: CPUs less one, at most 8]")
    ] = None,
    on_error: Annotated[
        str, typer.Option(help="After a case that cannot be aligned: stop (exit 3), or skip and go on (exit 4).")
    ] = "stop",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Align everything again, and replace a folder that holds other things.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout, nothing else.")] = False,
) -> None:
    """Resample every sequence of every case to the grid of one of them, in world coordinates."""
    from medssl_cli.commands.progress import progress_bar
    from medssl_cli.core.run import to_json
    from medssl_cli.services.align import AlignRequest, align_tree

    request = AlignRequest(
        root, out, reference, register=register, workers=workers, on_error=on_error, overwrite=overwrite
    )
    with progress_bar("aligning cases") as progress:
        result = align_tree(request, progress)
    typer.echo(to_json(result.report()) if json else result.summary())
    if result.error is not None:
        raise result.error


@app.command(context_settings={"allow_interspersed_args": True})
def weights(
    file: Annotated[
        Path,
        typer.Argument(
            help="Weights of another program: .pth, .pt, .bin or .safetensors; with --target a run or a backbone file "
            "of medssl."
        ),
    ],
    out: Annotated[
        Path,
        typer.Argument(
            help="Folder for teacher_backbone.safetensors, or a .safetensors file; with --target a .pth or .pt file, "
            "for timm a .safetensors file too."
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="What the file does not tell, e.g. num_heads=6 modality=oct."),
    ] = None,
    source: Annotated[
        str,
        typer.Option(
            help="dinov2, dinov3, meddinov3, retfound, visionfm, ibot, timm, hf, convnext or vgg19; auto looks."
        ),
    ] = "auto",
    target: Annotated[
        Literal["nnunet", "dinov2", "timm"] | None,
        typer.Option(
            help="The other way: write a backbone of medssl for another program. dinov2: names of DINOv2, of DINOv3 "
            "for rotary positions, as MedDINOv3 loads them; nnunet: the same below network_weights and --prefix."
        ),
    ] = None,
    prefix: Annotated[
        str | None, typer.Option(help="--target nnunet: what the network calls its backbone. [default: encoder.]")
    ] = None,
    sequence: Annotated[
        str | None,
        typer.Option(
            metavar="SEQ", help="--target: make the embedding of this sequence part of the patch convolution."
        ),
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Resize stored positions to images of this side. [default: the file's]")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace other weights at OUT.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout, nothing else.")] = False,
) -> None:
    """Take over a backbone of another program, with a card that tells how images are prepared for it; or, with
    --target, write one of ours for another program."""
    words = tuple(overrides or ())
    if target is None and prefix is None and sequence is None:
        from medssl_cli.services.convert_weights import WeightsRequest, convert_weights

        result = convert_weights(WeightsRequest(file, out, source, image_size, overwrite=overwrite, overrides=words))
    else:
        from medssl_cli.services.export_weights import ExportRequest, export_weights

        request = ExportRequest(
            file, out, target, prefix, sequence, source, image_size, overwrite=overwrite, overrides=words
        )
        result = export_weights(request)
    typer.echo(result.to_json() if json else result.summary())


@app.command()
def layout(
    source_folder: Annotated[Path, typer.Argument(metavar="SOURCE", help="Data set in the layout of its publisher.")],
    out: Annotated[Path, typer.Argument(help="Folder for the converted data set, complete or absent.")],
    source: Annotated[
        str,
        typer.Option(
            help="pclt20k: CT-PET slices; nnunet: raw folder of version 1 or 2; decathlon: Medical Segmentation "
            "Decathlon; vfm: VisionFM pictures by modality, with label files or label maps; imagenet: class folders."
        ),
    ],
    files: Annotated[
        str | None,
        typer.Option(
            help="copy, or link: relative links for pclt20k, hard links for others. [default: link for pclt20k, "
            "else copy]"
        ),
    ] = None,
    group_pattern: Annotated[
        str | None,
        typer.Option(metavar="REGEX", help=r"Finds the patient in a name or path, e.g. '(Patient\d+)_'."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be written, write nothing.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Make everything anew, and replace a folder that holds other things.")
    ] = False,
    on_error: Annotated[
        str, typer.Option(help="A case that cannot be converted: stop (exit 3), or leave it out and list it (exit 4).")
    ] = "stop",
    json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout, nothing else.")] = False,
) -> None:
    """Bring a published data set into the form that split, check-data, segment, extract and train-head read."""
    from medssl_cli.commands.progress import progress_bar
    from medssl_cli.core.run import to_json
    from medssl_cli.services.convert_layout import LayoutRequest, convert_layout

    request = LayoutRequest(
        source_folder=source_folder,
        out=out,
        source=source,
        files=files,
        dry_run=dry_run,
        overwrite=overwrite,
        on_error=on_error,
        group_pattern=group_pattern,
    )
    with progress_bar("converting cases") as progress:
        result = convert_layout(request, progress)
    typer.echo(to_json(result.report()) if json else result.summary())
    if result.error is not None:
        raise result.error


def _list_mappings(asked: bool) -> None:
    if asked:
        from medssl_cli.core.config import list_recipes

        for name, line in list_recipes("convert"):
            typer.echo(f"{name:<18} {line}")
        raise typer.Exit


def _plan_table(result) -> str:  # type: ignore[no-untyped-def]  # the type lives in a module that loads numpy
    """The plan of a dry run: one line a volume, then what is refused and what is left alone."""
    rows = [("case", "sequence", "series", "description", "slices", "volumes", "spacing z y x", "status")]
    for o in result.outputs:
        spacing = " ".join(f"{s:.4g}" for s in o.spacing)
        rows.append(
            (o.case_id, o.stem, o.series_number, o.description, str(o.n_slices), str(o.n_volumes), spacing, o.status)
        )
    for f in result.failures:
        rows.append((f.case_id, f.stem or "-", f.series_number, f.description, "", "", "", f"refused: {f.code}"))
    for u in result.unmatched:
        rows.append((u["case_id"], "-", u["series_number"], u["description"], "", "", "", f"left alone: {u['reason']}"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
