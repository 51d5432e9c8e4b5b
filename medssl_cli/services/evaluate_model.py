"""A trained head on stored features or on images: its predictions of one part of the cases, with their labels.

Cases that the head was trained or chosen on are refused, unless that part is asked for by name.

Letters: N slices of a case, R rows of a feature part, C outputs of the head, D width of a slice vector.
"""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from medssl_cli.core.case import Case
from medssl_cli.core.config import changed_keys, leaves, load_config
from medssl_cli.core.errors import ConfigError, DataError
from medssl_cli.core.run import hide_home
from medssl_cli.core.wording import counted
from medssl_cli.data.feature_cache import FeatureCache
from medssl_cli.data.feature_store import (
    ALL,
    FeaturePart,
    FeatureSet,
    ImageFacts,
    Row,
    describe_parts,
    is_features,
    read_features,
)
from medssl_cli.data.labels import read_targets
from medssl_cli.data.manifest import say_some, split_digest
from medssl_cli.data.store import default_cache
from medssl_cli.services.devices import describe_device, resolve_device
from medssl_cli.services.embedding import Embedder
from medssl_cli.services.evaluate_files import labelled_only
from medssl_cli.services.evaluate_request import (
    COMMAND,
    EvaluateConfig,
    EvaluateRequest,
    Failure,
    Progress,
    Scored,
    SequenceScorer,
    chosen_thresholds,
    refuse_needless_threshold,
)
from medssl_cli.services.evaluate_seen import SEEN, refuse_seen
from medssl_cli.services.extract_cohort import Cohort, asked_cohort
from medssl_cli.services.extract_features import (
    CLASS_FOLDER,
    Pool,
    RowsInMemory,
    Steps,
    encode,
    fill,
    find_labels,
    refuse_empty,
    vectors_of,
)
from medssl_cli.services.head import Head, is_head_run, load_head, novelty_vector, open_head
from medssl_cli.services.head_labels import encode_labels
from medssl_cli.services.lookup import find_model
from medssl_cli.services.predictions import PredictionTable, prediction_table

log = logging.getLogger(__name__)

DEFAULT_SPLIT = "test"
_SAME_VECTOR = 1e-7
"""Cosine distance below which two vectors are of one image; stored rows are rounded to float32."""


@dataclass(frozen=True)
class _Source:
    """Features of the cases to be evaluated, and how they came about.

    Args:
        head: What is evaluated.
        part: Their rows.
        info: ``features.json``.
        asked: Part that was asked for.
        path: Of the data.
        device: What computed.
        of_images: The cases are pictures.
        tables: Of the cohort.
        failures: Cases that could not be read.
        cohort: The images; None for stored features.
        embedder: As ``cohort``.
    """

    head: Head
    part: FeaturePart
    info: Mapping[str, Any]
    asked: str
    path: Path
    device: str
    of_images: bool = False
    tables: tuple[Path, ...] = ()
    failures: tuple[Failure, ...] = ()
    cohort: Cohort | None = None
    embedder: Embedder | None = None


def score_model(request: EvaluateRequest, data: Path, progress: Progress | None = None) -> Scored:
    """Predict one part of the cases with a head.

    Raises:
        ConfigError: No head was found, or an option has no effect on stored features.
        DataError: Cases that the head was trained on, features made with other settings, or no labels.
        CheckpointError: The head or its backbone cannot be loaded.
        ResourceError: The device is absent.
    """
    config = load_config(EvaluateConfig, None, recipes=COMMAND, overrides=request.overrides)
    source = _stored(request, data) if is_features(data) else _computed(request, config, data, progress)
    if request.split not in SEEN:
        _refuse_copies(source)
    head, part = source.head, source.part
    case_ids, values_NC = head.values_of_rows(part)
    labels_RC = _labels(request, source)
    rows = _case_rows(part)
    table = prediction_table(
        head.task,
        head.classes,
        case_ids,
        values_NC,
        patient_ids=[rows[case_id].patient_id for case_id in case_ids],
        splits=[part.name] * len(case_ids),
        labels_NC=_case_labels(head, part, labels_RC, case_ids),
    )
    return _scored(request, source, table, labels_RC, rows)


