"""Label maps: which values a file may hold, and which class each of them stands for.

Files keep the values of whoever drew them; inside, background is class 0 and the structures are 1, 2, … in the order of
``LabelSpec.classes``. A value that no class stands for is refused with its place, never taken for background.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from medssl_cli.core.errors import ConfigError, DataError
from medssl_cli.core.protocols import IGNORE_LABEL
from medssl_cli.core.run import hide_home
from medssl_cli.core.wording import counted
from medssl_cli.data.images import read_volume, volume_stem
from medssl_cli.data.npy import is_npy, open_npy, read_npy_picture

log = logging.getLogger(__name__)

BACKGROUND = "background"
IGNORE = "ignore"
"""Name of pixels that count nowhere, as nnU-Net spells it."""
ILLEGAL = 254
"""Stands in ``LabelSpec.lut`` for values that no class has."""
MAX_CLASSES = 64
"""A label map with more structures than these is an image."""

_WHOLE_TOLERANCE = 1e-4  # a mask of 0 and 255 with a slope of 1/255 reads as 1.0000001
_SHOWN = 8


@dataclass(frozen=True)
class LabelSpec:
    """The classes of a data set and the values by which its files name them.

    Args:
        classes: Names by class index; the first is ``background``.
        values: Value in the files -> class index.
        ignore_values: Values of pixels that count nowhere.
    """

    classes: tuple[str, ...]
    values: dict[int, int]
    ignore_values: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        known = (*self.values, *self.ignore_values)
        if len(self.classes) < 2 or self.classes[0] != BACKGROUND or len(set(self.classes)) < len(self.classes):
            raise ValueError(f"background and different structures are needed, got {self.classes}")
        if len(self.classes) >= ILLEGAL or not all(0 <= value <= 255 for value in known):
            raise ValueError(f"values lie between 0 and 255, got {sorted(known)}")
        if set(self.values.values()) != set(range(len(self.classes))) or len(set(known)) < len(known):
            raise ValueError(f"each class has a value and no value two meanings, got {self.values}")

    @property
    def outputs(self) -> int:
        """Logits of a network: 1 for one structure (sigmoid), else one for each class (softmax)."""
        return 1 if len(self.classes) == 2 else len(self.classes)

    def lut(self) -> np.ndarray:
        """(256,) uint8: value in a file -> class index, ``IGNORE_LABEL`` or ``ILLEGAL``."""
        table = np.full(256, ILLEGAL, np.uint8)
        for value, index in self.values.items():
            table[value] = index
        table[list(self.ignore_values)] = IGNORE_LABEL
        return table

    def classes_of(self, array: np.ndarray, where: str = "") -> np.ndarray:
        """Class index of every pixel, uint8 with ``IGNORE_LABEL`` for values to be ignored; any shape.

        Raises:
            DataError: Values that no class has (``label_values``), with their number and the first place.
        """
        label_map = self.lut()[whole_values(array, where)]
        if (label_map == ILLEGAL).any():
            unknown = np.unique(np.asarray(array)[label_map == ILLEGAL])
            raise self.unknown_values(unknown.tolist(), _place(label_map == ILLEGAL), where)
        return label_map

    def unknown_values(self, values: Sequence[float], place: str, where: str) -> DataError:
        """The error of values that no class has."""
        shown = ", ".join(f"{value:g}" for value in values[:_SHOWN])
        return DataError(
            f"A label map holds {'a value' if len(values) == 1 else 'values'} of no class.",
            where=f"{where}{': ' if where else ''}{shown} in {place}; known are {self.describe()}",
            fix="correct the file, or name what its values mean, e.g. --classes lesion=1+2,ignore=255",
            code="label_values",
        )

    def describe(self) -> str:
        """``0 background, 1 lesion, 255 ignored``."""
        known = [f"{value} {self.classes[index]}" for value, index in sorted(self.values.items())]
        return ", ".join([*known, *(f"{value} ignored" for value in self.ignore_values)])


def whole_values(array: np.ndarray, where: str = "") -> np.ndarray:
    """The same values as uint8.

    Raises:
        DataError: Fractional, negative or above 255 (``label_values``), with their number and the first place.
    """
    array = np.asarray(array)
    if array.dtype in (np.uint8, np.bool_):
        return array.astype(np.uint8, copy=False)
    rounded = np.rint(array) if array.dtype.kind == "f" else array
    wrong = (rounded < 0) | (rounded > 255)
    if array.dtype.kind == "f":
        with np.errstate(invalid="ignore"):
            wrong |= ~(np.abs(array - rounded) <= _WHOLE_TOLERANCE)  # so that NaN is wrong, too
    if wrong.any():
        value = np.asarray(array)[wrong].flat[0]
        raise DataError(
            "A label map holds other values than whole numbers from 0 to 255.",
            where=f"{where}{': ' if where else ''}{value:g} in {_place(wrong)}",
            fix="a probability map needs a threshold; labels beyond 255 need other numbers",
            code="label_values",
        )
    return rounded.astype(np.uint8)


def _place(wrong: np.ndarray) -> str:
    """``3 pixels, the first at (x, y)``."""
    first = tuple(int(n) for n in np.argwhere(wrong)[0][::-1])
    return f"{counted(int(wrong.sum()), 'voxel' if wrong.ndim > 2 else 'pixel')}, the first at {first}"


# --- classes by name -------------------------------------------------------------------------------------------------


def spec_of_names(labels: Mapping[str, Any]) -> LabelSpec:
    """Classes of the ``labels`` of a dataset.json: ``{"background": 0, "PZ": 1}`` of nnU-Net 2, or ``{"1": "PZ"}``.

    Structures get their class index in the order of their values; ``ignore`` names pixels that count nowhere.

    Raises:
        DataError: Regions (lists of values), values that are no whole numbers from 0 to 255, one value or name twice.
    """
    pairs = _pairs(labels)
    ignored = tuple(value for name, value in pairs if name.lower() == IGNORE)
    structures = sorted((value, name) for name, value in pairs if value != 0 and name.lower() != IGNORE)
    names = [name for _, name in structures]
    values = [value for _, value in pairs]
    twice = sorted({str(n) for n in (*names, *values) if (*names, *values).count(n) > 1})
    if twice or not structures or 0 in ignored or BACKGROUND in names:
        detail = f"twice: {', '.join(twice)}" if twice else f"{dict(labels)}"[:200]
        raise _labels_fault(detail, "name 0 background, and each structure once with a value of its own")
    if len(structures) > MAX_CLASSES:
        raise _labels_fault(f"{len(structures)} structures, {MAX_CLASSES} are the most", "join structures")
    return LabelSpec((BACKGROUND, *names), {0: 0, **{v: i for i, (v, _) in enumerate(structures, 1)}}, ignored)


def _pairs(labels: Mapping[str, Any]) -> list[tuple[str, int]]:
    """(name, value) of each entry, whichever of the two is the key."""
    pairs = []
    for key, entry in labels.items():
        if isinstance(entry, (list, tuple)):
            fix = "train on single structures: give each voxel one value, e.g. {'edema': 1, 'core': 2}"
            raise _labels_fault(f"{key!r} is a region of the values {entry}: regions overlap", fix)
        name, value = (str(entry), key) if isinstance(entry, str) and not entry.isdecimal() else (str(key), entry)
        try:
            number = int(value)
        except (TypeError, ValueError, OverflowError):
            number = -1
        if not 0 <= number <= 255 or isinstance(value, bool) or number != float(value) or not name.strip():
            raise _labels_fault(f"{key!r}: {entry!r}", "values are whole numbers from 0 to 255")
        pairs.append((name.strip(), number))
    return pairs


def _labels_fault(detail: str, fix: str) -> DataError:
    return DataError("The classes of the data set cannot be read.", where=f"labels: {detail}", fix=fix, code="labels")


def spec_of_values(
    found: Iterable[int],
    names: Sequence[str] = (),
    *,
    label: str = "",
    max_classes: int = MAX_CLASSES,
    where: str = "",
) -> LabelSpec:
    """Classes of label maps that hold the values ``found``; 0 is background, whether found or not.

    Args:
        found: Values in all label maps together.
        names: Of the structures with the values 1, 2, …, or with their values as in ``lesion=2+3``; either way
            ``ignore=255`` tells what counts nowhere. None calls them ``class_<value>``; a single structure is
            ``label``, or ``class_1``, whatever its value.
        label: Stem of the files, after which a single structure is called.
        max_classes: More structures are no label map.
        where: For messages.

    Raises:
        ConfigError: Names that cannot be read.
        DataError: No structure, too many, or a value beyond the names. Masks of 0 and 255 fit one name.
    """
    values = sorted({int(value) for value in found} - {0})
    single = names or ((label,) if label else ("class_1",))
    if any("=" in name for name in names):
        spec = _spec_of_entries(_numbered(names))
    elif values == [255] and len(names) < 2:
        log.info("label maps hold 0 and 255: 255 is %s", single[0])
        spec = _named(single, {255: 1})
    elif names:
        spec = _named(names, {index: index for index in range(1, len(names) + 1)})
    elif len(values) == 1:
        spec = _named(single, {values[0]: 1})
    else:
        if not 0 < len(values) <= max_classes:
            raise _no_classes(values, max_classes, where)
        return LabelSpec(
            (BACKGROUND, *(f"class_{value}" for value in values)), {0: 0, **{v: i for i, v in enumerate(values, 1)}}
        )
    unknown = [value for value in values if value not in spec.values and value not in spec.ignore_values]
    if unknown:
        raise spec.unknown_values(unknown, "some pixels", where)
    return spec


def _named(names: Sequence[str], values: Mapping[int, int], ignored: tuple[int, ...] = ()) -> LabelSpec:
    clean = [name.strip() for name in names]
    if not all(clean) or len(set(clean)) < len(clean) or {BACKGROUND, IGNORE} & set(clean) or len(clean) > MAX_CLASSES:
        raise _classes_fault(", ".join(names), f"different names of at most {MAX_CLASSES} structures, not background")
    return LabelSpec((BACKGROUND, *clean), {0: 0, **values}, ignored)


def _numbered(entries: Sequence[str]) -> list[str]:
    """``gland``, ``lesion``, ``ignore=255`` with the values 1 and 2 where ``ignore`` alone has its own."""
    if any("=" in entry and entry.partition("=")[0].strip() != IGNORE for entry in entries):
        return list(entries)
    bare = [entry for entry in entries if "=" not in entry]
    return [*(f"{name}={value}" for value, name in enumerate(bare, 1)), *(e for e in entries if "=" in e)]


def _spec_of_entries(entries: Sequence[str]) -> LabelSpec:
    """``lesion=2+3``, ``ignore=255``: every entry with its values."""
    structures: list[str] = []
    values, ignored = {0: 0}, []
    for entry in entries:
        name, _, text = (part.strip() for part in entry.partition("="))
        numbers = [part.strip() for part in text.split("+")]
        if not all(n.isdecimal() and len(n) < 4 and 0 < int(n) <= 255 for n in numbers):
            raise _classes_fault(entry, "values are whole numbers from 1 to 255, joined by +")
        if name == IGNORE:
            ignored += [int(n) for n in numbers]
            continue
        structures.append(name)
        for n in numbers:
            if int(n) in values:
                raise _classes_fault(entry, f"the value {n} has two names")
            values[int(n)] = len(structures)
    if set(ignored) & set(values) or len(set(ignored)) < len(ignored) or not structures:
        raise _classes_fault(", ".join(entries), "each value has one name, and one structure at least is needed")
    return _named(structures, values, tuple(ignored))


def _classes_fault(text: str, detail: str) -> ConfigError:
    return ConfigError(
        "The classes cannot be read.",
        where=f"--classes {text}: {detail}",
        fix="e.g. --classes gland,lesion,ignore=255 for the values 1 and 2, or --classes lesion=2+3,ignore=255",
        code="classes",
    )


def _no_classes(values: Sequence[int], most: int, where: str) -> DataError:
    if not values:
        what, fix = "The label maps are all empty.", "check --label; without a structure there is nothing to learn"
        return DataError(what, where=where, fix=fix, code="label_empty")
    return DataError(
        "The label maps hold too many values.",
        where=f"{where}{': ' if where else ''}{len(values)} structures, {most} are the most",
        fix="an image was taken for a label map, or a mask was saved as JPEG; name the label map with --label",
        code="label_values",
    )


# --- files -----------------------------------------------------------------------------------------------------------


def label_4d(path: Path) -> DataError:
    """The error of a label map with four axes."""
    fix = "give one 3-D file in which each voxel has the value of its structure"
    return DataError("The label map is 4-D.", where=str(path), fix=fix, code="volume_4d")


def read_label_picture(path: Path) -> np.ndarray:
    """(H, W) uint8 values of a label picture, as stored: palette indices stay, 1-bit becomes 0 and 1.

    PNG, TIFF, BMP, GIF, JPEG, ``.npy`` (H, W) and NIfTI of one slice are read. Three equal channels are one.

    Raises:
        DataError: Missing, damaged, coloured, of several pages, or values that are no labels.
    """
    if volume_stem(path) is not None:
        planes = read_volume(path).array
        if planes.ndim != 3 or planes.shape[0] != 1:
            raise _picture_fault(path, "The label map of a picture has one slice.", f"shape {planes.shape}")
        array = planes[0]
    elif is_npy(path):
        is_mask = open_npy(path).dtype.kind == "b"  # which pictures keep as 0 and 255
        array = _one_channel(path, read_npy_picture(path) // (255 if is_mask else 1))
    else:
        array = _read_pixels(path)
    return whole_values(array, str(path))


def _read_pixels(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as image:
            pages = getattr(image, "n_frames", 1)
            image.load()
            array = np.asarray(image.convert("RGB") if image.mode in ("CMYK", "YCbCr", "LAB", "HSV") else image)
            if image.mode in ("LA", "La", "RGBA", "RGBX", "PA"):
                array = array[..., : 1 if image.mode in ("LA", "La", "PA") else 3]
    except FileNotFoundError as error:
        raise _picture_fault(path, "The label map is missing.", "", "file_missing") from error
    except Exception as error:  # Pillow raises many kinds for a damaged file
        raise _picture_fault(path, "The label map cannot be read.", str(error), "image_unreadable") from error
    if pages > 1:
        raise _picture_fault(path, "The label map holds several pages.", f"{pages} pages", "image_pages")
    return array if array.ndim == 2 else _one_channel(path, array.transpose(2, 0, 1))


def _one_channel(path: Path, array_CHW: np.ndarray) -> np.ndarray:
    if (array_CHW != array_CHW[:1]).any():
        raise _picture_fault(path, "The label map is coloured.", "its channels differ", "label_colour")
    return array_CHW[0]


def picture_size(path: Path) -> tuple[int, int] | None:
    """(height, width) as the header of a picture says; None where only reading all of it tells, or nothing does."""
    if volume_stem(path) is not None or is_npy(path):
        return None
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except Exception:  # Pillow raises many kinds; whoever reads the pixels says what is wrong
        return None


def size_difference(path: Path, picture: tuple[int, ...], labels: tuple[int, ...]) -> DataError:
    """The error of a label map that is larger or smaller than its picture; sizes are (height, width)."""
    shown = " and ".join(f"{width} x {height}" for height, width in (picture, labels))
    return DataError(
        "Picture and label map differ in size.",
        where=f"{hide_home(str(path))}: {shown} pixels",
        fix="export both from one image at one size",
        code="label_size",
    )


def _picture_fault(path: Path, what: str, detail: str, code: str = "label_picture") -> DataError:
    detail = " ".join(detail.split())[:200]
    fix = "save it as PNG of one channel, or with a palette, in which each value is a class"
    return DataError(what, where=f"{path}{': ' if detail else ''}{detail}", fix=fix, code=code)
