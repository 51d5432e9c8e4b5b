"""Compiled blocks of the real networks: losses, gradients and resuming as without them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medssl_cli.core.config import load_config
from medssl_cli.core.protocols import Batch, SliceBatch
from medssl_cli.engine.acceleration import AccelerationConfig, accelerate, compiled_blocks, missing_for_compile
from medssl_cli.services.build import build_objective, build_optimizer, build_views
from medssl_cli.services.pretrain_config import PretrainConfig

SEQUENCES = ("ax_t2wi", "ax_adc", "ax_dwi")
CPU = torch.device("cpu")
VALUES = {"teacher_temp": 0.05, "momentum": 0.9}
SMALL = (
    *("student.embed_dim=64", "student.depth=3", "student.num_heads=2", "student.layerscale=0.1"),
    *("train.img_size=28", "data.spatial_size=28", "train.batch_size_per_gpu=4", "student.drop_path_rate=0.3"),
    *("crops.global_crops_size=28", "crops.local_crops_size=14", "crops.local_crops_number=2"),
    *("crops.intensity_aug=none", "dino.head_n_prototypes=64", "dino.head_hidden_dim=64"),
    *("dino.head_bottleneck_dim=32", "ibot.mask_sample_probability=1.0"),
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # of torch's own compiler, which an error would stop
    pytest.mark.skipif(bool(missing_for_compile(CPU)), reason="torch.compile needs g++"),
]


class Run:
    """A few updates without a trainer: the numbers of each step, and what a checkpoint would hold."""

    def __init__(self, compile_: bool) -> None:
        self.config = load_config(PretrainConfig, "prostate_vitb14", recipes="pretrain", overrides=SMALL)
        self.objective = build_objective(self.config, SEQUENCES, CPU, None)
        self.optimizer = build_optimizer(self.config, self.objective, CPU)
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-3
        self.views = build_views(self.config, len(SEQUENCES))
        accelerate(self.objective, AccelerationConfig(compile=compile_), CPU, "fp32", 10)
        self.gradients: list[dict[str, Tensor]] = []

    def batch(self, step: int) -> Batch:
        images = torch.rand(4, len(SEQUENCES), 28, 28, generator=torch.Generator().manual_seed(step))
        available = torch.ones(4, len(SEQUENCES), dtype=torch.bool)
        return self.views(SliceBatch(images, torch.full((4, 2), 28), available, None), step)

    def step(self, step: int) -> dict[str, float]:
        torch.manual_seed(step)
        losses = self.objective.losses(self.batch(step), VALUES)
        torch.stack(list(losses.values())).sum().backward()
        self.gradients.append({k: p.grad.clone() for k, p in self.objective.named_parameters() if p.grad is not None})
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.objective.after_step(VALUES)
        return {name: value.item() for name, value in losses.items()}

    def state(self) -> dict[str, Any]:
        return copy.deepcopy({"objective": self.objective.state_dict(), "optimizer": self.optimizer.state_dict()})

    def load(self, state: dict[str, Any]) -> None:
        self.objective.load_state_dict(state["objective"])
        self.optimizer.load_state_dict(state["optimizer"])


def test_compiled_blocks_give_the_same_losses_and_gradients_and_are_compiled_once() -> None:
    from torch._dynamo.utils import counters

    plain, compiled = Run(False), Run(True)
    counters.clear()
    assert compiled_blocks(plain.objective) == 0
    assert compiled_blocks(compiled.objective) == 6
    graphs = []
    for step in range(6):
        compiled.load(plain.state())  # so that each step starts from the same parameters
        expected, found = plain.step(step), compiled.step(step)
        assert found == pytest.approx(expected, rel=1e-5)
        for name, gradient in plain.gradients[-1].items():
            scale = float(gradient.abs().max())
            torch.testing.assert_close(compiled.gradients[-1][name], gradient, rtol=0, atol=1e-5 * max(scale, 1e-3))
        graphs.append(counters["stats"]["unique_graphs"])
    assert compiled_blocks(compiled.objective) == 6, "nothing fell back"
    # for each network: one for all blocks but the last, one for the last, one for the last with any number of tokens
    assert 4 <= graphs[0] <= graphs[-1] <= 6


def test_r01_a_resumed_compiled_run_is_bit_identical() -> None:
    straight, before, after = Run(True), Run(True), Run(True)
    expected = [straight.step(step) for step in range(6)]
    found = [before.step(step) for step in range(3)]
    after.load(before.state())
    found += [after.step(step) for step in range(3, 6)]
    assert found == expected
    assert compiled_blocks(after.objective) == 6
    for name, value in straight.objective.state_dict().items():
        assert torch.equal(value, after.objective.state_dict()[name]), name
    assert isinstance(straight.objective, nn.Module)
