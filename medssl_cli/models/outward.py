"""A backbone under the names of other programs: the way back of ``models.foreign``.

Dictionaries of tensors in and out, with an account of every tensor: renamed, changed, or left out for a reason. What
would change features and has no place in the target is refused.

Letters: D width, S sequences, N positions of patch tokens.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F

from medssl_cli.core.errors import ConfigError
from medssl_cli.models.convnext import ConvNeXt
from medssl_cli.models.foreign import Rules, State, flat_name
from medssl_cli.models.vit import VisionTransformer, resize_positions

Target = Literal["nnunet", "dinov2", "timm"]
"""nnunet holds the names of dinov2 below those of a segmentation network."""

_DINOV3: Rules = ((r"^register_tokens$", "storage_tokens"),)
_TIMM: Rules = (
    (r"^register_tokens$", "reg_token"),
    (r"\.mlp\.w12\.", ".mlp.fc1."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
)
_TIMM_CONVNEXT: Rules = (
    (r"^downsample_layers\.0\.", "stem."),
    (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.dwconv\.", ".conv_dw."),
    (r"\.pwconv(\d)\.", r".mlp.fc\1."),
    (r"^norm\.", "head.norm."),
)


@dataclass
class Outward:
    """A backbone as another program names it.

    Args:
        tensors: Under the target's names, on the CPU.
        family: Whose names they are: DINOv2, DINOv3, timm or ConvNeXt.
        source: What ``medssl convert weights --source`` calls such a file.
        renamed: Our name -> theirs, where they differ.
        changed: Their name -> what was done to the numbers.
        left_out: Our name -> why it is not there.
        notes: What a user of the file has to know besides.
    """

    tensors: State
    family: str
    source: str
    renamed: dict[str, str] = field(default_factory=dict)
    changed: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def to_target(
    model: VisionTransformer | ConvNeXt, target: Target, *, sequence: str | None = None, img_size: int | None = None
) -> Outward:
    """The tensors of a backbone under the names of a target.

    Args:
        model: Not changed.
        target: Whose names.
        sequence: The sequence of a multi-sequence backbone whose images the result is for: its embedding, the same for
            every patch token, becomes part of the patch convolution.
        img_size: Side in pixels for which positions are stored; the model's own if not given.

    Raises:
        ConfigError: The target has no place for a part that features depend on, or an option has no effect.
    """
    state = {flat_name(name): tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    if isinstance(model, ConvNeXt):
        _refuse_idle(model, sequence, img_size, "a convolutional network has neither")
        return _convnext(state, target)
    _refuse_unknown_parts(model, target)
    _refuse_idle(model, sequence, img_size, _why_idle(model))
    is_rope = model.pos_embed is None
    family, source = ("timm", "timm") if target == "timm" else ("DINOv3", "dinov3") if is_rope else ("DINOv2", "dinov2")
    if is_rope and not model.settings["qkv_bias"]:
        source = "meddinov3"
    out = Outward({}, family, source)
    _place_sequences(model, state, target, sequence, out)
    if img_size is not None:
        _resize(model, state, img_size, out)
    if not is_rope:
        _fold_bias_masks(state, out)
    if target == "timm":
        _as_timm_counts(state, out)
    rules = _TIMM if target == "timm" else _DINOV3 if is_rope else ()
    out.tensors = _renamed(state, rules, out)
    if family == "DINOv3":
        _split_gates(out)
    out.tensors = {name: tensor.contiguous() for name, tensor in out.tensors.items()}
    return out


# --- refusals --------------------------------------------------------------------------------------------------------


def _refuse_unknown_parts(model: VisionTransformer, target: Target) -> None:
    """Refuse what a program of the target cannot compute."""
    settings = model.settings
    if settings["ffn_layer"] == "identity":
        raise _no_place("its blocks have no feed-forward layer", "train with ffn_layer mlp or swiglu")
    if settings["pos_embed_type"] == "none":
        raise _no_place(
            "it has no positions, and a file without them is taken for one with rotary positions",
            "train with pos_embed_type learned or rope",
        )
    if target == "timm" and settings["pos_embed_type"] == "rope":
        raise _no_place(
            "timm's VisionTransformer has a table of positions, this backbone rotary ones; timm keeps such networks "
            "under another class, which reads the names of DINOv3",
            "pass --target dinov2: it writes the names of DINOv3 here",
        )


def _refuse_idle(model: VisionTransformer | ConvNeXt, sequence: str | None, img_size: int | None, why: str) -> None:
    """Refuse options without effect on this network."""
    given = []
    if sequence is not None and model.sequences is None:
        given.append("--sequence (it takes plain pictures)")
    elif sequence is not None and isinstance(model, VisionTransformer) and not model.use_mri_seq_embed:
        given.append("--sequence (use_mri_seq_embed is false: all sequences are seen alike)")
    if img_size is not None and (isinstance(model, ConvNeXt) or model.pos_embed is None):
        given.append(f"--image-size ({why})")
    if given:
        raise ConfigError(
            "These options have no effect on the backbone.",
            where=", ".join(given),
            fix="leave them out",
            code="config_without_effect",
        )
    if sequence is not None and sequence not in (model.sequences or ()):
        raise ConfigError(
            f"The backbone has no sequence {sequence!r}.",
            where="--sequence",
            fix=f"choose one of: {', '.join(model.sequences or ())}",
            code="sequence_unknown",
        )


def _why_idle(model: VisionTransformer) -> str:
    return "rotary positions have no size" if model.pos_embed is None else ""


def _no_place(why: str, fix: str) -> ConfigError:
    return ConfigError("The target has no place for this backbone.", where=why, fix=fix, code="target_no_place")


# --- vision transformers ---------------------------------------------------------------------------------------------


def _place_sequences(
    model: VisionTransformer, state: State, target: Target, sequence: str | None, out: Outward
) -> None:
    """The embedding of the sequences: without effect, folded for one of them, or kept under its own name."""
    if model.sequences is None:
        return
    names = ", ".join(model.sequences)
    out.notes.append(
        f"trained on {len(model.sequences)} sequences as one series of tokens ({names}); each is one grey image here, "
        "repeated over the channels of the patch convolution"
    )
    if not model.img_wise_pos_embed:
        if sequence is not None:
            raise _no_place(
                "its sequences are stacked into one tall image, whose positions tell them apart",
                "leave --sequence out, and show the sequences one above the other",
            )
        out.notes.append("img_wise_pos_embed is false: the sequences are one tall image, one above the other")
    if not model.use_mri_seq_embed:
        del state["seq_embed"]
        out.left_out["seq_embed"] = "without effect: the backbone was trained with use_mri_seq_embed false"
    elif sequence is not None:
        _fold_sequence(state, model.sequences.index(sequence), sequence, out)
    elif target == "timm":
        raise _no_place(
            f"the patch tokens of each sequence ({names}) carry an embedding of their own, which timm's network lacks",
            "pass --sequence NAME: the embedding of that sequence becomes part of the patch convolution",
        )
    else:
        out.notes.append(
            f"seq_embed ({len(model.sequences)} rows: {names}) is kept under this name: its rows, divided by their "
            "length, are added to the patch tokens of their sequence; a strict loader refuses the name, one that "
            "ignores it computes other features: pass --sequence NAME for a file without it"
        )


def _fold_sequence(state: State, index: int, sequence: str, out: Outward) -> None:
    """Add the direction of a sequence to all patch tokens, those of masked patches too, by way of what makes them."""
    direction_D = F.normalize(state.pop("seq_embed").float(), dim=1)[index]
    for name in ("patch_embed.proj.bias", "mask_token"):
        state[name] = (state[name].float() + direction_D).to(state[name].dtype)
        out.changed[name] = f"plus the embedding of the sequence {sequence}"
    out.left_out["seq_embed"] = f"the row of {sequence} is part of the patch convolution; the file is for its images"


def _resize(model: VisionTransformer, state: State, img_size: int, out: Outward) -> None:
    positions_1ND, side = state["pos_embed"], img_size // model.patch_size
    if side * side == positions_1ND.shape[1] - 1:
        return
    patches = resize_positions(
        positions_1ND[:, 1:], (side, side), offset=model.interpolate_offset, antialias=model.interpolate_antialias
    )
    state["pos_embed"] = torch.cat([positions_1ND[:, :1], patches], dim=1)
    have = math.isqrt(positions_1ND.shape[1] - 1)
    out.changed["pos_embed"] = f"resized from {have} x {have} to {side} x {side} positions"


def _fold_bias_masks(state: State, out: Outward) -> None:
    """DINOv2 and timm have no masks of the bias: the keys' third of it becomes 0."""
    for name in [name for name in state if name.endswith(".bias_mask")]:
        bias = name.removesuffix("_mask")
        mask = state.pop(name)
        out.left_out[name] = "a constant, multiplied into the bias"
        out.changed[bias] = "the keys' third is 0, as its mask says"
        state[bias] = state[bias] * mask.to(state[bias].dtype)


