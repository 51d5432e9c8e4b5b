"""Layers of a vision transformer on packed tokens: patch conv, attention, feed-forward, layer scale, stochastic depth.

Every layer works on one tensor of tokens laid end to end, so that crops of several sizes share each matrix product;
only attention and stochastic depth need to know where a sample begins. Random draws are made outside (``draw_drops``)
and handed in: a block is then a pure function, safe to recompute and to compile.

Letters: B samples, C channels, H W space, N tokens of one sample, T tokens of all groups together, K tokens that are
needed, D width, A heads, E width of one head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medssl_cli.models.attention import Groups, attend, token_count
from medssl_cli.models.rope import packed_table, rotate


def nearest_legal_sizes(size: int, patch_size: int) -> tuple[int, int]:
    """The two multiples of ``patch_size`` around ``size``; equal to it when it is legal."""
    below = max(size // patch_size, 1) * patch_size
    return (size, size) if size == below else (below, below + patch_size if size > below else below)


class PatchEmbed(nn.Module):
    """Image to patch tokens: (B, C, H, W) -> (B, N, D), row by row.

    One grey channel stands for ``in_chans`` equal ones: the kernel is summed over its channels instead of the image
    being repeated, so that weights learned on RGB serve grey images at a third of the work.
    """

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.patch_size, self.in_chans = patch_size, in_chans
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of patches.

        Raises:
            ValueError: A side is no multiple of the patch size.
        """
        for side in (height, width):
            if side % self.patch_size:
                near = " or ".join(str(n) for n in sorted(set(nearest_legal_sizes(side, self.patch_size))))
                raise ValueError(
                    f"image of {height} x {width} pixels: {side} is no multiple of the patch size {self.patch_size}; "
                    f"the nearest legal size is {near}"
                )
        return height // self.patch_size, width // self.patch_size

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N, D)."""
        self.grid(*images_BCHW.shape[-2:])
        weight, channels = self.proj.weight, images_BCHW.shape[1]
        if channels == 1 and self.in_chans > 1:
            weight = weight.sum(1, keepdim=True)
        elif channels != self.in_chans:
            raise ValueError(f"images of {channels} channels, the patch convolution takes {self.in_chans} or 1")
        images_BCHW = images_BCHW.to(weight.dtype)  # a pure fp16 or bf16 model takes float32 images
        return F.conv2d(images_BCHW, weight, self.proj.bias, stride=self.patch_size).flatten(2).transpose(1, 2)


_CARRIED_NUMBERS = 2**21
"""Attention weights of all heads that ``Attention.carried`` holds at once: 8 MiB."""


class KeylessBiasLinear(nn.Linear):
    """Query, key and value projection whose bias has no effect on the keys: (T, D) -> (T, 3 D).

    A bias of the keys shifts every score of a query by the same amount, so softmax takes no notice of it, but it
    drifts in half precision. DINOv3's files carry the mask as ``bias_mask``; it is filled here from the start.
    """

    bias_mask: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__(dim, 3 * dim, bias=True)
        self.register_buffer("bias_mask", torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(dim))

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, D) -> (T, 3 D)."""
        return F.linear(x_TD, self.weight, self.bias * self.bias_mask.to(self.bias.dtype))


