import json
import logging
import math
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_stub import CPU, Stub, batches, resumed, slices, trainer, views
from torch import Tensor

from medssl_cli.core.errors import CheckpointError, DataError, Interrupted, NonFiniteError, ResourceError
from medssl_cli.core.protocols import Batch, SliceBatch
from medssl_cli.core.run import seed_for
from medssl_cli.engine.checkpoint import optimizer_tensors, read_latest
from medssl_cli.engine.precision import Precision
from medssl_cli.engine.schedules import Schedules
from medssl_cli.engine.telemetry import read_metrics
from medssl_cli.engine.trainer import StopSignal, Trainer

TIMES = {"iter_time", "data_time", "data_wait_percent", "eta_s", "images_per_s", "memory_gib"}


def state(run: Trainer) -> dict[str, Tensor]:
    """Every tensor of student, teacher, centre and optimizer, copied."""
    tensors = {**run.objective.state_dict(), **optimizer_tensors(run.optimizer)}
    return {name: tensor.clone() for name, tensor in tensors.items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def logged(out: Path) -> list[dict[str, Any]]:
    lines = read_metrics(out / "training_metrics.jsonl")
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


# --- R01 and R16: resume is exact ------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_r01_twenty_steps_equal_ten_and_ten(tmp_path: Path, precision: str) -> None:
    straight = trainer(tmp_path / "straight", precision=Precision(precision, CPU))
    straight.fit()

    class Killed(BaseException):
        """Stands for a kill: nothing catches it."""

    def views_until_13(batch: SliceBatch, step: int, micro: int) -> Batch:
        if step == 12:
            raise Killed
        return views(batch, step, micro)

    cut = trainer(tmp_path / "cut", precision=Precision(precision, CPU), views=views_until_13)
    with pytest.raises(Killed):
        cut.fit()
    assert cut.steps_done == 12
    again = resumed(tmp_path / "cut", precision=Precision(precision, CPU))
    assert again.steps_done == 10
    again.fit()
    assert_same(state(again), state(straight))
    assert logged(tmp_path / "cut") == logged(tmp_path / "straight")
    assert len(logged(tmp_path / "cut")) == 20


def test_r01_dropout_matters_and_so_does_the_seed() -> None:
    """The comparison above would be empty if nothing were random."""
    runs = [trainer(None, seed=seed) for seed in (0, 0, 1)]
    for run in runs:
        run.fit()
    first, same, other = (run.objective.state_dict()["student.dino_head.weight"] for run in runs)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


SIGKILLED = """
import os, signal, sys
from pathlib import Path
from engine_stub import resumed, views
def killing_views(batch, step, micro):
    if step == int(sys.argv[2]):
        os.kill(os.getpid(), getattr(signal, sys.argv[3]))
    return views(batch, step, micro)
from medssl_cli.core.errors import MedsslError
try:
    result = resumed(Path(sys.argv[1]), views=killing_views).fit()
except MedsslError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
print(result.steps)
"""


@pytest.mark.slow
def test_r01_sigkill_sigterm_and_resume_in_new_processes(tmp_path: Path, python: Callable[..., Any]) -> None:
    straight = trainer(tmp_path / "straight")
    straight.fit()
    out = tmp_path / "cut"
    assert python(SIGKILLED, out, 12, "SIGKILL").returncode == -signal.SIGKILL
    stopped = python(SIGKILLED, out, 13, "SIGTERM")
    assert stopped.returncode == 75, stopped.stderr
    assert "SIGTERM came after step 14; the state is saved." in stopped.stderr
    assert "fix:   run the same command again" in stopped.stderr
    assert str(out / "checkpoints" / "step_0000014") in stopped.stderr
    ended = python(SIGKILLED, out, -1, "SIGTERM")
    assert (ended.returncode, ended.stdout) == (0, "20\n"), ended.stderr
    again = resumed(out)
    assert again.steps_done == 20
    assert_same(state(again), state(straight))
    assert logged(out) == logged(tmp_path / "straight")


def test_each_micro_batch_draws_by_its_own_seed() -> None:
    drawn: dict[tuple[int, int], float] = {}

    def drawing_views(batch: SliceBatch, step: int, micro: int) -> Batch:
        drawn[step, micro] = torch.rand(()).item()
        return views(batch, step, micro)

    trainer(None, steps=3, accumulation=2, seed=11, views=drawing_views).fit()
    assert list(drawn) == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    for (step, micro), value in drawn.items():
        generator = torch.Generator().manual_seed(seed_for(11, "step", step, micro, 0))
        assert value == torch.rand((), generator=generator).item()
    assert len(set(drawn.values())) == 6


def test_finished_run_does_nothing_more(tmp_path: Path) -> None:
    trainer(tmp_path).fit()
    result = resumed(tmp_path).fit()
    assert (result.steps, result.last_losses) == (20, {})


def test_callback_after_each_checkpoint_and_again_after_a_kill(tmp_path: Path) -> None:
    called: list[int] = []

    def callback(step: int) -> None:
        newest = read_latest(tmp_path / "checkpoints")
        assert newest is not None
        assert newest.step == step
        called.append(step)
        if called == [5, 10]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, on_checkpoint=callback).fit()
    resumed(tmp_path, on_checkpoint=callback).fit()
    assert called == [5, 10, 10, 15, 20]


