"""A trained segmentation network on labelled cases: segmented one after the other and measured at once.

Cases that the network was trained or chosen on are refused, unless that part is asked for by name. The threshold is
the one that validation has found, unless another one is given; which of the two is written down.
"""

from __future__ import annotations

import logging
import tempfile
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, PositiveInt

from medssl_cli.core.case import Case
from medssl_cli.core.config import load_config
from medssl_cli.core.errors import ConfigError, DataError
from medssl_cli.core.run import contained, hide_home
from medssl_cli.core.volume import Volume
from medssl_cli.core.wording import counted
from medssl_cli.data.ct_pet import Triple, read_ct_pet, read_pair, read_pet_ct_mask, split_triples
from medssl_cli.data.images import write_image, write_volume
from medssl_cli.data.label_maps import LabelSpec
from medssl_cli.data.labelled_cases import (
    described_spec,
    find_label_cases,
    find_label_pictures,
    holds_labelled_pictures,
)
from medssl_cli.data.manifest import read_ids, say_some, split_digest
from medssl_cli.services.devices import describe_device, resolve_device
from medssl_cli.services.evaluate_masks_cases import (
    CaseScores,
    Grid,
    ScoreOptions,
    grids_differ,
    nothing_left,
    read_classes,
    read_grid,
    score_case,
    score_options,
)
from medssl_cli.services.evaluate_masks_facts import ScoredMasks
from medssl_cli.services.evaluate_masks_groups import CaseTables, case_rows, patients_of, tables_at, with_patients
from medssl_cli.services.evaluate_masks_request import MasksConfig, refuse_idle_lesion_keys
from medssl_cli.services.evaluate_masks_worst import WorstCases
from medssl_cli.services.evaluate_request import COMMAND, EvaluateRequest, Failure, Progress
from medssl_cli.services.evaluate_seen import CASES, SEEN, read_seen, refuse_seen
from medssl_cli.services.segment_ct_pet import listed_triples
from medssl_cli.services.segmentation_inference import InferSegmentConfig, decide, segment_case, threshold_of
from medssl_cli.services.segmenter import Segmenter, open_segmenter
from medssl_cli.services.slice_pipeline import segment_pictures

log = logging.getLogger(__name__)

TEST = "test"
_UNIT_NOTE = "Pictures have no spacing: distances and the tolerance are in pixels, volumes are not known."


class SegmenterConfig(MasksConfig):
    """``KEY=VALUE`` of ``medssl eval`` with a segmentation network."""

    overlap: float = Field(0.5, ge=0, lt=1)
    """Share of a tile that its neighbour sees again."""
    blend: Literal["gaussian", "constant"] = "gaussian"
    """How tiles are joined, see `medssl infer`."""
    tta: bool = False
    """Average over the four flips of each tile."""
    batch_size: PositiveInt = 8
    """Tiles computed together; never changes what comes out but for rounding."""

    def inference(self, *, save_probabilities: bool) -> InferSegmentConfig:
        """As ``infer`` takes it."""
        return InferSegmentConfig(
            overlap=self.overlap,
            blend=self.blend,
            tta=self.tta,
            batch_size=self.batch_size,
            save_probabilities=save_probabilities,
        )


@dataclass(frozen=True)
class _Labelled:
    """One case to be segmented.

    Args:
        case_id: As the run's ``cases.csv`` would name it.
        name: For tables and for the file of its prediction.
        patient_id: Whose.
        reference: File of the label map.
        image: What is shown beside it.
        source: Where it is read from.
    """

    case_id: str
    name: str
    patient_id: str
    reference: Path
    image: Path
    source: Case | Triple


@dataclass(frozen=True)
class _Predicted:
    """Label map (class index) of a case on its grid, with probabilities where they are needed."""

    label_map: np.ndarray
    grid: Grid
    probability: np.ndarray | None = None


