"""Compiled blocks and CUDA graphs: the same numbers to rounding, in less time.

Each block of a network is compiled by itself: one small graph serves all blocks of a width, starts in seconds where a
whole network takes minutes, and leaves names, checkpoints and activation checkpointing as they are. What cannot be
compiled runs as before, after one warning that says why.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from medssl_cli.core.config import Config
from medssl_cli.core.errors import ConfigError
from medssl_cli.engine.precision import PrecisionName

log = logging.getLogger(__name__)

WORTHWHILE_STEPS = 1000
"""Compiling takes about a minute, which shorter runs would not win back."""

GRAPHS_A_BLOCK = 64
"""Variants of a block that may be compiled: with and without gradient, and one for each number of kept samples where
stochastic depth rises from block to block. PyTorch's own limit is 8, after which it goes on without compiling."""

OLDEST_CAPABILITY = (7, 0)
"""Of a GPU for which Triton makes code."""


class AccelerationConfig(Config):
    """What may be done to the networks for speed; names as in DINOv3's `train` section."""

    compile: Literal["auto"] | bool = "auto"
    """Compile the blocks of student and teacher: true, false, or auto: long runs on CUDA in tf32, bf16 or fp16."""
    cudagraphs: bool = False
    """Replay the teacher's compiled blocks as CUDA graphs, which saves launches where the batch is small."""


def accelerate(
    objective: nn.Module,
    config: AccelerationConfig,
    device: torch.device,
    precision: PrecisionName,
    steps: int,
    *,
    sharded: bool = False,
) -> list[str]:
    """Compile the blocks of an objective's networks, as far as the configuration and the machine allow.

    To be called when the networks lie on their device and the attention kernel is chosen, before the first step and
    before they are wrapped or sharded. Nothing is compiled here yet, but at the first pass of each block.

    Args:
        objective: Its networks are the sub-modules with ``flat_blocks``; those under the name ``teacher`` compute
            without gradient.
        config: What is wanted.
        device: Where the run computes.
        precision: Number format of the run.
        steps: Updates that are still to come.
        sharded: The networks are to be sharded over several processes.

    Returns:
        Lines for the log.

    Raises:
        ConfigError: CUDA graphs are asked for where there can be none.
    """
    _check_cudagraphs(config, device, sharded)
    wanted, reason = _wants_compile(config, device, precision, steps)
    if not wanted:
        return [f"compile: off ({reason})"]
    blocks = _blocks(objective)
    missing = "no network here is made of blocks" if not blocks else missing_for_compile(device)
    if missing:
        if blocks or config.compile is True:  # else nobody asked, and nothing is lost
            log.warning("The blocks are not compiled: %s.", missing)
        return [f"compile: off ({missing})"]
    _set_compiler_up()
    fallback = _Fallback([block.module for block in blocks])
    for block in blocks:
        if block.same_shapes:
            graphs = config.cudagraphs and block.is_teacher
            block.module.compile(dynamic=False, **({"mode": "reduce-overhead"} if graphs else {}))
        else:
            block.module.compile()  # from the second number of tokens on one graph serves all
        fallback.guard(block.module, begins_pass=config.cudagraphs and block.is_teacher and block.is_first)
    return [
        f"compile: {len(blocks)} blocks ({reason}); the first steps take longer",
        *(["CUDA graphs: the teacher's blocks"] if config.cudagraphs else []),
    ]


def compiled_blocks(objective: nn.Module) -> int:
    """How many blocks will run compiled; 0 after a fall-back."""
    return sum(getattr(block.module, _SLOT, None) is not None for block in _blocks(objective))


def missing_for_compile(device: torch.device) -> str:
    """What this machine lacks for compiling, as far as it can be seen without trying; empty if nothing."""
    compilers = (
        [os.environ.get("CXX"), "g++", "clang++"]
        if device.type == "cpu"
        else [os.environ.get("CC"), "gcc", "cc", "clang"]
    )
    if not any(name and shutil.which(name) for name in compilers):
        return f"no compiler was found; install {compilers[1]}"
    if device.type != "cuda":
        return "" if device.type == "cpu" else f"{device.type} is not supported"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if torch.cuda.get_device_capability(device) < OLDEST_CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} is too old for Triton"
    return ""


