"""What one case leaves behind: arrays, a heat map on the input's grid, pictures, a report; complete or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medssl_cli.core.case import Case
from medssl_cli.core.run import RESEARCH_NOTE, atomic_path, hide_home, say_disk_errors
from medssl_cli.data.images import read_image, write_image, write_volume
from medssl_cli.engine.telemetry import peak_memory_gib
from medssl_cli.report.case_page import CasePictures, Heat, case_page, heat_picture, similarity_picture
from medssl_cli.services.backbone import Backbone, Planes
from medssl_cli.services.devices import describe_device
from medssl_cli.services.heatmaps import (
    DEFINITIONS,
    SCORE_QUANTILE,
    UNITS,
    InferConfig,
    Seen,
    heat_of_all,
    on_pixels,
    top_slices,
)

RESULT_FILES = (
    "slice_embeddings.npy", "slice_indices.npy", "embedding_mean.npy", "similarity_map.npy", "similarity_map.png",
    "heatmap.nii.gz", "heatmap.npy", "heatmap.png", "report.html", "summary.json",
)  # fmt: skip
"""Everything that a case may leave behind."""


class CaseResults:
    """Results of one case in the making, in a folder that nobody else sees yet.

    Args:
        source: What the user named.
        case: Its files.
        planes: Its slices.
        seen: What the network made of them.
        backbone: The network.
        config: How it was looked at.
        folder: Where to write.
    """

    def __init__(
        self,
        source: Path,
        case: Case,
        planes: Planes,
        seen: Seen,
        backbone: Backbone,
        config: InferConfig,
        folder: Path,
    ) -> None:
        self.source, self.case, self.planes, self.seen = source, case, planes, seen
        self.backbone, self.config, self.folder = backbone, config, folder
        self.heat: Heat | None = None
        self.heat_file: str | None = None
        folder.mkdir(parents=True)

    # --- files -------------------------------------------------------------------------------------------------------

    def write_arrays(self) -> None:
        """Embeddings and the similarity map, as numbers and as a picture."""
        seen = self.seen
        _save_array(self.folder / "slice_embeddings.npy", seen.cls_ND)
        _save_array(self.folder / "slice_indices.npy", seen.indices_N)
        _save_array(self.folder / "embedding_mean.npy", seen.cls_ND.mean(0))
        _save_array(self.folder / "similarity_map.npy", seen.similarity_hw)
        write_image(self.folder / "similarity_map.png", similarity_picture(seen.similarity_hw, self.pictures()))

    def write_heat(self, top_k: int) -> None:
        """The heat map on the grid of the input file, and a picture of the slices where it is hottest."""
        heat_Zhw = heat_of_all(self.seen, len(self.planes))
        heat_ZHW = on_pixels(heat_Zhw, self.planes.size)
        prepared = self.planes.prepared
        if prepared is not None:
            self.heat_file = "heatmap.nii.gz"
            write_volume(self.folder / self.heat_file, prepared.restore.restore(heat_ZHW, nearest=False))
        else:
            self.heat_file = "heatmap.npy"
            height, width = self._picture_size()
            _save_array(self.folder / self.heat_file, on_pixels(heat_Zhw, (height, width))[0])
        method = self.config.heatmap_method
        top = top_slices(self.seen, heat_ZHW, self.planes, top_k, places=self._place)
        self.heat = Heat(heat_Zhw, UNITS[method], DEFINITIONS[method], tuple(top))
        write_image(self.folder / "heatmap.png", heat_picture(self.pictures()))

    def write_report(self, summary: dict[str, Any]) -> None:
        """The page; ``summary`` is what it tells of the case."""
        missing = tuple(summary["missing_sequences"])
        page = case_page(
            summary["case_id"],
            self.pictures(),
            similarity_hw=self.seen.similarity_hw,
            similarity_slice=self.seen.similarity_index,
            reference_patch=self.seen.reference_patch,
            missing=missing,
            facts=_provenance(summary),
        )
        page.write(self.folder / "report.html")

    def pictures(self) -> CasePictures:
        """The slices as they are looked at, of the sequences that exist, or of the windows of the only one."""
        planes = self.planes
        is_volume = planes.prepared is not None
        windows = tuple(name for name, _, _ in self.backbone.windows_hu) if is_volume else ()
        names = windows or tuple(name for name in self.backbone.sequences if name in self.case.sequences)
        keep = np.flatnonzero(planes.available_S) if len(planes.available_S) > 1 else slice(None)
        return CasePictures(
            names=names,
            plane=lambda z: planes.scaled(z)[keep],
            count=len(planes),
            spacing=planes.spacing,
            orientation=self.backbone.preprocess.orientation if is_volume else None,
            colour=self.backbone.model.sequences is None and not windows,
            heat=self.heat,
        )

    # --- facts -------------------------------------------------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        """``summary.json`` without its header."""
        seen, backbone = self.seen, self.backbone
        facts = {
            "case_id": self.case.case_id,
            "inputs": {name: self._input(entry.path) for name, entry in self.case.sequences.items()},
            "missing_sequences": list(self.case.missing(backbone.sequences)),
            "model": shown(backbone.found.run or backbone.found.weights),
            "model_found": backbone.found.why,
            "model_sha256": backbone.card["sha256"],
            "device": describe_device(backbone.device),
            "orientation": backbone.preprocess.orientation if self.planes.prepared is not None else "as stored",
            "num_slices": len(seen.indices_N),
            "stride": self.config.stride,
            "slice_size": list(self.planes.size),
            "slice_spacing_mm": None if self.planes.prepared is None else list(self.planes.spacing),
            "resize": list(seen.network_size),
            "embedding_dim": int(seen.cls_ND.shape[1]),
        }
        return {**facts, **self._map_facts(), **self._resource_facts(), "note": RESEARCH_NOTE}

    def _map_facts(self) -> dict[str, Any]:
        seen, heat = self.seen, self.heat
        facts: dict[str, Any] = {
            "similarity_map": "similarity_map.npy",
            "similarity_map_png": "similarity_map.png",
            "similarity_definition": DEFINITIONS["similarity"],
            "similarity_slice_index": seen.similarity_index,
            "similarity_reference_patch": list(seen.reference_patch),
            "heatmap": self.heat_file,
            "heatmap_png": None if heat is None else "heatmap.png",
            "heatmap_method": None if heat is None else self.config.heatmap_method,
            "heatmap_definition": None if heat is None else heat.definition,
            "top_slices": None if heat is None else list(heat.top),
            "top_slices_definition": None
            if heat is None
            else f"slices by the {SCORE_QUANTILE:.0%} quantile of their heat; slice_index counts from 0 along the "
            "slice axis of `orientation`, peak_voxel (i, j, k) in the input file",
        }
        return facts

    def _resource_facts(self) -> dict[str, Any]:
        device = self.backbone.device
        is_cuda = device.type == "cuda"
        reasons = {} if is_cuda else {"gpu_mem_mb": "computed on the CPU"}
        if self.heat is None:
            reasons |= dict.fromkeys(("heatmap", "top_slices"), "--heatmap was not given")
        return {
            "gpu_mem_mb": round(1024 * peak_memory_gib(device), 1) if is_cuda else None,
            "cpu_rss_mb": round(1024 * peak_memory_gib(torch.device("cpu")), 1),
            "null_reasons": reasons,
        }

    def _input(self, path: Path) -> str:
        """A file as the user knows it; one that was converted from DICOM is gone afterwards."""
        converted = path.is_relative_to(self.folder.parent)
        return f"{shown(self.source)} (DICOM)" if converted else shown(path)

    def _place(self, z: int, row: int, column: int) -> dict[str, Any]:
        """Where a pixel of a slice lies in the input file."""
        prepared = self.planes.prepared
        if prepared is None:
            scale = np.array(self._picture_size()) / self.planes.size
            pixel = ((np.array([row, column]) + 0.5) * scale).astype(int)
            return {"peak_pixel": [int(n) for n in pixel]}
        world = prepared.affine @ [column, row, z, 1]
        voxel = np.rint(np.linalg.solve(prepared.restore.source.affine, world))[:3].astype(int)
        last = np.array(prepared.restore.source.shape[::-1]) - 1
        return {
            "peak_voxel": [int(n) for n in np.clip(voxel, 0, last)],
            "peak_mm": [round(float(mm), 2) for mm in world[:3]],
        }

    def _picture_size(self) -> tuple[int, int]:
        height, width = read_image(next(iter(self.case.sequences.values())).path).shape[-2:]
        return height, width


def shown(path: Path) -> str:
    """A path for results: the home folder as ``~``, bytes that are no UTF-8 as question marks."""
    return hide_home(str(path)).encode("utf-8", "replace").decode("utf-8")


def publish(folder: Path, out: Path) -> None:
    """Move finished results to where they belong; ``summary.json`` goes first and comes last: it marks a whole set."""
    with say_disk_errors(out):
        remove_results(out)
        out.mkdir(parents=True, exist_ok=True)
        for path in sorted(folder.iterdir(), key=lambda path: path.name == "summary.json"):
            os.replace(path, out / path.name)


def remove_results(out: Path) -> None:
    """Take away what an earlier case left in this folder, and nothing else."""
    for name in reversed(RESULT_FILES):
        (out / name).unlink(missing_ok=True)


def _save_array(path: Path, array: np.ndarray) -> None:
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.save(file, array, allow_pickle=False)


_SHOWN_FACTS = {
    "inputs": "input",
    "model": "model",
    "model_sha256": "weights SHA-256",
    "device": "device",
    "num_slices": "slices looked at",
    "slice_size": "slice, pixels",
    "slice_spacing_mm": "pixel, mm",
    "resize": "as the network saw it, pixels",
    "embedding_dim": "numbers in an embedding",
    "elapsed_s": "seconds",
    "started_at": "started",
    "medssl_version": "medssl",
}


def _provenance(summary: dict[str, Any]) -> dict[str, str]:
    return {
        label: _fact(summary[key][:16] if key == "model_sha256" else summary[key])
        for key, label in _SHOWN_FACTS.items()
        if summary[key] is not None
    }


def _fact(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}: {Path(path).name}" for name, path in value.items())
    if isinstance(value, list):
        return " × ".join(f"{entry:.4g}" for entry in value)
    return f"{value:.1f}" if isinstance(value, float) else str(value)