def test_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path).fit()
    other = Stub()
    other.student["dino_head"] = torch.nn.Linear(8, 5)
    with pytest.raises(CheckpointError, match="does not fit"):
        resumed(tmp_path, objective=other)


# --- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_signal_saves_after_the_step_and_exits_75(tmp_path: Path, name: str) -> None:
    before = [signal.getsignal(getattr(signal, n)) for n in ("SIGTERM", "SIGUSR1", "SIGINT")]

    def views_with_signal(batch: SliceBatch, step: int, micro: int) -> Batch:
        if step == 6:
            os.kill(os.getpid(), getattr(signal, name))
        return views(batch, step, micro)

    with pytest.raises(Interrupted, match=f"{name} came after step 7; the state is saved") as caught:
        trainer(tmp_path, views=views_with_signal).fit()
    assert caught.value.exit_code == 75
    assert caught.value.fix == "run the same command again"
    newest = read_latest(tmp_path / "checkpoints")
    assert newest is not None
    assert newest.step == 7
    assert [signal.getsignal(getattr(signal, n)) for n in ("SIGTERM", "SIGUSR1", "SIGINT")] == before


def test_signal_in_the_last_step_lets_the_run_finish(tmp_path: Path) -> None:
    def views_with_signal(batch: SliceBatch, step: int, micro: int) -> Batch:
        if step == 19:
            os.kill(os.getpid(), signal.SIGTERM)
        return views(batch, step, micro)

    assert trainer(tmp_path, views=views_with_signal).fit().steps == 20


def test_second_ctrl_c_interrupts_at_once() -> None:
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_outside_the_main_thread_signals_are_left_alone() -> None:
    def look() -> None:
        with StopSignal():
            seen.append(signal.getsignal(signal.SIGTERM))

    seen: list[Any] = []
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]


# --- R06 and T35: non-finite values ----------------------------------------------------------------------------------


class Spoiled(Stub):
    """A loss term or a gradient that is not finite once ``bad`` is set."""

    bad = ""

    def losses(self, batch: Batch, values: Any) -> dict[str, Tensor]:
        terms = super().losses(batch, values)
        if self.bad == "loss":
            terms["koleo"] = terms["koleo"] + math.inf
        if self.bad == "gradient":  # the root is 0, its slope infinite, and 0 x inf is NaN
            terms["dino"] = terms["dino"] + (self.student["backbone"][1].bias * 0).sqrt().sum()
        return terms


def spoil_image(batch: SliceBatch, step: int, micro: int) -> Batch:
    if step == 7:
        batch.images_BSHW[2, 0, 1, 1] = math.nan
    return views(batch, step, micro)


def run_to_step_7(tmp_path: Path, bad: str) -> tuple[Trainer, dict[str, Tensor], NonFiniteError]:
    objective = Spoiled()
    run = trainer(tmp_path, objective=objective, views=spoil_image if bad == "image" else views)
    source = run.batches(0)
    while run.steps_done < 7:
        run.step(source)
        if run.steps_done == 5:
            run._save()
    objective.bad = bad
    before = state(run)
    with pytest.raises(NonFiniteError) as caught:
        run.step(source)
    return run, before, caught.value


@pytest.mark.parametrize(
    ("bad", "what"),
    [
        ("image", "An image of step 8 is not finite."),
        ("loss", "The loss term koleo became inf in step 8."),
        ("gradient", "The gradient of backbone became non-finite in step 8; first parameter: 1.bias."),
    ],
)
def test_r06_non_finite_stops_before_the_update(tmp_path: Path, bad: str, what: str) -> None:
    run, before, error = run_to_step_7(tmp_path, bad)
    assert error.exit_code == 5
    assert error.what == what
    assert "PT-007-0-0, PT-007-0-1, PT-007-0-2, PT-007-0-3" in error.where
    assert f"last good checkpoint: {tmp_path / 'checkpoints' / 'step_0000005'}" in error.where
    assert ("whose own image is not finite: PT-007-0-2" in error.where) is (bad == "image")
    assert_same(state(run), before)
    assert run.steps_done == 7


