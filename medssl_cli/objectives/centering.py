"""Teacher logits to targets: a moving centre (Caron et al. 2021) or Sinkhorn-Knopp (Cuturi 2013, Caron et al. 2020).

Both see the batches of all processes, so that two processes give what one gives with the joint batch.
Letters: M rows (crops or masked tokens), K prototypes.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

# A sample whose best logit lies this many nats below that of the batch weighs e^-60 in the first pass, not less:
# the smallest float32 is e^-87, and a weight of zero would end in 0/0.
LOWEST_LOG_WEIGHT = -60.0


class Centering(nn.Module):
    """Softmax of logits minus their moving mean, which keeps one prototype from taking every sample.

    The targets of a step use the means of earlier steps only. What a step's batches hold is summed aside and enters the
    centre in ``update``, once for each optimizer step however many micro-batches there were. After ``update`` the whole
    state is the buffer ``center``, so a run resumed at a step boundary goes on exactly.

    Args:
        prototypes: K.
        momentum: Share of the old centre that is kept.
    """

    center: Tensor

    def __init__(self, prototypes: int, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(prototypes))
        # no buffers: those are broadcast by data-parallel wrappers, and these sums differ between processes
        self._sum_K: Tensor | None = None
        self._rows = 0

    @torch.no_grad()
    def targets(self, logits_MK: Tensor, temperature: float) -> Tensor:
        """(M, K) logits -> (M, K) float32 probabilities, each row sums to 1; M may be 0. The rows enter the centre."""
        self.see(logits_MK)
        return self.softmax(logits_MK, temperature)

    @torch.no_grad()
    def see(self, logits_MK: Tensor) -> None:
        """Let rows enter the centre at the next update."""
        sum_K = logits_MK.sum(0, dtype=torch.float32)
        self._sum_K = sum_K if self._sum_K is None else self._sum_K + sum_K
        self._rows += logits_MK.shape[0]

    @torch.no_grad()
    def softmax(self, logits_MK: Tensor, temperature: float) -> Tensor:
        """The targets of rows that do not enter the centre, or have done so already."""
        return (logits_MK - self.center).div_(temperature).softmax(-1)

    @torch.no_grad()
    def update(self) -> None:
        """Move the centre by the rows seen since the last update in all processes; without any it stays."""
        if self._sum_K is None:
            return
        total = _sum_over_processes(torch.cat([self._sum_K, self._sum_K.new_full((1,), float(self._rows))]))
        mean_K = total[:-1] / total[-1].clamp_min(1)
        moved_K = self.center * self.momentum + mean_K * (1 - self.momentum)
        self.center.copy_(torch.where(total[-1] > 0, moved_K, self.center))
        self._sum_K, self._rows = None, 0


@torch.no_grad()
def sinkhorn_knopp(logits_MK: Tensor, temperature: float, n_iterations: int = 3) -> Tensor:
    """Targets under which the prototypes share the rows of all processes about equally.

    The published form divides Q = exp(logits / T) in turn by prototype sums times K and by row sums times n, at last
    times n. K and n cancel, and Q is always diag(v) E diag(u) with the first E: so only the two scaling vectors are
    iterated, by matrix-vector products, and no count of rows is exchanged. E is divided by the maximum of its row, and
    these maxima by that of the whole, so no exponential overflows and no row is lost.

    Args:
        logits_MK: (M, K), any float dtype; M may be 0 in some processes and differ between them.
        temperature: Divides the logits.
        n_iterations: Passes over prototypes and rows, at least 1.

    Returns:
        (M, K) float32 probabilities; each row sums to 1.
    """
    if n_iterations < 1:
        raise ValueError(f"n_iterations is {n_iterations}, at least 1 is needed")
    with torch.autocast(logits_MK.device.type, enabled=False):
        x_MK = logits_MK.float() / temperature
        best_M = x_MK.amax(1) if len(x_MK) else x_MK.new_empty(0)
        exp_MK = x_MK.sub_(best_M[:, None]).exp_()
        row_M = (best_M - _largest(best_M)).clamp_min(LOWEST_LOG_WEIGHT).exp()
        for _ in range(n_iterations):
            mass_K = _sum_over_processes(torch.mv(exp_MK.T, row_M))
            # divided by their mean, or the scale would run away by M / K in each pass
            prototype_K = (mass_K / mass_K.mean()).clamp_min(torch.finfo(torch.float32).tiny).reciprocal()
            row_M = torch.mv(exp_MK, prototype_K).reciprocal()
        return exp_MK.mul_(prototype_K).mul_(row_M[:, None])


def world_size() -> int:
    """Processes that train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _largest(values_M: Tensor) -> Tensor:
    """Maximum over all rows of all processes; -inf if there are none."""
    largest = torch.cat([values_M, values_M.new_full((1,), -torch.inf)]).amax()
    if world_size() > 1:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest


def _sum_over_processes(values_K: Tensor) -> Tensor:
    if world_size() > 1:
        dist.all_reduce(values_K)
    return values_K
