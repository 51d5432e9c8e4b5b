import json
import logging
import math
from pathlib import Path

import pytest
from engine_stub import CPU

from medssl_cli.core.errors import ResourceError
from medssl_cli.engine.health import CollapseError, HealthConfig, HealthMonitor
from medssl_cli.engine.schedules import Schedules
from medssl_cli.engine.telemetry import StepRecord, Telemetry, read_metrics

SCHEDULES = Schedules(total_steps=45, epoch_steps=5, lr=1e-3)


def record(step: int, seconds: float = 2.0, **changes: object) -> StepRecord:
    settings: dict[str, object] = {
        "values": SCHEDULES.at(step - 1),
        "losses": {"dino_local_crops": 1.0 / step, "ibot": 2.0},
        "gradient_norms": {"backbone": 0.5, "dino_head": 4.0},
        "images": 8,
        "data_seconds": seconds / 4,
    }
    return StepRecord(step=step, seconds=seconds, **{**settings, **changes})


def health() -> dict[str, float]:
    return {"teacher_entropy": 0.8, "effective_rank": 12.0}


def telemetry(out: Path, **changes: object) -> Telemetry:
    settings: dict[str, object] = {"total_steps": 45, "device": CPU, "tensorboard": False}
    return Telemetry(out, **{**settings, **changes})


def test_a_line_at_the_first_each_tenth_and_the_last_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    log = telemetry(tmp_path)
    log.start(0)
    for step in range(1, 46):
        log.record(record(step), health)
    lines = read_metrics(tmp_path / "training_metrics.jsonl")
    assert [line["iteration"] for line in lines] == [1, 10, 20, 30, 40, 45]
    assert len(caplog.messages) == 6
    assert caplog.messages[0].startswith("[ 1/45]  eta 0:01:28  4.0 images/s  data-wait 25.0%  mem ")
    assert caplog.messages[-1].startswith("[45/45]  eta 0:00:00")
    for text in ("lr ", "wd ", "grad_norm backbone 0.5 dino_head 4", "total_loss ", "dino_local_crops_loss ",
                 "ibot_loss 2", "teacher_entropy 0.8", "effective_rank 12"):  # fmt: skip
        assert text in caplog.messages[-1]


def test_line_has_the_keys_of_section_7_2_and_medians_of_twenty(tmp_path: Path) -> None:
    log = telemetry(tmp_path)
    log.start(0)
    for step in range(1, 41):
        log.record(record(step, seconds=100.0 if step % 7 == 0 else 2.0), health)
    line = read_metrics(tmp_path / "training_metrics.jsonl")[-1]
    assert line.keys() >= {
        "iteration", "iter_time", "data_time", "lr", "wd", "mom", "last_layer_lr", "backbone_frozen",
        "current_batch_size", "total_loss", "dino_local_crops_loss", "ibot_loss", "teacher_temp", "images_per_s",
        "memory_gib", "grad_norm_backbone", "grad_norm_dino_head", "teacher_entropy", "effective_rank",
    }  # fmt: skip
    assert line["iter_time"] == 2.0  # three outliers among twenty do not move it
    assert line["eta_s"] == 2.0 * 5
    assert line["dino_local_crops_loss"] == pytest.approx((1 / 30 + 1 / 31) / 2)  # median of 1/21 .. 1/40
    assert line["mom"] == SCHEDULES.at(39)["momentum"]
    assert line["backbone_frozen"] is False
    assert 0.01 < line["memory_gib"] < 100


def test_json_is_strict_and_keyed_json_equals_the_lines(tmp_path: Path) -> None:
    log = telemetry(tmp_path, total_steps=1)
    log.start(0)
    log.record(record(1, gradient_norms={"backbone": math.inf}, loss_scale_skipped=True), health)
    log.checkpoint()
    text = (tmp_path / "training_metrics.jsonl").read_text()
    assert "Infinity" not in text
    line = json.loads(text)
    assert line["grad_norm_backbone"] is None
    assert line["loss_scale_skipped"] is True
    assert json.loads((tmp_path / "training_metrics.json").read_text()) == {"1": line}


