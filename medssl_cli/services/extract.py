"""Extract: slice vectors of one case, or features of a cohort, with a frozen backbone.

Vectors come from a cache that is found by content, so that a second run computes nothing, and one that was cut off
only what is missing. Several processes fill the cache first, each its own cases, and the first one then puts the
folder together from it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from medssl_cli.core.config import load_config
from medssl_cli.core.errors import ConfigError, DataError, PartialFailure
from medssl_cli.core.result import Result
from medssl_cli.core.run import (
    check_out_folder,
    claim_out_folder,
    hide_home,
    locked,
    plain,
    result_header,
    temporary_folder,
    write_failures,
    write_json,
)
from medssl_cli.core.wording import counted
from medssl_cli.data.feature_cache import FeatureCache
from medssl_cli.data.feature_store import FEATURES, INFO, PartWriter, describe_parts, replace_folder
from medssl_cli.data.store import default_cache
from medssl_cli.engine.distributed import find_place, from_first, gather, joined, rank, together, world_size
from medssl_cli.services.backbone import Backbone, open_backbone
from medssl_cli.services.embedding import Embedder
from medssl_cli.services.embedding_config import ExtractConfig
from medssl_cli.services.extract_case import CASE_FILES, ExtractedCase
from medssl_cli.services.extract_cohort import Cohort, OnError, asked_cohort, is_cohort
from medssl_cli.services.extract_features import (
    Counts,
    Failed,
    LabelSource,
    Pool,
    Progress,
    Steps,
    all_failures,
    check_views,
    encode,
    feature_info,
    fill,
    find_labels,
    refuse_empty,
    vectors_of,
    views_of,
)
from medssl_cli.services.launch import launch
from medssl_cli.services.lookup import find_backbone
from medssl_cli.services.pretrain_group import (
    device_of,
    first_speaks,
    is_batch_shell,
    refuse_missing_gpus,
    refuse_named_gpu,
)
from medssl_cli.services.run_folder import stoppable

log = logging.getLogger(__name__)

COMMAND = "extract"


@dataclass(frozen=True)
class ExtractRequest:
    """What the user typed. Names as the options of ``medssl extract``."""

    input: Path
    out: Path
    overrides: tuple[str, ...] = ()
    model: Path | None = None
    config: str | None = None
    tokens: str | None = None
    pool: Pool | None = None
    orientation: str | None = None
    splits: Path | None = None
    split_csv: Path | None = None
    labels: Path | None = None
    targets: tuple[str, ...] = ()
    sequence: str | None = None
    gpus: int = 1
    device: str = "auto"
    cache: Path | None = None
    on_error: OnError = "stop"
    overwrite: bool = False


def extract(request: ExtractRequest, *, progress: Progress | None = None) -> Result:
    """Compute vectors and write them; ``progress`` is told cases done and in all.

    With ``--gpus`` this process only starts those that compute; in one that torchrun or srun started it joins them.

    Returns:
        What was done; empty in all processes of a group but the first.

    Raises:
        ConfigError: Wrong settings or options, or no model to be found.
        DataError: Bad cases (with ``on_error: stop``), labels that fit none, or splits that leak.
        CheckpointError: The model cannot be loaded.
        ResourceError: No such device, or not enough memory or disk.
    """
    place = find_place(os.environ)
    if request.gpus > 1 and (place is None or is_batch_shell(place)):
        refuse_named_gpu(request)
        _config(request)  # every bad key is told before anything starts
        refuse_missing_gpus(request, "it only takes longer")
        return launch(extract, request, processes=request.gpus)
    started = time.time()
    device = device_of(request, place)
    with joined(place, device), first_speaks(), stoppable("extracting"):
        config = _config(request)
        backbone = open_backbone(find_backbone(request.model), device)
        embedder = Embedder(backbone, config, FeatureCache(default_cache(request.cache)))
        _refuse_absent(request.input)
        whole = from_first(lambda: is_cohort(request.input, backbone))
        work = _extract_cohort if whole else _extract_case
        with _own_folder(request, backbone) as claim:
            return work(request, embedder, claim, progress if rank() == 0 else None, started)


def _config(request: ExtractRequest) -> ExtractConfig:
    flags = {"tokens": request.tokens, "orientation": request.orientation}
    return load_config(ExtractConfig, request.config, recipes=COMMAND, flags=flags, overrides=request.overrides)


def _refuse_absent(path: Path) -> None:
    if not path.exists():
        raise DataError(
            "The input does not exist.",
            where=hide_home(str(path)),
            fix="name a volume, a picture, a folder or a table",
            code="input_missing",
        )


@contextmanager
def _own_folder(request: ExtractRequest, backbone: Backbone) -> Iterator[Callable[..., None]]:
    """The output folder, held by the first process; gives what makes it ours, to be called once there are results."""
    out = request.out
    inputs = [request.input, backbone.found.run or backbone.found.weights, default_cache(request.cache)]
    named = (request.splits, request.split_csv, request.labels, request.config)
    inputs += [Path(path) for path in named if path is not None and Path(path).exists()]
    would_go = from_first(lambda: bool(check_out_folder(out, COMMAND, overwrite=request.overwrite, inputs=inputs)))
    claim = partial(claim_out_folder, out, COMMAND, overwrite=request.overwrite, inputs=inputs)
    with contextlib.ExitStack() as held:

        def open_folder() -> None:
            held.enter_context(locked(out, "output folder"))
            if not would_go:
                claim()
                for leftover in out.glob(".tmp-*"):
                    shutil.rmtree(leftover)

        from_first(open_folder)
        yield claim


# --- one case --------------------------------------------------------------------------------------------------------


def _extract_case(
    request: ExtractRequest, embedder: Embedder, claim: Callable[..., None], progress: Progress | None, started: float
) -> Result:
    """Vectors of one case, and the similarity map of one of its slices."""
    _refuse_cohort_options(request, embedder)
    temporary = temporary_folder(request.out, "case")
    try:
        case = ExtractedCase(request.input, request.sequence, embedder, temporary)
        facts = plain({**result_header(COMMAND, started), **case.extract(request.out)})
        write_json(case.folder / "summary.json", facts)
        claim(keep=(temporary,))
        _remove_results(request.out)
        case.publish(request.out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    counts = Counts(embedder.forward_passes, embedder.cache_hits)
    lines = [f"{facts['case_id']}: {counted(facts['num_slices'], 'slice')}, {facts['embedding_dim']} numbers each"]
    return Result([*lines, str(counts), f"written to {request.out}"], facts)


def _refuse_cohort_options(request: ExtractRequest, embedder: Embedder) -> None:
    named = {
        "--splits": request.splits,
        "--split-csv": request.split_csv,
        "--labels": request.labels,
        "--target": ",".join(request.targets),
        "--pool": request.pool,
        "--on-error": request.on_error != "stop",
        "--gpus": world_size() > 1,
        "views": embedder.config.views > 1,
    }
    given = [name for name, value in named.items() if value]
    if given:
        raise ConfigError(
            "These options have no effect on a single case.",
            where=f"{', '.join(given)}; {hide_home(str(request.input))} is one case",
            fix="leave them out, or name a folder of cases or a table",
            code="config_without_effect",
        )


# --- a cohort --------------------------------------------------------------------------------------------------------


def _extract_cohort(
    request: ExtractRequest, embedder: Embedder, claim: Callable[..., None], progress: Progress | None, started: float
) -> Result:
    """Features of all cases, in their splits and with their labels."""
    _refuse_case_options(embedder.config)
    pool = request.pool or "mean"
    cohort = from_first(lambda: asked_cohort(request.input, embedder.backbone, request))
    check_views(cohort, embedder)
    found: list[LabelSource] = []
    from_first(lambda: found.append(find_labels(cohort, request.labels, request.targets, pool)))
    counts = _fill_cache(cohort, embedder, request.on_error, progress) if world_size() > 1 else None
    assemble = partial(_assemble, request, cohort, embedder, pool, found, counts, claim, progress, started)
    result: Result = from_first(assemble)
    return result if rank() == 0 else Result([], {})


def _refuse_case_options(config: ExtractConfig) -> None:
    given = [key for key in ("sim_slice", "sim_patch") if getattr(config, key) is not None]
    if given:
        raise ConfigError(
            "These keys have no effect on a cohort.",
            where=", ".join(given),
            fix="leave them out: a similarity map is made of a single case",
            code="config_without_effect",
        )


def _fill_cache(cohort: Cohort, embedder: Embedder, on_error: OnError, progress: Progress | None) -> Counts:
    """Compute this process's share of the cases into the cache: every n-th one, each in one process only."""
    every = [(name, case) for name, cases in cohort.parts.items() for case in cases]
    mine = every[rank() :: world_size()]
    steps = Steps(progress, len(mine))

    def compute() -> None:
        for name in cohort.parts:
            cases = [case for part, case in mine if part == name]
            for _, view, vectors in vectors_of(cases, embedder, views_of(name, cohort, embedder)):
                if isinstance(vectors, Exception) and on_error == "stop":
                    raise vectors
                if view == 0:
                    steps.step()

    together(compute)
    shares = gather((embedder.forward_passes, embedder.cache_hits))
    return Counts(sum(share[0] for share in shares), sum(share[1] for share in shares))


