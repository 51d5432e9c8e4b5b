"""The training run of segment: files, history, the best epoch, interruption and resume."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from segment_parts import TinyConfig, history, looked, noisy, same_state, scripted, state, tiny_job, train
from torch import nn

from medssl_cli.core.errors import CheckpointError, ConfigError, Interrupted, NonFiniteError
from medssl_cli.core.protocols import LabelledBatch
from medssl_cli.engine.telemetry import read_metrics

EPOCH_STEPS = 3  # nine samples in batches of four


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four epochs without a break; not to be changed."""
    out = tmp_path_factory.mktemp("straight") / "run"
    train(tiny_job(), out)
    return out


class StopAt:
    """Views that send a signal to this process at one step."""

    def __init__(self, step: int, number: int = signal.SIGTERM) -> None:
        self.step, self.number = step, number

    def __call__(self, batch: LabelledBatch, step: int, micro: int) -> LabelledBatch:
        if step == self.step:
            os.kill(os.getpid(), self.number)
        return noisy(batch, step, micro)


def interrupted(out: Path, step: int, **given: Any) -> Path:
    """A run that got a signal in the step of this index."""
    with pytest.raises(Interrupted):
        train(tiny_job(views=StopAt(step), **given), out)
    return out


def test_all_files_are_there(straight: Path) -> None:
    for name in ("config.yaml", "run.json", "log.txt", "model.json", "best.safetensors", "history.json"):
        assert (straight / name).is_file(), name
    for name in ("progress.png", "cases.csv", "training_metrics.jsonl", "val_overlays/s0.png", "last/last/state.json"):
        assert (straight / name).is_file(), name
    assert [path.name for path in (straight / "last").glob("step_*")] == ["step_0000012"]
    assert sorted(path.name for path in (straight / "checkpoints").iterdir()) == [
        "epoch_0002.safetensors",
        "epoch_0004.safetensors",
    ]
    assert list((straight / "tb").glob("events*"))
    assert list((straight / "tb" / "epochs").glob("events*"))
    with (straight / "cases.csv").open() as file:
        assert list(csv.reader(file)) == [["part", "case_id", "patient_id"], ["train", "s0", "p0"], ["val", "s1", "p1"]]
    assert not list(straight.glob(".*.tmp*"))
    assert not list(straight.glob(".tmp-*"))


def test_history_holds_the_lists_of_each_epoch(straight: Path) -> None:
    found = history(straight)
    of_epoch = ["epoch", "lr", "train_loss", "train_dice", "train_iou", "train_f1", "train_hd95"]
    of_validation = ["val_epoch", "val_loss", "val_dice", "val_iou", "val_f1", "val_hd95", "val_best_dice"]
    assert set(found) == {*of_epoch, *of_validation, "val_best_threshold", "score"}
    assert found["epoch"] == found["val_epoch"] == [1, 2, 3, 4]
    assert all(len(values) == 4 for values in found.values())
    assert found["val_iou"] == [None] * 4
    half_cosine = [1e-6 + (0.01 - 1e-6) * share for share in (1.0, 0.8535533906, 0.5, 0.1464466094)]
    assert found["lr"] == pytest.approx(half_cosine, rel=1e-8)


def test_json_is_strict_and_tells_of_the_model(straight: Path) -> None:
    def refuse(text: str) -> None:
        raise AssertionError(text)

    card = json.loads((straight / "model.json").read_text(), parse_constant=refuse)
    run = json.loads((straight / "run.json").read_text(), parse_constant=refuse)
    found = history(straight)
    best = max(range(4), key=lambda at: found["score"][at])
    assert card["command"] == "segment"
    assert card["task"] == "ct-pet"
    assert card["weights"] == "ema"
    assert card["epoch"] == best + 1 == run["best_epoch"]
    assert card["threshold"] == 0.4
    assert card["score"] == found["score"][best] == card["val"]["val_dice"]
    assert card["n_parameters"] == {"total": 165, "trainable": 89, "frozen": 76}
    assert card["data_digest"] == "a" * 64
    assert card["split_digest"] == "b" * 64
    assert card["distance_unit"] == run["distance_unit"] == "px"
    assert "distance_unit" in card["definitions"]["val_hd95"]
    assert run["status"] == "finished"
    assert run["epoch"] == 4
    assert run["total_steps"] == 12


def test_c18_the_best_file_holds_both_sets_of_weights(straight: Path) -> None:
    tensors = load_file(straight / "best.safetensors")
    names = {name.partition(".")[2] for name in tensors if name.startswith("ema.")}
    assert names == {name.partition(".")[2] for name in tensors if name.startswith("raw.")}
    assert {name for name in tensors if name.startswith("frozen.")} == {"frozen.frozen.weight", "frozen.frozen.bias"}
    assert not torch.equal(tensors["ema.first.weight"], tensors["raw.first.weight"])


