"""``bench.py pretrain``: store, loader, views and step together, against the step on views that lie ready."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.loader import write_cases
from benchmarks.measuring import Findings, Mark, Options, Rows, measure
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
    alone = measure({"": lambda: make(slices, 0)}, options.repeat, options.device)[""].row("views alone")
    rows: Rows = [{**alone, "samples_per_s": 1e3 * batch / alone["wall_ms"]}]

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
    of_synthetic = {row["workers"]: row["of_synthetic_rate"] for row in rows[1:]}
    views_share = rows[0]["wall_ms"] / statistics.median(row["synthetic_ms"] for row in rows[1:])
    return Findings(
        {"arch": options.arch, "size": config.student.size, "batch": batch, **crop_sizes(config), "intensity": "rc"},
        rows,
        {
            **{f"pipeline, {workers} workers / synthetic rate": share for workers, share in of_synthetic.items()},
            "views alone / synthetic step, time": views_share,
        },
        [
            Mark("of the synthetic rate, 8 workers, H200", of_synthetic.get(8) if options.on_gpu else None, 0.95, True),
            Mark("of the step's time for the views, H200", views_share if options.on_gpu else None, 0.1),
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