def _as_timm_counts(state: State, out: Outward) -> None:
    """No mask token; with registers the positions are those of the patches alone, and cls has its own inside."""
    if "mask_token" in state:
        del state["mask_token"]
        out.left_out["mask_token"] = "timm's network hides no patches; features of whole images do not depend on it"
    if "register_tokens" in state:
        positions_1ND = state["pos_embed"]
        state["cls_token"] = state["cls_token"] + positions_1ND[:, :1]
        state["pos_embed"] = positions_1ND[:, 1:]
        out.changed["cls_token"] = "plus its position"
        resized = out.changed.get("pos_embed")
        out.changed["pos_embed"] = f"{resized}; without that of cls" if resized else "without that of cls"
        out.notes.append("build timm's network with no_embed_class=True, as its own networks with registers are")


def _split_gates(out: Outward) -> None:
    """DINOv3 keeps gate and value of a SwiGLU as w1 and w2."""
    for name in [name for name in out.tensors if ".mlp.w12." in name]:
        pair = name.replace(".w12.", ".w1."), name.replace(".w12.", ".w2.")
        out.tensors |= dict(zip(pair, out.tensors.pop(name).chunk(2), strict=True))
        out.renamed[name] = f"{pair[0]} and {pair[1].rpartition('.mlp.')[2]}"


# --- ConvNeXt --------------------------------------------------------------------------------------------------------


def _convnext(state: State, target: Target) -> Outward:
    if target == "timm":
        out = Outward({}, "timm", "timm")
        out.tensors = _renamed(state, _TIMM_CONVNEXT, out)
    else:
        out = Outward(dict(state), "ConvNeXt", "convnext")
        for kind in ("weight", "bias"):  # DINOv3's network lists its final norm a second time, under this name
            out.tensors[f"norms.3.{kind}"] = state[f"norm.{kind}"].clone()
        out.notes.append("norms.3 is the final norm once more, as DINOv3 lists it")
    return out


def _renamed(state: State, rules: Rules, out: Outward) -> State:
    renamed: State = {}
    for old, tensor in state.items():
        name = old
        for pattern, text in rules:
            name = re.sub(pattern, text, name)
        if name != old:
            out.renamed[old] = name
        renamed[name] = tensor
    return renamed