def test_c18_resuming_goes_on_from_the_raw_weights(straight: Path, tmp_path: Path) -> None:
    shutil.copytree(straight, tmp_path / "run")
    seen: list[dict[str, torch.Tensor]] = []
    job = tiny_job(TinyConfig(epochs=5))

    def look(batch: LabelledBatch, step: int, micro: int) -> LabelledBatch:
        seen.append({name: tensor.clone() for name, tensor in job.network.state_dict().items()})
        return noisy(batch, step, micro)

    job.views = look
    train(job, tmp_path / "run")
    saved = state(straight)
    assert len(seen) == EPOCH_STEPS
    assert all(torch.equal(tensor, saved[f"model/network.{name}"]) for name, tensor in seen[0].items())
    assert not torch.equal(seen[0]["first.weight"], saved["model/averaged.first.weight"])


def test_c16_validation_leaves_the_raw_weights_as_they_were(tmp_path: Path) -> None:
    seen: list[bool] = []
    job = tiny_job(TinyConfig(epochs=2))

    def validate(network: nn.Module) -> Mapping[str, Any]:
        before = {name: tensor.clone() for name, tensor in job.network.state_dict().items()}
        modes = [module.training for module in job.network.modules()]
        assert not any(module.training for module in network.modules())
        found = looked(network)
        seen.append(
            all(torch.equal(before[name], tensor) for name, tensor in job.network.state_dict().items())
            and modes == [module.training for module in job.network.modules()]
        )
        return found

    job.validate = validate
    train(job, tmp_path / "each")
    train(tiny_job(TinyConfig(epochs=2), val_freq=2), tmp_path / "last")
    assert seen == [True, True]
    same_state(tmp_path / "each", tmp_path / "last")


def test_c16_without_averaging_the_network_trains_on_after_a_validation(tmp_path: Path) -> None:
    train(tiny_job(TinyConfig(epochs=2), ema_decay=0.0), tmp_path / "each")
    train(tiny_job(TinyConfig(epochs=2), ema_decay=0.0, val_freq=2), tmp_path / "last")
    same_state(tmp_path / "each", tmp_path / "last")
    assert json.loads((tmp_path / "each" / "model.json").read_text())["weights"] == "raw"


@pytest.mark.parametrize("step", [5, 6], ids=["last-step-of-an-epoch", "middle"])
def test_c17_r01_an_interrupted_run_ends_as_one_without_a_break(straight: Path, tmp_path: Path, step: int) -> None:
    out = interrupted(tmp_path / "run", step)
    told = json.loads((out / "run.json").read_text())
    assert told["status"] == "interrupted"
    assert told["step"] == step + 1
    train(tiny_job(), out)
    same_state(straight, out)
    first, second = history(straight), history(out)
    if step == 5:  # the batch whose distance is told was gone when the figures of its epoch were taken
        assert second["train_hd95"][1] is None
        second["train_hd95"][1] = first["train_hd95"][1]
    assert first == second
    losses = [[line["total_loss"] for line in read_metrics(run / "training_metrics.jsonl")] for run in (straight, out)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 12
    best = [load_file(run / "best.safetensors") for run in (straight, out)]
    assert all(torch.equal(best[0][name], best[1][name]) for name in best[0])
    assert json.loads((out / "run.json").read_text())["status"] == "finished"


def test_r01_loader_processes_change_nothing(straight: Path, tmp_path: Path) -> None:
    out = interrupted(tmp_path / "run", 6, num_workers=1)
    train(tiny_job(num_workers=1), out)
    same_state(straight, out)


def test_interruption_has_exit_code_75(tmp_path: Path) -> None:
    with pytest.raises(Interrupted) as caught:
        train(tiny_job(views=StopAt(1)), tmp_path / "run")
    assert caught.value.exit_code == 75
    assert "SIGTERM" in caught.value.what
    assert "step_0000002" in caught.value.where


def test_a_run_killed_between_checkpoint_and_validation_validates_again(straight: Path, tmp_path: Path) -> None:
    class KilledError(BaseException):
        pass

    def die(network: nn.Module) -> Mapping[str, Any]:
        raise KilledError

    with pytest.raises(KilledError):
        train(tiny_job(validate=die), tmp_path / "run")
    assert (tmp_path / "run" / "last" / "step_0000003").is_dir()
    assert not (tmp_path / "run" / "history.json").exists()
    train(tiny_job(), tmp_path / "run")
    same_state(straight, tmp_path / "run")
    assert history(tmp_path / "run")["val_dice"] == history(straight)["val_dice"]
    assert history(tmp_path / "run")["train_loss"] == history(straight)["train_loss"]


def test_epochs_beyond_the_checkpoint_are_dropped_from_the_history(straight: Path, tmp_path: Path) -> None:
    out = interrupted(tmp_path / "run", 6)
    known = history(out)
    (out / "history.json").write_text(json.dumps({name: [*values, 99, 99] for name, values in known.items()}))
    train(tiny_job(), out)
    assert history(out)["epoch"] == [1, 2, 3, 4]
    assert history(out)["train_loss"] == history(straight)["train_loss"]


def test_the_best_epoch_is_the_first_of_the_highest_score(tmp_path: Path) -> None:
    train(tiny_job(validate=scripted([0.5, 0.5, 0.7, 0.7])), tmp_path / "run")
    card = json.loads((tmp_path / "run" / "model.json").read_text())
    assert (card["epoch"], card["score"], card["step"]) == (3, 0.7, 9)


def test_a_score_that_is_not_defined_never_replaces_one_that_is(tmp_path: Path) -> None:
    train(tiny_job(validate=scripted([None, 0.1, None, 0.05])), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "model.json").read_text())["epoch"] == 2


