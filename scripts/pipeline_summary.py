#!/usr/bin/env python
"""What ``ich_pipeline.sh`` looks at itself: the labels before it starts, and one summary of all steps at its end.

``pipeline_summary.py check SERIES_CSV [KEY=VALUE...]`` refuses a table whose ``label_any`` is not the largest of the
five kinds, and keys that `medssl train-head` would refuse hours later.
``pipeline_summary.py write OUT [KEY=VALUE...]`` writes ``test_metrics.json``, ``test_probs.npy`` and
``pipeline_summary.json`` from what the four commands left in OUT.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medssl_cli.core.config import load_config
from medssl_cli.core.errors import ConfigError, DataError, MedsslError
from medssl_cli.core.run import RESEARCH_NOTE, atomic_path, hide_home, result_header, write_json
from medssl_cli.data.manifest import STUDY_ALIASES, Table, read_table
from medssl_cli.services.head_config import HeadConfig, check_head_config

LABELS = tuple(
    f"label_{name}" for name in ("any", "epidural", "intraparenchymal", "intraventricular", "subarachnoid", "subdural")
)
PARTS = ("train", "val", "test")
RECIPE = "head.config="
"""The one key of the pipeline that is none of train-head: the recipe that its keys change."""


def check_labels(series: Path) -> None:
    """Refuse a table without the six columns, with cells that are no numbers, or with an ``any`` of its own mind.

    Raises:
        DataError: With the lines.
    """
    table = read_table(series)
    positive = [positives(table, name) for name in LABELS]
    wrong = [
        line
        for line, any_kind, *kinds in zip(table.lines, *positive, strict=True)
        if any_kind is not None and None not in kinds and any_kind != any(kinds)
    ]
    if wrong:
        shown = ", ".join(map(str, wrong[:8])) + (f" and {len(wrong) - 8} more" if len(wrong) > 8 else "")
        raise DataError(
            "label_any is not the largest of the five kinds.",
            where=f"{series}, line {shown}",
            fix="correct the labels: any is 1 exactly when one of the kinds is",
            code="labels_inconsistent",
        )


def positives(table: Table, column: str) -> list[bool | None]:
    """Whether each cell is above 0; None where it is empty or NaN.

    Raises:
        DataError: A cell that is no number.
    """
    values: list[bool | None] = []
    for line, cell in zip(table.lines, table.column(column), strict=True):
        try:
            number = float(cell or "nan")
            values.append(None if math.isnan(number) else number > 0)
        except ValueError as error:
            raise DataError(
                "A label is no number.",
                where=f"{table.path}, line {line}, {column}: {cell[:40]!r}",
                fix="write 1 or 0, or leave the cell empty where it is unknown",
                code="label_not_numeric",
            ) from error
    return values


def count_split(path: Path) -> dict[str, Any]:
    """Series, studies and positives of each label, in the order of ``LABELS``, of one list of ``medssl split``."""
    table = read_table(path)
    study = table.find(STUDY_ALIASES)
    studies = set(table.column(study)) if study else set(map(str, table.lines))
    return {
        "num_series": len(table.rows),
        "num_studies": len(studies),
        "positive_counts": [sum(value is True for value in positives(table, name)) for name in LABELS],
    }


def write_summary(out: Path, words: Sequence[str]) -> Path:
    """Gather what the commands wrote.

    Raises:
        ConfigError: A step has left nothing.
    """
    started = time.time()
    features = read_json(out / "features" / "features.json")
    train = read_json(out / "head" / "train_summary.json")
    metrics = read_json(out / "eval" / "metrics.json")
    write_json(out / "test_metrics.json", metrics)
    with atomic_path(out / "test_probs.npy") as temporary:
        shutil.copyfile(out / "eval" / "probs.npy", temporary)
    summary = {
        **result_header("ich_pipeline", started),
        "config": {
            "overrides": [hide_home(word) for word in words],
            "split": {key: read_json(out / "splits" / "split_summary.json").get(key) for key in ("ratios", "seed")},
            "extract": features.get("extraction"),
            "pool_mode": features.get("pool_mode"),
            "head": train.get("config"),
        },
        "labels": list(LABELS),
        "splits": {
            part: count_split(out / "splits" / f"{part}.csv")
            for part in PARTS
            if (out / "splits" / f"{part}.csv").is_file()
        },
        "features": features,
        "train_summary": train,
        "test_metrics": metrics,
        "invalid_nifti_report": features.get("invalid_report", {}),
        "note": RESEARCH_NOTE,
    }
    write_json(out / "pipeline_summary.json", summary)
    return out / "pipeline_summary.json"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ConfigError: Missing or damaged.
    """
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            "A step of the pipeline has left no result.",
            where=f"{path}: {error}",
            fix="run scripts/ich_pipeline.sh again",
            code="pipeline_incomplete",
        ) from error


def main(words: Sequence[str]) -> int:
    """Exit code of one of the two uses."""
    try:
        if len(words) >= 2 and words[0] == "check":
            recipe = next((word.partition("=")[2] for word in words[2:] if word.startswith(RECIPE)), "ich")
            keys = [word for word in words[2:] if not word.startswith(RECIPE)]
            check_head_config(load_config(HeadConfig, recipe, recipes="train_head", overrides=keys), "multilabel")
            check_labels(Path(words[1]))
        elif len(words) >= 2 and words[0] == "write":
            print(write_summary(Path(words[1]), words[2:]))
        else:
            raise ConfigError("Wrong words.", where=" ".join(words), fix=(__doc__ or "").strip(), code="usage")
    except MedsslError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
