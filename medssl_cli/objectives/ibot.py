"""iBOT: the student's prototypes at hidden patch tokens against the teacher's at the same place (Zhou et al. 2022).

Letters: B samples, V global crops (2B, view-major), S sequences, N patch tokens of all sequences, M masked tokens,
K prototypes.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, Field, NonNegativeFloat, NonNegativeInt, model_validator
from torch import Tensor

from medssl_cli.objectives.dino import STUDENT_TEMPERATURE, DinoConfig, HeadConfig, soft_cross_entropy

Share = Annotated[float, Field(ge=0, le=1)]
MaskMode = Literal["shared", "full_sequence", "independent"]
MaskSampling = Literal["stratified", "per_image"]


def _as_list(value: Any) -> Any:
    return (value,) if isinstance(value, (int, float)) else value


Shares = Annotated[tuple[Share, ...], Field(min_length=1), BeforeValidator(_as_list)]


class IbotConfig(HeadConfig):
    """Loss on masked patch tokens, how they are masked, and its head."""

    loss_weight: NonNegativeFloat = 1.0
    """Weight of the patch loss; 0 turns it off. The student's crops stay masked."""
    mask_sample_probability: Share = 0.5
    """Share of the global crops that get block masks."""
    mask_ratio_min_max: tuple[Share, Share] = (0.1, 0.5)
    """Range of the masked share of such a crop."""
    mask_per_channel: bool = False
    """DINOv2-style name for `mask_mode`: true is full_sequence, false is shared."""
    mask_mode: MaskMode | None = None
    """shared: one mask for all sequences; full_sequence: also one whole sequence; independent: a mask for each; unset:
    as `mask_per_channel` says."""
    mask_exact: bool = False
    """Top block masks up with single patches to the requested number, as in DINOv3."""
    mask_sampling: MaskSampling = "stratified"
    """stratified: a fixed share of the crops, ratios spread over the batch (DINOv2); per_image: each crop draws for
    itself from `pred_ratio` and `pred_ratio_var` (iBOT), and mask_sample_probability and mask_ratio_min_max rest."""
    pred_ratio: Shares = (0.0, 0.3)
    """Masked shares of which each crop takes one at random, with per_image; one number or a list."""
    pred_ratio_var: Shares = (0.0, 0.2)
    """Half width of the range around each of `pred_ratio`; as many numbers, none above its ratio."""
    pred_shape: Literal["block", "rand"] = "block"
    """block: rectangles; rand: single patches anywhere."""
    pred_start_epoch: NonNegativeInt = 0
    """First epoch in which tokens are masked; before it the student sees whole crops and the patch loss is 0."""
    center_tokens: Literal["masked", "all"] = "masked"
    """Patch tokens whose mean moves the centre: the masked ones (DINOv2), or all (iBOT)."""
    separate_head: bool = False
    """Give the patch tokens a head of their own; otherwise they share that of `dino`."""
    separate_last_layer: bool = False
    """Give the patch tokens a last layer of their own, `head_n_prototypes` wide, behind the MLP of `dino`'s head;
    alike for student and teacher."""

    @model_validator(mode="after")
    def _check_range(self) -> IbotConfig:
        low, high = self.mask_ratio_min_max
        if low > high:
            raise ValueError(f"mask_ratio_min_max is [{low}, {high}]: the first must not be larger than the second")
        if len(self.pred_ratio) != len(self.pred_ratio_var):
            raise ValueError(
                f"pred_ratio has {len(self.pred_ratio)} numbers and pred_ratio_var {len(self.pred_ratio_var)}: "
                "each ratio needs its own"
            )
        for ratio, width in zip(self.pred_ratio, self.pred_ratio_var, strict=True):
            if ratio < width or ratio + width > 1:
                raise ValueError(f"pred_ratio {ratio} ± pred_ratio_var {width} leaves 0 .. 1")
        if self.separate_head and self.separate_last_layer:
            raise ValueError("separate_head gives the patch tokens a whole head, separate_last_layer only its end: one")
        return self

    @property
    def masking(self) -> MaskMode:
        """The mode in force, after `mask_per_channel`."""
        return self.mask_mode or ("full_sequence" if self.mask_per_channel else "shared")

    def masked_crops_share(self, n_sequences: int) -> float:
        """Share of the global crops that hold at least one masked token, for cases with ``n_sequences`` sequences.

        Of a single one nothing is hidden whole, so ``full_sequence`` is ``shared`` there.
        """
        if self.masking == "full_sequence" and n_sequences > 1:
            return 1.0
        if self.mask_sampling == "per_image":
            return sum(ratio > 0 for ratio in self.pred_ratio) / len(self.pred_ratio)
        return self.mask_sample_probability

    def masks_at(self, step: int, epoch_steps: int) -> bool:
        """Whether tokens are masked in the update with this index, counted from 0."""
        return step >= self.pred_start_epoch * epoch_steps


