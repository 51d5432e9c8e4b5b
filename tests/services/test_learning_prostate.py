"""Pretraining makes lesions of the prostate phantom easier to find than at random initialisation."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from medssl_cli.core.run import seed_for
from medssl_cli.core.volume import AXIAL
from medssl_cli.data.datasets import DataConfig, plan_window, prepare_store
from medssl_cli.data.images import read_volume
from medssl_cli.data.manifest import read_cases
from medssl_cli.data.store import Store
from medssl_cli.metrics.classification import auroc, linear_scores
from medssl_cli.services.backbone import Backbone, open_backbone
from medssl_cli.services.lookup import find_model
from medssl_cli.services.phantom import make_phantom
from medssl_cli.services.pretrain import PretrainRequest, pretrain

SIDE = 43
"""Window in voxels of about 1.2 mm: the gland with a margin."""
LEAST_ROI_PIXELS = 20


def patch_features(backbone: Backbone, store: Store, root: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Patch tokens within the gland (M, S*D), whether they show lesion (M,), and the case each belongs to (M,)."""
    tokens, labels, cases = [], [], []
    size = backbone.spatial_size
    for case in range(len(store)):
        facts, plane = store.slice_facts(case, AXIAL), store.facts(case)
        lesion = read_volume(root / plane.case_id / "lesion.nii.gz").reoriented("RAS").array > 0
        for z in np.flatnonzero(facts.roi_pixels_N >= LEAST_ROI_PIXELS):
            top, left, height, width = window = plan_window(plane.shape[1:], (SIDE, SIDE), facts.roi_centre_N2[z])
            stored = store.read_slice(case, AXIAL, int(z), window=window)
            image = functional.interpolate(torch.from_numpy(stored.scaled())[None], (size, size), mode="bilinear")
            seen = backbone.see(backbone.to_network(image.numpy(), (size, size)), plane.available_S)
            grid = seen.patches_BShwD.shape[2]
            gland = share_of_patches(stored.roi_HW, grid)
            ill = share_of_patches(lesion[z, top : top + height, left : left + width], grid)
            clear = (gland > 0.5) & ((ill == 0) | (ill > 0.3))
            joined = np.moveaxis(seen.patches_BShwD[0], 0, 2).reshape(grid, grid, -1)
            tokens.append(joined[clear])
            labels.append(ill[clear] > 0.3)
            cases += [case] * int(clear.sum())
    return np.concatenate(tokens), np.concatenate(labels).astype(int), np.array(cases)


def share_of_patches(mask: np.ndarray, grid: int) -> np.ndarray:
    return functional.interpolate(torch.from_numpy(mask)[None, None].float(), (grid, grid), mode="area")[0, 0].numpy()


def lesion_auroc(weights: Path, store: Store, root: Path, train_cases: set[int]) -> float:
    """Linear probe on the patches of some patients, tested on those of others."""
    tokens, labels, cases = patch_features(open_backbone(find_model(weights), torch.device("cpu")), store, root)
    in_train = np.isin(cases, sorted(train_cases))
    rng = np.random.default_rng(seed_for(0, "patches"))

    def chosen(part: np.ndarray) -> np.ndarray:
        healthy = np.flatnonzero(part & (labels == 0))
        return np.concatenate([np.flatnonzero(part & (labels == 1)), rng.choice(healthy, 3000, replace=False)])

    train, test = chosen(in_train), chosen(~in_train)
    return auroc(linear_scores(tokens[train], labels[train], tokens[test], c=0.01), labels[test])


@pytest.mark.slow
def test_lesions_are_easier_to_find_after_pretraining(tmp_path: Path) -> None:
    root = tmp_path / "cases"
    make_phantom("prostate", root, cases=56, seed=5)
    rows = list(csv.DictReader((root / "labels.csv").read_text(encoding="utf-8").splitlines()))
    patients = sorted({row["patient_id"] for row in rows})
    half = set(patients[: len(patients) // 2])
    split = tmp_path / "train.csv"
    split.write_text("case_id\n" + "".join(f"{r['case_id']}\n" for r in rows if r["patient_id"] in half))

    def train(name: str, *overrides: str) -> Path:
        request = PretrainRequest(
            config="demo", data=root, split_csv=split, cache=tmp_path / "cache", out=tmp_path / name, seed=0,
            overrides=("train.batch_size_per_gpu=16", "train.tensorboard=false", *overrides),
        )  # fmt: skip
        pretrain(request)
        return tmp_path / name

    untrained = train("untrained", "optim.epochs=1", "train.OFFICIAL_EPOCH_LENGTH=1", "optim.warmup_epochs=0",
                      "optim.base_lr=1e-12", "optim.min_lr=0")  # fmt: skip
    trained = train("trained", "optim.epochs=12")
    config = DataConfig(root=str(root))
    cases = read_cases(root, config.mri_sequences)
    store = prepare_store(cases, config, tmp_path / "cache", kind="volumes")
    train_cases = {i for i, case in enumerate(cases) if case.patient_id in half}
    before = lesion_auroc(untrained, store, root, train_cases)
    after = lesion_auroc(trained, store, root, train_cases)
    print(f"lesion AUROC of patches: {before:.3f} before, {after:.3f} after pretraining")
    assert after > before + 0.005
