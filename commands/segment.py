"""medssl segment: a network that draws label maps, trained on images with a class for every pixel."""

from pathlib import Path
from typing import Annotated, Literal

import typer


def run(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, e.g. patience=10 fusion=2way.")
    ] = None,
    config: Annotated[str | None, typer.Option(help="Path of a YAML or JSON file, or the name of a recipe.")] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="semantic: backbone and decoder on volumes or pictures; ct-pet: CoCoSeg on pairs of slices. "
            "(instances: not there yet.)",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", "--dataset_root", help="Folder of the images and label maps.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "--logdir", help="Run folder; a run that is there is resumed. [default: runs/NAME OF CONFIG]"
        ),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            help="semantic: the backbone, a run or weight file; default: MEDSSL_MODEL, then the newest finished run."
        ),
    ] = None,
    label: Annotated[
        str | None,
        typer.Option(
            help="semantic: stem of the label map of each case, e.g. lesion; or the folder of the labels of pictures."
        ),
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(help="semantic: names of the structures, e.g. gland,lesion,ignore=255 or lesion=2+3."),
    ] = None,
    splits: Annotated[
        Path | None, typer.Option(help="Folder of `medssl split` with train.csv and val.csv; test.csv is not opened.")
    ] = None,
    split_csv: Annotated[
        Path | None, typer.Option(help="semantic: CSV of the cases to use; some are held back for validation.")
    ] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", "--epoch", min=1, help="Length of the run.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate at its highest.")] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", "--bs", min=1, help="Samples of one process and update.")
    ] = None,
    loss_type: Annotated[
        str | None,
        typer.Option("--loss-type", "--loss_type", help="combined, dice, ce, iou, tversky or focal."),
    ] = None,
    dice_weight: Annotated[
        float | None, typer.Option("--dice-weight", "--dice_weight", help="combined: weight of Dice.")
    ] = None,
    ce_weight: Annotated[
        float | None, typer.Option("--ce-weight", "--ce_weight", help="combined: weight of the cross-entropy.")
    ] = None,
    pos_weight: Annotated[
        float | None,
        typer.Option("--pos-weight", "--pos_weight", help="combined, ce: factor on the pixels of structures."),
    ] = None,
    val_freq: Annotated[
        int | None, typer.Option("--val-freq", "--val_freq", min=1, help="Epochs between validations.")
    ] = None,
    save_freq: Annotated[
        int | None,
        typer.Option("--save-freq", "--save_freq", min=0, help="Epochs between files in checkpoints/; 0: none."),
    ] = None,
    val_ratio: Annotated[
        float | None,
        typer.Option("--val-ratio", "--val_ratio", help="Share of the patients held back where nothing tells which."),
    ] = None,
    group_pattern: Annotated[
        str | None,
        typer.Option(
            help="semantic: regular expression whose first group is the patient in the names of cases or pictures."
        ),
    ] = None,
    dataset_type: Annotated[
        str | None,
        typer.Option("--dataset-type", "--dataset_type", help="ct-pet: auto, flat, presplit or pclt20k (pclt)."),
    ] = None,
    patient_regex: Annotated[
        str | None,
        typer.Option(help="ct-pet: pattern whose first group in a file name is the patient; default: up to _slice_."),
    ] = None,
    mask_threshold: Annotated[
        int | None,
        typer.Option(help="ct-pet: grey value above which a mask pixel is lesion; default: 0 and 255 alone."),
    ] = None,
    vgg_weights: Annotated[
        str | None, typer.Option(help="ct-pet: file of an ImageNet VGG19, or `random` for untrained trunks.")
    ] = None,
    gpus: Annotated[
        int, typer.Option(min=1, help="Processes on this machine, one a GPU; with --device cpu, as many.")
    ] = 1,
    resume: Annotated[bool, typer.Option(help="Go on from the newest checkpoint; --no-resume starts afresh.")] = True,
    resume_ckpt: Annotated[
        Path | None,
        typer.Option("--resume-ckpt", "--resume_ckpt", help="Go on from this run, its last/ or one step_… in it."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    precision: Annotated[str | None, typer.Option(help="fp32, tf32, bf16 or fp16.")] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", "--random_seed", min=0, help="Fixes Python, NumPy and torch.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", "--num_workers", min=0, help="Loader processes; default: by the config.")
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(help="semantic: where prepared volumes are kept. [default: MEDSSL_CACHE, then ~/.cache/medssl]"),
    ] = None,
    on_error: Annotated[
        Literal["stop", "skip"] | None,
        typer.Option(help="semantic: a case that cannot be read stops, or is left out. [default: stop]"),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Build everything, run a few steps, print estimates, write nothing.")
    ] = False,
    smoke: Annotated[bool, typer.Option("--smoke", help="Five steps; writes nothing.")] = False,
    allow_config_change: Annotated[
        list[str] | None, typer.Option(metavar="KEY", help="Resume although this key differs; may be repeated.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a folder that holds something else.")] = False,
    list_configs: Annotated[bool, typer.Option("--list-configs", help="List the shipped recipes and exit.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout, nothing else.")] = False,
) -> None:
    """Train a segmentation network, choose its best epoch and its threshold on validation patients."""
    if list_configs:
        from medssl_cli.core.config import list_recipes

        recipes = list_recipes("segment")
        widest = max(len(name) for name, _ in recipes)
        for name, line in recipes:
            typer.echo(f"{name:<{widest}}  {line}")
        return
    if task is None:
        raise typer.BadParameter("Name what to train with --task semantic or --task ct-pet.")
    from medssl_cli.services.segment_request import SegmentRequest, check_segment_request

    request = SegmentRequest(
        task=task,
        config=config,
        overrides=tuple(overrides or ()),
        data=data,
        splits=splits,
        split_csv=split_csv,
        out=out,
        model=model,
        label=label,
        classes=classes,
        group_pattern=group_pattern,
        gpus=gpus,
        resume=resume,
        resume_ckpt=resume_ckpt,
        epochs=epochs,
        lr=lr,
        batch_size=batch_size,
        loss_type=loss_type,
        dice_weight=dice_weight,
        ce_weight=ce_weight,
        pos_weight=pos_weight,
        val_freq=val_freq,
        save_freq=save_freq,
        val_ratio=val_ratio,
        dataset_type=dataset_type,
        patient_regex=patient_regex,
        mask_threshold=mask_threshold,
        vgg_weights=vgg_weights,
        device=device,
        precision=precision,
        seed=seed,
        workers=workers,
        cache=cache,
        on_error=on_error,
        dry_run=dry_run,
        smoke=smoke,
        allowed_changes=tuple(allow_config_change or ()),
        overwrite=overwrite,
    )
    check_segment_request(request)
    from medssl_cli.services.segment import segment

    result = segment(request, say=lambda line: typer.echo(line, err=json))
    if result.facts:  # of several processes the first one speaks
        typer.echo(result.to_json() if json else result.summary())
    if result.error is not None:
        raise result.error
