"""What one case leaves behind: arrays, a heat map on the input's grid, pictures, a report; complete or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from medssl_cli.core.case import Case
from medssl_cli.core.run import RESEARCH_NOTE, atomic_path, hide_home, say_disk_errors
from medssl_cli.data.images import read_image, write_image, write_volume
from medssl_cli.engine.telemetry import peak_memory_gib
from medssl_cli.report.case_page import CasePictures, Flag, Heat, case_page, heat_picture, similarity_picture
from medssl_cli.report.grey_values import CT_WINDOWS, Window
from medssl_cli.services.backbone import Backbone, Planes
from medssl_cli.services.devices import describe_device
from medssl_cli.services.dicom_export import (
    region_of,
    source_series,
    write_capture,
    write_parametric_map,
    write_segmentation,
)
from medssl_cli.services.heatmaps import (
    DEFINITIONS,
    HEAD_METHODS,
    SCALE_DEFINITION,
    SCORE_QUANTILE,
    UNITS,
    InferConfig,
    Seen,
    heat_of_all,
    heat_score,
    hottest,
    on_pixels,
    top_slices,
)
from medssl_cli.services.infer_head import facts_of, null_reasons, ranked_slices, verdict_of

if TYPE_CHECKING:
    from medssl_cli.core.volume import Volume
    from medssl_cli.services.embedding import Embedder
    from medssl_cli.services.infer_head import Judgement
    from medssl_cli.services.quality import QualityFlag

DICOM_FILES = {"pm": "heatmap_pm.dcm", "sc": "heatmap_sc.dcm", "seg": "heatmap_seg.dcm"}
RESULT_FILES = (
    "slice_embeddings.npy", "slice_indices.npy", "embedding_mean.npy", "volume_embedding.npy", "slice_probs.npy",
    "slice_values.npy", "slice_attention.npy", "similarity_map.npy", "similarity_map.png", "heatmap.nii.gz",
    "heatmap.npy", "heatmap.png", *DICOM_FILES.values(), "report.html", "summary.json",
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
        judgement: What a head says of it; None for a bare backbone.
        embedder: The head's settings of extraction.
        flags: What its reader has to know.
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
        *,
        judgement: Judgement | None = None,
        embedder: Embedder | None = None,
        flags: Sequence[QualityFlag] = (),
    ) -> None:
        self.source, self.case, self.planes, self.seen = source, case, planes, seen
        self.backbone, self.config, self.folder = backbone, config, folder
        self.judgement, self.embedder, self.flags = judgement, embedder, tuple(flags)
        self.heat: Heat | None = None
        self.heat_file: str | None = None
        self.heat_volume: Volume | None = None
        self.dicom_files: dict[str, str] = {}
        self.ranked: list[dict[str, Any]] | None = None if judgement is None else ranked_slices(judgement)
        folder.mkdir(parents=True)

    # --- files -------------------------------------------------------------------------------------------------------

    def write_arrays(self) -> None:
        """Embeddings and the similarity map, as numbers and as a picture."""
        seen = self.seen
        _save_array(self.folder / "slice_embeddings.npy", seen.cls_ND)
        _save_array(self.folder / "slice_indices.npy", seen.indices_N)
        if self.judgement is None:
            _save_array(self.folder / "embedding_mean.npy", seen.cls_ND.mean(0))
        else:
            _save_array(self.folder / "volume_embedding.npy", self.judgement.pooled_V)
            name = "slice_values.npy" if self.judgement.is_regression else "slice_probs.npy"
            _save_array(self.folder / name, self.judgement.slice_values_NC.astype(np.float32))
            if self.judgement.attention_N is not None:
                _save_array(self.folder / "slice_attention.npy", self.judgement.attention_N.astype(np.float32))
        _save_array(self.folder / "similarity_map.npy", seen.similarity_hw)
        write_image(self.folder / "similarity_map.png", similarity_picture(seen.similarity_hw, self.pictures()))

    def write_heat(self, top_k: int) -> None:
        """The heat map on the grid of the input file, and a picture of the slices where it is hottest."""
        heat_Zhw = heat_of_all(self.seen, len(self.planes))
        heat_ZHW = on_pixels(heat_Zhw, self.planes.size)
        prepared = self.planes.prepared
        if prepared is not None:
            self.heat_file = "heatmap.nii.gz"
            self.heat_volume = prepared.restore.restore(heat_ZHW, nearest=False)
            write_volume(self.folder / self.heat_file, self.heat_volume)
        else:
            self.heat_file = "heatmap.npy"
            height, width = self._picture_size()
            _save_array(self.folder / self.heat_file, on_pixels(heat_Zhw, (height, width))[0])
        method = self.config.heatmap_method
        if self.ranked is None:
            top = top_slices(self.seen, heat_ZHW, self.planes, top_k, places=self._place)
        else:
            top = self._add_heat(self.ranked, heat_ZHW)
        self.heat = Heat(heat_Zhw, UNITS[method], self._heat_definition(), tuple(top))
        write_image(self.folder / "heatmap.png", heat_picture(self.pictures()))

    def _add_heat(self, ranked: list[dict[str, Any]], heat_ZHW: np.ndarray) -> list[dict[str, Any]]:
        """Tell where the slices of the highest scores are hottest; the same slices with their heat, for pictures."""
        top = []
        for entry in ranked:
            z = entry["slice_index"]
            heat = heat_score(heat_ZHW[z])
            if heat_ZHW[z].max() > 0 or self.config.heatmap_method not in HEAD_METHODS:
                entry |= {"heat_score": heat, **self._place(z, *hottest(heat_ZHW[z]))}
            else:
                entry |= {"heat_score": heat, "peak_voxel": None, "peak_mm": None}
            top.append({"rank": entry["rank"], "slice_index": z, "score": heat})
        return top

    def _heat_definition(self) -> str:
        text = DEFINITIONS[self.config.heatmap_method]
        if self.judgement is None:
            return text
        return text.replace("{output}", self._output_name)

    def write_dicom(self, formats: Sequence[str]) -> None:
        """The heat map on the source series: as a map (pm), its picture (sc) and its hottest region (seg).

        Raises:
            DataError: No series of the DICOM folder has the grid of the heat map.
        """
        if not formats or self.heat_volume is None or self.heat is None:
            return
        reference = self.backbone.reference
        series = source_series(self.source, self.case, self.heat_volume, first=reference)
        label, definition = self._heat_label(), self.heat.definition
        if "pm" in formats:
            path = self.folder / DICOM_FILES["pm"]
            write_parametric_map(path, self.heat_volume, series, label=label, definition=definition)
        if "sc" in formats:
            picture_HW3 = heat_picture(self.pictures())
            write_capture(self.folder / DICOM_FILES["sc"], picture_HW3, series, label=label, definition=definition)
        if "seg" in formats:
            share = self.config.mask_threshold
            region = region_of(self.heat_volume, share)
            names = {1: f"heat of at least {share:g} of its maximum"}
            path = self.folder / DICOM_FILES["seg"]
            write_segmentation(path, region, series, names, algorithm=f"medssl {label}", description=label)
        self.dicom_files = {name: DICOM_FILES[name] for name in formats}

    def _heat_label(self) -> str:
        method = {"head": "Gradient x token", "gradcam": "Grad-CAM", "rollout": "Attention rollout"}
        name = method.get(self.config.heatmap_method, "Patch similarity")
        by_head = self.judgement is not None and self.config.heatmap_method in HEAD_METHODS
        return f"{name}, {self._output_name}" if by_head else name

    @property
    def _output_name(self) -> str:
        judgement = self.judgement
        return "" if judgement is None else str(judgement.head.classes[judgement.output])

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
            verdict=None if self.judgement is None else verdict_of(self.judgement, len(self.planes)),
            flags=[Flag(flag.kind, flag.title, flag.text) for flag in self.flags],
        )
        page.write(self.folder / "report.html")

    def pictures(self) -> CasePictures:
        """The slices as they are looked at, of the sequences that exist, or of the windows of the only one."""
        planes = self.planes
        is_volume = planes.prepared is not None
        windows = tuple(Window(name, (low + high) / 2, high - low) for name, low, high in self.backbone.windows_hu)
        windows = windows if is_volume else ()
        own = tuple(name for name in self.backbone.sequences if name in self.case.sequences)
        keep = np.flatnonzero(planes.available_S) if len(planes.available_S) > 1 else slice(None)
        measured = slice(0, 1) if windows else keep  # windows of one CT are one volume, several times
        return CasePictures(
            names=tuple(window.name for window in windows) or own,
            plane=lambda z: planes.scaled(z)[keep],
            count=len(planes),
            spacing=planes.spacing,
            orientation=self.backbone.preprocess.orientation if is_volume and not self._is_as_stored else None,
            colour=self.backbone.model.sequences is None and not windows,
            heat=self.heat,
            stored=(lambda z: planes.stored_SNHW[measured, z]) if is_volume else None,
            value_unit="HU" if windows or self._is_ct(own) else "",
            window_presets=windows and (*windows, *(preset for preset in CT_WINDOWS if preset not in windows)),
            stored_names=own if windows else (),
        )

    def _is_ct(self, names: Sequence[str]) -> bool:
        """Whether every sequence is prepared by a fixed window of HU."""
        config = self.backbone.preprocess
        windowed = names if config.window_sequences is None else config.window_sequences
        return config.window_hu is not None and set(names) <= set(windowed)

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
            "orientation": self._orientation(),
            "num_slices": len(seen.indices_N),
            "stride": self.config.stride if self.embedder is None else self.embedder.config.stride,
            "slice_size": list(self.planes.size),
            "slice_spacing_mm": None if self.planes.prepared is None else list(self.planes.spacing),
            "resize": list(seen.network_size),
            "embedding_dim": int(seen.cls_ND.shape[1]),
        }
        return {
            **facts,
            **self._head_facts(),
            **self._map_facts(),
            "flags": [asdict(flag) for flag in self.flags],
            **self._resource_facts(),
            "note": RESEARCH_NOTE,
        }

    def _orientation(self) -> str:
        if self.planes.prepared is None:
            return "as stored"
        return "stored axes" if self._is_as_stored else self.backbone.preprocess.orientation

    @property
    def _is_as_stored(self) -> bool:
        """Slices lie along the third axis of the file, and are not turned for reading."""
        return self.embedder is not None and self.embedder.config.orientation == "stored"

    def _head_facts(self) -> dict[str, Any]:
        """What a head adds: its decisions, and with which settings they were made."""
        if self.judgement is None or self.embedder is None:
            return {}
        head = self.judgement.head
        return {
            "checkpoint": shown(head.folder),
            "checkpoint_sha256": head.card["sha256"],
            **facts_of(self.judgement),
            "extraction": self.embedder.settings,
        }

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
            "heatmap_maximum": seen.heat_maximum,
            "heatmap_total": seen.heat_total,
            "heatmap_scale_definition": None if seen.heat_maximum is None else SCALE_DEFINITION,
            "dicom": self.dicom_files,
            **self._top_facts(),
        }
        return facts

    def _top_facts(self) -> dict[str, Any]:
        places = (
            "slice_index counts from 0 along the slice axis of `orientation`, peak_voxel (i, j, k) in the input file"
        )
        hot = f"the {SCORE_QUANTILE:.0%} quantile of their heat"
        if self.ranked is not None:
            text = (
                "slices by the score of top_slices_class, see slice_scores_definition; slice_pos is the row of "
                f"slice_indices.npy; attention is the weight of the slice in the case; heat_score is {hot}; {places}"
            )
            return {"top_slices": self.ranked, "top_slices_definition": text}
        if self.heat is None:
            return {"top_slices": None, "top_slices_definition": None}
        return {"top_slices": list(self.heat.top), "top_slices_definition": f"slices by {hot}; {places}"}

    def _resource_facts(self) -> dict[str, Any]:
        device = self.backbone.device
        is_cuda = device.type == "cuda"
        reasons = {} if is_cuda else {"gpu_mem_mb": "computed on the CPU"}
        if self.heat is None:
            keys = ["heatmap"] if self.ranked is not None else ["heatmap", "top_slices"]
            reasons |= dict.fromkeys(keys, "--heatmap was not given")
        elif self.seen.heat_maximum is None:
            keys = ["heatmap_maximum", "heatmap_total", "heatmap_scale_definition"]
            reasons |= dict.fromkeys(keys, "this map is not divided by its maximum")
        if self.judgement is not None:
            reasons |= null_reasons(self.judgement)
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
    for name in (*_files_named_by_case(out), *reversed(RESULT_FILES)):
        (out / name).unlink(missing_ok=True)


def _files_named_by_case(out: Path) -> list[str]:
    """Files of an earlier segmentation, whose names begin with that of the case: its summary lists them."""
    try:
        listed = json.loads((out / "summary.json").read_text(encoding="utf-8"))["files"]
        names = [name for name in listed if isinstance(name, str) and Path(name).name == name]
    except (OSError, ValueError, KeyError, TypeError):  # no summary, or one that lists none
        return []
    return [name for name in names if (out / name).is_file()]


def _save_array(path: Path, array: np.ndarray) -> None:
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.save(file, array, allow_pickle=False)


_SHOWN_FACTS = {
    "inputs": "input",
    "model": "model",
    "model_sha256": "weights SHA-256",
    "checkpoint": "head",
    "pool_mode": "pooling of slices",
    "threshold_source": "thresholds from",
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
        if summary.get(key) is not None
    }


def _fact(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}: {Path(path).name}" for name, path in value.items())
    if isinstance(value, list):
        return " × ".join(f"{entry:.4g}" for entry in value)
    return f"{value:.1f}" if isinstance(value, float) else str(value)
