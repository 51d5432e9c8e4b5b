"""Weights of other programs, made from Hugging Face's models with random numbers: the features must be theirs."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from medssl_cli.core.errors import CheckpointError, ConfigError
from medssl_cli.models.foreign import detect_source, vgg19_shapes
from medssl_cli.models.rope import rope_periods
from medssl_cli.models.zoo import StudentConfig, build_backbone, load_backbone, load_into, read_weights
from medssl_cli.services.convert_weights import WeightsRequest, convert_weights

State = dict[str, Tensor]


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def shaken(model: Any) -> Any:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def hugging_face(kind: str) -> Any:
    import transformers as hf

    size = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1}
    if kind == "dinov2":
        return shaken(hf.Dinov2Model(hf.Dinov2Config(**size, image_size=224, patch_size=14)))
    if kind == "giant":
        config = hf.Dinov2Config(**size, image_size=56, patch_size=14, use_swiglu_ffn=True)
        return shaken(hf.Dinov2Model(config))
    if kind == "registers":
        config = hf.Dinov2WithRegistersConfig(**size, image_size=224, patch_size=14, num_register_tokens=4)
        return shaken(hf.Dinov2WithRegistersModel(config))
    if kind == "dinov3":
        config = hf.DINOv3ViTConfig(**size, intermediate_size=256, image_size=224, patch_size=16, num_register_tokens=4)
        return shaken(hf.DINOv3ViTModel(config))
    if kind == "vit":
        config = hf.ViTConfig(**size, intermediate_size=256, image_size=224, patch_size=16)
        return shaken(hf.ViTModel(config, add_pooling_layer=True))
    config = hf.ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 2, 1, 1], layer_scale_init_value=0.5)
    return shaken(hf.ConvNextModel(config))


def names(state: State, rules: list[tuple[str, str]]) -> State:
    out = {}
    for old, tensor in state.items():
        name = old
        for pattern, text in rules:
            name = re.sub(pattern, text, name)
        out[name] = tensor.clone()
    return out


BLOCKS = [
    (r"^embeddings\.patch_embeddings(?:\.projection)?\.", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.", ""),
    (r"^(?:encoder\.|model\.)?layers?\.(\d+)\.", r"blocks.\1."),
    (r"layer_scale(\d)\.lambda1", r"ls\1.gamma"),
    (r"attention\.(?:o_proj|output\.dense)\.", "attn.proj."),
    (r"attention\.(?:attention\.)?(?:q_proj|query)\.", "attn.q."),
    (r"attention\.(?:attention\.)?(?:k_proj|key)\.", "attn.k."),
    (r"attention\.(?:attention\.)?(?:v_proj|value)\.", "attn.v."),
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
    (r"intermediate\.dense", "mlp.fc1"),
    (r"^(blocks\.\d+)\.output\.dense", r"\1.mlp.fc2"),
    (r"mlp\.up_proj", "mlp.fc1"),
    (r"mlp\.down_proj", "mlp.fc2"),
    (r"^layernorm\.", "norm."),
]


def native(model: Any) -> State:
    """Hugging Face's names as Meta's and DINO's own, queries, keys and values joined."""
    state = names(model.state_dict(), BLOCKS)
    for name in [name for name in state if name.endswith(".attn.q.weight")]:
        stem = name.removesuffix(".q.weight")
        parts = {part: (state.pop(f"{stem}.{part}.weight"), state.pop(f"{stem}.{part}.bias", None)) for part in "qkv"}
        state[f"{stem}.qkv.weight"] = torch.cat([weight for weight, _ in parts.values()])
        if parts["q"][1] is not None:
            width = parts["q"][0].shape[0]
            state[f"{stem}.qkv.bias"] = torch.cat([torch.zeros(width) if b is None else b for _, b in parts.values()])
    return {name: tensor for name, tensor in state.items() if not name.startswith(("pooler", "rope"))}


def dinov3_native(model: Any, *, mask: float | None = 1.0) -> State:
    """With storage tokens, stored periods and bias masks; the keys' bias is not 0 where the mask is."""
    state = native(model)
    state["storage_tokens"] = state.pop("register_tokens")
    state["rope_embed.periods"] = rope_periods(64, 100.0, "fp32")
    for name in [name for name in state if name.endswith("qkv.bias")]:
        state[name][64:128] = 3.0
        state[f"{name}_mask"] = torch.full((192,), float("nan")) if mask is None else torch.ones(192) * mask
        if mask is not None:
            state[f"{name}_mask"][64:128] = 0
    return state


