"""Rotary positions against Hugging Face's DINOv3 and against the formula, rounded by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from medssl_cli.models import layers
from medssl_cli.models.rollout import features_and_rollout
from medssl_cli.models.rope import RopeEmbedding, packed_table, rope_periods, rotate
from medssl_cli.models.vit import VisionTransformer
from medssl_cli.models.zoo import StudentConfig, build_backbone

CPU = torch.device("cpu")


def rope_vit(**settings: Any) -> VisionTransformer:
    torch.manual_seed(0)
    defaults: dict[str, Any] = {
        "img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "layerscale": 0.5,
        "pos_embed_type": "rope", "num_register_tokens": 2,
    }  # fmt: skip
    model = VisionTransformer(**{**defaults, **settings})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


# --- the table -------------------------------------------------------------------------------------------------------


def table_by_formula(rows: int, columns: int, round_: Any) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine for heads of width 64, each operation on float32 numbers and then rounded."""
    periods = [round_(np.float32(100.0) ** round_(round_(2.0 * j) / np.float32(32))) for j in range(16)]
    angles = np.zeros((rows * columns, 64), np.float32)
    for i in range(rows):
        for j in range(columns):
            place = []
            for index, count in ((i, rows), (j, columns)):
                unit = round_(round_(index + 0.5) / np.float32(count))
                coordinate = round_(round_(np.float32(2) * unit) - np.float32(1))
                turn = round_(np.float32(2 * math.pi) * coordinate)
                place += [round_(turn / p) for p in periods]
            angles[i * columns + j] = [*place, *place]
    return (np.vectorize(round_)(np.cos(angles)), np.vectorize(round_)(np.sin(angles)))


def to_bf16(value: Any) -> np.float32:
    """Nearest number with 8 bits of mantissa, ties to even."""
    bits = int(np.array(value, np.float32).view(np.uint32))
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16
    return np.array(rounded & 0xFFFFFFFF, np.uint32).view(np.float32)[()]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_table_is_the_formula_with_every_intermediate_rounded(dtype: Any) -> None:
    found = RopeEmbedding(64, dtype=dtype).table((1, 3, 14), 0, CPU)
    expected = table_by_formula(3, 14, to_bf16 if dtype == "bf16" else np.float32)
    # the cosine of numpy and of torch may round the last bit of float32 otherwise
    for part, value in zip(found.float().numpy(), expected, strict=True):
        np.testing.assert_allclose(part, value, atol=2e-6 if dtype == "fp32" else 0.004)
        assert dtype == "fp32" or (part == value).mean() > 0.99
    assert found.dtype == (torch.float32 if dtype == "fp32" else torch.bfloat16)


def test_m05_bf16_differs_measurably_from_fp32_and_from_rounded_periods_alone() -> None:
    tables = {d: RopeEmbedding(64, dtype=d).table((1, 14, 14), 0, CPU).float() for d in ("fp32", "bf16", "mixed")}
    assert 0.005 < float((tables["bf16"] - tables["fp32"]).abs().max()) < 0.05
    assert 0.001 < float((tables["mixed"] - tables["fp32"]).abs().max()) < 0.02
    assert torch.equal(rope_periods(64, 100.0, "mixed"), rope_periods(64, 100.0, "bf16").float())
    torch.testing.assert_close(
        rope_periods(64, 100.0, "fp32"), torch.tensor([100 ** (2 * j / 32) for j in range(16)]), rtol=1e-6, atol=0
    )


def test_coordinates_are_divided_by_their_own_the_larger_or_the_smaller_side() -> None:
    for how, (rows, columns) in {"separate": (2, 4), "max": (4, 4), "min": (2, 2)}.items():
        table = RopeEmbedding(4, normalize_coords=how).table((1, 2, 4), 0, CPU)  # type: ignore[arg-type]
        y, x = 2 * 0.5 / rows - 1, 2 * 2.5 / columns - 1  # row 0, column 2
        torch.testing.assert_close(table[0, 2, 0], torch.tensor(math.cos(2 * math.pi * y)))
        torch.testing.assert_close(table[1, 2, 1], torch.tensor(math.sin(2 * math.pi * x)))


