"""A trained segmentation network with what belongs to it: one weight file and one card, whole by themselves.

``best.safetensors`` holds every tensor, frozen ones too, and ``model.json`` all that is needed to build the network
and to show it a case as training did; the backbone or the VGG file that training began from is not needed again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from medssl_cli.core.digest import file_digest
from medssl_cli.core.errors import CheckpointError
from medssl_cli.core.run import SCHEMA_VERSION, atomic_path, hide_home, say_disk_errors, to_json
from medssl_cli.data.preprocess import PreprocessConfig
from medssl_cli.models.convnext import ConvNeXt
from medssl_cli.models.dense_decoder import DecoderConfig, DenseNetwork
from medssl_cli.models.dual_encoder import DualEncoderConfig, DualEncoderUNet
from medssl_cli.models.vit import VisionTransformer
from medssl_cli.objectives.supervised import load_weights
from medssl_cli.services.devices import describe_device
from medssl_cli.services.lookup import SEGMENTER_CARD, SEGMENTER_WEIGHTS, read_segmenter_card

log = logging.getLogger(__name__)

PLAIN = ("image",)
"""The one sequence of a network for plain pictures."""
VIT_DECODER, COCOSEG = "vit_decoder", "cocoseg"
"""Names of the networks in a card."""


@dataclass(frozen=True)
class Segmenter:
    """A segmentation network and the preparation that it was trained with.

    Args:
        run: Its run folder.
        card: ``model.json``.
        network: In evaluation mode on ``device``, with the averaged weights.
        task: ``semantic`` or ``ct-pet``.
        classes: Names by class index; the first is the background.
        outputs: Logits of a pixel: 1 (sigmoid) for one structure, else one a class.
        device: Where it computes.
        threshold: Probability at which a pixel belongs to the one structure; None for several.
        sequences: Names in channel order; ``image`` for plain pictures.
        preprocess: From files to one grid and to intensity limits.
        mean, std: One number, or one a channel of a slice.
        tile: Side in pixels of the window that it was trained on.
        pixel_mm: Side of a pixel in mm at which volumes are shown; None: the smaller one of the slice. Pictures have
            none.
        context: Neighbouring slices on each side of the one that is segmented.
        windows_hu: (name, low, high) of the windows that make the channels of a picture from a CT volume.
    """

    run: Path
    card: dict[str, Any]
    network: nn.Module
    task: str
    classes: tuple[str, ...]
    outputs: int
    device: torch.device
    threshold: float | None
    sequences: tuple[str, ...]
    preprocess: PreprocessConfig
    mean: float | tuple[float, ...]
    std: float | tuple[float, ...]
    tile: int
    pixel_mm: float | None
    context: int
    windows_hu: tuple[tuple[str, float, float], ...] = ()

    @property
    def pictures(self) -> bool:
        """It was trained on plain pictures, not on slices of volumes."""
        return self.card.get("kind") == "images"

    @property
    def plain(self) -> bool:
        """Its channels are the colours of one picture, or windows of one volume, not sequences of a case."""
        return self.sequences == PLAIN

    @property
    def channels(self) -> int:
        """Channels of one slice; a grey picture is repeated to as many."""
        return int(self.card.get("channels") or len(self.sequences))


# --- cards -----------------------------------------------------------------------------------------------------------


def network_facts(network: nn.Module) -> dict[str, Any]:
    """What ``model.json`` says under ``network``: enough to build it without any other file.

    Raises:
        ValueError: A network of another kind.
    """
    if isinstance(network, DenseNetwork):
        backbone = network.backbone
        family = "vit" if isinstance(backbone, VisionTransformer) else "convnext"
        return {"name": VIT_DECODER, "family": family, "arch": backbone.settings, "decoder": network.settings()}
    if isinstance(network, DualEncoderUNet):
        return {"name": COCOSEG, "settings": network.settings()}
    raise ValueError(f"no card is known for a {type(network).__name__}")


def build_network(facts: Mapping[str, Any]) -> nn.Module:
    """A network as ``network_facts`` tells of it, with random weights; torch's generators are left as they were.

    Raises:
        KeyError, TypeError, ValueError: The facts are not whole.
    """
    makers: dict[str, Callable[[Mapping[str, Any]], nn.Module]] = {VIT_DECODER: _vit_decoder, COCOSEG: _cocoseg}
    if facts.get("name") not in makers:
        raise ValueError(f"network {facts.get('name')!r}; this program knows {', '.join(makers)}")
    with torch.random.fork_rng(devices=[]):
        return makers[facts["name"]](facts)


def _vit_decoder(facts: Mapping[str, Any]) -> DenseNetwork:
    families: dict[str, type[VisionTransformer] | type[ConvNeXt]] = {"vit": VisionTransformer, "convnext": ConvNeXt}
    settings = dict(facts["decoder"])
    config = DecoderConfig.model_validate(settings.pop("config"))
    return DenseNetwork(families[facts["family"]](**facts["arch"]), config=config, **settings)


def _cocoseg(facts: Mapping[str, Any]) -> DualEncoderUNet:
    settings = facts.get("settings") or {key: value for key, value in facts.items() if key != "name"}
    return DualEncoderUNet(DualEncoderConfig.model_validate(settings))


# --- on disk ---------------------------------------------------------------------------------------------------------


def write_model(run: Path, tensors: Mapping[str, Tensor], card: Mapping[str, Any]) -> dict[str, Any]:
    """Write ``best.safetensors`` and then ``model.json``, each whole or not at all.

    Both are on the disk under other names before the first takes its place, so that next to nothing lies between the
    two; a card that tells of other weights is noticed by ``open_segmenter``.

    Args:
        run: Run folder.
        tensors: ``SupervisedSegmentation.weights()``.
        card: All of ``model.json`` but the digest of the weights.

    Returns:
        The card as written.

    Raises:
        ResourceError: The disk is full; older files are as they were.
    """
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    size = sum(tensor.numel() * tensor.element_size() for tensor in held.values())
    card_file, weights = run / SEGMENTER_CARD, run / SEGMENTER_WEIGHTS
    with atomic_path(card_file) as new_card, atomic_path(weights) as new_weights, say_disk_errors(weights, size):
        save_file(held, new_weights, metadata={"format": "pt"})
        written = {"schema_version": SCHEMA_VERSION, **card, "sha256": file_digest(new_weights)}
        new_card.write_text(to_json(written) + "\n", encoding="utf-8")
    return written


def open_segmenter(run: Path, device: torch.device) -> Segmenter:
    """The network of a segmentation run with its averaged weights, in evaluation mode.

    Args:
        run: Folder of `medssl segment`; ``FoundModel.segmenter``.
        device: Where it will compute.

    Raises:
        CheckpointError: Card or weights missing, truncated, altered, or not of one make.
    """
    card = read_segmenter_card(run)
    tensors = _read_tensors(run / SEGMENTER_WEIGHTS, card)
    try:
        network = build_network(card["network"])
    except (KeyError, TypeError, ValueError, ValidationError) as error:
        raise _refused(run / SEGMENTER_CARD, f"its network cannot be built: {_short(error)}") from error
    load_weights(network, tensors, "ema")
    log.info("Model: %s, on %s", hide_home(str(run)), describe_device(device))
    return segmenter_of(run, card, network.requires_grad_(False).to(device).eval(), device)


def segmenter_of(run: Path, card: Mapping[str, Any], network: nn.Module, device: torch.device) -> Segmenter:
    """A network with what its card tells of it.

    Args:
        run: Run folder, for messages.
        card: ``model.json``, or what is known of it while training.
        network: On ``device``.
        device: Where it computes.

    Raises:
        CheckpointError: The card does not tell all that is needed.
    """
    try:
        return Segmenter(
            run=run,
            card=dict(card),
            network=network,
            task=str(card["task"]),
            classes=tuple(str(name) for name in card["classes"]),
            outputs=int(card["outputs"]),
            device=device,
            threshold=None if card.get("threshold") is None else float(card["threshold"]),
            sequences=tuple(card.get("sequences") or PLAIN),
            preprocess=PreprocessConfig.model_validate(card.get("preprocess") or {}),
            mean=_numbers(card["mean"]),
            std=_numbers(card["std"]),
            tile=int(card["tile"]),
            pixel_mm=None if card.get("pixel_mm") is None else float(card["pixel_mm"]),
            context=int(card.get("context") or 0),
            windows_hu=tuple((str(name), float(low), float(high)) for name, low, high in card.get("windows_hu") or ()),
        )
    except (KeyError, TypeError, ValueError, ValidationError) as error:
        raise _refused(run / SEGMENTER_CARD, f"it does not tell how images are prepared: {_short(error)}") from error


def _read_tensors(path: Path, card: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a weight file whose digest is that of its card; nothing but tensors is read from it."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise _refused(path, _short(error)) from error
    digest = file_digest(path)
    if digest != card.get("sha256"):
        raise _refused(path, f"SHA-256 {digest[:16]}…, its card tells {str(card.get('sha256'))[:16]}…")
    return tensors


def _refused(path: Path, detail: str) -> CheckpointError:
    return CheckpointError(
        "The segmentation network cannot be loaded.",
        where=f"{hide_home(str(path))}: {detail}",
        fix=f"copy the whole run folder again: {SEGMENTER_WEIGHTS} and {SEGMENTER_CARD} go together; or train again",
        code="segmenter_rejected",
    )


def _short(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _numbers(value: float | list[float] | tuple[float, ...]) -> float | tuple[float, ...]:
    return tuple(float(v) for v in value) if isinstance(value, (list, tuple)) else float(value)
