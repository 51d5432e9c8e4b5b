"""Cases through a segmentation network: a label map on the exact grid of each, volumes, a report."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from medssl_cli.core.case import Case
from medssl_cli.core.config import load_config
from medssl_cli.core.errors import ConfigError
from medssl_cli.core.result import Result
from medssl_cli.core.run import result_header, temporary_folder, write_json
from medssl_cli.data.images import is_image
from medssl_cli.services.case_input import Named, Wanted, found_case, guessed_sequence, named_cases
from medssl_cli.services.case_results import publish, shown
from medssl_cli.services.ct_pet_volume import CtPetInferConfig, as_volumes, refuse_incomplete, windows_of
from medssl_cli.services.devices import resolve_device, saying_memory
from medssl_cli.services.dicom_export import check_dicom_source
from medssl_cli.services.infer_cohort import COMMAND, InferRequest, Progress, check_threshold, infer_cohort, needless
from medssl_cli.services.infer_pairs import infer_pairs, paired_folders
from medssl_cli.services.lookup import FoundModel, read_segmenter_card
from medssl_cli.services.segment_dicom import segment_formats
from medssl_cli.services.segment_results import SegmentResults
from medssl_cli.services.segment_semantic_config import sided
from medssl_cli.services.segmentation_inference import InferSegmentConfig, segment_case
from medssl_cli.services.segmenter import Segmenter, open_segmenter

log = logging.getLogger(__name__)


def infer_segment(
    request: InferRequest, found: FoundModel, *, started: float, progress: Progress | None = None
) -> Result:
    """Segment one case or several; the branch of ``infer`` for segmentation networks.

    Args:
        request: What the user typed.
        found: With ``segmenter``.
        started: ``time.time()`` at the start.
        progress: Told cases done, or slices of the only case.

    Raises:
        ConfigError: Options without effect on a segmentation.
        DataError: A case cannot be read (with ``on_error: stop``); cases before it are complete.
        CheckpointError: The model cannot be loaded.
        ResourceError: No such device, or not enough memory or disk.
    """
    assert found.segmenter is not None
    _refuse_idle(request)
    is_ct_pet = read_segmenter_card(found.segmenter).get("task") == "ct-pet"
    config = _config(request, CtPetInferConfig if is_ct_pet else InferSegmentConfig)
    formats = segment_formats(request.dicom)
    segmenter = open_segmenter(found.segmenter, resolve_device(request.device))
    _refuse_threshold(request, segmenter)
    _refuse_mirrored_sides(config, segmenter)
    windows: Mapping[str, tuple[float, float]] | None = None
    if is_ct_pet:
        folders = paired_folders(request)
        if folders is not None:
            return infer_pairs(request, found, segmenter, config, folders, started=started, progress=progress)
        _refuse_lone_pictures(request)
        windows = windows_of(segmenter, config)
        segmenter = as_volumes(segmenter)
    elif request.ct is not None or request.pet is not None:
        raise needless(
            "--ct and --pet are for networks of CT-PET pairs.",
            f"the model segments {', '.join(segmenter.classes[1:])} on {', '.join(segmenter.sequences)}",
            "name the cases without them",
        )
    cases = named_cases(request.cases)
    if formats:
        for named in cases:
            check_dicom_source(named.path)
    several = len(cases) > 1

    def infer_case(named: Named, out: Path, slices: Progress | None, claim: Callable[..., None]) -> dict[str, Any]:
        return _infer_case(named, segmenter, found, request, config, windows, formats, out, slices, claim)

    return infer_cohort(
        request,
        cases,
        [*(Path(word) for word in request.cases), *(named.path for named in cases), segmenter.run],
        infer_case,
        started=started,
        lines=lambda summary: _lines(summary, request, several=several),
        saying_memory=lambda: saying_memory(segmenter.device, "batch_size=1"),
        finish=lambda _: None,
        progress=progress,
    )


def _refuse_idle(request: InferRequest) -> None:
    """Options that belong to heads and backbones."""
    idle = {
        "--heatmap": request.heatmap,
        "--top-k": request.top_k is not None,
    }
    given = [name for name, is_given in idle.items() if is_given]
    if given:
        raise needless(
            "This has no effect on a segmentation network: it gives a label map.",
            ", ".join(given),
            "leave it out, or name a head or a backbone with --model",
        )


def _config(request: InferRequest, kind: type[InferSegmentConfig]) -> InferSegmentConfig:
    flags = {"tta": request.tta or None, "save_probabilities": request.save_probabilities or None}
    config = load_config(kind, None, recipes=COMMAND, flags=flags, overrides=request.overrides)
    check_threshold(request)
    return config


def _refuse_threshold(request: InferRequest, segmenter: Segmenter) -> None:
    if request.threshold is not None and segmenter.outputs > 1:
        raise needless(
            "--threshold has no effect on several classes: the most probable one wins.",
            f"--threshold {request.threshold}; classes: {', '.join(segmenter.classes)}",
            "leave it out; --save-probabilities keeps what a threshold of your own can be set on",
        )


def _refuse_mirrored_sides(config: InferSegmentConfig, segmenter: Segmenter) -> None:
    if config.tta and sided(segmenter.classes):
        raise ConfigError(
            "--tta averages over mirrored slices, in which left and right structures change places.",
            where=f"classes: {', '.join(segmenter.classes)}",
            fix="leave --tta out",
            code="tta_of_sides",
        )


def _refuse_lone_pictures(request: InferRequest) -> None:
    lone = [word for word in request.cases if is_image(Path(word))]
    if lone:
        raise ConfigError(
            "The network takes CT and PET together.",
            where=", ".join(lone[:5]),
            fix="name the two folders, CT first, or one pair of pictures with --ct and --pet",
            code="pair_incomplete",
        )


# --- one case --------------------------------------------------------------------------------------------------------


def wanted_by(segmenter: Segmenter) -> Wanted:
    """What the network takes, for finding the files of a case."""
    reference = segmenter.preprocess.reference
    reference = reference if reference in segmenter.sequences else segmenter.sequences[0]
    return Wanted(segmenter.sequences, reference, volumes=not segmenter.plain, slices=not segmenter.pictures)


def _infer_case(
    named: Named,
    segmenter: Segmenter,
    found: FoundModel,
    request: InferRequest,
    config: InferSegmentConfig,
    windows: Mapping[str, tuple[float, float]] | None,
    formats: Sequence[str],
    out: Path,
    progress: Progress | None,
    claim: Callable[..., None],
) -> dict[str, Any]:
    """Segment one case; its folder gets all results, or keeps what it had."""
    started = time.time()
    temporary = temporary_folder(request.out, "case")
    try:
        with found_case(named, wanted_by(segmenter), request.sequence, temporary) as case:
            if windows is not None:
                refuse_incomplete(case)
            seen = segment_case(
                segmenter,
                case,
                config,
                threshold=request.threshold,
                windows=windows,
                scratch=temporary / "scratch",
                progress=progress,
            )
            results = SegmentResults(
                named.name,
                named.path,
                seen,
                segmenter,
                found,
                config,
                temporary / "results",
                asked=request.threshold,
                guessed=_guessed(named, case, segmenter, request),
            )
            results.write_maps()
            results.write_overlay()
            results.write_dicom(formats)
            summary = {
                **result_header(COMMAND, started),
                "input": shown(named.path),
                "output_dir": shown(out),
                "config": {**settings_of(request, config), "windows": windows},
                **results.facts(),
            }
            results.write_report(summary)
            write_json(results.folder / "summary.json", summary)
            claim(keep=(temporary,))
            publish(results.folder, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return summary


def settings_of(request: InferRequest, config: InferSegmentConfig) -> dict[str, Any]:
    """The options and keys that decided."""
    options = {"threshold": request.threshold, "sequence": request.sequence, "device": request.device}
    return {**options, **config.model_dump(mode="json")}


def _guessed(named: Named, case: Case, segmenter: Segmenter, request: InferRequest) -> str | None:
    """The sequence that a lone volume was taken for although nothing says so."""
    return None if segmenter.plain else guessed_sequence(named, case, segmenter.sequences, request.sequence)


def _lines(summary: dict[str, Any], request: InferRequest, *, several: bool) -> list[str]:
    out = request.out / summary["case_id"] if several else request.out
    lines = [f"{summary['case_id']}:"]
    for name, count in summary["voxels"].items():
        volume = summary["volume_ml"]
        size = f"{count:,} pixels" if volume is None else f"{volume[name]:.4g} ml, {count:,} voxels"
        lines.append(f"  {name}: {size}")
    lines += [f"  {flag['kind']}: {flag['title']}: {flag['text']}" for flag in summary["flags"] if flag["kind"] != "ok"]
    lines.append(f"label map: {out / summary['segmentation']}")
    return [*lines, f"report:    {out / 'report.html'}"]
