import math

import numpy as np
import pytest

from medssl_cli.engine.schedules import Schedules, effective_lr, linear_ramp, warmup_cosine


def table(start: float, base: float, final: float, warmup: int, total: int) -> np.ndarray:
    """The schedule as one array, written from its closed form."""
    steps = np.arange(total - warmup)
    cosine = final + 0.5 * (base - final) * (1 + np.cos(np.pi * steps / len(steps)))
    return np.concatenate([np.linspace(start, base, warmup), cosine])


@pytest.mark.parametrize("warmup", [0, 1, 2, 7, 49])
def test_warmup_then_cosine_equals_the_closed_form(warmup: int) -> None:
    values = [warmup_cosine(step, 0.0, 3e-4, 1e-6, warmup, 50) for step in range(50)]
    np.testing.assert_allclose(values, table(0.0, 3e-4, 1e-6, warmup, 50), rtol=1e-12, atol=1e-18)


def test_t30_first_rate_is_zero_the_ramp_ends_at_base_and_the_end_holds() -> None:
    assert warmup_cosine(0, 0.0, 1.0, 0.1, 10, 100) == 0.0
    assert warmup_cosine(9, 0.0, 1.0, 0.1, 10, 100) == 1.0
    assert warmup_cosine(10, 0.0, 1.0, 0.1, 10, 100) == 1.0
    assert warmup_cosine(55, 0.0, 1.0, 0.1, 10, 100) == pytest.approx(0.55)  # half way: the mean
    assert warmup_cosine(99, 0.0, 1.0, 0.1, 10, 100) > 0.1
    assert warmup_cosine(100, 0.0, 1.0, 0.1, 10, 100) == warmup_cosine(10**6, 0.0, 1.0, 0.1, 10, 100) == 0.1


def test_ramp_of_one_and_of_no_steps() -> None:
    assert [linear_ramp(step, 0.04, 0.07, 1) for step in (0, 1)] == [0.04, 0.07]
    assert linear_ramp(0, 0.04, 0.07, 0) == 0.07


def test_long_warmup_is_shortened_and_said() -> None:
    long = Schedules(total_steps=5, epoch_steps=1, lr=0.8, warmup_epochs=30)
    assert [long.at(step)["lr"] for step in range(5)] == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8])
    assert long.at(5)["lr"] == 1e-6
    assert "30 steps is longer than the run of 5" in long.warnings()[0]
    assert Schedules(total_steps=500, epoch_steps=1, lr=0.8, warmup_epochs=30).warnings() == []


def test_warns_of_a_rate_below_its_end_and_of_parts_frozen_for_ever() -> None:
    odd = Schedules(total_steps=10, epoch_steps=5, lr=1e-7, warmup_epochs=0, freeze_backbone_epochs=2)
    texts = " ".join(odd.warnings())
    assert "below optim.min_lr" in texts
    assert "The backbone is frozen for the whole run" in texts


def test_at_gives_all_values_of_section_6_9() -> None:
    run = Schedules(
        total_steps=300 * 50, epoch_steps=50, lr=3.1e-5, warmup_epochs=30, freeze_last_layer_epochs=1,
        freeze_backbone_epochs=2,
    )  # fmt: skip
    first, at_50, at_100, late, end = (run.at(step) for step in (0, 50, 100, 7500, 15000))
    assert first == {
        "lr": 0.0, "last_layer_lr": 0.0, "wd": 0.04, "momentum": 0.992, "teacher_temp": 0.04, "backbone_frozen": 1.0,
    }  # fmt: skip
    assert run.at(49)["last_layer_lr"] == 0.0
    assert at_50["last_layer_lr"] == at_50["lr"] == pytest.approx(3.1e-5 * 50 / 1499)
    assert (run.at(99)["backbone_frozen"], at_100["backbone_frozen"]) == (1.0, 0.0)
    assert run.at(1499)["teacher_temp"] == run.at(1500)["teacher_temp"] == late["teacher_temp"] == 0.07
    assert late["wd"] == pytest.approx(0.22)
    assert late["momentum"] == pytest.approx(0.996)
    assert (end["lr"], end["wd"], end["momentum"]) == (1e-6, 0.4, 1.0)


