"""Which labelled cases the teacher is scored on while it trains: parts, classes, and the gates against leaks.

Labels never reach the training. A labelled case may lie in the pretraining data, for nothing of its label is seen
there; how many do is counted and said.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from medssl_cli.core.case import Case
from medssl_cli.core.config import Config
from medssl_cli.core.errors import ConfigError, DataError
from medssl_cli.core.run import digest_of, seed_for
from medssl_cli.core.wording import counted
from medssl_cli.data.copies import refuse_copies
from medssl_cli.data.datasets import DataConfig
from medssl_cli.data.manifest import (
    check_no_overlap,
    match_image_ids,
    parse_dataset_string,
    read_labels,
    read_table,
    read_table_cases,
    say_some,
)
from medssl_cli.data.split import Item, split_items
from medssl_cli.metrics.classification import DEFINITIONS, MULTILABEL
from medssl_cli.services.training_data import Kind, TrainingData, read_training_data

log = logging.getLogger(__name__)

PARTS = ("train", "val", "test")
AUTOMATIC_SPLIT = (0.7, 0.3, 0.0)
"""Train, val and test where no lists are given."""
SPLIT_SEED = 42
"""The same for every run, so that scores of two runs are of the same cases."""

Probe = Literal["knn", "linear"]


class EvaluationConfig(Config):
    """The teacher scored on labelled cases while it trains; names as in DINOv2 where it has one."""

    eval_period_iterations: NonNegativeInt = 0
    """Steps between scores, each of which has a checkpoint too; 0 turns them off."""
    train_dataset_path: str = ""
    """Dataset string of the cases that the probes are fitted to, e.g. ProstateSSL:split=TRAIN:root=DIR:split_csv=FILE;
    wins over root and train_split_csv."""
    val_dataset_path: str = ""
    """Dataset string of the cases that scores during the run are of."""
    test_dataset_path: str = ""
    """Dataset string of the cases that are scored once, at the end."""
    metric_types: tuple[str, ...] = ("mcc",)
    """Metrics to be logged; the first one chooses C and the best teacher. Results hold all that apply."""
    root: str = ""
    """Folder of the labelled cases; data.root if not given."""
    labels: str = ""
    """CSV with a column of ids (or image, path, file) and one of labels; labels.csv in the root if not given. Pictures
    in folders train/CLASS need none."""
    target: str = ""
    """Column of the labels."""
    train_split_csv: str = ""
    """List of the cases that the probes are fitted to."""
    val_split_csv: str = ""
    """List of the cases that scores during the run are of."""
    test_split_csv: str = ""
    """List of the cases that are scored once, at the end."""
    group_by: str = ""
    """Column of the labels CSV that names the patient; the patient of the case tree if not given."""
    probes: tuple[Probe, ...] = ("knn", "linear")
    """Nearest neighbours, logistic regression, or both."""
    knn_k: PositiveInt = 20
    """Neighbours that vote."""
    c_values: int = Field(default=45, ge=1, le=45)
    """Values of C, log-spaced from 1e-6 to 1e5, among which logistic regression chooses; 1 takes C = 1."""
    tokens: Literal["cls", "mean", "cls_mean"] = "cls"
    """What the probes see of an image: the cls token, the mean patch token, or both end to end."""
    slices: PositiveInt = 1
    """Axial slices of a volume: 1 takes the one with most region of interest, or the middle one; more are evenly spaced
    and their embeddings averaged."""
    max_side: PositiveInt = 518
    """Longer side in pixels of a picture as the network sees it, as in `medssl infer`."""
    batch_size: PositiveInt = 32
    """Images computed together."""
    missing_sequences: bool = False
    """Also score with sequences left out: every subset, and one dropped at random for each case."""
    max_cases: NonNegativeInt = 0
    """Most cases of each part, chosen by their ids; 0 takes all."""

    @field_validator("metric_types", "probes", mode="before")
    @classmethod
    def _split_names(cls, value: Any) -> Any:
        return [name.strip() for name in value.split(",")] if isinstance(value, str) else value

    @field_validator("metric_types")
    @classmethod
    def _known_metrics(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        several = [name for name in names if name in MULTILABEL]
        if several:
            raise ValueError(f"{several[0]} is for several labels a case; here each case has one class")
        unknown = [name for name in names if name not in DEFINITIONS]
        if unknown or not names or len(set(names)) < len(names):
            raise ValueError(f"one or more different names of: {', '.join(DEFINITIONS)}")
        return names

    @field_validator("probes")
    @classmethod
    def _some_probe(cls, names: tuple[Probe, ...]) -> tuple[Probe, ...]:
        if not names or len(set(names)) < len(names):
            raise ValueError("knn, linear, or both")
        return names

    @model_validator(mode="after")
    def _lists_in_pairs(self) -> EvaluationConfig:
        train, val = (bool(self.list_of(part)) for part in ("train", "val"))
        if train != val:
            raise ValueError(
                f"only {'train' if train else 'val'} cases are named: give both train and val, or neither for an "
                "automatic split"
            )
        if self.list_of("test") and not train:
            raise ValueError("test cases are named without train and val cases")
        return self

    def list_of(self, part: str) -> str:
        """The dataset string or list that names the cases of a part; empty if none does."""
        return str(getattr(self, f"{part}_dataset_path") or getattr(self, f"{part}_split_csv"))

    @property
    def is_on(self) -> bool:
        """Whether anything is scored: a period is set and labelled cases are named."""
        return self.eval_period_iterations > 0 and self.names_cases

    @property
    def names_cases(self) -> bool:
        """Whether labels are to be found: a CSV, a column, a folder or lists are named."""
        return any((self.labels, self.target, self.root, self.train_dataset_path, self.train_split_csv))

    @property
    def deciding_probe(self) -> Probe:
        """The probe that chooses the best teacher."""
        return "linear" if "linear" in self.probes else self.probes[0]

    def warnings(self) -> list[str]:
        """Settings that have no effect, in words."""
        if self.eval_period_iterations and not self.names_cases:
            return ["No effect: evaluation.eval_period_iterations: no labelled cases are named (evaluation.labels)."]
        if self.names_cases and not self.eval_period_iterations:
            return ["No effect: labelled cases are named, but evaluation.eval_period_iterations is 0."]
        return []


@dataclass(frozen=True)
class LabelledData:
    """Labelled cases in parts.

    Args:
        parts: ``train``, ``val`` and perhaps ``test``; each case with its label as text.
        classes: Labels of the training part in order; the place of a label is its class.
        kind: ``volumes`` or ``images``.
        config: Of the data, with what they tell themselves.
        division: How the parts were made, in words.
        group_level: What was kept together: a column, ``patient_id`` or ``case_id``.
        digest: SHA-256 over ids and labels of all parts.
        held: Ids of the training cases on which C is chosen, a tenth of them.
    """

    parts: Mapping[str, list[Case]]
    classes: tuple[str, ...]
    kind: Kind
    config: DataConfig
    division: str
    group_level: str
    digest: str
    held: frozenset[str]

    @property
    def cases(self) -> list[Case]:
        """Of all parts."""
        return [case for cases in self.parts.values() for case in cases]

    def counts(self) -> dict[str, dict[str, int]]:
        """Cases of each class in each part."""
        found = {name: Counter(case.label for case in cases) for name, cases in self.parts.items()}
        return {name: {label: counts[label] for label in self.classes} for name, counts in found.items()}


def read_labelled_data(config: EvaluationConfig, data: DataConfig) -> LabelledData:
    """The cases to be scored; nothing but names, tables and headers is read.

    Args:
        config: Where labels and lists are.
        data: Of the run: its root, sequences and region of interest.

    Raises:
        ConfigError: No root, or no column of labels is named.
        DataError: Missing cases, fewer than two classes, a class unknown to the training part, or a leak between parts.
    """
    read = _read_parts(config, data)
    _same_make(read)
    labels = _read_all_labels(config, read)
    cases = {part: _with_labels(part, found, labels) for part, found in read.items()}
    level = config.group_by or _level(cases)
    if "val" in cases:
        parts, division = cases, "as listed" if config.list_of("train") else "by the folders of the tree"
    else:
        parts, division = _divided(cases["train"], level)
    parts = {name: _some(cases, config.max_cases) for name, cases in parts.items()}
    check_no_overlap(parts)
    refuse_copies(parts)
    classes = _classes(parts)
    digest = digest_of("labelled", {name: sorted((c.case_id, c.label) for c in part) for name, part in parts.items()})
    train = read["train"]
    found = LabelledData(parts, classes, train.kind, train.config, division, level, digest, _held(parts["train"]))
    _tell(found)
    return found


def label_cases(labels: str, target: str, found: TrainingData) -> dict[str, str]:
    """Label by case id of those cases of a run that have one.

    Args:
        labels: CSV; ``labels.csv`` in the root, or the labels that the layout brings, if empty.
        target: Its column.
        found: Cases of the run.

    Raises:
        ConfigError, DataError: As ``read_labelled_data``.
    """
    section = "semi_supervised"
    read = _read_all_labels(EvaluationConfig(labels=labels, target=target), {"train": found}, section)
    return {case.case_id: case.label for case in _with_labels("train", found, read, section)}


def count_seen(labelled: Iterable[Case], pretraining: Iterable[Case]) -> int:
    """How many labelled cases share their patient or a file with the pretraining data."""
    patients, files = set(), set()
    for case in pretraining:
        patients.add(case.patient_id)
        files |= {sequence.path.resolve() for sequence in case.sequences.values()}
    return sum(
        case.patient_id in patients or any(s.path.resolve() in files for s in case.sequences.values())
        for case in labelled
    )


# --- where they are --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """One part: what of the run's data settings differs for it."""

    root: str
    split_csv: str | None = None
    split: str = "TRAIN"
    layout: str = ""

    def read(self, data: DataConfig) -> TrainingData:
        """The cases of the part, with or without label."""
        update: dict[str, Any] = {"root": self.root, "split_csv": self.split_csv, "split": self.split}
        if self.root != data.root or self.layout:  # another tree may be named by other rules
            update |= {"layout": self.layout or "auto", "template": "", "modality": ""}
        return read_training_data(data.model_copy(update=update))