def patch_head(dino: DinoConfig, ibot: IbotConfig) -> HeadConfig:
    """Shape of the head that the patch tokens go through, with the number of prototypes that they meet."""
    if ibot.separate_head:
        return ibot
    return dino.model_copy(update={"head_n_prototypes": ibot.head_n_prototypes}) if ibot.separate_last_layer else dino


def head_warning(dino: DinoConfig, ibot: IbotConfig) -> str | None:
    """What to tell a user whose iBOT head settings have no effect; None if there is nothing to tell."""
    if ibot.separate_head:
        return None
    shared = [name for name in HeadConfig.model_fields if name != "head_n_prototypes" or not ibot.separate_last_layer]
    ignored = [
        f"ibot.{name}={getattr(ibot, name)} (in force: dino.{name}={getattr(dino, name)})"
        for name in shared
        if getattr(ibot, name) not in (getattr(dino, name), IbotConfig.model_fields[name].default)
    ]
    if not ignored:
        return None
    return f"ibot.separate_head is false, so these have no effect: {'; '.join(ignored)}"


def mask_warning(ibot: IbotConfig, centering: str) -> str | None:
    """What to tell a user whose settings of masks or of the centre have no effect; None if there is nothing to tell."""
    of_sampling = {
        "stratified": ("mask_sample_probability", "mask_ratio_min_max"),
        "per_image": ("pred_ratio", "pred_ratio_var"),
    }
    idle = [name for sampling, names in of_sampling.items() if sampling != ibot.mask_sampling for name in names]
    # a dumped configuration has every key: only a value of the user's own is worth a word
    ignored = [f"ibot.{name}" for name in idle if getattr(ibot, name) != IbotConfig.model_fields[name].default]
    texts = []
    if ignored:
        texts.append(f"No effect with ibot.mask_sampling {ibot.mask_sampling}: {', '.join(ignored)}.")
    if ibot.pred_shape == "rand" and ibot.mask_exact:
        texts.append("No effect: ibot.mask_exact: single patches always reach the requested number.")
    if ibot.center_tokens == "all" and centering != "centering":
        texts.append(f"No effect: ibot.center_tokens all: train.centering {centering} has no centre.")
    return " ".join(texts) or None


class MaskedTokens(NamedTuple):
    """Where the targets of a batch are.

    Args:
        index_M: int64 position in the tokens of all crops, flattened over (V, N).
        weight_M: float32, 1 / (targets in the crop of this token).
        crops: V, all global crops, masked or not.
    """

    index_M: Tensor
    weight_M: Tensor
    crops: int


def find_masked_tokens(token_mask_VN: Tensor, available_BS: Tensor) -> MaskedTokens:
    """The masked tokens that are targets: those of sequences that exist.

    Waits for the device once, to learn how many there are; so it is best called before the forward passes are queued.

    Args:
        token_mask_VN: (2B, N) bool, tokens sequence-major.
        available_BS: (B, S) bool; S = 1 for a plain picture.

    Raises:
        ValueError: The shapes do not fit.
    """
    crops, tokens = token_mask_VN.shape
    batch, sequences = available_BS.shape
    if crops != 2 * batch or tokens % sequences:
        raise ValueError(
            f"token mask {tuple(token_mask_VN.shape)} does not fit availability {tuple(available_BS.shape)}"
        )
    exists_VS1 = available_BS.repeat(2, 1)[:, :, None]
    target_VN = (token_mask_VN.unflatten(1, (sequences, -1)) & exists_VS1).flatten(1)
    count_V = target_VN.sum(1)
    index_M = target_VN.flatten().nonzero().squeeze(1)
    weight_M = count_V.float().reciprocal().index_select(0, index_M // tokens)
    return MaskedTokens(index_M, weight_M, crops)


def find_existing_tokens(available_BS: Tensor, tokens: int) -> Tensor:
    """int64 positions, in (2B, N) flattened, of the tokens of sequences that exist; waits for the device once.

    Args:
        available_BS: (B, S) bool.
        tokens: N, of all sequences together.
    """
    exists_VN = available_BS.repeat(2, 1).repeat_interleave(tokens // available_BS.shape[1], 1)
    return exists_VN.flatten().nonzero().squeeze(1)


def ibot_loss(
    logits_MK: Tensor, targets_MK: Tensor, masked: MaskedTokens, temperature: float = STUDENT_TEMPERATURE
) -> Tensor:
    """Cross-entropy averaged in each crop, then over all global crops; a crop without targets counts as 0.

    Args:
        logits_MK: Student, at the masked tokens.
        targets_MK: float32 teacher probabilities at the same tokens of the same crops, seen unmasked.
        masked: Weights of the tokens and the number of crops.
        temperature: Of the student's softmax.

    Returns:
        float32 scalar.
    """
    return (soft_cross_entropy(logits_MK, targets_MK, temperature) * masked.weight_M).sum() / masked.crops
