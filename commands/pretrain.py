"""medssl pretrain: self-supervised training of a backbone on volumes or pictures, on one device or many."""

from pathlib import Path
from typing import Annotated

import typer


def run(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, e.g. optim.base_lr=1e-4.")
    ] = None,
    config: Annotated[str | None, typer.Option(help="Path of a YAML or JSON file, or the name of a recipe.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Case tree, image tree, series table or another layout; default: data.root of the config."),
    ] = None,
    split_csv: Annotated[Path | None, typer.Option(help="CSV of the cases to train on.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Run folder; a run that is there is resumed. [default: runs/NAME OF CONFIG]")
    ] = None,
    gpus: Annotated[
        int, typer.Option(min=1, help="Processes on this machine, one a GPU; with --device cpu, as many.")
    ] = 1,
    submit: Annotated[
        str | None, typer.Option(help="slurm: queue this as a job that saves and queues itself again in time.")
    ] = None,
    nodes: Annotated[
        int, typer.Option(min=1, help="With --submit: machines of the job, --gpus processes on each.")
    ] = 1,
    slurm: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="With --submit: an option of sbatch, e.g. partition=gpu; repeatable."),
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the newest checkpoint; --no-resume starts afresh.")] = True,
    init: Annotated[
        Path | None, typer.Option(help="Weights for the student's backbone, as a file or a run; training starts at 0.")
    ] = None,
    init_from: Annotated[
        str | None, typer.Option(help="Of a weight file that holds both: teacher or student. [default: teacher]")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="visionfm: the temperatures of the published run, which fall instead of rising.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    precision: Annotated[str | None, typer.Option(help="fp32, tf32, bf16 or fp16.")] = None,
    attention: Annotated[
        str | None,
        typer.Option(
            help="xformers, sdpa, sdpa_flash, sdpa_cudnn, sdpa_efficient, varlen or plain; default: a timed trial."
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Fixes Python, NumPy and torch.")] = None,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Loader processes; default: train.num_workers, or fewer CPUs.")
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(envvar="MEDSSL_CACHE", help="Where prepared volumes are kept. [default: ~/.cache/medssl]"),
    ] = None,
    on_error: Annotated[
        str | None, typer.Option(help="A case that cannot be read: stop, or skip and list it. [default: stop]")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Build everything, run a few steps, print estimates, write nothing.")
    ] = False,
    smoke: Annotated[bool, typer.Option("--smoke", help="Five steps on up to four cases; writes nothing.")] = False,
    allow_config_change: Annotated[
        list[str] | None, typer.Option(metavar="KEY", help="Resume although this key differs; may be repeated.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a folder that holds something else.")] = False,
    list_configs: Annotated[bool, typer.Option("--list-configs", help="List the shipped recipes and exit.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout, nothing else.")] = False,
) -> None:
    """Pretrain a backbone with DINO, iBOT and KoLeo."""
    if list_configs:
        from medssl_cli.core.config import list_recipes

        recipes = list_recipes("pretrain")
        widest = max(len(name) for name, _ in recipes)
        for name, line in recipes:
            typer.echo(f"{name:<{widest}}  {line}")
        return
    from medssl_cli.commands.progress import progress_bar
    from medssl_cli.services.pretrain import PretrainRequest, pretrain

    request = PretrainRequest(
        config=config,
        overrides=tuple(overrides or ()),
        data=data,
        split_csv=split_csv,
        out=out,
        gpus=gpus,
        resume=resume,
        init=init,
        init_from=init_from,
        preset=preset,
        device=device,
        precision=precision,
        attention=attention,
        seed=seed,
        workers=workers,
        cache=cache,
        on_error=on_error,
        dry_run=dry_run,
        smoke=smoke,
        allowed_changes=tuple(allow_config_change or ()),
        overwrite=overwrite,
        submit=submit,
        nodes=nodes,
        slurm=tuple(slurm or ()),
    )
    with progress_bar("preparing") as progress:
        result = pretrain(request, progress=progress, say=lambda line: typer.echo(line, err=json))
    if result.facts:  # of several processes the first one speaks
        typer.echo(result.to_json() if json else result.summary())
    if result.error is not None:
        raise result.error
