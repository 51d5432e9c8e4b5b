"""Look at cases through a backbone or a head: embeddings, probabilities, a heat map on the input's grid, a report."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from medssl_cli.core.case import Case
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
from medssl_cli.data.images import volume_stem
from medssl_cli.models.vit import VisionTransformer
from medssl_cli.services.backbone import Backbone, open_backbone, read_planes, saying_memory
from medssl_cli.services.case_input import Named, Wanted, found_case, named_cases
from medssl_cli.services.case_results import CaseResults, publish, remove_results, shown
from medssl_cli.services.devices import resolve_device
from medssl_cli.services.dicom_export import check_dicom_source, dicom_formats
from medssl_cli.services.embedding import Embedder
from medssl_cli.services.head import Head, open_head
from medssl_cli.services.heatmaps import HEAD_METHODS, InferConfig, look, look_with_head
from medssl_cli.services.infer_head import Limits, check_class, describe, judge, limits_of, lines_of
from medssl_cli.services.lookup import find_model
from medssl_cli.services.predictions import prediction_table, write_predictions
from medssl_cli.services.quality import is_guessed, map_flags, quality_flags

log = logging.getLogger(__name__)

COMMAND = "infer"
PREDICTIONS = "predictions.csv"
DEFAULT_TOP_K = 5
HEAD_DECIDES = ("max_side", "stride")
"""Keys that a head brings with its settings of extraction."""
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class InferRequest:
    """What the user typed. Names as the options of ``medssl infer``."""

    cases: tuple[str, ...]
    overrides: tuple[str, ...] = ()
    model: Path | None = None
    heatmap: bool = False
    out: Path = Path("out")
    top_k: int | None = None
    sequence: str | None = None
    device: str = "auto"
    on_error: Literal["stop", "skip"] = "stop"
    overwrite: bool = False
    threshold: float | None = None
    backbone: Path | None = None
    dicom: str | None = None

    @property
    def slices_listed(self) -> int:
        """Slices with the highest score that are listed and shown, at most."""
        return DEFAULT_TOP_K if self.top_k is None else self.top_k


@dataclass(frozen=True)
class Model:
    """What looks at the cases: a backbone, and the head on it if there is one.

    Args:
        backbone: The network.
        head: Trained on its slice vectors.
        embedder: The backbone with the settings of extraction that the head was trained with.
        limits: Thresholds of the head.
    """

    backbone: Backbone
    head: Head | None = None
    embedder: Embedder | None = None
    limits: Limits | None = None


def default_out(words: tuple[str, ...]) -> Path:
    """``out/<case>`` for one case, so that the next one does not replace it, and ``out`` for several."""
    cases = named_cases(words)
    return Path("out") / cases[0].name if len(cases) == 1 else Path("out")


def infer(request: InferRequest, *, progress: Progress | None = None) -> Result:
    """Look at one case or several with one model; ``progress`` is told cases done, or slices of the only case.

    Raises:
        ConfigError: No case, or no model to be found.
        DataError: A case cannot be read (with ``on_error: stop``); cases before it are complete.
        CheckpointError: The model cannot be loaded.
        ResourceError: No such device, or not enough memory or disk.
    """
    started = time.time()
    config = _config(request)
    formats = dicom_formats(request.dicom, heatmap=request.heatmap)
    cases = named_cases(request.cases)
    if formats:
        for named in cases:
            check_dicom_source(named.path)
    model = _open(request, config)
    config = _fitting(config, model)
    inputs = _inputs(request, cases, model)
    would_go = check_out_folder(request.out, COMMAND, overwrite=request.overwrite, inputs=inputs)
    claim = partial(claim_out_folder, request.out, COMMAND, overwrite=request.overwrite, inputs=inputs)
    summaries: list[dict[str, Any]] = []
    failures: list[tuple[str, str, str, str]] = []
    with locked(request.out, "output folder"):
        if not would_go:
            claim()
            for leftover in request.out.glob(".tmp-*"):
                shutil.rmtree(leftover)
        for done, named in enumerate(cases, start=1):
            out = request.out if len(cases) == 1 else request.out / named.name
            slices = progress if len(cases) == 1 else None
            try:
                with saying_memory(model.backbone):
                    summaries.append(_infer_case(named, model, request, config, formats, out, slices, claim))
            except DataError as error:
                if request.on_error == "stop":
                    raise
                log.warning("%s: %s", named.name, error.what)
                failures.append((named.name, hide_home(str(named.path)), _reason(error), error.fix))
            if progress is not None and len(cases) > 1:
                progress(done, len(cases))
        if would_go and not summaries:
            raise _nothing_to_replace_it(failures)
        write_failures(request.out / "failures.csv", failures)
        facts = plain({**result_header(COMMAND, started), "cases": summaries, "failures": _failure_facts(failures)})
        if len(cases) > 1:
            remove_results(request.out)
            _write_predictions(request.out / PREDICTIONS, model, summaries)
            write_json(request.out / "summary.json", facts)
    lines = [line for summary in summaries for line in _lines(summary, request, len(cases))]
    return Result(lines, facts, _partial(failures, len(cases), request.out))


def _config(request: InferRequest) -> InferConfig:
    config = load_config(InferConfig, None, recipes=COMMAND, overrides=request.overrides)
    if not request.heatmap and "heatmap_method" in config.model_fields_set:
        raise _needless(
            "heatmap_method has no effect without a heat map.",
            f"heatmap_method={config.heatmap_method}",
            "add --heatmap, or leave the key out",
        )
    if "mask_threshold" in config.model_fields_set and "seg" not in (request.dicom or ""):
        raise _needless(
            "mask_threshold has no effect without a DICOM segmentation.",
            f"mask_threshold={config.mask_threshold}",
            "add --heatmap --dicom seg, or leave the key out",
        )
    if request.threshold is not None and not 0 < request.threshold < 1:
        raise ConfigError(
            "A threshold lies between 0 and 1.",
            where=f"--threshold {request.threshold}",
            fix="give a number above 0 and below 1",
            code="threshold_range",
        )
    return config


def _open(request: InferRequest, config: InferConfig) -> Model:
    """The model, loaded once for all cases; keys that it leaves without effect are refused."""
    found = find_model(request.model, backbone=request.backbone)
    device = resolve_device(request.device)
    given = config.model_fields_set
    if found.head is None:
        _refuse_head_options(request, config)
        if request.top_k is not None and not request.heatmap:
            raise _needless(
                "--top-k has no effect on a bare backbone without a heat map: nothing ranks the slices.",
                f"--top-k {request.top_k}",
                "add --heatmap, or leave it out",
            )
        return Model(open_backbone(found, device))
    idle = [key for key in HEAD_DECIDES if key in given]
    if idle:
        raise _needless(
            "A head brings its own settings of extraction.",
            ", ".join(f"{key}={getattr(config, key)}" for key in idle),
            "leave them out, or train a head on features that were extracted so",
        )
    head, embedder = open_head(found, device)
    if "batch_size" in given:
        batched = embedder.config.model_copy(update={"batch_size": config.batch_size})
        embedder = Embedder(embedder.backbone, batched)
    if config.heatmap_class is not None:
        check_class(head, config.heatmap_class)
    log.info("Head: %s (%s)", shown(found.head), describe(head))
    return Model(embedder.backbone, head, embedder, limits_of(head, request.threshold))


def _refuse_head_options(request: InferRequest, config: InferConfig) -> None:
    idle = [] if request.threshold is None else [f"--threshold {request.threshold}"]
    idle += [] if config.heatmap_class is None else [f"heatmap_class={config.heatmap_class}"]
    if request.heatmap and config.heatmap_method in HEAD_METHODS:
        idle.append(f"heatmap_method={config.heatmap_method}")
    if idle:
        raise _needless(
            "This takes a trained head, and the model is a bare backbone.",
            ", ".join(idle),
            "name the --out folder of `medssl train-head` with --model, or leave it out",
        )


def _needless(what: str, where: str, fix: str) -> ConfigError:
    return ConfigError(what, where=where, fix=fix, code="config_invalid")


def _fitting(config: InferConfig, model: Model) -> InferConfig:
    """The method that suits the model, where none was asked for: a network without attention has none to roll out."""
    if "heatmap_method" in config.model_fields_set:
        return config
    is_vit = isinstance(model.backbone.model, VisionTransformer)
    method = "head" if model.head is not None else "rollout" if is_vit else "similarity"
    return config.model_copy(update={"heatmap_method": method})


def _inputs(request: InferRequest, cases: list[Named], model: Model) -> list[Path]:
    """What is read: cases, the tables that name them, and the model."""
    found = model.backbone.found
    models = [found.run or found.weights, *([] if found.head is None else [found.head])]
    return [*(Path(word) for word in request.cases), *(named.path for named in cases), *models]


def _nothing_to_replace_it(failures: list[tuple[str, str, str, str]]) -> DataError:
    return DataError(
        f"None of {len(failures)} cases could be looked at; the output folder keeps what it holds.",
        where="\n".join(f"{path}: {reason}" for _, path, reason, _ in failures[:5]),
        fix=failures[0][3],
        code="cases_failed",
    )


def _reason(error: DataError) -> str:
    return f"{error.what} {error.where}".strip()


def _failure_facts(failures: list[tuple[str, str, str, str]]) -> list[dict[str, str]]:
    return [dict(zip(("case_id", "path", "reason", "fix"), failure, strict=True)) for failure in failures]


def _partial(failures: list[tuple[str, str, str, str]], count: int, out: Path) -> PartialFailure | None:
    if not failures:
        return None
    return PartialFailure(
        f"{len(failures)} of {count} cases failed.",
        where=hide_home(str(out / "failures.csv")),
        fix="see the reasons there; the other cases are complete",
        code="cases_failed",
    )


def _write_predictions(path: Path, model: Model, summaries: list[dict[str, Any]]) -> None:
    """The decisions of all cases as one table, which ``medssl eval --predictions`` reads."""
    path.unlink(missing_ok=True)
    if model.head is None or model.limits is None or not summaries:
        return
    names = [summary["case_id"] for summary in summaries]
    values_NC = np.array([list((summary.get("probabilities") or summary["values"]).values()) for summary in summaries])
    table = prediction_table(model.head.task, model.head.classes, names, values_NC, thresholds=model.limits.values_C)
    write_predictions(path, table)


# --- one case --------------------------------------------------------------------------------------------------------


def _infer_case(
    named: Named,
    model: Model,
    request: InferRequest,
    config: InferConfig,
    formats: Sequence[str],
    out: Path,
    progress: Progress | None,
    claim: Callable[..., None],
) -> dict[str, Any]:
    """Look at one case; its folder gets all results, or keeps what it had.

    ``claim`` makes the output folder ours, which may delete what lay there: not before there are results.
    """
    started = time.time()
    backbone = model.backbone
    volumes = backbone.model.sequences is not None
    wanted = Wanted(backbone.sequences, backbone.reference, volumes=volumes, slices=backbone.slices)
    temporary = temporary_folder(request.out, "case")
    try:
        with found_case(named, wanted, request.sequence, temporary) as case:
            results = _looked_at(named, case, model, request, config, temporary / "results", progress)
            results.write_arrays()
            if request.heatmap:
                results.write_heat(request.slices_listed)
            results.write_dicom(formats)
            summary = {
                **result_header(COMMAND, started),
                "input": shown(named.path),
                "output_dir": shown(out),
                "config": _settings(request, config, model),
                **results.facts(),
            }
            results.write_report(summary)
            write_json(results.folder / "summary.json", summary)
            claim(keep=(temporary,))
            publish(results.folder, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return summary


def _looked_at(
    named: Named,
    case: Case,
    model: Model,
    request: InferRequest,
    config: InferConfig,
    folder: Path,
    progress: Progress | None,
) -> CaseResults:
    """The case as the network and the head see it."""
    if model.head is None or model.embedder is None or model.limits is None:
        planes = read_planes(case, model.backbone)
        seen = look(planes, model.backbone, config, heatmap=request.heatmap, progress=progress)
        return CaseResults(named.path, case, planes, seen, model.backbone, config, folder)
    head, embedder = model.head, model.embedder
    planes = embedder.planes(case)
    vectors = embedder.embed_planes(case, planes)
    slices_ND, indices_N = vectors.slices_ND, vectors.indices_N
    judgement = judge(
        head,
        slices_ND,
        indices_N,
        planes.filled_N[indices_N],
        model.limits,
        top_k=request.slices_listed,
        by=config.heatmap_class,
    )
    seen = look_with_head(
        planes, head, embedder, judgement, slices_ND, config, heatmap=request.heatmap, progress=progress
    )
    flags = quality_flags(
        vectors.facts,
        head.card,
        novelty=head.novelty_of(slices_ND),
        guessed=_guessed(named, case, model.backbone, request),
        filled_N=planes.filled_N,
    )
    flags = [*map_flags(seen.heat_total, config.heatmap_method), *flags]
    return CaseResults(
        named.path,
        case,
        planes,
        seen,
        model.backbone,
        config,
        folder,
        judgement=judgement,
        embedder=embedder,
        flags=flags,
    )


def _settings(request: InferRequest, config: InferConfig, model: Model) -> dict[str, Any]:
    """The options and keys that decided; a head's settings of extraction stand for themselves."""
    keys = config.model_dump(mode="json")
    if model.embedder is not None:
        keys = {key: value for key, value in keys.items() if key not in HEAD_DECIDES}
        keys["batch_size"] = model.embedder.config.batch_size
    options = {"heatmap": request.heatmap, "top_k": request.slices_listed, "threshold": request.threshold}
    return {**options, "sequence": request.sequence, "device": request.device, **keys}


def _guessed(named: Named, case: Case, backbone: Backbone, request: InferRequest) -> str | None:
    """The sequence that a lone volume was taken for although its name does not say so."""
    stem = None if named.path.is_dir() or backbone.model.sequences is None else volume_stem(named.path)
    is_guess = is_guessed(stem, backbone.sequences, request.sequence)
    return next(iter(case.sequences)) if is_guess else None


def _lines(summary: dict[str, Any], request: InferRequest, count: int) -> list[str]:
    out = request.out if count == 1 else request.out / summary["case_id"]
    looked_at = "one picture" if summary["slice_spacing_mm"] is None else counted(summary["num_slices"], "slice")
    lines = [f"{summary['case_id']}: {looked_at}, {counted(summary['embedding_dim'], 'number')} each"]
    if "checkpoint" in summary:
        lines += lines_of(summary)
    lines += [f"  {flag['kind']}: {flag['title']}: {flag['text']}" for flag in summary["flags"] if flag["kind"] != "ok"]
    if summary["heatmap"]:
        lines.append(f"heat map: {out / summary['heatmap']} ({summary['heatmap_method']})")
    return [*lines, f"report:   {out / 'report.html'}"]
