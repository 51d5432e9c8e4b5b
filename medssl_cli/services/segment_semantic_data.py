"""What a semantic segmentation is trained and validated on: labelled cases in two parts, and the prepared store.

The parts come from lists, from folds of nnU-Net, from the folders of the data set, or else from a seeded split of the
patients; the test part stays shut. Label maps are looked at before the split, so that patients with and without a
structure come to both sides.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from medssl_cli.core.case import Case
from medssl_cli.core.errors import ConfigError, DataError
from medssl_cli.core.run import digest_of, hide_home, seed_for, worker_count
from medssl_cli.core.wording import counted
from medssl_cli.data.checks import check_geometry
from medssl_cli.data.copies import refuse_copies
from medssl_cli.data.datasets import HuWindow
from medssl_cli.data.label_maps import LabelSpec, read_label_picture, spec_of_values
from medssl_cli.data.labelled_cases import (
    described_spec,
    find_label_cases,
    find_label_pictures,
    holds_labelled_pictures,
    label_stems,
)
from medssl_cli.data.layouts import LayoutName, detect_layout, layout_channels
from medssl_cli.data.manifest import IMAGE, check_no_overlap, say_some, split_digest
from medssl_cli.data.preprocess import PreprocessConfig, naming_case
from medssl_cli.data.split import Item, split_items
from medssl_cli.data.store import Store, build_store, default_cache
from medssl_cli.services.backbone import Backbone
from medssl_cli.services.segment_request import SegmentRequest
from medssl_cli.services.segment_semantic_config import Kind, LabelledDataConfig, SemanticConfig, check_semantic_config
from medssl_cli.services.segment_validation import LabelledPlanes, PicturePlanes, StoredPlanes
from medssl_cli.services.training_data import Failure, tell_absent

log = logging.getLogger(__name__)

FOLDS = "splits_final.json"
_SHOWN = 8


@dataclass(frozen=True)
class SemanticData:
    """Labelled cases, prepared.

    Args:
        config: In force.
        kind: ``volumes`` or ``images``.
        layout: How the files are named.
        spec: Classes.
        sequences: Of the network, in channel order; None for a network of plain pictures.
        channels: Of one slice as the network takes it.
        windows_hu: Windows that become the channels of a volume.
        preprocess: From files to one grid and to intensity limits.
        train, val: Cases; each has a label map.
        train_store, val_store: Of volumes; None of pictures.
        division: How the parts came about, in words.
        values_of: Values in the label map of each case.
        notes: What is legal and yet unlikely to be meant.
        failures: Cases that were left out.
        unused: Training cases that ``data.percentage_labels`` leaves out.
    """

    config: SemanticConfig
    kind: Kind
    layout: str
    spec: LabelSpec
    sequences: tuple[str, ...] | None
    channels: int
    windows_hu: tuple[HuWindow, ...]
    preprocess: PreprocessConfig
    train: tuple[Case, ...]
    val: tuple[Case, ...]
    train_store: Store | None
    val_store: Store | None
    division: str
    values_of: Mapping[str, frozenset[int]]
    notes: tuple[str, ...] = ()
    failures: tuple[Failure, ...] = ()
    unused: int = 0

    @property
    def parts(self) -> dict[str, tuple[Case, ...]]:
        """Cases by part."""
        return {"train": self.train, "val": self.val}

    @property
    def colours(self) -> int:
        """Channels that a slice of one channel is repeated to; 0 where its channels are sequences or windows."""
        return self.channels if self.sequences is None and not self.windows_hu else 0

    def validation(self) -> _Validation:
        """The validation cases, each read when it is asked for."""
        return _Validation(self)

    def seen(self) -> list[tuple[str, str, str]]:
        """(part, case id, patient id) of all cases."""
        return [(name, case.case_id, case.patient_id) for name, cases in self.parts.items() for case in cases]

    def has_structure(self, case: Case) -> bool:
        """Whether the label map of a case holds any structure."""
        return any(self.spec.values.get(value, 0) for value in self.values_of[case.case_id])

    def facts(self) -> dict[str, Any]:
        """For ``run.json`` and ``model.json``."""
        stores = {name: store for name, store in (("train", self.train_store), ("val", self.val_store)) if store}
        return {
            "kind": self.kind,
            "layout": self.layout,
            "split": self.division,
            "parts": {
                name: {
                    "cases": len(cases),
                    "patients": len({case.patient_id for case in cases}),
                    "cases_with_structure": sum(self.has_structure(case) for case in cases),
                    **({"slices": _slices(stores[name])} if name in stores else {}),
                }
                for name, cases in self.parts.items()
            },
            "unused_training_cases": self.unused,
            "split_digest": split_digest(f"{part}/{case_id}" for part, case_id, _ in self.seen()),
            "split_digests": {name: split_digest(c.case_id for c in cases) for name, cases in self.parts.items()},
            "data_digest": self._digest(),
            "cache_bytes": sum(store.size_bytes for store in stores.values()),
        }

    def _digest(self) -> str:
        """Of what the parts are made of: files by name, size and time, as prepared."""
        if self.train_store is not None and self.val_store is not None:
            return digest_of("segmentation", self.train_store.digest, self.val_store.digest)
        return digest_of(
            "segmentation", {name: [_files_of(case) for case in cases] for name, cases in self.parts.items()}
        )

    def lines(self) -> list[str]:
        """What is trained on, for people."""
        told = []
        for name, part in self.facts()["parts"].items():
            slices = f", {counted(part['slices'], 'slice')}" if "slices" in part else ""
            told.append(
                f"{name}: {counted(part['cases'], 'case')} of {counted(part['patients'], 'patient')}{slices}, "
                f"{part['cases_with_structure']} with a structure"
            )
        left_out = f"; {counted(self.unused, 'training case')} unused (data.percentage_labels)" if self.unused else ""
        return [f"classes: {self.spec.describe()}", *told, f"split: {self.division}{left_out}"]

    def ranges(self) -> dict[str, list[float]]:
        """[lowest, highest] voxel size in mm and number of slices of the training cases, named as on a head's card."""
        if self.train_store is None or self.preprocess.resample_mm is not None:
            return {}
        sizes = self.train_store.spacings()
        found = {f"spacing_{axis}_mm": column for axis, column in zip("zyx", sizes.T, strict=True)}
        depths = np.array([self.train_store.facts(case).shape[0] for case in range(len(self.train_store))])
        return {name: [float(v.min()), float(v.max())] for name, v in {**found, "slices": depths}.items()}

    def missing(self) -> dict[str, int]:
        """Training cases that lack each sequence."""
        names = self.sequences or ()
        counts = {name: sum(name not in case.sequences for case in self.train) for name in names}
        return {name: count for name, count in counts.items() if count}


