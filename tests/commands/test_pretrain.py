"""`medssl pretrain` as it is typed: exit codes, printed lines and the files of the contract."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from medssl_cli.core.config import load_config
from medssl_cli.core.run import locked
from medssl_cli.objectives.self_distillation import SelfDistillation
from medssl_cli.services.pretrain_config import PretrainConfig

Run = Callable[..., Any]


@pytest.fixture
def tiny(medssl: Run, tiny_recipe: Path, prostate_tree: Path, prepared_cache: Path) -> Run:
    """`medssl pretrain` with the tiny recipe on the phantoms; later words win."""

    def run(*words: object, env: dict[str, str] | None = None) -> Any:
        options = ("--config", tiny_recipe, "--data", prostate_tree, "--cache", prepared_cache, "--device", "cpu")
        return medssl("pretrain", *options, *words, env=env)

    return run


@pytest.fixture(scope="session")
def finished_run(
    tmp_path_factory: pytest.TempPathFactory, tiny_recipe: Path, prostate_tree: Path, prepared_cache: Path
) -> Path:
    """A run of eight steps, made by the program in a process of its own; copy it before changing it."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    words = ("--config", tiny_recipe, "--data", prostate_tree, "--out", out, "--cache", prepared_cache)
    command = [sys.executable, "-m", "medssl_cli", "pretrain", *map(str, words), "--device", "cpu"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert answer.returncode == 0, answer.stderr
    return out


@pytest.fixture
def copied_run(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(finished_run, tmp_path / "tiny", symlinks=True))


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def record_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "run.json").read_text())


def metrics_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "training_metrics.jsonl").read_text().splitlines()]


# --- a whole run -----------------------------------------------------------------------------------------------------


def test_t25_a_run_ends_with_the_files_of_the_contract(tiny: Run, tmp_path: Path) -> None:
    out = tmp_path / "run"
    answer = tiny("--out", out)
    assert answer.exit_code == 0, answer.stderr
    for name in (
        *("config.yaml", "run.json", "log.txt", "training_metrics.jsonl", "training_metrics.json", "progress.png"),
        *("export/teacher_backbone.safetensors", "export/teacher_backbone.json"),
        *("checkpoints/step_0000004/model.safetensors", "checkpoints/step_0000008/state.json"),
    ):
        assert (out / name).stat().st_size > 0, name
    assert (out / "checkpoints/last").resolve().name == "step_0000008"
    assert list((out / "tb").glob("events.out.tfevents.*"))
    assert not (out / "failures.csv").exists()
    lines = answer.stdout.splitlines()
    assert re.fullmatch(r"8 steps in 0:00:\d\d, [\d.]+ images/s, last loss [\d.]+", lines[0])
    assert lines[1] == f"backbone: {out}/export/teacher_backbone.safetensors"
    assert lines[-1] == f"next:     medssl infer CASE --model {out} --heatmap"


def test_run_json_says_what_was_done_with_what(finished_run: Path) -> None:
    record = record_of(finished_run)
    assert record["status"] == "finished"
    assert (record["step"], record["total_steps"], record["n_cases"], record["n_failed"]) == (8, 8, 6, 0)
    assert record["command"] == "pretrain"
    assert record["sequences"] == ["ax_t2wi", "ax_adc", "ax_dwi"]
    assert record["device"].startswith("cpu")
    for key in ("schema_version", "medssl_version", "started_at", "elapsed_s", "command_line", "versions", "git"):
        assert key in record
    assert re.fullmatch("[0-9a-f]{64}", record["data_digest"])
    assert re.fullmatch("[0-9a-f]{64}", record["split_digest"])
    assert record["versions"]["torch"] == torch.__version__


