"""``medssl split``: who is for training, who for validation, who for the test; patients stay together."""

from __future__ import annotations

import json
import logging
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

from medssl_cli.core.errors import ConfigError, DataError
from medssl_cli.core.run import (
    check_out_folder,
    claim_out_folder,
    hide_home,
    locked,
    result_header,
    to_json,
    write_csv,
    write_json,
    write_text,
)
from medssl_cli.core.wording import counted
from medssl_cli.data.ct_pet import CtPetData
from medssl_cli.data.layouts import LayoutChoice, LayoutName, asked_layout, read_layout_cases
from medssl_cli.data.manifest import (
    ID_ALIASES,
    SPLIT_ALIASES,
    Owner,
    Table,
    case_ids,
    filled_column,
    groups_by_pattern,
    label_id_column,
    match_image_ids,
    nearest_id,
    patient_of,
    read_ids,
    read_image_cases,
    read_owners,
    read_table,
    row_ids,
    say_some,
    split_digest,
    table_owners,
)
from medssl_cli.data.split import DEFAULT_RATIOS, SPLITS, Item, check_ratios, fold_items, prevalence, split_items
from medssl_cli.services import split_pairs
from medssl_cli.services.split_pairs import Files

log = logging.getLogger(__name__)

MAX_CLASSES = 20
"""A column with more values, and one for every fifth case, is a measurement and no class."""


MIN_SHARED = 10
"""Every tenth image at least shares its name with another before a pattern is suggested."""

_SHARED_NAMES = (  # what differs, the pattern that leaves it out, what the rest of a name holds if it is of a patient
    ("left and right", r"([^/]+?)(?:[_-](?:[LRlr]|O[DS]))?(?:\.\w+)?$", ""),
    ("a last number", r"([^/]+?)(?:[_-]\d+)?(?:\.\w+)?$", r"\d"),  # not img_001: its img is no patient
)


@dataclass(frozen=True)
class Source:
    """What is split.

    Args:
        items: One for each case, image or row, in the order of the source.
        level: What the groups are: ``patient_id``, ``study_uid``, ``case``, a column or a pattern.
        header, rows: What is written of each item; rows by item id.
        notes: What a reader should know.
        split_column: Column that names the part in each list of a table; empty writes none.
    """

    items: tuple[Item, ...]
    level: str
    header: tuple[str, ...]
    rows: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...] = ()
    split_column: str = ""

    @property
    def written_header(self) -> tuple[str, ...]:
        """Of a list: a column of parts that the table has is written anew, else it is the last one."""
        added = self.split_column and self.split_column not in self.header
        return (*self.header, self.split_column) if added else self.header

    def written_row(self, item_id: str, part: str) -> tuple[str, ...]:
        """The row of an item in the list of ``part``."""
        row = self.rows[item_id]
        if not self.split_column:
            return row
        if self.split_column not in self.header:
            return (*row, part)
        return tuple(part if name == self.split_column else cell for name, cell in zip(self.header, row, strict=True))


@dataclass(frozen=True)
class SplitResult:
    """What was written where.

    Args:
        out: The folder.
        report: Contents of ``split_summary.json``.
    """

    out: Path
    report: dict[str, Any] = field(default_factory=dict)

    def summary(self) -> str:
        """A few lines for a terminal."""
        r = self.report
        sizes = f"{counted(r['n_items'], 'case')} in {counted(r['n_groups'], 'group')}"
        lines = [f"{sizes}, kept together by {r['group_by']}; seed {r['seed']}"]
        for name, part in r["splits"].items():
            shares = ", ".join(f"{k} {100 * v:.1f} %" for k, v in (part["prevalence"] or {}).items() if v is not None)
            sizes = f"{counted(part['n_items'], 'case'):>13} {counted(part['n_groups'], 'group'):>14}"
            lines.append(f"  {name:<6}{sizes}   {shares}".rstrip())
        lines += [f"note: {note}" for note in r["notes"]]
        folds = f", fold_0 to fold_{r['folds'] - 1} and splits_final.json" if r["folds"] else ""
        files = ", ".join(f"{name}.csv" for name, count in r["counts"].items() if count)
        if r["files"] != "none":
            files += f", train/, val/ and test/ with {'links' if r['files'] == 'link' else 'copies'}"
        return "\n".join([*lines, f"written to {self.out}: {files}{folds}, split_summary.json"])

    def to_json(self) -> str:
        """One strict JSON document."""
        return to_json(self.report)


