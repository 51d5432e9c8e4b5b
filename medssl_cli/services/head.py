"""A trained head: from the slice vectors of a case to its probabilities or values, with what is known of its limits.

Values are computed in float64 on the CPU, so that a case alone and the same case in a table of features give the same
numbers; ``logits`` is the differentiable way, on the head's device, for maps and for fine-tuning.

Letters: N slices of a case (1 for a picture), R rows of a table, B cases, D width of a slice vector, P pooled width,
C outputs.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from medssl_cli.core.digest import file_digest
from medssl_cli.core.errors import CheckpointError, ConfigError
from medssl_cli.core.run import atomic_path, hide_home, say_disk_errors, write_json
from medssl_cli.data.feature_cache import FeatureCache
from medssl_cli.data.feature_store import FeaturePart
from medssl_cli.metrics.novelty import Novelty, NoveltyScore
from medssl_cli.models.feature_heads import AttentionHead, Form, NeighbourHead, build_head
from medssl_cli.models.zoo import read_weights
from medssl_cli.services.backbone import open_backbone
from medssl_cli.services.embedding import Embedder, embedder_of, pooled
from medssl_cli.services.lookup import HEAD_CARD, HEAD_WEIGHTS, FoundModel, is_head_run, read_head_card

__all__ = ["Head", "case_logits", "form_of", "is_head_run", "load_head", "open_head", "probabilities", "save_head"]

Task = Literal["binary", "multiclass", "multilabel", "regression"]
PoolMode = Literal["mean", "meanmax", "attention", "none"]

_NEEDED = (
    *("task", "targets", "classes", "outputs", "kind", "slice_dim", "input_width", "pool_mode", "level"),
    *("thresholds", "calibration", "calibrated", "preprocessing", "model", "sha256"),
)  # fmt: skip
_BLOCK_CASES = 1024


def form_of(task: str) -> Form:
    """What the outputs of a task become: ``sigmoid``, ``softmax`` or ``value``."""
    forms: dict[str, Form] = {"multiclass": "softmax", "regression": "value"}
    return forms.get(task, "sigmoid")


def probabilities(logits_BC: np.ndarray, task: str, calibration: Mapping[str, Any] | None = None) -> np.ndarray:
    """Probabilities of logits, (B, C); multiclass rows sum to 1.

    Args:
        logits_BC: Of the head, before calibration.
        task: ``binary``, ``multilabel`` or ``multiclass``.
        calibration: ``scale`` and ``shift`` of each output, applied to the logits first.
    """
    z = np.asarray(logits_BC, dtype=np.float64)
    if calibration is not None:
        z = z * np.asarray(calibration["scale"], dtype=np.float64) + np.asarray(calibration["shift"], dtype=np.float64)
    if form_of(task) == "softmax":
        powers = np.exp(z - z.max(axis=-1, keepdims=True))
        return powers / powers.sum(axis=-1, keepdims=True)
    half = np.exp(-np.abs(z))  # never overflows
    return np.where(z >= 0, 1.0, half) / (1.0 + half)


def case_logits(module: nn.Module, slices_ND: Tensor, pool_mode: PoolMode, case_rule: str = "max") -> Tensor:
    """The C logits of one case from its slice vectors, differentiable.

    Args:
        module: Of ``models.feature_heads``.
        slices_ND: Slice vectors.
        pool_mode: How slices become one vector; ``none``: each slice has its logits.
        case_rule: With ``none``: ``max`` or ``mean`` of the slices' logits.
    """
    if pool_mode == "attention":
        return module(slices_ND[None])[0]
    if pool_mode == "none":
        logits_NC = module(slices_ND)
        return logits_NC.amax(0) if case_rule == "max" else logits_NC.mean(0)
    parts = [slices_ND.mean(0)] if pool_mode == "mean" else [slices_ND.mean(0), slices_ND.amax(0)]
    return module(torch.cat(parts)[None])[0]


@dataclass(frozen=True)
class Head:
    """A head as ``medssl train-head`` left it.

    Args:
        folder: Run folder.
        card: ``head.json``.
        module: In evaluation mode.
        novelty: How far a new case may lie from the training cases; None if it was not stored.
        reliability: Probabilities and labels (N, C) of the validation cases; None without validation.
    """

    folder: Path
    card: dict[str, Any]
    module: nn.Module
    novelty: Novelty | None = None
    reliability: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def task(self) -> Task:
        """``binary``, ``multiclass``, ``multilabel`` or ``regression``."""
        return self.card["task"]

    @property
    def targets(self) -> tuple[str, ...]:
        """Label columns it was trained on."""
        return tuple(self.card["targets"])

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the C outputs."""
        return tuple(self.card["classes"])

    @property
    def outputs(self) -> int:
        """C."""
        return int(self.card["outputs"])

    @property
    def kind(self) -> str:
        """``logistic``, ``linear``, ``mlp``, ``attention_mil`` or ``knn``."""
        return str(self.card["kind"])

    @property
    def pool_mode(self) -> PoolMode:
        """How slices become one vector: ``mean``, ``meanmax``, ``attention``, or ``none`` for a slice head."""
        return self.card["pool_mode"]

    @property
    def level(self) -> Literal["case", "slice"]:
        """What it was trained on."""
        return self.card["level"]

    @property
    def case_rule(self) -> str:
        """Of a slice head: ``max`` or ``mean`` of the slices' logits is the case's."""
        return str(self.card.get("case_rule") or "max")

    @property
    def slice_dim(self) -> int:
        """D."""
        return int(self.card["slice_dim"])

    @property
    def input_width(self) -> int:
        """P."""
        return int(self.card["input_width"])

    @property
    def thresholds(self) -> np.ndarray | None:
        """(C,) of a binary or multilabel head: a probability at or above it is positive."""
        told = self.card["thresholds"]
        return None if told is None else np.asarray(told, dtype=np.float64)

    @property
    def calibrated(self) -> bool:
        """Whether probabilities were fitted to the validation cases."""
        return bool(self.card["calibrated"])

    @property
    def slice_scores_from(self) -> Literal["volume_head", "slice_head"]:
        """Whether single slices are what the head was trained on."""
        return "slice_head" if self.level == "slice" else "volume_head"

    def to(self, device: torch.device | str) -> Head:
        """The same head on another device."""
        return replace(self, module=copy.deepcopy(self.module).to(device))

    def logits(self, slices_ND: Tensor) -> Tensor:
        """(N, D) -> (C,) of the case, before calibration; differentiable. Regression: standardised values."""
        self._check_width(slices_ND.shape[-1], "slice vectors")
        return case_logits(self.module, slices_ND, self.pool_mode, self.case_rule)

    def values(self, slices_ND: np.ndarray) -> np.ndarray:
        """(N, D) -> (C,): calibrated probabilities, or values in the units of the targets."""
        self._check_width(slices_ND.shape[-1], "slice vectors")
        return self._finish(self._exact_logits(slices_ND)[None])[0]

    def slice_values(self, slices_ND: np.ndarray) -> np.ndarray:
        """(N, D) -> (N, C), each slice as if it were the whole case."""
        self._check_width(slices_ND.shape[-1], "slice vectors")
        rows = torch.from_numpy(np.asarray(slices_ND, dtype=np.float64))
        if self.pool_mode == "meanmax":  # the mean and the maximum of one slice are the slice
            rows = torch.cat([rows, rows], 1)
        with torch.inference_mode():
            logits = self._exact(rows[:, None] if self.pool_mode == "attention" else rows)
        return self._finish(logits.numpy())

    def values_of_rows(self, part: FeaturePart) -> tuple[list[str], np.ndarray]:
        """Case ids and values (cases, C) of stored features, of the images as they are (view 0).

        Raises:
            ConfigError: The rows are pooled in another way than the head was trained on.
        """
        slices_of: dict[str, list[int]] = {}
        for number, row in enumerate(part.rows):
            if row.view == 0:
                slices_of.setdefault(row.case_id, []).append(number)
        if not slices_of:
            return [], np.zeros((0, self.outputs))
        kept = [part.rows[numbers[0]] for numbers in slices_of.values()]
        if kept[0].slice_index is None:
            self._check_pooled(part, max(row.n_slices for row in kept))
            numbers = [numbers[0] for numbers in slices_of.values()]
            return list(slices_of), self._finish(self._exact_rows(part.embeddings_RP, numbers))
        self._check_width(part.embeddings_RP.shape[1], f"slice vectors of part {part.name}")
        logits = [self._exact_logits(np.asarray(part.embeddings_RP[numbers])) for numbers in slices_of.values()]
        return list(slices_of), self._finish(np.stack(logits))

    def attention(self, slices_ND: np.ndarray) -> np.ndarray | None:
        """(N,) weights of the slices, which sum to 1; None of a head without attention."""
        if not isinstance(self._exact, AttentionHead):
            return None
        with torch.inference_mode():
            bag = torch.from_numpy(np.asarray(slices_ND, dtype=np.float64))[None]
            return self._exact.attention(bag)[0].numpy()

    def novelty_of(self, slices_ND: np.ndarray) -> NoveltyScore | None:
        """How far a case lies from the training cases; None if that was not stored."""
        return None if self.novelty is None else self.novelty.score(novelty_vector(slices_ND, self.pool_mode))

    @cached_property
    def _exact(self) -> nn.Module:
        return copy.deepcopy(self.module).cpu().double().eval()

    def _exact_logits(self, slices_ND: np.ndarray) -> np.ndarray:
        """(C,); pooled as the feature folder pools, in float32."""
        with torch.inference_mode():
            if self.pool_mode in ("mean", "meanmax"):
                vector = pooled(np.asarray(slices_ND, dtype=np.float32), self.pool_mode)
                return self._exact(torch.from_numpy(vector.astype(np.float64))[None])[0].numpy()
            slices = torch.from_numpy(np.asarray(slices_ND, dtype=np.float64))
            return case_logits(self._exact, slices, self.pool_mode, self.case_rule).numpy()

    def _exact_rows(self, rows_RP: np.ndarray, numbers: Sequence[int]) -> np.ndarray:
        """(cases, C) of rows that are one case each, a block in memory at a time."""
        found = []
        with torch.inference_mode():
            for start in range(0, len(numbers), _BLOCK_CASES):
                block = np.asarray(rows_RP[list(numbers[start : start + _BLOCK_CASES])], dtype=np.float64)
                rows = torch.from_numpy(block)
                found.append(self._exact(rows[:, None] if self.pool_mode == "attention" else rows).numpy())
        return np.concatenate(found)

    def _finish(self, logits_BC: np.ndarray) -> np.ndarray:
        if self.task == "regression":
            scaler = self.card["scaler"]
            return logits_BC * np.asarray(scaler["scale"]) + np.asarray(scaler["mean"])
        return probabilities(logits_BC, self.task, self.card["calibration"])

    def _check_width(self, width: int, what: str) -> None:
        if width != self.slice_dim:
            raise ConfigError(
                f"The head was trained on slice vectors of {self.slice_dim} numbers, not of {width}.",
                where=f"{hide_home(str(self.folder))}: {what}",
                fix="take the backbone and the tokens and layers that the head was trained with",
                code="head_mismatch",
            )

    def _check_pooled(self, part: FeaturePart, most_slices: int) -> None:
        """Refuse pooled rows unless they are pooled as the head's were; of one slice, the mean is the slice."""
        width = part.embeddings_RP.shape[1]
        needs_slices = self.pool_mode in ("attention", "none")
        if width == self.input_width and not (needs_slices and most_slices > 1):
            return
        raise mismatch(
            f"{hide_home(str(self.folder))}: part {part.name}",
            f"{self.input_width} numbers ({self.pool_mode} of slice vectors of {self.slice_dim})",
            f"{width} numbers ({'meanmax' if width == 2 * self.slice_dim else 'mean'})",
            "mean" if needs_slices else self.pool_mode,
        )


