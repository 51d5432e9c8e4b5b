"""Named sizes, and weights that load fully or not at all."""

from __future__ import annotations

import argparse
import json
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from medssl_cli.core.config import load_config
from medssl_cli.core.errors import CheckpointError, ConfigError
from medssl_cli.models.vit import VisionTransformer
from medssl_cli.models.zoo import (
    ARCHS,
    StudentConfig,
    build_backbone,
    card_path,
    card_warnings,
    differences_to_card,
    load_backbone,
    load_into,
    read_card,
    read_weights,
    save_backbone,
)

TINY: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def tiny(seed: int = 0, **settings: Any) -> VisionTransformer:
    torch.manual_seed(seed)
    return VisionTransformer(**{**TINY, **settings}).eval()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["vit", "medical_vit", "glioma_vit"])
@pytest.mark.parametrize(
    ("size", "ffn", "at_224", "at_518"),
    [
        ("small", "mlp", 21_629_184, 22_056_576),
        ("base", "mlp", 85_725_696, 86_580_480),
        ("large", "mlp", 303_228_928, 304_368_640),
        ("giant2", "mlp", 1_134_689_280, None),
        ("giant2", "swiglufused", 1_134_771_200, 1_136_480_768),
    ],
)
def test_t27_all_sizes_build_with_the_published_counts(
    family: str, size: str, ffn: str, at_224: int, at_518: int | None
) -> None:
    config = StudentConfig(arch=f"{family}_{size}", patch_size=14, ffn_layer=ffn)  # type: ignore[arg-type]
    width, _, heads = config.size
    assert width == 64 * heads
    for img_size, count in ((224, at_224), (518, at_518)):
        if count is not None:
            with torch.device("meta"):
                plain = build_backbone(config, img_size, None, stochastic_depth=True)
                several = build_backbone(config, img_size, ["a", "b", "c"], stochastic_depth=False)
            assert sum(p.numel() for p in plain.parameters()) == count
            assert sum(p.numel() for p in several.parameters()) == count + 3 * width


def test_tiny_is_192_wide() -> None:
    assert ARCHS["vit_tiny"] == (192, 12, 3)


def test_defaults_are_the_framework_defaults() -> None:
    assert StudentConfig().model_dump() == {
        "arch": "vit_large",
        "patch_size": 16,
        "drop_path_rate": 0.3,
        "drop_path_uniform": True,
        "layerscale": 1e-5,
        "pretrained_weights": "",
        "ffn_layer": "mlp",
        "block_chunks": 0,
        "qkv_bias": True,
        "proj_bias": True,
        "ffn_bias": True,
        "use_mri_seq_embed": False,
        "img_wise_pos_embed": True,
        "num_register_tokens": 0,
        "n_storage_tokens": None,
        "interpolate_offset": None,
        "interpolate_antialias": None,
        "pos_embed_type": "learned",
        "pos_embed_rope_base": 100.0,
        "pos_embed_rope_dtype": "fp32",
        "pos_embed_rope_normalize_coords": "separate",
        "pos_embed_rope_shift_coords": None,
        "pos_embed_rope_jitter_coords": None,
        "pos_embed_rope_rescale_coords": None,
        "mask_k_bias": False,
        "layernorm_eps": 1e-6,
        "norm_layer": None,
        "grad_checkpointing": False,
        "embed_dim": None,
        "depth": None,
        "num_heads": None,
    }


def test_config_faults_are_said_together_with_the_nearest_names() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(StudentConfig, None, recipes="pretrain", overrides=["arch=glioma_vit_smal", "patchsize=14"])
    assert "did you mean glioma_vit_small" in caught.value.where
    assert "did you mean patch_size" in caught.value.where
    with pytest.raises(ValidationError, match="embed_dim 32 is no multiple of num_heads 3"):
        StudentConfig(embed_dim=32, num_heads=3)


