"""Who a file belongs to: a case with its sequences, as paths and facts. Nothing here touches the disk."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Sequence:
    """One acquisition of a case: T2w, ADC, CT venous, PET; or the one photograph of an image case.

    Args:
        name: The name asked for, e.g. ``ax_dwi``.
        path: The file chosen for it.
        volume_index: Which volume of a 4-D file; None for a 3-D file.
        note: Why this file was chosen, when there was a choice (``b1400 of b50, b400, b1400``).
    """

    name: str
    path: Path
    volume_index: int | None = None
    note: str = ""


@dataclass(frozen=True)
class Case:
    """The unit of decision: one patient at one time point.

    Args:
        case_id: Name of the folder, or relative path of the image.
        patient_id: Person; equal to ``case_id`` when nothing tells otherwise.
        study_uid: Visit, when known.
        sequences: Existing sequences by the name asked for; a missing one has no entry.
        roi: Mask of the region of interest, e.g. ``roi_Prostate``.
        label: Class or value as text, when a table gives one.
        split: ``train``, ``val``, ``test`` or empty.
    """

    case_id: str
    patient_id: str
    sequences: dict[str, Sequence] = field(default_factory=dict)
    study_uid: str = ""
    roi: Path | None = None
    label: str = ""
    split: str = ""

    def missing(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """The names among ``names`` for which this case has no file."""
        return tuple(name for name in names if name not in self.sequences)
