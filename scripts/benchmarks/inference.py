"""``bench.py infer``: volumes through a backbone and a head with heat map and report; time and memory a case."""

from __future__ import annotations

import itertools
import logging
import resource
import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.measuring import Findings, Mark, Options
from medssl_cli.models.zoo import StudentConfig, build_backbone, save_backbone
from medssl_cli.services.extract import ExtractRequest, extract
from medssl_cli.services.head_request import TrainHeadRequest
from medssl_cli.services.infer import InferRequest
from medssl_cli.services.infer import infer as look_at
from medssl_cli.services.phantom import make_phantom
from medssl_cli.services.train_head import train_head

LABEL = "label_any"


def infer(options: Options) -> Findings:
    """Phantom heads one after the other in one call: the first brings the model, the others should not."""
    logging.getLogger("medssl_cli").setLevel(logging.ERROR)
    cases = 4 if options.tiny else 24
    with tempfile.TemporaryDirectory(prefix="medssl-bench-") as temporary:
        folder = Path(temporary)
        make_phantom("head-ct", folder / "data", cases=max(cases, 8), size="small")
        head = train(folder, options)
        volumes = sorted((folder / "data").glob("*/*/ct.nii.gz"))[:cases]
        rows = []
        for what, heatmap in (("without heat map", False), ("with heat map", True)):
            stamps: list[tuple[float, float]] = [(time.perf_counter(), peak_mb())]
            request = InferRequest(
                cases=tuple(map(str, volumes)),
                model=head,
                heatmap=heatmap,
                out=folder / what.replace(" ", "_"),
                device=str(options.device),
            )
            look_at(
                request, progress=lambda done, total, stamps=stamps: stamps.append((time.perf_counter(), peak_mb()))
            )
            seconds = [later[0] - earlier[0] for earlier, later in itertools.pairwise(stamps)]
            rows.append(
                {
                    "what": what,
                    "cases": len(seconds),
                    "first_ms": 1e3 * seconds[0],
                    "wall_ms": 1e3 * statistics.median(seconds[1:]),
                    "growth_mb": stamps[-1][1] - stamps[len(stamps) // 2][1],
                }
            )
    return Findings(
        {"network": options.arch if not options.tiny else "ViT of width 64", "volume": "phantom head CT, small"},
        rows,
        {f"further case / first case, {row['what']}": row["wall_ms"] / row["first_ms"] for row in rows},
        [Mark(f"MB that memory grows over the later half, {row['what']}", row["growth_mb"], 50.0) for row in rows],
    )


def train(folder: Path, options: Options) -> Path:
    """A head on a network at its random start; what it says is of no interest here."""
    size = {"embed_dim": 64, "depth": 2, "num_heads": 1} if options.tiny else {}
    student = StudentConfig(arch="vit_tiny" if options.tiny else options.arch, patch_size=16, **size)
    torch.manual_seed(0)
    model = build_backbone(student, 96, None, stochastic_depth=False)
    preprocess = {"orientation": "LPS", "window_hu": [0.0, 80.0]}
    card = {"mean": 0.4, "std": 0.3, "preprocess": preprocess, "spatial_size": 96, "as_pictures": True}
    save_backbone(folder / "backbone.safetensors", model, card)
    extract(
        ExtractRequest(
            input=folder / "data" / "series.csv",
            out=folder / "features",
            model=folder / "backbone.safetensors",
            targets=(LABEL,),
            cache=folder / "cache",
            device=str(options.device),
        )
    )
    train_head(TrainHeadRequest(data=folder / "features", task="binary", out=folder / "head", target=(LABEL,)))
    return folder / "head"


def peak_mb() -> float:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
