"""The projection head against torch's own weight normalisation, and its published sizes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from medssl_cli.models.heads import DINOHead


@pytest.mark.parametrize(("prototypes", "count"), [(4096, 7_348_480), (8192, 8_401_152), (65536, 23_138_560)])
def test_head_sizes_are_the_published_ones(prototypes: int, count: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in DINOHead(768, prototypes).parameters()) == count


def test_head_has_the_published_names() -> None:
    names = set(DINOHead(8, 5, hidden_dim=6, bottleneck_dim=4).state_dict())
    mlp = {f"mlp.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")}
    assert names == mlp | {"last_layer.weight_g", "last_layer.weight_v"}
    assert "mlp.weight" in DINOHead(8, 5, bottleneck_dim=4, n_layers=1).state_dict()


def test_head_equals_torchs_weight_norm_in_values_and_gradients() -> None:
    torch.manual_seed(0)
    head, x = DINOHead(8, 5, hidden_dim=16, bottleneck_dim=4), torch.randn(7, 8)
    with torch.no_grad():
        head.last_layer.weight_g.uniform_(0.5, 2)
    last = weight_norm(nn.Linear(4, 5, bias=False))
    with torch.no_grad():
        last.parametrizations.weight.original0.copy_(head.last_layer.weight_g)
        last.parametrizations.weight.original1.copy_(head.last_layer.weight_v)
    z = head.mlp(x)
    expected = last(z / z.norm(dim=-1, keepdim=True))
    out = head(x)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=0)
    out.cos().sum().backward()
    grads = (head.last_layer.weight_g.grad, head.last_layer.weight_v.grad)
    expected.cos().sum().backward()
    found = (last.parametrizations.weight.original0.grad, last.parametrizations.weight.original1.grad)
    torch.testing.assert_close(grads, found, atol=1e-6, rtol=0)


def test_gains_start_at_one_are_trained_and_bound_the_logits() -> None:
    head = DINOHead(8, 50, hidden_dim=16, bottleneck_dim=4)
    assert head.last_layer.weight_g.requires_grad
    assert torch.equal(head.last_layer.weight_g, torch.ones(50, 1))
    assert head(100 * torch.randn(20, 8)).detach().abs().max() <= 1 + 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_zero_row_stays_finite_in_half_precision(dtype: torch.dtype) -> None:
    head = DINOHead(8, 5, hidden_dim=16, bottleneck_dim=4).to(dtype)
    out = head(torch.zeros(2, 8, dtype=dtype))
    assert out.dtype == dtype
    assert torch.isfinite(out).all()


def test_head_under_autocast_is_close_to_float32() -> None:
    torch.manual_seed(0)
    head, x = DINOHead(8, 5, hidden_dim=16, bottleneck_dim=4), torch.randn(7, 8)
    with torch.autocast("cpu", torch.bfloat16):
        half = head(x)
    assert F.cosine_similarity(half.float(), head(x), dim=-1).min() > 0.999


# --- iBOT's head -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("patches", "count"), [(None, 8_401_152), (8192, 10_506_496)], ids=["shared", "separate"])
def test_ibot_head_sizes_are_the_published_ones(patches: int | None, count: int) -> None:
    with torch.device("meta"):
        head = DINOHead(768, 8192, train_gains=False, n_patch_prototypes=patches)
    assert sum(p.numel() for p in head.parameters()) == count


def test_frozen_gains_stay_at_one_through_training_and_are_saved() -> None:
    torch.manual_seed(0)
    head = DINOHead(8, 5, hidden_dim=16, bottleneck_dim=4, train_gains=False, n_patch_prototypes=6)
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        cls, patches = head(torch.randn(7, 8), 3)
        (cls.cos().sum() + patches.cos().sum()).backward()
        optimizer.step()
    for layer in (head.last_layer, head.last_layer2):
        assert layer.weight_g.grad is None
        assert torch.equal(layer.weight_g, torch.ones_like(layer.weight_g))
    trained = DINOHead(8, 5, hidden_dim=16, bottleneck_dim=4, n_patch_prototypes=6)
    trained.load_state_dict(head.state_dict())  # the same names, whether the gains are trained or not
    torch.testing.assert_close(trained(torch.ones(1, 8)), head(torch.ones(1, 8)))


def test_patch_tokens_take_their_own_last_layer_behind_the_common_mlp() -> None:
    torch.manual_seed(0)
    head = DINOHead(8, 5, hidden_dim=16, bottleneck_dim=4, n_patch_prototypes=6)
    x = torch.randn(7, 8)
    cls, patches = head(x, 3)
    z = F.normalize(head.mlp(x), dim=-1)
    torch.testing.assert_close(cls, z[:4] @ F.normalize(head.last_layer.weight_v, dim=1).T)
    torch.testing.assert_close(patches, z[4:] @ F.normalize(head.last_layer2.weight_v, dim=1).T)
    torch.testing.assert_close(head(x)[:4], cls)
    assert [tuple(part.shape) for part in head(x, 0)] == [(7, 5), (0, 6)]
    assert {name for name in head.state_dict() if "last" in name} == {
        f"last_layer{i}.weight_{kind}" for i in ("", "2") for kind in "gv"
    }
    with pytest.raises(ValueError, match="no last layer for patch tokens"):
        DINOHead(8, 5, hidden_dim=16, bottleneck_dim=4)(x, 3)


@pytest.mark.parametrize("norm", ["none", "bn", "syncbn", "ln"])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_norm_and_activation_lie_between_the_layers(norm: str, activation: str) -> None:
    torch.manual_seed(0)
    head = DINOHead(8, 5, hidden_dim=16, bottleneck_dim=4, norm=norm, activation=activation)
    x = torch.randn(9, 8)
    z = x
    linears = [layer for layer in head.mlp if isinstance(layer, nn.Linear)]
    for linear in linears[:-1]:
        z = F.linear(z, linear.weight, linear.bias)
        if norm == "ln":
            z = (z - z.mean(1, keepdim=True)) / (z.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        elif norm != "none":
            z = (z - z.mean(0)) / (z.var(0, unbiased=False) + 1e-5).sqrt()
        z = z.clamp_min(0) if activation == "relu" else z * 0.5 * (1 + torch.erf(z / 2**0.5))
    z = linears[-1](z)
    expected = z / z.norm(dim=1, keepdim=True) @ F.normalize(head.last_layer.weight_v, dim=1).T
    torch.testing.assert_close(head(x), expected, atol=1e-6, rtol=1e-5)
