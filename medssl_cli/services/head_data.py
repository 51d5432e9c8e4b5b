"""Features and labels of the training and validation parts; the test part is never opened.

Features come from a folder of `medssl extract`, or are made of raw data with a backbone. Where no validation part is
named, whole patients are held back, evenly by class.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from medssl_cli.core.errors import ConfigError, DataError
from medssl_cli.core.run import hide_home, seed_for
from medssl_cli.core.wording import counted
from medssl_cli.data.feature_cache import FeatureCache
from medssl_cli.data.feature_store import ALL, FeaturePart, FeatureSet, is_features, read_features
from medssl_cli.data.labels import encode_columns, read_patients, read_targets
from medssl_cli.data.manifest import say_some, split_digest
from medssl_cli.data.split import Item, split_items
from medssl_cli.data.store import default_cache
from medssl_cli.services.backbone import open_backbone
from medssl_cli.services.devices import resolve_device
from medssl_cli.services.embedding import Embedder
from medssl_cli.services.extract_cohort import asked_cohort
from medssl_cli.services.extract_features import (
    Pool,
    check_has_labels,
    check_views,
    features_of,
    find_labels,
)
from medssl_cli.services.head_config import HeadConfig, Task
from medssl_cli.services.head_request import TrainHeadRequest
from medssl_cli.services.lookup import find_backbone

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
Failure = tuple[str, str, str, str]
"""(case_id, path, reason, fix)."""
_USED = ("train", "val", ALL)


@dataclass(frozen=True)
class Labelled:
    """A part with the label columns that were asked for.

    Args:
        part: Vectors, ids and facts.
        labels_RT: One row for each vector, NaN where unknown.
    """

    part: FeaturePart
    labels_RT: np.ndarray

    def chosen(self, case_ids: set[str], name: str) -> Labelled:
        """The rows of some of the cases, as a part of another name."""
        rows = [number for number, row in enumerate(self.part.rows) if row.case_id in case_ids]
        part = FeaturePart(
            name,
            np.asarray(self.part.embeddings_RP[rows]),
            None,
            tuple(self.part.rows[number] for number in rows),
            {case_id: facts for case_id, facts in self.part.facts.items() if case_id in case_ids},
        )
        return Labelled(part, self.labels_RT[rows])


@dataclass(frozen=True)
class HeadData:
    """What a head is trained and judged on.

    Args:
        features: Where it comes from.
        train: Training part.
        val: Validation part; None where none was wanted.
        names: Label columns.
        label_values: Texts by number of the columns that are classes.
        is_made: The features were made of raw data, and are to be kept with the run.
        split: How the parts came about, in words.
        has_test: The data hold a test part, which is not looked at.
        failures: Cases of raw data that could not be read.
    """

    features: FeatureSet
    train: Labelled
    val: Labelled | None
    names: tuple[str, ...]
    label_values: Mapping[str, Sequence[str]]
    is_made: bool
    split: str
    has_test: bool
    failures: tuple[Failure, ...] = ()

    @property
    def info(self) -> dict[str, Any]:
        """``features.json``."""
        return self.features.info

    @property
    def by_slice(self) -> bool:
        """Whether a row is a slice."""
        return str(self.info["pool_mode"]) == "none"

    def split_digests(self) -> dict[str, str]:
        """Of the cases of each part."""
        parts = {"train": self.train, "val": self.val}
        return {name: split_digest(found.part.case_ids) for name, found in parts.items() if found is not None}


def read_head_data(
    request: TrainHeadRequest, config: HeadConfig, task: Task, progress: Progress | None = None
) -> HeadData:
    """Features and labels for one task.

    Raises:
        ConfigError: Options without effect, or no model for raw data.
        DataError: No features, no labels, or too few patients to hold some back.
    """
    is_made = not is_features(request.data)
    failures: tuple[Failure, ...] = ()
    if is_made:
        features, failures, has_test = _made_features(request, config, task, progress)
    else:
        features = _stored_features(request, config)
        has_test = "test" in features.names
    _refuse_no_training(features.names, request.data)
    if "train" in features.names:
        parts: dict[str, FeaturePart] = {n: features.part(n) for n in ("train", "val") if n in features.names}
    else:
        parts = {"train": features.part(ALL)}
    labelled, targets, values = _labelled(parts, features.info, request, is_made=is_made)
    train, val, split = with_validation(labelled["train"], labelled.get("val"), config, task, targets)
    return HeadData(features, train, val, targets, values, is_made, split, has_test, failures)


def _refuse_no_training(names: Sequence[str], data: Path) -> None:
    if not {"train", ALL} & set(names):
        raise DataError(
            "There is no training part.",
            where=f"{hide_home(str(data))}: {', '.join(names) or 'no part'}",
            fix="extract with a split that has train cases, or without any",
            code="part_missing",
        )


# --- features --------------------------------------------------------------------------------------------------------


def _stored_features(request: TrainHeadRequest, config: HeadConfig) -> FeatureSet:
    given = {
        "--model": request.model,
        "--splits": request.splits,
        "--split-csv": request.split_csv,
        "--sequence": request.sequence,
        "--cache": request.cache,
        "--on-error": request.on_error != "stop",
        "extract.*": "extract" in config.model_fields_set,
    }
    needless = [name for name, value in given.items() if value]
    if needless:
        raise ConfigError(
            "Options about images have no effect on stored features.",
            where=f"{', '.join(needless)}; {hide_home(str(request.data))} holds features",
            fix="leave them out, or name the images instead of the features",
            code="flags_without_effect",
        )
    return read_features(request.data)


def _made_features(
    request: TrainHeadRequest, config: HeadConfig, task: Task, progress: Progress | None
) -> tuple[FeatureSet, tuple[Failure, ...], bool]:
    """Vectors of raw data, in memory, the cases that could not be read, and whether there is a test part.

    That part is not looked at.
    """
    if not request.data.exists():
        raise DataError(
            "There are no features and no data of this name.",
            where=hide_home(str(request.data)),
            fix="name the --out folder of `medssl extract`, or a folder of images with --model RUN",
            code="data_missing",
        )
    if request.data.is_dir() and all(entry.name.startswith(".") for entry in request.data.iterdir()):
        raise ConfigError(
            "The folder holds neither features nor images.",
            where=hide_home(str(request.data)),
            fix="an extraction that failed leaves nothing behind: run `medssl extract` again and see what it says",
            code="data_empty",
        )
    log.info("%s holds no features: vectors are made of it as raw data", hide_home(str(request.data)))
    backbone = open_backbone(find_backbone(request.model), resolve_device(request.device))
    cohort = asked_cohort(request.data, backbone, request)
    _refuse_no_training(tuple(cohort.parts), request.data)
    used = {name: cases for name, cases in cohort.parts.items() if name in _USED}
    invalid = {name: found for name, found in cohort.invalid.items() if name in _USED}
    embedder = Embedder(backbone, config.extract, FeatureCache(default_cache(request.cache)))
    by_slice = config.kind(task) == "attention_mil" or config.level == "slice"
    pool: Pool = "none" if by_slice else "meanmax" if config.pool == "meanmax" else "mean"
    seen = replace(cohort, parts=used, invalid=invalid)
    check_views(seen, embedder)
    source = find_labels(seen, request.labels, request.target, pool)
    check_has_labels(source, seen)
    features, failed = features_of(
        seen, embedder, pool=pool, source=source, on_error=request.on_error, progress=progress
    )
    failures = tuple((bad.case_id, bad.path, bad.reason, bad.fix) for bad in failed)
    return features, failures, "test" in cohort.parts


# --- labels ----------------------------------------------------------------------------------------------------------


def _labelled(
    parts: Mapping[str, FeaturePart], info: Mapping[str, Any], request: TrainHeadRequest, *, is_made: bool
) -> tuple[dict[str, Labelled], tuple[str, ...], dict[str, list[str]]]:
    """Each part with its labels, the names of the columns, and the texts of those that are classes."""
    if request.labels is not None and not is_made:
        return _from_table(parts, request.labels, request.target)
    stored = [str(name) for name in info.get("targets") or ()]
    asked = request.target or tuple(stored)
    absent = [name for name in asked if name not in stored]
    if absent or not asked or any(part.labels_RC is None for part in parts.values()):
        raise DataError(
            "The features do not hold these labels." if absent else "The features hold no labels.",
            where=f"{hide_home(str(request.data))}: sought {say_some(absent) if absent else 'any'}, "
            f"there are: {', '.join(stored) or 'none'}",
            fix="pass --labels CSV --target COL, or name the columns that are there with --target",
            code="labels_missing",
        )
    columns = [stored.index(name) for name in asked]
    known = info.get("label_values") or {}
    values = {name: list(known[name]) for name in asked if name in known}
    found = {
        name: Labelled(part, np.asarray(part.labels_RC, dtype=np.float64)[:, columns]) for name, part in parts.items()
    }
    return found, asked, values


def _from_table(
    parts: Mapping[str, FeaturePart], table: Path, targets: tuple[str, ...]
) -> tuple[dict[str, Labelled], tuple[str, ...], dict[str, list[str]]]:
    """Labels of all parts read together, so that a column means the same in each."""
    rows = [row for part in parts.values() for row in part.rows]
    facts = [fact for part in parts.values() for fact in part.facts.values()]
    of_images = bool(facts) and all(fact.spacing_mm is None for fact in facts)
    cells = read_targets(table, targets, rows, of_images=of_images, root=None)
    labels_RT, values = encode_columns(cells, targets)
    owners = read_patients(table, rows, of_images=of_images, root=None)
    found, start = {}, 0
    for name, part in parts.items():
        part = replace(part, rows=tuple(replace(r, patient_id=owners.get(r.case_id, r.patient_id)) for r in part.rows))
        found[name] = Labelled(part, labels_RT[start : start + len(part.rows)].astype(np.float64))
        start += len(part.rows)
    return found, targets, values


# --- parts -----------------------------------------------------------------------------------------------------------


def with_validation(
    train: Labelled, val: Labelled | None, config: HeadConfig, task: Task, names: Sequence[str]
) -> tuple[Labelled, Labelled | None, str]:
    """Training and validation part, and how they came about."""
    if val is not None:
        if "val_ratio" in config.model_fields_set:
            raise ConfigError(
                "val_ratio has no effect where the data name a validation part.",
                where=f"val_ratio={config.val_ratio:g}; the part val holds {counted(len(val.part.case_ids), 'case')}",
                fix="leave it out",
                code="config_invalid",
            )
        return train, val, "as the data name them"
    if config.val_ratio == 0:
        log.warning("No validation cases: nothing is chosen or calibrated, and thresholds are 0.5")
        return replace(train, part=replace(train.part, name="train")), None, "all cases are for training"
    items = items_of(train, task, names)
    if not items:
        raise DataError(
            "No case has a label.",
            where=", ".join(names),
            fix="pass --labels CSV --target COL, or check the ids there",
            code="labels_missing",
        )
    ratios = (1 - config.val_ratio, config.val_ratio, 0.0)
    split = split_items(items, ratios, seed_for(config.seed, "head split") % 2**32)
    held = set(split["val"])
    kept = {row.case_id for row in train.part.rows} - held
    log.info(
        "No validation part is named: %s of %d are held back (val_ratio %g, whole patients, evenly by class)",
        counted(len(held), "case"),
        len(items),
        config.val_ratio,
    )
    words = f"{config.val_ratio:g} of the patients held back for validation, by class"
    return train.chosen(kept, "train"), train.chosen(held, "val"), words


def items_of(labelled: Labelled, task: Task, names: Sequence[str]) -> list[Item]:
    """The cases with a label, with their patients and classes, for a division by whole patients."""
    labels: dict[str, np.ndarray] = {}
    groups: dict[str, str] = {}
    for row, label_T in zip(labelled.part.rows, labelled.labels_RT, strict=True):
        if not np.isnan(label_T).all():
            before = labels.get(row.case_id, np.full(len(label_T), -np.inf))
            labels[row.case_id] = np.fmax(before, label_T)
            groups[row.case_id] = row.patient_id or row.study_uid or row.case_id
    return [Item(case_id, groups[case_id], _strata(label_T, task, names)) for case_id, label_T in labels.items()]


def _strata(label_T: np.ndarray, task: Task, names: Sequence[str]) -> tuple[str, ...]:
    known = [(name, value) for name, value in zip(names, label_T, strict=True) if np.isfinite(value)]
    if task == "regression":
        return ()
    if task == "multilabel":
        return tuple(name for name, value in known if value > 0) or ("none",)
    return tuple(f"{name}={value:g}" for name, value in known)
