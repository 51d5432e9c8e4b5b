"""A pretraining as a whole: bad data, drift, leaks, non-finite numbers, and what the traps of the specification ask."""

from __future__ import annotations

import csv
import gzip
import json
import math
import os
import re
import shutil
import signal
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from medssl_cli.core.config import load_config
from medssl_cli.core.errors import ResourceError
from medssl_cli.core.run import locked
from medssl_cli.data.images import read_volume, write_volume
from medssl_cli.services.pretrain import PretrainRequest, resolve_config
from medssl_cli.services.pretrain_config import PretrainConfig
from medssl_cli.services.pretrain_run import PretrainRun, build_run
from medssl_cli.services.training_data import read_training_data

Run = Callable[..., Any]


@pytest.fixture
def tree(tmp_path: Path, prostate_tree: Path) -> Path:
    """A tree of our own, to be changed."""
    return Path(shutil.copytree(prostate_tree, tmp_path / "tree"))


@pytest.fixture
def tiny(medssl: Run, tiny_recipe: Path, tree: Path, tmp_path: Path) -> Run:
    """`medssl pretrain` of four steps on the changed tree into `tmp_path/run`; later words win."""

    def run(*words: object) -> Any:
        options = ("--config", tiny_recipe, "--data", tree, "--cache", tmp_path / "cache", "--device", "cpu")
        return medssl("pretrain", *options, "--out", tmp_path / "run", "optim.epochs=1", *words)

    return run


def record_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "run.json").read_text())


def built(recipe: Path, root: Path, cache: Path, *overrides: str, **flags: Any) -> PretrainRun:
    """A run ready for its first step."""
    from medssl_cli.data.datasets import prepare_store

    config = resolve_config(PretrainRequest(config=str(recipe), data=root, overrides=overrides, **flags))
    data = read_training_data(config.data)
    store = prepare_store(data.cases, config.data, cache, kind=data.kind)
    return build_run(config, torch.device("cpu"), store, weights=config.initial_weights, workers=0)


# --- bad images ------------------------------------------------------------------------------------------------------


def rewrite(path: Path, change: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]) -> None:
    volume = read_volume(path)
    array, affine = change(volume.array.astype(np.float32), volume.affine.copy())
    nibabel.save(nibabel.Nifti1Image(array.transpose(*range(array.ndim)[::-1]), affine), path)


def poke(path: Path, offset: int, data: bytes) -> None:
    raw = bytearray(gzip.decompress(path.read_bytes()))
    raw[offset : offset + len(data)] = data
    path.write_bytes(gzip.compress(bytes(raw)))


def with_nan(array: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    array[1, 2, 3] = np.nan
    return array, affine


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:2000]),
    "zero bytes": lambda path: path.write_bytes(b""),
    "wrong magic": lambda path: poke(path, 344, b"abcd"),
    "NaN voxels": lambda path: rewrite(path, with_nan),
    "infinite voxels": lambda path: rewrite(path, lambda a, m: (np.where(a > a.mean(), np.inf, a), m)),
    "constant": lambda path: rewrite(path, lambda a, m: (np.full_like(a, 7), m)),
    "4-D": lambda path: rewrite(path, lambda a, m: (np.stack([a, a + 1]), m)),
    "2-D": lambda path: rewrite(path, lambda a, m: (a[0], m)),
    "size-1 axis": lambda path: rewrite(path, lambda a, m: (a[:1], m)),
    "huge dimensions": lambda path: poke(path, 40, struct.pack("<4h", 3, 32000, 32000, 32000)),
    "singular affine": lambda path: poke(path, 280, struct.pack("<12f", *([0.0] * 12))),
    "shifted 10 mm": lambda path: rewrite(
        path, lambda a, m: (a, m + np.array([[10.0 * (j == 3) for j in range(4)]] + [[0] * 4] * 3))
    ),
    "flipped": lambda path: rewrite(path, lambda a, m: (a, m @ np.diag([-1.0, 1, 1, 1]))),
    "sform is not qform": lambda path: poke(path, 292, struct.pack("<f", 123.0)),
    "gz bomb": lambda path: path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()) + bytes(50_000_000))),
    "far away": lambda path: rewrite(path, lambda a, m: (a, m + np.array([[0, 0, 0, 5000.0]] + [[0] * 4] * 3))),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_r09_a_damaged_image_stops_before_the_first_step(tiny: Run, tree: Path, tmp_path: Path, damage: str) -> None:
    path = tree / "PT-0003/ax_adc.nii.gz"
    DAMAGES[damage](path)
    answer = tiny("--on-error", "stop")
    assert answer.exit_code == 3, answer.stderr
    assert "PT-0003" in answer.stderr
    assert str(path.parent) in answer.stderr
    assert "ax_adc" in answer.stderr  # of two grids that contradict each other both are named
    assert "fix:" in answer.stderr
    assert "[1/4]" not in answer.stderr
    assert not (tmp_path / "run/checkpoints").exists()