def test_r06_bad_image_also_names_the_term_that_it_spoiled(tmp_path: Path) -> None:
    _, _, error = run_to_step_7(tmp_path, "image")
    assert "loss terms not finite: dino" in error.where


def test_r06_crop_that_became_non_finite_is_traced_to_its_case() -> None:
    def spoiling(batch: SliceBatch, step: int, micro: int) -> Batch:
        crops = views(batch, step, micro)
        crops.local_VSHW = torch.zeros(12, 1, 2, 2)  # three local crops of four samples, view-major
        crops.local_VSHW[2 * 4 + 1] = math.inf
        return crops

    with pytest.raises(NonFiniteError) as caught:
        trainer(None, views=spoiling).fit()
    assert "whose own image is not finite: PT-000-0-1\n" in caught.value.where
    assert "none was saved yet" in caught.value.where


def test_t35_term_of_the_guilty_micro_batch_and_its_cases_only() -> None:
    class Third(Stub):
        calls = 0

        def losses(self, batch: Batch, values: Any) -> dict[str, Tensor]:
            self.calls += 1
            terms = super().losses(batch, values)
            # opposite infinities: a check of the sum alone would see NaN only, and one of the mean nothing at all
            return terms | ({"koleo": terms["koleo"] * math.nan} if self.calls == 4 else {})

    with pytest.raises(NonFiniteError, match="loss term koleo became nan in step 2") as caught:
        trainer(None, objective=Third(), accumulation=2).fit()
    assert "cases: PT-001-1-0, PT-001-1-1, PT-001-1-2, PT-001-1-3\n" in caught.value.where


# --- the loader ------------------------------------------------------------------------------------------------------


def test_workers_gone_between_micro_batches_count_as_the_same_signal(tmp_path: Path) -> None:
    def source(step: int) -> Iterator[SliceBatch]:
        yield from (slices(0, micro, 4) for micro in range(3))
        os.kill(os.getpid(), signal.SIGTERM)
        raise ResourceError("Loader worker 0 died.", code="loader_worker_died")

    run = trainer(tmp_path, batches=source, accumulation=2)
    with pytest.raises(Interrupted, match="SIGTERM came after step 1; the state is saved"):
        run.fit()
    newest = read_latest(tmp_path / "checkpoints")
    assert newest is not None
    assert newest.step == 1


@pytest.mark.parametrize(
    "error",
    [
        ResourceError("Loader worker 0 died.", where="at case PT-7", code="loader_worker_died"),
        DataError("A file is cut short.", where="a.nii.gz", fix="copy it again"),
        RuntimeError("a bug"),
    ],
)
def test_an_error_of_the_loader_comes_as_it_was_raised(tmp_path: Path, error: Exception) -> None:
    def source(step: int) -> Iterator[SliceBatch]:
        yield slices(0, 0, 4)
        raise error

    run = trainer(tmp_path, batches=source)
    with pytest.raises(type(error)) as caught:
        run.fit()
    assert caught.value is error
    assert caught.value.__cause__ is None
    assert run.steps_done == 1


def test_out_of_memory_gives_the_documented_advice() -> None:
    def full(batch: SliceBatch, step: int, micro: int) -> Batch:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    with pytest.raises(ResourceError, match="not enough memory") as caught:
        trainer(None, views=full).fit()
    assert caught.value.where.startswith("cpu, step 1, 4 samples, peak ")
    assert caught.value.where.endswith(": CUDA out of memory. Tried to allocate 2 GiB")
    assert "batch_size_per_gpu" in caught.value.fix


def test_out_of_memory_names_the_batch_that_would_fit() -> None:
    """As if three samples of 64 MiB each were all that fits."""
    held: list[Tensor] = []

    def hungry(batch: SliceBatch, step: int, micro: int) -> Batch:
        held.clear()
        if len(batch.images_BSHW) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        held.append(torch.ones(len(batch.images_BSHW), 2**24))
        return views(batch, step, micro)

    with pytest.raises(ResourceError) as caught:
        trainer(None, views=hungry).fit()
    assert caught.value.exit_code == 6
    assert re.search(r"train.batch_size_per_gpu=[12] train.grad_accumulation=[24] would take", caught.value.fix)


