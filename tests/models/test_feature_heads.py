"""Heads on vectors: sizes, gated attention against a loop, votes against the metric they come from."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from medssl_cli.metrics.classification import knn_probabilities
from medssl_cli.models.feature_heads import AttentionHead, NeighbourHead, VectorHead, build_head


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_sizes_are_the_published_ones() -> None:
    assert count(build_head("mlp", 768, 6)) == 199_942
    assert count(build_head("mlp", 1536, 6)) == 398_086
    assert count(build_head("logistic", 768, 6)) == count(VectorHead(768, 6, hidden_dim=0)) == 4_614


def test_one_linear_layer_has_no_norm() -> None:
    head = build_head("linear", 5, 2)
    x = torch.randn(3, 5)
    assert torch.allclose(head(10 * x) - head.last.bias, 10 * (head(x) - head.last.bias), atol=1e-5)


def test_attention_equals_a_loop_over_bags() -> None:
    """Equation 9 of Ilse et al. 2018, bag by bag, against padded bags with rubbish in the padding."""
    torch.manual_seed(0)
    head = AttentionHead(6, 2, hidden_dim=5, dropout=0.0).double().eval()
    head.requires_grad_(False)
    nn.init.normal_(head.norm.weight)
    lengths = [1, 4, 7]
    bags = torch.full((3, 7, 6), 1e6, dtype=torch.float64)
    present = torch.zeros(3, 7, dtype=torch.bool)
    expected, weights = [], []
    for b, n in enumerate(lengths):
        bags[b, :n], present[b, :n] = torch.randn(n, 6, dtype=torch.float64), True
        h = nn.functional.layer_norm(bags[b, :n], (6,), head.norm.weight, head.norm.bias)
        raw = []
        for k in range(n):
            v = torch.tanh(head.tanh_gate.weight @ h[k] + head.tanh_gate.bias)
            u = 1 / (1 + torch.exp(-(head.sigmoid_gate.weight @ h[k] + head.sigmoid_gate.bias)))
            raw.append(math.exp(float(head.score.weight[0] @ (v * u) + head.score.bias[0])))
        a = torch.tensor(raw, dtype=torch.float64) / sum(raw)
        weights.append(a)
        expected.append(head.last.weight @ (a @ h) + head.last.bias)
    assert torch.allclose(head(bags, present), torch.stack(expected), atol=1e-12)
    found = head.attention(bags, present)
    for b, a in enumerate(weights):
        assert torch.allclose(found[b, : len(a)], a, atol=1e-12)
        assert (found[b, len(a) :] == 0).all()


@pytest.mark.parametrize("k", [1, 5, 500])
def test_votes_equal_the_knn_metric(k: int) -> None:
    rng = np.random.default_rng(1)
    train, test, labels = rng.standard_normal((40, 8)), rng.standard_normal((9, 8)), rng.integers(0, 3, 40)
    expected = knn_probabilities(train, labels, test, 3, k)
    one_hot = torch.from_numpy(np.eye(3)[labels])
    head = NeighbourHead(torch.from_numpy(train), one_hot, k, "softmax").double()
    assert np.allclose(head(torch.from_numpy(test)).softmax(1).numpy(), expected, atol=1e-6)
    single = NeighbourHead(torch.from_numpy(train), one_hot[:, [2]], k, "sigmoid").double()
    assert np.allclose(single(torch.from_numpy(test)).sigmoid().numpy()[:, 0], expected[:, 2], atol=1e-6)


def test_rows_without_a_label_do_not_vote_on_it() -> None:
    rng = np.random.default_rng(2)
    rows, labels = torch.from_numpy(rng.standard_normal((12, 4))), torch.from_numpy(rng.integers(0, 2, (12, 2)) * 1.0)
    labels[:6, 1] = torch.nan
    head = NeighbourHead(rows, labels, 3, "sigmoid").double()
    alone = NeighbourHead(rows[6:], labels[6:, [1]], 3, "sigmoid").double()
    x = torch.from_numpy(rng.standard_normal((5, 4)))
    assert torch.allclose(head(x)[:, 1], alone(x)[:, 0])


def test_a_value_is_the_weighted_mean_of_neighbours() -> None:
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    head = NeighbourHead(rows, torch.tensor([[10.0], [30.0]]), 5, "value")
    assert head(torch.tensor([[1.0, 1.0]])).item() == pytest.approx(20.0, abs=1e-4)


def test_neighbours_are_not_built_by_name() -> None:
    with pytest.raises(ValueError, match="training rows"):
        build_head("knn", 4, 1)
