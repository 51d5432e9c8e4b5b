"""What one segmented case leaves behind: label map, probabilities, overlay, report, DICOM; complete or not at all.

Letters: N slices, S sequences, C outputs, Z Y X voxels, H W pixels.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medssl_cli.core.run import RESEARCH_NOTE, atomic_path
from medssl_cli.core.volume import affine_orientation, affine_spacing
from medssl_cli.core.wording import counted
from medssl_cli.data.images import write_image, write_volume
from medssl_cli.data.volume_stream import write_volumes
from medssl_cli.engine.telemetry import peak_memory_gib
from medssl_cli.report.case_page import CasePictures
from medssl_cli.report.grey_values import CT_WINDOWS, Window
from medssl_cli.report.labels import Labels
from medssl_cli.report.page import Content
from medssl_cli.report.segmentation_page import StructureRow, overlay_picture, segmentation_page
from medssl_cli.report.verdict import Flag
from medssl_cli.services.case_results import shown
from medssl_cli.services.devices import describe_device
from medssl_cli.services.dicom_export import source_series
from medssl_cli.services.lookup import FoundModel
from medssl_cli.services.quality import AXES, SPACING_TOLERANCE, QualityFlag, range_of
from medssl_cli.services.segment_dicom import DICOM_WRITERS, DicomCase
from medssl_cli.services.segmentation_inference import InferSegmentConfig, SegmentedCase, threshold_of
from medssl_cli.services.segmenter import Segmenter

PROBABILITIES_DEFINITION = {
    1: "probability of the one structure, on the grid of the label map",
    2: "probabilities of all classes, the background first, along the fourth axis (x, y, z, class), on the grid of the "
    "label map; where that is not the grid of the network's slices they are interpolated linearly, and the label map "
    "by nearest neighbour",
}
VOLUME_DEFINITION = "voxels of a structure in the label map times the volume of a voxel"


class SegmentResults:
    """Results of one segmented case in the making, in a folder that nobody else sees yet.

    Args:
        name: Of the case, safe in file names.
        source: What the user named.
        seen: What the network made of it.
        segmenter: The network.
        found: How it was found.
        config: How the slices were looked at.
        asked: ``--threshold``.
        folder: Where to write.
        guessed: The sequence that a file was taken for without its name saying so.
    """

    def __init__(
        self,
        name: str,
        source: Path,
        seen: SegmentedCase,
        segmenter: Segmenter,
        found: FoundModel,
        config: InferSegmentConfig,
        folder: Path,
        *,
        asked: float | None = None,
        guessed: str | None = None,
    ) -> None:
        self.name, self.source, self.seen, self.segmenter = name, source, seen, segmenter
        self.found, self.config, self.folder, self.asked = found, config, folder, asked
        self.files: dict[str, str] = {}
        self.dicom_files: dict[str, str] = {}
        self.flags = segment_flags(seen, segmenter, guessed=guessed)
        folder.mkdir(parents=True, exist_ok=True)

    # --- files -------------------------------------------------------------------------------------------------------

    def write_maps(self) -> None:
        """The label map, and the probabilities if there are any."""
        seen = self.seen
        suffix = "png" if seen.is_picture else "nii.gz"
        path = self._file("segmentation", f"segmentation.{suffix}")
        if seen.is_picture:
            write_image(path, seen.label_map.array[0])
        else:
            write_volume(path, seen.label_map)
        if seen.probabilities is None:
            return
        if seen.is_picture:
            save_array(self._file("probabilities", "probabilities.npy"), seen.probabilities[:, 0])
        else:
            write_volumes(
                self._file("probabilities", "probabilities.nii.gz"), seen.probabilities, seen.label_map.affine
            )

    def write_overlay(self) -> None:
        """A picture of some slices with the label map laid over."""
        self.files["overlay"] = "overlay.png"
        write_image(self.folder / "overlay.png", overlay_picture(self.pictures, self.areas_N))

    def write_dicom(self, formats: Sequence[str]) -> None:
        """The label map on the source series.

        Raises:
            DataError: No series of the DICOM folder has the grid of the label map.
        """
        if not formats:
            return
        seen, segmenter = self.seen, self.segmenter
        reference = segmenter.preprocess.reference or segmenter.sequences[0]
        case = DicomCase(
            label_map=seen.label_map,
            names=dict(enumerate(seen.classes[1:], start=1)),
            series=source_series(self.source, seen.case, seen.label_map, first=reference),
            source=self.source,
            algorithm=f"medssl {segmenter.run.name}",
        )
        for name in formats:
            ending, write = DICOM_WRITERS[name]
            write(self._file(f"dicom_{name}", ending), case)
            self.dicom_files[name] = self.files.pop(f"dicom_{name}")

    def _file(self, key: str, ending: str) -> Path:
        """The path of a result, ``<case>_<ending>``."""
        self.files[key] = f"{self.name}_{ending}"
        return self.folder / self.files[key]

    def write_report(self, summary: Mapping[str, Any]) -> None:
        """The page; ``summary`` is what it tells of the case."""
        page = segmentation_page(
            summary["case_id"],
            self.pictures,
            self._rows(),
            areas_Z=self.areas_N,
            area_unit=self._area_unit,
            lead=f"Label map of the network {self.segmenter.run.name}: {', '.join(self.seen.classes[1:])}.",
            decided=self._decided(),
            flags=[Flag(flag.kind, flag.title, flag.text) for flag in self.flags],
            facts=provenance_of(summary),
        )
        page.write(self.folder / "report.html")

    # --- pictures ----------------------------------------------------------------------------------------------------

    @functools.cached_property
    def pictures(self) -> CasePictures:
        """The slices as they are looked at, with the label map over them."""
        seen, segmenter = self.seen, self.segmenter
        slices = seen.slices
        windows = tuple(Window(name, (low + high) / 2, high - low) for name, low, high in segmenter.windows_hu)
        own = tuple(name for name in segmenter.sequences if name in seen.case.sequences)
        is_plain = segmenter.plain
        names = tuple(window.name for window in windows) or own
        keep = slice(None) if is_plain else np.flatnonzero(slices.available_S)
        return CasePictures(
            names=names,
            plane=lambda z: slices.scaled(z)[keep],
            count=len(slices),
            spacing=slices.spacing,
            orientation=None if seen.is_picture else segmenter.preprocess.orientation,
            colour=is_plain and not windows,
            stored=None if seen.is_picture else lambda z: slices.stored_SNHW[:, z][slice(None) if is_plain else keep],
            value_unit="HU" if windows or self._is_ct(own) else "",
            window_presets=windows and (*windows, *(preset for preset in CT_WINDOWS if preset not in windows)),
            stored_names=own if windows else (),
            labels=Labels(seen.classes[1:], self._details(), lambda z: seen.labels_NHW[z]),
        )

    def _is_ct(self, names: Sequence[str]) -> bool:
        config = self.segmenter.preprocess
        windowed = names if config.window_sequences is None else config.window_sequences
        return config.window_hu is not None and set(names) <= set(windowed)

    def _details(self) -> tuple[str, ...]:
        volumes = self.seen.volumes_ml
        if volumes is None:
            return tuple(f"{count:,} pixels" for count in self.seen.voxels.values())
        return tuple(f"{volume:.3g} ml" if volume < 1000 else f"{volume:,.0f} ml" for volume in volumes.values())

    @functools.cached_property
    def areas_N(self) -> np.ndarray:
        """Segmented area of every slice, in cm², of a picture in pixels."""
        pixels_N = np.array([np.count_nonzero(labels_HW) for labels_HW in self.seen.labels_NHW], float)
        spacing = self.seen.slices.spacing
        return pixels_N if self.seen.is_picture else pixels_N * spacing[0] * spacing[1] / 100

    @property
    def _area_unit(self) -> str:
        return "pixels" if self.seen.is_picture else "cm²"

    def _rows(self) -> list[StructureRow]:
        volumes = self.seen.volumes_ml or {}
        in_slices = np.zeros(256, np.int64)
        for labels_HW in self.seen.labels_NHW:
            in_slices += np.bincount(labels_HW.ravel(), minlength=256) > 0
        return [
            StructureRow(name, count, volumes.get(name), int(in_slices[label]))
            for label, (name, count) in enumerate(self.seen.voxels.items(), start=1)
        ]

    def _decided(self) -> str:
        return decision_text(self.segmenter, self.asked, "pixel" if self.seen.is_picture else "voxel")

    # --- facts -------------------------------------------------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        """``summary.json`` without its header."""
        seen, segmenter = self.seen, self.segmenter
        threshold, source = threshold_of(segmenter, self.asked)
        spacing = None if seen.is_picture else affine_spacing(seen.label_map.affine)
        volumes = seen.volumes_ml
        reasons = {} if volumes else dict.fromkeys(("volume_ml", "spacing_mm"), "a picture has no size in millimetres")
        if threshold is None:
            reasons |= dict.fromkeys(("threshold", "threshold_source"), "of several classes the most probable one wins")
        return {
            "case_id": seen.case.case_id,
            "inputs": {name: self._input(entry.path) for name, entry in seen.case.sequences.items()},
            "missing_sequences": [] if segmenter.plain else list(seen.case.missing(segmenter.sequences)),
            **model_facts(segmenter, self.found),
            "classes": list(seen.classes),
            "labels": {name: label for label, name in enumerate(seen.classes)},
            "voxels": seen.voxels,
            "volume_ml": volumes,
            "volume_definition": VOLUME_DEFINITION,
            "threshold": threshold,
            "threshold_source": source,
            "decision": self._decided(),
            "shape": list(seen.label_map.shape) if not seen.is_picture else list(seen.label_map.shape[1:]),
            "spacing_mm": None if spacing is None else list(spacing),
            "orientation": None if seen.is_picture else affine_orientation(seen.label_map.affine),
            "num_slices": len(seen.slices),
            "slice_size": list(seen.slices.size),
            **self.files,
            "probabilities_definition": self._probabilities_definition(),
            "dicom": self.dicom_files,
            "files": [*self.files.values(), *self.dicom_files.values(), "report.html"],
            "flags": [asdict(flag) for flag in self.flags],
            **resource_facts(segmenter.device, reasons),
            "note": RESEARCH_NOTE,
        }

    def _probabilities_definition(self) -> str | None:
        if self.seen.probabilities is None:
            return None
        return PROBABILITIES_DEFINITION[min(2, len(self.seen.probabilities))]

    def _input(self, path: Path) -> str:
        """A file as the user knows it; one that was converted from DICOM is gone afterwards."""
        return f"{shown(self.source)} (DICOM)" if path.is_relative_to(self.folder.parent) else shown(path)


def decision_text(segmenter: Segmenter, asked: float | None, unit: str = "voxel") -> str:
    """How probabilities became labels, in a sentence about a voxel or a pixel."""
    threshold, source = threshold_of(segmenter, asked)
    if threshold is None:
        return f"Every {unit} has its most probable class."
    return f"A {unit} belongs to {segmenter.classes[1]} from a probability of {threshold:g} on ({source})."


def model_facts(segmenter: Segmenter, found: FoundModel) -> dict[str, Any]:
    """Which network it was."""
    return {
        "model": shown(segmenter.run),
        "model_found": found.why,
        "model_sha256": segmenter.card.get("sha256"),
        "task": segmenter.task,
        "device": describe_device(segmenter.device),
        "tile": segmenter.tile,
        "pixel_mm": segmenter.pixel_mm,
        "context": segmenter.context,
    }


def resource_facts(device: torch.device, reasons: Mapping[str, str]) -> dict[str, Any]:
    """Memory at its highest, and why numbers are missing."""
    is_cuda = device.type == "cuda"
    absent = {} if is_cuda else {"gpu_mem_mb": "computed on the CPU"}
    return {
        "gpu_mem_mb": round(1024 * peak_memory_gib(device), 1) if is_cuda else None,
        "cpu_rss_mb": round(1024 * peak_memory_gib(torch.device("cpu")), 1),
        "null_reasons": {**reasons, **absent},
    }


def save_array(path: Path, array: np.ndarray) -> None:
    """One ``.npy`` file, whole or not at all."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.save(file, array, allow_pickle=False)


