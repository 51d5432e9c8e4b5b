"""Labels of the cases of a run for the semi-supervised loss."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from medssl_cli.core.errors import DataError
from medssl_cli.core.run import digest_of
from medssl_cli.core.wording import counted
from medssl_cli.objectives.semi_supervised import keep_labels
from medssl_cli.services.labelled_data import label_cases
from medssl_cli.services.pretrain_config import PretrainConfig
from medssl_cli.services.training_data import TrainingData

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClassLabels:
    """Class of each labelled case; empty where the run uses no labels.

    Args:
        names: Labels in the order of the classes.
        class_of: Class by case id.
    """

    names: tuple[str, ...] = ()
    class_of: Mapping[str, int] = field(default_factory=dict)

    @property
    def counts(self) -> tuple[int, ...]:
        """Labelled cases of each class."""
        found = Counter(self.class_of.values())
        return tuple(found[number] for number in range(len(self.names)))

    @property
    def digest(self) -> str | None:
        """SHA-256 over the cases and their classes; None where the run uses no labels."""
        return digest_of("class labels", list(self.names), sorted(self.class_of.items())) if self.names else None

    def of_batch(self, case_ids: Sequence[str]) -> Tensor | None:
        """(B,) int64, -1 for a case without label; None where the run uses none."""
        if not self.names:
            return None
        return torch.tensor([self.class_of.get(case_id, -1) for case_id in case_ids])


def read_class_labels(config: PretrainConfig, data: TrainingData) -> ClassLabels:
    """The labels that the semi-supervised loss uses; none if it is off.

    Raises:
        ConfigError, DataError: The column or the file is missing, or there are fewer than two classes.
    """
    semi = config.semi_supervised
    if not semi.loss_weight:
        return ClassLabels()
    found = label_cases(semi.labels, semi.target, data)
    share = config.data.percentage_labels
    kept = keep_labels(found, share, config.train.seed) if share < 1 else found
    names = tuple(sorted(set(kept.values())))
    if len(names) < 2:
        raise DataError(
            "A classification loss needs two classes.",
            where=f"semi_supervised.target={semi.target}: {', '.join(names) or 'no label'}",
            fix="name a column with several classes, or set semi_supervised.loss_weight=0",
            code="labels_one_class",
        )
    log.info("%s of %s, %d classes: %s", counted(len(kept), "label"), counted(len(data.cases), "case"), len(names),
             ", ".join(names))  # fmt: skip
    return ClassLabels(names, {case_id: names.index(label) for case_id, label in kept.items()})