class _Validation:
    """The validation cases, one at a time."""

    def __init__(self, data: SemanticData) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data.val)

    def __getitem__(self, index: int) -> LabelledPlanes:
        data, case = self.data, self.data.val[index]
        if data.val_store is None:
            return PicturePlanes(case, data.spec, data.preprocess, data.channels)
        return StoredPlanes(
            data.val_store, index, case.patient_id, data.spec, windows_hu=data.windows_hu, colours=data.colours
        )


def read_semantic_data(config: SemanticConfig, backbone: Backbone, request: SegmentRequest) -> SemanticData:
    """Cases, label maps and parts; every label map is looked at before the first step.

    Raises:
        ConfigError: Keys that do not fit the data, or sequences that do not fit the backbone.
        DataError: Missing or bad cases, values of no class, one image or patient on both sides, or a part without case.
        ResourceError: No room on the disk for the prepared data.
    """
    root = _root(config.data)
    kind, layout = _kind_of(config.data, root)
    check_semantic_config(config, kind)
    reader = _Reader(config.data, root, kind, layout, _channel_names(config.data, root, layout, backbone, kind))
    listed, division = _listed(reader)
    _refuse_leaks(listed)
    looked = _look_at_labels(reader, listed, backbone, request)
    spec = _spec(config.data, root, kind, looked.values_of)
    if "val" not in listed:
        looked = _held_back(looked, config, spec)
        division += f"; {config.data.val_ratio:g} of the patients held back for validation, seed {config.train.seed}"
    parts = looked.parts
    _refuse_leaks(parts)
    used = _some_patients(parts["train"], looked, spec, config)
    for name, cases in (("training", used), ("validation", parts["val"])):
        if not cases:
            raise DataError(
                f"The {name} part has no case.",
                where=f"{hide_home(str(root))}: {division}",
                fix="name other lists, or more cases",
                code="part_empty",
            )
    if not any(spec.values.get(value, 0) for case in used for value in looked.values_of[case.case_id]):
        raise DataError(
            "No training case has a structure: there is nothing to learn.",
            where=f"{hide_home(str(root))}: {counted(len(used), 'training case')}, {spec.describe()}",
            fix="check --label and --classes, or name cases with a structure",
            code="label_empty",
        )
    stores = {
        name: None if kind == "images" else looked.store_of(list(cases), backbone, request)
        for name, cases in (("train", used), ("val", parts["val"]))
    }
    data = SemanticData(
        config=config.settled(kind, spec.classes),
        kind=kind,
        layout=layout,
        spec=spec,
        sequences=None if backbone.model.sequences is None else reader.sequences,
        channels=_channels(backbone, reader),
        windows_hu=_windows(backbone, kind),
        preprocess=backbone.preprocess,
        train=tuple(used),
        val=tuple(parts["val"]),
        train_store=stores["train"],
        val_store=stores["val"],
        division=division,
        values_of=looked.values_of,
        failures=(*reader.failures, *looked.failures),
        unused=len(parts["train"]) - len(used),
    )
    return replace(data, notes=_notes(data))