def split(
    source: Path,
    out: Path,
    *,
    ratios: tuple[float, float, float] = DEFAULT_RATIOS,
    seed: int = 42,
    folds: int | None = None,
    group_by: str | None = None,
    group_pattern: str | None = None,
    stratify: str | None = None,
    labels: Path | None = None,
    overwrite: bool = False,
    layout: LayoutChoice | Literal["ct-pet"] = "auto",
    template: str = "",
    files: Files | None = None,
) -> SplitResult:
    """Split a case tree, an image tree, a table or a data set in another layout, and write ids and a summary.

    Args:
        source: What to split.
        out: Folder for ``train.csv``, ``val.csv``, ``test.csv`` and ``split_summary.json``.
        ratios: Shares of train, val and test; a part whose share is 0 gets no file.
        seed: Of the draw.
        folds: Also ``fold_k/`` over train and val; the test part stays out of every fold.
        group_by: Column that tells the group, of the table itself, of ``labels`` or of ``cases.csv``.
        group_pattern: Regular expression that takes the group from a name.
        stratify: Column or columns, joined by commas, whose classes are spread evenly.
        labels: CSV with an id column for a tree.
        overwrite: Replace what lies in ``out``, another split among it.
        layout, template: As ``data.layout`` and ``data.template`` of a training; ``ct-pet`` for pairs of slices.
        files: Of a CT-PET data set: the tree of the parts as links (the default), copies or none.

    Raises:
        ConfigError: Contradicting options, or an output folder that cannot be used or holds another split.
        DataError: Unreadable source, unknown columns, too few groups.
    """
    started = time.time()
    check_ratios(ratios)
    if group_by and group_pattern:
        raise ConfigError(
            "Groups come from a column or from a pattern, not from both.",
            where="--group-by and --group-pattern",
            fix="leave one of them out",
            code="group_twice",
        )
    pairs_of = _read_pairs(source, layout, template, group_by, group_pattern, stratify, labels, files)
    if pairs_of is not None:
        files = files or "link"
        items = split_pairs.items_of(pairs_of)
        what = Source(items, "patient_id", split_pairs.HEADER, split_pairs.rows_of(pairs_of))
    else:
        files = "none"
        kind = asked_layout(source, cast(LayoutChoice, layout), template)
        what = _read_source(source, kind, template, group_by, group_pattern, stratify, labels)
    parts = split_items(what.items, ratios, seed)
    pairs = _folds(what, parts, folds, seed)
    inputs = [source] if labels is None else [source, labels]
    check_out_folder(out, "split", overwrite=overwrite, inputs=inputs)
    with locked(out, "output folder"):
        if not overwrite:
            _refuse_other_split(out, what, parts, pairs)
        claim_out_folder(out, "split", overwrite=overwrite, inputs=inputs)
        _write(out, what, parts, pairs)
        report = {
            **result_header("split", started),
            "source": hide_home(str(source)),
            **_facts(out, what, parts),
            "ratios": list(ratios),
            "seed": seed,
            "stratify": stratify,
            "folds": len(pairs),
            "folds_cover": "train and val" if pairs else None,
            "files": files,
        }
        if pairs_of is not None:
            split_pairs.write_tree(out, pairs_of, parts, files)
            split_pairs.write_info(out, pairs_of, parts, {**report, "layout": pairs_of.layout})
        write_json(out / "split_summary.json", report)
    return SplitResult(out, report)


# --- reading ---------------------------------------------------------------------------------------------------------


