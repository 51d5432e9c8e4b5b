from __future__ import annotations

import os
import pickle
import sys
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medssl_cli.core.errors import ConfigError
from medssl_cli.services.pretrain import PretrainRequest
from medssl_cli.services.submit import SIGNAL_DELAY_S, Job, command_of, read_options


class FakeSubmitit(types.ModuleType):
    """Records what would be queued, under the names of submitit's own interface."""

    def __init__(self) -> None:
        super().__init__("submitit")
        calls: dict[str, Any] = {}
        self.calls = calls

        class AutoExecutor:
            def __init__(self, folder: str, cluster: str, **options: Any) -> None:
                calls["executor"] = {"folder": folder, "cluster": cluster, **options}

            def update_parameters(self, **parameters: Any) -> None:
                calls["parameters"] = parameters

            def submit(self, function: Any) -> Any:
                calls["job"] = pickle.loads(pickle.dumps(function))
                return types.SimpleNamespace(job_id="4711")

        class DelayedSubmission:
            def __init__(self, function: Any) -> None:
                self.function = function

        self.AutoExecutor = AutoExecutor
        self.helpers = types.SimpleNamespace(DelayedSubmission=DelayedSubmission)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeSubmitit:
    """A machine with submitit and an sbatch that is never called."""
    fake = FakeSubmitit()
    monkeypatch.setitem(sys.modules, "submitit", fake)
    sbatch = tmp_path / "bin/sbatch"
    sbatch.parent.mkdir()
    for name in ("sbatch", "srun"):
        sbatch.with_name(name).write_text("#!/bin/sh\nexit 1\n")
        sbatch.with_name(name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:{os.environ['PATH']}")
    return fake


def test_submit_queues_the_same_command(medssl: Callable[..., Any], cluster: FakeSubmitit, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ("--config", "prostate_vitb14", "--data", tmp_path, "--out", out, "--gpus", 8, "--nodes", 4)
    slurm = ("--slurm", "partition=gpu", "--slurm", "time=24:00:00", "--slurm", "cpus-per-task=16")
    answer = medssl("pretrain", *words, "--submit", "slurm", *slurm, "--no-resume", "optim.epochs=7")
    assert answer.exit_code == 0, answer.stderr
    assert "job 4711 is in the queue" in answer.stdout
    assert cluster.calls["executor"]["cluster"] == "slurm"
    assert cluster.calls["executor"]["folder"] == f"{out}-slurm"
    assert cluster.calls["executor"]["slurm_max_num_timeout"] > 1000
    assert cluster.calls["parameters"] == {
        "name": "medssl-run",
        "nodes": 4,
        "tasks_per_node": 8,
        "gpus_per_node": 8,
        "cpus_per_task": 16,
        "slurm_time": "24:00:00",
        "slurm_signal_delay_s": SIGNAL_DELAY_S,
        "slurm_srun_args": ["--kill-on-bad-exit=1", "--cpus-per-task=16"],
        "slurm_additional_parameters": {"partition": "gpu"},
    }
    program = [sys.executable, "-m", "medssl_cli", "pretrain"]
    options = ["--config", "prostate_vitb14", "--data", str(tmp_path), "--out", str(out), "--no-resume"]
    assert cluster.calls["job"].command == [*program, *options, "optim.epochs=7"]
    assert cluster.calls["job"].folder == os.getcwd()
    assert not out.exists()


def test_dry_run_says_what_would_be_queued(medssl: Callable[..., Any], cluster: FakeSubmitit, tmp_path: Path) -> None:
    words = ("--data", tmp_path, "--out", tmp_path / "run", "--submit", "slurm", "--dry-run", "--device", "cpu")
    answer = medssl("pretrain", *words)
    assert answer.exit_code == 0
    assert "nothing was submitted" in answer.stdout
    assert "gpus_per_node" not in answer.stdout
    assert "--dry-run" not in answer.stdout
    assert cluster.calls == {}


def test_bad_keys_are_told_before_anything_is_queued(
    medssl: Callable[..., Any], cluster: FakeSubmitit, tmp_path: Path
) -> None:
    answer = medssl("pretrain", "--out", tmp_path / "run", "--submit", "slurm", "optim.base_rl=1")
    assert answer.exit_code == 2
    assert "optim.base_lr" in answer.stderr
    assert cluster.calls == {}
    assert medssl("pretrain", "--out", tmp_path / "run", "--submit", "pbs").exit_code == 2
    answer = medssl("pretrain", "--out", tmp_path / "run", "--device", "cpu", "--nodes", 2)
    assert answer.exit_code == 2
    assert "add --submit slurm" in answer.stderr


def test_missing_submitit_names_its_extra(
    medssl: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    answer = medssl("pretrain", "--out", tmp_path / "run", "--submit", "slurm")
    assert answer.exit_code == 6
    assert "pip install 'medssl[cluster]'" in answer.stderr


def test_missing_sbatch_is_said(medssl: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "submitit", FakeSubmitit())
    monkeypatch.setenv("PATH", str(tmp_path))
    answer = medssl("pretrain", "--out", tmp_path / "run", "--submit", "slurm")
    assert answer.exit_code == 6
    assert "sbatch and srun not on the PATH" in answer.stderr


def test_options_of_sbatch_are_read_or_refused_together() -> None:
    assert read_options(["--mem=64G", "cpus-per-task=4"]) == {"mem": "64G", "cpus_per_task": "4"}
    with pytest.raises(ConfigError) as caught:
        read_options(["partition", "nodes=2", "gpus-per-node=8", "cpus-per-task=many"])
    assert caught.value.where.splitlines() == [
        "--slurm partition: not KEY=VALUE",
        "--slurm nodes=2: use --nodes",
        "--slurm gpus-per-node=8: use --gpus",
        "--slurm cpus-per-task=many: not a number",
    ]


def test_command_of_gives_back_the_request() -> None:
    request = PretrainRequest(
        config="x.yaml", overrides=("a.b=1",), seed=0, overwrite=True, resume=False, allowed_changes=("optim", "data")
    )
    words = ["--config", "x.yaml", "--no-resume", "--seed", "0"]
    changes = ["--allow-config-change", "optim", "--allow-config-change", "data"]
    assert command_of(request)[4:] == [*words, *changes, "--overwrite", "a.b=1"]
    assert command_of(PretrainRequest())[4:] == []


SAVING = """
import signal, sys, time
signal.signal(signal.SIGUSR1, lambda *_: (open(sys.argv[1], "w").write("saved"), sys.exit(75)))
open(sys.argv[1] + ".ready", "w").close()
time.sleep(60)
"""


def test_requeue_waits_until_the_command_has_saved(cluster: FakeSubmitit, tmp_path: Path) -> None:
    job = Job([sys.executable, "-c", SAVING, str(tmp_path / "state")], str(tmp_path))
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(job()))
    thread.start()
    deadline = time.monotonic() + 30
    while not (tmp_path / "state.ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    again = job.checkpoint()
    assert (tmp_path / "state").read_text() == "saved"
    thread.join(10)
    assert codes == [75]
    assert again.function == Job(job.command, job.folder)
    assert pickle.loads(pickle.dumps(again.function)) == again.function


def test_a_command_that_fails_fails_the_job(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="ended with exit code 3"):
        Job([sys.executable, "-c", "raise SystemExit(3)"], str(tmp_path))()
    assert Job([sys.executable, "-c", "raise SystemExit(4)"], str(tmp_path))() == 4


def test_the_command_has_a_session_of_its_own_which_signals_for_the_task_do_not_reach() -> None:
    script = "import os; raise SystemExit(0 if os.getsid(0) == os.getpid() else 1)"
    assert Job([sys.executable, "-c", script], os.getcwd())() == 0


def test_the_real_submitit_writes_a_batch_script(
    medssl: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("submitit")
    script = tmp_path / "bin/sbatch"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\ncp "$1" {tmp_path}/batch.sh\necho Submitted batch job 4711\n')
    script.with_name("srun").write_text("#!/bin/sh\nexit 1\n")
    for each in (script, script.with_name("srun")):
        each.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    words = ("--submit", "slurm", "--nodes", 2, "--gpus", 4, "--slurm", "partition=gpu", "--slurm", "time=24:00:00")
    answer = medssl("pretrain", "--config", "demo", "--data", tmp_path, "--out", tmp_path / "run", *words)
    assert answer.exit_code == 0, answer.stderr
    assert "job 4711 is in the queue" in answer.stdout
    text = (tmp_path / "batch.sh").read_text()
    for line in ("--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--partition=gpu", "--time=24:00:00",
                 f"--signal=USR2@{SIGNAL_DELAY_S}", "--cpus-per-task=9"):  # fmt: skip
        assert f"#SBATCH {line}\n" in text
    assert "srun" in text
    assert "--kill-on-bad-exit=1" in text
    started = next(line for line in text.splitlines() if line.startswith("srun "))
    assert "--cpus-per-task=9" in started, "what sbatch was told, srun does not take over"
