#!/usr/bin/env python
"""What pretraining on many GPUs sends, waits for and holds: ``python scripts/scaling.py [--tiny] [--json]``.

Three kinds of numbers, each marked as such. ``counted``: parameters and bytes of the real networks, built without
memory. ``simulated``: a step as a sequence of gradient buckets that become ready while the backward pass runs and queue
for the network; its assumptions are the fields of ``Cluster``. ``measured``: the sampler, the store's index and the
list of cases at the size asked for, on this machine. ``docs/scaling.md`` tells what follows.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medssl_cli.core.case import Case
from medssl_cli.core.case import Sequence as Acquisition
from medssl_cli.core.run import to_json
from medssl_cli.data.datasets import ResumableSampler
from medssl_cli.models.heads import DINOHead
from medssl_cli.models.zoo import StudentConfig, build_backbone

ARCHS = {"vits14": "vit_small", "vitb14": "vit_base", "vitl14": "vit_large", "vitg14": "vit_giant2"}
BUCKET_BYTES = 25 * 2**20
"""PyTorch's size of a DDP bucket."""
BACKWARD_SHARE = 0.55
"""Of the time of a step: the backward pass is two thirds of the student's work, the teacher has none."""


@dataclass(frozen=True)
class Cluster:
    """What the simulation assumes; every other number follows.

    Args:
        gpus_per_node: Joined by NVLink.
        node_gb_s: Network of a node, each way: 400 Gb/s are 50 GB/s.
        link_gb_s: NVLink of a GPU, each way.
        efficiency: Share of the wire speed that collectives reach.
        latency_us: Of one hop between nodes; a collective of n nodes has 2 log2(n) of them (tree).
        flop_s: Sustained by a GPU in bf16: 166 samples/s x 2.04 TFLOP, the bare probe on one H200.
        jitter: Relative spread of the step time of one GPU; the slowest of all counts.
    """

    gpus_per_node: int = 8
    node_gb_s: float = 50.0
    link_gb_s: float = 450.0
    efficiency: float = 0.8
    latency_us: float = 15.0
    flop_s: float = 166 * 2.04e12
    jitter: float = 0.01


# --- counted ---------------------------------------------------------------------------------------------------------


def count_network(arch: str, prototypes: int) -> dict[str, int]:
    """Parameters of the backbone and of one head with this many prototypes."""
    student = StudentConfig(arch=ARCHS[arch], patch_size=14, drop_path_rate=0.0)
    with torch.device("meta"):
        backbone = build_backbone(student, 518, ("a", "b", "c"), stochastic_depth=False)
        head = DINOHead(backbone.embed_dim, prototypes)
    return {
        "backbone": sum(p.numel() for p in backbone.parameters()),
        "head": sum(p.numel() for p in head.parameters()),
        "width": backbone.embed_dim,
    }


def bytes_on_the_wire(parameters: int, gpus: int) -> dict[str, float]:
    """What one GPU sends in a step, in bytes, by the way of sharing; as much again comes in.

    A ring of n sends 2 (n - 1) / n of a tensor for an all-reduce, half of it for an all-gather or a reduce-scatter.
    Gradients travel in fp32. Sharded parameters are gathered in bf16: those of student and teacher before their forward
    pass, and with FULL_SHARD those of the student again before the backward pass.
    """
    ring = (gpus - 1) / gpus
    reduce, gather = ring * parameters * 4, ring * parameters * 2
    return {"ddp": 2 * reduce, "shard_grad_op": reduce + 2 * gather, "full_shard": reduce + 3 * gather}


def state_bytes(parameters: int, gpus: int) -> dict[str, float]:
    """Memory of a GPU for parameters, gradients, two moments and the teacher, all fp32, before activations."""
    whole = parameters * 4 * 5.0
    return {"ddp": whole, "sharded": whole / gpus}


def centre_bytes(prototypes: int, heads: int = 2) -> dict[str, int]:
    """Bytes that a GPU reduces for the targets of a step: a centre and a count, or three sums and a maximum."""
    return {"centering": heads * (prototypes + 1) * 4, "sinkhorn": heads * (3 * prototypes + 1) * 4}


# --- simulated -------------------------------------------------------------------------------------------------------


