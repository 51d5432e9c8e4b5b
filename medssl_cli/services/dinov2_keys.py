"""Keys of DINOv2's files that this program does not use: set aside with a word, so that an existing YAML works."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

UNUSED = {
    "compute_precision.grad_scaler": "the loss is scaled with precision fp16, and only then",
    "train.cache_dataset": "prepared volumes are always kept in the cache",
    "train.persistent_workers": "loader processes always live as long as the run",
    "train.pin_memory": "batches are always copied into page-locked memory for a GPU, and only then",
    "optim.lr": "the learning rate follows from optim.base_lr and optim.scaling_rule",
}
"""Dotted key, or whole section, and why it changes nothing."""


RENAMED = {
    "train.auto_epoch_length": "train.OFFICIAL_EPOCH_LENGTH",
    "logging.log_period_iterations": "train.log_period_iterations",
}
"""Dotted key of other DINOv2 files, and the key here that means it and counts where both are given. Only a true
`auto_epoch_length` stands above an epoch length, beside which such files always have it."""


def set_aside(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The values in this program's keys, and one sentence for each that changes nothing or has another name here.

    Raises:
        ValueError: A key asks for something that would change the result and is not there.
    """
    kept: dict[str, Any] = {name: dict(v) if isinstance(v, Mapping) else v for name, v in values.items()}
    notes = _rename(kept)
    for key, reason in UNUSED.items():
        section, _, leaf = key.partition(".")
        holder = kept if not leaf else kept.get(section)
        name = leaf or section
        if isinstance(holder, dict) and name in holder:
            found = ", ".join(_names(key, holder.pop(name)))
            notes.append(f"No effect: {found}: {reason}.")
    return kept, notes


def _rename(values: dict[str, Any]) -> list[str]:
    """Move each value to the key that means it here, in place.

    Raises:
        ValueError: ``train.auto_epoch_length`` is neither true nor false.
    """
    notes = []
    for old, new in RENAMED.items():
        section, _, leaf = old.partition(".")
        holder = values.get(section)
        if not isinstance(holder, dict) or leaf not in holder:
            continue
        value = holder.pop(leaf)
        if not holder:
            del values[section]
        if old == "train.auto_epoch_length":
            if not isinstance(value, bool):
                raise ValueError(f"{old} is {value!r}: true or false is needed")
            value = "auto" if value else None  # false: the length is given as usual
        if value is not None:
            notes += _move(values, old, new, value)
    return notes


def _move(values: dict[str, Any], old: str, new: str, value: Any) -> list[str]:
    section, _, leaf = new.partition(".")
    holder = values.setdefault(section, {})
    if not isinstance(holder, dict):  # told by the check of types
        return []
    if leaf in holder and holder[leaf] != value and value != "auto":
        return [f"No effect: {old}: {new}={holder[leaf]!r} was given and counts."]
    overruled = f", and counts instead of {holder[leaf]!r}" if holder.get(leaf, value) != value else ""
    holder[leaf] = value
    return [f"{old} is read as {new}={value}{overruled}."]


def _names(prefix: str, value: Any) -> Iterator[str]:
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _names(f"{prefix}.{name}", inner)
    else:
        yield prefix