Rope = tuple[Tensor, ...]
"""Cosines and sines of each group's tokens, (2, N, E) each; see ``rope.RopeEmbedding``."""


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017) within each sample: (T, D) -> (T, D)."""

    def __init__(
        self, dim: int, num_heads: int, *, qkv_bias: bool = True, proj_bias: bool = True, mask_k_bias: bool = False
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"width {dim} is no multiple of {num_heads} heads")
        self.num_heads = num_heads
        self.qkv = KeylessBiasLinear(dim) if qkv_bias and mask_k_bias else nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)

    def _split(self, x_TD: Tensor, groups: Groups, rope: Rope | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys, values, each (T, A, E); views, but for queries and keys that are turned."""
        q, k, v = self.qkv(x_TD).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        if rope is not None:
            table_2T1E = packed_table(rope, groups)
            q, k = rotate(q, table_2T1E), rotate(k, table_2T1E)
        return q, k, v

    def forward(self, x_TD: Tensor, groups: Groups, rope: Rope | None = None) -> Tensor:
        """(T, D) -> (T, D)."""
        return self.proj(self.mix(x_TD, groups, rope))

    def mix(self, x_TD: Tensor, groups: Groups, rope: Rope | None = None) -> Tensor:
        """What the heads found, before the output projection: (T, D) -> (T, D)."""
        return attend(*self._split(x_TD, groups, rope), groups).flatten(-2)

    def weights(self, x_TD: Tensor, groups: Groups, rope: Rope | None = None) -> Tensor:
        """Attention of one group, averaged over heads: (B, N, N), each row sums to 1."""
        if len(groups) != 1:
            raise ValueError(f"attention weights are made for one group at a time, got {groups}")
        q, k, _ = (part.unflatten(0, groups[0]).transpose(1, 2) for part in self._split(x_TD, groups, rope))
        return (q.float() @ k.float().transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1).mean(1)

    def carried(self, x_TD: Tensor, groups: Groups, share_BN: Tensor, rope: Rope | None = None) -> Tensor:
        """``share_BN`` of the queries handed on to the keys: (B, N), the product ``share @ weights`` row by row.

        The weights themselves, (B, N, N), are never held: a few thousand tokens would fill gigabytes.
        """
        if len(groups) != 1:
            raise ValueError(f"attention is carried for one group at a time, got {groups}")
        q, k, _ = (part.unflatten(0, groups[0]).transpose(1, 2).float() for part in self._split(x_TD, groups, rope))
        q, k_BAEN = q * q.shape[-1] ** -0.5, k.transpose(-2, -1)
        rows = max(1, _CARRIED_NUMBERS // (q.shape[0] * q.shape[1] * q.shape[2]))
        carried_BN = torch.zeros_like(share_BN)
        for start in range(0, q.shape[2], rows):
            part = slice(start, start + rows)
            weights_BARN = (q[:, :, part] @ k_BAEN).softmax(-1)
            carried_BN += (share_BN[:, None, None, part] @ weights_BARN).mean((1, 2))
        return carried_BN


class Mlp(nn.Module):
    """Two linear layers with GELU between: (T, D) -> (T, D)."""

    def __init__(self, dim: int, hidden: int, *, bias: bool = True) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, D) -> (T, D)."""
        return self.fc2(F.gelu(self.fc1(x_TD)))


class SwiGlu(nn.Module):
    """Gated feed-forward layer (Shazeer 2020): (T, D) -> (T, D).

    The hidden width is two thirds of the plain one, rounded up to a multiple of 8, so that both cost the same.
    """

    def __init__(self, dim: int, hidden: int, *, bias: bool = True) -> None:
        super().__init__()
        hidden = (hidden * 2 // 3 + 7) // 8 * 8
        self.w12 = nn.Linear(dim, 2 * hidden, bias=bias)
        self.w3 = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, D) -> (T, D)."""
        gate, value = self.w12(x_TD).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class LayerScale(nn.Module):
    """A trained factor for each channel of a residual branch (Touvron et al. 2021)."""

    def __init__(self, dim: int, start: float) -> None:
        super().__init__()
        self.start = start
        self.gamma = nn.Parameter(torch.full((dim,), start))

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, D) -> (T, D)."""
        return x_TD * self.gamma


# --- stochastic depth ------------------------------------------------------------------------------------------------


class Subset(NamedTuple):
    """A branch that runs on some samples only, whose part counts for all.

    Args:
        groups: Of the whole packed tensor.
        kept: Samples kept of each group.
        indices: For each group the kept samples, (kept,) int64.
    """

    groups: Groups
    kept: tuple[int, ...]
    indices: tuple[Tensor, ...]

    @property
    def kept_groups(self) -> Groups:
        """How the kept samples lie in their packed tensor."""
        return tuple((k, tokens) for k, (_, tokens) in zip(self.kept, self.groups, strict=True))

    def factors(self, dtype: torch.dtype) -> Tensor:
        """(B,) over all groups: how much the branch of a sample counts, 0 for those left out."""
        return torch.cat(
            [
                torch.zeros(samples, dtype=dtype, device=index.device).index_fill_(0, index, samples / kept)
                for (samples, _), kept, index in zip(self.groups, self.kept, self.indices, strict=True)
            ]
        )

    def starts(self) -> Tensor:
        """(B,) over all groups: where a sample begins in the packed tensor of the kept ones; 0 for those left out."""
        starts, before = [], 0
        for (samples, tokens), kept, index in zip(self.groups, self.kept, self.indices, strict=True):
            places = torch.arange(kept, device=index.device) * tokens + before
            starts.append(torch.zeros(samples, dtype=torch.int64, device=index.device).index_copy_(0, index, places))
            before += kept * tokens
        return torch.cat(starts)


class SampleMask(NamedTuple):
    """A branch that runs on all samples and is then dropped for some: ``factor_B11`` is 0 or 1 / (1 - rate)."""

    factor_B11: Tensor


Drop = Subset | SampleMask | None


class Needed(NamedTuple):
    """The tokens whose output of a block is wanted.

    Args:
        places_K: Where they lie in the packed tensor, int64.
        samples_K: Their samples, counted over all groups.
        tokens_K: Their places within the sample.
    """

    places_K: Tensor
    samples_K: Tensor
    tokens_K: Tensor


def draw_drops(
    rates: Sequence[float],
    groups: Groups,
    *,
    packed: bool,
    device: torch.device,
    generator: torch.Generator | None = None,
) -> list[tuple[Drop, Drop]]:
    """Which samples each block's two branches leave out, for one forward pass.

    Packed crops, and single ones at a rate above 0.1, run each branch on a random subset of max(floor(b(1-r)), 1)
    samples of b; at small b the real rate therefore differs from r, and one sample is never dropped. Single crops at
    a rate up to 0.1 are masked one by one.

    Args:
        rates: One for each block, 0 <= r < 1.
        groups: Of the packed tensor.
        packed: Crops of several sizes in one pass.
        device: Where the tokens lie.
        generator: Source of the draws; torch's own on the CPU if None, whatever the device, so that CPU and GPU agree.

    Returns:
        For each block the drops of its attention and feed-forward branch.

    Source: Huang et al. 2016 (stochastic depth); Oquab et al. 2023 (on subsets of the batch).
    """
    source = torch.device("cpu") if generator is None else generator.device
    draws = [torch.rand(2 * len(rates), samples, generator=generator, device=source) for samples, _ in groups]
    orders = [draw.argsort(1).to(device, non_blocking=True) for draw in draws]
    masks = None if packed else draws[0].to(device, non_blocking=True)

    def one(rate: float, branch: int) -> Drop:
        if rate == 0:
            return None
        if masks is not None and rate <= 0.1:
            return SampleMask((masks[branch] >= rate).to(torch.float32).div_(1 - rate).view(-1, 1, 1))
        kept = tuple(max(int(samples * (1 - rate)), 1) for samples, _ in groups)
        if all(k == samples for k, (samples, _) in zip(kept, groups, strict=True)):
            return None
        return Subset(groups, kept, tuple(order[branch, :k] for order, k in zip(orders, kept, strict=True)))

    return [(one(rate, 2 * i), one(rate, 2 * i + 1)) for i, rate in enumerate(rates)]


class _TakeSamples(torch.autograd.Function):
    """Packed tokens of the kept samples, (T, D) -> (T', D)."""

    @staticmethod
    def forward(x_TD: Tensor, subset: Subset) -> Tensor:
        return _take(x_TD, subset)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Subset], output: Tensor) -> None:
        ctx.subset = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None]:
        whole = grad_TD.new_zeros(token_count(ctx.subset.groups), grad_TD.shape[1])
        return _add_(whole, grad_TD, ctx.subset, scaled=False), None


