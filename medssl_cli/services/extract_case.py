"""One case: a vector a slice, and a map of the patches that look like one reference patch.

Letters: N slices looked at, S sequences, h w patches, D width of a vector, E width of the network.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medssl_cli.core.case import Case
from medssl_cli.core.digest import file_digest
from medssl_cli.core.errors import DataError
from medssl_cli.core.run import RESEARCH_NOTE, atomic_path, hide_home, say_disk_errors
from medssl_cli.data.feature_cache import FeatureCache
from medssl_cli.data.feature_store import FEATURES
from medssl_cli.data.images import write_image
from medssl_cli.engine.telemetry import peak_memory_gib
from medssl_cli.report.attention import similarity
from medssl_cli.report.case_page import CasePictures, similarity_picture
from medssl_cli.services.case_input import Wanted, found_case, named_cases
from medssl_cli.services.case_vectors import CaseVectors, pooled
from medssl_cli.services.devices import describe_device
from medssl_cli.services.embedding import Embedder
from medssl_cli.services.heatmaps import DEFINITIONS

CASE_FILES = (
    *("slice_embeddings.npy", "slice_indices.npy", "embedding_mean.npy", "similarity_map.npy", "similarity_map.png"),
    "patch_tokens.npy",
)
"""What one case may leave behind, beside ``summary.json``."""


@dataclass(frozen=True)
class _Slice:
    """The slice of the similarity map, as it is kept in the cache.

    Args:
        patches_ShwE: Its patch tokens.
        index: Its position.
        available_S: Sequences that exist.
        size: (height, width) in pixels.
        spacing: (y, x) in mm.
        network_size: (height, width) in pixels as the network saw it.
    """

    patches_ShwE: np.ndarray
    index: int
    available_S: np.ndarray
    size: tuple[int, int]
    spacing: tuple[float, float]
    network_size: tuple[int, int]


class ExtractedCase:
    """Results of one case in the making, in a folder that nobody else sees yet.

    Args:
        source: What the user named.
        sequence: Which of the model's sequences a single file is.
        embedder: Makes the vectors.
        temporary: Folder to work in.
    """

    def __init__(self, source: Path, sequence: str | None, embedder: Embedder, temporary: Path) -> None:
        self.source, self.sequence, self.embedder = source, sequence, embedder
        self.temporary, self.folder = temporary, temporary / "results"

    def extract(self, out: Path) -> dict[str, Any]:
        """Compute and write everything but ``summary.json``, whose contents without header are given back.

        Raises:
            ConfigError, DataError: As ``found_case`` and ``Embedder.embed``; a slice or patch outside the case.
        """
        (named,) = named_cases([str(self.source)])
        backbone = self.embedder.backbone
        volumes = backbone.model.sequences is not None
        wanted = Wanted(backbone.sequences, backbone.reference, volumes=volumes, slices=backbone.slices)
        self.folder.mkdir(parents=True)
        with found_case(named, wanted, self.sequence, self.temporary) as case:
            vectors = self.embedder.embed(case)
            shown = self._slice(case, vectors)
            reference = self._reference_patch(shown)
            map_hw = similarity_map(shown.patches_ShwE, shown.available_S, reference)
            self._write(vectors, shown, map_hw)
            return self._facts(case, vectors, shown, reference, out)

    def publish(self, out: Path) -> None:
        """Move the finished files to where they belong; ``summary.json`` comes last: it marks a whole set."""
        with say_disk_errors(out):
            if (out / FEATURES).is_dir():
                shutil.rmtree(out / FEATURES)
            for path in sorted(self.folder.iterdir(), key=lambda path: path.name == "summary.json"):
                os.replace(path, out / path.name)

    # --- the slice of the similarity map -----------------------------------------------------------------------------

    def _slice(self, case: Case, vectors: CaseVectors) -> _Slice:
        """Patch tokens of the slice that was asked for, else of the middle one of those looked at."""
        embedder, asked = self.embedder, self.embedder.config.sim_slice
        fields = self._fields(case, asked)
        key = FeatureCache.key_of(fields)
        arrays = None if embedder.cache is None else embedder.cache.read(key, fields)
        if arrays is None:
            arrays = self._computed(case, vectors, asked)
            if embedder.cache is not None:
                embedder.cache.write(key, fields, arrays)
        height, width, rows, columns = (int(n) for n in arrays["sizes_4"])
        y_mm, x_mm = arrays["spacing_2"].tolist()
        return _Slice(
            patches_ShwE=arrays["patches_ShwE"],
            index=int(arrays["index_1"][0]),
            available_S=arrays["available_S"],
            size=(height, width),
            spacing=(y_mm, x_mm),
            network_size=(rows, columns),
        )

    def _fields(self, case: Case, asked: int | None) -> dict[str, Any]:
        sources = {
            name: {"sha256": file_digest(entry.path), "volume": entry.volume_index or 0}
            for name, entry in case.sequences.items()
        }
        return {
            "what": "patch tokens of one slice",
            "settings": self.embedder.settings,
            "sources": sources,
            "slice": asked,
        }

    def _computed(self, case: Case, vectors: CaseVectors, asked: int | None) -> dict[str, np.ndarray]:
        planes = self.embedder.planes(case)
        if asked is not None and asked >= len(planes):
            raise DataError(
                "The slice of the similarity map lies outside the case.",
                where=f"sim_slice={asked}; slices 0 to {len(planes) - 1}",
                fix="choose one of them, or leave it out for the middle one",
                code="sim_slice_outside",
            )
        index = int(vectors.indices_N[len(vectors.indices_N) // 2]) if asked is None else asked
        return {
            "patches_ShwE": self.embedder.patch_tokens(planes, np.array([index]))[0],
            "index_1": np.array([index]),
            "available_S": planes.available_S,
            "sizes_4": np.array([*planes.size, *self.embedder.network_size(planes)]),
            "spacing_2": np.array(planes.spacing, np.float64),
        }

    def _reference_patch(self, shown: _Slice) -> tuple[int, int]:
        rows, columns = shown.patches_ShwE.shape[1:3]
        asked = self.embedder.config.sim_patch
        if asked is None:
            return rows // 2, columns // 2
        if asked[0] >= rows or asked[1] >= columns:
            raise DataError(
                "The reference patch lies outside the slice.",
                where=f"sim_patch={asked[0]},{asked[1]}; rows 0 to {rows - 1}, columns 0 to {columns - 1}",
                fix="choose a patch inside, or leave it out for the middle one",
                code="sim_patch_outside",
            )
        return asked

    # --- files -------------------------------------------------------------------------------------------------------

    def _write(self, vectors: CaseVectors, shown: _Slice, map_hw: np.ndarray) -> None:
        _save(self.folder / "slice_embeddings.npy", vectors.slices_ND)
        _save(self.folder / "slice_indices.npy", vectors.indices_N)
        _save(self.folder / "embedding_mean.npy", pooled(vectors.slices_ND, "mean"))
        _save(self.folder / "similarity_map.npy", map_hw)
        if vectors.patches_NShwD is not None:
            _save(self.folder / "patch_tokens.npy", vectors.patches_NShwD)
        pictures = CasePictures(
            names=self.embedder.backbone.sequences,
            plane=lambda _: np.zeros((1, *shown.size), np.float32),
            count=1,
            spacing=shown.spacing,
            orientation=self._axes(vectors),
            colour=False,
        )
        write_image(self.folder / "similarity_map.png", similarity_picture(map_hw, pictures))

    def _axes(self, vectors: CaseVectors) -> str | None:
        """Where the axes of a slice point to; None for a picture and for slices as stored, which are shown as is."""
        if vectors.facts.spacing_mm is None or self.embedder.config.orientation == "stored":
            return None
        return self.embedder.backbone.preprocess.orientation

    def _facts(
        self, case: Case, vectors: CaseVectors, shown: _Slice, reference: tuple[int, int], out: Path
    ) -> dict[str, Any]:
        embedder, backbone = self.embedder, self.embedder.backbone
        config = embedder.config
        facts = {
            "case_id": case.case_id,
            "input": _shown(self.source),
            "output_dir": _shown(out),
            "missing_sequences": list(vectors.facts.missing),
            "model": _shown(backbone.found.run or backbone.found.weights),
            "model_found": backbone.found.why,
            "model_sha256": backbone.card["sha256"],
            "device": describe_device(backbone.device),
            "tokens": list(config.tokens),
            "layers": config.layers,
            "orientation": config.orientation if vectors.facts.spacing_mm is not None else "as stored",
            "num_slices": len(vectors.indices_N),
            "stride": config.stride,
            "resize": list(shown.network_size),
            "slice_size": list(shown.size),
            "embedding_dim": int(vectors.slices_ND.shape[1]),
            "patch_tokens": None if vectors.patches_NShwD is None else "patch_tokens.npy",
            "similarity_map": "similarity_map.npy",
            "similarity_map_png": "similarity_map.png",
            "similarity_definition": DEFINITIONS["similarity"],
            "similarity_slice_index": shown.index,
            "similarity_reference_patch": list(reference),
            "extraction": embedder.settings,
            "forward_passes": embedder.forward_passes,
            "cache_hits": embedder.cache_hits,
        }
        return {**facts, **self._resources(vectors), "note": RESEARCH_NOTE}

    def _resources(self, vectors: CaseVectors) -> dict[str, Any]:
        device = self.embedder.backbone.device
        is_cuda = device.type == "cuda"
        reasons = {} if is_cuda else {"gpu_mem_mb": "computed on the CPU"}
        if vectors.patches_NShwD is None:
            reasons["patch_tokens"] = "patch is not among the tokens"
        return {
            "gpu_mem_mb": round(1024 * peak_memory_gib(device), 1) if is_cuda else None,
            "cpu_rss_mb": round(1024 * peak_memory_gib(torch.device("cpu")), 1),
            "null_reasons": reasons,
        }


def similarity_map(patches_ShwE: np.ndarray, available_S: np.ndarray, patch: tuple[int, int]) -> np.ndarray:
    """(h, w) float32: cosine of each place with the reference patch of the same sequence, averaged over those there.

    It says which patches look like the reference patch; it is no map of lesions.
    """
    maps = [
        similarity(patches_ShwE[s], patches_ShwE[s][patch]) for s in np.flatnonzero(available_S[: len(patches_ShwE)])
    ]
    return np.stack(maps).mean(axis=0, dtype=np.float64).astype(np.float32)


def _save(path: Path, array: np.ndarray) -> None:
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.save(file, array, allow_pickle=False)


def _shown(path: Path) -> str:
    """A path for results: the home folder as ``~``, bytes that are no UTF-8 as question marks."""
    return hide_home(str(path)).encode("utf-8", "replace").decode("utf-8")
