"""A pretraining as a job of SLURM, through submitit: written, queued, saved before its time is over, queued again.

Each task of the job runs the same command as a user would, in a process of its own, which joins the others by SLURM's
variables. Ahead of the time limit SLURM sends a signal to submitit; the command is then told to save, and the job goes
back into the queue, where it resumes.
"""

from __future__ import annotations

import importlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from medssl_cli.core.errors import ConfigError, Interrupted, PartialFailure, ResourceError
from medssl_cli.core.result import Result
from medssl_cli.core.run import plain, result_header

SIGNAL_DELAY_S = 300
"""How long before the time limit the job is told to save: a step, an evaluation and a save take less."""
MOST_TIMEOUTS = 10_000
"""How often a job may run out of time and go back into the queue; submitit's own number is 3."""
OWN_OPTIONS = {
    "nodes": "--nodes",
    "gpus": "--gpus",
    "gpus_per_node": "--gpus",
    "ntasks": "--nodes and --gpus",
    "ntasks_per_node": "--gpus",
    "signal": "nothing: the job is told to save by itself",
}
"""Options of sbatch that follow from those of medssl."""


@dataclass
class Job:
    """What every task of the job runs; submitit pickles it.

    Args:
        command: The program and its options.
        folder: Working directory at submission.
    """

    command: list[str]
    folder: str
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False, repr=False)

    def __call__(self) -> int:
        """Run the command to its end.

        Returns:
            Its exit code: done, done with some cases left out, or saved after a signal.

        Raises:
            RuntimeError: It failed; its own message stands in the log of the task.
        """
        # a session of its own: SLURM's signal is for submitit, and would kill the command
        self._process = subprocess.Popen(self.command, cwd=self.folder, start_new_session=True)
        while self._process.poll() is None:
            time.sleep(0.2)
        code = self._process.returncode
        if code not in (0, PartialFailure.exit_code, Interrupted.exit_code):
            raise RuntimeError(f"`{shlex.join(self.command)}` ended with exit code {code}")
        return code

    def checkpoint(self) -> Any:
        """Called by submitit in the first task when time is nearly over: save, then the same job again."""
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(signal.SIGUSR1)
            # not Popen.wait: this runs in a signal handler that may have interrupted it
            os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        return importlib.import_module("submitit").helpers.DelayedSubmission(Job(self.command, self.folder))


def submit(
    command: Sequence[str],
    out: Path,
    *,
    nodes: int,
    processes_per_node: int,
    with_gpus: bool,
    cpus_per_process: int = 1,
    options: Sequence[str] = (),
    really: bool = True,
) -> Result:
    """Queue a command as a job.

    Args:
        command: Program and options; each task runs it.
        out: Its run folder; the job's logs go to a folder beside it.
        nodes, processes_per_node: Size of the job.
        with_gpus: One GPU for each process.
        cpus_per_process: For training and its loader, unless the options name cpus-per-task.
        options: KEY=VALUE of sbatch, such as ``partition=gpu`` or ``time=24:00:00``.
        really: False only says what would be queued.

    Raises:
        ConfigError: An option that cannot be read, or that follows from others.
        ResourceError: submitit or sbatch is missing.
    """
    started = time.time()
    given = read_options(options)
    logs = out.with_name(f"{out.name}-slurm")
    given.setdefault("cpus_per_task", str(cpus_per_process))
    parameters = _parameters(out, given, nodes, processes_per_node, with_gpus)
    job = Job(list(command), os.getcwd())
    facts = {**result_header("pretrain", started), "submit": "slurm", "parameters": parameters, "command": job.command}
    lines = [f"{key}: {value}" for key, value in parameters.items()]
    lines.append(f"each task: {shlex.join(job.command)}")
    if not really:
        return Result([*lines, "nothing was submitted"], plain({**facts, "job_id": None}))
    submitit = _submitit()
    executor = submitit.AutoExecutor(folder=str(logs), cluster="slurm", slurm_max_num_timeout=MOST_TIMEOUTS)
    executor.update_parameters(**parameters)
    queued = executor.submit(job)
    lines += [f"job {queued.job_id} is in the queue", f"logs:   {logs}", f"run:    {out}", "watch:  squeue --me"]
    return Result(lines, plain({**facts, "job_id": queued.job_id, "logs": logs, "run": out}))


