"""Which model a command works with: the option, MEDSSL_MODEL, or the newest finished run under ./runs.

A run is of a backbone, of a head or of a segmentation network. A head works on the vectors of one backbone, so that a
head run stands for two things: the head itself, and the weights of its backbone, which lie in the run (after
fine-tuning) or where its card says. A segmentation network is whole by itself, and no backbone for anything else.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from medssl_cli.core.errors import CheckpointError, ConfigError
from medssl_cli.core.run import hide_home

RUNS = Path("runs")
EXPORT = Path("export/teacher_backbone.safetensors")
HEAD_CARD = "head.json"
HEAD_WEIGHTS = "best.safetensors"
SEGMENTER_CARD = "model.json"
SEGMENTER_WEIGHTS = "best.safetensors"


@dataclass(frozen=True)
class FoundModel:
    """A weight file and how it was found.

    Args:
        weights: ``.safetensors`` file of the backbone with its card beside it; of the segmentation network where
            ``segmenter`` is given.
        run: Run folder that the backbone belongs to, or None for a bare file.
        why: For the user: ``given``, ``MEDSSL_MODEL`` or ``newest finished run under ./runs``.
        head: Run folder of a head that works on this backbone, or None for the backbone alone.
        segmenter: Run folder of a segmentation network, which holds all that it needs; None for a backbone.
    """

    weights: Path
    run: Path | None
    why: str
    head: Path | None = None
    segmenter: Path | None = None


def find_model(model: Path | None, *, backbone: Path | None = None) -> FoundModel:
    """Resolve ``--model``.

    Args:
        model: Run folder or weight file; None: MEDSSL_MODEL, then the newest finished run.
        backbone: Where the backbone of a head lies now, as a run folder or a weight file.

    Raises:
        ConfigError: Nothing was named and no finished run exists; or the backbone of a head is not where it was.
        CheckpointError: The named run has no exported backbone, or the file does not exist.
    """
    return _resolve(*_named_or_newest(model, _is_model), backbone)


def find_backbone(model: Path | None) -> FoundModel:
    """Resolve ``--model`` for a command that needs a backbone: as ``find_model``, with segmentation networks left out.

    Raises:
        ConfigError: As ``find_model``; or a segmentation network was named.
        CheckpointError: As ``find_model``.
    """
    found = _resolve(*_named_or_newest(model, _has_backbone), None)
    refuse_segmenter(found)
    return found


def refuse_segmenter(found: FoundModel) -> None:
    """Refuse a segmentation network where a backbone is needed.

    Raises:
        ConfigError: It is one.
    """
    if found.segmenter is not None:
        raise ConfigError(
            "This model is a segmentation network: it gives masks, and is no backbone whose features could be used.",
            where=f"{hide_home(str(found.segmenter))} ({found.why})",
            fix="name the run of `medssl pretrain` that it was made from; `medssl infer` and `medssl eval` take the "
            "segmentation network itself",
            code="model_is_segmenter",
        )


def _named_or_newest(model: Path | None, fits: Callable[[Path], bool]) -> tuple[Path, str]:
    """(run folder or weight file, why it was taken)."""
    if model is not None:
        return model, "given"
    if named := os.environ.get("MEDSSL_MODEL"):
        return Path(named), "MEDSSL_MODEL"
    finished = [run for run in RUNS.glob("*") if run_status(run) == "finished" and fits(run)]
    if not finished:
        raise ConfigError(
            "No model was named and no finished run was found.",
            where=f"looked in {RUNS.resolve()}",
            fix="pass --model RUN or FILE, set MEDSSL_MODEL, or run `medssl pretrain` with --out runs/NAME first",
            code="model_missing",
        )
    newest = max(finished, key=lambda run: (run / "run.json").stat().st_mtime)
    return newest, "newest finished run under ./runs"


def model_paths(model: Path | None, *, backbone: Path | None = None) -> list[Path]:
    """What belongs to the model that a command will open, so that it is not deleted; nothing if none is found."""
    try:
        found = find_model(model, backbone=backbone)
    except (CheckpointError, ConfigError):  # told by whoever opens it
        return []
    return [path for path in (found.weights, found.run, found.head, found.segmenter) if path is not None]


def run_status(run: Path) -> str | None:
    """``status`` of a run's ``run.json``; None where there is none."""
    try:
        return json.loads((run / "run.json").read_text(encoding="utf-8")).get("status")
    except (OSError, ValueError, AttributeError):
        return None


def is_head_run(path: Path) -> bool:
    """Whether a folder holds a trained head."""
    return (path / HEAD_CARD).is_file() and (path / HEAD_WEIGHTS).is_file()


def is_segment_run(path: Path) -> bool:
    """Whether a folder holds a trained segmentation network."""
    return (path / SEGMENTER_CARD).is_file() and (path / SEGMENTER_WEIGHTS).is_file()