def test_a_loss_that_does_not_move_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for lr, told in ((1e-9, 1), (0.01, 0)):
        caplog.clear()
        train(tiny_job(TinyConfig(epochs=6, lr=lr), min_lr=0.0, val_freq=6), tmp_path / f"{lr}")
        texts = [record.getMessage() for record in caplog.records if "hardly moved in 5 epochs" in record.getMessage()]
        assert len(texts) == told
        assert all("--lr" in text and "check-data" in text for text in texts)


@pytest.mark.parametrize(
    ("counts", "told"), [({"train": {}, "test": {}}, "--data cases --split test"), ({"train": {}}, "--split all")]
)
def test_the_next_command_evaluates_on_what_the_model_has_not_seen(
    tmp_path: Path, counts: dict[str, Any], told: str
) -> None:
    job = tiny_job(TinyConfig(epochs=1), data_facts={"counts": counts})
    line = next(line for line in train(job, tmp_path / "run", data=Path("cases")).lines if line.startswith("next:"))
    assert told in line
    assert ("cases" in line) == ("test" in counts)


def test_validations_are_as_far_apart_as_val_freq_says_and_the_last_epoch_has_one(tmp_path: Path) -> None:
    train(tiny_job(val_freq=3), tmp_path / "run")
    assert history(tmp_path / "run")["val_epoch"] == [3, 4]
    assert len(history(tmp_path / "run")["train_loss"]) == 4


def test_patience_ends_the_training_and_nothing_is_left_to_do(tmp_path: Path) -> None:
    given = {"config": TinyConfig(epochs=9), "patience": 2}
    result = train(tiny_job(validate=scripted([0.5, 0.6, 0.6, 0.4]), **given), tmp_path / "run")
    assert result.facts["stopped_early"] is True
    assert result.facts["epochs"] == 4
    assert history(tmp_path / "run")["epoch"] == [1, 2, 3, 4]
    again = train(tiny_job(validate=scripted([]), **given), tmp_path / "run")
    assert "nothing left to do" in again.lines[0]
    assert json.loads((tmp_path / "run" / "model.json").read_text())["epoch"] == 2


def test_a_finished_run_has_nothing_left_to_do_and_more_epochs_go_on(straight: Path, tmp_path: Path) -> None:
    shutil.copytree(straight, tmp_path / "run")
    assert "nothing left to do" in train(tiny_job(), tmp_path / "run").lines[0]
    train(tiny_job(TinyConfig(epochs=5)), tmp_path / "run")
    longer = history(tmp_path / "run")
    assert longer["epoch"] == [1, 2, 3, 4, 5]
    assert longer["lr"][:4] == history(straight)["lr"]


def test_a_finished_run_whose_model_is_gone_is_validated_again(straight: Path, tmp_path: Path) -> None:
    shutil.copytree(straight, tmp_path / "run")
    (tmp_path / "run" / "best.safetensors").unlink()
    train(tiny_job(), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "model.json").read_text())["epoch"] == 4
    assert (tmp_path / "run" / "best.safetensors").is_file()


