"""Look at cases through a backbone or a head: embeddings, probabilities, a heat map on the input's grid, a report."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medssl_cli.core.case import Case
from medssl_cli.core.config import load_config
from medssl_cli.core.result import Result
from medssl_cli.core.run import result_header, temporary_folder, write_json
from medssl_cli.core.wording import counted
from medssl_cli.models.vit import VisionTransformer
from medssl_cli.services.backbone import Backbone, open_backbone, read_planes
from medssl_cli.services.case_input import Named, Wanted, found_case, guessed_sequence, named_cases
from medssl_cli.services.case_results import CaseResults, publish, shown
from medssl_cli.services.devices import resolve_device, saying_memory
from medssl_cli.services.dicom_export import check_dicom_source, dicom_formats
from medssl_cli.services.embedding import Embedder
from medssl_cli.services.head import Head, open_head
from medssl_cli.services.heatmaps import HEAD_METHODS, InferConfig, look, look_with_head
from medssl_cli.services.infer_cohort import COMMAND, InferRequest, Progress, check_threshold, infer_cohort, needless
from medssl_cli.services.infer_head import Limits, check_class, describe, judge, limits_of, lines_of
from medssl_cli.services.lookup import FoundModel, find_model
from medssl_cli.services.predictions import prediction_table, write_predictions
from medssl_cli.services.quality import map_flags, quality_flags

log = logging.getLogger(__name__)

PREDICTIONS = "predictions.csv"
HEAD_DECIDES = ("max_side", "stride")
"""Keys that a head brings with its settings of extraction."""


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
    found = find_model(request.model, backbone=request.backbone)
    if found.segmenter is not None:
        from medssl_cli.services.infer_segment import infer_segment

        return infer_segment(request, found, started=started, progress=progress)
    _refuse_segment_options(request)
    config = _config(request)
    formats = dicom_formats(request.dicom, heatmap=request.heatmap)
    cases = named_cases(request.cases)
    if formats:
        for named in cases:
            check_dicom_source(named.path)
    model = _open(request, config, found)
    config = _fitting(config, model)
    inputs = _inputs(request, cases, model)
    several = len(cases) > 1

    def infer_case(named: Named, out: Path, slices: Progress | None, claim: Callable[..., None]) -> dict[str, Any]:
        return _infer_case(named, model, request, config, formats, out, slices, claim)

    return infer_cohort(
        request,
        cases,
        inputs,
        infer_case,
        started=started,
        lines=lambda summary: _lines(summary, request, several=several),
        saying_memory=lambda: saying_memory(model.backbone.device),
        finish=lambda summaries: _write_predictions(request.out / PREDICTIONS, model, summaries),
        progress=progress,
    )


def _refuse_segment_options(request: InferRequest) -> None:
    """Options that belong to segmentation networks."""
    idle = {
        "--tta": request.tta,
        "--save-probabilities": request.save_probabilities,
        "--ct": request.ct is not None,
        "--pet": request.pet is not None,
    }
    given = [name for name, is_given in idle.items() if is_given]
    if given:
        raise needless(
            "This takes a segmentation network, and the model is none.",
            ", ".join(given),
            "name the --out folder of `medssl segment` with --model, or leave it out",
        )


def _config(request: InferRequest) -> InferConfig:
    config = load_config(InferConfig, None, recipes=COMMAND, overrides=request.overrides)
    if not request.heatmap and "heatmap_method" in config.model_fields_set:
        raise needless(
            "heatmap_method has no effect without a heat map.",
            f"heatmap_method={config.heatmap_method}",
            "add --heatmap, or leave the key out",
        )
    if "mask_threshold" in config.model_fields_set and "seg" not in (request.dicom or ""):
        raise needless(
            "mask_threshold has no effect without a DICOM segmentation.",
            f"mask_threshold={config.mask_threshold}",
            "add --heatmap --dicom seg, or leave the key out",
        )
    check_threshold(request)
    return config


def _open(request: InferRequest, config: InferConfig, found: FoundModel) -> Model:
    """The model, loaded once for all cases; keys that it leaves without effect are refused."""
    device = resolve_device(request.device)
    given = config.model_fields_set
    if found.head is None:
        _refuse_head_options(request, config)
        if request.top_k is not None and not request.heatmap:
            raise needless(
                "--top-k has no effect on a bare backbone without a heat map: nothing ranks the slices.",
                f"--top-k {request.top_k}",
                "add --heatmap, or leave it out",
            )
        return Model(open_backbone(found, device))
    idle = [key for key in HEAD_DECIDES if key in given]
    if idle:
        raise needless(
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
        raise needless(
            "This takes a trained head, and the model is a bare backbone.",
            ", ".join(idle),
            "name the --out folder of `medssl train-head` with --model, or leave it out",
        )


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
    """The sequence that a lone volume was taken for although nothing says so."""
    is_plain = backbone.model.sequences is None
    return None if is_plain else guessed_sequence(named, case, backbone.sequences, request.sequence)


def _lines(summary: dict[str, Any], request: InferRequest, *, several: bool) -> list[str]:
    out = request.out / summary["case_id"] if several else request.out
    looked_at = "one picture" if summary["slice_spacing_mm"] is None else counted(summary["num_slices"], "slice")
    lines = [f"{summary['case_id']}: {looked_at}, {counted(summary['embedding_dim'], 'number')} each"]
    if "checkpoint" in summary:
        lines += lines_of(summary)
    lines += [f"  {flag['kind']}: {flag['title']}: {flag['text']}" for flag in summary["flags"] if flag["kind"] != "ok"]
    if summary["heatmap"]:
        lines.append(f"heat map: {out / summary['heatmap']} ({summary['heatmap_method']})")
    return [*lines, f"report:   {out / 'report.html'}"]