def score_segmenter(
    request: EvaluateRequest, run: Path, progress: Progress | None = None, saved: Path | None = None
) -> tuple[ScoredMasks, WorstCases]:
    """Segment and measure one part of labelled data.

    Args:
        request: What the user typed.
        run: Of the segmentation network.
        progress: Told cases done and in all.
        saved: Folder for the label maps; None keeps none.

    Raises:
        ConfigError: Options without effect.
        DataError: Cases that the network has seen or that cannot be read, other classes, no case at all.
        CheckpointError: The network cannot be loaded, or its list of cases is gone.
        ResourceError: The device is absent.
    """
    if request.data is None:
        raise ValueError("a model without data")
    config = load_config(SegmenterConfig, None, recipes=COMMAND, overrides=request.overrides)
    refuse_idle_lesion_keys(request, lesions=request.lesions)
    segmenter = open_segmenter(run, resolve_device(request.device))
    threshold, source = _threshold(request, segmenter)
    found: list[Failure] = []
    labelled, part = _labelled(request, segmenter, request.data, found)
    spec = _spec(request, segmenter, request.data)
    options = score_options(request, config, threshold, lesions=request.lesions)
    tables = CaseTables(
        case_rows([c.case_id for c in labelled], [c.name for c in labelled], [c.patient_id for c in labelled]),
        request.data,
        tables_at(request.data, request.subgroups),
        of_images=segmenter.pictures,
    )
    patients, group_by, notes = patients_of(request, tables)
    tables = with_patients(tables, patients, request.subgroup)
    cases: list[CaseScores] = []
    worst, unit = WorstCases(config.worst_cases), ""
    for number, (case, predicted, error) in enumerate(_predictions(request, segmenter, labelled, config, options)):
        try:
            if error is not None or predicted is None:
                raise error or ValueError("neither a prediction nor an error")
            cases.append(_measured(case, predicted, spec, options, patients[case.case_id], worst, segmenter))
            unit = "px" if len(predicted.grid.shape) == 2 else "mm"
            if saved is not None:
                _save(saved, case, predicted)
        except DataError as fault:
            if request.on_error == "stop":
                raise
            found.append(
                (case.case_id, hide_home(str(case.image)), f"{fault.what} {hide_home(fault.where)}", fault.fix)
            )
        if progress is not None:
            progress(number + 1, len(labelled))
    if not cases:
        raise nothing_left(found)
    scored = ScoredMasks(
        cases=tuple(cases),
        classes=segmenter.classes,
        options=options,
        unit=unit,
        group_by=group_by,
        tables=tables.kept([case.case_id for case in cases]),
        threshold=threshold,
        threshold_source=source,
        data={
            "path": hide_home(str(request.data)),
            "split": part,
            "split_digest": split_digest([case.case_id for case in cases]),
            "held_back": part not in SEEN,
        },
        lesion_source=config.candidates("probability") if options.lesions else None,
        failures=tuple(found),
        model=_model_facts(segmenter, config),
        device=describe_device(segmenter.device),
        notes=(*notes, *([_UNIT_NOTE] if unit == "px" else []), *_seen_note(part)),
    )
    return scored, worst


def _threshold(request: EvaluateRequest, segmenter: Segmenter) -> tuple[float | None, str]:
    if request.threshold is not None and segmenter.outputs > 1:
        raise ConfigError(
            "--threshold has no effect on several classes: the most probable one wins.",
            where=f"--threshold {request.threshold:g}; classes: {', '.join(segmenter.classes)}",
            fix="leave it out",
            code="threshold_needless",
        )
    threshold, source = threshold_of(segmenter, request.threshold)
    return threshold, source or "no threshold: the most probable class"


def _model_facts(segmenter: Segmenter, config: SegmenterConfig) -> dict[str, Any]:
    card = segmenter.card
    return {
        "run": hide_home(str(segmenter.run)),
        "sha256": card.get("sha256"),
        "task": segmenter.task,
        "network": (card.get("network") or {}).get("name"),
        "epoch": card.get("epoch"),
        "threshold_stored": segmenter.threshold,
        "inference": config.inference(save_probabilities=False).model_dump(mode="json", exclude={"save_probabilities"}),
    }


def _seen_note(part: str) -> tuple[str, ...]:
    if part not in SEEN:
        return ()
    how = "trained" if part == "train" else "chosen, and its threshold set,"
    return (f"The network was {how} on this part: these numbers tell nothing of new patients.",)


# --- which cases -----------------------------------------------------------------------------------------------------


