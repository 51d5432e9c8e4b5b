"""Which file of a case folder is the sequence that was asked for; above all, which diffusion image.

A diffusion file is chosen by its b-value, read from whole tokens of its name, so that dates, times and series numbers
are never taken for one. Every choice among several files is told in ``Sequence.note``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from medssl_cli.core.case import Sequence
from medssl_cli.core.errors import DataError
from medssl_cli.data.images import read_header, volume_stem

MAX_LONE_B = 5000
"""Largest bare integer in a file name that is taken for a b-value, in s/mm²."""

_PREFIXES = ("ax_dwi", "dwi")
_NOT_DIFFUSION = frozenset(
    {"adc", "mask", "masks", "roi", "rois", "seg", "segs", "segmentation", "label", "labels"},
)
_TOKENS = re.compile(r"[_\-.]+")
_NAMED_B = re.compile(r"b(?:val(?:ue)?)?=?([0-9]{1,5})")
_B_KEYS = frozenset({"b", "bval", "bvals", "bvalue", "bvalues", "diffusionbvalue", "diffusionbvalues"})
_MAX_SIDECAR_BYTES = 2**20


@dataclass(frozen=True)
class Candidate:
    """A diffusion file and what is known of its b-value.

    Args:
        file_name: With suffix.
        b: Its b-value in s/mm², the largest one of a 4-D file; None when nothing tells.
        volume_b: The b-value of each volume of a 4-D file, from its sidecar.
    """

    file_name: str
    b: float | None
    volume_b: tuple[float, ...] = ()


@dataclass(frozen=True)
class Choice:
    """The file chosen for one sequence, and what a reader should be warned of.

    Args:
        sequence: As the rest of the program sees it.
        warnings: (code, message) pairs: several candidates, no b-value, another spelling.
    """

    sequence: Sequence
    warnings: tuple[tuple[str, str], ...] = ()


# --- pure functions over names ---------------------------------------------------------------------------------------


def name_tokens(stem: str) -> list[str]:
    """Lower-cased tokens of a stem, split at ``_``, ``-`` and ``.``."""
    return [token for token in _TOKENS.split(stem.lower()) if token]


def is_diffusion_name(stem: str) -> bool:
    """Whether a stem is that of a diffusion image: right prefix, and no token of a derived file."""
    return stem.lower().startswith(_PREFIXES) and not _NOT_DIFFUSION.intersection(name_tokens(stem))


def b_value_of_name(stem: str) -> int | None:
    """b-value that a file name tells, in s/mm².

    The largest of the tokens ``b1000``, ``b=1000``, ``bval1000``; else the only token that is an integer, if it lies in
    0 to 5000; else None: a date or two bare numbers tell nothing.
    """
    tokens = name_tokens(stem)
    named = [int(match[1]) for token in tokens if (match := _NAMED_B.fullmatch(token))]
    if named:
        return max(named)
    bare = [token for token in tokens if token.isascii() and token.isdigit()]
    small = [int(token) for token in bare if len(token) <= 9 and int(token) <= MAX_LONE_B]
    return small[0] if len(small) == 1 else None


def parse_bval(text: str) -> tuple[float, ...] | None:
    """The b-values of an FSL ``.bval`` text, one a volume; None when it holds anything else."""
    try:
        values = tuple(float(word) for word in text.replace(",", " ").split())
    except ValueError:
        return None
    return values if values and all(math.isfinite(b) and b >= 0 for b in values) else None


def parse_json_b(text: str) -> tuple[float, ...] | None:
    """The b-values that a JSON sidecar states under any usual key; None when it states none."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(data, dict):
        return None
    for key, value in data.items():
        if re.sub(r"[^a-z]", "", key.lower()) in _B_KEYS:
            found = parse_bval(" ".join(str(v) for v in value) if isinstance(value, list) else str(value))
            if found:
                return found
    return None


def best_candidate(candidates: Iterable[Candidate]) -> Candidate | None:
    """The candidate of the largest b-value; ties by prefix (``ax_dwi`` before ``dwi``), then by name.

    None when there are several and none has a b-value.
    """
    found = sorted(candidates, key=lambda c: (_prefix_rank(c.file_name), c.file_name))
    known = [c for c in found if c.b is not None]
    if known:
        return max(known, key=lambda c: c.b or 0.0)  # max keeps the first of equals: the order above breaks ties
    return found[0] if len(found) == 1 else None


def _prefix_rank(name: str) -> int:
    return next(rank for rank, prefix in enumerate(_PREFIXES) if name.lower().startswith(prefix))


# --- looking into a case folder --------------------------------------------------------------------------------------


def resolve_sequence(case_dir: Path, name: str) -> Sequence | None:
    """The file of ``case_dir`` for the sequence ``name``; None when there is none.

    Raises:
        DataError: Several diffusion files of which none tells its b-value (``dwi_ambiguous``), or a 4-D diffusion file
            without usable b-values (``dwi_4d_without_bval``).
    """
    choice = choose_sequence(case_dir, name)
    return None if choice is None else choice.sequence


def choose_sequence(case_dir: Path, name: str) -> Choice | None:
    """As ``resolve_sequence``, with the warnings that belong to the choice.

    An existing file of exactly that stem wins; then one that differs in case only; then, for a name that holds
    ``dwi``, the diffusion file of the largest b-value; then a folder of that name with one volume in it.
    """
    files = _volume_files(case_dir)
    exact = _by_stem(files, name, ignore_case=False) or _by_stem(files, name, ignore_case=True)
    if exact:
        return _exact_choice(case_dir, name, exact)
    if "dwi" in name.lower():
        names = [_preferred(group) for group in _grouped(files).values()]
        names = [file for file in names if is_diffusion_name(volume_stem(Path(file)) or "")]
        if names:
            return _diffusion_choice(case_dir, name, names)
    return _folder_choice(case_dir, name)


