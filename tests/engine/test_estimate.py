"""What a dry run says: arithmetic by hand, and a real trainer of the stub."""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from engine_stub import slices, trainer

from medssl_cli.core.protocols import SliceBatch
from medssl_cli.core.run import to_json
from medssl_cli.engine import estimate as module
from medssl_cli.engine.estimate import Estimate, estimate, loader_images_per_s
from medssl_cli.engine.memory import GIB, MemoryReport, first_samples

BY_HAND = Estimate(
    step_images_per_s=20.0,
    loader_images_per_s=50.0,
    steps=9000,
    samples_per_step=16,
    batch=8,
    memory=MemoryReport(4.0, 16.0),
    cases=400,
    cache_bytes=2_500_000_000,
    workers=2,
    predicted_gib={4: 2.5, 8: 4.0, 16: 7.0, 32: 13.0},
    largest_batch=38,
    first_losses={"dino": 8.0, "ibot": 8.25},
)


def test_the_lines_by_hand() -> None:
    assert BY_HAND.lines() == [
        "20.00 images/s: 9000 steps of 16 samples take about 2.00 h",
        "the loader alone gives 50.0 images/s with 2 processes, 2.5 times what the step takes: the step sets the pace",
        "memory peak 4.00 GiB of 16.00 GiB at batch 8; predicted GiB at batch 4: 2.50, 16: 7.00, 32: 13.00; "
        "up to batch 38 should fit",
        "cache about 2500.0 MB for 400 cases",
        "first loss 16.250; nothing was written",
    ]


def test_a_slow_loader_sets_the_pace_and_the_hours() -> None:
    slow = replace(BY_HAND, loader_images_per_s=5.0)
    assert slow.pace == "loader"
    assert slow.hours == pytest.approx(8.0)
    assert "0.25 of what the step could take" in slow.lines()[1]
    assert "train.num_workers" in slow.lines()[1]


def test_what_was_not_measured_is_left_out() -> None:
    bare = replace(
        BY_HAND, loader_images_per_s=None, memory=MemoryReport(None, None), predicted_gib={}, largest_batch=None
    )
    assert bare.lines()[1] == "memory peak unknown at batch 8"
    assert bare.facts()["pace"] is None
    assert bare.facts()["fits"] is None
    assert bare.hours == pytest.approx(2.0)


def test_the_facts_are_strict_json() -> None:
    facts = json.loads(to_json(BY_HAND.facts()))
    assert facts["hours"] == pytest.approx(2.0)
    assert facts["predicted_memory_gib"] == {"4": 2.5, "8": 4.0, "16": 7.0, "32": 13.0}
    assert facts["fits"] is True
    assert facts["cache_bytes"] == 2_500_000_000


# --- measuring -------------------------------------------------------------------------------------------------------


def paced(seconds: float, size: int = 4) -> Iterator[SliceBatch]:
    for step in itertools.count():
        time.sleep(seconds)
        yield slices(step, 0, size)


def test_a_loader_is_measured_after_what_it_had_ready() -> None:
    def with_queue() -> Iterator[SliceBatch]:
        yield from (slices(step, 0, 4) for step in range(5))
        yield from paced(0.02)

    assert loader_images_per_s(with_queue(), skip=5, count=6) == pytest.approx(200, rel=0.3)


def test_a_slow_loader_is_stopped_in_time() -> None:
    started = time.perf_counter()
    assert loader_images_per_s(paced(0.05), skip=1, count=1000, seconds=0.2) == pytest.approx(80, rel=0.3)
    assert time.perf_counter() - started < 1
    assert loader_images_per_s(iter([slices(0, 0, 4)]), skip=1) is None


def test_a_smaller_batch_is_the_first_samples() -> None:
    whole = replace(slices(0, 0, 4), roi_BHW=torch.arange(64).view(4, 4, 4) % 2 == 0)
    fewer = first_samples(whole, 2)
    assert torch.equal(fewer.images_BSHW, whole.images_BSHW[:2])
    assert torch.equal(fewer.roi_BHW, whole.roi_BHW[:2])  # type: ignore[arg-type, index]
    assert fewer.case_ids == whole.case_ids[:2]
    assert len(fewer.sizes_B2) == len(fewer.available_BS) == 2
    assert first_samples(slices(0, 0, 4), 1).roi_BHW is None
    for samples in (0, 5):
        with pytest.raises(ValueError, match=f"{samples} samples of a batch of 4"):
            first_samples(whole, samples)


def test_a_trainer_is_estimated() -> None:
    stub = trainer(None, steps=20)
    found = estimate(stub, batch=4, samples_per_step=4, steps=20, cases=10, cache_bytes=1000, workers=0)
    assert found.steps == 20
    assert found.step_images_per_s > 4
    assert found.loader_images_per_s is not None
    assert set(found.first_losses) == {"dino", "koleo"}
    assert found.hours == pytest.approx(80 / found.images_per_s / 3600)
    assert stub.steps_done == 0
    if sys.platform.startswith("linux"):
        assert found.memory.peak_gib is not None
        assert 0.05 < found.memory.peak_gib < 64
        assert set(found.predicted_gib) == {2, 4, 8, 16}


def test_the_prediction_is_the_line_through_two_batches() -> None:
    peaks = {4: 3 * GIB, 8: 5 * GIB}
    assert module._predicted(peaks, 8) == {4: 3.0, 8: 5.0, 16: 9.0, 32: 17.0}
    assert module._largest(peaks, 20 * GIB) == 36  # 1 GiB and half a GiB a sample; 95 % of 20 are 19
    assert module._largest(peaks, None) is None
    assert module._predicted({8: 5 * GIB}, 8) == {}
    assert module._largest({8: 5 * GIB}, 20 * GIB) is None


def test_after_a_long_first_step_no_more_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    stub = trainer(None, steps=20)
    monkeypatch.setattr(module, "LONG_STEP_SECONDS", 0.0)
    assert [fit.steps for fit in module._timed(stub)] == [1]
    monkeypatch.setattr(module, "LONG_STEP_SECONDS", 10.0)
    assert [fit.steps for fit in module._timed(stub)] == [1, 3]


def test_the_loaders_of_all_processes_are_compared_with_the_step_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step's images are those of all processes; a loader gives those of its own."""
    monkeypatch.setattr(module, "loader_images_per_s", lambda *_, **__: 50.0)
    monkeypatch.setattr(module, "world_size", lambda: 4)
    found = estimate(
        trainer(None, steps=20), batch=4, samples_per_step=16, steps=20, cases=10, cache_bytes=1, workers=3
    )
    assert found.loader_images_per_s == 200.0
    assert "the loader alone gives 200.0 images/s with 12 processes" in found.lines()[1]
