"""Weights of other programs: which program wrote a file, its names as ours, and the network that the shapes ask for.

One table of renaming rules a source. Nothing here reads files or fills models (``models.zoo`` does): dictionaries of
tensors in, dictionaries of tensors out. Heads that a file carries keep their names, so that a load report lists them.

Letters: D width, J periods of rotary positions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from medssl_cli.core.errors import CheckpointError
from medssl_cli.models.rope import rope_periods

State = dict[str, Tensor]
Rules = tuple[tuple[str, str], ...]

SOURCES = ("dinov2", "dinov3", "meddinov3", "ibot", "visionfm", "retfound", "timm", "hf", "convnext", "vgg19", "medssl")
"""Every kind of file that is known; ``medssl`` is our own export."""

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Origin:
    """What belongs to the weights of a source beside their names.

    Args:
        offset: Of the position resize; None leaves it to the registers, as in DINOv2.
        antialias: Of the position resize; None likewise.
        layernorm_eps: Not stored in any file.
        mean: Of the pictures in [0, 1].
        std: Likewise.
        window_hu: CT values that become 0 and 1, for weights made on CT.
    """

    offset: float | None = None
    antialias: bool | None = None
    layernorm_eps: float = 1e-6
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    window_hu: tuple[float, float] | None = None


_CT_WINDOW = (-1000.0, 1000.0)
_CT_WIDTH = _CT_WINDOW[1] - _CT_WINDOW[0]

ORIGINS: dict[str, Origin] = {
    "dinov2": Origin(),
    "dinov3": Origin(layernorm_eps=1e-5),
    # normalised in HU; here after the window has become 0 to 1
    "meddinov3": Origin(
        mean=((65.1084213256836 - _CT_WINDOW[0]) / _CT_WIDTH,),
        std=(178.01663208007812 / _CT_WIDTH,),
        window_hu=_CT_WINDOW,
    ),
    "ibot": Origin(offset=0.1, antialias=False),
    "visionfm": Origin(offset=0.1, antialias=False),
    "retfound": Origin(offset=0.0, antialias=False),
    "timm": Origin(offset=0.0, antialias=True),
    "hf": Origin(offset=0.0),  # Hugging Face asks for the exact size, with antialiasing for registers only
    "convnext": Origin(),
    "vgg19": Origin(),
    "medssl": Origin(),
}

# --- which source ----------------------------------------------------------------------------------------------------

_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_CHUNKED = re.compile(r"^blocks\.\d+\.(\d+)\.")
_ROLES = ("teacher", "student")


def flat_name(name: str) -> str:
    """Name of a block's tensor without its chunk: ``blocks.1.7.norm1.weight`` -> ``blocks.7.norm1.weight``."""
    return _CHUNKED.sub(r"blocks.\1.", name)


def plain_names(state: Mapping[str, Tensor], where: str = "", role: str | None = None) -> State:
    """The same tensors under the names of a bare backbone or head, without wrappers, role and chunks.

    Args:
        state: As read.
        where: Named in messages.
        role: ``teacher`` or ``student`` of a file that holds both; the teacher if not given.

    Raises:
        CheckpointError: Two tensors get one name, or the role is not there.
    """
    unwrapped = {_WRAPPERS.sub("", name): tensor for name, tensor in state.items()}
    halves = {
        each: {name.removeprefix(f"{each}."): t for name, t in unwrapped.items() if name.startswith(f"{each}.")}
        for each in _ROLES
    }
    held = [each for each in _ROLES if halves[each]]
    if role is not None and held and role not in held:
        raise CheckpointError(
            f"The weight file holds no {role}.",
            where=f"{where or 'weights'}: it holds the {held[0]} alone",
            fix=f"take the {held[0]}, or name another file",
            code="weights_role_missing",
        )
    if held:
        unwrapped = halves[role or held[0]]
    plain: State = {}
    for name, tensor in unwrapped.items():
        flat = flat_name(name.removeprefix("backbone."))
        if flat in plain:
            raise CheckpointError(
                "Two tensors of the weight file have the same name.",
                where=f"{where or 'weights'}: {name} and another are both {flat}",
                fix="give a file of one network; chunks must number their blocks through",
                code="weights_ambiguous",
            )
        plain[flat] = tensor
    return plain


