"""Memory of a step: what it takes, what there is, and the largest batch that would fit.

After an allocation has failed, a step is measured at two smaller batches and a line through both answers what to set.
On a GPU the allocator's peak is measured, on Linux the peak of the process's resident memory, which the kernel lets a
process set back; elsewhere a CPU tells nothing, and nothing is predicted.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import resource
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from medssl_cli.core.errors import ResourceError
from medssl_cli.core.protocols import Loaded

log = logging.getLogger(__name__)
AnyBatch = TypeVar("AnyBatch", bound=Loaded)

GIB = 2**30
MARGIN = 0.05
"""Share of the memory that is left free: blocks of the allocator do not fit into each other without gaps."""

_SAYINGS = (
    "can't allocate memory",  # torch's allocator of the CPU
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "not enough memory",
)

Probe = Callable[[int], object]
"""Does once what takes the memory of a step, with so many samples."""

Measure = Callable[[int], int | None]
"""Samples -> peak in bytes; None if they do not fit, or if it cannot be measured."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that an allocation failed, on a GPU or in main memory.

    A GPU has a class of its own for it; the CPU's allocator and some libraries of CUDA raise a RuntimeError.
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(saying in str(error) for saying in _SAYINGS)


@dataclass(frozen=True)
class MemoryReport:
    """What was taken and what there is.

    Args:
        peak_gib: Largest memory; None where it cannot be measured.
        limit_gib: What the process may take; None where it is not known.
    """

    peak_gib: float | None
    limit_gib: float | None

    @property
    def fits(self) -> bool | None:
        """With the margin; None if it cannot be told."""
        if self.peak_gib is None or self.limit_gib is None:
            return None
        return self.peak_gib <= (1 - MARGIN) * self.limit_gib

    def __str__(self) -> str:
        peak = "unknown" if self.peak_gib is None else f"{self.peak_gib:.2f} GiB"
        return f"peak {peak}" + ("" if self.limit_gib is None else f" of {self.limit_gib:.2f} GiB")


@dataclass(frozen=True)
class KeyNames:
    """What the keys of a run are called, for advice; those of ``medssl pretrain`` by default.

    Args:
        batch: Samples of a micro-batch.
        accumulation: Micro-batches of an update; None for a run that has no such key.
        workers: Loader processes.
        less_memory: What else makes a step smaller, in words.
        not_finite: What to change where a loss or a gradient is not finite, in words.
    """

    batch: str = "train.batch_size_per_gpu"
    accumulation: str | None = "train.grad_accumulation"
    workers: str = "train.num_workers"
    less_memory: str = "student.grad_checkpointing=true, a smaller backbone or precision bf16 need less"
    not_finite: str = (
        "lower optim.base_lr (3.5e-4 -> 1e-4), raise optim.warmup_epochs (30 -> 50), keep optim.clip_grad at 3.0"
    )

    @property
    def halved(self) -> str:
        """How to halve the batch, in words."""
        return f"halve {self.batch}" + (f" and double {self.accumulation}" if self.accumulation else "")


@dataclass(frozen=True)
class BatchAdvice:
    """Batch and accumulation that keep the samples of an update and fit.

    Args:
        batch: Samples of a micro-batch.
        accumulation: Micro-batches of an update.
        report: Predicted at this batch.
    """

    batch: int
    accumulation: int
    report: MemoryReport

    def said(self, keys: KeyNames) -> str:
        """As it is typed."""
        more = f" {keys.accumulation}={self.accumulation}" if keys.accumulation else ""
        return f"{keys.batch}={self.batch}{more}"


# --- prediction ------------------------------------------------------------------------------------------------------


def fit_line(peaks: Mapping[int, int]) -> tuple[float, float] | None:
    """(bytes at no sample, bytes a sample) through the smallest and the largest batch; None from fewer than two."""
    if len(peaks) < 2:
        return None
    low, high = min(peaks), max(peaks)
    slope = max(0.0, (peaks[high] - peaks[low]) / (high - low))
    return peaks[high] - slope * high, slope


