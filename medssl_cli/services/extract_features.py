"""Vectors of a cohort, row by row, with their labels: into a folder, or into memory.

Rows are made in the order of the cases, and labels are looked up by the ids of the rows that were really made: a case
that failed takes its label with it, so that nothing can shift.

Letters: R rows, P numbers of a row, C label columns, N slices of a case, D width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from medssl_cli.core.case import Case
from medssl_cli.core.errors import ConfigError, DataError
from medssl_cli.core.run import RESEARCH_NOTE, hide_home, plain
from medssl_cli.core.wording import counted
from medssl_cli.data.feature_store import (
    FeaturePart,
    FeatureSet,
    ImageFacts,
    Row,
    features_in_memory,
)
from medssl_cli.data.images import is_image, volume_stem
from medssl_cli.data.labels import SLICE_COLUMN, encode_columns, read_targets, target_columns
from medssl_cli.data.manifest import class_folders, read_table, row_ids, say_some
from medssl_cli.services.case_vectors import CaseVectors, pooled
from medssl_cli.services.embedding import Embedder
from medssl_cli.services.extract_cohort import Cohort, OnError, row_path

log = logging.getLogger(__name__)

Pool = Literal["mean", "meanmax", "none"]
Progress = Callable[[int, int], None]
CLASS_FOLDER = "label"
"""Name of the label column where the tree itself tells the classes."""
_EXAMPLES = 10


@dataclass(frozen=True)
class Failed:
    """A case without vectors.

    Args:
        case_id, path, reason, fix: As in ``failures.csv``.
        code: ``path_not_found``, ``not_a_file``, ``not_nifti_file``, or that of the error.
    """

    case_id: str
    path: str
    reason: str
    fix: str
    code: str


@dataclass(frozen=True)
class Counts:
    """Work of all processes.

    Args:
        forward_passes: Slices, or pictures, that went through the network.
        cache_hits: Slices, or pictures, whose vectors were there already.
    """

    forward_passes: int
    cache_hits: int

    def __str__(self) -> str:
        passes = f"{self.forward_passes} forward pass{'' if self.forward_passes == 1 else 'es'}"
        return f"{passes}, {counted(self.cache_hits, 'slice')} from the cache"


class Sink(Protocol):
    """Where the rows of a part go."""

    def add(self, rows: Sequence[Row], vectors_RP: np.ndarray, facts: ImageFacts | None = None) -> int:
        """Append rows of one case; the number of the first."""
        ...

    def add_patches(self, row: int, patches_NShwD: np.ndarray) -> None:
        """Keep the patch tokens of the case whose first row this is."""
        ...


@dataclass
class RowsInMemory:
    """The rows of a part in lists."""

    rows: list[Row] = field(default_factory=list)
    vectors: list[np.ndarray] = field(default_factory=list)
    facts: dict[str, ImageFacts] = field(default_factory=dict)

    def add(self, rows: Sequence[Row], vectors_RP: np.ndarray, facts: ImageFacts | None = None) -> int:
        """See ``Sink``."""
        first = len(self.rows)
        self.rows += rows
        self.vectors.append(vectors_RP)
        if facts is not None and rows:
            self.facts[rows[0].case_id] = facts
        return first

    def add_patches(self, row: int, patches_NShwD: np.ndarray) -> None:
        """Patch tokens are no part of the vectors: a head in memory has no use for them."""

    def part(self, name: str, labels_RC: np.ndarray | None) -> FeaturePart:
        """The rows as a part."""
        return FeaturePart(name, np.concatenate(self.vectors), labels_RC, tuple(self.rows), self.facts)


def features_of(
    cohort: Cohort,
    embedder: Embedder,
    *,
    pool: Pool,
    source: LabelSource,
    on_error: OnError = "stop",
    progress: Progress | None = None,
) -> tuple[FeatureSet, list[Failed]]:
    """Vectors and labels of a cohort in memory; nothing is written but the cache of the embedder.

    Args:
        cohort: The parts to be computed, from ``read_cohort``.
        embedder: Makes the vectors.
        pool: One row a case (mean, meanmax), or one a slice (none).
        source: Where labels come from, from ``find_labels``.
        on_error: Whether a bad case stops, or is left out and told of.
        progress: Told cases done and in all.

    Returns:
        The features, and all cases that could not be read.

    Raises:
        DataError: A bad case (with ``stop``), labels that fit no case, or no case left.
    """
    steps = Steps(progress, len(cohort.cases))
    sinks = {name: RowsInMemory() for name in cohort.parts}
    failed = {
        name: fill(sinks[name], name, cases, cohort, embedder, pool, on_error, steps)
        for name, cases in cohort.parts.items()
    }
    refuse_empty(sinks, failed)
    arrays, values = encode(source, {name: sink.rows for name, sink in sinks.items()})
    info = feature_info(cohort, embedder, pool, source, values, failed)
    parts = [sink.part(name, arrays[name]) for name, sink in sinks.items() if sink.rows]
    return features_in_memory(info, parts), [bad for found in all_failures(cohort, failed).values() for bad in found]


# --- rows ------------------------------------------------------------------------------------------------------------


@dataclass
class Steps:
    """Counts cases for a progress bar."""

    progress: Progress | None
    total: int
    done: int = 0

    def step(self) -> None:
        """One case is done."""
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total)


def fill(
    sink: Sink,
    name: str,
    cases: Sequence[Case],
    cohort: Cohort,
    embedder: Embedder,
    pool: Pool,
    on_error: OnError,
    steps: Steps,
) -> list[Failed]:
    """Put the rows of a part into ``sink``, case by case; the cases that failed.

    Raises:
        DataError: A bad case, with ``on_error: stop``.
    """
    failed: dict[str, Failed] = {}
    base = cohort.root if cohort.root.is_dir() else cohort.root.parent
    for case, view, found in vectors_of(cases, embedder, views_of(name, cohort, embedder)):
        if isinstance(found, DataError):
            if on_error == "stop":
                raise found
            if case.case_id not in failed:
                log.warning("%s: %s", case.case_id, found.what)
                failed[case.case_id] = _failed(case, found)
        elif case.case_id not in failed:
            _add(sink, case, view, found, pool, base)
        if view == 0:
            steps.step()
    return list(failed.values())


def vectors_of(
    cases: Sequence[Case], embedder: Embedder, views: int, shown: tuple[str, ...] | None = None
) -> Iterator[tuple[Case, int, CaseVectors | DataError]]:
    """(case, view, vectors or what is wrong with the case); any other error is raised."""
    stream = embedder.embed_many(cases, shown=shown, views=views)
    with closing(stream) as found:  # type: ignore[type-var]
        for case, view, vectors in found:
            if isinstance(vectors, Exception) and not isinstance(vectors, DataError):
                raise vectors
            yield case, view, vectors


def check_views(cohort: Cohort, embedder: Embedder) -> None:
    """Refuse several views where nothing could be flipped.

    Raises:
        ConfigError: ``views`` has no effect.
    """
    if embedder.config.views > 1 and not (cohort.kind == "images" and "train" in cohort.parts):
        raise ConfigError(
            "views has no effect on these data.",
            where=f"views={embedder.config.views}; {cohort.kind}, parts {', '.join(cohort.parts)}",
            fix="leave it out: only pictures of a training part are flipped",
            code="config_without_effect",
        )


def views_of(name: str, cohort: Cohort, embedder: Embedder) -> int:
    """Views of each case of a part: what is scored is seen once, as it is."""
    return embedder.config.views if name == "train" and cohort.kind == "images" else 1


def _add(sink: Sink, case: Case, view: int, found: CaseVectors, pool: Pool, base: Path) -> None:
    count, path = len(found.slices_ND), row_path(case, base)
    facts = found.facts if view == 0 else None
    indices = [None] if pool != "none" else [int(index) for index in found.indices_N]
    vectors_RP = found.slices_ND if pool == "none" else pooled(found.slices_ND, pool)[None]
    rows = [Row(case.case_id, case.patient_id, case.study_uid, index, count, view, path) for index in indices]
    first = sink.add(rows, vectors_RP, facts)
    if found.patches_NShwD is not None:
        sink.add_patches(first, found.patches_NShwD)


def _failed(case: Case, error: DataError) -> Failed:
    path = hide_home(str(next(iter(case.sequences.values())).path))
    return Failed(case.case_id, path, f"{error.what} {hide_home(error.where)}".strip(), error.fix, error.code)


def refuse_empty(sinks: Mapping[str, Any], failed: Mapping[str, Sequence[Failed]]) -> None:
    """Refuse to go on without a single vector.

    Raises:
        DataError: With the first reasons.
    """
    if any(sink.rows for sink in sinks.values()):
        for name, sink in sinks.items():
            if not sink.rows:
                log.warning("no case of the part %s is left", name)
        return
    reasons = [failure for failures in failed.values() for failure in failures]
    raise DataError(
        f"None of {len(reasons)} cases could be looked at.",
        where="\n".join(f"{failure.path}: {failure.reason}" for failure in reasons[:5]),
        fix=reasons[0].fix if reasons else "name a folder or table with cases",
        code="cases_failed",
    )


# --- labels ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LabelSource:
    """Where labels come from; no targets if there are none.

    Args:
        targets: Names of the label columns.
        path: The table, in words.
        by_case: Cells by case id.
        of_slices: Looks up the cells of rows of slices, for a table that labels slices.
    """

    targets: tuple[str, ...] = ()
    path: str | None = None
    by_case: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    of_slices: Callable[[Sequence[Row]], list[tuple[str, ...]]] | None = None

    def cells(self, rows: Sequence[Row]) -> list[tuple[str, ...]]:
        """Text cells of each row; empty where unknown."""
        if self.of_slices is not None:
            return self.of_slices(rows)
        unknown = ("",) * len(self.targets)
        return [self.by_case.get(row.case_id, unknown) for row in rows]


def find_labels(cohort: Cohort, labels: Path | None, targets: tuple[str, ...], pool: Pool) -> LabelSource:
    """The labels of a cohort, looked up before anything is computed.

    A table that is named comes first; then the columns of the series table itself, or ``labels.csv`` in the tree; then
    class folders, with or without split folders above them, or the labels that a layout brings.

    Raises:
        ConfigError: A table without a column, or a column without a table.
        DataError: The table cannot be read, has no such column, or fits no case.
    """
    if labels is not None and not targets:
        raise ConfigError(
            "The column of the labels is not named.",
            where=f"{hide_home(str(labels))}: {', '.join(read_table(labels).header)}",
            fix="pass one or more of these columns to --target, joined by commas",
            code="target_missing",
        )
    own = _own_table(cohort)
    if not targets:
        told = {case.case_id: (case.label,) for case in cohort.cases if case.label}
        found: Mapping[str, tuple[str, ...]] = told or _of_folders(cohort)
        return LabelSource((CLASS_FOLDER,), "the data", found) if found else LabelSource()
    path = labels or own
    if labels is None and not own.is_file():
        raise ConfigError(
            "A label column was named, but no table that has it.",
            where=f"--target {','.join(targets)}; there is no {hide_home(str(own))}",
            fix="pass --labels CSV",
            code="labels_missing",
        )
    if path.resolve() == cohort.root.resolve():
        table = read_table(path)
        columns = target_columns(table, targets)
        by_case = dict(zip(row_ids(table), zip(*columns, strict=True), strict=True))
        return LabelSource(targets, hide_home(str(path)), by_case)
    return _from_table(path, targets, cohort, pool)


def _own_table(cohort: Cohort) -> Path:
    """Where data keep their own label columns; it need not exist."""
    return cohort.root if cohort.root.is_file() else cohort.root / "labels.csv"


def _of_folders(cohort: Cohort) -> Mapping[str, tuple[str, ...]]:
    """Labels of pictures right in class folders; none beside a table, whose columns are to be named."""
    if cohort.kind != "images" or not cohort.root.is_dir() or _own_table(cohort).is_file():
        return {}
    known = class_folders(cohort.root)
    found: dict[str, tuple[str, ...]] = {
        case.case_id: (known[case.case_id],) for case in cohort.cases if case.case_id in known
    }
    if found:
        classes = sorted(set(known.values()))
        log.warning("labels: the %d folders of the pictures are taken as classes: %s", len(classes), say_some(classes))
    return found


def check_has_labels(source: LabelSource, cohort: Cohort) -> None:
    """Refuse data without labels, before anything is computed.

    Raises:
        DataError: Nothing tells labels.
    """
    if source.targets:
        return
    own = _own_table(cohort)
    if own.is_file():
        where, fix = f"{hide_home(str(own))}: {', '.join(read_table(own).header)}", "pass one or more of these columns"
        fix += " to --target, or --labels CSV --target COL"
    else:
        where, fix = hide_home(str(cohort.root)), "pass --labels CSV --target COL"
        if cohort.kind == "images":
            fix += ", or put the pictures into class folders: CLASS/x.png, or train/CLASS/x.png and val/CLASS/y.png"
    raise DataError("The data tell no labels.", where=where, fix=fix, code="labels_missing")


def _from_table(path: Path, targets: tuple[str, ...], cohort: Cohort, pool: Pool) -> LabelSource:
    base = cohort.root if cohort.root.is_dir() else cohort.root.parent
    images = cohort.kind == "images"

    def look_up(rows: Sequence[Row]) -> list[tuple[str, ...]]:
        return read_targets(path, targets, rows, of_images=images, root=base)

    table = read_table(path)
    if table.find((SLICE_COLUMN,)) is not None and pool == "none":
        target_columns(table, targets)
        return LabelSource(targets, hide_home(str(path)), of_slices=look_up)
    rows = [
        Row(case.case_id, case.patient_id, case.study_uid, None, 0, 0, row_path(case, base)) for case in cohort.cases
    ]
    by_case = {row.case_id: cells for row, cells in zip(rows, look_up(rows), strict=True)}
    return LabelSource(targets, hide_home(str(path)), by_case)


def encode(
    source: LabelSource, rows: Mapping[str, Sequence[Row]]
) -> tuple[dict[str, np.ndarray | None], dict[str, list[str]]]:
    """Labels of each part as numbers, classes counted alike in all of them, and the texts of the classes."""
    if not source.targets:
        return dict.fromkeys(rows), {}
    every = [row for found in rows.values() for row in found]
    labels_RC, values = encode_columns(source.cells(every), source.targets)
    arrays: dict[str, np.ndarray | None] = {}
    start = 0
    for name, found in rows.items():
        arrays[name] = labels_RC[start : start + len(found)]
        start += len(found)
    return arrays, values


# --- what is told of them --------------------------------------------------------------------------------------------


def feature_info(
    cohort: Cohort,
    embedder: Embedder,
    pool: Pool,
    labels: LabelSource,
    values: Mapping[str, Sequence[str]],
    failed: Mapping[str, Sequence[Failed]],
    counts: Counts | None = None,
) -> dict[str, Any]:
    """``features.json`` without its header, ``splits`` and ``feature_digest``."""
    counts = counts or Counts(embedder.forward_passes, embedder.cache_hits)
    backbone, config = embedder.backbone, embedder.config
    failures = all_failures(cohort, failed)
    return plain(
        {
            "input": hide_home(str(cohort.root)),
            "kind": cohort.kind,
            "pool_mode": pool,
            "tokens": list(config.tokens),
            "layers": config.layers,
            "slice_dim": embedder.width,
            "embedding_dim": embedder.width * (2 if pool == "meanmax" else 1),
            "targets": list(labels.targets),
            "labels": labels.path,
            "label_values": values,
            "group_level": cohort.group_level,
            "model": {
                "path": hide_home(str(backbone.found.weights.absolute())),
                "sha256": backbone.card["sha256"],
                "arch": backbone.card.get("arch"),
                "sequences": list(backbone.sequences),
            },
            "orientation": config.orientation,
            "extraction": embedder.settings,
            "forward_passes": counts.forward_passes,
            "cache_hits": counts.cache_hits,
            "failures": sum(map(len, failures.values())),
            "invalid_report": invalid_report(failures),
            "note": RESEARCH_NOTE,
        }
    )


def all_failures(cohort: Cohort, failed: Mapping[str, Sequence[Failed]]) -> dict[str, list[Failed]]:
    """By split: cases that could not be read at all, then those that could not be looked at."""
    names = dict.fromkeys([*cohort.parts, *cohort.invalid])
    return {
        name: [
            *(Failed(case_id, hide_home(path), reason, fix, _code_of(path)) for case_id, path, reason, fix in
              cohort.invalid.get(name, ())),
            *failed.get(name, ()),
        ]
        for name in names
    }  # fmt: skip


def invalid_report(failures: Mapping[str, Sequence[Failed]]) -> dict[str, Any]:
    """How many cases of each split were left out, and the first of them with their reasons."""
    return {
        name: {
            "count": len(found),
            "examples": [
                {"case_id": f.case_id, "path": f.path, "reason": f.code or f.reason} for f in found[:_EXAMPLES]
            ],
        }
        for name, found in failures.items()
    }


def _code_of(path: str) -> str:
    """Why a file that a table or tree names is none; empty for a fault inside it."""
    place = Path(path)
    if not place.exists():
        return "path_not_found"
    if not place.is_file():
        return "not_a_file"
    return "not_nifti_file" if volume_stem(place) is None and not is_image(place) else ""
