"""One process of two (gloo) that trains on its part of a batch. Run: two_segmenters.py RANK WORLD STORE OUT."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from supervised_parts import NetworkWithoutNorm, make_batch, make_objective, part_of

from medssl_cli.core.protocols import LabelledBatch
from medssl_cli.engine.distributed import Alone, Parallel, Replicated
from medssl_cli.objectives.supervised import SupervisedSegmentation


def own_part(batch: LabelledBatch, rank: int, world: int, first: int) -> LabelledBatch:
    """All samples, or the first ones in process 0 and the rest in process 1."""
    return batch if world == 1 else part_of(batch, [slice(0, first), slice(first, None)][rank])


def train(rank: int, world: int) -> dict[str, Any]:
    """Three steps of plain descent, two micro-batches each, with the gradients averaged by DDP."""
    objective = make_objective(network=NetworkWithoutNorm, ema_decay=0.9)
    parallel: Parallel = Alone(objective) if world == 1 else Replicated(objective)
    optimizer = torch.optim.SGD([p for p in objective.network.parameters() if p.requires_grad], lr=0.2)
    objective.start_epoch()
    for step in range(3):
        optimizer.zero_grad()
        for micro in range(2):
            batch = own_part(make_batch(6, seed=10 * step + micro), rank, world, first=3)
            with parallel.synchronising(last=micro == 1):
                (torch.stack(list(parallel.losses(batch, {}).values())).sum() / 2).backward()
        optimizer.step()
        objective.after_step({})
    return {"state": objective.state_dict(), "figures": known_figures(objective)}


def known_figures(objective: SupervisedSegmentation) -> dict[str, float]:
    return {name: value for name, value in objective.epoch_figures().items() if value is not None}


def count_unequal_parts(rank: int, world: int) -> dict[str, float]:
    """Figures of one batch of 7, of which process 0 sees 5."""
    objective: SupervisedSegmentation = make_objective(network=NetworkWithoutNorm)
    objective.losses(own_part(make_batch(7), rank, world, first=5), {})
    objective.after_step({})
    return known_figures(objective)


if __name__ == "__main__":
    own_rank, own_world, store, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=own_rank, world_size=own_world)
    torch.save({"trained": train(own_rank, own_world), "counted": count_unequal_parts(own_rank, own_world)}, out)
    dist.destroy_process_group()
