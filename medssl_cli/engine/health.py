"""Alarms of a run that trains without errors and learns nothing: collapse to one answer, uniform targets, divergence.

The monitor looks at the logged figures alone, waits until a fresh network may be judged, takes medians so that one odd
line alarms nobody, and speaks once until a figure is good again. Its memory is plain data and travels with the
checkpoint, so a resumed run says what an undisturbed one would have said.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt

from medssl_cli.core.config import Config
from medssl_cli.core.errors import MedsslError

if TYPE_CHECKING:
    from typing import TypeGuard

REMEMBERED = 50
"""Alarms kept for the page of the run; the log has them all."""

GRACE_FACTOR = 10
"""A warm-up puts the first judgement off to its end, but by no more than this many times ``after_step``."""


class HealthConfig(Config):
    """When the figures of a run raise an alarm; 0 turns an alarm off."""

    action: Literal["warn", "stop"] = "warn"
    """What a collapse does: one line in the log, or an end of the run with exit code 5 and its checkpoints intact.
    Figures that only look odd are never more than a line."""
    after_step: NonNegativeInt = 200
    """No judgement before this step, nor within the warm-up of the learning rate if that is not over ten times as
    long: a fresh network gives every image nearly the same features."""
    window: PositiveInt = 3
    """Logged lines, at most, whose median counts."""
    teacher_entropy_min: NonNegativeFloat = 0.1
    """Entropy of the teacher's targets divided by ln K, below which they are one-hot: collapse."""
    teacher_entropy_max: NonNegativeFloat = 0.995
    """The same, above which they are uniform and say nothing."""
    effective_rank_min: NonNegativeFloat = 2.0
    """Effective rank of the teacher's cls tokens, below which all images look alike: collapse."""
    dino_agreement_max: NonNegativeFloat = 0.99
    """Share of crops for which student and teacher choose one prototype, above which the task is trivial, looked at
    until `early_steps`."""
    early_steps: NonNegativeInt = 1000
    """Steps within which such agreement comes too early."""
    koleo_max: NonNegativeFloat = 0.0
    """-ln of the distance between nearest neighbours in one view, above which features coincide, e.g. 12."""
    center_norm_max: NonNegativeFloat = 0.0
    """Length of the centre of the teacher's logits, above which it runs away, e.g. 100."""
    loss_jump: NonNegativeFloat = 8.0
    """Rise of the total loss over the median of its last lines, in their typical deviations (1 % of it at least)."""
    grad_norm_jump: NonNegativeFloat = 20.0
    """Ratio of a gradient norm to the median of its last lines."""
    jump_window: PositiveInt = 20
    """Logged lines that a jump is compared with; as many must be there first."""


@dataclass(frozen=True)
class Alarm:
    """A figure that tells of trouble.

    Args:
        name: Of the figure.
        step: At which it was seen.
        value: Median that counted.
        threshold: That it passed.
        side: ``below`` or ``above``.
        meaning: What such a value says.
        fix: What helps.
        is_collapse: Whether nothing is left to learn; only such an alarm may stop the run.
    """

    name: str
    step: int
    value: float
    threshold: float
    side: Literal["below", "above"]
    meaning: str
    fix: str
    is_collapse: bool

    def __str__(self) -> str:
        word = "Collapse?" if self.is_collapse else "Health:"
        return (
            f"{word} {self.name} is {self.value:.3g} at step {self.step}, {self.side} {self.threshold:g}: "
            f"{self.meaning}."
        )


class CollapseError(MedsslError):
    """The run was told to stop when its features collapse, and they did; checkpoints are intact.

    Exit code 5 stands for a run that its own numbers ended; the last good checkpoint is named, as for a loss that is
    not finite.
    """

    exit_code = 5


@dataclass(frozen=True)
class _Limit:
    """One figure with its limit."""

    figure: str
    threshold: float
    side: Literal["below", "above"]
    meaning: str
    fix: str
    is_collapse: bool = False
    last_step: int | None = None