def _notes(data: SemanticData) -> tuple[str, ...]:
    notes = []
    if not any(data.has_structure(case) for case in data.val):
        notes.append("No validation case has a structure: a score of 1 means that nothing is predicted there.")
    if data.config.augment.horizontal_flip == 0 and "horizontal_flip" not in data.config.augment.model_fields_set:
        notes.append("Images are not mirrored: the name of a structure tells a side of the body.")
    return tuple(notes)


# --- what lies there -------------------------------------------------------------------------------------------------


def _root(config: LabelledDataConfig) -> Path:
    if not config.root:
        fix = "pass --data ROOT, or set data.root"
        raise ConfigError("No data was named.", where="data.root", fix=fix, code="data_missing")
    if not Path(config.root).is_dir():
        where = hide_home(config.root)
        fix = "name a folder of cases, of images and labels, nnU-Net or the Decathlon"
        raise DataError("There is no such data folder.", where=where, fix=fix, code="data_missing")
    return Path(config.root)


def _kind_of(config: LabelledDataConfig, root: Path) -> tuple[Kind, LayoutName]:
    """What the folder holds; pictures beside their labels are looked for first, for a tree may hold nothing else."""
    if config.layout == "images" or (config.layout == "auto" and not config.template and holds_labelled_pictures(root)):
        return "images", "images"
    chosen = config.layout != "auto" and not config.template
    return "volumes", config.layout if chosen else detect_layout(root, config.template)  # type: ignore[return-value]


def _channel_names(
    config: LabelledDataConfig, root: Path, layout: LayoutName, backbone: Backbone, kind: Kind
) -> tuple[str, ...]:
    """The sequences to read, in channel order.

    Raises:
        ConfigError: They are not those of the backbone, or several for a backbone of plain pictures.
    """
    known, asked = backbone.model.sequences, config.mri_sequences
    if kind == "images":
        if known is not None:
            raise _no_pictures(backbone)
        return (IMAGE,)
    if known is not None:
        unknown = [name for name in asked or () if name not in known]
        if unknown:
            raise ConfigError(
                f"The backbone does not know the sequence{'s' if len(unknown) > 1 else ''} {', '.join(unknown)}.",
                where=f"data.mri_sequences; {hide_home(str(backbone.found.weights))}: {', '.join(known)}",
                fix="name some of these",
                code="sequences_unknown",
            )
        return asked or tuple(known)
    names = asked or layout_channels(root, layout)
    if len(names) == 1:
        return names
    stems = ", ".join((names or label_stems(root))[:_SHOWN]) or "none"
    raise ConfigError(
        "The backbone takes plain pictures: slices of one sequence.",
        where=f"{hide_home(str(root))}: there are {stems}",
        fix="name it, e.g. data.mri_sequences=ct, or take a backbone of several sequences",
        code="sequence_one",
    )


def _no_pictures(backbone: Backbone) -> ConfigError:
    return ConfigError(
        "The backbone takes sequences of a case, and the data are plain pictures.",
        where=f"{hide_home(str(backbone.found.weights))}: {', '.join(backbone.sequences)}",
        fix="take a backbone of pictures, e.g. from `medssl pretrain --config images_small`",
        code="backbone_of_sequences",
    )


