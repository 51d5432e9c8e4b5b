"""``scripts/bench.py``: every benchmark runs at the reduced size and prints one strict JSON document."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from medssl_cli.engine.precision import Precision
from medssl_cli.models.attention import set_backend
from medssl_cli.services.build import build_objective

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
NAMES = ("startup", "loader", "views", "step", "pretrain", "extract", "head", "segment")
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


@pytest.mark.parametrize("name", [*NAMES, pytest.param("infer", marks=pytest.mark.slow)])
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


def test_tricks_are_left_out_one_at_a_time(document: Callable[..., dict[str, Any]]) -> None:
    found = document("step", "--tricks", "--repeat", "1", "--batch", "2", "--precision", "bf16")
    rows = {row["what"]: row for row in found["rows"]}
    own = rows["medssl"]
    assert own["against_medssl"] == 1
    for what in ("all tokens through the last block", "one pass for each crop size", "in fp32"):
        assert rows[what]["against_medssl"] == pytest.approx(rows[what]["cpu_ms"] / own["cpu_ms"])
        assert rows[what]["kept_gib"] > own["kept_gib"], "each of these keeps more for the backward pass"
    assert rows["activation checkpointing"]["kept_gib"] < own["kept_gib"]
    assert {"clipping, one by one", "moving average, together", "AdamW, fused", "attention plain"} <= rows.keys()


def test_a_switched_step_gives_the_same_numbers(bench: ModuleType) -> None:
    """The plain restatement is the same training: equal losses and parameters after two steps, to rounding."""
    from benchmarks.recipe import build_trainer, pretrain_config
    from benchmarks.ways import Switch, Way

    found = []
    for way in (
        Way(),
        Way(packed=False, needed=False, together=False, fused=False, kernel="plain"),
        Way(checkpointing=True),
    ):
        given = options(bench, "--tiny")
        config = pretrain_config(given, 2, "student.drop_path_rate=0", "optim.clip_grad=0.01")
        trainer = build_trainer(config, given)
        groups = [{**group, "foreach": True, "fused": False} for group in trainer.optimizer.param_groups]
        switch = Switch(trainer, torch.optim.AdamW(groups, lr=0.0))
        switch.take(way)
        source = trainer.batches(0)
        losses = [trainer.step(source).losses for _ in range(2)]
        switch.restore()
        found.append((losses, [parameter.detach().clone() for parameter in trainer.objective.parameters()]))
    for losses, parameters in found[1:]:
        assert losses == [pytest.approx(each, rel=1e-5) for each in found[0][0]]
        torch.testing.assert_close(parameters, found[0][1], rtol=1e-5, atol=1e-6)


def test_a_switch_leaves_nothing_behind(bench: ModuleType) -> None:
    from benchmarks.recipe import build_trainer, pretrain_config
    from benchmarks.ways import SLOT, Switch, Way

    from medssl_cli.engine import trainer as trainer_module
    from medssl_cli.engine.optim import clip_gradients

    given = options(bench, "--tiny")
    trainer = build_trainer(pretrain_config(given, 2), given)
    names = lambda: [set(vars(module)) - {SLOT} for module in trainer.objective.modules()]  # noqa: E731
    before = names()
    switch = Switch(trainer)
    switch.take(Way(packed=False, needed=False, together=False, checkpointing=True, precision="bf16", kernel="plain"))
    assert trainer.precision.name == "bf16"
    with pytest.raises(ValueError, match="one optimizer"):
        switch.take(Way(fused=False))
    switch.restore()
    assert names() == before
    assert trainer_module.clip_gradients is clip_gradients
    assert trainer.precision.name == "fp32"


def test_what_is_kept_for_the_backward_pass_is_counted_once(bench: ModuleType) -> None:
    from benchmarks.ways import kept_gib

    class Square(torch.nn.Module):
        dino_center = ibot_center = None

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1000))

        def losses(self, batch: torch.Tensor, values: object) -> dict[str, torch.Tensor]:
            scaled = batch * self.weight  # keeps the batch; the weight is a parameter
            return {"loss": (scaled * scaled).sum()}  # keeps the product, twice the same

    class Trainer:
        objective = Square()
        precision = Precision("fp32", torch.device("cpu"))

        def batches(self, step: int) -> Iterator[torch.Tensor]:
            return iter([torch.ones(1000)])

        def views(self, slices: torch.Tensor, step: int, micro: int) -> torch.Tensor:
            return slices

        schedules = SimpleNamespace(at=lambda step: {})

    assert kept_gib(Trainer()) == pytest.approx(8000 / 2**30)  # type: ignore[arg-type]


def test_the_trial_sees_the_tokens_of_the_recipe(bench: ModuleType) -> None:
    from benchmarks.recipe import pretrain_config
    from benchmarks.tricks import packed_groups

    assert packed_groups(pretrain_config(options(bench), 8)) == ((16, 769), (64, 193))
    assert packed_groups(pretrain_config(options(bench), 2, "crops.local_crops_number=0")) == ((4, 769),)


def test_colours_of_a_plain_picture_are_measured_beside_random_convolution(
    document: Callable[..., dict[str, Any]],
) -> None:
    found = document("views", "--repeat", "1")
    assert [row["what"] for row in found["rows"]][2:] == [
        "crops, blur, gamma, rc; one core",
        "crops, blur, colour jitter, grey, solarise; one core",
    ]
    assert len(found["ratios"]) == 2


# --- all of them on a GPU --------------------------------------------------------------------------------------------


def test_the_survey_asks_for_every_mark_of_a_gpu(bench: ModuleType) -> None:
    from benchmarks.step import STEP_MARKS
    from benchmarks.survey import plan

    asked: set[tuple[str, str, int]] = set()
    for job in plan("cuda", tiny=False):
        name, _, given = bench.read_options([*job.words, "--device", "cpu"])  # every word is known
        assert name == job.words[0]
        if name == "step":
            asked |= {(given.arch, given.precision, batch) for batch in given.batch}
        if name == "extract":
            asked |= {("extract", given.precision, batch) for batch in given.batch}
    assert asked >= STEP_MARKS.keys() | {("extract", "bf16", 256)}
    assert {("vit_base", "fp16", 8), ("vit_base", "bf16", 64), ("vit_large", "bf16", 32)} <= asked


def test_a_failed_benchmark_is_told_and_the_others_go_on(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks import survey

    jobs = [survey.Job("broken", ("step", "--device", "cuda:99")), survey.Job("whole", ("startup",))]
    document = {
        "command": "bench startup",
        "started_at": "2026-01-02T03:04:05",
        "precision": "fp32",
        "sizes": {},
        "machine": {"gpu": None, "cpu": "a CPU", "cores": 2},
        "versions": {"torch": "9.9", "cuda": None},
        "rows": [{"what": "help | text", "wall_ms": 12.345, "none": None}],
        "marks": [{"mark": "s", "value": 0.1, "limit": 0.35, "at_least": False, "reached": True}],
    }

    def answer(command: list[str], **_: object) -> SimpleNamespace:
        if "startup" in command:
            return SimpleNamespace(returncode=0, stdout=json.dumps(document), stderr="")
        return SimpleNamespace(returncode=6, stdout="", stderr="error: The device cuda:99 is absent.\n  fix: none")

    monkeypatch.setattr(survey, "plan", lambda *_, **__: jobs)
    monkeypatch.setattr(subprocess, "run", answer)
    assert survey.main([str(tmp_path / "out")]) == 1
    assert "failed: error: The device cuda:99 is absent." in capsys.readouterr().out
    written = json.loads((tmp_path / "out/results.json").read_text())["results"]
    assert ["failed" in result for result in written] == [True, False]
    text = (tmp_path / "out/results.md").read_text()
    assert "| help / text | 12.35 |" in text
    assert "error: The device cuda:99 is absent." in text
    assert "| bench startup, fp32: s ≤ 0.35 | 0.1 | reached |" in text


def test_of_several_runs_a_mark_takes_the_best(bench: ModuleType) -> None:
    from benchmarks.survey import _marks

    def document(rate: float | None, gib: float | None) -> dict[str, Any]:
        return {
            "command": "bench step",
            "precision": "bf16",
            "sizes": {"arch": "vit_base"},
            "marks": [
                {"mark": "rate", "value": rate, "limit": 230, "at_least": True, "reached": rate and rate >= 230},
                {"mark": "GiB", "value": gib, "limit": 26, "at_least": False, "reached": gib and gib <= 26},
            ],
        }

    text = _marks([document(None, None), document(240.0, 30.0), document(200.0, 25.0)])
    assert "| bench step, vit_base, bf16: rate ≥ 230 | 240 | reached |" in text
    assert "| bench step, vit_base, bf16: GiB ≤ 26 | 25 | reached |" in text


@pytest.mark.slow
def test_one_command_measures_all_and_writes_two_files(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPTS / "bench_gpu"), str(tmp_path / "out"), "--device", "cpu", "--tiny"]
    answer = subprocess.run([*command, "--repeat", "1"], capture_output=True, text=True, check=True)
    results = json.loads((tmp_path / "out/results.json").read_text(), parse_constant=refuse)["results"]
    assert [result["title"] for result in results] == ["startup", "step, fp32", "tricks, bf16"]
    assert all(result["document"]["tiny"] for result in results)
    assert "[3/3] tricks, bf16" in answer.stdout
    page = (tmp_path / "out/results.md").read_text()
    assert "### tricks, bf16" in page
    assert "restated plainly" in page


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
    objective = build_objective(config, SEQUENCES, torch.device("cpu"), None)
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