def _scored(
    request: EvaluateRequest,
    source: _Source,
    table: PredictionTable,
    labels_RC: np.ndarray,
    rows: Mapping[str, Row],
) -> Scored:
    head = source.head
    rule = f"head: {head.card.get('threshold_rule') or 'stored threshold'}"
    thresholds, why = chosen_thresholds(head.task, head.outputs, request.threshold, head.thresholds, rule)
    order = sorted(range(len(table)), key=lambda row: table.case_ids[row])
    table, unlabelled = labelled_only(table.taken(order))
    table = prediction_table(
        table.task,
        table.classes,
        table.case_ids,
        table.values_NC,
        thresholds=thresholds,
        patient_ids=table.patient_ids,
        splits=table.splits,
        labels_NC=table.labels_NC,
    )
    return Scored(
        table,
        thresholds,
        why,
        "patient_id",
        head.calibrated if head.task != "regression" else None,
        tuple(rows[case_id] for case_id in table.case_ids),
        _data_facts(source, table),
        of_images=source.of_images,
        root=source.path if source.cohort is not None else None,
        tables=tuple(path for path in (request.labels, *source.tables) if path is not None),
        known=_known(source.part.facts, table),
        unlabelled=unlabelled,
        failures=source.failures,
        model=_model_facts(head),
        device=source.device,
        notes=_notes(source),
        slices=_slice_table(head, source.part, labels_RC, thresholds),
        with_sequences=_sequence_scorer(source, table),
    )


def _data_facts(source: _Source, table: PredictionTable) -> dict[str, Any]:
    return {
        "path": hide_home(str(source.path)),
        "split": source.part.name,
        "split_asked": source.asked,
        "split_digest": split_digest(table.case_ids),
        "held_back": source.part.name not in SEEN,
        "feature_digest": source.info.get("feature_digest"),
    }


def _model_facts(head: Head) -> dict[str, Any]:
    card = head.card
    return {
        "head": hide_home(str(head.folder)),
        "head_sha256": card["sha256"],
        "backbone_sha256": card["model"].get("sha256"),
        "arch": card["model"].get("arch"),
        "kind": head.kind,
        "pool_mode": head.pool_mode,
        "level": head.level,
        "case_rule": head.case_rule if head.level == "slice" else None,
        "calibrated": head.calibrated,
        "split_digests": card.get("split_digests"),
    }


def _notes(source: _Source) -> tuple[str, ...]:
    if source.part.name in SEEN:
        return (
            f"The head was {'trained' if source.part.name == 'train' else 'chosen and calibrated'} on this part: "
            "these numbers tell nothing of new patients.",
        )
    return ()


# --- where features come from ----------------------------------------------------------------------------------------


def _head_folder(request: EvaluateRequest) -> Path:
    """The head that is meant; on stored features its backbone need not be there."""
    for named in (request.model, os.environ.get("MEDSSL_MODEL")):
        if named:
            path = Path(named)
            return path if is_head_run(path) else _needs_head(find_model(path).head, path)
    found = find_model(None, backbone=request.backbone)
    return _needs_head(found.head, found.run or found.weights)


def _needs_head(head: Path | None, path: Path) -> Path:
    if head is None:
        raise ConfigError(
            "A bare backbone predicts nothing that could be evaluated.",
            where=hide_home(str(path)),
            fix="train a head with `medssl train-head` and name its run folder with --model",
            code="head_missing",
        )
    return head


def _stored(request: EvaluateRequest, data: Path) -> _Source:
    """Features as `medssl extract` left them; nothing is computed but the head."""
    named = (
        ("--splits", request.splits),
        ("--split-csv", request.split_csv),
        ("--sequence", request.sequence),
        ("--missing-sequences", request.missing_sequences),
        ("--backbone", request.backbone),
        ("--cache", request.cache),
        ("--on-error", request.on_error != "stop"),
        *((text, True) for text in request.overrides),
    )
    needless = [name for name, value in named if value]
    if needless:
        raise ConfigError(
            "Options about images have no effect on stored features.",
            where=f"{', '.join(needless)}; {hide_home(str(data))} holds features",
            fix="leave them out, or name the images with --data",
            code="flags_without_effect",
        )
    head = load_head(_head_folder(request))
    refuse_needless_threshold(head.task, request.threshold)
    if resolve_device(request.device).type != "cpu":
        log.info("Heads on stored features are computed on the CPU, in float64.")
    features = read_features(data)
    _refuse_other_settings(head, features, data)
    asked = request.split or DEFAULT_SPLIT
    part = features.part(_part_name(features.names, asked, data))
    if request.split not in SEEN:
        refuse_seen(head.folder, part.name, ((row.case_id, row.patient_id) for row in part.rows))
    of_images = all(facts.spacing_mm is None for facts in part.facts.values()) and bool(part.facts)
    return _Source(head, part, features.info, asked, data, "cpu", of_images=of_images)


