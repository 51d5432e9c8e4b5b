import math
from collections.abc import Mapping

import pytest
import torch
from engine_stub import CPU, Stub, trainer

from medssl_cli.core.errors import NonFiniteError
from medssl_cli.engine.precision import ComputePrecisionConfig, Precision


@pytest.fixture(autouse=True)
def restore_switches() -> object:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@pytest.mark.parametrize(("name", "tf32"), [("fp32", False), ("tf32", True), ("bf16", False), ("fp16", False)])
def test_tf32_only_where_it_is_named(name: str, tf32: bool) -> None:
    Precision(name, CPU)
    assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
    assert torch.backends.cudnn.allow_tf32 is tf32


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp32", "float32"), ("tf32", "float32"), ("bf16", "bfloat16"), ("fp16", "float16")]
)
def test_autocast_type(name: str, dtype: str) -> None:
    with Precision(name, CPU).autocast():
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert str(product.dtype) == f"torch.{dtype}"


def test_default_is_fp32() -> None:
    assert ComputePrecisionConfig().precision == "fp32"


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_half_precision_trains_float32_parameters_close_to_fp32(name: str) -> None:
    full, half = (
        trainer(None, objective=Stub(dropout=0)),
        trainer(None, objective=Stub(dropout=0), precision=Precision(name, CPU)),
    )
    assert half.fit().last_losses["dino"] == pytest.approx(full.fit().last_losses["dino"], rel=0.05)
    assert {p.dtype for p in half.objective.parameters()} == {torch.float32}


class Overflowing(Stub):
    """Gradient of the head infinite in the given steps; losses stay finite."""

    def __init__(self, steps: range) -> None:
        super().__init__()
        self.steps, self.count = steps, 0
        self.student["dino_head"].weight.register_hook(self._spoil)

    def _spoil(self, gradient: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return gradient * math.inf if self.count - 1 in self.steps else gradient


def test_fp16_overflow_skips_the_update_and_halves_the_scale() -> None:
    objective = Overflowing(range(1, 3))
    precision = Precision("fp16", CPU)
    precision.load_state_dict(
        {"scaler": {**precision.state_dict()["scaler"], "scale": 256.0}, "skipped": 0}
    )  # the default of 65536 overflows by itself at first
    run = trainer(None, objective=objective, precision=precision)
    source = run.batches(0)
    assert not run.step(source).loss_scale_skipped
    scale = run.precision.state_dict()["scaler"]["scale"]
    before = {name: tensor.clone() for name, tensor in objective.state_dict().items()}
    assert run.step(source).loss_scale_skipped
    assert run.step(source).loss_scale_skipped
    after = objective.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in after if name.startswith("student."))
    assert run.precision.state_dict()["scaler"]["scale"] == scale / 4
    assert run.precision.skipped_in_a_row == 2
    assert not run.step(source).loss_scale_skipped
    assert run.precision.skipped_in_a_row == 0
    assert not torch.equal(objective.student["dino_head"].weight, before["student.dino_head.weight"])


def test_the_objective_hears_of_a_skipped_step_too() -> None:
    """Else the sums behind a centre would count in the next step, and be lost by a resume in between."""

    class Listening(Overflowing):
        def __init__(self) -> None:
            super().__init__(range(1, 3))
            self.heard: list[float] = []

        def after_step(self, values: Mapping[str, float]) -> None:
            self.heard.append(values["momentum"])
            super().after_step(values)

    objective = Listening()
    run = trainer(None, objective=objective, precision=Precision("fp16", CPU))
    run.precision.load_state_dict({"scaler": {**run.precision.state_dict()["scaler"], "scale": 256.0}, "skipped": 0})
    source = run.batches(0)
    skipped = [run.step(source).loss_scale_skipped for _ in range(4)]
    assert skipped == [False, True, True, False]
    assert objective.heard == [run.schedules.at(step)["momentum"] for step in range(4)]


def test_fp16_raises_after_twenty_skips_in_a_row() -> None:
    run = trainer(None, steps=40, objective=Overflowing(range(40)), precision=Precision("fp16", CPU))
    with pytest.raises(NonFiniteError, match="gradient of dino_head became non-finite in step 20"):
        run.fit()
    assert run.steps_done == 19


def test_loss_scale_survives_a_checkpoint() -> None:
    first, second = Precision("fp16", CPU), Precision("fp16", CPU)
    first.load_state_dict(
        {"scaler": {**first.state_dict()["scaler"], "scale": 1024.0, "_growth_tracker": 7}, "skipped": 3}
    )
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == first.state_dict()
    assert second.state_dict()["scaler"]["scale"] == 1024.0
    assert second.skipped_in_a_row == 3
    assert Precision("fp32", CPU).state_dict() == {}
