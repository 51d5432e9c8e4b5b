"""What a user names on the command line as cases with their files: folders, volumes, pictures, DICOM, tables.

Results of each go into a folder of its own below ``--out``, whose name is made here, so that no two cases and no odd
file name can get in each other's way.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from medssl_cli.core.case import Case
from medssl_cli.core.case import Sequence as CaseSequence
from medssl_cli.core.errors import ConfigError, DataError, PartialFailure
from medssl_cli.core.run import hide_home
from medssl_cli.data.images import is_image, volume_stem
from medssl_cli.data.layouts import cases_beside
from medssl_cli.data.manifest import case_ids, read_table, read_table_cases
from medssl_cli.data.sequences import is_diffusion_name, resolve_sequence

log = logging.getLogger(__name__)

TABLE_SUFFIXES = (".csv", ".tsv")
RESERVED = ("summary.json", "failures.csv", "predictions.csv")
MAX_NAME_BYTES = 150


@dataclass(frozen=True)
class Named:
    """One thing to look at.

    Args:
        path: A folder or a file.
        name: Unique among the cases of this command, and safe as the name of a folder.
    """

    path: Path
    name: str


@dataclass(frozen=True)
class Wanted:
    """What a model takes.

    Args:
        sequences: Names in channel order.
        reference: The one that a file of unknown name is taken for.
        volumes: False for a model of plain pictures.
        slices: The pictures of that model were slices of volumes.
    """

    sequences: tuple[str, ...]
    reference: str
    volumes: bool
    slices: bool = False


# --- names -----------------------------------------------------------------------------------------------------------


def named_cases(words: Sequence[str]) -> list[Named]:
    """The cases that were named, tables replaced by their rows.

    Raises:
        ConfigError: None at all, or one of them twice.
        DataError: A table that cannot be read.
    """
    paths: list[Path] = []
    for word in words:
        path = Path(word)
        is_table = path.suffix.lower() in TABLE_SUFFIXES and path.is_file()
        paths += _rows(path) if is_table else _images_of_layout(path) or [path]
    if not paths:
        raise ConfigError(
            "No case was named.",
            fix="name a NIfTI file, a case folder, a DICOM folder, a picture, or a CSV of them",
            code="case_missing",
        )
    twice = [path for path, count in Counter(path.absolute() for path in paths).items() if count > 1]
    if twice:
        raise ConfigError(
            "A case is named twice.",
            where=", ".join(hide_home(str(path)) for path in twice[:5]),
            fix="name each case once",
            code="case_twice",
        )
    return [Named(path, name) for path, name in zip(paths, unique_names(paths), strict=True)]


def _images_of_layout(folder: Path) -> list[Path]:
    """The first file of each case in a folder of images of nnU-Net or the Decathlon; none of anything else."""
    first = next((path for path in sorted(folder.iterdir()) if volume_stem(path)), None) if folder.is_dir() else None
    if first is None:
        return []
    return [folder / next(iter(case.sequences.values())).path.name for case in cases_beside(first)]


def unique_names(paths: Sequence[Path]) -> list[str]:
    """A safe name for each path: its own, with as many parents before it as tell it from the others."""
    names = [_safe_name(_own_name(path)) for path in paths]
    parents = [list(reversed(path.absolute().parts[:-1])) for path in paths]
    for depth in range(max(map(len, parents))):
        taken = Counter(name.casefold() for name in names)
        if max(taken.values()) == 1:
            return names
        for i, name in enumerate(names):
            if taken[name.casefold()] > 1 and depth < len(parents[i]):
                names[i] = _safe_name(f"{parents[i][depth]}_{name}")
    taken = Counter(name.casefold() for name in names)  # told apart by suffix alone: x.nii and x.nii.gz
    return [
        name if taken[name.casefold()] == 1 else f"{name}-{_digest(str(path.absolute()))}"
        for name, path in zip(names, paths, strict=True)
    ]


def _own_name(path: Path) -> str:
    if path.is_dir():
        return path.resolve().name
    stem = volume_stem(path) or path.stem
    in_layout = path.absolute().parent.name in ("imagesTr", "imagesTs")
    return stem.removesuffix("_0000") if in_layout else stem  # the first channel of nnU-Net


def _safe_name(name: str) -> str:
    """A folder name that is printable UTF-8, not hidden, not too long and none of our own files."""
    shown = name.encode("utf-8", "replace").decode("utf-8")
    shown = "".join(c if c.isprintable() and c not in "/\\" else "_" for c in shown).lstrip(".").strip()
    if shown in RESERVED or not shown:
        shown = f"case_{shown}"
    if len(shown.encode()) > MAX_NAME_BYTES:
        shown = f"{shown.encode()[: MAX_NAME_BYTES - 9].decode('utf-8', 'ignore')}-{_digest(shown)}"
    return shown


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]


def _rows(table: Path) -> list[Path]:
    """The files of a table; those of one case that lie in one folder are that folder."""
    cases = read_table_cases(table)
    files = [next(iter(case.sequences.values())).path for case in cases]
    found = read_table(table)
    column = found.find(("case_id",))
    if column is None:
        return files
    groups: dict[str, list[Path]] = {}
    for case_id, file in zip(found.column(column), files, strict=True):
        groups.setdefault(case_id, []).append(file)
    return [path for group in groups.values() for path in _one_folder(group)]


def _one_folder(files: list[Path]) -> list[Path]:
    folders = {file.parent for file in files}
    return [folders.pop()] if len(files) > 1 and len(folders) == 1 else files


# --- files -----------------------------------------------------------------------------------------------------------


@contextmanager
def found_case(named: Named, wanted: Wanted, sequence: str | None, scratch: Path) -> Iterator[Case]:
    """The files of a case; a DICOM folder is converted into ``scratch`` first.

    Raises:
        ConfigError: ``sequence`` is none of the model's, or is given for something else than a volume file.
        DataError: Nothing there that the model takes.
    """
    path = named.path
    if sequence is not None and (path.is_dir() or is_image(path)):
        raise ConfigError(
            "--sequence tells what a single NIfTI file is; this is none.",
            where=hide_home(str(path)),
            fix="leave it out: the files of a folder are told by their names",
            code="sequence_needless",
        )
    if path.is_dir():
        with _naming_source(named, scratch):
            yield _folder_case(named, wanted, scratch)
    elif is_image(path) and path.exists():
        yield _picture_case(named, wanted)
    else:
        yield (_layout_case(named, wanted) if sequence is None else None) or _file_case(named, wanted, sequence)


def _layout_case(named: Named, wanted: Wanted) -> Case | None:
    """All channels of a case of nnU-Net or the Decathlon of which one file was named; None of anything else."""
    if not wanted.volumes:
        return None
    for case in cases_beside(named.path, wanted.sequences):
        if any(entry.path.name == named.path.name for entry in case.sequences.values()):
            found = {name: case.sequences[name] for name in wanted.sequences if name in case.sequences}
            _say_missing(named, wanted, found)
            return Case(named.name, named.name, found) if found else None
    return None


def _folder_case(named: Named, wanted: Wanted, scratch: Path) -> Case:
    found = _sequences_in(named.path, wanted)
    if not found and not _holds_volumes(named.path):
        found = _sequences_in(_converted(named, scratch), wanted)
    if not found:
        raise DataError(
            "The folder holds none of the model's sequences.",
            where=f"{hide_home(str(named.path))}: looked for {_looked_for(wanted)} as .nii or .nii.gz",
            fix=_folder_fix(named.path, wanted),
            code="sequences_missing",
        )
    for name, entry in found.items():
        if entry.note:
            log.info("%s: %s: %s", named.name, name, entry.note)
    _say_slices(named, wanted)
    _say_missing(named, wanted, found)
    return Case(named.name, named.name, found)


def _say_missing(named: Named, wanted: Wanted, found: Mapping[str, CaseSequence]) -> None:
    missing = [name for name in wanted.sequences if name not in found]
    if found and missing:
        log.warning("%s: %s missing; the model sees the others alone", named.name, ", ".join(missing))


def _looked_for(wanted: Wanted) -> str:
    return ", ".join(wanted.sequences) if wanted.volumes else "the only volume"


def _folder_fix(folder: Path, wanted: Wanted) -> str:
    if _cases_inside(folder, wanted):
        return f"it holds folders of cases: name {hide_home(str(folder))}/* to look at all of them"
    if wanted.volumes:
        return "name the files by these sequences, or name one NIfTI file and tell what it is with --sequence"
    pictures = sorted({path.suffix for path in folder.iterdir() if is_image(path)})
    if pictures:
        return f"it holds pictures: name {hide_home(str(folder))}/*{pictures[0]} to look at all of them"
    return "name the one NIfTI file or picture to look at"


@contextmanager
def _naming_source(named: Named, scratch: Path) -> Iterator[None]:
    """Put the folder that the user named in place of a converted file, which is gone by then and may tell a patient."""
    try:
        yield
    except DataError as error:
        inside = re.escape(str(scratch / "cases")) + r"/[^/\n]*"
        where = re.sub(inside, lambda _: hide_home(str(named.path)), error.where)
        raise DataError(error.what, where=where, fix=error.fix, code=error.code) from error


def _sequences_in(folder: Path, wanted: Wanted) -> dict[str, CaseSequence]:
    """The model's sequences by their names; a model of pictures takes the only volume, whatever its name."""
    if wanted.volumes:
        return {name: found for name in wanted.sequences if (found := resolve_sequence(folder, name)) is not None}
    volumes = [path for path in folder.iterdir() if volume_stem(path) is not None]
    if len(volumes) != 1:
        return {}
    return {wanted.reference: CaseSequence(wanted.reference, volumes[0])}