def mismatch(where: str, head: str, features: str, pool: str) -> ConfigError:
    """A head and features that do not fit each other; both are named."""
    fix = "extract with --pool none, which fits every head"
    return ConfigError(
        "Head and features are pooled in different ways.",
        where=f"{where}: the head takes {head}, the features hold {features}",
        fix=fix if pool not in ("mean", "meanmax") else f"{fix}, or with --pool {pool}",
        code="pool_mismatch",
    )


def novelty_vector(slices_ND: np.ndarray, pool_mode: PoolMode) -> np.ndarray:
    """The one vector of a case by which it is compared with the training cases: as pooled, else the mean."""
    return pooled(np.asarray(slices_ND, dtype=np.float32), "meanmax" if pool_mode == "meanmax" else "mean")


# --- on disk ---------------------------------------------------------------------------------------------------------


def save_head(
    folder: Path,
    card: Mapping[str, Any],
    module: nn.Module,
    *,
    novelty: Novelty | None = None,
    reliability: tuple[np.ndarray, np.ndarray] | None = None,
) -> dict[str, Any]:
    """Write ``best.safetensors`` and ``head.json``, each whole or not at all.

    Args:
        folder: Run folder.
        card: What ``head.json`` says besides the digest of the weights.
        module: Of ``models.feature_heads``.
        novelty: Of the training cases.
        reliability: Probabilities and labels (N, C) of the validation cases.

    Returns:
        The card as written.
    """
    tensors = head_tensors(module)
    for name, array in (novelty.tensors() if novelty is not None else {}).items():
        tensors[f"novelty.{name}"] = torch.from_numpy(np.ascontiguousarray(array))
    for name, array in zip(("p", "y"), reliability or (), strict=False):
        tensors[f"reliability.{name}"] = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
    digest = write_tensors(folder / HEAD_WEIGHTS, tensors)
    written = {**card, "sha256": digest}
    write_json(folder / HEAD_CARD, written)
    return written