def _read_pairs(
    source: Path,
    layout: str,
    template: str,
    group_by: str | None,
    pattern: str | None,
    stratify: str | None,
    labels: Path | None,
    files: Files | None,
) -> CtPetData | None:
    """The slices of a CT-PET data set; None for any other source.

    Raises:
        ConfigError: Options that have no effect on what lies there.
    """
    wanted = layout == "ct-pet" or (layout == "auto" and not template and split_pairs.is_pairs(source))
    given = {"--group-by": group_by, "--stratify": stratify, "--labels": labels} if wanted else {"--files": files}
    idle = [f"{option} {value}" for option, value in given.items() if value is not None]
    if idle:
        raise ConfigError(
            f"{'Pairs of CT and PET are' if wanted else 'This data set is'} split without these options.",
            where=", ".join(idle),
            fix="leave them out; the patient comes from the file name, see --group-pattern"
            if wanted
            else "leave it out: only a folder with CT and PET side by side becomes a tree of files",
            code="flags_without_effect",
        )
    return split_pairs.read_pairs(source, pattern) if wanted else None


def _read_source(
    source: Path,
    kind: LayoutName,
    template: str,
    group_by: str | None,
    pattern: str | None,
    stratify: str | None,
    labels: Path | None,
) -> Source:
    if kind == "table":
        return _of_table(source, group_by, pattern, stratify, labels)
    if kind == "images":
        return _of_images(source, group_by, pattern, stratify, labels)
    if kind == "cases":
        return _of_cases(source, case_ids(source), group_by, pattern, stratify, labels)
    return _of_layout(source, kind, template, group_by, pattern, stratify, labels)


def _of_layout(
    root: Path,
    kind: LayoutName,
    template: str,
    group_by: str | None,
    pattern: str | None,
    stratify: str | None,
    labels: Path | None,
) -> Source:
    """The cases of another layout; those that nnU-Net and the Decathlon keep for the test are left out."""
    every = read_layout_cases(root, kind, (), template=template)
    cases = [case for case in every if case.split != "test"] if kind in ("nnunet", "decathlon") else every
    ids = [case.case_id for case in cases]
    own = {case.case_id: case.label for case in cases}
    if stratify == "label" and labels is None and any(own.values()):
        what = _of_cases(root, ids, group_by, pattern, None, None)
        items = tuple(replace(item, strata=(f"label={own[item.item_id]}",)) for item in what.items)
        what = replace(what, items=items)
    else:
        what = _of_cases(root, ids, group_by, pattern, stratify, labels)
    before = sorted({case.split for case in cases} - {""})
    notes = list(what.notes)
    if len(before) > 1:
        notes.append(f"the splits {', '.join(before)} of the layout were not taken")
    if len(cases) < len(every):
        notes.append(f"{counted(len(every) - len(cases), 'case')} of the layout's own test set are left out")
    return replace(what, notes=tuple(notes))


def _of_table(
    source: Path, group_by: str | None, pattern: str | None, stratify: str | None, labels: Path | None
) -> Source:
    if labels is not None:
        raise ConfigError(
            "A table has its labels in itself.",
            where=f"--labels {labels}",
            fix="name a column of the table with --stratify",
            code="labels_unused",
        )
    table = read_table(source)
    ids = row_ids(table)
    groups, level = patient_of(table) if not group_by and not pattern else (ids, "case")
    if group_by:
        groups, level = filled_column(table, group_by), group_by
    if pattern:
        found = groups_by_pattern(ids, pattern)
        groups, level = [found[name] for name in ids], f"pattern {pattern}"
    strata = _strata_of_table(table, stratify)
    items = tuple(Item(name, g, s) for name, g, s in zip(ids, groups, strata, strict=True))
    rows = dict(zip(ids, table.rows, strict=True))
    return Source(items, level, table.header, rows, split_column=table.find(SPLIT_ALIASES) or "split")


