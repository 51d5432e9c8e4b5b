"""Keys of DINOv2's files that this program does not use: set aside with a word, so that an existing YAML works."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

UNUSED = {
    "compute_precision.grad_scaler": "the loss is scaled with precision fp16, and only then",
    "compute_precision.student": "all parameters are float32; compute_precision.precision is the number format",
    "compute_precision.teacher": "all parameters are float32; compute_precision.precision is the number format",
    "train.cache_dataset": "prepared volumes are always kept in the cache",
    "optim.lr": "the learning rate follows from optim.base_lr and optim.scaling_rule",
    "evaluation": "nothing is evaluated while training; `medssl eval` scores the exported backbone",
    "semi_supervised": "the semi-supervised loss is off, as by default",
}
"""Dotted key, or whole section, and why it changes nothing."""


def set_aside(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The values without those keys, and one sentence for each that was given.

    Raises:
        ValueError: A key asks for something that would change the result and is not there.
    """
    _refuse_semi_supervised(values.get("semi_supervised"))
    kept: dict[str, Any] = {name: dict(v) if isinstance(v, Mapping) else v for name, v in values.items()}
    notes = []
    for key, reason in UNUSED.items():
        section, _, leaf = key.partition(".")
        holder = kept if not leaf else kept.get(section)
        name = leaf or section
        if isinstance(holder, dict) and name in holder:
            found = ", ".join(_names(key, holder.pop(name)))
            notes.append(f"No effect: {found}: {reason}.")
    return kept, notes


def _refuse_semi_supervised(section: Any) -> None:
    weight = section.get("loss_weight", 0) if isinstance(section, Mapping) else 0
    if weight:
        raise ValueError(
            f"semi_supervised.loss_weight is {weight}, but there is no semi-supervised loss here; set it to 0 "
            "and train a head on the labels with `medssl train-head`"
        )


def _names(prefix: str, value: Any) -> Iterator[str]:
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _names(f"{prefix}.{name}", inner)
    else:
        yield prefix