def detect_source(state: Mapping[str, Tensor]) -> str | None:
    """Name of the program whose names a state has, or None; wrappers and roles may still be there.

    Files of iBOT and VisionFM are alike and called ``ibot``; those of DINO (2021) have no name that timm's lack and
    are called ``timm``: the network is the same, but positions are resized otherwise.
    """
    names = plain_names(state)
    has = names.keys().__contains__
    if any(re.match(r"(?:\w+\.)?embeddings\.(?:cls_token|patch_embeddings\.)", name) for name in names):
        return "hf"
    if any(re.match(r"(?:\w+\.)*stages\.0\.downsample_layers\.0\.weight$", name) for name in names):
        return "hf"
    if has("features.0.weight") and has("features.34.weight"):
        return "vgg19"
    if has("stem.0.weight") and has("stages.0.blocks.0.conv_dw.weight"):
        return "timm"
    if has("downsample_layers.0.0.weight"):
        return "convnext"
    if not has("patch_embed.proj.weight"):
        return None
    if has("seq_embed") or (has("rope_embed.periods") and not has("storage_tokens")):
        return "medssl"
    if has("storage_tokens") or has("rope_embed.periods"):
        return "dinov3" if has("blocks.0.attn.qkv.bias") else "meddinov3"
    if has("decoder_embed.weight") or has("decoder_pos_embed"):
        return "retfound"
    if has("masked_embed"):
        return "ibot"
    if has("mask_token"):
        return "dinov2"
    return "timm" if has("blocks.0.attn.qkv.weight") else None


_ALIKE = (frozenset({"dinov2", "ibot", "visionfm", "retfound", "timm", "medssl"}), frozenset({"dinov3", "meddinov3"}))


def contradicts(asked: str, found: str | None) -> bool:
    """Whether a file cannot be of the source that the user names: the names tell another kind of network."""
    return found not in (None, asked) and not any(asked in group and found in group for group in _ALIKE)


# --- renaming --------------------------------------------------------------------------------------------------------

_DINOV3: Rules = ((r"^storage_tokens$", "register_tokens"),)
_IBOT: Rules = ((r"^masked_embed$", "mask_token"),)
_TIMM: Rules = (
    (r"^reg_token$", "register_tokens"),
    (r"\.ls(\d)\.(?:scale|weight)$", r".ls\1.gamma"),
    (r"^stem\.", "downsample_layers.0."),
    (r"^stages\.(\d+)\.downsample\.", r"downsample_layers.\1."),
    (r"^stages\.(\d+)\.blocks\.(\d+)\.", r"stages.\1.\2."),
    (r"\.conv_dw\.", ".dwconv."),
    (r"^(stages\.\d+\.\d+)\.mlp\.fc", r"\1.pwconv"),
    (r"^head\.norm\.", "norm."),
)
_HF: Rules = (
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.(cls_token|mask_token|register_tokens)$", r"\1"),
    (r"^(?:encoder\.|model\.)?layers?\.(\d+)\.", r"blocks.\1."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"\.attention\.(?:o_proj|output\.dense)\.", ".attn.proj."),
    (r"\.attention\.(?:attention\.)?(?:q_proj|query)\.", ".attn.q."),
    (r"\.attention\.(?:attention\.)?(?:k_proj|key)\.", ".attn.k."),
    (r"\.attention\.(?:attention\.)?(?:v_proj|value)\.", ".attn.v."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"^(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.weights_out\.", ".mlp.w3."),
    (r"^layernorm\.", "norm."),
)
_HF_CONVNEXT: Rules = (
    (r"^embeddings\.patch_embeddings\.", "downsample_layers.0.0."),
    (r"^embeddings\.layernorm\.", "downsample_layers.0.1."),
    (r"^encoder\.stages\.(\d+)\.downsampling_layer\.", r"downsample_layers.\1."),
    (r"^encoder\.stages\.(\d+)\.layers\.(\d+)\.layernorm\.", r"stages.\1.\2.norm."),
    (r"^encoder\.stages\.(\d+)\.layers\.(\d+)\.layer_scale_parameter$", r"stages.\1.\2.gamma"),
    (r"^encoder\.stages\.(\d+)\.layers\.(\d+)\.", r"stages.\1.\2."),
    (r"^layernorm\.", "norm."),
)

_HF_DINOV3_CONVNEXT: Rules = (
    (r"^(?:model\.)?stages\.(\d+)\.downsample_layers\.", r"downsample_layers.\1."),
    (r"^(?:model\.)?stages\.(\d+)\.layers\.(\d+)\.", r"stages.\1.\2."),
    (r"^(stages\.\d+\.\d+)\.depthwise_conv\.", r"\1.dwconv."),
    (r"^(stages\.\d+\.\d+)\.layer_norm\.", r"\1.norm."),
    (r"^(stages\.\d+\.\d+)\.pointwise_conv", r"\1.pwconv"),
    (r"^layer_norm\.", "norm."),
)


