"""Train a segmentation network: settle what was asked for, build the job of its task, run it alone or in a group."""

from __future__ import annotations

import logging
import os
import time

import torch

from medssl_cli.core.config import leaves
from medssl_cli.core.result import Result
from medssl_cli.core.run import check_out_folder, package_version
from medssl_cli.engine.distributed import find_place, from_first, joined, rank, refuse_differences
from medssl_cli.engine.memory import saying_out_of_memory
from medssl_cli.services.launch import launch
from medssl_cli.services.pretrain_group import (
    device_of,
    first_speaks,
    is_batch_shell,
    open_folder,
    refuse_missing_gpus,
    refuse_named_gpu,
)
from medssl_cli.services.run_folder import HeldLog, stoppable
from medssl_cli.services.segment_ct_pet import build_ct_pet_job
from medssl_cli.services.segment_ct_pet_config import settle_ct_pet
from medssl_cli.services.segment_job import SegmentJob
from medssl_cli.services.segment_request import COMMAND, SegmentRequest, check_segment_request
from medssl_cli.services.segment_run import train_job
from medssl_cli.services.segment_semantic import build_semantic_job, load_semantic_config
from medssl_cli.services.segment_training import Say, dry_run, smoke

__all__ = ["SegmentRequest", "segment"]

log = logging.getLogger(__name__)

LESS_MEMORY = {
    "ct-pet": "take a smaller batch (bs), or keep fewer decoded slices (cache_gb=0)",
    "semantic": "take a smaller batch (optim.batch_size) or a smaller backbone",
}
"""By task: what helps where memory runs out before the first step."""


def segment(request: SegmentRequest, *, say: Say = log.info) -> Result:
    """Train as the request says; resume if the run folder holds a checkpoint.

    With ``--gpus`` this process only starts those that train; in one that torchrun or srun started it joins the group.

    Args:
        request: What the user typed.
        say: Receives the lines of ``--smoke`` one by one.

    Returns:
        What was done; empty in all processes of a group but the first.

    Raises:
        MedsslError: Each kind with its exit code; see ``core.errors``.
    """
    check_segment_request(request)
    request = settled(request)
    place = find_place(os.environ)
    if request.gpus > 1 and (place is None or is_batch_shell(place)):
        refuse_named_gpu(request)
        refuse_missing_gpus(request, "a batch that is as many times larger gives the same updates")
        return launch(_segment_in_group, request, processes=request.gpus)
    started = time.time()
    device = device_of(request, place)
    with joined(place, device):
        result = _segment(request, device, say, started)
    return result if place is None or place.rank == 0 else Result([], {})


def settled(request: SegmentRequest) -> SegmentRequest:
    """The request with what its config says of data, run folder and device, where no option does.

    Raises:
        ConfigError: Every fault of the config, before anything starts.
    """
    if request.task == "ct-pet":
        return settle_ct_pet(request)
    load_semantic_config(request)
    return request


def _segment_in_group(request: SegmentRequest) -> Result:
    return segment(request, say=log.debug)  # the process that the user looks at says it


def _segment(request: SegmentRequest, device: torch.device, say: Say, started: float) -> Result:
    out, inputs = request.run_folder(), request.inputs()
    trial = request.smoke or request.dry_run
    with first_speaks(), HeldLog() as lines, stoppable("preparing"):
        if not trial:  # told before the images are read; the folder is taken only when all is built
            from_first(lambda: check_out_folder(out, COMMAND, overwrite=request.overwrite, inputs=inputs) and None)
        with saying_out_of_memory(device, LESS_MEMORY[request.task]):
            job = _build(request, device)
            _refuse_different_jobs(request, job)
            if trial:
                return smoke(job, say, started) if request.smoke else dry_run(job, started)
            with open_folder(out, lines, request, inputs, COMMAND) as folder:
                return train_job(job, folder, request, started)


def _build(request: SegmentRequest, device: torch.device) -> SegmentJob:
    if request.task == "ct-pet":
        return build_ct_pet_job(request, device)
    return build_semantic_job(request, device)


def _refuse_different_jobs(request: SegmentRequest, job: SegmentJob) -> None:
    """Every process must have been given the same run, the same program and the same images."""
    facts = dict(leaves(job.config.model_dump(mode="json")))
    facts |= {f"digest of {name}": digest for name, digest in job.digests.items()}
    facts |= {"--out": str(request.run_folder()), "--resume": request.resume, "--overwrite": request.overwrite}
    facts |= {"medssl": package_version(), "torch": torch.__version__}
    refuse_differences(
        facts,
        "The processes of this run have different settings or images before them.",
        "start all of them with the same command, the same installation and the same data; copies must keep the times "
        "of files (cp -a, rsync -a)",
    )
    if rank() == 0:
        log.debug("%d settings are the same in all processes", len(facts))