def test_metrics_have_every_key_at_every_logged_step(finished_run: Path) -> None:
    rows = metrics_of(finished_run)
    assert [row["iteration"] for row in rows] == list(range(1, 9))
    keys = {
        *("iter_time", "data_time", "data_wait_percent", "eta_s", "images_per_s", "memory_gib", "lr", "wd", "mom"),
        *("last_layer_lr", "backbone_frozen", "current_batch_size", "total_loss", "dino_local_crops_loss"),
        *("dino_global_crops_loss", "koleo_loss", "ibot_loss", "grad_norm_backbone", "grad_norm_dino_head"),
        *("teacher_entropy", "effective_rank"),
    }
    assert all(keys <= row.keys() for row in rows)
    assert rows[0]["lr"] == 0.0
    keyed = json.loads((finished_run / "training_metrics.json").read_text())
    assert keyed == {str(row["iteration"]): row for row in rows}


def test_config_yaml_reloads_to_the_same_config(finished_run: Path, tiny_recipe: Path, prostate_tree: Path) -> None:
    again = load_config(PretrainConfig, finished_run / "config.yaml", recipes="pretrain")
    flags = {"data.root": str(prostate_tree), "train.output_dir": str(finished_run)}
    asked = load_config(PretrainConfig, tiny_recipe, recipes="pretrain", flags=flags)
    assert again.model_dump() == asked.model_dump()


def test_the_export_is_the_teacher_and_its_card_tells_how_to_use_it(finished_run: Path) -> None:
    exported = load_file(finished_run / "export/teacher_backbone.safetensors")
    saved = load_file(finished_run / "checkpoints/last/model.safetensors")
    teacher = {k.removeprefix("teacher.backbone."): v for k, v in saved.items() if k.startswith("teacher.backbone.")}
    assert exported.keys() == teacher.keys()
    assert all(torch.equal(exported[name], teacher[name]) for name in exported)
    card = json.loads((finished_run / "export/teacher_backbone.json").read_text())
    assert card["sequences"] == ["ax_t2wi", "ax_adc", "ax_dwi"]
    assert (card["patch_size"], card["embed_dim"], card["step"]) == (8, 32, 8)
    assert (card["mean"], card["std"]) == (0.45, 0.22)
    assert card["preprocess"]["percentiles"] == [1.0, 99.0]
    assert card["split_digest"] == record_of(finished_run)["split_digest"]


def test_log_txt_holds_what_was_said(finished_run: Path) -> None:
    text = (finished_run / "log.txt").read_text()
    for words in (
        "'PT-0002'. Its tokens are masked",
        "ax_dwi: ax_dwi_b1400.nii.gz chosen",
        "8 steps of 2 samples, 4 an epoch; effective learning rate 0.000442",
        "49 tokens a global crop, 13 a local crop; expected first loss about",
        "[8/8]",
        "Saved",
    ):
        assert words in text


# --- the same folder again -------------------------------------------------------------------------------------------


def test_a_finished_run_is_left_alone_and_says_so(tiny: Run, copied_run: Path) -> None:
    before = files_of(copied_run)
    answer = tiny("--out", copied_run)
    assert answer.exit_code == 0
    assert answer.stdout.startswith("nothing left to do: all 8 steps")
    after = files_of(copied_run)
    assert {name: data for name, data in after.items() if name != ".lock"} == {
        name: data for name, data in before.items() if name != ".lock"
    }
    assert json.loads(tiny("--out", copied_run, "--json").stdout)["steps_now"] == 0


def test_more_epochs_go_on_where_the_run_ended(tiny: Run, copied_run: Path) -> None:
    first = metrics_of(copied_run)
    answer = tiny("--out", copied_run, "optim.epochs=3")
    assert answer.exit_code == 0, answer.stderr
    assert answer.stdout.startswith("12 steps")
    rows = metrics_of(copied_run)
    assert [row["iteration"] for row in rows] == list(range(1, 13))
    assert rows[:8] == first
    assert record_of(copied_run)["step"] == 12
    assert "optim.epochs: 2 -> 3" in (copied_run / "log.txt").read_text()
    refused = tiny("--out", copied_run, "optim.epochs=1")
    assert refused.exit_code == 2
    assert "optim.epochs: 3 -> 1" in refused.stderr