def predict(peaks: Mapping[int, int], batch: int) -> int | None:
    """Peak in bytes at another batch, from the measured ones; None if they do not tell."""
    if batch in peaks:
        return peaks[batch]
    line = fit_line(peaks)
    return None if line is None else round(line[0] + line[1] * batch)


def _two_peaks(measure: Measure, failed: int) -> tuple[dict[int, int], int]:
    """Peaks at an eighth and a quarter of a batch, or at fewer where these fail too; and the least that failed."""
    peaks: dict[int, int] = {}
    while len(peaks) < 2:
        low = max(1, failed // 8)
        untried = [batch for batch in (low, max(low + 1, failed // 4)) if batch < failed and batch not in peaks]
        if not untried:
            break
        for batch in untried:
            peak = measure(batch)
            if peak is None:
                failed = batch
                break
            peaks[batch] = peak
    return peaks, failed


def _largest(peaks: Mapping[int, int], failed: int, limit_bytes: int) -> int:
    known = max((batch for batch, peak in peaks.items() if peak <= limit_bytes), default=0)
    line = fit_line(peaks)
    if line is None or line[1] == 0:
        return known
    base, slope = line
    return min(failed - 1, max(known, int((limit_bytes * (1 - MARGIN) - base) // slope)))


def split_batch(samples: int, largest: int) -> tuple[int, int]:
    """(batch, accumulation) whose product is ``samples``, with the largest batch that ``largest`` allows."""
    batch = next(n for n in range(min(samples, largest), 0, -1) if samples % n == 0)
    return batch, samples // batch


# --- measuring -------------------------------------------------------------------------------------------------------


def memory_limit(device: torch.device) -> int | None:
    """Bytes that this process may take: of a GPU what others leave, of main memory also what a container allows."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    own, free = _kernel_figure("/proc/self/status", "VmRSS"), _kernel_figure("/proc/meminfo", "MemAvailable")
    limits: list[int | None] = [_container_limit(), None if own is None or free is None else own + free]
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    space = _kernel_figure("/proc/self/status", "VmSize")
    if soft != resource.RLIM_INFINITY and own is not None and space is not None:
        limits.append(soft - space + own)  # what is mapped and not resident counts there and not in the peak
    found = [limit for limit in limits if limit is not None]
    return min(found) if found else None


def peak_of(run: Callable[[], object], device: torch.device) -> int | None:
    """Largest memory while ``run`` runs, in bytes; None if it does not fit or cannot be measured.

    Raises:
        Exception: Whatever ``run`` raises that is not a failed allocation.
    """
    release(device)
    measurable = _reset_peak(device)
    try:
        run()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        forget_frames(error)
        release(device)
        return None
    return _read_peak(device) if measurable else None


def release(device: torch.device) -> None:
    """Give back what is not in use."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):  # a C library other than GNU's has no such call
            ctypes.CDLL(None).malloc_trim(0)


def forget_frames(error: BaseException) -> None:
    """Let go of the tensors that the frames of an exception hold; those of functions still running stay."""
    if error.__traceback__ is not None:
        traceback.clear_frames(error.__traceback__)


def _reset_peak(device: torch.device) -> bool:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # sets VmHWM back to what is resident now
    except OSError:
        return False
    return True


def _read_peak(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _kernel_figure("/proc/self/status", "VmHWM")


def _kernel_figure(path: str, name: str) -> int | None:
    """Bytes of one line of a file in which Linux tells of memory."""
    try:
        lines = Path(path).read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


def _container_limit() -> int | None:
    """Bytes that the container of this process may take, told by either version of control groups."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError):
            text = Path("/sys/fs/cgroup", name).read_text(encoding="ascii").strip()
            if text.isdigit():  # "max" is no limit
                return int(text)
    return None


def first_samples(slices: AnyBatch, samples: int) -> AnyBatch:
    """A smaller batch of the same shapes, to probe with.

    Raises:
        ValueError: The batch has fewer samples.
    """
    if not 0 < samples <= len(slices.images_BSHW):
        raise ValueError(f"{samples} samples of a batch of {len(slices.images_BSHW)}")
    parts = {each.name: getattr(slices, each.name) for each in fields(cast(Any, slices))}
    return replace(cast(Any, slices), **{name: part[:samples] for name, part in parts.items() if part is not None})


@contextmanager
def saying_out_of_memory(
    device: torch.device,
    less: str = "take a smaller backbone, fewer prototypes or, on several GPUs, compute_precision.parallel=fsdp",
) -> Iterator[None]:
    """Around everything else than steps, which know what would fit: say that memory ran out.

    Args:
        device: Where the run computes.
        less: What makes the run smaller, in words.

    Raises:
        ResourceError: In place of what an allocator raised.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ResourceError(
            "The device has not enough memory." if device.type == "cuda" else "There is not enough memory.",
            where=f"{device}: {next(iter(str(error).splitlines()), type(error).__name__)}",
            fix=f"free memory, or {less}",
            code="out_of_memory",
        ) from error


# --- advice ----------------------------------------------------------------------------------------------------------


def advise(
    probe: Probe,
    device: torch.device,
    *,
    batch: int,
    accumulation: int = 1,
    extra_bytes: int = 0,
    limit_bytes: int | None = None,
) -> BatchAdvice | None:
    """Batch and accumulation that would fit, after ``batch`` did not.

    Args:
        probe: A step, or its forward and backward pass, with fewer samples.
        device: Where it computes.
        batch: Samples that did not fit.
        accumulation: Micro-batches of an update so far.
        extra_bytes: What a real step needs beside the probe, e.g. the optimizer's state before its first update.
        limit_bytes: Memory that may be taken; what ``memory_limit`` finds if None.

    Returns:
        None if not one sample fits, or if this machine cannot tell.
    """
    limit = memory_limit(device) if limit_bytes is None else limit_bytes

    def measure(samples: int) -> int | None:
        peak = peak_of(lambda: probe(samples), device)
        return None if peak is None else peak + extra_bytes

    if limit is None:
        return None
    peaks, failed = _two_peaks(measure, batch)
    largest = _largest(peaks, failed, limit)
    if largest == 0:
        return None
    fitting, times = split_batch(batch * accumulation, largest)
    predicted = predict(peaks, fitting)
    return BatchAdvice(fitting, times, MemoryReport(None if predicted is None else predicted / GIB, limit / GIB))


def out_of_memory_error(
    error: BaseException,
    device: torch.device,
    *,
    step: int,
    batch: int,
    accumulation: int = 1,
    probe: Probe | None = None,
    extra_bytes: int = 0,
    keys: KeyNames = KeyNames(),
) -> ResourceError:
    """What to tell the user after an allocation failed: the peak, the limit, and the batch that would fit.

    The tensors that the failed step holds are let go first; call it where the functions of the step have ended.

    Args:
        error: For which ``is_out_of_memory`` holds.
        device: Where the run computes.
        step: Update that failed, counted from 1.
        batch: Samples of its micro-batches.
        accumulation: Micro-batches of an update.
        probe: Does the same with fewer samples; None predicts nothing.
        extra_bytes: See ``advise``.
        keys: Of the run.
    """
    first_line = next(iter(str(error).splitlines()), type(error).__name__)
    peak, limit = _read_peak(device), memory_limit(device)
    report = MemoryReport(None if peak is None else peak / GIB, None if limit is None else limit / GIB)
    forget_frames(error)
    release(device)
    advice = None
    if probe is not None:
        try:
            advice = advise(probe, device, batch=batch, accumulation=accumulation, extra_bytes=extra_bytes)
        except Exception as fault:  # a guess that fails must not hide the fault that it was to explain
            log.warning("The batch that would fit could not be measured: %s: %s", type(fault).__name__, fault)
    first = keys.halved if advice is None else f"{advice.said(keys)} would take {advice.report}"
    return ResourceError(
        "The device has not enough memory." if device.type == "cuda" else "There is not enough memory.",
        where=f"{device}, step {step}, {batch} samples, {report}: {first_line}",
        fix=f"{first}; {keys.less_memory}",
        code="out_of_memory",
    )
