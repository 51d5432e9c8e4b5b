#!/usr/bin/env python
"""Is a backbone worth anything? ``python scripts/chain.py ROOT --model RUN --out DIR --task binary [...]``.

Runs ``extract``, ``train-head`` and ``eval`` on labelled pictures or volumes three times: with the backbone, with the
same network at its random start, and, for pictures, with the plain pixels. The commands are printed as they run; the
table at the end holds the test part's numbers with their intervals, and the difference to the backbone.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from medssl_cli.core.errors import MedsslError
from medssl_cli.core.run import seed_for
from medssl_cli.data.feature_store import FeaturePart, read_features, write_features
from medssl_cli.data.images import is_image, read_image
from medssl_cli.models.zoo import load_backbone, read_card, save_backbone
from medssl_cli.services.lookup import find_model

OWN_KEYS = ("mean", "std", "preprocess", "spatial_size", "windows_hu", "as_pictures", "modality", "recipe")
"""Of a card: what belongs to the images, not to the weights."""


def medssl(*words: object) -> None:
    """One command of ours, printed and run."""
    said = [str(word) for word in words]
    print("+ medssl", " ".join(said), file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "medssl_cli", *said], check=True, stdout=sys.stderr)


def random_twin(weights: Path, out: Path, seed: int) -> Path:
    """The same network before any training, with the same card."""
    model, _ = load_backbone(weights)
    card = read_card(weights)
    torch.manual_seed(seed_for(seed, "random twin"))
    twin = type(model)(**model.settings)
    path = out / "random_backbone.safetensors"
    save_backbone(path, twin, {key: card[key] for key in OWN_KEYS if key in card})
    return path


def pixel_features(features: Path, root: Path, out: Path, side: int) -> None:
    """The pictures themselves as vectors: reduced to ``side`` pixels, all channels end to end."""
    stored = read_features(features)
    parts = []
    for name in stored.names:
        part = stored.part(name)
        vectors = np.stack([_pixels(root / row.path, side) for row in part.rows])
        parts.append(FeaturePart(name, vectors, part.labels_RC, part.rows, part.facts))
    width = parts[0].embeddings_RP.shape[1]
    extraction = {"pixels": side, "embedding_dim": width}
    model = {"path": "pixels", "sha256": "", "arch": "pixels", "sequences": ["image"]}
    info = {**stored.info, "slice_dim": width, "embedding_dim": width, "extraction": extraction, "model": model}
    write_features(out / "features", info, parts)


def _pixels(path: Path, side: int) -> np.ndarray:
    picture = read_image(path).astype(np.float32)
    planes = [np.asarray(Image.fromarray(plane).resize((side, side), Image.Resampling.BOX)) for plane in picture]
    return np.concatenate([plane.ravel() for plane in planes]).astype(np.float32) / 255


def figures(folder: Path) -> dict[str, Any]:
    """``metrics.json`` of one evaluation."""
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def table(results: dict[str, dict[str, Any]], names: Sequence[str]) -> str:
    """One line a metric: value and interval of each way."""
    shown = [name for name in names if all(name in result["metrics"] for result in results.values())]
    lines = ["| metric | " + " | ".join(results) + " |", "|---" * (len(results) + 1) + "|"]
    for name in shown:
        cells = [_cell(result["metrics"][name]) for result in results.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(metric: dict[str, Any]) -> str:
    if metric["value"] is None:
        return "–"
    if metric["ci_low"] is None:
        return f"{metric['value']:.3f}"
    return f"{metric['value']:.3f} ({metric['ci_low']:.3f}–{metric['ci_high']:.3f})"


def differences(way: str, comparison: dict[str, Any]) -> list[str]:
    """One line a test: how far a way lies from the backbone."""
    lines = [f"{way} minus backbone, {comparison['n']} cases of {comparison['n_groups']} patients:"]
    for name, test in comparison["tests"].items():
        if test["difference"] is None:
            lines.append(f"  {name}: undefined")
            continue
        interval = "" if test["ci_low"] is None else f" ({test['ci_low']:+.3f} to {test['ci_high']:+.3f})"
        p = "undefined" if test["p"] is None else f"{test['p']:.3f}"
        lines.append(f"  {name}: {test['difference']:+.3f}{interval}, p {p}, {test['method']}")
    return lines


def run(given: argparse.Namespace) -> int:
    """All ways, one after the other."""
    found = find_model(given.model)
    given.out.mkdir(parents=True, exist_ok=True)
    labels = [
        *(["--labels", given.labels] if given.labels else []),
        *(["--target", given.target] if given.target else []),
    ]
    splits = ["--splits", given.splits] if given.splits else []
    ways = {"backbone": given.model, "random": random_twin(found.weights, given.out, given.seed)}
    for way, model in ways.items():
        where = given.out / way
        medssl("extract", given.root, "--model", model, "--out", where, *labels, *splits, *given.extract)
    if given.root.is_dir() and any(is_image(path) for path in given.root.rglob("*")):
        pixel_features(given.out / "backbone", given.root, given.out / "pixels", given.side)
        ways["pixels"] = Path("pixels")
    results = {}
    for way in ways:
        features, head, scores = given.out / way, given.out / f"{way}_head", given.out / f"{way}_eval"
        medssl("train-head", features, "--task", given.task, "--out", head, *given.head)
        compare = [] if way == "backbone" else ["--compare", given.out / "backbone_eval"]
        medssl("eval", "--model", head, "--data", features, "--split", given.split, "--out", scores, *compare)
        results[way] = figures(scores)
    print(table(results, given.metrics))
    for way, result in results.items():
        if way != "backbone" and result.get("comparison"):
            print("\n".join(differences(way, result["comparison"])))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the words, run, and give the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("root", type=Path, help="case tree, image tree or series table with labels")
    parser.add_argument("--model", type=Path, required=True, help="run folder or weight file")
    parser.add_argument("--out", type=Path, required=True, help="folder of all results")
    parser.add_argument("--task", required=True, choices=("binary", "multiclass", "multilabel", "regression"))
    parser.add_argument("--labels", type=Path, help="CSV, with --target")
    parser.add_argument("--target", help="columns of the labels, with commas between")
    parser.add_argument("--splits", type=Path, help="folder of `medssl split`")
    parser.add_argument("--split", default="test", help="part that is evaluated")
    parser.add_argument("--side", type=int, default=32, help="of the plain pixels")
    parser.add_argument("--seed", type=int, default=0, help="of the random start")
    parser.add_argument("--extract", nargs="*", default=[], help="KEY=VALUE of extract")
    parser.add_argument("--head", nargs="*", default=[], help="KEY=VALUE of train-head")
    wanted = ["auroc", "macro_auroc", "average_precision", "balanced_accuracy", "mcc", "sensitivity", "specificity",
              "brier", "ece", "mae", "r2", "pearson", "quadratic_weighted_kappa"]  # fmt: skip
    parser.add_argument("--metrics", nargs="+", default=wanted)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        return run(parser.parse_args(arguments))
    except MedsslError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except subprocess.CalledProcessError as error:
        return error.returncode


if __name__ == "__main__":
    sys.exit(main())
