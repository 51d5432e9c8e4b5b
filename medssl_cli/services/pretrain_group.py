"""The processes of one pretraining run: how they are started, find their device, agree, and share one folder."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from medssl_cli.core.config import leaves
from medssl_cli.core.errors import ConfigError, ResourceError
from medssl_cli.core.result import Result
from medssl_cli.core.run import package_version, usable_cpus
from medssl_cli.engine.distributed import Place, from_first, gather, rank, refuse_differences, world_size
from medssl_cli.services.devices import resolve_device
from medssl_cli.services.launch import launch
from medssl_cli.services.pretrain_config import PretrainConfig
from medssl_cli.services.pretrain_request import PretrainRequest, check_request, resolve_config, run_folder_of
from medssl_cli.services.run_folder import HeldLog, RunFolder
from medssl_cli.services.submit import command_of, submit

MOST_LOADERS = 8
"""Loader processes that a job asks CPUs for; more seldom help."""


def submit_job(request: PretrainRequest) -> Result:
    """The same as a job of a cluster, once everything that can be checked here is checked."""
    if request.submit != "slurm":
        raise ConfigError(
            f"There is no cluster {request.submit!r}.",
            where=f"--submit {request.submit}",
            fix="pass --submit slurm",
            code="cluster_unknown",
        )
    config = resolve_config(request)
    return submit(
        command_of(request, leave_out=("submit", "nodes", "slurm", "gpus", "dry_run")),
        run_folder_of(request, config),
        nodes=request.nodes,
        processes_per_node=request.gpus,
        with_gpus=request.device != "cpu",
        cpus_per_process=1
        + min(MOST_LOADERS, config.train.num_workers if request.workers is None else request.workers),
        options=request.slurm,
        really=not request.dry_run,
    )


def launch_group(request: PretrainRequest, work: Callable[[PretrainRequest], Result]) -> Result:
    """The same in ``--gpus`` processes of this machine; the first one's result."""
    refuse_named_gpu(request)
    check_request(request)
    resolve_config(request)  # every bad key is told before anything starts
    refuse_missing_gpus(request, "train.grad_accumulation gives the same total batch")
    return launch(work, request, processes=request.gpus)


class GroupRequest(Protocol):
    """What a command that starts a group was asked for."""

    @property
    def gpus(self) -> int:
        """``--gpus``."""
        ...

    @property
    def device(self) -> str:
        """``--device``."""
        ...


def refuse_named_gpu(request: GroupRequest) -> None:
    """Refuse several processes on one named GPU.

    Raises:
        ConfigError: ``--device cuda:N`` with ``--gpus``.
    """
    if request.device.startswith("cuda:"):
        raise ConfigError(
            "--gpus takes one GPU for each process.",
            where=f"--gpus {request.gpus} --device {request.device}",
            fix="pass --device cuda, or set CUDA_VISIBLE_DEVICES to the GPUs to use",
            code="flags_exclude",
        )


def refuse_missing_gpus(request: GroupRequest, instead: str) -> None:
    """Refuse more processes than there are GPUs; ``instead`` tells what a lower number costs.

    Raises:
        ResourceError: There are fewer.
    """
    if request.device == "cpu":
        return
    resolve_device("auto" if request.device == "auto" else "cuda")
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found < request.gpus:
        raise ResourceError(
            f"There are not {request.gpus} GPUs here.",
            where=f"--gpus {request.gpus}; found {found}",
            fix=f"lower --gpus ({instead}), or pass --device cpu for as many processes on the CPU",
            code="gpus_missing",
        )


def is_batch_shell(place: Place) -> bool:
    """A batch script of SLURM has the variables of a task too, but no step: its tasks are started by srun, or here."""
    return place.source == "slurm" and "SLURM_STEP_ID" not in os.environ


def device_of(request: GroupRequest, place: Place | None) -> torch.device:
    """The device of this process: in a group, the GPU with its local number."""
    if place is None:
        return resolve_device(request.device)
    if request.gpus > 1 and request.gpus != place.local_world:
        raise ConfigError(
            "--gpus and the launcher disagree.",
            where=f"--gpus {request.gpus}; {place.source} started {place.local_world} processes on this machine",
            fix="drop --gpus under torchrun or srun",
            code="gpus_differ",
        )
    if request.device.startswith("cuda:"):
        raise ConfigError(
            "One device was named for several processes.",
            where=f"--device {request.device}; {place.world} processes",
            fix="pass --device cuda: each process takes the GPU with its local number",
            code="flags_exclude",
        )
    device = resolve_device(request.device)
    if device.type == "cpu":
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, usable_cpus() // place.local_world))
        return device
    # srun may show each task its own GPU alone
    return resolve_device(f"cuda:{0 if torch.cuda.device_count() == 1 < place.local_world else place.local_rank}")


@contextmanager
def first_speaks() -> Iterator[None]:
    """The other processes log errors only."""
    root = logging.getLogger()
    before = root.level
    if rank():
        root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(before)


def refuse_different_commands(request: PretrainRequest, config: PretrainConfig) -> None:
    """Every process must have been given the same run and the same program."""
    facts = dict(leaves(config.model_dump(mode="json")))
    facts |= {
        "--out": str(run_folder_of(request, config)),
        "--resume": request.resume,
        "--overwrite": request.overwrite,
    }
    facts |= {"medssl": package_version(), "torch": torch.__version__}
    refuse_differences(
        facts,
        "The processes of this run were started with different settings.",
        "start all of them with the same command and the same installation",
    )


class _Onlooker(RunFolder):
    """The run folder as the other processes see it: they write nothing of their own."""

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def begin(self, *, clear: Sequence[str] = ()) -> None:
        """Nothing."""

    def say(self, status: str, **facts: Any) -> None:
        """Nothing."""


class FolderRequest(Protocol):
    """What a command that writes a run folder was asked for."""

    @property
    def overwrite(self) -> bool:
        """``--overwrite``."""
        ...


@contextmanager
def open_folder(
    out: Path, lines: HeldLog, request: FolderRequest, inputs: list[Path], command: str = "pretrain"
) -> Iterator[RunFolder]:
    """The folder, held by the first process; if that one is refused, all are."""
    kind = _Onlooker if rank() else RunFolder
    with contextlib.ExitStack() as held:
        folder = kind(out, command, lines, overwrite=request.overwrite, inputs=inputs)
        from_first(lambda: held.enter_context(folder) and None)
        yield folder


def refuse_unshared(out: Path) -> None:
    """Refuse a run folder that is not the same for all processes.

    Raises:
        ConfigError: A machine does not see what the first process writes there.
    """
    if world_size() == 1:
        return
    name = from_first(lambda: f".shared-{secrets.token_hex(8)}")
    if rank() == 0:
        (out / name).touch()
    seen = gather((socket.gethostname(), _appears(out / name)))
    if rank() == 0:
        (out / name).unlink()
    blind = sorted({host for host, found in seen if not found})
    if blind:
        raise ConfigError(
            "The run folder is not the same for all processes.",
            where=f"{out}: what {seen[0][0]} writes there is not seen on {', '.join(blind[:5])}",
            fix="put --out on a disk that all machines share, under the same path",
            code="out_not_shared",
        )


def _appears(path: Path) -> bool:
    """Whether a file is there, or comes within ten seconds: network disks remember what they did not find."""
    for _ in range(100):
        if path.exists():
            return True
        time.sleep(0.1)
        with contextlib.suppress(OSError):
            os.listdir(path.parent)
    return False
