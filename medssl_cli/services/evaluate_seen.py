"""Whom a model has seen: the cases of its run, and the refusal to score it on them."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

from medssl_cli.core.errors import CheckpointError, DataError
from medssl_cli.core.run import hide_home
from medssl_cli.core.wording import counted

CASES = "cases.csv"
SEEN = ("train", "val")
"""Parts that a model learns from or is chosen on."""
_SHOWN = 8


def refuse_seen(run: Path, part: str, cases: Iterable[tuple[str, str]], what: str = "head") -> None:
    """Refuse a part with patients or cases that a model was trained or chosen on.

    Args:
        run: Folder of its run, with the list of these cases.
        part: Name of the part.
        cases: (case id, patient id) of the part.
        what: What kind of model it is, for messages.

    Raises:
        DataError: ``split_leak``.
        CheckpointError: The list of these cases cannot be read.
    """
    seen_cases, seen_patients = read_seen(run / CASES, what)
    shared = []
    for case_id, patient_id in dict(cases).items():
        if case_id in seen_cases:
            shared.append(f"case {case_id} ({seen_cases[case_id]})")
        elif patient_id in seen_patients:
            shared.append(f"patient {patient_id} ({seen_patients[patient_id]}), case {case_id}")
    if shared:
        more = f"\nand {len(shared) - _SHOWN} more" if len(shared) > _SHOWN else ""
        raise DataError(
            f"The {what} has seen {counted(len(shared), 'case')} of part {part}: scores would be too good.",
            where="\n".join(shared[:_SHOWN]) + more,
            fix="evaluate a part held back, or ask for --split train or val by name; other people of the same ids need "
            "ids of their own",
            code="split_leak",
        )


def read_seen(path: Path, what: str = "head") -> tuple[dict[str, str], dict[str, str]]:
    """(part by case, part by patient) of a run: what it was trained and chosen on.

    Raises:
        CheckpointError: The list cannot be read.
    """
    try:
        with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
            rows = [(row["part"], row["case_id"], row["patient_id"]) for row in csv.DictReader(file)]
    except (OSError, KeyError, csv.Error) as error:
        raise CheckpointError(
            f"The list of the cases that the {what} was trained on cannot be read.",
            where=f"{hide_home(str(path))}: {error}",
            fix=f"copy the whole run folder of the {what}",
            code="head_cases_missing",
        ) from error
    kept = [row for row in rows if row[0] in SEEN]
    return {case_id: part for part, case_id, _ in kept}, {patient: part for part, _, patient in kept if patient}
