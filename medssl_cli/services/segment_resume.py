"""Where a segmentation run goes on from, and what must be the same when it does."""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

from medssl_cli.core.errors import CheckpointError, ConfigError, MedsslError
from medssl_cli.core.run import hide_home
from medssl_cli.engine.checkpoint import STATE, Checkpoint, Checkpoints, compare_configs, read, read_latest
from medssl_cli.services.lookup import SEGMENTER_WEIGHTS
from medssl_cli.services.run_folder import without_home
from medssl_cli.services.segment_history import HISTORY
from medssl_cli.services.segment_job import SegmentJob
from medssl_cli.services.segment_request import SegmentRequest
from medssl_cli.services.segment_training import samples_per_update

log = logging.getLogger(__name__)

LAST = "last"
"""Folder of a run with its newest checkpoint."""
SAMPLES = "samples_per_update"
DATA_DIGESTS = ("data_digest", "split_digest")


def find_checkpoint(checkpoints: Checkpoints, run: Path, request: SegmentRequest) -> Checkpoint | None:
    """The checkpoint to go on from; None for a run that begins.

    Raises:
        CheckpointError: The one that was named is missing or damaged; or the run folder holds a model and its
            checkpoint is gone, so that the run would begin anew in silence.
        ConfigError: One was named, and the run folder has another one of its own.
    """
    if request.resume_ckpt is not None:
        given, own = open_checkpoint(request.resume_ckpt), checkpoints.latest()
        if own is not None and own.path.resolve() != given.path.resolve():
            raise ConfigError(
                "The run folder has a checkpoint of its own.",
                where=f"{hide_home(str(own.path))} and --resume-ckpt {hide_home(str(given.path))}",
                fix="leave --resume-ckpt out to go on from the first, or choose another --out for the second",
                code="checkpoint_twice",
            )
        return given
    if not request.resume:
        return None
    found = checkpoints.latest()
    left = [name for name in (SEGMENTER_WEIGHTS, HISTORY) if (run / name).is_file()]
    if found is None and left:
        raise CheckpointError(
            "The run folder holds a trained model, but no checkpoint to go on from.",
            where=f"{hide_home(str(run))} holds {' and '.join(left)}; {LAST}/ holds no whole checkpoint",
            fix="name a copy of it with --resume-ckpt, start afresh with --no-resume, or choose another --out",
            code="checkpoint_missing",
        )
    return found


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint that ``--resume-ckpt`` names: a run folder, its ``last``, or one step in it.

    Raises:
        CheckpointError: There is none, it is damaged, or it is a weight file.
    """
    if path.is_file():
        raise _missing(path, "it is a file: weights alone, without the state of the optimizer")
    if (path / STATE).is_file():
        return read(path)
    for folder in (path / LAST, path):
        found = read_latest(folder) if folder.is_dir() else None
        if found is not None:
            return found
    raise _missing(path, "it does not exist" if not path.exists() else "it holds no whole checkpoint")


def _missing(path: Path, why: str) -> MedsslError:
    return CheckpointError(
        "There is no checkpoint to resume from.",
        where=f"{hide_home(str(path))}: {why}",
        fix=f"name a run folder, its {LAST}/ or one step_… folder in it; without --resume-ckpt the run folder's own "
        "checkpoint is taken",
        code="checkpoint_missing",
    )


def comparable(job: SegmentJob) -> dict[str, Any]:
    """The configuration as a checkpoint keeps it: plain data, with digests in place of paths."""
    values: dict[str, Any] = without_home(job.config.model_dump(mode="json"))
    for dotted in job.location_keys:
        node, leaf = _node(values, dotted)
        node.pop(leaf, None)
    for dotted, digest in job.digests.items():
        node, leaf = _node(values, dotted)
        node[leaf] = f"digest {digest[:12]}"
    known = {name: str(job.data_facts.get(name))[:12] for name in DATA_DIGESTS}
    return {**values, **known, SAMPLES: samples_per_update(job)}


def _node(values: dict[str, Any], dotted: str) -> tuple[dict[str, Any], str]:
    """The section that holds a key, and the key in it."""
    *parents, leaf = dotted.split(".")
    for name in parents:
        values = values.setdefault(name, {})
    return values, leaf


def refuse_drift(checkpoint: Checkpoint, job: SegmentJob, allowed: Collection[str]) -> None:
    """Refuse a configuration, data or a start that differ from those of the checkpoint.

    Raises:
        ConfigError: Naming every key with both values.
    """
    before, now = checkpoint.config, comparable(job)
    safe = set(job.safe_keys)
    if before.get(SAMPLES) == now[SAMPLES]:
        safe |= job.batch_keys  # another number of processes, and the same samples in each update
    for change in compare_configs(before, now, safe=safe, growing=job.growing_keys, allowed=allowed):
        log.info("Changed since the checkpoint: %s", change)
