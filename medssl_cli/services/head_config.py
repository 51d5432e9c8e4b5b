"""Settings of `medssl train-head`, and which of them a task and a kind of head can use."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, field_validator

from medssl_cli.core.config import Config
from medssl_cli.core.errors import ConfigError
from medssl_cli.models.feature_heads import HeadKind
from medssl_cli.services.embedding import ExtractConfig

Task = Literal["binary", "multiclass", "multilabel", "regression"]
Selection = Literal["auroc", "loss", "mcc"]

_RULE = re.compile(r"youden|f1|mcc|(sensitivity|specificity|fixed)=(0?\.\d+|0|1|1\.0*|0\.\d+)")


class HeadConfig(Config):
    """A head on the vectors of a frozen backbone."""

    head: HeadKind | None = None
    """logistic, linear, mlp, attention_mil or knn; null: logistic, for regression linear."""
    hidden_dim: int = 256
    """Hidden width of an MLP (0: one linear layer without LayerNorm), or of the gates of attention."""
    dropout: float = Field(default=0.2, ge=0, lt=1)
    """Share of hidden units left out in training."""
    epochs: PositiveInt = 20
    """Passes over the training cases."""
    batch_size: PositiveInt = 64
    """Cases (slices of a slice head) of one optimizer step."""
    lr: float = Field(default=1e-3, gt=0)
    """Learning rate of AdamW."""
    weight_decay: NonNegativeFloat = 1e-2
    """Weight decay of AdamW; biases and norms have none."""
    patience: NonNegativeInt = 0
    """Stop after so many epochs without a better validation score; 0 never stops early."""
    c_values: int = Field(default=45, ge=1, le=45)
    """Values of C, log-spaced from 1e-6 to 1e5, among which logistic regression chooses on the validation cases; 1
    takes C = 1."""
    refit: bool = False
    """Fit the logistic head to training and validation cases together once C and thresholds are chosen; it is then not
    calibrated."""
    knn_k: PositiveInt = 20
    """Neighbours that vote."""
    class_weights: Literal["balanced", "none"] | None = None
    """balanced: a positive weighs negatives / positives, exclusive classes weigh inversely to their number; null:
    balanced for linear, mlp and attention_mil, none for logistic."""
    max_pos_weight: float = Field(default=100.0, ge=1)
    """Highest weight of a class; the lowest is 0.01."""
    pool: Literal["mean", "meanmax", "attention"] | None = None
    """How slices become one vector: their mean, mean and maximum end to end, or learned attention (head=attention_mil);
    null: as the features are, and the mean of features stored by slice."""
    level: Literal["case", "slice"] = "case"
    """slice: train on single slices; a case is then judged by case_rule."""
    case_rule: Literal["max", "mean"] = "max"
    """Of a slice head: the highest logit of the slices is the case's, or their mean."""
    calibration: Literal["temperature", "platt", "none"] | None = None
    """Fitted on the validation cases: one scale of the logits, scale and shift (platt), or none; null: temperature, and
    platt where classes are weighted, for weights shift the logits."""
    threshold_rule: str = "youden"
    """Chooses thresholds on the validation cases: youden, f1, mcc, sensitivity=0.9, specificity=0.9, or fixed=0.5 which
    needs none."""
    selection: Literal["auto", "auroc", "loss", "mcc"] = "auto"
    """What chooses the epoch or C on the validation cases, fixed before training; auto: macro AUROC if any validation
    class has both values, else loss."""
    val_ratio: float = Field(default=0.2, ge=0, lt=1)
    """Share of the patients held back for validation where the data name no validation part; 0: none."""
    positive: str = ""
    """Binary task: the value of the target that counts as positive; default: the second in sorted order."""
    percentage_labels: float = Field(default=1.0, gt=0, le=1)
    """Share of the training patients whose labels are used, drawn by class: few-shot learning."""
    repeats: PositiveInt = 1
    """Draws of these patients (and starts of the head); the best one by the validation score is kept."""
    extract: ExtractConfig = ExtractConfig()
    """How vectors are made of raw data, as in `medssl extract`; for data that are features it has no effect."""
    seed: NonNegativeInt = 42
    """Of every draw; two runs with one seed give the same head."""

    @field_validator("hidden_dim")
    @classmethod
    def _no_negative_width(cls, value: int) -> int:
        if value < 0:
            raise ValueError("a width is not negative; 0 is one linear layer, as head=linear")
        return value

    @field_validator("threshold_rule", mode="before")
    @classmethod
    def _known_rule(cls, value: Any) -> Any:
        text = str(value).replace(" ", "")
        if not _RULE.fullmatch(text):
            raise ValueError("one of youden, f1, mcc, sensitivity=0.9, specificity=0.9, fixed=0.5")
        return text

    @field_validator("positive", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:  # YAML reads 1 and yes as something else
        return {True: "true", False: "false"}[value] if isinstance(value, bool) else str(value)

    def kind(self, task: Task) -> HeadKind:
        """The head to train: as named, by ``pool: attention``, or by the task."""
        if self.head is not None:
            return "linear" if self.head == "mlp" and self.hidden_dim == 0 else self.head
        if self.pool == "attention":
            return "attention_mil"
        return "linear" if task == "regression" else "logistic"

    def weights_classes(self, task: Task) -> bool:
        """Whether rare classes weigh more in training."""
        if self.class_weights is not None:
            return self.class_weights == "balanced"
        return task != "regression" and self.kind(task) in ("linear", "mlp", "attention_mil")


_STEPWISE = ("linear", "mlp", "attention_mil")
_OF_KINDS: dict[str, tuple[str, ...]] = {
    "hidden_dim": ("mlp", "attention_mil"),
    "dropout": ("mlp", "attention_mil"),
    **dict.fromkeys(("epochs", "batch_size", "lr", "weight_decay", "patience"), _STEPWISE),
    "c_values": ("logistic",),
    "refit": ("logistic",),
    "knn_k": ("knn",),
    "class_weights": ("logistic", *_STEPWISE),
    "max_pos_weight": ("logistic", *_STEPWISE),
}
_OF_TASKS: dict[str, tuple[str, ...]] = {
    "positive": ("binary",),
    "threshold_rule": ("binary", "multilabel"),
    **dict.fromkeys(("calibration", "class_weights", "max_pos_weight"), ("binary", "multiclass", "multilabel")),
}


def check_head_config(config: HeadConfig, task: Task) -> None:
    """Refuse keys that contradict each other, or that would have no effect; all of them at once.

    Raises:
        ConfigError: With each fault.
    """
    faults = [*_without_effect(config, task), *_contradictions(config, task)]
    if faults:
        raise ConfigError(
            f"{'One key does' if len(faults) == 1 else f'{len(faults)} keys do'} not fit this task and head.",
            where="\n".join(faults),
            fix="leave them out or change them; nothing was written",
            code="config_invalid",
        )


def _without_effect(config: HeadConfig, task: Task) -> Iterator[str]:
    kind, given = config.kind(task), config.model_fields_set
    for key in sorted(given):
        if key == "hidden_dim" and config.head == "mlp":  # 0 made it a linear head
            continue
        if kind not in _OF_KINDS.get(key, (kind,)):
            yield f"{key}: a {kind} head does not use it; it is for {', '.join(_OF_KINDS[key])}"
        elif task not in _OF_TASKS.get(key, (task,)):
            yield f"{key}: {task} does not use it; it is for {', '.join(_OF_TASKS[key])}"
    if "max_pos_weight" in given and not config.weights_classes(task) and task != "regression" and kind != "knn":
        yield "max_pos_weight: classes are not weighted; add class_weights=balanced"
    if "case_rule" in given and config.level != "slice":
        yield "case_rule: for slice heads; add level=slice"
    if config.repeats > 1 and config.percentage_labels == 1 and kind in ("logistic", "knn"):
        yield f"repeats: a {kind} head on all labels is the same each time; add percentage_labels=0.1"


def _contradictions(config: HeadConfig, task: Task) -> Iterator[str]:
    kind = config.kind(task)
    if kind == "attention_mil" and config.hidden_dim == 0:
        yield "hidden_dim: the gates of attention need a width; pass hidden_dim=256"
    if kind == "attention_mil" and config.level == "slice":
        yield "level: attention looks at all slices of a case; leave level=slice out"
    if (config.pool == "attention") != (kind == "attention_mil") and config.pool is not None:
        yield f"pool: {config.pool} does not fit head={kind}; attention goes with attention_mil alone"
    if config.level == "slice" and config.pool is not None:
        yield "pool: a slice head sees single slices; leave pool out"
    if config.level == "slice" and task not in ("binary", "multilabel"):
        yield f"level: a slice head tells of findings that a slice has or has not; {task} needs level=case"
    if task == "regression" and kind == "logistic":
        yield "head: logistic regression tells classes; pass head=linear, mlp, attention_mil or knn"
    if task == "regression" and config.selection not in ("auto", "loss"):
        yield f"selection: {config.selection} is for classes; regression selects by loss"
    if config.refit and config.calibration not in (None, "none"):
        yield "calibration: with refit the head has seen the validation cases; pass calibration=none"
