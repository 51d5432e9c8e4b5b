"""medssl convert weights: a weight file of another program as a backbone file with its card.

The source is recognised by the names in the file, the network is built from the shapes, and everything has to fit:
a file that would leave one tensor of the backbone at random is refused, and nothing is written.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt
from safetensors.torch import save_file
from torch import Tensor

from medssl_cli.core.config import Config, load_config
from medssl_cli.core.digest import file_digest
from medssl_cli.core.errors import CheckpointError, ConfigError
from medssl_cli.core.result import Result
from medssl_cli.core.run import (
    SCHEMA_VERSION,
    atomic_path,
    hide_home,
    package_version,
    result_header,
    say_disk_errors,
    write_json,
)
from medssl_cli.data.modalities import find_modality, resolve_modality
from medssl_cli.data.preprocess import PreprocessConfig
from medssl_cli.models.convnext import ConvNeXt
from medssl_cli.models.foreign import ORIGINS, SOURCES, contradicts, detect_source, family_of, infer_settings, translate
from medssl_cli.models.layers import nearest_legal_sizes
from medssl_cli.models.rope import RopeDtype
from medssl_cli.models.vgg import IMAGENET_DIGEST
from medssl_cli.models.vit import VisionTransformer
from medssl_cli.models.zoo import LoadReport, card_path, load_into, read_weights, save_backbone

NAME = "teacher_backbone.safetensors"
"""Name of the file in an output folder, as in the export of a run."""


class WeightsConfig(Config):
    """What a weight file does not tell; the source decides where nothing is given."""

    init_from: Literal["teacher", "student"] | None = None
    """Network of a file that holds both; the teacher where not given."""
    num_heads: PositiveInt | None = None
    """Attention heads, where they are not 64 wide."""
    layernorm_eps: PositiveFloat | None = None
    """Added to the variance in every LayerNorm."""
    interpolate_offset: float | None = Field(default=None, ge=0)
    """Offset of the position resize: 0.1 as in DINO and DINOv2, 0 for the exact size."""
    interpolate_antialias: bool | None = None
    """Low-pass filter of the position resize."""
    pos_embed_rope_dtype: RopeDtype | None = None
    """Number type of rotary positions: fp32, bf16 or mixed."""
    mean: tuple[float, ...] | None = None
    """Of the images in [0, 1], one number or one a channel."""
    std: tuple[PositiveFloat, ...] | None = None
    """Likewise."""
    window_hu: tuple[float, float] | None = None
    """CT values that become 0 and 1."""
    modality: str | None = None
    """Kind of images that the weights were made for; names of eye pictures bring their mean and std to visionfm and
    ibot weights."""


@dataclass(frozen=True)
class WeightsRequest:
    """What is asked for.

    Args:
        file: Foreign weights.
        out: Folder, or a file that ends in ``.safetensors``.
        source: One of ``foreign.SOURCES``, or ``auto``.
        image_size: Side in pixels of the image for which positions are stored; that of the file if not given.
        overwrite: Replace other weights at ``out``.
        overrides: ``KEY=VALUE`` for ``WeightsConfig``.
    """

    file: Path
    out: Path
    source: str = "auto"
    image_size: int | None = None
    overwrite: bool = False
    overrides: tuple[str, ...] = ()


def convert_weights(request: WeightsRequest) -> Result:
    """Read, check and write.

    Raises:
        CheckpointError: Unreadable, unsafe or of no known source, or not all of the network is in the file.
        ConfigError: Faulty options, or ``out`` holds other weights.
        ResourceError: The disk is full; an older file is as it was.
    """
    started = time.time()
    config = load_config(WeightsConfig, None, recipes="convert", overrides=request.overrides)
    target = _target(request)
    state = read_weights(request.file, config.init_from)
    source = _source(request, state)
    digest = file_digest(request.file)
    _refuse_losing(target, digest, overwrite=request.overwrite)
    facts: dict[str, Any] = {"source": source, "source_file": request.file.name, "source_sha256": digest}
    translated, notes = translate(state, source, config.init_from)
    _refuse_without_effect(request, config, translated)
    if family_of(translated) == "features":
        card = _write_features(target, translated, facts, notes, digest)
        lines = [f"{len(translated)} tensors from {request.file} (vgg19 weights)", *(f"note: {n}" for n in notes)]
    else:
        model, report = _load(request, config, state, translated, source)
        facts |= {"load_report": _counts(report), "notes": list(report.notes)}
        card = save_backbone(target, model, facts | _seeing(request, config, source, model.img_size))
        lines = report.lines()
    lines.append(_tell(card))
    lines.append(f"written: {hide_home(str(target))} and {card_path(target).name}")
    return Result(lines, {**result_header("convert weights", started), "weights": str(target), "card": card})


# --- options without effect ------------------------------------------------------------------------------------------

_OF_POSITIONS = ("interpolate_offset", "interpolate_antialias")
_OF_TOKENS = ("num_heads", "layernorm_eps", *_OF_POSITIONS, "pos_embed_rope_dtype")
_OF_IMAGES = ("mean", "std", "window_hu", "modality")


def _refuse_without_effect(request: WeightsRequest, config: WeightsConfig, state: Mapping[str, Tensor]) -> None:
    """Refuse keys that mean nothing for the network of the file."""
    family = family_of(state)
    idle = {
        "vit": ("pos_embed_rope_dtype",) if "pos_embed" in state else _OF_POSITIONS,
        "convnext": _OF_TOKENS,
        "features": (*_OF_TOKENS, *_OF_IMAGES),
    }[family]
    given = [key for key in idle if key in config.model_fields_set]
    given += ["--image-size"] if family == "features" and request.image_size is not None else []
    if given:
        network = {"vit": "ViT with " + ("a position table" if "pos_embed" in state else "rotary positions")}
        raise ConfigError(
            "These options have no effect on the weights.",
            where=f"{', '.join(given)}; {request.file} is a {network.get(family, family)}",
            fix="leave them out",
            code="config_without_effect",
        )


# --- steps -----------------------------------------------------------------------------------------------------------


def _target(request: WeightsRequest) -> Path:
    target = request.out if request.out.suffix == ".safetensors" else request.out / NAME
    if request.out.is_file() and target != request.out:
        raise ConfigError(
            "The output folder is a file.",
            where=str(request.out),
            fix="name a folder, or a file that ends in .safetensors",
            code="out_is_file",
        )
    if target.exists() and request.file.exists() and target.samefile(request.file):
        raise ConfigError(
            "Weights are not converted onto themselves.",
            where=str(target),
            fix="name another output",
            code="out_is_input",
        )
    return target


def _refuse_losing(target: Path, digest: str, *, overwrite: bool) -> None:
    if overwrite or not target.exists():
        return
    try:
        card = json.loads(card_path(target).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        card = {}
    if not isinstance(card, dict) or card.get("source_sha256") != digest:
        raise ConfigError(
            "There are other weights already.",
            where=str(target),
            fix="pass --overwrite to replace them, or name another output",
            code="out_not_empty",
        )


def _source(request: WeightsRequest, state: Mapping[str, Tensor]) -> str:
    found = detect_source(state)
    if request.source == "auto":
        if found is None:
            raise CheckpointError(
                "The weights were not recognised.",
                where=f"{request.file}: {len(state)} tensors, the first {', '.join(list(state)[:3])}",
                fix=f"name their --source: {', '.join(SOURCES[:-1])}",
                code="weights_source_unknown",
            )
        if found != "medssl":
            return found
    elif request.source in SOURCES[:-1]:
        if contradicts(request.source, found):
            raise CheckpointError(
                f"These are no {request.source} weights.",
                where=f"{request.file}: its names are those of {found}",
                fix=f"pass --source {found}, or leave it out",
                code="weights_source_wrong",
            )
        return request.source
    else:
        raise ConfigError(
            f"There is no source {request.source!r}.",
            where="--source",
            fix=f"choose auto or one of: {', '.join(SOURCES[:-1])}",
            code="source_unknown",
        )
    raise CheckpointError(
        "These are weights of medssl already.",
        where=str(request.file),
        fix="name the run they come from, or the file with its card X.json beside it, as --model or --init",
        code="weights_own",
    )


def _load(
    request: WeightsRequest,
    config: WeightsConfig,
    state: Mapping[str, Tensor],
    translated: Mapping[str, Tensor],
    source: str,
) -> tuple[VisionTransformer | ConvNeXt, LoadReport]:
    beside = _beside(request.file, "config.json") if source == "hf" else {}
    _refuse_activation(request.file, translated, beside)
    settings = infer_settings(
        translated,
        source,
        num_heads=config.num_heads or beside.get("num_attention_heads"),
        layernorm_eps=config.layernorm_eps or beside.get("layer_norm_eps"),
    )
    model: VisionTransformer | ConvNeXt
    if family_of(translated) == "convnext":
        if request.image_size is not None:
            settings["img_size"] = request.image_size
        model = ConvNeXt(**settings)
    else:
        for name in ("interpolate_offset", "interpolate_antialias", "pos_embed_rope_dtype"):
            if (value := getattr(config, name)) is not None:
                settings[name] = value
        if settings.get("pos_embed_type") == "rope" and "rope_theta" in beside:
            settings["pos_embed_rope_base"] = float(beside["rope_theta"])
        if request.image_size is not None:
            settings["img_size"] = _legal(request.image_size, settings["patch_size"])
        model = _built(settings)
    report = load_into(
        model, state, source=str(request.file), kind=source, role=config.init_from, quiet=True
    )  # strict: all of the backbone, or nothing
    return model.eval(), report


def _built(settings: dict[str, Any]) -> VisionTransformer:
    try:
        return VisionTransformer(**settings)
    except ValueError as error:
        raise CheckpointError(
            "The network of these weights cannot be built.",
            where=str(error),
            fix="pass num_heads=N if its heads are not 64 wide",
            code="weights_foreign",
        ) from error


def _legal(size: int, patch: int) -> int:
    if size % patch:
        below, above = nearest_legal_sizes(size, patch)
        raise ConfigError(
            f"The image size is no multiple of the patch size {patch}.",
            where=f"--image-size {size}",
            fix=f"choose {below} or {above}" if below != above else f"choose {above}",
            code="img_size_illegal",
        )
    return size


def _refuse_activation(file: Path, state: Mapping[str, Tensor], beside: Mapping[str, Any]) -> None:
    """Refuse a network whose activation, which no tensor tells, is another than ours: its features would be wrong."""
    asked, is_gated = beside.get("hidden_act"), "blocks.0.mlp.w12.weight" in state
    ours = ("silu", "swish") if is_gated and beside.get("model_type") == "dinov3_vit" else ("gelu",)
    if asked is not None and asked not in ours:
        raise CheckpointError(
            "The network of these weights cannot be built.",
            where=f"{file.parent / 'config.json'}: hidden_act {str(asked)[:40]!r}, here it is {ours[0]}",
            fix="take weights that were trained with it",
            code="weights_foreign",
        )


def _beside(file: Path, name: str) -> dict[str, Any]:
    """A JSON file that Hugging Face keeps beside the weights; nothing if there is none."""
    path = file.parent / name
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            "A file beside the weights cannot be read.",
            where=f"{path}: {str(error)[:200]}",
            fix="download it again, or move it away",
            code="weights_config_unreadable",
        ) from error
    return data if isinstance(data, dict) else {}


def _seeing(request: WeightsRequest, config: WeightsConfig, source: str, img_size: int) -> dict[str, Any]:
    """How images are prepared for these weights: normalisation, window, size, modality."""
    origin = ORIGINS[source]
    mean: Sequence[float] = origin.mean
    std: Sequence[float] = origin.std
    beside = _beside(request.file, "preprocessor_config.json") if source == "hf" else {}
    if isinstance(beside.get("image_mean"), list) and isinstance(beside.get("image_std"), list):
        mean, std = beside["image_mean"], beside["image_std"]
    modality = None
    # VisionFM's files look like iBOT's, and are taken for them where no source is named
    if config.modality is not None and (source == "visionfm" or (source == "ibot" and find_modality(config.modality))):
        known = resolve_modality(config.modality)
        modality, mean, std = known.name, known.mean, known.std
    elif config.modality is not None:
        modality = config.modality
    elif source == "meddinov3":
        modality = "ct"
    mean, std = config.mean or mean, config.std or std
    if len(mean) != len(std):
        raise ConfigError(
            "Mean and standard deviation have different lengths.",
            where=f"mean {list(mean)}, std {list(std)}",
            fix="give both, one number or one a channel",
            code="normalisation_lengths",
        )
    window = config.window_hu or origin.window_hu
    return {
        "mean": mean[0] if len(mean) == 1 else list(mean),
        "std": std[0] if len(std) == 1 else list(std),
        "modality": modality,
        "preprocess": PreprocessConfig(window_hu=window).model_dump(mode="json"),
        "spatial_size": img_size,
    }


def _write_features(
    target: Path, state: Mapping[str, Tensor], facts: dict[str, Any], notes: list[str], digest: str
) -> dict[str, Any]:
    """VGG-19: a network that measures images, no backbone; its own kind of card."""
    if not digest.startswith(IMAGENET_DIGEST):
        notes.append(f"the SHA-256 begins with {digest[:8]}, torchvision's ImageNet weights with {IMAGENET_DIGEST}")
    kept = {name: t.contiguous().float() for name, t in state.items() if name.startswith("features.")}
    size = sum(tensor.numel() * 4 for tensor in kept.values())
    with atomic_path(target) as temporary, say_disk_errors(target, size):
        save_file(kept, temporary, metadata={"format": "pt"})
        written = file_digest(temporary)
    origin = ORIGINS["vgg19"]
    card = {
        "schema_version": SCHEMA_VERSION,
        "medssl_version": package_version(),
        "kind": "features",
        "family": "vgg19",
        **facts,
        "weights": target.name,
        "sha256": written,
        "n_parameters": sum(tensor.numel() for tensor in kept.values()),
        "dtype": "float32",
        "mean": list(origin.mean),
        "std": list(origin.std),
        "notes": notes,
    }
    write_json(card_path(target), card)
    return card


def _counts(report: LoadReport) -> dict[str, Any]:
    return {
        "matched": len(report.matched),
        "missing": list(report.missing),
        "unexpected": list(report.unexpected),
        "resized": list(report.resized),
    }


def _tell(card: Mapping[str, Any]) -> str:
    """The network and how it sees images, in one line."""
    if card["kind"] == "features":
        return f"vgg19 features, {card['n_parameters']:,} parameters, mean {card['mean']}, std {card['std']}"
    window = card["preprocess"].get("window_hu")
    parts = [
        f"{card['family']}: width {card['embed_dim']}, patch {card['patch_size']}, images of {card['img_size']} px, "
        f"{card['n_parameters']:,} parameters",
        f"mean {_number(card['mean'])}, std {_number(card['std'])}",
        *([f"window {window[0]:g} to {window[1]:g} HU"] if window else []),
    ]
    if "interpolate_offset" in card and card["arch"]["pos_embed_type"] == "learned":
        rule = f"offset {card['interpolate_offset']:g}" if card["interpolate_offset"] else "exact size"
        parts.append(f"positions resized with {rule}{', antialiased' if card['interpolate_antialias'] else ''}")
    return "; ".join(parts)


def _number(value: float | list[float]) -> str:
    return " ".join(f"{v:.4g}" for v in (value if isinstance(value, list) else [value]))
