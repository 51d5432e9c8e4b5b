import math

import numpy as np
import pytest
import torch
from engine_stub import CPU, Stub
from torch import nn

from medssl_cli.core.config import load_config
from medssl_cli.core.errors import ConfigError
from medssl_cli.engine.optim import (
    OptimConfig,
    apply_schedule,
    build_adamw,
    clip_gradients,
    first_bad_gradient,
    layer_index,
    parameter_groups,
    plain_name,
    set_frozen,
)


class Names(nn.Module):
    """Parameters of given dotted names, all of size 2."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            node: nn.Module = self
            *parents, leaf = name.split(".")
            for part in parents:
                if part not in node._modules:
                    node.add_module(part, nn.Module())
                node = node._modules[part]
            node.register_parameter(leaf, nn.Parameter(torch.zeros(2)))


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
    weight.data = torch.tensor([1.0, -2.0])
    weight.grad = torch.tensor([0.5, 4.0])
    optimizer.step()  # first step of Adam: the sign of the gradient; decoupled decay by lr x wd
    expected = np.array([1.0, -2.0]) * (1 - 0.1 * 0.5) - 0.1 * np.sign([0.5, 4.0])
    np.testing.assert_allclose(weight.detach().numpy(), expected, rtol=1e-6)


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
        "adamw_beta2": 0.999,
    }  # fmt: skip
    with pytest.raises(ConfigError, match="2 faults") as caught:
        load_config(OptimConfig, None, recipes="pretrain", overrides=["epoch=3", "layerwise_decay=1.5"])
    assert "did you mean epochs?" in caught.value.where
    assert "layerwise_decay" in caught.value.where
