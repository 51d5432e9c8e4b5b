"""The part of ``medssl check-data --task segment`` that differs: which cases there are, and where their label maps lie.

Images are checked as for pretraining; each label map is then held against its image, and all against the classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from medssl_cli.core.case import Case
from medssl_cli.core.errors import ConfigError, DataError
from medssl_cli.data.checks import Finding
from medssl_cli.data.label_checks import LabelRules
from medssl_cli.data.label_maps import LabelSpec
from medssl_cli.data.labelled_cases import (
    described_spec,
    find_label_cases,
    find_label_pictures,
    holds_labelled_pictures,
)
from medssl_cli.data.layouts import LayoutName, select_cases
from medssl_cli.data.manifest import Ids

SEGMENT = "segment"

Splits = Mapping[str, tuple[Path, Ids]]


@dataclass(frozen=True)
class LabelQuestion:
    """What the user asks about label maps.

    Args:
        label: Stem of the label map in a case tree or template; folder of the labels of pictures.
        classes: Names of the structures, as ``label_maps.spec_of_values`` takes them.
        min_pixels: Smallest structure, in pixels of its largest slice.
    """

    label: str = ""
    classes: tuple[str, ...] = ()
    min_pixels: int = 1


@dataclass(frozen=True)
class LabelledSet:
    """The cases of a data set with label maps.

    Args:
        cases: Each with its label map as ``roi`` where it has one; of a case tree without their images.
        patients: Patient by case id, of all cases of the data set.
        spec: Classes of a dataset.json.
        findings: Label maps that cannot be told apart.
        pictures: Whether the cases are pictures.
        unlabelled: Cases of a test set, which may lack label maps.
        question: What is asked.
    """

    cases: list[Case]
    patients: dict[str, str]
    spec: LabelSpec | None
    findings: list[Finding] = field(default_factory=list)
    pictures: bool = False
    unlabelled: frozenset[str] = frozenset()
    question: LabelQuestion = field(default_factory=LabelQuestion)

    def rules_of(self, case: Case) -> LabelRules | None:
        """What is asked of the label map of one of the cases; None where its file is told by a finding already."""
        if case.roi is None and case.case_id in {finding.case_id for finding in self.findings}:
            return None
        return LabelRules(case.roi, self.question.label, self.question.min_pixels, case.case_id in self.unlabelled)


def refuse_idle_options(task: str, question: LabelQuestion, others: Mapping[str, bool]) -> None:
    """Refuse options that mean nothing for a task.

    Args:
        task: As settled.
        question: Options of ``segment`` alone.
        others: Whether an option of other tasks was given, by its spelling.

    Raises:
        ConfigError: With the options.
    """
    own = {"--label": bool(question.label), "--classes": bool(question.classes)}
    idle = [name for name, given in (others if task == SEGMENT else own).items() if given]
    if idle:
        raise ConfigError(
            "An option has no effect for this task.",
            where=f"{', '.join(idle)} with --task {task}",
            fix="name the label map with --label" if task == SEGMENT else "pass --task segment, or leave it out",
            code="option_idle",
        )


def read_labelled_set(
    source: Path, kind: LayoutName, sequences: tuple[str, ...], question: LabelQuestion, splits: Splits, template: str
) -> LabelledSet:
    """Every case of a data set, or those of its splits, with or without a label map.

    Raises:
        DataError: No case, no label map anywhere, a damaged description, unknown ids.
        ConfigError: A layout without label maps, or no stem for those of a case tree.
    """
    spec = described_spec(source) if source.is_dir() else None
    if kind in ("images", "nnunet") and (kind == "images" or holds_labelled_pictures(source)):
        return _pictures(source, spec, question, splits)
    return _volumes(source, kind, sequences, spec, question, splits, template)


def _volumes(
    source: Path,
    kind: LayoutName,
    sequences: tuple[str, ...],
    spec: LabelSpec | None,
    question: LabelQuestion,
    splits: Splits,
    template: str,
) -> LabelledSet:
    faults: list[Finding] = []

    def keep(case_id: str, error: DataError) -> None:
        faults.append(Finding.of(error, case_id, source / case_id))

    wanted = () if kind == "cases" else sequences  # the images of a tree are found one by one, with their own faults
    found = find_label_cases(source, kind, wanted, question.label, template=template, require=False, on_fault=keep)
    if found and not any(case.roi for case in found):
        find_label_cases(source, kind, wanted, question.label, template=template)  # tells what there is instead
    known = {case.case_id for case in found}
    cases = [*found, *(Case(f.case_id, f.case_id) for f in faults if f.case_id not in known)]
    unlabelled = {case.case_id for case in found if case.split == "test" and kind in ("nnunet", "decathlon")}
    patients = {case.case_id: case.patient_id for case in cases}
    if splits:
        cases = _of_splits(cases, kind, splits)
    chosen = {case.case_id for case in cases}
    return LabelledSet(
        cases=sorted(cases, key=lambda case: case.case_id),
        patients=patients,
        spec=spec,
        findings=[finding for finding in faults if finding.case_id in chosen],
        unlabelled=frozenset(unlabelled),
        question=question,
    )


def _of_splits(cases: list[Case], kind: LayoutName, splits: Splits) -> list[Case]:
    """The cases that the splits name; ids without a folder of a tree become cases that the checks find missing."""
    split_of = {case_id: name for name, (_, ids) in splits.items() for case_id in ids.ids}
    if kind == "cases":
        known = {case.case_id for case in cases}
        cases = [*cases, *(Case(name, name) for name in split_of if name not in known)]
    else:
        for path, _ in splits.values():
            select_cases(cases, path)  # refuses unknown ids
    return [replace(case, split=split_of[case.case_id]) for case in cases if case.case_id in split_of]


def _pictures(source: Path, spec: LabelSpec | None, question: LabelQuestion, splits: Splits) -> LabelledSet:
    every = find_label_pictures(source, label=question.label, require=False)
    cases = every
    if splits:
        cases = [
            case
            for name, (path, _) in splits.items()
            for case in find_label_pictures(source, label=question.label, split_csv=path, split=name, require=False)
        ]
    return LabelledSet(
        cases=cases,
        patients={case.case_id: case.patient_id for case in (*every, *cases)},
        spec=spec,
        pictures=True,
        unlabelled=frozenset(case.case_id for case in every if case.split == "test"),
        question=question,
    )