def _read_parts(config: EvaluationConfig, data: DataConfig) -> dict[str, TrainingData]:
    """The parts as listed, or those of the folders train, val and test, or all cases as ``train``."""
    root = config.root or data.root
    listed = {part: config.list_of(part) for part in PARTS if config.list_of(part)}
    if listed:
        return {part: _source_of(config, part, root).read(data) for part in listed}
    read = {"train": _Source(_given(root)).read(data)}
    if any(case.split for case in read["train"].cases):
        for part in ("val", "test"):
            try:
                read[part] = _Source(root, split=part.upper()).read(data)
            except DataError as error:
                if error.code != "split_empty":
                    raise
    return read if "val" in read else {"train": read["train"]}


def _given(root: str) -> str:
    if not root:
        raise ConfigError(
            "No labelled data was named.",
            where="evaluation.root",
            fix="set evaluation.root, or pass --data ROOT",
            code="data_missing",
        )
    return root


def _source_of(config: EvaluationConfig, part: str, root: str) -> _Source:
    """A part by its dataset string, of which split, root and split_csv count, or by its list.

    Raises:
        ConfigError: The string cannot be read, or holds other keys.
    """
    text = getattr(config, f"{part}_dataset_path")
    if not text:
        return _Source(_given(root), getattr(config, f"{part}_split_csv"))
    name, _, rest = text.partition(":")
    default = "" if any(piece.strip().startswith("split=") for piece in rest.split(":")) else f":split={part.upper()}"
    values = parse_dataset_string(f"{name}{default}:{rest}")
    other = sorted(values.keys() - {"split", "root", "split_csv", "layout"})
    if other:
        raise ConfigError(
            "A dataset string for the evaluation has keys without effect.",
            where=f"evaluation.{part}_dataset_path: {', '.join(other)}",
            fix="leave them out: sequences and slices are those of the run",
            code="config_without_effect",
        )
    return _Source(values["root"], values.get("split_csv"), values["split"], values.get("layout", ""))