def translate(state: Mapping[str, Tensor], source: str, role: str | None = None) -> tuple[State, list[str]]:
    """A file's tensors under this program's names, and in words what was done to them besides.

    Args:
        state: As read; wrappers, roles and chunks may still be there.
        source: One of ``SOURCES``.
        role: ``teacher`` or ``student`` of a file that holds both.

    Raises:
        CheckpointError: The tensors are not what that source writes.
        ValueError: No such source.
    """
    if source not in _TRANSLATORS:
        raise ValueError(f"no source {source!r}; known: {', '.join(SOURCES)}")
    notes: list[str] = []
    renamed = _TRANSLATORS[source](plain_names(state, source, role), notes)
    _shape_mask_token(renamed, notes)
    return renamed, notes


def _renamed(state: State, rules: Rules) -> State:
    out: State = {}
    for old, tensor in state.items():
        name = old
        for pattern, text in rules:
            name = re.sub(pattern, text, name)
        if name in out:
            raise _refused(f"{old} and another tensor are both {name}")
        out[name] = tensor
    return out


def _from_dinov3(state: State, notes: list[str]) -> State:
    out = _renamed(state, _DINOV3)
    _fold_bias_masks(out, notes)
    for name in [name for name in out if re.search(r"\.mlp\.w1\.", name)]:
        pair = [name, name.replace(".w1.", ".w2.")]
        if pair[1] not in out:
            raise _refused(f"{pair[1]} is missing")
        out[name.replace(".w1.", ".w12.")] = _end_to_end(name, [out.pop(part) for part in pair])
    return out


def _end_to_end(name: str, parts: Sequence[Tensor]) -> Tensor:
    """Tensors joined along their first axis.

    Raises:
        CheckpointError: Their shapes do not allow it.
    """
    if any(part.ndim == 0 or part.shape[1:] != parts[0].shape[1:] for part in parts):
        raise _refused(f"{name}: parts of shapes {', '.join(str(tuple(part.shape)) for part in parts)}")
    return torch.cat(list(parts))


def _fold_bias_masks(state: State, notes: list[str]) -> None:
    """Multiply the masks of a file into its biases, so that our own mask, always whole, changes nothing more."""
    unfilled = 0
    for name in [name for name in state if name.endswith(".attn.qkv.bias_mask")]:
        mask, bias = state.pop(name), name.removesuffix("_mask")
        if bias not in state:
            continue
        if mask.shape != state[bias].shape:
            raise _refused(f"{name} is {tuple(mask.shape)}, its bias {tuple(state[bias].shape)}")
        if bool(mask.isfinite().all()):
            state[bias] = state[bias] * mask.to(state[bias].dtype)
        else:  # created as NaN upstream and never filled
            unfilled += 1
    if unfilled:
        notes.append(f"{unfilled} bias masks of the file were never filled; the keys' third of the bias is masked here")


def _from_retfound(state: State, notes: list[str]) -> State:
    out = dict(state)
    if "norm.weight" not in out and "fc_norm.weight" in out:
        out |= {f"norm.{kind}": out.pop(f"fc_norm.{kind}") for kind in ("weight", "bias")}
        notes.append(
            "the file has fc_norm, trained on the mean of the patch tokens, and no norm: it is taken as the final norm "
            "of every token; the mean of the patch tokens is the feature it was trained for"
        )
    return out


def _from_timm(state: State, notes: list[str]) -> State:
    out = _renamed(state, _TIMM)
    for name in [name for name in out if re.match(r"stages\.\d+\.\d+\.pwconv\d\.weight$", name)]:
        out[name] = out[name].flatten(1)  # some are stored as 1 x 1 convolutions
    if any(".mlp.fc1." in name for name in out) and _is_gated(out):
        out = _renamed(out, ((r"\.mlp\.fc1\.", ".mlp.w12."), (r"\.mlp\.fc2\.", ".mlp.w3.")))
    if "norm.weight" not in out and "fc_norm.weight" in out:
        return _from_retfound(out, notes)
    positions = out.get("pos_embed")
    if positions is not None and positions.ndim == 3 and math.isqrt(positions.shape[1]) ** 2 == positions.shape[1]:
        out["pos_embed"] = torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)
        notes.append("the file has no position for the cls token; 0 stands there")
    return out