def test_r06_a_bad_case_is_skipped_and_listed_when_asked(tiny: Run, tree: Path, tmp_path: Path) -> None:
    rewrite(tree / "PT-0003/ax_adc.nii.gz", with_nan)
    for path in (tree / "PT-0000").glob("ax_*"):
        path.unlink()
    answer = tiny("--on-error", "skip")
    assert answer.exit_code == 4, answer.stderr
    assert "2 of 6 cases were left out" in answer.stderr
    assert answer.stdout.startswith("4 steps")
    with (tmp_path / "run/failures.csv").open(newline="") as file:
        rows = {row["case_id"]: row for row in csv.DictReader(file)}
    assert rows.keys() == {"PT-0000", "PT-0003"}
    assert "NaN" in rows["PT-0003"]["reason"]
    assert rows["PT-0003"]["path"].endswith("PT-0003/ax_adc.nii.gz")
    assert all(row["fix"] for row in rows.values())
    record = record_of(tmp_path / "run")
    assert (record["status"], record["n_cases"], record["n_failed"]) == ("finished", 4, 2)
    assert (tmp_path / "run/export/teacher_backbone.safetensors").is_file()
    again = tiny("--on-error", "skip")
    assert again.exit_code == 4
    assert again.stdout.startswith("nothing left to do")
    facts = json.loads(tiny("--on-error", "skip", "--json").stdout)
    assert facts["steps"] == 4
    assert tiny("--on-error", "stop").exit_code == 3


def test_r06_a_loss_that_explodes_ends_with_5_and_names_the_last_checkpoint(tiny: Run, tmp_path: Path) -> None:
    words = ("optim.base_lr=1e30", "optim.scaling_rule=identity", "optim.warmup_epochs=0", "optim.clip_grad=0")
    answer = tiny(*words, "train.checkpoint_period_iterations=1")
    assert answer.exit_code == 5, answer.stderr
    assert "cases: PT-" in answer.stderr
    assert "lower optim.base_lr" in answer.stderr
    record = record_of(tmp_path / "run")
    assert record["status"] == "failed"
    assert "step" in record["reason"]
    last = tmp_path / f"run/checkpoints/step_{record['step']:07d}"
    assert f"last good checkpoint: {last}" in answer.stderr
    assert all(tensor.isfinite().all() for tensor in load_file(last / "model.safetensors").values())
    assert "error: " in (tmp_path / "run/log.txt").read_text()


# --- drift -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def begun(tiny: Run, tree: Path) -> Path:
    """The split file of a run of four steps in `tmp_path/run`."""
    split = tree / "split/train.csv"
    split.parent.mkdir()
    split.write_text("patient_id\nPT-0000\nPT-0002\nPT-0003\n")
    answer = tiny("--split-csv", split)
    assert answer.exit_code == 0, answer.stderr
    return split


def test_r07_all_drift_is_refused_at_once_naming_keys_and_values(tiny: Run, begun: Path, tmp_path: Path) -> None:
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file() and p.name != ".lock"}
    begun.write_text("patient_id\nPT-0000\nPT-0003\n")
    words = ("optim.base_lr=0.02", "student.arch=vit_small", "data.mri_sequences=ax_adc,ax_t2wi,ax_dwi")
    answer = tiny("--split-csv", begun, *words, "optim.epochs=2", "--workers", 0)
    assert answer.exit_code == 2
    for line in (
        "optim.base_lr: 0.01 -> 0.02",
        'student.arch: "vit_tiny" -> "vit_small"',
        'data.mri_sequences: ["ax_t2wi", "ax_adc", "ax_dwi"] -> ["ax_adc", "ax_t2wi", "ax_dwi"]',
        'data.split_csv: "ids ',
        "--allow-config-change optim.base_lr",
    ):
        assert line in answer.stderr
    assert "num_workers" not in answer.stderr
    after = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file() and p.name != ".lock"}
    assert after == before


