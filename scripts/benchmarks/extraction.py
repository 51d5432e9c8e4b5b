"""``bench.py extract``: pictures to vectors, against Hugging Face's network of the same weights; the second run."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from benchmarks.measuring import Findings, Mark, Options, Parts, measure
from medssl_cli.core.case import Case
from medssl_cli.core.case import Sequence as Acquisition
from medssl_cli.core.errors import MedsslError, ResourceError
from medssl_cli.data.feature_cache import FeatureCache
from medssl_cli.data.images import write_image
from medssl_cli.services.backbone import open_backbone
from medssl_cli.services.convert_weights import WeightsRequest, convert_weights
from medssl_cli.services.embedding import Embedder, ExtractConfig
from medssl_cli.services.lookup import find_model

SIDE = 224


def extract(options: Options) -> Findings:
    """One batch through the bare network, ours and Hugging Face's; then pictures from files, and from the cache."""
    logging.getLogger("medssl_cli").setLevel(logging.WARNING)
    batch = options.batch[0]
    with tempfile.TemporaryDirectory(prefix="medssl-bench-") as temporary:
        folder = Path(temporary)
        theirs = hugging_face(options)
        side = theirs.config.image_size
        embedder = ours(theirs, folder, options)
        images_BCHW = torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(0)).to(options.device)
        theirs.to(options.device)
        with torch.inference_mode():
            distance = (cls_of(theirs, images_BCHW) - embedder.backbone.model(images_BCHW).cls_BD).abs()
        difference = float(distance.max())
        parts: Parts = {
            "Hugging Face, SDPA": lambda: autocast(options, lambda: cls_of(theirs, images_BCHW)),
            "medssl": lambda: autocast(options, lambda: embedder.backbone.model(images_BCHW)),
        }
        timings = measure(parts, options.repeat, options.device, warmup=2)
        rows = [{**timing.row(name, batch), "images": batch} for name, timing in timings.items()]
        cases = write_pictures(folder / "pictures", 3 * batch, side)
        rows += file_rows(embedder, cases, options)
    of_them = timings["Hugging Face, SDPA"].row("")["cpu_ms" if options.clock == "cpu" else "wall_ms"]
    ours_ms = timings["medssl"].row("")["cpu_ms" if options.clock == "cpu" else "wall_ms"]
    second = next(row for row in rows if row["what"] == "from the cache")
    peak = share_of_peak(options, ours_ms / batch, embedder) if options.on_gpu else None
    return Findings(
        {
            "network": "ViT-B/16" if not options.tiny else "ViT of width 64",
            "side": side,
            "batch": batch,
            "cls_difference": difference,
        },
        rows,
        {"Hugging Face / medssl, time": of_them / ours_ms},
        [
            Mark(
                "of the speed of Hugging Face, CPU", None if options.on_gpu else of_them / ours_ms, 1.0, at_least=True
            ),
            Mark("difference of the cls token", difference if options.precision == "fp32" else None, 1e-4),
            Mark("of the matrix peak, bf16, batch 256, H200", peak if options.on_h200 else None, 0.45, at_least=True),
            Mark("forward passes of the second run", float(second["forward_passes"]), 0.0),
        ],
    )


def autocast(options: Options, work: Any) -> Any:
    """``work`` without gradients in the number format asked for."""
    with (
        torch.inference_mode(),
        torch.autocast(options.device.type, torch.bfloat16, enabled=options.precision == "bf16"),
    ):
        return work()


def hugging_face(options: Options) -> Any:
    """A ViT with random weights, of the size of the benchmark.

    Raises:
        ResourceError: transformers is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise ResourceError(
            "This benchmark compares with transformers, which is not installed.",
            fix="pip install 'medssl[dev]'",
            code="package_missing",
        ) from error
    tiny = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1, "intermediate_size": 256}
    size = {**tiny, "image_size": 32} if options.tiny else {"image_size": SIDE}
    config = transformers.ViTConfig(**size, patch_size=16, attn_implementation="sdpa")
    torch.manual_seed(0)
    return transformers.ViTModel(config, add_pooling_layer=False).eval()


@torch.inference_mode()
def cls_of(theirs: Any, images_BCHW: torch.Tensor) -> torch.Tensor:
    """Their cls token after the last norm."""
    return theirs(pixel_values=images_BCHW).last_hidden_state[:, 0]


def ours(theirs: Any, folder: Path, options: Options) -> Embedder:
    """The same weights as a backbone of ours, converted as a user would."""
    theirs.config.save_pretrained(folder)
    save_file({name: tensor.contiguous() for name, tensor in theirs.state_dict().items()}, folder / "model.safetensors")
    convert_weights(WeightsRequest(folder / "model.safetensors", folder / "weights", "hf"))
    backbone = open_backbone(find_model(folder / "weights"), options.device)
    precision = "bf16" if options.precision == "bf16" else "fp32"
    config = ExtractConfig(batch_size=options.batch[0], precision=precision)
    return Embedder(backbone, config, FeatureCache(folder / "cache"))


def write_pictures(folder: Path, count: int, side: int) -> list[Case]:
    """Noise in PNG files."""
    cases = []
    for number in range(count):
        path = folder / f"{number:04d}.png"
        path.parent.mkdir(exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 256, (side, side, 3), np.uint8)
        write_image(path, noise)
        cases.append(Case(path.name, path.name, {"image": Acquisition("image", path)}))
    return cases


def file_rows(embedder: Embedder, cases: Sequence[Case], options: Options) -> list[dict[str, Any]]:
    """Decoding and forward overlapped, once without and once with what the first run left in the cache."""
    rows = []
    for what in ("from files", "from the cache"):
        before = embedder.forward_passes
        timing = measure({what: lambda: list_of(embedder, cases)}, 1, options.device, warmup=0)[what]
        row = timing.row(what, len(cases))
        rows.append({**row, "images": len(cases), "forward_passes": embedder.forward_passes - before})
    return rows


def list_of(embedder: Embedder, cases: Sequence[Case]) -> None:
    """Every vector; an error is raised."""
    for _, _, result in embedder.embed_many(cases):
        if isinstance(result, MedsslError):
            raise result


def share_of_peak(options: Options, ms_per_image: float, embedder: Embedder) -> float:
    """What the network does in a second over what one large matrix product does on the same device."""
    model = embedder.backbone.model
    side = model.img_size if isinstance(model.img_size, int) else model.img_size[0]
    tokens, width = 1 + (side // model.patch_size) ** 2, model.embed_dim
    depth = len(model.drop_rates) if hasattr(model, "drop_rates") else 0
    flop = depth * tokens * (24 * width**2 + 4 * tokens * width)
    n, kind = 8192, torch.bfloat16 if options.precision == "bf16" else torch.float32
    left = torch.randn(n, n, device=options.device, dtype=kind)
    timing = measure({"peak": lambda: left @ left}, 10, options.device, warmup=3)["peak"]
    return (flop / (ms_per_image / 1e3)) / (2 * n**3 / (timing.row("")["fastest_ms"] / 1e3))
