"""``bench.py loader``: a slice from the prepared store against decompressing every file, and the loader on top."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np

from benchmarks.measuring import Findings, Mark, Options, Parts, Rows, measure
from medssl_cli.core.case import Case
from medssl_cli.core.case import Sequence as Acquisition
from medssl_cli.core.protocols import SliceBatch
from medssl_cli.core.volume import AXIAL, AXIS_NAMES, Volume
from medssl_cli.data.datasets import DataConfig, ImageDataset, SliceDataset, build_loader, prepare_store
from medssl_cli.data.images import read_volume, write_image, write_volume
from medssl_cli.data.phantom_anatomy import Layer, Tissue
from medssl_cli.data.phantoms import Scan, plan_cases
from medssl_cli.data.store import Store

SEQUENCES = ("ax_t2wi", "ax_adc", "ax_dwi")


def write_cases(folder: Path, count: int, size: str) -> list[Case]:
    """Phantom T2 of ``count`` patients, measured three times each on one grid, with the gland as region of interest."""
    cases = []
    for plan in plan_cases(count, seed=0):
        scan, grid, files = Scan.of(plan), plan.protocol.t2[size], folder / plan.case_id
        files.mkdir()
        affine = scan.affine(grid, SEQUENCES[0])
        for name in SEQUENCES:
            write_volume(files / f"{name}.nii.gz", Volume(scan.t2(grid, name).array, affine))
        gland = scan.mask(grid, Layer(scan.anatomy.gland, Tissue(1, 1, 1)), SEQUENCES[0])
        write_volume(files / "roi_Prostate.nii.gz", Volume(gland.array, affine))
        acquisitions = {name: Acquisition(name, files / f"{name}.nii.gz") for name in SEQUENCES}
        cases.append(Case(plan.case_id, plan.patient_id, acquisitions, roi=files / "roi_Prostate.nii.gz"))
    return cases


def files_of(case: Case) -> list[Path]:
    """All files of a case, the region of interest last."""
    return [sequence.path for sequence in case.sequences.values()] + ([case.roi] if case.roi else [])


def loader(options: Options) -> Findings:
    """One plane of all sequences, from the store and as the upstream reader does it; then samples a second."""
    with tempfile.TemporaryDirectory(prefix="medssl-bench-") as temporary:
        folder = Path(temporary)
        cases = write_cases(folder, 2 if options.tiny else 4, "small" if options.tiny else "full")
        config = DataConfig(mri_sequences=SEQUENCES, random_slices=True, spatial_size=32 if options.tiny else 224)
        started = time.perf_counter()
        store = prepare_store(cases, config, folder / "cache", kind="volumes")
        build_s = (time.perf_counter() - started) / len(cases)
        source_bytes = sum(path.stat().st_size for case in cases for path in files_of(case))
        rows = slice_rows(store, cases, options)
        found = {row["what"]: row for row in rows}
        upstream, ours = found["nibabel reads every .nii.gz"], found["store, axial, file opened anew"]
        ratio = upstream["cpu_ms"] / ours["cpu_ms"]
        rates = loader_rates(SliceDataset(store, config, 0), options)
        opening = opening_rows(folder, options)
        fraction = store.size_bytes / source_bytes
    return Findings(
        {"cases": len(cases), "shape_SZYX": [len(SEQUENCES), *store.facts(0).shape], "prepare_s_a_case": build_s},
        [*rows, *rates, *opening],
        {
            "nibabel / store, cpu": ratio,
            "store / .nii.gz bytes": fraction,
            "sample of many pictures / of 10": opening[1]["sample_ms"] / opening[0]["sample_ms"],
        },
        [
            Mark("ms of a core for one axial slice, file opened anew", ours["cpu_ms"], 2),
            Mark("times faster than nibabel", ratio, 25, at_least=True),
            Mark("store bytes / .nii.gz bytes", fraction, 1.3),
        ],
    )


def slice_rows(store: Store, cases: Sequence[Case], options: Options) -> Rows:
    """Milliseconds for one plane of all sequences and the region of interest."""
    draw = np.random.default_rng(0)
    planes = {
        axis: [(case, int(draw.integers(store.facts(case).shape[axis]))) for case in range(len(store))]
        for axis in range(3)
    }

    def upstream() -> None:
        for case, index in planes[AXIAL]:
            for path in files_of(cases[case]):
                np.ascontiguousarray(np.asanyarray(nib.load(path).dataobj)[..., index])  # type: ignore[attr-defined]

    def whole() -> None:
        for case in cases:
            for path in files_of(case):
                read_volume(path)

    def ours(axis: int, *, anew: bool) -> None:
        for case, index in planes[axis]:
            if anew:
                store.close()
            store.read_slice(case, axis, index)

    parts: Parts = {"nibabel reads every .nii.gz": upstream, "read_volume of every file": whole}
    for axis, name in AXIS_NAMES.items():
        parts[f"store, {name}, file opened anew"] = partial(ours, axis, anew=True)
        parts[f"store, {name}, file open"] = partial(ours, axis, anew=False)
    return [timing.row(name, len(cases)) for name, timing in measure(parts, options.repeat).items()]


def loader_rates(dataset: SliceDataset, options: Options) -> Rows:
    """Samples a second of the loader alone, by its number of processes."""
    batch, count = options.batch[0], 2 if options.tiny else 20
    rows = []
    for workers in options.workers:
        batches = build_loader(dataset, batch_size=batch, seed=0, workers=workers)
        timing = measure({"": partial(take, batches, count)}, options.repeat)[""]
        batches.close()
        rate = count * batch / statistics.median(timing.wall)
        rows.append({"what": f"loader, {workers} workers", "samples_per_s": rate, "wall_ms": 1e3 / rate})
    return rows


def take(batches: Iterator[SliceBatch], count: int) -> None:
    """Load so many batches."""
    for _ in range(count):
        next(batches)


def open_store(folder: Path) -> None:
    """Open a prepared store and look at one case."""
    Store.open(folder).facts(0)


def load_samples(dataset: ImageDataset, cases: list[int]) -> None:
    """Load these pictures."""
    for case in cases:
        dataset[0, case]


def opening_rows(folder: Path, options: Options) -> Rows:
    """What a store of few and of many pictures costs to open, and one sample of it."""
    picture = folder / "picture.png"
    write_image(picture, np.random.default_rng(0).integers(0, 255, (28, 28)).astype(np.uint8))
    many, rows = 200 if options.tiny else 10_000, []
    for count in (10, many):
        names = [f"{number:05d}" for number in range(count)]
        cases = [Case(name, name, {"image": Acquisition("image", picture)}) for name in names]
        store = prepare_store(cases, DataConfig(), folder / "pictures", kind="images")
        dataset, keys = ImageDataset(store), np.random.default_rng(1).integers(0, count, 50).tolist()
        parts: Parts = {
            "open": partial(open_store, store.folder),
            "sample": partial(load_samples, dataset, keys),
        }
        timings = measure(parts, options.repeat)
        opened = timings["open"].row(f"open a store of {count} pictures")
        rows.append({**opened, "sample_ms": timings["sample"].row("", 50)["wall_ms"]})
    return rows