def _of_cases(
    root: Path,
    ids: list[str],
    group_by: str | None,
    pattern: str | None,
    stratify: str | None,
    labels: Path | None,
) -> Source:
    owners = {**({} if labels is None else table_owners(read_table(labels))), **read_owners(root)}
    table = _labels_table(root, labels, "cases")
    same = dict(zip(ids, ids, strict=True))
    if group_by:
        groups, level = _column_for(ids, table, group_by, same, of_images=False), group_by
    elif pattern:
        groups, level = groups_by_pattern(ids, pattern), f"pattern {pattern}"
    else:
        groups, level = _owner_groups(ids, owners)
    strata = _strata_of_tree(ids, table, stratify, same, of_images=False)
    items = tuple(Item(name, groups[name], strata[name]) for name in ids)
    return Source(items, level, ("patient_id",), {name: (name,) for name in ids}, _unowned(ids, owners, level))


def _owner_groups(ids: Sequence[str], owners: Mapping[str, Owner]) -> tuple[dict[str, str], str]:
    """Group of each case and what it is: the patient if one is known, else the study, else the case itself."""
    patients = {name: owners.get(name, Owner()).patient_id for name in ids}
    studies = {name: owners.get(name, Owner()).study_uid for name in ids}
    for level, known in (("patient_id", patients), ("study_uid", studies)):
        if any(known.values()):
            return {name: known[name] or name for name in ids}, level
    return dict(zip(ids, ids, strict=True)), "case"


def _unowned(ids: Sequence[str], owners: Mapping[str, Owner], level: str) -> tuple[str, ...]:
    alone = [name for name in ids if name not in owners] if level in ("patient_id", "study_uid") else []
    what = f"{counted(len(alone), 'case')} {'is' if len(alone) == 1 else 'are'} in no table of patients"
    text = f"{what}, each counted as a patient of its own: {say_some(alone, 3)}"
    return (text,) if alone else ()


def _of_images(
    root: Path, group_by: str | None, pattern: str | None, stratify: str | None, labels: Path | None
) -> Source:
    cases = read_image_cases(root)
    ids = [case.case_id for case in cases]
    table = _labels_table(root, labels, "images")
    given = _image_keys(root, table, ids)
    groups, level = dict(zip(ids, ids, strict=True)), "case"
    if group_by:
        groups, level = _column_for(ids, table, group_by, given, of_images=True), group_by
    elif pattern:
        groups, level = groups_by_pattern(ids, pattern), f"pattern {pattern}"
    elif table is not None and patient_of(table)[1] == "patient_id":
        column = next(c for c in table.header if table.column(c) == patient_of(table)[0])
        groups, level = _column_for(ids, table, column, given, of_images=True), column
    folder_labels = {case.case_id: case.label for case in cases}
    if stratify == "label" and table is None and any(folder_labels.values()):
        strata: dict[str, tuple[str, ...]] = {name: (f"label={label}",) for name, label in folder_labels.items()}
    else:
        strata = _strata_of_tree(ids, table, stratify, given, of_images=True)
    items = tuple(Item(name, groups[name], strata[name]) for name in ids)
    before = {case.split for case in cases} - {""}
    notes = (f"the folders {', '.join(sorted(before))} of the tree were not taken as a split",) if before else ()
    if level == "case" and (hint := _pattern_hint(ids)):
        log.warning("warning: %s", hint)
        notes = (*notes, hint)
    if level == "case":
        return Source(items, level, ("patient_id",), {name: (name,) for name in ids}, notes)
    return Source(items, level, ("patient_id", "group"), {name: (name, groups[name]) for name in ids}, notes)


def _pattern_hint(ids: Sequence[str]) -> str:
    """What to say of images whose names look like several of one patient; empty where few or none do."""
    for what, pattern, of_patients in _SHARED_NAMES:
        groups: dict[str, list[str]] = {}
        for name in ids:
            match = re.search(pattern, name)
            groups.setdefault(match[1] if match else name, []).append(name)
        shared = [names for group, names in groups.items() if len(names) > 1 and re.search(of_patients, group)]
        if len(shared) > 1 and MIN_SHARED * sum(map(len, shared)) >= len(ids):
            some = " and ".join(shared[0][:2])
            return (
                f"the names of {sum(map(len, shared))} of {counted(len(ids), 'image')} differ only in {what}, such as "
                f"{some}: if they show one patient, pass --group-pattern '{pattern}' to keep them together"
            )
    return ""


