"""``bench.py step``: one optimizer step on views that lie ready on the device, by attention kernel and batch."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks.measuring import Findings, Mark, Options, Parts, Rows, measure
from benchmarks.recipe import build_trainer, crop_sizes, pretrain_config, tflop_per_sample
from benchmarks.tricks import packed_groups, tricks
from benchmarks.ways import Switch, Way
from medssl_cli.engine.precision import AUTOCAST_DTYPES, Precision
from medssl_cli.engine.telemetry import peak_memory_gib
from medssl_cli.models.attention import choose_by_trial, probe_backends, set_backend
from medssl_cli.services.pretrain_config import PretrainConfig

STEP_MARKS = {  # (arch, precision, batch) -> samples/s on one H200, GiB
    ("vit_base", "fp32", 32): (22, 40),
    ("vit_base", "tf32", 32): (85, None),
    ("vit_base", "bf16", 8): (150, None),
    ("vit_base", "bf16", 32): (230, 26),
    ("vit_large", "bf16", 32): (85, None),
}


def matrix_peak(options: Options) -> float:
    """TFLOP/s of one large matrix product in the precision of the run, the fastest of the repetitions.

    On a CPU for each second of a core, in the same way as ``peak_share``.
    """
    side = 256 if options.tiny else 8192 if options.on_gpu else 2048
    dtype = AUTOCAST_DTYPES.get(options.precision, torch.float32)
    Precision(options.precision, options.device)  # type: ignore[arg-type]
    a, b = (torch.randn(side, side, device=options.device).to(dtype) for _ in range(2))
    timing = measure({"": lambda: a @ b}, max(options.repeat, 5), options.device, warmup=3)[""]
    return 2 * side**3 / min(timing.seconds(options.clock)) / 1e12


def step(options: Options) -> Findings:
    """W1: one optimizer step on views that lie ready on the device, by attention kernel and batch; or by trick."""
    if options.tricks:
        return tricks(options)
    dtype = AUTOCAST_DTYPES.get(options.precision, torch.float32)
    working = [status.name for status in probe_backends(options.device, dtype) if status.works]
    peak = matrix_peak(options)
    rows: Rows = []
    marks: list[Mark] = []
    for batch in options.batch:
        config = pretrain_config(options, batch)
        rows += (found := step_rows(config, options, options.attention or working_for(config, options, working), peak))
        marks += step_marks(options, batch, found)
        gc.collect()  # else the next batch size would be measured beside the last one's networks
    clock = f"{options.clock}_ms"
    ratios = {
        f"{row['what']} / {rows[0]['what']}, {clock}": row[clock] / rows[0][clock]
        for row in rows[1:]
        if row["batch"] == rows[0]["batch"] and clock in row
    }
    sizes = {"arch": options.arch, **crop_sizes(config), "prototypes": config.dino.head_n_prototypes}
    sizes |= {"size": config.student.size, "tflop_a_sample": tflop_per_sample(config), "matrix_peak_tflops": peak}
    return Findings({**sizes, "compiled_blocks": options.compile}, rows, ratios, marks)


def working_for(config: PretrainConfig, options: Options, working: list[str]) -> list[str]:
    """All kernels that work; when compiling, which fixes one, the fastest on the shapes of the run."""
    if not options.compile:
        return working
    width, depth, heads = config.student.size
    dtype = AUTOCAST_DTYPES.get(options.precision, torch.float32)
    set_backend(None, options.device, dtype)
    choice = choose_by_trial(options.device, dtype, packed_groups(config), heads, width // heads, layers=depth)
    return [choice.name]


def step_marks(options: Options, batch: int, rows: Rows) -> list[Mark]:
    """The marks of this architecture, precision and batch, for the fastest kernel."""
    speed, memory = STEP_MARKS.get((options.arch, options.precision, batch), (None, None))
    best = max(rows, key=lambda row: row.get("samples_per_s", 0.0)) if options.on_h200 else {}
    marks = []
    if speed:
        marks.append(Mark(f"samples/s at batch {batch}, H200", best.get("samples_per_s"), speed, at_least=True))
    if memory:
        marks.append(Mark(f"GiB at batch {batch}, H200", best.get("peak_gib"), memory))
    return marks


def step_rows(config: PretrainConfig, options: Options, kernels: Sequence[str], peak: float) -> Rows:
    """One row a kernel, and the step restated plainly: kernel ``plain``, one forward a crop size, all tokens."""
    trainer, batch = build_trainer(config, options), config.train.batch_size_per_gpu
    source, switch = trainer.batches(0), Switch(trainer)
    peaks: dict[str, float | None] = {}

    def update(name: str, way: Way) -> None:
        switch.take(way)
        if options.on_gpu:
            torch.cuda.reset_peak_memory_stats(options.device)
        trainer.step(source)
        peaks[name] = peak_memory_gib(options.device) if options.on_gpu else None  # of a CPU only the process is known

    ways = {f"{kernel}, packed": Way(kernel=kernel) for kernel in kernels}
    ways["plain, one forward a size"] = Way(kernel="plain", packed=False, needed=False)
    if options.compile:  # a compiled block keeps the kernel it was compiled with
        first = Way(kernel=kernels[0])
        ways = {
            f"{kernels[0]}, packed": first,
            f"{kernels[0]}, packed, compiled": replace(first, compiled=True),
        }
    steps: Parts = {name: partial(update, name, how) for name, how in ways.items()}
    try:
        fitting = {name: run for name, run in steps.items() if fits(run)}
        timings = measure(fitting, options.repeat, options.device, warmup=2 if options.on_gpu or options.compile else 0)
    finally:
        switch.restore()
    rows: Rows = []
    for name in steps:
        if name not in timings:
            rows.append({"what": f"{name}: out of memory", "batch": batch})
            continue
        rate = batch / statistics.median(timings[name].wall)
        share = batch * tflop_per_sample(config) / statistics.median(timings[name].seconds(options.clock)) / peak
        facts = {"samples_per_s": rate, "peak_share": share, "peak_gib": peaks[name]}
        rows.append({**timings[name].row(name), "batch": batch, **facts})
    return rows


def fits(run: Callable[[], Any]) -> bool:
    """Whether one call goes through with the memory of the GPU."""
    try:
        run()
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return False
    return True
