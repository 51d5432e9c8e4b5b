"""One line a logged step, on the console and as strict JSON; throughput, memory and the health of the teacher.

Losses, gradient norms and times are medians of the last 20 steps, as in DINOv2. The medians' memory travels with the
checkpoint and lines beyond a resumed step are dropped, so the file of a resumed run equals that of an undisturbed one
apart from times and memory.
"""

from __future__ import annotations

import json
import logging
import math
import os
import resource
import sys
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from medssl_cli.core.run import plain, say_disk_errors, write_json, write_text
from medssl_cli.engine.health import HealthConfig, HealthMonitor

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger(__name__)

WINDOW = 20
HEALTH_FIGURES = ("teacher_entropy", "effective_rank")
"""Figures of health on the console line."""


_OF_A_TEACHER = {"mom": "momentum", "teacher_temp": "teacher_temp", "teacher_patch_temp": "teacher_patch_temp"}
"""Schedules that a line tells where the objective has a teacher, by their names in the file."""


@dataclass(frozen=True)
class StepRecord:
    """What one optimizer update did.

    Args:
        step: Updates done, this one included.
        values: Schedules of the update.
        losses: Each term, averaged over the micro-batches.
        gradient_norms: 2-norm of each sub-module before clipping.
        images: Images of the update, over all processes.
        seconds: Wall time of the update.
        data_seconds: Part of it spent waiting for the loader.
        loss_scale_skipped: True if fp16 overflowed and the student was not updated.
    """

    step: int
    values: Mapping[str, float]
    losses: Mapping[str, float]
    gradient_norms: Mapping[str, float]
    images: int
    seconds: float
    data_seconds: float
    loss_scale_skipped: bool = False

    @property
    def total_loss(self) -> float:
        """Sum of the terms."""
        return sum(self.losses.values())