# --- flags -----------------------------------------------------------------------------------------------------------


def segment_flags(seen: SegmentedCase, segmenter: Segmenter, *, guessed: str | None = None) -> list[QualityFlag]:
    """What a reader has to know before trusting the label map, the weightiest first."""
    flags = [*_missing(seen, segmenter), *_taken_as(guessed, segmenter), *_spacing(seen, segmenter), *_empty(seen)]
    flags.sort(key=lambda flag: ("error", "warning", "info", "ok").index(flag.kind))
    return flags


def _missing(seen: SegmentedCase, segmenter: Segmenter) -> list[QualityFlag]:
    if segmenter.plain:
        return []
    known = set(segmenter.card.get("missing_in_training") or ())
    text = {
        True: "The network works without it. Some training cases lacked it too.",
        False: "The network works without it, but every training case had it.",
    }
    return [
        QualityFlag("info" if name in known else "warning", f"{name} is missing", text[name in known], "missing")
        for name in seen.case.missing(segmenter.sequences)
    ]


def _taken_as(guessed: str | None, segmenter: Segmenter) -> list[QualityFlag]:
    if guessed is None:
        return []
    text = f"The name of the file does not say what it is; it was taken as {guessed}. --sequence tells otherwise."
    kind = "warning" if len(segmenter.sequences) > 1 else "info"
    return [QualityFlag("warning" if kind == "warning" else "info", f"Taken as {guessed}", text, "sequence_guessed")]