def _labelled(
    request: EvaluateRequest, segmenter: Segmenter, root: Path, failures: list[Failure]
) -> tuple[list[_Labelled], str]:
    """(cases of the part asked for, its name).

    Raises:
        DataError: No such part, or cases that the network has seen.
    """
    if not root.is_dir():
        raise DataError(
            "There is no such data folder.", where=hide_home(str(root)), fix="check --data", code="data_missing"
        )
    seen_cases, _ = read_seen(segmenter.run / CASES, "network")
    find = _ct_pet_cases if segmenter.task == "ct-pet" else _semantic_cases
    parts = find(request, segmenter, root, failures)
    name = _part_name(request, parts, root)
    cases = (
        parts[name]
        if name in parts
        else [c for c in parts["all"] if name == "all" or seen_cases.get(c.case_id) == name]
    )
    if not cases:
        raise DataError(
            f"Part {name} has no labelled case.",
            where=f"{hide_home(str(root))}: {', '.join(f'{part} {len(found)}' for part, found in parts.items())}",
            fix="name another part with --split, or the lists with --splits or --split-csv",
            code="part_empty",
        )
    if request.split not in SEEN:
        refuse_seen(segmenter.run, name, ((case.case_id, case.patient_id) for case in cases), "network")
    return sorted(cases, key=lambda case: case.case_id), name


def _part_name(request: EvaluateRequest, parts: Mapping[str, Sequence[_Labelled]], root: Path) -> str:
    if request.split_csv is not None:
        return "listed"
    asked = request.split or TEST
    if asked in parts or (asked in SEEN and "all" in parts):
        return asked
    if set(parts) == {"all"} and asked != TEST:
        return asked
    if set(parts) == {"all"} and request.split is None:
        log.warning("No split is known of %s: all cases are evaluated.", hide_home(str(root)))
        return "all"
    raise DataError(
        f"There is no part {asked!r}.",
        where=f"{hide_home(str(root))}: {', '.join(parts) or 'no part'}",
        fix="name one of these with --split, or give --splits with the folder of `medssl split`",
        code="part_missing",
    )


def _lists(request: EvaluateRequest) -> dict[str, Path]:
    """List of each part that was named."""
    if request.split_csv is not None:
        return {"listed": request.split_csv}
    if request.splits is None:
        return {}
    found = {name: request.splits / f"{name}.csv" for name in ("train", "val", TEST)}
    return {name: path for name, path in found.items() if path.is_file()}


def _semantic_cases(
    request: EvaluateRequest, segmenter: Segmenter, root: Path, failures: list[Failure]
) -> dict[str, list[_Labelled]]:
    """Labelled volumes or pictures by part."""
    told = (segmenter.card.get("config") or {}).get("data") or {}
    label = request.label if request.label is not None else str(told.get("label") or "")

    def on_fault(name: str, error: DataError) -> None:
        failures.append((name, hide_home(str(root / name)), error.what, error.fix))

    faults = on_fault if request.on_error == "skip" else None

    def read(split_csv: Path | None, split: str) -> list[Case]:
        pattern = request.group_pattern or str(told.get("group_pattern") or "") or None
        if segmenter.pictures or (segmenter.plain and holds_labelled_pictures(root)):
            return find_label_pictures(
                root, label=label, split_csv=split_csv, split=split, group_pattern=pattern, on_fault=faults
            )
        names = _sequences(segmenter, told)
        template = str(told.get("template") or "")
        return find_label_cases(
            root,
            "auto",
            names,
            label,
            template=template,
            split_csv=split_csv,
            split=split,
            group_pattern=pattern,
            on_fault=faults,
        )

    lists = _lists(request)
    if lists:
        wanted = [name for name in lists if name in ("listed", request.split or TEST) or request.split == "all"]
        parts = {name: _of_cases(read(lists[name], name)) for name in wanted}
        return {"all": [case for cases in parts.values() for case in cases]} if request.split == "all" else parts
    cases = read(None, "")
    by_part = {name: [case for case in cases if case.split == name] for name in ("train", "val", TEST)}
    known = {name: _of_cases(found) for name, found in by_part.items() if found}
    return {**(known if TEST in known else {}), "all": _of_cases(cases)}