def test_m04_rows_come_before_columns() -> None:
    """Three rows, five columns: the patch below the first turns its first half, the one beside it its second."""
    cosine = RopeEmbedding(8).table((1, 3, 5), 0, CPU)[0]  # two periods, 1 and 10: angles y, y, x, x, and again
    periods = np.array([1.0, 10.0])
    y = 2 * (np.arange(3) + 0.5) / 3 - 1
    x = 2 * (np.arange(5) + 0.5) / 5 - 1
    for place, row, column in ((0, 0, 0), (1, 0, 1), (5, 1, 0)):
        angles = np.concatenate([2 * np.pi * y[row] / periods, 2 * np.pi * x[column] / periods])
        np.testing.assert_allclose(cosine[place].numpy(), np.cos(np.tile(angles, 2)), atol=1e-6)


def test_m03_prefix_rests_and_every_sequence_has_the_same_positions() -> None:
    table = RopeEmbedding(16).table((3, 2, 2), 5, CPU)
    assert table.shape == (2, 5 + 12, 16)
    assert torch.equal(table[:, :5], torch.tensor([1.0, 0.0]).view(2, 1, 1).expand(2, 5, 16))
    assert torch.equal(table[:, 5:9], table[:, 9:13])
    assert torch.equal(table[:, 5:9], RopeEmbedding(16).table((1, 2, 2), 0, CPU))


def test_m03_rotation_leaves_queries_and_keys_of_the_prefix_and_turns_those_of_patches() -> None:
    grid = (2, 3)
    table = packed_table((RopeEmbedding(16).table((1, *grid), 3, CPU),), ((2, 3 + 6),))  # two pictures
    generator = torch.Generator().manual_seed(0)
    for x_TAE in torch.randn(2, 18, 2, 16, generator=generator):  # queries, then keys
        turned = rotate(x_TAE, table).unflatten(0, (2, 9))
        given = x_TAE.unflatten(0, (2, 9))
        assert torch.equal(turned[:, :3], given[:, :3])
        assert ((turned[:, 3:] - given[:, 3:]).abs().amax(-1) > 1e-2).all()
        torch.testing.assert_close(turned.norm(dim=-1), given.norm(dim=-1))