def _assemble(
    request: ExtractRequest,
    cohort: Cohort,
    embedder: Embedder,
    pool: Pool,
    labels: list[LabelSource],
    shared: Counts | None,
    claim: Callable[..., None],
    progress: Progress | None,
    started: float,
) -> Result:
    """Put the features together in a folder that nobody sees yet, then show it as a whole."""
    (source,) = labels
    computed_before = embedder.forward_passes
    temporary = temporary_folder(request.out, FEATURES)
    try:
        writers, failed = _write_rows(temporary, cohort, embedder, pool, request.on_error, progress)
        refuse_empty(writers, failed)
        kept = {name: writer for name, writer in writers.items() if writer.rows}
        arrays, values = encode(source, {name: writer.rows for name, writer in kept.items()})
        for name, writer in writers.items():
            if name in kept:
                writer.write_tables(arrays[name])
            else:
                writer.discard()
        counts = _all_work(shared, embedder, computed_before)
        info = feature_info(cohort, embedder, pool, source, values, failed, counts)
        info = {**result_header(COMMAND, started), **info}
        info |= describe_parts([writer.part(arrays[name]) for name, writer in kept.items()], info)
        write_json(temporary / INFO, info)
        claim(keep=(temporary,))
        _remove_results(request.out)
        replace_folder(temporary, request.out / FEATURES)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    failures = [bad for found in all_failures(cohort, failed).values() for bad in found]
    write_failures(request.out / "failures.csv", [(bad.case_id, bad.path, bad.reason, bad.fix) for bad in failures])
    return Result(_lines(info, counts, request.out), plain(info), _partial(failures, info, request.out))


