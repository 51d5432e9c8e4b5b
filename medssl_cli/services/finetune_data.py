"""What a backbone is fine-tuned on: cases with labels in a training and a validation part; the test part stays shut.

Labels, parts and outputs come about as for a head on features, so that the two can be compared.

Letters: R rows (here one a case), T label columns, B cases, L columns of encoded labels.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from medssl_cli.core.case import Case
from medssl_cli.core.errors import ConfigError, DataError
from medssl_cli.core.run import hide_home
from medssl_cli.core.wording import counted
from medssl_cli.data.feature_store import ALL, FeaturePart, Row, is_features
from medssl_cli.data.manifest import split_digest
from medssl_cli.services.backbone import Backbone
from medssl_cli.services.embedding import Embedder
from medssl_cli.services.extract_cohort import Cohort, asked_cohort
from medssl_cli.services.extract_features import check_has_labels, encode, find_labels
from medssl_cli.services.finetune_config import FinetuneConfig, settle
from medssl_cli.services.finetune_training import Labelled as LabelledCases
from medssl_cli.services.finetune_views import CaseImages, in_order
from medssl_cli.services.head import PoolMode
from medssl_cli.services.head_config import Task
from medssl_cli.services.head_data import Labelled, with_validation
from medssl_cli.services.head_examples import Examples, build_examples, refuse_leak
from medssl_cli.services.head_request import TrainHeadRequest
from medssl_cli.services.head_targets import Targets, check_consistent, prepare_targets
from medssl_cli.services.train_head import few_shot
from medssl_cli.services.training_data import Failure

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FinetuneJob:
    """All that a backbone and its head are trained on.

    Args:
        cohort: Where the cases come from.
        embedder: The backbone, and how cases become slice vectors.
        images: The cases, decoded.
        config: Settings.
        targets: Outputs of the head.
        pool_mode: How slice vectors become one.
        train, val: Ids, patients and labels of the cases; None without validation.
        split: How the parts came about, in words.
        split_digests: Of the cases of each part.
        failures: Cases that were left out.
        inconsistent: Cases whose label ``any`` contradicts the others.
    """

    cohort: Cohort
    embedder: Embedder
    images: CaseImages
    config: FinetuneConfig
    targets: Targets
    pool_mode: PoolMode
    train: Examples
    val: Examples | None
    split: str
    split_digests: dict[str, str]
    failures: list[Failure]
    inconsistent: int

    @property
    def kind(self) -> str:
        """Of the head."""
        return self.config.kind(self.targets.task)

    @property
    def pictures(self) -> bool:
        """The cases are pictures."""
        return self.cohort.kind == "images"

    def cases_of(self, examples: Examples) -> LabelledCases:
        """The cases themselves, with their labels."""
        known = {case.case_id: case for case in self.cohort.cases}
        return LabelledCases(tuple(known[case_id] for case_id in examples.case_ids), examples.labels_BL)


def read_job(request: TrainHeadRequest, backbone: Backbone, config: FinetuneConfig, task: Task) -> FinetuneJob:
    """Cases, labels and parts; every image is looked at once, before the first step.

    Raises:
        ConfigError: Features instead of images, or keys that do not fit the data.
        DataError: Bad cases (with ``on_error: stop``), missing or contradicting labels, or patients on both sides.
    """
    _refuse_features(request)
    cohort = asked_cohort(request.data, backbone, request)
    config = settle(config, backbone, pictures=cohort.kind == "images")
    embedder = Embedder(backbone, config.extract)
    parts, names, values = _labelled(request, cohort)
    train, val, split = with_validation(parts["train"], parts.get("val"), config, task, names)
    pool_mode: PoolMode = "attention" if config.kind(task) == "attention_mil" else config.pool or "mean"
    targets = prepare_targets(task, names, train.labels_RT, values, positive=config.positive)
    train_examples, val_examples = (None if p is None else _examples(p, targets, values) for p in (train, val))
    assert train_examples is not None
    refuse_leak(train_examples, val_examples)
    labels = [examples.labels_BL for examples in (train_examples, val_examples) if examples is not None]
    inconsistent = check_consistent(targets, np.concatenate(labels))
    used = few_shot(train_examples, targets, config, 0)
    if used is not train_examples and task == "regression":  # the scale of labels that are not used is not known
        targets = prepare_targets("regression", targets.names, used.labels_BL)
    digests = {"train": train, **({} if val is None else {"val": val})}
    job = FinetuneJob(
        cohort=cohort,
        embedder=embedder,
        images=CaseImages(embedder, config.cache_gb),
        config=config,
        targets=targets,
        pool_mode=pool_mode,
        train=used,
        val=val_examples,
        split=split,
        split_digests={name: split_digest(part.part.case_ids) for name, part in digests.items()},
        failures=list(cohort.unreadable),
        inconsistent=inconsistent,
    )
    return _looked_at(job, skip=request.on_error == "skip")


def _refuse_features(request: TrainHeadRequest) -> None:
    if request.data.exists() and not is_features(request.data):
        return
    where = hide_home(str(request.data))
    fix = "name the images: a case tree, an image tree or a table, with --model RUN"
    if not request.data.exists():
        raise DataError("There are no data of this name.", where=where, fix=fix, code="data_missing")
    raise ConfigError(
        "Fine-tuning reads images, and these are features.", where=where, fix=fix, code="finetune_features"
    )


def _labelled(
    request: TrainHeadRequest, cohort: Cohort
) -> tuple[dict[str, Labelled], tuple[str, ...], Mapping[str, Sequence[str]]]:
    """``train``, and ``val`` if the data name it, with label columns; the names of these and the texts of classes."""
    named: dict[str, list[Case]] = {name: cohort.parts[name] for name in ("train", "val") if name in cohort.parts}
    if "train" not in named and ALL in cohort.parts:
        named = {"train": cohort.parts[ALL]}
    if "train" not in named:
        raise DataError(
            "There is no training part.",
            where=f"{hide_home(str(request.data))}: {', '.join(cohort.parts)}",
            fix="name data or a split that has train cases, or one without any",
            code="part_missing",
        )
    source = find_labels(cohort, request.labels, request.target, "mean")
    check_has_labels(source, cohort)
    rows = {name: tuple(_row(case) for case in cases) for name, cases in named.items()}
    arrays, values = encode(source, rows)
    found: dict[str, Labelled] = {}
    for name, own in rows.items():
        part = FeaturePart(name, np.zeros((len(own), 0), np.float32), None, own, {})
        found[name] = Labelled(part, np.asarray(arrays[name], dtype=np.float64))
    return found, source.targets, values


def _row(case: Case) -> Row:
    return Row(case.case_id, case.patient_id, case.study_uid, None, 1, 0, "")


def _examples(part: Labelled, targets: Targets, values: Mapping[str, Any]) -> Examples:
    return build_examples(part.part, targets.encode(part.labels_RT, values), "mean", by_slice=False)


# --- the first look --------------------------------------------------------------------------------------------------


def _looked_at(job: FinetuneJob, *, skip: bool) -> FinetuneJob:
    """The job without the cases that cannot be read.

    Raises:
        DataError: One of them, unless they are skipped; or no training case is left.
    """
    ids = job.train.case_ids + (job.val.case_ids if job.val is not None else ())
    known = {case.case_id: case for case in job.cohort.cases}
    log.info("Reading %s", counted(len(ids), "case"))
    failed: dict[str, DataError] = {}

    def look(case_id: str) -> DataError | None:
        try:
            job.images.planes(known[case_id])
        except DataError as error:
            return error
        return None

    for case_id, error in zip(ids, in_order(look, ids, job.config.num_workers), strict=True):
        if error is not None and not skip:
            raise error
        if error is not None:
            log.warning("%s: %s", case_id, error.what)
            failed[case_id] = error
    return job if not failed else _without(job, failed)


def _without(job: FinetuneJob, failed: Mapping[str, DataError]) -> FinetuneJob:
    known = {case.case_id: case for case in job.cohort.cases}
    train = job.train.chosen(set(job.train.case_ids) - set(failed))
    val = None if job.val is None else job.val.chosen(set(job.val.case_ids) - set(failed))
    if not len(train) or (val is not None and not len(val)):
        first = next(iter(failed.values()))
        raise DataError(
            f"No case of the {'validation' if len(train) else 'training'} part can be read.",
            where=f"{counted(len(failed), 'case')} failed, the first: {first.where}: {first.what}",
            fix=first.fix,
            code="cases_failed",
        )
    failures = [
        (case_id, hide_home(str(next(iter(known[case_id].sequences.values())).path)), _reason(error), error.fix)
        for case_id, error in failed.items()
    ]
    return replace(job, train=train, val=val, failures=[*job.failures, *failures])


def _reason(error: DataError) -> str:
    return f"{error.what} {hide_home(error.where)}".strip()