def test_r07_safe_keys_and_allowed_ones_go_on(tiny: Run, begun: Path, tmp_path: Path) -> None:
    moved = begun.rename(begun.with_name("mine.csv"))  # the same ids under another name
    words = ("--split-csv", moved, "optim.epochs=2", "train.log_period_iterations=2", "train.prefetch_factor=2")
    answer = tiny(*words, "optim.base_lr=0.02", "--allow-config-change", "optim.base_lr")
    assert answer.exit_code == 0, answer.stderr
    assert answer.stdout.startswith("8 steps")
    assert "Changed since the checkpoint: optim.base_lr: 0.01 -> 0.02" in (tmp_path / "run/log.txt").read_text()
    again = load_config(PretrainConfig, tmp_path / "run/config.yaml", recipes="pretrain")
    assert (again.optim.base_lr, again.train.log_period_iterations) == (0.02, 2)


def test_r07_other_images_are_refused_unless_allowed(tiny: Run, begun: Path, tree: Path) -> None:
    path = tree / "PT-0003/ax_t2wi.nii.gz"
    volume = read_volume(path)
    volume.array[0, 0, 0] += 1
    write_volume(path, volume)
    words = ("--split-csv", begun, "optim.epochs=2")
    answer = tiny(*words)
    assert answer.exit_code == 2
    assert "The images differ" in answer.stderr
    assert tiny(*words, "--allow-config-change", "data").exit_code == 0