def convert(folder: Path, state: Any, **options: Any) -> tuple[Any, dict[str, Any], Any]:
    """Model, card and result of a state that is saved and converted."""
    folder.mkdir(exist_ok=True)
    file = folder / options.pop("name", "weights.pth")
    save_file(state, file) if file.suffix == ".safetensors" else torch.save(state, file)
    result = convert_weights(WeightsRequest(file, folder / "out", **options))
    model, card = load_backbone(folder / "out" / "teacher_backbone.safetensors")
    return model, card, result


def same_features(ours: Any, theirs: Any, sizes: list[tuple[int, int]], atol: float = 1e-5) -> None:
    for size in sizes:
        picture = images(2, 3, *size)
        with torch.no_grad():
            interpolate = {"interpolate_pos_encoding": True} if type(theirs).__name__ == "ViTModel" else {}
            expected = theirs(picture, **interpolate).last_hidden_state
            found = ours(picture)
        first = expected.shape[1] - found.patches_BND.shape[1]
        torch.testing.assert_close(found.cls_BD, expected[:, 0], atol=atol, rtol=0)
        torch.testing.assert_close(found.patches_BND, expected[:, first:], atol=atol, rtol=0)


SIZES_14 = [(224, 224), (112, 112), (126, 182)]
SIZES_16 = [(224, 224), (112, 112), (96, 176)]


# --- Hugging Face's own names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kind", ["dinov2", "giant", "registers", "dinov3", "vit"])
def test_hugging_face_files_give_hugging_faces_features(tmp_path: Path, kind: str, suffix: str) -> None:
    theirs = hugging_face(kind)
    ours, card, result = convert(tmp_path, theirs.state_dict(), name=f"model{suffix}")
    same_features(ours, theirs, SIZES_16 if kind in ("vit", "dinov3") else SIZES_14)
    assert (card["source"], card["family"], card["kind"]) == ("hf", "vit", "backbone")
    assert "recognised as hf weights" in result.lines
    assert card["mean"] == [0.485, 0.456, 0.406]
    assert card["load_report"]["missing"] == (["rope_embed.periods", "blocks.0.attn.qkv.bias_mask",
        "blocks.1.attn.qkv.bias_mask"] if kind == "dinov3" else ["mask_token"] if kind == "vit" else [])  # fmt: skip


@pytest.mark.parametrize("prefix", ["", "dinov2."])
def test_the_older_names_of_hugging_face_files(tmp_path: Path, prefix: str) -> None:
    """As published files have them, and below the name that a model with a head gives its backbone."""
    theirs = hugging_face("dinov2")
    older = [
        (r"attention\.q_proj", "attention.attention.query"),
        (r"attention\.k_proj", "attention.attention.key"),
        (r"attention\.v_proj", "attention.attention.value"),
        (r"attention\.o_proj", "attention.output.dense"),
        (r"^(?:model|encoder)\.layer", "encoder.layer"),
        (r"^", prefix),
    ]
    state = names(theirs.state_dict(), older)
    assert f"{prefix}encoder.layer.0.attention.attention.query.weight" in state
    ours, _, result = convert(tmp_path, {**state, "classifier.weight": torch.zeros(3, 64)})
    same_features(ours, theirs, SIZES_14)
    assert "unexpected 1: classifier.weight" in result.lines


def test_facts_beside_a_hugging_face_file_are_read(tmp_path: Path) -> None:
    import transformers as hf

    config = hf.ViTConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=192, image_size=32, patch_size=8
    )
    theirs = shaken(hf.ViTModel(config, add_pooling_layer=False))
    with pytest.raises(CheckpointError) as caught:
        convert(tmp_path, theirs.state_dict())
    assert (caught.value.code, caught.value.exit_code) == ("weights_heads_unknown", 7)
    assert "num_heads=N" in caught.value.fix
    ours, _, _ = convert(tmp_path, theirs.state_dict(), overrides=("num_heads=4", "layernorm_eps=1e-12"))
    same_features(ours, theirs, [(32, 32), (64, 40)])
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    ours, card, _ = convert(tmp_path, theirs.state_dict())
    same_features(ours, theirs, [(32, 32)])
    assert (card["mean"], card["std"], card["arch"]["layernorm_eps"]) == ([0.5] * 3, [0.25] * 3, 1e-12)


