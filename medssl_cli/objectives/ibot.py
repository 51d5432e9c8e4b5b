"""iBOT: the student's prototypes at hidden patch tokens against the teacher's at the same place (Zhou et al. 2022).

Letters: B samples, V global crops (2B, view-major), S sequences, N patch tokens of all sequences, M masked tokens,
K prototypes.
"""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

from pydantic import Field, NonNegativeFloat, model_validator
from torch import Tensor

from medssl_cli.objectives.dino import STUDENT_TEMPERATURE, DinoConfig, HeadConfig, soft_cross_entropy

Share = Annotated[float, Field(ge=0, le=1)]
MaskMode = Literal["shared", "full_sequence", "independent"]


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
    separate_head: bool = False
    """Give the patch tokens a head of their own; otherwise they share that of `dino`."""

    @model_validator(mode="after")
    def _check_range(self) -> IbotConfig:
        low, high = self.mask_ratio_min_max
        if low > high:
            raise ValueError(f"mask_ratio_min_max is [{low}, {high}]: the first must not be larger than the second")
        return self

    @property
    def masking(self) -> MaskMode:
        """The mode in force, after `mask_per_channel`."""
        return self.mask_mode or ("full_sequence" if self.mask_per_channel else "shared")

    def masked_crops_share(self, n_sequences: int) -> float:
        """Share of the global crops that hold at least one masked token, for cases with ``n_sequences`` sequences.

        Of a single one nothing is hidden whole, so ``full_sequence`` is ``shared`` there.
        """
        whole = self.masking == "full_sequence" and n_sequences > 1
        return 1.0 if whole else self.mask_sample_probability


def head_warning(dino: DinoConfig, ibot: IbotConfig) -> str | None:
    """What to tell a user whose iBOT head settings have no effect; None if there is nothing to tell."""
    if ibot.separate_head:
        return None
    ignored = [
        f"ibot.{name}={getattr(ibot, name)} (in force: dino.{name}={getattr(dino, name)})"
        for name in HeadConfig.model_fields
        if name in ibot.model_fields_set and getattr(ibot, name) != getattr(dino, name)
    ]
    if not ignored:
        return None
    return f"ibot.separate_head is false, so these have no effect: {'; '.join(ignored)}"


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
