"""What a run or a weight file is, read from its JSON and its header; torch is not loaded."""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medssl_cli.core.errors import CheckpointError, ConfigError
from medssl_cli.core.run import LOCK, hide_home, result_header, to_json
from medssl_cli.services.lookup import (
    EXPORT,
    SEGMENTER_WEIGHTS,
    find_model,
    is_head_run,
    is_segment_run,
    read_head_card,
    read_segmenter_card,
    run_status,
)

MAX_HEADER_BYTES = 100_000_000
"""Upper bound of a safetensors header, the format's own."""

CONSTANTS = ("rope_embed.periods", ".bias_mask")
"""Tensors of a weight file that are no parameters."""

OF_SEGMENTER = ("task", "classes", "sequences", "threshold", "tile", "pixel_mm", "context", "epoch", "score")
"""What is told of a segmentation network, as in its ``model.json``."""


@dataclass(frozen=True)
class Info:
    """Facts about a run or a weight file, as text for people and JSON for scripts."""

    facts: dict[str, Any]

    def to_json(self) -> str:
        """Strict JSON with the common header."""
        return to_json(self.facts)

    def summary(self) -> str:
        """One ``name: value`` line a fact, groups indented."""
        skip = {"schema_version", "medssl_version", "command", "started_at", "elapsed_s"}
        return "\n".join(_lines({key: value for key, value in self.facts.items() if key not in skip}))


def info(path: Path | None) -> Info:
    """Describe a run folder or a weight file; the newest finished run when none is named.

    Raises:
        ConfigError: Nothing lies at ``path``.
        CheckpointError: Neither a run nor a safetensors file.
    """
    started = time.time()
    facts = _facts(path) if path is not None else _facts(_newest())
    return Info({**result_header("info", started), **facts})


def _newest() -> Path:
    found = find_model(None)
    return found.head or found.segmenter or found.run or found.weights


def _facts(path: Path) -> dict[str, Any]:
    if path.is_dir():
        converted = path / EXPORT.name  # a folder of `medssl convert weights`
        return _describe_weights(converted) if converted.is_file() else _describe_run(path)
    if path.is_file():
        return _describe_weights(path)
    raise ConfigError(
        "There is no such run or file.",
        where=str(path),
        fix="name a run folder or a .safetensors file",
        code="model_missing",
    )


def _describe_run(run: Path) -> dict[str, Any]:
    status = run_status(run)
    if status is None:
        raise CheckpointError(
            "This folder is not a run of medssl.",
            where=f"{run}: run.json is missing or damaged",
            fix="name the folder given to --out",
            code="not_a_run",
        )
    record = _read_object(run / "run.json", "not_a_run")
    steps = sorted(p.name for p in (run / "checkpoints").glob("step_*") if p.is_dir())
    facts: dict[str, Any] = {"kind": "run", "path": hide_home(str(run)), "status": status}
    if status == "running" and not _is_held(run):
        facts["status"] = _interrupted(steps)
    facts |= {
        key: record[key]
        for key in ("recipe", "step", "total_steps", "device", "sequences", "data_digest", "split_digest", "versions")
        if key in record
    }
    facts["checkpoints"] = steps
    if is_head_run(run):
        card = read_head_card(run)
        keys = ("task", "classes", "kind", "pool_mode", "level", "thresholds", "calibrated", "selection")
        facts["head"] = {key: card[key] for key in keys if key in card} | {"backbone": card["model"].get("path")}
    if is_segment_run(run):
        card = read_segmenter_card(run)
        facts["segmenter"] = {key: card[key] for key in (*OF_SEGMENTER, "n_parameters") if key in card}
        facts["segmenter"] |= {"network": card["network"].get("name"), "weights": _sizes(run / SEGMENTER_WEIGHTS)}
    export = run / EXPORT
    if export.is_file():
        facts["export"] = _describe_weights(export)
    return facts


def _sizes(path: Path) -> dict[str, Any]:
    """The tensors of a weight file and its length, from its header."""
    header = read_safetensors_header(path)
    return {"tensors": sum(name != "__metadata__" for name in header), "bytes": path.stat().st_size}


def _is_held(run: Path) -> bool:
    """Whether a process works on ``run``; one that was killed lost the lock without a word in ``run.json``."""
    try:
        with (run / LOCK).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two readers do not take each other for a run
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    except OSError:  # a file system without locks, or a lock that may not be read: run.json is all there is
        return True
    return False


def _interrupted(steps: Sequence[str]) -> str:
    at = f"at step {int(steps[-1].removeprefix('step_'))}" if steps else "before its first checkpoint"
    return f"interrupted {at}; the same command resumes"


def _describe_weights(path: Path) -> dict[str, Any]:
    header = read_safetensors_header(path)
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    count = sum(_size(entry["shape"]) for name, entry in tensors.items() if not name.endswith(CONSTANTS))
    facts: dict[str, Any] = {
        "kind": "weights",
        "path": hide_home(str(path)),
        "tensors": len(tensors),
        "parameters": count,
        "dtypes": sorted({entry["dtype"] for entry in tensors.values()}),
        "bytes": path.stat().st_size,
    }
    card = path.with_suffix(".json")
    if card.is_file():
        told = _read_object(card, "card_invalid")
        facts |= {key: told[key] for key in ("family", "source", "modality") if told.get(key) is not None}
        facts["card"] = told
    return facts


def _read_object(path: Path, code: str) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict):
            raise ValueError(f"a {type(data).__name__}, not an object")
    except (ValueError, RecursionError, OSError) as error:
        raise CheckpointError(
            "A JSON file of the model is damaged.",
            where=f"{path}: {str(error)[:200]}",
            fix="copy it again from the run that made it",
            code=code,
        ) from error
    return data


def read_safetensors_header(path: Path) -> dict[str, Any]:
    """Names, shapes and types of a safetensors file, without its data.

    Raises:
        CheckpointError: Not a safetensors file, or shorter than its header says.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= MAX_HEADER_BYTES:
                raise ValueError("its first bytes are no header length")
            header = json.loads(file.read(length))
        end = max((e["data_offsets"][1] for n, e in header.items() if n != "__metadata__"), default=0)
        if path.stat().st_size != 8 + length + end:
            raise _refused(
                "The safetensors file is not whole.",
                f"{path}: {path.stat().st_size} bytes instead of {8 + length + end}",
            )
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise _refused("This is not a safetensors file.", f"{path}: {str(error)[:200]}") from error
    return header


def _refused(what: str, where: str) -> CheckpointError:
    return CheckpointError(
        what, where=where, fix="name a run folder, or a whole .safetensors file", code="weights_unreadable"
    )


def _size(shape: list[int]) -> int:
    product = 1
    for n in shape:
        product *= n
    return product


def _lines(facts: dict[str, Any], indent: int = 0) -> Iterator[str]:
    for key, value in facts.items():
        name = " " * indent + str(key) + ":"
        if isinstance(value, dict) and value:
            yield name
            yield from _lines(value, indent + 2)
        else:
            yield f"{name:<28} {_short(value)}"


def _short(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(_short(v) for v in value) or "none"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)
