"""The page of a run: what lies in the folder, escaped, and readable whatever is missing."""

from __future__ import annotations

import json
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from medssl_cli.report.run_page import write_run_page

EVIL = "<script>alert('x')</script>\"&"
ALARM = {
    "step": 300, "name": "effective_rank", "value": 1.31, "threshold": 2.0, "side": "below", "is_collapse": True,
    "meaning": "all images have nearly the same features", "fix": "lower optim.base_lr",
}  # fmt: skip


class Reader(HTMLParser):
    """Tags, text and the cells of each table."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def history(count: int = 3) -> list[dict[str, Any]]:
    return [
        {"iteration": 100 * i, "metric": "linear_mcc", "value": 0.1 * i, "linear_mcc": 0.1 * i, "knn_mcc": 0.05 * i,
         "linear_binary_auc": 0.5 + 0.01 * i, "linear_multiclass_auc": 0.5, "is_best": i == 2, "seconds": 1.0}
        for i in range(count)
    ]  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    for name in ("checkpoints/step_0000200", "eval/best", "eval/step_0000200", "export"):
        (folder / name).mkdir(parents=True)
    record = {
        "status": "running", "recipe": "demo", "step": 200, "total_steps": 400, "n_cases": 12, "device": "cpu",
        "command_line": ["/home/somebody/bin/medssl", "pretrain", "--data", "my data", "--out", "runs/demo"],
        "versions": {"torch": "2.13"}, "git": {"commit": "abcdef0123456789", "dirty": True},
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(record))
    line = {"iteration": 200, "total_loss": 8.25, "eta_s": 90.0, "effective_rank": 17.5, "grad_norm_backbone": 1.5}
    (folder / "training_metrics.jsonl").write_text(json.dumps(line) + "\n" + '{"iteration": 21')
    (folder / "eval/history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in history()))
    results = {
        "step": 200, "metric": "mcc", "probe": "linear", "value": 0.2, "classes": ["benign", "cancer"],
        "n_cases": {"train": {"benign": 5, "cancer": 4}, "val": {"benign": 2, "cancer": 2}},
        "split": {"division": "70 to 30 by patient_id, seed 42"}, "seen_in_pretraining": 7,
    }  # fmt: skip
    for name in ("best", "step_0000200"):
        (folder / f"eval/{name}/results.json").write_text(json.dumps(results))
    (folder / "config.yaml").write_text("student: {arch: vit_tiny, patch_size: 8}\ntrain: {seed: 3}\n")
    (folder / "checkpoints/step_0000200/model.safetensors").write_bytes(bytes(2_000_000))
    (folder / "export/teacher_backbone.safetensors").write_bytes(b"x")
    (folder / "progress.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return folder


def test_the_page_tells_how_the_run_stands(run: Path) -> None:
    page = Reader(write_run_page(run, [ALARM]).read_text(encoding="utf-8"))
    for words in (
        "Pretraining demo", "step 200 of 400, on cpu", "running", "50 % of 400 steps", "0:01:30",
        "medssl pretrain --data 'my data' --out runs/demo",
        "collapse? effective_rank 1.31 below 2", "lower optim.base_lr",
        "total loss 8.25", "effective rank 17.5", "gradient norm, backbone 1.5",
        "best linear mcc 0.2 at step 200", "benign, cancer", "9 train, 4 val", "70 to 30 by patient_id",
        "7 of them are seen in pretraining",
        "checkpoints/step_0000200 2", "medssl infer CASE --model",
        "backbone vit_tiny", "All 3 keys", "train.seed 3", "torch 2.13", "abcdef012345, changed",
    ):  # fmt: skip
        assert words in page.text, words
    assert "somebody" not in page.text
    assert "multiclass auc" not in page.text  # two classes: one area says it all


def test_r15_every_text_is_escaped_and_nothing_is_fetched(run: Path) -> None:
    record = {
        "status": EVIL, "recipe": EVIL, "device": EVIL, "reason": EVIL, "command_line": ["medssl", EVIL],
        "versions": {EVIL: EVIL}, "git": {"commit": EVIL}, "platform": EVIL, "step": 200, "data_digest": EVIL,
    }  # fmt: skip
    (run / "run.json").write_text(json.dumps(record))
    line = {"iteration": 200, EVIL: 1.0, f"grad_norm_{EVIL}": 2.0}
    (run / "training_metrics.jsonl").write_text(json.dumps(line) + "\n")
    rows = [{"iteration": 200, "metric": f"linear_{EVIL}", "value": 0.2, f"linear_{EVIL}": 0.2, "is_best": True}]
    (run / "eval/history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    results = {
        "metric": EVIL,
        "probe": EVIL,
        "value": EVIL,
        "step": EVIL,
        "classes": [EVIL],
        "split": {"division": EVIL},
    }
    for name in ("best", "step_0000200"):
        (run / f"eval/{name}/results.json").write_text(json.dumps(results))
    (run / "config.yaml").write_text(json.dumps({EVIL: {EVIL: EVIL}, "student": {"arch": EVIL}}))
    (run / "checkpoints/step_<b>x").mkdir()
    text = write_run_page(run, [{**ALARM, "name": EVIL, "meaning": EVIL, "fix": EVIL, "side": EVIL}]).read_text()
    page = Reader(text)
    assert "script" not in page.tags
    assert "b" not in page.tags
    assert page.text.count("<script>alert('x')</script>") > 15
    assert "default-src 'none'" in text
    assert all(re.match(r"#|data:", source) for source in page.sources)


def test_a_run_that_has_just_begun_has_a_page_too(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    page = Reader(write_run_page(tmp_path / "run").read_text())
    assert "run.json does not tell how the run stands" in page.text
    assert "No alarm was raised" in page.text
    assert "Scores" not in page.text


def test_damaged_files_are_said_to_be(run: Path) -> None:
    (run / "run.json").write_text("{")
    (run / "config.yaml").write_text("a: [")
    (run / "eval/best/results.json").write_text("nonsense")
    page = Reader(write_run_page(run).read_text())
    for name in ("run.json", "config.yaml", "eval/best/results.json"):
        assert f"could not be read. {name}" in page.text
    assert "total loss 8.25" in page.text


@pytest.mark.parametrize(("status", "word"), [("finished", "is finished"), ("failed", "ended with an error")])
def test_a_run_that_ended_says_how(run: Path, status: str, word: str) -> None:
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "status": status, "reason": "the disk was full"}))
    page = Reader(write_run_page(run).read_text())
    assert word in page.text
    assert "the disk was full" in page.text
    assert ("goes on from the newest checkpoint" in page.text) == (status != "finished")


def test_the_scores_of_the_test_part_are_shown_when_there_are_any(run: Path) -> None:
    (run / "eval/final").mkdir()
    test = {"n": 6, "probes": {"linear": {"mcc": 0.625, "binary_auc": 0.875}}}
    (run / "eval/final/results.json").write_text(json.dumps({"metric": "mcc", "scores": {"test": test}}))
    page = Reader(write_run_page(run).read_text())
    assert "scored once at the end: 6" in page.text
    assert "linear 0.625 0.875" in page.text


def test_a_long_run_has_a_short_page_made_in_half_a_second(run: Path) -> None:
    line = json.loads((run / "training_metrics.jsonl").read_text().splitlines()[0])
    with (run / "training_metrics.jsonl").open("w") as file:
        file.writelines(json.dumps({**line, "iteration": i}) + "\n" for i in range(12_500))
    (run / "eval/history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in history(400)))
    started = time.perf_counter()
    text = write_run_page(run).read_text()
    assert time.perf_counter() - started < 2.0  # 0.1 s on an idle core
    assert len(text) < 100_000
    assert "368 lines left out" in text
    assert ">200<" in text  # a step that was best stays
