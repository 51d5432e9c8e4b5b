"""Backbones for other programs: read back to the same features, and loaded into networks that we did not write."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_infer_segment import ct_pet_run
from test_segmenter import _dense, _write
from torch import Tensor, nn

from medssl_cli.core.digest import file_digest
from medssl_cli.core.errors import CheckpointError, ConfigError
from medssl_cli.models.convnext import ConvNeXt
from medssl_cli.models.outward import Target, to_target
from medssl_cli.models.vit import VisionTransformer
from medssl_cli.models.zoo import load_backbone, save_backbone
from medssl_cli.services.convert_weights import WeightsRequest, convert_weights
from medssl_cli.services.export_weights import ExportRequest, export_weights

State = dict[str, Tensor]
WriteRun = Callable[..., Path]
TINY: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "layerscale": 0.5}
ROPE = {"pos_embed_type": "rope", "num_register_tokens": 3}


def shaken(model: Any) -> Any:
    """Every parameter moved off its start, so that no mix-up of two goes unseen."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def vit(**settings: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return shaken(VisionTransformer(**{**TINY, **settings}))


def convnext() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return shaken(ConvNeXt(depths=(1, 2, 1, 1), dims=(8, 16, 24, 32), layer_scale=0.5))


MODELS: dict[str, Callable[[], Any]] = {
    "dinov2": vit,
    "registers": lambda: vit(num_register_tokens=3),
    "swiglu": lambda: vit(ffn_layer="swiglufused", layerscale=0.0),
    "chunked": lambda: vit(block_chunks=2, mask_k_bias=True),
    "dinov3": lambda: vit(**ROPE, mask_k_bias=True, layernorm_eps=1e-5, pos_embed_rope_base=50.0),
    "gated dinov3": lambda: vit(**ROPE, mask_k_bias=True, ffn_layer="swiglu", layernorm_eps=1e-5),
    "meddinov3": lambda: vit(**ROPE, qkv_bias=False, mask_k_bias=True, pos_embed_rope_dtype="bf16"),
    "convnext": convnext,
}


def saved(folder: Path, model: Any, **card: Any) -> Path:
    path = folder / "ours" / "teacher_backbone.safetensors"
    path.parent.mkdir(parents=True)
    save_backbone(path, model, {"mean": 0.5, "std": 0.25, **card})
    return path


