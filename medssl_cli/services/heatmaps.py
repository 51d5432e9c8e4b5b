"""Slices of a case through a backbone: embeddings, a patch-similarity map, and heat on the grid of the slices.

Letters: N slices looked at, Z all slices, B slices computed together, S sequences, H W pixels of a slice, h w patches,
D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import Field, PositiveInt
from torch.nn import functional

from medssl_cli.core.config import Config
from medssl_cli.core.errors import DataError
from medssl_cli.report.attention import similarity
from medssl_cli.services.backbone import Backbone, Planes, Tokens
from medssl_cli.services.embedding_config import SimPatch, SimSlice
from medssl_cli.services.head_maps import HeadMethod, head_heat

if TYPE_CHECKING:
    from medssl_cli.services.embedding import Embedder
    from medssl_cli.services.head import Head
    from medssl_cli.services.infer_head import Judgement

Method = Literal["head", "gradcam", "rollout", "similarity"]
HEAD_METHODS: tuple[HeadMethod, ...] = ("head", "gradcam")
"""Methods that follow the gradient of a head."""

DEFINITIONS: dict[str, str] = {
    "head": "Gradient times patch token (Shrikumar et al. 2017): how much each place raises the output {output} of the "
    "head for the whole case, to first order; nothing below zero, 1 is the largest value of the case. It shows what "
    "the head leans on; it is no map of lesions and outlines none.",
    "gradcam": "Grad-CAM on patch tokens (Selvaraju et al. 2017): channels weighted by the gradient of the output "
    "{output} of the head for the whole case, averaged over the patches of a slice; nothing below zero, 1 is the "
    "largest value of the case. It shows what the head leans on; it is no map of lesions and outlines none.",
    "rollout": "Attention rollout (Abnar and Zuidema 2020): how much each place reaches the CLS token through all "
    "blocks; 1 is the average of the slice. It shows where the network looks; it is no map of lesions.",
    "similarity": "Patch similarity: cosine of each place with the reference patch, averaged over sequences. It shows "
    "what looks alike; it is no map of lesions.",
}
UNITS: dict[str, str] = {
    "head": "of maximum",
    "gradcam": "of maximum",
    "rollout": "× average",
    "similarity": "cosine",
}
SCALE_DEFINITION = (
    "heatmap_maximum: what 1 stands for in the map; heatmap_total: sum over all patches of the slices looked at; of "
    "the method head both are in logits (of a regression in standard deviations of the target)"
)
SCORE_QUANTILE = 0.99


class InferConfig(Config):
    """How a case is looked at."""

    heatmap_method: Method = "rollout"
    """What the heat map shows: head (gradient times patch token) and gradcam follow the gradient of a head, rollout the
    attention, similarity the likeness to the reference patch. Not given: head for a trained head, rollout for a bare
    ViT, similarity for a bare convolutional network, which has no attention."""
    heatmap_class: str | None = None
    """Class of the head whose output the heat map and the ranking of slices follow; not given: `any` or the positive
    class, or the predicted one of exclusive classes."""
    mask_threshold: float = Field(default=0.5, gt=0, le=1)
    """Share of the largest heat of a case from which on a voxel belongs to the region of a DICOM segmentation."""
    max_side: PositiveInt = 518
    """Longer side in pixels of a slice as a bare backbone sees it; larger ones are reduced. A head brings its own."""
    stride: PositiveInt = 1
    """Every n-th slice is shown to a bare backbone; those between are interpolated in the heat map. A head brings its
    own."""
    batch_size: PositiveInt = 4
    """Slices computed together."""
    sim_slice: SimSlice = None
    """Slice of the similarity map, from 0; not given, or -1: the top slice of a head, else the middle one."""
    sim_patch: SimPatch = None
    """Row and column of the patch that all are compared with, from 0, as `h,w`; the middle one if not given, or
    `center`."""


@dataclass(frozen=True)
class Seen:
    """What the network made of the slices of one case.

    Args:
        cls_ND: Embedding of each slice; under a head its slice vector, whatever tokens that is made of.
        indices_N: Their positions.
        heat_Nhw: Heat of each slice, one value a patch; None if not asked for.
        similarity_hw: Similarity map of one slice, one value a patch.
        similarity_index: Position of that slice.
        reference_patch: (row, column) of the patch compared with.
        network_size: (height, width) in pixels of a slice as the network saw it.
        heat_maximum: The largest raw value of a map that was divided by it; None for the other methods.
        heat_total: Sum of the raw values over all patches of the slices looked at; None likewise.
    """

    cls_ND: np.ndarray
    indices_N: np.ndarray
    heat_Nhw: np.ndarray | None
    similarity_hw: np.ndarray
    similarity_index: int
    reference_patch: tuple[int, int]
    network_size: tuple[int, int]
    heat_maximum: float | None = None
    heat_total: float | None = None


def look(
    planes: Planes,
    backbone: Backbone,
    config: InferConfig,
    *,
    heatmap: bool,
    progress: Callable[[int, int], None] | None = None,
) -> Seen:
    """Show the slices to the network, the one of the similarity map first; ``progress`` is told slices done and in all.

    Raises:
        DataError: ``sim_slice`` or ``sim_patch`` lies outside.
        NonFiniteError: The network gave NaN or infinity.
    """
    size = backbone.network_size(planes.size, planes.spacing, config.max_side)
    indices = np.arange(0, len(planes), config.stride)
    sim_index = _similarity_slice(indices, len(planes), config)
    indices = np.union1d(indices, [sim_index])
    patch = _reference_patch(size, backbone, config)
    method = config.heatmap_method if heatmap else None

    grid = tuple(n // backbone.model.patch_size for n in size)
    cls_ND = np.empty((len(indices), backbone.model.embed_dim), np.float32)
    heat_Nhw = None if method is None else np.zeros((len(indices), *grid), np.float32)
    reference_SD = similarity_hw = np.empty(0)
    done = 0
    for places in _batches(indices, sim_index, config.batch_size):
        images = backbone.to_network(planes.batch(indices[places]), size)
        tokens = backbone.see(images, planes.available_S, with_rollout=method == "rollout")
        cls_ND[places] = tokens.cls_BD
        if not done:
            reference_SD = tokens.patches_BShwD[0, :, patch[0], patch[1]]
            similarity_hw = _alike(tokens, reference_SD, planes.available_S)[0]
        if heat_Nhw is not None:
            heat_Nhw[places] = _token_heat(tokens, reference_SD, planes.available_S)
        done += len(places)
        if progress is not None:
            progress(done, len(indices))
    if heat_Nhw is not None:
        heat_Nhw[~planes.filled_N[indices]] = 0.0  # padding: there is nothing to look at
    return Seen(cls_ND, indices, heat_Nhw, similarity_hw, sim_index, patch, size)


def look_with_head(
    planes: Planes,
    head: Head,
    embedder: Embedder,
    judgement: Judgement,
    slices_NV: np.ndarray,
    config: InferConfig,
    *,
    heatmap: bool,
    progress: Callable[[int, int], None] | None = None,
) -> Seen:
    """The similarity map and the heat of slices whose vectors are known, seen with the head's own settings.

    Raises:
        DataError: ``sim_slice`` or ``sim_patch`` lies outside.
        ConfigError: No such heat map of this head and network.
        NonFiniteError: The network or the gradient gave NaN or infinity.
    """
    backbone, indices = embedder.backbone, judgement.indices_N
    top = int(indices[judgement.order[0]])
    sim_index = top if config.sim_slice is None else _similarity_slice(indices, len(planes), config)
    images = embedder.network_input(planes, np.array([sim_index]))
    height, width = images.shape[-2:]
    patch = _reference_patch((height, width), backbone, config)
    tokens = backbone.see(images, planes.available_S)
    reference_SD = tokens.patches_BShwD[0, :, patch[0], patch[1]]
    similarity_hw = _alike(tokens, reference_SD, planes.available_S)[0]
    heat_Nhw = maximum = total = None
    method = config.heatmap_method
    if heatmap and method in HEAD_METHODS:
        heat_Nhw = head_heat(
            head, embedder, planes, slices_NV, indices, output=judgement.output, method=method, progress=progress
        )
    elif heatmap:
        heat_Nhw = _heat_of_tokens(planes, embedder, indices, reference_SD, method, progress)
    if heat_Nhw is not None:
        heat_Nhw[~planes.filled_N[indices]] = 0.0
        if method in HEAD_METHODS:
            maximum, total = float(heat_Nhw.max()), float(heat_Nhw.sum(dtype=np.float64))
            heat_Nhw /= maximum or 1.0
    return Seen(slices_NV, indices, heat_Nhw, similarity_hw, sim_index, patch, (height, width), maximum, total)


def _heat_of_tokens(
    planes: Planes,
    embedder: Embedder,
    indices_N: np.ndarray,
    reference_SD: np.ndarray,
    method: str,
    progress: Callable[[int, int], None] | None,
) -> np.ndarray:
    """(N, h, w): rollout or similarity of slices as the head sees them."""
    heat = []
    for start in range(0, len(indices_N), embedder.config.batch_size):
        places = indices_N[start : start + embedder.config.batch_size]
        images = embedder.network_input(planes, places)
        tokens = embedder.backbone.see(images, planes.available_S, with_rollout=method == "rollout")
        heat.append(_token_heat(tokens, reference_SD, planes.available_S))
        if progress is not None:
            progress(start + len(places), len(indices_N))
    return np.concatenate(heat)


def _token_heat(tokens: Tokens, reference_SD: np.ndarray, available_S: np.ndarray) -> np.ndarray:
    """(B, h, w): the rollout where it was computed, else the similarity."""
    if tokens.rollout_BShw is not None:
        return _relative(tokens, available_S)
    return _alike(tokens, reference_SD, available_S)


def _batches(indices_N: np.ndarray, first: int, size: int) -> Iterator[np.ndarray]:
    """Places in ``indices_N``: that of the slice ``first`` alone, then the others."""
    place = int(np.searchsorted(indices_N, first))
    yield np.array([place])
    others = np.delete(np.arange(len(indices_N)), place)
    for start in range(0, len(others), size):
        yield others[start : start + size]


def _similarity_slice(indices: np.ndarray, count: int, config: InferConfig) -> int:
    if config.sim_slice is None:
        return int(indices[len(indices) // 2])
    if config.sim_slice >= count:
        raise DataError(
            "The slice of the similarity map lies outside the case.",
            where=f"sim_slice={config.sim_slice}; slices 0 to {count - 1}",
            fix="choose one of them, or leave it out for the middle one",
            code="sim_slice_outside",
        )
    return config.sim_slice


def _reference_patch(size: tuple[int, int], backbone: Backbone, config: InferConfig) -> tuple[int, int]:
    rows, columns = (n // backbone.model.patch_size for n in size)
    if config.sim_patch is None:
        return rows // 2, columns // 2
    row, column = config.sim_patch
    if row >= rows or column >= columns:
        raise DataError(
            "The reference patch lies outside the slice.",
            where=f"sim_patch=[{row},{column}]; rows 0 to {rows - 1}, columns 0 to {columns - 1}",
            fix="choose a patch inside, or leave it out for the middle one",
            code="sim_patch_outside",
        )
    return row, column


def _alike(tokens: Tokens, reference_SD: np.ndarray, available_S: np.ndarray) -> np.ndarray:
    """(B, h, w): cosine with the reference patch of the same sequence, averaged over the sequences that exist."""
    maps = [
        similarity(tokens.patches_BShwD[:, s], reference_SD[s])
        for s in np.flatnonzero(available_S[: len(reference_SD)])
    ]
    return np.stack(maps).mean(axis=0, dtype=np.float64).astype(np.float32)


def _relative(tokens: Tokens, available_S: np.ndarray) -> np.ndarray:
    """(B, h, w): rollout summed over the sequences that exist, 1 on average over the slice."""
    assert tokens.rollout_BShw is not None
    summed_Bhw = tokens.rollout_BShw[:, available_S[: tokens.rollout_BShw.shape[1]]].sum(1)
    return summed_Bhw / np.maximum(summed_Bhw.mean((1, 2), keepdims=True), 1e-30)


# --- heat on the grid of the slices ----------------------------------------------------------------------------------


def heat_of_all(seen: Seen, count: int) -> np.ndarray:
    """(Z, h, w): slices between those looked at are interpolated linearly, beyond the ends the last one is kept.

    Farther from a slice that was looked at than such slices lie apart there is no heat.
    """
    assert seen.heat_Nhw is not None
    if len(seen.indices_N) == count:
        return seen.heat_Nhw
    places = np.interp(np.arange(count), seen.indices_N, np.arange(len(seen.indices_N)))
    low = np.floor(places).astype(int)
    high = np.minimum(low + 1, len(seen.indices_N) - 1)
    share = (places - low).astype(np.float32)[:, None, None]
    heat_Zhw = (1 - share) * seen.heat_Nhw[low] + share * seen.heat_Nhw[high]
    reach = int(np.diff(seen.indices_N).max(initial=0))
    heat_Zhw[: max(0, seen.indices_N[0] - reach)] = 0.0
    heat_Zhw[seen.indices_N[-1] + reach + 1 :] = 0.0
    return np.asarray(heat_Zhw)


def on_pixels(heat_Zhw: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(Z, H, W) float32: one value a patch -> one a pixel, bilinear between the centres of the patches."""
    out_ZHW = np.empty((len(heat_Zhw), *size), np.float32)
    for grid_hw, plane_HW in zip(heat_Zhw, out_ZHW, strict=True):
        grid = torch.from_numpy(np.ascontiguousarray(grid_hw, np.float32))[None, None]
        plane_HW[...] = functional.interpolate(grid, size, mode="bilinear", align_corners=False)[0, 0].numpy()
    return out_ZHW


