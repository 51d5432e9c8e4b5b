"""The loop that trains a head and its backbone end to end, and keeps the epoch that validation cases choose.

Training sees random views; validation goes through the embedder, so that it sees to the digit what `medssl infer` will
see. A step whose loss or gradient is not finite is not taken. Every draw is a function of the seed and its place in
the run: start, order, slices, views, dropout, stochastic depth.

Letters: B cases of a step, K slices of a case that are shown, M slices of several cases of one size, N all slices of
a case, S sequences, H W pixels, h w patches, D width of a slice vector, E width of the network, C outputs, L columns
of labels, V validation cases.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from medssl_cli.core.case import Case
from medssl_cli.core.errors import Interrupted, MedsslError, NonFiniteError, ResourceError
from medssl_cli.core.run import seed_for
from medssl_cli.data.manifest import say_some
from medssl_cli.engine.memory import is_out_of_memory
from medssl_cli.engine.optim import (
    BACKBONE,
    apply_schedule,
    build_adamw,
    clip_gradients,
    first_bad_gradient,
    parameter_groups,
    set_frozen,
)
from medssl_cli.engine.precision import Precision
from medssl_cli.engine.schedules import warmup_cosine
from medssl_cli.engine.trainer import StopSignal
from medssl_cli.models.convnext import ConvNeXt
from medssl_cli.models.feature_heads import build_head
from medssl_cli.models.vit import VisionTransformer
from medssl_cli.services.devices import describe_device
from medssl_cli.services.embedding import Embedder, last_layers, token_vectors
from medssl_cli.services.finetune_config import FinetuneConfig
from medssl_cli.services.finetune_views import CaseImages, CaseViews, Shown, in_order
from medssl_cli.services.head import PoolMode, case_logits
from medssl_cli.services.head_config import Selection
from medssl_cli.services.head_targets import Targets
from medssl_cli.services.head_training import (
    Trained,
    choose_selection,
    head_loss,
    macro_auroc,
    per_class_auroc,
    ranking,
    selection_score,
)
from medssl_cli.services.joined_slices import Job, Joined

log = logging.getLogger(__name__)

Network = VisionTransformer | ConvNeXt
Progress = Callable[[int, int], None]
HEAD = "head"


@dataclass(frozen=True)
class Labelled:
    """Cases of a part with their labels.

    Args:
        cases: B of them.
        labels_BL: Encoded; NaN where unknown.
    """

    cases: tuple[Case, ...]
    labels_BL: np.ndarray

    def __len__(self) -> int:
        return len(self.cases)


@dataclass
class Tuned:
    """A head and its backbone after training.

    Args:
        trained: The head, its epoch and history.
        backbone: Tensors of the backbone at the chosen epoch, on the CPU.
        last_backbone: The same at the end.
        val_logits_VC: Of the validation cases at the chosen epoch, before calibration; None without validation.
        stopped: What ended the training early; None if it ran to its end.
    """

    trained: Trained
    backbone: dict[str, Tensor]
    last_backbone: dict[str, Tensor]
    val_logits_VC: np.ndarray | None
    stopped: MedsslError | None = None


# --- what the network computes ---------------------------------------------------------------------------------------


def slice_vectors(
    model: Network, images_MSHW: Tensor, available_MS: Tensor | None, tokens: Sequence[str], layers: int
) -> Tensor:
    """(M, S, H, W) -> (M, D) float32: the vectors of ``Embedder``, with a gradient.

    Args:
        model: The backbone.
        images_MSHW: Normalised.
        available_MS: Which sequences exist; None for all, or of plain pictures.
        tokens: ``cls``: the CLS token of the last ``layers`` blocks, ``mean``: the mean patch token of the last one;
            each after the final norm.
        layers: Blocks.
    """
    return token_vectors(last_layers(model, images_MSHW, available_MS, layers), available_MS, tokens)


def build_groups(model: Network, head: nn.Module, config: FinetuneConfig) -> list[dict[str, Any]]:
    """Parameter groups: the head at rate 1, the backbone's last layer at its scale, each layer below it at less.

    Source: layer-wise decay as in Clark et al. 2020 (ELECTRA) and He et al. 2022 (MAE).
    """
    deep = parameter_groups(
        {BACKBONE: model}, len(model.drop_rates), layerwise_decay=config.layerwise_decay, patch_embed_lr_mult=1.0
    )
    for group in deep:
        group["lr_multiplier"] *= config.backbone_lr_scale
    return [*deep, *parameter_groups({HEAD: head}, 0)]


def rates_of(groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What share of the learning rate and of the weight decay each tensor has, for ``train_summary.json``."""
    return [
        {
            "lr_share": group["lr_multiplier"],
            "weight_decay_share": group["wd_multiplier"],
            "tensors": [name for name, _ in group["params"]],
            "parameters": sum(parameter.numel() for _, parameter in group["params"]),
        }
        for group in sorted(groups, key=lambda group: (group["lr_multiplier"], group["wd_multiplier"]))
    ]