class HealthMonitor:
    """Watches one run.

    Args:
        config: Thresholds.
        warmup_steps: Of the learning rate; see ``HealthConfig.after_step``.
        koleo_weight: Weight of the KoLeo loss, by which the logged term is divided; 0 without it.
    """

    def __init__(self, config: HealthConfig, *, warmup_steps: int = 0, koleo_weight: float = 0.0) -> None:
        self.config, self.koleo_weight = config, koleo_weight
        self.first_step = max(config.after_step, min(warmup_steps, GRACE_FACTOR * config.after_step))
        self._limits = _limits(config)
        self._windows: dict[str, deque[float]] = {}
        self._active: set[str] = set()
        self._told: deque[Alarm] = deque(maxlen=REMEMBERED)

    @property
    def alarms(self) -> list[Alarm]:
        """What was raised so far, the last ones."""
        return list(self._told)

    def check(self, step: int, figures: Mapping[str, float | None]) -> list[Alarm]:
        """Take note of one logged line and give the alarms that are new.

        Args:
            step: Updates done.
            figures: Numbers of the line by name; those that are absent, None or not finite are passed over.
        """
        known = {name: value for name, value in self._figures(figures).items() if _is_number(value)}
        raised = self._check_limits(step, known)
        raised += self._check_jumps(step, known)
        self._told += raised
        return raised

    def refuse(self, alarms: list[Alarm], last_good: str) -> None:
        """Stop the run if it was asked for and one of the alarms is a collapse.

        Args:
            alarms: New ones.
            last_good: Names the last good checkpoint.

        Raises:
            CollapseError: Naming the figure and the last good checkpoint.
        """
        collapse = next((alarm for alarm in alarms if alarm.is_collapse), None)
        if collapse is None or self.config.action != "stop":
            return
        raise CollapseError(
            f"The run was stopped: {collapse.meaning}.",
            where=f"step {collapse.step}: {collapse.name} is {collapse.value:.3g}, {collapse.side} "
            f"{collapse.threshold:g}\n{last_good}",
            fix=f"{collapse.fix}; health.action=warn goes on all the same",
            code="training_collapsed",
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain data: the last figures, the alarms that hold, and those that were raised."""
        return {
            "windows": {name: list(values) for name, values in self._windows.items()},
            "active": sorted(self._active),
            "told": [asdict(alarm) for alarm in self._told],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what ``state_dict`` gave; an empty state starts afresh."""
        self._windows = {
            name: deque(values, maxlen=self._length(name)) for name, values in state.get("windows", {}).items()
        }
        self._active = set(state.get("active", ()))
        self._told = deque((Alarm(**alarm) for alarm in state.get("told", ())), maxlen=REMEMBERED)

    # --- limits ---

    def _figures(self, line: Mapping[str, float | None]) -> dict[str, float | None]:
        found = dict(line)
        koleo = line.get("koleo_loss")
        if self.koleo_weight and _is_number(koleo):
            found["koleo"] = koleo / (2 * self.koleo_weight)  # the term is a sum over two views
        return found

    def _check_limits(self, step: int, figures: Mapping[str, float]) -> list[Alarm]:
        raised = []
        for figure in dict.fromkeys(limit.figure for limit in self._limits):
            if figure in figures and step >= self.first_step:  # figures of a fresh network count for nothing
                self._window(figure).append(figures[figure])
        for limit in self._limits:
            window = self._window(limit.figure)
            name = f"{limit.figure} {limit.side}"
            if limit.figure not in figures or not window:
                continue
            value = median(window)
            bad = value < limit.threshold if limit.side == "below" else value > limit.threshold
            bad = bad and (limit.last_step is None or step <= limit.last_step)
            if bad and name not in self._active:
                raised.append(Alarm(limit.figure, step, value, limit.threshold, limit.side, limit.meaning, limit.fix,
                                    limit.is_collapse))  # fmt: skip
            self._mark(name, bad)
        return raised

    # --- jumps ---

    def _check_jumps(self, step: int, figures: Mapping[str, float]) -> list[Alarm]:
        raised = []
        for figure, value in figures.items():
            is_loss, is_norm = figure == "total_loss", figure.startswith("grad_norm_")
            if not ((is_loss and self.config.loss_jump) or (is_norm and self.config.grad_norm_jump)):
                continue
            window = self._window(figure)
            if step >= self.first_step and len(window) == self.config.jump_window:
                limit = _loss_limit(window, self.config.loss_jump) if is_loss else (
                    median(window) * self.config.grad_norm_jump)  # fmt: skip
                bad = value > limit
                if bad and figure not in self._active:
                    meaning = "the loss has jumped" if is_loss else "the gradients have grown many times over"
                    raised.append(Alarm(figure, step, value, limit, "above", meaning, _DIVERGE_FIX, is_collapse=False))
                self._mark(figure, bad)
            window.append(value)
        return raised

    def _window(self, name: str) -> deque[float]:
        return self._windows.setdefault(name, deque(maxlen=self._length(name)))

    def _length(self, name: str) -> int:
        is_jump = name == "total_loss" or name.startswith("grad_norm_")
        return self.config.jump_window if is_jump else self.config.window

    def _mark(self, name: str, bad: bool) -> None:
        self._active.add(name) if bad else self._active.discard(name)


_COLLAPSE_FIX = (
    "lower optim.base_lr, take train.centering=sinkhorn_knopp or a lower teacher.teacher_temp, and keep "
    "dino.koleo_loss_weight above 0"
)
_UNIFORM_FIX = "lower teacher.teacher_temp and teacher.warmup_teacher_temp, or take train.centering=sinkhorn_knopp"
_TRIVIAL_FIX = "look at the crops (crops.global_crops_scale) and at duplicates in the data with `medssl check-data`"
_DIVERGE_FIX = "lower optim.base_lr, raise optim.warmup_epochs, keep optim.clip_grad at 3.0"


def _limits(config: HealthConfig) -> list[_Limit]:
    every = [
        _Limit("teacher_entropy", config.teacher_entropy_min, "below",
               "the teacher gives every image the same few prototypes", _COLLAPSE_FIX, is_collapse=True),
        _Limit("teacher_entropy", config.teacher_entropy_max, "above",
               "the targets are uniform and say nothing", _UNIFORM_FIX),
        _Limit("effective_rank", config.effective_rank_min, "below",
               "all images have nearly the same features", _COLLAPSE_FIX, is_collapse=True),
        _Limit("dino_agreement", config.dino_agreement_max, "above",
               "student and teacher agree nearly always so early: the task is trivial", _TRIVIAL_FIX,
               last_step=config.early_steps),
        _Limit("koleo", config.koleo_max, "above", "features of different images coincide", _COLLAPSE_FIX),
        _Limit("center_norm", config.center_norm_max, "above", "the centre of the logits runs away", _DIVERGE_FIX),
    ]  # fmt: skip
    return [limit for limit in every if limit.threshold]


def _loss_limit(window: deque[float], deviations: float) -> float:
    middle = median(window)
    spread = 1.4826 * median(abs(value - middle) for value in window)  # of a normal distribution: one deviation
    return middle + deviations * max(spread, 0.01 * abs(middle), 1e-6)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