def _volume_files(folder: Path) -> list[str]:
    """Names of the NIfTI files directly in ``folder``, sorted; empty when it cannot be listed."""
    if not folder.is_dir():
        return []
    return sorted(p.name for p in folder.iterdir() if volume_stem(p) is not None and p.is_file())


def _by_stem(files: list[str], name: str, *, ignore_case: bool) -> list[str]:
    def same(stem: str | None) -> bool:
        return stem is not None and (stem.casefold() == name.casefold() if ignore_case else stem == name)

    return [file for file in files if same(volume_stem(Path(file)))]


def _grouped(files: list[str]) -> dict[str, list[str]]:
    """Files by stem: the two spellings ``.nii`` and ``.nii.gz`` are one candidate."""
    groups: dict[str, list[str]] = {}
    for file in files:
        groups.setdefault(volume_stem(Path(file)) or file, []).append(file)
    return groups


def _preferred(files: list[str]) -> str:
    """``.nii`` before ``.nii.gz``, then by name."""
    return min(files, key=lambda file: (file.lower().endswith(".gz"), file))


def _exact_choice(case_dir: Path, name: str, files: list[str]) -> Choice:
    chosen = _preferred(files)
    warnings = []
    if len(files) > 1:
        warnings.append(("sequence_twice", f"{name}: {chosen} chosen of {', '.join(files)}"))
    if volume_stem(Path(chosen)) != name:
        warnings.append(("name_case", f"{name}: taken from {chosen}, which differs in capitals"))
    note = "; ".join(text.partition(": ")[2] for _, text in warnings)
    sequence = Sequence(name, case_dir / chosen, note=note)
    if "dwi" in name.lower():
        sequence = _with_volume(sequence, _candidate(case_dir, chosen))
    return Choice(sequence, tuple(warnings))


def _diffusion_choice(case_dir: Path, name: str, files: list[str]) -> Choice:
    candidates = [_candidate(case_dir, file) for file in files]
    best = best_candidate(candidates)
    if best is None:
        raise DataError(
            "Several diffusion files, and none tells its b-value.",
            where="\n".join(str(case_dir / file) for file in files),
            fix="name them by b-value, e.g. ax_dwi_b1000.nii.gz, or put a .bval file beside each",
            code="dwi_ambiguous",
        )
    sequence = _with_volume(Sequence(name, case_dir / best.file_name), best)
    warnings = []
    if len(candidates) > 1:
        shown = ", ".join(c.file_name for c in candidates)
        warnings.append(("dwi_candidates", f"{name}: {best.file_name} chosen of {shown}"))
    unread = [c.file_name for c in candidates if c.b is None]
    if unread:
        warnings.append(("dwi_b_unknown", f"{name}: no b-value can be read of {', '.join(unread)}"))
    asked = b_value_of_name(name)
    if asked is not None and best.b != asked:
        b = "an unknown b" if best.b is None else f"b{best.b:g}"
        warnings.append(("dwi_other_b", f"{name}: b{asked} is absent, {b} is taken: {best.file_name}"))
    notes = [text.partition(": ")[2] for _, text in warnings] + ([sequence.note] if sequence.note else [])
    return Choice(replace(sequence, note="; ".join(notes)), tuple(warnings))


def _folder_choice(case_dir: Path, name: str) -> Choice | None:
    """A folder named as the sequence that holds exactly one volume, as some tools write."""
    folder = case_dir / name
    files = _volume_files(folder)
    if not files:
        return None
    if len(files) > 1:
        raise DataError(
            "The folder of a sequence holds several volumes.",
            where=f"{folder}: {', '.join(files[:6])}",
            fix=f"keep one of them, or name the file {name}.nii.gz in the case folder",
            code="sequence_ambiguous",
        )
    return Choice(Sequence(name, folder / files[0], note=f"{name}/{files[0]}"))


def _candidate(case_dir: Path, file: str) -> Candidate:
    stem = volume_stem(Path(file)) or file
    told = parse_bval(_sidecar(case_dir / f"{stem}.bval"))
    if told is None:
        told = parse_json_b(_sidecar(case_dir / f"{stem}.json"))
    if told and len(told) > 1:  # a series of several volumes: its sidecar knows better than its name
        return Candidate(file, max(told), told)
    named = b_value_of_name(stem)
    return Candidate(file, float(named) if named is not None else (told[0] if told else None), told or ())


def _sidecar(path: Path) -> str:
    """Text of a small file beside the image; empty when there is none or it is not text."""
    try:
        if not path.is_file() or path.stat().st_size > _MAX_SIDECAR_BYTES:
            return ""
        return path.read_text(encoding="utf-8-sig", errors="replace")
    except OSError:
        return ""


def _with_volume(sequence: Sequence, candidate: Candidate) -> Sequence:
    """The sequence with the volume of highest b-value, if its file is 4-D."""
    try:
        shape = read_header(sequence.path).shape
    except DataError:
        return sequence  # whoever reads the voxels says what is wrong with the file
    if len(shape) < 4:
        return sequence
    told = candidate.volume_b
    if len(told) != shape[3]:
        raise DataError(
            "A 4-D diffusion file does not tell the b-value of each volume.",
            where=f"{sequence.path}: {shape[3]} volumes, {len(told)} b-values beside it",
            fix="put the scanner's .bval file beside it, or split it with `medssl convert dicom`",
            code="dwi_4d_without_bval",
        )
    index = told.index(max(told))
    shown = ", ".join(f"b{b:g}" for b in dict.fromkeys(told))
    note = f"volume {index} (b{told[index]:g}) of {shown}"
    return replace(sequence, volume_index=index, note="; ".join(filter(None, (sequence.note, note))))