def _is_gated(state: State) -> bool:
    first, second = state.get("blocks.0.mlp.fc1.weight"), state.get("blocks.0.mlp.fc2.weight")
    if first is None or second is None or first.ndim != 2 or second.ndim != 2:
        return False
    return first.shape[0] == 2 * second.shape[1]


_HF_ROOT = re.compile(r"^(?:dinov2|dinov2_with_registers|dinov3_vit|dinov3_convnext|vit|convnext)\.")
"""What a model with a head calls its backbone."""


def _from_hf(state: State, notes: list[str]) -> State:
    bare = {_HF_ROOT.sub("", name): tensor for name, tensor in state.items()}
    if any(name.startswith("encoder.stages.") for name in bare):
        return _renamed(bare, _HF_CONVNEXT)
    if any(".downsample_layers." in name for name in bare):
        return _renamed(bare, _HF_DINOV3_CONVNEXT)
    is_dinov3 = "embeddings.patch_embeddings.weight" in bare
    rules = ((r"^embeddings\.patch_embeddings\.(?!projection)", "patch_embed.proj."), *_HF)
    out = _renamed(bare, rules)
    _join_feed_forward(out)
    _join_queries_keys_values(out)
    if is_dinov3 and "rope_embed.periods" not in out:
        notes.append("the file has no position table: rotary positions with base 100 in fp32")
    out.pop("rope_embeddings.inv_freq", None)
    return out


def _join_feed_forward(state: State) -> None:
    """``gate_proj`` and ``up_proj`` into ``w12``; without a gate ``up_proj`` is ``fc1``."""
    for name in [name for name in state if ".mlp.up_proj." in name]:
        up, gate = state.pop(name), state.pop(name.replace(".up_proj.", ".gate_proj."), None)
        down = state.pop(name.replace(".up_proj.", ".down_proj."), None)
        first, second = (".fc1.", ".fc2.") if gate is None else (".w12.", ".w3.")
        state[name.replace(".up_proj.", first)] = up if gate is None else _end_to_end(name, [gate, up])
        if down is not None:
            state[name.replace(".up_proj.", second)] = down


def _join_queries_keys_values(state: State) -> None:
    """Three projections into one; a bias that one of them lacks is 0."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name in [name for name in state if re.search(r"\.attn\.[qkv]\.(?:weight|bias)$", name)]:
        stem, part, kind = name.rsplit(".", 2)
        parts.setdefault(f"{stem}.qkv.{kind}", {})[part] = state.pop(name)
    for name, found in parts.items():
        if name.endswith(".weight") and len(found) < 3:
            raise _refused(f"{name}: queries, keys and values are needed, the file has {', '.join(sorted(found))}")
        like = next(iter(found.values()))
        state[name] = _end_to_end(name, [found.get(part, torch.zeros_like(like)) for part in "qkv"])


def _shape_mask_token(state: State, notes: list[str]) -> None:
    """(1, 1, D) becomes (1, D); that of a masked autoencoder's decoder has another width and is left out."""
    token, weight = state.get("mask_token"), state.get("patch_embed.proj.weight")
    if token is None or weight is None or not token.ndim or not weight.ndim:
        return
    if token.numel() == weight.shape[0]:
        state["mask_token"] = token.reshape(1, -1)
    else:
        del state["mask_token"]
        notes.append(f"the mask token is {token.shape[-1]} wide, as of a decoder; it is left out")


_VGG19 = (64, 64, "M", 128, 128, "M", 256, 256, 256, 256, "M", 512, 512, 512, 512, "M", 512, 512, 512, 512, "M")
"""Width of each 3 x 3 convolution, M for a maximum over 2 x 2; a ReLU follows each convolution."""