def read_options(options: Sequence[str]) -> dict[str, str]:
    """``KEY=VALUE`` of sbatch by name, with underscores.

    Raises:
        ConfigError: No ``KEY=VALUE``, or a key that follows from an option of medssl.
    """
    faults, given = [], {}
    for text in options:
        key, equals, value = text.partition("=")
        name = key.strip().lstrip("-").replace("-", "_")
        if not (equals and name and value):
            faults.append(f"--slurm {text}: not KEY=VALUE")
        elif name in OWN_OPTIONS:
            faults.append(f"--slurm {text}: use {OWN_OPTIONS[name]}")
        elif name == "cpus_per_task" and not value.strip().isdigit():
            faults.append(f"--slurm {text}: not a number")
        given[name] = value.strip()
    if faults:
        raise ConfigError(
            "Options for SLURM cannot be used.",
            where="\n".join(faults),
            fix="write e.g. --slurm partition=gpu --slurm time=24:00:00",
            code="slurm_options",
        )
    return given


def _parameters(
    out: Path, given: Mapping[str, str], nodes: int, processes_per_node: int, with_gpus: bool
) -> dict[str, Any]:
    """For submitit: what it has a name for under that name, the rest as lines of the batch script."""
    rest = {key: value for key, value in given.items() if key not in ("time", "cpus_per_task", "mem")}
    parameters: dict[str, Any] = {
        "name": f"medssl-{out.name}",
        "nodes": nodes,
        "tasks_per_node": processes_per_node,
        "slurm_signal_delay_s": SIGNAL_DELAY_S,
        # else the others wait for the one that failed, and since SLURM 22.05 srun gives each task one CPU
        "slurm_srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={int(given['cpus_per_task'])}"],
        "cpus_per_task": int(given["cpus_per_task"]),
        **{f"slurm_{key}": given[key] for key in ("time", "mem") if key in given},
    }
    if with_gpus:
        parameters["gpus_per_node"] = processes_per_node
    if rest:
        parameters["slurm_additional_parameters"] = rest
    return parameters


def _submitit() -> Any:
    try:
        module = importlib.import_module("submitit")
    except ImportError as error:
        raise ResourceError(
            "Jobs for SLURM are written by submitit, which is not installed.",
            where="--submit slurm",
            fix="pip install 'medssl[cluster]'",
            code="extra_missing",
        ) from error
    missing = [name for name in ("sbatch", "srun") if shutil.which(name) is None]
    if missing:
        raise ResourceError(
            "There is no SLURM on this machine.",
            where=f"--submit slurm: {' and '.join(missing)} not on the PATH",
            fix="run this on the login node of a cluster; here --gpus N trains on this machine's own GPUs",
            code="slurm_missing",
        )
    return module


def command_of(request: Any, *, leave_out: Sequence[str] = ()) -> list[str]:
    """The command line that gives this request: a dataclass whose fields are named as the options.

    Args:
        request: ``overrides`` stand last, booleans become flags, fields at their default are left out.
        leave_out: Fields that the command is not to have.
    """
    words: list[str] = []
    for each in fields(request):
        value, option = getattr(request, each.name), "--" + each.name.replace("_", "-")
        if each.name in ("overrides", *leave_out) or value == each.default:
            continue
        if each.name == "allowed_changes":
            words += [word for key in value for word in ("--allow-config-change", key)]
        elif isinstance(value, bool):
            words.append(option if value else option.replace("--", "--no-", 1))
        else:
            words += [option, str(value)]
    return [sys.executable, "-m", "medssl_cli", "pretrain", *words, *request.overrides]
