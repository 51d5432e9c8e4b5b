"""LARS: momentum with a learning rate for each layer, in proportion to the length of its weights (You et al. 2017)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from medssl_cli.engine.distributed import local_piece, whole_tensor


class Lars(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling, as DINO uses it for very large batches.

    For a matrix w with gradient g: u = g + decay * w, scaled by trust * |w| / |u| where both lengths are positive;
    m = momentum * m + u; w = w - lr * m. A tensor of one dimension takes its plain gradient, without decay and scaling.

    Args:
        params: Parameters or groups, as for any optimizer; rates and decay may be set for each group later.
        lr: Learning rate.
        weight_decay: Share of the weights that is added to the gradient.
        momentum: Share of the old direction that is kept.
        trust: Length of an update in units of the length of the weights, before the learning rate.

    Source: You, Gitman and Ginsburg 2017, "Large batch training of convolutional networks".
    """

    def __init__(
        self, params: Any, lr: float = 0.0, weight_decay: float = 0.0, momentum: float = 0.9, trust: float = 0.001
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "trust": trust})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self._step_group(parameters, group)
        return loss

    def _step_group(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        updates = [p.grad for p in parameters if p.grad is not None]
        matrices = [i for i, p in enumerate(parameters) if p.ndim > 1]
        if matrices:
            weights = [parameters[i].detach() for i in matrices]
            scaled = list(torch._foreach_add([updates[i] for i in matrices], weights, alpha=group["weight_decay"]))
            for update, rate in zip(scaled, _rates(weights, scaled, group["trust"]).unbind(), strict=True):
                local_piece(update).mul_(rate)
            for i, update in zip(matrices, scaled, strict=True):
                updates[i] = update
        moments = []
        for parameter in parameters:
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            moments.append(state["momentum_buffer"])
        torch._foreach_mul_(moments, group["momentum"])
        torch._foreach_add_(moments, updates)
        torch._foreach_add_(parameters, moments, alpha=-group["lr"])


def _rates(weights: list[Tensor], updates: list[Tensor], trust: float) -> Tensor:
    """trust * |w| / |u| of each pair, 1 where either has no length; one number a pair, over all shards."""
    weight_P, update_P = (whole_tensor(torch.stack(torch._foreach_norm(tensors))) for tensors in (weights, updates))
    return torch.where((weight_P > 0) & (update_P > 0), trust * weight_P / update_P, 1.0)
