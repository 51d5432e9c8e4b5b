"""Fine-tuning: what the network learns, that a step is the textbook's step, and that the run is one like any other."""

from __future__ import annotations

import csv
import json
import math
import os
import shlex
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional

from medssl_cli.core.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    Interrupted,
    NonFiniteError,
    PartialFailure,
    ResourceError,
)
from medssl_cli.core.result import Result
from medssl_cli.data.transforms import AreaCrop
from medssl_cli.models.feature_heads import build_head
from medssl_cli.services.backbone import open_backbone
from medssl_cli.services.embedding import Embedder, ExtractConfig
from medssl_cli.services.finetune import build_tuner, finetune, load_finetune_config
from medssl_cli.services.finetune_data import FinetuneJob, read_job
from medssl_cli.services.finetune_training import Tuned, Tuner, build_groups, slice_vectors
from medssl_cli.services.finetune_views import ViewDraws, apply_views, draw_views, in_order
from medssl_cli.services.head import load_head, open_head
from medssl_cli.services.head_request import TrainHeadRequest
from medssl_cli.services.infer import InferRequest, infer
from medssl_cli.services.lookup import find_model
from medssl_cli.services.train_head import next_lines

CPU = torch.device("cpu")
WHOLE = ("crop_scale=[1,1]", "crop_aspect=[1,1]", "horizontal_flip=false", "vertical_flip=false")
STILL = (*WHOLE, "drop_path=0", "freeze_epochs=0", "num_workers=0")
"""No chance but start and order."""
SHORT = ("epochs=2", "batch_size=8", "freeze_epochs=0", "num_workers=1")


def write_pictures(root: Path, parts: dict[str, int]) -> Path:
    """Dark pictures of 32 pixels with one small bright square, in the upper half or in the lower one."""
    for number, (part, count) in enumerate(parts.items()):
        for k in range(count):
            rng = np.random.default_rng((number, k))
            image = rng.integers(0, 40, (32, 32)).astype(np.uint8)
            row, column = rng.integers(0, 12, 2)
            row, column = row + (0 if k % 2 else 16), column + 16 * (k % 4 // 2)
            image[row : row + 4, column : column + 4] = 255
            folder = root / part / ("up" if k % 2 else "down")
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{part}{k:03d}.png")
    return root


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """17 training, 8 validation and 4 test pictures of two classes; not to be changed."""
    return write_pictures(tmp_path_factory.mktemp("pictures"), {"train": 17, "val": 8, "test": 4})


def spread(model: Any) -> None:
    """A start whose random network is no near constant, as the usual one of width 32 is."""
    for name, parameter in model.named_parameters():
        if "blocks" in name and parameter.ndim > 1:
            parameter.mul_(8)
        if "pos_embed" in name:
            parameter.mul_(20)


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory: pytest.TempPathFactory, write_run: Callable[..., Path]) -> Path:
    """A run with a random backbone for plain pictures."""
    return write_run(tmp_path_factory.mktemp("plain") / "run", None, edit=spread)


def asked(data: Path, run: Path, out: Path, *overrides: str, **more: Any) -> TrainHeadRequest:
    return TrainHeadRequest(
        data=data, task=more.pop("task", "binary"), out=out, model=run, device="cpu", overrides=overrides, **more
    )


def tune(data: Path, run: Path, out: Path, *overrides: str, progress: Any = None, **more: Any) -> Result:
    return finetune(asked(data, run, out, *overrides, **more), progress=progress)


@pytest.fixture(scope="module")
def job_of(pictures: Path, plain_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., FinetuneJob]:
    """A function that reads the job of some settings, without a run folder."""

    def read(*overrides: str, data: Path = pictures, run: Path = plain_run, **more: Any) -> FinetuneJob:
        request = asked(data, run, tmp_path_factory.mktemp("unused"), *overrides, **more)
        task: Any = request.task
        backbone = open_backbone(find_model(run), CPU)
        return read_job(request, backbone, load_finetune_config(request, task), task)

    return read


