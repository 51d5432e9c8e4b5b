"""A CT volume with its PET before a network that learned from pairs of pictures: grid, orientation and windows.

The pictures of CoCoSeg's data are axial slices as scanners show them, the patient's right on the left and anterior up,
whose grey values are a window of HU and a range of uptake. A volume is brought to just that: PET onto the grid of the
CT in world coordinates, both turned to LPS, each scaled by its own window.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from pydantic import field_validator

from medssl_cli.core.case import Case
from medssl_cli.core.errors import ConfigError, DataError
from medssl_cli.core.run import hide_home
from medssl_cli.data.preprocess import PreprocessConfig
from medssl_cli.services.segmenter import Segmenter
from medssl_cli.services.slice_pipeline import InferSegmentConfig

CT, PET = "CT", "PET"
ORIENTATION: Final = "LPS"
WINDOW_KEYS = {CT: "ct_window", PET: "pet_range"}

Ends = tuple[float, float]


class CtPetInferConfig(InferSegmentConfig):
    """How a network of CT-PET pairs looks at its case."""

    ct_window: Ends | None = None
    """Volumes: the values of the CT in HU that became black and white in the pictures of training, e.g. -160,240."""
    pet_range: Ends | None = None
    """Volumes: the values of the PET that became black and white in the pictures of training, e.g. 0,20 in SUV; in the
    unit of the PET file."""

    @field_validator("ct_window", "pet_range", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return [float(part) for part in value.split(",")] if isinstance(value, str) else value

    @field_validator("ct_window", "pet_range")
    @classmethod
    def _rises(cls, value: Ends | None) -> Ends | None:
        if value is not None and not value[0] < value[1]:
            raise ValueError("the lower end must be below the upper end")
        return value


def as_volumes(segmenter: Segmenter) -> Segmenter:
    """The network with the preparation that brings volumes to what its pictures were."""
    preprocess = PreprocessConfig(orientation=ORIENTATION, reference=CT)
    return replace(segmenter, preprocess=preprocess, tile=0)


def windows_of(segmenter: Segmenter, config: InferSegmentConfig) -> Mapping[str, Ends]:
    """Values that become 0 and 1 in CT and PET: as asked, else as the card of the training tells.

    Raises:
        ConfigError: Neither tells them.
    """
    windows = {name: getattr(config, key, None) or _ends(segmenter.card.get(key)) for name, key in WINDOW_KEYS.items()}
    unknown = [WINDOW_KEYS[name] for name, ends in windows.items() if ends is None]
    if unknown:
        raise ConfigError(
            "The network learned from pictures, and nothing tells which values of a volume their grey values were.",
            where=f"{hide_home(str(segmenter.run))}/model.json has no {' and no '.join(unknown)}",
            fix="add what the pictures of training were made with, e.g. ct_window=-160,240 pet_range=0,20",
            code="windows_unknown",
        )
    return {name: ends for name, ends in windows.items() if ends is not None}


def _ends(value: Any) -> Ends | None:
    return None if value is None else (float(value[0]), float(value[1]))


def refuse_incomplete(case: Case) -> None:
    """Refuse a case without CT or PET: the network has never seen one alone.

    Raises:
        DataError: Which is missing.
    """
    missing = case.missing((CT, PET))
    if missing:
        there = ", ".join(hide_home(str(entry.path)) for entry in case.sequences.values())
        raise DataError(
            f"The {missing[0]} of the case is missing.",
            where=f"case {case.case_id}: {there}",
            fix="put CT.nii.gz and PET.nii.gz into the folder of the case, or name folders of CT and PET pictures",
            code="pair_incomplete",
        )
