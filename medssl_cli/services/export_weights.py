"""medssl convert weights --target: a backbone of this program as a file that other programs load.

The file holds tensors alone; what no tensor tells (heads, eps, how images are prepared) and what became of every name
stands in a JSON beside it. Reading back a file of DINOv2 or timm is ``medssl convert weights`` without ``--target``.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from medssl_cli.core.digest import file_digest
from medssl_cli.core.errors import ConfigError
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
from medssl_cli.models.convnext import ConvNeXt
from medssl_cli.models.dense_decoder import DenseNetwork
from medssl_cli.models.layers import nearest_legal_sizes
from medssl_cli.models.outward import Outward, Target, to_target
from medssl_cli.models.vit import VisionTransformer
from medssl_cli.models.zoo import load_backbone
from medssl_cli.services.lookup import FoundModel, find_model
from medssl_cli.services.segmenter import open_segmenter

ENCODER = "encoder."
"""What the networks of nnU-Net call their backbone."""
_PICKLES = (".pth", ".pt")
_SHOWN_CARD = ("mean", "std", "modality", "preprocess", "spatial_size", "windows_hu", "sequences")
"""How images are prepared."""


@dataclass(frozen=True)
class ExportRequest:
    """What is asked for.

    Args:
        model: Run folder or weight file of a backbone, or the run of a segmentation network or a head.
        out: File to write.
        target: Whose names; None is refused, for options of an export were given without it.
        prefix: Put before every name, for nnunet; ``encoder.`` if not given.
        sequence: Fold the embedding of this sequence into the patch convolution.
        source: Of the command; has to be ``auto``.
        image_size: Side in pixels for which positions are stored; the backbone's own if not given.
        overwrite: Replace another file at ``out``.
        overrides: Of the command; has to be empty.
    """

    model: Path
    out: Path
    target: Target | None
    prefix: str | None = None
    sequence: str | None = None
    source: str = "auto"
    image_size: int | None = None
    overwrite: bool = False
    overrides: tuple[str, ...] = ()


def export_weights(request: ExportRequest) -> Result:
    """Read, rename and write.

    Raises:
        CheckpointError: The model cannot be read.
        ConfigError: Options that contradict each other, a backbone that the target has no place for, or another file
            at ``out``.
        ResourceError: The disk is full; an older file is as it was.
    """
    started = time.time()
    target = _checked_target(request)
    prefix = _prefix(request)
    found = find_model(request.model)
    if request.out.exists() and request.out.samefile(found.weights):
        raise _bad_out("Weights are not exported onto themselves.", request.out, "name another file", "out_is_input")
    model, origin = _open(found)
    _refuse_illegal_size(model, request.image_size)
    out = to_target(model, target, sequence=request.sequence, img_size=request.image_size)
    tensors = {f"{prefix}{name}": tensor for name, tensor in out.tensors.items()}
    if target == "nnunet":
        out.notes.append(_nnunet_note())
    facts = _facts(request, target, prefix, found, model, origin, out)
    _refuse_losing(request, facts)
    facts |= {"sha256": _write(request.out, tensors, target), **_sizes(tensors)}
    beside = facts_path(request.out)
    write_json(beside, facts)
    lines = [*_lines(facts, out), f"written: {hide_home(str(request.out))} and {beside.name}"]
    header = result_header("convert weights", started)
    return Result(lines, {**header, "weights": str(request.out), "export": facts})


def facts_path(path: Path) -> Path:
    """``X.pth.json`` beside ``X.pth``; ``X.json`` would be the card of a backbone ``X.safetensors``."""
    return path.with_name(f"{path.name}.json")


# --- options ---------------------------------------------------------------------------------------------------------


def _checked_target(request: ExportRequest) -> Target:
    """The target, with options that contradict it refused."""
    if request.target is None:
        given = {"--prefix": request.prefix, "--sequence": request.sequence}
        raise _needless(
            "These options belong to --target.",
            [name for name, value in given.items() if value is not None],
            "name a target: nnunet, dinov2 or timm; or leave them out",
        )
    idle = [] if request.source == "auto" else [f"--source {request.source}"]
    idle += list(request.overrides)
    if idle:
        raise _needless(
            "--target exports a backbone of this program, whose card tells all about it.",
            idle,
            "leave them out; --source and KEY=VALUE are for files of other programs, read without --target",
        )
    if request.prefix is not None and request.target != "nnunet":
        raise _needless(
            "--prefix belongs to --target nnunet.",
            [f"--prefix {request.prefix}, --target {request.target}"],
            "leave it out: the names of this target are fixed",
        )
    endings = (*_PICKLES, ".safetensors") if request.target == "timm" else _PICKLES
    if request.out.suffix not in endings:
        raise _bad_out(
            "The output is a weight file of another program.",
            request.out,
            f"name a file that ends in {' or '.join(endings)}",
            "out_suffix",
        )
    if request.out.is_dir():
        raise _bad_out("The output file is a folder.", request.out, "name a file", "out_is_folder")
    return request.target


def _prefix(request: ExportRequest) -> str:
    if request.target != "nnunet":
        return ""
    prefix = ENCODER if request.prefix is None else request.prefix
    if not re.fullmatch(r"(?:\w+\.)*", prefix):
        raise ConfigError(
            "The prefix is put before every name as it is, and has to end with a dot.",
            where=f"--prefix {prefix}",
            fix="write it as in encoder. or network.encoder. ('' for none)",
            code="prefix_illegal",
        )
    return prefix


def _needless(what: str, options: list[str], fix: str) -> ConfigError:
    return ConfigError(what, where=", ".join(options), fix=fix, code="config_without_effect")


def _bad_out(what: str, path: Path, fix: str, code: str) -> ConfigError:
    return ConfigError(what, where=hide_home(str(path)), fix=fix, code=code)


def _refuse_illegal_size(model: VisionTransformer | ConvNeXt, size: int | None) -> None:
    if size is not None and size % model.patch_size:
        below, above = nearest_legal_sizes(size, model.patch_size)
        raise ConfigError(
            f"The image size is no multiple of the patch size {model.patch_size}.",
            where=f"--image-size {size}",
            fix=f"choose {below} or {above}" if below != above else f"choose {above}",
            code="img_size_illegal",
        )


def _refuse_losing(request: ExportRequest, facts: Mapping[str, Any]) -> None:
    """Refuse to replace a file that is not an older export of the same."""
    if request.overwrite or not request.out.exists():
        return
    try:
        older = json.loads(facts_path(request.out).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        older = {}
    same = ("source_sha256", "target", "prefix", "sequence", "image_size")
    if not isinstance(older, dict) or any(older.get(key, "") != facts[key] for key in same):
        raise _bad_out(
            "There are other weights already.",
            request.out,
            "pass --overwrite to replace them, or name another output",
            "out_not_empty",
        )


# --- steps -----------------------------------------------------------------------------------------------------------


def _open(found: FoundModel) -> tuple[VisionTransformer | ConvNeXt, dict[str, Any]]:
    """The backbone and its card; of a segmentation network the backbone inside, as it was trained there."""
    if found.segmenter is None:
        return load_backbone(found.weights)
    segmenter = open_segmenter(found.segmenter, torch.device("cpu"))
    if not isinstance(segmenter.network, DenseNetwork):
        raise ConfigError(
            "This segmentation network has no backbone to export.",
            where=f"{hide_home(str(found.segmenter))}: task {segmenter.task}, one U-Net from end to end",
            fix="name the run of a `medssl segment --task semantic`, or of `medssl pretrain`",
            code="model_without_backbone",
        )
    return segmenter.network.backbone, segmenter.card


def _facts(
    request: ExportRequest,
    target: Target,
    prefix: str,
    found: FoundModel,
    model: VisionTransformer | ConvNeXt,
    card: Mapping[str, Any],
    out: Outward,
) -> dict[str, Any]:
    """The JSON beside the weights, but for their digest and size."""
    img_size = request.image_size or model.img_size
    backbone_of = "segmentation network" if found.segmenter else "head" if found.head else "backbone"
    if found.segmenter is not None:
        trained = "frozen in training: as it was before" if _was_frozen(card) else "trained with the decoder, averaged"
        out.notes.append(f"the backbone of a segmentation network, {trained}")
    return {
        "schema_version": SCHEMA_VERSION,
        "medssl_version": package_version(),
        "kind": "exported_backbone",
        "target": target,
        "names_of": out.family,
        "prefix": prefix,
        "weights": request.out.name,
        "source": hide_home(str(found.weights)),
        "source_sha256": card.get("sha256"),
        "backbone_of": backbone_of,
        "sequence": request.sequence,
        "image_size": request.image_size,
        "network": {"class": type(model).__name__, **model.settings, "img_size": img_size},
        "images": {key: card[key] for key in _SHOWN_CARD if card.get(key) is not None},
        "renamed": {old: f"{prefix}{new}" for old, new in out.renamed.items()},
        "changed": {f"{prefix}{name}": how for name, how in out.changed.items()},
        "left_out": out.left_out,
        "notes": out.notes,
        "load": _loading(target, out),
    }


def _was_frozen(card: Mapping[str, Any]) -> bool:
    return bool(card["network"]["decoder"].get("freeze_backbone"))


def _loading(target: Target, out: Outward) -> str:
    """How the file is read, in a line."""
    if target == "nnunet":
        return "torch.load(FILE, weights_only=True)['network_weights']"
    if target == "dinov2":
        return (
            f"torch.load(FILE, weights_only=True)['teacher']; or medssl convert weights FILE DIR --source {out.source}"
        )
    return "timm.create_model(..., checkpoint_path=FILE); or medssl convert weights FILE DIR --source timm"


def _nnunet_note() -> str:
    return (
        "-pretrained_weights of nnU-Net wants every tensor of the network but those with .seg_layers. in their name; "
        "for a network with more than backbone and segmentation layers, load network_weights with strict=False"
    )


def _write(path: Path, tensors: dict[str, Tensor], target: Target) -> str:
    """Write the file whole or not at all; its SHA-256."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    with atomic_path(path) as temporary, say_disk_errors(path, size):
        if path.suffix == ".safetensors":
            save_file(tensors, temporary, metadata={"format": "pt"})
        else:
            nests = {"nnunet": {"network_weights": tensors}, "dinov2": {"teacher": _below_backbone(tensors)}}
            with temporary.open("wb") as file:  # given a path, torch would write its name into the file
                torch.save(nests.get(target, tensors), file)
        return file_digest(temporary)


def _below_backbone(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"backbone.{name}": tensor for name, tensor in tensors.items()}


def _sizes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {
        "n_tensors": len(tensors),
        "n_numbers": sum(tensor.numel() for tensor in tensors.values()),
        "shapes": {name: list(tensor.shape) for name, tensor in tensors.items()},
    }


# --- words -----------------------------------------------------------------------------------------------------------


def _lines(facts: Mapping[str, Any], out: Outward) -> list[str]:
    held = f"{facts['n_tensors']} tensors of the {facts['backbone_of']} under the names of {out.family}"
    lines = [held + (f", each after {facts['prefix']!r}" if facts["prefix"] else "")]
    for label, arrow in (("renamed", "->"), ("changed", ":"), ("left_out", ":")):
        told: Mapping[str, str] = getattr(out, label)
        if told:
            shown = "; ".join(
                f"{name}{'' if arrow == ':' else ' '}{arrow} {text}" for name, text in list(told.items())[:6]
            )
            more = f"; and {len(told) - 6} more" if len(told) > 6 else ""
            lines.append(f"{label.replace('_', ' ')} {len(told)}: {shown}{more}")
    lines += [f"note: {note}" for note in out.notes]
    return [*lines, f"load: {facts['load']}"]
