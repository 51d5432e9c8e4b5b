"""Self-distillation as in DINOv2 (Oquab et al. 2023): a student learns what its own moving average sees.

The parts are handed in; here they are connected: DINO on cls tokens, iBOT on masked patch tokens, KoLeo on the
student's cls tokens, and the exponential moving average. Letters: B samples, V crops (view-major), S sequences,
N patch tokens of all sequences, M masked tokens, D width, K prototypes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor, nn

from medssl_cli.core.config import Config
from medssl_cli.core.protocols import Batch, Features
from medssl_cli.objectives.centering import Centering, sinkhorn_knopp
from medssl_cli.objectives.dino import STUDENT_TEMPERATURE, DinoConfig, HeadConfig, dino_losses
from medssl_cli.objectives.ibot import IbotConfig, MaskedTokens, find_masked_tokens, ibot_loss
from medssl_cli.objectives.koleo import koleo_loss

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
    init_with_student_weights: bool = True
    """Kept for existing files, without effect: the teacher always starts as a copy of the student."""


class SelfDistillation(nn.Module):
    """The objective of pretraining: student, teacher and the three losses between them.

    Heads exist only where a loss needs them: ``dino_head`` for cls tokens and, unless ``ibot.separate_head``, patches;
    ``ibot_head`` for patches alone. The teacher is always in eval mode, takes no gradient, and sees the global crops
    only, unmasked.

    Args:
        student_backbone: Keeps the ``Backbone`` protocol; with its initial weights already loaded.
        teacher_backbone: The same network without stochastic depth; its weights are overwritten by the student's.
        make_head: Called with ``dino`` or ``ibot`` for a head of that shape, for the student and for the teacher.
        dino: Loss weights and head shape.
        ibot: Loss weight and head shape.
        centering: How teacher logits become targets.
    """

    def __init__(
        self,
        student_backbone: nn.Module,
        teacher_backbone: nn.Module,
        make_head: Callable[[HeadConfig], nn.Module],
        *,
        dino: DinoConfig,
        ibot: IbotConfig,
        centering: CenteringName = "centering",
    ) -> None:
        super().__init__()
        if not (dino.loss_weight or ibot.loss_weight):
            raise ValueError("dino.loss_weight and ibot.loss_weight are both 0: there is nothing to learn")
        self.dino, self.ibot = dino, ibot
        heads: dict[str, HeadConfig] = {}
        if dino.loss_weight or not ibot.separate_head:
            heads["dino_head"] = dino
        if ibot.loss_weight and ibot.separate_head:
            heads["ibot_head"] = ibot
        self.student = nn.ModuleDict({"backbone": student_backbone, **{k: make_head(v) for k, v in heads.items()}})
        self.teacher = nn.ModuleDict({"backbone": teacher_backbone, **{k: make_head(v) for k, v in heads.items()}})
        centred = centering == "centering"
        patch_prototypes = (ibot if ibot.separate_head else dino).head_n_prototypes
        self.dino_center = Centering(dino.head_n_prototypes) if centred and dino.loss_weight else None
        self.ibot_center = Centering(patch_prototypes) if centred and ibot.loss_weight else None
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
            values: ``teacher_temp``.

        Returns:
            Those that are on of ``dino_local_crops_loss``, ``dino_global_crops_loss``, ``ibot_loss``, ``koleo_loss``.

        Raises:
            ValueError: The parts of the batch do not fit together.
        """
        local_crops = _count_local_crops(batch)
        masked = find_masked_tokens(batch.token_mask_VN, batch.available_BS) if self.ibot.loss_weight else None
        cls_targets_VK, patch_targets_MK = self._teach(batch, masked, values["teacher_temp"])
        global_, local = self._study(batch, local_crops)
        cls_tokens = [global_.cls_BD] if local is None else [global_.cls_BD, local.cls_BD]
        cls_logits_VK, patch_logits_MK = self._project(self.student, cls_tokens, global_, masked)
        terms: dict[str, Tensor] = {}
        if cls_logits_VK is not None and cls_targets_VK is not None:
            global_VK, local_VK = cls_logits_VK.tensor_split([len(cls_targets_VK)])
            pairs = dino_losses(global_VK, local_VK if local_crops else None, cls_targets_VK)
            terms |= {name: self.dino.loss_weight * loss for name, loss in pairs.items()}
            self._seen |= {"targets_VK": cls_targets_VK, "student_best_V": global_VK.detach().argmax(1)}
        if masked is not None and patch_logits_MK is not None and patch_targets_MK is not None:
            terms["ibot_loss"] = self.ibot.loss_weight * ibot_loss(patch_logits_MK, patch_targets_MK, masked)
        if self.dino.koleo_loss_weight:
            views = global_.cls_BD.chunk(2)
            terms["koleo_loss"] = self.dino.koleo_loss_weight * (koleo_loss(views[0]) + koleo_loss(views[1]))
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
        return dict(self.student.items())

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

    @torch.no_grad()
    def _teach(
        self, batch: Batch, masked: MaskedTokens | None, temperature: float
    ) -> tuple[Tensor | None, Tensor | None]:
        """Targets (2B, K) of the cls tokens and (M, K) of the masked tokens, from whole global crops."""
        features = self.teacher["backbone"](batch.global_VSHW, available_BS=batch.available_BS.repeat(2, 1))
        if masked is not None and features.patches_BND.shape[:2] != batch.token_mask_VN.shape:
            raise ValueError(
                f"token mask {tuple(batch.token_mask_VN.shape)} does not fit patch tokens "
                f"{tuple(features.patches_BND.shape)} of (sequences, rows, columns) {features.grid}"
            )
        self._seen = {"teacher_cls_VD": features.cls_BD.clone()}  # a view would keep all tokens alive
        cls_logits_VK, patch_logits_MK = self._project(self.teacher, [features.cls_BD], features, masked)
        return (
            _targets(cls_logits_VK, self.dino_center, temperature),
            _targets(patch_logits_MK, self.ibot_center, temperature),
        )

    def _study(self, batch: Batch, local_crops: int) -> tuple[Features, Features | None]:
        """Student features of the masked global crops and, if there are any, of the local crops."""
        available_BS = batch.available_BS
        if batch.local_VSHW is None or not local_crops:
            found = self.student["backbone"].forward_list(  # type: ignore[operator]
                [batch.global_VSHW], [batch.token_mask_VN], [available_BS.repeat(2, 1)]
            )
            return found[0], None
        found = self.student["backbone"].forward_list(  # type: ignore[operator]
            [batch.global_VSHW, batch.local_VSHW],
            [batch.token_mask_VN, None],
            [available_BS.repeat(2, 1), available_BS.repeat(local_crops, 1)],
        )
        return found[0], found[1]

    def _project(
        self, network: nn.ModuleDict, cls_tokens: list[Tensor], global_: Features, masked: MaskedTokens | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Logits of all cls tokens and of the masked patch tokens; one call a head."""
        cls = cls_tokens if self.dino.loss_weight else []
        if masked is None:
            return network["dino_head"](torch.cat(cls)), None
        patches_MD = global_.patches_BND.flatten(0, 1).index_select(0, masked.index_M)
        if self.ibot.separate_head:
            return network["dino_head"](torch.cat(cls)) if cls else None, network["ibot_head"](patches_MD)
        logits = network["dino_head"](torch.cat([*cls, patches_MD]))
        cls_logits, patch_logits = logits.tensor_split([len(logits) - len(patches_MD)])
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
) -> dict[str, float]:
    """What each weighted term should be about at the first step, before anything is learned.

    Random networks give nearly the same cls token to every view, so the mean over the 2n + 2 pairs of views is what
    ``cross_entropy_of_equals`` says, of which the n local crops hold 2n / (2n + 2). A hidden token tells a random
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

    Returns:
        The terms that ``SelfDistillation.losses`` returns with the same settings.
    """
    terms: dict[str, float] = {}
    if dino.loss_weight:
        pair = cross_entropy_of_equals(dino.head_n_prototypes, dino.head_bottleneck_dim, teacher_temperature)
        each = dino.loss_weight * pair / (local_crops_number + 1)
        if local_crops_number:
            terms["dino_local_crops_loss"] = each * local_crops_number
        terms["dino_global_crops_loss"] = each
    if ibot.loss_weight:
        prototypes = (ibot if ibot.separate_head else dino).head_n_prototypes
        terms["ibot_loss"] = ibot.loss_weight * ibot.masked_crops_share(n_sequences) * math.log(prototypes)
    if dino.koleo_loss_weight:
        terms["koleo_loss"] = dino.koleo_loss_weight * 2 * -math.log(layerscale or 1.0) * (batch_size > 1)
    return terms


def cross_entropy_of_equals(prototypes: int, bottleneck_dim: int, teacher_temperature: float) -> float:
    """Expected cross-entropy of a random head with itself, over K prototypes in random directions of d dimensions.

    A cosine x has the density (1 - x²)^((d-3)/2), cut off where fewer than half a prototype is to be expected. With
    the temperatures 0.1 and T the value is ln K + ln E[exp(x / 0.1)] - E[x exp(x / T)] / (0.1 E[exp(x / T)]); for wide
    bottlenecks that is ln K + 1/(0.02 d) - 1/(0.1 T d), 0.8 below ln K for d = 256 and T = 0.04.
    """
    x = torch.linspace(-1, 1, 20_001, dtype=torch.float64)[1:-1]
    log_density = 0.5 * (bottleneck_dim - 3) * torch.log1p(-x * x)
    log_density = log_density - log_density.logsumexp(0)
    beyond = log_density.exp().flip(0).cumsum(0).flip(0)
    x, log_density = x[beyond * prototypes > 0.5], log_density[beyond * prototypes > 0.5]
    student = math.log(prototypes) + (log_density + x / STUDENT_TEMPERATURE).logsumexp(0)
    seen = ((log_density + x / teacher_temperature).softmax(0) * x).sum()
    return float(student - seen / STUDENT_TEMPERATURE)


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


def _targets(logits_MK: Tensor | None, center: Centering | None, temperature: float) -> Tensor | None:
    if logits_MK is None:
        return None
    return sinkhorn_knopp(logits_MK, temperature) if center is None else center.targets(logits_MK, temperature)


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
