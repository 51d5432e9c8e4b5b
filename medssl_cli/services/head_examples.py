"""Labelled vectors of one part, cut into the units that a head is trained on: cases, bags of slices, or slices.

Letters: R rows, U units (a case, one view of a picture, or a slice), N slices of a bag, B cases, P width of a row,
L columns of encoded labels.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from medssl_cli.core.errors import DataError
from medssl_cli.core.wording import counted
from medssl_cli.data.feature_store import FeaturePart, Row
from medssl_cli.services.embedding import pooled
from medssl_cli.services.head import PoolMode, mismatch, novelty_vector

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Examples:
    """What a head is trained or judged on.

    Args:
        name: Of the part.
        rows_RP: Vectors; the rows of a unit lie one behind the other.
        stops_U: Row behind the last one of each unit; the first unit begins at row 0.
        labels_UL: Encoded labels of each unit.
        case_U: Position of its case.
        is_plain_U: The image as it is, as against a random view of it.
        case_ids, patient_ids: B of them.
        labels_BL: Encoded labels of each case; of a slice head: 1 if any slice has the finding.
    """

    name: str
    rows_RP: np.ndarray
    stops_U: np.ndarray
    labels_UL: np.ndarray
    case_U: np.ndarray
    is_plain_U: np.ndarray
    case_ids: tuple[str, ...]
    patient_ids: tuple[str, ...]
    labels_BL: np.ndarray

    def __len__(self) -> int:
        return len(self.stops_U)

    @property
    def starts_U(self) -> np.ndarray:
        """First row of each unit."""
        return np.concatenate([[0], self.stops_U[:-1]]).astype(np.int64)

    @property
    def has_single_rows(self) -> bool:
        """Whether every unit is one row."""
        return len(self.rows_RP) == len(self.stops_U)

    def chosen(self, case_ids: set[str]) -> Examples:
        """The units of some of the cases."""
        keep_B = np.array([case_id in case_ids for case_id in self.case_ids], dtype=bool)
        place_B = np.cumsum(keep_B) - 1
        keep_U = keep_B[self.case_U]
        lengths_U = self.stops_U - self.starts_U
        return replace(
            self,
            rows_RP=self.rows_RP[np.repeat(keep_U, lengths_U)],
            stops_U=np.cumsum(lengths_U[keep_U]),
            labels_UL=self.labels_UL[keep_U],
            case_U=place_B[self.case_U[keep_U]],
            is_plain_U=self.is_plain_U[keep_U],
            case_ids=tuple(c for c, keep in zip(self.case_ids, keep_B, strict=True) if keep),
            patient_ids=tuple(p for p, keep in zip(self.patient_ids, keep_B, strict=True) if keep),
            labels_BL=self.labels_BL[keep_B],
        )

    def plain(self) -> Examples:
        """The images as they are alone; of a part without views the part itself."""
        if self.is_plain_U.all():
            return self
        keep_U, lengths_U = self.is_plain_U, self.stops_U - self.starts_U
        return replace(
            self,
            rows_RP=self.rows_RP[np.repeat(keep_U, lengths_U)],
            stops_U=np.cumsum(lengths_U[keep_U]),
            labels_UL=self.labels_UL[keep_U],
            case_U=self.case_U[keep_U],
            is_plain_U=keep_U[keep_U],
        )

    def case_vectors(self, pool_mode: PoolMode) -> np.ndarray:
        """(B, P) one vector of each case by which cases are compared, of the images as they are."""
        plain = self.plain()
        if plain.has_single_rows and pool_mode in ("mean", "meanmax"):
            return plain.rows_RP
        rows_of: list[list[int]] = [[] for _ in self.case_ids]
        for case, start, stop in zip(plain.case_U, plain.starts_U, plain.stops_U, strict=True):
            rows_of[case] += range(start, stop)
        return np.stack([novelty_vector(plain.rows_RP[rows], pool_mode) for rows in rows_of])


def pool_mode_of(info: Mapping[str, object], asked: str | None, kind: str, level: str) -> PoolMode:
    """How a head pools the slices of these features.

    Args:
        info: ``features.json``.
        asked: ``pool`` of the head's settings.
        kind: Of the head.
        level: ``case`` or ``slice``.

    Raises:
        ConfigError: The features are pooled in another way already.
    """
    stored = str(info["pool_mode"])
    wanted = "attention" if kind == "attention_mil" else "none" if level == "slice" else asked
    if stored == "none":
        if wanted is None:
            log.info("Features are stored by slice: a case is the mean of its slices (pool=meanmax for another way)")
        return wanted or "mean"  # type: ignore[return-value]
    if wanted in (None, stored):
        return stored  # type: ignore[return-value]
    raise mismatch(
        "features",
        {"attention": "slice vectors (attention)", "none": "slice vectors (level=slice)"}.get(wanted, wanted),
        f"{info['embedding_dim']} numbers a case ({stored} of slice vectors of {info['slice_dim']})",
        wanted,
    )


def build_examples(part: FeaturePart, labels_RL: np.ndarray, pool_mode: PoolMode, *, by_slice: bool) -> Examples:
    """The labelled units of a part; rows without any label are left out and counted.

    Args:
        part: Vectors and ids.
        labels_RL: Encoded, one row for each vector.
        pool_mode: Of the head.
        by_slice: The features are one row a slice.

    Raises:
        DataError: No label at all, or labels of slices for a head of whole cases.
    """
    known_R = ~np.isnan(labels_RL).all(axis=1)
    _tell_unlabelled(part, known_R)
    units = _units(part.rows, known_R if pool_mode == "none" else np.ones(len(known_R), bool), pool_mode)
    units = [unit for unit in units if known_R[unit].any()]
    if not units:
        raise DataError(
            f"No case of the {part.name} part has a label.",
            where=f"{counted(len(part.case_ids), 'case')}, {counted(labels_RL.shape[1], 'label column')}",
            fix="pass --labels CSV and --target COL, or check the ids there",
            code="labels_missing",
        )
    first_U = [part.rows[unit[0]] for unit in units]
    cases = tuple(dict.fromkeys(row.case_id for row in first_U))
    place = {case_id: number for number, case_id in enumerate(cases)}
    case_U = np.array([place[row.case_id] for row in first_U])
    if all(len(unit) == 1 for unit in units):
        labels_UL = labels_RL[np.concatenate(units)]
    else:
        labels_UL = np.stack([_label_of(labels_RL[unit], part.rows[unit[0]]) for unit in units])
    patients = {row.case_id: row.patient_id or row.study_uid or row.case_id for row in first_U}
    order = np.concatenate(units)
    rows = np.asarray(part.embeddings_RP[order], dtype=np.float32)
    stops = np.cumsum([len(unit) for unit in units])
    if by_slice and pool_mode in ("mean", "meanmax"):
        rows = np.stack([pooled(chunk, pool_mode) for chunk in np.split(rows, stops[:-1])])
        stops = np.arange(1, len(units) + 1)
    return Examples(
        name=part.name,
        rows_RP=rows,
        stops_U=stops,
        labels_UL=labels_UL,
        case_U=case_U,
        is_plain_U=np.array([row.view == 0 for row in first_U], dtype=bool),
        case_ids=cases,
        patient_ids=tuple(patients[case_id] for case_id in cases),
        labels_BL=_case_labels(labels_UL, case_U, len(cases)),
    )


def refuse_leak(train: Examples, val: Examples | None) -> None:
    """Refuse patients on both sides.

    Raises:
        DataError: With their names.
    """
    shared = sorted(set(train.patient_ids) & set(val.patient_ids if val is not None else ()))
    if shared:
        raise DataError(
            "Patients of the validation part are in the training part too.",
            where=f"{counted(len(shared), 'patient')}: {', '.join(shared[:5])}",
            fix="split again by patient, with `medssl split`, and extract again",
            code="split_leak",
        )


def _units(rows: Sequence[Row], keep_R: np.ndarray, pool_mode: PoolMode) -> list[np.ndarray]:
    """Rows of each unit: a slice, or all slices of one view of a case."""
    if pool_mode == "none":
        return [np.array([number]) for number in np.flatnonzero(keep_R)]
    found: dict[tuple[str, int], list[int]] = {}
    for number, row in enumerate(rows):
        found.setdefault((row.case_id, row.view), []).append(number)
    return [np.array(numbers) for numbers in found.values()]


def _label_of(labels_NL: np.ndarray, row: Row) -> np.ndarray:
    """The one label of all rows of a unit."""
    known = labels_NL[~np.isnan(labels_NL).all(axis=1)]
    if len(known) != len(labels_NL) or not np.array_equal(known, np.broadcast_to(known[:1], known.shape), True):
        raise DataError(
            "Slices of one case have different labels, and the head is to be of whole cases.",
            where=f"case {row.case_id}",
            fix="pass level=slice for a head of slices, or labels of cases",
            code="labels_by_slice",
        )
    return known[0]


def _case_labels(labels_UL: np.ndarray, case_U: np.ndarray, cases: int) -> np.ndarray:
    """Label of each case: the highest known one of its units, which are alike unless they are slices."""
    highest = np.full((cases, labels_UL.shape[1]), -np.inf)
    np.maximum.at(highest, case_U, np.where(np.isnan(labels_UL), -np.inf, labels_UL))
    return np.where(np.isneginf(highest), np.nan, highest)


def _tell_unlabelled(part: FeaturePart, known_R: np.ndarray) -> None:
    labelled = {row.case_id for row, known in zip(part.rows, known_R, strict=True) if known}
    left_out = [case_id for case_id in part.case_ids if case_id not in labelled]
    if left_out:
        log.warning(
            "%s of the %s part without a label: left out (%s%s)",
            counted(len(left_out), "case"),
            part.name,
            ", ".join(left_out[:3]),
            ", …" if len(left_out) > 3 else "",
        )


def case_rows(train: Examples, val: Examples | None) -> list[tuple[str, str, str]]:
    """(part, case, patient) of all that a head has seen, for ``cases.csv``."""
    parts = [("train", train)] + ([("val", val)] if val is not None else [])
    return [(name, *ids) for name, part in parts for ids in zip(part.case_ids, part.patient_ids, strict=True)]
