"""One study into one case folder: choose its series, put them through the gates, convert, verify, write.

``convert_case`` is the task of a worker process: it takes and returns plain values, holds one output at a time and
never raises for bad data. Nothing reaches the case folder that has not passed every gate; the sidecar is written last,
so a volume with its sidecar is complete.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from medssl_cli.core.errors import DataError
from medssl_cli.core.run import contained, digest_of, hide_home, write_json, write_text
from medssl_cli.core.volume import Volume
from medssl_cli.data.dicom import SeriesEntry, SeriesFacts, quiet_pydicom, read_header, read_series
from medssl_cli.data.dicom_engines import EngineResult, convert_files, extract_frames
from medssl_cli.data.dicom_gates import SeriesGeometry, VolumePlan, check_converted, check_series
from medssl_cli.data.dicom_tags import Pseudonyms, kept_tags
from medssl_cli.data.diffusion import combine_directions, round_b
from medssl_cli.data.images import read_header as read_nifti_header
from medssl_cli.data.images import write_volume
from medssl_cli.data.resample import holds_classes, resample_to
from medssl_cli.data.series_rules import Rule, SeriesRules, diffusion_stem, named_b, preference

FORMAT = 3
"""Raised when the same input gives other files, so that a new version converts again."""

VOLUMETRIC = ("CT", "MR", "PT", "NM", "")
"""Modalities that ``--all`` tries; projections, screen shots, plans and reports are left alone."""


@dataclass(frozen=True)
class CaseOptions:
    """What holds for every case of a run."""

    rules: SeriesRules
    engine: str
    engine_version: str
    convert_unmatched: bool = False
    reference: str | None = None
    align: bool = True
    dry_run: bool = False
    again: bool = False
    pseudonyms: Pseudonyms | None = None


@dataclass(frozen=True)
class CaseTask:
    """One study; ids are those that may be written."""

    root: Path
    out: Path
    case_id: str
    patient_id: str
    study_uid: str
    entries: tuple[SeriesEntry, ...]
    options: CaseOptions


@dataclass(frozen=True)
class Output:
    """One volume, planned or written.

    Args:
        path: Below the output folder.
        n_slices, spacing: Of the file; spacing (z, y, x) in mm.
        status: ``converted``, ``up_to_date`` or ``planned``.
        note: How it was chosen and made.
    """

    case_id: str
    patient_id: str
    study_uid: str
    stem: str
    path: str
    series_uid: str
    series_number: str
    description: str
    n_slices: int
    n_volumes: int
    spacing: tuple[float, float, float]
    b: int | None
    status: str
    note: str


@dataclass(frozen=True)
class Failure:
    """One series that was refused; ``path`` is below the source folder, empty when names are kept out."""

    case_id: str
    path: str
    reason: str
    fix: str
    code: str
    series_uid: str = ""
    series_number: str = ""
    description: str = ""
    stem: str = ""

    @property
    def name(self) -> str:
        """What was refused, in a few words: the series, or the file where none was readable."""
        series = " ".join(word for word in (self.series_number, self.description) if word)
        return f"series {series}" if series else self.path or f"case {self.case_id}"


@dataclass
class CaseResult:
    """What became of one study."""

    case_id: str
    outputs: list[Output] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    unmatched: list[dict[str, Any]] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)


@dataclass
class _Loaded:
    """A series with the verdict of the gates: one of ``geometry`` and ``error`` is set."""

    facts: SeriesFacts
    geometry: SeriesGeometry | None = None
    error: DataError | None = None


@dataclass(frozen=True)
class _Plan:
    """One output: which volumes of which series, and how they become one file."""

    stem: str
    facts: SeriesFacts
    geometry: SeriesGeometry
    volumes: tuple[VolumePlan, ...]
    b: int | None = None
    keep_4d: bool = False
    note: str = ""


def convert_case(task: CaseTask) -> CaseResult:
    """Convert one study; every series that is refused is a ``Failure`` of the result."""
    result = CaseResult(task.case_id)
    plans = _plan_case(task, result)
    folder = contained(task.out, task.case_id, "case id")
    if not task.options.dry_run and folder.is_dir():
        for leftover in folder.glob(".*.tmp*"):  # of a run that was killed; we hold the lock of the output folder
            leftover.unlink()
    reference = task.options.reference if task.options.align else None
    if reference is not None:
        reference = _resolved(reference, plans)
        task = replace(task, options=replace(task.options, reference=reference))
        plans = _reference_first(task, plans, reference, result)
    grid: tuple[Volume, str] | None = None
    for plan in plans:
        digest = _digest(task, plan, grid[1] if grid else "")
        try:
            output = _existing(task, plan, digest) or _convert(task, plan, digest, grid[0] if grid else None)
        except DataError as error:
            result.failures.append(_failure(task, plan.facts, error, plan.stem))
            if plan.stem == reference:
                _fail_rest(task, [p for p in plans if p is not plan], reference, result)
                break
            continue
        result.outputs.append(output)
        if plan.stem == reference:
            grid = _grid(task, plan, output), digest
    return result


# --- choosing --------------------------------------------------------------------------------------------------------


def _plan_case(task: CaseTask, result: CaseResult) -> list[_Plan]:
    rules = task.options.rules
    candidates: dict[str, list[tuple[Rule, _Loaded]]] = {}
    spare: list[_Loaded] = []
    everything: list[tuple[list[Rule], list[_Loaded]]] = []
    for entry in task.entries:
        matching = [rule for rule in rules.rules if rule.matches(entry)]
        if not matching and not task.options.convert_unmatched:
            _leave(task, result, entry, "no rule names it")
        else:
            everything.append((matching, _load(task, entry)))
    _refuse_parts([loaded for _, parts in everything for loaded in parts])
    for matching, parts in everything:
        for loaded in parts:
            stems = {r.stem: r for r in reversed(matching) if r.accepts_geometry(loaded.facts)}
            for stem, rule in stems.items():
                candidates.setdefault(stem, []).append((rule, loaded))
            if not stems:
                spare.append(loaded)
    plans: list[_Plan] = []
    used: set[int] = set()
    for stem in dict.fromkeys(rule.stem for rule in rules.rules):
        found = candidates.get(stem, [])
        found.sort(key=lambda pair: preference(pair[1].facts, rules.rank(pair[0])))
        for plan in _plan_stem(task, stem, found, result, used):
            plans.append(plan)
            used.add(id(plan.facts))
    lost = {id(one.facts): one for pairs in candidates.values() for _, one in pairs if id(one.facts) not in used}
    spare += lost.values()
    plans += _plan_spare(task, spare, result, {plan.stem for plan in plans})
    return plans


def _load(task: CaseTask, entry: SeriesEntry) -> list[_Loaded]:
    """A series behind the gates; copies of it in several folders are told apart when each is whole by itself."""
    named = task.options.pseudonyms is None
    whole = _gated(read_series(task.root, entry, name_files=named), task)
    folders: dict[str, list[str]] = {}
    for path in entry.paths:
        folders.setdefault(str(Path(path).parent), []).append(path)
    if whole.error is None or whole.error.code != "dicom_duplicate_position" or len(folders) == 1:
        return [whole]
    parts = [_gated(read_series(task.root, replace(entry, paths=p), name_files=named), task) for p in folders.values()]
    if any(part.error for part in parts):
        return [whole]
    images = [frozenset(file.sop_uid for file in part.facts.files) for part in parts]
    return [part for i, part in enumerate(parts) if images[i] not in images[:i]]


def _refuse_parts(series: Sequence[_Loaded]) -> None:
    """Refuse what shares its UID with a refused series of another number: both may be parts of one volume."""
    refused = {one.facts.entry.series_uid: one for one in series if one.error is not None}
    for one in series:
        other = refused.get(one.facts.entry.series_uid)
        if other is not None and one.error is None:
            one.geometry, one.error = (
                None,
                DataError(
                    "The series shares its UID with one that was refused: both may be parts of one volume.",
                    where=f"series numbers {one.facts.entry.number or 'none'} and {other.facts.entry.number or 'none'}",
                    fix="send the series again from the archive, or leave it out with the mapping",
                    code="dicom_split_series",
                ),
            )


def _gated(facts: SeriesFacts, task: CaseTask) -> _Loaded:
    try:
        if task.options.pseudonyms is not None and facts.has_burned_in_text:
            raise DataError(
                "The header says that text is burned into the pixels: they cannot be made anonymous.",
                where="BurnedInAnnotation = YES",
                fix="leave the series out with the mapping, or paint the text over first",
                code="dicom_burned_in_text",
            )
        return _Loaded(facts, geometry=check_series(facts))
    except DataError as error:
        return _Loaded(facts, error=error)


def _plan_stem(
    task: CaseTask, stem: str, found: Sequence[tuple[Rule, _Loaded]], result: CaseResult, used: set[int]
) -> Iterator[_Plan]:
    """Outputs of one sequence from its candidates, best first."""
    if not found:
        return
    rule, best = found[0]
    if rule.b:
        yield from _plan_diffusion(task, stem, found, result, used)
        return
    others = [loaded for _, loaded in found[1:]]
    note = _choice_note(task, best, others)
    if others:
        result.messages.append(f"{task.case_id} {stem}: {note}")
    if best.geometry is None:
        assert best.error is not None
        result.failures.append(_failure(task, best.facts, best.error, stem))
        used.add(id(best.facts))
        return
    volumes = tuple(v for v in best.geometry.volumes if rule.accepts_image(v.image_type)) or best.geometry.volumes
    b_values = sorted({round_b(v.b) for v in volumes if v.b is not None})
    if len(volumes) > 1 and len(b_values) > 1 and all(v.b is not None for v in volumes):
        for b in b_values:
            members = tuple(v for v in volumes if v.b is not None and round_b(v.b) == b)
            yield _Plan(diffusion_stem(stem, b), best.facts, best.geometry, members, b, note=note)
        return
    yield _Plan(stem, best.facts, best.geometry, volumes, keep_4d=len(volumes) > 1, note=note)


def _plan_diffusion(
    task: CaseTask, stem: str, found: Sequence[tuple[Rule, _Loaded]], result: CaseResult, used: set[int]
) -> Iterator[_Plan]:
    """One output for each wanted b-value, each from the best series that has it."""
    by_b: dict[int, list[tuple[_Loaded, tuple[VolumePlan, ...]]]] = {}
    for rule, loaded in found:
        if loaded.geometry is None:
            assert loaded.error is not None
            result.failures.append(_failure(task, loaded.facts, loaded.error, stem))
            used.add(id(loaded.facts))
            continue
        volumes = [v for v in loaded.geometry.volumes if rule.accepts_image(v.image_type)]
        told = _described_b(loaded.facts) if named_b(stem) is None else float(named_b(stem) or 0)
        known = [(v, told if v.b is None else v.b) for v in volumes]
        if any(b is None for _, b in known):
            result.failures.append(_failure(task, loaded.facts, _no_b_value(), stem))
            used.add(id(loaded.facts))
            continue
        for b in sorted({round_b(b) for _, b in known if b is not None}):
            members = tuple(v for v, value in known if value is not None and round_b(value) == b)
            by_b.setdefault(b, []).append((loaded, members))
    for b in _wanted_b(found[0][0].b, sorted(by_b)):
        (best, members), *rest = by_b[b]
        note = _choice_note(task, best, [loaded for loaded, _ in rest])
        if rest:
            result.messages.append(f"{task.case_id} {diffusion_stem(stem, b)}: {note}")
        assert best.geometry is not None
        yield _Plan(diffusion_stem(stem, b), best.facts, best.geometry, members, b, note=note)


def _wanted_b(wanted: str | tuple[int, ...], there: list[int]) -> list[int]:
    """The b-values that a rule asks for, of those that are there."""
    if wanted == "all":
        return there
    return there[-1:] if wanted == "highest" else [b for b in there if b in wanted]


def _plan_spare(task: CaseTask, spare: Sequence[_Loaded], result: CaseResult, taken: set[str]) -> Iterator[_Plan]:
    """With ``--all``, a 3-D or 4-D output for each series that no sequence uses; else a line in the report."""
    failed = {(f.series_uid, f.series_number) for f in result.failures}
    for loaded in spare:
        entry = loaded.facts.entry
        if (_uid(task, entry), entry.number) in failed:
            continue
        reason = _not_wanted(task, loaded)
        if reason:
            _leave(task, result, entry, reason)
        elif loaded.geometry is None:
            assert loaded.error is not None
            result.failures.append(_failure(task, loaded.facts, loaded.error, ""))
        else:
            stem = _spare_stem(task, entry, taken)
            taken.add(stem)
            volumes = loaded.geometry.volumes
            yield _Plan(stem, loaded.facts, loaded.geometry, volumes, keep_4d=len(volumes) > 1)


def _not_wanted(task: CaseTask, loaded: _Loaded) -> str:
    """Why a series is left alone, or nothing."""
    if not task.options.convert_unmatched:
        return "no rule chose it"
    modality = loaded.facts.entry.tags.get("Modality", [""])[0]
    if modality not in VOLUMETRIC:
        return f"modality {modality} holds no volumes"
    text = " ".join([*loaded.facts.entry.tags.get("ImageType", []), loaded.facts.entry.description]).lower()
    is_localizer = any(word in text for word in ("loc", "scout", "survey", "topogram"))
    if loaded.error is not None and loaded.error.code == "dicom_mixed_orientation" and is_localizer:
        return "a localizer: its images have several orientations"
    return ""


def _spare_stem(task: CaseTask, entry: SeriesEntry, taken: set[str]) -> str:
    """``<series number>_<description>``; with ``--anonymize`` the modality stands for the free text."""
    text = entry.description if task.options.pseudonyms is None else entry.tags.get("Modality", ["series"])[0]
    name = re.sub(r"[^A-Za-z0-9.-]+", "_", f"{entry.number or 0}_{text}").strip("._-")[:64] or "series"
    number = 1
    stem = name
    while stem in taken:
        number += 1
        stem = f"{name}_{number}"
    return stem


def _described_b(facts: SeriesFacts) -> float | None:
    """The one b-value that the series description names, where no tag states it: ``DWI_b1400``."""
    found = re.findall(r"(?<![a-z])b(?:val(?:ue)?)?[ _=-]?(\d{1,5})(?![a-z\d])", facts.entry.description.lower())
    return float(found[0]) if len(set(found)) == 1 else None


def _no_b_value() -> DataError:
    return DataError(
        "Neither a tag nor the description states the b-value of the series.",
        where="DiffusionBValue and the private tags of Siemens, GE and Philips are absent",
        fix="name it in the stem of a mapping, for example ax_dwi_b1000: {SeriesDescription: …}",
        code="dicom_no_b_value",
    )


def _choice_note(task: CaseTask, best: _Loaded, others: Sequence[_Loaded]) -> str:
    if not others:
        return ""
    rest = ", ".join(_series_name(task, loaded.facts.entry) for loaded in others)
    return f"{_series_name(task, best.facts.entry)} chosen, not {rest} (rule, original, most slices, latest)"


def _series_name(task: CaseTask, entry: SeriesEntry) -> str:
    number = f"series {entry.number or '?'}"
    return number if task.options.pseudonyms is not None else f"{number} {entry.description}"


def _leave(task: CaseTask, result: CaseResult, entry: SeriesEntry, reason: str) -> None:
    result.unmatched.append(
        {
            "case_id": task.case_id,
            "series_uid": _uid(task, entry),
            "series_number": entry.number,
            "description": _description(task, entry),
            "n_files": len(entry.paths),
            "reason": reason,
        }
    )


# --- the reference ---------------------------------------------------------------------------------------------------


def _resolved(reference: str, plans: Sequence[_Plan]) -> str:
    """The stem of the reference in this case: of a sequence that is split by b-value the highest one."""
    split = [plan for plan in plans if plan.b is not None and plan.stem == diffusion_stem(reference, plan.b)]
    if not split or any(plan.stem == reference for plan in plans):
        return reference
    return max(split, key=lambda plan: plan.b or 0).stem


def _reference_first(task: CaseTask, plans: list[_Plan], reference: str, result: CaseResult) -> list[_Plan]:
    """The reference before the others; without it all others fail, since their grid is unknown."""
    first = [plan for plan in plans if plan.stem == reference]
    if not first and plans:
        _fail_rest(task, plans, reference, result)
        return []
    return first + [plan for plan in plans if plan.stem != reference]


def _fail_rest(task: CaseTask, plans: Sequence[_Plan], reference: str, result: CaseResult) -> None:
    error = DataError(
        f"The case has no {reference}, on whose grid the sequence was to lie.",
        where=f"case {task.case_id}",
        fix="pass --no-align, or another --reference",
        code="reference_missing",
    )
    result.failures += [_failure(task, plan.facts, error, plan.stem) for plan in plans]


def _grid(task: CaseTask, plan: _Plan, output: Output) -> Volume:
    """The grid of the reference, without its voxels."""
    if task.options.dry_run:
        return Volume(np.broadcast_to(np.int8(0), plan.geometry.shape), plan.geometry.affine)
    header = read_nifti_header(task.out / output.path)
    return Volume(np.broadcast_to(np.int8(0), header.shape[2::-1]), header.affine)


# --- converting ------------------------------------------------------------------------------------------------------


def _existing(task: CaseTask, plan: _Plan, digest: str) -> Output | None:
    """The output of an earlier run from the same files and options, or None."""
    if task.options.again:
        return None
    path = task.out / task.case_id / f"{plan.stem}.nii.gz"
    try:
        record = json.loads(path.with_name(f"{plan.stem}.json").read_text(encoding="utf-8"))["medssl"]
        if record["digest"] != digest or record["bytes"] != path.stat().st_size:
            return None
        return output_of(record, status="up_to_date")
    except (OSError, ValueError, KeyError, TypeError):
        return None  # missing or damaged: converted again


def output_of(record: dict[str, Any], status: str) -> Output:
    """The ``medssl`` part of a sidecar as an output.

    Raises:
        KeyError, TypeError: The record is not ours.
    """
    z, y, x = record["spacing"]
    return Output(
        case_id=str(record["case_id"]),
        patient_id=str(record["patient_id"]),
        study_uid=str(record["study_uid"]),
        stem=str(record["stem"]),
        path=f"{record['case_id']}/{record['stem']}.nii.gz",
        series_uid=str(record["series_uid"]),
        series_number=str(record["series_number"]),
        description=str(record["description"]),
        n_slices=int(record["n_slices"]),
        n_volumes=int(record["n_volumes"]),
        spacing=(float(z), float(y), float(x)),
        b=record["b_value"],
        status=status,
        note=str(record["note"]),
    )


def _convert(task: CaseTask, plan: _Plan, digest: str, grid: Volume | None) -> Output:
    """Convert, verify, resample and write one output; with ``dry_run`` only describe it."""
    if task.options.dry_run:
        return output_of(_record(task, plan, digest, grid, plan.geometry.shape[0], plan.geometry.spacing), "planned")
    work = task.out / ".work" / task.case_id
    try:
        volume, b_vectors, how = _read_volumes(task, plan, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    volume = _small_type(volume)
    is_nearest = holds_classes(plan.stem, volume.array)
    n_slices = plan.geometry.shape[0]
    spacing = plan.geometry.spacing
    if grid is not None:
        if b_vectors is not None and not np.allclose(_directions(volume), _directions(grid), atol=1e-3):
            b_vectors, how = None, f"{how}; gradient directions left out: they belong to the original axes"
        volume = resample_to(volume, grid, nearest=is_nearest)
        n_slices, spacing = grid.shape[0], grid.spacing
    record = _record(task, plan, digest, grid, n_slices, spacing)
    record["made"] = how
    record["interpolation"] = None if grid is None else "nearest" if is_nearest else "linear"
    return _write(task, plan, volume, b_vectors, record)


def _write(task: CaseTask, plan: _Plan, volume: Volume, b_vectors: np.ndarray | None, record: dict[str, Any]) -> Output:
    folder = contained(task.out, task.case_id, "case id")
    path = folder / f"{plan.stem}.nii.gz"
    sidecar = folder / f"{plan.stem}.json"
    sidecar.unlink(missing_ok=True)  # without it the volume counts as unfinished, whatever happens next
    write_volume(path, volume)
    gradients = {"bval": None, "bvec": None} | _gradient_texts(plan, volume, b_vectors)
    for suffix, text in gradients.items():
        target = folder / f"{plan.stem}.{suffix}"
        if text is None:
            target.unlink(missing_ok=True)
        else:
            write_text(target, text)
    first = plan.facts.files[plan.volumes[0].files[0]]
    with quiet_pydicom():
        header = read_header(first.path)
        tags = {} if header is None else kept_tags(header, anonymize=task.options.pseudonyms is not None)
    if plan.b is not None:
        tags["DiffusionBValue"] = plan.b
    write_json(sidecar, {**tags, "medssl": {**record, "bytes": path.stat().st_size}})
    return output_of(record, "converted")


def _record(
    task: CaseTask, plan: _Plan, digest: str, grid: Volume | None, n_slices: int, spacing: Sequence[float]
) -> dict[str, Any]:
    options = task.options
    n_volumes = len(plan.volumes) if plan.keep_4d else 1
    b_values = [None if v.b is None else round_b(v.b) for v in plan.volumes] if plan.keep_4d else None
    return {
        "digest": digest,
        "case_id": task.case_id,
        "patient_id": task.patient_id,
        "study_uid": task.study_uid,
        "stem": plan.stem,
        "series_uid": _uid(task, plan.facts.entry),
        "series_number": plan.facts.entry.number,
        "description": _description(task, plan.facts.entry),
        "n_files": len({f for v in plan.volumes for f in v.files}),
        "n_slices": n_slices,
        "n_volumes": n_volumes,
        "spacing": [round(float(s), 6) for s in spacing],
        "b_value": plan.b,
        "b_values": b_values,
        "plane": plan.facts.plane,
        "engine": options.engine,
        "engine_version": options.engine_version,
        "anonymized": options.pseudonyms is not None,
        "aligned_to": options.reference if grid is not None else None,
        "note": plan.note,
    }


def _digest(task: CaseTask, plan: _Plan, grid_digest: str) -> str:
    used = sorted({f for v in plan.volumes for f in v.files})
    files = [(f.sop_uid, f.size, f.modified_ns) for f in (plan.facts.files[i] for i in used)]
    options = task.options
    identity = (task.case_id, task.patient_id, plan.stem, plan.b, plan.keep_4d, options.pseudonyms is not None)
    return digest_of(FORMAT, identity, options.engine, options.engine_version, sorted(files), grid_digest)


def _read_volumes(task: CaseTask, plan: _Plan, work: Path) -> tuple[Volume, np.ndarray | None, str]:
    """The verified volume of a plan, gradient vectors (3, T) of a 4-D one, and how it was made."""
    if plan.keep_4d:
        whole = _whole_series(task, plan, work)
        if whole is not None:
            return whole.volume, whole.b_vectors, "one 4-D series"
    results = [_one(task, plan, volume, work) for volume in plan.volumes]
    arrays = [result.volume.array for result in results]
    if plan.keep_4d:
        return Volume(np.stack(arrays), results[0].volume.affine), None, f"{len(arrays)} volumes, stacked"
    array, how = combine_directions(arrays, [volume.direction for volume in plan.volumes])
    return Volume(array, results[0].volume.affine), None, how


def _one(task: CaseTask, plan: _Plan, volume: VolumePlan, work: Path) -> EngineResult:
    files = [plan.facts.files[i] for i in volume.files]
    paths = [file.path for file in files]
    if len(volume.frames) < sum(file.n_frames for file in files) and not plan.facts.is_mosaic:
        paths = _extracted(plan, volume, work / "frames")
    result = convert_files(task.options.engine, paths, work, is_compressed=any(f.is_compressed for f in files))
    check_converted(result.volume, plan.geometry, task.options.engine)
    if result.volume.array.ndim != 3:
        raise DataError(
            f"{task.options.engine} made {len(result.volume.array)} volumes where the headers describe one.",
            fix="try another --engine; the series was not written",
            code="dicom_engine_disagrees",
        )
    return result


def _extracted(plan: _Plan, volume: VolumePlan, folder: Path) -> list[Path]:
    """Files with the frames of one volume alone, out of multi-frame files that hold several."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    paths = []
    for file in volume.files:
        paths.append(folder / f"{file:06d}.dcm")
        extract_frames(plan.facts.files[file].path, [f.index for f in volume.frames if f.file == file], paths[-1])
    return paths


