"""Label files of VisionFM: one line a picture, ``training/1.jpg;0,1,0``, or ``path, label, interval`` for forecasts.

Blank lines and lines that begin with ``#`` are skipped; a leading ``# classes: a,b,c`` names the columns. Any line
ends, blanks around commas, a byte-order mark and backslashes in paths are taken. A ``.csv`` has a header instead.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from medssl_cli.core.errors import DataError
from medssl_cli.core.run import hide_home
from medssl_cli.data.manifest import PATH_ALIASES, PATIENT_ALIASES, SPLIT_ALIASES, read_table, say_some

FORECAST_COLUMNS = ("label", "interval_days")
_NAMES = re.compile(r"#\s*classes\s*:\s*(?P<names>.*)", re.IGNORECASE)
_IMAGE_ALIASES = ("image", "path", "file", *PATH_ALIASES)
_SHOWN = 100


@dataclass(frozen=True)
class LabelLine:
    """One picture.

    Args:
        line: Of the file, from 1.
        image: Path as it stands there, with forward slashes.
        values: Numbers as text; an unknown one (NaN) is empty.
        patient_id: Where the file tells it.
    """

    line: int
    image: str
    values: tuple[str, ...]
    patient_id: str = ""


@dataclass(frozen=True)
class LabelLines:
    """A label file.

    Args:
        path: Where it was read.
        entries: In the order of the file; all have as many values.
        names: Of the values, or of the classes that a single value counts; empty where nothing names them.
        is_forecast: Each entry is a label and an interval in days.
    """

    path: Path
    entries: tuple[LabelLine, ...]
    names: tuple[str, ...]
    is_forecast: bool = False

    @property
    def width(self) -> int:
        """Values of each entry."""
        return len(self.entries[0].values)

    @property
    def columns(self) -> tuple[str, ...]:
        """A name for each value: as the file names it, else ``label`` or ``label_0``, ``label_1``, …"""
        if self.is_forecast and not self.names:
            return FORECAST_COLUMNS
        if self.width == 1:
            return ("label",)
        return self.names or tuple(f"label_{number}" for number in range(self.width))

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes that a single value counts; empty where nothing names them."""
        return self.names if self.width == 1 else ()


def read_label_lines(path: Path) -> LabelLines:
    """Read a label file.

    Raises:
        DataError: Not readable as text, no entry, or lines that cannot be read: all of them, each with its number.
    """
    if path.suffix.lower() == ".csv":
        return _of_table(path)
    faults: list[str] = []
    names, entries = _entries(path, faults)
    return _checked(path, [entry for entry, _ in entries], names, {forecast for _, forecast in entries}, faults)


def _entries(path: Path, faults: list[str]) -> tuple[tuple[str, ...], list[tuple[LabelLine, bool]]]:
    """(names of a leading comment, entries with whether each is a forecast)."""
    names: tuple[str, ...] = ()
    entries: list[tuple[LabelLine, bool]] = []
    for number, line in enumerate(_lines(path), start=1):
        if line.startswith("#") and not entries and (match := _NAMES.fullmatch(line)):
            names = tuple(name.strip() for name in match["names"].split(","))
            if not all(names) or len(set(names)) < len(names):
                faults.append(f"line {number}: names are empty or stand there twice: {line[:80]!r}")
        if not line or line.startswith("#"):
            continue
        try:
            entries.append(_entry(number, line))
        except ValueError as error:
            faults.append(f"line {number}: {error}: {line[:80]!r}")
    return names, entries


