"""Alarms: what a run that learns nothing looks like in its figures, and that healthy runs are left alone."""

from __future__ import annotations

import json
import math

import pytest
import torch

from medssl_cli.core.errors import MedsslError
from medssl_cli.engine.health import Alarm, CollapseError, HealthConfig, HealthMonitor

HEALTHY = {
    "teacher_entropy": 0.6,
    "effective_rank": 20.0,
    "dino_agreement": 0.4,
    "center_norm": 3.0,
    "total_loss": 9.0,
    "koleo_loss": 0.3,
    "grad_norm_backbone": 1.0,
}


def watch(monitor: HealthMonitor, steps: range, **figures: float | None) -> list[Alarm]:
    return [alarm for step in steps for alarm in monitor.check(step, {**HEALTHY, **figures})]


def test_a_healthy_run_raises_no_alarm() -> None:
    monitor = HealthMonitor(HealthConfig(koleo_max=12, center_norm_max=100), koleo_weight=0.1)
    generator = torch.Generator().manual_seed(0)
    for step in range(10, 5000, 10):
        noise = 1 + 0.1 * torch.randn(len(HEALTHY), generator=generator).clamp(-2, 2)
        falling = HEALTHY["total_loss"] * (1 + math.exp(-step / 500))
        figures = {name: value * float(f) for (name, value), f in zip(HEALTHY.items(), noise, strict=True)}
        assert monitor.check(step, {**figures, "total_loss": falling * float(noise[4] ** 0.1)}) == []
    assert monitor.alarms == []


@pytest.mark.parametrize(
    ("figures", "collapse", "word"),
    [
        ({"teacher_entropy": 0.01}, True, "same few prototypes"),
        ({"teacher_entropy": 0.999}, False, "uniform"),
        ({"effective_rank": 1.01}, True, "same features"),
        ({"dino_agreement": 1.0}, False, "so early"),
        ({"koleo_loss": 3.6}, False, "coincide"),
        ({"center_norm": 500.0}, False, "runs away"),
    ],
)
def test_each_kind_of_collapse_is_told_once(figures: dict[str, float], collapse: bool, word: str) -> None:
    monitor = HealthMonitor(HealthConfig(koleo_max=12, center_norm_max=100), koleo_weight=0.1)
    assert watch(monitor, range(10, 200, 10), **figures) == []  # a fresh network is not judged
    alarms = watch(monitor, range(200, 600, 10), **figures)
    assert [alarm.is_collapse for alarm in alarms] == [collapse]
    assert word in str(alarms[0])
    assert alarms[0].step == 200
    assert alarms[0].fix


def test_features_that_are_all_alike_alarm() -> None:
    """From tensors: constant features have the effective rank 1 and one-hot targets the entropy 0."""
    from medssl_cli.objectives.self_distillation import effective_rank, normalised_entropy

    monitor = HealthMonitor(HealthConfig())
    features = torch.randn(1, 32).expand(16, 32) + 1e-6 * torch.randn(16, 32)
    targets = torch.nn.functional.one_hot(torch.zeros(16, dtype=torch.long), 64).float()
    figures = {"effective_rank": effective_rank(features), "teacher_entropy": normalised_entropy(targets)}
    assert {alarm.name for alarm in monitor.check(300, figures)} == {"effective_rank", "teacher_entropy"}
    spread = {
        "effective_rank": effective_rank(torch.randn(16, 32)),
        "teacher_entropy": normalised_entropy(torch.randn(16, 64).softmax(1)),
    }
    assert HealthMonitor(HealthConfig()).check(300, spread) == []


def test_one_odd_line_among_good_ones_alarms_nobody() -> None:
    monitor = HealthMonitor(HealthConfig(window=3))
    watch(monitor, range(200, 300, 10))
    assert monitor.check(300, {**HEALTHY, "effective_rank": 1.0}) == []
    assert [alarm.name for alarm in monitor.check(310, {**HEALTHY, "effective_rank": 1.0})] == ["effective_rank"]


def test_an_alarm_that_passed_may_come_again() -> None:
    monitor = HealthMonitor(HealthConfig(window=1))
    steps = iter(range(200, 400, 10))
    values = [1.0, 1.0, 9.0, 9.0, 1.0, 1.0]
    counts = [len(monitor.check(next(steps), {"effective_rank": value})) for value in values]
    assert counts == [1, 0, 0, 0, 1, 0]
    assert len(monitor.alarms) == 2


