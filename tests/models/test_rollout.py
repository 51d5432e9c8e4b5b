import pytest
import torch

from medssl_cli.models import layers
from medssl_cli.models.rollout import features_and_rollout
from medssl_cli.models.vit import VisionTransformer


def restless(sequences: tuple[str, ...] | None = None, *, registers: int = 0, chunks: int = 0) -> VisionTransformer:
    """A backbone whose attention is far from even."""
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=16, patch_size=4, embed_dim=16, depth=3, num_heads=2, layerscale=1.0, sequences=sequences,
        num_register_tokens=registers, block_chunks=chunks,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.6 * torch.randn(parameter.shape))
    return model.eval()


def rollout_of(maps: list[torch.Tensor]) -> torch.Tensor:
    """Row of the CLS token, as the paper writes it, in float64: (A + 1) / 2, rows to 1, multiplied up."""
    joint = torch.eye(maps[0].shape[-1], dtype=torch.float64).expand(maps[0].shape)
    for attention in maps:
        mixed = attention.double() + torch.eye(attention.shape[-1], dtype=torch.float64)
        joint = (mixed / mixed.sum(-1, keepdim=True)) @ joint
    return joint[:, 0]


@pytest.mark.parametrize("numbers", [1, 100, 2**21])
@pytest.mark.parametrize("chunks", [0, 2])
def test_rollout_is_the_product_of_the_papers_matrices(
    numbers: int, chunks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "_CARRIED_NUMBERS", numbers)
    model = restless(("a", "b"), registers=2, chunks=chunks)
    images, available = torch.rand(3, 2, 8, 12), torch.tensor([[True, True], [True, False], [False, True]])
    features, rollout = features_and_rollout(model, images, available)
    maps = model.attention_maps(images, available)
    assert max(float(row.max()) for row in maps) > 0.5
    expected = rollout_of(maps)
    torch.testing.assert_close(rollout.double(), expected[:, 3:], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(expected.sum(1), torch.ones(3, dtype=torch.float64))
    assert rollout.shape == (3, 2 * 2 * 3)
    plain = model(images, None, available)
    torch.testing.assert_close(features.patches_BND, plain.patches_BND)
    assert not any(block._forward_pre_hooks for block in model.flat_blocks())


def test_rollout_of_one_block_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = layers.Attention(4, 1)
    with torch.no_grad():
        attention.qkv.weight.zero_()
        attention.qkv.weight[0, 0] = attention.qkv.weight[4, 0] = 2.0  # q0 = k0 = 2 x0, scaled by 1 / sqrt(4)
        attention.qkv.bias.zero_()
    x = torch.tensor([[1.0, 0, 0, 0], [0.5, 0, 0, 0], [0, 0, 0, 0]])
    logits = torch.tensor([[2.0, 1.0, 0.0], [1.0, 0.5, 0.0], [0.0, 0.0, 0.0]])
    share = torch.tensor([[0.5, 0.25, 0.25]])
    carried = attention.carried(x, ((1, 3),), share)
    torch.testing.assert_close(carried, share @ logits.softmax(-1))
    with pytest.raises(ValueError, match="one group"):
        attention.carried(x, ((1, 2), (1, 1)), share)