@pytest.fixture(scope="module")
def tuned(pictures: Path, plain_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two epochs on the pictures; not to be changed."""
    out = tmp_path_factory.mktemp("tuned") / "run"
    tune(pictures, plain_run, out, *SHORT)
    return out


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return {
        **{f"backbone.{k}": v for k, v in load_file(run / "export" / "teacher_backbone.safetensors").items()},
        **load_file(run / "best.safetensors"),
    }


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], atol: float) -> None:
    """But for the bias of the keys, which changes no attention: AdamW makes steps of the rounding of its gradient."""
    for name, value in expected.items():
        kept = torch.ones(len(value), dtype=torch.bool)
        if name.endswith("qkv.bias"):
            kept[len(value) // 3 : 2 * len(value) // 3] = False
        torch.testing.assert_close(found[name][kept], value[kept], atol=atol, rtol=1e-4, msg=name)


# --- what it learns --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_fine_tuning_learns_what_frozen_features_do_not_tell(tmp_path: Path, plain_run: Path) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score

    root = write_pictures(tmp_path / "pictures", {"train": 192, "val": 48, "test": 32})
    keys = ("epochs=20", "batch_size=8", "lr=0.003", "backbone_lr_scale=0.3", "layerwise_decay=1")
    tune(root, plain_run, tmp_path / "out", *STILL, *keys, "horizontal_flip=true")

    def auroc(run: Path, *, is_tuned: bool) -> float:
        backbone = open_backbone(find_model(run), CPU)
        embedder = Embedder(backbone, ExtractConfig(resize=32, antialias=True))
        from medssl_cli.services.extract_cohort import read_cohort

        cohort = read_cohort(root, backbone)
        vectors = {
            part: np.stack([embedder.embed(case).slices_ND[0] for case in cases])
            for part, cases in cohort.parts.items()
        }
        labels = {part: np.array([case.label == "up" for case in cases]) for part, cases in cohort.parts.items()}
        if is_tuned:
            head = load_head(run)
            return float(roc_auc_score(labels["test"], [head.values(v[None])[0] for v in vectors["test"]]))
        probe = LogisticRegression(C=10, max_iter=5000).fit(vectors["train"], labels["train"])
        return float(roc_auc_score(labels["test"], probe.decision_function(vectors["test"])))

    assert auroc(plain_run, is_tuned=False) < 0.8
    assert auroc(tmp_path / "out", is_tuned=True) > 0.95


def test_a_step_is_that_of_a_loop_written_by_hand(job_of: Callable[..., FinetuneJob]) -> None:
    """Two steps against torch's AdamW with rates from the formula, images from the embedder, no view of ours."""
    keys = (*STILL, "batch_size=9", "epochs=1", "warmup_epochs=0", "lr=0.01", "clip_grad=0.5", "layerwise_decay=0.5")
    job = job_of(*keys, "class_weights=none", "extract.resize=null", "extract.max_side=32")
    tuner = build_tuner(job)
    order = torch.randperm(17, generator=torch.Generator().manual_seed(_order_seed(job, 1))).tolist()
    model = open_backbone(job.embedder.backbone.found, CPU).model.train()
    head = build_head("linear", 32, 1)
    head.load_state_dict(tuner.head.state_dict())
    rates = {"norm": 1.0, "blocks.1": 0.5, "blocks.0": 0.25, "": 0.125}
    groups = []
    for name, parameter in [*model.named_parameters(), *head.named_parameters(prefix="head")]:
        share = 1.0 if name.startswith("head") else 0.1 * next(r for p, r in rates.items() if name.startswith(p))
        spared = parameter.ndim == 1 or "bias" in name
        groups.append({"params": [parameter], "share": share, "weight_decay": 0.0 if spared else 0.05})
    adam = torch.optim.AdamW(groups, lr=0.01)
    embedder = job.embedder
    cases = job.cases_of(job.train)
    for step, places in enumerate((order[:9], order[9:])):
        planes = [embedder.planes(cases.cases[place]) for place in places]
        images = torch.cat([embedder.network_input(one, embedder.indices(one)) for one in planes])
        logits = head(model(images).cls_BD)[:, 0]
        reference = torch.tensor(cases.labels_BL[places, 0], dtype=torch.float32)
        adam.zero_grad()
        functional.binary_cross_entropy_with_logits(logits, reference).backward()
        for module in (model, head):
            torch.nn.utils.clip_grad_norm_(module.parameters(), 0.5)
        rate = 1e-6 + (0.01 - 1e-6) * (1 + math.cos(math.pi * step / 2)) / 2
        for group in adam.param_groups:
            group["lr"] = rate * group["share"]
        adam.step()
    result = tuner.fit()
    assert_close(result.last_backbone, model.state_dict(), 2e-6)
    torch.testing.assert_close(result.trained.last.state_dict(), head.state_dict(), atol=2e-6, rtol=1e-4)


def _order_seed(job: FinetuneJob, epoch: int) -> int:
    from medssl_cli.core.run import seed_for

    return seed_for(job.config.seed, "finetune order", epoch)


def test_the_rates_fall_from_layer_to_layer(job_of: Callable[..., FinetuneJob], tuned: Path) -> None:
    model = open_backbone(job_of().embedder.backbone.found, CPU).model
    config = job_of("backbone_lr_scale=0.2", "layerwise_decay=0.75").config
    shares = {
        name: (group["lr_multiplier"], group["wd_multiplier"])
        for group in build_groups(model, build_head("linear", 32, 1), config)
        for name, _ in group["params"]
    }
    assert len(shares) == len(list(model.parameters())) + 2
    expected = {
        "head.last.weight": (1.0, 1), "head.last.bias": (1.0, 0), "backbone.norm.weight": (0.2, 0),
        "backbone.blocks.1.attn.qkv.weight": (0.2 * 0.75, 1), "backbone.blocks.0.mlp.fc1.bias": (0.2 * 0.75**2, 0),
        "backbone.patch_embed.proj.weight": (0.2 * 0.75**3, 1), "backbone.pos_embed": (0.2 * 0.75**3, 1),
    }  # fmt: skip
    for name, share in expected.items():
        assert shares[name] == pytest.approx(share), name
    told = json.loads((tuned / "train_summary.json").read_text())["rates"]
    assert [one["lr_share"] for one in told] == sorted(one["lr_share"] for one in told)
    assert sum(one["parameters"] for one in told) == sum(p.numel() for p in model.parameters()) + 33
    assert sum(len(one["tensors"]) for one in told) == len(shares)


@pytest.mark.parametrize("task", ["binary", "multiclass"])
def test_parts_of_a_step_change_nothing(job_of: Callable[..., FinetuneJob], task: str) -> None:
    def last(accumulation: int) -> Tuned:
        keys = (*STILL, "epochs=1", "batch_size=6", f"accumulation={accumulation}")
        return build_tuner(job_of(*keys, task=task)).fit()

    one, four = last(1), last(4)
    assert_close(four.last_backbone, one.last_backbone, 1e-5)
    assert four.trained.history[0]["train_loss"] == pytest.approx(one.trained.history[0]["train_loss"], abs=1e-6)


def test_the_head_alone_moves_at_first(job_of: Callable[..., FinetuneJob]) -> None:
    tuner = build_tuner(job_of("epochs=3", "freeze_epochs=2", "batch_size=8", "lr=0.01"))
    before = {name: value.clone() for name, value in tuner.model.state_dict().items()}
    head = {name: value.clone() for name, value in tuner.head.state_dict().items()}
    seen = []

    def note(done: int, total: int) -> None:
        moved = any(not torch.equal(value, before[name]) for name, value in tuner.model.state_dict().items())
        seen.append((moved, not torch.equal(tuner.head.last.weight, head["last.weight"])))

    tuner.fit(note)
    assert seen == [(False, True)] * 6 + [(True, True)] * 3


# --- views -----------------------------------------------------------------------------------------------------------


def test_a_whole_view_is_what_the_network_sees_of_the_slice(
    labelled_tree: Path, tmp_path: Path, write_run: Callable[..., Path]
) -> None:
    backbone = open_backbone(find_model(write_run(tmp_path / "run")), CPU)
    embedder = Embedder(backbone, ExtractConfig(max_side=40))
    from medssl_cli.services.extract_cohort import read_cohort

    case = read_cohort(labelled_tree, backbone).cases[0]
    planes = embedder.planes(case)
    indices = embedder.indices(planes)[:3]
    size = embedder.network_size(planes)
    images = torch.from_numpy(planes.batch(indices))
    draws = draw_views(3, *images.shape[-2:], AreaCrop((1, 1), (1, 1)), (False, False), np.random.default_rng(0))
    view = (apply_views(images, draws, size) - 0.45) / 0.22
    assert images.shape[-2:] != size
    torch.testing.assert_close(view, embedder.network_input(planes, indices), atol=2e-5, rtol=0)


def test_a_view_shows_its_box_and_nothing_else() -> None:
    images = torch.rand(2, 1, 40, 60, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[4, 10, 16, 30], [0, 0, 40, 60]])
    draws = ViewDraws(boxes, np.array([False, True]), np.array([True, False]))
    view = apply_views(images, draws, (8, 16))
    cut = functional.interpolate(images[:1, :, 4:20, 10:40], (8, 16), mode="bicubic", antialias=True).clamp(0, 1)
    whole = functional.interpolate(images[1:], (8, 16), mode="bicubic", antialias=True).clamp(0, 1)
    torch.testing.assert_close(view, torch.cat([cut.flip(3), whole.flip(2)]), atol=1e-5, rtol=0)
    images[0, :, :4] = 100.0  # outside the box
    torch.testing.assert_close(apply_views(images, draws, (8, 16)), view)


