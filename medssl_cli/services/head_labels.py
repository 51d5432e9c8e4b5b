"""Labels of other cases, encoded as the training of a head encoded its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from medssl_cli.data.labels import encode_columns
from medssl_cli.services.head_targets import targets_of_card


def encode_labels(card: Mapping[str, Any], cells: Sequence[tuple[str, ...]]) -> np.ndarray:
    """Text cells of the targets of a head as the metrics take them, NaN where unknown.

    Args:
        card: ``head.json``.
        cells: One text for each target of each row; empty for unknown.

    Returns:
        (R, C) of 0 and 1 for a binary or multilabel head, (R, 1) numbers of classes, (R, T) measurements.

    Raises:
        DataError: A value that the head does not know, or text where it knows numbers.
    """
    targets = targets_of_card(card)
    known = targets.label_values or {}
    labels_RT, _ = encode_columns(cells, targets.names, known)
    return targets.encode(labels_RT, known)
