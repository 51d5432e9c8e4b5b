"""Training on label maps: the average against its formula, figures of an epoch against the metrics, weights."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from supervised_parts import SIZE, Network, NetworkWithoutNorm, make_batch, make_objective, part_of
from torch import Tensor, nn

from medssl_cli.core.errors import CheckpointError
from medssl_cli.core.protocols import IGNORE_LABEL, LabelledBatch
from medssl_cli.engine.checkpoint import Checkpoints, model_tensors
from medssl_cli.engine.optim import apply_schedule, build_adamw, parameter_groups
from medssl_cli.engine.precision import Precision
from medssl_cli.engine.trainer import Trainer
from medssl_cli.metrics.segmentation import counts, dice, f1, iou
from medssl_cli.objectives.segmentation import SegmentationLoss, SegmentationLossConfig
from medssl_cli.objectives.supervised import (
    EpochCosine,
    SupervisedSegmentation,
    averaging_decay,
    load_weights,
    predicted_classes,
)

CPU = torch.device("cpu")


def step(objective: SupervisedSegmentation, batch: LabelledBatch, lr: float = 0.1) -> dict[str, Tensor]:
    """One update by plain descent."""
    terms = objective.losses(batch, {})
    objective.zero_grad()
    torch.stack(list(terms.values())).sum().backward()
    with torch.no_grad():
        for parameter in objective.network.parameters():
            if parameter.grad is not None:
                parameter -= lr * parameter.grad
    objective.after_step({})
    return terms


def added(terms: dict[str, Tensor]) -> float:
    return float(torch.stack(list(terms.values())).detach().sum())


def raw_state(objective: SupervisedSegmentation) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in objective.network.state_dict().items()}


# --- the average -----------------------------------------------------------------------------------------------------


def test_c16_the_first_step_keeps_two_elevenths_and_copies_running_statistics() -> None:
    objective = make_objective()
    before = raw_state(objective)
    step(objective, make_batch())
    after, averaged = raw_state(objective), objective.averaged.state_dict()
    for name in ("backbone.weight", "decoder.bias", "norm.weight"):
        assert not torch.equal(before[name], after[name]), name
        torch.testing.assert_close(averaged[name], 2 / 11 * before[name] + 9 / 11 * after[name], atol=1e-6, rtol=0)
    for name in ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked"):
        assert not torch.equal(before[name], after[name]), name
        assert torch.equal(averaged[name], after[name]), name


def test_c16_the_decay_rises_to_its_limit_as_in_the_formula() -> None:
    assert averaging_decay(1, 0.999) == 2 / 11
    assert averaging_decay(8990, 0.999) == pytest.approx(8991 / 9000)
    assert averaging_decay(8991, 0.999) == 0.999 == averaging_decay(10**6, 0.999)
    objective = make_objective(ema_decay=0.25)
    shadow = {name: tensor.double() for name, tensor in raw_state(objective).items()}
    for n in range(1, 6):
        step(objective, make_batch(seed=n))
        d = min(0.25, (1 + n) / (10 + n))
        shadow = {k: d * shadow[k] + (1 - d) * v.double() for k, v in raw_state(objective).items()}
    for name in ("backbone.weight", "decoder.weight"):
        torch.testing.assert_close(objective.averaged.state_dict()[name].double(), shadow[name], atol=1e-6, rtol=0)


def test_c16_validation_of_the_average_leaves_the_raw_weights_and_modes_alone() -> None:
    objective = make_objective()
    step(objective, make_batch())
    before = raw_state(objective)
    with torch.no_grad():
        seen = objective.averaged(make_batch(seed=9).images_BSHW)
        assert not torch.equal(seen, objective.network(make_batch(seed=9).images_BSHW))
    assert all(torch.equal(before[k], v) for k, v in raw_state(objective).items() if "norm" not in k)
    assert objective.network.training
    objective.train()
    assert not any(module.training for module in objective.averaged.modules())


def test_a_step_that_changed_nothing_still_moves_the_average() -> None:
    """As after an overflow in fp16: the update was skipped, ``after_step`` is called all the same."""
    objective = make_objective()
    step(objective, make_batch())
    apart = (objective.averaged.decoder.weight - objective.network.decoder.weight).detach().abs().max()
    objective.after_step({})
    closer = (objective.averaged.decoder.weight - objective.network.decoder.weight).detach().abs().max()
    assert float(closer) == pytest.approx(3 / 12 * float(apart), rel=1e-4)


def test_frozen_tensors_are_one_in_both_networks_and_never_move() -> None:
    objective = make_objective()
    assert objective.averaged.trunk.weight is objective.network.trunk.weight
    assert objective.averaged.backbone.weight is not objective.network.backbone.weight
    before = objective.network.trunk.weight.clone()
    step(objective, make_batch())
    assert torch.equal(objective.network.trunk.weight, before)
    assert not any(parameter.requires_grad for parameter in objective.averaged.parameters())


def test_without_averaging_the_network_is_its_own_average() -> None:
    objective = make_objective(ema_decay=0)
    assert objective.averaged is objective.network
    assert objective.network.training
    step(objective, make_batch())
    assert not [name for name in objective.state_dict() if name.startswith("averaged.")]
    fresh = make_objective(seed=5, ema_decay=0)
    fresh.load_state_dict(objective.state_dict())
    assert all(torch.equal(tensor, raw_state(fresh)[name]) for name, tensor in raw_state(objective).items())
    with pytest.raises(ValueError, match="below 1"):
        make_objective(ema_decay=1.0)


def test_what_the_network_gets_and_which_parts_are_clipped() -> None:
    objective, batch = make_objective(), make_batch()
    batch.available_BS[0, 1] = False
    objective.losses(batch, {})
    assert objective.network.seen_available is batch.available_BS
    assert list(objective.trained_modules()) == ["backbone", "norm", "decoder"]
    assert objective(batch, {}).keys() == {"dice", "ce"}


# --- figures of an epoch ---------------------------------------------------------------------------------------------


def expected_figures(objective: SupervisedSegmentation, batch: LabelledBatch) -> list[tuple[float, float, float]]:
    """(Dice, IoU, F1) of each sample by the program's metrics, which know nothing of this file."""
    rows = []
    with torch.no_grad():
        logits = objective.network(batch.images_BSHW)
    prediction = predicted_classes(logits).numpy()
    for mine, true in zip(prediction, batch.label_map_BHW.numpy(), strict=True):
        keep = true != IGNORE_LABEL
        scores = []
        for number in range(1, objective.loss.classes):
            found = counts((mine == number)[keep], (true == number)[keep])
            if found.tp + found.fp + found.fn:
                scores.append([metric(found.tp, found.fp, found.fn) for metric in (dice, iou, f1)])
        rows.append(tuple(np.mean(scores, 0)) if scores else (1.0, 1.0, 1.0))
    return rows


