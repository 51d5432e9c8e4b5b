"""The recipe for small pictures learns: its features tell real radiographs apart better than those of a fresh network.

PneumoniaMNIST, developers' part: 1,788 pictures to train on, without their labels, and 524 to be told apart. The labels
meet the frozen features only here. So that one core needs about a minute the run is cut to 112 steps;
``docs/benchmarks.md`` has the figures of the whole recipe.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from medssl_cli.data.views import normalize
from medssl_cli.engine.telemetry import read_metrics
from medssl_cli.metrics.classification import auroc, knn_probabilities, linear_scores
from medssl_cli.models.vit import VisionTransformer
from medssl_cli.models.zoo import build_backbone, load_backbone
from medssl_cli.services.pretrain import PretrainRequest, pretrain, resolve_config

pytestmark = pytest.mark.slow

KNN_MARK = 0.86
"""Least AUROC of nearest neighbours after up to 448 steps."""

SHORTER = ("optim.epochs=4",)


@dataclass(frozen=True)
class Radiographs:
    """Grey pictures (N, 1, 28, 28) in [0, 1] and labels (N,): 1 for pneumonia."""

    train_NCHW: torch.Tensor
    train_N: np.ndarray
    test_NCHW: torch.Tensor
    test_N: np.ndarray


@dataclass(frozen=True)
class Learned:
    """A finished run and its scores: AUROC of (k-NN, logistic regression) on pictures that it never saw."""

    out: Path
    trained: tuple[float, float]
    untrained: tuple[float, float]


@pytest.fixture(scope="module")
def radiographs(real_data: Path) -> Radiographs:
    file = real_data / "pneumoniamnist" / "pneumoniamnist_dev.npz"
    if not file.is_file():
        pytest.skip(f"no radiographs: {file} is missing; set MEDSSL_TEST_DATA")
    with np.load(file) as held:
        parts = {name: held[name] for name in held.files}
    pictures = [torch.from_numpy(parts[f"{part}_images"]).float()[:, None] / 255 for part in ("train", "val")]
    labels = [parts[f"{part}_labels"][:, 0] for part in ("train", "val")]
    return Radiographs(pictures[0], labels[0], pictures[1], labels[1])


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """The same sums in the same order however many cores there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def learned(radiographs: Radiographs, one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Learned:
    folder = tmp_path_factory.mktemp("learning")
    pictures = folder / "pictures"
    pictures.mkdir()
    for number, picture in enumerate((radiographs.train_NCHW[:, 0] * 255).round().to(torch.uint8).numpy()):
        Image.fromarray(picture).save(pictures / f"{number:05d}.png")
    out = folder / "run"
    request = PretrainRequest(
        config="images_small",
        data=pictures,
        out=out,
        cache=folder / "cache",
        overrides=SHORTER,
        device="cpu",
        workers=0,
        seed=0,
    )
    pretrain(request)
    teacher, card = load_backbone(out / "export" / "teacher_backbone.safetensors")
    config = resolve_config(request)
    torch.manual_seed(config.train.seed)
    fresh = build_backbone(config.student, config.train.img_size, None, stochastic_depth=False)
    return Learned(out, score(teacher, card, radiographs), score(fresh.eval(), card, radiographs))


@torch.no_grad()
def score(backbone: VisionTransformer, card: dict[str, float], radiographs: Radiographs) -> tuple[float, float]:
    """AUROC of k-NN and of logistic regression on cls tokens, fitted to the train part."""

    def features(pictures: torch.Tensor) -> np.ndarray:
        normal = normalize(pictures, card["mean"], card["std"])
        return torch.cat([backbone(part).cls_BD for part in normal.split(256)]).numpy()

    train, test = features(radiographs.train_NCHW), features(radiographs.test_NCHW)
    knn = auroc(knn_probabilities(train, radiographs.train_N, test, 2)[:, 1], radiographs.test_N)
    return knn, auroc(linear_scores(train, radiographs.train_N, test), radiographs.test_N)


def test_neighbours_are_alike_after_training_and_were_not_before(learned: Learned) -> None:
    assert learned.trained[0] >= KNN_MARK, f"k-NN {learned.trained[0]:.3f}"
    assert learned.trained[0] > learned.untrained[0] + 0.02, f"{learned.trained[0]:.3f}, {learned.untrained[0]:.3f}"


def test_a_linear_probe_gains_from_training(learned: Learned) -> None:
    assert learned.trained[1] > learned.untrained[1], f"{learned.trained[1]:.3f}, untrained {learned.untrained[1]:.3f}"


def test_the_loss_falls_and_the_features_stay_spread(learned: Learned) -> None:
    lines = read_metrics(learned.out / "training_metrics.jsonl")
    assert lines[-1]["total_loss"] < 0.97 * lines[0]["total_loss"]
    assert lines[-1]["effective_rank"] > 8, "the cls tokens have become alike"
    assert lines[-1]["teacher_entropy"] < 0.95, "the targets say nothing"
