"""Vision transformer of DINOv2 and DINOv3 for one picture or for several MRI sequences in one token sequence.

Parameter names are DINOv2's, so that public weights load by name. Several sequences share the patch convolution and
the positions; each may get an embedding of its own, and an absent one is made of mask tokens. All tokens of a pass,
crops of several sizes included, lie end to end in one tensor, and ``forward`` is the case of one size.

Letters: B samples, S sequences, C channels, H W space, M side of the stored position grid, N patch tokens of one image
of one sequence, P cls and register tokens, R registers, T tokens of all groups together, K tokens that are needed, D
width, E width of one head.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from medssl_cli.core.protocols import Features
from medssl_cli.models.attention import Groups
from medssl_cli.models.layers import Block, Drop, Needed, PatchEmbed, Rope, draw_drops
from medssl_cli.models.rope import Grid, Normalize, RopeDtype, RopeEmbedding

PosEmbed = Literal["learned", "rope", "none"]


class VisionTransformer(nn.Module):
    """Images to features; keeps ``core.protocols.Backbone``.

    Args:
        img_size: Side of the image for which positions are stored; other sizes are interpolated.
        patch_size: Side of a patch in pixels.
        in_chans: Channels of the patch convolution; a grey image stands for that many equal ones.
        embed_dim: Width D, a multiple of ``num_heads``.
        depth: Blocks.
        num_heads: Attention heads.
        ffn_layer: mlp, swiglu, swiglufused or identity, four times as wide as D (SwiGLU: two thirds of that).
        sequences: Names of the MRI sequences in channel order; None for one plain picture.
        use_mri_seq_embed: Add an embedding of the sequence to its patch tokens.
        img_wise_pos_embed: Every sequence has the same 2-D positions; otherwise the sequences are stacked into one
            tall image with positions of its own.
        num_register_tokens: Extra tokens after cls, without position (Darcet et al. 2024).
        interpolate_offset: Added to the target grid before the scale factor is taken (historic DINOv2: 0.1); 0 asks
            for the exact size. None: 0.1 without registers, 0 with them, as the public weights were trained.
        interpolate_antialias: Low-pass filter when the grid shrinks. None: with registers only.
        pos_embed_type: learned (a table that is added), rope (queries and keys are turned; see ``rope.RopeEmbedding``,
            whose arguments are those named ``pos_embed_rope_*`` here) or none.
        mask_k_bias: The bias of the keys has no effect, as in DINOv3; without ``qkv_bias`` there is none.
        layernorm_eps: Of every LayerNorm.
        drop_path_rate: Stochastic depth while training, the same for all blocks or rising linearly from 0. Drawn from
            torch's global generator of the CPU, which the trainer seeds anew for every micro-batch.
        layerscale: Start of the layer scale; 0 leaves it out.
        block_chunks: Above 0 the blocks are kept in that many chunks, named ``blocks.<chunk>.<i>``.
        grad_checkpointing: Recompute each block in the backward pass instead of keeping its activations.

    Source: Dosovitskiy et al. 2021; Oquab et al. 2023 (DINOv2); Simeoni et al. 2025 (DINOv3); several sequences in one
    token sequence as in MM-DINOv2 (MICCAI 2025).
    """

    def __init__(
        self,
        *,
        img_size: int = 224,
        patch_size: int = 14,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        ffn_layer: str = "mlp",
        qkv_bias: bool = True,
        proj_bias: bool = True,
        ffn_bias: bool = True,
        layerscale: float = 1e-5,
        drop_path_rate: float = 0.0,
        drop_path_uniform: bool = True,
        block_chunks: int = 0,
        sequences: Sequence[str] | None = None,
        use_mri_seq_embed: bool = False,
        img_wise_pos_embed: bool = True,
        num_register_tokens: int = 0,
        interpolate_offset: float | None = None,
        interpolate_antialias: bool | None = None,
        pos_embed_type: PosEmbed = "learned",
        pos_embed_rope_base: float = 100.0,
        pos_embed_rope_dtype: RopeDtype = "fp32",
        pos_embed_rope_normalize_coords: Normalize = "separate",
        pos_embed_rope_shift_coords: float | None = None,
        pos_embed_rope_jitter_coords: float | None = None,
        pos_embed_rope_rescale_coords: float | None = None,
        mask_k_bias: bool = False,
        layernorm_eps: float = 1e-6,
        grad_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if sequences is not None and (not sequences or len(set(sequences)) != len(sequences)):
            raise ValueError(f"sequences are one or more different names, got {tuple(sequences)}")
        if interpolate_offset is None:
            interpolate_offset = 0.0 if num_register_tokens else 0.1
        if interpolate_antialias is None:
            interpolate_antialias = num_register_tokens > 0
        self.settings: dict[str, Any] = {
            "img_size": img_size,
            "patch_size": patch_size,
            "in_chans": in_chans,
            "embed_dim": embed_dim,
            "depth": depth,
            "num_heads": num_heads,
            "ffn_layer": ffn_layer,
            "qkv_bias": qkv_bias,
            "proj_bias": proj_bias,
            "ffn_bias": ffn_bias,
            "layerscale": layerscale,
            "drop_path_rate": drop_path_rate,
            "drop_path_uniform": drop_path_uniform,
            "block_chunks": block_chunks,
            "sequences": None if sequences is None else list(sequences),
            "use_mri_seq_embed": use_mri_seq_embed,
            "img_wise_pos_embed": img_wise_pos_embed,
            "num_register_tokens": num_register_tokens,
            "interpolate_offset": interpolate_offset,
            "interpolate_antialias": interpolate_antialias,
            "pos_embed_type": pos_embed_type,
            "pos_embed_rope_base": pos_embed_rope_base,
            "pos_embed_rope_dtype": pos_embed_rope_dtype,
            "pos_embed_rope_normalize_coords": pos_embed_rope_normalize_coords,
            "pos_embed_rope_shift_coords": pos_embed_rope_shift_coords,
            "pos_embed_rope_jitter_coords": pos_embed_rope_jitter_coords,
            "pos_embed_rope_rescale_coords": pos_embed_rope_rescale_coords,
            "mask_k_bias": mask_k_bias,
            "layernorm_eps": layernorm_eps,
        }
        self.embed_dim, self.patch_size, self.img_size, self.in_chans = embed_dim, patch_size, img_size, in_chans
        self.sequences = None if sequences is None else tuple(sequences)
        self.use_mri_seq_embed, self.img_wise_pos_embed = use_mri_seq_embed, img_wise_pos_embed
        self.num_register_tokens = num_register_tokens
        self.interpolate_offset, self.interpolate_antialias = interpolate_offset, interpolate_antialias
        self.grad_checkpointing = grad_checkpointing
        self.drop_rates = [drop_path_rate * (1.0 if drop_path_uniform else i / max(depth - 1, 1)) for i in range(depth)]

        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        rows, columns = self.patch_embed.grid(img_size, img_size)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = (
            nn.Parameter(torch.empty(1, 1 + rows * columns, embed_dim)) if pos_embed_type == "learned" else None
        )
        self.rope_embed = (
            RopeEmbedding(
                embed_dim // num_heads,
                base=pos_embed_rope_base,
                dtype=pos_embed_rope_dtype,
                normalize_coords=pos_embed_rope_normalize_coords,
                shift_coords=pos_embed_rope_shift_coords,
                jitter_coords=pos_embed_rope_jitter_coords,
                rescale_coords=pos_embed_rope_rescale_coords,
            )
            if pos_embed_type == "rope"
            else None
        )
        self.register_tokens = (
            nn.Parameter(torch.empty(1, num_register_tokens, embed_dim)) if num_register_tokens else None
        )
        self.mask_token = nn.Parameter(torch.empty(1, embed_dim))
        self.seq_embed = None if self.sequences is None else nn.Parameter(torch.empty(len(self.sequences), embed_dim))
        blocks = [
            Block(
                embed_dim,
                num_heads,
                ffn_layer=ffn_layer,
                ffn_hidden=4 * embed_dim,
                layerscale=layerscale,
                qkv_bias=qkv_bias,
                proj_bias=proj_bias,
                ffn_bias=ffn_bias,
                mask_k_bias=mask_k_bias,
                layernorm_eps=layernorm_eps,
            )
            for _ in range(depth)
        ]
        self.blocks = nn.ModuleList(_chunked(blocks, block_chunks) if block_chunks else blocks)
        self.norm = nn.LayerNorm(embed_dim, eps=layernorm_eps)
        self.init_weights()

    def init_weights(self) -> None:
        """Fresh weights: linear and positions truncated normal 0.02, cls and registers normal 1e-6, mask token 0.

        Without a table of positions nothing else lifts cls and registers above the epsilon of the first norm, and they
        are normal 0.02, as in DINOv3.
        """
        std = 1e-6 if self.pos_embed is not None else 0.02
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=std)
        nn.init.zeros_(self.mask_token)
        if self.register_tokens is not None:
            nn.init.normal_(self.register_tokens, std=std)
        if self.seq_embed is not None:
            nn.init.normal_(self.seq_embed)  # only the direction of a row matters

    # --- the main path -----------------------------------------------------------------------------------------------

    def forward(
        self, images_BSHW: Tensor, token_mask_BN: Tensor | None = None, available_BS: Tensor | None = None
    ) -> Features:
        """(B, S, H, W), or (B, C, H, W) of a plain picture -> Features.

        Args:
            images_BSHW: Sides are multiples of the patch size; not necessarily square.
            token_mask_BN: (B, S*N) bool, True where the mask token stands instead of the patch.
            available_BS: (B, S) bool, at least one True for each sample; all tokens of an absent sequence become mask
                tokens, whatever the image holds there.

        Raises:
            ValueError: Shapes that do not fit, or a sample without any sequence (seen only when ``available_BS`` lies
                on the CPU: looking at a GPU tensor would stop the queue).
        """
        return self._features([self._embed(images_BSHW, token_mask_BN, available_BS, {})], packed=False)[0]

    def forward_list(
        self,
        images: Sequence[Tensor],
        token_masks: Sequence[Tensor | None],
        available: Sequence[Tensor | None],
    ) -> list[Features]:
        """Crops of several sizes in one pass; without stochastic depth the numbers of one ``forward`` for each."""
        positions: dict[tuple[int, int], Tensor] = {}
        embedded = [self._embed(*one, positions) for one in zip(images, token_masks, available, strict=True)]
        return self._features(embedded, packed=True)

    def forward_needed(
        self,
        images: Sequence[Tensor],
        token_masks: Sequence[Tensor | None],
        available: Sequence[Tensor | None],
        patch_index: Sequence[Tensor | None],
    ) -> list[tuple[Tensor, Tensor]]:
        """The numbers of ``forward_list`` for the cls tokens and some patch tokens, with less work in the last block.

        All tokens of the last block are attended to; its output projection, its feed-forward layer and the final norm
        run on the wanted ones alone. Nothing is copied to the host.

        Args:
            images: As in ``forward_list``.
            token_masks: As in ``forward_list``.
            available: As in ``forward_list``.
            patch_index: For each group places in its patch tokens flattened over (B, S*N), int64, in any order; None
                or empty for none.

        Returns:
            For each group cls (B, D) and the wanted patch tokens (K, D) in the order of their places.
        """
        positions: dict[tuple[int, int], Tensor] = {}
        embedded = [self._embed(*one, positions) for one in zip(images, token_masks, available, strict=True)]
        groups, grids = _groups_of(embedded), [grid for _, grid in embedded]
        needed, sizes = self._needed(groups, patch_index, embedded[0][0].device)
        x_TD = _packed([x for x, _ in embedded])
        for out_TD in self._through_blocks(x_TD, groups, grids, packed=True, needed=needed):
            x_TD = out_TD
        outs = self.norm(x_TD).split([count for pair in sizes for count in pair])
        return list(zip(outs[0::2], outs[1::2], strict=True))

    def _needed(
        self, groups: Groups, patch_index: Sequence[Tensor | None], device: torch.device
    ) -> tuple[Needed, list[tuple[int, int]]]:
        """The cls and the wanted patch tokens of each group, and how many there are of both."""
        first, places, samples, tokens, sizes = 1 + self.num_register_tokens, [], [], [], []
        tokens_before = samples_before = 0
        for (count, length), index in zip(groups, patch_index, strict=True):
            cls_B = torch.arange(count, device=device)
            wanted_K = cls_B[:0] if index is None else index.to(device, torch.int64)
            sample = torch.cat([cls_B, wanted_K.div(length - first, rounding_mode="floor")])
            token = torch.cat([torch.zeros_like(cls_B), wanted_K.remainder(length - first) + first])
            places.append(tokens_before + sample * length + token)
            samples.append(samples_before + sample)
            tokens.append(token)
            sizes.append((count, len(wanted_K)))
            tokens_before, samples_before = tokens_before + count * length, samples_before + count
        return Needed(torch.cat(places), torch.cat(samples), torch.cat(tokens)), sizes

    def forward_layers(
        self,
        images_BSHW: Tensor,
        layers: Sequence[int],
        token_mask_BN: Tensor | None = None,
        available_BS: Tensor | None = None,
    ) -> list[Features]:
        """Features after the blocks ``layers`` (0 the first, -1 the last), each through the final norm."""
        depth = len(self.drop_rates)
        wanted = [range(depth)[layer] for layer in layers]
        x_BTD, grid = self._embed(images_BSHW, token_mask_BN, available_BS, {})
        groups = _groups_of([(x_BTD, grid)])
        kept: dict[int, Features] = {}
        for index, x_TD in enumerate(self._through_blocks(x_BTD.flatten(0, 1), groups, [grid], packed=False)):
            if index in wanted:
                kept[index] = self._split(self.norm(x_TD).unflatten(0, groups[0]), grid)
        return [kept[index] for index in wanted]

    @torch.no_grad()
    def attention_maps(self, images_BSHW: Tensor, available_BS: Tensor | None = None) -> list[Tensor]:
        """Attention of each block, averaged over heads: (B, T, T) with T = cls, registers, patches, for rollout."""
        x_BTD, grid = self._embed(images_BSHW, None, available_BS, {})
        groups = _groups_of([(x_BTD, grid)])
        x_TD, rope, maps = x_BTD.flatten(0, 1), self._rope([grid], x_BTD.device), []
        for block in self.flat_blocks():
            maps.append(block.attn.weights(block.norm1(x_TD), groups, rope))
            x_TD = block(x_TD, groups, (None, None), rope)
        return maps

    def flat_blocks(self) -> Iterator[Block]:
        """The blocks in order, chunked or not."""
        for child in self.blocks:
            yield from child.values() if isinstance(child, nn.ModuleDict) else (child,)  # type: ignore[misc]

    # --- steps of it -------------------------------------------------------------------------------------------------

    def _features(self, embedded: Sequence[tuple[Tensor, Grid]], *, packed: bool) -> list[Features]:
        """Run the blocks and the final norm once over all crops."""
        groups, grids = _groups_of(embedded), [grid for _, grid in embedded]
        x_TD = _packed([x for x, _ in embedded])
        for out_TD in self._through_blocks(x_TD, groups, grids, packed=packed):
            x_TD = out_TD
        outs = self.norm(x_TD).split([samples * tokens for samples, tokens in groups])
        return [
            self._split(out.unflatten(0, group), grid) for out, group, grid in zip(outs, groups, grids, strict=True)
        ]

    def _through_blocks(
        self, x_TD: Tensor, groups: Groups, grids: Sequence[Grid], *, packed: bool, needed: Needed | None = None
    ) -> Iterator[Tensor]:
        """The tokens after each block; after the last one only those that are ``needed``, if told."""
        rope = self._rope(grids, x_TD.device)
        drops: list[tuple[Drop, Drop]] = [(None, None)] * len(self.drop_rates)
        if self.training and any(self.drop_rates):
            drops = draw_drops(self.drop_rates, groups, packed=packed, device=x_TD.device)
        last = len(drops) - 1
        for index, (block, drop) in enumerate(zip(self.flat_blocks(), drops, strict=True)):
            # always through the block's own call: sharding and compilation hang on it
            given = (x_TD, groups, drop, rope, *(() if needed is None or index < last else (needed,)))
            if self.grad_checkpointing and self.training and torch.is_grad_enabled():
                # the draws are inputs, so nothing random happens inside and no generator state needs saving
                x_TD = checkpoint(block, *given, use_reentrant=False, preserve_rng_state=False)
            else:
                x_TD = block(*given)
            yield x_TD

    def _rope(self, grids: Sequence[Grid], device: torch.device) -> Rope | None:
        """Rotary tables of each group, (2, P + S*N, E); random ones are drawn once a pass and grid."""
        if self.rope_embed is None:
            return None
        tables: dict[Grid, Tensor] = {}
        for grid in grids:
            if grid not in tables:
                sequences, rows, columns = grid
                place = grid if self.img_wise_pos_embed else (1, sequences * rows, columns)
                tables[grid] = self.rope_embed.table(place, 1 + self.num_register_tokens, device)
        return tuple(tables[grid] for grid in grids)

    def _split(self, x_BTD: Tensor, grid: Grid) -> Features:
        first = 1 + self.num_register_tokens
        return Features(x_BTD[:, 0], x_BTD[:, first:], x_BTD[:, 1:first], grid)

    def _embed(
        self,
        images_BSHW: Tensor,
        token_mask_BN: Tensor | None,
        available_BS: Tensor | None,
        positions: dict[tuple[int, int], Tensor],
    ) -> tuple[Tensor, Grid]:
        """Image to tokens with positions: (B, P + S*N, D), and the grid (S, rows, columns)."""
        patches_BSND, grid = self._patches(images_BSHW)
        mask_BSN = self._mask(token_mask_BN, available_BS, patches_BSND)
        if mask_BSN is not None:
            patches_BSND = torch.where(mask_BSN[..., None], self.mask_token.to(patches_BSND.dtype), patches_BSND)
        added = self._position_and_sequence(grid, positions)
        patches_BSND = patches_BSND if added is None else patches_BSND + added
        prefix = [self.cls_token if self.pos_embed is None else self.cls_token + self.pos_embed[:, :1]]
        if self.register_tokens is not None:
            prefix.append(self.register_tokens)
        expanded = [part.expand(len(images_BSHW), -1, -1) for part in prefix]
        # one concatenation puts cls, registers and all sequences into place; sequence-major
        return torch.cat([*expanded, *patches_BSND.unbind(1)], dim=1), grid

    def _patches(self, images_BSHW: Tensor) -> tuple[Tensor, Grid]:
        """Patch tokens without positions, (B, S, N, D)."""
        samples, channels, height, width = images_BSHW.shape
        rows, columns = self.patch_embed.grid(height, width)
        if self.sequences is None:
            return self.patch_embed(images_BSHW).unsqueeze(1), (1, rows, columns)
        if channels != len(self.sequences):
            raise ValueError(
                f"images of {channels} sequences, the backbone takes {len(self.sequences)}: {', '.join(self.sequences)}"
            )
        patches = self.patch_embed(images_BSHW.reshape(samples * channels, 1, height, width))
        return patches.unflatten(0, (samples, channels)), (channels, rows, columns)

    def _mask(self, token_mask_BN: Tensor | None, available_BS: Tensor | None, patches_BSND: Tensor) -> Tensor | None:
        """Where the mask token stands, (B, S, N) bool; None for nowhere."""
        samples, sequences, tokens, _ = patches_BSND.shape
        mask = None
        if token_mask_BN is not None:
            if token_mask_BN.shape != (samples, sequences * tokens):
                raise ValueError(
                    f"token mask of {tuple(token_mask_BN.shape)}, the tokens are {(samples, sequences * tokens)}"
                )
            mask = token_mask_BN.to(patches_BSND.device, torch.bool).view(samples, sequences, tokens)
        if available_BS is not None:
            if available_BS.shape != (samples, sequences):
                raise ValueError(f"availability of {tuple(available_BS.shape)}, the images {(samples, sequences)}")
            if available_BS.device.type == "cpu" and not available_BS.any(1).all():
                empty = (~available_BS.bool().any(1)).nonzero().flatten().tolist()
                raise ValueError(f"at least one sequence is required; samples {empty} of the batch have none")
            absent = ~available_BS.to(patches_BSND.device, torch.bool)[..., None]
            mask = absent.expand(-1, -1, tokens) if mask is None else mask | absent
        return mask

    def _position_and_sequence(self, grid: Grid, positions: dict[tuple[int, int], Tensor]) -> Tensor | None:
        """What is added to the patch tokens, (S, N, D) or (1, N, D), or (S, 1, D) without a table of positions.

        ``positions`` keeps it for crops of one size.
        """
        sequences, rows, columns = grid
        if (rows, columns) in positions:
            return positions[rows, columns]
        added = None
        if self.pos_embed is not None:
            tall = rows if self.img_wise_pos_embed else sequences * rows
            added = resize_positions(
                self.pos_embed[:, 1:],
                (tall, columns),
                offset=self.interpolate_offset,
                antialias=self.interpolate_antialias,
            ).view(-1, rows * columns, self.embed_dim)
        if self.seq_embed is not None:
            # times 0 rather than left out: the parameter stays in the graph, as data-parallel training wants it
            directions = F.normalize(self.seq_embed, dim=1)[:, None] * float(self.use_mri_seq_embed)
            added = directions if added is None else added + directions.to(added.dtype)
        if added is not None:
            positions[rows, columns] = added
        return added


def _groups_of(embedded: Sequence[tuple[Tensor, Grid]]) -> Groups:
    return tuple((x.shape[0], x.shape[1]) for x, _ in embedded)


def _packed(pieces: Sequence[Tensor]) -> Tensor:
    """Tokens of several groups end to end: [(B, T, D), …] -> (T, D)."""
    flat = [piece.flatten(0, 1) for piece in pieces]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


def resize_positions(positions_1ND: Tensor, grid: tuple[int, int], *, offset: float, antialias: bool) -> Tensor:
    """Positions of a square grid on another one, bicubic: (1, M*M, D) -> (1, rows*columns, D).

    With an offset the scale factor is (target + offset) / M, as in the first DINOv2 weights; with 0 the exact size is
    asked for. The two differ by tens of per cent on small grids, so the choice belongs to the weights.

    Bicubic interpolation is linear in the values and separable, so it is done as one small matrix for each axis: the
    matrices are made once by ``torch.nn.functional.interpolate``, and the gradient is deterministic on a GPU too.
    """
    side = math.isqrt(positions_1ND.shape[1])
    if side * side != positions_1ND.shape[1]:
        raise ValueError(f"{positions_1ND.shape[1]} positions are no square grid")
    if grid == (side, side):
        return positions_1ND
    device = positions_1ND.device
    rows, columns = (_resize_matrix(side, target, offset, antialias, str(device)) for target in grid)
    with torch.autocast(device.type, enabled=False):
        # float64: immune to TF32 and half precision, and tiny
        by_row = rows @ positions_1ND[0].to(rows.dtype).reshape(side, -1)
        resized = columns @ by_row.view(grid[0], side, -1)
    return resized.to(positions_1ND.dtype).view(1, grid[0] * grid[1], -1)


@functools.lru_cache(maxsize=128)
def _resize_matrix(side: int, target: int, offset: float, antialias: bool, device: str) -> Tensor:
    """(target, side): weights of the stored positions at each new one, along one axis."""
    with torch.inference_mode(False), torch.no_grad():  # kept beyond this call
        # each column one unit vector; as images of width 1 torch 2.13's antialiasing repeats the first row for all
        unit = torch.eye(side, dtype=torch.float64, device="cpu")[None, None]
        how: dict[str, Any] = {"size": (target, side)}
        if offset:
            how = {"scale_factor": ((target + offset) / side, 1.0), "recompute_scale_factor": False}
        resized = F.interpolate(unit, mode="bicubic", antialias=antialias, **how)
        if resized.shape[2] != target:
            raise ValueError(f"an offset of {offset} makes {resized.shape[2]} of {target} positions from {side}")
        return resized[0, 0].to(device, torch.float32 if device.startswith("mps") else torch.float64)


def _chunked(blocks: Sequence[Block], chunks: int) -> list[nn.ModuleDict]:
    """Blocks in equal chunks that keep their number within the whole network as their name."""
    size = max(len(blocks) // chunks, 1)
    return [
        nn.ModuleDict({str(i): blocks[i] for i in range(start, min(start + size, len(blocks)))})
        for start in range(0, len(blocks), size)
    ]