def test_every_key_reaches_the_backbone() -> None:
    config = StudentConfig(
        arch="vit_tiny",
        patch_size=8,
        drop_path_rate=0.2,
        drop_path_uniform=False,
        layerscale=0.5,
        ffn_layer="swiglu",
        block_chunks=2,
        qkv_bias=False,
        proj_bias=False,
        ffn_bias=False,
        use_mri_seq_embed=True,
        img_wise_pos_embed=False,
        num_register_tokens=2,
        interpolate_offset=0.1,
        interpolate_antialias=False,
        pos_embed_type="rope",
        pos_embed_rope_base=50.0,
        pos_embed_rope_dtype="bf16",
        pos_embed_rope_normalize_coords="max",
        pos_embed_rope_shift_coords=0.1,
        pos_embed_rope_jitter_coords=1.5,
        pos_embed_rope_rescale_coords=2.0,
        mask_k_bias=True,
        layernorm_eps=1e-5,
        grad_checkpointing=True,
        embed_dim=32,
        depth=4,
        num_heads=2,
    )
    model = build_backbone(config, 32, ("a", "b"), in_chans=1, stochastic_depth=True)
    assert model.settings == {
        **{key: value for key, value in config.model_dump().items() if key in model.settings},
        "img_size": 32,
        "in_chans": 1,
        "sequences": ["a", "b"],
    }
    assert model.grad_checkpointing
    assert model.drop_rates[-1] == 0.2
    assert build_backbone(config, 32, None, stochastic_depth=False).drop_rates == [0, 0, 0, 0]


def test_t38_an_illegal_image_size_names_the_nearest() -> None:
    with pytest.raises(ConfigError) as caught:
        build_backbone(StudentConfig(patch_size=14), 192, None, stochastic_depth=False)
    assert caught.value.fix == "choose 182 or 196"


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "nest"),
    [("safetensors", ())]
    + [
        (k, n)
        for k in ("zip", "legacy")
        for n in ((), ("teacher",), ("model",), ("state_dict",), ("model", "state_dict"))
    ],
)
def test_weights_are_found_in_every_kind_of_file(tmp_path: Path, kind: str, nest: tuple[str, ...]) -> None:
    state, path = tiny().state_dict(), tmp_path / "weights.bin"
    if kind == "safetensors":
        save_file(state, path)
    else:
        data: Any = OrderedDict(state)
        for name in reversed(nest):
            data = {name: data, "epoch": 7, "args": argparse.Namespace(lr=0.1)}
        torch.save(data, path, _use_new_zipfile_serialization=kind == "zip")
    assert same(read_weights(path), state)


def test_the_teacher_is_preferred_to_the_student(tmp_path: Path) -> None:
    torch.save({"student": {"w": torch.zeros(1)}, "teacher": {"w": torch.ones(1)}}, tmp_path / "a.pth")
    assert read_weights(tmp_path / "a.pth")["w"] == 1