def _computed(request: EvaluateRequest, config: EvaluateConfig, data: Path, progress: Progress | None) -> _Source:
    """Features of images, through the cache."""
    found = find_model(request.model, backbone=request.backbone)
    _needs_head(found.head, found.run or found.weights)
    device = resolve_device(request.device)
    cache = FeatureCache(default_cache(request.cache))
    overrides = {"batch_size": config.batch_size, "digest": config.digest}
    head, embedder = open_head(found, device, cache, overrides)
    refuse_needless_threshold(head.task, request.threshold)
    if request.missing_sequences and len(embedder.backbone.sequences) < 2:
        raise ConfigError(
            "The model takes one image a case: no sequence can be left out.",
            where=f"--missing-sequences; {hide_home(str(head.folder))}",
            fix="leave it out",
            code="flags_without_effect",
        )
    cohort = asked_cohort(data, embedder.backbone, request)
    asked = request.split or DEFAULT_SPLIT
    listed = request.split_csv is not None
    part_name = next(iter(cohort.parts)) if listed else _part_name(tuple(cohort.parts), asked, data)
    if request.split not in SEEN:
        refuse_seen(head.folder, part_name, ((case.case_id, case.patient_id) for case in cohort.parts[part_name]))
    part, labels, failed = _computed_part(request, head, embedder, cohort, part_name, progress)
    log.info("%s: %d forward passes, %d slices from the cache", part_name, embedder.forward_passes, embedder.cache_hits)
    tables = [path for path in (data, data / "labels.csv", data / "cases.csv") if path.is_file()]
    return _Source(
        head,
        part,
        {**labels, **describe_parts([part], labels)},
        asked,
        data,
        describe_device(device),
        of_images=cohort.kind == "images",
        tables=tuple(tables),
        failures=failed,
        cohort=cohort,
        embedder=embedder,
    )


def _computed_part(
    request: EvaluateRequest, head: Head, embedder: Embedder, cohort: Cohort, name: str, progress: Progress | None
) -> tuple[FeaturePart, dict[str, Any], tuple[Failure, ...]]:
    """(vectors of a part with their labels, what the labels are, cases that could not be read)."""
    pool: Pool = head.pool_mode if head.pool_mode in ("mean", "meanmax") else "none"
    source = find_labels(cohort, request.labels, _sought(request, head, cohort.root), pool)
    cases, sink = cohort.parts[name], RowsInMemory()
    failed = fill(sink, name, cases, cohort, embedder, pool, request.on_error, Steps(progress, len(cases)))
    refuse_empty({name: sink}, {name: failed})
    arrays, values = encode(source, {name: sink.rows})
    unread = [failure for where, found in cohort.invalid.items() if where in (name, ALL) for failure in found]
    failures = [
        *((case_id, hide_home(path), reason, fix) for case_id, path, reason, fix in unread),
        *((bad.case_id, bad.path, bad.reason, bad.fix) for bad in failed),
    ]
    labels = {"targets": list(source.targets), "label_values": values}
    return sink.part(name, arrays[name]), labels, tuple(failures)


def _sought(request: EvaluateRequest, head: Head, data: Path) -> tuple[str, ...]:
    """Label columns to look for in the data; none where the folders of the pictures are the classes."""
    of_folders = head.targets == (CLASS_FOLDER,) and data.is_dir() and not (data / "labels.csv").is_file()
    return () if of_folders and request.labels is None else request.target or head.targets


def _part_name(names: Sequence[str], asked: str, data: Path) -> str:
    """The part to take: as asked, or all cases where no split is known."""
    if asked in names:
        return asked
    if tuple(names) == (ALL,):
        log.warning("No split is known of %s: all cases are evaluated.", hide_home(str(data)))
        return ALL
    raise DataError(
        f"There is no part {asked!r}.",
        where=f"{hide_home(str(data))}: {', '.join(names) or 'no part'}",
        fix="name one of these with --split, or give --splits with the folder of `medssl split`",
        code="part_missing",
    )