@pytest.mark.parametrize(
    ("base_lr", "batch", "documented"),
    [(2.5e-4, 4, 1.56e-5), (3.5e-4, 8, 3.09e-5), (5e-4, 16, 6.25e-5), (7e-4, 32, 1.24e-4)],
)
def test_t10_effective_rate_of_the_documented_settings(base_lr: float, batch: int, documented: float) -> None:
    assert effective_lr(base_lr, batch, "sqrt_wrt_1024") == pytest.approx(documented, rel=4e-3)


def test_other_scaling_rules() -> None:
    assert effective_lr(1e-3, 64, "linear_wrt_256") == pytest.approx(2.5e-4)
    assert effective_lr(1e-3, 64, "identity") == 1e-3
    assert effective_lr(4e-3, 1024, "sqrt_wrt_1024") == 4e-3
    assert math.isclose(effective_lr(4e-3, 256, "sqrt_wrt_1024"), 2e-3)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        effective_lr(1e-3, 0, "identity")


def test_w16_linear_rule_of_the_published_run() -> None:
    assert effective_lr(7.5e-5, 512, "linear_wrt_256") == pytest.approx(1.5e-4)
    assert effective_lr(7.5e-5, 512, "sqrt_wrt_1024") == pytest.approx(7.5e-5 * math.sqrt(0.5))


def test_w20_warmup_longer_than_the_run_stays_a_rising_rate() -> None:
    run = Schedules(total_steps=5 * 4, epoch_steps=4, lr=1.5e-4, min_lr=2e-6, warmup_epochs=50)
    rates = [run.at(step)["lr"] for step in range(20)]
    np.testing.assert_allclose(rates, np.linspace(0, 1.5e-4, 20), rtol=1e-9)
    assert "200 steps is longer than the run of 20" in run.warnings()[0]


def test_w15_patch_targets_may_have_their_own_temperature() -> None:
    common = {"total_steps": 100, "epoch_steps": 2, "lr": 1e-3}
    assert "teacher_patch_temp" not in Schedules(**common).at(0)
    same = Schedules(**common, warmup_teacher_patch_temp=0.04, teacher_patch_temp=0.07)
    assert "teacher_patch_temp" not in same.at(0)
    # the documented run: falling for cls tokens, rising for patches
    run = Schedules(
        **common, warmup_teacher_temp=0.07, teacher_temp=0.04, warmup_teacher_patch_temp=0.04, teacher_patch_temp=0.07
    )
    ramp = np.linspace(0, 1, 60)
    np.testing.assert_allclose([run.at(i)["teacher_temp"] for i in range(60)], 0.07 - 0.03 * ramp)
    np.testing.assert_allclose([run.at(i)["teacher_patch_temp"] for i in range(60)], 0.04 + 0.03 * ramp)
    assert (run.at(99)["teacher_temp"], run.at(99)["teacher_patch_temp"]) == (0.04, 0.07)
    shorter = Schedules(**common, warmup_teacher_patch_temp_epochs=5)
    assert [shorter.at(i)["teacher_patch_temp"] for i in (0, 9, 10)] == [0.04, 0.07, 0.07]


def test_last_layer_is_frozen_by_its_rate_or_by_its_gradient() -> None:
    common = {"total_steps": 100, "epoch_steps": 5, "lr": 1e-3, "warmup_epochs": 0, "freeze_last_layer_epochs": 3}
    assert "last_layer_frozen" not in Schedules(**common).at(0)
    run = Schedules(**common, freeze_last_layer="gradient")
    assert [run.at(step)["last_layer_frozen"] for step in (0, 14, 15)] == [1.0, 1.0, 0.0]
    assert [run.at(step)["last_layer_lr"] > 0 for step in (0, 14, 15)] == [False, False, True]