def _channels(backbone: Backbone, reader: _Reader) -> int:
    """Channels of one slice as the network takes it."""
    if backbone.model.sequences is not None:
        return len(reader.sequences)
    return len(_windows(backbone, reader.kind)) or backbone.model.in_chans


def _windows(backbone: Backbone, kind: Kind) -> tuple[HuWindow, ...]:
    return backbone.windows_hu if kind == "volumes" else ()


@dataclass
class _Reader:
    """Reads cases with their label maps; with ``on_error: skip`` bad ones are listed."""

    config: LabelledDataConfig
    root: Path
    kind: Kind
    layout: LayoutName
    sequences: tuple[str, ...]
    failures: list[Failure] = field(default_factory=list)

    def read(self, split_csv: Path | None = None, split: str = "") -> list[Case]:
        """The cases of a list, or all."""
        if self.kind == "images":
            return find_label_pictures(
                self.root,
                label=self.config.label,
                split_csv=split_csv,
                split=split,
                group_pattern=self.config.group_pattern or None,
                on_fault=self._on_fault,
            )
        cases = find_label_cases(
            self.root,
            self.layout,
            self.sequences,
            self.config.label,
            template=self.config.template,
            split_csv=split_csv,
            split=split,
            group_pattern=self.config.group_pattern or None,
            on_fault=self._on_fault,
        )
        return self._in_place(cases)

    @property
    def _on_fault(self) -> Callable[[str, DataError], None] | None:
        if self.config.on_error != "skip":
            return None
        return lambda name, error: self.failures.append((name, hide_home(str(self.root / name)), error.what, error.fix))

    def _in_place(self, cases: Sequence[Case]) -> list[Case]:
        """The cases whose headers agree; others are refused, all in one message, or listed."""
        faults = {case.case_id: f for case in cases for f in check_geometry(case) if f.severity == "error"}
        if faults and self.config.on_error == "stop":
            shown = [f"case {f.case_id}: {f.path}: {f.message}" for f in list(faults.values())[:_SHOWN]]
            more = [f"and {len(faults) - _SHOWN} more"] if len(faults) > _SHOWN else []
            first = next(iter(faults.values()))
            raise DataError(
                f"{len(faults)} of {len(cases)} cases have headers that contradict each other.",
                where="\n".join([*shown, *more]),
                fix=first.fix or "convert these cases again, or leave them out",
                code=first.code,
            )
        self.failures += [(f.case_id, f.path, f.message, f.fix) for f in faults.values()]
        return [case for case in cases if case.case_id not in faults]


# --- parts -----------------------------------------------------------------------------------------------------------


def _listed(reader: _Reader) -> tuple[dict[str, list[Case]], str]:
    """(the parts that something tells, how in words); ``train`` alone where validation cases are to be held back."""
    config = reader.config
    if config.splits is not None:
        folder = Path(config.splits)
        lists = {name: folder / f"{name}.csv" for name in ("train", "val")}
        absent = [path.name for path in lists.values() if not path.is_file()]
        if absent:
            raise DataError(
                f"The split has no {' and no '.join(absent)}.",
                where=hide_home(str(folder)),
                fix="make it with `medssl split --out DIR`, or name one list with --split-csv",
                code="split_incomplete",
            )
        return {name: reader.read(path, name) for name, path in lists.items()}, f"lists in {hide_home(str(folder))}"
    if config.split_csv is not None:
        return {"train": reader.read(Path(config.split_csv))}, f"cases of {hide_home(config.split_csv)}"
    cases = reader.read()
    if (reader.root / FOLDS).is_file():
        return _fold(reader, cases), f"fold {config.fold} of {FOLDS}"
    if "fold" in config.model_fields_set:
        raise ConfigError(
            "There are no folds to choose from.",
            where=f"data.fold; {hide_home(str(reader.root / FOLDS))} is not there",
            fix="leave it out",
            code="fold_missing",
        )
    return _by_folder(cases)