@pytest.mark.parametrize("registers", [0, 2])
def test_m03_attention_rotates_queries_and_keys_of_patches_only(
    registers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def watched(x_TAE: Tensor, table: Tensor) -> Tensor:
        seen.append((x_TAE, rotate(x_TAE, table)))
        return seen[-1][1]

    monkeypatch.setattr(layers, "rotate", watched)
    with torch.no_grad():
        rope_vit(num_register_tokens=registers)(images(1, 3, 32, 32))
    assert len(seen) == 4  # queries and keys of two blocks
    prefix = 1 + registers
    for before, after in seen:
        assert len(before) == prefix + 16
        assert torch.equal(after[:prefix], before[:prefix])
        assert (after[prefix:] != before[prefix:]).flatten(1).any(1).all()


def test_tables_are_kept_and_serve_training_after_inference() -> None:
    rope = RopeEmbedding(16, base=97.0)
    with torch.inference_mode():
        first = rope.table((1, 5, 5), 1, CPU)
    assert rope.table((1, 5, 5), 1, CPU) is first
    assert not first.is_inference()
    model = rope_vit(pos_embed_rope_base=97.0)
    with torch.inference_mode():
        model(images(1, 3, 40, 40))
    model(images(1, 3, 40, 40)).cls_BD.sum().backward()


def test_rotation_keeps_length_and_turns_by_the_angle() -> None:
    """Two channels of a head turn like a hand of a clock; scores depend on the difference of places only."""
    angle = 0.7
    table = torch.tensor([[math.cos(angle)] * 2, [math.sin(angle)] * 2]).view(2, 1, 1, 2)
    turned = rotate(torch.tensor([[[3.0, 4.0]]]), table)
    expected = [3 * math.cos(angle) - 4 * math.sin(angle), 4 * math.cos(angle) + 3 * math.sin(angle)]
    torch.testing.assert_close(turned.flatten(), torch.tensor(expected))
    q, k = torch.randn(1, 1, 16).expand(5, 1, 16), torch.randn(1, 1, 16).expand(5, 1, 16)
    tables = packed_table((RopeEmbedding(16).table((1, 1, 5), 0, CPU),), ((1, 5),))
    scores = (rotate(q, tables)[:, 0] @ rotate(k, tables)[:, 0].T).numpy()
    for step in range(1, 4):
        np.testing.assert_allclose(np.diagonal(scores, step), scores[0, step], atol=1e-4)


# --- random coordinates ----------------------------------------------------------------------------------------------


def test_coordinates_are_drawn_while_training_and_only_when_asked() -> None:
    plain = RopeEmbedding(16).train()
    state = torch.get_rng_state()
    assert plain.table((1, 3, 3), 1, CPU) is plain.table((1, 3, 3), 1, CPU)
    assert torch.equal(torch.get_rng_state(), state)
    rope = RopeEmbedding(16, rescale_coords=2.0)
    assert torch.equal(rope.eval().table((1, 3, 3), 1, CPU), plain.table((1, 3, 3), 1, CPU))
    rope.train()
    torch.manual_seed(3)
    first, second = rope.table((1, 3, 3), 1, CPU), rope.table((1, 3, 3), 1, CPU)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(rope.table((1, 3, 3), 1, CPU), first)


def test_random_coordinates_are_shifted_then_stretched_within_their_limits() -> None:
    rope = RopeEmbedding(4, shift_coords=0.3, jitter_coords=1.5, rescale_coords=2.0).train()
    torch.manual_seed(0)
    shifts, factors = zip(*(rope._draw() for _ in range(400)), strict=True)
    shift, factor = torch.stack(shifts), torch.stack(factors)
    assert 0.29 < float(shift.abs().max()) <= 0.3
    assert float(shift.mean().abs()) < 0.02
    assert 2.5 < float(factor.max()) <= 3.0
    assert 1 / 3 <= float(factor.min()) < 0.4
    both = RopeEmbedding(4, rescale_coords=2.0).train()._draw()[1]
    assert both[0] == both[1]
    torch.manual_seed(5)
    moved = rope.table((1, 2, 2), 0, CPU)
    torch.manual_seed(5)
    shift_2, factor_2 = rope._draw()
    y = (2 * 0.5 / 2 - 1 + float(shift_2[0])) * float(factor_2[0])
    torch.testing.assert_close(moved[0, 0, 0], torch.tensor(math.cos(2 * math.pi * y)), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="rescale_coords is the largest factor"):
        RopeEmbedding(4, rescale_coords=0.5)


def test_student_has_random_coordinates_the_teacher_has_none() -> None:
    config = StudentConfig(arch="dinov3_vits16", embed_dim=32, depth=1, num_heads=2, drop_path_rate=0.0)
    student = build_backbone(config, 32, None, stochastic_depth=True).train()
    teacher = build_backbone(config, 32, None, stochastic_depth=False).train()
    picture = images(1, 3, 32, 32)
    for model, random in ((student, True), (teacher, False)):
        with torch.no_grad():
            for block in model.flat_blocks():
                block.ls1.gamma.fill_(1.0)
            same = torch.equal(model(picture).patches_BND, model(picture).patches_BND)
        assert same != random


# --- in the backbone -------------------------------------------------------------------------------------------------


def test_features_equal_hugging_faces_dinov3() -> None:
    import transformers as hf

    config = hf.DINOv3ViTConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=2, num_register_tokens=4,
        layerscale_value=0.7, image_size=64, patch_size=16,
    )  # fmt: skip
    torch.manual_seed(1)
    theirs = hf.DINOv3ViTModel(config).eval()
    ours = VisionTransformer(
        img_size=64, patch_size=16, embed_dim=128, depth=3, num_heads=2, num_register_tokens=4, pos_embed_type="rope",
        mask_k_bias=True, layernorm_eps=1e-5,
    ).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        ours.cls_token.copy_(theirs.embeddings.cls_token)
        ours.register_tokens.copy_(theirs.embeddings.register_tokens)
        ours.mask_token.copy_(theirs.embeddings.mask_token[0])
        ours.patch_embed.proj.load_state_dict(theirs.embeddings.patch_embeddings.state_dict())
        ours.norm.load_state_dict(theirs.norm.state_dict())
        blocks = theirs.layer if hasattr(theirs, "layer") else theirs.model.layer
        for block, their in zip(ours.blocks, blocks, strict=True):
            attention = their.attention
            parts = (attention.q_proj, attention.k_proj, attention.v_proj)
            block.attn.qkv.weight.copy_(torch.cat([part.weight for part in parts]))
            nothing = torch.full((128,), 5.0)  # the keys' bias is masked
            block.attn.qkv.bias.copy_(torch.cat([parts[0].bias, nothing, parts[2].bias]))
            block.attn.proj.load_state_dict(attention.o_proj.state_dict())
            block.mlp.fc1.load_state_dict(their.mlp.up_proj.state_dict())
            block.mlp.fc2.load_state_dict(their.mlp.down_proj.state_dict())
            block.norm1.load_state_dict(their.norm1.state_dict())
            block.norm2.load_state_dict(their.norm2.state_dict())
            block.ls1.gamma.copy_(their.layer_scale1.lambda1)
            block.ls2.gamma.copy_(their.layer_scale2.lambda1)
        for size in ((64, 64), (48, 96)):
            picture = images(2, 3, *size)
            mask = images(2, size[0] * size[1] // 256, seed=2) > 0.7
            for given in (None, mask):
                expected = theirs(picture, bool_masked_pos=given).last_hidden_state
                found = ours(picture, given)
                torch.testing.assert_close(found.cls_BD, expected[:, 0], atol=1e-5, rtol=0)
                torch.testing.assert_close(found.registers_BRD, expected[:, 1:5], atol=1e-5, rtol=0)
                torch.testing.assert_close(found.patches_BND, expected[:, 5:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("sequences", [None, ("a", "b")])
def test_packed_crops_equal_single_ones(sequences: tuple[str, ...] | None) -> None:
    model = rope_vit(sequences=sequences)
    channels = 3 if sequences is None else 2
    crops = [images(2, channels, 32, 32), images(3, channels, 16, 24, seed=1)]
    together = model.forward_list(crops, [None, None], [None, None])
    for out, crop in zip(together, crops, strict=True):
        alone = model(crop)
        torch.testing.assert_close(out.cls_BD, alone.cls_BD, atol=1e-5, rtol=0)
        torch.testing.assert_close(out.patches_BND, alone.patches_BND, atol=1e-5, rtol=0)


def test_sequences_of_equal_content_have_equal_tokens() -> None:
    model = rope_vit(sequences=("a", "b"))
    found = model(images(1, 1, 32, 32).expand(1, 2, 32, 32))
    per_sequence = found.patches_BND.unflatten(1, found.grid)[0]
    torch.testing.assert_close(per_sequence[0], per_sequence[1], atol=1e-5, rtol=0)


def test_tall_mode_rotates_as_one_tall_picture() -> None:
    model, plain = rope_vit(sequences=("a", "b"), img_wise_pos_embed=False), rope_vit()
    plain.load_state_dict(model.state_dict(), strict=False)
    picture = images(2, 2, 32, 32)
    tall = plain(picture.reshape(2, 1, 64, 32))
    torch.testing.assert_close(model(picture).patches_BND, tall.patches_BND, atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the tracer touches what torch warns about
def test_a_block_with_rope_and_needed_tokens_compiles_whole() -> None:
    """One graph, without a break, for the whole block and for its short form."""
    block = rope_vit(num_register_tokens=0).blocks[0]
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    x_TD, groups = torch.randn(2 * 17 + 3 * 5, 32), ((2, 17), (3, 5))
    rope = tuple(RopeEmbedding(16).table((1, side, side), 1, CPU) for side in (4, 2))
    kept = layers.Subset(groups, (1, 2), (torch.tensor([1]), torch.tensor([2, 0])))
    needed = layers.Needed(torch.tensor([0, 17, 34]), torch.tensor([0, 1, 2]), torch.tensor([0, 0, 0]))
    for drops in ((None, None), (kept, kept)):
        for given in ((), (needed,)):
            args = (x_TD, groups, drops, rope, *given)
            torch.testing.assert_close(compiled(*args), block(*args), atol=1e-6, rtol=1e-6)


def test_places_matter_with_rope_and_do_not_without() -> None:
    picture = images(1, 3, 32, 32)
    moved = picture.unflatten(2, (4, 8)).flip(2).flatten(2, 3)  # rows of patches in the opposite order
    for kind, same in (("none", True), ("rope", False)):
        model = rope_vit(pos_embed_type=kind)
        a, b = model(picture), model(moved)
        back = b.patches_BND.unflatten(1, (4, 4)).flip(1).flatten(1, 2)
        assert bool((a.cls_BD - b.cls_BD).detach().abs().max() < 1e-5) == same
        assert bool((a.patches_BND - back).detach().abs().max() < 1e-5) == same


def test_training_with_rope_reaches_every_parameter_and_equals_recomputation() -> None:
    grads = []
    for checkpointing in (False, True):
        model = rope_vit(drop_path_rate=0.4, grad_checkpointing=checkpointing, pos_embed_rope_rescale_coords=2.0)
        torch.manual_seed(4)
        outs = model.train().forward_list(
            [images(4, 3, 32, 32), images(6, 3, 16, 16, seed=1)], [images(4, 16, seed=2) > 0.5, None], [None, None]
        )
        sum(out.cls_BD.sin().sum() + out.patches_BND.sum() for out in outs).backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        assert grad is not None, name
        torch.testing.assert_close(grads[1][name], grad, msg=name)


def test_a_model_in_half_precision_keeps_its_rotation() -> None:
    """The tables come from the settings, not from the buffer that was rounded with the weights."""
    model = rope_vit().to(torch.bfloat16)
    (table,) = model._rope([(1, 4, 4)], CPU) or ()
    assert torch.equal(table, rope_vit()._rope([(1, 4, 4)], CPU)[0])  # type: ignore[index]
    assert model(images(1, 3, 32, 32)).cls_BD.dtype == torch.bfloat16


def test_rollout_sees_the_rotation() -> None:
    model = rope_vit()
    picture = images(2, 3, 32, 32)
    _, rollout = features_and_rollout(model, picture)
    joint = torch.eye(1 + 2 + 16).expand(2, -1, -1)
    for attention in model.attention_maps(picture):
        joint = (0.5 * attention + 0.5 * torch.eye(19)) @ joint
    torch.testing.assert_close(rollout, joint[:, 0, 3:], atol=1e-5, rtol=1e-4)


# --- DINOv3's other settings -----------------------------------------------------------------------------------------


def test_m08_a_fresh_network_with_masked_key_bias_is_finite_and_its_keys_have_none() -> None:
    attention = layers.Attention(32, 2, mask_k_bias=True)
    assert attention.qkv.bias_mask.tolist() == [1.0] * 32 + [0.0] * 32 + [1.0] * 32
    x, groups = torch.randn(6, 32), ((1, 6),)
    with torch.no_grad():
        attention.qkv.bias.normal_()
        before = attention(x, groups)
        attention.qkv.bias[32:64] = 1e6
        assert torch.equal(attention(x, groups), before)
    assert before.isfinite().all()
    attention(x, groups).sum().backward()
    assert torch.equal(attention.qkv.bias.grad[32:64], torch.zeros(32))
    assert attention.qkv.bias.grad[64:].abs().min() > 0
    assert isinstance(layers.Attention(32, 2, qkv_bias=False, mask_k_bias=True).qkv, torch.nn.Linear)


def test_m06_the_epsilon_of_the_norms_shows_on_nearly_constant_tokens() -> None:
    """At a spread of 1e-3 a norm with 1e-5 divides by sqrt(1.1e-5), one with 1e-6 by sqrt(2e-6)."""
    token = torch.full((1, 8), 5.0, dtype=torch.float64)
    token[0, ::2] += 1e-3
    token[0, 1::2] -= 1e-3
    for name, epsilon in (("meddinov3_vitb16", 1e-6), ("dinov3_vitb16", 1e-5)):
        with torch.device("meta"):
            model = build_backbone(StudentConfig(arch=name), 224, None, stochastic_depth=False)
        for norm in (model.norm, model.blocks[0].norm1, model.blocks[-1].norm2):
            seen = torch.nn.functional.layer_norm(token, (8,), eps=norm.eps).abs()
            torch.testing.assert_close(seen, torch.full_like(seen, 1e-3 / math.sqrt(1e-6 + epsilon)))


@pytest.mark.parametrize(("arch", "count"), [("meddinov3_vitb16", 85_641_984), ("dinov3_vitb16", 85_669_632)])
def test_m07_dinov3_counts_are_the_published_ones(arch: str, count: int) -> None:
    with torch.device("meta"):
        model = build_backbone(StudentConfig(arch=arch), 224, None, stochastic_depth=False)
    assert sum(p.numel() for p in model.parameters()) == count
    assert model.settings["pos_embed_rope_dtype"] == ("bf16" if arch.startswith("med") else "fp32")
    assert model.norm.eps == (1e-6 if arch.startswith("med") else 1e-5)
    assert sum(p.numel() for p in model.blocks[0].parameters()) == 7_087_104 + 2304 * arch.startswith("dino")


@pytest.mark.parametrize(
    ("arch", "count"),
    [("tiny", 5_524_416), ("small", 21_665_664), ("base", 85_798_656), ("large", 303_301_632)],
)
def test_dino_and_ibot_counts_at_patch_16(arch: str, count: int) -> None:
    """Without the mask token, which DINO has not and iBOT adds."""
    config = StudentConfig(arch=f"vit_{arch}", patch_size=16, layerscale=0.0)
    with torch.device("meta"):
        model = build_backbone(config, 224, None, stochastic_depth=False)
    assert sum(p.numel() for p in model.parameters()) - model.embed_dim == count


def test_names_bring_settings_and_given_keys_win() -> None:
    config = StudentConfig(arch="dinov3_vitl16", num_register_tokens=0, pos_embed_rope_rescale_coords=None)
    assert (config.size, config.patch_size, config.pos_embed_type) == ((1024, 24, 16), 16, "rope")
    assert (config.num_register_tokens, config.pos_embed_rope_rescale_coords, config.mask_k_bias) == (0, None, True)
    again = StudentConfig.model_validate(config.model_dump())
    assert again == config
    named = StudentConfig.model_validate({"arch": "vit_base", "n_storage_tokens": 4, "norm_layer": "layernormbf16"})
    assert (named.num_register_tokens, named.layernorm_eps) == (4, 1e-5)
    assert StudentConfig.model_validate(named.model_dump()) == named
    with pytest.raises(ValueError, match="mean the same"):
        StudentConfig(n_storage_tokens=4, num_register_tokens=2)
    with pytest.raises(ValueError, match="mean the same"):
        StudentConfig(norm_layer="layernorm", layernorm_eps=1e-5)
    with pytest.raises(ValueError, match="multiple of 4"):
        StudentConfig(arch="dinov3_vits16", embed_dim=36, num_heads=6)


@pytest.mark.parametrize(("positions", "std"), [("rope", 0.02), ("none", 0.02), ("learned", 1e-6)])
def test_cls_and_storage_tokens_start_above_the_epsilon_of_a_norm(positions: str, std: float) -> None:
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=32, patch_size=16, embed_dim=256, depth=1, num_heads=4, num_register_tokens=4, pos_embed_type=positions
    )
    assert model.register_tokens is not None
    for tokens in (model.cls_token, model.register_tokens):
        assert float(tokens.detach().std()) == pytest.approx(std, rel=0.2)