def top_slices(
    seen: Seen, heat_ZHW: np.ndarray, planes: Planes, top_k: int, *, places: Callable[[int, int, int], dict[str, Any]]
) -> list[dict[str, Any]]:
    """The slices whose hottest hundredth is hottest, best first; equal ones in their order, padding left out.

    Args:
        seen: What was looked at; slices between are not ranked.
        heat_ZHW: From ``on_pixels``.
        planes: To tell padding.
        top_k: How many at most.
        places: (slice, row, column) of the hottest pixel to further facts about it.
    """
    filled = planes.filled_N
    ranked = [int(z) for z in seen.indices_N if filled[z]] or [int(z) for z in seen.indices_N]
    scores = {z: heat_score(heat_ZHW[z]) for z in ranked}
    best = sorted(ranked, key=lambda z: (-scores[z], z))[:top_k]
    return [
        {"rank": rank, "slice_index": z, "score": scores[z], **places(z, *hottest(heat_ZHW[z]))}
        for rank, z in enumerate(best, start=1)
    ]


def heat_score(heat_HW: np.ndarray) -> float:
    """How hot a slice is: the quantile that its hottest hundredth exceeds."""
    return float(np.quantile(heat_HW, SCORE_QUANTILE))


def hottest(heat_HW: np.ndarray) -> tuple[int, int]:
    """(row, column) of the hottest pixel."""
    row, column = np.unravel_index(int(heat_HW.argmax()), heat_HW.shape)
    return int(row), int(column)
