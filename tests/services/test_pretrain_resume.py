"""The real program killed, interrupted and resumed: to the bit the run that nobody disturbed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

SLOW = ("train.OFFICIAL_EPOCH_LENGTH=10", "train.checkpoint_period_iterations=5")
"""Twenty steps with a checkpoint every five."""

START = """
import os, signal, sys, threading, time
from pathlib import Path

def watch(run, name, number, group):
    while not (run / "checkpoints" / name / "state.json").exists():
        time.sleep(0.002)
    (os.killpg if group else os.kill)(os.getpid(), number)

run, name, number, group = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4] == "group"
if number:
    threading.Thread(target=watch, args=(run, name, number, group), daemon=True).start()
sys.argv = ["medssl", *sys.argv[5:]]
from medssl_cli.app import main
main()
"""
"""The program with a thread that sends a signal to it, or to its whole group, as soon as a checkpoint is whole."""

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tiny_recipe: Path, prostate_tree: Path, prepared_cache: Path) -> Iterator[Start]:
    """Start `medssl pretrain` on a run folder; with `sent` it gets that signal after checkpoint 10."""
    started: list[subprocess.Popen[str]] = []

    def run(out: Path, *words: object, sent: int = 0, group: bool = False) -> subprocess.Popen[str]:
        options = ("--config", tiny_recipe, "--data", prostate_tree, "--cache", prepared_cache, "--device", "cpu")
        command = ["pretrain", *options, "--out", out, *SLOW, *words]
        whom = "group" if group else "self"
        process = subprocess.Popen(
            [sys.executable, "-c", START, *map(str, (out, "step_0000010", int(sent), whom, *command))],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        if process.poll() is None:  # its test failed; the loader's workers are of its group
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, tiny_recipe: Path, prostate_tree: Path, prepared_cache: Path
) -> Path:
    """Twenty steps in one go."""
    out = tmp_path_factory.mktemp("straight") / "run"
    words = ("--config", tiny_recipe, "--data", prostate_tree, "--cache", prepared_cache, "--device", "cpu")
    command = [sys.executable, "-m", "medssl_cli", "pretrain", *map(str, words), "--out", str(out), *SLOW]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert answer.returncode == 0, answer.stderr
    return out


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, stderr = process.communicate(timeout=120)
    return process.returncode, stderr


def record_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "run.json").read_text())


def same_to_the_bit(run: Path, other: Path) -> None:
    """Every tensor of student, teacher, centres and optimizer, the export, and every logged loss and schedule."""
    for name in ("model", "optimizer"):
        ours = load_file(run / f"checkpoints/last/{name}.safetensors")
        theirs = load_file(other / f"checkpoints/last/{name}.safetensors")
        assert ours.keys() == theirs.keys()
        different = [key for key in ours if not torch.equal(ours[key], theirs[key])]
        assert not different
    names = {name.partition(".")[0] for name in load_file(run / "checkpoints/last/model.safetensors")}
    assert {"student", "teacher", "dino_center", "ibot_center"} <= names
    export = "export/teacher_backbone.safetensors"
    assert (run / export).read_bytes() == (other / export).read_bytes()
    measured = {"iter_time", "data_time", "data_wait_percent", "eta_s", "images_per_s", "memory_gib"}
    lines = [
        [
            {key: value for key, value in json.loads(text).items() if key not in measured}
            for text in (folder / "training_metrics.jsonl").read_text().splitlines()
        ]
        for folder in (run, other)
    ]
    assert len(lines[0]) == 20
    assert lines[0] == lines[1]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_r01_killed_and_resumed_is_the_undisturbed_run(
    start: Start, undisturbed: Path, tmp_path: Path, workers: int
) -> None:
    out = tmp_path / "run"
    code, stderr = finish(start(out, "--workers", workers, sent=signal.SIGKILL))
    assert code == -signal.SIGKILL, stderr
    killed = record_of(out)
    assert killed["status"] == "running"
    assert not (out / "export").exists()
    code, stderr = finish(start(out, "--workers", workers))
    assert code == 0, stderr
    assert "Resuming after step 1" in stderr  # 10, or 15 if the kill came late
    assert record_of(out)["status"] == "finished"
    same_to_the_bit(out, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "workers", "group"),
    [(signal.SIGTERM, 0, False), (signal.SIGTERM, 2, False), (signal.SIGTERM, 2, True), (signal.SIGUSR1, 2, True)],
)
def test_r01_a_signal_saves_and_the_same_command_goes_on(
    start: Start, undisturbed: Path, tmp_path: Path, number: signal.Signals, workers: int, group: bool
) -> None:
    out = tmp_path / "run"
    code, stderr = finish(start(out, "--workers", workers, sent=number, group=group))
    assert code == 75, stderr
    assert f"error: {number.name} came after step" in stderr
    stopped = record_of(out)
    assert stopped["status"] == "interrupted"
    assert 10 <= stopped["step"] < 20
    assert (out / "checkpoints/last").resolve().name == f"step_{stopped['step']:07d}"
    code, stderr = finish(start(out, "--workers", workers))
    assert code == 0, stderr
    assert f"Resuming after step {stopped['step']}" in stderr
    same_to_the_bit(out, undisturbed)


@pytest.mark.slow
def test_r17_of_two_processes_on_one_run_the_second_is_refused(start: Start, tmp_path: Path) -> None:
    out = tmp_path / "run"
    first = start(out, "optim.epochs=1000")
    until(lambda: (out / "checkpoints/last").exists(), first)
    code, stderr = finish(start(out, "optim.epochs=1000"))
    assert code == 2, stderr
    assert f"process {first.pid}" in stderr
    first.send_signal(signal.SIGTERM)
    code, stderr = finish(first)
    assert code == 75, stderr
    rows = [json.loads(line)["iteration"] for line in (out / "training_metrics.jsonl").read_text().splitlines()]
    assert rows == list(range(1, record_of(out)["step"] + 1))


@pytest.mark.slow
def test_r19_a_killed_loader_worker_ends_the_run_and_is_named(start: Start, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(out, "--workers", 1, "optim.epochs=1000")
    until(lambda: (out / "checkpoints/last").exists(), process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 1
    os.kill(int(children[0]), signal.SIGKILL)
    code, stderr = finish(process)
    assert code == 6, stderr
    assert "Loader worker 0 died (killed by SIGKILL)" in stderr
    assert "at case PT-" in stderr
    assert record_of(out)["status"] == "failed"


@pytest.mark.slow
def test_r19_a_stopped_loader_worker_ends_the_run_within_the_time_out(start: Start, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(out, "--workers", 1, "optim.epochs=1000", "train.loader_timeout_s=2")
    until(lambda: (out / "checkpoints/last").exists(), process)
    (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(child), signal.SIGSTOP)
    stopped = time.monotonic()
    code, stderr = finish(process)
    assert code == 6, stderr
    assert time.monotonic() - stopped < 20
    assert "Loader worker 0 gave nothing for 2 s" in stderr
    assert "at case PT-" in stderr


@pytest.mark.slow
def test_r03_a_full_disk_names_path_and_bytes_and_costs_nothing(
    tiny_recipe: Path, prostate_tree: Path, prepared_cache: Path, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = ("unshare", "-m", "sh", "-c", f'mount -t tmpfs -o size=3000k none {disk} && exec "$@"', "sh")
    if subprocess.run([*mounted, "true"], capture_output=True, check=False).returncode:
        pytest.skip("mounting a small tmpfs is not permitted here")
    words = ("--config", tiny_recipe, "--data", prostate_tree, "--cache", prepared_cache, "--device", "cpu")
    command = ["pretrain", *words, "--out", disk / "run", "optim.epochs=20", "train.tensorboard=false"]
    script = f"{sys.executable} -m medssl_cli {' '.join(map(str, command))}; echo code $?; cd {disk}/run; "
    script += "cat run.json; for d in checkpoints/step_*; do echo; echo $d; ls $d | wc -l; done; ls -a checkpoints"
    answer = subprocess.run([*mounted, "sh", "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert "code 6" in answer.stdout, answer.stdout + answer.stderr
    assert re.search(rf"where: {disk}/run/\S+: No space left on device, [\d,]+ bytes (needed|free)", answer.stderr)
    assert re.search(r"checkpoints/step_\d+\n3\n", answer.stdout), "the checkpoints before are whole"
    assert ".tmp-" not in answer.stdout


@pytest.mark.slow
def test_r18_memory_is_flat_from_step_50_to_500(start: Start, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ("train.OFFICIAL_EPOCH_LENGTH=50", "train.log_period_iterations=50", "optim.epochs=10")
    # no checkpoint on the way: each draws the curves, for which matplotlib takes some 40 MB over the first eight times
    code, stderr = finish(start(out, *words, "train.checkpoint_period_iterations=1000"))
    assert code == 0, stderr
    rows = {r["iteration"]: r for r in map(json.loads, (out / "training_metrics.jsonl").read_text().splitlines())}
    growth_mib = 1024 * (rows[500]["memory_gib"] - rows[50]["memory_gib"])
    assert growth_mib < 10, f"peak memory grew by {growth_mib:.1f} MiB"


def until(happened: Callable[[], bool], process: subprocess.Popen[str], timeout_s: float = 60) -> None:
    """Wait for a file to appear; the process must live meanwhile."""
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)
