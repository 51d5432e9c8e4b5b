#!/usr/bin/env python
"""Speed and memory of medssl, measured: ``python scripts/bench.py NAME [--tiny] [--json]``.

All parts of one table are measured in turns within one run, so that a busy machine slows them alike: read the ratios.
``wall`` is time on the clock, ``cpu`` the processor time of this process and its children; medians of the repetitions
after a warm-up. ``docs/benchmarks.md`` tells how to read them and holds what was found.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from benchmarks.extraction import extract
from benchmarks.head_training import head
from benchmarks.inference import infer
from benchmarks.loader import loader
from benchmarks.measuring import Findings, Mark, Options, Rows
from benchmarks.pipeline import pretrain
from benchmarks.segmentation import segment
from benchmarks.startup import startup
from benchmarks.step import step
from benchmarks.views import views

from medssl_cli.core.errors import MedsslError
from medssl_cli.core.run import provenance, result_header, to_json
from medssl_cli.services.devices import describe_device, resolve_device

BENCHMARKS: dict[str, Callable[[Options], Findings]] = {
    "startup": startup,
    "loader": loader,
    "views": views,
    "step": step,
    "pretrain": pretrain,
    "extract": extract,
    "infer": infer,
    "head": head,
    "segment": segment,
}


def machine(device: torch.device) -> dict[str, Any]:
    """Processor, memory, load and GPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    on_gpu = device.type == "cuda"
    return {
        "cpu": model or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
        "load_average": os.getloadavg()[0],
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
        "gpu_memory_gib": torch.cuda.get_device_properties(device).total_memory / 2**30 if on_gpu else None,
    }


def versions() -> dict[str, str | None]:
    """Python and the packages that matter; None where one is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch.version.cuda, "xformers": None}
    with contextlib.suppress(metadata.PackageNotFoundError):
        found["xformers"] = metadata.version("xformers")
    return {**found, **provenance()["versions"]}


def judged(marks: Iterable[Mark], *, tiny: bool) -> Rows:
    """Marks as rows; the reduced size reaches and misses none."""
    return [
        {
            "mark": mark.what,
            "value": mark.value,
            "limit": mark.limit,
            "at_least": mark.at_least,
            "reached": None if tiny else mark.reached,
        }
        for mark in marks
    ]


def table(rows: Rows) -> str:
    """Aligned columns; a row without a value leaves its place empty."""
    heads = list(dict.fromkeys(key for row in rows for key in row))
    cells = [heads, *([text(row.get(head)) for head in heads] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(heads))]
    pad = [str.ljust, *[str.rjust] * (len(heads) - 1)]
    return "\n".join("  ".join(f(cell, w) for f, cell, w in zip(pad, line, widths, strict=True)) for line in cells)


def text(value: object) -> str:
    """A number in four figures; nothing for None."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)


def report(document: Mapping[str, Any]) -> str:
    """The document for people."""
    facts = {**document["machine"], **document["versions"], "precision": document["precision"], **document["sizes"]}
    parts = ["; ".join(f"{key} {text(value)}" for key, value in facts.items() if value is not None)]
    parts.append(table(document["rows"]))
    parts += [f"{name}: {value:.3g}" for name, value in document["ratios"].items()]
    for mark in document["marks"]:
        state = {True: "reached", False: "NOT reached", None: "not judged here"}[mark["reached"]]
        sign = "≥" if mark["at_least"] else "≤"
        parts.append(f"mark {sign} {mark['limit']:g} {mark['mark']}: {text(mark['value'])} {state}")
    return "\n".join(parts)


def read_options(arguments: Sequence[str] | None) -> tuple[str, bool, Options]:
    """Name of the benchmark, whether JSON is wanted, and the rest."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("name", choices=BENCHMARKS)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--tiny", action="store_true", help="reduced size, for tests")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "tf32", "bf16", "fp16"))
    parser.add_argument("--repeat", type=int, default=5, help="repetitions after the warm-up")
    parser.add_argument("--batch", type=int, nargs="+", help="samples; step takes several")
    parser.add_argument("--arch", default="vit_base", help="vit_tiny, vit_small, vit_base, vit_large")
    parser.add_argument("--attention", nargs="+", default=[], help="kernels; all that work if not given")
    parser.add_argument("--workers", type=int, nargs="+", help="loader processes")
    parser.add_argument("--compile", action="store_true", help="compile the blocks, as train.compile does")
    parser.add_argument("--cudagraphs", action="store_true", help="with --compile: as train.cudagraphs does")
    parser.add_argument("--tricks", action="store_true", help="step: leave out one trick at a time")
    given = parser.parse_args(arguments)
    cores = len(os.sched_getaffinity(0))
    options = Options(
        tiny=given.tiny,
        device=resolve_device(given.device),
        precision=given.precision,
        repeat=max(1, given.repeat),
        batch=tuple(given.batch or [2 if given.tiny else 8]),
        arch=given.arch,
        attention=tuple(given.attention),
        workers=tuple(given.workers or ([0, 1] if given.tiny else [n for n in (0, 1, 2, 4, 8) if n <= cores])),
        compile=given.compile,
        tricks=given.tricks,
        cudagraphs=given.cudagraphs,
    )
    return given.name, given.json, options


def run(name: str, options: Options) -> dict[str, Any]:
    """One benchmark as a document."""
    started, on_machine = time.time(), machine(options.device)
    found = BENCHMARKS[name](options)
    return {
        **result_header(f"bench {name}", started),
        "machine": on_machine,
        "device": describe_device(options.device),
        "versions": versions(),
        "tiny": options.tiny,
        "precision": options.precision,
        "repeat": options.repeat,
        "sizes": found.sizes,
        "rows": found.rows,
        "ratios": found.ratios,
        "marks": judged(found.marks, tiny=options.tiny),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one benchmark and print it; gives the exit status."""
    try:
        name, as_json, options = read_options(arguments)
        document = run(name, options)
    except MedsslError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(to_json(document) if as_json else report(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