@pytest.mark.parametrize("outputs", [1, 3])
def test_c20_a_small_last_batch_weighs_its_samples(outputs: int) -> None:
    """9 samples in batches of 8: the figures are means of 9 numbers, not of 2."""
    objective = make_objective(outputs, network=NetworkWithoutNorm)
    joint = make_batch(9, outputs=outputs)
    for _ in range(100):  # far enough that the samples differ
        step(objective, joint, lr=2.0)
    objective.start_epoch()
    losses = []
    for keep in (slice(0, 8), slice(8, 9)):
        part = part_of(joint, keep)
        losses += [added(objective.losses(part, {})) * len(part.case_ids)]
        objective.after_step({})
    figures = objective.epoch_figures()
    rows = np.array(expected_figures(objective, joint))
    assert len(set(rows[:, 0].round(3))) > 3
    for name, values in zip(("train_dice", "train_iou", "train_f1"), rows.T, strict=True):
        assert figures[name] == pytest.approx(values.mean(), abs=1e-9)
    by_batch = (rows[:8, 0].mean() + rows[8, 0]) / 2
    assert abs(figures["train_dice"] - by_batch) > 0.003
    assert figures["train_loss"] == pytest.approx(sum(losses) / 9, rel=1e-6)
    whole = added(objective.losses(joint, {}))
    assert figures["train_loss"] == pytest.approx(whole, rel=1e-5)  # a mean over samples does not know of batches