def exported(model: Path, out: Path, target: Target | None, **more: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a trainer reads from the file, and the JSON beside it."""
    export_weights(ExportRequest(model, out, target, **more))
    facts = json.loads(out.with_name(f"{out.name}.json").read_text(encoding="utf-8"))
    held = load_file(out) if out.suffix == ".safetensors" else torch.load(out, weights_only=True)
    assert facts["sha256"] == file_digest(out)
    return held, facts


def features(model: Any, images: Tensor) -> Tensor:
    with torch.no_grad():
        found = model(images)
    return torch.cat([found.cls_BD[:, None], found.patches_BND], 1)


def pictures(*size: int, channels: int = 3) -> Tensor:
    return torch.rand(2, channels, *size, generator=torch.Generator().manual_seed(4))


# --- there and back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "target"),
    [(kind, target) for kind in MODELS for target in ("dinov2", "timm") if target == "dinov2" or "dinov3" not in kind],
)
def test_an_export_is_read_back_to_identical_features(tmp_path: Path, kind: str, target: Target) -> None:
    model = MODELS[kind]()
    held, facts = exported(saved(tmp_path, model), tmp_path / "x.pth", target)
    source = facts["load"].rpartition("--source ")[2]
    assert source == ("timm" if target == "timm" else "convnext" if kind == "convnext" else kind.split()[-1]
                      if "dinov3" in kind else "dinov2")  # fmt: skip
    eps = () if kind == "convnext" else (f"layernorm_eps={facts['network']['layernorm_eps']}",)
    heads = () if kind == "convnext" else (f"num_heads={facts['network']['num_heads']}",)
    convert_weights(WeightsRequest(tmp_path / "x.pth", tmp_path / "back", source, overrides=(*eps, *heads)))
    back, card = load_backbone(tmp_path / "back" / "teacher_backbone.safetensors")
    size = (64, 32) if kind == "convnext" else (32, 32)
    assert torch.equal(features(back, pictures(*size)), features(model, pictures(*size)))
    missing = [name for name in card["load_report"]["missing"] if not name.endswith("bias_mask")]  # a constant
    assert missing == (["mask_token"] if target == "timm" and kind != "convnext" else [])
    # every tensor of ours is accounted for
    names = {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name) for name in model.state_dict()}
    theirs = held["teacher"] if target == "dinov2" else held
    kept = {name for name in names if f"{'backbone.' * (target == 'dinov2')}{name}" in theirs}
    assert names == kept | set(facts["renamed"]) | set(facts["left_out"])
    assert not kept & set(facts["left_out"])


def test_the_same_export_is_the_same_file(tmp_path: Path) -> None:
    ours = saved(tmp_path, vit())
    exported(ours, tmp_path / "a.pth", "dinov2")
    exported(ours, tmp_path / "b.pth", "dinov2")
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "b.pth").read_bytes()


def test_positions_are_stored_for_another_size_as_the_backbone_itself_resizes_them(tmp_path: Path) -> None:
    model = vit(num_register_tokens=3)
    _, facts = exported(saved(tmp_path, model), tmp_path / "x.pth", "timm", image_size=64)
    assert facts["network"]["img_size"] == 64
    assert facts["changed"]["pos_embed"] == "resized from 4 x 4 to 8 x 8 positions; without that of cls"
    convert_weights(WeightsRequest(tmp_path / "x.pth", tmp_path / "back", "timm", overrides=("num_heads=2",)))
    back, card = load_backbone(tmp_path / "back" / "teacher_backbone.safetensors")
    assert card["img_size"] == 64
    torch.testing.assert_close(features(back, pictures(64, 64)), features(model, pictures(64, 64)))


# --- into networks of others -----------------------------------------------------------------------------------------

TO_META = [
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
    (r"^register_tokens", "storage_tokens"),
    (r"^layernorm\.", "norm."),
]


def meta_name(name: str, *, gated: bool) -> str:
    """What Meta's file calls a tensor of Hugging Face's network."""
    rules = (
        [(r"mlp\.down_proj", "mlp.w3"), *[rule for rule in TO_META if "up_proj" not in rule[0]]] if gated else TO_META
    )
    for pattern, text in rules:
        name = re.sub(pattern, text, name)
    return name


def filled(theirs: Any, state: State) -> Any:
    """Hugging Face's network with the tensors of a file in Meta's or timm's names; every one of both is used."""
    found, used = {}, set()
    gated = "blocks.0.mlp.w12.weight" in state
    for name, own in theirs.state_dict().items():
        native = meta_name(name, gated=gated)
        part = re.search(r"\.attn\.([qkv])\.(weight|bias)$", native)
        gate = re.search(r"\.mlp\.(gate|up)_proj\.", native)
        if gate:
            native = native.replace(gate[0], ".mlp.w12.")
            found[name] = state[native].chunk(2)[("gate", "up").index(gate[1])]
        elif part:
            native = native.replace(f".attn.{part[1]}.", ".attn.qkv.")
            found[name] = state[native].chunk(3)["qkv".index(part[1])]
        else:
            found[name] = state[native].view_as(own)
        used.add(native)
    theirs.load_state_dict(found, strict=True)
    left = {n for n in state if n not in used and not n.startswith("rope") and not n.endswith("bias_mask")}
    assert not left, left
    return theirs.eval()


SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}