def test_views_are_drawn_within_their_limits_and_by_their_seed() -> None:
    def drawn(seed: int, flips: tuple[bool, bool] = (True, False)) -> ViewDraws:
        return draw_views(400, 100, 50, AreaCrop((0.08, 1.0), (0.75, 4 / 3)), flips, np.random.default_rng(seed))

    draws = drawn(1)
    top, left, height, width = draws.boxes_K4.unbind(1)
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= 100).all()
    assert (left + width <= 50).all()
    share, aspect = height * width / 5000, (width / 50) / (height / 100)
    assert 0.075 < share.min() < 0.12
    assert 0.9 < share.max() <= 1
    assert aspect.min() > 0.7
    assert aspect.max() < 1.4
    assert draws.flip_rows_K.mean() == pytest.approx(0.5, abs=0.1)
    assert not draws.flip_columns_K.any()
    assert torch.equal(drawn(1).boxes_K4, draws.boxes_K4)
    assert not torch.equal(drawn(2).boxes_K4, draws.boxes_K4)
    assert torch.equal(drawn(1, (False, False)).boxes_K4, draws.boxes_K4)


def test_slices_are_drawn_anew_in_each_epoch(
    job_of: Callable[..., FinetuneJob], labelled_tree: Path, tmp_path: Path, write_run: Callable[..., Path]
) -> None:
    run = write_run(tmp_path / "run")
    job = job_of("slices_per_case=2", data=labelled_tree, run=run, target=("label",))
    tuner = build_tuner(job)
    case = job.cases_of(job.train).cases[0]
    every = job.images.planes(case)
    numbered = [every.scaled(index) for index in range(len(every))]
    picks = []
    for epoch in (1, 2, 3, 1):
        shown = tuner.views.read(case, 0, epoch).images_KSHW
        picks.append([next(n for n, one in enumerate(numbered) if np.array_equal(one, slice_)) for slice_ in shown])
    assert all(len(set(pick)) == 2 and pick == sorted(pick) for pick in picks)
    assert picks[0] == picks[3]
    assert len({tuple(pick) for pick in picks}) > 1


def test_threads_that_read_ahead_keep_the_order_and_the_errors() -> None:
    def work(number: int) -> int:
        if number == 5:
            raise DataError("bad")
        return number * number

    for threads in (0, 3):
        found = in_order(work, range(9), threads)
        assert [next(found) for _ in range(5)] == [0, 1, 4, 9, 16]
        with pytest.raises(DataError):
            next(found)


# --- the vector of a slice -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "layers"), [(("cls",), 1), (("cls", "mean"), 2), (("mean",), 1)])
def test_w35_training_and_inference_have_one_vector_at_any_size(
    plain_run: Path, tokens: tuple[Any, ...], layers: int
) -> None:
    """Positions are stretched to 48 x 40 pixels from a table made for 32 x 32."""
    backbone = open_backbone(find_model(plain_run), CPU)
    embedder = Embedder(backbone, ExtractConfig(tokens=tokens, layers=layers))
    images = torch.randn(3, 1, 48, 40, generator=torch.Generator().manual_seed(0))
    vectors = slice_vectors(backbone.model.eval(), images, None, tokens, layers)
    assert vectors.requires_grad
    assert vectors.shape == (3, embedder.width)
    expected, _ = embedder.forward(images, np.ones((3, 1), bool))
    np.testing.assert_allclose(vectors.detach().numpy(), expected, atol=1e-6)