def _write_rows(
    folder: Path, cohort: Cohort, embedder: Embedder, pool: Pool, on_error: OnError, progress: Progress | None
) -> tuple[dict[str, PartWriter], dict[str, list[Failed]]]:
    width = embedder.width * (2 if pool == "meanmax" else 1)
    writers: dict[str, PartWriter] = {}
    failed: dict[str, list[Failed]] = {}
    steps = Steps(progress, len(cohort.cases))
    for name, cases in cohort.parts.items():
        with PartWriter(folder, name, width) as writers[name]:
            failed[name] = fill(writers[name], name, cases, cohort, embedder, pool, on_error, steps)
    return writers, failed


def _all_work(shared: Counts | None, embedder: Embedder, before: int) -> Counts:
    """What all processes did; what the first one had to compute again is said."""
    if shared is None:
        return Counts(embedder.forward_passes, embedder.cache_hits)
    again = embedder.forward_passes - before
    if again:
        log.warning("%s computed twice: put --cache on a disk that all machines share", counted(again, "slice"))
    return Counts(shared.forward_passes + again, shared.cache_hits)


def _remove_results(out: Path) -> None:
    """Take away what an earlier extraction of one case left beside the features, and the features of a cohort."""
    for name in ("summary.json", "failures.csv", *CASE_FILES):
        (out / name).unlink(missing_ok=True)


def _lines(info: dict[str, Any], counts: Counts, out: Path) -> list[str]:
    lines = []
    for name, part in info["splits"].items():
        sizes = f"{counted(part['n_cases'], 'case')} of {counted(part['n_patients'], 'patient')}"
        lines.append(f"{name}: {sizes}, {counted(part['n_rows'], 'row')} of {info['embedding_dim']} numbers")
        lines += [
            f"  {target}: " + ", ".join(f"{value} {number}" for value, number in found.items())
            for target, found in part["class_counts"].items()
            if found
        ]
    return [*lines, str(counts), f"written to {out / FEATURES}"]


def _partial(failures: list[Failed], info: dict[str, Any], out: Path) -> PartialFailure | None:
    if not failures:
        return None
    count = len(failures) + sum(part["n_cases"] for part in info["splits"].values())
    return PartialFailure(
        f"{len(failures)} of {count} cases failed.",
        where=hide_home(str(out / "failures.csv")),
        fix="see the reasons there; the features of the other cases are complete",
        code="cases_failed",
    )