class Telemetry:
    """Log of one run; used by one process only.

    Args:
        out: Run folder: ``training_metrics.jsonl``, ``training_metrics.json`` and ``tb/`` go there.
        total_steps: Updates of the whole run.
        device: Whose memory is reported; the process's own on the CPU.
        log_every: Steps between lines; the first and the last step always have one.
        console: Logger for the human line; this module's if None.
        tensorboard: Write TensorBoard events too.
        monitor: Raises alarms over the lines; one with its usual thresholds if None.
    """

    def __init__(
        self,
        out: Path,
        total_steps: int,
        device: torch.device,
        *,
        log_every: int = 10,
        console: logging.Logger | None = None,
        tensorboard: bool = True,
        monitor: HealthMonitor | None = None,
    ) -> None:
        self.out, self.total_steps, self.device, self.log_every = out, total_steps, device, log_every
        self._lines = out / "training_metrics.jsonl"
        self._console = console or log
        self._tensorboard = tensorboard
        self._writer: SummaryWriter | None = None
        self._windows: dict[str, deque[float]] = {}
        self._times: dict[str, deque[float]] = {name: deque(maxlen=WINDOW) for name in ("iter_time", "data_time")}
        self.monitor = monitor or HealthMonitor(HealthConfig())

    # --- life of a run ---

    def start(self, step: int, state: Mapping[str, Any] | None = None) -> None:
        """Begin after ``step`` updates: drop later lines of an earlier attempt and take up its medians.

        Args:
            step: Updates done; 0 for a new run.
            state: What ``state_dict`` gave when the checkpoint of this step was saved.
        """
        windows = (state or {}).get("windows", {})
        self.monitor.load_state_dict((state or {}).get("monitor", {}))
        self._windows = {name: deque(values, maxlen=WINDOW) for name, values in windows.items()}
        kept = [line for line in read_metrics(self._lines) if line["iteration"] <= step]
        if self._lines.exists():
            write_text(self._lines, "".join(_to_line(line) for line in kept))
        if self._tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # costs half a second

            self._writer = SummaryWriter(log_dir=str(self.out / "tb"), purge_step=step + 1)

    def record(
        self,
        record: StepRecord,
        health: Callable[[], Mapping[str, float]],
        last_good: Callable[[], str] = lambda: "nothing is saved here",
    ) -> None:
        """Take note of one update and write a line when one is due.

        Args:
            record: The update.
            health: Figures of the objective; called only for a line, since it may wait for the device.
            last_good: Names the last checkpoint; called only with an alarm.

        Raises:
            CollapseError: The run is to be stopped by its figures, and they are bad.
        """
        self._times["iter_time"].append(record.seconds)
        self._times["data_time"].append(record.data_seconds)
        for name, value in _smoothed(record).items():
            window = self._windows.setdefault(name, deque(maxlen=WINDOW))
            if math.isfinite(value):  # the norm of a step that fp16 skipped is not
                window.append(value)
        if record.step == 1 or record.step % self.log_every == 0 or record.step == self.total_steps:
            line = self._line(record, health())
            self._write(line)
            self._console.info(console_line(line, self.total_steps))
            self._check_health(line, last_good)

    def checkpoint(self) -> dict[str, Any]:
        """Make the lines so far durable, write them keyed by step too, and give the state to be saved."""
        with say_disk_errors(self._lines):
            if self._lines.exists():
                with self._lines.open("rb") as file:
                    os.fsync(file.fileno())
        write_json(
            self.out / "training_metrics.json", {str(line["iteration"]): line for line in read_metrics(self._lines)}
        )
        if self._writer is not None:
            self._writer.flush()
        return self.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """Values behind the running medians, as plain data."""
        windows = {name: list(values) for name, values in self._windows.items()}
        return {"windows": windows, "monitor": self.monitor.state_dict()}

    def close(self) -> None:
        """Close the TensorBoard file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    # --- one line ---

    def _line(self, record: StepRecord, health: Mapping[str, float]) -> dict[str, Any]:
        seconds, waiting = median(self._times["iter_time"]), median(self._times["data_time"])
        values = record.values
        return plain(
            {
                "iteration": record.step,
                "iter_time": seconds,
                "data_time": waiting,
                "data_wait_percent": 100 * sum(self._times["data_time"]) / max(sum(self._times["iter_time"]), 1e-9),
                "eta_s": seconds * (self.total_steps - record.step),
                "images_per_s": record.images / max(seconds, 1e-9),
                "memory_gib": peak_memory_gib(self.device),
                "lr": values["lr"],
                "wd": values["wd"],
                **{name: values[key] for name, key in _OF_A_TEACHER.items() if key in values},
                "last_layer_lr": values["last_layer_lr"],
                "backbone_frozen": bool(values.get("backbone_frozen", 0.0)),
                "current_batch_size": record.images,
                "loss_scale_skipped": record.loss_scale_skipped,
                **{name: median(self._windows[name] or [math.nan]) for name in _smoothed(record)},
                **health,
            }
        )

    def _write(self, line: Mapping[str, Any]) -> None:
        with say_disk_errors(self._lines):
            self._lines.parent.mkdir(parents=True, exist_ok=True)
            with self._lines.open("a", encoding="utf-8") as file:
                file.write(_to_line(line))
        if self._writer is not None:
            for name, value in line.items():
                if name != "iteration" and isinstance(value, (int, float)):
                    self._writer.add_scalar(_tag(name), value, line["iteration"])

    def _check_health(self, line: Mapping[str, Any], last_good: Callable[[], str]) -> None:
        alarms = self.monitor.check(line["iteration"], line)
        for alarm in alarms:
            self._console.warning("%s", alarm)
        if alarms:
            self.monitor.refuse(alarms, last_good())


def console_line(line: Mapping[str, Any], total_steps: int) -> str:
    """The human form of one line of metrics."""
    width = len(str(total_steps))
    norms = {k.removeprefix("grad_norm_"): v for k, v in line.items() if k.startswith("grad_norm_")}
    losses = {k: v for k, v in line.items() if k.endswith("_loss")}
    parts = [
        f"[{line['iteration']:>{width}}/{total_steps}]",
        f"eta {timedelta(seconds=round(line['eta_s']))}",
        f"{line['images_per_s']:.1f} images/s",
        f"data-wait {line['data_wait_percent']:.1f}%",
        f"mem {line['memory_gib']:.2f} GiB",
        f"lr {line['lr']:.3g}",
        f"wd {line['wd']:.3g}",
        "grad_norm " + " ".join(f"{name} {_show(value)}" for name, value in norms.items()),
        *(f"{name} {_show(value)}" for name, value in losses.items()),
        *(f"{name} {_show(line[name])}" for name in HEALTH_FIGURES if name in line),
    ]
    return "  ".join(parts)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of ``training_metrics.jsonl``; a last line cut short by a kill is left out."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if not text.endswith("\n"):
            break
        lines.append(json.loads(text))
    return lines


def peak_memory_gib(device: torch.device) -> float:
    """Largest memory so far: of the allocator on CUDA, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _smoothed(record: StepRecord) -> dict[str, float]:
    losses = {name if name.endswith("_loss") else f"{name}_loss": value for name, value in record.losses.items()}
    norms = {f"grad_norm_{name}": value for name, value in record.gradient_norms.items()}
    return {"total_loss": record.total_loss, **losses, **norms}


def _tag(name: str) -> str:
    if name.endswith("_loss"):
        return f"loss/{name}"
    if name.startswith("grad_norm_"):
        return f"grad_norm/{name.removeprefix('grad_norm_')}"
    folders: dict[str, Iterable[str]] = {
        "schedule": ("lr", "wd", "mom", "teacher_temp", "teacher_patch_temp", "last_layer_lr", "backbone_frozen"),
        "health": (
            *(*HEALTH_FIGURES, "dino_agreement", "center_norm"),
            *("predicted_foreground", "reference_foreground"),
        ),
    }
    return next((f"{folder}/{name}" for folder, names in folders.items() if name in names), f"speed/{name}")


def _to_line(line: Mapping[str, Any]) -> str:
    return json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n"


def _show(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.4g}"
