"""How cases become slice vectors, and what of a backbone decides the numbers: as plain JSON, to be compared later."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, NonNegativeInt, PositiveInt, field_validator, model_validator

from medssl_cli.core.config import Config
from medssl_cli.core.errors import ConfigError
from medssl_cli.models.layers import nearest_legal_sizes
from medssl_cli.models.vit import VisionTransformer
from medssl_cli.services.backbone import Backbone

SCHEMA = 1
"""Of the numbers: raised whenever the same settings come to mean other vectors."""
DEFAULT_MAX_SIDE = 518


def _slice_or_middle(value: object) -> object:
    return None if value == -1 else value


def _patch_of_text(value: object) -> object:
    if not isinstance(value, str):
        return value
    return None if value.strip() == "center" else tuple(part.strip() for part in value.split(","))


SimSlice = Annotated[NonNegativeInt | None, BeforeValidator(_slice_or_middle)]
"""Slice of a similarity map, from 0; None, or -1, for the one chosen by itself."""
SimPatch = Annotated[tuple[NonNegativeInt, NonNegativeInt] | None, BeforeValidator(_patch_of_text)]
"""Row and column of the patch that all are compared with, from 0; None, or `center`, for the middle one."""


class ExtractConfig(Config):
    """How the slices of a case become vectors."""

    tokens: tuple[Literal["cls", "mean", "patch"], ...] = ("cls",)
    """What a slice vector is made of, end to end: cls, then the mean patch token of the last block over the sequences
    that exist. `patch` keeps the patch tokens of the last block beside the vector; alone it means `cls,patch`."""
    layers: PositiveInt = 1
    """CLS tokens of the last n blocks end to end, shallow to deep, each through the final norm."""
    orientation: Literal["ras-axial", "stored"] = "ras-axial"
    """Slices of a volume: reoriented and resampled as in training, or along the third axis of the file as it is stored,
    each slice as [x, y], for models of one sequence."""
    slice_selection: Literal["even", "first"] = "even"
    """Which slices remain of more than `max_slices`: evenly spaced over the volume, or the first ones."""
    stride: PositiveInt = 1
    """Every n-th slice is looked at."""
    max_slices: NonNegativeInt = 0
    """Most slices of a volume that are looked at; 0 is no limit."""
    resize: PositiveInt | None = None
    """Side in pixels of a square that every slice is brought to, bilinearly; a multiple of the patch size. Without it
    slices keep their proportions, as `medssl infer` shows them."""
    antialias: bool = False
    """Low-pass filter where `resize` shrinks a slice."""
    max_side: PositiveInt = DEFAULT_MAX_SIDE
    """Longer side in pixels of a slice as the network sees it without `resize`; larger ones are reduced."""
    batch_size: PositiveInt = 8
    """Slices computed together, of several cases where they have one size."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Number format of the network."""
    digest: Literal["content", "fast"] = "content"
    """How the cache tells files apart: by their bytes (SHA-256), or by path, size and time of change."""
    views: PositiveInt = 1
    """Vectors of each training picture: the first as it is, further ones with random flips."""
    sim_slice: SimSlice = None
    """Slice of the similarity map of a single volume, from 0; the middle one of those looked at if not given, or -1."""
    sim_patch: SimPatch = None
    """Row and column of the patch that all are compared with, from 0, as `h,w`; the middle one if not given, or
    `center`."""

    @field_validator("tokens", mode="before")
    @classmethod
    def _tokens_of_text(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value

    @field_validator("tokens")
    @classmethod
    def _tokens_in_order(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value or len(set(value)) != len(value):
            raise ValueError("one or more different tokens of cls, mean, patch are needed")
        given = {"cls", *value} if value == ("patch",) else set(value)
        return tuple(token for token in ("cls", "mean", "patch") if token in given)

    @model_validator(mode="after")
    def _all_have_effect(self) -> ExtractConfig:
        if self.layers > 1 and "cls" not in self.tokens:
            raise ValueError("layers counts for the cls token, which is not among the tokens")
        if self.antialias and self.resize is None:
            raise ValueError("antialias counts for resize, which is not given")
        if self.max_side != DEFAULT_MAX_SIDE and self.resize is not None:
            raise ValueError("max_side counts without resize only")
        if self.slice_selection == "first" and not self.max_slices:
            raise ValueError("slice_selection counts for max_slices, which is 0")
        return self


def decisions(config: ExtractConfig) -> dict[str, Any]:
    """The keys of the config that decide the vectors, as plain JSON."""
    return {
        "schema": SCHEMA,
        "tokens": [token for token in config.tokens if token != "patch"],
        "layers": config.layers,
        "orientation": config.orientation,
        "slice_selection": config.slice_selection,
        "stride": config.stride,
        "max_slices": config.max_slices,
        "resize": config.resize,
        "antialias": config.antialias,
        "max_side": config.max_side if config.resize is None else None,
        "precision": config.precision,
    }


def backbone_facts(backbone: Backbone) -> dict[str, Any]:
    """What of a backbone decides its numbers, as plain JSON."""
    return {
        "weights_sha256": backbone.card.get("sha256"),
        "family": backbone.card.get("family", "vit"),
        "arch": backbone.card.get("arch"),
        "sequences": list(backbone.sequences),
        "as_pictures": backbone.slices,
        "spatial_size": backbone.spatial_size,
        "mean": backbone.mean,
        "std": backbone.std,
        "windows_hu": [list(window) for window in backbone.windows_hu],
        "preprocess": backbone.preprocess.model_dump(mode="json"),
    }


def check_fits(backbone: Backbone, config: ExtractConfig) -> None:
    """Refuse settings that the network cannot follow.

    Raises:
        ConfigError: All of them, with the nearest legal sizes.
    """
    model, faults, fixes = backbone.model, [], []
    if config.resize is not None and config.resize % model.patch_size:
        below, above = nearest_legal_sizes(config.resize, model.patch_size)
        faults.append(f"resize={config.resize} is no multiple of the patch size {model.patch_size}")
        fixes.append(f"choose resize={below} or {above}" if below else f"choose resize={above}")
    is_vit = isinstance(model, VisionTransformer)
    depth = len(model.drop_rates) if is_vit else 1
    if config.layers > depth:
        faults.append(f"layers={config.layers}, the network has " + (f"{depth} blocks" if is_vit else "one last stage"))
        fixes.append(f"choose layers up to {depth}")
    if config.orientation == "stored" and len(backbone.sequences) > 1:
        faults.append(f"orientation=stored, the model takes {len(backbone.sequences)} sequences on one grid")
        fixes.append("leave the orientation out")
    if faults:
        raise ConfigError(
            "The extraction does not fit the network.",
            where="\n".join(faults),
            fix="; ".join(fixes),
            code="extraction_misfit",
        )
