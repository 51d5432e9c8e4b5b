"""Renaming by hand, and networks told from shapes; features of whole files: tests/services/test_convert_weights.py."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor

from medssl_cli.core.errors import CheckpointError
from medssl_cli.models.convnext import ConvNeXt
from medssl_cli.models.foreign import ORIGINS, SOURCES, contradicts, foreign_parts, infer_settings, translate
from medssl_cli.models.rope import rope_periods
from medssl_cli.models.vit import VisionTransformer


def vit(**settings: Any) -> dict[str, Tensor]:
    defaults = {"img_size": 48, "patch_size": 16, "embed_dim": 128, "depth": 3, "num_heads": 2}
    with torch.device("meta"):
        model = VisionTransformer(**{**defaults, **settings})
    return dict(model.state_dict())


def test_queries_keys_and_values_are_joined_in_this_order_and_a_missing_bias_is_zero() -> None:
    state = {
        "embeddings.cls_token": torch.zeros(1, 1, 2),
        "embeddings.patch_embeddings.weight": torch.zeros(2, 3, 4, 4),
    }
    for number, part in enumerate("kvq"):
        state[f"model.layer.0.attention.{part}_proj.weight"] = torch.full((2, 2), float(number))
    state["model.layer.0.attention.q_proj.bias"] = torch.full((2,), 7.0)
    state["model.layer.0.attention.v_proj.bias"] = torch.full((2,), 8.0)
    found, notes = translate(state, "hf")
    assert found["blocks.0.attn.qkv.weight"][:, 0].tolist() == [2, 2, 0, 0, 1, 1]
    assert found["blocks.0.attn.qkv.bias"].tolist() == [7, 7, 0, 0, 8, 8]
    assert notes == ["the file has no position table: rotary positions with base 100 in fp32"]
    del state["model.layer.0.attention.k_proj.weight"]
    with pytest.raises(CheckpointError) as caught:
        translate(state, "hf")
    assert "the file has q, v" in caught.value.where


def test_gates_come_before_values() -> None:
    one, two, three = (torch.full((2, 1), float(n)) for n in (1, 2, 3))
    native = {"storage_tokens": one, "blocks.0.mlp.w1.weight": one, "blocks.0.mlp.w2.weight": two,
              "blocks.0.mlp.w3.weight": three}  # fmt: skip
    found, _ = translate(native, "dinov3")
    assert found["blocks.0.mlp.w12.weight"].flatten().tolist() == [1, 1, 2, 2]
    assert found["blocks.0.mlp.w3.weight"] is three
    face = {
        "layer.0.mlp.up_proj.weight": two,
        "layer.0.mlp.gate_proj.weight": one,
        "layer.0.mlp.down_proj.weight": three,
    }
    assert translate(face, "hf")[0].keys() == {"blocks.0.mlp.w12.weight", "blocks.0.mlp.w3.weight"}
    assert translate(face, "hf")[0]["blocks.0.mlp.w12.weight"].flatten().tolist() == [1, 1, 2, 2]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_register_tokens": 4, "ffn_layer": "swiglu", "layerscale": 0.0},
        {"qkv_bias": False, "proj_bias": False, "ffn_bias": False, "in_chans": 1},
        {"pos_embed_type": "rope", "mask_k_bias": True, "num_register_tokens": 4, "img_size": 224},
    ],
)
def test_settings_are_told_from_shapes(settings: dict[str, Any]) -> None:
    """A network built from them has the same names and shapes."""
    state = vit(**settings)
    if "rope_embed.periods" in state:
        state["rope_embed.periods"] = torch.tensor([100 ** (2 * j / 32) for j in range(16)])
    found = infer_settings(state, "dinov2")
    again = vit(**found)
    assert {name: t.shape for name, t in again.items()} == {name: t.shape for name, t in state.items()}
    assert (found["num_heads"], found["patch_size"]) == (2, 16)


def test_stages_of_a_convnext_are_told_from_shapes() -> None:
    with torch.device("meta"):
        model = ConvNeXt(depths=(1, 2, 3, 1), dims=(4, 8, 12, 16), layer_scale=0.0, in_chans=1)
    found = infer_settings(model.state_dict(), "convnext")
    assert found == {"in_chans": 1, "depths": [1, 2, 3, 1], "dims": [4, 8, 12, 16], "layer_scale": 0.0}
    state = {name: t for name, t in model.state_dict().items() if not name.startswith("stages.3")}
    with pytest.raises(CheckpointError, match="no network"):
        infer_settings(state, "convnext")


def test_shapes_of_no_network_here_are_refused_with_the_reason() -> None:
    for name, shape, word in (
        ("pos_embed", (1, 12, 128), "12 positions, no square grid"),
        ("blocks.0.mlp.fc1.weight", (384, 128), "(384, 128); 512"),
        ("patch_embed.proj.weight", (128, 3, 16, 8), "square patches"),
    ):
        with pytest.raises(CheckpointError) as caught:
            infer_settings({**vit(), name: torch.empty(shape, device="meta")}, "dinov2")
        assert word in caught.value.where
    with pytest.raises(CheckpointError) as caught:
        infer_settings({name: t for name, t in vit().items() if name != "cls_token"}, "dinov2")
    assert "cls_token is missing" in caught.value.where


def test_a_source_can_only_be_one_of_the_same_kind() -> None:
    assert not contradicts("visionfm", "ibot")
    assert not contradicts("retfound", "timm")
    assert not contradicts("dinov2", None)
    assert contradicts("convnext", "timm")
    assert contradicts("dinov3", "hf")
    assert set(ORIGINS) == set(SOURCES)
    with pytest.raises(ValueError, match="no source 'dinov9'"):
        translate({}, "dinov9")


def test_what_is_left_over_counts_as_a_head_or_as_a_part() -> None:
    names = [
        "head.weight",
        "fc_norm.bias",
        "blocks.3.norm1.bias",
        "norm_pre.weight",
        "ibot_head.x",
        "decoder_norm.bias",
    ]
    assert foreign_parts(names) == ["blocks.3.norm1.bias", "norm_pre.weight"]
    heads = ["local_head.0.weight", "projector.2.bias", "classifier.weight", "logit_scale", "dino_loss.center"]
    assert foreign_parts([*heads, "norms.3.weight", "storage_tokenz", "tokens"]) == ["storage_tokenz", "tokens"]


@pytest.mark.parametrize("source", ["dinov2", "dinov3", "hf", "timm", "convnext"])
def test_r08_r21_damaged_tensors_are_refused_in_the_error_family(source: str) -> None:
    """Each tensor in turn is taken away, or gets a shape that it never has."""
    kinds: dict[str, Any] = {
        "hf": {
            **{
                f"encoder.layer.0.attention.attention.{n}.weight": torch.zeros(64, 64)
                for n in ("query", "key", "value")
            },
            "embeddings.patch_embeddings.projection.weight": torch.zeros(64, 3, 8, 8),
            "embeddings.cls_token": torch.zeros(1, 1, 64),
            "embeddings.register_tokens": torch.zeros(1, 4, 64),
            "embeddings.mask_token": torch.zeros(1, 64),
            "embeddings.position_embeddings": torch.zeros(1, 5, 64),
            "encoder.layer.0.mlp.gate_proj.weight": torch.zeros(176, 64),
            "encoder.layer.0.mlp.up_proj.weight": torch.zeros(176, 64),
            "encoder.layer.0.mlp.down_proj.weight": torch.zeros(64, 176),
        },
        "convnext": {
            name: torch.zeros(t.shape) for name, t in ConvNeXt(depths=(1,) * 4, dims=(8,) * 4).state_dict().items()
        },
    }
    if source == "dinov3":
        state = {name: torch.zeros(t.shape) for name, t in vit(pos_embed_type="rope").items() if ".mlp.fc" not in name}
        for i in (0, 1):
            state[f"blocks.{i}.attn.qkv.bias_mask"] = torch.ones(384)
            state |= {f"blocks.{i}.mlp.{w}.weight": torch.zeros(344, 128) for w in ("w1", "w2")}
        state["rope_embed.periods"] = rope_periods(64, 100.0, "fp32")
    else:
        state = kinds.get(source) or {name: torch.zeros(t.shape) for name, t in vit().items()}
    infer_settings(translate(state, source)[0], source)
    shapes = [(), (0,), (3,), (2, 0), (2, 2, 2), (1, 0, 5), (1, 5, 0), (0, 3, 16, 16), (1, 1, 1, 1)]
    for name in state:
        for damaged in ({}, *({name: torch.zeros(shape)} for shape in shapes)):
            broken = {key: tensor for key, tensor in state.items() if key != name} | damaged
            with contextlib.suppress(CheckpointError):
                infer_settings(translate(broken, source)[0], source)
