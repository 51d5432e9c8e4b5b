"""Every benchmark at every size that a mark asks for, one after the other: one JSON file and one page of tables.

Each runs in a process of its own, so that memory, compiled code and a failure of one stay its own. What was measured
is written after each, so that a run that is stopped leaves what it has.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medssl_cli.core.run import to_json, write_text

BENCH = Path(__file__).resolve().parents[1] / "bench.py"
TIMEOUT_S = 1800


@dataclass(frozen=True)
class Job:
    """One call of ``bench.py``: its words, and what the page calls it."""

    title: str
    words: tuple[str, ...]


def plan(device: str, *, tiny: bool) -> list[Job]:
    """What is measured, in order of importance after the quick ones."""
    if tiny:
        return [
            Job("startup", ("startup",)),
            Job("step, fp32", ("step", "--precision", "fp32", "--batch", "2", "3")),
            Job("tricks, bf16", ("step", "--tricks", "--precision", "bf16")),
        ]

    def step(precision: str, *batches: int, arch: str = "vit_base", more: Sequence[str] = ()) -> Job:
        title = " ".join((f"step, {arch}, {precision}", *more)).replace("--", "")
        words = ("--precision", precision, "--arch", arch, "--batch", *map(str, batches), *more)
        return Job(title, ("step", *words))

    compiled, graphs = ("--compile",), ("--compile", "--cudagraphs")
    return [
        Job("startup", ("startup",)),
        step("bf16", 8, 32, 64),
        step("bf16", 8, 32, 64, more=compiled),
        step("bf16", 8, 32, more=graphs),
        step("bf16", 32, more=("--tricks", "--compile")),
        step("fp32", 8, 32),
        step("tf32", 8, 32),
        step("tf32", 8, 32, more=compiled),
        step("fp32", 8, more=("--tricks",)),
        step("tf32", 32, more=("--tricks",)),
        step("fp16", 8, 32, 64),
        step("fp16", 8, 32, 64, more=compiled),
        step("bf16", 8, 32, 64, arch="vit_large"),
        step("bf16", 8, 32, 64, arch="vit_large", more=compiled),
        step("fp16", 32, arch="vit_large"),
        Job("views", ("views", "--batch", "32")),
        Job("loader", ("loader",)),
        Job("pretrain, bf16", ("pretrain", "--precision", "bf16", "--batch", "32", "--workers", "0", "2", "4", "8",
                               "--repeat", "30")),
        Job("extract, bf16", ("extract", "--precision", "bf16", "--batch", "256")),
        Job("extract, fp32", ("extract", "--precision", "fp32", "--batch", "256")),
        Job("infer", ("infer",)),
        *(Job(f"segment, {name}", ("segment", "--precision", name)) for name in ("fp32", "tf32", "bf16")),
    ]  # fmt: skip


def run_job(job: Job, device: str, *, tiny: bool, repeat: int) -> dict[str, Any]:
    """The document of one job, or why there is none."""
    given = () if "--repeat" in job.words else ("--repeat", str(repeat))
    words = [*job.words, *given, "--device", device, "--json", *(("--tiny",) if tiny else ())]
    command = [sys.executable, str(BENCH), *words]
    started = time.perf_counter()
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return {"title": job.title, "words": words, "failed": f"took longer than {TIMEOUT_S} s"}
    facts = {"title": job.title, "words": words, "seconds": time.perf_counter() - started}
    if answer.returncode:
        return {**facts, "failed": answer.stderr.strip()[-2000:] or f"exit code {answer.returncode}"}
    return {**facts, "document": json.loads(answer.stdout), "said": answer.stderr.strip()[-2000:]}


def page(results: Sequence[dict[str, Any]]) -> str:
    """The results as Markdown tables."""
    documents = [result["document"] for result in results if "document" in result]
    parts = [f"Measured with `scripts/bench_gpu`, {_where(documents[0])}." if documents else "Nothing was measured."]
    for result in results:
        parts.append(f"### {result['title']}\n\n`python scripts/bench.py {' '.join(result['words'])}`")
        if "failed" in result:
            parts.append("Failed:\n\n```\n" + result["failed"] + "\n```")
        else:
            parts.append(_table(result["document"]["rows"]))
    parts.append("### Marks\n\n" + _marks(documents))
    return "\n\n".join(parts) + "\n"


def _where(document: dict[str, Any]) -> str:
    machine, versions = document["machine"], document["versions"]
    cuda = f", CUDA {versions['cuda']}" if versions.get("cuda") else ""
    xformers = f", xformers {versions['xformers']}" if versions.get("xformers") else ""
    device = machine["gpu"] or machine["cpu"]
    return (
        f"{document['started_at'][:10]}, {device}, {machine['cores']} cores, torch {versions['torch']}{cuda}{xformers}"
    )


def _table(rows: Sequence[dict[str, Any]]) -> str:
    heads = list(dict.fromkeys(key for row in rows for key, value in row.items() if value is not None))
    lines = [heads, ["---"] * len(heads), *([_cell(row.get(head)) for head in heads] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value).replace("|", "/")


def _marks(documents: Sequence[dict[str, Any]]) -> str:
    """Each mark with the best value of all runs that it concerns."""
    best: dict[str, dict[str, Any]] = {}
    for document in documents:
        of = ", ".join(str(part) for part in (document["sizes"].get("arch"), document["precision"]) if part)
        for mark in document["marks"]:
            name = f"{document['command']}, {of}: {mark['mark']}"
            before = best.get(name)
            if before is None or _better(mark, before):
                best[name] = mark
    rows = [
        {
            "mark": f"{name} {'≥' if mark['at_least'] else '≤'} {mark['limit']:g}",
            "value": mark["value"] if mark["value"] is not None else "not measured",
            "reached": {True: "reached", False: "NOT reached", None: "not judged"}[mark["reached"]],
        }
        for name, mark in best.items()
    ]
    return _table(rows) if rows else "No mark was judged."


def _better(mark: dict[str, Any], before: dict[str, Any]) -> bool:
    if mark["value"] is None or before["value"] is None:
        return before["value"] is None
    return mark["value"] > before["value"] if mark["at_least"] else mark["value"] < before["value"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure all, write both files; 1 if a benchmark failed."""
    parser = argparse.ArgumentParser(description="Run every benchmark on one GPU and write a page of tables.")
    parser.add_argument("out", type=Path, nargs="?", default=Path("bench_gpu"), help="folder for results")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu")
    parser.add_argument("--repeat", type=int, default=5, help="repetitions after the warm-up")
    parser.add_argument("--only", default="", help="only titles that hold this text")
    parser.add_argument("--tiny", action="store_true", help="reduced size, for tests")
    given = parser.parse_args(arguments)
    jobs = [job for job in plan(given.device, tiny=given.tiny) if given.only in job.title]
    given.out.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    for number, job in enumerate(jobs, 1):
        print(f"[{number}/{len(jobs)}] {job.title}", flush=True)
        results.append(run_job(job, given.device, tiny=given.tiny, repeat=given.repeat))
        if "failed" in results[-1]:
            print(f"  failed: {results[-1]['failed'].splitlines()[0]}", flush=True)
        write_text(given.out / "results.json", to_json({"results": results}))
        write_text(given.out / "results.md", page(results))
    print(f"{given.out / 'results.json'}, {given.out / 'results.md'}")
    return int(any("failed" in result for result in results))