def _by_folder(cases: Sequence[Case]) -> tuple[dict[str, list[Case]], str]:
    """The parts that folders or the layout tell; test cases are left alone."""
    parts = {name: [case for case in cases if case.split == name] for name in ("train", "val", "test", "")}
    if parts["train"] and parts["val"]:
        return {"train": parts["train"], "val": parts["val"]}, "as the data set tells"
    if parts["train"] or parts["val"]:
        kept = [*parts["train"], *parts["val"], *parts[""]]
        alone = f", {counted(len(parts['test']), 'test case')} left alone" if parts["test"] else ""
        return {"train": kept}, f"training cases of the data set{alone}"
    if parts[""]:
        return {"train": parts[""]}, "all cases"
    return {"train": []}, "the data set has test cases alone"


def _fold(reader: _Reader, cases: Sequence[Case]) -> dict[str, list[Case]]:
    """One fold of nnU-Net's list of folds.

    Raises:
        DataError: A damaged list, or names without a case.
        ConfigError: No such fold.
    """
    path, number = reader.root / FOLDS, reader.config.fold
    try:
        folds = json.loads(path.read_text(encoding="utf-8"))
        named = [{name: [str(entry) for entry in fold[name]] for name in ("train", "val")} for fold in folds]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            "The list of folds cannot be read.",
            where=f"{hide_home(str(path))}: {type(error).__name__}: {str(error)[:150]}",
            fix="it holds [{'train': [...], 'val': [...]}, ...], as nnU-Net and `medssl split --folds` write it",
            code="folds_invalid",
        ) from error
    if number >= len(named):
        where = f"data.fold {number}; {hide_home(str(path))} holds {counted(len(named), 'fold')}"
        raise ConfigError("There is no such fold.", where=where, fix="folds count from 0", code="fold_missing")
    known = {case.case_id: case for case in cases}
    unknown = [name for part in named[number].values() for name in part if name not in known]
    unknown = [name for name in unknown if name not in {failure[0] for failure in reader.failures}]
    if unknown:
        raise DataError(
            f"{counted(len(unknown), 'name')} of the fold {'has' if len(unknown) == 1 else 'have'} no labelled case.",
            where=f"{hide_home(str(path))}: {say_some(unknown)}",
            fix="the names are ids of cases; take the list of this very data set",
            code="id_unknown",
        )
    return {part: [known[name] for name in names if name in known] for part, names in named[number].items()}


def _refuse_leaks(parts: Mapping[str, Sequence[Case]]) -> None:
    check_no_overlap(parts)
    refuse_copies(parts)


# --- label maps ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Looked:
    """Parts whose label maps were looked at.

    Args:
        parts: Cases that can be used.
        values_of: Values in the label map of each.
        failures: Cases that could not be prepared.
        reader: Where they come from.
    """

    parts: dict[str, list[Case]]
    values_of: dict[str, frozenset[int]]
    failures: list[Failure]
    reader: _Reader

    def store_of(self, cases: list[Case], backbone: Backbone, request: SegmentRequest) -> Store:
        """A store of some cases; all of them are prepared already."""
        return _build(cases, self.reader, backbone, request)


def _look_at_labels(
    reader: _Reader, parts: Mapping[str, list[Case]], backbone: Backbone, request: SegmentRequest
) -> _Looked:
    """Prepare every case, and learn which values its label map holds.

    Raises:
        DataError: A case that cannot be read, unless these are skipped.
    """
    plain = backbone.model.sequences is None and reader.kind == "volumes"
    named = {name: [_as_image(case) if plain else case for case in cases] for name, cases in parts.items()}
    cases = [case for part in named.values() for case in part]
    if not cases:
        return _Looked(dict(named), {}, [], reader)
    failures: list[Failure] = []
    if reader.kind == "images":
        values_of = _picture_values(cases, reader, failures)
    else:
        tell_absent(cases, (IMAGE,) if plain else reader.sequences, "The network sees the others alone there.")
        store = _build(cases, reader, backbone, request)
        values_of = {store.case_id(n): frozenset(store.label_values(n).tolist()) for n in range(len(store))}
        failures = [tuple(failure) for failure in store.failures]  # type: ignore[misc]
    kept = {name: [case for case in part if case.case_id in values_of] for name, part in named.items()}
    return _Looked(kept, values_of, failures, reader)


def _as_image(case: Case) -> Case:
    """The one sequence under the name that plain pictures have, so that training and inference scale it alike."""
    (only,) = case.sequences.values() or (None,)
    return case if only is None else replace(case, sequences={IMAGE: replace(only, name=IMAGE)})