# --- native names ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("kind", ["dinov2", "registers"])
def test_dinov2_files_give_the_same_features(tmp_path: Path, kind: str, chunked: bool) -> None:
    theirs = hugging_face(kind)
    state = native(theirs)
    if chunked:
        state = names(state, [(r"^blocks\.(\d+)\.", r"blocks.0.\1.")])
    rule = ("interpolate_offset=0",) if kind == "dinov2" else ()
    ours, card, _ = convert(tmp_path, {"teacher": {f"backbone.{n}": t for n, t in state.items()}}, overrides=rule)
    same_features(ours, theirs, SIZES_14)
    assert (card["source"], card["load_report"]["missing"]) == ("dinov2", [])


def test_t14_dinov2_without_registers_is_resized_as_it_was_trained(tmp_path: Path) -> None:
    """The historic rule: a scale factor of (grid + 0.1) / 16; restated with torch's interpolation."""
    theirs = hugging_face("dinov2")
    ours, card, result = convert(tmp_path, native(theirs))
    assert (card["interpolate_offset"], card["interpolate_antialias"]) == (0.1, False)
    assert any("positions resized with offset 0.1" in line for line in result.lines)
    grid = theirs.embeddings.position_embeddings[:, 1:].reshape(1, 16, 16, 64).permute(0, 3, 1, 2)
    scaled = torch.nn.functional.interpolate(grid, scale_factor=(8.1 / 16, 8.1 / 16), mode="bicubic")
    small = scaled.permute(0, 2, 3, 1).reshape(1, 64, 64)
    picture = images(1, 3, 112, 112)
    with torch.no_grad():
        patches = theirs.embeddings.patch_embeddings(picture) + small
        cls = theirs.embeddings.cls_token + theirs.embeddings.position_embeddings[:, :1]
        hidden = torch.cat([cls, patches], 1)
        layers = getattr(theirs, "encoder", None) or theirs.model
        for layer in layers.layer:
            hidden = layer(hidden)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        expected = theirs.layernorm(hidden)
        found = ours(picture)
    torch.testing.assert_close(found.cls_BD, expected[:, 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(found.patches_BND, expected[:, 1:], atol=1e-5, rtol=0)


def test_dinov3_files_give_the_same_features(tmp_path: Path) -> None:
    theirs = hugging_face("dinov3")
    ours, card, _ = convert(tmp_path, dinov3_native(theirs))
    same_features(ours, theirs, SIZES_16)
    assert (card["source"], card["arch"]["pos_embed_rope_dtype"]) == ("dinov3", "fp32")
    assert (card["arch"]["layernorm_eps"], card["arch"]["num_register_tokens"]) == (1e-5, 4)
    assert card["n_parameters"] == sum(p.numel() for p in ours.parameters())


def test_bias_masks_of_a_dinov3_file_are_kept_in_effect(tmp_path: Path) -> None:
    """Half of a bias where the mask is one half; none of a file whose mask was never filled is lost or NaN."""
    theirs = hugging_face("dinov3")
    unfilled, card, result = convert(tmp_path / "nan", dinov3_native(theirs, mask=None))
    same_features(unfilled, theirs, [(224, 224)])
    assert "2 bias masks of the file were never filled" in card["notes"][0]
    assert any(line.startswith("note: 2 bias masks") for line in result.lines)
    halved, _, _ = convert(tmp_path / "half", dinov3_native(theirs, mask=0.5))
    with torch.no_grad():
        for block in theirs.layer if hasattr(theirs, "layer") else theirs.model.layer:
            block.attention.q_proj.bias.mul_(0.5)
            block.attention.v_proj.bias.mul_(0.5)
    same_features(halved, theirs, [(224, 224)])


def test_meddinov3_is_recognised_with_its_settings_and_its_ct_window(tmp_path: Path) -> None:
    theirs = hugging_face("dinov3")
    state = {name: t for name, t in dinov3_native(theirs).items() if "qkv.bias" not in name}
    state["rope_embed.periods"] = rope_periods(64, 100.0, "bf16")
    heads = {f"{head}.mlp.0.weight": torch.zeros(2) for head in ("dino_head", "ibot_head")}
    file = {"teacher": {**{f"backbone.{name}": t for name, t in state.items()}, **heads}}
    ours, card, result = convert(tmp_path, file)
    arch = card["arch"]
    assert (card["source"], card["modality"]) == ("meddinov3", "ct")
    assert (arch["qkv_bias"], arch["pos_embed_rope_dtype"], arch["layernorm_eps"]) == (False, "bf16", 1e-6)
    assert card["preprocess"]["window_hu"] == [-1000.0, 1000.0]
    # as upstream in HU, and after the window has become 0 to 1
    for hu in (-1000.0, 40.0, 1000.0):
        unit = (hu + 1000) / 2000
        assert (unit - card["mean"]) / card["std"] == pytest.approx((hu - 65.1084213256836) / 178.01663208007812)
    assert "unexpected 2: dino_head.mlp.0.weight, ibot_head.mlp.0.weight" in result.lines
    with torch.no_grad():
        for block in theirs.layer if hasattr(theirs, "layer") else theirs.model.layer:
            block.attention.q_proj.bias.zero_()
            block.attention.v_proj.bias.zero_()
            block.norm1.eps = block.norm2.eps = 1e-6
        theirs.norm.eps = 1e-6
        theirs.rope_embeddings.forward = lambda picture: bf16_tables(picture.shape[-2] // 16, picture.shape[-1] // 16)
        same_features(ours, theirs, [(224, 224)], atol=0.02)  # theirs turns in fp32, ours in bf16 as in training
        for block in ours.flat_blocks():
            block.attn._split = split_in_fp32(block.attn)
        same_features(ours, theirs, [(224, 224), (96, 176)])


def test_m01_m02_every_tensor_arrives_and_only_the_first_prefix_goes(tmp_path: Path) -> None:
    state = native(hugging_face("dinov2"))
    ours, _, _ = convert(tmp_path, {"teacher": {f"backbone.{name}": tensor for name, tensor in state.items()}})
    kept = ours.state_dict()
    assert all(torch.equal(kept[name], tensor.reshape(kept[name].shape)) for name, tensor in state.items())
    inner = {f"backbone.{name}": tensor for name, tensor in state.items()}
    inner["backbone.x.backbone.y"] = torch.ones(2)
    assert "x.backbone.y" in refused(tmp_path / "inner", {"teacher": inner}).where


def bf16_tables(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Every intermediate rounded to bfloat16 by a cast of its own."""

    def rounded(value: Tensor) -> Tensor:
        return value.to(torch.bfloat16).float()

    exponents = rounded(rounded(2 * torch.arange(16.0)) / 32)
    periods = rounded(torch.tensor(100.0) ** exponents)
    sides = []
    for count in (rows, columns):
        centres = rounded(torch.arange(float(count)) + 0.5)
        sides.append(rounded(rounded(2 * rounded(centres / count)) - 1))
    y, x = torch.meshgrid(*sides, indexing="ij")
    places = torch.stack([y.flatten(), x.flatten()], -1)
    angles = rounded(rounded(2 * torch.pi * places)[:, :, None] / periods).flatten(1).tile(2)
    return rounded(angles.cos()), rounded(angles.sin())


def split_in_fp32(attention: Any) -> Callable[..., Any]:
    def split(x: Tensor, groups: Any, rope: Any) -> Any:
        wide = tuple(table.float() for table in rope)
        return type(attention)._split(attention, x, groups, wide)

    return split


def test_public_dinov3_periods_that_were_rounded_are_used_rounded(tmp_path: Path) -> None:
    state = dinov3_native(hugging_face("dinov3"))
    state["rope_embed.periods"] = rope_periods(64, 100.0, "mixed")
    _, card, _ = convert(tmp_path, state)
    assert card["arch"]["pos_embed_rope_dtype"] == "mixed"
    state["rope_embed.periods"] = rope_periods(64, 10000.0, "fp32")
    _, card, _ = convert(tmp_path, state, overwrite=True)
    assert card["arch"]["pos_embed_rope_base"] == pytest.approx(10000, rel=1e-4)
    state["rope_embed.periods"] = torch.arange(1.0, 17.0)
    with pytest.raises(CheckpointError, match="of no network"):
        convert(tmp_path, state, overwrite=True)


@pytest.mark.parametrize("source", ["ibot", "visionfm"])
def test_ibot_and_visionfm_files(tmp_path: Path, source: str) -> None:
    theirs = hugging_face("vit")
    state = {**native(theirs), "masked_embed": torch.full((1, 64), 0.5)}
    heads = {"head.mlp.0.weight": torch.zeros(2, 64), "head.last_layer2.weight_v": torch.zeros(2, 4)}
    file = {"student": {f"module.backbone.{n}": torch.zeros_like(t) for n, t in state.items()},
            "teacher": {**{f"backbone.{n}": t for n, t in state.items()}, **heads}}  # fmt: skip
    chosen = ("layernorm_eps=1e-12", "interpolate_offset=0")
    more = ("modality=OCT",) if source == "visionfm" else ()
    ours, card, result = convert(tmp_path, file, source="auto" if source == "ibot" else source, overrides=chosen + more)
    same_features(ours, theirs, SIZES_16)
    assert torch.equal(ours.mask_token, state["masked_embed"])
    assert card["source"] == source
    assert "unexpected 2: head.mlp.0.weight, head.last_layer2.weight_v" in result.lines
    assert (card["modality"], card["mean"][0]) == (("oct", 0.21091926) if more else (None, 0.485))
    _, card, _ = convert(tmp_path, file, overwrite=True)
    assert (card["interpolate_offset"], card["interpolate_antialias"]) == (0.1, False)
    _, card, _ = convert(tmp_path, file, overwrite=True, overrides=("modality=B-Ultrasound",))
    assert (card["source"], card["modality"], card["mean"][0]) == ("ibot", "ultrasound", 0.05989236)


def test_w11_either_network_of_a_file_with_both_can_be_taken(tmp_path: Path) -> None:
    state = {**native(hugging_face("vit")), "masked_embed": torch.zeros(1, 64)}
    other = {name: tensor + 1 for name, tensor in state.items()}
    file = {"student": other, "teacher": state, "epoch": 3}
    for role, expected in (("teacher", state), ("student", other)):
        ours, _, _ = convert(tmp_path, file, overwrite=True, overrides=(f"init_from={role}",))
        assert torch.equal(ours.cls_token, expected["cls_token"])
    torch.save(file, tmp_path / "both.pth")
    config = StudentConfig(arch="vit_tiny", embed_dim=64, depth=2, num_heads=1, layerscale=0, patch_size=16)
    for role, expected in ((None, state), ("teacher", state), ("student", other)):
        model = build_backbone(config, 224, None, stochastic_depth=False)
        load_into(model, read_weights(tmp_path / "both.pth", role), role=role)
        assert torch.equal(model.norm.weight, expected["norm.weight"])
        flat = {
            f"{who}.backbone.{n}": t for who, half in (("student", other), ("teacher", state)) for n, t in half.items()
        }
        load_into(model, flat, role=role)
        assert torch.equal(model.norm.weight, expected["norm.weight"])
    with pytest.raises(CheckpointError) as caught:
        convert(tmp_path, {"teacher": state}, overwrite=True, overrides=("init_from=student",))
    assert caught.value.code == "weights_role_missing"


def test_timm_files_with_and_without_registers(tmp_path: Path) -> None:
    theirs = hugging_face("vit")
    ours, card, result = convert(
        tmp_path / "a",
        {**native(theirs), "head.weight": torch.zeros(5, 64), "head.bias": torch.zeros(5)},
        overrides=("layernorm_eps=1e-12", "interpolate_antialias=false"),
    )
    same_features(ours, theirs, SIZES_16)
    assert card["source"] == "timm"
    assert "unexpected 2: head.weight, head.bias" in result.lines
    theirs = hugging_face("registers")
    state = native(theirs)
    del state["mask_token"]
    state["reg_token"] = state.pop("register_tokens")
    # timm adds the position of cls to the token itself
    state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
    state["pos_embed"] = state["pos_embed"][:, 1:]
    ours, card, _ = convert(tmp_path / "b", state)
    same_features(ours, theirs, SIZES_14)
    assert (card["interpolate_offset"], card["interpolate_antialias"]) == (0.0, True)
    assert card["notes"] == ["the file has no position for the cls token; 0 stands there"]


def test_retfound_files_lose_their_decoder_and_say_so(tmp_path: Path) -> None:
    theirs = hugging_face("vit")
    state = native(theirs)
    decoder = {
        "mask_token": torch.zeros(1, 1, 32),
        "decoder_embed.weight": torch.zeros(32, 64),
        "decoder_blocks.0.norm1.weight": torch.zeros(32),
        "decoder_pos_embed": torch.zeros(1, 197, 32),
    }
    ours, card, result = convert(
        tmp_path / "a", {"model": {**state, **decoder}, "epoch": 1}, overrides=("layernorm_eps=1e-12",)
    )
    same_features(ours, theirs, SIZES_16)
    assert (card["source"], card["interpolate_offset"]) == ("retfound", 0.0)
    assert any("the mask token is 32 wide, as of a decoder" in line for line in result.lines)
    assert "missing 1: mask_token" in result.lines
    state["fc_norm.weight"], state["fc_norm.bias"] = state.pop("norm.weight"), state.pop("norm.bias")
    ours, card, result = convert(
        tmp_path / "b", {"model": state}, source="retfound", overrides=("layernorm_eps=1e-12",)
    )
    same_features(ours, theirs, [(224, 224)])
    assert any("the file has fc_norm" in line for line in result.lines)


@pytest.mark.parametrize("naming", ["hf", "convnext", "timm"])
def test_convnext_files_give_hugging_faces_features(tmp_path: Path, naming: str) -> None:
    theirs = hugging_face("convnext")
    public = [
        (r"^embeddings\.patch_embeddings\.", "downsample_layers.0.0."),
        (r"^embeddings\.layernorm\.", "downsample_layers.0.1."),
        (r"^encoder\.stages\.(\d)\.downsampling_layer\.", r"downsample_layers.\1."),
        (r"^encoder\.stages\.(\d)\.layers\.(\d+)\.", r"stages.\1.\2."),
        (r"layer_scale_parameter$", "gamma"),
        (r"layernorm\.", "norm."),
    ]
    timm = [
        (r"^downsample_layers\.0\.", "stem."),
        (r"^downsample_layers\.(\d)\.", r"stages.\1.downsample."),
        (r"^stages\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
        (r"dwconv", "conv_dw"),
        (r"pwconv", "mlp.fc"),
        (r"^norm\.", "head.norm."),
    ]
    state = names(theirs.state_dict(), {"hf": [], "convnext": public, "timm": public + timm}[naming])
    ours, card, _ = convert(tmp_path, {"model": state} if naming == "convnext" else state)
    picture = images(2, 3, 96, 64)
    with torch.no_grad():
        expected, found = theirs(picture), ours(picture)
        tokens = theirs.layernorm(expected.last_hidden_state.flatten(2).transpose(1, 2))
    torch.testing.assert_close(found.cls_BD, expected.pooler_output, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.patches_BND, tokens, atol=1e-5, rtol=0)
    assert (card["source"], card["family"], card["load_report"]["missing"]) == (naming, "convnext", [])


def test_vgg19_becomes_features_and_no_backbone(tmp_path: Path) -> None:
    shapes = vgg19_shapes()
    assert len(shapes) == 32
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 20_024_384
    state = {name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}
    file, out = tmp_path / "vgg19.pth", tmp_path / "out" / "vgg19.safetensors"
    torch.save({**state, "classifier.0.bias": torch.zeros(3)}, file)
    result = convert_weights(WeightsRequest(file, out))
    card = json.loads(out.with_suffix(".json").read_text())
    assert (card["kind"], card["family"], card["n_parameters"]) == ("features", "vgg19", 20_024_384)
    assert "torchvision's ImageNet weights with dcbb9e9d" in result.summary()
    assert read_weights(out).keys() == shapes.keys()
    with pytest.raises(CheckpointError, match="card of the weights was rejected"):
        load_backbone(out)
    torch.save({**state, "features.34.weight": torch.zeros(8, 512, 3, 3)}, file)
    with pytest.raises(CheckpointError) as caught:
        convert_weights(WeightsRequest(file, tmp_path / "other"))
    assert "features.34.weight (8, 512, 3, 3), VGG-19 has (512, 512, 3, 3)" in caught.value.where


# --- positions are resized once --------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["dinov2", "ibot", "timm"])
def test_w35_features_at_512_are_the_same_whichever_way_the_model_is_built(tmp_path: Path, source: str) -> None:
    """Built for 224 and shown 512, converted for 512, and loaded into a network made for 512: one formula."""
    state = native(hugging_face("vit"))
    if source != "timm":
        state["mask_token" if source == "dinov2" else "masked_embed"] = torch.zeros(1, 64)
    stored, card, _ = convert(tmp_path / "a", state)
    resized, other, result = convert(tmp_path / "b", state, image_size=512)
    assert (card["img_size"], other["img_size"], card["source"]) == (224, 512, source)
    assert "resized 1: pos_embed: 14 x 14 to 32 x 32 positions" in result.lines
    config = StudentConfig(
        arch="vit_tiny", embed_dim=64, depth=2, num_heads=1, layerscale=0, patch_size=16,
        interpolate_offset=card["interpolate_offset"], interpolate_antialias=card["interpolate_antialias"],
    )  # fmt: skip
    built = build_backbone(config, 512, None, stochastic_depth=False).eval()
    load_into(built, state)
    picture = images(1, 3, 512, 512)
    with torch.no_grad():
        expected = stored(picture)
        for model in (resized, built):
            torch.testing.assert_close(model(picture).patches_BND, expected.patches_BND, atol=1e-6, rtol=0)
    with pytest.raises(ConfigError) as caught:
        convert(tmp_path / "c", state, image_size=500)
    assert "choose 496 or 512" in caught.value.fix


def test_dinov3_convnext_files_of_hugging_face_give_the_same_features(tmp_path: Path) -> None:
    import transformers as hf

    config = hf.DINOv3ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 2, 1, 1], layer_scale_init_value=0.5)
    theirs = shaken(hf.DINOv3ConvNextModel(config))
    ours, card, _ = convert(tmp_path, theirs.state_dict())
    picture = images(2, 3, 96, 64)
    with torch.no_grad():
        expected, found = theirs(picture).last_hidden_state, ours(picture)
    torch.testing.assert_close(found.cls_BD, expected[:, 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(found.patches_BND, expected[:, 1:], atol=1e-5, rtol=0)
    assert (card["source"], card["family"], card["load_report"]["unexpected"]) == ("hf", "convnext", [])


# --- refusals --------------------------------------------------------------------------------------------------------


def refused(tmp_path: Path, state: Any, **options: Any) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        convert(tmp_path, state, **options)
    assert caught.value.exit_code == 7
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
    return caught.value


def test_r08_t13_m01_whatever_would_stay_random_is_refused(tmp_path: Path) -> None:
    state = native(hugging_face("dinov2"))
    short = {name: tensor for name, tensor in state.items() if name != "blocks.1.norm2.bias"}
    assert "missing 1: blocks.1.norm2.bias" in refused(tmp_path, short).where
    gap = {name: tensor for name, tensor in state.items() if not name.startswith("blocks.0.mlp.fc1")}
    assert "feed-forward" in refused(tmp_path, gap).where
    shape = {**state, "blocks.1.attn.proj.weight": torch.zeros(64, 32)}
    assert "blocks.1.attn.proj.weight: file (64, 32), model (64, 64)" in refused(tmp_path, shape).where
    inner = {**state, "blocks.0.attn.q_norm.weight": torch.ones(64)}
    assert "blocks.0.attn.q_norm.weight" in refused(tmp_path, inner).where
    assert refused(tmp_path, {f"encoder.{n}": t for n, t in state.items()}).code == "weights_source_unknown"
    assert "its names are those of dinov2" in refused(tmp_path, state, source="convnext").where


def test_r08_a_renamed_tensor_is_refused_even_where_the_network_exists_without_it(tmp_path: Path) -> None:
    state = hugging_face("registers").state_dict()
    state["embeddings.registers"] = state.pop("embeddings.register_tokens")
    assert "unexpected 1: embeddings.registers" in refused(tmp_path, state).where


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None])
def test_r08_weights_that_are_no_finite_numbers_are_refused(tmp_path: Path, value: float | None) -> None:
    state = native(hugging_face("dinov2"))
    token = state["cls_token"]
    state["cls_token"] = token.to(torch.int32) if value is None else torch.full_like(token, value)
    error = refused(tmp_path, state)
    assert (error.code, "cls_token" in error.where) == ("weights_nonfinite", True)


def test_another_activation_beside_a_hugging_face_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"hidden_act": "quick_gelu"}))
    assert "quick_gelu" in refused(tmp_path, hugging_face("vit").state_dict()).where


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        ("convnext", ("num_heads=3", "layernorm_eps=1e-3", "interpolate_offset=0")),
        ("dinov3", ("interpolate_antialias=true",)),
        ("vit", ("pos_embed_rope_dtype=bf16",)),
    ],
)
def test_options_without_effect_are_named(tmp_path: Path, kind: str, overrides: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        convert(tmp_path, hugging_face(kind).state_dict(), overrides=overrides)
    assert caught.value.code == "config_without_effect"
    assert all(text.partition("=")[0] in caught.value.where for text in overrides)


def test_a_folder_is_answered_with_the_name_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        convert_weights(WeightsRequest(tmp_path, tmp_path / "out"))
    assert "model.safetensors" in caught.value.fix


def test_r08_w01_unreadable_files_are_refused_and_older_weights_stay(tmp_path: Path) -> None:
    convert(tmp_path, native(hugging_face("dinov2")))
    kept = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    good = (tmp_path / "weights.pth").read_bytes()
    bad = {
        "html": b"<!DOCTYPE html><html>404</html>",
        "cut": good[: len(good) // 2],
        "lfs": b"version https://git-lfs.github.com/spec/v1\n",
        "code": pickle.dumps({"x": Path("/nowhere")}),
        "empty": b"",
    }
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError) as caught:
            convert_weights(WeightsRequest(tmp_path / name, tmp_path / "out", overwrite=True))
        assert caught.value.exit_code == 7, name
    with pytest.raises(CheckpointError) as caught:
        convert_weights(WeightsRequest(tmp_path / "mistyped.pth", tmp_path / "out"))
    assert caught.value.code == "weights_missing"
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == kept


def test_other_weights_are_never_replaced_unasked(tmp_path: Path) -> None:
    state = native(hugging_face("dinov2"))
    convert(tmp_path, state)
    convert(tmp_path, state)  # the same again is fine
    other = {**state, "cls_token": state["cls_token"] + 1}
    with pytest.raises(ConfigError) as caught:
        convert(tmp_path, other)
    assert caught.value.code == "out_not_empty"
    ours, _, _ = convert(tmp_path, other, overwrite=True)
    assert torch.equal(ours.cls_token, other["cls_token"])
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="output folder is a file"):
        convert_weights(WeightsRequest(tmp_path / "weights.pth", tmp_path / "file"))
    own = tmp_path / "out" / "teacher_backbone.safetensors"
    with pytest.raises(ConfigError, match="onto themselves"):
        convert_weights(WeightsRequest(own, own))
    with pytest.raises(ConfigError) as caught:
        convert_weights(WeightsRequest(tmp_path / "weights.pth", tmp_path / "new", source="dinov4"))
    assert "meddinov3" in caught.value.fix


def test_init_recognises_foreign_files_itself() -> None:
    config = StudentConfig(arch="vit_tiny", embed_dim=64, depth=2, num_heads=1, patch_size=14)
    model = build_backbone(config, 224, ("t2", "adc"), stochastic_depth=False)
    theirs = hugging_face("dinov2")
    report = load_into(model, theirs.state_dict(), source="model.bin")
    assert (report.kind, report.missing) == ("hf", ("seq_embed",))
    assert torch.equal(model.cls_token, theirs.embeddings.cls_token)
    assert "recognised as hf weights" in report.lines()
    with_registers = build_backbone(
        config.model_copy(update={"num_register_tokens": 4}), 224, None, stochastic_depth=False
    )
    with pytest.raises(CheckpointError) as caught:  # above 95 %, and still short
        load_into(with_registers, theirs.state_dict())
    assert "missing 1: register_tokens" in caught.value.where
    deeper = native(hugging_face("dinov2"))
    shallow = build_backbone(config.model_copy(update={"depth": 1}), 224, None, stochastic_depth=False)
    with pytest.raises(CheckpointError) as caught:
        load_into(shallow, deeper)
    assert "unexpected" in caught.value.where


def test_periods_of_another_base_are_refused_and_another_rounding_is_noted() -> None:
    config = StudentConfig(arch="dinov3_vits16", embed_dim=64, depth=1, num_heads=1)
    model = build_backbone(config, 32, None, stochastic_depth=False)
    state = dict(model.state_dict())
    state["rope_embed.periods"] = rope_periods(64, 100.0, "bf16").float()
    assert any("rounded otherwise" in note for note in load_into(model, state).notes)
    state["rope_embed.periods"] = rope_periods(64, 10_000.0, "fp32")
    with pytest.raises(CheckpointError) as caught:
        load_into(model, state)
    assert "rope_embed.periods: file up to" in caught.value.where


def test_every_source_is_told_apart() -> None:
    vit = native(hugging_face("vit"))
    v3 = dinov3_native(hugging_face("dinov3"))
    cases = {
        "hf": hugging_face("vit").state_dict(),
        "dinov2": native(hugging_face("dinov2")),
        "dinov3": v3,
        "meddinov3": {n: t for n, t in v3.items() if "qkv.bias" not in n},
        "ibot": {**vit, "masked_embed": torch.zeros(1, 64)},
        "retfound": {**vit, "decoder_embed.weight": torch.zeros(1)},
        "timm": vit,
        "medssl": {**native(hugging_face("dinov2")), "seq_embed": torch.zeros(2, 64)},
        "vgg19": dict.fromkeys(vgg19_shapes(), torch.zeros(1)),
    }
    for source, state in cases.items():
        for prefix in ("", "module.", "teacher.backbone."):
            assert detect_source({prefix + name: t for name, t in state.items()}) == source
    assert detect_source({"layer1.0.weight": torch.zeros(1)}) is None
