"""One process of two (gloo): clipping and optimizers on parameters cut in two by FSDP2 equal those on whole ones.

Run: sharded_steps.py RANK STORE.
"""

from __future__ import annotations

import sys
from itertools import product

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode

from medssl_cli.engine.optim import ClipMode, OptimizerName, apply_schedule, build_optimizer, clip_gradients
from medssl_cli.engine.optim import parameter_groups as groups

CPU = torch.device("cpu")


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 4), nn.LayerNorm(4))


def compare(name: OptimizerName, mode: ClipMode, mesh: DeviceMesh) -> None:
    whole, sharded = net(), net()
    fully_shard(sharded, mesh=mesh)
    nets = [(each, build_optimizer(name, groups({"backbone": each}, depth=1), CPU)) for each in (whole, sharded)]
    images = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        norms = []
        for each, optimizer in nets:
            apply_schedule(optimizer, {"lr": 0.1, "last_layer_lr": 0.1, "wd": 0.1})
            optimizer.zero_grad()
            (each(images) ** 3 * 100).mean().backward()
            with CommDebugMode() as messages:
                norms.append(clip_gradients({"backbone": each}, 0.5, mode=mode)["backbone"])
            assert messages.get_total_counts() == (each is sharded), "one message for all norms together"
            optimizer.step()
        torch.testing.assert_close(norms[0], norms[1])
    for (key, p), q in zip(whole.named_parameters(), sharded.parameters(), strict=True):
        torch.testing.assert_close(
            q.full_tensor().detach(), p.detach(), atol=1e-6, rtol=1e-5, msg=f"{name} {mode} {key}"
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=int(sys.argv[1]), world_size=2)
    names: tuple[OptimizerName, ...] = ("adamw", "sgd", "lars")
    modes: tuple[ClipMode, ...] = ("module", "tensor")
    for optimizer_name, clip_mode in product(names, modes):
        compare(optimizer_name, clip_mode, init_device_mesh("cpu", (2,)))
    dist.destroy_process_group()
