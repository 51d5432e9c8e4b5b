"""Self-distillation as in DINOv2 (Oquab et al. 2023): a student learns what its own moving average sees.

The parts are handed in; here they are connected: DINO on cls tokens, iBOT on masked patch tokens, KoLeo on the
student's cls tokens, and the exponential moving average. iBOT itself (Zhou et al. 2022) is the same step with other
settings. Letters: B samples, V crops (view-major), S sequences, N patch tokens of all sequences, T patch tokens that a
head sees, M masked tokens, D width, K prototypes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor, nn

from medssl_cli.core.config import Config
from medssl_cli.core.protocols import Batch
from medssl_cli.objectives.centering import Centering, sinkhorn_knopp
from medssl_cli.objectives.dino import STUDENT_TEMPERATURE, DinoConfig, HeadConfig, dino_losses
from medssl_cli.objectives.ibot import (
    IbotConfig,
    find_existing_tokens,
    find_masked_tokens,
    ibot_loss,
    patch_head,
)
from medssl_cli.objectives.koleo import koleo_loss
from medssl_cli.objectives.semi_supervised import SemiSupervised

Momentum = Annotated[float, Field(ge=0, le=1)]
CenteringName = Literal["centering", "sinkhorn_knopp"]


class TeacherConfig(Config):
    """The averaged network: how slowly it follows and how sharp its targets are."""

    momentum_teacher: Momentum = 0.992
    """Share of the old teacher kept at each step, at the start."""
    final_momentum_teacher: Momentum = 1.0
    """The same at the end; a cosine lies between."""
    warmup_teacher_temp: PositiveFloat = 0.04
    """Temperature of the targets at the start."""
    teacher_temp: PositiveFloat = 0.07
    """Temperature after the warm-up."""
    warmup_teacher_temp_epochs: NonNegativeFloat = 30
    """Epochs of the linear warm-up of the temperature."""
    warmup_teacher_patch_temp: PositiveFloat | None = None
    """Temperature of the patch targets at the start; null is that of the cls targets."""
    teacher_patch_temp: PositiveFloat | None = None
    """Temperature of the patch targets after their warm-up; null is that of the cls targets."""
    warmup_teacher_patch_temp_epochs: NonNegativeFloat | None = None
    """Epochs of the warm-up of the temperature of the patch targets; null is that of the cls targets."""
    init_with_student_weights: bool = True
    """Kept for existing files, without effect: the teacher always starts as a copy of the student."""


class _PatchTokens(NamedTuple):
    """The patch tokens of the global crops that matter in one batch, as positions in (V, N) flattened.

    Args:
        index_M: Where the targets are.
        existing_T: Those of all sequences that exist, in order; None if no head needs to see them.
    """

    index_M: Tensor
    existing_T: Tensor | None

    def seen(self, everything: bool) -> tuple[Tensor, Tensor | None]:
        """Positions of the tokens that a head sees, and where the targets lie among them; None: they are the same."""
        if not everything or self.existing_T is None:
            return self.index_M, None
        return self.existing_T, torch.searchsorted(self.existing_T, self.index_M)


class SelfDistillation(nn.Module):
    """The objective of pretraining: student, teacher and the losses between them.

    Heads exist only where a loss needs them: ``dino_head`` for cls tokens and, unless ``ibot.separate_head``, patches;
    ``ibot_head`` for patches alone. The teacher is always in eval mode, takes no gradient, and sees the global crops
    only, unmasked. A head sees the patch tokens that a loss needs, and all of them where ``ibot.center_tokens`` or a
    norm over the rows ask for it.

    Args:
        student_backbone: Keeps the ``Backbone`` protocol; with its initial weights already loaded.
        teacher_backbone: The same network without stochastic depth; its weights are overwritten by the student's.
        make_head: Called with ``dino`` or ``ibot`` for a head of that shape, for the student and for the teacher alike.
            With ``ibot.separate_last_layer`` also with ``n_patch_prototypes``: such a head is called with the number of
            patch tokens at the end of its rows, and gives two sets of logits.
        dino: Loss weights and head shape.
        ibot: Loss weight and head shape.
        centering: How teacher logits become targets.
        semi_supervised: Classes from the student's cls tokens; None without labels. It has no teacher.
    """

    def __init__(
        self,
        student_backbone: nn.Module,
        teacher_backbone: nn.Module,
        make_head: Callable[..., nn.Module],
        *,
        dino: DinoConfig,
        ibot: IbotConfig,
        centering: CenteringName = "centering",
        semi_supervised: SemiSupervised | None = None,
    ) -> None:
        super().__init__()
        if not (dino.loss_weight or ibot.loss_weight):
            raise ValueError("dino.loss_weight and ibot.loss_weight are both 0: there is nothing to learn")
        self.dino, self.ibot = dino, ibot
        for_patches = patch_head(dino, ibot)
        # without a loss on cls tokens the layer of the patch tokens is the head's only one
        self._two_last_layers = ibot.separate_last_layer and bool(dino.loss_weight and ibot.loss_weight)
        extra = {"n_patch_prototypes": for_patches.head_n_prototypes} if self._two_last_layers else {}
        shapes: dict[str, tuple[HeadConfig, dict[str, int]]] = {}
        if dino.loss_weight or not ibot.separate_head:
            shapes["dino_head"] = (dino if dino.loss_weight else for_patches, extra)
        if ibot.loss_weight and ibot.separate_head:
            shapes["ibot_head"] = (ibot, {})
        self.student, self.teacher = (
            nn.ModuleDict({"backbone": backbone, **{k: make_head(v, **more) for k, (v, more) in shapes.items()}})
            for backbone in (student_backbone, teacher_backbone)
        )
        self.class_head = semi_supervised
        centred = centering == "centering"
        self.dino_center = Centering(dino.head_n_prototypes) if centred and dino.loss_weight else None
        self.ibot_center = Centering(for_patches.head_n_prototypes) if centred and ibot.loss_weight else None
        self._student_sees_all = for_patches.needs_all_tokens
        self._teacher_sees_all = self.ibot_center is not None and ibot.center_tokens == "all"
        self._seen: dict[str, Tensor] = {}
        self.teacher.requires_grad_(False)
        self.copy_student_to_teacher()
        self.train()

    def train(self, mode: bool = True) -> SelfDistillation:
        """As usual for the student; the teacher stays in eval mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, batch: Batch, values: Mapping[str, float]) -> dict[str, Tensor]:
        """The same as ``losses``, for wrappers that hook into ``forward``."""
        return self.losses(batch, values)

    def losses(self, batch: Batch, values: Mapping[str, float]) -> dict[str, Tensor]:
        """Weighted scalar terms of one batch, float32; their sum is what is optimised.

        Args:
            batch: Views on the device of the parameters.
            values: ``teacher_temp``, and ``teacher_patch_temp`` where the patch targets have their own.

        Returns:
            Those that are on of ``dino_local_crops_loss``, ``dino_global_crops_loss``, ``ibot_loss``, ``koleo_loss``,
            ``semi_supervised_loss``.

        Raises:
            ValueError: The parts of the batch do not fit together.
        """
        local_crops = _count_local_crops(batch)
        masked = find_masked_tokens(batch.token_mask_VN, batch.available_BS) if self.ibot.loss_weight else None
        tokens = None if masked is None else self._patch_tokens(masked.index_M, batch)
        cls_targets_VK, patch_targets_MK = self._teach(batch, tokens, values)
        cls_tokens, patches_TD, place_M = self._study(batch, local_crops, tokens)
        cls_logits_VK, patch_logits_TK = self._project(self.student, cls_tokens, patches_TD)
        terms: dict[str, Tensor] = {}
        if cls_logits_VK is not None and cls_targets_VK is not None:
            global_VK, local_VK = cls_logits_VK.tensor_split([len(cls_targets_VK)])
            pairs = dino_losses(global_VK, local_VK if local_crops else None, cls_targets_VK)
            terms |= {name: self.dino.loss_weight * loss for name, loss in pairs.items()}
            self._seen |= {"targets_VK": cls_targets_VK, "student_best_V": global_VK.detach().argmax(1)}
        if masked is not None and patch_logits_TK is not None and patch_targets_MK is not None:
            patch_logits_MK = _pick(patch_logits_TK, place_M)
            terms["ibot_loss"] = self.ibot.loss_weight * ibot_loss(patch_logits_MK, patch_targets_MK, masked)
        if self.dino.koleo_loss_weight:
            views = cls_tokens[0].chunk(2)
            terms["koleo_loss"] = self.dino.koleo_loss_weight * (koleo_loss(views[0]) + koleo_loss(views[1]))
        if self.class_head is not None:
            terms["semi_supervised_loss"] = self.class_head(torch.cat(cls_tokens), batch.labels_B)
        return terms

    @torch.no_grad()
    def after_step(self, values: Mapping[str, float]) -> None:
        """Teacher <- momentum * teacher + (1 - momentum) * student, then the centres; once an optimizer step."""
        _reshard(self.teacher)
        teacher: list[Tensor] = [*self.teacher.parameters()]
        student: list[Tensor] = [*self.student.parameters()]
        torch._foreach_lerp_(teacher, student, 1 - values["momentum"])  # all tensors in a few kernels
        for old, new in zip(self.teacher.buffers(), self.student.buffers(), strict=True):
            old.copy_(new)
        for center in (self.dino_center, self.ibot_center):
            if center is not None:
                center.update()

    @torch.no_grad()
    def copy_student_to_teacher(self) -> None:
        """Make the teacher equal to the student: at the start, and after weights were loaded into the student.

        Raises:
            RuntimeError: The two networks differ in names or shapes.
        """
        self.teacher.load_state_dict(self.student.state_dict())

    def trained_modules(self) -> dict[str, nn.Module]:
        """The student's ``backbone`` and heads by name; each is clipped by its own gradient norm."""
        modules = dict(self.student.items())
        return modules if self.class_head is None else {**modules, "class_head": self.class_head}

    @torch.no_grad()
    def health(self) -> dict[str, float]:
        """Figures about the last batch of this process; waits for the device.

        ``teacher_entropy``: mean entropy of the cls targets divided by ln K; near 1 they say nothing, at 0 they are
        one-hot. ``dino_agreement``: share of global crops whose most likely prototype is the teacher's on the other
        view. ``effective_rank``: of the teacher's cls tokens, from 1 (all alike: collapsed) to min(2B, D).
        ``center_norm``: length of the centre. Only what the losses in use provide; empty before the first batch.
        """
        seen, figures = self._seen, {}
        if "targets_VK" in seen:
            other_view_VK = seen["targets_VK"].unflatten(0, (2, -1)).flip(0).flatten(0, 1)
            figures["teacher_entropy"] = normalised_entropy(other_view_VK)
            figures["dino_agreement"] = float((other_view_VK.argmax(1) == seen["student_best_V"]).float().mean())
        if "teacher_cls_VD" in seen:
            figures["effective_rank"] = effective_rank(seen["teacher_cls_VD"])
        center = self.dino_center or self.ibot_center
        if center is not None:
            figures["center_norm"] = float(center.center.norm())
        return figures

    def _patch_tokens(self, index_M: Tensor, batch: Batch) -> _PatchTokens:
        existing = self._student_sees_all or self._teacher_sees_all
        tokens = batch.token_mask_VN.shape[1]
        return _PatchTokens(index_M, find_existing_tokens(batch.available_BS, tokens) if existing else None)

    @torch.no_grad()
    def _teach(
        self, batch: Batch, tokens: _PatchTokens | None, values: Mapping[str, float]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Targets (2B, K) of the cls tokens and (M, K) of the masked tokens, from whole global crops."""
        backbone, available_VS = self.teacher["backbone"], batch.available_BS.repeat(2, 1)
        index_T, place_M = (None, None) if tokens is None else tokens.seen(self._teacher_sees_all)
        if hasattr(backbone, "forward_needed"):
            wanted_T = _no_tokens(batch) if index_T is None else index_T
            ((cls_VD, patches_TD),) = backbone.forward_needed(  # type: ignore[operator]
                [batch.global_VSHW], [None], [available_VS], [wanted_T]
            )
        else:
            features = backbone(batch.global_VSHW, available_BS=available_VS)
            if index_T is not None and features.patches_BND.shape[:2] != batch.token_mask_VN.shape:
                raise ValueError(
                    f"token mask {tuple(batch.token_mask_VN.shape)} does not fit patch tokens "
                    f"{tuple(features.patches_BND.shape)} of (sequences, rows, columns) {features.grid}"
                )
            cls_VD, patches_TD = features.cls_BD, _pick(features.patches_BND.flatten(0, 1), index_T)
        self._seen = {"teacher_cls_VD": cls_VD.clone()}  # a view would keep all tokens alive
        cls_logits_VK, patch_logits_TK = self._project(self.teacher, [cls_VD], None if tokens is None else patches_TD)
        temperature = values["teacher_temp"]
        return (
            _targets(cls_logits_VK, self.dino_center, temperature),
            _targets(patch_logits_TK, self.ibot_center, values.get("teacher_patch_temp", temperature), place_M),
        )

    def _study(
        self, batch: Batch, local_crops: int, tokens: _PatchTokens | None
    ) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
        """Student: cls tokens of the masked global crops and of the local crops, if there are any; patch tokens (T, D)
        of the global crops for the head; and where the targets lie among these.
        """
        images, masks = [batch.global_VSHW], [batch.token_mask_VN, None]
        available = [batch.available_BS.repeat(2, 1), batch.available_BS.repeat(max(local_crops, 1), 1)]
        if batch.local_VSHW is not None and local_crops:
            images.append(batch.local_VSHW)
        groups = len(images)
        index_T, place_M = (None, None) if tokens is None else tokens.seen(self._student_sees_all)
        backbone = self.student["backbone"]
        if hasattr(backbone, "forward_needed"):
            none = _no_tokens(batch)
            wanted = [none if index_T is None else index_T, none]
            found = backbone.forward_needed(  # type: ignore[operator]
                images, masks[:groups], available[:groups], wanted[:groups]
            )
            return [cls for cls, _ in found], None if tokens is None else found[0][1], place_M
        features = backbone.forward_list(images, masks[:groups], available[:groups])  # type: ignore[operator]
        cls = [each.cls_BD for each in features]
        return cls, None if tokens is None else _pick(features[0].patches_BND.flatten(0, 1), index_T), place_M

    def _project(
        self, network: nn.ModuleDict, cls_tokens: list[Tensor], patches_TD: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Logits of all cls tokens and of the patch tokens, None where no loss needs them; one call a head."""
        cls = cls_tokens if self.dino.loss_weight else []
        if patches_TD is None:
            return network["dino_head"](torch.cat(cls)), None
        if self.ibot.separate_head:
            return network["dino_head"](torch.cat(cls)) if cls else None, network["ibot_head"](patches_TD)
        rows_TD = torch.cat([*cls, patches_TD])
        if self._two_last_layers:
            cls_logits, patch_logits = network["dino_head"](rows_TD, len(patches_TD))
            return cls_logits, patch_logits
        logits = network["dino_head"](rows_TD)
        cls_logits, patch_logits = logits.tensor_split([len(logits) - len(patches_TD)])
        return cls_logits if cls else None, patch_logits


def expected_first_loss(
    dino: DinoConfig,
    ibot: IbotConfig,
    local_crops_number: int,
    batch_size: int = 2,
    *,
    n_sequences: int,
    teacher_temperature: float = 0.04,
    layerscale: float = 1e-5,
    centering: CenteringName = "centering",
) -> dict[str, float]:
    """What each weighted term should be about at the first step, before anything is learned.

    Random networks give nearly the same cls token to every view, so the mean over the 2n + 2 pairs of views is what
    ``cross_entropy_of_equals`` says, of which the n local crops hold 2n / (2n + 2). Sinkhorn-Knopp shares equal rows
    out over all prototypes, so there it is what ``cross_entropy_of_uniform`` says. A hidden token tells a random
    student next to nothing of the patch that the teacher sees there: iBOT, averaged over all global crops, is ln K
    times the share of crops that hold masked tokens. KoLeo is -ln(distance) of nearest neighbours: the cls tokens of
    two images differ only by what the blocks add, in proportion to the layer scale, so it is about -ln(layer scale)
    for each view. Measured for widths 48 to 768: 10 to 13 with 1e-5, 2 to 4 with 0.1, 1 to 2 with 1.

    Args:
        dino: Weights and prototypes.
        ibot: Weight, prototypes and how many crops are masked.
        local_crops_number: n.
        batch_size: Samples in one process; KoLeo needs two.
        n_sequences: Of a case; 1 for plain pictures.
        teacher_temperature: At the first step.
        layerscale: Of the backbone; 0 stands for none.
        centering: How teacher logits become targets.

    Returns:
        The terms that ``SelfDistillation.losses`` returns with the same settings, without labels.
    """
    terms: dict[str, float] = {}
    if dino.loss_weight:
        shape = (dino.head_n_prototypes, dino.head_bottleneck_dim)
        balanced = centering == "sinkhorn_knopp"
        pair = cross_entropy_of_uniform(*shape) if balanced else cross_entropy_of_equals(*shape, teacher_temperature)
        each = dino.loss_weight * pair / (local_crops_number + 1)
        if local_crops_number:
            terms["dino_local_crops_loss"] = each * local_crops_number
        terms["dino_global_crops_loss"] = each
    if ibot.loss_weight:
        share = ibot.masked_crops_share(n_sequences) if ibot.masks_at(0, 1) else 0.0
        terms["ibot_loss"] = ibot.loss_weight * share * math.log(patch_head(dino, ibot).head_n_prototypes)
    if dino.koleo_loss_weight:
        terms["koleo_loss"] = dino.koleo_loss_weight * 2 * -math.log(layerscale or 1.0) * (batch_size > 1)
    return terms


def cross_entropy_of_equals(prototypes: int, bottleneck_dim: int, teacher_temperature: float) -> float:
    """Expected cross-entropy of a random head with itself, over K prototypes in random directions of d dimensions.

    A cosine x has the density (1 - x²)^((d-3)/2), cut off where fewer than half a prototype is to be expected. With
    the temperatures 0.1 and T the value is ln K + ln E[exp(x / 0.1)] - E[x exp(x / T)] / (0.1 E[exp(x / T)]); for wide
    bottlenecks that is ln K + 1/(0.02 d) - 1/(0.1 T d), 0.8 below ln K for d = 256 and T = 0.04.
    """
    x, log_density = _cosines(prototypes, bottleneck_dim)
    student = math.log(prototypes) + (log_density + x / STUDENT_TEMPERATURE).logsumexp(0)
    seen = ((log_density + x / teacher_temperature).softmax(0) * x).sum()
    return float(student - seen / STUDENT_TEMPERATURE)


def cross_entropy_of_uniform(prototypes: int, bottleneck_dim: int) -> float:
    """Expected cross-entropy of a random head with uniform targets: ln K + ln E[exp(x / 0.1)], as E[x] is 0."""
    x, log_density = _cosines(prototypes, bottleneck_dim)
    return math.log(prototypes) + float((log_density + x / STUDENT_TEMPERATURE).logsumexp(0))


def _cosines(prototypes: int, bottleneck_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines between random directions and the logarithm of their density; see ``cross_entropy_of_equals``."""
    x = torch.linspace(-1, 1, 20_001, dtype=torch.float64)[1:-1]
    log_density = 0.5 * (bottleneck_dim - 3) * torch.log1p(-x * x)
    log_density = log_density - log_density.logsumexp(0)
    beyond = log_density.exp().flip(0).cumsum(0).flip(0)
    return x[beyond * prototypes > 0.5], log_density[beyond * prototypes > 0.5]


def normalised_entropy(probabilities_MK: Tensor) -> float:
    """Mean entropy of the rows divided by ln K: 0 for one-hot rows, 1 for uniform ones."""
    entropy_M = torch.special.entr(probabilities_MK.float()).sum(1)
    return float(entropy_M.mean()) / math.log(probabilities_MK.shape[1])


def effective_rank(rows_MD: Tensor) -> float:
    """Exponential of the entropy of the singular values divided by their sum; NaN if they are all zero or not finite.

    Source: Roy & Vetterli 2007, "The effective rank".
    """
    matrix = rows_MD.detach().cpu().double()
    if not bool(matrix.isfinite().all()):
        return math.nan
    values = torch.linalg.svdvals(matrix)
    return float(torch.special.entr(values / values.sum()).sum().exp())


def _targets(
    logits_TK: Tensor | None, center: Centering | None, temperature: float, place_M: Tensor | None = None
) -> Tensor | None:
    """Targets of the rows at ``place_M``, or of all rows; all rows enter the centre."""
    if logits_TK is None:
        return None
    if center is None:
        return sinkhorn_knopp(_pick(logits_TK, place_M), temperature)
    if place_M is None:
        return center.targets(logits_TK, temperature)
    center.see(logits_TK)
    return center.softmax(_pick(logits_TK, place_M), temperature)


def _pick(rows: Tensor, index: Tensor | None) -> Tensor:
    return rows if index is None else rows.index_select(0, index)


def _no_tokens(batch: Batch) -> Tensor:
    return torch.empty(0, dtype=torch.int64, device=batch.global_VSHW.device)


def _count_local_crops(batch: Batch) -> int:
    samples = len(batch.available_BS)
    crops = 0 if batch.local_VSHW is None else len(batch.local_VSHW)
    if len(batch.global_VSHW) != 2 * samples or crops % samples:
        raise ValueError(
            f"{len(batch.global_VSHW)} global and {crops} local crops do not fit {samples} samples: each needs two "
            "global crops and the same number of local crops"
        )
    return crops // samples


def _reshard(network: nn.Module) -> None:
    """Free what fully sharded modules gathered: after a forward without backward the root keeps whole parameters, and
    an average written into those would be lost.
    """
    for module in network.modules():
        reshard = getattr(module, "reshard", None)
        if reshard is not None:
            reshard()