def _refuse_other_settings(head: Head, features: FeatureSet, data: Path) -> None:
    """Features that were made with other settings, or by another backbone, than the head was trained on."""
    differ = changed_keys(head.card["preprocessing"], features.info["extraction"])
    if differ:
        own, other = (dict(leaves(settings)) for settings in (head.card["preprocessing"], features.info["extraction"]))
        shown = [f"{key}: head {_short(own.get(key))}, features {_short(other.get(key))}" for key in differ[:8]]
        raise DataError(
            "The features were made in another way than those that the head was trained on.",
            where=f"{hide_home(str(data))}\n" + "\n".join(shown),
            fix="extract them with the backbone and the settings of the head, or name the images with --data",
            code="features_mismatch",
        )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


# --- leaks -----------------------------------------------------------------------------------------------------------


def _refuse_copies(source: _Source) -> None:
    """Refuse training images under other names: their vectors are those of training cases.

    Raises:
        DataError: ``split_leak``.
    """
    head, part = source.head, source.part
    if head.novelty is None or not len(part.rows):
        return
    usual = head.novelty.reference_M
    if not len(usual) or np.median(usual) < 1e3 * _SAME_VECTOR:  # all images look alike to this backbone
        return
    places = _places(part)
    whole = part.rows[0].slice_index is None
    vectors = [
        part.embeddings_RP[rows[0]] if whole else novelty_vector(part.embeddings_RP[rows], head.pool_mode)
        for rows in places.values()
    ]
    if np.shape(vectors)[1:] != head.novelty.mean_P.shape:  # the head says what does not fit
        return
    distances = head.novelty.nearest(np.stack(vectors))
    copies = [case_id for case_id, distance in zip(places, distances, strict=True) if distance < _SAME_VECTOR]
    if copies:
        raise DataError(
            f"The head was trained on the images of {counted(len(copies), 'case')} of part {part.name} already.",
            where=f"their vectors equal those of training cases: {say_some(copies)}",
            fix="leave them out, or ask for --split train by name",
            code="split_leak",
        )


# --- labels ----------------------------------------------------------------------------------------------------------


def _labels(request: EvaluateRequest, source: _Source) -> np.ndarray:
    """Labels of each row as the head counts them: 0 and 1, places of classes, or values; NaN where unknown.

    Raises:
        DataError: The columns that the head was trained on are not there, or hold a value that it does not know.
    """
    head, part, info = source.head, source.part, source.info
    targets = request.target or head.targets
    if len(targets) != len(head.targets):
        raise ConfigError(
            f"The head predicts {counted(len(head.targets), 'column')}, --target names {len(targets)}.",
            where=f"head: {', '.join(head.targets)}; --target {','.join(targets)}",
            fix="name one column for each, in the order of the head",
            code="target_count",
        )
    if request.labels is not None and source.cohort is None:
        cells = read_targets(request.labels, targets, part.rows, of_images=source.of_images, root=None)
        return encode_labels(head.card, cells)
    stored = list(info.get("targets") or ())
    absent = [name for name in targets if name not in stored]
    if absent or part.labels_RC is None:
        raise DataError(
            "The data hold no labels for what the head predicts.",
            where=f"{hide_home(str(source.path))}: sought {say_some(absent or targets)}, "
            f"there {'is' if len(stored) == 1 else 'are'} {say_some(stored) or 'none'}",
            fix="pass --labels CSV, and --target COL where the column has another name",
            code="labels_missing",
        )
    labels_RC = part.labels_RC[:, [stored.index(name) for name in targets]]
    return encode_labels(head.card, _cells(labels_RC, targets, info.get("label_values") or {}))


def _cells(labels_RC: np.ndarray, targets: Sequence[str], values: Mapping[str, Sequence[str]]) -> list[tuple[str, ...]]:
    """Stored labels as the texts that they were."""

    def text(value: float, target: str) -> str:
        if np.isnan(value):
            return ""
        return values[target][int(value)] if target in values else repr(float(value)).removesuffix(".0")

    return [tuple(text(float(v), target) for v, target in zip(row, targets, strict=True)) for row in labels_RC]


def _case_rows(part: FeaturePart) -> dict[str, Row]:
    """One row for each case, without its slice."""
    return {row.case_id: replace(row, slice_index=None) for row in part.rows if row.view == 0}


