"""Look at cases through a backbone: slice embeddings, a heat map on the input's grid, and a report."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import PositiveInt
from torch.nn import functional

from medssl_cli.core.case import Case
from medssl_cli.core.case import Sequence as CaseSequence
from medssl_cli.core.config import Config, load_config
from medssl_cli.core.errors import ConfigError, DataError, PartialFailure
from medssl_cli.core.run import (
    RESEARCH_NOTE,
    claim_out_folder,
    plain,
    result_header,
    to_json,
    write_failures,
    write_json,
)
from medssl_cli.core.volume import AXIAL
from medssl_cli.data.images import is_image, volume_stem, write_image, write_volume
from medssl_cli.data.preprocess import (
    Prepared,
    PreprocessConfig,
    prepare_case,
    prepare_picture,
    scale_to_unit,
    sequence_limits,
)
from medssl_cli.data.sequences import resolve_sequence
from medssl_cli.models.vit import VisionTransformer
from medssl_cli.models.zoo import load_backbone
from medssl_cli.report.attention import rollout, similarity
from medssl_cli.report.overlay import blend, fitted, jpeg_bytes, montage, png_bytes, radiological, window
from medssl_cli.report.page import Page
from medssl_cli.report.viewer import ViewerSlice, add_viewer
from medssl_cli.services.devices import describe_device, resolve_device
from medssl_cli.services.lookup import FoundModel, find_model

log = logging.getLogger(__name__)

PLAIN = ("image",)
"""The one sequence of a backbone for plain pictures."""

METHODS = {
    "rollout": "attention rollout (Abnar and Zuidema 2020): how much each place reaches the CLS token; 1 is the average",
    "similarity": "patch similarity: cosine with the reference patch; shows what looks alike, no lesion map",
}
VIEWER_SLICES = 48
THUMBNAIL = 384


class InferConfig(Config):
    """How a case is looked at."""

    heatmap_method: Literal["rollout", "similarity"] = "rollout"
    """What the heat map of a bare backbone shows."""
    max_side: PositiveInt = 518
    """Longer side in pixels of a slice as the network sees it; larger ones are reduced."""
    stride: PositiveInt = 1
    """Every n-th slice is looked at; those between are interpolated in the heat map."""
    batch_size: PositiveInt = 4
    """Slices computed together."""


@dataclass(frozen=True)
class InferRequest:
    """What the user typed. Names as the options of ``medssl infer``."""

    cases: tuple[str, ...]
    overrides: tuple[str, ...] = ()
    model: Path | None = None
    heatmap: bool = False
    out: Path = Path("out")
    top_k: int = 5
    sequence: str | None = None
    device: str = "auto"
    on_error: Literal["stop", "skip"] = "stop"
    overwrite: bool = False


@dataclass(frozen=True)
class InferResult:
    """Summaries of the cases, for people and for scripts."""

    lines: list[str]
    facts: dict[str, Any]

    def summary(self) -> str:
        """A few lines for people."""
        return "\n".join(self.lines)

    def to_json(self) -> str:
        """Strict JSON with the common header."""
        return to_json(self.facts)


@dataclass(frozen=True)
class Loaded:
    """A backbone with what belongs to it."""

    found: FoundModel
    model: VisionTransformer
    card: dict[str, Any]
    device: torch.device
    config: InferConfig

    @property
    def sequences(self) -> tuple[str, ...]:
        """Names in channel order; ``image`` for a backbone of plain pictures."""
        return tuple(self.model.sequences or PLAIN)


@dataclass(frozen=True)
class Seen:
    """What the network made of the planes of one case.

    Args:
        cls_ND: Embedding of each plane.
        indices_N: Their positions.
        heat_NHW: Heat of each plane at its own size; None if not asked for.
        similarity_HW: Similarity map of the middle plane, one value a patch.
        similarity_index: Position of that plane.
        reference_patch: (row, column) of the patch compared with.
    """

    cls_ND: np.ndarray
    indices_N: np.ndarray
    heat_NHW: np.ndarray | None
    similarity_HW: np.ndarray
    similarity_index: int
    reference_patch: tuple[int, int]


def infer(request: InferRequest, *, progress: Callable[[int, int], None] | None = None) -> InferResult:
    """Look at one case or several with one model.

    Raises:
        ConfigError: No case, or no model to be found.
        DataError: A case cannot be read (with ``on_error: stop``).
        PartialFailure: Some cases failed and are listed (with ``on_error: skip``).
    """
    started = time.time()
    config = load_config(InferConfig, None, recipes="infer", overrides=request.overrides)
    if not request.cases:
        raise ConfigError("No case was named.", fix="name a NIfTI file, a case folder or a picture", code="case_missing")
    loaded = _load(request, config)
    claim_out_folder(request.out, "infer", overwrite=request.overwrite)
    summaries, failures = [], []
    for done, name in enumerate(request.cases):
        out = request.out if len(request.cases) == 1 else request.out / _case_name(Path(name))
        try:
            summaries.append(_infer_case(Path(name), loaded, request, out))
        except DataError as error:
            if request.on_error == "stop":
                raise
            failures.append((_case_name(Path(name)), name, error.what, error.fix))
        if progress is not None:
            progress(done + 1, len(request.cases))
    write_failures(request.out / "failures.csv", failures)
    if failures:
        raise PartialFailure(
            f"{len(failures)} of {len(request.cases)} cases failed.",
            where=str(request.out / "failures.csv"),
            fix="see the reasons there; the other cases are complete",
            code="cases_failed",
        )
    facts = {**result_header("infer", started), "cases": summaries}
    return InferResult([line for summary in summaries for line in _lines(summary)], plain(facts))


# --- one case --------------------------------------------------------------------------------------------------------


def _load(request: InferRequest, config: InferConfig) -> Loaded:
    device = resolve_device(request.device)
    found = find_model(request.model)
    model, card = load_backbone(found.weights, device)
    log.info("Model: %s (%s), %s", found.run or found.weights, found.why, describe_device(device))
    return Loaded(found, model, card, device, config)


def _infer_case(path: Path, loaded: Loaded, request: InferRequest, out: Path) -> dict[str, Any]:
    started = time.time()
    case = _find_case(path, loaded, request.sequence)
    planes_NSHW, prepared = _read_planes(case, loaded)
    seen = _look(planes_NSHW, loaded, case, heatmap=request.heatmap)
    files = _write_arrays(seen, out)
    heat_ZYX = None
    if seen.heat_NHW is not None:
        heat_ZYX = _fill_between(seen.heat_NHW, seen.indices_N, len(planes_NSHW))
        if prepared is not None:
            write_volume(out / "heatmap.nii.gz", prepared.restore.restore(heat_ZYX.astype(np.float32), nearest=False))
            files["heatmap"] = "heatmap.nii.gz"
    top = _top_slices(seen, heat_ZYX, request.top_k)
    base_ZYX = planes_NSHW[:, _first_available(case, loaded)]
    if heat_ZYX is not None:
        write_image(out / "heatmap.png", _overlay(base_ZYX, heat_ZYX, top, volume=prepared is not None))
        files["heatmap_png"] = "heatmap.png"
    summary = {
        **result_header("infer", started),
        **_describe(case, loaded, seen, planes_NSHW),
        "heatmap_method": METHODS[loaded.config.heatmap_method] if request.heatmap else None,
        "top_slices": top,
        "files": files,
        "out": out,
        "note": RESEARCH_NOTE,
    }
    _report(summary, base_ZYX, heat_ZYX, top, seen, out, volume=prepared is not None)
    files["report"] = "report.html"
    write_json(out / "summary.json", summary)
    return summary


def _find_case(path: Path, loaded: Loaded, sequence: str | None) -> Case:
    """The files of a case: a folder by the names of its files, a single file as the sequence it stands for."""
    name = _case_name(path)
    if path.is_dir():
        found = {key: entry for key in loaded.sequences if (entry := resolve_sequence(path, key)) is not None}
        if not found:
            raise DataError(
                "The folder holds none of the model's sequences.",
                where=f"{path}: looked for {', '.join(loaded.sequences)} as .nii or .nii.gz",
                fix="name one NIfTI file, or convert DICOM first: medssl convert dicom SOURCE OUT",
                code="sequences_missing",
            )
        return Case(name, name, found)
    if is_image(path):
        if loaded.model.sequences is not None:
            raise DataError(
                "The model reads volumes, this is a picture.",
                where=f"{path}; the model's sequences: {', '.join(loaded.sequences)}",
                fix="name a NIfTI file or a case folder, or a model pretrained on pictures",
                code="case_kind",
            )
        return Case(name, name, {"image": CaseSequence("image", path)})
    stem = volume_stem(path)
    if stem is None:
        raise DataError(
            "This is no case.",
            where=str(path) + ("" if path.exists() else ": it does not exist"),
            fix="name a .nii or .nii.gz file, a case folder, or a PNG, JPEG or TIFF picture",
            code="case_unknown",
        )
    chosen = _sequence_of(stem, loaded, sequence)
    return Case(name, name, {chosen: CaseSequence(chosen, path)})


def _sequence_of(stem: str, loaded: Loaded, asked: str | None) -> str:
    if asked is not None:
        if asked not in loaded.sequences:
            raise ConfigError(
                f"The model has no sequence {asked!r}.",
                where=f"its sequences: {', '.join(loaded.sequences)}",
                fix="pass one of them to --sequence",
                code="sequence_unknown",
            )
        return asked
    by_name = [name for name in loaded.sequences if stem == name or stem.startswith(f"{name}_")]
    if by_name:
        return by_name[0]
    if len(loaded.sequences) > 1:
        log.warning(
            "%s is taken as %s, the model's reference sequence; --sequence names another", stem, loaded.sequences[0]
        )
    return loaded.sequences[0]


def _read_planes(case: Case, loaded: Loaded) -> tuple[np.ndarray, Prepared | None]:
    """(N, S, H, W) float32 in [0, 1] as in training, and for a volume the way back to its grid."""
    config = PreprocessConfig.model_validate(loaded.card["preprocess"])
    path = next(iter(case.sequences.values())).path
    if is_image(path):
        picture = prepare_picture(case, config)
        channels = len(picture.image_CHW)
        scaled = scale_to_unit(picture.image_CHW, np.full(channels, picture.low), np.full(channels, picture.high))
        return scaled[None], None
    prepared = prepare_case(case, loaded.sequences, config)
    limits = [
        sequence_limits(name, volume, AXIAL, config)
        for name, volume in zip(loaded.sequences, prepared.images_SZYX, strict=True)
    ]
    planes = [
        scale_to_unit(
            prepared.images_SZYX[:, z],
            np.array([low[z] for low, _ in limits]),
            np.array([high[z] for _, high in limits]),
        )
        for z in range(prepared.images_SZYX.shape[1])
    ]
    return np.stack(planes), prepared


# --- through the network ---------------------------------------------------------------------------------------------


def _look(planes_NSHW: np.ndarray, loaded: Loaded, case: Case, *, heatmap: bool) -> Seen:
    indices = np.arange(0, len(planes_NSHW), loaded.config.stride)
    available = torch.tensor([name in case.sequences for name in loaded.sequences])
    method = loaded.config.heatmap_method if heatmap else None
    middle = int(np.abs(indices - (len(planes_NSHW) - 1) / 2).argmin())
    reference, patch = _reference_patch(planes_NSHW[indices[middle]], loaded, available)
    cls, heat, middle_map = [], [], None
    for start in range(0, len(indices), loaded.config.batch_size):
        chosen = indices[start : start + loaded.config.batch_size]
        cls_BD, patches_BGHD, rolled = _forward(planes_NSHW[chosen], loaded, available, with_rollout=method == "rollout")
        cls.append(cls_BD)
        alike_BHW = similarity(patches_BGHD, reference)[:, available.numpy()].mean(1)
        if start <= middle < start + len(chosen):
            middle_map = alike_BHW[middle - start]
        if method is not None:
            grid_BHW = alike_BHW if rolled is None else rolled
            heat.append(_resized(grid_BHW, planes_NSHW.shape[-2:]))
    assert middle_map is not None
    return Seen(
        cls_ND=np.concatenate(cls),
        indices_N=indices,
        heat_NHW=np.concatenate(heat) if heat else None,
        similarity_HW=middle_map,
        similarity_index=int(indices[middle]),
        reference_patch=patch,
    )


def _reference_patch(plane_SHW: np.ndarray, loaded: Loaded, available: torch.Tensor) -> tuple[np.ndarray, tuple[int, int]]:
    """The token in the centre of a plane, of the first sequence that exists, and its (row, column)."""
    _, patches, _ = _forward(plane_SHW[None], loaded, available, with_rollout=False)
    row, column = patches.shape[2] // 2, patches.shape[3] // 2
    return patches[0, int(available.nonzero()[0]), row, column], (row, column)


@torch.inference_mode()
def _forward(
    planes_BSHW: np.ndarray, loaded: Loaded, available_S: torch.Tensor, *, with_rollout: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """cls (B, D), patches (B, S, h, w, D), and the rollout (B, h, w), summed over sequences, 1 on average."""
    images = torch.from_numpy(planes_BSHW).to(loaded.device)
    images = functional.interpolate(images, _network_size(planes_BSHW.shape[-2:], loaded), mode="bilinear", antialias=True)
    card = loaded.card
    images = (images - _channels(card["mean"], loaded)) / _channels(card["std"], loaded)
    available = None
    if loaded.model.sequences is not None:
        available = available_S.to(loaded.device).expand(len(images), -1)
    features = loaded.model(images, None, available)
    patches = features.patches_BND.unflatten(1, features.grid).float().cpu().numpy()
    rolled = None
    if with_rollout:
        maps = [attention.float().cpu().numpy() for attention in loaded.model.attention_maps(images, available)]
        leading = maps[0].shape[-1] - features.patches_BND.shape[1]
        tokens_BSHW = rollout(maps, leading).reshape(len(images), *features.grid)
        tokens_BSHW = tokens_BSHW / tokens_BSHW.mean((1, 2, 3), keepdims=True)
        rolled = tokens_BSHW[:, available_S.numpy()].mean(1)
    return features.cls_BD.float().cpu().numpy(), patches, rolled


def _channels(values: float | Sequence[float], loaded: Loaded) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.float32, device=loaded.device).reshape(1, -1, 1, 1)


def _network_size(size: tuple[int, ...], loaded: Loaded) -> tuple[int, int]:
    """Nearest multiples of the patch size, at most ``max_side`` on the longer side."""
    patch = loaded.model.patch_size
    scale = min(1.0, loaded.config.max_side / max(size))
    height, width = (max(1, round(n * scale / patch)) * patch for n in size)
    return height, width


def _resized(grid_BHW: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    maps = torch.from_numpy(np.ascontiguousarray(grid_BHW, dtype=np.float32))[:, None]
    return functional.interpolate(maps, tuple(size), mode="bilinear", align_corners=False)[:, 0].numpy()


def _fill_between(heat_NHW: np.ndarray, indices_N: np.ndarray, count: int) -> np.ndarray:
    """(Z, H, W): planes between the ones looked at are interpolated linearly."""
    if len(indices_N) == count:
        return heat_NHW
    places = np.interp(np.arange(count), indices_N, np.arange(len(indices_N)))
    low = np.floor(places).astype(int)
    high = np.minimum(low + 1, len(indices_N) - 1)
    share = (places - low)[:, None, None]
    return (1 - share) * heat_NHW[low] + share * heat_NHW[high]


# --- what is written -------------------------------------------------------------------------------------------------


def _write_arrays(seen: Seen, out: Path) -> dict[str, str]:
    out.mkdir(parents=True, exist_ok=True)
    arrays = {
        "slice_embeddings.npy": seen.cls_ND,
        "slice_indices.npy": seen.indices_N,
        "embedding_mean.npy": seen.cls_ND.mean(0),
        "similarity_map.npy": seen.similarity_HW,
    }
    for name, array in arrays.items():
        _save_array(out / name, array)
    write_image(out / "similarity_map.png", _similarity_picture(seen))
    return {name.partition(".")[0]: name for name in arrays} | {"similarity_map_png": "similarity_map.png"}


def _save_array(path: Path, array: np.ndarray) -> None:
    from medssl_cli.core.run import atomic_path

    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.save(file, array, allow_pickle=False)


def _similarity_picture(seen: Seen) -> np.ndarray:
    grid = (radiological(seen.similarity_HW) + 1) / 2
    black = np.zeros((*grid.shape, 3), np.uint8)
    return fitted(blend(black, grid, 1.0, colormap="viridis"), THUMBNAIL)


def _top_slices(seen: Seen, heat_ZYX: np.ndarray | None, top_k: int) -> list[dict[str, Any]]:
    """Slices whose hottest hundredth is hottest; without a heat map those around the middle."""
    if heat_ZYX is None:
        order = np.argsort(np.abs(seen.indices_N - seen.similarity_index), kind="stable")[:top_k]
        return [{"rank": r + 1, "slice_index": int(seen.indices_N[i]), "score": None} for r, i in enumerate(order)]
    scores = np.quantile(heat_ZYX.reshape(len(heat_ZYX), -1), 0.99, axis=1)
    order = np.argsort(-scores, kind="stable")[:top_k]
    return [{"rank": r + 1, "slice_index": int(z), "score": float(scores[z])} for r, z in enumerate(order)]


def _unit_heat(heat_ZYX: np.ndarray) -> np.ndarray:
    """Heat scaled to [0, 1] over the whole case, so that slices can be compared."""
    low, high = np.quantile(heat_ZYX, (0.01, 0.999))
    return np.clip((heat_ZYX - low) / max(high - low, 1e-12), 0, 1)


def _shown(plane_HW: np.ndarray, volume: bool) -> np.ndarray:
    return radiological(plane_HW) if volume else plane_HW


def _overlay(base_ZYX: np.ndarray, heat_ZYX: np.ndarray, top: list[dict[str, Any]], *, volume: bool) -> np.ndarray:
    """Above the slices, below the same with the heat map laid over."""
    unit = _unit_heat(heat_ZYX)
    greys, blends = [], []
    for entry in top:
        z = entry["slice_index"]
        grey = window(_shown(base_ZYX[z], volume), 0.0, 1.0)
        greys.append(fitted(grey, THUMBNAIL))
        blends.append(fitted(blend(grey, _shown(unit[z], volume), 0.5), THUMBNAIL))
    return montage([*greys, *blends], columns=len(top))


def _describe(case: Case, loaded: Loaded, seen: Seen, planes_NSHW: np.ndarray) -> dict[str, Any]:
    return {
        "case_id": case.case_id,
        "inputs": {name: entry.path for name, entry in case.sequences.items()},
        "missing_sequences": list(case.missing(loaded.sequences)),
        "model": loaded.found.run or loaded.found.weights,
        "model_found": loaded.found.why,
        "model_sha256": loaded.card["sha256"],
        "device": describe_device(loaded.device),
        "num_slices": len(seen.indices_N),
        "stride": loaded.config.stride,
        "slice_size": list(planes_NSHW.shape[-2:]),
        "network_size": list(_network_size(planes_NSHW.shape[-2:], loaded)),
        "embedding_dim": int(seen.cls_ND.shape[1]),
        "similarity_slice_index": seen.similarity_index,
        "similarity_reference_patch": list(seen.reference_patch),
    }


def _first_available(case: Case, loaded: Loaded) -> int:
    return next(i for i, name in enumerate(loaded.sequences) if name in case.sequences)


def _report(
    summary: dict[str, Any],
    base_ZYX: np.ndarray,
    heat_ZYX: np.ndarray | None,
    top: list[dict[str, Any]],
    seen: Seen,
    out: Path,
    *,
    volume: bool,
) -> None:
    page = Page(f"Case {summary['case_id']}", "Seen by a self-supervised backbone; no diagnosis is made here.")
    page.note(RESEARCH_NOTE, "warning")
    page.heading("Slices")
    page.text(summary["heatmap_method"] or "No heat map was asked for; pass --heatmap for one.")
    slices, first = _viewer_slices(base_ZYX, heat_ZYX, top, volume=volume)
    add_viewer(page, slices, first, alt="slice of the case", layer_name="heat map" if heat_ZYX is not None else "")
    if heat_ZYX is not None:
        page.heading("Hottest slices")
        page.figure((out / "heatmap.png").read_bytes(), "Above: the slices; below: with the heat map.", alt="top slices")
    page.heading("Patch similarity")
    row, column = seen.reference_patch
    page.figure(
        (out / "similarity_map.png").read_bytes(),
        f"Slice {seen.similarity_index}: cosine of every patch with the one at row {row}, column {column}. "
        "It shows what looks alike and is no lesion map.",
        alt="similarity map",
        width=THUMBNAIL,
    )
    page.heading("Provenance")
    page.facts({key: _fact(summary[key]) for key in _FACTS if summary[key] is not None})
    page.write(out / "report.html")


_FACTS = (
    "case_id", "inputs", "missing_sequences", "model", "model_sha256", "device", "num_slices", "slice_size",
    "network_size", "embedding_dim", "elapsed_s", "medssl_version", "started_at",
)  # fmt: skip


def _fact(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {entry.name if isinstance(entry, Path) else entry}" for key, entry in value.items())
    if isinstance(value, list):
        return " x ".join(map(str, value)) if value and isinstance(value[0], int) else ", ".join(map(str, value)) or "none"
    return str(value)


def _viewer_slices(
    base_ZYX: np.ndarray, heat_ZYX: np.ndarray | None, top: list[dict[str, Any]], *, volume: bool
) -> tuple[list[ViewerSlice], int]:
    best = top[0]["slice_index"]
    chosen = sorted({*np.linspace(0, len(base_ZYX) - 1, min(len(base_ZYX), VIEWER_SLICES)).round().astype(int), best})
    unit = None if heat_ZYX is None else _unit_heat(heat_ZYX)
    slices = list(_planes(base_ZYX, unit, [int(z) for z in chosen], volume=volume))
    return slices, chosen.index(best)


def _planes(
    base_ZYX: np.ndarray, unit_ZYX: np.ndarray | None, chosen: list[int], *, volume: bool
) -> Iterator[ViewerSlice]:
    for z in chosen:
        picture = jpeg_bytes(window(_shown(base_ZYX[z], volume), 0.0, 1.0), quality=85)
        layer = None
        if unit_ZYX is not None:
            heat = _shown(unit_ZYX[z], volume)
            colours = blend(np.zeros((*heat.shape, 3), np.uint8), heat, 1.0)
            layer = png_bytes(np.dstack([colours, np.rint(255 * np.sqrt(heat)).astype(np.uint8)]))
        yield ViewerSlice(f"slice {z + 1} of {len(base_ZYX)}", picture, layer)


def _case_name(path: Path) -> str:
    return volume_stem(path) or (path.resolve().name if path.is_dir() else path.stem)


def _lines(summary: dict[str, Any]) -> list[str]:
    out = Path(summary["out"])
    lines = [f"{summary['case_id']}: {summary['num_slices']} slices, {summary['embedding_dim']} numbers each"]
    if "heatmap" in summary["files"]:
        lines.append(f"heat map: {out / 'heatmap.nii.gz'} ({summary['heatmap_method'].partition(':')[0]})")
    return [*lines, f"report:   {out / 'report.html'}"]