def _sequences(segmenter: Segmenter, told: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the volumes that a network takes; one for plain pictures works on the slices of one sequence."""
    if not segmenter.plain:
        return segmenter.sequences
    names = told.get("mri_sequences") or ()
    return tuple(str(name) for name in names) or segmenter.sequences


def _of_cases(cases: Sequence[Case]) -> list[_Labelled]:
    found = []
    for case in cases:
        if case.roi is None:
            raise ValueError(f"case {case.case_id} without a label map")
        image = next(iter(case.sequences.values())).path
        found.append(_Labelled(case.case_id, case.case_id, case.patient_id, case.roi, image, case))
    return found


def _ct_pet_cases(
    request: EvaluateRequest, segmenter: Segmenter, root: Path, _failures: list[Failure]
) -> dict[str, list[_Labelled]]:
    """Slices of CT and PET by part: as folders split them, as lists tell, else as training divided them."""
    told = segmenter.card.get("config") or {}
    regex = told.get("patient_regex")
    data = read_ct_pet(root, dataset_type=told.get("dataset_type") or "auto", patient_regex=regex)
    every = [triple for triples in data.parts.values() for triple in triples]
    parts: dict[str, tuple[Triple, ...]]
    if request.split_csv is not None:
        parts = {"listed": _named_triples(every, request.split_csv)}
    elif request.splits is not None:
        parts = listed_triples(every, request.splits)
    elif data.layout == "flat":
        parts = {}
    else:
        seed, share = int(told.get("random_seed", 42)), float(told.get("val_ratio", 0.2))
        parts = split_triples(data, val_ratio=share, seed=seed)
    named = {name: [_of_triple(triple) for triple in triples] for name, triples in parts.items()}
    return {**named, **({} if "listed" in named else {"all": [_of_triple(triple) for triple in every]})}


def _named_triples(triples: Sequence[Triple], split_csv: Path) -> tuple[Triple, ...]:
    """The slices that a list names, by patient, by file or by file without its suffix.

    Raises:
        DataError: An id that is none of them.
    """
    known: dict[str, set[Triple]] = defaultdict(set)
    for triple in triples:
        for name in (triple.patient_id, triple.name, Path(triple.name).stem):
            known[name].add(triple)
    ids = read_ids(split_csv).ids
    wanted = {triple for name in ids if name in known for triple in known[name]}
    unknown = [name for name in ids if name not in known]
    if unknown:
        raise DataError(
            f"{counted(len(unknown), 'id')} of the list names no patient and no slice.",
            where=f"{hide_home(str(split_csv))}: {say_some(unknown)}",
            fix="ids are patients or names of slices",
            code="id_unknown",
        )
    return tuple(triple for triple in triples if triple in wanted)


def _of_triple(triple: Triple) -> _Labelled:
    if triple.mask is None:
        raise ValueError(f"{triple.name} without a mask")
    return _Labelled(triple.name, triple.name, triple.patient_id, triple.mask, triple.pet, triple)


# --- classes ---------------------------------------------------------------------------------------------------------


def _spec(request: EvaluateRequest, segmenter: Segmenter, root: Path) -> LabelSpec:
    """Values of the references as classes of the network: as its data set or its own card tells.

    Raises:
        DataError: The data set names other classes.
    """
    described = None if segmenter.task == "ct-pet" else described_spec(root)
    if described is not None:
        if described.classes != segmenter.classes:
            raise DataError(
                "The data set names other structures than the network gives.",
                where=f"{hide_home(str(root))}: {', '.join(described.classes[1:])}; "
                f"{hide_home(str(segmenter.run))}: {', '.join(segmenter.classes[1:])}",
                fix="evaluate on data with the classes of the training, or compare exported label maps with --classes",
                code="classes_differ",
            )
        return described
    values = segmenter.card.get("label_values")
    if values:
        ignored = tuple(int(value) for value in segmenter.card.get("ignore_values") or ())
        return LabelSpec(segmenter.classes, {int(v): segmenter.classes.index(n) for v, n in values.items()}, ignored)
    return LabelSpec(segmenter.classes, {index: index for index in range(len(segmenter.classes))})


# --- cases through the network ---------------------------------------------------------------------------------------

_Outcome = tuple[_Labelled, _Predicted | None, DataError | None]


def _predictions(
    request: EvaluateRequest,
    segmenter: Segmenter,
    labelled: Sequence[_Labelled],
    config: SegmenterConfig,
    options: ScoreOptions,
) -> Iterator[_Outcome]:
    """Each case with its label map, or with the error that it met; one after the other."""
    if segmenter.task == "ct-pet":
        yield from _pair_predictions(request, segmenter, labelled, config, options)
        return
    for case in labelled:
        scratch = tempfile.TemporaryDirectory(prefix="medssl-") if options.lesions else nullcontext(None)
        with scratch as folder:
            try:
                predicted = _segmented(segmenter, case, config, options, folder)
            except DataError as error:
                yield case, None, error
                continue
            yield case, predicted, None


def _segmented(
    segmenter: Segmenter, case: _Labelled, config: SegmenterConfig, options: ScoreOptions, scratch: str | None
) -> _Predicted:
    if not isinstance(case.source, Case):
        raise TypeError("a pair of CT and PET is no case of one network input")
    difference = None if segmenter.pictures else grids_differ(read_grid(case.image), read_grid(case.reference))
    if difference:
        raise _grids(case, difference)
    seen = segment_case(
        segmenter,
        case.source,
        config.inference(save_probabilities=options.lesions),
        threshold=None if segmenter.outputs > 1 else options.threshold,
        scratch=None if scratch is None else Path(scratch),
    )
    label_map, probability = seen.label_map, seen.probabilities
    if seen.is_picture:
        flat = None if probability is None else probability[:, 0]
        return _Predicted(label_map.array[0], Grid(label_map.shape[1:], None), flat)
    return _Predicted(label_map.array, Grid(label_map.shape, label_map.affine), probability)


def _pair_predictions(
    request: EvaluateRequest,
    segmenter: Segmenter,
    labelled: Sequence[_Labelled],
    config: SegmenterConfig,
    options: ScoreOptions,
) -> Iterator[_Outcome]:
    """Slices of CT and PET, several at a time through the network."""
    going: deque[_Labelled] = deque()
    broken: deque[_Outcome] = deque()

    def pictures() -> Iterator[np.ndarray]:
        for case in labelled:
            try:
                pair_2HW = read_pair(_triple(case))
            except DataError as error:
                broken.append((case, None, error))
                continue
            going.append(case)
            yield pair_2HW

    whole = replace(segmenter, tile=0)  # the network learned from whole slices and pads them itself
    for probability_CHW in segment_pictures(whole, pictures(), config.inference(save_probabilities=False)):
        while broken:
            yield broken.popleft()
        mask_HW = decide(probability_CHW, options.threshold)
        kept = probability_CHW if options.lesions else None
        yield going.popleft(), _Predicted(mask_HW, Grid(mask_HW.shape, None), kept), None
    yield from broken


def _triple(case: _Labelled) -> Triple:
    if not isinstance(case.source, Triple):
        raise TypeError("a case is no pair of CT and PET")
    return case.source


def _measured(
    case: _Labelled,
    predicted: _Predicted,
    spec: LabelSpec,
    options: ScoreOptions,
    patient_id: str,
    worst: WorstCases,
    segmenter: Segmenter,
) -> CaseScores:
    if segmenter.task == "ct-pet":
        threshold = segmenter.card.get("mask_threshold")
        reference = read_pet_ct_mask(case.reference, threshold=None if threshold is None else int(threshold))
        grid = Grid(reference.shape, None)
    else:
        reference, grid = read_classes(case.reference, spec), read_grid(case.reference)
    difference = grids_differ(predicted.grid, grid)
    if difference:
        raise _grids(case, difference)
    names = (case.case_id, case.name, patient_id)
    scores = score_case(names, predicted.label_map, reference, grid, segmenter.classes, options, predicted.probability)
    worst.add(scores, predicted.label_map, reference, grid, case.image)
    return scores


def _grids(case: _Labelled, difference: str) -> DataError:
    return DataError(
        "Image and reference lie on different grids.",
        where=f"case {case.case_id}: {hide_home(str(case.image))}, {hide_home(str(case.reference))}: {difference}",
        fix="draw or resample the label map on the grid of its image; nothing is resampled here",
        code="grid_mismatch",
    )


def _save(folder: Path, case: _Labelled, predicted: _Predicted) -> None:
    """The label map under the name of its case: PNG of 0 and 255 for one structure of a picture, else class indices."""
    if predicted.grid.affine is not None:
        path = contained(folder, f"{case.case_id}_segmentation.nii.gz", "prediction")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_volume(path, Volume(predicted.label_map, predicted.grid.affine))
        return
    path = contained(folder, Path(case.name).with_suffix(".png").as_posix(), "prediction")
    path.parent.mkdir(parents=True, exist_ok=True)
    scale = 255 if isinstance(case.source, Triple) else 1
    write_image(path, predicted.label_map * np.uint8(scale))