def _whole_series(task: CaseTask, plan: _Plan, work: Path) -> EngineResult | None:
    """A 4-D series in one pass, when its order is proven: first and last volume are those of our own grouping."""
    files = [plan.facts.files[i] for i in dict.fromkeys(i for v in plan.volumes for i in v.files)]
    try:
        result = convert_files(task.options.engine, [f.path for f in files], work)
        check_converted(result.volume, plan.geometry, task.options.engine)
        array = result.volume.array
        if array.ndim != 4 or len(array) != len(plan.volumes):
            return None
        for i in (0, len(array) - 1):
            alone = _one(task, plan, plan.volumes[i], work).volume.reoriented(result.volume.orientation)
            if not np.array_equal(alone.array, array[i]):
                return None
    except DataError:
        return None  # volume by volume then, where each is checked and its fault is told
    ours = [0.0 if v.b is None else v.b for v in plan.volumes]
    if result.b_values is None or not np.allclose(result.b_values, ours, atol=1.0):
        return replace(result, b_values=None, b_vectors=None)
    return result


def _small_type(volume: Volume) -> Volume:
    """int16 where unsigned or wide whole numbers fit it, float32 for double: what trainers and viewers read."""
    array = volume.array
    if array.dtype == np.float64:
        return Volume(array.astype(np.float32), volume.affine)
    if array.dtype.kind in "iu" and array.dtype.itemsize > 1 and array.dtype != np.int16:
        fits = array.min(initial=0) >= -32768 and array.max(initial=0) <= 32767
        return Volume(array.astype(np.int16), volume.affine) if fits else volume
    return volume