def _labels_table(root: Path, labels: Path | None, kind: str) -> Table | None:
    if labels is not None:
        return read_table(labels)
    for own in (root / "labels.csv", root / "cases.csv"):
        if kind == "cases" and own.is_file():
            return read_table(own)
    return None


def _image_keys(root: Path, table: Table | None, ids: Sequence[str]) -> dict[str, str]:
    """{image: its id in the labels table}."""
    if table is None:
        return {}
    return match_image_ids(root, dict.fromkeys(table.column(label_id_column(table, of_images=True)), ""), ids)


def _column_for(
    ids: Sequence[str], table: Table | None, column: str, given: Mapping[str, str], *, of_images: bool
) -> dict[str, str]:
    """Cell of ``column`` for each id, which the table calls ``given[id]``.

    Raises:
        ConfigError: There is no table that could have the column.
        DataError: No such column, or ids without a row.
    """
    if table is None:
        raise ConfigError(
            f"Nothing tells the column {column!r} of this tree.",
            where=f"--group-by or --stratify {column}",
            fix="pass --labels with a CSV that has an id column and this one",
            code="labels_missing",
        )
    cells = dict(zip(table.column(label_id_column(table, of_images=of_images)), table.column(column), strict=True))
    lost = [name for name in ids if given.get(name, "") not in cells]
    if lost:
        raise DataError(
            f"{len(lost)} of {len(ids)} cases have no row in the labels.",
            where=f"{table.path}: " + ", ".join(f"{n!r}{nearest_id(n, list(cells))}" for n in lost[:5]),
            fix="add the rows; ids must equal the names of folders or images",
            code="label_missing",
        )
    return {name: cells[given[name]] for name in ids}


def _strata_of_table(table: Table, stratify: str | None) -> list[tuple[str, ...]]:
    names = _columns(stratify)
    columns = [table.column(name) for name in names]
    _check_classes(names, columns)
    return [tuple(f"{n}={v}" for n, v in zip(names, row, strict=True)) for row in zip(*columns, strict=True)] or [
        () for _ in table.rows
    ]


def _strata_of_tree(
    ids: Sequence[str], table: Table | None, stratify: str | None, given: Mapping[str, str], *, of_images: bool
) -> dict[str, tuple[str, ...]]:
    names = _columns(stratify)
    found = [_column_for(ids, table, name, given, of_images=of_images) for name in names]
    _check_classes(names, [list(cells.values()) for cells in found])
    return {key: tuple(f"{n}={cells[key]}" for n, cells in zip(names, found, strict=True)) for key in ids}


def _columns(stratify: str | None) -> list[str]:
    return [name.strip() for name in (stratify or "").split(",") if name.strip()]


