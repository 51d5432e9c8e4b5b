"""The teacher scored while it trains: right numbers, nothing disturbed, the best one whole or not there."""

from __future__ import annotations

import csv
import dataclasses
import json
import logging
import math
import os
import random
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import matthews_corrcoef, roc_auc_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from medssl_cli.data.datasets import DataConfig, SliceDataset
from medssl_cli.models.vit import VisionTransformer
from medssl_cli.models.zoo import StudentConfig, build_backbone, load_backbone
from medssl_cli.services import online_evaluation
from medssl_cli.services.labelled_data import EvaluationConfig
from medssl_cli.services.labelled_images import EvenSlices
from medssl_cli.services.online_evaluation import (
    Look,
    OnlineEvaluation,
    prepare_evaluation,
    read_history,
    subsets,
    undisturbed,
)

SEQUENCES = ("ax_t2wi", "ax_adc", "ax_dwi")
Make = Callable[..., OnlineEvaluation]


def teacher(seed: int = 0, sequences: tuple[str, ...] | None = SEQUENCES) -> VisionTransformer:
    student = StudentConfig(arch="vit_tiny", embed_dim=32, depth=2, num_heads=2, patch_size=8, layerscale=1.0)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build_backbone(student, 32, sequences, stochastic_depth=False)
    assert isinstance(model, VisionTransformer)
    return model.eval()


@pytest.fixture
def make(labelled_tree: Path, prepared_cache: Path, tmp_path: Path) -> Make:
    """An evaluation of the labelled phantoms in ``tmp_path/run``."""

    def made(out: Path | None = None, **values: Any) -> OnlineEvaluation:
        settings = {"eval_period_iterations": 4, "target": "label", "c_values": 9, "knn_k": 3, **values}
        return prepare_evaluation(
            EvaluationConfig(**settings),
            DataConfig(root=str(labelled_tree), spatial_size=32),
            out or tmp_path / "run",
            cache=prepared_cache,
            look=Look(),
            card=lambda step: {"step": step, "mean": 0.45},
        )

    return made