class _AddSamples(torch.autograd.Function):
    """x plus the scaled branch of the kept samples: (T, D), (T', D) -> (T, D).

    Written by hand because the ready-made operators copy the whole gradient once for every group.
    """

    @staticmethod
    def forward(x_TD: Tensor, branch_TD: Tensor, subset: Subset) -> Tensor:
        return _add_(x_TD.clone(), branch_TD, subset, scaled=True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Subset], output: Tensor) -> None:
        ctx.subset, ctx.dtype = inputs[2], inputs[1].dtype

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad_TD, _take(grad_TD, ctx.subset, scaled=True).to(ctx.dtype), None


def _take(x_TD: Tensor, subset: Subset, *, scaled: bool = False) -> Tensor:
    pieces = []
    for piece, (samples, tokens), kept, index in _pieces(x_TD, subset):
        # whole samples as rows: on a CPU a hundred times faster than token by token
        taken = piece.reshape(samples, -1).index_select(0, index)
        pieces.append((taken.mul_(samples / kept) if scaled else taken).view(kept * tokens, -1))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _add_(x_TD: Tensor, branch_TD: Tensor, subset: Subset, *, scaled: bool) -> Tensor:
    branches = branch_TD.to(x_TD.dtype).split([k * tokens for k, tokens in subset.kept_groups])
    for (piece, (samples, _), kept, index), branch in zip(_pieces(x_TD, subset), branches, strict=True):
        alpha = samples / kept if scaled else 1.0
        piece.view(samples, -1).index_add_(0, index, branch.reshape(kept, -1), alpha=alpha)
    return x_TD


def _pieces(x_TD: Tensor, subset: Subset) -> list[tuple[Tensor, tuple[int, int], int, Tensor]]:
    pieces = x_TD.split([samples * tokens for samples, tokens in subset.groups])
    return list(zip(pieces, subset.groups, subset.kept, subset.indices, strict=True))