def vgg19_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the convolutions of VGG-19 (Simonyan and Zisserman 2015), numbered as torchvision does."""
    shapes: dict[str, tuple[int, ...]] = {}
    place, channels = 0, 3
    for width in _VGG19:
        if isinstance(width, int):
            shapes[f"features.{place}.weight"] = (width, channels, 3, 3)
            shapes[f"features.{place}.bias"] = (width,)
            channels = width
        place += 2 if isinstance(width, int) else 1
    return shapes


def _from_vgg19(state: State, notes: list[str]) -> State:
    wanted = vgg19_shapes()
    wrong = [f"{name} {tuple(state[name].shape) if name in state else 'missing'}, VGG-19 has {shape}"
             for name, shape in wanted.items() if name not in state or tuple(state[name].shape) != shape]  # fmt: skip
    if wrong:
        raise _refused("\n".join(wrong[:5]))
    return dict(state)


def _as_it_is(state: State, notes: list[str]) -> State:
    return dict(state)


def _from_ibot(state: State, notes: list[str]) -> State:
    return _renamed(state, _IBOT)


_TRANSLATORS: dict[str, Callable[[State, list[str]], State]] = {
    "dinov2": _as_it_is,
    "dinov3": _from_dinov3,
    "meddinov3": _from_dinov3,
    "ibot": _from_ibot,
    "visionfm": _from_ibot,
    "retfound": _from_retfound,
    "timm": _from_timm,
    "hf": _from_hf,
    "convnext": _as_it_is,
    "vgg19": _from_vgg19,
    "medssl": _as_it_is,
}


# --- the network that the shapes ask for -----------------------------------------------------------------------------


def family_of(state: Mapping[str, Tensor]) -> str:
    """vit, convnext or features, from the names after ``translate``."""
    if "downsample_layers.0.0.weight" in state:
        return "convnext"
    return "features" if "features.0.weight" in state else "vit"


def infer_settings(
    state: Mapping[str, Tensor], source: str, *, num_heads: int | None = None, layernorm_eps: float | None = None
) -> dict[str, Any]:
    """Arguments of the network that a translated file was made for.

    Args:
        state: From ``translate``.
        source: Decides what no shape tells: eps of the norms, how positions are resized.
        num_heads: Where heads are not 64 wide; rotary periods in the file tell it too.
        layernorm_eps: Instead of the source's own.

    Raises:
        CheckpointError: The shapes are of no network that this program has.
    """
    if family_of(state) == "convnext":
        return _convnext_settings(state)
    for name, axes in _NEEDED.items():
        if name not in state:
            raise _refused(f"{name} is missing")
        _refuse_axes(state, name, axes)
    for name in ("register_tokens", "pos_embed"):
        _refuse_axes(state, name, 3)
    kernel = state["patch_embed.proj.weight"]
    if kernel.shape[2] != kernel.shape[3] or not kernel.numel():
        raise _refused(f"patch_embed.proj.weight is {tuple(kernel.shape)}; square patches of 2-D images are needed")
    width, patch = kernel.shape[0], kernel.shape[2]
    origin, registers = ORIGINS[source], state["register_tokens"].shape[1] if "register_tokens" in state else 0
    settings: dict[str, Any] = {
        "patch_size": patch,
        "in_chans": kernel.shape[1],
        "embed_dim": width,
        "depth": 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks.")),
        "num_register_tokens": registers,
        "layerscale": 1e-5 if "blocks.0.ls1.gamma" in state else 0.0,
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "proj_bias": "blocks.0.attn.proj.bias" in state,
        "ffn_layer": _feed_forward(state, width),
        "ffn_bias": any(f"blocks.0.mlp.{part}.bias" in state for part in ("fc1", "w12")),
        "interpolate_offset": origin.offset,
        "interpolate_antialias": origin.antialias,
        "layernorm_eps": layernorm_eps or (_hf_eps(state) if source == "hf" else origin.layernorm_eps),
    }
    if "pos_embed" in state:
        if not state["pos_embed"].shape[1]:
            raise _refused("pos_embed is empty")
        side = math.isqrt(state["pos_embed"].shape[1] - 1)
        if side * side != state["pos_embed"].shape[1] - 1 or side < 1:
            raise _refused(f"pos_embed holds {state['pos_embed'].shape[1]} positions, no square grid and one for cls")
        settings |= {"img_size": side * patch, "num_heads": num_heads or _heads(width)}
    else:
        periods = state.get("rope_embed.periods")
        if periods is not None and (periods.ndim != 1 or not len(periods)):
            raise _refused(f"rope_embed.periods is {tuple(periods.shape)}")
        heads = num_heads or (_heads(width) if periods is None else max(1, width // (4 * len(periods))))
        base, dtype = (100.0, "fp32") if periods is None else _rope_of(periods, 4 * len(periods), source)
        settings |= {
            "img_size": 224 // patch * patch,
            "num_heads": heads,
            "pos_embed_type": "rope",
            "pos_embed_rope_base": base,
            "pos_embed_rope_dtype": dtype,
            "mask_k_bias": settings["qkv_bias"],
        }
    return settings


_NEEDED = {"patch_embed.proj.weight": 4, "blocks.0.attn.qkv.weight": 2, "cls_token": 3}
"""Number of axes of the tensors without which there is no vision transformer."""


def _refuse_axes(state: Mapping[str, Tensor], name: str, axes: int) -> None:
    if name in state and state[name].ndim != axes:
        raise _refused(f"{name} is {tuple(state[name].shape)}; {axes} axes are needed")


def _hf_eps(state: Mapping[str, Tensor]) -> float:
    """What Hugging Face's three vision transformers add to the variance unless their configuration says otherwise."""
    if "pos_embed" not in state:
        return ORIGINS["dinov3"].layernorm_eps
    return ORIGINS["dinov2"].layernorm_eps if "blocks.0.ls1.gamma" in state else 1e-12