def test_batches_that_end_are_a_bug_of_ours() -> None:
    with pytest.raises(ValueError, match="the batches ended in step 3 of 20"):
        trainer(None, batches=lambda step: iter([slices(0, 0, 4), slices(1, 0, 4)])).fit()


# --- what a step does ------------------------------------------------------------------------------------------------


def test_t03_teacher_follows_by_the_momentum_of_the_step() -> None:
    seen: list[dict[str, float]] = []

    class Watched(Stub):
        def after_step(self, values: Any) -> None:
            seen.append(dict(values))
            super().after_step(values)

    run = trainer(None, objective=Watched())
    old = run.objective.teacher["dino_head"].weight.clone()
    run.steps_done = 9
    run.step(run.batches(9))
    assert seen == [run.schedules.at(9)]
    student = run.objective.student["dino_head"].weight
    momentum = seen[0]["momentum"]
    assert not torch.equal(run.objective.teacher["dino_head"].weight, old)
    torch.testing.assert_close(
        run.objective.teacher["dino_head"].weight, momentum * old + (1 - momentum) * student, atol=1e-7, rtol=0
    )


def test_t11_frozen_backbone_stays_and_then_trains(tmp_path: Path) -> None:
    schedules = Schedules(total_steps=8, epoch_steps=2, lr=1e-2, warmup_epochs=0, freeze_backbone_epochs=2)
    run = trainer(tmp_path, steps=8, schedules=schedules, checkpoint_every=3)
    weight = run.objective.student["backbone"][1].weight
    head = run.objective.student["dino_head"].weight
    source = run.batches(0)
    history = [(weight.clone(), head.clone())]
    for _ in range(6):
        run.step(source)
        history.append((weight.clone(), head.clone()))
    assert [torch.equal(a[0], b[0]) for a, b in pairwise(history)] == [True] * 4 + [False] * 2
    assert not any(torch.equal(a[1], b[1]) for a, b in pairwise(history))


def test_t11_resume_while_frozen_is_exact(tmp_path: Path) -> None:
    schedules = Schedules(total_steps=8, epoch_steps=2, lr=1e-2, warmup_epochs=0, freeze_backbone_epochs=2)
    straight = trainer(None, steps=8, schedules=schedules)
    straight.fit()
    cut = trainer(tmp_path, steps=8, schedules=schedules)
    source = cut.batches(0)
    for _ in range(3):
        cut.step(source)
    cut._save()
    again = resumed(tmp_path, steps=8, schedules=schedules)
    again.fit()
    assert_same(state(again), state(straight))


def test_t30_values_after_resume_equal_those_of_the_straight_run(tmp_path: Path) -> None:
    keys = ("lr", "wd", "mom", "teacher_temp", "last_layer_lr")
    trainer(tmp_path / "straight").fit()
    cut = trainer(tmp_path / "cut")
    cut.total_steps = 10
    cut.fit()
    resumed(tmp_path / "cut").fit()
    rows = [[line[key] for key in keys] for line in logged(tmp_path / "cut")]
    assert rows == [[line[key] for key in keys] for line in logged(tmp_path / "straight")]
    assert rows[0][0] == 0.0
    assert len({row[0] for row in rows}) > 10


def test_two_micro_batches_of_four_equal_one_of_eight() -> None:
    def joint(step: int) -> Iterator[SliceBatch]:
        while True:
            halves = [slices(step, micro, 4) for micro in (0, 1)]
            yield SliceBatch(
                images_BSHW=torch.cat([half.images_BSHW for half in halves]),
                sizes_B2=torch.cat([half.sizes_B2 for half in halves]),
                available_BS=torch.cat([half.available_BS for half in halves]),
                case_ids=[case for half in halves for case in half.case_ids],
            )
            step += 1

    class Uncentred(Stub):
        """The stub's centre follows the last micro-batch alone; how centres gather is the objective's affair."""

        def after_step(self, values: Any) -> None:
            super().after_step(values)
            self.centre.zero_()

    runs = [
        trainer(
            None,
            objective=Uncentred(dropout=0).double(),
            accumulation=2,
            batches=lambda step: doubles(batches(step, 2)),
        ),
        trainer(
            None, objective=Uncentred(dropout=0).double(), accumulation=1, batches=lambda step: doubles(joint(step))
        ),
    ]
    for run in runs:
        source = run.batches(0)
        records = [run.step(source) for _ in range(2)]
        assert [record.images for record in records] == [8, 8]
        run.last = records[0]
    split, whole = runs
    assert split.last.losses["dino"] == pytest.approx(whole.last.losses["dino"], rel=1e-6)
    first = {name: tensor for name, tensor in split.objective.state_dict().items() if name.startswith("student")}
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, whole.objective.state_dict()[name], rtol=1e-9, atol=1e-9)