class Block(nn.Module):
    """Pre-norm transformer block: attention, then feed-forward, each added to its input."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        ffn_layer: str = "mlp",
        ffn_hidden: int,
        layerscale: float = 1e-5,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        ffn_bias: bool = True,
        mask_k_bias: bool = False,
        layernorm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=layernorm_eps)
        self.attn = Attention(dim, num_heads, qkv_bias=qkv_bias, proj_bias=proj_bias, mask_k_bias=mask_k_bias)
        self.ls1 = LayerScale(dim, layerscale) if layerscale else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=layernorm_eps)
        self.mlp = build_ffn(ffn_layer, dim, ffn_hidden, bias=ffn_bias)
        self.ls2 = LayerScale(dim, layerscale) if layerscale else nn.Identity()

    def forward(
        self,
        x_TD: Tensor,
        groups: Groups | None = None,
        drops: tuple[Drop, Drop] = (None, None),
        rope: Rope | None = None,
        needed: Needed | None = None,
    ) -> Tensor:
        """(T, D) packed as ``groups`` says -> (T, D); or (B, N, D) without groups -> (B, N, D).

        With ``needed`` only those tokens come out, (K, D): all tokens are attended to, but the output projection and
        the feed-forward layer run on the needed ones alone.
        """
        if groups is None:
            samples, tokens, _ = x_TD.shape
            return self(x_TD.flatten(0, 1), ((samples, tokens),), drops, rope).unflatten(0, (samples, tokens))
        if needed is not None:
            return self._needed(x_TD, groups, drops, rope, needed)
        x_TD = self._residual(x_TD, groups, drops[0], rope, attention=True)
        return self._residual(x_TD, groups, drops[1], rope, attention=False)

    def _residual(self, x_TD: Tensor, groups: Groups, drop: Drop, rope: Rope | None, *, attention: bool) -> Tensor:
        scale = self.ls1 if attention else self.ls2
        if isinstance(drop, Subset):
            branch = self._branch(_TakeSamples.apply(x_TD, drop), drop.kept_groups, rope, attention=attention)
            return _AddSamples.apply(x_TD, scale(branch), drop)
        branch = self._branch(x_TD, groups, rope, attention=attention)
        if isinstance(drop, SampleMask):
            factor = drop.factor_B11.to(x_TD.dtype).expand(-1, groups[0][1], 1).reshape(-1, 1)
            return torch.addcmul(x_TD, scale(branch), factor)
        return torch.addcmul(x_TD, branch, scale.gamma) if isinstance(scale, LayerScale) else x_TD + branch

    def _branch(self, x_TD: Tensor, groups: Groups, rope: Rope | None, *, attention: bool) -> Tensor:
        return self.attn(self.norm1(x_TD), groups, rope) if attention else self.mlp(self.norm2(x_TD))

    def _needed(
        self, x_TD: Tensor, groups: Groups, drops: tuple[Drop, Drop], rope: Rope | None, needed: Needed
    ) -> Tensor:
        kept_TD, places_K = x_TD, needed.places_K
        if isinstance(drops[0], Subset):
            kept_TD, groups = _TakeSamples.apply(x_TD, drops[0]), drops[0].kept_groups
            # a token of a sample left out takes any place: its factor is 0
            places_K = drops[0].starts().index_select(0, needed.samples_K) + needed.tokens_K
            places_K = places_K.clamp_(max=kept_TD.shape[0] - 1)
        mixed_TD = self.attn.mix(self.norm1(kept_TD), groups, rope)
        branch_KD = self.ls1(self.attn.proj(mixed_TD.index_select(0, places_K)))
        x_KD = _add_needed(x_TD.index_select(0, needed.places_K), branch_KD, drops[0], needed)
        return _add_needed(x_KD, self.ls2(self.mlp(self.norm2(x_KD))), drops[1], needed)


def _add_needed(x_KD: Tensor, branch_KD: Tensor, drop: Drop, needed: Needed) -> Tensor:
    """x plus the branch of needed tokens, each as much as stochastic depth lets its sample count."""
    branch_KD = branch_KD.to(x_KD.dtype)
    if drop is None:
        return x_KD + branch_KD
    factors_B = drop.factors(x_KD.dtype) if isinstance(drop, Subset) else drop.factor_B11.flatten().to(x_KD.dtype)
    return torch.addcmul(x_KD, branch_KD, factors_B.index_select(0, needed.samples_K)[:, None])


def build_ffn(name: str, dim: int, hidden: int, *, bias: bool = True) -> nn.Module:
    """Feed-forward layer by its configuration name: mlp, swiglu, swiglufused (the same numbers), identity."""
    if name == "mlp":
        return Mlp(dim, hidden, bias=bias)
    if name in ("swiglu", "swiglufused"):
        return SwiGlu(dim, hidden, bias=bias)
    if name == "identity":
        return nn.Identity()
    raise ValueError(f"no feed-forward layer {name!r}; choose mlp, swiglu, swiglufused or identity")
