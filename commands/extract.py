"""medssl extract: vectors of slices, cases or whole cohorts from a frozen backbone."""

from pathlib import Path
from typing import Annotated, Literal

import typer


def run(
    context: typer.Context,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="INPUT [KEY=VALUE]...",
            help="A volume, picture, case folder or DICOM folder; or a case tree, image tree, series table or another "
            "layout; then overrides, e.g. resize=224.",
        ),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            help="Run folder or weight file; default: MEDSSL_MODEL, then the newest finished run under ./runs."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the results; made if missing.")] = None,
    tokens: Annotated[
        str | None, typer.Option(help="cls, mean, patch, joined by commas: what a vector is made of. [default: cls]")
    ] = None,
    pool: Annotated[
        Literal["mean", "meanmax", "none"] | None,
        typer.Option(help="Of a cohort: one row a case, or with none one row a slice. [default: mean]"),
    ] = None,
    splits: Annotated[Path | None, typer.Option(help="Folder of `medssl split`: train.csv, val.csv, test.csv.")] = None,
    split_csv: Annotated[Path | None, typer.Option(help="One list of the cases to take.")] = None,
    labels: Annotated[Path | None, typer.Option(help="CSV with a column of ids, or of paths, and the targets.")] = None,
    target: Annotated[
        str | None, typer.Option(metavar="COL[,COL]", help="Columns of the labels; of INPUT itself if it is a table.")
    ] = None,
    orientation: Annotated[
        Literal["ras-axial", "stored"] | None,
        typer.Option(help="Slices of volumes: turned as in training, or along the third axis as it is stored."),
    ] = None,
    sequence: Annotated[
        str | None, typer.Option(help="Which of the model's sequences a single file, or the volumes of a table, are.")
    ] = None,
    config: Annotated[str | None, typer.Option(help="Path of a YAML or JSON file, or the name of a recipe.")] = None,
    gpus: Annotated[
        int, typer.Option(min=1, help="Processes on this machine, one a GPU; with --device cpu, as many.")
    ] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    cache: Annotated[
        Path | None,
        typer.Option(help="Where vectors are kept. [default: MEDSSL_CACHE, then ~/.cache/medssl]"),
    ] = None,
    on_error: Annotated[
        Literal["stop", "skip"], typer.Option(help="A case that cannot be read: stop (exit 3), or list it (exit 4).")
    ] = "stop",
    skip_invalid_nifti: Annotated[
        bool, typer.Option("--skip-invalid-nifti", help="The same as --on-error skip.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a folder that holds something else.")] = False,
    cache_info: Annotated[bool, typer.Option("--cache-info", help="Tell what the cache holds and exit.")] = False,
    cache_prune: Annotated[
        bool, typer.Option("--cache-prune", help="Empty the cache, or what --older-than and --model name, and exit.")
    ] = False,
    older_than: Annotated[
        float | None, typer.Option(min=0, metavar="DAYS", help="With --cache-prune: entries older than this.")
    ] = None,
    list_configs: Annotated[bool, typer.Option("--list-configs", help="List the shipped recipes and exit.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout, nothing else.")] = False,
) -> None:
    """Extract vectors with a frozen backbone, for heads and other uses."""
    if list_configs:
        from medssl_cli.core.config import list_recipes

        recipes = list_recipes("extract")
        widest = max(len(name) for name, _ in recipes)
        for name, line in recipes:
            typer.echo(f"{name:<{widest}}  {line}")
        return
    _refuse_beside_cache(context, info=cache_info, prune=cache_prune)
    if cache_info or cache_prune:
        from medssl_cli.services.extract_cache import cache_info as tell
        from medssl_cli.services.extract_cache import prune_cache

        answer = tell(cache) if cache_info else prune_cache(cache, older_than_days=older_than, model=model)
        typer.echo(answer.to_json() if json else answer.summary())
        return
    from medssl_cli.commands.progress import progress_bar
    from medssl_cli.services.extract import ExtractRequest, extract

    source, overrides = _parted(words or [])
    request = ExtractRequest(
        input=_needed(source, "INPUT"),
        out=_needed(out, "--out"),
        overrides=overrides,
        model=model,
        config=config,
        tokens=tokens,
        pool=pool,
        orientation=orientation,
        splits=splits,
        split_csv=split_csv,
        labels=labels,
        targets=tuple(name.strip() for name in (target or "").split(",") if name.strip()),
        sequence=sequence,
        gpus=gpus,
        device=device,
        cache=cache,
        on_error="skip" if skip_invalid_nifti else on_error,
        overwrite=overwrite,
    )
    with progress_bar("extract") as progress:
        result = extract(request, progress=progress)
    if result.facts:  # of several processes the first one speaks
        typer.echo(result.to_json() if json else result.summary())
    if result.error is not None:
        raise result.error


def _refuse_beside_cache(context: typer.Context, *, info: bool, prune: bool) -> None:
    """Refuse what was typed and has no effect beside the options that only look after the cache, or without them.

    Raises:
        ConfigError: With each of them.
    """
    from medssl_cli.core.errors import ConfigError

    if info or prune:
        mode = "--cache-info" if info else "--cache-prune"
        heeded = {"cache", "json", *(("cache_info",) if info else ("cache_prune", "older_than", "model"))}
        names = [name for name in context.params if name not in heeded]
    else:
        mode, names = "", ["older_than"]
    sources = {name: context.get_parameter_source(name) for name in names}
    typed = [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    if not typed:
        return
    told = ["INPUT and KEY=VALUE" if name == "words" else f"--{name.replace('_', '-')}" for name in sorted(typed)]
    raise ConfigError(
        f"{mode} does nothing but look after the cache: {', '.join(told)} would have no effect."
        if mode
        else "--older-than has no effect without --cache-prune.",
        where=f"medssl extract {mode}".strip(),
        fix="leave out what has no effect" + (f", or {mode}" if mode else ", or add --cache-prune"),
        code="flags_without_effect",
    )


def _parted(words: list[str]) -> tuple[Path | None, tuple[str, ...]]:
    """The input, and the overrides.

    Raises:
        ConfigError: Several inputs.
    """
    from medssl_cli.core.errors import ConfigError

    inputs = [word for word in words if "=" not in word or Path(word).exists()]
    if len(inputs) > 1:
        raise ConfigError(
            "Vectors are extracted from one input at a time.",
            where=", ".join(inputs[:5]),
            fix="name a folder of cases, or a CSV with their paths",
            code="inputs_several",
        )
    return Path(inputs[0]) if inputs else None, tuple(word for word in words if word not in inputs)


def _needed(path: Path | None, name: str) -> Path:
    if path is None:
        raise typer.BadParameter(f"{name} is missing: medssl extract INPUT --out DIR")
    return path