def test_a_warm_up_puts_the_first_judgement_off_but_not_for_ever() -> None:
    bad = {"effective_rank": 1.0}
    assert HealthMonitor(HealthConfig(), warmup_steps=900).check(800, bad) == []
    assert HealthMonitor(HealthConfig(), warmup_steps=900).check(900, bad)
    assert HealthMonitor(HealthConfig(), warmup_steps=12_500).check(1990, bad) == []
    assert HealthMonitor(HealthConfig(), warmup_steps=12_500).check(2000, bad)


def test_agreement_late_in_a_run_is_fine() -> None:
    assert HealthMonitor(HealthConfig()).check(1010, {"dino_agreement": 1.0}) == []
    assert HealthMonitor(HealthConfig()).check(990, {"dino_agreement": 1.0})


def test_zero_turns_an_alarm_off() -> None:
    off = HealthConfig(teacher_entropy_min=0, effective_rank_min=0, dino_agreement_max=0, loss_jump=0, grad_norm_jump=0)
    monitor = HealthMonitor(off)
    watch(monitor, range(200, 500, 10))
    bad = {"teacher_entropy": 0.0, "effective_rank": 1.0, "dino_agreement": 1.0, "total_loss": 1e6}
    assert watch(monitor, range(500, 600, 10), grad_norm_backbone=1e6, **bad) == []


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_figures_that_are_not_numbers_are_passed_over(value: float | None) -> None:
    monitor = HealthMonitor(HealthConfig(), koleo_weight=0.1)
    assert watch(monitor, range(200, 400, 10), effective_rank=value, total_loss=value, koleo_loss=value) == []
    json.dumps(monitor.state_dict(), allow_nan=False)


@pytest.mark.parametrize(("figure", "value"), [("total_loss", 14.0), ("grad_norm_backbone", 30.0)])
def test_a_jump_is_told_once_and_compared_with_the_lines_before_it(figure: str, value: float) -> None:
    monitor = HealthMonitor(HealthConfig())
    assert watch(monitor, range(10, 400, 10)) == []
    alarms = watch(monitor, range(400, 450, 10), **{figure: value})
    assert [(alarm.name, alarm.step, alarm.is_collapse) for alarm in alarms] == [(figure, 400, False)]
    assert "Health:" in str(alarms[0])


def test_r01_a_resumed_monitor_says_what_an_undisturbed_one_says() -> None:
    def line(step: int) -> dict[str, float]:
        return {**HEALTHY, "effective_rank": 1.0 if 300 <= step < 500 else 9.0, "total_loss": 9.0 + (step == 700) * 9}

    straight = HealthMonitor(HealthConfig())
    wanted = [(step, [a.name for a in straight.check(step, line(step))]) for step in range(10, 900, 10)]
    for cut in (200, 310, 400, 600, 700):
        first = HealthMonitor(HealthConfig())
        found = [(step, [a.name for a in first.check(step, line(step))]) for step in range(10, cut + 1, 10)]
        again = HealthMonitor(HealthConfig())
        again.load_state_dict(json.loads(json.dumps(first.state_dict())))
        found += [(step, [a.name for a in again.check(step, line(step))]) for step in range(cut + 10, 900, 10)]
        assert found == wanted
        assert again.alarms == straight.alarms


def test_the_memory_stays_small() -> None:
    monitor = HealthMonitor(HealthConfig(window=1))
    for step in range(200, 20_000, 10):
        monitor.check(step, {**HEALTHY, "effective_rank": 1.0 + step // 10 % 2 * 8})
    assert len(json.dumps(monitor.state_dict())) < 30_000
    assert len(monitor.alarms) == 50


def test_a_collapse_stops_the_run_only_when_asked() -> None:
    alarms = HealthMonitor(HealthConfig()).check(300, {"effective_rank": 1.0})
    HealthMonitor(HealthConfig()).refuse(alarms, "last good checkpoint: here")
    stopping = HealthMonitor(HealthConfig(action="stop"))
    odd = stopping.check(300, {"teacher_entropy": 0.999})
    stopping.refuse(odd, "")  # odd, but no collapse
    with pytest.raises(CollapseError) as caught:
        stopping.refuse(alarms, "last good checkpoint: here")
    error = caught.value
    assert isinstance(error, MedsslError)
    assert error.exit_code == 5
    assert "effective_rank is 1, below 2" in error.where
    assert "last good checkpoint: here" in error.where
    assert "health.action=warn" in error.fix
