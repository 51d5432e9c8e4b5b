"""One process of two (gloo): its half of a batch; writes what it found. Run: two_processes.py RANK WORLD STORE OUT."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from conftest import SEQUENCES, make_batch, make_objective
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from medssl_cli.core.protocols import Batch
from medssl_cli.objectives.centering import Centering, sinkhorn_knopp
from medssl_cli.objectives.self_distillation import SelfDistillation

VALUES = {"teacher_temp": 0.07, "momentum": 0.9}


def part_of(batch: Batch, rank: int, world: int) -> Batch:
    """The samples of one process, all views of each."""
    samples = len(batch.available_BS) // world
    keep = slice(rank * samples, (rank + 1) * samples)

    def cut(crops: torch.Tensor) -> torch.Tensor:
        return crops.unflatten(0, (-1, samples * world))[:, keep].flatten(0, 1)

    assert batch.local_VSHW is not None
    return Batch(
        cut(batch.global_VSHW),
        cut(batch.local_VSHW),
        cut(batch.token_mask_VN),
        batch.available_BS[keep],
        batch.case_ids[keep],
    )


def mean_over_processes(tensor: torch.Tensor, world: int) -> torch.Tensor:
    if world > 1:
        dist.all_reduce(tensor)
    return tensor / world


def train(objective: SelfDistillation, rank: int, world: int) -> dict[str, torch.Tensor]:
    """Three steps of plain gradient descent with gradients averaged over the processes."""
    found: dict[str, torch.Tensor] = {}
    for step in range(3):
        batch = make_batch(samples=8, local_crops=2, seed=step)
        batch.available_BS[1, 2] = False
        batch.token_mask_VN[4:8, : SEQUENCES * 2] = False  # an unequal number of masked tokens in the two halves
        losses = objective.losses(part_of(batch, rank, world), VALUES)
        objective.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        for name, loss in losses.items():
            found[f"{step}.{name}"] = mean_over_processes(loss.detach().clone(), world)
        for name, parameter in objective.student.named_parameters():
            assert parameter.grad is not None, name
            parameter.grad = mean_over_processes(parameter.grad, world)
            found[f"{step}.grad.{name}"] = parameter.grad.clone()
            parameter.data -= 0.1 * parameter.grad
        objective.after_step(VALUES)
    return found | {f"state.{name}": value for name, value in objective.state_dict().items()}


def teacher_after_a_sharded_step(rank: int, world: int) -> dict[str, torch.Tensor]:
    """Whole teacher tensors after two steps; with two processes student and teacher are cut in two by FSDP2."""
    objective = make_objective(4, dino={"koleo_loss_weight": 0.0})
    if world > 1:
        mesh = init_device_mesh("cpu", (world,))
        for network in (objective.student, objective.teacher):
            for module in network.values():
                fully_shard(module, mesh=mesh)
            register_fsdp_forward_method(network["backbone"], "forward_list")
    optimizer = torch.optim.SGD(objective.student.parameters(), lr=0.5)
    for seed in range(2):
        losses = objective.losses(part_of(make_batch(samples=8, seed=seed), rank, world), VALUES)
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        objective.after_step(VALUES)
    state = objective.teacher.state_dict().items()
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in state}


def measure(rank: int, world: int) -> dict[str, Any]:
    logits = torch.randn(10, 6, generator=torch.Generator().manual_seed(0))
    mine = logits if world == 1 else logits[[slice(0, 3), slice(3, 10)][rank]]  # unequal counts
    centering = Centering(6)
    centering.targets(mine, 0.1)
    centering.update()
    found: dict[str, Any] = {"center": centering.center, "sinkhorn": sinkhorn_knopp(mine, 0.1)}
    # KoLeo compares the samples of one process, so it is left out where two are to equal one
    for name in ("centering", "sinkhorn_knopp"):
        objective = make_objective(3, name, dino={"koleo_loss_weight": 0.0})
        found[name] = train(objective, rank, world)
    found["sharded"] = teacher_after_a_sharded_step(rank, world)
    return found


if __name__ == "__main__":
    own_rank, own_world, store, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=own_rank, world_size=own_world)
    torch.save(measure(own_rank, own_world), out)
    dist.destroy_process_group()
