"""Segmentation learned from label maps: the network, its moving average, and the figures of an epoch.

The average is what is validated and shipped. It follows the trained tensors alone: frozen ones are the same tensors in
both networks, held, moved and saved once, and buffers (running statistics) are copied. Figures of an epoch are sums
over samples, kept on the device, so a small last batch weighs what it holds and no step waits. Letters: B samples, C
outputs, L classes with background, K structures, H W space.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from medssl_cli.core.errors import CheckpointError
from medssl_cli.core.protocols import IGNORE_LABEL, LabelledBatch
from medssl_cli.objectives.centering import world_size
from medssl_cli.objectives.segmentation import SegmentationLoss

WeightSet = Literal["ema", "raw"]
FROZEN = "frozen"
_FIGURES = ("loss", "dice", "iou", "f1")


class SupervisedSegmentation(nn.Module):
    """The objective of training on label maps.

    Args:
        network: Keeps the ``SegmentationNetwork`` protocol; on its device, with the weights that training starts from.
            What takes no gradient now counts as frozen for good, and no longer follows or is followed.
        loss: For the outputs of the network.
        ema_decay: Largest share of the old average kept at each step; 0: no averaging, ``averaged`` is the network.

    Source of the average: CoCoSeg; its rising decay is that of TensorFlow's ``ExponentialMovingAverage``.
    """

    updates: Tensor
    epoch_sums: Tensor

    def __init__(self, network: nn.Module, loss: SegmentationLoss, *, ema_decay: float = 0.999) -> None:
        super().__init__()
        if not 0 <= ema_decay < 1:
            raise ValueError(f"ema_decay is {ema_decay}, it is at least 0 and below 1")
        self.network, self.loss, self.ema_decay = network, loss, ema_decay
        named = network.named_parameters(remove_duplicate=False)
        self._frozen = frozenset(name for name, parameter in named if not parameter.requires_grad)
        self.averaged = _copy_sharing_frozen(network) if ema_decay else network
        device = next(iter(network.parameters())).device
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64, device=device))
        # samples, those with a loss, then the sums of the figures; float64: an epoch may have a million slices
        self.register_buffer("epoch_sums", torch.zeros(2 + len(_FIGURES), dtype=torch.float64, device=device))
        self._n: int | None = 0  # the same as ``updates``, which cannot be read without waiting for the device
        # no buffer: what the processes have not yet added up differs between them
        self._pending: Tensor | None = None
        self._last: LastBatch | None = None
        self.register_state_dict_post_hook(_drop_shared)
        self.register_load_state_dict_post_hook(_expect_no_shared)
        self.train()

    def train(self, mode: bool = True) -> SupervisedSegmentation:
        """As usual for the network; its average stays in eval mode."""
        super().train(mode)
        if self.averaged is not self.network:
            self.averaged.eval()
        return self

    # --- a step ---

    def forward(self, batch: LabelledBatch, values: Mapping[str, float]) -> dict[str, Tensor]:
        """The same as ``losses``, for wrappers that hook into ``forward``."""
        return self.losses(batch, values)

    def losses(self, batch: LabelledBatch, values: Mapping[str, float]) -> dict[str, Tensor]:
        """Weighted scalar terms of one batch, float32; their sum is what is optimised.

        Args:
            batch: Augmented and normalised, on the device of the parameters.
            values: Not used: no term has a schedule.
        """
        logits = self.network(batch.images_BSHW, batch.available_BS)
        terms = self.loss(logits, batch.label_map_BHW)
        with torch.no_grad():
            finest_BCHW = logits if isinstance(logits, Tensor) else logits[0]
            prediction_BHW = predicted_classes(finest_BCHW.detach())
            self._last = LastBatch(prediction_BHW, batch.label_map_BHW)
            self._count(torch.stack([value.detach() for value in terms.values()]).sum(), self._last)
        return terms

    @torch.no_grad()
    def after_step(self, values: Mapping[str, float]) -> None:
        """Move the average and add the step's samples to those of the epoch; once an optimizer step.

        With n the steps so far, this one included, the average keeps min(ema_decay, (1 + n) / (10 + n)) of itself: 2/11
        at the first step.
        """
        self._add_up()
        n = self._n = (int(self.updates) if self._n is None else self._n) + 1
        self.updates += 1
        if self.averaged is self.network:
            return
        both = zip(self.averaged.parameters(), self.network.parameters(), strict=True)
        pairs = [(old, new) for old, new in both if old is not new]
        if pairs:
            old, new = map(list, zip(*pairs, strict=True))
            torch._foreach_lerp_(old, new, 1 - averaging_decay(n, self.ema_decay))  # all tensors in a few kernels
        buffers = list(self.averaged.buffers())
        if buffers:
            torch._foreach_copy_(buffers, list(self.network.buffers()))

    def trained_modules(self) -> dict[str, nn.Module]:
        """The parts that the network names; each is clipped by its own gradient norm."""
        return self.network.trained_parts()  # type: ignore[operator]

    @torch.no_grad()
    def health(self) -> dict[str, float]:
        """Figures about the last batch of this process; waits for the device.

        ``predicted_foreground`` and ``reference_foreground``: share of the counted pixels that are no background. A
        network that has collapsed onto the background has 0 of the first. Empty before the first batch, and for one
        without any pixel that counts.
        """
        if self._last is None:
            return {}
        counted = self._last.reference_BHW != IGNORE_LABEL
        shares = [((classes != 0) & counted).sum() / counted.sum() for classes in self._last]
        predicted, reference = torch.stack(shares).tolist()
        if math.isnan(reference):
            return {}
        return {"predicted_foreground": predicted, "reference_foreground": reference}

    # --- figures of an epoch ---

    def start_epoch(self) -> None:
        """Forget the samples seen so far."""
        self.epoch_sums.zero_()
        self._pending = None

    def epoch_figures(
        self, hausdorff_95: Callable[[np.ndarray, np.ndarray], float] | None = None
    ) -> dict[str, float | None]:
        """Means over all samples of all processes since ``start_epoch``, in the steps that are done.

        Args:
            hausdorff_95: (prediction, reference), boolean (H, W) -> distance in pixels, NaN where one of them is empty.

        Returns:
            ``train_loss``: of the optimised sum, over the samples with a pixel that counts. ``train_dice``,
            ``train_iou``, ``train_f1``: of each sample, averaged over the structures that its reference or prediction
            holds, 1 if neither holds any; of pixels F1 and Dice are the same. ``train_hd95``: of the last batch of this
            process alone, averaged over its samples and structures; None without a function, or where it is not
            defined. All None before the first sample.
        """
        samples, scored, *sums = self.epoch_sums.tolist()
        counts = dict(zip(_FIGURES, (scored, samples, samples, samples), strict=True))
        figures = {
            f"train_{name}": value / counts[name] if counts[name] else None
            for name, value in zip(_FIGURES, sums, strict=True)
        }
        distance = None if hausdorff_95 is None or self._last is None else self._last.mean_distance(hausdorff_95)
        return {**figures, "train_hd95": distance}

    def _count(self, loss: Tensor, seen: LastBatch) -> None:
        """Add one micro-batch to what is pending; nothing waits for the device."""
        dice_B, iou_B = sample_overlaps(*seen, self.loss.classes)
        scored_B = (seen.reference_BHW != IGNORE_LABEL).flatten(1).any(1).double()
        scored, samples = scored_B.sum(), scored_B.new_full((), len(scored_B))
        dice, iou = dice_B.sum(), iou_B.sum()
        found = torch.stack([samples, scored, loss.double() * scored, dice, iou, dice])
        self._pending = found if self._pending is None else self._pending + found

    def _add_up(self) -> None:
        """Move what is pending in all processes into the sums, which are then the same in all of them."""
        if self._pending is None:
            return
        if world_size() > 1:
            dist.all_reduce(self._pending)
        self.epoch_sums += self._pending
        self._pending = None

    # --- weights ---

    def weights(self) -> dict[str, Tensor]:
        """Copies on the CPU: ``ema.<name>`` and ``raw.<name>`` of what is trained and of buffers, ``frozen.<name>``.

        Without averaging both sets are the same.
        """
        ema, raw = self.averaged.state_dict(), self.network.state_dict()
        found: dict[str, Tensor] = {}
        for name, tensor in raw.items():
            if name in self._frozen:
                found[f"{FROZEN}.{name}"] = _on_cpu(tensor)
            else:
                found[f"raw.{name}"], found[f"ema.{name}"] = _on_cpu(tensor), _on_cpu(ema[name])
        return found

    def _shared_names(self) -> list[str]:
        """Names in the state that only repeat a tensor of the network."""
        alone = self.averaged is self.network
        names = self._frozen if not alone else list(self.network.state_dict())
        return [f"averaged.{name}" for name in names]


class LastBatch(NamedTuple):
    """What the network said of the last batch, and what is true: (B, H, W) class indices on the device."""

    prediction_BHW: Tensor
    reference_BHW: Tensor

    def mean_distance(self, distance: Callable[[np.ndarray, np.ndarray], float]) -> float | None:
        """Mean over samples and structures of the distances that are defined; None if none is."""
        reference = self.reference_BHW.cpu().numpy()
        prediction = np.where(reference == IGNORE_LABEL, 0, self.prediction_BHW.cpu().numpy())
        reference = np.where(reference == IGNORE_LABEL, 0, reference)
        found = [
            distance(mine == number, true == number)
            for mine, true in zip(prediction, reference, strict=True)
            for number in np.intersect1d(mine[mine > 0], true[true > 0])
        ]
        known = [value for value in found if math.isfinite(value)]
        return float(np.mean(known)) if known else None


def averaging_decay(n: int, largest: float) -> float:
    """Share of the old average kept at update n, counted from 1: min(largest, (1 + n) / (10 + n))."""
    return min(largest, (1 + n) / (10 + n))


def predicted_classes(logits_BCHW: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H, W) uint8: the likeliest class; of one output where its probability is above 0.5."""
    if logits_BCHW.shape[1] == 1:
        return (logits_BCHW[:, 0] > 0).to(torch.uint8)
    return logits_BCHW.argmax(1).to(torch.uint8)


