"""A label map as DICOM: a segmentation with a segment a structure, and a structure set of its contours.

What a structure is, in codes that every reader knows, is told from its name where a word of it is among those below;
any other is tissue of no further kind.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from medssl_cli.core.errors import ConfigError
from medssl_cli.core.volume import Volume
from medssl_cli.report.labels import label_colour
from medssl_cli.services.dicom_export import Code, Property, SourceSeries, highdicom_is_there, write_segmentation
from medssl_cli.services.rtstruct import write_rtstruct

_SCT = "SCT"
_ALTERED: Code = ("49755003", _SCT, "Morphologically Abnormal Structure")
_ANATOMY: Code = ("91723000", _SCT, "Anatomical Structure")
_TISSUE: Code = ("85756007", _SCT, "Tissue")
_FINDINGS: dict[str, Code] = {
    "lesion": ("52988006", _SCT, "Lesion"),
    "tumor": ("108369006", _SCT, "Neoplasm"),
    "tumour": ("108369006", _SCT, "Neoplasm"),
    "neoplasm": ("108369006", _SCT, "Neoplasm"),
    "hemorrhage": ("50960005", _SCT, "Hemorrhage"),
    "haemorrhage": ("50960005", _SCT, "Hemorrhage"),
    "bleed": ("50960005", _SCT, "Hemorrhage"),
    "edema": ("79654002", _SCT, "Edema"),
    "oedema": ("79654002", _SCT, "Edema"),
    "necrosis": ("6574001", _SCT, "Necrosis"),
    "nodule": ("27925004", _SCT, "Nodule"),
    "cyst": ("367643001", _SCT, "Cyst"),
}
_ORGANS: dict[str, Code] = {
    "prostate": ("41216001", _SCT, "Prostate"),
    "liver": ("10200004", _SCT, "Liver"),
    "kidney": ("64033007", _SCT, "Kidney"),
    "spleen": ("78961009", _SCT, "Spleen"),
    "pancreas": ("15776009", _SCT, "Pancreas"),
    "heart": ("80891009", _SCT, "Heart"),
    "lung": ("39607008", _SCT, "Lung"),
    "brain": ("12738006", _SCT, "Brain"),
    "stomach": ("69695003", _SCT, "Stomach"),
    "colon": ("71854001", _SCT, "Colon"),
    "aorta": ("15825003", _SCT, "Aorta"),
    "vertebra": ("51282000", _SCT, "Vertebra"),
    "uterus": ("35039007", _SCT, "Uterus"),
    "breast": ("76752008", _SCT, "Breast"),
}
_DESCRIPTION = "Segmentation"


@dataclass(frozen=True)
class DicomCase:
    """What a writer of DICOM needs of a segmented case.

    Args:
        label_map: Class indices on the exact grid of the converted file.
        names: Structures by label.
        series: Instances of the source that stand for its planes.
        source: The DICOM folder that the user named.
        algorithm: Name of what made it.
    """

    label_map: Volume
    names: Mapping[int, str]
    series: SourceSeries
    source: Path
    algorithm: str


def segment_formats(text: str | None) -> tuple[str, ...]:
    """``--dicom`` of a segmentation as names.

    Raises:
        ConfigError: A format that a segmentation is not written as.
        ResourceError: highdicom is not installed.
    """
    if text is None:
        return ()
    names = tuple(dict.fromkeys(part.strip().lower() for part in text.split(",")))
    unknown = [name for name in names if name not in DICOM_WRITERS]
    if unknown:
        reason = _OF_HEAT_MAPS.get(unknown[0], "it is no format that is known here")
        raise ConfigError(
            f"A segmentation is not written as DICOM {unknown[0]!r}: {reason}.",
            where=f"--dicom {text}",
            fix="name seg (segmentation), rtstruct (contours) or both, separated by commas",
            code="dicom_format_unknown",
        )
    if "seg" in names:
        highdicom_is_there()
    return names


def property_of(name: str) -> Property:
    """(category, type) of a structure in public codes, by the words of its name; a finding comes before an organ."""
    words = [word.removesuffix("s") for word in re.split(r"[^a-z]+", name.lower())]
    words += [f"{word}s" for word in words]  # the plural of one, the singular of the other: pancreas, uterus
    for category, codes in ((_ALTERED, _FINDINGS), (_ANATOMY, _ORGANS)):
        found = next((codes[word] for word in words if word in codes), None)
        if found is not None:
            return category, found
    return _TISSUE, _TISSUE


# --- writers ---------------------------------------------------------------------------------------------------------


def _write_seg(path: Path, case: DicomCase) -> None:
    write_segmentation(
        path,
        case.label_map,
        case.series,
        case.names,
        algorithm=case.algorithm,
        description=_DESCRIPTION,
        content_label="SEGMENTATION",
        properties={label: property_of(name) for label, name in case.names.items()},
    )


def _write_rtstruct(path: Path, case: DicomCase) -> None:
    write_rtstruct(
        path,
        case.label_map,
        case.series,
        case.names,
        colours={label: label_colour(label - 1) for label in case.names},
        algorithm=case.algorithm,
        description=_DESCRIPTION,
    )


DICOM_WRITERS: dict[str, tuple[str, Callable[[Path, DicomCase], None]]] = {
    "seg": ("seg.dcm", _write_seg),
    "rtstruct": ("rtstruct.dcm", _write_rtstruct),
}
"""Format -> (end of the file name, writer)."""
_OF_HEAT_MAPS = {
    "pm": "a parametric map holds the numbers of a heat map, and a segmentation has classes; its probabilities are "
    "kept by --save-probabilities",
    "sc": "the picture is that of a heat map; overlay.png shows the structures",
}