def test_w35_missing_sequences_count_alike(tmp_path: Path, write_run: Callable[..., Path]) -> None:
    backbone = open_backbone(find_model(write_run(tmp_path / "run")), CPU)
    embedder = Embedder(backbone, ExtractConfig(tokens=("cls", "mean")))
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    available = np.array([[True, False, True], [True, True, True]])
    vectors = slice_vectors(backbone.model.eval(), images, torch.from_numpy(available), ("cls", "mean"), 1)
    np.testing.assert_allclose(vectors.detach().numpy(), embedder.forward(images, available)[0], atol=1e-6)


def test_w36_the_mean_token_is_taken_after_the_final_norm(plain_run: Path) -> None:
    model = open_backbone(find_model(plain_run), CPU).model.eval()
    with torch.no_grad():
        model.norm.weight.copy_(torch.linspace(0.5, 2, 32))
        model.norm.bias.copy_(torch.linspace(-1, 1, 32))
    kept: list[torch.Tensor] = []
    hook = model.norm.register_forward_hook(lambda _module, given, _out: kept.append(given[0]))
    images = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    vectors = slice_vectors(model, images, None, ("mean",), 1)
    hook.remove()
    tokens = kept[0].detach().double().reshape(2, -1, 32)[:, -16:]
    centred = tokens - tokens.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    expected = (normed * model.norm.weight + model.norm.bias).mean(1)
    torch.testing.assert_close(vectors.double(), expected, atol=1e-5, rtol=0)


def test_w43_validation_does_not_depend_on_the_last_training_batch(job_of: Callable[..., FinetuneJob]) -> None:
    tuner = build_tuner(job_of("epochs=1", "batch_size=8", "freeze_epochs=0"))
    tuner.fit()
    before = tuner.validation_logits()
    tuner.model.train()
    shown = [tuner.views.read(case, place, 9) for place, case in enumerate(tuner.train.cases[:3])]
    tuner._vectors(torch.cat([tuner.views.show(one) for one in shown]) * 50, np.ones((3, 1), bool))
    np.testing.assert_array_equal(tuner.validation_logits(), before)


# --- what chooses ----------------------------------------------------------------------------------------------------


def test_w04_the_test_part_is_never_looked_at(pictures: Path, plain_run: Path, tuned: Path, tmp_path: Path) -> None:
    """The same weights with test pictures whose pixels cannot be read, and none of them is opened."""
    root = tmp_path / "pictures"
    shutil.copytree(pictures, root)
    for path in (root / "test").rglob("*.png"):
        path.write_bytes(path.read_bytes()[:60])
    tune(root, plain_run, tmp_path / "out", *SHORT)
    assert same(weights_of(tmp_path / "out"), weights_of(tuned))
    with (tmp_path / "out" / "cases.csv").open() as file:
        parts = [row["part"] for row in csv.DictReader(file)]
    assert parts == ["train"] * 17 + ["val"] * 8


def test_the_epoch_with_the_best_validation_score_is_kept(job_of: Callable[..., FinetuneJob]) -> None:
    tuner = build_tuner(job_of(*STILL, "epochs=4", "batch_size=8", "lr=0.003", "backbone_lr_scale=1"))
    states, logits = [], []
    judge = tuner._judge

    def scripted(logits_VC: np.ndarray, val: Any) -> tuple[dict[str, Any], float]:
        states.append({name: value.clone() for name, value in tuner.model.state_dict().items()})
        logits.append(logits_VC)
        return judge(logits_VC, val)[0], [0.5, 0.8, math.nan, 0.8][len(states) - 1]

    tuner._judge = scripted  # type: ignore[method-assign]
    result = tuner.fit()
    assert (result.trained.epoch, result.trained.score) == (2, 0.8)  # the first of equal ones
    assert same(result.backbone, states[1])
    assert same(result.last_backbone, states[3])
    assert result.val_logits_VC is logits[1]
    assert [entry["epoch"] for entry in result.trained.history] == [1, 2, 3, 4]


def test_patience_ends_a_run_that_no_longer_gains(job_of: Callable[..., FinetuneJob]) -> None:
    tuner = build_tuner(job_of("epochs=9", "patience=2", "batch_size=8"))
    tuner._judge = lambda logits_VC, val: ({}, 0.7)  # type: ignore[method-assign]
    result = tuner.fit()
    assert result.trained.epoch == 1
    assert len(result.trained.history) == 3
    assert result.stopped is None


# --- the same again --------------------------------------------------------------------------------------------------


def test_m24_two_runs_of_one_seed_have_one_result(pictures: Path, plain_run: Path, tuned: Path, tmp_path: Path) -> None:
    tune(pictures, plain_run, tmp_path / "again", *SHORT[:-1], "num_workers=0", "cache_gb=0")
    assert same(weights_of(tmp_path / "again"), weights_of(tuned))
    tune(pictures, plain_run, tmp_path / "other", *SHORT, seed=7)
    assert not same(weights_of(tmp_path / "other"), weights_of(tuned))


