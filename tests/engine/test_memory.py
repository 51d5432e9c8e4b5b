"""Out of memory: recognised wherever it comes from, and answered with the batch that fits."""

from __future__ import annotations

import gc
import itertools
import subprocess
import sys
import textwrap
import weakref
from collections.abc import Callable, Mapping

import pytest
import torch
from engine_stub import Stub, slices, trainer
from torch import Tensor

from medssl_cli.core.errors import ResourceError
from medssl_cli.core.protocols import Batch
from medssl_cli.engine import memory
from medssl_cli.engine.memory import GIB, BatchAdvice, KeyNames, MemoryReport

CPU = torch.device("cpu")


def largest_batch(measure: memory.Measure, failed: int, limit_bytes: int) -> int:
    """What the advice rests on."""
    return memory._largest(*memory._two_peaks(measure, failed), limit_bytes)


MIB = 2**20


class FakeDevice:
    """A device whose step takes ``base + each * samples`` bytes and fails above ``limit``."""

    def __init__(self, base: int, each: int, limit: int) -> None:
        self.base, self.each, self.limit = base, each, limit
        self.asked: list[int] = []

    def peak(self, samples: int) -> int | None:
        self.asked.append(samples)
        peak = self.base + self.each * samples
        return peak if peak <= self.limit else None


@pytest.mark.parametrize(
    ("base", "each", "limit", "failed", "asked"),
    [
        (100, 10, 1000, 128, [16, 32]),
        (100, 10, 600, 512, [64, 8, 16]),  # 64 does not fit either
        (0, 100, 250, 8, [1, 2]),
        (0, 100, 150, 2, [1]),
        (900, 50, 1000, 3, [1, 2]),
    ],
)
def test_the_largest_batch_is_what_the_line_allows(
    base: int, each: int, limit: int, failed: int, asked: list[int]
) -> None:
    device = FakeDevice(base, each, limit)
    found = largest_batch(device.peak, failed, limit)
    assert device.asked == asked
    allowed = max((n for n in range(failed) if base + each * n <= 0.95 * limit), default=0)
    assert found == max(allowed, *(n for n in asked if base + each * n <= limit))


def test_no_batch_fits() -> None:
    assert largest_batch(FakeDevice(2000, 10, 1000).peak, 8, 1000) == 0
    assert largest_batch(FakeDevice(0, 10, 5).peak, 1, 5) == 0


def test_a_batch_that_failed_is_never_proposed_whatever_the_line_says() -> None:
    # flat at first, steep later: the line of 8 and 16 would allow thousands
    assert largest_batch(lambda n: 100 if n <= 16 else None, 64, 10**6) == 16
    assert largest_batch(lambda n: 100 + n if n < 8 else None, 64, 10**6) == 7


@pytest.mark.parametrize(
    ("samples", "largest", "expected"),
    [(64, 20, (16, 4)), (64, 64, (64, 1)), (30, 7, (6, 5)), (31, 30, (1, 31)), (8, 1, (1, 8)), (4, 9, (4, 1))],
)
def test_the_samples_of_an_update_stay_the_same(samples: int, largest: int, expected: tuple[int, int]) -> None:
    batch, accumulation = memory.split_batch(samples, largest)
    assert (batch, accumulation) == expected
    assert batch * accumulation == samples


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (MemoryError(), True),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried "
                "to allocate 4000000000000 bytes. Error code 12 (Cannot allocate memory)"
            ),
            True,
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("CUDA out of memory"), False),
    ],
)
def test_out_of_memory_is_told_from_other_faults(error: Exception, expected: bool) -> None:
    assert memory.is_out_of_memory(error) is expected


def test_the_cpu_allocator_of_this_torch_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert memory.is_out_of_memory(caught.value)


@pytest.mark.parametrize(
    ("peak", "limit", "fits"), [(9.4, 10.0, True), (9.6, 10.0, False), (None, 10.0, None), (1.0, None, None)]
)
def test_a_report_leaves_a_margin(peak: float | None, limit: float | None, fits: bool | None) -> None:
    assert MemoryReport(peak, limit).fits is fits


def test_a_report_in_words() -> None:
    assert str(MemoryReport(9.404, 10.0)) == "peak 9.40 GiB of 10.00 GiB"
    assert str(MemoryReport(None, None)) == "peak unknown"


# --- measuring -------------------------------------------------------------------------------------------------------


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux sets its peak back")