def test_r07_a_changed_configuration_is_refused_by_name(straight: Path, tmp_path: Path) -> None:
    shutil.copytree(straight, tmp_path / "run")
    before = state(tmp_path / "run")
    with pytest.raises(ConfigError) as caught:
        train(tiny_job(TinyConfig(epochs=3, lr=0.02), data_facts={"data_digest": "c" * 64}), tmp_path / "run")
    assert caught.value.exit_code == 2
    for line in ("lr: 0.01 -> 0.02", "epochs: 4 -> 3", 'data_digest: "aaaaaaaaaaaa" -> "cccccccccccc"'):
        assert line in caught.value.where
    assert all(torch.equal(before[name], tensor) for name, tensor in state(tmp_path / "run").items())
    train(tiny_job(TinyConfig(epochs=5, workers=1), num_workers=0), tmp_path / "run")  # these two may change
    train(tiny_job(TinyConfig(epochs=6, lr=0.02)), tmp_path / "run", allowed_changes=("lr",))


def test_another_architecture_is_refused(straight: Path, tmp_path: Path) -> None:
    shutil.copytree(straight, tmp_path / "run")
    with pytest.raises(CheckpointError) as caught:
        train(tiny_job(width=8), tmp_path / "run")
    assert caught.value.exit_code == 7
    assert "shape of network.first.weight" in caught.value.where


def test_c17_w42_a_missing_checkpoint_is_never_a_fresh_start(straight: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        train(tiny_job(), tmp_path / "run", resume_ckpt=tmp_path / "none")
    assert caught.value.exit_code == 7
    assert "does not exist" in caught.value.where
    assert "run folder" in caught.value.fix
    with pytest.raises(CheckpointError, match="no checkpoint to resume"):
        train(tiny_job(), tmp_path / "run", resume_ckpt=straight / "best.safetensors")
    shutil.copytree(straight, tmp_path / "gone")
    shutil.rmtree(tmp_path / "gone" / "last")
    with pytest.raises(CheckpointError) as caught:
        train(tiny_job(), tmp_path / "gone")
    assert "--no-resume" in caught.value.fix
    train(tiny_job(TinyConfig(epochs=1)), tmp_path / "gone", resume=False)
    assert history(tmp_path / "gone")["epoch"] == [1]
    assert not (tmp_path / "gone" / "checkpoints").exists()


@pytest.mark.parametrize("named", ["", "last", "last/step_0000007"])
def test_a_named_checkpoint_goes_on_in_another_folder(straight: Path, tmp_path: Path, named: str) -> None:
    first = interrupted(tmp_path / "first", 6)
    train(tiny_job(), tmp_path / "second", resume_ckpt=first / named)
    same_state(straight, tmp_path / "second")
    assert history(tmp_path / "second")["train_loss"] == history(straight)["train_loss"]
    assert json.loads((tmp_path / "second" / "model.json").read_text())["epoch"] in (3, 4)
    with pytest.raises(ConfigError, match="checkpoint of its own"):
        train(tiny_job(), first, resume_ckpt=straight)


def test_r06_a_nan_stops_before_the_update(tmp_path: Path) -> None:
    def poison(batch: LabelledBatch, step: int, micro: int) -> LabelledBatch:
        batch = noisy(batch, step, micro)
        if step == 4:
            batch.images_BSHW[0, 0, 0, 0] = torch.nan
        return batch

    with pytest.raises(NonFiniteError) as caught:
        train(tiny_job(views=poison), tmp_path / "run")
    assert caught.value.exit_code == 5
    assert "step_0000003" in caught.value.where
    assert "cases: s" in caught.value.where
    assert "--lr" in caught.value.fix
    assert "optim.base_lr" not in caught.value.fix
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"
    assert (tmp_path / "run" / "last" / "step_0000003").is_dir()


def test_c20_a_small_last_batch_weighs_what_it_holds(tmp_path: Path) -> None:
    job = tiny_job(TinyConfig(epochs=1, lr=1e-12, batch=8), min_lr=0.0, weight_decay=0.0, views=lambda b, s, m: b)
    job.network.norm = nn.Identity()  # type: ignore[assignment]
    job.network.frozen = nn.Identity().requires_grad_(False)  # type: ignore[assignment]
    job.network.forward = lambda images, available=None: (
        images[:, :1] * 8
        - 5
        + 0
        * job.network.last(  # type: ignore[assignment]
            job.network.first(images)
        )
    )
    train(job, tmp_path / "run")
    scores = []
    for index in range(9):
        sample = job.train[(0, index)]
        predicted, true = sample.image_SHW[0] * 8 - 5 > 0, sample.label_HW > 0
        scores.append(2 * float((predicted & true).sum()) / float(predicted.sum() + true.sum()))
    assert history(tmp_path / "run")["train_dice"][0] == pytest.approx(sum(scores) / 9, abs=1e-9)
