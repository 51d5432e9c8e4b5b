"""``scripts/bench.py``: every benchmark runs at the reduced size and prints one strict JSON document."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from medssl_cli.models.attention import set_backend
from medssl_cli.services.build import build_objective

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
NAMES = ("startup", "loader", "views", "step", "pretrain")
HEADER = {"schema_version", "medssl_version", "command", "started_at", "elapsed_s"}


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    """The script as a module; it finds its benchmarks beside itself."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        import bench

        yield bench
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.fixture
def document(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """A function that runs the script and reads what it printed."""

    def run(*words: str) -> dict[str, Any]:
        assert bench.main([*words, "--tiny", "--json", "--device", "cpu"]) == 0
        return json.loads(capsys.readouterr().out, parse_constant=refuse)

    return run


def refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not strict JSON")


def options(bench: ModuleType, *words: str) -> Any:
    return bench.read_options(["step", "--device", "cpu", *words])[2]


@pytest.mark.parametrize("name", NAMES)
def test_each_benchmark_prints_one_strict_json_document(name: str, document: Callable[..., dict[str, Any]]) -> None:
    found = document(name, "--repeat", "1")
    assert found.keys() >= HEADER | {"machine", "versions", "precision", "sizes", "rows", "ratios", "marks"}
    assert found["command"] == f"bench {name}"
    assert found["machine"]["cpu"]
    assert found["versions"]["torch"] == torch.__version__
    assert {"cuda", "xformers"} <= found["versions"].keys()
    times = [row["wall_ms"] for row in found["rows"]]
    assert len(times) > 1
    assert min(times) > 0
    assert found["ratios"]
    assert all(math.isfinite(ratio) and ratio > 0 for ratio in found["ratios"].values())
    assert {mark["reached"] for mark in found["marks"]} <= {None}, "the reduced size judges nothing"


def test_help_loads_nothing_heavy(document: Callable[..., dict[str, Any]]) -> None:
    sizes = document("startup", "--repeat", "1")["sizes"]
    assert sizes["modules"] > 50
    assert sizes["heavy_modules"] == []


def test_step_compares_the_kernels_and_takes_several_batches(document: Callable[..., dict[str, Any]]) -> None:
    rows = document("step", "--repeat", "1", "--batch", "2", "3", "--attention", "sdpa", "--precision", "bf16")["rows"]
    assert [(row["batch"], row["what"]) for row in rows] == [
        (batch, what) for batch in (2, 3) for what in ("sdpa, packed", "plain, one forward a size")
    ]
    for row in rows:
        assert row["samples_per_s"] == pytest.approx(1e3 * row["batch"] / row["wall_ms"])


def test_workers_are_compared_with_the_step_on_ready_views(document: Callable[..., dict[str, Any]]) -> None:
    rows = document("pretrain", "--repeat", "2", "--workers", "0")["rows"]
    assert [row["what"] for row in rows] == ["views without rc", "views", "pipeline, 0 workers"]
    assert rows[2]["of_synthetic_rate"] == pytest.approx(rows[2]["synthetic_ms"] / rows[2]["wall_ms"])
    assert 0 < rows[2]["data_wait_share"] < 1


def test_parts_are_measured_in_turns_after_the_warm_up(bench: ModuleType) -> None:
    from benchmarks.measuring import measure

    calls: list[str] = []
    timings = measure({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3, warmup=2)
    assert calls == ["a", "b"] * 5
    assert [len(timings[name].wall) for name in "ab"] == [3, 3]


def test_a_row_is_the_median_of_a_unit(bench: ModuleType) -> None:
    from benchmarks.measuring import Timing

    row = Timing(wall=[0.4, 0.1, 0.2], cpu=[0.06, 0.02, 0.04]).row("two units", per=2)
    assert row == {"what": "two units", "wall_ms": 100.0, "cpu_ms": 20.0, "fastest_ms": 50.0}


def test_processor_time_of_children_is_counted(bench: ModuleType) -> None:
    from benchmarks.measuring import measure
    from benchmarks.startup import run_python

    timing = measure({"": lambda: run_python("-c", "sum(range(2_000_000))")}, 1, warmup=0)[""]
    assert timing.cpu[0] > 0.02


@pytest.mark.parametrize(
    ("value", "limit", "at_least", "reached"),
    [(1.9, 2, False, True), (2.1, 2, False, False), (26, 25, True, True), (24, 25, True, False), (None, 1, True, None)],
)
def test_marks_are_judged(
    bench: ModuleType, value: float | None, limit: float, at_least: bool, reached: bool | None
) -> None:
    from benchmarks.measuring import Mark

    mark = Mark("m", value, limit, at_least)
    assert bench.judged([mark], tiny=False)[0]["reached"] is reached
    assert bench.judged([mark], tiny=True)[0]["reached"] is None


def test_work_of_a_sample_is_that_of_the_anchor(bench: ModuleType) -> None:
    from benchmarks.recipe import pretrain_config, tflop_per_sample

    assert tflop_per_sample(pretrain_config(options(bench), 8)) == pytest.approx(2.04, abs=0.005)


def test_work_of_a_sample_is_what_torch_counts(bench: ModuleType) -> None:
    from benchmarks.recipe import SEQUENCES, pretrain_config, random_slices, tflop_per_sample

    from medssl_cli.services.build import build_views

    config = pretrain_config(options(bench, "--tiny"), 2, "student.drop_path_rate=0")
    objective, _ = build_objective(config, SEQUENCES, torch.device("cpu"), None)
    batch = build_views(config, len(SEQUENCES))(random_slices(config, torch.device("cpu")), 0)
    set_backend("plain")  # torch counts matrix products
    try:
        with FlopCounterMode(display=False) as counter:
            with torch.no_grad():
                objective.teacher["backbone"](batch.global_VSHW)
            features = objective.student["backbone"].forward_list(
                [batch.global_VSHW, batch.local_VSHW], [None, None], [None, None]
            )
            sum(f.cls_BD.sum() + f.patches_BND.sum() for f in features).backward()
    finally:
        set_backend(None)
    counts = counter.get_flop_counts()["Global"]
    products = sum(count for operator, count in counts.items() if "convolution" not in str(operator))
    assert tflop_per_sample(config) == pytest.approx(
        products / 2 / 1e12, rel=1e-4
    )  # the rest: positions, resized by small matrices


def test_the_table_tells_what_cannot_be_judged(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["views", "--tiny", "--device", "cpu", "--repeat", "1"]) == 0
    text = capsys.readouterr().out
    assert "crops, blur, gamma, rc; one core" in text
    assert "mark ≤ 150 ms a sample, rc, one core" in text
    assert "not judged here" in text


def test_an_absent_device_is_said_in_three_lines(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["step", "--tiny", "--device", "cuda:99"]) == 6
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: The device cuda:99 is absent.")
    assert "fix:" in printed.err


@pytest.mark.slow
@pytest.mark.parametrize("words", [["views"], ["step", "--compile"]], ids=" ".join)
def test_the_script_runs_from_anywhere(tmp_path: Path, words: list[str]) -> None:
    if "--compile" in words and shutil.which("g++") is None:
        pytest.skip("torch.compile needs g++")
    script = [sys.executable, str(SCRIPTS / "bench.py"), *words, "--device", "cpu"]
    answer = subprocess.run(
        [*script, "--tiny", "--json", "--repeat", "1"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    found = json.loads(answer.stdout, parse_constant=refuse)
    assert found["command"] == f"bench {words[0]}"
    assert found["sizes"].get("compiled_blocks", False) is ("--compile" in words)
    assert list(tmp_path.iterdir()) == []