def _build(cases: list[Case], reader: _Reader, backbone: Backbone, request: SegmentRequest) -> Store:
    plain = backbone.model.sequences is None
    return build_store(
        cases,
        (IMAGE,) if plain else reader.sequences,
        backbone.preprocess,
        default_cache(request.cache),
        kind="labels",
        workers=worker_count(request.workers or None),
        on_error=reader.config.on_error,
    )


def _picture_values(cases: Sequence[Case], reader: _Reader, failures: list[Failure]) -> dict[str, frozenset[int]]:
    found: dict[str, frozenset[int]] = {}
    for case in cases:
        assert case.roi is not None
        try:
            with naming_case(case):
                found[case.case_id] = frozenset(np.unique(read_label_picture(case.roi)).tolist())
        except DataError as error:
            if reader.config.on_error == "stop":
                raise
            failures.append((case.case_id, hide_home(str(case.roi)), error.what, error.fix))
    return found


def _spec(config: LabelledDataConfig, root: Path, kind: Kind, values_of: Mapping[str, frozenset[int]]) -> LabelSpec:
    """Classes as named, as the data set tells, or as the label maps show.

    Raises:
        DataError, ConfigError: As ``spec_of_values``.
    """
    told = None if config.classes else described_spec(root)
    if told is not None:
        return told
    values = set().union(*values_of.values())
    stem = config.label if kind == "volumes" else ""  # that of pictures is a folder
    return spec_of_values(values, config.classes, label=stem, where=hide_home(str(root)))


# --- who is trained on -----------------------------------------------------------------------------------------------


def _items(cases: Sequence[Case], looked: _Looked, spec: LabelSpec) -> list[Item]:
    """Cases by patient, with the structures that their label maps hold."""
    items = []
    for case in cases:
        held = {spec.values.get(value, 0) for value in looked.values_of[case.case_id]} - {0}
        strata = tuple(spec.classes[index] for index in sorted(held)) or ("none",)
        items.append(Item(case.case_id, case.patient_id, strata))
    return items


def _held_back(looked: _Looked, config: SemanticConfig, spec: LabelSpec) -> _Looked:
    """A share of the patients becomes the validation part; each structure comes to both sides where it can.

    Raises:
        DataError: One patient alone.
    """
    cases, ratio = looked.parts["train"], config.data.val_ratio
    patients = {case.patient_id for case in cases}
    if len(patients) < 2:
        raise DataError(
            "There are too few patients to hold one back for validation.",
            where=f"{counted(len(cases), 'labelled case')} of {counted(len(patients), 'patient')}",
            fix="add patients, or name train.csv and val.csv with --splits",
            code="split_too_few",
        )
    chosen = split_items(_items(cases, looked, spec), (1 - ratio, ratio, 0.0), config.train.seed)
    held = set(chosen["val"])
    parts = {
        "train": [case for case in cases if case.case_id not in held],
        "val": [case for case in cases if case.case_id in held],
    }
    return replace(looked, parts=parts)


def _some_patients(cases: Sequence[Case], looked: _Looked, spec: LabelSpec, config: SemanticConfig) -> list[Case]:
    """``data.percentage_labels`` of the training patients, those with a structure as often as among all; one at least.

    A patient with a structure is always among them where there is one.
    """
    share, seed = config.data.percentage_labels, seed_for(config.train.seed, "percentage_labels")
    items = [
        replace(item, strata=item.strata if item.strata == ("none",) else ("some",))
        for item in _items(cases, looked, spec)
    ]
    if share >= 1 or len({item.group for item in items}) < 2:
        return list(cases)
    kept = set(split_items(items, (share, 1 - share, 0.0), seed % 2**32)["train"])
    if not any(item.item_id in kept and item.strata == ("some",) for item in items):
        able = sorted({item.group for item in items if item.strata == ("some",)})
        if able:
            one = able[int(np.random.default_rng(seed).integers(len(able)))]
            kept = {item.item_id for item in items if item.group == one}
    return [case for case in cases if case.case_id in kept]


def _files_of(case: Case) -> list[Any]:
    """Id of a case, and size and time of its files."""
    paths = [*(sequence.path for sequence in case.sequences.values()), *([case.roi] if case.roi else [])]
    return [case.case_id, *([stat.st_size, stat.st_mtime_ns] for stat in (path.stat() for path in paths))]


def _slices(store: Store) -> int:
    return sum(store.facts(case).shape[0] for case in range(len(store)))
