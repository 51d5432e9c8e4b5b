"""Attention rollout: how much each patch token reaches the CLS token through all blocks.

Only the row of the CLS token is wanted, so a row vector is handed back from the last block to the first instead of
whole matrices being multiplied: memory grows with the tokens, not with their square.

Letters: B samples, S sequences, N patch tokens of one sequence, T all tokens of one sample, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from medssl_cli.core.protocols import Features
from medssl_cli.models.layers import Rope
from medssl_cli.models.vit import VisionTransformer


@torch.inference_mode()
def features_and_rollout(
    model: VisionTransformer, images_BSHW: Tensor, available_BS: Tensor | None = None
) -> tuple[Features, Tensor]:
    """One forward pass, and the rollout of its attention.

    The attention of each block, averaged over heads, is mixed half and half with the identity, for the residual
    branch, and the blocks are multiplied; what comes back is the row of the CLS token.

    Returns:
        Features, and (B, S*N) float32, non-negative; what is missing to a sum of 1 stays with CLS and registers.

    Source: Abnar and Zuidema 2020.
    """
    blocks = list(model.flat_blocks())
    with _inputs_of(blocks) as inputs:
        features = model(images_BSHW, None, available_BS)
    samples = len(images_BSHW)
    groups = ((samples, len(inputs[0][0]) // samples),)
    share_BT = torch.zeros(groups[0], device=images_BSHW.device)
    share_BT[:, 0] = 1.0
    for block in reversed(blocks):
        x_TD, rope = inputs.pop()
        share_BT = 0.5 * share_BT + 0.5 * block.attn.carried(block.norm1(x_TD), groups, share_BT, rope)
    return features, share_BT[:, -features.patches_BND.shape[1] :]


@contextmanager
def _inputs_of(blocks: list[Any]) -> Iterator[list[tuple[Tensor, Rope | None]]]:
    """The tokens that go into each block during the passes within, and their rotary positions."""
    inputs: list[tuple[Tensor, Rope | None]] = []

    def keep(block: nn.Module, given: tuple[Any, ...]) -> None:
        x_TD, _, _, rope = given  # as the backbone calls its blocks
        inputs.append((x_TD, rope))

    hooks = [block.register_forward_pre_hook(keep) for block in blocks]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()