def head_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a head as they are stored."""
    return {f"head.{name}": value.detach().cpu().contiguous() for name, value in module.state_dict().items()}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a safetensors file whole or not at all; its SHA-256."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    with atomic_path(path) as temporary, say_disk_errors(path, size):
        save_file(dict(tensors), temporary, metadata={"format": "pt"})
        return file_digest(temporary)


def load_head(folder: Path) -> Head:
    """Read the head of a run.

    Raises:
        CheckpointError: Card or weights missing, damaged, altered, or not of one make.
    """
    card = read_head_card(folder)
    absent = [key for key in _NEEDED if key not in card]
    if absent:
        raise _refused(folder / HEAD_CARD, f"without {', '.join(absent)}")
    path = folder / HEAD_WEIGHTS
    tensors = read_weights(path)
    if file_digest(path) != card["sha256"]:
        raise _refused(path, f"not the weights of SHA-256 {str(card['sha256'])[:16]}… that the card describes")
    reliability = None
    if "reliability.p" in tensors and "reliability.y" in tensors:
        reliability = (tensors["reliability.p"].numpy(), tensors["reliability.y"].numpy())
    stored = _with_prefix(tensors, "novelty.")
    novelty = Novelty.from_tensors({name: tensor.numpy() for name, tensor in stored.items()}) if stored else None
    return Head(folder, card, _module(card, _with_prefix(tensors, "head."), path), novelty, reliability)


def open_head(
    found: FoundModel,
    device: torch.device,
    cache: FeatureCache | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> tuple[Head, Embedder]:
    """The head of a found model, and its backbone with the settings of extraction that it was trained with.

    Args:
        found: With ``head``.
        device: Of both.
        cache: Of slice vectors.
        overrides: ``batch_size`` and ``digest`` of the embedder, which change no number.

    Raises:
        CheckpointError: The head cannot be read, or the backbone is another than its own.
    """
    if found.head is None:
        raise ValueError("the model has no head")
    head = load_head(found.head)
    backbone = open_backbone(found, device)
    return head.to(device), embedder_of(head.card["preprocessing"], backbone, cache, **(overrides or {}))


def _module(card: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> nn.Module:
    """The network of a card with its tensors, all of them and no others."""
    width, outputs = int(card["input_width"]), int(card["outputs"])
    try:
        module: nn.Module
        if card["kind"] == "knn":
            module = NeighbourHead(
                tensors["rows_MP"], tensors["targets_MC"], int(card["knn_k"]), form_of(str(card["task"]))
            )
        else:
            module = build_head(card["kind"], width, outputs, hidden_dim=int(card["hidden_dim"]), dropout=0.0)
        module.load_state_dict(dict(tensors), strict=True)
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise _refused(path, " ".join(str(error).split())[:300]) from error
    return module.requires_grad_(False).eval()


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _refused(path: Path, detail: str) -> CheckpointError:
    return CheckpointError(
        "The head cannot be loaded.",
        where=f"{hide_home(str(path))}: {detail}",
        fix="copy the whole run folder again, or train the head again",
        code="head_rejected",
    )
