"""Channel attention against numbers worked out by hand and against its formula in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medssl_cli.models.channel_attention import CamScale, ChannelAttention


def random_attention(channels: int, scale: CamScale, gamma: float = 0.7) -> ChannelAttention:
    torch.manual_seed(0)
    attention = ChannelAttention(channels, scale)
    with torch.no_grad():
        attention.gamma.fill_(gamma)
    return attention


def by_formula(attention: ChannelAttention, x_BCHW: Tensor) -> np.ndarray:
    """Section 5.4 in float64, one sample and one channel after the other."""
    query, key, value = (
        F.conv2d(x_BCHW.double(), part.weight.double(), _bias(part).double(), padding=1).flatten(2).detach().numpy()
        for part in (attention.query, attention.key, attention.value)
    )
    out = np.zeros_like(value)
    for b in range(len(query)):
        for i in range(query.shape[1]):
            energy = np.array([(query[b, i] * key[b, j]).sum() for j in range(key.shape[1])])
            if attention.cam_scale == "mean":
                energy = energy / query.shape[2]
            share = np.exp(energy.max() - energy)
            share /= share.sum()
            out[b, i] = attention.gamma.item() * sum(share[j] * value[b, j] for j in range(len(share))) + value[b, i]
    return out.reshape(x_BCHW.shape)


def _bias(part: nn.Conv2d) -> Tensor:
    assert part.bias is not None
    return part.bias


@pytest.mark.parametrize("scale", ["mean", "none"])
def test_attention_is_the_formula(scale: CamScale) -> None:
    attention = random_attention(5, scale)
    x = torch.randn(3, 5, 4, 7, generator=torch.Generator().manual_seed(1))
    np.testing.assert_allclose(attention(x).detach().numpy(), by_formula(attention, x), rtol=2e-5, atol=2e-6)


def hand_made(scale: CamScale, gamma: float) -> ChannelAttention:
    """Q = K = input; V = 3 x channel 0, 1 x channel 1."""
    attention = ChannelAttention(2, scale)
    with torch.no_grad():
        for part, factors in ((attention.query, (1, 1)), (attention.key, (1, 1)), (attention.value, (3, 1))):
            part.weight.zero_()
            _bias(part).zero_()
            for channel, factor in enumerate(factors):
                part.weight[channel, channel, 1, 1] = factor
        attention.gamma.fill_(gamma)
    return attention


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        # E = [[1, 0], [0, 4]]; A = [[1, e] / (1 + e), [e^4, 1] / (e^4 + 1)]; V = [[3, 0], [0, 2]]; y = A V + V
        ("none", [[3.8068243, 1.4621172], [2.9460414, 2.0359724]]),
        # E / 2 = [[.5, 0], [0, 2]]; A = [[1, e^.5] / (1 + e^.5), [e^2, 1] / (e^2 + 1)]
        ("mean", [[4.1326220, 1.2449187], [2.6423912, 2.2384058]]),
    ],
)
def test_c09_dissimilar_channels_weigh_most_and_the_residual_is_the_value(
    scale: CamScale, expected: list[list[float]]
) -> None:
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0]]).view(1, 2, 1, 2)
    torch.testing.assert_close(hand_made(scale, 1.0)(x).view(2, 2), torch.tensor(expected), rtol=0, atol=2e-6)


def test_c09_without_gamma_the_output_is_the_value_convolution() -> None:
    attention = random_attention(4, "mean", gamma=0.0)
    x = torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(2))
    assert torch.equal(attention(x), attention.value(x))
    assert not torch.allclose(attention(x), x)


def test_fresh_attention_starts_as_its_value_convolution() -> None:
    assert ChannelAttention(3).gamma.tolist() == [0.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", ["mean", "none"])
def test_c10_energies_of_65536_places_stay_finite_under_autocast(scale: CamScale, dtype: torch.dtype) -> None:
    attention = hand_made(scale, 1.0)
    x = torch.full((1, 2, 256, 256), 10.0)
    assert not torch.tensor(10.0 * 10 * x[0, 0].numel()).half().isfinite()  # one energy, in half precision
    with torch.autocast("cpu", dtype=dtype):
        out = attention(x)
    assert out.dtype == dtype
    # all energies are equal, so each channel gets the mean of 30 and 10 besides its own value
    torch.testing.assert_close(out.float().mean((0, 2, 3)), torch.tensor([50.0, 30.0]), rtol=4e-3, atol=0)
    if scale == "mean":  # the gradients of undivided energies grow with the number of places
        out.float().mean().backward()
        for parameter in attention.parameters():
            assert parameter.grad is not None
            assert bool(parameter.grad.isfinite().all())


def test_autocast_changes_the_attention_by_rounding_alone() -> None:
    attention = random_attention(6, "mean")
    x = 3 * torch.randn(2, 6, 16, 16, generator=torch.Generator().manual_seed(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = attention(x).detach().float()
    whole = attention(x).detach()
    assert float((half - whole).norm() / whole.norm()) < 0.01


@pytest.mark.parametrize(("channels", "count"), [(32, 27_745), (64, 110_785), (128, 442_753), (256, 1_770_241)])
def test_parameters_are_three_convolutions_and_gamma(channels: int, count: int) -> None:
    assert (
        sum(p.numel() for p in ChannelAttention(channels).parameters()) == count == 3 * (9 * channels**2 + channels) + 1
    )