def _directions(volume: Volume) -> np.ndarray:
    columns = volume.affine[:3, :3]
    return columns / np.linalg.norm(columns, axis=0)


def _gradient_texts(plan: _Plan, volume: Volume, b_vectors: np.ndarray | None) -> dict[str, str | None]:
    """``.bval`` and ``.bvec`` of a 4-D diffusion series, in FSL's form."""
    if volume.array.ndim != 4 or not any(v.b for v in plan.volumes) or any(v.b is None for v in plan.volumes):
        return {}
    b_values = " ".join(str(round_b(v.b)) for v in plan.volumes if v.b is not None) + "\n"
    if b_vectors is None:
        return {"bval": b_values}
    return {"bval": b_values, "bvec": "".join(" ".join(f"{n:.6g}" for n in row) + "\n" for row in b_vectors)}


# --- saying ----------------------------------------------------------------------------------------------------------


def _failure(task: CaseTask, facts: SeriesFacts, error: DataError, stem: str) -> Failure:
    entry = facts.entry
    is_private = task.options.pseudonyms is not None
    # an engine's own words may hold what the header holds
    where = "" if is_private and error.code == "dicom_engine_failed" else hide_home(" ".join(error.where.split()))
    reason = f"{_series_name(task, entry)}{f' for {stem}' if stem else ''}: {error.what}" + (
        f" {where}" if where else ""
    )
    return Failure(
        case_id=task.case_id,
        path="" if is_private else str(Path(entry.paths[0]).parent),
        reason=reason,
        fix=error.fix,
        code=error.code,
        series_uid=_uid(task, entry),
        series_number=entry.number,
        description=_description(task, entry),
        stem=stem,
    )


def _uid(task: CaseTask, entry: SeriesEntry) -> str:
    pseudonyms = task.options.pseudonyms
    return entry.series_uid if pseudonyms is None else pseudonyms.uid(entry.series_uid)


def _description(task: CaseTask, entry: SeriesEntry) -> str:
    return entry.description if task.options.pseudonyms is None else ""