def read_segmenter_card(run: Path) -> dict[str, Any]:
    """``model.json`` of a segmentation run.

    Raises:
        CheckpointError: Missing, or not JSON of a segmentation network.
    """
    path = run / SEGMENTER_CARD
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(card, dict) or not isinstance(card.get("network"), dict):
            raise ValueError("it does not tell of a segmentation network")
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            "The card of the segmentation network cannot be read.",
            where=f"{hide_home(str(path))}: {str(error)[:200]}",
            fix="name the --out folder of a finished `medssl segment`, copied whole",
            code="segmenter_unreadable",
        ) from error
    return card


def read_head_card(run: Path) -> dict[str, Any]:
    """``head.json`` of a head run.

    Raises:
        CheckpointError: Missing, or not JSON of a head.
    """
    path = run / HEAD_CARD
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(card, dict) or not isinstance(card.get("model"), dict):
            raise ValueError("it does not tell of a head and its backbone")
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            "The card of the head cannot be read.",
            where=f"{hide_home(str(path))}: {str(error)[:200]}",
            fix="name the --out folder of a finished `medssl train-head`",
            code="head_unreadable",
        ) from error
    return card


def _is_model(run: Path) -> bool:
    return _has_backbone(run) or is_segment_run(run)


def _has_backbone(run: Path) -> bool:
    return (run / EXPORT).is_file() or is_head_run(run)


def _resolve(path: Path, why: str, backbone: Path | None) -> FoundModel:
    if path.is_dir() and is_head_run(path):
        return _resolve_head(path, why, backbone)
    path = _run_of_weights(path)
    if backbone is not None:
        raise ConfigError(
            "A backbone was named for a model that is no head.",
            where=f"{hide_home(str(path))}, --backbone {hide_home(str(backbone))}",
            fix="leave --backbone out, or name the run folder of a head with --model",
            code="backbone_without_head",
        )
    if path.is_dir() and is_segment_run(path):
        return FoundModel(path / SEGMENTER_WEIGHTS, path, why, segmenter=path)
    return _resolve_backbone(path, why)


def _run_of_weights(path: Path) -> Path:
    """The run of a segmentation network whose weight file was named, for its card is found there; else the path."""
    is_one = path.name == SEGMENTER_WEIGHTS and path.is_file() and is_segment_run(path.parent)
    return path.parent if is_one and not is_head_run(path.parent) else path


def _resolve_backbone(path: Path, why: str) -> FoundModel:
    if path.is_dir():
        if (path / EXPORT.name).is_file():  # a folder of `medssl convert weights`
            return FoundModel(path / EXPORT.name, None, why)
        weights = path / EXPORT
        if not weights.is_file():
            raise CheckpointError(
                "The run has no exported backbone.",
                where=str(weights),
                fix="let `medssl pretrain` finish (the same command resumes), or name a .safetensors file",
                code="export_missing",
            )
        return FoundModel(weights, path, why)
    if not path.is_file():
        raise CheckpointError(
            "The model does not exist.", where=str(path), fix="name a run folder or a weight file", code="model_missing"
        )
    return FoundModel(path, None, why)


def _resolve_head(run: Path, why: str, backbone: Path | None) -> FoundModel:
    """A head run with its backbone: fine-tuned in the run itself, as named, or where the card says it lay."""
    if (run / EXPORT).is_file():
        if backbone is not None:
            raise ConfigError(
                "This head has a fine-tuned backbone of its own.",
                where=hide_home(str(run / EXPORT)),
                fix="leave --backbone out",
                code="backbone_given_twice",
            )
        return FoundModel(run / EXPORT, run, why, head=run)
    if backbone is not None:
        return replace(_resolve_backbone(backbone, why), head=run)
    told = read_head_card(run)["model"]
    places = [_beside(run, str(told["path_from_run"]))] if told.get("path_from_run") else []
    places += [Path(str(told["path"])).expanduser()] if told.get("path") else []
    for weights in places:
        if weights.is_file():
            owner = weights.parents[1] if weights.parts[-2:] == EXPORT.parts else None
            return FoundModel(weights, owner, why, head=run)
    raise ConfigError(
        "The backbone of the head is not where it was.",
        where=f"{hide_home(str(run))}: looked for {' and '.join(hide_home(str(place)) for place in places) or 'none'}",
        fix="name its run folder or weight file with --backbone",
        code="backbone_missing",
    )


def _beside(run: Path, path: str) -> Path:
    """A place told from a run, as a person would write it: ``runs/backbone/…``, not ``runs/head/../backbone/…``."""
    plain = Path(os.path.normpath(run / path))
    return plain if plain.is_file() else run / path  # a linked run folder has another parent than its name tells