@pytest.mark.parametrize("kind", ["dinov2", "swiglu", "registers"])
def test_hugging_faces_dinov2_gives_our_features_from_the_file(tmp_path: Path, kind: str) -> None:
    import transformers as hf

    model = vit(ffn_layer="swiglu") if kind == "swiglu" else MODELS[kind]()
    held, _ = exported(saved(tmp_path, model), tmp_path / "x.pth", "dinov2")
    assert set(held) == {"teacher"}
    assert all(name.startswith("backbone.") for name in held["teacher"])
    state = {name.removeprefix("backbone."): tensor for name, tensor in held["teacher"].items()}
    theirs: Any
    if kind == "registers":
        state["storage_tokens"] = state.pop("register_tokens")
        theirs = hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**SIZE, num_register_tokens=3))
    else:
        theirs = hf.Dinov2Model(hf.Dinov2Config(**SIZE, use_swiglu_ffn=kind == "swiglu"))
    with torch.no_grad():
        expected = filled(theirs, state)(pictures(32, 32)).last_hidden_state
    found = features(model, pictures(32, 32))
    torch.testing.assert_close(found[:, 0], expected[:, 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(found[:, 1:], expected[:, -16:], atol=1e-5, rtol=0)


def test_hugging_faces_dinov3_gives_our_features_from_the_file(tmp_path: Path) -> None:
    import transformers as hf

    model = vit(**ROPE, mask_k_bias=True, layernorm_eps=1e-5)
    held, _ = exported(saved(tmp_path, model), tmp_path / "x.pth", "dinov2")
    state = {name.removeprefix("backbone."): tensor for name, tensor in held["teacher"].items()}
    for name in [name for name in state if name.endswith("bias_mask")]:
        state[name.removesuffix("_mask")] *= state[name]
    theirs = hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**SIZE, intermediate_size=128, num_register_tokens=3))
    with torch.no_grad():
        expected = filled(theirs, state)(pictures(32, 48)).last_hidden_state
    found = features(model, pictures(32, 48))
    torch.testing.assert_close(found[:, 0], expected[:, 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(found[:, 1:], expected[:, 4:], atol=1e-5, rtol=0)


def test_hugging_faces_vit_gives_our_features_from_timms_file(tmp_path: Path) -> None:
    import transformers as hf

    model = vit(layerscale=0.0, layernorm_eps=1e-12)
    held, facts = exported(saved(tmp_path, model), tmp_path / "x.safetensors", "timm")
    theirs = hf.ViTModel(hf.ViTConfig(**SIZE, intermediate_size=128), add_pooling_layer=False)
    with torch.no_grad():
        expected = filled(theirs, held)(pictures(32, 32)).last_hidden_state
    torch.testing.assert_close(features(model, pictures(32, 32)), expected, atol=1e-5, rtol=0)
    assert facts["left_out"] == {
        "mask_token": "timm's network hides no patches; features of whole images do not depend on it"
    }


def test_timms_names_with_registers_gates_and_stages(tmp_path: Path) -> None:
    """As `timm.create_model('vit_*_reg4_dinov2')` and `convnext_*` list them."""
    gated = vit(num_register_tokens=3, ffn_layer="swiglu", layerscale=1.0)
    held, _ = exported(saved(tmp_path / "a", gated), tmp_path / "a.pth", "timm")
    block = [f"{part}.{kind}" for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
             for kind in ("weight", "bias")] + ["ls1.gamma", "ls2.gamma"]  # fmt: skip
    assert set(held) == {
        *("cls_token", "pos_embed", "reg_token", "norm.weight", "norm.bias"),
        *("patch_embed.proj.weight", "patch_embed.proj.bias"),
        *(f"blocks.{index}.{name}" for index in range(2) for name in block),
    }
    assert held["pos_embed"].shape == (1, 16, 32)  # no_embed_class: positions of patches alone
    torch.testing.assert_close(held["cls_token"], gated.cls_token + gated.pos_embed[:, :1])
    held, _ = exported(saved(tmp_path / "b", convnext()), tmp_path / "b.pth", "timm")
    expected = {"stem.0.weight", "stem.1.bias", "stages.1.downsample.1.weight", "stages.1.blocks.1.conv_dw.weight",
                "stages.1.blocks.1.mlp.fc2.bias", "stages.3.blocks.0.gamma", "head.norm.weight"}  # fmt: skip
    assert expected <= set(held)
    assert not any("dwconv" in name or "pwconv" in name for name in held)


def test_meddinov3s_trainer_loads_the_file_strictly(tmp_path: Path) -> None:
    """Its rule: the tensors below teacher but those of heads, `backbone.` taken off anywhere, nothing missing or left.

    The names are those of DINOv3's network with storage tokens, a bias nowhere in the joined projection, layer scale
    and the periods of its rotary positions, which it keeps in bf16.
    """
    model = MODELS["meddinov3"]()
    held, facts = exported(saved(tmp_path, model), tmp_path / "model.pth", "dinov2")
    state = {
        name.replace("backbone.", ""): tensor
        for name, tensor in held["teacher"].items()
        if "ibot" not in name and "dino_head" not in name
    }
    block = [*(f"norm{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")), "attn.qkv.weight", "attn.proj.weight"]
    block += [
        "attn.proj.bias",
        "ls1.gamma",
        "ls2.gamma",
        *(f"mlp.fc{i}.{k}" for i in (1, 2) for k in ("weight", "bias")),
    ]
    assert set(state) == {
        *("cls_token", "storage_tokens", "mask_token", "rope_embed.periods", "norm.weight", "norm.bias"),
        *("patch_embed.proj.weight", "patch_embed.proj.bias"),
        *(f"blocks.{index}.{name}" for index in range(2) for name in block),
    }
    periods = state["rope_embed.periods"]
    assert torch.equal(periods, periods.bfloat16().float())  # a bf16 buffer takes them as they are
    assert facts["names_of"] == "DINOv3"
    assert facts["renamed"] == {"register_tokens": "storage_tokens"}


class Segmenter(nn.Module):
    """A network of the kind that nnU-Net trains: a backbone called encoder, and layers called seg_layers."""

    def __init__(self, encoder: nn.Module, *, decoder: bool = False) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Module()
        self.head.seg_layers = nn.ModuleList([nn.Linear(32, 2)])
        self.decoder = nn.Linear(32, 32) if decoder else nn.Identity()


def nnunet_pretrained(network: nn.Module, file: Path) -> None:
    """The rule of nnU-Net's -pretrained_weights, restated.

    Every name of the network in which `.seg_layers.` does not occur has to be below `network_weights` with the same
    shape, else nothing is loaded; names of the file that the network lacks are passed over.
    """
    given = torch.load(file, weights_only=True)["network_weights"]
    wanted = {name: tensor for name, tensor in network.state_dict().items() if ".seg_layers." not in name}
    for name, tensor in wanted.items():
        if name not in given or given[name].shape != tensor.shape:
            raise AssertionError(name)
    network.load_state_dict({**network.state_dict(), **{name: given[name] for name in wanted}})


@pytest.mark.parametrize("prefix", [None, "", "network.vit."])
def test_nnunets_loader_takes_the_file(tmp_path: Path, prefix: str | None) -> None:
    model = vit(num_register_tokens=3)
    held, facts = exported(saved(tmp_path, model), tmp_path / "x.pth", "nnunet", prefix=prefix)
    assert set(held) == {"network_weights"}
    assert facts["prefix"] == ("encoder." if prefix is None else prefix)
    assert any("strict=False" in note for note in facts["notes"])
    fresh = VisionTransformer(**{**TINY, "num_register_tokens": 3}).eval()
    if prefix is None:
        network = Segmenter(fresh)
        before = network.head.seg_layers[0].weight.clone()
        nnunet_pretrained(network, tmp_path / "x.pth")
        assert torch.equal(network.head.seg_layers[0].weight, before)
        with pytest.raises(AssertionError, match=r"decoder\.weight"):  # what the note is about
            nnunet_pretrained(Segmenter(fresh, decoder=True), tmp_path / "x.pth")
    else:
        fresh.load_state_dict({n.removeprefix(prefix): t for n, t in held["network_weights"].items()}, strict=True)
    assert torch.equal(features(fresh, pictures(40, 32)), features(model, pictures(40, 32)))


# --- several sequences -----------------------------------------------------------------------------------------------


def several(**more: Any) -> Any:
    return vit(sequences=("ax_t2wi", "ax_adc"), use_mri_seq_embed=True, **more)


def test_the_embedding_of_a_sequence_becomes_part_of_the_patch_convolution(tmp_path: Path) -> None:
    lone = vit(sequences=("ax_t2wi",), use_mri_seq_embed=True)
    held, facts = exported(saved(tmp_path / "a", lone), tmp_path / "a.pth", "nnunet", prefix="", sequence="ax_t2wi")
    plain = VisionTransformer(**TINY).eval()
    plain.load_state_dict(held["network_weights"], strict=True)
    grey = pictures(32, 32, channels=1)
    torch.testing.assert_close(features(plain, grey), features(lone, grey), atol=1e-5, rtol=0)
    hidden = torch.rand(2, 16, generator=torch.Generator().manual_seed(0)) < 0.5
    with torch.no_grad():  # masked patches carry the embedding too
        first, second = (one(grey, token_mask_BN=hidden).patches_BND for one in (plain, lone))
    torch.testing.assert_close(first, second, atol=1e-5, rtol=0)
    assert facts["left_out"]["seq_embed"].startswith("the row of ax_t2wi is part of the patch convolution")
    both = several()
    images = pictures(32, 32, channels=2)
    with torch.no_grad():  # tokens as they enter the first block, sequence after sequence
        joint = both._embed(images, None, None, {})[0][:, 1:]
        for index, name in enumerate(both.sequences):
            plain.load_state_dict(to_target(both, "dinov2", sequence=name).tensors, strict=True)
            alone = plain._embed(images[:, index : index + 1], None, None, {})[0][:, 1:]
            torch.testing.assert_close(alone, joint[:, 16 * index : 16 * index + 16], atol=1e-5, rtol=0)


def test_an_embedding_is_kept_under_its_name_or_left_out_where_it_has_no_effect(tmp_path: Path) -> None:
    held, facts = exported(saved(tmp_path / "a", several()), tmp_path / "a.pth", "dinov2")
    assert torch.equal(held["teacher"]["backbone.seq_embed"], several().seq_embed)
    assert any("seq_embed (2 rows: ax_t2wi, ax_adc) is kept" in note for note in facts["notes"])
    idle = vit(sequences=("ax_t2wi", "ax_adc"))
    held, facts = exported(saved(tmp_path / "b", idle), tmp_path / "b.pth", "timm")
    assert "seq_embed" not in held
    assert facts["left_out"]["seq_embed"].startswith("without effect")
    assert any("trained on 2 sequences as one series of tokens" in note for note in facts["notes"])


# --- which model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("freeze", [True, False])
def test_a_segmentation_run_gives_its_averaged_backbone(tmp_path: Path, freeze: bool) -> None:
    network = _dense(freeze=freeze)
    before = {name: tensor.clone() for name, tensor in network.backbone.state_dict().items()}
    _write(tmp_path / "run", network)  # the average is as the network was, the trained network is moved
    held, facts = exported(tmp_path / "run", tmp_path / "x.pth", "dinov2")
    for name, tensor in held["teacher"].items():
        assert torch.equal(tensor, before[name.removeprefix("backbone.")]), name
    assert facts["backbone_of"] == "segmentation network"
    assert any(("frozen" if freeze else "averaged") in note for note in facts["notes"])
    assert facts["images"] == {
        "mean": 0.5,
        "std": [0.25, 0.5],
        "preprocess": {"reference": "b"},
        "sequences": ["a", "b"],
    }


def test_a_network_without_backbone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        exported(ct_pet_run(tmp_path / "cocoseg", threshold=0.3), tmp_path / "x.pth", "dinov2")
    assert (caught.value.code, (tmp_path / "x.pth").exists()) == ("model_without_backbone", False)


def test_a_run_is_exported_by_the_command(medssl: Callable[..., Any], write_run: WriteRun, tmp_path: Path) -> None:
    run, out = write_run(tmp_path / "run", None), tmp_path / "w" / "x.pth"
    done = medssl("convert", "weights", run, out, "--target", "nnunet", "--prefix", "vit.")
    assert done.exit_code == 0, done.stderr
    assert "tensors of the backbone under the names of DINOv2, each after 'vit.'" in done.stdout
    assert "x.pth.json" in done.stdout
    held = torch.load(out, weights_only=True)["network_weights"]
    ours, card = load_backbone(run / "export" / "teacher_backbone.safetensors")
    assert {name.removeprefix("vit.") for name in held} == set(ours.state_dict())
    done = medssl("convert", "weights", run, tmp_path / "y.safetensors", "--target", "timm", "--json")
    document = json.loads(done.stdout)
    assert (done.exit_code, document["command"], document["export"]["names_of"]) == (0, "convert weights", "timm")
    assert document["export"]["images"]["mean"] == card["mean"]
    assert document["export"]["source_sha256"] == card["sha256"]


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("x.pth", "--prefix", "encoder."), "belong to --target"),
        (("x.pth", "--sequence", "ax_t2wi"), "belong to --target"),
        (("x.pth", "--target", "dinov2", "--prefix", "encoder."), "--prefix belongs to --target nnunet"),
        (("x.pth", "--target", "dinov2", "--source", "dinov2"), "--source dinov2"),
        (("x.pth", "--target", "dinov2", "num_heads=3"), "num_heads=3"),
        (("x.pth", "--target", "nnunet", "--prefix", "encoder"), "has to end with a dot"),
        (("x.safetensors", "--target", "nnunet"), "ends in .pth or .pt"),
        (("folder", "--target", "timm"), "ends in .pth or .pt or .safetensors"),
        (("x.pth", "--target", "timm", "--sequence", "ax_t2wi"), "it takes plain pictures"),
        (("x.pth", "--target", "timm", "--image-size", "30"), "choose 24 or 32"),
        (("x.pth", "--target", "keras"), "keras"),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    medssl: Callable[..., Any], write_run: WriteRun, tmp_path: Path, words: tuple[str, ...], told: str
) -> None:
    run = write_run(tmp_path / "run", None)
    done = medssl("convert", "weights", run, tmp_path / words[0], *words[1:])
    assert done.exit_code == 2
    assert told in " ".join(done.stderr.split())
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