def test_c20_samples_without_pixels_that_count_have_no_weight_in_the_loss() -> None:
    objective = make_objective(network=NetworkWithoutNorm)
    first, second = make_batch(4, seed=1), make_batch(4, seed=2)
    first.label_map_BHW[2:] = IGNORE_LABEL
    losses = [added(objective.losses(batch, {})) for batch in (first, second)]
    objective.after_step({})
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)
    assert objective.epoch_figures()["train_loss"] == pytest.approx((2 * losses[0] + 4 * losses[1]) / 6, rel=1e-6)


class Fixed(nn.Module):
    """Says what it was told to."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, images: Tensor, available: Tensor | None = None) -> Tensor:
        return self.logits

    def trained_parts(self) -> dict[str, nn.Module]:
        return {"network": self}


def told(prediction: Tensor, reference: Tensor) -> SupervisedSegmentation:
    """An objective that has seen one batch of certain predictions."""
    outputs = int(prediction.max()) + 1
    logits = (
        80.0 * (prediction[:, None] - 0.5)
        if outputs <= 2
        else 80.0 * F.one_hot(prediction, outputs).movedim(-1, 1).float()
    )
    objective = SupervisedSegmentation(
        Fixed(logits), SegmentationLoss(SegmentationLossConfig(), 1 if outputs <= 2 else outputs)
    )
    count = len(prediction)
    batch = LabelledBatch(
        torch.zeros(count, 1, *prediction.shape[1:]), reference, torch.ones(count, 1).bool(), torch.zeros(count, 2)
    )
    objective.losses(batch, {})
    objective.after_step({})
    return objective


def test_c13_one_right_and_one_missed_sample_have_mean_one_half() -> None:
    truth = torch.zeros(2, 20, 20, dtype=torch.int64)
    truth[0] = 1
    truth[1, 0, 0] = 1
    said = truth.clone()
    said[1] = 0
    assert told(said, truth).epoch_figures()["train_dice"] == pytest.approx(0.5)


def test_c14_empty_prediction_and_empty_reference_score_one_as_in_the_metrics() -> None:
    truth = torch.zeros(2, 8, 8, dtype=torch.int64)
    truth[:, 0] = IGNORE_LABEL
    said = torch.zeros_like(truth)
    said[:, 0, :3] = 1  # where nothing counts
    figures = told(said, truth).epoch_figures()
    assert figures["train_dice"] == figures["train_iou"] == figures["train_f1"] == dice(0, 0, 0) == 1.0
    said[0, 4, 4] = 1
    assert told(said, truth).epoch_figures()["train_dice"] == pytest.approx((dice(0, 1, 0) + 1) / 2)


def test_structures_that_a_sample_lacks_do_not_raise_its_score() -> None:
    truth = torch.zeros(1, 4, 8, dtype=torch.int64)
    truth[0, 0, :4] = 1
    said = torch.zeros_like(truth)
    said[0, 0, 2:6] = 1
    said[0, 3, 0] = 3  # four outputs; class 2 is nowhere
    assert told(said, truth).epoch_figures()["train_dice"] == pytest.approx((2 * 2 / (4 + 4) + 0) / 2)


def test_distance_is_asked_for_and_of_the_last_batch() -> None:
    from medssl_cli.metrics.surface import hausdorff_95

    def in_pixels(prediction: np.ndarray, reference: np.ndarray) -> float:
        return hausdorff_95(prediction, reference, (1.0, 1.0))

    truth = torch.zeros(3, 16, 16, dtype=torch.int64)
    truth[0, 2:6, 2:6] = 1
    truth[1, 2:6, 2:6] = 1
    said = torch.zeros_like(truth)
    said[0, 2:6, 5:9] = 1  # moved by 3
    said[2, 0, 0] = 1  # of the second and third sample one side is empty
    truth[:, :, 12:] = IGNORE_LABEL
    said[0, 8, 14] = 1  # counts nowhere
    objective = told(said, truth)
    assert objective.epoch_figures()["train_hd95"] is None
    assert objective.epoch_figures(in_pixels)["train_hd95"] == pytest.approx(3.0)
    assert told(torch.zeros_like(truth), truth).epoch_figures(in_pixels)["train_hd95"] is None


def test_start_epoch_forgets_and_nothing_seen_is_none() -> None:
    objective = make_objective()
    assert set(objective.epoch_figures().values()) == {None}
    step(objective, make_batch())
    objective.losses(make_batch(), {})  # of a step that is not done
    assert objective.epoch_figures()["train_loss"] is not None
    assert float(objective.epoch_sums[0]) == 4
    objective.start_epoch()
    objective.after_step({})
    assert set(objective.epoch_figures().values()) == {None}


def test_a_batch_of_ignored_samples_has_no_loss_but_no_nan() -> None:
    objective, batch = make_objective(), make_batch()
    batch.label_map_BHW[:] = IGNORE_LABEL
    step(objective, batch)
    assert objective.epoch_figures() == {
        "train_loss": None,
        "train_dice": 1.0,
        "train_iou": 1.0,
        "train_f1": 1.0,
        "train_hd95": None,
    }
    assert objective.health() == {}
    assert all(tensor.isfinite().all() for tensor in objective.state_dict().values())


def test_health_tells_of_a_network_that_sees_background_alone() -> None:
    truth = torch.zeros(1, 4, 4, dtype=torch.int64)
    truth[0, 0] = 1
    truth[0, 3] = IGNORE_LABEL
    assert make_objective().health() == {}
    objective = told(torch.zeros_like(truth), truth)
    assert objective.health() == {"predicted_foreground": 0.0, "reference_foreground": pytest.approx(4 / 12)}


def test_deep_supervision_is_scored_at_the_finest_level() -> None:
    class Levels(NetworkWithoutNorm):
        def forward(self, images_BSHW: Tensor, available_BS: Tensor | None = None) -> Any:
            finest = super().forward(images_BSHW)
            assert isinstance(finest, Tensor)
            return [finest, F.avg_pool2d(finest, 2)] if self.training else finest

    objective, batch = make_objective(network=Levels), make_batch()
    step(objective, batch)
    objective.start_epoch()
    terms = objective.losses(batch, {})
    objective.after_step({})
    objective.network.eval()
    rows = np.array(expected_figures(objective, batch))
    assert objective.epoch_figures()["train_dice"] == pytest.approx(rows[:, 0].mean())
    assert objective.epoch_figures()["train_loss"] == pytest.approx(added(terms), rel=1e-6)


# --- in the trainer --------------------------------------------------------------------------------------------------


def trainer(out: Path, steps: int, seed: int = 0) -> Trainer:
    """Four steps make an epoch; the backbone joins in the second one."""
    objective = make_objective(seed=seed)

    def batches(first: int) -> Iterator[LabelledBatch]:
        while True:
            yield make_batch(seed=first)
            first += 1

    def views(batch: LabelledBatch, number: int, micro: int) -> LabelledBatch:
        return batch

    optimizer = build_adamw(parameter_groups(objective.trained_modules(), depth=1), CPU)
    schedules = EpochCosine(3, 4, lr=1e-2, freeze_backbone_epochs=1)
    checkpoints = Checkpoints(out, sequence_names=["CT", "PET"])
    return Trainer(objective, optimizer, schedules, batches, views, steps, CPU, Precision("fp32", CPU),  # type: ignore[arg-type]
                   checkpoints=checkpoints)  # fmt: skip


def test_c17_c18_a_stop_within_an_epoch_changes_nothing(tmp_path: Path) -> None:
    straight = trainer(tmp_path / "straight", 12)
    frozen_before = straight.objective.network.backbone.weight.clone()  # type: ignore[attr-defined, union-attr]
    straight.fit()
    trainer(tmp_path / "two", 6).fit()
    second = trainer(tmp_path / "two", 12, seed=3)  # everything comes from the file, frozen tensors too
    newest = second.checkpoints.latest()  # type: ignore[union-attr]
    assert newest is not None
    assert second.restore(newest) == 6
    second.fit()
    one, two = straight.objective.state_dict(), second.objective.state_dict()
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name
    assert straight.objective.epoch_figures() == second.objective.epoch_figures()  # type: ignore[attr-defined]
    assert torch.equal(second.objective.averaged.trunk.weight, second.objective.network.trunk.weight)  # type: ignore
    assert not torch.equal(straight.objective.network.backbone.weight, frozen_before)  # type: ignore[attr-defined]


def test_checkpoints_hold_frozen_tensors_once() -> None:
    objective = make_objective()
    names = model_tensors(objective).keys()
    assert "network.trunk.weight" in names
    assert "averaged.trunk.weight" not in names
    assert {"averaged.backbone.weight", "averaged.norm.running_mean", "updates", "epoch_sums"} <= names
    step(objective, make_batch())
    twin = make_objective(seed=7)
    twin.load_state_dict(objective.state_dict())
    for name, tensor in objective.averaged.state_dict().items():
        assert torch.equal(twin.averaged.state_dict()[name], tensor), name
    step(objective, make_batch(seed=4))
    step(twin, make_batch(seed=4))
    assert torch.equal(
        twin.averaged.decoder.weight, objective.averaged.decoder.weight
    )  # its second step, not its first
    with pytest.raises(RuntimeError, match=r"averaged\.backbone\.weight"):
        twin.load_state_dict({k: v for k, v in objective.state_dict().items() if k != "averaged.backbone.weight"})


# --- weights ---------------------------------------------------------------------------------------------------------


def test_c18_the_file_holds_both_sets_and_loads_either(tmp_path: Path) -> None:
    objective = make_objective()
    step(objective, make_batch())
    safetensors.torch.save_file(objective.weights(), tmp_path / "best.safetensors")
    tensors = safetensors.torch.load_file(tmp_path / "best.safetensors")
    assert {"ema.decoder.weight", "raw.decoder.weight", "frozen.trunk.weight", "ema.norm.running_var"} <= tensors.keys()
    assert not {"ema.trunk.weight", "raw.trunk.weight"} & tensors.keys()
    images = make_batch(seed=8).images_BSHW
    found = {}
    for which, source in (("ema", objective.averaged), ("raw", objective.network)):
        torch.manual_seed(99)
        network = Network()
        load_weights(network, tensors, which)  # type: ignore[arg-type]
        found[which] = network.eval()(images)
        assert torch.equal(found[which], copy.deepcopy(source).eval()(images))
    assert not torch.equal(found["ema"], found["raw"])
    default = Network()
    load_weights(default, tensors)
    assert torch.equal(default.eval()(images), found["ema"])


def test_weights_are_copies_and_whole_without_averaging_too(tmp_path: Path) -> None:
    objective = make_objective(ema_decay=0)
    tensors = objective.weights()
    kept = tensors["raw.decoder.weight"].clone()
    step(objective, make_batch())
    assert torch.equal(tensors["raw.decoder.weight"], kept)
    safetensors.torch.save_file(tensors, tmp_path / "best.safetensors")  # refuses memory that is shared
    network = Network()
    load_weights(network, tensors, "ema")
    assert torch.equal(network.decoder.weight, kept)


def test_weights_that_do_not_fit_leave_the_network_as_it_was() -> None:
    tensors = make_objective().weights()
    network = Network()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    faults = {
        "missing: decoder.bias": {k: v for k, v in tensors.items() if k != "ema.decoder.bias"},
        "missing: trunk.weight": {k: v for k, v in tensors.items() if k != "frozen.trunk.weight"},
        "unexpected: head.weight": {**tensors, "ema.head.weight": torch.zeros(1)},
        "shape of decoder.bias: saved (2,), needed (1,)": {**tensors, "ema.decoder.bias": torch.zeros(2)},
        "not finite: decoder.bias": {**tensors, "ema.decoder.bias": torch.tensor([math.nan])},
    }
    for text, spoiled in faults.items():
        with pytest.raises(CheckpointError) as caught:
            load_weights(network, spoiled)
        assert text in caught.value.where
        assert "model.json" in caught.value.fix
        assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    load_weights(network, {**tensors, "raw.decoder.bias": torch.tensor([math.nan])}, "ema")  # the other set is not read


# --- schedule --------------------------------------------------------------------------------------------------------


def test_the_rate_by_epoch_is_that_of_pytorch() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-4)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=30, eta_min=1e-6)
    schedule = EpochCosine(30, 7, 1e-4)
    for epoch in range(30):
        expected = theirs.get_last_lr()[0]
        assert len({schedule.at(epoch * 7 + step)["lr"] for step in range(7)}) == 1
        assert schedule.at(epoch * 7 + 6)["lr"] == pytest.approx(expected, rel=1e-9)
        assert schedule.at(epoch * 7)["lr"] == pytest.approx(
            1e-6 + 0.5 * (1e-4 - 1e-6) * (1 + math.cos(math.pi * epoch / 30)), rel=1e-12
        )
        optimizer.step()
        theirs.step()
    assert schedule.at(30 * 7)["lr"] == 1e-6 == schedule.at(10_000)["lr"]


def test_the_rate_by_step_is_that_of_pytorch_after_a_warm_up() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-2)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / 10, 1.0, total_iters=9)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=30, eta_min=1e-5)
    theirs = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, cosine], milestones=[10])
    schedule = EpochCosine(4, 10, 1e-2, 1e-5, warmup_epochs=1, per="step")
    for number in range(40):
        assert schedule.at(number)["lr"] == pytest.approx(theirs.get_last_lr()[0], rel=1e-6), number
        optimizer.step()
        theirs.step()


def test_warm_up_by_epoch_and_one_longer_than_the_run() -> None:
    rates = [EpochCosine(6, 2, 1.0, 0.0, warmup_epochs=2).at(step)["lr"] for step in range(12)]
    assert rates[:6] == [0.5, 0.5, 1.0, 1.0, 1.0, 1.0]
    assert rates == sorted(rates[:4]) + sorted(rates[4:], reverse=True)
    assert [EpochCosine(2, 1, 1.0, warmup_epochs=9).at(step)["lr"] for step in range(2)] == [0.5, 1.0]


def test_the_values_are_those_that_the_optimizer_takes() -> None:
    schedule = EpochCosine(4, 3, 1e-3, weight_decay=0.02, freeze_backbone_epochs=2)
    assert [schedule.at(step)["backbone_frozen"] for step in (0, 5, 6)] == [1.0, 1.0, 0.0]
    optimizer = build_adamw(parameter_groups(make_objective().trained_modules(), depth=1), CPU)
    apply_schedule(optimizer, schedule.at(0))
    assert {group["lr"] for group in optimizer.param_groups if group["lr_multiplier"] == 1} == {1e-3}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.02}
    with pytest.raises(ValueError, match="at least one"):
        EpochCosine(0, 3, 1e-3)


# --- behaviour -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outputs", [1, 3])
def test_one_batch_is_overfitted_and_the_average_follows(outputs: int) -> None:
    objective, batch = make_objective(outputs), make_batch(outputs=outputs)
    optimizer = torch.optim.Adam([p for p in objective.network.parameters() if p.requires_grad], lr=0.05)
    for _ in range(120):
        objective.start_epoch()
        loss = torch.stack(list(objective.losses(batch, {}).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        objective.after_step({})
    figures = objective.epoch_figures()
    assert figures["train_dice"] > 0.75
    with torch.no_grad():
        averaged = objective.loss(objective.averaged(batch.images_BSHW), batch.label_map_BHW)
    assert added(averaged) < 0.6 * math.log(2)
    assert batch.label_map_BHW.shape[-1] == SIZE


@pytest.mark.slow
def test_r05_two_processes_equal_one(tmp_path: Path) -> None:
    """Weights, average and figures of three steps in halves; and figures of unequal parts."""
    script = Path(__file__).with_name("two_segmenters.py")
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
    joint, *halves = (torch.load(tmp_path / out) for _, _, _, out in jobs)
    for half in halves:
        assert half["trained"]["state"].keys() == joint["trained"]["state"].keys()
        for name, tensor in joint["trained"]["state"].items():
            torch.testing.assert_close(half["trained"]["state"][name], tensor, atol=1e-6, rtol=1e-5, msg=name)
        assert half["trained"]["figures"] == pytest.approx(joint["trained"]["figures"], rel=1e-6)
        assert half["counted"] == pytest.approx(joint["counted"], rel=1e-6)