def sample_overlaps(prediction_BHW: Tensor, reference_BHW: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Dice and IoU of each sample, (B,) float64, over the pixels that count.

    Averaged over the structures that prediction or reference holds; 1 for a sample in which neither holds any.
    """
    structures_K = torch.arange(1, classes, device=prediction_BHW.device)[:, None, None]
    predicted_BKHW = (prediction_BHW[:, None] == structures_K) & (reference_BHW[:, None] != IGNORE_LABEL)
    true_BKHW = reference_BHW[:, None] == structures_K
    overlap_BK = (predicted_BKHW & true_BKHW).sum((2, 3)).double()
    both_BK = (predicted_BKHW.sum((2, 3)) + true_BKHW.sum((2, 3))).double()
    held_BK = both_BK > 0
    structures_B = held_BK.sum(1)
    dice_BK = 2 * overlap_BK / both_BK.clamp_min(1)
    iou_BK = overlap_BK / (both_BK - overlap_BK).clamp_min(1)
    return _mean_or_one(dice_BK, structures_B), _mean_or_one(iou_BK, structures_B)


def _mean_or_one(scores_BK: Tensor, structures_B: Tensor) -> Tensor:
    mean_B = scores_BK.sum(1) / structures_B.clamp_min(1)
    return torch.where(structures_B > 0, mean_B, torch.ones_like(mean_B))


# --- weights of a network ---------------------------------------------------------------------------------------------


def load_weights(network: nn.Module, tensors: Mapping[str, Tensor], which: WeightSet = "ema") -> None:
    """Fill a network from the tensors that ``SupervisedSegmentation.weights`` gave, all of it or nothing.

    Args:
        network: Built as the one that was trained.
        tensors: With the prefixes ``ema.``, ``raw.`` and ``frozen.``.
        which: The averaged weights, or those that training goes on from.

    Raises:
        CheckpointError: Tensors are missing, unexpected, of another shape or not finite; the network is as it was.
    """
    own = network.state_dict()
    saved = {
        name.partition(".")[2]: tensor for name, tensor in tensors.items() if name.partition(".")[0] in (which, FROZEN)
    }
    faults = [f"missing: {name}" for name in sorted(own.keys() - saved.keys())]
    faults += [f"unexpected: {name}" for name in sorted(saved.keys() - own.keys())]
    for name in sorted(own.keys() & saved.keys()):
        if own[name].shape != saved[name].shape:
            faults.append(f"shape of {name}: saved {tuple(saved[name].shape)}, needed {tuple(own[name].shape)}")
        elif not bool(saved[name].isfinite().all()):
            faults.append(f"not finite: {name}")
    if faults:
        more = [f"and {len(faults) - 10} more"] if len(faults) > 10 else []
        raise CheckpointError(
            f"The {which} weights do not fit the network.",
            where="\n".join([f"{len(own)} tensors are needed, {len(faults)} faults", *faults[:10], *more]),
            fix="use the weights together with the model.json of the run that wrote them",
            code="weights_mismatch",
        )
    network.load_state_dict(saved)


def _copy_sharing_frozen(network: nn.Module) -> nn.Module:
    """A copy in eval mode without gradients, whose frozen parameters are those of the network."""
    frozen = {id(parameter): parameter for parameter in network.parameters() if not parameter.requires_grad}
    twin: nn.Module = copy.deepcopy(network, dict(frozen))
    return twin.requires_grad_(False).eval()


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _drop_shared(module: nn.Module, state: dict[str, Tensor], prefix: str, local_metadata: object) -> None:
    for name in module._shared_names():  # type: ignore[operator]
        state.pop(prefix + name, None)


def _expect_no_shared(module: nn.Module, keys: object) -> None:
    shared = set(module._shared_names())  # type: ignore[operator]
    missing: list[str] = keys.missing_keys  # type: ignore[attr-defined]
    missing[:] = [name for name in missing if name not in shared]
    module._n = None  # type: ignore[assignment]


# --- schedule ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EpochCosine:
    """Learning rate as half a cosine over the epochs, a function of the step alone.

    With e the epochs done, lr(e) = min_lr + (lr - min_lr) (1 + cos(pi (e - w) / (epochs - w))) / 2 after a linear
    warm-up of w epochs, which begins one unit above 0 and ends at ``lr``; a warm-up longer than the run is shortened to
    it.

    Args:
        epochs: Length of the run.
        epoch_steps: Updates of one epoch.
        lr: Highest learning rate.
        min_lr: At the end of the run.
        weight_decay: The same throughout.
        warmup_epochs: w; 0 for none.
        per: ``epoch``: e is a whole number, so all steps of an epoch have one rate, as in CoCoSeg; ``step``: it rises
            with every step.
        freeze_backbone_epochs: Epochs in which the backbone takes no gradient.

    Raises:
        ValueError: No epochs or no steps.
    """

    epochs: int
    epoch_steps: int
    lr: float
    min_lr: float = 1e-6
    weight_decay: float = 1e-4
    _: KW_ONLY
    warmup_epochs: float = 0.0
    per: Literal["epoch", "step"] = "epoch"
    freeze_backbone_epochs: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.epoch_steps < 1:
            raise ValueError(f"{self.epochs} epochs of {self.epoch_steps} steps: at least one of each is needed")

    def at(self, step: int) -> dict[str, float]:
        """Values of the update with this index, counted from 0.

        Returns:
            ``lr``, ``last_layer_lr`` (the same), ``wd`` and ``backbone_frozen`` (0 or 1).
        """
        epoch = step // self.epoch_steps
        unit = 1.0 if self.per == "epoch" else 1 / self.epoch_steps
        lr = self._rate(epoch if self.per == "epoch" else step / self.epoch_steps, unit)
        frozen = float(epoch < self.freeze_backbone_epochs)
        return {"lr": lr, "last_layer_lr": lr, "wd": self.weight_decay, "backbone_frozen": frozen}

    def _rate(self, done: float, unit: float) -> float:
        """Rate after ``done`` epochs, in which the next change is ``unit`` epochs away."""
        warmup = min(self.warmup_epochs, float(self.epochs))
        if done < warmup:
            return self.lr * min(1.0, (done + unit) / warmup)
        if done >= self.epochs:
            return self.min_lr
        share = (1 + math.cos(math.pi * (done - warmup) / (self.epochs - warmup))) / 2
        return self.min_lr + (self.lr - self.min_lr) * share