@linux
def test_the_peak_of_a_run_is_its_own_and_not_that_of_the_process() -> None:
    def take(mib: int) -> Callable[[], object]:
        return lambda: torch.ones(mib * MIB // 4).sum()

    large, small = memory.peak_of(take(256), CPU), memory.peak_of(take(64), CPU)
    assert large is not None
    assert small is not None
    assert large - small == pytest.approx(192 * MIB, abs=16 * MIB)


@linux
def test_what_does_not_fit_has_no_peak_and_is_let_go() -> None:
    class Held:
        pass

    watched: list[weakref.ref[Held]] = []

    def grow() -> None:
        held = Held()
        watched.append(weakref.ref(held))
        raise torch.OutOfMemoryError(f"{held} is in the way")

    assert memory.peak_of(grow, CPU) is None
    gc.collect()
    assert watched[0]() is None


def test_another_fault_is_not_taken_for_memory() -> None:
    def wrong() -> None:
        raise RuntimeError("shapes")

    with pytest.raises(RuntimeError, match="shapes"):
        memory.peak_of(wrong, CPU)


@linux
def test_main_memory_has_a_limit() -> None:
    limit = memory.memory_limit(CPU)
    assert limit is not None
    assert 2**28 < limit < 2**50


# --- what the user reads ---------------------------------------------------------------------------------------------


def failing_above(samples: int) -> Callable[[int], None]:
    """A step that holds 32 MiB a sample and fails above a number of them."""

    def step(batch: int) -> None:
        held = torch.ones(batch * 32 * MIB // 4)
        if batch > samples:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {held.nbytes} bytes")

    return step


@linux
def test_the_advice_keeps_the_samples_of_an_update(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    small = 500 * MIB  # counted, not measured: this process has room of other tests left over

    def probe(samples: int) -> None:
        asked.append(samples)

    def peak_of(run: Callable[[], object], device: torch.device) -> int:
        run()
        return small + 32 * MIB * (asked[-1] - 1)

    monkeypatch.setattr(memory, "peak_of", peak_of)
    limit = round((small + 32 * MIB * 11.5) / 0.95)  # room for 12 samples, and not for 13
    advice = memory.advise(probe, CPU, batch=32, accumulation=2, limit_bytes=limit)
    assert advice is not None
    assert (advice.batch, advice.accumulation) == (8, 8)  # the divisors of 64 are powers of two
    assert advice.said(KeyNames()) == "train.batch_size_per_gpu=8 train.grad_accumulation=8"
    assert advice.said(KeyNames(batch="bs", accumulation=None)) == "bs=8"
    assert advice.report.fits
    assert advice.report.peak_gib == pytest.approx((small + 32 * MIB * 7) / GIB, abs=0.03)
    state = 32 * MIB * 6  # what an optimizer will add leaves room for fewer
    less = memory.advise(probe, CPU, batch=32, accumulation=2, extra_bytes=state, limit_bytes=limit)
    assert less is not None
    assert (less.batch, less.accumulation) == (4, 16)


def test_memory_that_ends_outside_a_step_is_said_in_three_lines() -> None:
    with pytest.raises(memory.ResourceError) as caught, memory.saying_out_of_memory(torch.device("cuda")):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
    assert (caught.value.exit_code, caught.value.code) == (6, "out_of_memory")
    assert caught.value.where == "cuda: CUDA out of memory. Tried to allocate 2.00 GiB."
    with pytest.raises(RuntimeError, match="a bug"), memory.saying_out_of_memory(CPU):
        raise RuntimeError("a bug")


def test_the_message_names_peak_limit_and_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "memory_limit", lambda _: 12 * GIB)
    monkeypatch.setattr(memory, "_read_peak", lambda _: 11 * GIB)
    monkeypatch.setattr(memory, "advise", lambda *_, **__: BatchAdvice(4, 4, MemoryReport(6.5, 12.0)), raising=True)
    error = memory.out_of_memory_error(
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation"),
        torch.device("cpu"),
        step=1,
        batch=8,
        accumulation=2,
        probe=lambda _: None,
    )
    assert error.exit_code == 6
    assert error.code == "out_of_memory"
    assert "step 1, 8 samples, peak 11.00 GiB of 12.00 GiB: CUDA out of memory" in error.where
    assert "See documentation" not in error.where
    assert error.fix.startswith(
        "train.batch_size_per_gpu=4 train.grad_accumulation=4 would take peak 6.50 GiB of 12.00 GiB; "
    )
    assert "student.grad_checkpointing=true" in error.fix
    keys = KeyNames(batch="bs", accumulation=None, less_memory="precision=bf16 needs less")
    told = memory.out_of_memory_error(MemoryError("enough"), CPU, step=1, batch=8, keys=keys)
    assert told.fix == "halve bs; precision=bf16 needs less"


def test_a_probe_that_breaks_hides_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def broken(_: int) -> None:
        raise RuntimeError("the loader is gone")

    error = memory.out_of_memory_error(MemoryError(), CPU, step=3, batch=8, probe=broken)
    assert "halve train.batch_size_per_gpu" in error.fix
    assert "MemoryError" in error.where
    assert "the loader is gone" in caplog.text


LIMITED = """
    import resource, torch
    from medssl_cli.engine import memory

    torch.set_num_threads(1)
    size = memory._kernel_figure("/proc/self/status", "VmSize")
    resource.setrlimit(resource.RLIMIT_AS, (size + 400 * 2**20, -1))

    def step(samples):
        held = [torch.ones(32 * 2**20 // 4) for _ in range(samples)]

    try:
        step(16)
    except RuntimeError as error:
        assert memory.is_out_of_memory(error), error
        print(memory.out_of_memory_error(error, torch.device("cpu"), step=1, batch=16, probe=step))
"""


@pytest.mark.slow
@linux
def test_a_process_with_little_memory_is_told_the_batch_that_fits() -> None:
    """400 MiB for samples of 32 MiB: 12 at most, 11 with the margin of the whole; of 16 that is 8 twice."""
    answer = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(LIMITED)], capture_output=True, text=True, timeout=120, check=False
    )
    assert answer.returncode == 0, answer.stderr
    assert "DefaultCPUAllocator" in answer.stdout
    assert "train.batch_size_per_gpu=8 train.grad_accumulation=2 would take peak" in answer.stdout


