"""medssl train-head: a small head on the vectors of a backbone, from features to probabilities."""

from pathlib import Path
from typing import Annotated, Literal

import typer


def run(
    data: Annotated[
        Path | None,
        typer.Argument(
            metavar="FEATURES|ROOT",
            help="The --out folder of `medssl extract`, or raw data (case tree, image tree, table) with --model.",
            show_default=False,
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, e.g. head=mlp hidden_dim=256.")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="binary, multiclass, multilabel or regression.", show_default=False)
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="CSV with a column of ids (or image, path, file) and the targets.")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(help="Columns of the labels, with commas between; default: all that the features hold."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder. [default: runs/head-TASK]", show_default=False)] = None,
    config: Annotated[str | None, typer.Option(help="Path of a YAML or JSON file, or the name of a recipe.")] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            help="Backbone for raw data: run or weight file; default: MEDSSL_MODEL, then the newest finished run."
        ),
    ] = None,
    splits: Annotated[
        Path | None, typer.Option(help="For raw data: folder of `medssl split` with train.csv and val.csv.")
    ] = None,
    split_csv: Annotated[
        Path | None, typer.Option(help="For raw data: CSV of the cases to use; some are held back for validation.")
    ] = None,
    sequence: Annotated[str | None, typer.Option(help="For raw data: the one sequence to read.")] = None,
    finetune: Annotated[
        bool,
        typer.Option(
            "--finetune",
            help="Train the backbone too; needs raw data with --model. A run that is cut off keeps its best epoch so "
            "far, and starts over when the command is given again.",
        ),
    ] = False,
    backbone_lr_scale: Annotated[
        float | None,
        typer.Option(min=0, help="With --finetune: learning rate of the backbone over that of the head."),
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="1: heads and fine-tuning take one device.")] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    seed: Annotated[int | None, typer.Option(min=0, help="Fixes Python, NumPy and torch.")] = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            help="For raw data, without --finetune: where slice vectors are kept. [default: MEDSSL_CACHE, then "
            "~/.cache/medssl]"
        ),
    ] = None,
    on_error: Annotated[
        Literal["stop", "skip"], typer.Option(help="For raw data: a case that cannot be read stops, or is left out.")
    ] = "stop",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a folder that holds something else.")] = False,
    list_configs: Annotated[bool, typer.Option("--list-configs", help="List the shipped recipes and exit.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout, nothing else.")] = False,
) -> None:
    """Train a head on features, choose it on validation cases, calibrate it."""
    if list_configs:
        from medssl_cli.core.config import list_recipes

        recipes = list_recipes("train_head")
        widest = max(len(name) for name, _ in recipes)
        for name, line in recipes:
            typer.echo(f"{name:<{widest}}  {line}")
        return
    if data is None or task is None:
        raise typer.BadParameter("Name the features or data, and what to learn with --task.")
    _refuse_group(gpus)
    from medssl_cli.commands.progress import progress_bar
    from medssl_cli.services.head_request import TrainHeadRequest

    request = TrainHeadRequest(
        data=data,
        task=task,
        out=out or Path("runs") / f"head-{task}",
        config=config,
        overrides=tuple(overrides or ()),
        labels=labels,
        target=tuple(name.strip() for name in target.split(",") if name.strip()) if target else (),
        model=model,
        splits=splits,
        split_csv=split_csv,
        sequence=sequence,
        finetune=finetune,
        backbone_lr_scale=backbone_lr_scale,
        device=device,
        seed=seed,
        cache=cache,
        on_error=on_error,
        overwrite=overwrite,
    )
    if finetune:
        from medssl_cli.services.finetune import finetune as train
    else:
        from medssl_cli.services.train_head import train_head as train

    with progress_bar("train-head") as progress:
        result = train(request, progress=progress)
    typer.echo(result.to_json() if json else result.summary())
    if result.error is not None:
        raise result.error


def _refuse_group(gpus: int) -> None:
    from medssl_cli.core.errors import ConfigError

    if gpus > 1:
        raise ConfigError(
            "Heads and fine-tuning are trained on one device.",
            where=f"--gpus {gpus}",
            fix="leave --gpus out; accumulation=N makes larger steps of fine-tuning fit one GPU",
            code="gpus_refused",
        )