def _heads(width: int) -> int:
    if width % 64:
        raise CheckpointError(
            "The number of attention heads cannot be told from the weights.",
            where=f"the network is {width} wide, no multiple of 64",
            fix="pass num_heads=N",
            code="weights_heads_unknown",
        )
    return width // 64


def _feed_forward(state: Mapping[str, Tensor], width: int) -> str:
    """mlp or swiglu, if it is as wide as ours."""
    plain, gated = state.get("blocks.0.mlp.fc1.weight"), state.get("blocks.0.mlp.w12.weight")
    if plain is not None and plain.shape[:1] == (4 * width,):
        return "mlp"
    if gated is not None and gated.shape[:1] == (2 * ((4 * width * 2 // 3 + 7) // 8 * 8),):
        return "swiglu"
    shape = next((tuple(t.shape) for t in (plain, gated) if t is not None), None)
    raise _refused(f"the feed-forward layer is {shape}; {4 * width} or a SwiGLU of two thirds of it is needed")


def _rope_of(periods_J: Tensor, head_dim: int, source: str) -> tuple[float, str]:
    """Base and number type of stored rotary periods."""
    stored = periods_J.double()
    rounded = rope_periods(head_dim, 100.0, "bf16").double()
    if torch.equal(stored, rounded):
        # MedDINOv3 computes in bf16; public DINOv3 in fp32, whatever the stored periods were rounded to
        return 100.0, "bf16" if source in ("meddinov3", "medssl") else "mixed"
    count = len(stored)
    base = float(stored[-1]) ** (count / (count - 1)) if count > 1 else 100.0
    base = round(base, 3) if math.isfinite(base) and base > 1 else 100.0
    if not torch.allclose(stored, rope_periods(head_dim, base, "fp32").double(), rtol=1e-4):
        raise _refused(f"rope_embed.periods {[round(float(p), 3) for p in stored[:4]]}… follow no single base")
    return base, "fp32"


def _convnext_settings(state: Mapping[str, Tensor]) -> dict[str, Any]:
    blocks = [re.match(r"stages\.(\d+)\.(\d+)\.", name) for name in state]
    found = [(int(match[1]), int(match[2])) for match in blocks if match]
    if {stage for stage, _ in found} != {0, 1, 2, 3}:
        raise _refused(f"a ConvNeXt has four stages, the file {len({stage for stage, _ in found})}")
    _refuse_axes(state, "downsample_layers.0.0.weight", 4)
    for stage in range(4):
        name = f"stages.{stage}.0.pwconv1.weight"
        if name not in state:
            raise _refused(f"{name} is missing")
        _refuse_axes(state, name, 2)
    return {
        "in_chans": state["downsample_layers.0.0.weight"].shape[1],
        "depths": [1 + max(block for stage, block in found if stage == each) for each in range(4)],
        "dims": [state[f"stages.{stage}.0.pwconv1.weight"].shape[1] for stage in range(4)],
        "layer_scale": 1e-6 if "stages.0.0.gamma" in state else 0.0,
    }


def _refused(why: str) -> CheckpointError:
    return CheckpointError(
        "The weights are of no network that this program has.",
        where=why,
        fix="name the right --source, or take another file",
        code="weights_foreign",
    )


HEAD_NAMES = re.compile(
    r"^\w*(?:head|fc|pooler|classifier|decoder|projector|predictor|prototypes|loss|queue|center)\w*(?:\.|$)"
    r"|^(?:logit_scale|logit_bias|temperature|bias_mask)$"
    r"|^norms\.3\.(?:weight|bias)$"  # a second name of the final norm in DINOv3's ConvNeXt
)
"""Names that belong to heads, decoders and losses, whose absence from a backbone is right."""


def foreign_parts(unexpected: Sequence[str]) -> list[str]:
    """Of the names that a backbone does not have, those that are no heads: leaving them out would change features."""
    return [name for name in unexpected if not HEAD_NAMES.match(name)]