def test_a_run_whose_export_is_gone_exports_again(tiny: Run, copied_run: Path, finished_run: Path) -> None:
    shutil.rmtree(copied_run / "export")
    assert tiny("--out", copied_run).exit_code == 0
    name = "export/teacher_backbone.safetensors"
    assert (copied_run / name).read_bytes() == (finished_run / name).read_bytes()


def test_no_resume_starts_afresh_with_the_same_numbers(tiny: Run, copied_run: Path) -> None:
    (copied_run / "eval").mkdir()
    before = metrics_of(copied_run)
    assert tiny("--out", copied_run, "--no-resume").exit_code == 0
    after = metrics_of(copied_run)
    assert not (copied_run / "eval").exists()
    assert [row["total_loss"] for row in after] == [row["total_loss"] for row in before]
    assert len((copied_run / "log.txt").read_text().split("effective learning rate")) == 2


@pytest.mark.parametrize("fault", [("--init", "nowhere.safetensors"), ("--data", "nowhere")])
def test_no_resume_with_bad_input_costs_nothing(tiny: Run, copied_run: Path, fault: tuple[str, str]) -> None:
    before = files_of(copied_run)
    assert tiny("--out", copied_run, "--no-resume", *fault).exit_code in (3, 7)
    after = files_of(copied_run)
    assert after.pop(".lock", None) is not None
    before.pop(".lock")
    assert after == before


def test_a_foreign_folder_is_refused_and_replaced_only_for_a_good_run(tiny: Run, tmp_path: Path) -> None:
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "chapter1.md").write_text("years of work")
    refused = tiny("--out", out)
    assert refused.exit_code == 2
    assert "--overwrite" in refused.stderr
    assert "another folder" in refused.stderr
    assert files_of(out) == {"chapter1.md": b"years of work"}
    assert tiny("--out", out, "--overwrite", "--init", "nowhere.pth").exit_code == 7
    assert (out / "chapter1.md").read_text() == "years of work"
    assert tiny("--out", out, "--overwrite").exit_code == 0
    assert not (out / "chapter1.md").exists()
    assert record_of(out)["status"] == "finished"
    assert "effective learning rate" in (out / "log.txt").read_text()
    with locked(out, "run folder"):
        pass


def test_overwrite_never_deletes_an_input(tiny: Run, tmp_path: Path, prostate_tree: Path) -> None:
    data = tmp_path / "all/data"
    shutil.copytree(prostate_tree, data)
    before = files_of(tmp_path)
    for out in (data, data.parent, data / next(data.iterdir()).name):
        refused = tiny("--data", data, "--out", out, "--overwrite")
        assert refused.exit_code == 2
        assert "more than old results" in refused.stderr
    refused = tiny("--cache", tmp_path / "all/cache", "--out", tmp_path / "all", "--overwrite")
    assert "more than old results" in refused.stderr
    assert files_of(tmp_path) == before


