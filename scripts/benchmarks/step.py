"""``bench.py step``: one optimizer step on views that lie ready on the device, by attention kernel and batch."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.measuring import Findings, Mark, Options, Rows, measure
from benchmarks.recipe import build_trainer, crop_sizes, pretrain_config, tflop_per_sample
from medssl_cli.engine.precision import Precision
from medssl_cli.engine.telemetry import peak_memory_gib
from medssl_cli.models.attention import probe_backends, set_backend
from medssl_cli.services.build import AUTOCAST_DTYPES
from medssl_cli.services.pretrain_config import PretrainConfig

STEP_MARKS = {  # (arch, precision, batch) -> samples/s on one H200, GiB
    ("vit_base", "fp32", 32): (22, 40),
    ("vit_base", "tf32", 32): (85, None),
    ("vit_base", "bf16", 8): (150, None),
    ("vit_base", "bf16", 32): (230, 26),
    ("vit_large", "bf16", 32): (85, None),
}


def matrix_peak(options: Options) -> float:
    """TFLOP/s of one large matrix product in the precision of the run, the fastest of the repetitions."""
    side = 256 if options.tiny else 8192 if options.on_gpu else 2048
    dtype = AUTOCAST_DTYPES.get(options.precision, torch.float32)
    Precision(options.precision, options.device)  # type: ignore[arg-type]
    a, b = (torch.randn(side, side, device=options.device).to(dtype) for _ in range(2))
    timing = measure({"": lambda: a @ b}, max(options.repeat, 5), options.device, warmup=3)[""]
    return 2 * side**3 / min(timing.wall) / 1e12


def step(options: Options) -> Findings:
    """W1: one optimizer step on views that lie ready on the device, by attention kernel and batch."""
    dtype = AUTOCAST_DTYPES.get(options.precision, torch.float32)
    working = [status.name for status in probe_backends(options.device, dtype) if status.works]
    peak = matrix_peak(options)
    rows: Rows = []
    marks: list[Mark] = []
    for batch in options.batch:
        config = pretrain_config(options, batch)
        try:
            found = step_rows(config, options, options.attention or working, peak)
        except torch.OutOfMemoryError:
            found = [{"what": "out of memory", "batch": batch}]
            torch.cuda.empty_cache()
        rows += found
        speed, memory = STEP_MARKS.get((options.arch, options.precision, batch), (None, None))
        best = max(found, key=lambda row: row.get("samples_per_s", 0.0))
        if speed:
            rate = best.get("samples_per_s") if options.on_gpu else None
            marks.append(Mark(f"samples/s at batch {batch} on an H200", rate, speed, at_least=True))
        if memory:
            gib = best.get("peak_gib") if options.on_gpu else None
            marks.append(Mark(f"GiB at batch {batch} on an H200", gib, memory))
    ratios = {
        f"{row['what']} / {rows[0]['what']}, time": row["wall_ms"] / rows[0]["wall_ms"]
        for row in rows[1:]
        if row["batch"] == rows[0]["batch"] and "wall_ms" in row
    }
    sizes = {"arch": options.arch, **crop_sizes(config), "prototypes": config.dino.head_n_prototypes}
    sizes |= {"size": config.student.size, "tflop_a_sample": tflop_per_sample(config), "matrix_peak_tflops": peak}
    return Findings({**sizes, "compiled_blocks": options.compile}, rows, ratios, marks)


def step_rows(config: PretrainConfig, options: Options, kernels: Sequence[str], peak: float) -> Rows:
    """One row a kernel, and the step restated plainly: kernel ``plain``, one forward a crop size."""
    trainer, batch = build_trainer(config, options), config.train.batch_size_per_gpu
    source, backbone = trainer.batches(0), trainer.objective.trained_modules()["backbone"]
    packed, peaks = backbone.forward_list, dict[str, float]()

    def one_by_one(images: Iterable[Any], masks: Iterable[Any], available: Iterable[Any]) -> list[Any]:
        return [backbone(*parts) for parts in zip(images, masks, available, strict=True)]

    def update(name: str, kernel: str, forward_list: Callable[..., Any]) -> None:
        set_backend(kernel, options.device, AUTOCAST_DTYPES.get(options.precision, torch.float32))
        backbone.forward_list = forward_list  # type: ignore[assignment]
        if options.on_gpu:
            torch.cuda.reset_peak_memory_stats(options.device)
        trainer.step(source)
        peaks[name] = peak_memory_gib(options.device)

    names = {f"{kernel}, packed": (kernel, packed) for kernel in kernels}
    names["plain, one forward a size"] = ("plain", one_by_one)
    try:
        timings = measure({n: partial(update, n, *how) for n, how in names.items()}, options.repeat, options.device)
    finally:
        set_backend(None, options.device)
    rows = []
    for name, timing in timings.items():
        rate = batch / statistics.median(timing.wall)
        share = rate * tflop_per_sample(config) / peak
        rows.append(
            {**timing.row(name), "batch": batch, "samples_per_s": rate, "peak_share": share, "peak_gib": peaks[name]}
        )
    return rows
