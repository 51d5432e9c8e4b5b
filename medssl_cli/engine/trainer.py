"""The training loop: fit -> step -> forward and backward, for anything that keeps the Objective protocol.

A step is one optimizer update. All that is random in it is seeded by (run, step, micro-batch, process), and the
loader starts at the sample position of a step, so the state of a run is its tensors and its step number. Nothing
non-finite reaches the parameters: losses, gradient norms and input images are checked together, with one copy to the
host a step, before the update.
"""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import FrameType, TracebackType
from typing import Any, Protocol

import torch
import torch.distributed
from torch import Tensor, nn

from medssl_cli.core.errors import Interrupted, NonFiniteError, ResourceError
from medssl_cli.core.protocols import Batch, Objective, SliceBatch
from medssl_cli.core.run import seed_for
from medssl_cli.engine.checkpoint import Checkpoint, Checkpoints, Stateful, restore
from medssl_cli.engine.optim import BACKBONE, apply_schedule, clip_gradients, first_bad_gradient, set_frozen
from medssl_cli.engine.precision import Precision
from medssl_cli.engine.telemetry import StepRecord, Telemetry, peak_memory_gib

log = logging.getLogger(__name__)


class TrainableObjective(Objective, Stateful, Protocol):
    """An Objective whose tensors can be saved; every Objective that is an ``nn.Module`` is one."""


class ScheduleValues(Protocol):
    """Values that depend on the step alone."""

    def at(self, step: int) -> dict[str, float]:
        """Values of the update with this index, counted from 0."""


@dataclass(frozen=True)
class FitResult:
    """What a call of ``fit`` or ``measure`` did.

    Args:
        steps: Updates done since the beginning of the run.
        last_losses: Terms of the last update; empty if there was none.
        seconds: Wall time of this call.
        images_per_s: Images of an update over the median time of an update, the first one left out.
        peak_memory_gib: Largest memory of the device, or of the process on the CPU.
    """

    steps: int
    last_losses: dict[str, float]
    seconds: float
    images_per_s: float
    peak_memory_gib: float