def _same_make(read: Mapping[str, TrainingData]) -> None:
    first = read["train"]
    for part, other in read.items():
        if (other.kind, other.config.mri_sequences) != (first.kind, first.config.mri_sequences):
            raise DataError(
                f"The train and {part} cases of the evaluation are not of one make.",
                where=f"train: {first.kind} of {', '.join(first.config.mri_sequences)}; "
                f"{part}: {other.kind} of {', '.join(other.config.mri_sequences)}",
                fix="name cases of one layout and the same sequences",
                code="parts_differ",
            )


# --- labels ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Labels:
    """Label and group by id; both empty where the tree itself tells the classes."""

    by_id: Mapping[str, str]
    group_by_id: Mapping[str, str]


def _read_all_labels(
    config: EvaluationConfig, read: Mapping[str, TrainingData], section: str = "evaluation"
) -> _Labels:
    """The labels that a CSV holds; ``section`` of the configuration names it.

    Raises:
        ConfigError: No column of it is named.
        DataError: The CSV or a column of it is missing, one id has two labels, a row has no group.
    """
    train = read["train"]
    root, images = Path(train.config.root), train.kind == "images"
    path = Path(config.labels) if config.labels else (root if root.is_file() else root / "labels.csv")
    if not config.labels and not (config.target and path.is_file()) and any(case.label for case in train.cases):
        return _Labels({}, {})  # of class folders, or of a layout that brings its labels
    if not config.target:
        columns = ", ".join(read_table(path).header) if path.is_file() else "no such file"
        raise ConfigError(
            "The column of the labels is not named.",
            where=f"{section}.target; {path}: {columns}",
            fix=f"set {section}.target to one of the columns",
            code="target_missing",
        )

    def column(name: str) -> dict[str, str]:
        if path == root:  # the series table itself
            return {case.case_id: case.label for case in read_table_cases(path, target=name)}
        return read_labels(path, name, of_images=images)

    groups = column(config.group_by) if config.group_by else {}
    nameless = [name for name, group in groups.items() if not group]
    if nameless:
        raise DataError(
            f"{counted(len(nameless), 'row')} of the labels have no {config.group_by}.",
            where=f"{path}: {say_some(nameless)}",
            fix="fill the column, or leave evaluation.group_by out",
            code="group_unknown",
        )
    by_id = column(config.target)
    log.info("%s: labels are the column %s of %s", section, config.target, path)
    return _Labels(by_id, groups)