def test_random_numbers_of_others_are_left_alone(job_of: Callable[..., FinetuneJob]) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build_tuner(job_of("epochs=2", "batch_size=8")).fit()
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    "head", [("head=linear",), ("head=mlp", "hidden_dim=8"), ("head=attention_mil", "hidden_dim=8")]
)
@pytest.mark.parametrize("batch_size", [1, 16])
def test_w26_batches_of_one_case(job_of: Callable[..., FinetuneJob], batch_size: int, head: tuple[str, ...]) -> None:
    """17 cases in batches of 16 leave one case for the last."""
    tuner = build_tuner(job_of("epochs=1", "freeze_epochs=0", f"batch_size={batch_size}", *head))
    result = tuner.fit()
    assert math.isfinite(result.trained.history[0]["train_loss"])
    assert tuner.steps_done == math.ceil(17 / batch_size)


# --- the run ---------------------------------------------------------------------------------------------------------


def test_the_run_is_one_like_any_other(tuned: Path, plain_run: Path, pictures: Path) -> None:
    names = {path.relative_to(tuned).as_posix() for path in tuned.rglob("*") if path.is_file()}
    assert names == {
        *("best.safetensors", "last.safetensors", "head.json", "train_summary.json", "progress.png", "run.json"),
        *("config.yaml", "cases.csv", ".medssl.json", ".lock", "log.txt", "export/teacher_backbone.safetensors"),
        *("export/teacher_backbone.json", "export/last_backbone.safetensors", "export/last_backbone.json"),
    }
    card = json.loads((tuned / "export" / "teacher_backbone.json").read_text())
    before = json.loads((plain_run / "export" / "teacher_backbone.json").read_text())
    changed = {key for key in card.keys() | before.keys() if card.get(key) != before.get(key)}
    assert changed == {"sha256", "finetuned"}
    assert card["finetuned"]["from_sha256"] == before["sha256"]
    assert card["finetuned"]["cases"] == 17
    head = json.loads((tuned / "head.json").read_text())
    assert head["preprocessing"]["weights_sha256"] == head["model"]["sha256"] == card["sha256"]
    assert (head["preprocessing"]["resize"], head["preprocessing"]["antialias"]) == (32, True)
    assert head["model"]["path_from_run"] == "export/teacher_backbone.safetensors"
    assert head["classes"] == ["up"]
    assert head["selection"]["epoch"] in (1, 2)
    assert head["ranges"]["height"] == [32, 32]
    summary = json.loads((tuned / "train_summary.json").read_text())
    assert summary["steps"] == 6
    assert len(summary["history"]) == 2
    assert summary["stopped"] is None
    assert any("the last epoch" in note for note in summary["notes"]) == (head["selection"]["epoch"] == 2)
    run = json.loads((tuned / "run.json").read_text())
    assert run["status"] == "finished"
    assert run["backbone_sha256"] == before["sha256"]
    assert load_head(tuned).novelty is not None


def test_infer_gives_the_probabilities_of_validation(tuned: Path, pictures: Path, tmp_path: Path) -> None:
    head = load_head(tuned)
    assert head.reliability is not None
    with (tuned / "cases.csv").open() as file:
        names = [row["case_id"] for row in csv.DictReader(file) if row["part"] == "val"]
    files = {path.stem: path for path in (pictures / "val").rglob("*.png")}
    request = InferRequest(
        cases=tuple(str(files[Path(name).stem]) for name in names), model=tuned, out=tmp_path / "out", device="cpu"
    )
    found = [case["probabilities"]["up"] for case in infer(request).facts["cases"]]
    logit = np.log(found) - np.log1p(-np.asarray(found))
    known = head.reliability[0][:, 0].astype(np.float64)
    np.testing.assert_allclose(logit, np.log(known) - np.log1p(-known), atol=1e-5)
    assert head.reliability[1][:, 0].tolist() == [float("up" in str(files[Path(name).stem])) for name in names]


def test_the_last_network_is_kept_beside_the_best(pictures: Path, plain_run: Path, tuned: Path, tmp_path: Path) -> None:
    last = load_file(tuned / "export" / "last_backbone.safetensors")
    assert last.keys() == load_file(tuned / "export" / "teacher_backbone.safetensors").keys()
    backbone = open_backbone(find_model(tuned / "export" / "last_backbone.safetensors"), CPU)
    assert backbone.card["finetuned"]["epoch"] == 2
    out = tmp_path / "out"
    shutil.copytree(tuned, out)
    tune(pictures, plain_run, out, *SHORT, "keep_last=false")
    assert {path.name for path in (out / "export").iterdir()} == {
        "teacher_backbone.safetensors",
        "teacher_backbone.json",
    }


def test_another_backbone_is_no_longer_the_heads_own(tuned: Path, plain_run: Path) -> None:
    found = replace(find_model(plain_run), head=tuned)
    with pytest.raises(CheckpointError) as caught:
        open_head(found, CPU)
    assert "weights_sha256" in caught.value.where


def test_a_volume_is_the_mean_of_its_slices(
    labelled_tree: Path, tmp_path: Path, write_run: Callable[..., Path]
) -> None:
    run = write_run(tmp_path / "run")
    keys = ("epochs=2", "batch_size=3", "slices_per_case=2", "extract.max_slices=6", "precision=bf16")
    more = ("grad_checkpointing=true", "extract.tokens=cls,mean", "extract.layers=2", "head=mlp", "hidden_dim=8")
    tune(labelled_tree, run, tmp_path / "out", *keys, *more, target=("label",))
    card = json.loads((tmp_path / "out" / "head.json").read_text())
    assert card["slice_dim"] == 96
    assert card["pool_mode"] == "mean"
    assert card["preprocessing"]["max_slices"] == 6
    assert card["preprocessing"]["precision"] == "fp32"
    assert card["sequences"] == ["ax_t2wi", "ax_adc", "ax_dwi"]
    assert card["ranges"]["spacing_z_mm"][0] > 1
    head = load_head(tmp_path / "out")
    with (tmp_path / "out" / "cases.csv").open() as file:
        rows = list(csv.DictReader(file))
    held = [row["case_id"] for row in rows if row["part"] == "val"]
    patients = [{row["patient_id"] for row in rows if row["part"] == part} for part in ("train", "val")]
    assert held
    assert not patients[0] & patients[1]
    request = InferRequest(
        cases=(str(labelled_tree / held[0]),), model=tmp_path / "out", out=tmp_path / "i", device="cpu"
    )
    (case,) = infer(request).facts["cases"]
    assert head.reliability is not None
    assert case["probabilities"][head.classes[0]] == pytest.approx(float(head.reliability[0][0, 0]), abs=1e-5)