class Evil:
    """A pickle that would leave a file behind."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
def test_r08_code_in_a_pickle_is_named_and_never_runs(tmp_path: Path, kind: str) -> None:
    path, trace = tmp_path / "evil.pth", tmp_path / "it_ran"
    data = {"w": torch.ones(2), "x": Evil(trace)}
    if kind == "pickle":
        path.write_bytes(pickle.dumps({"x": Evil(trace)}))
    else:
        torch.save(data, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(CheckpointError) as caught:
        read_weights(path)
    assert not trace.exists()
    assert caught.value.exit_code == 7
    assert caught.value.code == "weights_unsafe"
    assert "not run" in caught.value.where
    if kind == "pickle":  # the trap is armed: plain unpickling would have sprung it
        pickle.loads(path.read_bytes())
        assert trace.exists()


def broken_files(folder: Path) -> dict[str, tuple[Path, str]]:
    state = tiny().state_dict()
    save_file(state, folder / "good.safetensors")
    torch.save(state, folder / "good.pth")
    torch.save(state, folder / "old.pth", _use_new_zipfile_serialization=False)
    contents: dict[str, tuple[bytes, str]] = {
        "empty": (b"", "weights_empty"),
        "html": (b"\n<!DOCTYPE html><html>404</html>", "weights_html"),
        "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "weights_lfs_pointer"),
        "noise": (bytes(range(256)), "weights_unknown"),
        "text": (b"x", "weights_unknown"),
        "cut safetensors": ((folder / "good.safetensors").read_bytes()[:-100], "weights_truncated"),
        "cut header": ((folder / "good.safetensors").read_bytes()[:40], "weights_truncated"),
        "cut zip": ((folder / "good.pth").read_bytes()[:5000], "weights_truncated"),
        "cut legacy": ((folder / "old.pth").read_bytes()[:-1000], "weights_truncated"),
        "safetensors of nothing": (b"\x02\0\0\0\0\0\0\0{}", "weights_without_tensors"),
    }
    for name, data in (("a list", [torch.ones(1)]), ("no tensors", {"epoch": 3}), ("deep", {"model": {"model": {}}})):
        torch.save(data, folder / "plain.pth")
        contents[name] = ((folder / "plain.pth").read_bytes(), "weights_without_tensors")
    out = {}
    for name, (content, code) in contents.items():
        path = folder / f"{name.replace(' ', '_')}.bin"
        path.write_bytes(content)
        out[name] = (path, code)
    return out


def test_r08_broken_files_are_refused_with_their_fault(tmp_path: Path) -> None:
    for name, (path, code) in broken_files(tmp_path).items():
        with pytest.raises(CheckpointError) as caught:
            read_weights(path)
        assert caught.value.code == code, name
        assert str(path) in caught.value.where
        assert caught.value.fix
    with pytest.raises(CheckpointError) as caught:
        read_weights(tmp_path / "nowhere.pth")
    assert caught.value.code == "weights_missing"
    with pytest.raises(CheckpointError):
        read_weights(tmp_path)  # a folder


# --- loading into a model --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "module.backbone.", "teacher.backbone.", "_orig_mod."])
def test_t13_prefixes_are_taken_off_and_heads_reported(prefix: str) -> None:
    source, model = tiny(1), tiny(2)
    state = {prefix + name: tensor for name, tensor in source.state_dict().items()}
    head = ("teacher." if "teacher" in prefix else "") + "dino_head.mlp.0.weight"
    report = load_into(model, {**state, head: torch.zeros(3)}, source="file.pth")
    assert same(model.state_dict(), source.state_dict())
    assert len(report.matched) == len(source.state_dict())
    assert report.missing == report.mismatched == ()
    assert report.unexpected == ("dino_head.mlp.0.weight",)
    assert report.lines()[0].endswith("tensors loaded (100.0%) from file.pth")
    assert "unexpected 1: dino_head.mlp.0.weight" in report.lines()


def test_the_teacher_half_of_a_training_checkpoint_is_taken() -> None:
    student, teacher, model = tiny(1), tiny(2), tiny(3)
    state = {f"student.backbone.{name}": t for name, t in student.state_dict().items()}
    state |= {f"teacher.backbone.{name}": t for name, t in teacher.state_dict().items()}
    load_into(model, state)
    assert same(model.state_dict(), teacher.state_dict())
    load_into(model, {name: t for name, t in state.items() if name.startswith("student")})
    assert same(model.state_dict(), student.state_dict())


def test_compiled_and_wrapped_names_inside_are_plain() -> None:
    source, model = tiny(1), tiny(2)
    state = {name.replace("blocks.0.", "blocks.0._orig_mod."): t for name, t in source.state_dict().items()}
    load_into(model, state)
    assert same(model.state_dict(), source.state_dict())


def test_chunked_and_flat_names_load_into_each_other() -> None:
    flat, chunked, other = tiny(1, depth=4), tiny(2, depth=4, block_chunks=2), tiny(3, depth=4)
    load_into(chunked, flat.state_dict())
    picture = torch.rand(1, 3, 32, 32)
    assert torch.equal(chunked(picture).cls_BD, flat(picture).cls_BD)
    load_into(other, chunked.state_dict())
    assert same(other.state_dict(), flat.state_dict())


def test_two_tensors_of_one_name_are_refused() -> None:
    state = {"blocks.0.0.norm1.weight": torch.ones(32), "blocks.1.0.norm1.weight": torch.ones(32)}
    with pytest.raises(CheckpointError) as caught:
        load_into(tiny(), state)
    assert caught.value.code == "weights_ambiguous"


@pytest.mark.parametrize("settings", [{}, {"num_register_tokens": 2}, {"interpolate_offset": 0.0}])
def test_t13_positions_of_another_grid_are_resized_as_the_model_would(settings: dict[str, Any]) -> None:
    large, model = tiny(1, img_size=104, **settings), tiny(2, **settings)
    report = load_into(model, large.state_dict())
    assert report.resized == ("pos_embed: 13 x 13 to 4 x 4 positions",)
    assert "resized 1" in report.lines()[1]
    picture = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(model(picture).patches_BND, large(picture).patches_BND, atol=1e-5, rtol=0)


def test_r08_renamed_keys_leave_the_model_untouched() -> None:
    model = tiny(1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    renamed = {f"encoder.{name}": tensor for name, tensor in tiny(2).state_dict().items()}
    for force in (False, True):  # nothing at all matches: force cannot help
        with pytest.raises(CheckpointError) as caught:
            load_into(model, renamed, force=force)
        assert caught.value.exit_code == 7
        assert "0 of" in caught.value.where
        assert "missing" in caught.value.where
        assert "encoder.cls_token" in caught.value.where
    assert same(model.state_dict(), before)


def test_r08_wrong_shapes_fail_unless_forced() -> None:
    model, state = tiny(1), tiny(2).state_dict()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["norm.weight"] = torch.ones(31)
    with pytest.raises(CheckpointError) as caught:
        load_into(model, state)
    assert "norm.weight: file (31,), model (32,)" in caught.value.where
    assert same(model.state_dict(), before)
    report = load_into(model, state, force=True)
    assert report.mismatched == ("norm.weight: file (31,), model (32,)",)
    assert torch.equal(model.norm.weight, before["norm.weight"])
    assert torch.equal(model.cls_token, state["cls_token"])


def test_less_than_95_percent_fails_unless_forced_or_allowed() -> None:
    model, state = tiny(1), tiny(2).state_dict()
    for name in [name for name in state if "gamma" in name]:
        del state[name]
    with pytest.raises(CheckpointError) as caught:
        load_into(model, state)
    assert "missing 4: blocks.0.ls1.gamma" in caught.value.where
    share = load_into(model, state, minimum=0.8).share
    assert 0.8 < share < 0.95
    assert load_into(model, state, force=True).share == share


def test_public_weights_load_into_a_multi_sequence_model() -> None:
    model = tiny(1, sequences=["a", "b"])
    own = model.seq_embed.detach().clone()
    report = load_into(model, tiny(2).state_dict())
    assert report.missing == ("seq_embed",)
    assert torch.equal(model.seq_embed, own)


def test_t15_rows_of_the_sequence_table_follow_their_names() -> None:
    source, model = tiny(1, sequences=["a", "b"]), tiny(2, sequences=["b", "c", "a"])
    own = model.seq_embed.detach().clone()
    load_into(model, source.state_dict(), sequences=["a", "b"])
    assert torch.equal(model.seq_embed, torch.stack([source.seq_embed[1], own[1], source.seq_embed[0]]))
    with pytest.raises(CheckpointError, match="do not fit"):  # without names a table of another size cannot fit
        load_into(model, source.state_dict())


# --- our own files ---------------------------------------------------------------------------------------------------


def test_backbone_file_round_trip(tmp_path: Path) -> None:
    settings = {
        "sequences": ["t2", "adc"],
        "use_mri_seq_embed": True,
        "num_register_tokens": 2,
        "block_chunks": 2,
        "interpolate_offset": 0.1,
        "drop_path_rate": 0.3,
    }
    model, path = tiny(1, **settings), tmp_path / "export" / "teacher_backbone.safetensors"
    written = save_backbone(path, model, {"normalisation": {"mean": 0.45, "std": 0.22}})
    loaded, card = load_backbone(path)
    assert card == written == read_card(path) == json.loads((tmp_path / "export/teacher_backbone.json").read_text())
    assert card["sequences"] == ["t2", "adc"]
    assert card["normalisation"] == {"mean": 0.45, "std": 0.22}
    assert (card["img_size"], card["patch_size"], card["interpolate_offset"]) == (32, 8, 0.1)
    assert card["schema_version"] == 1
    assert not loaded.training
    assert loaded.settings == model.settings
    assert same(loaded.state_dict(), model.state_dict())
    picture = torch.rand(2, 2, 24, 32)
    assert torch.equal(loaded(picture).patches_BND, model(picture).patches_BND)
    loaded.train()(picture).cls_BD.sum().backward()  # trainable: nothing is left on the meta device
    assert loaded.pos_embed.grad is not None
    assert sorted(p.name for p in path.parent.iterdir()) == ["teacher_backbone.json", "teacher_backbone.safetensors"]


def test_half_precision_backbones_stay_so(tmp_path: Path) -> None:
    card = save_backbone(tmp_path / "a.safetensors", tiny().to(torch.bfloat16), {})
    assert card["dtype"] == "bfloat16"
    assert load_backbone(tmp_path / "a.safetensors")[0].cls_token.dtype == torch.bfloat16


def test_r08_altered_or_foreign_backbone_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "b.safetensors"
    save_backbone(path, tiny(1), {})
    good, card = path.read_bytes(), json.loads(card_path(path).read_text())

    def code() -> str:
        with pytest.raises(CheckpointError) as caught:
            load_backbone(path)
        assert caught.value.fix
        return caught.value.code

    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert code() == "weights_altered"
    path.write_bytes(good[:-200])
    assert code() == "weights_truncated"
    path.write_bytes(good)
    for change, expected in (
        ({"schema_version": 99}, "card_invalid"),
        ({"kind": "head"}, "card_invalid"),
        ({"arch": {**card["arch"], "no_such": 1}}, "card_invalid"),
        ({"arch": {**card["arch"], "depth": 3}}, "weights_mismatch"),
        ({"arch": {**card["arch"], "depth": 1}}, "weights_mismatch"),
        ({"arch": {**card["arch"], "embed_dim": 64}}, "weights_mismatch"),
    ):
        card_path(path).write_text(json.dumps({**card, **change}))
        assert code() == expected, change
    card_path(path).write_text("{")
    assert code() == "card_invalid"
    card_path(path).unlink()
    assert code() == "card_missing"


def test_the_card_keeps_its_own_names(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the card writes sha256 itself"):
        save_backbone(tmp_path / "a.safetensors", tiny(), {"sha256": "0"})


def test_r03_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import medssl_cli.models.zoo as zoo

    path = tmp_path / "a.safetensors"
    save_backbone(path, tiny(1), {})
    before = load_file(path)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(zoo, "save_file", full)
    from medssl_cli.core.errors import ResourceError

    with pytest.raises(ResourceError) as caught:
        save_backbone(path, tiny(2), {})
    assert "bytes needed" in caught.value.where
    assert same(load_file(path), before)
    load_backbone(path)


def test_networks_of_every_family_come_back_from_their_card(tmp_path: Path) -> None:
    for index, (arch, extra) in enumerate(
        [("vit_tiny", {"num_heads": 2, "patch_size": 8}), ("meddinov3_vitb16", {"num_heads": 2}), ("convnext_tiny", {})]
    ):
        config = StudentConfig(arch=arch, embed_dim=32, depth=4, **extra)
        model = build_backbone(config, 32, None, stochastic_depth=False).eval()
        path = tmp_path / f"{index}.safetensors"
        card = save_backbone(path, model, {})
        loaded, _ = load_backbone(path)
        assert type(loaded) is type(model)
        assert same(loaded.state_dict(), model.state_dict())
        assert card["family"] == ("convnext" if "convnext" in arch else "vit")
        assert card["n_parameters"] == sum(p.numel() for p in model.parameters())
        picture = torch.rand(1, 3, 32, 64)
        assert torch.equal(loaded(picture).patches_BND, model(picture).patches_BND)
        loaded.train()(picture).cls_BD.sum().backward()


def test_cards_from_before_families_and_rotary_positions_still_load(tmp_path: Path) -> None:
    path, model = tmp_path / "a.safetensors", tiny()
    save_backbone(path, model, {})
    card = json.loads(card_path(path).read_text())
    del card["family"]
    for name in [
        name for name in card["arch"] if name.startswith("pos_embed_") or name in ("mask_k_bias", "layernorm_eps")
    ]:
        del card["arch"][name]
    card_path(path).write_text(json.dumps(card))
    loaded, _ = load_backbone(path)
    assert loaded.settings == model.settings
    card["family"] = "unet"
    card_path(path).write_text(json.dumps(card))
    with pytest.raises(CheckpointError) as caught:
        load_backbone(path)
    assert "family 'unet'" in caught.value.where


def test_w03_a_backbone_of_another_modality_is_told() -> None:
    assert card_warnings({"modality": "fundus"}, "oct")[0].startswith(
        "The backbone was made for images of the modality"
    )
    for card, modality in (
        ({"modality": "oct"}, "OCT"),
        ({}, "oct"),
        ({"modality": None}, "oct"),
        ({"modality": "ct"}, None),
    ):
        assert card_warnings(card, modality) == []


def test_weights_that_do_not_fit_name_the_keys_that_would() -> None:
    file = VisionTransformer(
        img_size=32, patch_size=16, embed_dim=64, depth=2, num_heads=1, num_register_tokens=4, mask_k_bias=True,
        pos_embed_type="rope",
    )  # fmt: skip
    for missing in ("mask_k_bias", "num_register_tokens", "pos_embed_type"):
        settings = {"num_register_tokens": 4, "mask_k_bias": True, "pos_embed_type": "rope"}
        del settings[missing]
        model = VisionTransformer(img_size=32, patch_size=16, embed_dim=64, depth=2, num_heads=1, **settings)
        with pytest.raises(CheckpointError) as caught:
            load_into(model, file.state_dict())
        wanted = {"mask_k_bias": "true", "num_register_tokens": "4", "pos_embed_type": "rope"}[missing]
        assert f"student.{missing}={wanted}" in caught.value.fix


def test_weights_of_a_convnext_name_their_architecture() -> None:
    with torch.device("meta"):
        file = build_backbone(StudentConfig(arch="convnext_small"), 64, None, stochastic_depth=False)
    with pytest.raises(CheckpointError) as caught:
        load_into(tiny(), file.state_dict())
    assert "student.arch=convnext_small" in caught.value.fix


def test_other_heads_than_the_cards_are_refused_and_another_eps_is_told() -> None:
    model = VisionTransformer(img_size=32, patch_size=16, embed_dim=64, depth=1, num_heads=2)
    same = {"arch": dict(model.settings)}
    assert differences_to_card(same, model) == []
    assert differences_to_card({}, model) == []
    told = differences_to_card({"arch": {**model.settings, "layernorm_eps": 1e-5}}, model)
    assert len(told) == 1
    assert "student.layernorm_eps=1e-05" in told[0]
    with pytest.raises(CheckpointError) as caught:
        differences_to_card({"arch": {**model.settings, "num_heads": 4}}, model)
    assert "student.num_heads=4" in caught.value.fix