def test_a_trainer_that_runs_out_of_memory_is_told_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part but the device is real: 1 GiB and half a GiB a sample, of 5 GiB, so that 7 of 8 samples would fit."""

    class Hungry(Stub):
        taken = 0

        def losses(self, batch: Batch, values: Mapping[str, float]) -> dict[str, Tensor]:
            samples = len(batch.global_VSHW) // 2
            self.taken = GIB + samples * GIB // 2
            if self.taken >= 5 * GIB:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 512.00 MiB")
            return super().losses(batch, values)

    hungry = Hungry()
    monkeypatch.setattr(memory, "memory_limit", lambda _: 5 * GIB)
    monkeypatch.setattr(memory, "_reset_peak", lambda _: True)
    monkeypatch.setattr(memory, "_read_peak", lambda _: hungry.taken)
    stub, whole = trainer(None, objective=hungry, accumulation=3), slices(0, 0, 8)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        stub.step(itertools.repeat(whole))
    error = memory.out_of_memory_error(
        caught.value,
        CPU,
        step=1,
        batch=8,
        accumulation=3,
        probe=lambda samples: stub.step(itertools.repeat(memory.first_samples(whole, samples))),
    )
    assert "step 1, 8 samples, peak 5.00 GiB of 5.00 GiB" in error.where
    # 95 % of 5 GiB leave room for 7 samples, of which 24 can be made by 6 and 4
    assert error.fix.startswith(
        "train.batch_size_per_gpu=6 train.grad_accumulation=4 would take peak 4.00 GiB of 5.00 GiB; "
    )


def test_moments_are_counted_once_when_a_first_step_runs_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each probe starts like the failed step, without the optimizer's state, which is added to what it takes."""

    class Hungry(Stub):
        taken = 0

        def losses(self, batch: Batch, values: Mapping[str, float]) -> dict[str, Tensor]:
            samples = len(batch.global_VSHW) // 2
            held.append((samples, len(stub.optimizer.state)))
            self.taken = GIB + samples * GIB // 2 + (2 * GIB if stub.optimizer.state else 0)
            if self.taken >= 5 * GIB:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 512.00 MiB")
            return super().losses(batch, values)

    held: list[tuple[int, int]] = []
    hungry = Hungry()
    monkeypatch.setattr(memory, "memory_limit", lambda _: 5 * GIB)
    monkeypatch.setattr(memory, "_reset_peak", lambda _: True)
    monkeypatch.setattr(memory, "_read_peak", lambda _: hungry.taken)
    stub = trainer(None, objective=hungry, batches=lambda step: itertools.repeat(slices(0, 0, 8)))
    with pytest.raises(ResourceError) as caught:
        stub.fit()
    assert held == [(8, 0), (1, 0), (2, 0)]
    assert caught.value.fix.startswith("train.batch_size_per_gpu=4 train.grad_accumulation=2 would take peak 3.00 GiB")
