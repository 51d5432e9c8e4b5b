"""What every benchmark shares: options, findings, and timing in turns."""

from __future__ import annotations

import contextlib
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

Rows = list[dict[str, Any]]
Parts = dict[str, Callable[[], Any]]


@dataclass(frozen=True)
class Options:
    """What was asked for.

    Args:
        tiny: Reduced size, for tests.
        precision: fp32, tf32, bf16 or fp16.
        repeat: Repetitions after the warm-up.
        batch: Samples of a batch; only ``step`` looks at more than the first.
        attention: Kernels to compare; empty for all that work.
        workers: Numbers of loader processes.
        compile: Compile the blocks, as ``train.compile`` does.
        cudagraphs: Replay the teacher's compiled blocks, as ``train.cudagraphs`` does.
        tricks: ``step`` leaves out one trick at a time.
    """

    tiny: bool
    device: torch.device
    precision: str
    repeat: int
    batch: tuple[int, ...]
    arch: str
    attention: tuple[str, ...]
    workers: tuple[int, ...]
    compile: bool
    tricks: bool = False
    cudagraphs: bool = False

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU computes."""
        return self.device.type == "cuda"

    @property
    def clock(self) -> Literal["wall", "cpu"]:
        """What ratios are taken from: beside other jobs only processor time tells anything of a CPU."""
        return "wall" if self.on_gpu else "cpu"

    @property
    def on_h200(self) -> bool:
        """Whether the marks for a GPU can be judged here."""
        return self.on_gpu and "H200" in torch.cuda.get_device_name(self.device)


@dataclass(frozen=True)
class Mark:
    """A figure to reach: at most ``limit``, or at least; ``value`` is None where this machine cannot tell."""

    what: str
    value: float | None
    limit: float
    at_least: bool = False

    @property
    def reached(self) -> bool | None:
        """None when it cannot be told."""
        if self.value is None:
            return None
        return self.value >= self.limit if self.at_least else self.value <= self.limit


@dataclass(frozen=True)
class Findings:
    """Sizes, table, ratios within the run, and marks of one benchmark."""

    sizes: dict[str, Any]
    rows: Rows
    ratios: dict[str, float]
    marks: list[Mark] = field(default_factory=list)


@dataclass
class Timing:
    """Seconds of each repetition."""

    wall: list[float]
    cpu: list[float]

    def seconds(self, clock: Literal["wall", "cpu"]) -> list[float]:
        """The repetitions by one clock."""
        return self.wall if clock == "wall" else self.cpu

    def row(self, what: str, per: int = 1) -> dict[str, Any]:
        """A row of the table in ms; ``per`` units were done in one call."""
        return {
            "what": what,
            "wall_ms": 1e3 * statistics.median(self.wall) / per,
            "cpu_ms": 1e3 * statistics.median(self.cpu) / per,
            "fastest_ms": 1e3 * min(self.wall) / per,
        }


def measure(
    parts: Mapping[str, Callable[[], Any]],
    repeat: int,
    device: torch.device | None = None,
    warmup: int = 1,
    before: Mapping[str, Callable[[], Any]] | None = None,
) -> dict[str, Timing]:
    """Call all parts in turns, so that whatever else runs on the machine meets them alike.

    Args:
        parts: What is timed, by name.
        repeat: Turns that count.
        device: Waited for after each call.
        warmup: Turns that do not count.
        before: What is called before the part of the same name and not timed.
    """
    timings = {name: Timing([], []) for name in parts}
    for turn in range(warmup + repeat):
        for name, part in parts.items():
            if before is not None:
                before[name]()
            if device is not None and device.type == "cuda":
                torch.cuda.synchronize(device)
            cpu, wall = cpu_seconds(), time.perf_counter()
            part()
            if device is not None and device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn >= warmup:
                timings[name].wall.append(time.perf_counter() - wall)
                timings[name].cpu.append(cpu_seconds() - cpu)
    return timings


def cpu_seconds() -> float:
    """Processor time of this process and its finished children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """A single core for torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
