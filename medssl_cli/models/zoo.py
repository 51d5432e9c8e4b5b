"""Named sizes of the backbone, and weights in and out: foreign files renamed and reported, our own with a card beside.

A weight file is never trusted: only tensors are read from it, whatever it claims to hold, and nothing is copied into a
model before the whole of it has been compared.
"""

from __future__ import annotations

import argparse
import difflib
import json
import logging
import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, field_validator, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from medssl_cli.core.config import Config
from medssl_cli.core.digest import file_digest
from medssl_cli.core.errors import CheckpointError, ConfigError
from medssl_cli.core.run import SCHEMA_VERSION, atomic_path, package_version, say_disk_errors, write_json
from medssl_cli.models.convnext import STRIDE, ConvNeXt
from medssl_cli.models.foreign import (
    detect_source,
    family_of,
    flat_name,
    foreign_parts,
    infer_settings,
    plain_names,
    translate,
)
from medssl_cli.models.layers import nearest_legal_sizes
from medssl_cli.models.rope import Normalize, RopeDtype
from medssl_cli.models.vit import PosEmbed, VisionTransformer, resize_positions

logger = logging.getLogger(__name__)

SIZES = {
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "giant2": (1536, 40, 24),
}
"""(width, blocks, heads) of each named size; heads are 64 wide."""

FAMILIES = ("vit", "medical_vit", "glioma_vit")
"""Names under which published configurations know the same networks."""

CONVNEXT_SIZES = {
    "tiny": ((3, 3, 9, 3), (96, 192, 384, 768)),
    "small": ((3, 3, 27, 3), (96, 192, 384, 768)),
    "base": ((3, 3, 27, 3), (128, 256, 512, 1024)),
    "large": ((3, 3, 27, 3), (192, 384, 768, 1536)),
}
"""(blocks, widths) of the four stages of each named size."""

_DINOV3: dict[str, Any] = {
    "patch_size": 16,
    "num_register_tokens": 4,
    "pos_embed_type": "rope",
    "pos_embed_rope_rescale_coords": 2.0,
    "mask_k_bias": True,
    "layernorm_eps": 1e-5,
}
_MEDDINOV3 = {
    **_DINOV3,
    "pos_embed_rope_dtype": "bf16",
    "pos_embed_rope_rescale_coords": None,
    "qkv_bias": False,
    "layernorm_eps": 1e-6,
}

PRESETS: dict[str, dict[str, Any]] = {
    "dinov3_vits16": _DINOV3,
    "dinov3_vitb16": _DINOV3,
    "dinov3_vitl16": _DINOV3,
    "meddinov3_vitb16": _MEDDINOV3,
    **{
        f"convnext_{size}": {"patch_size": STRIDE, "layerscale": 1e-6, "drop_path_uniform": False}
        for size in CONVNEXT_SIZES
    },
}
"""Settings that a name stands for beside its size; keys given beside it win."""

ARCHS = {
    **{f"{family}_{size}": numbers for family in FAMILIES for size, numbers in SIZES.items()},
    "dinov3_vits16": SIZES["small"],
    "dinov3_vitb16": SIZES["base"],
    "dinov3_vitl16": SIZES["large"],
    "meddinov3_vitb16": SIZES["base"],
    **{f"convnext_{size}": (dims[-1], sum(depths), 1) for size, (depths, dims) in CONVNEXT_SIZES.items()},
}
"""(width, blocks, heads) of every name; of a ConvNeXt the last width and all blocks."""

NORM_EPS = {"layernorm": 1e-6, "layernormbf16": 1e-5}
"""DINOv3's names of its norms."""


