"""What must be the same when a pretraining run is resumed: configuration, samples an update, images, labels."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from medssl_cli.core.errors import ConfigError
from medssl_cli.data.store import Store
from medssl_cli.engine.checkpoint import Checkpoint, compare_configs
from medssl_cli.engine.distributed import world_size
from medssl_cli.services.class_labels import ClassLabels
from medssl_cli.services.pretrain_config import SAFE_KEYS, PretrainConfig
from medssl_cli.services.pretrain_request import PretrainRequest
from medssl_cli.services.run_folder import without_home
from medssl_cli.services.training_data import TrainingData

log = logging.getLogger(__name__)

SAMPLE_KEYS = ("train.batch_size_per_gpu", "train.grad_accumulation")
"""With the number of processes, the factors of the samples of an update."""


def comparable(config: PretrainConfig) -> dict[str, Any]:
    """The configuration as a checkpoint keeps it: it is plain data that may leave this machine."""
    return without_home(config.model_dump(mode="json"))


def refuse_drift(checkpoint: Checkpoint, config: PretrainConfig, data: TrainingData, request: PretrainRequest) -> None:
    """Refuse a configuration that differs; the list of cases counts by its ids, not by the name of its file."""

    def with_digest(values: dict[str, Any], digest: object) -> dict[str, Any]:
        return {**values, "data": {**values["data"], "split_csv": f"ids {str(digest)[:12]}"}}

    before, now = _in_samples(checkpoint, config, request)
    changes = compare_configs(
        with_digest(before, checkpoint.extra.get("split_digest")),
        with_digest(now, data.split_digest),
        safe=SAFE_KEYS,
        growing={"optim.epochs"},
        allowed=set(request.allowed_changes),
    )
    for change in changes:
        log.info("Changed since the checkpoint: %s", change)


def refuse_other_data(checkpoint: Checkpoint, store: Store, request: PretrainRequest) -> None:
    """Refuse images that are not those of the checkpoint.

    Raises:
        ConfigError: Contents, times or places of files changed.
    """
    if checkpoint.extra.get("data_digest") != store.digest and not {"data", "data.split_csv"} & {
        *request.allowed_changes
    }:
        raise ConfigError(
            "The images differ from those of the run to be resumed.",
            where=f"data: digest {str(checkpoint.extra.get('data_digest'))[:12]} -> {store.digest[:12]} "
            "(contents, times or places of files changed)",
            fix="restore the files, choose another --out, or pass --allow-config-change data",
            code="config_changed",
        )


def refuse_other_labels(checkpoint: Checkpoint, labels: ClassLabels, request: PretrainRequest) -> None:
    """Refuse labels of the classification loss that are not those of the checkpoint: its head has learned those.

    Raises:
        ConfigError: The table changed under its name.
    """
    before = checkpoint.extra.get("labels_digest", labels.digest)
    if before in (None, labels.digest) or {"semi_supervised", "semi_supervised.labels"} & {*request.allowed_changes}:
        return
    raise ConfigError(
        "The labels differ from those of the run to be resumed.",
        where=f"semi_supervised.labels: digest {str(before)[:12]} -> {str(labels.digest)[:12]}; "
        f"classes now: {', '.join(labels.names)}",
        fix="restore the table, choose another --out, or pass --allow-config-change semi_supervised.labels",
        code="config_changed",
    )


def _in_samples(
    checkpoint: Checkpoint, config: PretrainConfig, request: PretrainRequest
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both configurations, where the number of processes changed with the samples of an update for its factors.

    Raises:
        ConfigError: Another number of processes, and another number of samples.
    """
    # a key that came with a later version had its default
    before = _filled(checkpoint.config, PretrainConfig().model_dump(mode="json"))
    now = comparable(config)
    worlds = (int(checkpoint.extra.get("world", 1)), world_size())
    if worlds[0] == worlds[1]:
        return before, now
    sizes = [_samples(values["train"], world) for values, world in zip((before, now), worlds, strict=True)]
    if sizes[0] != sizes[1] and not {"train", *SAMPLE_KEYS} & set(request.allowed_changes):
        raise ConfigError(
            "On another number of processes an update would see another number of samples.",
            where=f"then {worlds[0]} {_say_samples(before['train'])} = {sizes[0]}; "
            f"now {worlds[1]} {_say_samples(now['train'])} = {sizes[1]}",
            fix=_same_samples(sizes[0], now["train"], worlds[1]),
            code="config_changed",
        )
    if sizes[0] == sizes[1]:
        log.info(
            "%d processes instead of %d, %d samples an update as before; crops are drawn anew for each process, and "
            "KoLeo compares the samples of one process.", worlds[1], worlds[0], sizes[0]
        )  # fmt: skip
        factors = {key.partition(".")[2] for key in SAMPLE_KEYS}
        for values in (before, now):
            values["train"] = {key: value for key, value in values["train"].items() if key not in factors}
    return before, now


def _filled(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    filled = {**defaults, **values}
    for key, default in defaults.items():
        if isinstance(default, Mapping) and isinstance(filled[key], Mapping):
            filled[key] = _filled(filled[key], default)
    return filled


def _samples(train: Mapping[str, Any], world: int) -> int:
    return int(train["batch_size_per_gpu"]) * int(train["grad_accumulation"]) * world


def _say_samples(train: Mapping[str, Any]) -> str:
    return f"processes x {train['batch_size_per_gpu']} samples x {train['grad_accumulation']} micro-batches"


def _same_samples(samples: int, train: Mapping[str, Any], world: int) -> str:
    """What to set so that an update has as many samples as before."""
    batch = min(samples // world, int(train["batch_size_per_gpu"]) * int(train["grad_accumulation"]))
    while batch > 0 and samples % (batch * world):
        batch -= 1
    if batch < 1:
        return f"take a number of processes that divides {samples}"
    return f"set train.batch_size_per_gpu={batch} train.grad_accumulation={samples // (batch * world)}"
