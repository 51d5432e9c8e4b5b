"""Shapes of data shared by neighbouring floors.

Letters: B samples, V crops (2B global, or n*B local, view-major: all samples of view 1, then of view 2), S sequences,
H W space, N patch tokens of one image of one sequence, D width, K neighbouring slices, C outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

IGNORE_LABEL = 255
"""Class of the pixels that count nowhere, neither in a loss nor in a metric: padding, and what nobody has labelled."""


class Loaded(Protocol):
    """A batch as the loader yields it and as the objective takes it: what the trainer has to know of both."""

    case_ids: list[str]

    @property
    def images_BSHW(self) -> Tensor:
        """Images, one row a sample."""
        ...

    def to(self, device: torch.device) -> Any:
        """The same batch on ``device``."""

    def finite_samples(self) -> Tensor:
        """(B,) bool: which samples hold finite numbers alone."""


@dataclass
class SliceBatch:
    """What the loader yields: stored slices scaled to [0, 1], before any random view.

    Args:
        images_BSHW: float32, zero-padded at the bottom and right to the largest slice of the batch.
        sizes_B2: int64 (height, width) of the true region of each sample.
        available_BS: bool, which sequences exist; an absent one is all zeros.
        roi_BHW: bool mask of the region of interest, or None if no sample of the run has one.
        case_ids: One id a sample, for messages.
    """

    images_BSHW: Tensor
    sizes_B2: Tensor
    available_BS: Tensor
    roi_BHW: Tensor | None = None
    case_ids: list[str] = field(default_factory=list)

    def to(self, device: torch.device) -> SliceBatch:
        """The same batch on ``device``; pinned memory is copied without waiting."""
        return replace(
            self,
            images_BSHW=self.images_BSHW.to(device, non_blocking=True),
            sizes_B2=self.sizes_B2.to(device, non_blocking=True),
            available_BS=self.available_BS.to(device, non_blocking=True),
            roi_BHW=None if self.roi_BHW is None else self.roi_BHW.to(device, non_blocking=True),
        )

    def pin_memory(self) -> SliceBatch:
        """The same batch in page-locked memory; called by the loader."""
        return replace(
            self,
            images_BSHW=self.images_BSHW.pin_memory(),
            sizes_B2=self.sizes_B2.pin_memory(),
            available_BS=self.available_BS.pin_memory(),
            roi_BHW=None if self.roi_BHW is None else self.roi_BHW.pin_memory(),
        )

    def finite_samples(self) -> Tensor:
        """(B,) bool: which slices hold finite numbers alone."""
        return self.images_BSHW.isfinite().flatten(1).all(1)


@dataclass
class Batch:
    """Views of one batch, ready for student and teacher.

    Args:
        global_VSHW: (2B, S, G, G), view-major, normalised.
        local_VSHW: (n_local*B, S, L, L), view-major, normalised; None without local crops.
        token_mask_VN: (2B, S*N) bool, True where the student sees the mask token for the iBOT task.
        available_BS: (B, S) bool; an absent sequence is all mask tokens for student and teacher, never a target.
        case_ids: One id a sample.
        labels_B: int64 class of each sample, -1 where it has none; None if no sample of the run has one.
    """

    global_VSHW: Tensor
    local_VSHW: Tensor | None
    token_mask_VN: Tensor
    available_BS: Tensor
    case_ids: list[str] = field(default_factory=list)
    labels_B: Tensor | None = None

    def finite_samples(self) -> Tensor:
        """(B,) bool: which samples have finite crops alone. Crops are view-major: crop v*B + b is of sample b."""
        count = len(self.available_BS)
        views = [self.global_VSHW] if self.local_VSHW is None else [self.global_VSHW, self.local_VSHW]
        finite_B = [crops.isfinite().flatten(1).all(1).view(-1, count).all(0) for crops in views]
        return finite_B[0] if len(finite_B) == 1 else finite_B[0] & finite_B[1]


@dataclass
class LabelledBatch:
    """Images with a class for every pixel, as the loader yields them and, after random changes, as a network sees them.

    Args:
        images_BSHW: float32; in [0, 1] from the loader, normalised for the network. With K neighbouring slices the
            channels are slice-major: all sequences of the first slice, then of the next. Zero-padded at the bottom
            and right to the largest sample.
        label_map_BHW: int64 class of each pixel, 0 background, ``IGNORE_LABEL`` where none counts and in the padding.
        available_BS: bool, which sequences exist, (B, S) also with several slices.
        sizes_B2: int64 (height, width) of the true region of each sample.
        case_ids: One a sample, for messages.
    """

    images_BSHW: Tensor
    label_map_BHW: Tensor
    available_BS: Tensor
    sizes_B2: Tensor
    case_ids: list[str] = field(default_factory=list)

    def to(self, device: torch.device) -> LabelledBatch:
        """The same batch on ``device``; pinned memory is copied without waiting."""
        return self._each(lambda part: part.to(device, non_blocking=True))

    def pin_memory(self) -> LabelledBatch:
        """The same batch in page-locked memory; called by the loader."""
        return self._each(lambda part: part.pin_memory())

    def finite_samples(self) -> Tensor:
        """(B,) bool: which samples hold finite numbers alone."""
        return self.images_BSHW.isfinite().flatten(1).all(1)

    def _each(self, change: Callable[[Tensor], Tensor]) -> LabelledBatch:
        return replace(
            self,
            images_BSHW=change(self.images_BSHW),
            label_map_BHW=change(self.label_map_BHW),
            available_BS=change(self.available_BS),
            sizes_B2=change(self.sizes_B2),
        )


@dataclass
class Features:
    """Outputs of a backbone after its final norm.

    Args:
        cls_BD: (B, D).
        patches_BND: (B, S*N, D), sequence-major: all tokens of sequence 1, then of sequence 2.
        registers_BRD: (B, R, D), R may be 0.
        grid: (sequences, rows, columns) so that ``patches_BND.unflatten(1, grid)`` has one token at its place.
    """

    cls_BD: Tensor
    patches_BND: Tensor
    registers_BRD: Tensor
    grid: tuple[int, int, int]


class Backbone(Protocol):
    """Images to features. ``images`` is (B, S, H, W) of one-channel sequences, or (B, C, H, W) of one plain picture."""

    embed_dim: int

    def forward(
        self, images_BSHW: Tensor, token_mask_BN: Tensor | None = None, available_BS: Tensor | None = None
    ) -> Features:
        """(B, S, H, W) -> Features. Masked tokens and all tokens of an absent sequence become the mask token."""

    def forward_list(
        self,
        images: Sequence[Tensor],
        token_masks: Sequence[Tensor | None],
        available: Sequence[Tensor | None],
    ) -> list[Features]:
        """Crops of several sizes in one pass: the same numbers as one ``forward`` for each, computed together."""


class SegmentationNetwork(Protocol):
    """Images to one logit for each pixel and output: one output for one structure, else one a class with background."""

    def forward(self, images_BSHW: Tensor, available_BS: Tensor | None = None) -> Tensor | list[Tensor]:
        """(B, S, H, W) -> logits (B, C, H, W); in training with deep supervision a list, the finest first."""

    def trained_parts(self) -> dict[str, nn.Module]:
        """Modules with a gradient norm of their own, by name: ``network``, or ``backbone`` and ``decoder``."""


class Objective(Protocol):
    """What the engine trains."""

    def losses(self, batch: Any, values: Mapping[str, float]) -> dict[str, Tensor]:
        """Weighted scalar terms of one batch; the trainer adds them. ``values`` holds this step's schedules."""

    def after_step(self, values: Mapping[str, float]) -> None:
        """Called once a step, also if fp16 skipped the update: moves the teacher and the centres."""

    def trained_modules(self) -> dict[str, nn.Module]:
        """Sub-modules with their own gradient norm, by name: ``backbone``, ``dino_head``, ``ibot_head``."""

    def health(self) -> dict[str, float]:
        """Figures about the last batch for the log: ``teacher_entropy``, ``effective_rank``."""