def scripted(evaluation: OnlineEvaluation, values: dict[int, float | None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each step have the value that is written here; everything around it stays as it is."""
    results = evaluation._results

    def told(step: int, *rest: Any) -> dict[str, Any]:
        return {**results(step, *rest), "value": values[step]}

    monkeypatch.setattr(evaluation, "_results", told)


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_p33_scores_equal_scikit_learn_on_the_same_features(make: Make) -> None:
    evaluation, model = make(c_values=1), teacher()
    found = evaluation.score(model, 4)
    features, reference = {}, {}
    dataset = SliceDataset(evaluation.images.store, evaluation.data.model_copy(update={"split": "VAL"}), 0)
    place = {case_id: i for i, case_id in enumerate(evaluation.images.store.case_ids())}
    for part in ("train", "val"):
        rows = []
        for case in evaluation.labelled.parts[part]:
            sample = dataset[(0, place[case.case_id])]
            image = (sample.image_SHW[None] - 0.45) / 0.22
            with torch.no_grad():
                rows.append(model(image, None, sample.available_S[None]).cls_BD[0].numpy())
        features[part] = np.stack(rows)
        reference[part] = np.array([int(case.label) for case in evaluation.labelled.parts[part]])
    linear = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, max_iter=5000, tol=1e-9))
    told = linear.fit(features["train"], reference["train"]).predict_proba(features["val"])[:, 1]
    scores = found["scores"]["val"]["probes"]
    assert scores["linear"]["binary_auc"] == pytest.approx(roc_auc_score(reference["val"], told), abs=1e-9)
    assert scores["linear"]["mcc"] == pytest.approx(matthews_corrcoef(reference["val"], told > 0.5), abs=1e-9)
    near = KNeighborsClassifier(3, metric="cosine", algorithm="brute", weights=lambda d: np.exp(-d / 0.07))
    told = near.fit(features["train"], reference["train"]).predict_proba(features["val"])[:, 1]
    assert scores["knn"]["binary_auc"] == pytest.approx(roc_auc_score(reference["val"], told), abs=1e-6)
    assert (found["metric"], found["probe"], found["value"]) == ("mcc", "linear", scores["linear"]["mcc"])


def test_the_file_is_strict_json_and_says_what_was_done(make: Make, tmp_path: Path) -> None:
    found = make(metric_types=["binary_auc", "f1"]).score(teacher(), 4)
    text = (tmp_path / "run/eval/step_0000004/results.json").read_text(encoding="utf-8")

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    written = json.loads(text, parse_constant=refuse)
    assert written == found
    assert written["command"] == "pretrain"
    assert written["step"] == 4
    assert written["metric"] == "binary_auc"
    assert written["classes"] == ["0", "1"]
    assert written["scores"]["val"]["n"] == sum(written["n_cases"]["val"].values())
    assert written["split"]["group_by"] == "patient_id"
    assert len(written["split"]["digest"]) == 64
    assert written["seen_in_pretraining"] == 0
    assert written["probes"]["linear"]["n_fitted"] == sum(written["n_cases"]["train"].values())
    assert len(written["probes"]["linear"]["sweep"]) == 9
    assert written["elapsed_s"] >= 0
    assert "most region of interest" in written["definitions"]["images"]
    assert "test" not in written["scores"]


def test_w21_batches_and_slices_do_not_change_whose_features_are_whose(make: Make) -> None:
    model = teacher()
    cases = make().labelled.cases
    alone, together = make(batch_size=1), make(batch_size=7)
    with torch.no_grad():
        a, b = (e.images.embed(cases, e._backbone(model, 0), nullcontext) for e in (alone, together))
        again = together.images.embed(cases, together._backbone(model.train(), 0), nullcontext)
    np.testing.assert_allclose(a, b, atol=1e-5)
    np.testing.assert_array_equal(b, again)  # also of a model in training mode


def test_the_probes_see_cls_mean_or_both(make: Make) -> None:
    model = teacher()
    cases = make().labelled.cases
    found = {}
    for tokens in ("cls", "mean", "cls_mean"):
        scores = make(tokens=tokens)
        found[tokens] = scores.images.embed(cases, scores._backbone(model, 0), nullcontext)
        assert tokens.split("_")[-1] in scores._say_images()
    np.testing.assert_array_equal(found["cls_mean"], np.concatenate([found["cls"], found["mean"]], axis=1))
    assert not np.allclose(found["cls"], found["mean"])


def test_several_slices_are_spread_over_the_region_of_interest_and_averaged(make: Make) -> None:
    evaluation, model = make(slices=3), teacher()
    dataset = evaluation.images.dataset
    assert isinstance(dataset, EvenSlices)
    pixels = dataset.store.slice_facts(0, 0).roi_pixels_N
    indices = dataset.indices(0)
    assert len(indices) == 3
    assert (pixels[indices] > 0).all()
    assert indices == sorted(set(indices))
    case = next(c for c in evaluation.labelled.cases if c.case_id == dataset.case_id(0))
    with torch.no_grad():
        whole = evaluation.images.embed([case], evaluation._backbone(model, 0), nullcontext)[0]
        rows = [model((dataset[(n, 0)].image_SHW[None] - 0.45) / 0.22).cls_BD[0].numpy() for n in range(3)]
    assert [dataset[(n, 0)].index for n in range(3)] == indices
    np.testing.assert_allclose(whole, np.mean(rows, axis=0), atol=1e-5)


def test_a_teacher_that_sees_more_scores_more(make: Make) -> None:
    evaluation = make()
    blind = evaluation.score(teacher(), 4)
    embed = evaluation._embed

    def knowing(part: str, *rest: Any) -> Any:
        found = embed(part, *rest)
        found.features_ND[:] = 0.0
        found.features_ND[:, 5] = 3.0 * found.reference_N
        return found

    evaluation._embed = knowing  # type: ignore[method-assign]
    seeing = evaluation.score(teacher(), 8)
    assert seeing["value"] == 1.0 > blind["value"]
    assert seeing["is_best"]


# --- nothing is disturbed --------------------------------------------------------------------------------------------


def test_modes_and_random_states_are_those_of_before(make: Make) -> None:
    evaluation, model = make(), teacher()
    model.train()
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    before = (random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state())
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    evaluation.score(model, 4)
    assert [module.training for module in model.modules()] == modes
    assert random.getstate() == before[0]
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert torch.equal(torch.get_rng_state(), before[2])
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_modes_and_draws_are_put_back_after_an_error_too() -> None:
    model = teacher().train()

    def fail() -> None:
        with undisturbed(model):
            assert not model.training
            draw()
            raise RuntimeError("inside")

    def draw() -> tuple[float, float, float]:
        return float(torch.rand(1)), random.random(), float(np.random.rand())

    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    wanted = draw()
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    np.random.set_state(states[2])
    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert model.training
    assert draw() == wanted


def test_training_after_a_score_goes_on_bit_for_bit(make: Make) -> None:
    """Stochastic depth draws from the global generator: the same draws with and without a score between the steps."""

    def train(evaluation: OnlineEvaluation | None) -> list[torch.Tensor]:
        student = StudentConfig(arch="vit_tiny", embed_dim=32, depth=2, num_heads=2, patch_size=8, layerscale=1.0)
        torch.manual_seed(0)
        model = build_backbone(student, 32, SEQUENCES, stochastic_depth=True)
        assert isinstance(model, VisionTransformer)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(2):
            images = torch.rand(4, 3, 32, 32)
            model(images, None, torch.ones(4, 3, dtype=torch.bool)).cls_BD.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if evaluation is not None:
                evaluation.score(model, step)
        return [parameter.detach().clone() for parameter in model.parameters()]

    straight, scored = train(None), train(make(probes="knn", max_cases=4))
    assert all(torch.equal(a, b) for a, b in zip(straight, scored, strict=True))


# --- the best teacher ------------------------------------------------------------------------------------------------


def test_p34_the_best_teacher_is_the_one_whose_first_metric_rose_highest(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluation = make()
    scripted(evaluation, {0: 0.9, 4: 0.2, 8: 0.5, 12: 0.5, 16: None, 20: 0.4}, monkeypatch)
    models = {step: teacher(step) for step in (0, 4, 8, 12, 16, 20)}
    kept = [step for step in models if evaluation.score(models[step], step)["is_best"]]
    assert kept == [4, 8]  # not the start, not an equal value, not an undefined one
    best = tmp_path / "run/eval/best"
    assert {path.name for path in best.iterdir()} == {
        "teacher_checkpoint.safetensors", "teacher_checkpoint.json", "results.json"
    }  # fmt: skip
    loaded, card = load_backbone(best / "teacher_checkpoint.safetensors")
    assert card["step"] == 8
    assert card["evaluation"] == {"metric": "mcc", "probe": "linear", "value": 0.5}
    assert all(torch.equal(t, models[8].state_dict()[name]) for name, t in loaded.state_dict().items())
    assert json.loads((best / "results.json").read_text())["step"] == 8
    again = evaluation.best_teacher()
    assert again is not None
    assert torch.equal(again.cls_token, models[8].cls_token)
    lines = read_history(tmp_path / "run")
    assert [line["iteration"] for line in lines] == [0, 4, 8, 12, 16, 20]
    assert [line["is_best"] for line in lines] == [False, True, True, False, False, False]
    assert lines[4]["value"] is None
    assert lines[0].keys() >= {"linear_mcc", "knn_mcc", "linear_binary_auc", "metric", "seconds"}


def test_the_best_so_far_is_read_back_after_a_resume(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make()
    scripted(first, {4: 0.7}, monkeypatch)
    first.score(teacher(), 4)
    again = make()
    scripted(again, {8: 0.6, 12: 0.8}, monkeypatch)
    again.resume(4)
    assert not again.score(teacher(1), 8)["is_best"]
    assert again.score(teacher(2), 12)["is_best"]
    assert [line["iteration"] for line in read_history(tmp_path / "run")] == [4, 8, 12]


def test_steps_beyond_a_resume_are_forgotten_and_scored_again(make: Make, tmp_path: Path) -> None:
    evaluation = make(missing_sequences=True)
    for step in (4, 8, 12):
        evaluation.score(teacher(step), step)
    again = make(missing_sequences=True)
    again.resume(8)
    assert [line["iteration"] for line in again.history()] == [4, 8]
    names = {path.name.partition("_mri")[0] for path in (tmp_path / "run/eval").glob("step_*")}
    assert names == {"step_0000004", "step_0000008"}
    again.score(teacher(12), 12)
    assert [line["iteration"] for line in again.history()] == [4, 8, 12]


def test_a_step_that_is_scored_is_read_back(make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = make().score(teacher(), 4)
    (tmp_path / "run/eval/history.jsonl").unlink()  # as after a kill between the two files
    again = make()
    monkeypatch.setattr(again, "_embed", lambda *_: pytest.fail("scored twice"))
    assert again.score(teacher(), 4) == found
    assert [line["iteration"] for line in again.history()] == [4]


def test_results_of_other_settings_are_not_read_back_nor_compared(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = make()
    scripted(first, {4: 0.9}, monkeypatch)
    first.score(teacher(), 4)
    other = make(knn_k=2)
    assert other.digest != first.digest
    scripted(other, {8: 0.1}, monkeypatch)
    with caplog.at_level(logging.WARNING):
        assert other.score(teacher(1), 8)["is_best"]
    assert any("other cases or settings" in r.getMessage() for r in caplog.records)


class Killed(BaseException):
    """Stands for SIGKILL: nothing below catches it."""


BOUNDARIES = ("fsync", "replace", "rename")


@pytest.mark.parametrize("name", BOUNDARIES)
def test_r02_the_best_teacher_is_whole_or_not_there_wherever_a_kill_comes(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Cut off at every write boundary while a better teacher takes the place of an older one."""
    values: dict[int, float | None] = {4: 0.3, 8: 0.6}
    models = {4: teacher(4), 8: teacher(8)}
    base = tmp_path / "base"
    first = make(base, probes="knn", max_cases=4)
    known = {part: first._embed(part, first._backbone(models[4], 0)) for part in ("train", "val")}

    def at(out: Path) -> OnlineEvaluation:
        """As a new process finds it; the features are known, for only the writing matters here."""
        evaluation = dataclasses.replace(first, out=out)
        evaluation._embed = lambda part, *_: known[part]  # type: ignore[method-assign]
        scripted(evaluation, values, monkeypatch)
        return evaluation

    at(base).score(models[4], 4)
    original = {"fsync": os.fsync, "replace": os.replace, "rename": os.rename}[name]
    rename = Path.rename
    seen_old = seen_new = 0
    for cut in range(40):
        out = Path(shutil.copytree(base, tmp_path / f"run{cut}"))
        evaluation = at(out)
        calls = iter(range(1000))

        def cut_off(*args: Any, cut: int = cut, calls: Any = calls, **kwargs: Any) -> Any:
            if next(calls) == cut:
                raise Killed
            return rename(*args, **kwargs) if name == "rename" else original(*args, **kwargs)

        with monkeypatch.context() as patched:
            patched.setattr(Path, "rename", cut_off) if name == "rename" else patched.setattr(os, name, cut_off)
            patched.setattr(shutil, "rmtree", lambda *_, **__: None)  # a killed process cleans nothing up
            try:
                evaluation.score(models[8], 8)
                finished = True
            except Killed:
                finished = False
        again = at(out)
        best = again.best()
        assert best is not None
        loaded = again.best_teacher()
        assert loaded is not None
        assert torch.equal(loaded.cls_token, models[best["step"]].cls_token)
        seen_old, seen_new = seen_old + (best["step"] == 4), seen_new + (best["step"] == 8)
        again.resume(8 if finished else 4)
        again.score(models[8], 8)
        assert again.best()["step"] == 8  # type: ignore[index]
        assert not list((out / "eval").glob(".*"))
        assert [line["is_best"] for line in again.history()] == [True, True]
        if finished:
            break
    assert finished
    assert seen_old or name == "rename"
    assert seen_new


def test_r03_a_full_disk_leaves_the_best_teacher_as_it_was(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from medssl_cli.core.errors import ResourceError

    evaluation = make()
    scripted(evaluation, {4: 0.3, 8: 0.6}, monkeypatch)
    evaluation.score(teacher(4), 4)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(online_evaluation, "save_backbone", full)
        with pytest.raises(ResourceError) as caught:
            evaluation.score(teacher(8), 8)
    assert caught.value.exit_code == 6
    assert evaluation.best()["step"] == 4  # type: ignore[index]
    assert not list((tmp_path / "run/eval").glob(".tmp*"))
    assert evaluation.score(teacher(8), 8)["is_best"]


def test_features_that_are_not_finite_are_undefined_and_never_best(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    evaluation, model = make(), teacher()
    with torch.no_grad():
        model.norm.weight.fill_(math.nan)
    with caplog.at_level(logging.INFO):
        found = evaluation.score(model, 4)
    assert found["value"] is None
    assert not found["is_best"]
    assert "not finite" in found["undefined"]["val"]
    assert evaluation.best() is None
    assert any("undefined" in r.getMessage() for r in caplog.records)


def test_w04_the_test_part_is_scored_only_at_the_end(make: Make, labelled_tree: Path, tmp_path: Path) -> None:
    with (labelled_tree / "labels.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    patients = sorted({row["patient_id"] for row in rows})
    lists = {}
    for name, part in (("train", patients[:7]), ("val", patients[7:10]), ("test", patients[10:])):
        ids = [row["case_id"] for row in rows if row["patient_id"] in part]
        path = tmp_path / f"part_{name}.csv"
        path.write_text("case_id\n" + "\n".join(ids) + "\n", encoding="utf-8")
        lists[f"{name}_split_csv"] = str(path)
    evaluation = make(**lists)
    shown = []
    embed = evaluation._embed

    def noted(part: str, *rest: Any) -> Any:
        shown.append(part)
        return embed(part, *rest)

    evaluation._embed = noted  # type: ignore[method-assign]
    assert "test" not in evaluation.score(teacher(), 4)["scores"]
    assert "test" not in shown
    found = evaluation.score(teacher(), 4, final=True)
    assert found["scores"]["test"]["n"] > 0
    assert json.loads((tmp_path / "run/eval/final/results.json").read_text()) == found
    assert [line["iteration"] for line in evaluation.history()] == [4]


# --- sequences left out ----------------------------------------------------------------------------------------------


def test_p43_every_subset_and_a_random_one_are_scored(make: Make, tmp_path: Path) -> None:
    evaluation = make(missing_sequences=True)
    found = evaluation.score(teacher(), 4)
    folder = tmp_path / "run/eval"
    names = ["-".join(subset) for subset in subsets(SEQUENCES)] + ["random"]
    assert len(names) == 8
    scores = {
        name: json.loads((folder / f"step_0000004_mri_sequences-{name}/results.json").read_text()) for name in names
    }
    whole = scores["ax_t2wi-ax_adc-ax_dwi"]
    assert whole["scores"]["val"] == found["scores"]["val"]
    assert len({scores[name]["scores"]["val"]["probes"]["knn"]["binary_auc"] for name in names}) > 1
    assert scores["ax_adc"]["mri_sequences"] == "ax_adc"
    with (folder / "best_mri_sequences_eval_metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["mri_sequences"] for row in rows} == set(names)
    assert {row["probe"] for row in rows} == {"knn", "linear"}
    of_all = next(r for r in rows if r["mri_sequences"] == "ax_t2wi-ax_adc-ax_dwi" and r["probe"] == "linear")
    assert float(of_all["mcc"]) == found["value"]


def test_p43_tokens_of_a_sequence_left_out_are_masked_whatever_its_image_holds(make: Make) -> None:
    evaluation, model = make(), teacher()
    backbone = evaluation._backbone(model, 0)
    cases = evaluation.labelled.parts["val"]
    shown = {case.case_id: np.array([True, False, True]) for case in cases}

    class Rubbish(EvenSlices):
        def __getitem__(self, key: Any) -> Any:
            sample = super().__getitem__(key)
            sample.image_SHW = sample.image_SHW.clone()
            sample.image_SHW[1] = torch.rand(sample.image_SHW.shape[1:])
            return sample

    images = evaluation.images
    with torch.no_grad():
        clean = images.embed(cases, backbone, nullcontext, shown)
        whole = images.embed(cases, backbone, nullcontext)
        images.dataset = Rubbish(images.store, evaluation.data, 1)
        spoilt = images.embed(cases, backbone, nullcontext, shown)
        seen = images.embed(cases, backbone, nullcontext)
    np.testing.assert_array_equal(clean, spoilt)
    assert np.abs(clean - whole).max() > 1e-3
    assert np.abs(seen - whole).max() > 1e-3  # the rubbish is there, and seen where nothing masks it


def test_p43_a_case_without_any_of_the_sequences_is_not_scored(make: Make) -> None:
    evaluation = make()
    bare = [case for case in evaluation.labelled.cases if "ax_adc" not in case.sequences]
    assert len(bare) == 1
    part = next(name for name, cases in evaluation.labelled.parts.items() if bare[0] in cases)
    total = len(evaluation.labelled.parts[part])
    shown = {case.case_id: np.array([False, True, False]) for case in evaluation.labelled.cases}
    backbone = evaluation._backbone(teacher(), 0)
    with torch.no_grad():
        assert len(evaluation._embed(part, backbone, shown).cases) == total - 1
        assert len(evaluation._embed(part, backbone).cases) == total


def test_p43_the_dropped_sequence_is_the_same_at_every_step_and_differs_between_cases(make: Make) -> None:
    evaluation = make()
    cases = evaluation.labelled.cases
    drawn = [evaluation._one_dropped(case) for case in cases]
    assert all(shown.sum() == 2 for shown in drawn)
    assert all(evaluation.images.available(case)[~shown].all() for shown, case in zip(drawn, cases, strict=True))
    assert len({int(np.flatnonzero(~shown)[0]) for shown in drawn}) == 3
    assert all(np.array_equal(a, evaluation._one_dropped(case)) for a, case in zip(drawn, cases, strict=True))


def test_subsets_are_all_of_them() -> None:
    assert subsets(("a", "b", "c")) == [("a",), ("b",), ("c",), ("a", "b"), ("a", "c"), ("b", "c"), ("a", "b", "c")]


# --- pictures --------------------------------------------------------------------------------------------------------


def test_pictures_of_several_sizes_and_colours_are_seen_as_by_infer(tmp_path: Path) -> None:
    from PIL import Image

    from medssl_cli.services.backbone import read_planes

    root = tmp_path / "pictures"
    rng = np.random.default_rng(0)
    for i in range(12):
        path = root / ("train" if i < 8 else "val") / f"class_{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        size = [(24, 32), (40, 33), (16, 16)][i % 3]
        grey = (rng.random(size) * 100 + 100 * (i % 2)).astype(np.uint8)
        Image.fromarray(grey if i % 4 else np.stack([grey] * 3, -1)).save(path)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.2, 0.2)
    evaluation = prepare_evaluation(
        EvaluationConfig(eval_period_iterations=1, c_values=1, max_side=32),
        DataConfig(root=str(root)),
        tmp_path / "run",
        cache=tmp_path / "cache",
        look=Look(mean, std),
        card=lambda step: {"step": step},
    )
    model = teacher(sequences=None)
    backbone = evaluation._backbone(model, 0)
    cases = evaluation.labelled.cases
    with torch.no_grad():
        found = evaluation.images.embed(cases, backbone, nullcontext)
    for row, case in zip(found, cases, strict=True):
        planes = read_planes(case, backbone)
        size = backbone.network_size(planes.size, planes.spacing, 32)
        wanted = backbone.see(backbone.to_network(planes.batch(np.array([0])), size), planes.available_S).cls_BD[0]
        np.testing.assert_allclose(row, wanted, atol=1e-5)
    result = evaluation.score(model, 1)
    assert result["classes"] == ["class_0", "class_1"]
    assert "whole picture" in result["definitions"]["images"]