@dataclass
class Trainer:
    """Trains one objective.

    Args:
        objective: What is trained; already on ``device``.
        optimizer: Over the objective's parameters, from ``parameter_groups``.
        schedules: Values of a step.
        batches: Step -> endless iterator over the micro-batches from that step on, ``accumulation`` for each step.
        views: (slices on the device, step, micro-batch) -> crops and masks; draws from its own generators.
        total_steps: Length of the run.
        device: Where to compute.
        precision: Number format.
        accumulation: Micro-batches of one update; losses are averaged over them.
        clip_grad: Largest gradient norm of each sub-module; 0 for none.
        seed: Of the run.
        checkpoints: Where to save; None writes nothing. Only the first process writes.
        checkpoint_every: Steps between checkpoints; 0 saves at the end only.
        telemetry: Log; None writes nothing.
        on_checkpoint: Called with the step after each checkpoint, e.g. to evaluate the teacher.
    """

    objective: TrainableObjective
    optimizer: torch.optim.Optimizer
    schedules: ScheduleValues
    batches: Callable[[int], Iterator[SliceBatch]]
    views: Callable[[SliceBatch, int, int], Batch]
    total_steps: int
    device: torch.device
    precision: Precision
    accumulation: int = 1
    clip_grad: float = 3.0
    seed: int = 0
    checkpoints: Checkpoints | None = None
    checkpoint_every: int = 0
    telemetry: Telemetry | None = None
    on_checkpoint: Callable[[int], None] | None = None
    steps_done: int = field(default=0, init=False)
    _telemetry_state: dict[str, Any] = field(default_factory=dict, init=False)

    def restore(self, checkpoint: Checkpoint) -> int:
        """Take up the run where the checkpoint left it; gives the steps done."""
        names = None if self.checkpoints is None else self.checkpoints.sequence_names
        self.steps_done = restore(checkpoint, self.objective, self.optimizer, sequence_names=names)
        self.precision.load_state_dict(checkpoint.precision)
        self._telemetry_state = checkpoint.telemetry
        return self.steps_done

    def fit(self) -> FitResult:
        """Train up to ``total_steps``, saving on the way.

        Raises:
            NonFiniteError: A loss, gradient or image is not finite; the parameters are those before the step.
            Interrupted: SIGTERM, SIGUSR1 or SIGINT came; the state is saved.
            ResourceError: A loader worker died or is stuck, the device's memory or the disk is full.
        """
        if self.telemetry is not None:
            self.telemetry.start(self.steps_done, self._telemetry_state)
        try:
            with StopSignal() as stop, self._say_out_of_memory():
                if self.steps_done and self._is_due() and self.on_checkpoint is not None:
                    self.on_checkpoint(self.steps_done)  # a kill may have come between the save and this call
                return self._loop(self.total_steps, stop)
        finally:
            if self.telemetry is not None:
                self.telemetry.close()

    def measure(self, steps: int) -> FitResult:
        """Run ``steps`` updates for their speed and memory; writes nothing and leaves the parameters changed."""
        quiet = replace(self, checkpoints=None, telemetry=None, on_checkpoint=None)
        quiet.steps_done = self.steps_done
        with self._say_out_of_memory():
            return quiet._loop(self.steps_done + steps, None)

    def step(self, source: Iterator[SliceBatch]) -> StepRecord:
        """One optimizer update from the next micro-batches of ``source``."""
        started, waited = time.perf_counter(), 0.0
        modules = self.objective.trained_modules()
        values = self.schedules.at(self.steps_done)
        self._prepare(modules, values)
        evidence = _Evidence(self.steps_done + 1, self.accumulation)
        images = 0
        for micro in range(self.accumulation):
            asked = time.perf_counter()
            slices = self._fetch(source)
            waited += time.perf_counter() - asked
            images += len(slices.images_BSHW)
            self._forward_backward(slices, micro, values, evidence)
        self.precision.unscale(self.optimizer)
        evidence.norms = clip_gradients(modules, self.clip_grad)
        updated = self._update(evidence, modules, values)
        self.steps_done += 1
        return StepRecord(
            step=self.steps_done,
            values=values,
            losses=evidence.mean_losses(),
            gradient_norms=evidence.norm_values(),
            images=images * _process_count(),
            seconds=time.perf_counter() - started,
            data_seconds=waited,
            loss_scale_skipped=not updated,
        )

    # --- inside a step ---

    def _fetch(self, source: Iterator[SliceBatch]) -> SliceBatch:
        slices = next(source, None)
        if slices is None:
            raise ValueError(f"the batches ended in step {self.steps_done + 1} of {self.total_steps}")
        return slices

    def _prepare(self, modules: Mapping[str, nn.Module], values: Mapping[str, float]) -> None:
        if BACKBONE in modules:
            set_frozen(modules[BACKBONE], self.optimizer, bool(values.get("backbone_frozen", 0.0)))
        apply_schedule(self.optimizer, values)
        self.optimizer.zero_grad(set_to_none=True)

    def _forward_backward(
        self, slices: SliceBatch, micro: int, values: Mapping[str, float], evidence: _Evidence
    ) -> None:
        torch.manual_seed(seed_for(self.seed, "step", self.steps_done, micro, _process_index()))
        slices = slices.to(self.device)
        batch = self.views(slices, self.steps_done, micro)
        with self.precision.autocast():
            losses = self.objective.losses(batch, values)
        evidence.add(losses, _finite_samples(slices, batch), slices.case_ids)
        self.precision.backward(torch.stack(list(losses.values())).sum() / self.accumulation)

    def _update(self, evidence: _Evidence, modules: Mapping[str, nn.Module], values: Mapping[str, float]) -> bool:
        """Apply the gradients if all is finite; False if fp16 overflowed and the step was skipped."""
        fault = evidence.fault()
        overflow = fault == "gradient" and self.precision.scales_loss
        overflow = overflow and self.precision.skipped_in_a_row < self.precision.overflow_limit - 1
        refused = fault is not None and not overflow
        if _any_process(refused, self.device):
            raise evidence.error(modules, self._last_good()) if refused else _elsewhere(evidence.step)
        if overflow:
            self.precision.skip()
        else:
            self.precision.step(self.optimizer)
        self.objective.after_step(values)  # also without an update, as in DINOv2: the batch must not count in the next
        return not overflow

    # --- around the steps ---

    def _loop(self, last_step: int, stop: StopSignal | None) -> FitResult:
        started = time.perf_counter()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        seconds: list[float] = []
        last: StepRecord | None = None
        source = self.batches(self.steps_done)
        while self.steps_done < last_step:
            record = self._step_unless_stopped(source, stop)
            if record is not None:
                last = record
                seconds.append(record.seconds)
                if self.telemetry is not None:
                    self.telemetry.record(record, self.objective.health)
            stopping = stop is not None and _any_process(stop.received is not None, self.device)
            if self._is_due() or stopping:
                self._save()
            if stopping and self.steps_done < last_step:
                raise self._interrupted("" if stop is None else stop.received)
            if self._is_due() and self.on_checkpoint is not None:
                self.on_checkpoint(self.steps_done)
        return FitResult(
            steps=self.steps_done,
            last_losses={} if last is None else dict(last.losses),
            seconds=time.perf_counter() - started,
            images_per_s=0.0 if last is None else last.images / max(_median_after_first(seconds), 1e-9),
            peak_memory_gib=peak_memory_gib(self.device),
        )

    def _step_unless_stopped(self, source: Iterator[SliceBatch], stop: StopSignal | None) -> StepRecord | None:
        """One update; None if the loader's workers obeyed the same signal, so that nothing was updated."""
        try:
            return self.step(source)
        except ResourceError as error:
            told = stop is not None and stop.received is not None and _process_count() == 1
            if told and error.code.startswith("loader_"):
                return None
            raise

    def _is_due(self) -> bool:
        every = self.checkpoint_every
        return self.steps_done == self.total_steps or (every > 0 and self.steps_done % every == 0)

    def _save(self) -> None:
        lines = {} if self.telemetry is None else self.telemetry.checkpoint()
        if self.checkpoints is not None and _process_index() == 0:
            path = self.checkpoints.save(
                self.steps_done, self.objective, self.optimizer, self.precision.state_dict(), lines
            )
            log.info("Saved %s", path)
        if _process_count() > 1:
            torch.distributed.barrier()

    def _interrupted(self, name: str | None) -> Interrupted:
        saved = "the state is saved" if self.checkpoints is not None else "this run saves nothing"
        return Interrupted(
            f"{name or 'A signal to another process'} came after step {self.steps_done}; {saved}.",
            where=self._last_good(),
            fix="run the same command again",
            code="interrupted",
        )

    def _last_good(self) -> str:
        path = None if self.checkpoints is None else self.checkpoints.latest_path()
        return "last good checkpoint: " + ("none was saved yet" if path is None else str(path))

    @contextmanager
    def _say_out_of_memory(self) -> Iterator[None]:
        """Say in three lines that the device ran out of memory."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise ResourceError(
                "The device has not enough memory.",
                where=f"{self.device}, step {self.steps_done + 1}: {str(error).splitlines()[0]}",
                fix="halve train.batch_size_per_gpu (and accumulate), take a smaller backbone, or precision bf16",
                code="out_of_memory",
            ) from error


# --- non-finite values -----------------------------------------------------------------------------------------------


class _Evidence:
    """All numbers of one step that must be finite; they stay on the device until ``fault`` copies them once."""

    def __init__(self, step: int, micro_batches: int) -> None:
        self.step, self.micro_batches = step, micro_batches
        self.norms: dict[str, Tensor] = {}
        self._losses: list[dict[str, Tensor]] = []
        self._finite: list[Tensor] = []
        self._cases: list[list[str]] = []
        self._numbers: list[float] = []

    def add(self, losses: Mapping[str, Tensor], finite_B: Tensor, case_ids: Sequence[str]) -> None:
        """Take note of one micro-batch."""
        self._losses.append({name: value.detach() for name, value in losses.items()})
        self._finite.append(finite_B)
        self._cases.append(list(case_ids) or [f"sample {i}" for i in range(len(finite_B))])

    def fault(self) -> str | None:
        """``image``, ``loss``, ``gradient`` or None; the one wait for the device."""
        losses = [value for terms in self._losses for value in terms.values()]
        scalars = torch.stack([value.float() for value in (*losses, *self.norms.values())])
        self._numbers = torch.cat([scalars, *(flags.float() for flags in self._finite)]).tolist()
        if self._bad_cases():
            return "image"
        if self._bad_term():
            return "loss"
        return "gradient" if self._bad_modules() else None

    def mean_losses(self) -> dict[str, float]:
        """Each term, averaged over the micro-batches."""
        totals: dict[str, float] = {}
        for _, name, value in self._terms():
            totals[name] = totals.get(name, 0.0) + value / self.micro_batches
        return totals

    def norm_values(self) -> dict[str, float]:
        """Gradient norm of each sub-module."""
        first = sum(len(terms) for terms in self._losses)
        return dict(zip(self.norms, self._numbers[first : first + len(self.norms)], strict=True))

    def error(self, modules: Mapping[str, nn.Module], last_good: str) -> NonFiniteError:
        """The fault in words."""
        bad_cases, term, bad_modules = self._bad_cases(), self._bad_term(), self._bad_modules()
        cases = self._cases
        if bad_cases:
            what, code = f"An image of step {self.step} is not finite.", "non_finite_image"
        elif term is not None:
            micro, name, value = term
            what, code = f"The loss term {name} became {value} in step {self.step}.", "non_finite_loss"
            cases = [self._cases[micro]]
        else:
            name, code = bad_modules[0], "non_finite_gradient"
            parameter = first_bad_gradient(modules[name]) or "none by itself, only their norm"
            what = f"The gradient of {name} became non-finite in step {self.step}; first parameter: {parameter}."
        where = [f"step {self.step}; cases: {', '.join(case for micro in cases for case in micro)}"]
        where += [f"cases whose own image is not finite: {', '.join(bad_cases)}"] if bad_cases else []
        where += [f"loss terms not finite: {term[1]}"] if bad_cases and term is not None else []
        return NonFiniteError(
            what,
            where="\n".join([*where, last_good]),
            fix="look at these cases with `medssl check-data`; lower optim.base_lr (3.5e-4 -> 1e-4), raise "
            "optim.warmup_epochs (30 -> 50), keep optim.clip_grad at 3.0; nothing was updated in this step",
            code=code,
        )

    def _terms(self) -> Iterator[tuple[int, str, float]]:
        numbers = iter(self._numbers)
        for micro, terms in enumerate(self._losses):
            for name in terms:
                yield micro, name, next(numbers)

    def _bad_term(self) -> tuple[int, str, float] | None:
        return next((found for found in self._terms() if not math.isfinite(found[2])), None)

    def _bad_modules(self) -> list[str]:
        return [name for name, norm in self.norm_values().items() if not math.isfinite(norm)]

    def _bad_cases(self) -> list[str]:
        flags = self._numbers[len(self._numbers) - sum(len(flags) for flags in self._finite) :]
        names = [case for micro in self._cases for case in micro]
        return [case for case, fine in zip(names, flags, strict=True) if not fine]


def _finite_samples(slices: SliceBatch, batch: Batch) -> Tensor:
    """(B,) bool: the stored slice and all its crops are finite. Crops are view-major: crop v*B + b is of sample b."""
    finite_B = slices.images_BSHW.isfinite().flatten(1).all(1)
    for crops in (batch.global_VSHW, batch.local_VSHW):
        if crops is not None:
            finite_B = finite_B & crops.isfinite().flatten(1).all(1).view(-1, len(finite_B)).all(0)
    return finite_B


def _elsewhere(step: int) -> NonFiniteError:
    return NonFiniteError(
        f"Another process met a non-finite value in step {step}.",
        where="its own message names the term and the cases",
        fix="see the message of that process",
        code="non_finite_elsewhere",
    )


# --- signals ---------------------------------------------------------------------------------------------------------


class StopSignal:
    """Turns SIGTERM, SIGUSR1 and the first SIGINT into a request to stop after the current step.

    A second SIGINT interrupts at once. Outside the main thread, where Python allows no handlers, it does nothing.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGTERM", "SIGUSR1", "SIGINT"):
                number = getattr(signal, name, None)
                if number is not None:
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name
        log.info("%s: saving after this step.", self.received)


# --- processes -------------------------------------------------------------------------------------------------------


def _process_count() -> int:
    return torch.distributed.get_world_size() if _has_peers() else 1


def _process_index() -> int:
    return torch.distributed.get_rank() if _has_peers() else 0


def _has_peers() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _any_process(here: bool, device: torch.device) -> bool:
    """True if it is true in any process, so that all stop at the same step."""
    if _process_count() == 1:
        return here
    flag = torch.tensor([float(here)], device=device)
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
    return bool(flag.item())


def _median_after_first(seconds: Sequence[float]) -> float:
    counted = sorted(seconds[1:] or seconds)
    return counted[len(counted) // 2]