def doubles(source: Iterator[SliceBatch]) -> Iterator[SliceBatch]:
    for batch in source:
        batch.images_BSHW = batch.images_BSHW.double()
        yield batch


def test_gradients_are_clipped_per_submodule_before_the_update() -> None:
    run = trainer(None, clip_grad=0.01)
    record = run.step(run.batches(0))
    for name, module in run.objective.trained_modules().items():
        left = math.sqrt(sum(p.grad.square().sum().item() for p in module.parameters()))
        assert record.gradient_norms[name] > 0.01
        assert left == pytest.approx(0.01, rel=1e-4)


def test_it_learns_and_reports() -> None:
    run = trainer(None, steps=60, objective=Stub(dropout=0))
    first = run.step(run.batches(0)).total_loss
    result = run.fit()
    assert sum(result.last_losses.values()) < 0.7 * first
    assert result.steps == 60
    assert result.images_per_s > 0
    assert result.seconds > 0
    assert 0.01 < result.peak_memory_gib < 100


def test_measure_writes_nothing(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    result = run.measure(3)
    assert result.steps == 3
    assert result.images_per_s > 0
    assert run.steps_done == 0
    assert list(tmp_path.iterdir()) == []


def test_log_checkpoint_and_json_of_a_whole_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    trainer(tmp_path).fit()
    keyed = json.loads((tmp_path / "training_metrics.json").read_text())
    assert list(keyed) == [str(step) for step in range(1, 21)]
    assert keyed["20"]["current_batch_size"] == 4
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "last", "step_0000010", "step_0000015", "step_0000020",
    ]  # fmt: skip
    assert any(message.startswith("[20/20]  eta 0:00:00") for message in caplog.messages)


# --- two processes ---------------------------------------------------------------------------------------------------

TWO_PROCESSES = """
import os, signal, sys, warnings
from pathlib import Path
import torch, torch.distributed
torch.set_num_threads(1)
from engine_stub import trainer, views
from medssl_cli.core.errors import MedsslError

out, kind = Path(sys.argv[1]), sys.argv[2]
rank = 1 if os.fork() == 0 else 0

def spoiling(batch, step, micro):
    if rank == 1 and step == 6:
        if kind == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            batch.images_BSHW[0] = float("nan")
    return views(batch, step, micro)

torch.distributed.init_process_group("gloo", init_method=f"file://{out}.meet", rank=rank, world_size=2)
try:
    trainer(out if rank == 0 else None, views=spoiling).fit()
    code = 0
except MedsslError as error:
    (out.parent / f"{kind}{rank}.txt").write_text(str(error))
    code = error.exit_code
torch.distributed.destroy_process_group()
if rank == 1:
    os._exit(code)
other = os.waitstatus_to_exitcode(os.wait()[1])
print(code, other)
"""


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_at_the_same_step(tmp_path: Path, python: Callable[..., Any]) -> None:
    answer = python(TWO_PROCESSES, tmp_path / "run", "signal")
    assert answer.stdout == "75 75\n", answer.stderr
    assert "A signal to another process came after step 7" in (tmp_path / "signal0.txt").read_text()
    assert "SIGTERM came after step 7" in (tmp_path / "signal1.txt").read_text()
    newest = read_latest(tmp_path / "run" / "checkpoints")
    assert newest is not None
    assert newest.step == 7
    assert logged(tmp_path / "run")[-1]["current_batch_size"] == 8


@pytest.mark.slow
def test_r06_non_finite_in_one_process_stops_both(tmp_path: Path, python: Callable[..., Any]) -> None:
    answer = python(TWO_PROCESSES, tmp_path / "run", "nan")
    assert answer.stdout == "5 5\n", answer.stderr
    assert "Another process met a non-finite value in step 7" in (tmp_path / "nan0.txt").read_text()
    assert "whose own image is not finite: PT-006-0-0" in (tmp_path / "nan1.txt").read_text()
    newest = read_latest(tmp_path / "run" / "checkpoints")
    assert newest is not None
    assert newest.step == 5
