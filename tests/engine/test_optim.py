import copy
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_stub import CPU, Stub, trainer
from torch import nn

from medssl_cli.core.config import load_config
from medssl_cli.core.errors import ConfigError
from medssl_cli.engine.checkpoint import optimizer_tensors
from medssl_cli.engine.optim import (
    OptimConfig,
    apply_schedule,
    build_adamw,
    build_optimizer,
    clip_gradients,
    count_stages,
    first_bad_gradient,
    layer_index,
    parameter_groups,
    plain_name,
    set_frozen,
)
from medssl_cli.engine.schedules import Schedules
from medssl_cli.engine.trainer import Trainer


class Names(nn.Module):
    """Parameters of given dotted names, all of two numbers: one dimension for biases, norms and layer scales."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            node: nn.Module = self
            *parents, leaf = name.split(".")
            for part in parents:
                if part not in node._modules:
                    node.add_module(part, nn.Module())
                node = node._modules[part]
            flat = leaf in ("bias", "gamma") or "norm" in name
            node.register_parameter(leaf, nn.Parameter(torch.zeros(2) if flat else torch.zeros(1, 2)))


BLOCK = ("norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.qkv.bias", "ls1.gamma", "mlp.fc1.weight")
EMBEDDING = (
    "cls_token",
    "pos_embed",
    "register_tokens",
    "mask_token",
    "patch_embed.proj.weight",
    "patch_embed.proj.bias",
)


def vit_base(prefix: str = "blocks.{i}.") -> Names:
    blocks = [prefix.format(i=i, chunk=i // 4) + name for i in range(12) for name in BLOCK]
    return Names(*EMBEDDING, "seq_embed", *blocks, "norm.weight", "norm.bias")


def head() -> Names:
    return Names("mlp.0.weight", "mlp.0.bias", "last_layer.weight_g", "last_layer.weight_v")


def dump(modules: dict[str, nn.Module], **settings: float) -> dict[str, tuple[float, float, bool]]:
    groups = parameter_groups(modules, depth=12, **settings)
    return {
        name: (group["lr_multiplier"], group["wd_multiplier"], group["is_last_layer"])
        for group in groups
        for name, _ in group["params"]
    }


@pytest.mark.parametrize("prefix", ["blocks.{i}.", "blocks.{chunk}.{i}."], ids=["plain", "chunked"])
def test_t31_group_dump_of_vit_base(prefix: str) -> None:
    facts = dump({"backbone": vit_base(prefix), "dino_head": head()})
    rates = {name: fact[0] for name, fact in facts.items()}
    block = {i: "backbone." + prefix.format(i=i, chunk=i // 4) for i in (0, 5, 11)}
    assert rates["backbone.patch_embed.proj.weight"] == pytest.approx(0.0508, abs=5e-5)
    assert rates["backbone.pos_embed"] == rates["backbone.cls_token"] == pytest.approx(0.9**13)
    assert rates["backbone.register_tokens"] == rates["backbone.mask_token"] == pytest.approx(0.2542, abs=5e-5)
    assert rates[block[0] + "mlp.fc1.weight"] == pytest.approx(0.2824, abs=5e-5)
    assert rates[block[5] + "norm1.bias"] == pytest.approx(0.9**7)
    assert rates[block[11] + "ls1.gamma"] == pytest.approx(0.9)
    assert rates["backbone.norm.weight"] == rates["backbone.seq_embed"] == rates["dino_head.mlp.0.weight"] == 1.0

    undecayed = {name for name, fact in facts.items() if fact[1] == 0.0}
    spared = ("norm1.weight", "norm1.bias", "attn.qkv.bias", "ls1.gamma")
    assert undecayed == {
        *("backbone." + prefix.format(i=i, chunk=i // 4) + name for i in range(12) for name in spared),
        "backbone.patch_embed.proj.bias", "backbone.norm.weight", "backbone.norm.bias", "dino_head.mlp.0.bias",
    }  # fmt: skip
    assert {fact[1] for fact in facts.values()} == {0.0, 1.0}
    assert {name for name, fact in facts.items() if fact[2]} == {
        "dino_head.last_layer.weight_g", "dino_head.last_layer.weight_v",
    }  # fmt: skip


def test_groups_are_fused_and_hold_every_trainable_parameter_once() -> None:
    backbone, first = vit_base(), head()
    backbone.get_parameter("pos_embed").requires_grad_(False)
    groups = parameter_groups({"backbone": backbone, "dino_head": first, "ibot_head": first}, depth=12)
    keys = [(g["lr_multiplier"], g["wd_multiplier"], g["is_last_layer"]) for g in groups]
    assert len(keys) == len(set(keys))
    # 12 blocks x (decayed, not); embedding without bias; patch weight, patch bias; rest decayed, not; last layer
    assert len(groups) == 24 + 1 + 2 + 2 + 1
    names = [name for g in groups for name, _ in g["params"]]
    assert len(names) == len(set(names)) == len(list(backbone.parameters())) - 1 + 4


def test_wrappers_do_not_change_names_or_layers() -> None:
    assert plain_name("module.blocks.3._orig_mod.mlp.fc1.weight") == "blocks.3.mlp.fc1.weight"
    assert plain_name("_orig_mod._checkpoint_wrapped_module.norm.weight") == "norm.weight"
    assert plain_name("submodule.weight") == "submodule.weight"
    assert layer_index("blocks.2.11.mlp.fc1.weight", 12) == layer_index("blocks.11.mlp.fc1.weight", 12) == 12
    assert layer_index("register_tokens", 12) == 0
    assert layer_index("head.blocks_weight", 12) == 13


def test_schedule_reaches_each_group_with_its_multiplier() -> None:
    groups = parameter_groups({"backbone": vit_base(), "dino_head": head()}, depth=12)
    optimizer = build_adamw(groups, CPU, beta1=0.8, beta2=0.99)
    apply_schedule(optimizer, {"lr": 2.0, "last_layer_lr": 0.0, "wd": 0.1})
    by_name = {name: g for g in optimizer.param_groups for name in g["param_names"]}
    assert by_name["backbone.patch_embed.proj.weight"]["lr"] == pytest.approx(2 * 0.2 * 0.9**13)
    assert by_name["backbone.patch_embed.proj.weight"]["weight_decay"] == 0.1
    assert by_name["backbone.norm.bias"]["weight_decay"] == 0.0
    assert by_name["dino_head.mlp.0.weight"]["lr"] == 2.0
    assert by_name["dino_head.last_layer.weight_g"]["lr"] == 0.0
    assert by_name["dino_head.last_layer.weight_g"]["betas"] == (0.8, 0.99)


def test_adamw_step_equals_the_formula() -> None:
    module = Names("a.weight")
    optimizer = build_adamw(parameter_groups({"backbone": module}, depth=0), CPU)
    apply_schedule(optimizer, {"lr": 0.1, "last_layer_lr": 0.0, "wd": 0.5})
    weight = module.get_parameter("a.weight")
    weight.data = torch.tensor([[1.0, -2.0]])
    weight.grad = torch.tensor([[0.5, 4.0]])
    optimizer.step()  # first step of Adam: the sign of the gradient; decoupled decay by lr x wd
    expected = np.array([1.0, -2.0]) * (1 - 0.1 * 0.5) - 0.1 * np.sign([0.5, 4.0])
    np.testing.assert_allclose(weight.detach().numpy()[0], expected, rtol=1e-6)


def set_gradients(module: nn.Module, value: float) -> float:
    """Constant gradient; its 2-norm, in float64."""
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, value)
    return math.sqrt(sum(p.numel() * value**2 for p in module.parameters()))


def test_t32_each_submodule_is_clipped_by_its_own_norm() -> None:
    stub = Stub()
    modules = stub.trained_modules()
    small = set_gradients(modules["backbone"], 0.1)
    large = set_gradients(modules["dino_head"], 1e4)
    assert small < 3.0
    norms = clip_gradients(modules, 3.0)
    assert norms["backbone"].item() == pytest.approx(small)
    assert norms["dino_head"].item() == pytest.approx(large)
    for parameter in modules["backbone"].parameters():
        assert (parameter.grad == torch.full_like(parameter, 0.1)).all()
    left = math.sqrt(sum(p.grad.double().square().sum().item() for p in modules["dino_head"].parameters()))
    assert left == pytest.approx(3.0, rel=1e-5)


def test_clipping_is_off_at_zero_and_leaves_bad_gradients_for_the_message() -> None:
    modules = Stub().trained_modules()
    set_gradients(modules["dino_head"], 1e4)
    assert list(clip_gradients(modules, 0.0)) == ["dino_head"]
    assert (modules["dino_head"].weight.grad == 1e4).all()
    modules["dino_head"].bias.grad[1] = math.nan
    assert not clip_gradients(modules, 3.0)["dino_head"].isfinite()
    assert (modules["dino_head"].weight.grad == 1e4).all()
    assert first_bad_gradient(modules["dino_head"]) == "bias"
    assert first_bad_gradient(modules["backbone"]) is None


def test_freezing_spares_what_was_never_trained() -> None:
    module = Names("blocks.0.weight", "pos_embed")
    module.get_parameter("pos_embed").requires_grad_(False)
    optimizer = build_adamw(parameter_groups({"backbone": module}, depth=1), CPU)
    set_frozen(module, optimizer, True)
    assert not any(p.requires_grad for p in module.parameters())
    set_frozen(module, optimizer, False)
    assert module.get_parameter("blocks.0.weight").requires_grad
    assert not module.get_parameter("pos_embed").requires_grad


def test_config_has_the_framework_defaults_and_reports_all_faults() -> None:
    config = load_config(OptimConfig, None, recipes="pretrain")
    assert config.model_dump() == {
        "epochs": 100, "warmup_epochs": 10, "base_lr": 0.004, "min_lr": 1e-6, "weight_decay": 0.04,
        "weight_decay_end": 0.4, "clip_grad": 3.0, "freeze_last_layer_epochs": 1, "freeze_backbone_epochs": 0,
        "scaling_rule": "sqrt_wrt_1024", "patch_embed_lr_mult": 0.2, "layerwise_decay": 0.9, "adamw_beta1": 0.9,
        "adamw_beta2": 0.999, "clip_mode": "module", "freeze_last_layer": "lr", "optimizer": "adamw",
    }  # fmt: skip
    with pytest.raises(ConfigError, match="2 faults") as caught:
        load_config(OptimConfig, None, recipes="pretrain", overrides=["epoch=3", "layerwise_decay=1.5"])
    assert "did you mean epochs?" in caught.value.where
    assert "layerwise_decay" in caught.value.where


# --- names of other networks -----------------------------------------------------------------------------------------


def test_dinov3_names_are_the_embedding() -> None:
    for name in ("storage_tokens", "rope_embed.periods", "mask_token", "backbone.cls_token"):
        assert layer_index(name, 12) == 0
    assert layer_index("blocks.11.attn.qkv.bias", 12) == 12
    assert layer_index("local_cls_norm.weight", 12) == 13


LAST_LAYER = {"lr_multiplier": 1.0, "wd_multiplier": 1.0, "is_last_layer": True}


def convnext(depths: tuple[int, ...]) -> Names:
    """Names of the public ConvNeXt, each in the shape of a norm or of a matrix."""
    down = [f"downsample_layers.{i}.{j}.{kind}" for i in range(4) for j in range(2) for kind in ("weight", "bias")]
    parts = ("dwconv.weight", "dwconv.bias", "norm.weight", "pwconv1.weight", "gamma")
    blocks = [f"stages.{i}.{j}.{part}" for i, depth in enumerate(depths) for j in range(depth) for part in parts]
    return Names(*down, *blocks, "norm.weight", "norm.bias", "mask_token")


@pytest.mark.parametrize("depths", [(3, 3, 9, 3), (3, 3, 27, 3), (1, 2, 1, 1)])
def test_convnext_blocks_are_counted_through_the_stages(depths: tuple[int, ...]) -> None:
    network, total = convnext(depths), sum(depths)
    assert count_stages(name for name, _ in network.named_parameters()) == depths
    groups = parameter_groups({"backbone": network}, depth=999, layerwise_decay=0.9)
    rates = {name.removeprefix("backbone."): g["lr_multiplier"] for g in groups for name, _ in g["params"]}
    layer = {name: round(total + 1 - math.log(rate) / math.log(0.9)) for name, rate in rates.items()}
    assert layer["downsample_layers.0.0.weight"] == layer["mask_token"] == 0  # the stem
    expected = 0
    for stage, depth in enumerate(depths):
        for block in range(depth):
            expected += 1
            assert layer[f"stages.{stage}.{block}.dwconv.weight"] == expected
            assert layer[f"stages.{stage}.{block}.gamma"] == expected
        if stage:
            assert layer[f"downsample_layers.{stage}.1.weight"] == layer[f"stages.{stage}.0.gamma"]
    assert expected == total
    assert layer["norm.weight"] == total + 1
    undecayed = {name for g in groups for name, _ in g["params"] if not g["wd_multiplier"]}
    assert all(name.endswith(("bias", "gamma")) or "norm" in name for name in undecayed)


def test_tensors_of_one_dimension_have_no_decay_whatever_their_name() -> None:
    module = nn.Module()
    module.scales, module.table = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, 1))
    decay = {n: g["wd_multiplier"] for g in parameter_groups({"dino_head": module}, 0) for n, _ in g["params"]}
    assert decay == {"dino_head.scales": 0.0, "dino_head.table": 1.0}


def test_no_layerwise_decay_is_one_rate() -> None:
    groups = parameter_groups({"backbone": vit_base()}, 12, layerwise_decay=1.0, patch_embed_lr_mult=1.0)
    assert {g["lr_multiplier"] for g in groups} == {1.0}
    assert len(groups) == 2


# --- optimizers ------------------------------------------------------------------------------------------------------


class Toy(nn.Module):
    """A matrix, a bias and a last layer, of fixed start."""

    def __init__(self) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(4)
        self.matrix = nn.Parameter(torch.randn(3, 4, generator=rng))
        self.bias = nn.Parameter(torch.randn(3, generator=rng))
        self.last_layer = nn.Linear(3, 2)


def gradients(step: int, module: nn.Module) -> None:
    """The gradients of one step, alike for everybody."""
    rng = torch.Generator().manual_seed(step)
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=rng)


def values(step: int, **more: float) -> dict[str, float]:
    return {"lr": 0.1 * (step + 1), "last_layer_lr": 0.1 * (step + 1), "wd": 0.05, **more}


def run(name: Any, steps: int, module: nn.Module, optimizer: Any = None, start: int = 0) -> torch.optim.Optimizer:
    optimizer = optimizer or build_optimizer(name, parameter_groups({"dino_head": module}, 0), CPU)
    for step in range(start, steps):
        apply_schedule(optimizer, values(step))
        gradients(step, module)
        optimizer.step()
    return optimizer


def by_formula(name: str, steps: int, module: nn.Module) -> dict[str, np.ndarray]:
    """SGD with momentum and LARS in float64, tensor by tensor."""
    weights = {n: p.detach().double().numpy().copy() for n, p in module.named_parameters()}
    moments = {n: np.zeros_like(w) for n, w in weights.items()}
    for step in range(steps):
        gradients(step, module)
        for n, p in module.named_parameters():
            w, update = weights[n], p.grad.double().numpy()
            if w.ndim > 1:
                update = update + 0.05 * w
                if name == "lars":
                    update = update * 0.001 * math.sqrt((w**2).sum()) / math.sqrt((update**2).sum())
            moments[n] = 0.9 * moments[n] + update
            weights[n] = w - 0.1 * (step + 1) * moments[n]
    return weights


@pytest.mark.parametrize("name", ["sgd", "lars"])
def test_momentum_optimizers_equal_their_formulas(name: str) -> None:
    module = Toy()
    expected = by_formula(name, 4, copy.deepcopy(module))
    run(name, 4, module)
    for n, parameter in module.named_parameters():
        np.testing.assert_allclose(parameter.detach().numpy(), expected[n], rtol=2e-5, atol=1e-7, err_msg=n)


def test_lars_of_weights_or_updates_without_length_takes_the_plain_step() -> None:
    module = Names("a.weight", "b.weight")
    optimizer = build_optimizer("lars", parameter_groups({"dino_head": module}, 0), CPU)
    apply_schedule(optimizer, {"lr": 1.0, "last_layer_lr": 1.0, "wd": 0.0})
    a, b = module.parameters()
    with torch.no_grad():
        b.fill_(2.0)
    a.grad, b.grad = torch.ones(1, 2), torch.zeros(1, 2)
    optimizer.step()
    assert torch.equal(a.detach(), -torch.ones(1, 2))
    assert torch.equal(b.detach(), torch.full((1, 2), 2.0))


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_r01_every_optimizer_resumes_to_the_same_bits(tmp_path: Path, name: Any) -> None:
    def make(out: Path | None) -> tuple[Trainer, Stub]:
        objective = Stub()
        made = trainer(out, 10, objective)
        made.optimizer = build_optimizer(name, parameter_groups(objective.trained_modules(), depth=1), CPU)
        return made, objective

    straight, straight_objective = make(None)
    straight.fit()
    stopped, _ = make(tmp_path)
    stopped.total_steps = 5
    stopped.fit()
    again, objective = make(tmp_path)
    assert again.checkpoints is not None
    newest = again.checkpoints.latest()
    assert newest is not None
    assert again.restore(newest) == 5
    again.fit()
    for key, value in straight_objective.state_dict().items():
        assert torch.equal(value, objective.state_dict()[key]), key
    mine, theirs = optimizer_tensors(again.optimizer), optimizer_tensors(straight.optimizer)
    assert mine.keys() == theirs.keys()
    assert mine
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_w18_a_last_layer_without_gradient_neither_decays_nor_builds_moments(name: Any) -> None:
    module = Toy()
    before = copy.deepcopy(module.last_layer.state_dict())
    optimizer = build_optimizer(name, parameter_groups({"dino_head": module}, 0), CPU)
    for step in range(3):
        apply_schedule(optimizer, values(step, last_layer_frozen=1.0))
        gradients(step, module)
        optimizer.step()
    assert all(torch.equal(value, before[key]) for key, value in module.last_layer.state_dict().items())
    assert {key.partition(":")[0] for key in optimizer_tensors(optimizer)} == {"dino_head.matrix", "dino_head.bias"}
    apply_schedule(optimizer, values(3, last_layer_frozen=0.0))
    gradients(3, module)
    optimizer.step()
    assert not torch.equal(module.last_layer.weight, before["weight"])
    assert any(key.startswith("dino_head.last_layer.weight") for key in optimizer_tensors(optimizer))


def test_a_last_layer_of_rate_zero_builds_moments_and_keeps_its_weights() -> None:
    module = Toy()
    before = copy.deepcopy(module.last_layer.state_dict())
    optimizer = build_adamw(parameter_groups({"dino_head": module}, 0), CPU)
    apply_schedule(optimizer, values(0) | {"last_layer_lr": 0.0})
    gradients(0, module)
    optimizer.step()
    assert all(torch.equal(value, before[key]) for key, value in module.last_layer.state_dict().items())
    assert any(key.startswith("dino_head.last_layer.weight") for key in optimizer_tensors(optimizer))


# --- clipping each tensor --------------------------------------------------------------------------------------------


def test_w17_each_tensor_is_clipped_by_its_own_norm() -> None:
    module = Toy()
    modules = {"dino_head": module}
    gradients(0, module)
    module.bias.grad = torch.tensor([0.3, 0.4, 0.0])  # norm 0.5: stays
    module.matrix.grad = torch.full((3, 4), 10.0)  # norm 34.6
    before = {n: p.grad.double().clone() for n, p in module.named_parameters()}
    norms = clip_gradients(modules, 3.0, mode="tensor")
    assert norms["dino_head"].item() == pytest.approx(math.sqrt(sum(float((g**2).sum()) for g in before.values())))
    for name, parameter in module.named_parameters():
        length = float(before[name].norm())
        expected = before[name] * min(1.0, 3.0 / (length + 1e-6))  # as DINO and iBOT write it
        torch.testing.assert_close(parameter.grad.double(), expected, atol=1e-7, rtol=1e-6)
    assert torch.equal(module.bias.grad.double(), before["bias"])


def test_w17_w18_the_trainer_clips_tensors_and_freezes_by_the_gradient() -> None:
    objective = Stub()
    made = trainer(None, 6, objective, clip_grad=1e-3, clip_mode="tensor")
    made.schedules = Schedules(
        total_steps=6, epoch_steps=2, lr=1e-2, warmup_epochs=0, freeze_last_layer_epochs=3, freeze_last_layer="gradient"
    )
    head = objective.student["dino_head"]
    made.optimizer = build_optimizer("sgd", [{"params": [("dino_head.last_layer", head.weight)], **LAST_LAYER}], CPU)
    before = head.weight.detach().clone()
    for done in range(1, 6 + 1):
        made.total_steps = done
        made.fit()
        if done == 5:
            made.schedules = Schedules(total_steps=6, epoch_steps=2, lr=1e-2, warmup_epochs=0)
            assert torch.equal(head.weight, before)
            assert optimizer_tensors(made.optimizer) == {}
    assert float(head.weight.grad.norm()) == pytest.approx(1e-3, rel=1e-3)
    assert not torch.equal(head.weight, before)


def test_clipping_tensors_spares_bad_ones_and_nothing_at_zero() -> None:
    module = Toy()
    gradients(0, module)
    module.matrix.grad *= 100
    module.bias.grad[1] = math.inf
    before = {n: p.grad.clone() for n, p in module.named_parameters()}
    assert not clip_gradients({"dino_head": module}, 0.0, mode="tensor")["dino_head"].isfinite()
    assert all(torch.equal(p.grad, before[n]) for n, p in module.named_parameters())
    clip_gradients({"dino_head": module}, 3.0, mode="tensor")
    assert torch.equal(module.bias.grad, before["bias"])
    assert float(module.matrix.grad.norm()) == pytest.approx(3.0, rel=1e-5)
    assert first_bad_gradient(module) == "bias"


@pytest.mark.slow
def test_sharded_parameters_are_clipped_and_updated_as_whole_ones(tmp_path: Path) -> None:
    script = Path(__file__).with_name("sharded_steps.py")
    running = [
        subprocess.Popen([sys.executable, str(script), str(rank), str(tmp_path / "store")], stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    try:
        ends = [process.communicate(timeout=120)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], ends
