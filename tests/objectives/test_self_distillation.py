"""The whole step: who sees what, what is compared with what, how the teacher moves, and that it learns."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from medssl_cli.core.protocols import Batch
from medssl_cli.objectives.dino import DinoConfig
from medssl_cli.objectives.ibot import IbotConfig
from medssl_cli.objectives.koleo import koleo_loss
from medssl_cli.objectives.self_distillation import (
    SelfDistillation,
    TeacherConfig,
    cross_entropy_of_equals,
    effective_rank,
    expected_first_loss,
    normalised_entropy,
)

VALUES = {"teacher_temp": 0.07, "momentum": 0.9}
Make = Callable[..., Any]
ALL_TERMS = {"dino_local_crops_loss", "dino_global_crops_loss", "ibot_loss", "koleo_loss"}


def total(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()


def step(objective: SelfDistillation, batch: Batch, optimizer: torch.optim.Optimizer) -> float:
    loss = total(objective.losses(batch, VALUES))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    objective.after_step(VALUES)
    return float(loss.detach())


def sgd(objective: SelfDistillation, lr: float = 0.5) -> torch.optim.Optimizer:
    return torch.optim.SGD(objective.student.parameters(), lr=lr)


# --- teacher ---------------------------------------------------------------------------------------------------------


def test_t04_teacher_starts_as_a_copy_of_the_student(make_objective: Make) -> None:
    objective = make_objective(ibot={"separate_head": True})
    student, teacher = objective.student.state_dict(), objective.teacher.state_dict()
    assert student.keys() == teacher.keys()
    assert all(torch.equal(student[name], teacher[name]) for name in student)
    assert not {p.data_ptr() for p in objective.student.parameters()} & {
        p.data_ptr() for p in objective.teacher.parameters()
    }


def test_t03_teacher_is_the_moving_average_after_each_step(make_objective: Make, make_batch: Make) -> None:
    objective = make_objective(ibot={"separate_head": True})
    optimizer = sgd(objective)
    for seed in range(2):
        old = copy.deepcopy(dict(objective.teacher.named_parameters()))
        step(objective, make_batch(seed=seed), optimizer)
        new, student = dict(objective.teacher.named_parameters()), dict(objective.student.named_parameters())
        for name, tensor in new.items():
            expected = 0.9 * old[name].double() + (1 - 0.9) * student[name].detach().double()
            torch.testing.assert_close(tensor.double(), expected, atol=1e-7, rtol=1e-7)
        moved = [name for name in new if not torch.equal(new[name], old[name])]
        assert {name.split(".")[0] for name in moved} == {"backbone", "dino_head", "ibot_head"}


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_t03_the_ends_of_the_average_are_exact(make_objective: Make, momentum: float) -> None:
    objective = make_objective()
    before = copy.deepcopy(objective.teacher.state_dict())
    with torch.no_grad():
        for parameter in objective.student.parameters():
            parameter.add_(torch.randn_like(parameter))
    objective.after_step({"momentum": momentum})
    expected = before if momentum == 1.0 else objective.student.state_dict()
    after = objective.teacher.state_dict()
    assert all(torch.equal(after[name], expected[name]) for name, _ in objective.teacher.named_parameters())


def test_buffers_of_the_teacher_follow_the_student(make_objective: Make) -> None:
    objective = make_objective()
    objective.student["backbone"].steps.fill_(7)
    objective.after_step(VALUES)
    assert objective.teacher["backbone"].steps.item() == 7


def test_teacher_takes_no_gradient_and_stays_in_eval_mode(make_objective: Make, make_batch: Make) -> None:
    objective = make_objective()
    total(objective.losses(make_batch(), VALUES)).backward()
    assert all(not p.requires_grad and p.grad is None for p in objective.teacher.parameters())
    for mode in (True, False, True):
        objective.train(mode)
        assert not any(module.training for module in objective.teacher.modules())
        assert all(module.training is mode for module in objective.student.modules())


def test_student_weights_loaded_later_can_be_copied(make_objective: Make) -> None:
    objective, other = make_objective(0), make_objective(1)
    objective.student.load_state_dict(other.student.state_dict())
    objective.copy_student_to_teacher()
    assert torch.equal(objective.teacher["backbone"].patch.weight, other.student["backbone"].patch.weight)


def test_networks_that_differ_are_refused(make_objective: Make) -> None:
    student = make_objective().student["backbone"]
    with pytest.raises(RuntimeError, match=r"Missing key|Unexpected key"):
        SelfDistillation(student, nn.Linear(2, 2), lambda _: nn.Linear(32, 8), dino=DinoConfig(), ibot=IbotConfig())


# --- who sees what ---------------------------------------------------------------------------------------------------


def test_t07_teacher_sees_whole_global_crops_only(make_objective: Make, make_batch: Make) -> None:
    objective, batch = make_objective(), make_batch()
    batch.available_BS[1, 0] = False
    objective.losses(batch, VALUES)
    (call,) = objective.teacher["backbone"].calls
    assert call["images"] is batch.global_VSHW
    assert call["token_mask"] is None
    assert torch.equal(call["available"], torch.cat([batch.available_BS, batch.available_BS]))


def test_student_sees_masked_global_and_whole_local_crops(make_objective: Make, make_batch: Make) -> None:
    objective, batch = make_objective(), make_batch(samples=3, local_crops=2)
    batch.available_BS[1, 0] = False
    objective.losses(batch, VALUES)
    global_, local = objective.student["backbone"].calls
    assert global_["images"] is batch.global_VSHW
    assert global_["token_mask"] is batch.token_mask_VN
    assert torch.equal(global_["available"], batch.available_BS[[0, 1, 2, 0, 1, 2]])
    assert local["images"] is batch.local_VSHW
    assert local["token_mask"] is None
    assert torch.equal(local["available"], batch.available_BS[[0, 1, 2, 0, 1, 2]])


def test_t08_mask_of_sample_0_view_1_hides_that_crop_alone(make_objective: Make, make_batch: Make) -> None:
    objective, batch = make_objective(), make_batch(samples=3)
    batch.token_mask_VN[:] = False
    batch.token_mask_VN[0 + 1 * 3, 5] = True  # view-major: second view of sample 0
    objective.losses(batch, VALUES)
    backbone = objective.student["backbone"]
    hidden = (backbone.embedded[0] == backbone.mask_token).all(-1)
    assert hidden.nonzero().tolist() == [[3, 5]]


@pytest.mark.parametrize("separate", [False, True])
def test_heads_are_called_once_on_the_tokens_that_are_needed(
    make_objective: Make, make_batch: Make, separate: bool
) -> None:
    objective, batch = make_objective(ibot={"separate_head": separate}), make_batch(samples=4, local_crops=3)
    masked = int(batch.token_mask_VN.sum())
    objective.losses(batch, VALUES)
    for network, crops in ((objective.student, 8 + 12), (objective.teacher, 8)):
        assert network["dino_head"].rows == [crops if separate else crops + masked]
        if separate:
            assert network["ibot_head"].rows == [masked]


# --- the numbers -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def losses_by_loop(objective: SelfDistillation, batch: Batch, temperature: float) -> dict[str, float]:
    """All terms in float64, sample by sample, from the formulas; no sharing of computation between crops."""
    double = copy.deepcopy(objective).double()
    samples = len(batch.available_BS)
    centers = [c.center if c is not None else torch.zeros(1) for c in (double.dino_center, double.ibot_center)]

    def see(network: nn.ModuleDict, image: Tensor, mask: Tensor | None, available: Tensor) -> tuple[Tensor, Tensor]:
        features = network["backbone"](image[None].double(), None if mask is None else mask[None], available[None])
        return features.cls_BD[0], features.patches_BND[0]

    def log_p(head: nn.Module, token: Tensor) -> Tensor:
        return F.log_softmax(head(token[None])[0] / 0.1, -1)

    patch_head = "ibot_head" if "ibot_head" in double.student else "dino_head"
    local_sum = global_sum = ibot = 0.0
    views: list[list[Tensor]] = [[], []]
    local_crops = 0 if batch.local_VSHW is None else len(batch.local_VSHW) // samples
    for b in range(samples):
        available = batch.available_BS[b]
        targets = []
        for v in range(2):
            crop = v * samples + b
            cls, patches = see(double.teacher, batch.global_VSHW[crop], None, available)
            targets.append(F.softmax((double.teacher["dino_head"](cls[None])[0] - centers[0]) / temperature, -1))
            mask = batch.token_mask_VN[crop]
            student_cls, student_patches = see(double.student, batch.global_VSHW[crop], mask, available)
            views[v].append(student_cls)
            places = [n for n in mask.nonzero().flatten().tolist() if available[n // 4]]
            for n in places:
                target = F.softmax((double.teacher[patch_head](patches[n][None])[0] - centers[1]) / temperature, -1)
                ibot -= float(target @ log_p(double.student[patch_head], student_patches[n])) / len(places)
        for v in range(2):
            global_sum -= float(targets[1 - v] @ log_p(double.student["dino_head"], views[v][b]))
            for i in range(local_crops):
                assert batch.local_VSHW is not None
                cls, _ = see(double.student, batch.local_VSHW[i * samples + b], None, available)
                local_sum -= float(targets[v] @ log_p(double.student["dino_head"], cls))
    pairs = 2 * local_crops + 2
    return {
        "dino_local_crops_loss": local_sum / samples / pairs,
        "dino_global_crops_loss": global_sum / samples / pairs,
        "ibot_loss": ibot / (2 * samples),
        "koleo_loss": 0.1 * sum(float(koleo_loss(torch.stack(rows).detach())) for rows in views),
    }


@pytest.mark.parametrize("separate", [False, True])
def test_all_terms_equal_loops_in_float64(make_objective: Make, make_batch: Make, separate: bool) -> None:
    objective = make_objective(ibot={"separate_head": separate, "head_n_prototypes": 12 if separate else 16})
    optimizer = sgd(objective)
    for seed in range(2):  # so that the teacher differs from the student and the centres from zero
        step(objective, make_batch(samples=3, seed=seed), optimizer)
    batch = make_batch(samples=3, seed=5)
    batch.available_BS[1, 2] = False
    expected = losses_by_loop(objective, batch, 0.06)
    found = objective.losses(batch, {"teacher_temp": 0.06})
    assert found.keys() == ALL_TERMS
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value, rel=2e-5), name


def test_weights_multiply_their_own_terms(make_objective: Make, make_batch: Make) -> None:
    plain = make_objective().losses(make_batch(), VALUES)
    heavy = make_objective(dino={"loss_weight": 2.0, "koleo_loss_weight": 0.3}, ibot={"loss_weight": 5.0}).losses(
        make_batch(), VALUES
    )
    factors = {"dino_local_crops_loss": 2, "dino_global_crops_loss": 2, "ibot_loss": 5, "koleo_loss": 3}
    for name, factor in factors.items():
        torch.testing.assert_close(heavy[name], factor * plain[name])


def test_t06_exchanging_the_global_views_of_the_teacher_matters(make_objective: Make, make_batch: Make) -> None:
    objective, batch = make_objective(), make_batch(samples=2)
    batch.token_mask_VN[:] = False
    batch.global_VSHW[2:] += 3.0  # the second views bear a mark
    right = objective.losses(batch, VALUES)["dino_global_crops_loss"].item()
    forward = objective.teacher["backbone"].forward
    objective.teacher["backbone"].forward = lambda images, **kw: forward(images[[2, 3, 0, 1]], **kw)
    wrong = objective.losses(batch, VALUES)["dino_global_crops_loss"].item()
    # with the teacher a copy of the student, meeting one's own view is the easier task
    assert wrong < right - 0.01


def test_losses_are_float32_under_autocast(make_objective: Make, make_batch: Make) -> None:
    objective, batch = make_objective(), make_batch()
    exact = objective.losses(batch, VALUES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = objective.losses(batch, VALUES)
    for name, loss in mixed.items():
        assert loss.dtype is torch.float32
        assert loss.item() == pytest.approx(exact[name].item(), rel=0.05)


@pytest.mark.parametrize(
    ("settings", "local_crops", "terms", "modules"),
    [
        ({}, 2, ALL_TERMS, {"backbone", "dino_head"}),
        ({}, 0, ALL_TERMS - {"dino_local_crops_loss"}, {"backbone", "dino_head"}),
        ({"dino": {"loss_weight": 0.0}}, 2, {"ibot_loss", "koleo_loss"}, {"backbone", "dino_head"}),
        (
            {"dino": {"loss_weight": 0.0, "koleo_loss_weight": 0.0}, "ibot": {"separate_head": True}},
            2,
            {"ibot_loss"},
            {"backbone", "ibot_head"},
        ),
        ({"ibot": {"loss_weight": 0.0}}, 2, ALL_TERMS - {"ibot_loss"}, {"backbone", "dino_head"}),
        ({"ibot": {"separate_head": True}}, 2, ALL_TERMS, {"backbone", "dino_head", "ibot_head"}),
        ({"centering": "sinkhorn_knopp"}, 2, ALL_TERMS, {"backbone", "dino_head"}),
        (
            {"centering": "sinkhorn_knopp", "ibot": {"separate_head": True}},
            0,
            ALL_TERMS - {"dino_local_crops_loss"},
            None,
        ),
    ],
)
def test_each_loss_can_be_turned_off(
    make_objective: Make, make_batch: Make, settings: dict, local_crops: int, terms: set, modules: set | None
) -> None:
    objective = make_objective(**settings)
    losses = objective.losses(make_batch(local_crops=local_crops), VALUES)
    total(losses).backward()
    objective.after_step(VALUES)
    assert losses.keys() == terms
    assert all(loss.ndim == 0 and bool(loss.isfinite()) for loss in losses.values())
    if modules is not None:
        assert objective.trained_modules().keys() == modules
    assert all(p.grad is not None for p in objective.student.parameters())
    health = objective.health()
    assert health
    assert ("teacher_entropy" in health) == ("dino_global_crops_loss" in terms)
    assert all(math.isfinite(figure) for figure in health.values())


def test_nothing_to_learn_is_refused(make_objective: Make) -> None:
    with pytest.raises(ValueError, match="nothing to learn"):
        make_objective(dino={"loss_weight": 0.0}, ibot={"loss_weight": 0.0})


def test_t12_koleo_reaches_the_backbone_and_not_the_head(make_objective: Make, make_batch: Make) -> None:
    objective = make_objective()
    objective.losses(make_batch(), VALUES)["koleo_loss"].backward()
    assert float(objective.student["backbone"].patch.weight.grad.abs().sum()) > 0
    assert all(p.grad is None for p in objective.student["dino_head"].parameters())


def test_t12_one_sample_is_finite(make_objective: Make, make_batch: Make) -> None:
    objective = make_objective()
    losses = objective.losses(make_batch(samples=1), VALUES)
    total(losses).backward()
    assert losses["koleo_loss"].item() == 0.0
    assert all(bool(p.grad.isfinite().all()) for p in objective.student.parameters())


def test_t35_a_non_finite_image_shows_in_the_terms_it_reaches(make_objective: Make, make_batch: Make) -> None:
    objective, batch = make_objective(), make_batch()
    batch.local_VSHW[3] = math.nan
    losses = objective.losses(batch, VALUES)
    assert {name for name, loss in losses.items() if not bool(loss.isfinite())} == {"dino_local_crops_loss"}


def test_crops_that_do_not_fit_are_refused(make_objective: Make, make_batch: Make) -> None:
    objective, batch = make_objective(), make_batch()
    batch.local_VSHW = batch.local_VSHW[:-1]
    with pytest.raises(ValueError, match="8 global and 7 local crops do not fit 4 samples"):
        objective.losses(batch, VALUES)
    batch = make_batch()
    batch.token_mask_VN = torch.zeros(8, 15, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"token mask \(8, 15\) does not fit patch tokens \(8, 12, 32\)"):
        objective.losses(batch, VALUES)


# --- centres and resuming --------------------------------------------------------------------------------------------


def test_state_names_and_centres(make_objective: Make) -> None:
    names = set(make_objective(ibot={"separate_head": True}).state_dict())
    assert {"dino_center.center", "ibot_center.center"} <= names
    prefixes = {".".join(name.split(".")[:2]) for name in names}
    assert prefixes == {
        "dino_center.center",
        "ibot_center.center",
        *(f"{network}.{part}" for network in ("student", "teacher") for part in ("backbone", "dino_head", "ibot_head")),
    }
    assert not [name for name in make_objective(centering="sinkhorn_knopp").state_dict() if "center" in name]


@torch.no_grad()
def test_each_centre_follows_its_own_tokens(make_objective: Make, make_batch: Make) -> None:
    objective, batch = make_objective(), make_batch()
    batch.available_BS[2, 1] = False
    features = objective.teacher["backbone"](batch.global_VSHW, available_BS=batch.available_BS.repeat(2, 1))
    head = objective.teacher["dino_head"]
    targets = batch.token_mask_VN & batch.available_BS.repeat(2, 1).repeat_interleave(4, 1)
    objective.losses(batch, VALUES)
    objective.after_step(VALUES)
    torch.testing.assert_close(objective.dino_center.center, 0.1 * head(features.cls_BD).mean(0))
    torch.testing.assert_close(objective.ibot_center.center, 0.1 * head(features.patches_BND[targets]).mean(0))


def test_r01_resuming_between_steps_is_exact(make_objective: Make, make_batch: Make) -> None:
    straight = make_objective(0)
    optimizer = sgd(straight)
    for seed in range(4):
        if seed == 2:
            state = copy.deepcopy(straight.state_dict())
        losses = [step(straight, make_batch(seed=seed), optimizer)]
    resumed = make_objective(1)
    resumed.load_state_dict(state)
    optimizer = sgd(resumed)
    for seed in (2, 3):
        again = [step(resumed, make_batch(seed=seed), optimizer)]
    assert again == losses
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_accumulated_micro_batches_update_each_centre_once(make_objective: Make, make_batch: Make) -> None:
    joint, parts = make_objective(), make_objective()
    batch, halves = make_batch(samples=4), []
    for keep in (slice(0, 2), slice(2, 4)):
        cut = [t.unflatten(0, (-1, 4))[:, keep].flatten(0, 1) for t in (batch.global_VSHW, batch.token_mask_VN)]
        halves.append(Batch(cut[0], None, cut[1], batch.available_BS[keep]))
    joint.losses(batch, VALUES)
    for half in halves:
        parts.losses(half, VALUES)
    joint.after_step(VALUES)
    parts.after_step(VALUES)
    torch.testing.assert_close(parts.dino_center.center, joint.dino_center.center)
    torch.testing.assert_close(parts.ibot_center.center, joint.ibot_center.center)


@pytest.mark.slow
def test_t29_r05_two_processes_equal_one(tmp_path: Path) -> None:
    script = Path(__file__).with_name("two_processes.py")
    jobs = [("0", "1", "one", "joint"), ("0", "2", "two", "first"), ("1", "2", "two", "second")]
    running = [
        subprocess.Popen([sys.executable, str(script), rank, world, str(tmp_path / store), str(tmp_path / out)])
        for rank, world, store, out in jobs
    ]
    try:
        assert [process.wait(timeout=120) for process in running] == [0, 0, 0]
    finally:
        for process in running:
            process.kill()
    joint, first, second = (torch.load(tmp_path / out) for _, _, _, out in jobs)
    torch.testing.assert_close(first["center"], joint["center"], atol=1e-7, rtol=0)
    torch.testing.assert_close(torch.cat([first["sinkhorn"], second["sinkhorn"]]), joint["sinkhorn"], atol=1e-6, rtol=0)
    for centering in ("centering", "sinkhorn_knopp", "sharded"):
        assert first[centering].keys() == joint[centering].keys()
        for name, value in joint[centering].items():
            for half in (first, second):
                torch.testing.assert_close(
                    half[centering][name], value, atol=1e-6, rtol=1e-5, msg=f"{centering} {name}"
                )


# --- health and expectations -----------------------------------------------------------------------------------------


def test_health_before_and_after_a_batch(make_objective: Make, make_batch: Make) -> None:
    objective = make_objective()
    assert objective.health() == {"center_norm": 0.0}
    objective.losses(make_batch(), VALUES)
    objective.after_step(VALUES)
    figures = objective.health()
    assert figures.keys() == {"teacher_entropy", "dino_agreement", "effective_rank", "center_norm"}
    assert 0 < figures["teacher_entropy"] < 1
    assert 1 <= figures["effective_rank"] <= 8
    assert 0 <= figures["dino_agreement"] <= 1
    assert figures["center_norm"] == pytest.approx(float(objective.dino_center.center.norm()))


def test_agreement_is_with_the_other_view(make_objective: Make, make_batch: Make) -> None:
    objective, batch = make_objective(), make_batch(samples=3)
    batch.token_mask_VN[:] = False
    batch.global_VSHW[3:] = batch.global_VSHW[:3]
    objective.losses(batch, VALUES)
    assert objective.health()["dino_agreement"] == 1.0  # both views alike, teacher and student alike
    batch = make_batch(samples=3)
    batch.global_VSHW *= 20.0
    objective.losses(batch, VALUES)
    backbone, head = objective.teacher["backbone"], objective.teacher["dino_head"]
    teacher = head(backbone(batch.global_VSHW).cls_BD).argmax(1)
    student = head(backbone(batch.global_VSHW, batch.token_mask_VN).cls_BD).argmax(1)
    expected = (student == teacher[[3, 4, 5, 0, 1, 2]]).float().mean().item()
    assert expected != (student == teacher).float().mean().item()
    assert objective.health()["dino_agreement"] == pytest.approx(expected)


def test_effective_rank_of_known_matrices() -> None:
    assert effective_rank(torch.eye(6)) == pytest.approx(6.0)
    assert effective_rank(torch.ones(5, 8)) == pytest.approx(1.0)
    # singular values 2 and 1: exp(-(2/3 ln 2/3 + 1/3 ln 1/3)) = 1.88988
    assert effective_rank(torch.tensor([[0.0, 2.0, 0.0], [1.0, 0.0, 0.0]])) == pytest.approx(1.88988, abs=1e-5)
    assert math.isnan(effective_rank(torch.tensor([[math.nan, 1.0]])))


def test_entropy_is_measured_in_units_of_ln_k() -> None:
    assert normalised_entropy(torch.full((3, 7), 1 / 7)) == pytest.approx(1.0)
    assert normalised_entropy(torch.eye(4)) == 0.0
    assert normalised_entropy(torch.tensor([[0.5, 0.5, 0.0, 0.0]])) == pytest.approx(0.5)


@pytest.mark.parametrize(("mode", "every"), [("shared", 2), ("full_sequence", 1)])
@pytest.mark.parametrize("local_crops", [2, 0])
def test_t36_first_loss_is_what_was_predicted(
    make_objective: Make, make_batch: Make, mode: str, every: int, local_crops: int
) -> None:
    shape = {"head_n_prototypes": 4096, "head_bottleneck_dim": 256}
    objective = make_objective(dino=shape, ibot={**shape, "mask_mode": mode})
    batch = make_batch(samples=8, local_crops=local_crops)
    batch.token_mask_VN[:] = False
    batch.token_mask_VN[::every, 3:8] = True
    expected = expected_first_loss(objective.dino, objective.ibot, local_crops, batch_size=8, n_sequences=3)
    found = {name: loss.item() for name, loss in objective.losses(batch, {"teacher_temp": 0.04}).items()}
    assert found.keys() == expected.keys()
    del found["koleo_loss"], expected["koleo_loss"]  # predicted for layer scale, which this backbone lacks
    assert sum(found.values()) == pytest.approx(sum(expected.values()), rel=0.25)
    for name, loss in found.items():
        assert loss == pytest.approx(expected[name], rel=0.25), name


def test_t36_prediction_by_hand() -> None:
    dino, ibot = DinoConfig(head_n_prototypes=4096, head_bottleneck_dim=3), IbotConfig(head_n_prototypes=8192)
    ln_k = 8.317766
    # in three dimensions cosines are uniform in -1 .. 1: E[exp(10 x)] = sinh(10)/10, E[x exp(25 x)] = coth(25) - 1/25
    pair = ln_k + math.log(math.sinh(10) / 10) - 10 * (1 / math.tanh(25) - 1 / 25)
    expected = {"dino_local_crops_loss": pair * 16 / 18, "dino_global_crops_loss": pair * 2 / 18}
    expected |= {"ibot_loss": 0.5 * ln_k, "koleo_loss": 0.1 * 2 * 11.512925}
    assert expected_first_loss(dino, ibot, 8, n_sequences=3) == pytest.approx(expected, rel=2e-3)
    assert expected_first_loss(dino, ibot, 8, batch_size=1, n_sequences=3)["koleo_loss"] == 0.0
    own_head = IbotConfig(head_n_prototypes=8192, separate_head=True, mask_per_channel=True)
    assert expected_first_loss(dino, own_head, 8, n_sequences=3)["ibot_loss"] == pytest.approx(math.log(8192))
    alone = expected_first_loss(dino, own_head, 8, n_sequences=1)["ibot_loss"]  # half of the crops hold masked tokens
    assert alone == pytest.approx(0.5 * math.log(8192))


@pytest.mark.parametrize("dim", [16, 32, 64, 256])
def test_t36_cross_entropy_of_a_random_head_with_itself(dim: int) -> None:
    rng = torch.Generator().manual_seed(dim)
    features = torch.nn.functional.normalize(torch.randn(400, dim, generator=rng), dim=1)
    heads = torch.nn.functional.normalize(torch.randn(4096, dim, generator=rng), dim=1)
    cosines = features @ heads.T
    found = torch.nn.functional.cross_entropy(cosines / 0.1, (cosines / 0.04).softmax(1)).item()
    assert cross_entropy_of_equals(4096, dim, 0.04) == pytest.approx(found, rel=0.06)
    if dim == 256:  # the wide limit
        assert found == pytest.approx(math.log(4096) + 1 / (0.02 * dim) - 1 / (0.1 * 0.04 * dim), rel=0.01)


@pytest.mark.parametrize("centering", ["centering", "sinkhorn_knopp"])
def test_one_batch_is_overfitted(make_objective: Make, make_batch: Make, centering: str) -> None:
    objective, batch = make_objective(centering=centering), make_batch(samples=6)
    optimizer = torch.optim.AdamW(objective.student.parameters(), lr=3e-3)
    losses = []
    for _ in range(80):
        loss = total(objective.losses(batch, {"teacher_temp": 0.04}))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        objective.after_step({"momentum": 0.996})
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_teacher_settings() -> None:
    config = TeacherConfig()
    assert (config.momentum_teacher, config.final_momentum_teacher) == (0.992, 1.0)
    assert (config.warmup_teacher_temp, config.teacher_temp, config.warmup_teacher_temp_epochs) == (0.04, 0.07, 30)
    assert not TeacherConfig(init_with_student_weights=False).init_with_student_weights  # an old file still loads
    with pytest.raises(ValidationError):
        TeacherConfig(momentum_teacher=1.5)