def test_out_is_named_after_the_recipe_or_by_the_config(
    tiny: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert tiny("optim.epochs=1").exit_code == 0
    assert record_of(tmp_path / "runs/tiny")["status"] == "finished"
    assert tiny("optim.epochs=1", "train.output_dir=elsewhere").exit_code == 0
    assert record_of(tmp_path / "elsewhere")["status"] == "finished"


def test_r17_a_second_run_in_the_same_folder_is_refused(tiny: Run, copied_run: Path) -> None:
    before = files_of(copied_run)
    with locked(copied_run, "run folder"):
        answer = tiny("--out", copied_run, "--no-resume")
    assert answer.exit_code == 2
    assert "Another process is working on this run folder." in answer.stderr
    before.pop(".lock"), (after := files_of(copied_run)).pop(".lock")
    assert after == before


# --- printing --------------------------------------------------------------------------------------------------------


def test_json_is_one_document_on_stdout(tiny: Run, tmp_path: Path) -> None:
    answer = tiny("--out", tmp_path / "run", "--json", "optim.epochs=1")
    facts = json.loads(answer.stdout)
    assert facts["command"] == "pretrain"
    assert facts["steps"] == 4
    assert facts["export"] == str(tmp_path / "run/export/teacher_backbone.safetensors")
    assert {"schema_version", "medssl_version", "started_at", "elapsed_s"} <= facts.keys()
    assert "[4/4]" in answer.stderr
    smoke = tiny("--smoke", "--json")
    assert len(json.loads(smoke.stdout)["losses"]) == 5
    assert "[step 4] loss=" in smoke.stderr


def test_list_configs_names_each_recipe(medssl: Run) -> None:
    answer = medssl("pretrain", "--list-configs")
    assert answer.exit_code == 0
    lines = dict(line.split(maxsplit=1) for line in answer.stdout.splitlines())
    assert "the documented recipe" in lines["prostate_vitb14"]
    assert all(lines.values())


def test_smoke_prints_five_losses_and_writes_nothing(
    medssl: Run, tiny_recipe: Path, prostate_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P39: the data root comes from the environment when nothing names one."""
    monkeypatch.chdir(tmp_path)
    env = {"PROSTATE_DATA_ROOT": str(prostate_tree), "MEDSSL_CACHE": str(tmp_path / "cache")}
    before = sorted(prostate_tree.rglob("*"))
    answer = medssl("pretrain", "--config", tiny_recipe, "--smoke", "--device", "cpu", env=env)
    assert answer.exit_code == 0, answer.stderr
    *steps, last = answer.stdout.splitlines()
    assert [re.fullmatch(r"\[step (\d)\] loss=\d+\.\d+", line)[1] for line in steps] == list("01234")  # type: ignore[index]
    assert last == "smoke test passed: 5 steps on 4 cases, nothing written"
    assert list(tmp_path.iterdir()) == []
    assert sorted(prostate_tree.rglob("*")) == before
    elsewhere = medssl("pretrain", "--config", tiny_recipe, "--smoke", "--data", tmp_path / "nowhere", env=env)
    assert elsewhere.exit_code == 3


def test_t18_the_documented_recipe_runs_on_thick_slices_and_says_what_it_leaves_out(
    medssl: Run, prostate_tree: Path
) -> None:
    """The recipe as shipped, on slices of 6 mm, with network and crops that a test can afford."""
    small = ("student.arch=vit_tiny", "student.depth=1", "crops.rc_size=32", "crops.local_crops_number=1")
    sizes = ("crops.global_crops_size=56", "crops.local_crops_size=28", "data.preprocess.resample_mm=[6,1.5,1.5]")
    words = ("--config", "prostate_vitb14", "--data", prostate_tree, "--device", "cpu", "--smoke", *small, *sizes)
    answer = medssl("pretrain", *words)
    assert answer.exit_code == 0, answer.stderr
    assert "Random axes: coronal and sagittal slices are left out in 4 of 4 cases" in answer.stderr
    assert "data.preprocess.resample_mm=[1.5,1.5,1.5] brings them in" in answer.stderr
    assert answer.stdout.count("loss=") == 5


def test_without_data_both_ways_to_name_it_are_told(medssl: Run, tiny_recipe: Path) -> None:
    answer = medssl("pretrain", "--config", tiny_recipe, env={"PROSTATE_DATA_ROOT": ""})
    assert answer.exit_code == 2
    assert "pass --data ROOT, or set data.root" in answer.stderr


def test_dry_run_estimates_and_writes_nothing(
    tiny: Run, prostate_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(prostate_tree.rglob("*"))
    words = ("--dry-run", "--out", tmp_path / "run", "--cache", tmp_path / "cache", "train.batch_size_per_gpu=4")
    answer = tiny(*words)
    assert answer.exit_code == 0, answer.stderr
    assert re.search(r"[\d.]+ images/s: 8 steps of 4 samples take about [\d.]+ h", answer.stdout)
    assert re.search(r"memory peak [\d.]+ GiB of [\d.]+ GiB at batch 4", answer.stdout)
    assert re.search(r"the loader alone gives [\d.]+ images/s", answer.stdout)
    assert re.search(r"cache about [\d.]+ MB for 6 cases", answer.stdout)
    assert "nothing was written" in answer.stdout
    assert list(tmp_path.iterdir()) == []
    assert sorted(prostate_tree.rglob("*")) == before
    facts = json.loads(tiny(*words, "--json").stdout)
    assert facts["hours"] == pytest.approx(8 * 4 / facts["images_per_s"] / 3600)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("way", ["--smoke", "--dry-run"])
def test_a_trial_that_runs_out_of_memory_ends_like_a_run(tiny: Run, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    def too_much(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80.00 GiB")

    monkeypatch.setattr(SelfDistillation, "losses", too_much)
    answer = tiny(way)
    assert answer.exit_code == 6
    assert "There is not enough memory." in answer.stderr
    assert "Tried to allocate 80.00 GiB" in answer.stderr


def test_dry_run_tells_the_epochs_of_all_cases_though_it_looks_at_four(tiny: Run) -> None:
    """Whether a run is worth compiling for follows from its length too."""
    answer = tiny("--dry-run", "train.batch_size_per_gpu=4", "train.OFFICIAL_EPOCH_LENGTH=auto")
    assert "4 steps of 4 samples, 2 an epoch" in answer.stderr
    assert "4 steps of 4 samples take about" in answer.stdout


# --- wrong usage -----------------------------------------------------------------------------------------------------


def test_every_wrong_key_is_told_at_once_with_the_nearest(tiny: Run, tmp_path: Path) -> None:
    answer = tiny("--out", tmp_path / "run", "optim.base_lrr=1e-4", "student.patch_sice=8", "optim.epochs=many")
    assert answer.exit_code == 2
    assert "3 faults" in answer.stderr
    assert "optim.base_lrr: unknown key; did you mean optim.base_lr?" in answer.stderr
    assert "student.patch_sice: unknown key; did you mean student.patch_size?" in answer.stderr
    assert "optim.epochs: input should be a valid integer" in answer.stderr
    assert not (tmp_path / "run").exists()


def test_t38_a_crop_that_does_not_divide_names_its_neighbours(tiny: Run, tmp_path: Path) -> None:
    answer = tiny(
        "--out", tmp_path / "run", "student.patch_size=14", "train.img_size=224", "crops.global_crops_size=192",
        "crops.local_crops_size=96",
    )  # fmt: skip
    assert answer.exit_code == 2
    assert "192 is not a multiple of the patch size 14; the nearest are 182 and 196" in answer.stderr
    assert "96 is not a multiple of the patch size 14; the nearest are 84 and 98" in answer.stderr


def test_an_absent_device_is_an_error(tiny: Run, tmp_path: Path) -> None:
    count = torch.cuda.device_count()
    answer = tiny("--out", tmp_path / "run", "--device", f"cuda:{count}")
    assert answer.exit_code == 6
    assert "--device cpu" in answer.stderr
    assert not (tmp_path / "run").exists()
    assert tiny("--device", "tpu").exit_code == 2


def test_more_gpus_than_there_are_is_an_error_with_a_way_out(
    tiny: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    answer = tiny("--out", tmp_path / "run", "--gpus", 3, "--device", "auto")
    assert answer.exit_code == 6
    assert "--gpus 3; found 2" in answer.stderr
    assert "--device cpu" in answer.stderr
    assert "train.grad_accumulation" in answer.stderr
    assert tiny("--gpus", 2, "--device", "cuda:1").exit_code == 2
    assert not (tmp_path / "run").exists()


def test_torchrun_and_gpus_must_agree(tiny: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    answer = tiny("--out", tmp_path / "run", "--gpus", 2)
    assert answer.exit_code == 2
    assert "--gpus 2; torchrun started 4 processes on this machine" in answer.stderr
    assert not (tmp_path / "run").exists()


def test_smoke_and_dry_run_exclude_each_other(tiny: Run) -> None:
    assert tiny("--smoke", "--dry-run").exit_code == 2


def test_on_error_of_the_config_counts_unless_the_flag_is_given(tiny: Run, tmp_path: Path) -> None:
    assert tiny("--out", tmp_path / "run", "data.on_error=skip", "optim.epochs=1").exit_code == 0
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["data"]["on_error"] == "skip"


# --- learning rate and warnings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "accumulation", "base_lr", "printed"),
    [
        (4, 1, "2.5e-4", "1.56e-05"),
        (8, 1, "3.5e-4", "3.09e-05"),
        (8, 2, "5e-4", "6.25e-05"),
        (8, 4, "7e-4", "0.000124"),
    ],
)
def test_t10_effective_rate_is_printed_for_the_documented_batches(
    tiny: Run, batch: int, accumulation: int, base_lr: str, printed: str
) -> None:
    answer = tiny(
        "--dry-run", f"train.batch_size_per_gpu={batch}", f"train.grad_accumulation={accumulation}",
        f"optim.base_lr={base_lr}", "optim.warmup_epochs=0",
    )  # fmt: skip
    assert f"effective learning rate {printed} " in answer.stderr


def test_t28_an_ignored_head_is_named(tiny: Run) -> None:
    answer = tiny("--smoke", "ibot.head_n_prototypes=128")
    assert "ibot.head_n_prototypes" in answer.stderr
    assert "separate_head" in answer.stderr
    assert "separate_head" not in tiny("--smoke").stderr


def test_t02_two_steps_without_xformers(tiny: Run, tmp_path: Path) -> None:
    words = ("--out", tmp_path / "run", "optim.epochs=1", "train.OFFICIAL_EPOCH_LENGTH=2")
    answer = tiny(*words, env={"XFORMERS_DISABLED": "1"})
    assert answer.exit_code == 0
    assert record_of(tmp_path / "run")["attention"] in {"sdpa", "plain"}


# --- weights ---------------------------------------------------------------------------------------------------------


def renamed_as_dinov2(export: Path, path: Path) -> Path:
    """The exported backbone as a checkpoint of DINOv2 names it: a teacher with a head, four-chunk blocks."""
    tensors = {f"teacher.backbone.{name}": tensor for name, tensor in load_file(export).items()}
    tensors["teacher.dino_head.last_layer.weight_v"] = torch.zeros(4, 4)
    torch.save(tensors, path)
    return path


def test_init_takes_weights_in_dinov2_names_and_reports(tiny: Run, finished_run: Path, tmp_path: Path) -> None:
    weights = renamed_as_dinov2(finished_run / "export/teacher_backbone.safetensors", tmp_path / "dinov2.pth")
    out = tmp_path / "run"
    words = ("--out", out, "optim.epochs=1", "train.OFFICIAL_EPOCH_LENGTH=1")  # one step, at learning rate 0
    answer = tiny(*words, "--init", weights)
    assert answer.exit_code == 0, answer.stderr
    total = len(load_file(finished_run / "export/teacher_backbone.safetensors"))
    assert f"{total} of {total} tensors loaded (100.0%)" in answer.stderr
    assert "unexpected 1: " in answer.stderr
    name = "export/teacher_backbone.safetensors"
    first, after = load_file(finished_run / name), load_file(out / name)
    assert all(torch.equal(first[key], after[key]) for key in first)
    assert f"{total} of {total} tensors loaded" in (out / "log.txt").read_text()


@pytest.mark.parametrize("key", ["MODEL.WEIGHTS", "student.pretrained_weights"])
def test_weights_may_stand_in_the_config(tiny: Run, finished_run: Path, key: str) -> None:
    answer = tiny("--smoke", f"{key}={finished_run}/export/teacher_backbone.safetensors")
    assert answer.exit_code == 0
    assert "(100.0%)" in answer.stderr


def test_a_run_stands_for_its_backbone(tiny: Run, finished_run: Path, tmp_path: Path) -> None:
    words = ("optim.epochs=1", "train.OFFICIAL_EPOCH_LENGTH=1", "--out")
    export = "export/teacher_backbone.safetensors"
    for name, init in (("run", finished_run), ("export", finished_run / "export"), ("file", finished_run / export)):
        answer = tiny(*words, tmp_path / name, "--init", init)
        assert answer.exit_code == 0, answer.stderr
    found = {name: (tmp_path / name / export).read_bytes() for name in ("run", "export", "file")}
    assert found["run"] == found["export"] == found["file"]


def test_weights_that_do_not_fit_are_refused_before_images_are_prepared(
    tiny: Run, finished_run: Path, tmp_path: Path
) -> None:
    words = ("--out", tmp_path / "run", "--cache", tmp_path / "cache", "student.embed_dim=48")
    answer = tiny(*words, "--init", finished_run / "export/teacher_backbone.safetensors")
    assert answer.exit_code == 7, answer.stderr
    assert "mismatched" in answer.stderr
    assert not (tmp_path / "cache").exists(), "nothing was prepared"


def test_t15_rows_of_the_sequence_table_follow_the_names(tiny: Run, finished_run: Path, tmp_path: Path) -> None:
    words = ("--out", tmp_path / "run", "optim.epochs=1", "train.OFFICIAL_EPOCH_LENGTH=1")
    export = "export/teacher_backbone.safetensors"
    assert tiny(*words, "--init", finished_run / export, "data.mri_sequences=ax_dwi,ax_t2wi,ax_adc").exit_code == 0
    before, after = load_file(finished_run / export), load_file(tmp_path / "run" / export)
    (table,) = [name for name in before if before[name].shape[0] in (3, 4) and "seq" in name]
    assert torch.equal(after[table][:3], before[table][[2, 0, 1]])


@pytest.mark.parametrize("fault", ["renamed", "shape", "truncated", "empty", "html", "missing", "pickle"])
def test_r08_wrong_weights_are_refused_before_anything_is_written(
    tiny: Run, finished_run: Path, tmp_path: Path, fault: str
) -> None:
    good = finished_run / "export/teacher_backbone.safetensors"
    path = tmp_path / ("weights.pth" if fault in ("html", "pickle") else "weights.safetensors")
    tensors = load_file(good)
    marker = tmp_path / "executed"
    if fault == "renamed":
        save_file({f"x{name}": tensor for name, tensor in tensors.items()}, path)
    elif fault == "shape":
        save_file({name: torch.zeros(5, 5) for name in tensors}, path)
    elif fault == "truncated":
        path.write_bytes(good.read_bytes()[:-100])
    elif fault == "empty":
        path.write_bytes(b"")
    elif fault == "html":
        path.write_text("<!doctype html><title>404</title>")
    elif fault == "pickle":
        torch.save({"model": _Malicious(marker)}, path)
    answer = tiny("--out", tmp_path / "run", "--init", path)
    assert answer.exit_code == 7, answer.stderr
    assert str(path) in answer.stderr
    assert not marker.exists()
    assert not (tmp_path / "run/checkpoints").exists()
    assert not (tmp_path / "run/run.json").exists()


class _Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.marker,))


# --- privacy ---------------------------------------------------------------------------------------------------------


def test_r20_json_and_log_hide_the_home_folder(
    tiny: Run, prostate_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home" / "jane"
    shutil.copytree(prostate_tree, home / "data")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr("sys.argv", ["medssl", "pretrain", "--data", str(home / "data")])
    words = ("--data", home / "data", "--out", home / "run", "--cache", home / "cache", "optim.epochs=1")
    assert tiny(*words).exit_code == 0
    written = [p for p in (home / "run").rglob("*") if p.suffix in {".json", ".jsonl", ".txt"}]
    assert len(written) >= 6
    for path in written:
        assert str(home) not in path.read_text(), path
    assert record_of(home / "run")["command_line"][-1] == "~/data"
    again = tiny(*words)
    assert again.stdout.startswith("nothing left to do")