def _spacing(seen: SegmentedCase, segmenter: Segmenter) -> list[QualityFlag]:
    """Voxels unlike those of the training cases, where the card tells of these."""
    if seen.slices.prepared is None:
        return []
    ranges, odd = segmenter.card.get("ranges") or {}, []
    for axis, value in zip(AXES, affine_spacing(seen.slices.prepared.affine), strict=True):
        known = range_of(ranges, f"spacing_{axis}_mm")
        if known and not known[0] * (1 - SPACING_TOLERANCE) <= value <= known[1] * (1 + SPACING_TOLERANCE):
            low, high = known
            odd.append(f"{axis}: {value:.3g} mm, in training {low:.4g} to {high:.4g} mm")
    return [QualityFlag("warning", "Unusual voxel size", "; ".join(odd) + ".", "spacing_outside")] if odd else []


def _empty(seen: SegmentedCase) -> list[QualityFlag]:
    absent = [name for name, count in seen.voxels.items() if not count]
    if not absent:
        return []
    what = "Nothing was segmented" if len(absent) == len(seen.classes) - 1 else "Structures that were not found"
    text = f"{counted(len(absent), 'structure')} without a voxel: {', '.join(absent)}."
    return [QualityFlag("info", what, text, "empty")]


# --- provenance ------------------------------------------------------------------------------------------------------

_SHOWN_FACTS = {
    "inputs": "input",
    "model": "model",
    "model_sha256": "weights SHA-256",
    "task": "task",
    "device": "device",
    "shape": "voxels of the input, z y x",
    "spacing_mm": "voxel z y x, mm",
    "orientation": "orientation of the input",
    "num_slices": "slices",
    "tile": "tile of the network, pixels",
    "pixel_mm": "pixel of the network, mm",
    "threshold": "threshold",
    "threshold_source": "threshold from",
    "elapsed_s": "seconds",
    "started_at": "started",
    "medssl_version": "medssl",
}


def provenance_of(summary: Mapping[str, Any]) -> dict[str, Content]:
    """What the report says of where everything came from."""
    told = {**summary, "tile": summary.get("tile") or "whole slices", "model_sha256": str(summary["model_sha256"])[:16]}
    return {label: _fact(told[key]) for key, label in _SHOWN_FACTS.items() if told.get(key) is not None}


def _fact(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}: {Path(path).name}" for name, path in value.items())
    if isinstance(value, list):
        return " × ".join(f"{entry:.4g}" for entry in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
