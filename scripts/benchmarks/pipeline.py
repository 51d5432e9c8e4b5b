"""``bench.py pretrain``: store, loader, views and step together, against the step on views that lie ready."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.loader import write_cases
from benchmarks.measuring import Findings, Mark, Options, Parts, measure
from benchmarks.recipe import SEQUENCES, build_trainer, crop_sizes, pretrain_config, random_slices
from medssl_cli.core.protocols import Batch, SliceBatch
from medssl_cli.core.run import seed_for
from medssl_cli.data.datasets import SliceDataset, build_loader, prepare_store
from medssl_cli.engine.trainer import Trainer
from medssl_cli.services.build import build_views

PREFETCH = 2


def pretrain(options: Options) -> Findings:
    """The whole run as the recipe asks for it, by the number of loader processes."""
    batch = options.batch[0]
    config = pretrain_config(options, batch)
    make = build_views(config, len(SEQUENCES))
    trainer, slices = build_trainer(config, options), random_slices(config, options.device)
    plain = build_views(pretrain_config(options, batch, "crops.intensity_aug=none"), len(SEQUENCES))
    parts: Parts = {"views without rc": lambda: plain(slices, 0), "views": lambda: make(slices, 0)}
    rows = [timing.row(name) for name, timing in measure(parts, options.repeat, options.device).items()]

    def make_views(slices: SliceBatch, step: int, micro: int) -> Batch:
        return make(slices, seed_for(0, "views", step, micro))

    with tempfile.TemporaryDirectory(prefix="medssl-bench-") as temporary:
        folder = Path(temporary)
        cases = write_cases(folder, 2 if options.tiny else 4, "small" if options.tiny else "full")
        store = prepare_store(cases, config.data, folder / "cache", kind="volumes")
        dataset = SliceDataset(store, config.data, 0)
        for workers in options.workers:
            batches = build_loader(
                dataset, batch_size=batch, seed=0, workers=workers, pin_memory=options.on_gpu, prefetch=PREFETCH
            )
            rows.append(pipeline_row(trainer, batches, make_views, workers, options))
            batches.close()
    of_synthetic = {row["workers"]: row["of_synthetic_rate"] for row in rows[2:]}
    judged = of_synthetic if options.on_h200 else {}
    step_ms = statistics.median(row["synthetic_ms"] for row in rows[2:])
    shares = [row["wall_ms"] / step_ms for row in rows[:2]]
    return Findings(
        {"arch": options.arch, "size": config.student.size, "batch": batch, **crop_sizes(config), "intensity": "rc"},
        rows,
        {
            **{f"pipeline, {workers} workers / synthetic rate": share for workers, share in of_synthetic.items()},
            "views without rc / synthetic step, time": shares[0],
            "views / synthetic step, time": shares[1],
        },
        [
            Mark("of the synthetic rate, 8 workers, H200", judged.get(8), 0.95, at_least=True),
            Mark("of the step's time for views without rc, H200", shares[0] if options.on_h200 else None, 0.08),
            Mark("of the step's time for views, H200", shares[1] if options.on_h200 else None, 0.1),
        ],
    )


def pipeline_row(
    trainer: Trainer,
    batches: Iterator[SliceBatch],
    make_views: Callable[..., Batch],
    workers: int,
    options: Options,
) -> dict[str, Any]:
    """Steps in a row, after the batches that the workers had ready; the synthetic step just before."""
    ready, noise = trainer.views, trainer.batches(0)
    synthetic = measure({"": lambda: trainer.step(noise)}, options.repeat, options.device)[""].row("")
    waits: list[float] = []

    def update() -> None:
        record = trainer.step(batches)
        waits.append(record.data_seconds / record.seconds)

    trainer.views = make_views
    try:
        timing = measure({"": update}, options.repeat, options.device, warmup=1 + PREFETCH * workers)[""]
    finally:
        trainer.views = ready
    row = timing.row(f"pipeline, {workers} workers")
    return {
        **row,
        "workers": workers,
        "samples_per_s": 1e3 * options.batch[0] / row["wall_ms"],
        "synthetic_ms": synthetic["wall_ms"],
        "of_synthetic_rate": synthetic["wall_ms"] / row["wall_ms"],
        "data_wait_share": statistics.median(waits[-options.repeat :]),
    }