def _check_classes(names: Sequence[str], columns: Sequence[Sequence[str]]) -> None:
    for name, cells in zip(names, columns, strict=True):
        values = set(cells)
        if len(values) > max(MAX_CLASSES, len(cells) // 5):
            raise DataError(
                f"The column {name!r} has {len(values)} values in {len(cells)} cases: it cannot be spread evenly.",
                where=f"values such as {say_some(sorted(values), 3)}",
                fix="name a column of few classes, or make one of ranges",
                code="stratify_values",
            )


# --- writing ---------------------------------------------------------------------------------------------------------


def _folds(
    what: Source, parts: Mapping[str, Sequence[str]], folds: int | None, seed: int
) -> list[dict[str, list[str]]]:
    if folds is None:
        return []
    development = {*parts["train"], *parts["val"]}
    return fold_items([item for item in what.items if item.item_id in development], folds, seed)


def _refuse_other_split(
    out: Path, what: Source, parts: Mapping[str, Sequence[str]], pairs: Sequence[Mapping[str, Sequence[str]]]
) -> None:
    """A list that lies in ``out`` and would name other ids, or go, may be what a model was trained with.

    Raises:
        ConfigError: ``split_differs``, with the seed and the digest of the split that is there.
    """
    new = {f"{name}.csv": ids for name, ids in parts.items() if ids}
    new |= {f"fold_{k}/{name}.csv": ids for k, pair in enumerate(pairs) for name, ids in pair.items()}
    old = [f"{name}.csv" for name in SPLITS]
    old += sorted(str(path.relative_to(out)) for path in out.glob("fold_*/*.csv"))
    old = [name for name in old if (out / name).is_file()]
    changed = [name for name in old if _digest(out / name) != _new_digest(what, new.get(name, ()))]
    if changed:
        raise ConfigError(
            "The folder holds another split, and a model may have been trained with it.",
            where=f"{out}: seed {_old_seed(out)}; other ids in "
            + ", ".join(f"{name} (sha256 {_digest(out / name)[:12]})" for name in changed[:3])
            + (f" and {counted(len(changed) - 3, 'list')} more" if len(changed) > 3 else ""),
            fix="choose another folder with --out to keep it, or pass --overwrite to replace it",
            code="split_differs",
        )


def _digest(path: Path) -> str:
    try:
        return split_digest(read_ids(path).ids)
    except DataError:
        return "unreadable"


def _new_digest(what: Source, ids: Sequence[str]) -> str:
    """As ``_digest`` of the file with these items: by the column that a reader takes for the ids."""
    rows = [what.rows[item_id] for item_id in ids]
    table = Table(Path(), what.header, tuple(rows), tuple(range(len(rows))))
    return split_digest(set(table.column(table.find(ID_ALIASES) or what.header[0])))


def _old_seed(out: Path) -> str:
    try:
        return str(json.loads((out / "split_summary.json").read_text(encoding="utf-8"))["seed"])
    except (OSError, ValueError, KeyError, TypeError):
        return "unknown"


def _write(
    out: Path, what: Source, parts: Mapping[str, Sequence[str]], pairs: Sequence[Mapping[str, Sequence[str]]]
) -> None:
    for stale in out.iterdir():
        if stale.is_dir() and re.fullmatch(r"fold_\d+", stale.name):
            shutil.rmtree(stale)
    (out / "splits_final.json").unlink(missing_ok=True)
    for name in SPLITS:
        if parts[name]:
            _write_ids(out / f"{name}.csv", what, name, parts[name])
        else:  # a list without ids would be refused by whoever reads it
            (out / f"{name}.csv").unlink(missing_ok=True)
    for k, pair in enumerate(pairs):
        for name, ids in pair.items():
            _write_ids(out / f"fold_{k}" / f"{name}.csv", what, name, ids)
    if pairs:
        write_text(out / "splits_final.json", json.dumps(list(pairs), indent=2, ensure_ascii=False) + "\n")


def _write_ids(path: Path, what: Source, part: str, ids: Sequence[str]) -> None:
    """Rows of a tree sorted by id, rows of a table in the order of the table and with the name of the part."""
    wanted = set(ids)
    rows = (what.written_row(item.item_id, part) for item in what.items if item.item_id in wanted)
    write_csv(path, what.written_header, rows)


def _facts(out: Path, what: Source, parts: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    group_of = {item.item_id: item.group for item in what.items}
    splits = {}
    for name, ids in parts.items():
        written = read_ids(out / f"{name}.csv").ids if ids else ()
        splits[name] = {
            "n_items": len(ids),
            "n_groups": len({group_of[i] for i in ids}),
            "prevalence": prevalence(what.items, ids) or None,
            "sha256": split_digest(written),
        }
    return {
        "group_by": what.level,
        "n_items": len(what.items),
        "n_groups": len(set(group_of.values())),
        "counts": {name: len(ids) for name, ids in parts.items()},
        "prevalence": {name: part["prevalence"] for name, part in splits.items()},
        "sha256": {name: part["sha256"] for name, part in splits.items()},
        "splits": splits,
        "notes": list(what.notes),
    }