def _lines(path: Path) -> Iterator[str]:
    """Stripped lines.

    Raises:
        DataError: Missing, or not UTF-8 text.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise _fault(path, "The label file cannot be read.", str(error.strerror), "labels_missing") from error
    except UnicodeDecodeError as error:
        raise _fault(path, "The label file is not UTF-8 text.", f"byte {error.start}", "table_encoding") from error
    if "\0" in text:
        raise _fault(path, "The label file is not text.", "it holds NUL characters", "table_encoding")
    yield from (line.strip() for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n"))


def _entry(number: int, line: str) -> tuple[LabelLine, bool]:
    """The picture of a line, and whether the line is one of forecasting.

    Raises:
        ValueError: It cannot be read; says why.
    """
    parts = line.split(";")
    if len(parts) > 2:
        raise ValueError(f"{len(parts) - 1} semicolons, one is expected")
    is_forecast = len(parts) == 1
    if is_forecast:
        parts = line.rsplit(",", 2)
        if len(parts) < 3:
            raise ValueError("neither 'path;labels' nor 'path, label, interval'")
        parts = [parts[0], ",".join(parts[1:])]
    image = parts[0].strip().replace("\\", "/")
    if not image:
        raise ValueError("no path")
    values = tuple(_value(text.strip()) for text in parts[1].split(","))
    if is_forecast and (values[0] not in ("0", "1") or not values[1].isdecimal()):
        raise ValueError("a forecast has a label 0 or 1 and an interval in whole days")
    return LabelLine(number, image, values), is_forecast


def _value(text: str) -> str:
    """The number as it is written; empty for NaN.

    Raises:
        ValueError: Not a number, or an infinite one.
    """
    try:
        number = math.inf if "_" in text else float(text)  # Python takes 1_2 for twelve
    except ValueError:
        number = math.inf
    if math.isinf(number):
        raise ValueError(f"{text[:30]!r} is no number" if text else "a label is empty")
    return "" if math.isnan(number) else text


def _of_table(path: Path) -> LabelLines:
    """A CSV with a column of pictures, on request one of patients, and one for each label."""
    table = read_table(path)
    image = table.find(_IMAGE_ALIASES)
    if image is None:
        detail = f"none of its columns is called {', '.join(_IMAGE_ALIASES[:3])}: {', '.join(table.header)}"
        raise _fault(path, "The label file has no column of pictures.", detail, "column_missing")
    patient, split = table.find(PATIENT_ALIASES), table.find(SPLIT_ALIASES)
    names = tuple(name for name in table.header if name not in (image, patient, split))
    faults: list[str] = []
    entries = []
    patients = [""] * len(table.rows) if patient is None else table.column(patient)
    cells = zip(*(table.column(name) for name in names), strict=True) if names else ((),) * len(table.rows)
    for line, name, row, owner in zip(table.lines, table.column(image), cells, patients, strict=True):
        try:
            if not name or not row:
                raise ValueError("no path" if not name else "no label")
            values = tuple(_value(text) if text else "" for text in row)
            entries.append(LabelLine(line, name.replace("\\", "/"), values, owner))
        except ValueError as error:
            faults.append(f"line {line}: {error}")
    is_forecast = set(FORECAST_COLUMNS) <= set(names)
    return _checked(path, entries, names if len(names) > 1 else (), {is_forecast}, faults)


def _checked(
    path: Path, entries: Sequence[LabelLine], names: tuple[str, ...], forms: set[bool], faults: list[str]
) -> LabelLines:
    """The whole file, if its lines agree."""
    if len(forms) > 1:
        faults.append("some lines are 'path;labels', others 'path, label, interval'")
    counts = Counter(len(entry.values) for entry in entries)
    if len(counts) > 1:
        usual = counts.most_common(1)[0][0]
        odd = [entry for entry in entries if len(entry.values) != usual]
        faults += [f"line {entry.line}: {len(entry.values)} labels, others have {usual}" for entry in odd]
    elif names and entries and len(entries[0].values) not in (1, len(names)):
        faults.append(f"{len(names)} names for {len(entries[0].values)} labels: {say_some(names)}")
    if faults:
        shown = [f"{hide_home(str(path))}, {fault}" for fault in faults[:_SHOWN]]
        more = [f"and {len(faults) - _SHOWN} more"] if len(faults) > _SHOWN else []
        raise DataError(
            "The label file cannot be read.",
            where="\n".join([*shown, *more]),
            fix="write 'training/1.jpg;0,1' with one semicolon and numbers, each line with as many",
            code="label_lines",
        )
    if not entries:
        raise _fault(path, "The label file names no picture.", "blank lines and comments alone", "label_lines")
    return LabelLines(path, tuple(entries), names, is_forecast=True in forms)


def _fault(path: Path, what: str, detail: str, code: str) -> DataError:
    return DataError(what, where=f"{hide_home(str(path))}: {detail}", fix="correct or export it again", code=code)
