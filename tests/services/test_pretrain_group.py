"""The real program in several processes: started by --gpus, torchrun and SLURM; stopped, resumed, refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

Start = Callable[..., "subprocess.Popen[str]"]
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "medssl_cli")


@pytest.fixture
def start(tiny_recipe: Path, prostate_tree: Path, prepared_cache: Path) -> Iterator[Start]:
    """Start ``medssl pretrain`` on a run folder, by itself or through ``program``."""
    started: list[subprocess.Popen[str]] = []

    def run(
        out: Path, *words: object, program: tuple[str, ...] = ("-m", "medssl_cli"), **env: object
    ) -> subprocess.Popen[str]:
        options = ("--config", tiny_recipe, "--data", prostate_tree, "--cache", prepared_cache, "--device", "cpu")
        command = [*program, "pretrain", *options, "--out", out, "--workers", 0, "train.tensorboard=false", *words]
        process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            env={**os.environ, "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in env.items()}},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def finish(process: subprocess.Popen[str], code: int = 0) -> tuple[str, str]:
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == code, stderr
    return stdout, stderr


def last_model(run: Path) -> dict[str, torch.Tensor]:
    from medssl_cli.engine.checkpoint import read_latest

    newest = read_latest(run / "checkpoints")
    assert newest is not None
    return newest.model()


def export(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "export/teacher_backbone.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_r04_a_run_goes_from_two_processes_to_one_and_back(start: Start, tmp_path: Path, parallel: str) -> None:
    run, how = tmp_path / "run", f"compute_precision.parallel={parallel}"
    stdout, stderr = finish(start(run, "--gpus", 2, how, "optim.epochs=1"))
    assert stdout.startswith("4 steps in")
    assert f"x 2 processes ({parallel})" in stderr
    assert "4 steps of 4 samples" in stderr
    assert stderr.count("[4/4]") == 1
    assert json.loads((run / "run.json").read_text())["status"] == "finished"
    before = export(run)
    sharded = (run / "checkpoints/last/model").is_dir()
    assert sharded == (parallel == "fsdp")

    _, stderr = finish(start(run, how, "optim.epochs=2"), 2)
    assert (
        "then 2 processes x 2 samples x 1 micro-batches = 4; now 1 processes x 2 samples x 1 micro-batches = 2"
        in stderr
    )
    assert "set train.batch_size_per_gpu=2 train.grad_accumulation=2" in stderr
    _, stderr = finish(start(run, how, "optim.epochs=2", "train.grad_accumulation=2"))
    assert "Resuming after step 4" in stderr
    assert "1 processes instead of 2, 4 samples an update as before" in stderr
    assert not all(torch.equal(before[name], tensor) for name, tensor in export(run).items())

    _, stderr = finish(start(run, "--gpus", 2, how, "optim.epochs=3"))
    assert "Resuming after step 8" in stderr
    teacher = {key.removeprefix("teacher.backbone."): value for key, value in last_model(run).items()}
    for name, tensor in export(run).items():
        assert torch.equal(tensor, teacher[name]), name
    facts = finish(subprocess.Popen(
        [sys.executable, "-m", "medssl_cli", "info", str(run), "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ))[0]  # fmt: skip
    assert json.loads(facts)["step"] == 12


@pytest.mark.slow
def test_a_signal_to_the_launcher_saves_in_all_processes_and_the_same_command_goes_on(
    start: Start, tmp_path: Path
) -> None:
    run, words = tmp_path / "run", ("--gpus", 2, "optim.epochs=50")
    process = start(run, *words)
    while not (run / "checkpoints/last").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    _, stderr = finish(process, 75)
    assert stderr.count("error: ") == 1
    assert "SIGUSR1 came after step" in stderr
    assert "fix:   run the same command again" in stderr
    record = json.loads((run / "run.json").read_text())
    assert record["status"] == "interrupted"
    process = start(run, *words)
    while json.loads((run / "run.json").read_text())["step"] <= record["step"]:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.terminate()
    _, stderr = finish(process, 75)
    assert f"Resuming after step {record['step']} " in stderr


@pytest.mark.slow
def test_torchrun_starts_the_same_command(start: Start, tmp_path: Path) -> None:
    stdout, stderr = finish(start(tmp_path / "run", "--json", "optim.epochs=1", program=TORCHRUN))
    assert json.loads(stdout)["steps"] == 4
    assert stderr.count("[4/4]") == 1
    _, stderr = finish(start(tmp_path / "run", "--json", "optim.epochs=1", "student.depth=3", program=TORCHRUN), 1)
    assert stderr.count("error: The configuration differs") == 1


@pytest.mark.slow
def test_slurm_variables_join_and_different_commands_are_refused(start: Start, tmp_path: Path) -> None:
    def tasks(out: Path, job: int, *different: object) -> list[subprocess.Popen[str]]:
        common = {"SLURM_STEP_ID": 0, "SLURM_STEP_NUM_TASKS": 2, "SLURM_STEP_TASKS_PER_NODE": 2, "SLURM_JOB_ID": job}
        common |= {"SLURM_STEP_NODELIST": "localhost"}
        return [
            start(out, "optim.epochs=1", *(different if n else ()), **common, SLURM_PROCID=n, SLURM_LOCALID=n)
            for n in range(2)
        ]

    job = os.getpid()
    first, second = tasks(tmp_path / "run", job)
    assert finish(first)[0].startswith("4 steps in")
    assert finish(second)[0] == ""
    first, second = tasks(tmp_path / "other", job + 1, "optim.base_lr=0.02")
    _, stderr = finish(first, 2)
    assert "optim.base_lr: 0.01 (rank 0); 0.02 (rank 1)" in stderr
    assert "error" not in finish(second, 2)[1]
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_smoke_in_two_processes_prints_each_step_once(start: Start, tmp_path: Path) -> None:
    stdout, _ = finish(start(tmp_path / "run", "--gpus", 2, "--smoke"))
    assert [line.split("=")[0] for line in stdout.splitlines()[:5]] == [f"[step {i}] loss" for i in range(5)]
    assert not (tmp_path / "run").exists()