# --- the loop --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Kept:
    """The state of one epoch."""

    epoch: int
    score: float
    head: nn.Module
    backbone: dict[str, Tensor]
    val_logits_VC: np.ndarray | None = None


@dataclass
class _Part:
    """Cases of a step that are computed together, and their share of its loss."""

    shown: list[Shown] = field(default_factory=list)
    share: float = 1.0

    @property
    def places(self) -> list[int]:
        return [one.place for one in self.shown]


class Tuner:
    """Backbone and head of one fine-tuning.

    Args:
        embedder: The backbone, whose weights are changed in place, and how cases become slice vectors.
        images: Where the cases come from.
        targets: Outputs of the head.
        config: Settings.
        train, val: Cases; None without validation.
        pool_mode: How slice vectors become one.
        pictures: The cases are pictures.
    """

    def __init__(
        self,
        embedder: Embedder,
        images: CaseImages,
        targets: Targets,
        config: FinetuneConfig,
        train: Labelled,
        val: Labelled | None,
        *,
        pool_mode: PoolMode,
        pictures: bool,
    ) -> None:
        self.embedder, self.images, self.targets, self.config = embedder, images, targets, config
        self.train, self.val, self.pool_mode = train, val, pool_mode
        self.model: Network = embedder.backbone.model.float()
        self.device = embedder.backbone.device
        self.views = CaseViews(images, embedder, config, config.seed, pictures=pictures)
        self.criterion: Selection | None = choose_selection(config, targets, None if val is None else val.labels_BL)
        self.loss = head_loss(targets, train.labels_BL, config, self.device)
        self.labels_BL = _as_tensor(targets, train.labels_BL, self.device)
        self.head = self._new_head()
        self.precision = Precision(config.precision, self.device)
        depth = len(self.model.drop_rates)
        self.model.drop_rates = [config.drop_path * i / max(depth - 1, 1) for i in range(depth)]
        self.model.grad_checkpointing = config.grad_checkpointing
        self.model.requires_grad_(True)
        groups = build_groups(self.model, self.head, config)
        self.rates = rates_of(groups)
        self.optimizer = build_adamw(groups, self.device)
        self.steps_done = 0
        self.history: list[dict[str, Any]] = []

    @property
    def epoch_steps(self) -> int:
        """Optimizer steps of an epoch; the last one may have fewer cases."""
        return math.ceil(len(self.train) / self.config.batch_size)

    def rate_at(self, step: int) -> float:
        """Learning rate of the head at a step, from 0."""
        warmup, total = round(self.config.warmup_epochs * self.epoch_steps), self.config.epochs * self.epoch_steps
        lr = self.config.lr
        return warmup_cosine(step, lr / max(warmup, 1), lr, min(self.config.min_lr, lr), warmup, total)

    def fit(self, progress: Progress | None = None) -> Tuned:
        """All epochs, or until validation has not improved for ``patience`` of them.

        Raises:
            MedsslError: What ended the training before there was an epoch to keep.
        """
        best: _Kept | None = None
        stopped: MedsslError | None = None
        cuda = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda), StopSignal() as stop:
            try:
                for epoch in range(1, self.config.epochs + 1):
                    best = self._one_epoch(epoch, best, stop, progress)
                    if self.criterion and self.config.patience and epoch - best.epoch >= self.config.patience:
                        log.info("No better validation score for %d epochs: stopped", self.config.patience)
                        break
            except MedsslError as error:
                if best is None:
                    raise
                stopped = error
        assert best is not None
        self.model.eval()
        last_head, last_backbone = _copied(self.head), _tensors(self.model)
        trained = Trained(best.head, last_head, self.criterion, best.score, best.epoch, self.history)
        return Tuned(trained, best.backbone, last_backbone, best.val_logits_VC, stopped)

    def _one_epoch(self, epoch: int, best: _Kept | None, stop: StopSignal, progress: Progress | None) -> _Kept:
        entry: dict[str, Any] = {"epoch": epoch, "lr": self.rate_at(self.steps_done)}
        with self._saying_memory():
            entry["train_loss"] = self._train(epoch, stop, progress)
            score, logits_VC = math.nan, None
            if self.val is not None and self.criterion is not None:
                logits_VC = self.validation_logits()
                told, score = self._judge(logits_VC, self.val)
                entry |= told
        self.history.append(entry)
        log.info("%s", _line(entry, self.config.epochs))
        keeps = best is None or self.criterion is None or score > best.score
        if best is not None and not keeps and not (math.isnan(best.score) and not math.isnan(score)):
            return best
        return _Kept(epoch, score, _copied(self.head), _tensors(self.model), logits_VC)

    # --- training ----------------------------------------------------------------------------------------------------

    def _train(self, epoch: int, stop: StopSignal, progress: Progress | None) -> float:
        """One pass; the mean loss over the known labels."""
        is_frozen = epoch <= self.config.freeze_epochs
        set_frozen(self.model, self.optimizer, is_frozen)
        self.model.train(not is_frozen)
        self.head.train()
        total = mass = 0.0
        with closing(self._steps(epoch)) as steps:  # type: ignore[type-var]
            for parts, weight in steps:
                total += weight * self._step(parts, is_frozen=is_frozen)
                mass += weight
                self.steps_done += 1
                if progress is not None:
                    progress(self.steps_done, self.config.epochs * self.epoch_steps)
                if stop.received is not None:
                    raise Interrupted(
                        f"{stop.received} came in epoch {epoch} of {self.config.epochs}.",
                        where=f"after step {self.steps_done} of {self.config.epochs * self.epoch_steps}",
                        fix="run the same command again: fine-tuning starts over",
                        code="interrupted",
                    )
        return total / mass if mass else 0.0

    def _steps(self, epoch: int) -> Iterator[tuple[list[_Part], float]]:
        """The parts of each step, their images read ahead, and how much label there is in the step."""
        generator = torch.Generator().manual_seed(seed_for(self.config.seed, "finetune order", epoch))
        order = torch.randperm(len(self.train), generator=generator).tolist()

        def read(place: int) -> Shown:
            return self.views.read(self.train.cases[place], place, epoch)

        with closing(in_order(read, order, self.config.num_workers)) as ahead:  # type: ignore[type-var]
            for start in range(0, len(order), self.config.batch_size):
                places = order[start : start + self.config.batch_size]
                weight = self._mass(places)
                size = math.ceil(len(places) / self.config.accumulation)
                # a generator within: the images of one part alone are held
                yield self._parts(places, size, weight, ahead), weight  # type: ignore[misc]

    def _parts(self, places: list[int], size: int, weight: float, ahead: Iterator[Shown]) -> Iterator[_Part]:
        for start in range(0, len(places), size):
            shown = [next(ahead) for _ in places[start : start + size]]
            share = self._mass([one.place for one in shown]) / weight if weight else 0.0
            yield _Part(shown, share)

    def _mass(self, places: Sequence[int]) -> float:
        """What the loss of some cases is divided by: known labels, weighted where classes exclude one another."""
        labels_BL = self.labels_BL[list(places)]
        known_BL = ~labels_BL.isnan()
        if self.targets.task != "multiclass" or self.loss.weights_C is None:
            return float(known_BL.sum())
        return float(self.loss.weights_C[labels_BL[known_BL].long()].sum())

    def _step(self, parts: Iterator[_Part] | Sequence[_Part], *, is_frozen: bool) -> float:
        """One update, or none and an error if it would not be finite; the loss of the step."""
        torch.manual_seed(seed_for(self.config.seed, "finetune noise", self.steps_done))
        self.optimizer.zero_grad(set_to_none=True)
        places: list[int] = []
        total = 0.0
        for part in parts:
            places += part.places
            logits_BC = self._logits(part, is_frozen=is_frozen)
            value = self.loss(logits_BC, self.labels_BL[part.places]) * part.share
            told = float(value.detach())
            if not math.isfinite(told):
                guilty = [p for p, row in zip(part.places, logits_BC.detach(), strict=True) if not row.isfinite().all()]
                raise self._nonfinite("The loss became non-finite.", guilty or part.places)
            value.backward()
            total += told
        norms = clip_gradients({BACKBONE: self.model, HEAD: self.head}, self.config.clip_grad)
        if not all(math.isfinite(float(norm)) for norm in norms.values()):
            names = (first_bad_gradient(module) for module in (self.model, self.head))
            name = next((name for name in names if name is not None), "the norm of all of them")
            raise self._nonfinite(f"A gradient became non-finite ({name}).", places)
        rate = self.rate_at(self.steps_done)
        apply_schedule(self.optimizer, {"lr": rate, "last_layer_lr": rate, "wd": self.config.weight_decay})
        self.optimizer.step()
        return total

    def _logits(self, part: _Part, *, is_frozen: bool) -> Tensor:
        """(B, C) of some cases; slices of one size go through the network together."""
        groups: dict[tuple[int, ...], list[int]] = {}
        views = [self.views.show(one) for one in part.shown]
        for number, view in enumerate(views):
            groups.setdefault(tuple(view.shape[1:]), []).append(number)
        vectors: list[Tensor] = [torch.empty(0)] * len(views)
        for numbers in groups.values():
            counts = [len(views[number]) for number in numbers]
            images_MSHW = torch.cat([views[number] for number in numbers])
            available_MS = np.repeat([part.shown[number].available_S for number in numbers], counts, axis=0)
            with torch.set_grad_enabled(not is_frozen), self.precision.autocast():
                found_MD = self._vectors(images_MSHW, available_MS)
            for number, slices_KD in zip(numbers, found_MD.split(counts), strict=True):
                vectors[number] = slices_KD
        return torch.stack([case_logits(self.head, slices_KD, self.pool_mode) for slices_KD in vectors])

    def _vectors(self, images_MSHW: Tensor, available_MS: np.ndarray) -> Tensor:
        exist = None
        if self.model.sequences is not None and not available_MS.all():
            exist = torch.from_numpy(available_MS).to(self.device)
        return slice_vectors(self.model, images_MSHW, exist, self.embedder.config.tokens, self.embedder.config.layers)

    # --- validation --------------------------------------------------------------------------------------------------

    def validation_logits(self) -> np.ndarray:
        """(V, C) float64 of the whole validation cases, as ``Head`` computes them."""
        assert self.val is not None
        self.model.eval()
        exact = _copied(self.head).double()
        rows = [
            case_logits(exact, torch.from_numpy(slices_ND.astype(np.float64)), self.pool_mode)
            for slices_ND in self._embedded(self.val.cases)
        ]
        return torch.stack(rows).detach().numpy()

    def _embedded(self, cases: Sequence[Case]) -> Iterator[np.ndarray]:
        """(N, D) of each case as ``Embedder`` computes it, with the weights of now."""
        embedder = self.embedder
        joined = Joined(embedder, embedder.config.batch_size)
        jobs = []
        with closing(in_order(self.images.planes, cases, self.config.num_workers)) as ahead:  # type: ignore[type-var]
            for case, planes in zip(cases, ahead, strict=True):
                job = Job(case, 0, "", {}, planes=planes, indices_N=embedder.indices(planes))
                job.available_S, job.left = planes.available_S, job.count
                jobs.append(job)
                joined.add(job)
        joined.finish_all()
        for job in jobs:
            assert job.slices_ND is not None
            if not np.isfinite(job.slices_ND).all():
                raise self._bad_step("The backbone gives non-finite features.", [job.case.case_id])
            yield job.slices_ND

    def _judge(self, logits_VC: np.ndarray, val: Labelled) -> tuple[dict[str, Any], float]:
        """Loss and areas on the validation cases, and the score that chooses."""
        assert self.criterion is not None
        logits = torch.from_numpy(logits_VC).float().to(self.device)
        loss = float(self.loss(logits, _as_tensor(self.targets, val.labels_BL, self.device)))
        ranks = ranking(logits_VC, self.targets)
        told = {
            "val_loss": loss,
            "val_macro_auroc": macro_auroc(ranks, val.labels_BL, self.targets),
            "val_per_class_auroc": per_class_auroc(ranks, val.labels_BL, self.targets),
        }
        return told, selection_score(self.criterion, logits_VC, val.labels_BL, self.targets, loss)

    # --- trifles -----------------------------------------------------------------------------------------------------

    def _new_head(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_for(self.config.seed, "head start"))
            width = self.embedder.width * (2 if self.pool_mode == "meanmax" else 1)
            return build_head(
                self.config.kind(self.targets.task),
                width,
                self.targets.outputs,
                hidden_dim=self.config.hidden_dim,
                dropout=self.config.dropout,
            ).to(self.device)

    def _nonfinite(self, what: str, places: Sequence[int]) -> NonFiniteError:
        return self._bad_step(what, [self.train.cases[place].case_id for place in places])

    def _bad_step(self, what: str, case_ids: Sequence[str]) -> NonFiniteError:
        return NonFiniteError(
            f"{what} The step was not taken.",
            where=f"step {self.steps_done + 1}, cases {say_some(list(case_ids))}",
            fix="lower lr or backbone_lr_scale, pass precision=fp32, or look at these cases with `medssl check-data`",
            code="loss_nonfinite",
        )

    @contextmanager
    def _saying_memory(self) -> Iterator[None]:
        """Tell which keys need less memory when there is not enough."""
        try:
            yield
        except (RuntimeError, MemoryError, ResourceError) as error:
            told = isinstance(error, ResourceError) and error.code == "memory_full"
            if not told and not is_out_of_memory(error):
                raise
            raise ResourceError(
                "There is not enough memory for a step of fine-tuning.",
                where=f"{describe_device(self.device)}, step {self.steps_done + 1}: batch_size="
                f"{self.config.batch_size}, accumulation={self.config.accumulation}, {self.config.precision}",
                fix=f"pass accumulation={min(2 * self.config.accumulation, self.config.batch_size)} (the same step in "
                "more parts), precision=bf16, grad_checkpointing=true, a lower batch_size, slices_per_case or "
                "extract.batch_size, or a smaller extract.resize or extract.max_side",
                code="memory_full",
            ) from error


def _as_tensor(targets: Targets, labels_BL: np.ndarray, device: torch.device) -> Tensor:
    """Labels as the loss takes them."""
    return torch.from_numpy(np.asarray(targets.trained_on(labels_BL))).float().to(device)


def _copied(module: nn.Module) -> nn.Module:
    """A copy on the CPU, in evaluation mode, without gradients."""
    return copy.deepcopy(module).cpu().requires_grad_(False).eval()


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Copies on the CPU of all tensors."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in module.state_dict().items()}


def _line(entry: Mapping[str, Any], epochs: int) -> str:
    told = [f"epoch {entry['epoch']}/{epochs}", f"loss {entry['train_loss']:.4f}"]
    told += [f"{name} {entry[key]:.4f}" for key, name in _TOLD.items() if math.isfinite(entry.get(key, math.nan))]
    return "  ".join(told)


_TOLD = {"val_loss": "validation loss", "val_macro_auroc": "AUROC"}