def _with_labels(part: str, found: TrainingData, labels: _Labels, section: str = "evaluation") -> list[Case]:
    """The cases that have a label; others are left out, and counted where they are scored.

    Raises:
        DataError: None has one.
    """
    names = _names_in_table(found, labels.by_id)
    groups = _names_in_table(found, labels.group_by_id)
    cases = []
    for case in found.cases:
        label = labels.by_id.get(names.get(case.case_id, ""), "") if labels.by_id else case.label
        group = labels.group_by_id.get(groups.get(case.case_id, ""), case.patient_id)
        cases.append(replace(case, label=label, patient_id=group))
    left = [case.case_id for case in cases if not case.label]
    if len(left) == len(cases):
        raise DataError(
            f"No case of the {part} part has a label.",
            where=f"{found.config.split_csv or found.config.root}: {counted(len(cases), 'case')}, e.g. "
            f"{say_some(left, 3)}" + (f"; the labels name {say_some(labels.by_id, 3)}" if labels.by_id else ""),
            fix=f"the ids of the labels must equal the names of the cases; see {section}.labels and {section}.target",
            code="labels_missing",
        )
    if left and section == "evaluation":
        log.warning("Evaluation: %s of the %s part without label left out: %s", counted(len(left), "case"), part,
                    say_some(left))  # fmt: skip
    return [case for case in cases if case.label]


