"""The training loop: fit -> step -> forward and backward, for anything that keeps the Objective protocol.

A step is one optimizer update. All that is random in it is seeded by (run, step, micro-batch, process), and the
loader starts at the sample position of a step, so the state of a run is its tensors and its step number. Nothing
non-finite reaches the parameters: losses, gradient norms and input images are checked together, with one copy to the
host a step, before the update. Several processes exchange one small tensor a step, which carries the means of the
losses, whether any of them met such a value, and whether any of them was asked to stop.
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
from itertools import repeat
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from medssl_cli.core.errors import Interrupted, NonFiniteError, ResourceError
from medssl_cli.core.protocols import Loaded, Objective
from medssl_cli.core.run import seed_for
from medssl_cli.engine.checkpoint import Checkpoint, Checkpoints, Stateful, restore
from medssl_cli.engine.distributed import (
    Alone,
    Parallel,
    Sharded,
    barrier,
    from_first,
    gather,
    rank,
    sum_over_processes,
    world_size,
)
from medssl_cli.engine.memory import KeyNames, first_samples, is_out_of_memory, out_of_memory_error
from medssl_cli.engine.optim import (
    BACKBONE,
    ClipMode,
    apply_schedule,
    clip_gradients,
    first_bad_gradient,
    set_frozen,
)
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
        views: (loaded batch on the device, step, micro-batch) -> the batch that the objective takes, which has
            ``finite_samples`` too; draws from its own generators.
        total_steps: Length of the run.
        device: Where to compute.
        precision: Number format.
        accumulation: Micro-batches of one update; losses are averaged over them.
        clip_grad: Largest gradient norm, of what ``clip_mode`` says; 0 for none.
        clip_mode: Clip each sub-module or each tensor by its own norm.
        seed: Of the run.
        checkpoints: Where to save; None writes nothing. Of whole tensors only the first process writes, of sharded ones
            each its pieces.
        checkpoint_every: Steps between checkpoints; 0 saves at the end only.
        evaluate_every: Steps between evaluations, each of which has a checkpoint too; 0 for none.
        telemetry: Log; None writes nothing.
        on_checkpoint: Called with the step after each checkpoint, e.g. to evaluate the teacher; in every process, and
            all wait until the slowest has returned.
        parallel: How the gradients of several processes become one; None for a process that trains alone.
        keys: What the keys of the run are called, for advice.
    """

    objective: TrainableObjective
    optimizer: torch.optim.Optimizer
    schedules: ScheduleValues
    batches: Callable[[int], Iterator[Loaded]]
    views: Callable[[Any, int, int], Any]
    total_steps: int
    device: torch.device
    precision: Precision
    accumulation: int = 1
    clip_grad: float = 3.0
    clip_mode: ClipMode = "module"
    seed: int = 0
    checkpoints: Checkpoints | None = None
    checkpoint_every: int = 0
    evaluate_every: int = 0
    telemetry: Telemetry | None = None
    on_checkpoint: Callable[[int], None] | None = None
    parallel: Parallel | None = None
    keys: KeyNames = field(default_factory=KeyNames)
    steps_done: int = field(default=0, init=False)
    _telemetry_state: dict[str, Any] = field(default_factory=dict, init=False)
    _slices: Loaded | None = field(default=None, init=False)
    _stop: StopSignal | None = field(default=None, init=False)
    _stop_agreed: bool = field(default=False, init=False)

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
            with StopSignal() as stop, self.say_out_of_memory():
                if self.steps_done and self._is_due():
                    self._tell_checkpoint()  # a kill may have come between the save and this call
                return self._loop(self.total_steps, stop)
        finally:
            if self.telemetry is not None:
                self.telemetry.close()

    def measure(self, steps: int) -> FitResult:
        """Run ``steps`` updates for their speed and memory; writes nothing and leaves the parameters changed."""
        quiet = replace(self, checkpoints=None, telemetry=None, on_checkpoint=None)
        quiet.steps_done = self.steps_done
        with self.say_out_of_memory():
            return quiet._loop(self.steps_done + steps, None)

    def step(self, source: Iterator[Loaded]) -> StepRecord:
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
        evidence.norms = clip_gradients(modules, self.clip_grad, mode=self.clip_mode)
        updated = self._update(evidence, modules, values)
        self.steps_done += 1
        return StepRecord(
            step=self.steps_done,
            values=values,
            losses=evidence.mean_losses(),
            gradient_norms=evidence.norm_values(),
            images=images * world_size(),
            seconds=time.perf_counter() - started,
            data_seconds=waited,
            loss_scale_skipped=not updated,
        )

    # --- inside a step ---

    def _fetch(self, source: Iterator[Loaded]) -> Loaded:
        slices = next(source, None)
        if slices is None:
            raise ValueError(f"the batches ended in step {self.steps_done + 1} of {self.total_steps}")
        self._slices = slices
        return slices

    def _prepare(self, modules: Mapping[str, nn.Module], values: Mapping[str, float]) -> None:
        if BACKBONE in modules:
            set_frozen(modules[BACKBONE], self.optimizer, bool(values.get("backbone_frozen", 0.0)))
        apply_schedule(self.optimizer, values)
        self.optimizer.zero_grad(set_to_none=True)

    def _forward_backward(self, slices: Loaded, micro: int, values: Mapping[str, float], evidence: _Evidence) -> None:
        torch.manual_seed(seed_for(self.seed, "step", self.steps_done, micro, rank()))
        slices = slices.to(self.device)
        batch = self.views(slices, self.steps_done, micro)
        parallel = self.parallel or Alone(self.objective)
        with parallel.synchronising(last=micro == self.accumulation - 1):
            with self.precision.autocast():
                losses = parallel.losses(batch, values)
            evidence.add(losses, slices.finite_samples() & batch.finite_samples(), slices.case_ids)
            self.precision.backward(torch.stack(list(losses.values())).sum() / self.accumulation)

    def _update(self, evidence: _Evidence, modules: Mapping[str, nn.Module], values: Mapping[str, float]) -> bool:
        """Apply the gradients if all is finite; False if fp16 overflowed and the step was skipped."""
        fault = evidence.fault(self._told())
        self._stop_agreed = evidence.stop_asked
        overflow = fault == "gradient" and self.precision.scales_loss
        overflow = overflow and self.precision.skipped_in_a_row < self.precision.overflow_limit - 1
        if fault is not None and not overflow:
            raise self._refusal(fault, evidence, modules)
        if overflow:
            self.precision.skip()
        else:
            self.precision.step(self.optimizer)
        self.objective.after_step(values)  # also without an update, as in DINOv2: the batch must not count in the next
        return not overflow

    def _refusal(self, fault: str, evidence: _Evidence, modules: Mapping[str, nn.Module]) -> NonFiniteError:
        """The fault in words, in every process: one that met none tells what another one met."""
        if fault == "gradient":  # the same in all, so that any of their images may be the cause
            evidence.gather_cases()
        own = None if fault == "elsewhere" else evidence.error(modules, self._last_good(), self.keys.not_finite)
        known = [found for found in gather(own) if found is not None]
        if fault == "gradient":  # a process that holds another piece of the parameter cannot name it
            return min(known, key=lambda found: _NO_PARAMETER in found.what)
        if own is not None:
            return own
        order = ("non_finite_image", "non_finite_loss")
        found = min(known, key=lambda found: order.index(found.code))
        what = f"Another process met a non-finite value in step {evidence.step}: {found.what}"
        return NonFiniteError(what, where=found.where, fix=found.fix, code=found.code)

    # --- around the steps ---

    def _loop(self, last_step: int, stop: StopSignal | None) -> FitResult:
        started = time.perf_counter()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._stop, self._stop_agreed = stop, False
        seconds: list[float] = []
        last: StepRecord | None = None
        source = self.batches(self.steps_done)
        while self.steps_done < last_step:
            record = self._step_unless_stopped(source)
            if record is not None:
                last = record
                seconds.append(record.seconds)
                if self.telemetry is not None:
                    self.telemetry.record(record, self.objective.health, self._last_good)
            stopping = self._told() if world_size() == 1 else self._stop_agreed
            if self._is_due() or stopping:
                self._save()
            if stopping and self.steps_done < last_step:
                raise self._interrupted("" if stop is None else stop.received)
            if self._is_due():
                self._tell_checkpoint()
        return FitResult(
            steps=self.steps_done,
            last_losses={} if last is None else dict(last.losses),
            seconds=time.perf_counter() - started,
            images_per_s=0.0 if last is None else last.images / max(_median_after_first(seconds), 1e-9),
            peak_memory_gib=peak_memory_gib(self.device),
        )

    def _step_unless_stopped(self, source: Iterator[Loaded]) -> StepRecord | None:
        """One update; None if the loader's workers obeyed the same signal, so that nothing was updated."""
        try:
            return self.step(source)
        except ResourceError as error:
            if self._told() and world_size() == 1 and error.code.startswith("loader_"):
                return None
            raise

    def _told(self) -> bool:
        return self._stop is not None and self._stop.received is not None

    def _tell_checkpoint(self) -> None:
        if self.on_checkpoint is not None:
            self.on_checkpoint(self.steps_done)
        barrier()

    def _is_due(self) -> bool:
        periods = (self.checkpoint_every, self.evaluate_every)
        return self.steps_done == self.total_steps or any(every and self.steps_done % every == 0 for every in periods)

    def _save(self) -> None:
        lines = {} if self.telemetry is None else self.telemetry.checkpoint()

        def write() -> Path | None:
            if self.checkpoints is None:
                return None
            state = self.precision.state_dict()
            return self.checkpoints.save(self.steps_done, self.objective, self.optimizer, state, lines)

        path = write() if isinstance(self.parallel, Sharded) else from_first(write)
        if path is not None:
            log.info("Saved %s", path)

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
    def say_out_of_memory(self) -> Iterator[None]:
        """Around steps: say that memory ran out, and which batch would fit.

        Raises:
            ResourceError: In place of what an allocator raised.
        """
        try:
            yield
        except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
            if not is_out_of_memory(error):
                raise
            raise self._out_of_memory(error) from error

    def _out_of_memory(self, error: BaseException) -> ResourceError:
        """The error with advice from steps with fewer samples; of several processes none can probe by itself."""
        slices, parameters = self._slices, 0
        first = not self.optimizer.state or self.steps_done == 0  # it has no moments yet, or not all
        if first:
            parameters = sum(p.numel() for group in self.optimizer.param_groups for p in group["params"])
        probe = None
        if slices is not None and world_size() == 1:

            def probe(samples: int) -> None:
                if first:  # else the second probe would hold the moments that ``extra_bytes`` counts
                    self.optimizer.state.clear()
                self.step(repeat(first_samples(slices, samples)))

        return out_of_memory_error(
            error,
            self.device,
            step=self.steps_done + 1,
            batch=0 if slices is None else len(slices.images_BSHW),
            accumulation=self.accumulation,
            probe=probe,
            extra_bytes=8 * parameters,
            keys=self.keys,
        )