def _holds_volumes(folder: Path) -> bool:
    return any(volume_stem(path) is not None for path in folder.rglob("*"))


def _cases_inside(folder: Path, wanted: Wanted) -> bool:
    return any(_sequences_in(folder / name, wanted) for name in case_ids(folder)[:20])


def _converted(named: Named, scratch: Path) -> Path:
    """The one case of a DICOM folder as NIfTI.

    Raises:
        DataError: No DICOM image, no series that the shipped mapping names, or several studies.
    """
    from medssl_cli.services.convert import ConvertRequest, convert_dicom

    by_hand = "convert it first and name the case folder: medssl convert dicom SOURCE OUT"
    request = ConvertRequest(named.path, scratch / "cases", align=False, workers=1, on_error="skip")
    try:
        result = convert_dicom(request)
    except DataError as error:
        if error.code == "dicom_none":
            return named.path
        raise DataError(error.what, where=error.where, fix=by_hand, code=error.code) from error
    cases = sorted({output.case_id for output in result.outputs})
    if result.error is not None and not isinstance(result.error, PartialFailure):
        raise result.error
    if len(cases) != 1:
        raise DataError(
            "A DICOM folder has to hold one study." if cases else "No series of the DICOM folder could be converted.",
            where=f"{hide_home(str(named.path))}: {len(cases)} studies, {len(result.failures)} series refused",
            fix=by_hand,
            code="dicom_studies",
        )
    log.info("%s: converted %d series from DICOM", named.name, len(result.outputs))
    return scratch / "cases" / cases[0]


