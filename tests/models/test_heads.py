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