def simulate_step(
    parameters: int, flop_per_sample: float, batch: int, gpus: int, way: str, prototypes: int, cluster: Cluster
) -> dict[str, float]:
    """One step of a GPU: computing, and what of the network's work cannot hide behind it, in ms."""
    compute = batch * flop_per_sample / cluster.flop_s
    nodes = math.ceil(gpus / cluster.gpus_per_node)
    sent = bytes_on_the_wire(parameters, gpus)[way]
    buckets = max(1, math.ceil(parameters * 4 / BUCKET_BYTES))
    wire = _seconds_on_the_wire(sent, nodes, cluster)
    latency = cluster.latency_us * 1e-6 * 2 * max(1.0, math.log2(max(nodes, 2)))
    # DDP: a bucket may be sent once the backward pass has come so far; FSDP gathers all through the step
    span = compute * (BACKWARD_SHARE if way == "ddp" else 1.0)
    free = compute - span
    for number in range(buckets):
        ready = compute - span + span * (number + 1) / buckets
        free = max(ready, free) + wire / buckets + latency
    exposed = max(0.0, free - compute)
    waits = 4 + 2 * 4  # a flag tensor, centres or Sinkhorn sums of two heads: small, and nothing hides them
    small = waits * latency + _seconds_on_the_wire(2.0 * centre_bytes(prototypes)["sinkhorn"], nodes, cluster)
    slowest = compute * cluster.jitter * math.sqrt(2 * math.log(max(gpus, 2))) if gpus > 1 else 0.0
    if gpus == 1:
        exposed = small = 0.0
    total = compute + exposed + small + slowest
    return {
        "compute_ms": compute * 1e3,
        "wire_ms": wire * 1e3 if gpus > 1 else 0.0,
        "exposed_ms": exposed * 1e3,
        "small_collectives_ms": small * 1e3,
        "slowest_ms": slowest * 1e3,
        "efficiency": compute / total,
        "speedup": gpus * compute / total,
    }


def smallest_batch(
    parameters: int, flop: float, gpus: int, way: str, prototypes: int, cluster: Cluster, wanted: float = 0.9
) -> int | None:
    """Samples a GPU must have for the wanted efficiency; None if 256 are too few."""
    for batch in range(1, 257):
        if simulate_step(parameters, flop, batch, gpus, way, prototypes, cluster)["efficiency"] >= wanted:
            return batch
    return None


def _seconds_on_the_wire(sent: float, nodes: int, cluster: Cluster) -> float:
    """A ring over all GPUs crosses the border of a node once, so a node sends what a GPU sends."""
    speed = cluster.link_gb_s if nodes == 1 else cluster.node_gb_s
    return sent / (speed * 1e9 * cluster.efficiency)


def flop_per_sample(parameters: int) -> float:
    """2.04 TFLOP for the 86.6 M of ViT-B/14 (3 sequences, 2 x 224 and 8 x 112 pixels), in proportion for others."""
    return 2.04e12 * parameters / 86.6e6


# --- measured --------------------------------------------------------------------------------------------------------


def measure_sampler(cases: int, gpus: int) -> dict[str, float]:
    """Time of the first batch of a pass, of a later one, and bytes held by one process."""
    sampler = ResumableSampler(cases, 64, 0, 0, gpus - 1, gpus)
    first = _seconds(lambda: sampler.batch_at(0))
    later = min(_seconds(lambda n=n: sampler.batch_at(n)) for n in range(1, 20))  # type: ignore[misc]
    held = sum(order.nbytes for order in sampler._orders.values())
    return {"cases": cases, "first_batch_s": first, "later_batch_us": later * 1e6, "order_mb": held / 1e6}


def measure_index(cases: int) -> dict[str, float]:
    """A synthetic index of as many volumes, mapped and not read: size, one look-up, and a pass over all spacings."""
    from medssl_cli.data.store import Store

    with tempfile.TemporaryDirectory() as place:
        store = _synthetic_store(Path(place), cases)
        before = _resident_mb()
        look = min(_seconds(lambda n=n: store.facts(n)) for n in np.linspace(0, cases - 1, 50).astype(int))  # type: ignore[misc]
        held = _resident_mb() - before
        spacings = _seconds(store.spacings)
        assert isinstance(store, Store)
        size = (Path(place) / "synthetic/table.bin").stat().st_size
    return {
        "cases": cases,
        "table_mb": size / 1e6,
        "look_up_us": look * 1e6,
        "resident_after_look_ups_mb": held,
        "all_spacings_s": spacings,
        "files_a_folder": cases / 256,
    }


def _synthetic_store(cache: Path, cases: int) -> Any:
    from medssl_cli.data.prepared_file import RECORD
    from medssl_cli.data.store import FORMAT, Store

    folder = cache / "synthetic"
    folder.mkdir()
    record = np.zeros(1, RECORD)
    record["affine"] = np.eye(4)
    record["shape"] = (24, 320, 320)
    record["id_bytes"] = 4
    block = np.repeat(record, min(cases, 100_000))
    with (folder / "table.bin").open("wb") as file:
        for start in range(0, cases, len(block)):
            file.write(block[: cases - start].tobytes())
    (folder / "ids.bin").write_bytes(b"PT-0")
    for name in ("facts", "files"):
        (folder / f"{name}.bin").write_bytes(b"\0" * 64)
    about = {"format": FORMAT, "kind": "volumes", "sequences": ["a", "b", "c"], "cases": cases, "size_bytes": 0}
    about |= {"channels": 3, "preprocess": {}, "failures": []}
    (folder / "store.json").write_text(json.dumps(about))
    return Store(cache, "synthetic")