@pytest.mark.parametrize(
    ("task", "targets", "outputs"),
    [("regression", "size,age", 2), ("multilabel", "any,up", 2), ("multiclass", "kind", 3)],
)
def test_every_task_is_trained(
    pictures: Path, plain_run: Path, tmp_path: Path, task: str, targets: str, outputs: int
) -> None:
    table = tmp_path / "labels.csv"
    files = sorted(path for part in ("train", "val") for path in (pictures / part).rglob("*.png"))
    rng = np.random.default_rng(0)
    rows = ["image,size,age,any,up,kind"]
    for number, path in enumerate(files):
        up = int(path.parent.name == "up")
        size = "" if number == 3 else f"{rng.normal(20, 4):.2f}"
        rows.append(f"{path.relative_to(pictures)},{size},{30 + number},1,{up},{'abc'[number % 3]}")
    table.write_text("\n".join(rows))
    names = tuple(targets.split(","))
    result = tune(
        pictures, plain_run, tmp_path / "out", *SHORT, "accumulation=2", task=task, labels=table, target=names
    )
    head = load_head(tmp_path / "out")
    assert head.outputs == outputs
    assert result.facts["num_train"] == 17
    values = head.values(np.ones((1, 32), np.float32))
    assert np.isfinite(values).all()
    if task == "regression":
        assert 5 < values[0] < 35
        assert 25 < values[1] < 65
    elif task == "multiclass":
        assert values.sum() == pytest.approx(1)


def test_few_labels_train_on_a_share_of_the_cases(pictures: Path, plain_run: Path, tmp_path: Path) -> None:
    result = tune(pictures, plain_run, tmp_path / "out", *SHORT, "percentage_labels=0.3")
    assert result.facts["num_train"] == 5
    assert result.facts["num_val"] == 8


# --- what can go wrong -----------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_names_the_case_and_changes_nothing(job_of: Callable[..., FinetuneJob]) -> None:
    job = job_of(*STILL, "batch_size=8")
    tuner = build_tuner(job)
    guilty = tuner.train.cases[2].case_id
    show = tuner.views.show
    tuner.views.show = lambda shown: show(shown) * (math.nan if shown.place == 2 else 1.0)  # type: ignore
    parts = next(parts for parts, _ in _listed(tuner) if any(2 in part.places for part in parts))
    before = {name: value.clone() for name, value in {**tuner.model.state_dict(), **tuner.head.state_dict()}.items()}
    with pytest.raises(NonFiniteError) as caught:
        tuner._step(parts, is_frozen=False)
    assert f"cases {guilty!r}" in caught.value.where
    assert caught.value.exit_code == 5
    assert same({**tuner.model.state_dict(), **tuner.head.state_dict()}, before)


def _listed(tuner: Tuner) -> list[tuple[list[Any], float]]:
    """The parts of each step of the first epoch."""
    return [(list(parts), weight) for parts, weight in tuner._steps(1)]


def test_a_gradient_that_is_not_finite_is_not_followed(job_of: Callable[..., FinetuneJob]) -> None:
    tuner = build_tuner(job_of(*STILL, "batch_size=8"))

    class Cusp:
        """A finite loss without a finite gradient."""

        weights_C = None

        def __call__(self, logits_BC: torch.Tensor, labels_BL: torch.Tensor) -> torch.Tensor:
            return (logits_BC * 0).sum().sqrt()

    tuner.loss = Cusp()  # type: ignore[assignment]
    before = {name: value.clone() for name, value in tuner.model.state_dict().items()}
    with pytest.raises(NonFiniteError) as caught:
        tuner.fit()
    assert "gradient" in caught.value.what
    assert caught.value.where.count(".png") + caught.value.where.count("train") >= 3
    assert same(tuner.model.state_dict(), before)


