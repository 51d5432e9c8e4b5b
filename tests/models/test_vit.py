"""The backbone against Hugging Face's DINOv2, and its promises for several MRI sequences."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from medssl_cli.core.protocols import Features
from medssl_cli.models import attention
from medssl_cli.models.layers import Needed, SampleMask
from medssl_cli.models.vit import VisionTransformer, resize_positions

NAMES = ("ax_t2wi", "ax_adc", "ax_dwi", "seg")


def small(**settings: Any) -> VisionTransformer:
    """A backbone of width 32 with weights large enough that every part of it matters."""
    torch.manual_seed(0)
    defaults: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return shaken(VisionTransformer(**{**defaults, "layerscale": 0.5, **settings}))


def shaken(model: VisionTransformer) -> VisionTransformer:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3 if "token" in name or "pos" in name else 0.1)
    return model.eval()


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def close(a: Features, b: Features, atol: float = 1e-5) -> None:
    assert a.grid == b.grid
    for name in ("cls_BD", "patches_BND", "registers_BRD"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), atol=atol, rtol=0)


# --- the oracle ------------------------------------------------------------------------------------------------------


def hugging_face(registers: int, ffn: str = "mlp") -> Any:
    import transformers as hf

    config = {
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "image_size": 224,
        "patch_size": 14,
        "layerscale_value": 0.7,
        "use_swiglu_ffn": ffn != "mlp",
    }
    torch.manual_seed(1)
    if registers:
        model = hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**config, num_register_tokens=registers))
    else:
        model = hf.Dinov2Model(hf.Dinov2Config(**config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's names as DINOv2's."""
    rules = (
        (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
        (r"^embeddings\.position_embeddings$", "pos_embed"),
        (r"^embeddings\.", ""),
        (r"^(?:encoder|model)\.layer\.(\d+)\.", r"blocks.\1."),
        (r"layer_scale(\d)\.lambda1", r"ls\1.gamma"),
        (r"attention\.o_proj\.|attention\.output\.dense\.", "attn.proj."),
        (r"attention\.(?:attention\.)?(q_proj|k_proj|v_proj|query|key|value)\.", r"attn.\1."),
        (r"mlp\.weights_in\.", "mlp.w12."),
        (r"mlp\.(?:weights_out|down_proj)\.", "mlp.w3."),
        (r"^layernorm\.", "norm."),
    )
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        for pattern, text in rules:
            name = re.sub(pattern, text, name)
        out[name] = tensor
    parts = [("attn.qkv", ("q_proj", "k_proj", "v_proj")), ("attn.qkv", ("query", "key", "value"))]
    parts.append(("mlp.w12", ("gate_proj", "up_proj")))
    for target, sources in parts:
        room = target.partition(".")[0]
        for name in [name for name in out if f"{room}.{sources[0]}." in name]:
            names = [name.replace(sources[0], source) for source in sources]
            out[name.replace(f"{room}.{sources[0]}", target)] = torch.cat([out.pop(n) for n in names])
    return out


@pytest.mark.parametrize(("registers", "ffn"), [(0, "mlp"), (0, "swiglufused"), (4, "mlp")])
def test_features_equal_hugging_face(registers: int, ffn: str) -> None:
    theirs = hugging_face(registers, ffn)
    # Hugging Face resizes to the exact size, with antialiasing for the register models only
    ours = VisionTransformer(
        embed_dim=48, depth=3, num_heads=3, num_register_tokens=registers, ffn_layer=ffn, interpolate_offset=0.0
    ).eval()
    ours.load_state_dict(renamed(theirs.state_dict()), strict=True)
    for size in ((224, 224), (112, 112), (126, 182)):  # stored grid, shrunk grid, not square
        picture = images(2, 3, *size)
        with torch.no_grad():
            expected = theirs(picture).last_hidden_state
            found = ours(picture)
        assert found.grid == (1, size[0] // 14, size[1] // 14)
        torch.testing.assert_close(found.cls_BD, expected[:, 0], atol=1e-5, rtol=0)
        torch.testing.assert_close(found.registers_BRD, expected[:, 1 : 1 + registers], atol=1e-5, rtol=0)
        torch.testing.assert_close(found.patches_BND, expected[:, 1 + registers :], atol=1e-5, rtol=0)


def test_w22_masked_tokens_and_inner_layers_equal_hugging_face() -> None:
    theirs = hugging_face(0)
    ours = VisionTransformer(embed_dim=48, depth=3, num_heads=3).eval()
    ours.load_state_dict(renamed(theirs.state_dict()), strict=True)
    picture, mask = images(2, 3, 224, 224), images(2, 256, seed=1) > 0.6
    with torch.no_grad():
        expected = theirs(picture, bool_masked_pos=mask, output_hidden_states=True)
        found = ours.forward_layers(picture, [0, -1], mask)
        inner = theirs.layernorm(expected.hidden_states[1])
    torch.testing.assert_close(found[1].patches_BND, expected.last_hidden_state[:, 1:], atol=1e-5, rtol=0)
    torch.testing.assert_close(found[0].patches_BND, inner[:, 1:], atol=1e-5, rtol=0)
    close(found[1], ours(picture, mask), atol=0)


def test_attention_maps_equal_hugging_face() -> None:
    theirs = hugging_face(0)
    theirs.set_attn_implementation("eager")
    ours = VisionTransformer(embed_dim=48, depth=3, num_heads=3).eval()
    ours.load_state_dict(renamed(theirs.state_dict()), strict=True)
    picture = images(1, 3, 224, 224)
    with torch.no_grad():
        expected = theirs(picture, output_attentions=True).attentions
    for found, each in zip(ours.attention_maps(picture), expected, strict=True):
        torch.testing.assert_close(found, each.mean(1), atol=1e-6, rtol=0)


# --- positions -------------------------------------------------------------------------------------------------------


def bicubic_by_formula(square: np.ndarray, target: int, scale: float) -> np.ndarray:
    """Keys' kernel with a = -0.75 at (i + 0.5) / scale - 0.5, edges repeated, in float64: (M, M, D) -> (t, t, D)."""

    def kernel(x: float) -> float:
        x, a = abs(x), -0.75
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

    side = len(square)
    out = np.zeros((target, target, square.shape[2]))
    for i in range(target):
        for j in range(target):
            y, x = (i + 0.5) / scale - 0.5, (j + 0.5) / scale - 0.5
            for m in range(int(np.floor(y)) - 1, int(np.floor(y)) + 3):
                for n in range(int(np.floor(x)) - 1, int(np.floor(x)) + 3):
                    value = square[min(max(m, 0), side - 1), min(max(n, 0), side - 1)]
                    out[i, j] += kernel(y - m) * kernel(x - n) * value
    return out


@pytest.mark.parametrize("offset", [0.0, 0.1])
def test_t14_positions_of_a_112_crop_from_a_16_grid(offset: float) -> None:
    stored = torch.randn(1, 256, 3, generator=torch.Generator().manual_seed(0))
    found = resize_positions(stored, (8, 8), offset=offset, antialias=False)
    expected = bicubic_by_formula(stored.view(16, 16, 3).double().numpy(), 8, (8 + offset) / 16)
    np.testing.assert_allclose(found.view(8, 8, 3).numpy(), expected, atol=2e-6)
    other = resize_positions(stored, (8, 8), offset=0.1 - offset, antialias=False)
    assert float((found - other).norm() / found.norm()) > 0.02  # the choice matters


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("grid", [(7, 9), (20, 16), (16, 32)])
def test_t14_positions_equal_torchs_interpolation(antialias: bool, grid: tuple[int, int]) -> None:
    stored = torch.randn(1, 256, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    square = stored.view(1, 16, 16, 3).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(square, size=grid, mode="bicubic", antialias=antialias)
    expected = expected.flatten(2).transpose(1, 2)
    found = resize_positions(stored, grid, offset=0.0, antialias=antialias)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    (grad,) = torch.autograd.grad(found.sin().sum(), stored)
    (other,) = torch.autograd.grad(expected.sin().sum(), stored)
    torch.testing.assert_close(grad, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize("grid", [(8, 8), (16, 8), (7, 21)])
def test_t14_offset_positions_equal_torchs_scale_factor(grid: tuple[int, int]) -> None:
    """The historic form scales both axes, even one whose size stays."""
    stored = torch.randn(1, 256, 3, generator=torch.Generator().manual_seed(0))
    square = stored.view(1, 16, 16, 3).permute(0, 3, 1, 2)
    scale = tuple((side + 0.1) / 16 for side in grid)
    expected = torch.nn.functional.interpolate(square, scale_factor=scale, mode="bicubic").flatten(2).transpose(1, 2)
    found = resize_positions(stored, grid, offset=0.1, antialias=False)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_t14_resize_rule_follows_the_registers() -> None:
    assert (small().interpolate_offset, small().interpolate_antialias) == (0.1, False)
    with_registers = small(num_register_tokens=2)
    assert (with_registers.interpolate_offset, with_registers.interpolate_antialias) == (0.0, True)
    assert small(interpolate_offset=0.0, interpolate_antialias=True).settings["interpolate_antialias"] is True


def test_the_stored_grid_is_used_as_it_is() -> None:
    stored = torch.randn(1, 16, 3)
    assert resize_positions(stored, (4, 4), offset=0.1, antialias=True) is stored


def test_matrices_of_an_inference_run_serve_training_later() -> None:
    model = small(img_size=40)
    with torch.inference_mode():
        model(images(1, 3, 24, 24))
    model(images(1, 3, 24, 24)).cls_BD.sum().backward()
    assert model.pos_embed.grad is not None


# --- several sequences -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("img_wise", [True, False])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_t01_one_to_four_sequences(count: int, img_wise: bool) -> None:
    model = small(sequences=NAMES[:count], use_mri_seq_embed=True, img_wise_pos_embed=img_wise)
    found = model(images(2, count, 24, 40))
    assert found.grid == (count, 3, 5)
    assert found.patches_BND.shape == (2, count * 15, 32)
    assert found.cls_BD.shape == (2, 32)
    assert found.registers_BRD.shape == (2, 0, 32)
    with pytest.raises(ValueError, match=f"images of {count + 1} sequences, the backbone takes {count}"):
        model(images(2, count + 1, 24, 40))


def test_one_sequence_without_embedding_is_a_grey_picture() -> None:
    grey, plain = small(sequences=NAMES[:1]), small()
    plain.load_state_dict(grey.state_dict(), strict=False)
    picture = images(2, 1, 32, 32)
    close(grey(picture), plain(picture.repeat(1, 3, 1, 1)))


def test_multi_sequence_forward_is_the_definition() -> None:
    """Tokens made by hand for each sequence, then run through the blocks."""
    model = small(sequences=NAMES[:3], use_mri_seq_embed=True)
    picture = images(2, 3, 32, 32)
    tokens = [model.cls_token.expand(2, 1, 32) + model.pos_embed[:, :1]]
    for s in range(3):
        patches = model.patch_embed(picture[:, s : s + 1].repeat(1, 3, 1, 1))
        direction = model.seq_embed[s] / model.seq_embed[s].norm()
        tokens.append(patches + model.pos_embed[:, 1:] + direction)
    x = torch.cat(tokens, dim=1)
    for one in model.blocks:
        x = one(x)
    x = model.norm(x)
    found = model(picture)
    torch.testing.assert_close(found.cls_BD, x[:, 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(found.patches_BND, x[:, 1:], atol=1e-5, rtol=0)


def test_tall_mode_has_the_positions_of_one_tall_image() -> None:
    model = small(sequences=NAMES[:2], img_wise_pos_embed=False)
    plain = small()
    plain.load_state_dict(model.state_dict(), strict=False)
    picture = images(2, 2, 32, 32)
    tall = plain(picture.reshape(2, 1, 64, 32).repeat(1, 3, 1, 1))
    found = model(picture)
    torch.testing.assert_close(found.cls_BD, tall.cls_BD, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.patches_BND, tall.patches_BND, atol=1e-5, rtol=0)


def test_sequence_embedding_counts_by_direction_only_and_not_at_all_when_off() -> None:
    picture = images(1, 3, 32, 32)
    for use in (True, False):
        model = small(sequences=NAMES[:3], use_mri_seq_embed=use)
        before = model(picture)
        with torch.no_grad():
            model.seq_embed.mul_(5)
        close(model(picture), before)
        with torch.no_grad():
            model.seq_embed.normal_()
        moved = float((model(picture).cls_BD - before.cls_BD).detach().abs().max())
        assert moved > 1e-3 if use else moved == 0
        model(picture).cls_BD.sum().backward()
        assert model.seq_embed.grad is not None


def test_permuting_sequences_together_with_their_embeddings_changes_nothing() -> None:
    model, order = small(sequences=NAMES[:3], use_mri_seq_embed=True), [2, 0, 1]
    picture = images(2, 3, 32, 32)
    straight = model(picture)
    alone = model(picture[:, order])
    with torch.no_grad():
        model.seq_embed.copy_(model.seq_embed[order])
    together = model(picture[:, order])
    torch.testing.assert_close(together.cls_BD, straight.cls_BD, atol=1e-5, rtol=0)
    there = together.patches_BND.unflatten(1, together.grid)
    torch.testing.assert_close(there, straight.patches_BND.unflatten(1, straight.grid)[:, order], atol=1e-5, rtol=0)
    assert (alone.cls_BD - straight.cls_BD).detach().abs().max() > 1e-3


def test_t16_a_bright_patch_lies_at_its_place_in_the_grid() -> None:
    model = small(sequences=NAMES[:3], depth=1, layerscale=1e-5)
    picture = torch.zeros(1, 3, 32, 48)
    base = model(picture)
    picture[0, 1, 16:24, 32:40] = 5.0  # row 2, column 4 of the second sequence
    found = model(picture)
    assert found.grid == (3, 4, 6)
    change = (found.patches_BND - base.patches_BND).norm(dim=-1).unflatten(1, found.grid)[0]
    assert np.unravel_index(int(change.argmax()), found.grid) == (1, 2, 4)


@pytest.mark.parametrize("content", [0.0, 1e6, float("nan")])
def test_an_absent_sequence_does_not_leak_its_content(content: float) -> None:
    model = small(sequences=NAMES[:3], use_mri_seq_embed=True)
    available = torch.tensor([[True, False, True], [True, True, True]])
    picture = images(2, 3, 32, 32)
    expected = model(picture, available_BS=available)
    assert (expected.cls_BD[0] - model(picture).cls_BD[0]).detach().abs().max() > 1e-3
    close(
        Features(*(t[1:] for t in (expected.cls_BD, expected.patches_BND, expected.registers_BRD)), expected.grid),
        model(picture[1:]),
    )
    picture[0, 1] = content
    close(model(picture, available_BS=available), expected, atol=0)


def test_an_absent_sequence_is_a_fully_masked_one() -> None:
    model = small(sequences=NAMES[:3], use_mri_seq_embed=True)
    picture, mask = images(2, 3, 32, 32), torch.zeros(2, 48, dtype=torch.bool)
    mask[0, 16:32] = True
    mask[1, 5] = True
    available = torch.tensor([[True, False, True], [True, True, False]])
    both = mask.clone()
    both[1, 32:] = True
    close(model(picture, mask, available), model(picture, both), atol=0)


def test_a_sample_without_any_sequence_is_refused() -> None:
    model = small(sequences=NAMES[:2])
    with pytest.raises(ValueError, match=r"at least one sequence is required; samples \[1\]"):
        model(images(2, 2, 32, 32), available_BS=torch.tensor([[True, False], [False, False]]))
    with pytest.raises(ValueError, match=r"availability of \(2, 3\), the images \(2, 2\)"):
        model(images(2, 2, 32, 32), available_BS=torch.ones(2, 3, dtype=torch.bool))


def test_token_mask_hides_exactly_its_patches() -> None:
    model = small(sequences=NAMES[:2])
    mask = torch.zeros(1, 32, dtype=torch.bool)
    mask[0, 16 + 6] = True  # second sequence, row 1, column 2
    picture = images(1, 2, 32, 32)
    tokens, _ = model._embed(picture, mask, None, {})
    plain, _ = model._embed(picture, None, None, {})
    differs = (tokens != plain).any(-1)[0].nonzero().flatten().tolist()
    assert differs == [1 + 16 + 6]
    torch.testing.assert_close(tokens[0, 23], model.mask_token[0] + model.pos_embed[0, 1 + 6])
    altered = picture.clone()
    altered[0, 1, 8:16, 16:24] = 9.0
    close(model(altered, mask), model(picture, mask), atol=0)
    with pytest.raises(ValueError, match=r"token mask of \(1, 16\), the tokens are \(1, 32\)"):
        model(picture, mask[:, :16])


# --- packed crops ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["sdpa", "plain"])
@pytest.mark.parametrize("registers", [0, 2])
def test_forward_list_equals_forward_for_each(backend: str, registers: int) -> None:
    model = small(
        sequences=NAMES[:3], use_mri_seq_embed=True, num_register_tokens=registers, drop_path_rate=0.0
    ).train()
    big, little = images(2, 3, 32, 32), images(4, 3, 16, 24, seed=1)
    mask, available = images(2, 48, seed=2) > 0.5, torch.tensor([[True, True, False]] * 4)
    attention.set_backend(backend)
    try:
        together = model.forward_list([big, little], [mask, None], [None, available])
        alone = [model(big, mask), model(little, None, available)]
        grads = []
        for outs in (together, alone):
            model.zero_grad()
            sum(out.cls_BD.sin().sum() + out.patches_BND.cos().sum() for out in outs).backward()
            grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    finally:
        attention.set_backend(None)
    for a, b in zip(together, alone, strict=True):
        close(a, b)
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], atol=1e-4, rtol=1e-4, msg=name)


def test_stochastic_depth_trains_on_subsets_follows_the_seed_and_is_off_in_evaluation() -> None:
    model = small(drop_path_rate=0.5, depth=4)
    crops = [images(8, 3, 32, 32), images(12, 3, 16, 16, seed=1)]
    quiet = model.forward_list(crops, [None, None], [None, None])

    def noisy(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model.train().forward_list(crops, [None, None], [None, None])[1].cls_BD.detach()

    assert torch.equal(noisy(1), noisy(1))
    assert not torch.equal(noisy(1), noisy(2))
    assert (noisy(1) - quiet[1].cls_BD).detach().abs().max() > 1e-2
    assert torch.equal(model.eval()(crops[0]).cls_BD, small(drop_path_rate=0.0, depth=4)(crops[0]).cls_BD)


def test_rates_are_uniform_or_rise_linearly() -> None:
    assert small(drop_path_rate=0.3, depth=4).drop_rates == [0.3] * 4
    rising = small(drop_path_rate=0.3, drop_path_uniform=False, depth=4).drop_rates
    assert rising == pytest.approx([0, 0.1, 0.2, 0.3])


def test_gradient_checkpointing_gives_the_same_gradients_with_stochastic_depth() -> None:
    grads = []
    for checkpointing in (False, True):
        model = small(drop_path_rate=0.4, depth=3, grad_checkpointing=checkpointing).train()
        torch.manual_seed(3)
        outs = model.forward_list([images(4, 3, 32, 32), images(6, 3, 16, 16)], [None, None], [None, None])
        sum(out.cls_BD.square().sum() for out in outs).backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) > 20
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


# --- number types, names, compilation --------------------------------------------------------------------------------


@pytest.mark.parametrize("low_precision", ["autocast", "bfloat16", "float16"])
def test_low_precision_stays_close_to_float32(low_precision: str) -> None:
    model = small(sequences=NAMES[:2], use_mri_seq_embed=True)
    picture, small_picture = images(3, 2, 32, 32), images(3, 2, 16, 16)
    mask = images(3, 32, seed=4) > 0.7
    expected = [out.cls_BD.detach() for out in model.forward_list([picture, small_picture], [mask, None], [None, None])]
    model.train()
    if low_precision == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            outs = model.forward_list([picture, small_picture], [mask, None], [None, None])
    else:
        model.to(getattr(torch, low_precision))
        outs = model.forward_list([picture, small_picture], [mask, None], [None, None])
        assert outs[0].cls_BD.dtype == getattr(torch, low_precision)
    for out, each in zip(outs, expected, strict=True):
        assert torch.nn.functional.cosine_similarity(out.cls_BD.float(), each, dim=-1).min() > 0.99
    sum(out.cls_BD.float().sum() for out in outs).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_stochastic_depth_works_under_autocast() -> None:
    model = small(drop_path_rate=0.4).train()
    with torch.autocast("cpu", torch.bfloat16):
        outs = model.forward_list([images(4, 3, 32, 32), images(6, 3, 16, 16)], [None, None], [None, None])
        outs.append(model(images(4, 3, 32, 32)))
    sum(out.cls_BD.float().square().sum() for out in outs).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_names_are_those_of_dinov2() -> None:
    block = {
        *(f"norm{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")),
        *(f"attn.{part}.{kind}" for part in ("qkv", "proj") for kind in ("weight", "bias")),
        *(f"mlp.{part}.{kind}" for part in ("fc1", "fc2") for kind in ("weight", "bias")),
        "ls1.gamma",
        "ls2.gamma",
    }
    rest = {"cls_token", "pos_embed", "mask_token", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    rest |= {"norm.weight", "norm.bias"}
    assert set(small().state_dict()) == rest | {f"blocks.{i}.{name}" for i in range(2) for name in block}
    extra = set(small(num_register_tokens=1, sequences=["t1"], ffn_layer="swiglu").state_dict()) - rest
    assert {"register_tokens", "seq_embed", "blocks.0.mlp.w12.weight", "blocks.1.mlp.w3.bias"} <= extra
    shapes = {name: tuple(p.shape) for name, p in small(num_register_tokens=3).named_parameters() if "." not in name}
    assert shapes == {
        "cls_token": (1, 1, 32),
        "pos_embed": (1, 17, 32),
        "register_tokens": (1, 3, 32),
        "mask_token": (1, 32),
    }


def test_chunked_blocks_have_dinov2s_names_and_the_same_numbers() -> None:
    flat, chunked = small(depth=4), small(depth=4, block_chunks=2)
    names = {".".join(name.split(".")[:3]) for name in chunked.state_dict() if name.startswith("blocks.")}
    assert names == {"blocks.0.0", "blocks.0.1", "blocks.1.2", "blocks.1.3"}
    close(flat(images(1, 3, 32, 32)), chunked(images(1, 3, 32, 32)), atol=0)


def test_fresh_weights_follow_the_specification() -> None:
    torch.manual_seed(0)
    model = VisionTransformer(embed_dim=192, depth=1, num_heads=3, sequences=["a", "b"], num_register_tokens=4)
    linear = model.blocks[0].mlp.fc1
    assert float(linear.weight.detach().std()) == pytest.approx(0.02, rel=0.02)
    assert not linear.bias.any()
    assert float(model.pos_embed.detach().std()) == pytest.approx(0.02, rel=0.02)
    assert float(model.cls_token.detach().abs().max()) < 1e-5
    assert float(model.register_tokens.detach().abs().max()) < 1e-5
    assert not model.mask_token.any()
    assert float(model.seq_embed.detach().norm(dim=1).mean()) == pytest.approx(192**0.5, rel=0.15)
    assert model.blocks[0].ls1.gamma.tolist() == pytest.approx([1e-5] * 192)


def test_a_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="30 is no multiple of the patch size 8; the nearest legal size is 24 or 32"):
        small()(images(1, 3, 32, 30))
    with pytest.raises(ValueError, match="different names"):
        small(sequences=["t1", "t1"])


@pytest.mark.filterwarnings("ignore")  # the tracer touches what torch warns about
def test_blocks_compile_in_place_and_keep_their_names() -> None:
    model, crops = small(drop_path_rate=0.4).train(), [images(4, 3, 32, 32), images(6, 3, 16, 16)]

    def run() -> Tensor:
        torch.manual_seed(3)
        return model.forward_list(crops, [None, None], [None, None])[0].cls_BD.detach()

    expected, names = run(), list(model.state_dict())
    for block in model.flat_blocks():
        block.compile(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(), expected, atol=1e-6, rtol=0)
    assert list(model.state_dict()) == names


# --- needed tokens alone ---------------------------------------------------------------------------------------------


def wanted_places(counts: list[tuple[int, int]], seed: int = 0) -> list[Tensor | None]:
    """Some places of each group, unordered; none of the second."""
    generator = torch.Generator().manual_seed(seed)
    return [
        None if group == 1 else torch.randperm(samples * tokens, generator=generator)[: samples * tokens // 3]
        for group, (samples, tokens) in enumerate(counts)
    ]


@pytest.mark.parametrize("rate", [0.0, 0.4])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_register_tokens": 2, "sequences": NAMES[:2], "use_mri_seq_embed": True},
        {"grad_checkpointing": True, "ffn_layer": "swiglu"},
        {"block_chunks": 2, "layerscale": 0.0},
        {"pos_embed_type": "rope", "num_register_tokens": 1, "depth": 1},
    ],
    ids=["plain", "sequences", "checkpointing", "chunks", "rope"],
)
def test_needed_tokens_equal_the_whole_pass_with_gradients(settings: dict[str, Any], rate: float) -> None:
    model = small(**{"depth": 3, "drop_path_rate": rate, **settings}).train()
    channels = len(model.sequences or (0, 0, 0))
    crops = [images(4, channels, 32, 32), images(6, channels, 16, 16, seed=1), images(3, channels, 24, 16, seed=2)]
    sequences = len(model.sequences or (0,))
    counts = [(4, 16 * sequences), (6, 4 * sequences), (3, 6 * sequences)]
    mask = torch.rand(counts[0], generator=torch.Generator().manual_seed(3)) > 0.5
    available = torch.tensor([[True, False]] * 6) if sequences == 2 else None
    given = (crops, [mask, None, None], [None, available, None])
    wanted = wanted_places(counts)
    grads = []
    torch.manual_seed(7)
    whole = [
        (out.cls_BD, out.patches_BND.flatten(0, 1)[torch.tensor([], dtype=torch.int64) if w is None else w])
        for out, w in zip(model.forward_list(*given), wanted, strict=True)
    ]
    torch.manual_seed(7)
    needed = model.forward_needed(*given, wanted)
    assert torch.rand(1) == (torch.manual_seed(7), model.forward_list(*given), torch.rand(1))[2]  # as many draws
    for outs in (whole, needed):
        model.zero_grad()
        sum(cls.sin().sum() + patches.cos().sum() for cls, patches in outs).backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for (cls, patches), (expected_cls, expected_patches) in zip(needed, whole, strict=True):
        torch.testing.assert_close(cls, expected_cls, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(patches, expected_patches, atol=1e-6, rtol=1e-6)
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=2e-5, rtol=1e-5, msg=name)


def test_needed_tokens_of_one_masked_group_and_in_half_precision() -> None:
    """A drop drawn sample by sample, and autocast."""
    model = small(drop_path_rate=0.1, depth=2).train()
    x_TD, groups = torch.randn(3 * 5, 32), ((3, 5),)
    drop = SampleMask(torch.tensor([0.0, 1.25, 1.25]).view(-1, 1, 1))
    places = torch.tensor([0, 5, 10, 7, 3])
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            whole = model.blocks[0](x_TD, groups, (drop, drop))[places]
            needed = Needed(places, places // 5, places % 5)
            found = model.blocks[0](x_TD, groups, (drop, drop), None, needed)
        assert found.dtype == whole.dtype == torch.float32
        torch.testing.assert_close(found, whole, atol=0.02 if autocast else 1e-6, rtol=0)


def test_needed_tokens_never_look_at_a_value() -> None:
    """A look at a value would stop the queue of a GPU; with tensors that have none it raises."""
    model = small(drop_path_rate=0.5).train()
    model(images(1, 3, 16, 16))  # kernels are chosen by running them, tables are made, once
    with FakeTensorMode(allow_non_fake_inputs=True):
        crops = [torch.rand(4, 3, 32, 32), torch.rand(8, 3, 16, 16)]
        index = torch.randperm(9)
        outs = model.forward_needed(crops, [None, None], [None, None], [index, None])
        with pytest.raises(DataDependentOutputException):
            index.max().item()
    assert [(cls.shape, patches.shape) for cls, patches in outs] == [((4, 32), (9, 32)), ((8, 32), (0, 32))]


def test_needed_tokens_go_through_the_call_of_every_block() -> None:
    """None is gone around: what hangs on a block's call (sharding, compilation) stays in force."""
    model = small(depth=3)
    calls: list[int] = []
    for i, block in enumerate(model.flat_blocks()):
        block.register_forward_pre_hook(lambda *_, i=i: calls.append(i))
    model.forward_needed([images(2, 3, 32, 32)], [None], [None], [torch.tensor([31, 0])])
    assert calls == [0, 1, 2]