@pytest.mark.parametrize(
    ("model", "target", "more", "told"),
    [
        (lambda: vit(**ROPE), "timm", {}, "rotary ones"),
        (several, "timm", {}, "embedding of their own"),
        (lambda: several(img_wise_pos_embed=False), "dinov2", {"sequence": "ax_adc"}, "one tall image"),
        (several, "timm", {"sequence": "ax_dwi"}, "ax_t2wi, ax_adc"),
        (lambda: vit(sequences=("ax_t2wi",)), "timm", {"sequence": "ax_t2wi"}, "all sequences are seen alike"),
        (lambda: vit(ffn_layer="identity"), "dinov2", {}, "no feed-forward layer"),
        (lambda: vit(pos_embed_type="none"), "nnunet", {}, "it has no positions"),
        (lambda: vit(**ROPE), "dinov2", {"image_size": 64}, "rotary positions have no size"),
        (convnext, "timm", {"image_size": 64}, "--image-size"),
    ],
)
def test_what_the_target_has_no_place_for_is_refused(
    tmp_path: Path, model: Callable[[], Any], target: Target, more: dict[str, Any], told: str
) -> None:
    ours = saved(tmp_path, model())
    with pytest.raises(ConfigError) as caught:
        exported(ours, tmp_path / "x.pth", target, **more)
    assert told in f"{caught.value.where} {caught.value.fix}"
    assert not (tmp_path / "x.pth").exists()


def test_other_weights_are_never_replaced_unasked(tmp_path: Path) -> None:
    ours, out = saved(tmp_path, vit()), tmp_path / "x.pth"
    exported(ours, out, "dinov2")
    exported(ours, out, "dinov2")  # the same again
    before = out.read_bytes()
    for more in ({"target": "timm"}, {"target": "dinov2", "image_size": 64}, {"target": "nnunet"}):
        with pytest.raises(ConfigError) as caught:
            exported(ours, out, **more)  # type: ignore[arg-type]
        assert caught.value.code == "out_not_empty"
    assert out.read_bytes() == before
    held, _ = exported(ours, out, "timm", overwrite=True)
    assert "cls_token" in held
    with pytest.raises(ConfigError) as caught:
        exported(ours, ours, "timm", overwrite=True)
    assert caught.value.code == "out_is_input"


def test_weights_of_others_are_refused_with_the_way_in(tmp_path: Path) -> None:
    torch.save({"teacher": {}}, tmp_path / "foreign.pth")
    with pytest.raises(CheckpointError) as caught:
        exported(tmp_path / "foreign.pth", tmp_path / "x.pth", "timm")
    assert "medssl convert weights" in caught.value.fix