class StudentConfig(Config):
    """The backbone that is trained, in DINOv2's names."""

    arch: str = "vit_large"
    """vit_tiny, vit_small, vit_base, vit_large or vit_giant2 (medical_vit_* and glioma_vit_* name the same networks);
    dinov3_vits16, dinov3_vitb16, dinov3_vitl16 or meddinov3_vitb16, with their settings; convnext_tiny, convnext_small,
    convnext_base or convnext_large for plain pictures, without iBOT."""

    patch_size: PositiveInt = 16
    """Side of a patch in pixels; image and crop sizes are multiples of it. 32 for a ConvNeXt."""

    drop_path_rate: float = Field(default=0.3, ge=0, lt=1)
    """Stochastic depth of the student."""

    drop_path_uniform: bool = True
    """The same rate in every block; otherwise it rises linearly from 0."""

    layerscale: NonNegativeFloat = 1e-5
    """Start of the layer scale; 0 leaves it out."""

    pretrained_weights: str = ""
    """Weight file for the backbone at step 0; empty for a fresh start."""

    ffn_layer: Literal["mlp", "swiglu", "swiglufused", "identity"] = "mlp"
    """Feed-forward layer; swiglu and swiglufused are the same numbers."""

    block_chunks: NonNegativeInt = 0
    """Keep the blocks in that many chunks, as sharded DINOv2 checkpoints do; 0 for a flat list."""

    qkv_bias: bool = True
    """Bias of the query, key and value projection."""

    proj_bias: bool = True
    """Bias of the output projection of attention."""

    ffn_bias: bool = True
    """Bias of the feed-forward layers."""

    use_mri_seq_embed: bool = False
    """Add an embedding of its sequence to every patch token."""

    img_wise_pos_embed: bool = True
    """Every sequence has the same 2-D positions; otherwise they are stacked into one tall image."""

    num_register_tokens: NonNegativeInt = 0
    """Extra tokens without position."""

    n_storage_tokens: NonNegativeInt | None = None
    """DINOv3's name of num_register_tokens."""

    interpolate_offset: NonNegativeFloat | None = None
    """Offset of the position resize; null: 0.1 without registers, 0 (exact size) with them."""

    interpolate_antialias: bool | None = None
    """Low-pass filter of the position resize; null: with registers only."""

    pos_embed_type: PosEmbed = "learned"
    """learned (a table that is added), rope (queries and keys are rotated, as in DINOv3) or none."""

    pos_embed_rope_base: float = Field(default=100.0, gt=1)
    """Rotary positions: base of the periods."""

    pos_embed_rope_dtype: RopeDtype = "fp32"
    """Rotary positions: number type of every intermediate; bf16 for MedDINOv3. mixed: only the periods are rounded."""

    pos_embed_rope_normalize_coords: Normalize = "separate"
    """Rotary positions: divide rows and columns each by their own number, or both by the larger (max) or smaller."""

    pos_embed_rope_shift_coords: NonNegativeFloat | None = None
    """Rotary positions of the student: largest random shift of the coordinates."""

    pos_embed_rope_jitter_coords: float | None = Field(default=None, ge=1)
    """Rotary positions of the student: largest random stretch of each axis."""

    pos_embed_rope_rescale_coords: float | None = Field(default=None, ge=1)
    """Rotary positions of the student: largest random stretch of both axes together."""

    mask_k_bias: bool = False
    """The bias of the keys has no effect."""

    layernorm_eps: float = Field(default=1e-6, gt=0)
    """Added to the variance in every LayerNorm."""

    norm_layer: Literal["layernorm", "layernormbf16"] | None = None
    """DINOv3's name of layernorm_eps: 1e-6 or 1e-5."""

    grad_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""

    embed_dim: PositiveInt | None = None
    """Width, instead of the one that arch names."""

    depth: PositiveInt | None = None
    """Number of blocks, instead of the one that arch names."""

    num_heads: PositiveInt | None = None
    """Attention heads, instead of those that arch names."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_names(cls, values: Any) -> Any:
        """What the architecture and DINOv3's own names stand for, where the key itself is not given."""
        if not isinstance(values, dict):
            return values
        values, arch = dict(values), values.get("arch")
        if values.get("n_storage_tokens") is not None:
            values.setdefault("num_register_tokens", values["n_storage_tokens"])
        if values.get("norm_layer") in NORM_EPS:
            values.setdefault("layernorm_eps", NORM_EPS[values["norm_layer"]])
        return {**PRESETS.get(arch if isinstance(arch, str) else "", {}), **values}

    @field_validator("arch")
    @classmethod
    def _known(cls, arch: str) -> str:
        if arch not in ARCHS:
            near = difflib.get_close_matches(arch, ARCHS, n=1)
            raise ValueError(
                f"no such architecture; {f'did you mean {near[0]}? ' if near else ''}known: "
                f"{', '.join(f'vit_{size}' for size in SIZES)}, also as medical_vit_* and glioma_vit_*; "
                f"{', '.join(PRESETS)}"
            )
        return arch

    @model_validator(mode="after")
    def _heads_divide(self) -> StudentConfig:
        width, _, heads = self.size
        if width % heads:
            raise ValueError(f"embed_dim {width} is no multiple of num_heads {heads}")
        if self.pos_embed_type == "rope" and width // heads % 4:
            raise ValueError(f"rotary positions need heads whose width is a multiple of 4, not {width // heads}")
        return self

    @model_validator(mode="after")
    def _names_agree(self) -> StudentConfig:
        if self.n_storage_tokens not in (None, self.num_register_tokens):
            raise ValueError(
                f"n_storage_tokens {self.n_storage_tokens} and num_register_tokens {self.num_register_tokens} mean the "
                "same; give one of them"
            )
        if self.norm_layer is not None and self.layernorm_eps != NORM_EPS[self.norm_layer]:
            raise ValueError(f"norm_layer {self.norm_layer} and layernorm_eps {self.layernorm_eps} mean the same")
        return self

    @model_validator(mode="after")
    def _convnext_has_no_tokens(self) -> StudentConfig:
        if self.family != "convnext":
            return self
        allowed = {"arch", "patch_size", "drop_path_rate", "drop_path_uniform", "layerscale", "pretrained_weights"}
        allowed |= {"grad_checkpointing", "embed_dim", "depth"}
        fields = type(self).model_fields
        idle = [key for key, value in self if key not in allowed and value != fields[key].default]
        if idle:
            raise ValueError(f"{self.arch} is convolutional; no effect: {', '.join(idle)}")
        if self.patch_size != STRIDE or self.drop_path_uniform:
            raise ValueError(f"{self.arch} has patch_size {STRIDE} and drop_path_uniform false; leave both out")
        if (self.embed_dim or STRIDE) % 8 or (self.depth or 4) < 4:
            raise ValueError(f"{self.arch} needs embed_dim as a multiple of 8 and depth of 4 or more")
        return self

    @property
    def family(self) -> str:
        """vit or convnext."""
        return "convnext" if self.arch.startswith("convnext_") else "vit"

    @property
    def stages(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(blocks, widths) of a ConvNeXt's stages after the optional keys; a depth fills the third stage."""
        depths, dims = CONVNEXT_SIZES[self.arch.removeprefix("convnext_")]
        if self.depth is not None:
            depths = (1, 1, self.depth - 3, 1)
        if self.embed_dim is not None:
            dims = tuple(self.embed_dim // part for part in (8, 4, 2, 1))  # type: ignore[assignment]
        return depths, dims

    @property
    def size(self) -> tuple[int, int, int]:
        """(width, blocks, heads) after the optional keys."""
        width, depth, heads = ARCHS[self.arch]
        return self.embed_dim or width, self.depth or depth, self.num_heads or heads


def build_backbone(
    config: StudentConfig,
    img_size: int,
    sequences: Sequence[str] | None,
    in_chans: int = 3,
    *,
    stochastic_depth: bool,
) -> VisionTransformer | ConvNeXt:
    """A fresh backbone; ``pretrained_weights`` is left to the caller.

    Args:
        config: Its settings.
        img_size: Side of the image for which positions are stored.
        sequences: Names of the MRI sequences in channel order; None for plain pictures.
        in_chans: Channels of the patch convolution, 3 to take RGB weights.
        stochastic_depth: True for the student; the teacher and a backbone for inference are built without, and without
            random coordinates of rotary positions.

    Raises:
        ConfigError: ``img_size`` is no multiple of the patch size, or sequences for a convolutional network.
    """
    if img_size % config.patch_size:
        below, above = nearest_legal_sizes(img_size, config.patch_size)
        raise ConfigError(
            f"The image size is no multiple of the patch size {config.patch_size}.",
            where=f"img_size = {img_size}",
            fix=f"choose {below} or {above}" if below != above else f"choose {above}",
            code="img_size_illegal",
        )
    if config.family == "convnext":
        return _build_convnext(config, img_size, sequences, in_chans, stochastic_depth=stochastic_depth)
    width, depth, heads = config.size
    not_mine = {"arch", "pretrained_weights", "drop_path_rate", "embed_dim", "depth", "num_heads"}
    not_mine |= {"n_storage_tokens", "norm_layer"}
    random = {f"pos_embed_rope_{name}_coords" for name in ("shift", "jitter", "rescale")}
    settings = {name: value for name, value in config if name not in not_mine}
    if not stochastic_depth:
        settings |= dict.fromkeys(random)
    return VisionTransformer(
        img_size=img_size,
        in_chans=in_chans,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        sequences=sequences,
        drop_path_rate=config.drop_path_rate if stochastic_depth else 0.0,
        **settings,
    )


def _build_convnext(
    config: StudentConfig, img_size: int, sequences: Sequence[str] | None, in_chans: int, *, stochastic_depth: bool
) -> ConvNeXt:
    if sequences is not None:
        raise ConfigError(
            "A convolutional network takes plain pictures, not sequences of a case.",
            where=f"student.arch = {config.arch}, sequences {', '.join(sequences)}",
            fix="choose a vit_* architecture, or train on a picture tree",
            code="arch_for_pictures",
        )
    depths, dims = config.stages
    return ConvNeXt(
        in_chans=in_chans,
        depths=depths,
        dims=dims,
        drop_path_rate=config.drop_path_rate if stochastic_depth else 0.0,
        layer_scale=config.layerscale,
        img_size=img_size,
        grad_checkpointing=config.grad_checkpointing,
    )


# --- reading weights -------------------------------------------------------------------------------------------------

_NESTS = ("teacher", "model", "state_dict", "model_state_dict", "student", "module")
"""Keys under which weight files keep their tensors, in the order of preference."""


Role = Literal["teacher", "student"]


def read_weights(path: str | Path, role: Role | None = None) -> dict[str, Tensor]:
    """The tensors of a weight file, on the CPU, as they are named there.

    Takes safetensors and ``torch.save`` files, with the tensors at the top or below teacher, model, state_dict, …
    Pickled objects other than tensors and plain data are refused before any code of theirs runs.

    Args:
        path: The file.
        role: Which network of a file that holds both; the teacher if not given.

    Raises:
        CheckpointError: Missing, empty, cut off, of another kind, holding code, without tensors or without the role.
    """
    path = Path(path)
    head = _head_of(path)
    try:
        if head[8:9] == b"{":  # after the length of the header; a pickle cannot look so
            found = load_file(path)
        elif head[:2] == b"PK" or head[:1] == b"\x80":
            found = _tensors_of(_torch_load(path, zipped=head[:2] == b"PK"), path, role)
        else:
            raise _rejected(path, "neither a safetensors nor a torch.save file", "weights_unknown")
    except SafetensorError as error:
        raise _rejected(path, f"cut off or damaged: {error}", "weights_truncated") from error
    if not found:
        raise _rejected(path, "it holds no tensors", "weights_without_tensors")
    return found


def _head_of(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise CheckpointError(
            "The weight file cannot be read.",
            where=f"{path}: {error.strerror}",
            fix="check the path"
            if not path.is_dir()
            else "name the file in it, such as model.safetensors or pytorch_model.bin",
            code="weights_missing",
        ) from error
    text = head.lstrip().lower()
    if not head:
        raise _rejected(path, "the file is empty", "weights_empty")
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise _rejected(path, "it is a web page, not weights", "weights_html")
    if text.startswith(b"version https://git-lfs"):
        raise _rejected(path, "it is a Git LFS pointer, not the file itself", "weights_lfs_pointer")
    return head


def _torch_load(path: Path, *, zipped: bool) -> Any:
    # argparse.Namespace is a plain record that many published checkpoints carry beside their tensors
    with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer pickle protocols are announced, then read or refused below
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        except Exception as error:  # torch raises many kinds for a broken file; each becomes one clear refusal
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            if "weights only" in first.lower() or "unsupported" in first.lower():
                named = re.search(r"GLOBAL ([\w.]+)", str(error))
                what = f"it holds pickled code{f' ({named[1]})' if named else ''}, which was not run"
                raise _rejected(path, what, "weights_unsafe") from error
            raise _rejected(path, f"cut off or damaged: {first[:200]}", "weights_truncated") from error


def _tensors_of(data: Any, path: Path, role: Role | None, depth: int = 0) -> dict[str, Tensor]:
    """The tensors below the first known nest, or else those at the top."""
    if not isinstance(data, Mapping):
        raise _rejected(path, f"it holds a {type(data).__name__}, not named tensors", "weights_without_tensors")
    held = [name for name in ("teacher", "student") if isinstance(data.get(name), Mapping)]
    if role is not None and held and role not in held:
        raise _rejected(path, f"it holds the {held[0]}, but no {role}", "weights_role_missing")
    for nest in (*(() if role is None else (role,)), *_NESTS):
        if isinstance(data.get(nest), Mapping) and depth < 4:
            return _tensors_of(data[nest], path, role, depth + 1)
    return {str(key): value for key, value in data.items() if isinstance(value, Tensor)}


def _rejected(path: Path, why: str, code: str) -> CheckpointError:
    fixes = {
        "weights_unsafe": "take the weights as safetensors, or from a source that saved tensors only",
        "weights_lfs_pointer": "fetch the file itself with `git lfs pull`",
        "weights_without_tensors": "give a file that holds a state dict of tensors",
        "weights_role_missing": "take the network that the file holds, or name another file",
    }
    return CheckpointError(
        "The weight file was rejected.",
        where=f"{path}: {why}",
        fix=fixes.get(code, "download it again and compare its size and SHA-256 with the source"),
        code=code,
    )


# --- loading weights into a model ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LoadReport:
    """What became of every tensor of the model and of the file.

    Args:
        matched: Names of the model that were filled.
        missing: Names of the model that the file lacks; they keep their fresh values.
        unexpected: Names of the file that the model lacks, such as foreign heads; ignored.
        mismatched: Names with both shapes; never filled.
        resized: Names that were interpolated to the model's grid, with both shapes; counted among ``matched``.
        source: Where the tensors came from.
        kind: Program whose names the file has, see ``foreign.SOURCES``; empty if none was recognised.
        notes: What was done to the tensors besides renaming.
    """

    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...]
    resized: tuple[str, ...] = ()
    source: str = ""
    kind: str = ""
    notes: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """Share of the model's tensors that were filled."""
        return len(self.matched) / max(len(self.matched) + len(self.missing) + len(self.mismatched), 1)

    def lines(self) -> list[str]:
        """The report in words, names included."""
        total = len(self.matched) + len(self.missing) + len(self.mismatched)
        head = f"{len(self.matched)} of {total} tensors loaded ({self.share:.1%})"
        lines = [f"{head} from {self.source}" if self.source else head]
        for label in ("resized", "missing", "mismatched", "unexpected"):
            names = getattr(self, label)
            if names:
                lines.append(f"{label} {len(names)}: {_few(names)}")
        if self.kind:
            lines.append(f"recognised as {self.kind} weights")
        return [*lines, *(f"note: {note}" for note in self.notes)]


MAY_BE_MISSING = re.compile(r"^(?:mask_token|seq_embed|rope_embed\.periods)$|\.bias_mask$")
"""What a file may lack: no features without masks or sequences depend on the first two, the others are constants."""


def load_into(
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    minimum: float | None = None,
    force: bool = False,
    source: str = "",
    sequences: Sequence[str] | None = None,
    role: Role | None = None,
    kind: str | None = None,
    quiet: bool = False,
) -> LoadReport:
    """Fill a model with tensors of a file, or leave it untouched.

    Prefixes of wrappers (``module.``, ``backbone.``, ``student.``, ``teacher.``, …) are taken off, names of other
    programs are translated, stored positions are resized to the model's grid in the model's own way, the same as at
    run time: a model built for 512 pixels and one built for 224 and shown 512 give the same features.

    Args:
        model: A backbone or a head.
        state: From ``read_weights``.
        minimum: Least share of the model's tensors that must match. None: 95 % of a head, and all of a backbone but
            for ``MAY_BE_MISSING``, with nothing left over but heads.
        force: Load what fits even below ``minimum`` or with wrong shapes.
        source: Named in the report.
        sequences: Names of the rows of the file's sequence embedding, when known: rows are then matched by name.
        role: Which network of a file that holds both; the teacher if not given.
        kind: Program that wrote the file, see ``foreign.SOURCES``; recognised by its names if not given.
        quiet: The report is not logged.

    Raises:
        CheckpointError: Too little matches, or a shape differs; the report stands in its *where*.
    """
    targets = {flat_name(name): tensor for name, tensor in model.state_dict(keep_vars=True).items()}
    is_backbone = isinstance(model, (VisionTransformer, ConvNeXt))
    kind = (kind or detect_source(state)) if is_backbone else None
    given, notes = (plain_names(state, source, role), []) if kind is None else translate(state, kind, role)
    _match_sequences(model, given, sequences)
    resized = _resize_to(model, given)
    mismatched = [
        f"{name}: file {tuple(given[name].shape)}, model {tuple(target.shape)}"
        for name, target in targets.items()
        if name in given and given[name].shape != target.shape
    ]
    mismatched += _other_periods(given, targets, notes)
    wrong = {text.partition(":")[0] for text in mismatched}
    matched = [name for name in targets if name in given and name not in wrong]
    report = LoadReport(
        matched=tuple(matched),
        missing=tuple(name for name in targets if name not in given),
        unexpected=tuple(name for name in given if name not in targets),
        mismatched=tuple(mismatched),
        resized=tuple(resized),
        source=source,
        kind=kind or "",
        notes=tuple(notes),
    )
    if _is_short(report, minimum, is_backbone=is_backbone) and not (force and matched):
        raise CheckpointError(
            "The weights do not fit the model; nothing was loaded.",
            where="\n".join(report.lines()),
            fix=(_wanted_keys(model, given, kind) if is_backbone and kind else "")
            or "choose the architecture that the file was made for; "
            + (
                "all of a backbone must match"
                if minimum is None and is_backbone
                else f"{minimum or 0.95:.0%} must match"
            ),
            code="weights_mismatch",
        )
    _refuse_no_numbers(given, matched, source)
    with torch.no_grad():
        for name in matched:
            targets[name].copy_(given[name])
    if not quiet:
        for line in report.lines():
            logger.info("%s", line)
    return report


_SHAPING = (
    *("patch_size", "embed_dim", "depth", "num_heads", "num_register_tokens", "ffn_layer", "layerscale", "qkv_bias"),
    *("proj_bias", "ffn_bias", "pos_embed_type", "pos_embed_rope_base", "mask_k_bias"),
)
"""Settings of a vision transformer that decide on names and shapes, as ``StudentConfig`` calls them."""


def _wanted_keys(model: nn.Module, given: Mapping[str, Tensor], kind: str) -> str:
    """In keys of a configuration, what a model must be for a file to fit; empty if that is not the trouble."""
    try:
        wanted = infer_settings(given, kind)
    except CheckpointError:
        return ""
    if family_of(given) == "convnext":
        stages = tuple(wanted["depths"]), tuple(wanted["dims"])
        name = next((size for size, numbers in CONVNEXT_SIZES.items() if numbers == stages), None)
        own_stages = [model.settings[key] for key in ("depths", "dims")] if isinstance(model, ConvNeXt) else []
        return (
            ""
            if name is None or own_stages == list(map(list, stages))
            else f"set student.arch=convnext_{name}, which the file was made for"
        )
    own: Mapping[str, Any] = model.settings if isinstance(model, VisionTransformer) else {}
    plain = {name: getattr(StudentConfig(), name) for name in _SHAPING}
    keys = []
    for name in _SHAPING:
        have, want = own.get(name, plain[name]), wanted.get(name, plain[name])
        if name == "layerscale":
            have, want = (float(bool(value)) for value in (have, want))
        if name == "ffn_layer":
            have = str(have).replace("swiglufused", "swiglu")
        if have != want:
            keys.append(f"student.{name}={str(want).lower() if isinstance(want, bool) else want}")
    return f"set {' '.join(keys)}, which the file was made for" if keys else ""


def _refuse_no_numbers(given: Mapping[str, Tensor], names: Iterable[str], source: str) -> None:
    """Refuse tensors with NaN or infinity, or of a type that is no weight's."""
    for name in names:
        tensor = given[name]
        if tensor.is_meta:  # made of rows of a model that has shapes alone
            continue
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise CheckpointError(
                "The weights are no finite numbers.",
                where=f"{source or 'weights'}: {name}, {str(tensor.dtype).removeprefix('torch.')}",
                fix="take an undamaged file, or an earlier checkpoint",
                code="weights_nonfinite",
            )


def _is_short(report: LoadReport, minimum: float | None, *, is_backbone: bool) -> bool:
    """Whether so little fits that nothing may be loaded."""
    if report.mismatched or not report.matched:
        return True
    if minimum is not None or not is_backbone:
        return report.share < (0.95 if minimum is None else minimum)
    lost = [name for name in report.missing if not MAY_BE_MISSING.search(name)]
    return bool(lost or foreign_parts(report.unexpected))


def _other_periods(given: Mapping[str, Tensor], targets: Mapping[str, Tensor], notes: list[str]) -> list[str]:
    """Rotary periods of the file that are not the model's; a difference of rounding is only noted."""
    name = "rope_embed.periods"
    if name not in given or name not in targets or given[name].shape != targets[name].shape:
        return []
    theirs, ours = given[name].double().cpu(), targets[name].detach().double().cpu()
    if not torch.allclose(theirs, ours, rtol=0.01):
        return [f"{name}: file up to {float(theirs[-1]):.4g}, model up to {float(ours[-1]):.4g}"]
    if not torch.allclose(theirs, ours, rtol=1e-4):
        notes.append("the rotary periods of the file are rounded otherwise; see student.pos_embed_rope_dtype")
    return []


def _match_sequences(model: nn.Module, given: dict[str, Tensor], names: Sequence[str] | None) -> None:
    """Put the rows of the file's sequence embedding into the model's order, by name; new sequences keep theirs."""
    own = getattr(model, "sequences", None)
    table = given.get("seq_embed")
    if names is None or own is None or table is None or tuple(names) == tuple(own):
        return
    rows = model.seq_embed.detach().clone().to(table.dtype)  # type: ignore[operator]
    for index, name in enumerate(own):
        if name in names:
            rows[index] = table[list(names).index(name)]
    given["seq_embed"] = rows


def _resize_to(model: nn.Module, given: dict[str, Tensor]) -> list[str]:
    """Interpolate stored positions to the model's grid; returns what was done."""
    positions = given.get("pos_embed")
    if not isinstance(model, VisionTransformer) or model.pos_embed is None or positions is None or positions.ndim != 3:
        return []
    have, want = positions.shape[1] - 1, model.pos_embed.shape[1] - 1
    if have == want or have < 1 or math.isqrt(have) ** 2 != have:
        return []
    side, source_side = math.isqrt(want), math.isqrt(have)
    patches = resize_positions(
        positions[:, 1:],
        (side, side),
        offset=model.interpolate_offset,
        antialias=model.interpolate_antialias,
    )
    given["pos_embed"] = torch.cat([positions[:, :1], patches], dim=1)
    return [f"pos_embed: {source_side} x {source_side} to {side} x {side} positions"]


def _few(names: Iterable[str], most: int = 12) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f", and {len(names) - most} more" if len(names) > most else "")


# --- our own backbone files ------------------------------------------------------------------------------------------


def card_path(path: str | Path) -> Path:
    """``X.json`` beside ``X.safetensors``."""
    return Path(path).with_suffix(".json")


def save_backbone(path: str | Path, model: VisionTransformer | ConvNeXt, card: Mapping[str, Any]) -> dict[str, Any]:
    """Write ``X.safetensors`` and its card ``X.json``, each whole or not at all.

    Args:
        path: Ends in ``.safetensors``.
        model: Its parameters are written as they are, in their own number type.
        card: What a user of the features needs besides: normalisation, preprocessing, origin. Plain data.

    Returns:
        The whole card as written.

    Raises:
        ValueError: ``card`` uses a name that the card itself needs.
        ResourceError: The disk is full; an older file of this name is as it was.
    """
    path = Path(path)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    with atomic_path(path) as temporary, say_disk_errors(path, size):
        save_file(state, temporary, metadata={"format": "pt"})
        digest = file_digest(temporary)
    own = {
        "schema_version": SCHEMA_VERSION,
        "medssl_version": package_version(),
        "kind": "backbone",
        "family": "vit" if isinstance(model, VisionTransformer) else "convnext",
        "arch": model.settings,
        "sequences": None if model.sequences is None else list(model.sequences),
        "img_size": model.img_size,
        "patch_size": model.patch_size,
        "embed_dim": model.embed_dim,
        "weights": path.name,
        "sha256": digest,
        "n_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }
    if isinstance(model, VisionTransformer):
        own["interpolate_offset"] = model.interpolate_offset
        own["interpolate_antialias"] = model.interpolate_antialias
    taken = sorted(own.keys() & card.keys())
    if taken:
        raise ValueError(f"the card writes {', '.join(taken)} itself")
    written = {**own, **card}
    write_json(card_path(path), written)
    return written


def read_card(path: str | Path) -> dict[str, Any]:
    """The card of a backbone file.

    Raises:
        CheckpointError: There is none, or it is not ours.
    """
    card = card_path(path)
    try:
        data = json.loads(card.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            "The weight file has no card.",
            where=f"{card}: {error.strerror}",
            fix="keep X.json beside X.safetensors; for weights of another program, run `medssl convert weights` first",
            code="card_missing",
        ) from error
    except ValueError as error:
        raise _bad_card(card, f"not JSON: {error}") from error
    if not isinstance(data, dict) or data.get("kind") != "backbone" or not isinstance(data.get("arch"), dict):
        raise _bad_card(card, "it does not describe a backbone")
    if data.get("schema_version") != SCHEMA_VERSION:
        raise _bad_card(card, f"schema {data.get('schema_version')!r}, this program knows {SCHEMA_VERSION}")
    return data


def load_backbone(
    path: str | Path, device: torch.device | str = "cpu"
) -> tuple[VisionTransformer | ConvNeXt, dict[str, Any]]:
    """The backbone of a file that ``save_backbone`` wrote, in evaluation mode, and its card.

    Raises:
        CheckpointError: File or card missing, altered since, or not of one make.
    """
    path = Path(path)
    card = read_card(path)
    state = read_weights(path)
    digest = file_digest(path)
    if digest != card.get("sha256"):
        raise CheckpointError(
            "The weights are not the ones that the card describes.",
            where=f"{path}: SHA-256 {digest[:16]}…, card {str(card.get('sha256'))[:16]}…",
            fix="copy both files again; X.safetensors and X.json belong together",
            code="weights_altered",
        )
    model = _empty_backbone(card["arch"], str(card.get("family", "vit")), card_path(path))
    _check_complete(model, state, path)
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(True).to(device).eval(), card


def _empty_backbone(settings: Mapping[str, Any], family: str, card: Path) -> VisionTransformer | ConvNeXt:
    networks: dict[str, type[VisionTransformer] | type[ConvNeXt]] = {"vit": VisionTransformer, "convnext": ConvNeXt}
    if family not in networks:
        raise _bad_card(card, f"family {family!r}; this program knows {', '.join(networks)}")
    try:
        with torch.device("meta"):  # no memory and no random numbers for weights that are replaced at once
            return networks[family](**settings)
    except (TypeError, ValueError) as error:
        raise _bad_card(card, f"its arch cannot be built: {error}") from error


def card_warnings(card: Mapping[str, Any], modality: str | None) -> list[str]:
    """What a user should know before showing images of ``modality`` to the backbone of a card.

    Args:
        card: From ``read_card``.
        modality: Canonical name of the images, or None if unknown.
    """
    trained = card.get("modality")
    if not trained or not modality or str(trained).lower() == modality.lower():
        return []
    return [
        f"The backbone was made for images of the modality {trained} and is normalised with their statistics; "
        f"these are {modality}."
    ]


def differences_to_card(card: Mapping[str, Any], model: nn.Module) -> list[str]:
    """Settings of the card's network that no tensor tells and that the model has otherwise, in words.

    Raises:
        CheckpointError: The attention heads are others: every shape fits, and every feature would be wrong.
    """
    theirs = card.get("arch")
    if not isinstance(model, VisionTransformer) or not isinstance(theirs, Mapping):
        return []
    same_width = theirs.get("embed_dim") == model.embed_dim
    heads, own = theirs.get("num_heads"), model.settings["num_heads"]
    if same_width and heads not in (None, own):
        raise CheckpointError(
            "The weights were made with another number of attention heads.",
            where=f"{card.get('weights', 'weights')}: {heads} heads, the model has {own}",
            fix=f"set student.num_heads={heads}",
            code="weights_heads",
        )
    names = ["layernorm_eps", *(["pos_embed_rope_dtype"] if model.settings["pos_embed_type"] == "rope" else [])]
    return [
        f"The weights were made with {name} {theirs[name]}, the model has {model.settings[name]}: features differ a "
        f"little; set student.{name}={theirs[name]} to keep them."
        for name in names
        if name in theirs and theirs[name] != model.settings[name]
    ]


def _check_complete(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    own = model.state_dict()
    report = LoadReport(
        matched=tuple(name for name in own if name in state and own[name].shape == state[name].shape),
        missing=tuple(name for name in own if name not in state),
        unexpected=tuple(name for name in state if name not in own),
        mismatched=tuple(name for name in own if name in state and own[name].shape != state[name].shape),
        source=str(path),
    )
    if len(report.matched) != len(own) or report.unexpected:
        raise CheckpointError(
            "The weights are not those of the network that the card describes.",
            where="\n".join(report.lines()),
            fix="copy both files again, or use the file as foreign weights with --init",
            code="weights_mismatch",
        )


def _bad_card(card: Path, why: str) -> CheckpointError:
    return CheckpointError(
        "The card of the weights was rejected.",
        where=f"{card}: {why}",
        fix="copy X.json again from the run that made X.safetensors",
        code="card_invalid",
    )