# --- non-finite values -----------------------------------------------------------------------------------------------


_NO_PARAMETER = "none by itself, only their norm"


class _Evidence:
    """All numbers of one step that must be finite; they stay on the device until ``fault`` copies them once."""

    def __init__(self, step: int, micro_batches: int) -> None:
        self.step, self.micro_batches = step, micro_batches
        self.norms: dict[str, Tensor] = {}
        self._losses: list[dict[str, Tensor]] = []
        self._finite: list[Tensor] = []
        self._cases: list[list[str]] = []
        self._numbers: list[float] = []
        self._shared: list[float] = []

    def add(self, losses: Mapping[str, Tensor], finite_B: Tensor, case_ids: Sequence[str]) -> None:
        """Take note of one micro-batch."""
        self._losses.append({name: value.detach() for name, value in losses.items()})
        self._finite.append(finite_B)
        self._cases.append(list(case_ids) or [f"sample {i}" for i in range(len(finite_B))])

    def fault(self, stop_here: bool = False) -> str | None:
        """``image``, ``loss``, ``elsewhere`` (one of these in another process), ``gradient`` or None.

        The one wait for the device, and for the other processes.

        Args:
            stop_here: This process was asked to stop; ``stop_asked`` is then true in all of them.
        """
        losses_T = torch.stack([value.float() for terms in self._losses for value in terms.values()])
        flags = [finite_B.float() for finite_B in self._finite]
        own = torch.cat([losses_T, *(norm.float()[None] for norm in self.norms.values()), *flags])
        if world_size() == 1:
            self._numbers, self._shared = own.tolist(), [0.0, float(stop_here)]
        else:
            bad = 1.0 - torch.cat([losses_T.isfinite().float(), *flags]).amin()
            stop = torch.full_like(bad, float(stop_here))
            together = sum_over_processes(torch.cat([torch.stack([bad, stop]), losses_T]))
            numbers = torch.cat([own, together]).tolist()
            self._numbers, self._shared = numbers[: len(own)], numbers[len(own) :]
        if self._bad_cases():
            return "image"
        if self._bad_term():
            return "loss"
        if self._shared[0]:
            return "elsewhere"
        return "gradient" if self._bad_modules() else None

    @property
    def stop_asked(self) -> bool:
        """Any process was asked to stop."""
        return bool(self._shared[1])

    def gather_cases(self) -> None:
        """Count the cases of all processes as those of this one."""
        self._cases = [case for each in gather(self._cases) for case in each]

    def mean_losses(self) -> dict[str, float]:
        """Each term, averaged over the micro-batches and the processes."""
        totals: dict[str, float] = {}
        for _, name, value in self._terms(everywhere=True):
            totals[name] = totals.get(name, 0.0) + value / self.micro_batches
        return totals

    def norm_values(self) -> dict[str, float]:
        """Gradient norm of each sub-module."""
        first = sum(len(terms) for terms in self._losses)
        return dict(zip(self.norms, self._numbers[first : first + len(self.norms)], strict=True))

    def error(self, modules: Mapping[str, nn.Module], last_good: str, fix: str) -> NonFiniteError:
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
            parameter = first_bad_gradient(modules[name]) or _NO_PARAMETER
            what = f"The gradient of {name} became non-finite in step {self.step}; first parameter: {parameter}."
        where = [f"step {self.step}; cases: {', '.join(case for micro in cases for case in micro)}"]
        where += [f"cases whose own image is not finite: {', '.join(bad_cases)}"] if bad_cases else []
        where += [f"loss terms not finite: {term[1]}"] if bad_cases and term is not None else []
        return NonFiniteError(
            what,
            where="\n".join([*where, last_good]),
            fix=f"look at these cases with `medssl check-data`; {fix}; nothing was updated in this step",
            code=code,
        )

    def _terms(self, *, everywhere: bool = False) -> Iterator[tuple[int, str, float]]:
        """(micro-batch, name, value) of this process, or the mean over all."""
        shared = everywhere and world_size() > 1
        numbers = iter([value / world_size() for value in self._shared[2:]] if shared else self._numbers)
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


def _median_after_first(seconds: Sequence[float]) -> float:
    counted = sorted(seconds[1:] or seconds)
    return counted[len(counted) // 2]