def test_no_memory_is_told_with_the_keys_that_need_less(job_of: Callable[..., FinetuneJob]) -> None:
    tuner = build_tuner(job_of(*STILL, "batch_size=8"))

    def full(shown: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    tuner.views.show = full  # type: ignore[method-assign]
    with pytest.raises(ResourceError) as caught:
        tuner.fit()
    assert caught.value.exit_code == 6
    assert "accumulation=2" in caught.value.fix
    assert "batch_size=8" in caught.value.where


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGINT", marks=pytest.mark.slow)])
def test_a_signal_keeps_the_best_epoch_so_far(pictures: Path, plain_run: Path, tmp_path: Path, name: str) -> None:
    def stop(done: int, total: int) -> None:
        if done == 5:
            os.kill(os.getpid(), getattr(signal, name))

    out = tmp_path / "out"
    with pytest.raises(Interrupted) as caught:
        tune(pictures, plain_run, out, "epochs=4", "batch_size=8", progress=stop)
    assert caught.value.exit_code == 75
    assert "best epoch so far, 1" in caught.value.fix
    assert "starts over" in caught.value.fix
    assert json.loads((out / "run.json").read_text())["status"] == "interrupted"
    head, embedder = open_head(find_model(out), CPU)
    assert head.card["selection"]["epoch"] == 1
    assert head.novelty is None
    assert embedder.width == 32
    assert json.loads((out / "train_summary.json").read_text())["stopped"].startswith(name)
    assert not list(out.glob(".tmp*"))
    tune(pictures, plain_run, out, *SHORT)  # the same folder again
    assert json.loads((out / "run.json").read_text())["status"] == "finished"


def test_a_signal_in_the_first_epoch_leaves_no_half_run(pictures: Path, plain_run: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        tune(
            pictures, plain_run, tmp_path / "out", *SHORT,
            progress=lambda done, total: os.kill(os.getpid(), signal.SIGTERM),
        )  # fmt: skip
    assert {path.name for path in (tmp_path / "out").iterdir()} == {".medssl.json", ".lock", "run.json", "log.txt"}


def test_a_run_cut_off_does_not_replace_a_finished_one(
    pictures: Path, plain_run: Path, tuned: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(tuned, out)
    with pytest.raises(Interrupted) as caught:
        tune(
            pictures, plain_run, out, "epochs=5", "batch_size=4",
            progress=lambda done, total: os.kill(os.getpid(), signal.SIGTERM) if done == 7 else None,
        )  # fmt: skip
    assert "is as it was" in caught.value.fix
    for name in ("head.json", "best.safetensors", "export/teacher_backbone.safetensors"):
        assert (out / name).read_bytes() == (tuned / name).read_bytes()


def test_a_signal_while_the_cases_are_seen_again_costs_that_alone(
    pictures: Path, plain_run: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = Embedder.embed_many

    def interrupted(self: Embedder, *args: Any, **more: Any) -> Any:
        for number, found in enumerate(many(self, *args, **more)):
            if number == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            yield found

    monkeypatch.setattr(Embedder, "embed_many", interrupted)
    with pytest.raises(Interrupted):
        tune(pictures, plain_run, tmp_path / "out", *SHORT)
    head = load_head(tmp_path / "out")
    assert head.novelty is None
    assert head.card["ranges"] == {}
    exported = "export/teacher_backbone.safetensors"
    assert (tmp_path / "out" / exported).read_bytes() == (tuned / exported).read_bytes()


def test_a_bad_picture_stops_or_is_left_out(pictures: Path, plain_run: Path, tmp_path: Path) -> None:
    root = tmp_path / "pictures"
    shutil.copytree(pictures, root)
    bad = root / "train" / "up" / "train003.png"
    bad.write_bytes(bad.read_bytes()[:80])
    with pytest.raises(DataError) as caught:
        tune(root, plain_run, tmp_path / "out", *SHORT)
    assert "train003" in caught.value.where
    assert not (tmp_path / "out" / "head.json").exists()
    result = tune(root, plain_run, tmp_path / "out", *SHORT, on_error="skip")
    assert isinstance(result.error, PartialFailure)
    assert result.error.exit_code == 4
    assert result.facts["num_train"] == 16
    assert "train003" in (tmp_path / "out" / "failures.csv").read_text()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("head=logistic",), "has no gradient"),
        (("level=slice",), "level:"),
        (("freeze_epochs=30",), "never be trained"),
        (("batch_size=2", "accumulation=3"), "3 parts"),
        (("repeats=3", "refit=true"), "repeats:"),
        (("extract.views=2",), "extract.views"),
        (("extract.tokens=cls,patch",), "patch tokens"),
        (("c_values=3",), "c_values"),
        (("layer_decay=.5",), "layerwise_decay"),
        (("crop_scale=[0,1]",), "crop_scale"),
        (("backbone_lr_scale=0",), "backbone_lr_scale"),
        (("slices_per_case=4",), "slices_per_case"),
    ],
)
def test_keys_that_have_no_effect_are_refused(
    pictures: Path, plain_run: Path, tmp_path: Path, overrides: tuple[str, ...], said: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        tune(pictures, plain_run, tmp_path / "out", *overrides)
    assert said in caught.value.where
    assert not (tmp_path / "out" / "run.json").exists()


def test_features_are_no_images(pictures: Path, plain_run: Path, tmp_path: Path, medssl: Callable[..., Any]) -> None:
    (tmp_path / "features").mkdir()
    (tmp_path / "features" / "features.json").write_text("{}")
    words = ("train-head", tmp_path, "--finetune", "--task", "binary", "--model", plain_run, "--out", tmp_path / "o")
    answer = medssl(*words)
    assert answer.exit_code == 2
    assert "reads images" in answer.stderr
    assert medssl(*words, "--gpus", "2").exit_code == 2
    assert "one device" in medssl(*words, "--gpus", "2").stderr


def test_a_cache_is_refused_where_it_is_typed_and_not_where_it_is_set(
    pictures: Path, plain_run: Path, tmp_path: Path, medssl: Callable[..., Any]
) -> None:
    words = ("train-head", pictures, "--finetune", "--task", "binary", "--model", plain_run, "--out", tmp_path / "o")
    answer = medssl(*words, "--cache", tmp_path / "cache")
    assert answer.exit_code == 2
    assert "--cache" in answer.stderr
    short = ("epochs=1", "freeze_epochs=0", "batch_size=17")
    answer = medssl(*words, "--device", "cpu", *short, env={"MEDSSL_CACHE": str(tmp_path / "cache")})
    assert answer.exit_code == 0, answer.stderr
    assert not (tmp_path / "cache").exists()


def test_patients_of_the_label_table_stay_on_one_side(plain_run: Path, tmp_path: Path) -> None:
    """Both eyes of a person: pictures of one folder, whose table tells the patient."""
    root = write_pictures(tmp_path, {"data": 24}) / "data"
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.png"))
    assert len(names) == 24
    table = tmp_path / "labels.csv"
    table.write_text("image,patient_id,up\n" + "".join(f"{n},P{int(n[-6:-4]) // 4},{int('up' in n)}\n" for n in names))
    tune(root, plain_run, tmp_path / "out", *SHORT, "epochs=1", labels=table, target=("up",))
    with (tmp_path / "out" / "cases.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    sides = [{row["patient_id"] for row in rows if row["part"] == part} for part in ("train", "val")]
    assert sides[0]
    assert sides[1]
    assert not sides[0] & sides[1]
    assert sides[0] | sides[1] == {f"P{n}" for n in range(6)}


def test_class_folders_without_a_split_are_labels(plain_run: Path, tmp_path: Path, medssl: Callable[..., Any]) -> None:
    root = write_pictures(tmp_path, {"data": 12}) / "data"
    words = ("train-head", root, "--finetune", "--task", "binary", "--model", plain_run, "--out", tmp_path / "o o")
    answer = medssl(*words, "--device", "cpu", "epochs=1", "freeze_epochs=0", "positive=up")
    assert answer.exit_code == 0, answer.stderr
    assert "the last epoch is the best one" not in answer.stdout  # one epoch tells nothing of more
    assert "the 2 folders of the pictures are taken as classes: 'down', 'up'" in answer.stderr
    assert f"infer CASE --model '{tmp_path / 'o o'}'" in answer.stdout
    assert "medssl eval" not in answer.stdout  # no part is left to evaluate
    (root / "lonely.png").write_bytes((root / "up" / "data001.png").read_bytes())
    answer = medssl(*words, "--device", "cpu")
    assert answer.exit_code == 3
    assert "put the pictures into class folders" in answer.stderr


def test_the_command_trains_and_says_what_to_do_next(
    pictures: Path, plain_run: Path, tmp_path: Path, medssl: Callable[..., Any]
) -> None:
    answer = medssl(
        *("train-head", pictures, "--finetune", "--task", "binary", "--model", plain_run, "--out", tmp_path / "run"),
        *("--device", "cpu", "--backbone-lr-scale", "0.5", "--json", *SHORT),
    )
    assert answer.exit_code == 0, answer.stderr
    facts = json.loads(answer.stdout)
    assert facts["num_train"] == 17
    assert facts["head"]["model"]["finetuned"] is True
    assert "epoch 2/2" in (tmp_path / "run" / "log.txt").read_text()
    assert "backbone_lr_scale: 0.5" in (tmp_path / "run" / "config.yaml").read_text()


def test_what_to_type_next_can_be_typed(tmp_path: Path) -> None:
    request = TrainHeadRequest(
        tmp_path / "a b", "binary", tmp_path / "<x>", splits=tmp_path / "split", labels=tmp_path / "l.csv"
    )
    infer_line, eval_line = next_lines(request, has_test=True)
    assert shlex.split(infer_line)[1:] == ["medssl", "infer", "CASE", "--model", str(tmp_path / "<x>"), "--heatmap"]
    typed = shlex.split(eval_line)
    assert typed[:2] == ["medssl", "eval"]
    given = dict(zip(typed[2::2], typed[3::2], strict=True))
    assert given == {
        "--model": str(tmp_path / "<x>"),
        "--data": str(tmp_path / "a b"),
        "--split": "test",
        "--splits": str(tmp_path / "split"),
        "--labels": str(tmp_path / "l.csv"),
        "--out": f"{tmp_path / '<x>'}-eval",
    }


def test_a_head_needs_no_validation_part(pictures: Path, plain_run: Path, tmp_path: Path) -> None:
    root = tmp_path / "all"
    shutil.copytree(pictures / "train", root)
    table = tmp_path / "labels.csv"
    table.write_text("image,up\n" + "".join(f"{p.name},{int(p.parent.name == 'up')}\n" for p in root.rglob("*.png")))
    result = tune(root, plain_run, tmp_path / "out", *SHORT, "val_ratio=0", labels=table, target=("up",))
    card = result.facts["head"]
    assert card["selection"]["criterion"] is None
    assert card["selection"]["epoch"] == 2
    assert card["threshold"] == 0.5
    assert same(
        load_file(tmp_path / "out" / "export" / "teacher_backbone.safetensors"),
        load_file(tmp_path / "out" / "export" / "last_backbone.safetensors"),
    )


def test_a_convolutional_backbone_is_tuned(job_of: Callable[..., FinetuneJob], tmp_path: Path) -> None:
    from medssl_cli.models.convnext import ConvNeXt
    from medssl_cli.models.zoo import save_backbone

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ConvNeXt(in_chans=1, depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), img_size=32)
    facts = {"mean": 0.45, "std": 0.22, "spatial_size": 32, "preprocess": {}}
    save_backbone(tmp_path / "net" / "teacher_backbone.safetensors", model, facts)
    tuner: Tuner = build_tuner(job_of("epochs=1", "freeze_epochs=0", "drop_path=0.3", run=tmp_path / "net"))
    shares = {name: one["lr_share"] for one in tuner.rates for name in one["tensors"]}
    assert shares["backbone.downsample_layers.0.0.weight"] == pytest.approx(0.1 * 0.75**5)
    result = tuner.fit()
    assert math.isfinite(result.trained.history[0]["train_loss"])
    assert not same(result.last_backbone, model.state_dict())