def measure_case_list(cases: int) -> dict[str, float]:
    """Memory and pickled size of the list of cases, which the first process reads and hands to the others."""
    import pickle

    tracemalloc.start()
    listed = [
        Case(
            f"PT-{n:08d}",
            f"PT-{n:08d}",
            sequences={
                name: Acquisition(name, Path(f"/data/PT-{n:08d}/{name}.nii.gz")) for name in ("t2", "adc", "dwi")
            },
        )
        for n in range(cases)
    ]
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return {"cases": cases, "bytes_a_case": held / cases, "pickled_bytes_a_case": len(pickle.dumps(listed)) / cases}


def _seconds(work: Any) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _resident_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# --- the whole -------------------------------------------------------------------------------------------------------


def scaling(tiny: bool, cluster: Cluster | None = None) -> dict[str, Any]:
    """All numbers of ``docs/scaling.md``."""
    cluster = cluster or Cluster()
    archs: Sequence[str] = ("vits14",) if tiny else tuple(ARCHS)
    sizes = (1, 8, 1024) if tiny else (1, 2, 4, 8, 16, 64, 256, 1024)
    prototypes = 65_536
    counted: dict[str, Any] = {}
    simulated, batches = [], {}
    for arch in archs:
        network = count_network(arch, prototypes)
        student = network["backbone"] + 2 * network["head"]
        counted[arch] = {
            **network,
            "student": student,
            "sent_bytes_1024": bytes_on_the_wire(student, 1024),
            "state_bytes_1024": state_bytes(student, 1024),
        }
        flop = flop_per_sample(network["backbone"])
        for way in ("ddp", "shard_grad_op", "full_shard"):
            batches[f"{arch}, {way}"] = {
                str(gpus): smallest_batch(student, flop, gpus, way, prototypes, cluster) for gpus in (64, 256, 1024)
            }
            for batch in (8, 32):
                for gpus in sizes:
                    step = simulate_step(student, flop, batch, gpus, way, prototypes, cluster)
                    simulated.append({"arch": arch, "way": way, "batch_per_gpu": batch, "gpus": gpus, **step})
    cases = 20_000 if tiny else 10_000_000
    return {
        "cluster": asdict(cluster),
        "counted": counted,
        "centre_bytes": centre_bytes(prototypes),
        "simulated": simulated,
        "smallest_batch_for_90_percent": batches,
        "measured": {
            "sampler": measure_sampler(cases, 1024),
            "index": measure_index(cases),
            "case_list": measure_case_list(min(cases, 50_000)),
        },
    }


def show(found: dict[str, Any]) -> str:
    """The tables of the document."""
    lines = [
        "| network | backbone | student with two heads | ddp | shard_grad_op | full_shard |",
        "|---|---|---|---|---|---|",
    ]
    for arch, row in found["counted"].items():
        sent = " | ".join(f"{value / 1e9:.2f} GB" for value in row["sent_bytes_1024"].values())
        lines.append(f"| {arch} | {row['backbone'] / 1e6:.1f} M | {row['student'] / 1e6:.1f} M | {sent} |")
    lines += ["", "| network | way | batch a GPU | GPUs | compute ms | wire ms | exposed ms | small ms | efficiency |"]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    for row in found["simulated"]:
        times = (row[name] for name in ("compute_ms", "wire_ms", "exposed_ms", "small_collectives_ms"))
        lines.append(
            f"| {row['arch']} | {row['way']} | {row['batch_per_gpu']} | {row['gpus']} | "
            + " | ".join(f"{value:.1f}" for value in times)
            + f" | {100 * row['efficiency']:.0f} % |"
        )
    lines += ["", "smallest batch of a GPU for 90 %, on 64, 256 and 1024 GPUs:"]
    lines += [f"{name}: {row}" for name, row in found["smallest_batch_for_90_percent"].items()]
    lines.append("")
    for name, row in found["measured"].items():
        lines.append(f"{name}: " + ", ".join(f"{key} {value:,.4g}" for key, value in row.items()))
    return "\n".join(lines)


def main() -> None:
    """Print all numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tiny", action="store_true", help="one network, few cases")
    parser.add_argument("--json", action="store_true", help="one JSON document")
    options = parser.parse_args()
    found = scaling(options.tiny)
    sys.stdout.write((to_json(found) if options.json else show(found)) + "\n")


if __name__ == "__main__":
    main()