def _places(part: FeaturePart) -> dict[str, list[int]]:
    """Rows of each case, of its images as they are."""
    places: dict[str, list[int]] = defaultdict(list)
    for number, row in enumerate(part.rows):
        if row.view == 0:
            places[row.case_id].append(number)
    return places


def _case_labels(head: Head, part: FeaturePart, labels_RC: np.ndarray, case_ids: Iterable[str]) -> np.ndarray:
    """Label of each case from those of its rows: present if any slice has it; others must agree."""
    places = _places(part)
    found = []
    for case_id in case_ids:
        rows = labels_RC[places[case_id]]
        known = [column[~np.isnan(column)] for column in rows.T]
        if head.task in ("binary", "multilabel"):
            found.append([column.max() if len(column) else np.nan for column in known])
        else:
            found.append([column[0] if len(column) and (column == column[0]).all() else np.nan for column in known])
    return np.array(found, dtype=np.float64).reshape(len(found), labels_RC.shape[1])


def _slice_table(
    head: Head, part: FeaturePart, labels_RC: np.ndarray, thresholds: np.ndarray | None
) -> PredictionTable | None:
    """Predictions of single slices by a slice head, where slices of one case have different labels."""
    kept = [n for n, row in enumerate(part.rows) if row.view == 0 and row.slice_index is not None]
    places = _places(part).values()
    differ = any(len(np.unique(column[~np.isnan(column)])) > 1 for rows in places for column in labels_RC[rows].T)
    if head.level != "slice" or not kept or not differ:
        return None
    known = [n for n in kept if not np.isnan(labels_RC[n]).all()]
    rows = [part.rows[n] for n in known]
    return prediction_table(
        head.task,
        head.classes,
        [f"{row.case_id}:{row.slice_index}" for row in rows],
        head.slice_values(np.asarray(part.embeddings_RP[known])),
        thresholds=thresholds,
        patient_ids=[row.patient_id for row in rows],
        labels_NC=labels_RC[known],
    )


# --- what is known of the images -------------------------------------------------------------------------------------


def _known(facts: Mapping[str, ImageFacts], table: PredictionTable) -> dict[str, dict[str, str]]:
    """Facts of the images by name, as texts."""
    known: dict[str, dict[str, str]] = {"split": dict(zip(table.case_ids, table.splits, strict=True))}
    for case_id, fact in facts.items():
        told = {
            "missing": ";".join(fact.missing) or "none",
            **dict(zip(("slices", "height", "width"), map(str, fact.shape), strict=True)),
        }
        if fact.spacing_mm is not None:
            names = ("spacing_z_mm", "spacing_y_mm", "spacing_x_mm")
            told |= {name: f"{mm:.4g}" for name, mm in zip(names, fact.spacing_mm, strict=True)}
        for name, text in told.items():
            known.setdefault(name, {})[case_id] = text
    return known


def _sequence_scorer(source: _Source, table: PredictionTable) -> SequenceScorer | None:
    """Predicts the cases again with some of their sequences hidden."""
    cohort, embedder = source.cohort, source.embedder
    if cohort is None or embedder is None or len(embedder.backbone.sequences) < 2:
        return None
    cases = {case.case_id: case for case in cohort.parts[source.part.name]}
    names = embedder.backbone.sequences
    own = {c: tuple(name for name in names if name in cases[c].sequences) for c in table.case_ids}

    def predict(shown: Mapping[str, tuple[str, ...]]) -> np.ndarray:
        return _predicted(source.head, embedder, [cases[case_id] for case_id in shown], list(shown.values()))

    return SequenceScorer(names, own, predict)


def _predicted(head: Head, embedder: Embedder, cases: Sequence[Case], shown: Sequence[tuple[str, ...]]) -> np.ndarray:
    """(N, C) of cases of which only some sequences are shown."""
    values_NC = np.zeros((len(cases), head.outputs))
    for subset in dict.fromkeys(shown):
        places = [n for n, own in enumerate(shown) if own == subset]
        found = vectors_of([cases[n] for n in places], embedder, 1, subset)
        for place, (_, _, vectors) in zip(places, found, strict=True):
            if isinstance(vectors, DataError):
                raise vectors
            values_NC[place] = head.values(vectors.slices_ND)
    return values_NC