def _picture_case(named: Named, wanted: Wanted) -> Case:
    if wanted.volumes:
        raise DataError(
            "The model reads volumes, this is a picture.",
            where=f"{hide_home(str(named.path))}; the model's sequences: {', '.join(wanted.sequences)}",
            fix="name a NIfTI file or a case folder, or a model pretrained on pictures",
            code="case_kind",
        )
    return Case(named.name, named.name, {"image": CaseSequence("image", named.path)})


def _file_case(named: Named, wanted: Wanted, sequence: str | None) -> Case:
    path, stem = named.path, volume_stem(named.path)
    if stem is None or not path.exists():
        raise DataError(
            "This is no case." if path.exists() else "The case does not exist.",
            where=hide_home(str(path)),
            fix="name a .nii or .nii.gz file, a case folder, a DICOM folder, or a PNG, JPEG or TIFF picture",
            code="case_unknown" if path.exists() else "file_missing",
        )
    chosen = sequence_of(stem, wanted, sequence)
    _say_slices(named, wanted)
    beside = resolve_sequence(path.parent, stem) if "dwi" in stem.lower() else None
    index = beside.volume_index if beside is not None and beside.path == path else None
    return Case(named.name, named.name, {chosen: CaseSequence(chosen, path, volume_index=index)})


def _say_slices(named: Named, wanted: Wanted) -> None:
    if not wanted.volumes and not wanted.slices:
        log.warning("%s: the model learned from pictures; each slice is shown to it as one", named.name)


def sequence_of(stem: str, wanted: Wanted, asked: str | None = None) -> str:
    """Which of the model's sequences a file is: as asked, else by its name, else the reference, which is said.

    Raises:
        ConfigError: ``asked`` is none of them.
    """
    if asked is not None:
        if asked not in wanted.sequences:
            raise ConfigError(
                f"The model has no sequence {asked!r}.",
                where=f"its sequences: {', '.join(wanted.sequences)}",
                fix="pass one of them to --sequence",
                code="sequence_unknown",
            )
        return asked
    fitting = [name for name in wanted.sequences if _fits(stem.lower(), name.lower())]
    if fitting:
        return max(fitting, key=len)  # ax_t2_fs.nii is ax_t2_fs, though it begins as ax_t2 does
    if wanted.volumes:
        log.warning(
            "%s is taken as %s, the model's reference sequence; --sequence tells otherwise", stem, wanted.reference
        )
    return wanted.reference


def guessed_sequence(named: Named, case: Case, sequences: Sequence[str], asked: str | None) -> str | None:
    """The sequence that a lone volume was taken for although nothing says so; None where its name or data set does."""
    stem = None if named.path.is_dir() else volume_stem(named.path)
    if stem is None or asked is not None or any(_fits(stem.lower(), name.lower()) for name in sequences):
        return None
    return None if cases_beside(named.path) else next(iter(case.sequences))


def _fits(stem: str, name: str) -> bool:
    if stem == name:
        return True
    if "dwi" in name:
        return is_diffusion_name(stem)
    return stem.startswith(f"{name}_")