def _wants_compile(
    config: AccelerationConfig, device: torch.device, precision: PrecisionName, steps: int
) -> tuple[bool, str]:
    if config.compile != "auto":
        return config.compile, "as train.compile says"
    if device.type != "cuda":
        return False, f"auto: not on {device.type}"
    if precision == "fp32":
        return False, "auto: in fp32 matrix products take nearly all the time"
    if steps < WORTHWHILE_STEPS:
        return False, f"auto: {steps} steps would not win back the time of compiling"
    return True, "auto"


def _check_cudagraphs(config: AccelerationConfig, device: torch.device, sharded: bool) -> None:
    if not config.cudagraphs:
        return
    if device.type != "cuda":
        raise ConfigError(
            "CUDA graphs need a CUDA device.",
            where=f"train.cudagraphs: true, device {device}",
            fix="drop train.cudagraphs",
            code="cudagraphs_need_cuda",
        )
    if config.compile is False:
        raise ConfigError(
            "CUDA graphs are made of compiled blocks.",
            where="train.cudagraphs: true, train.compile: false",
            fix="set train.compile=true, or drop train.cudagraphs",
            code="cudagraphs_need_compile",
        )
    if sharded:
        raise ConfigError(
            "CUDA graphs need parameters that stay in their place.",
            where="train.cudagraphs: true, compute_precision.parallel: fsdp, which gathers them anew in each pass",
            fix="drop train.cudagraphs, or set compute_precision.parallel=ddp",
            code="cudagraphs_need_whole_parameters",
        )


# --- blocks ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _BlockOf:
    """A block, and what its network does with it.

    Args:
        module: The block.
        is_teacher: It never sees a gradient.
        is_first: A pass begins with it.
        same_shapes: Its tensors have one shape in all steps; the last block may be asked for some tokens only.
    """

    module: nn.Module
    is_teacher: bool
    is_first: bool
    same_shapes: bool


def _blocks(objective: nn.Module) -> list[_BlockOf]:
    """The blocks of every network that can list them, each once."""
    found: dict[int, _BlockOf] = {}
    for name, network in objective.named_modules():
        blocks = list(getattr(network, "flat_blocks", tuple)())
        for block in blocks:
            varies = block is blocks[-1] and hasattr(network, "forward_needed")
            found.setdefault(id(block), _BlockOf(block, _is_teacher(name), block is blocks[0], not varies))
    return list(found.values())


def _is_teacher(name: str) -> bool:
    return "teacher" in name.split(".")


def _set_compiler_up() -> None:
    import torch._dynamo  # two seconds at every start, if it stood at the top

    settings = torch._dynamo.config
    settings.recompile_limit = max(settings.recompile_limit, GRAPHS_A_BLOCK)
    # under DDP, graphs are cut at the borders of the gradient buckets: needless where each block is a graph of its own,
    # and the cutting fails at numbers of tokens that vary
    settings.optimize_ddp = False


_SLOT = "_compiled_call_impl"
"""Where ``nn.Module.compile`` keeps the compiled call; None there means uncompiled."""


class _Fallback:
    """Turns all blocks back to uncompiled ones when the compiler fails at one of them, with one warning.

    A block is a function of its inputs alone, so that the failed call is simply made again. Only faults of the
    compiler are caught: all others, a failed allocation among them, are those of the step.
    """

    def __init__(self, blocks: list[nn.Module]) -> None:
        self.blocks = blocks

    def guard(self, block: nn.Module, *, begins_pass: bool = False) -> None:
        """Put the guarded call in the place of the compiled one.

        Args:
            block: Compiled.
            begins_pass: Tell PyTorch that a pass begins here, after which the outputs that CUDA graphs gave in the one
                before may be written over. Not a hook of the network: it is called by several names.
        """
        compiled = getattr(block, _SLOT)

        def call(*args: Any, **kwargs: Any) -> Any:
            from torch._dynamo.exc import TorchDynamoException

            if begins_pass:
                torch.compiler.cudagraph_mark_step_begin()
            try:
                return compiled(*args, **kwargs)
            except TorchDynamoException as error:
                self.turn_back(error)
            return block(*args, **kwargs)

        setattr(block, _SLOT, call)

    def turn_back(self, error: Exception) -> None:
        """Forget the compiled calls."""
        if any(getattr(block, _SLOT) is not None for block in self.blocks):
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            log.warning(
                "The blocks could not be compiled and run as they are: %s: %s",
                type(error).__name__,
                " ".join(lines)[:300],
            )
        for block in self.blocks:
            setattr(block, _SLOT, None)
