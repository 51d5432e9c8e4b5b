"""What a run would take, from a few real steps: time, memory at this and other batches, and what sets the pace.

The steps are the trainer's own and leave its parameters changed, as ``Trainer.measure`` does: a dry run ends there.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import repeat
from typing import TYPE_CHECKING, Any

from medssl_cli.core.protocols import Loaded
from medssl_cli.core.wording import counted
from medssl_cli.engine.distributed import world_size
from medssl_cli.engine.memory import GIB, MARGIN, KeyNames, MemoryReport, first_samples, fit_line, memory_limit, peak_of

if TYPE_CHECKING:
    from medssl_cli.engine.trainer import FitResult, Trainer

TIMED_STEPS = {"cuda": 5, "cpu": 2}
"""Steps whose median counts, after two that warm up: compiled blocks meet a second number of tokens in the second."""

LONG_STEP_SECONDS = 10.0
"""After a first step that takes longer, it is taken for the rest."""

FORESIGHT = 16
"""A line through two small batches is not followed beyond so many times the larger one."""

LOADER_SECONDS = 5.0
"""Time for measuring the loader alone."""


@dataclass(frozen=True)
class Estimate:
    """What a run would take.

    Args:
        step_images_per_s: Images of an update over its median time, all processes together.
        loader_images_per_s: What the loaders alone give, all processes together; None if it was not measured.
        steps: Updates of the whole run.
        samples_per_step: Images of an update, all processes together.
        batch: Samples of a micro-batch.
        memory: Of a step at this batch.
        predicted_gib: Peak at other batches; empty where memory cannot be measured.
        largest_batch: Samples of a micro-batch that should fit; None if it cannot be told.
        cases: Of the whole run.
        cache_bytes: Size of the prepared store of all cases.
        first_losses: Terms of the first step.
        workers: Loader processes, of all processes together.
        workers_key: What sets them.
    """

    step_images_per_s: float
    loader_images_per_s: float | None
    steps: int
    samples_per_step: int
    batch: int
    memory: MemoryReport
    cases: int
    cache_bytes: int
    workers: int
    predicted_gib: dict[int, float] = field(default_factory=dict)
    largest_batch: int | None = None
    first_losses: dict[str, float] = field(default_factory=dict)
    workers_key: str = KeyNames.workers

    @property
    def images_per_s(self) -> float:
        """The slower of step and loader."""
        return min(self.step_images_per_s, self.loader_images_per_s or self.step_images_per_s)

    @property
    def hours(self) -> float:
        """Of the whole run."""
        return self.steps * self.samples_per_step / max(self.images_per_s, 1e-9) / 3600

    @property
    def pace(self) -> str | None:
        """``step`` or ``loader``, whichever is slower; None if the loader was not measured."""
        if self.loader_images_per_s is None:
            return None
        return "loader" if self.loader_images_per_s < self.step_images_per_s else "step"

    def lines(self) -> list[str]:
        """For people."""
        return [
            f"{self.images_per_s:.2f} images/s: {self.steps} steps of {counted(self.samples_per_step, 'sample')} "
            f"take about {self.hours:.2f} h",
            *self._pace_lines(),
            f"memory {self.memory} at batch {self.batch}{self._predictions()}",
            f"cache about {self.cache_bytes / 1e6:.1f} MB for {counted(self.cases, 'case')}",
            f"first loss {sum(self.first_losses.values()):.3f}; nothing was written",
        ]

    def facts(self) -> dict[str, Any]:
        """For ``--json``; None for what could not be measured."""
        return {
            "images_per_s": self.images_per_s,
            "step_images_per_s": self.step_images_per_s,
            "loader_images_per_s": self.loader_images_per_s,
            "pace": self.pace,
            "hours": self.hours,
            "steps": self.steps,
            "samples_per_step": self.samples_per_step,
            "peak_memory_gib": self.memory.peak_gib,
            "memory_limit_gib": self.memory.limit_gib,
            "fits": self.memory.fits,
            "predicted_memory_gib": {str(batch): gib for batch, gib in self.predicted_gib.items()},
            "largest_batch": self.largest_batch,
            "cache_bytes": self.cache_bytes,
            "first_loss": self.first_losses,
        }

    def _pace_lines(self) -> list[str]:
        if self.loader_images_per_s is None:
            return []
        ratio = self.loader_images_per_s / max(self.step_images_per_s, 1e-9)
        alone = f"the loader alone gives {self.loader_images_per_s:.1f} images/s with {self.workers} processes"
        if self.pace == "step":
            return [f"{alone}, {ratio:.1f} times what the step takes: the step sets the pace"]
        return [f"{alone}, {ratio:.2f} of what the step could take: the loader sets the pace; raise {self.workers_key}"]

    def _predictions(self) -> str:
        others = [f"{batch}: {gib:.2f}" for batch, gib in self.predicted_gib.items() if batch != self.batch]
        text = f"; predicted GiB at batch {', '.join(others)}" if others else ""
        return text + (f"; up to batch {self.largest_batch} should fit" if self.largest_batch else "")


def estimate(
    trainer: Trainer,
    *,
    batch: int,
    samples_per_step: int,
    steps: int,
    cases: int,
    cache_bytes: int,
    workers: int = 0,
    prefetch: int = 2,
) -> Estimate:
    """Do a few steps, load a few batches, and say what the whole run would take.

    Args:
        trainer: Built and not yet trained; its parameters are changed.
        batch: Samples of a micro-batch.
        samples_per_step: Images of an update over all micro-batches and processes.
        steps: Updates of the whole run.
        cases: Of the whole run.
        cache_bytes: Size of the prepared store of all cases.
        workers: Loader processes of this process.
        prefetch: Batches that each of them keeps ready.

    Raises:
        ResourceError: The batch does not fit.
    """
    device = trainer.device
    fits: list[FitResult] = []
    peak = peak_of(lambda: fits.extend(_timed(trainer)), device)
    limit = memory_limit(device)
    peaks = {} if peak is None else {batch: peak, **_smaller_peaks(trainer, batch)}
    source = trainer.batches(0)
    try:
        loader_rate = loader_images_per_s(source, skip=1 + workers * prefetch)
    finally:
        _close(source)
    return Estimate(
        step_images_per_s=fits[-1].images_per_s,
        loader_images_per_s=None if loader_rate is None else loader_rate * world_size(),  # all were at it just now
        steps=steps,
        samples_per_step=samples_per_step,
        batch=batch,
        memory=MemoryReport(None if peak is None else peak / GIB, None if limit is None else limit / GIB),
        predicted_gib=_predicted(peaks, batch),
        largest_batch=_largest(peaks, limit),
        cases=cases,
        cache_bytes=cache_bytes,
        workers=workers * world_size(),
        first_losses=fits[0].last_losses,
        workers_key=trainer.keys.workers,
    )


def loader_images_per_s(
    source: Iterator[Loaded], *, skip: int = 1, count: int = 16, seconds: float = LOADER_SECONDS
) -> float | None:
    """Images a second that a loader gives to somebody who does nothing else.

    Args:
        source: Fresh; its first batches are those that its processes fill their queues with.
        skip: Batches that are not counted.
        count: Batches that are.
        seconds: After that long it is stopped with what it has.

    Returns:
        None if not one batch could be counted in time.
    """
    began = time.perf_counter()
    started, images = began, 0
    for number, slices in enumerate(source):
        now = time.perf_counter()
        if number < skip:
            started = now
        else:
            images += len(slices.images_BSHW)
        if number + 1 >= skip + count or (images and now - began > seconds):
            break
    return images / max(time.perf_counter() - started, 1e-9) if images else None


def _timed(trainer: Trainer) -> list[FitResult]:
    """The first step by itself, then those that are timed."""
    kind = trainer.device.type
    first = trainer.measure(1)
    if kind == "cpu" and first.seconds > LONG_STEP_SECONDS:
        return [first]
    return [first, trainer.measure(1 + TIMED_STEPS.get(kind, 2))]  # the first step of a call is not counted


def _smaller_peaks(trainer: Trainer, batch: int) -> dict[int, int]:
    """Peak of a step with half the samples."""
    half = batch // 2
    if half == 0:
        return {}
    source = trainer.batches(0)
    try:
        fewer = first_samples(next(source), half)
    finally:
        _close(source)
    done = trainer.steps_done
    peak = peak_of(lambda: trainer.step(repeat(fewer)), trainer.device)
    trainer.steps_done = done
    return {} if peak is None else {half: peak}


def _predicted(peaks: dict[int, int], batch: int) -> dict[int, float]:
    line = fit_line(peaks)
    if line is None:
        return {}
    asked = sorted({max(1, batch // 2), batch, 2 * batch, 4 * batch})
    return {each: peaks.get(each, line[0] + line[1] * each) / GIB for each in asked}


def _largest(peaks: dict[int, int], limit: int | None) -> int | None:
    line = fit_line(peaks)
    if line is None or limit is None or line[1] == 0:
        return None
    told = max(0, int((limit * (1 - MARGIN) - line[0]) // line[1]))
    return min(told, FORESIGHT * max(peaks))


def _close(source: object) -> None:
    """End the processes of a loader; a plain iterator has none."""
    close = getattr(source, "close", None)
    if close is not None:
        close()