def _names_in_table(found: TrainingData, given: Mapping[str, str]) -> dict[str, str]:
    """Id in the table by case id: a table may name cases or their patients, and pictures in several spellings."""
    if found.kind == "images":
        return match_image_ids(Path(found.config.root), given, [case.case_id for case in found.cases])
    known = {}
    for case in found.cases:
        name = next((name for name in (case.case_id, case.patient_id) if name in given), None)
        if name is not None:
            known[case.case_id] = name
    return known


# --- parts -----------------------------------------------------------------------------------------------------------


def _level(parts: Mapping[str, list[Case]]) -> str:
    cases = [case for part in parts.values() for case in part]
    return "patient_id" if any(case.patient_id != case.case_id for case in cases) else "case_id"


def _divided(cases: list[Case], level: str) -> tuple[dict[str, list[Case]], str]:
    """70 % to fit to and 30 % to score, whole patients, classes spread evenly."""
    ids = split_items(_items(cases), AUTOMATIC_SPLIT, SPLIT_SEED)
    parts = {name: [case for case in cases if case.case_id in set(ids[name])] for name in ("train", "val")}
    return parts, f"70 to 30 by {level}, seed {SPLIT_SEED}"


def _held(cases: list[Case]) -> frozenset[str]:
    """A tenth of the training cases, whole patients, classes spread evenly; none if there is one patient only."""
    if len({case.patient_id for case in cases}) < 2:
        return frozenset()
    return frozenset(split_items(_items(cases), (0.9, 0.1, 0.0), SPLIT_SEED)["val"])


def _items(cases: list[Case]) -> list[Item]:
    return [Item(case.case_id, case.patient_id, (case.label,)) for case in cases]


def _some(cases: list[Case], most: int) -> list[Case]:
    """At most so many cases of each part: which ones follows from their ids, so that runs agree."""
    if not most or len(cases) <= most:
        return cases
    chosen = sorted(cases, key=lambda case: seed_for(SPLIT_SEED, "max_cases", case.case_id))[:most]
    return sorted(chosen, key=lambda case: case.case_id)


def _classes(parts: Mapping[str, list[Case]]) -> tuple[str, ...]:
    found = {case.label for case in parts["train"]}
    if len(found) < 2:
        raise DataError(
            "The labelled training cases are all of one class.",
            where=f"{counted(len(parts['train']), 'case')} of class {next(iter(found))!r}",
            fix="name another evaluation.target, or lists with cases of two classes",
            code="classes_missing",
        )
    for name, cases in parts.items():
        unknown = sorted({case.label for case in cases} - found)
        if unknown:
            raise DataError(
                f"The {name} cases have classes that no training case has.",
                where=f"{say_some(unknown)}; known: {', '.join(sorted(found))}",
                fix="correct the labels, or divide the cases so that every class can be learned",
                code="label_unknown",
            )
    return tuple(sorted(found, key=_in_order))


def _in_order(label: str) -> tuple[bool, float, str]:
    """Numbers by size, then texts by letter."""
    try:
        return False, float(label), label
    except ValueError:
        return True, 0.0, label


def _tell(data: LabelledData) -> None:
    counts = data.counts()
    shown = "; ".join(
        f"{name} {sum(of.values())} ({', '.join(f'{label}: {n}' for label, n in of.items())})"
        for name, of in counts.items()
    )
    log.info("Evaluation: %s; parts %s", shown, data.division)