def test_resume_drops_later_lines_and_keeps_the_medians(tmp_path: Path) -> None:
    def losses(out: Path) -> list[tuple[int, float]]:
        return [(line["iteration"], line["total_loss"]) for line in read_metrics(out / "training_metrics.jsonl")]

    straight = telemetry(tmp_path / "straight", log_every=3)
    straight.start(0)
    for step in range(1, 31):
        straight.record(record(step), health)

    cut = telemetry(tmp_path / "cut", log_every=3)
    cut.start(0)
    for step in range(1, 18):
        cut.record(record(step), health)
        if step == 10:
            state = json.loads(json.dumps(cut.checkpoint()))
    with (tmp_path / "cut" / "training_metrics.jsonl").open("a") as file:
        file.write('{"iteration": 18, "total_lo')  # what a kill leaves
    again = telemetry(tmp_path / "cut", log_every=3)
    again.start(10, state)
    assert [step for step, _ in losses(tmp_path / "cut")] == [1, 3, 6, 9]
    for step in range(11, 31):
        again.record(record(step), health)
    assert losses(tmp_path / "cut") == losses(tmp_path / "straight")


def test_a_new_run_in_the_same_folder_starts_an_empty_file(tmp_path: Path) -> None:
    for _ in range(2):
        log = telemetry(tmp_path, log_every=1)
        log.start(0)
        log.record(record(1), health)
    assert len(read_metrics(tmp_path / "training_metrics.jsonl")) == 1


def test_tensorboard_holds_losses_schedules_and_norms_and_forgets_what_was_redone(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = telemetry(tmp_path, log_every=1, tensorboard=True)
    log.start(0)
    for step in (1, 2, 3):
        log.record(record(step), health)
    log.close()
    again = telemetry(tmp_path, log_every=1, tensorboard=True)
    again.start(1)
    again.record(record(2, losses={"ibot": 7.0}), health)
    again.close()
    events = event_accumulator.EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert {"loss/ibot_loss", "loss/total_loss", "schedule/lr", "schedule/wd", "grad_norm/backbone"} <= set(tags)
    assert [(e.step, e.value) for e in events.Scalars("loss/ibot_loss")] == [(1, 2.0), (2, 7.0)]


def test_collapse_is_said_once_and_not_of_a_fresh_network(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = telemetry(tmp_path, log_every=1)
    log.start(0)
    for step in (1, 300, 301):
        log.record(record(step), lambda: {"teacher_entropy": 0.05, "effective_rank": 9.0})
    warned = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert warned == [
        "Collapse? teacher_entropy is 0.05 at step 300, below 0.1: "
        "the teacher gives every image the same few prototypes."
    ]


def test_r05_a_collapse_that_stops_the_run_names_the_checkpoint(tmp_path: Path) -> None:
    log = telemetry(tmp_path, log_every=1)
    log.monitor = HealthMonitor(HealthConfig(action="stop"))
    log.start(0)
    with pytest.raises(CollapseError) as error:
        log.record(record(300), lambda: {"teacher_entropy": 0.05}, lambda: "last good checkpoint: step_0000200")
    assert "last good checkpoint: step_0000200" in error.value.where


def test_health_is_asked_for_a_line_only(tmp_path: Path) -> None:
    asked = []
    log = telemetry(tmp_path)
    log.start(0)
    for step in range(1, 21):
        log.record(record(step), lambda step=step: asked.append(step) or {})
    assert asked == [1, 10, 20]


def test_full_disk_is_said_for_the_log_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = telemetry(tmp_path)
    log.start(0)
    (tmp_path / "training_metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(ResourceError) as caught:
        log.record(record(1), health)
    assert "training_metrics.jsonl: No space left on device" in caught.value.where
