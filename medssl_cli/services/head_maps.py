"""Heat maps of a trained head: which patch tokens raise the output of the whole case.

The gradient runs from one output of the case (its logit, through the head and the pooling over slices) to the slice
vectors, and from each slice vector to the patch tokens that it is made of. The first step is cheap and done once; the
second goes through the network a few slices at a time, so that memory does not grow with the slices.

Where the gradient is taken matters. A CLS token reads the patch tokens after the first norm of a block. Before that
norm the output does not change when a token is scaled, so that gradient times token would be zero by Euler's theorem,
whatever the head has learned; behind the norm it is not. The mean of the patch tokens is read after the final norm.

Letters: N slices, B slices computed together, S sequences, H W pixels, h w patches, P cls and register tokens, T all
tokens of one slice, D width of a token, V width of a slice vector.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from medssl_cli.core.errors import ConfigError, NonFiniteError
from medssl_cli.core.run import hide_home
from medssl_cli.models.convnext import ConvNeXt
from medssl_cli.models.layers import Block
from medssl_cli.models.vit import VisionTransformer

if TYPE_CHECKING:
    from medssl_cli.services.backbone import Planes
    from medssl_cli.services.embedding import Embedder
    from medssl_cli.services.head import Head

HeadMethod = Literal["head", "gradcam"]


class Reading(NamedTuple):
    """Patch tokens that part of a slice vector is read from, and the gradient of the output with respect to them.

    Both (B, S, h, w, D).
    """

    tokens_BShwD: Tensor
    gradient_BShwD: Tensor


def head_heat(
    head: Head,
    embedder: Embedder,
    planes: Planes,
    slices_NV: np.ndarray,
    indices_N: np.ndarray,
    *,
    output: int,
    method: HeadMethod,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """(N, h, w) float32, not negative: relevance of every patch for one output of the case.

    Args:
        head: Trained on slice vectors of this backbone.
        embedder: The backbone with the head's own settings.
        planes: The slices.
        slices_NV: Their vectors, from ``embedder``.
        indices_N: Their positions.
        output: Which output of the head, from 0.
        method: ``head``: gradient times token. ``gradcam``: the gradient averaged over the patch tokens of a slice
            weighs the channels.
        progress: Told slices done and in all.

    Raises:
        ConfigError: The head has no gradient, or the network cannot tell it.
        NonFiniteError: The gradient is not finite.

    Source: gradient x input, Shrikumar et al. 2017; Grad-CAM, Selvaraju et al. 2017, with tokens for a feature map.
    """
    model, config = embedder.backbone.model, embedder.config
    gradient_NV = case_gradient(head, slices_NV, output)
    available_S = np.asarray(planes.available_S)
    heat: list[np.ndarray] = []
    for start in range(0, len(indices_N), config.batch_size):
        places = slice(start, start + config.batch_size)
        images_BSHW = embedder.network_input(planes, indices_N[places])
        readings = readings_of(model, images_BSHW, available_S, config, gradient_NV[places])
        heat.append(relevance(readings, method, available_S).float().cpu().numpy())
        if progress is not None:
            progress(start + len(heat[-1]), len(indices_N))
    heat_Nhw = np.concatenate(heat)
    if not np.isfinite(heat_Nhw).all():
        raise NonFiniteError(
            "The gradient of the head is not finite.",
            where=f"{hide_home(str(head.folder))}, output {head.classes[output]}",
            fix="pass heatmap_method=similarity, or train the head again",
            code="gradient_nonfinite",
        )
    return heat_Nhw


def case_gradient(head: Head, slices_NV: np.ndarray, output: int) -> Tensor:
    """(N, V): gradient of one logit of the case with respect to each slice vector, through head and pooling.

    Raises:
        ConfigError: The head is no differentiable function of the slice vectors.
    """
    like = next(iter(head.module.state_dict().values()))
    with torch.inference_mode(False), torch.enable_grad():
        slices = torch.from_numpy(np.array(slices_NV)).to(like).requires_grad_()
        logit = head.logits(slices)[output]
        gradient = torch.autograd.grad(logit, slices, allow_unused=True)[0] if logit.requires_grad else None
    if gradient is None:
        raise ConfigError(
            "The head has no gradient that a heat map could follow.",
            where=hide_home(str(head.folder)),
            fix="pass heatmap_method=rollout or similarity",
            code="heatmap_without_gradient",
        )
    return gradient.detach()


def relevance(readings: Sequence[Reading], method: HeadMethod, available_S: np.ndarray) -> Tensor:
    """(B, h, w): what the readings add up to for each patch; below zero nothing, summed over sequences that exist."""
    signed_BShw: Any = 0.0
    exist = torch.from_numpy(available_S[: readings[0].tokens_BShwD.shape[1]].astype(bool))
    for tokens, gradient in readings:
        there = exist.to(tokens.device)
        tokens, gradient = tokens[:, there], gradient[:, there]
        if method == "gradcam":
            gradient = gradient.mean((1, 2, 3), keepdim=True)
        signed_BShw = signed_BShw + (tokens * gradient).sum(-1)
    return signed_BShw.clamp_min(0).sum(1)


# --- gradient of patch tokens ----------------------------------------------------------------------------------------


def readings_of(
    model: VisionTransformer | ConvNeXt,
    images_BSHW: Tensor,
    available_S: np.ndarray,
    config: Any,
    gradient_BV: Tensor,
) -> list[Reading]:
    """The patch tokens that the vectors of some slices are read from, and the gradient with respect to each.

    Args:
        model: The network; its parameters take no gradient meanwhile.
        images_BSHW: Normalised slices.
        available_S: Which sequences exist.
        config: ``tokens`` and ``layers`` of the slice vector.
        gradient_BV: Gradient of the output with respect to the vector of each slice.
    """
    with torch.inference_mode(False), torch.enable_grad(), _frozen(model):
        like = next(model.parameters())
        images_BSHW = images_BSHW.clone().to(like)  # one made in inference mode cannot be part of a gradient
        gradient_BV = gradient_BV.clone().to(like)
        if isinstance(model, ConvNeXt):
            return _convolutional(model, images_BSHW, config, gradient_BV)
        available_BS = None
        if model.sequences is not None:
            available_BS = torch.from_numpy(np.array(available_S)).to(like.device).expand(len(images_BSHW), -1)
        return _transformer(model, images_BSHW, available_BS, config, gradient_BV)


def _transformer(
    model: VisionTransformer, images_BSHW: Tensor, available_BS: Tensor | None, config: Any, gradient_BV: Tensor
) -> list[Reading]:
    parts = dict(zip(_parts(config), gradient_BV.split(model.embed_dim, dim=1), strict=True))
    layers = config.layers if "cls" in config.tokens else 0
    blocks = list(model.flat_blocks())
    wanted = range(len(blocks) - max(layers, 1), len(blocks))
    with _norm_outputs([blocks[i] for i in wanted] if layers else []) as normed:
        features = model.forward_layers(images_BSHW, list(wanted), None, available_BS)
    readings = []
    grid = features[-1].grid
    if layers:
        score = sum((parts[f"cls{i}"] * features[i].cls_BD).sum() for i in range(layers))
        gradients = torch.autograd.grad(score, normed)
        for tokens_TD, gradient_TD in zip(normed, gradients, strict=True):
            readings.append(Reading(*(_patches(x, grid, len(images_BSHW)) for x in (tokens_TD, gradient_TD))))
    if "mean" in config.tokens:
        patches_BShwD = features[-1].patches_BND.detach().unflatten(1, grid)
        readings.append(_of_mean(patches_BShwD, parts["mean"], available_BS))
    return readings


def _patches(tokens_TD: Tensor, grid: tuple[int, int, int], samples: int) -> Tensor:
    """(B*T, D) -> (B, S, h, w, D): the patch tokens, which come last."""
    return tokens_TD.detach().unflatten(0, (samples, -1))[:, -math.prod(grid) :].unflatten(1, grid)


def _of_mean(patches_BShwD: Tensor, gradient_BD: Tensor, available_BS: Tensor | None) -> Reading:
    """A mean passes the same gradient to every token that it is made of."""
    samples, sequences, rows, columns, _ = patches_BShwD.shape
    there_BS = patches_BShwD.new_ones(samples, sequences) if available_BS is None else available_BS.to(patches_BShwD)
    share_BS = there_BS / (there_BS.sum(1, keepdim=True) * rows * columns)
    gradient = share_BS[:, :, None, None, None] * gradient_BD[:, None, None, None]
    return Reading(patches_BShwD, gradient.expand_as(patches_BShwD))


def _convolutional(model: ConvNeXt, images_BSHW: Tensor, config: Any, gradient_BV: Tensor) -> list[Reading]:
    parts = dict(zip(_parts(config), gradient_BV.split(model.embed_dim, dim=1), strict=True))
    map_BDhw = model.forward_maps(images_BSHW)[-1].detach().requires_grad_()
    readings = []
    if "cls0" in parts:  # the norm of the mean over all places
        score = (parts["cls0"] * model.norm(map_BDhw.mean((-2, -1)))).sum()
        (gradient,) = torch.autograd.grad(score, map_BDhw)
        readings.append(Reading(*(x.detach().permute(0, 2, 3, 1)[:, None] for x in (map_BDhw, gradient))))
    if "mean" in parts:
        patches = model.norm(map_BDhw.detach().permute(0, 2, 3, 1))[:, None]
        readings.append(_of_mean(patches, parts["mean"], None))
    return readings


def _parts(config: Any) -> list[str]:
    """What lies end to end in a slice vector."""
    names: list[str] = []
    for token in config.tokens:
        names += {"cls": [f"cls{i}" for i in range(config.layers)], "mean": ["mean"], "patch": []}[token]
    return names


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Parameters take no gradient within: the graph begins at the tokens and holds the last blocks alone."""
    took = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in took:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in took:
            parameter.requires_grad_(True)


@contextmanager
def _norm_outputs(blocks: Sequence[Block]) -> Iterator[list[Tensor]]:
    """Outputs (B*T, D) of the first norm of each block during the pass within; the graph begins at the first."""
    kept: list[Tensor] = []

    def keep(_module: nn.Module, _given: Any, out_TD: Tensor) -> Tensor:
        kept.append(out_TD if kept else out_TD.detach().requires_grad_())
        return kept[-1]

    hooks = [block.norm1.register_forward_hook(keep) for block in blocks]
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()