def test_r12_a_leaking_split_is_refused_before_anything_is_built(tiny: Run, tree: Path, tmp_path: Path) -> None:
    split = tree / "split"
    split.mkdir()
    (split / "train.csv").write_text("patient_id\nPT-0000\nPT-0001_20230106\n")
    (split / "val.csv").write_text("patient_id\nPT-0001_20240215\n")
    answer = tiny("--split-csv", split / "train.csv")
    assert answer.exit_code == 3
    assert "patient PT-0001" in answer.stderr
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a\0b", "x" * 300])
def test_r13_ids_that_lead_out_are_refused(tiny: Run, tree: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(tree / "PT-0000", tmp_path / "outside")
    (tree / "train.csv").write_text(f"patient_id\n{name}\n")
    before = sorted(tmp_path.rglob("*"))
    answer = tiny("--split-csv", tree / "train.csv")
    assert answer.exit_code == 3, answer.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_r13_odd_names_stay_inside_the_run_folder(tiny: Run, tree: Path, tmp_path: Path) -> None:
    (tree / "PT-0000").rename(tree / "Ünïcode & spaces;$(touch x)")
    (tree / "PT-0003").rename(tree / ("y" * 200))
    (tree / "labels.csv").unlink()
    assert tiny().exit_code == 0
    outside = {p.name for p in tmp_path.iterdir()}
    assert outside == {"tree", "run", "cache"}


# --- while it runs ---------------------------------------------------------------------------------------------------


def test_run_json_tells_status_and_step_at_every_checkpoint(
    tiny: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medssl_cli.services import run_folder, run_watch

    seen: list[tuple[str, int]] = []

    def note(path: Path, data: dict[str, Any]) -> None:
        seen.append((data["status"], data["step"]))
        write_json(path, data)

    write_json = run_folder.write_json
    monkeypatch.setattr(run_folder, "write_json", note)
    monkeypatch.setattr(run_watch, "draw_progress", lambda rows, path, title, evaluations: path.write_bytes(b""))
    assert tiny("train.checkpoint_period_iterations=1").exit_code == 0
    assert seen == [("running", step) for step in range(5)] + [("finished", 4)]


def full(*_: object) -> None:
    raise ResourceError("The result cannot be written.", code="disk_full")


def terminated(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    raise AssertionError("the signal did not come")


@pytest.mark.parametrize(
    ("fault", "code", "status", "reason"),
    [
        (full, 6, "failed", "The result cannot be written."),
        (terminated, 75, "interrupted", "SIGTERM came while exporting; finished parts are whole."),
    ],
)
def test_a_run_that_ends_while_exporting_says_so_and_is_finished_by_the_same_command(
    tiny: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[..., None],
    code: int,
    status: str,
    reason: str,
) -> None:
    from medssl_cli.services import pretrain

    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "save_backbone", fault)
        answer = tiny()
    assert answer.exit_code == code
    assert f"error: {reason}" in answer.stderr
    record = record_of(tmp_path / "run")
    assert (record["status"], record["reason"], record["step"]) == (status, reason, 4)
    assert tiny().exit_code == 0
    assert record_of(tmp_path / "run")["status"] == "finished"
    assert (tmp_path / "run/export/teacher_backbone.safetensors").is_file()


def test_a_signal_while_a_case_is_read_drops_no_case(
    tiny: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--workers", 0, "--on-error", "skip")
    with monkeypatch.context() as patch:
        patch.setattr(nibabel.Nifti1Image, "from_bytes", terminated)
        answer = tiny(*words)
    assert answer.exit_code == 75, answer.stderr
    assert "error: SIGTERM came while preparing" in answer.stderr
    assert tiny(*words).exit_code == 0
    assert record_of(tmp_path / "run")["n_failed"] == 0


def test_info_shows_a_run_that_is_under_way(medssl: Run, tiny: Run, tmp_path: Path) -> None:
    assert tiny().exit_code == 0
    record = {**record_of(tmp_path / "run"), "status": "running", "step": 2}
    (tmp_path / "run/run.json").write_text(json.dumps(record))
    with locked(tmp_path / "run", "run folder"):
        answer = medssl("info", tmp_path / "run")
    assert re.search(r"^status: +running$", answer.stdout, re.M)
    assert re.search(r"^step: +2$", answer.stdout, re.M)


# --- traps -----------------------------------------------------------------------------------------------------------


def test_t19_share_0_gives_the_stream_of_a_tree_without_masks(
    tiny_recipe: Path, prostate_tree: Path, tree: Path, tmp_path: Path
) -> None:
    for path in tree.rglob("roi_Prostate.nii.gz"):
        path.unlink()
    share = "train.percentage_labels=0"
    streams = []
    for root, words in ((prostate_tree, (share,)), (tree, (share,)), (tree, ()), (prostate_tree, ())):
        run = built(tiny_recipe, root, tmp_path / "cache", *words)
        source = run.batches(0)
        batches = [next(source) for _ in range(6)]
        streams.append((batches, [run.trainer.views(batch, step, 0) for step, batch in enumerate(batches)]))
    reference = streams[0]
    for batches, views in streams[1:3]:
        for (ours, theirs), (our_views, their_views) in zip(
            zip(reference[0], batches, strict=True), zip(reference[1], views, strict=True), strict=True
        ):
            assert ours.case_ids == theirs.case_ids
            assert torch.equal(ours.images_BSHW, theirs.images_BSHW)
            assert ours.roi_BHW is None
            assert theirs.roi_BHW is None
            assert torch.equal(our_views.global_VSHW, their_views.global_VSHW)
    with_masks = streams[3][0]
    assert any(not torch.equal(a.images_BSHW, b.images_BSHW) for a, b in zip(reference[0], with_masks, strict=True))


def test_a_mask_that_no_crop_needs_is_not_shipped_and_still_chooses_slices(
    tiny_recipe: Path, prostate_tree: Path, prepared_cache: Path
) -> None:
    batches = []
    for crop in ("true", "false"):
        run = built(tiny_recipe, prostate_tree, prepared_cache, f"crops.crop_from_tumor_foreground={crop}")
        source = run.batches(0)
        batches.append([next(source) for _ in range(3)])
    for with_mask, without in zip(*batches, strict=True):
        assert with_mask.roi_BHW is not None
        assert without.roi_BHW is None
        assert torch.equal(with_mask.images_BSHW, without.images_BSHW)


def test_t04_at_step_0_the_teacher_equals_the_student_also_with_given_weights(
    tiny_recipe: Path, prostate_tree: Path, prepared_cache: Path, tmp_path: Path
) -> None:
    first = built(tiny_recipe, prostate_tree, prepared_cache, "train.seed=5")
    torch.save(first.objective.student["backbone"].state_dict(), tmp_path / "weights.pth")
    run = built(tiny_recipe, prostate_tree, prepared_cache, init=tmp_path / "weights.pth")
    student, teacher = run.objective.student.state_dict(), run.objective.teacher.state_dict()
    assert student.keys() == teacher.keys()
    assert all(torch.equal(student[name], teacher[name]) for name in student)
    given = first.objective.student["backbone"].state_dict()
    assert all(torch.equal(student[f"backbone.{name}"], tensor) for name, tensor in given.items())


def test_t01_every_number_of_sequences_with_and_without_region_crops(
    tiny_recipe: Path, prostate_tree: Path, tmp_path: Path
) -> None:
    names = ("ax_t2wi", "ax_adc", "ax_dwi", "lesion")
    for count in range(1, 5):
        for crop in ("true", "false"):
            words = (
                f"data.mri_sequences={','.join(names[:count])}",
                f"crops.crop_from_tumor_foreground={crop}",
                "data.on_error=skip",
            )
            run = built(tiny_recipe, prostate_tree, tmp_path / "cache", *words)
            record = run.trainer.step(run.batches(0))
            assert math.isfinite(record.total_loss)


@pytest.mark.parametrize("sequences", ["ax_t2wi,ax_adc,ax_dwi", "ax_t2wi"])
def test_t36_the_first_loss_is_about_what_was_announced(
    tiny_recipe: Path, prostate_tree: Path, prepared_cache: Path, sequences: str
) -> None:
    words = (
        *(f"data.mri_sequences={sequences}", "ibot.mask_per_channel=true"),
        *("dino.head_n_prototypes=4096", "dino.head_bottleneck_dim=256", "dino.head_hidden_dim=256"),
        *("student.layerscale=1e-5", "train.batch_size_per_gpu=6"),
    )
    run = built(tiny_recipe, prostate_tree, prepared_cache, *words)
    (line,) = [line for line in run.introduction() if "expected first loss" in line]
    announced = float(line.split("expected first loss about ")[1].split()[0])
    record = run.trainer.step(run.batches(0))
    assert abs(record.total_loss - announced) < 0.25 * announced


def test_no_local_crops_and_no_cls_loss_are_supported(
    tiny_recipe: Path, prostate_tree: Path, prepared_cache: Path
) -> None:
    for words in (("crops.local_crops_number=0",), ("dino.loss_weight=0",), ("ibot.loss_weight=0",)):
        run = built(tiny_recipe, prostate_tree, prepared_cache, *words)
        assert math.isfinite(run.trainer.step(run.batches(0)).total_loss)
        assert ("a local crop" in " ".join(run.introduction())) == (words[0] != "crops.local_crops_number=0")


def test_accumulation_sees_the_samples_of_one_large_batch(
    tiny_recipe: Path, prostate_tree: Path, prepared_cache: Path
) -> None:
    one = built(tiny_recipe, prostate_tree, prepared_cache, "train.batch_size_per_gpu=4")
    two = built(tiny_recipe, prostate_tree, prepared_cache, "train.grad_accumulation=2")
    source = two.batches(3)
    assert next(one.batches(3)).case_ids == next(source).case_ids + next(source).case_ids
    assert one.schedules.lr == two.schedules.lr


def test_image_trees_are_trained_on_whole_pictures(medssl: Run, tiny_recipe: Path, tmp_path: Path) -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    for number in range(4):
        path = tmp_path / f"images/{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (40, 48), dtype=np.uint8)).save(path)
    words = ("--config", tiny_recipe, "--data", tmp_path / "images", "--cache", tmp_path / "cache", "--device", "cpu")
    refused = medssl("pretrain", *words, "--out", tmp_path / "run", "optim.epochs=1")
    assert refused.exit_code == 2
    assert "data.random_slices: True" in refused.stderr
    assert not (tmp_path / "run").exists()
    words += ("data.random_slices=false", "data.spatial_size=224", "crops.crop_from_tumor_foreground=false")
    words += ("student.use_mri_seq_embed=false", "optim.epochs=1")
    answer = medssl("pretrain", *words, "--out", tmp_path / "run")
    assert answer.exit_code == 0, answer.stderr
    assert "17 tokens a global crop, 5 a local crop" in answer.stderr
    card = json.loads((tmp_path / "run/export/teacher_backbone.json").read_text())
    assert card["sequences"] is None
