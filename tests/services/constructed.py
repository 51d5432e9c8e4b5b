"""Networks whose answer is known, cases that go with them, and head runs as ``medssl train-head`` leaves them."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from medssl_cli.metrics.novelty import Novelty
from medssl_cli.models.feature_heads import build_head
from medssl_cli.services import infer as infer_module
from medssl_cli.services.backbone import open_backbone
from medssl_cli.services.embedding import Embedder, ExtractConfig
from medssl_cli.services.head import save_head
from medssl_cli.services.infer import InferRequest, infer
from medssl_cli.services.lookup import find_model


def read_contrast(model: Any) -> None:
    """CLS takes up the left-right contrast of patches; brightness lies in another channel, which nobody reads.

    Attention is even, the first block changes nothing, and the last one hands channel 3 of its normed tokens on to
    channel 5 of CLS.
    """
    for parameter in model.parameters():
        parameter.zero_()
    kernel = model.patch_embed.proj.weight
    kernel[0] = 1 / kernel[0].numel()
    kernel[3, ..., : kernel.shape[-1] // 2] = 1 / kernel[0].numel()
    kernel[3, ..., kernel.shape[-1] // 2 :] = -1 / kernel[0].numel()
    model.patch_embed.proj.bias[1], model.patch_embed.proj.bias[2] = 1.0, -1.0
    model.norm.weight.fill_(1)
    for block in model.flat_blocks():
        block.norm1.weight.fill_(1)
        block.norm2.weight.fill_(1)
    last = list(model.flat_blocks())[-1]
    last.attn.qkv.weight[2 * 32 + 4, 3] = 1.0  # value 4 is channel 3
    last.attn.proj.weight[5, 4] = 1.0
    last.ls1.gamma.fill_(1)
    model.cls_token[..., 7] = 1.0  # so that the final norm has something to divide by


def noise(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(100, 140, (48, 32, 5)).astype(np.int16)


def with_contrast(row: int, column: int, z: int, seed: int = 0) -> np.ndarray:
    """Noise with one patch of strong left-right contrast, and a brighter one without it."""
    array = noise(seed)
    left, top = 8 * column, 8 * row
    array[left : left + 4, top : top + 8, z] += 600
    array[0:8, 0:8, 1] += 900
    return array


def save(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.diag([1.0, 1, 3, 1]) if affine is None else affine), path)
    return path


def write_head(
    folder: Path,
    run: Path,
    *,
    task: str = "binary",
    classes: tuple[str, ...] = ("bleeding",),
    pool: str = "mean",
    kind: Any = "linear",
    extraction: ExtractConfig | None = None,
    zero: bool = False,
    weights: np.ndarray | None = None,
    thresholds: list[float] | None = None,
    novelty: Novelty | None = None,
    reliability: Any = None,
    **card: Any,
) -> Path:
    """A head run as ``medssl train-head`` leaves it, with random, zero or given weights."""
    backbone = open_backbone(find_model(run), torch.device("cpu"))
    embedder = Embedder(backbone, extraction or ExtractConfig())
    width = embedder.width * (2 if pool == "meanmax" else 1)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        module = build_head(kind, width, len(classes), hidden_dim=8, dropout=0.0)
    if zero:
        module.load_state_dict({name: torch.zeros_like(value) for name, value in module.state_dict().items()})
    if weights is not None:
        module.last.weight.data[:] = torch.from_numpy(weights)
    told = {
        "task": task, "targets": list(classes), "classes": list(classes), "outputs": len(classes), "kind": kind,
        "hidden_dim": 8, "dropout": 0.0, "slice_dim": embedder.width, "input_width": width, "pool_mode": pool,
        "level": "slice" if pool == "none" else "case", "case_rule": "max", "thresholds": thresholds,
        "threshold_rule": "youden", "calibration": None, "calibrated": False,
        "preprocessing": embedder.settings, "scaler": None,
        "model": {"path": str(backbone.found.weights), "sha256": backbone.card["sha256"]},
    }  # fmt: skip
    save_head(folder, {**told, **card}, module, novelty=novelty, reliability=reliability)
    (folder / "run.json").write_text(json.dumps({"status": "finished"}), encoding="utf-8")
    return folder


def run_infer(out: Path, model: Path, *cases: Path, **more: Any) -> list[dict[str, Any]]:
    request = InferRequest(cases=tuple(map(str, cases)), model=model, out=out, device="cpu", **more)
    return infer(request).facts["cases"]


def survivors(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that ``infer`` fills: at each case, how many images and results of the cases before it still exist."""
    refs: list[weakref.ref[Any]] = []
    counts: list[int] = []
    looked_at = infer_module._looked_at

    def watched(*args: Any, **more: Any) -> Any:
        gc.collect()
        counts.append(sum(ref() is not None for ref in refs))
        results = looked_at(*args, **more)
        planes = results.planes
        refs.extend(map(weakref.ref, (results, results.seen, planes, planes.stored_SNHW)))
        return results

    monkeypatch.setattr(infer_module, "_looked_at", watched)
    return counts
