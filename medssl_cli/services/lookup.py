"""Which model a command works with: the option, MEDSSL_MODEL, or the newest finished run under ./runs."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from medssl_cli.core.errors import CheckpointError, ConfigError

RUNS = Path("runs")
EXPORT = Path("export/teacher_backbone.safetensors")


@dataclass(frozen=True)
class FoundModel:
    """A weight file and how it was found.

    Args:
        weights: ``.safetensors`` file with its card beside it.
        run: Run folder it belongs to, or None for a bare file.
        why: For the user: ``given``, ``MEDSSL_MODEL`` or ``newest finished run under ./runs``.
    """

    weights: Path
    run: Path | None
    why: str


def find_model(model: Path | None) -> FoundModel:
    """Resolve ``--model``.

    Raises:
        ConfigError: Nothing was named and no finished run exists.
        CheckpointError: The named run has no exported backbone, or the file does not exist.
    """
    if model is not None:
        return _resolve(model, "given")
    if named := os.environ.get("MEDSSL_MODEL"):
        return _resolve(Path(named), "MEDSSL_MODEL")
    finished = [run for run in RUNS.glob("*") if run_status(run) == "finished" and (run / EXPORT).is_file()]
    if not finished:
        raise ConfigError(
            "No model was named and no finished run was found.",
            where=f"looked in {RUNS.resolve()}",
            fix="pass --model RUN or FILE, set MEDSSL_MODEL, or run `medssl pretrain` with --out runs/NAME first",
            code="model_missing",
        )
    newest = max(finished, key=lambda run: (run / "run.json").stat().st_mtime)
    return _resolve(newest, "newest finished run under ./runs")


def run_status(run: Path) -> str | None:
    """``status`` of a run's ``run.json``; None where there is none."""
    try:
        return json.loads((run / "run.json").read_text(encoding="utf-8")).get("status")
    except (OSError, ValueError, AttributeError):
        return None


def _resolve(path: Path, why: str) -> FoundModel:
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
