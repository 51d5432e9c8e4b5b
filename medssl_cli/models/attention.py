"""Attention over packed tokens, and the one place where its kernel is chosen.

Sequences of several lengths lie end to end in one tensor; ``groups`` says how: ((samples, tokens each), …). Nothing
looks across two samples. A kernel counts as available only after a tiny forward and backward gave the right numbers on
the very device: an import, or what a library says about itself, proves nothing.

Letters: T tokens of all groups together, A heads, E width of one head.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import logging
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from itertools import accumulate
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from medssl_cli.core.errors import ConfigError, ResourceError

logger = logging.getLogger(__name__)

Groups = tuple[tuple[int, int], ...]
"""(number of samples, tokens of each), in the order in which they lie in the packed tensor."""

Kernel = Callable[[Tensor, Tensor, Tensor, Groups], Tensor]

BACKENDS = ("xformers", "sdpa", "varlen", "plain")
"""In the order in which they are tried."""

HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class BackendStatus:
    """Whether one kernel really ran.

    Args:
        name: One of ``BACKENDS``.
        works: Its tiny forward and backward gave the right numbers.
        detail: What was run, or why it failed.
        fix: What would make it work; empty when nothing is to be done.
    """

    name: str
    works: bool
    detail: str
    fix: str = ""


def attend(q_TAE: Tensor, k_TAE: Tensor, v_TAE: Tensor, groups: Groups | None = None) -> Tensor:
    """Softmax attention within each sample.

    Args:
        q_TAE: Packed (T, A, E) with ``groups``, or (B, N, A, E) without; any strides with a dense last axis.
        k_TAE: Like ``q_TAE``.
        v_TAE: Like ``q_TAE``.
        groups: How the samples lie in T.

    Returns:
        The shape of ``q_TAE``.

    Raises:
        ValueError: The groups do not add up to T.
    """
    if groups is None:
        samples, tokens = q_TAE.shape[:2]
        q, k, v = (part.flatten(0, 1) for part in (q_TAE, k_TAE, v_TAE))
        return attend(q, k, v, ((samples, tokens),)).unflatten(0, (samples, tokens))
    if token_count(groups) != q_TAE.shape[0]:
        raise ValueError(f"groups {groups} hold {token_count(groups)} tokens, the tensor {q_TAE.shape[0]}")
    return _KERNELS[choose_backend(q_TAE.device, q_TAE.dtype)](q_TAE, k_TAE, v_TAE, groups)


def token_count(groups: Groups) -> int:
    """Length of the packed tensor."""
    return sum(samples * tokens for samples, tokens in groups)


# --- choice ----------------------------------------------------------------------------------------------------------

_forced: str | None = None
_chosen: dict[tuple[str, torch.dtype, str | None, bool], str] = {}


def choose_backend(device: torch.device, dtype: torch.dtype) -> str:
    """Name of the kernel for a device and a number type, decided once for each by running it.

    Raises:
        ResourceError: ``set_backend`` asked for a kernel that does not run here.
    """
    key = (str(device), dtype, _forced, _xformers_disabled())
    if key not in _chosen:
        _chosen[key] = _decide(device, dtype)
    return _chosen[key]


# The whole effect of torch.compiler.assume_constant_result, which would import torch._dynamo here: 2 s at every start.
choose_backend.__dict__["_dynamo_marked_constant"] = True


def set_backend(name: str | None, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
    """Use one kernel from now on; None or ``auto`` goes back to choosing.

    Raises:
        ConfigError: No kernel has this name.
        ResourceError: The kernel does not run on ``device`` with ``dtype``; the choice is as it was.
    """
    global _forced
    if name not in (None, "auto", *BACKENDS):
        raise ConfigError(
            f"There is no attention backend {name!r}.",
            where="attention backend",
            fix=f"choose one of: auto, {', '.join(BACKENDS)}",
            code="attention_unknown",
        )
    before, _forced = _forced, None if name == "auto" else name
    try:
        choose_backend(torch.device(device), dtype)
    except ResourceError:
        _forced = before
        raise


def probe_backends(device: torch.device | str, dtype: torch.dtype | None = None) -> list[BackendStatus]:
    """Run every kernel on ``device``; ``dtype`` is bfloat16 on a GPU and float32 elsewhere unless given."""
    device = torch.device(device)
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return [_status(name, device, dtype) for name in BACKENDS]


def _decide(device: torch.device, dtype: torch.dtype) -> str:
    if _forced is not None:
        status = _status(_forced, device, dtype)
        if not status.works:
            raise ResourceError(
                f"The attention backend {_forced} does not work on {device} with {dtype}.",
                where=status.detail,
                fix=status.fix or "leave the choice to the program",
                code="attention_unavailable",
            )
        return _forced
    statuses: list[BackendStatus] = []
    for name in BACKENDS:
        statuses.append(_status(name, device, dtype))
        if statuses[-1].works:
            break
    _say_choice(statuses, device, dtype)
    return statuses[-1].name


def _say_choice(statuses: list[BackendStatus], device: torch.device, dtype: torch.dtype) -> None:
    first, last = statuses[0], statuses[-1]
    if not last.works:
        raise ResourceError(
            f"No attention backend works on {device} with {dtype}.",
            where="\n".join(f"{status.name}: {status.detail}" for status in statuses),
            fix="choose another --device or precision; `medssl doctor` shows what runs",
            code="attention_unavailable",
        )
    tried = _serves("xformers", device, dtype) and not _xformers_disabled() and _version("xformers")
    if tried and not first.works:
        why = f"xformers {_version('xformers')} is installed but does not work: {first.detail}; {first.fix}"
        logger.warning("attention on %s: %s (%s)", device, last.name, why)
    else:
        logger.debug("attention on %s with %s: %s", device, dtype, last.name)


def _serves(name: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a kernel is made for such tensors at all; the two packed ones are for half precision on CUDA."""
    return name in ("sdpa", "plain") or (device.type == "cuda" and dtype in HALF)


def _status(name: str, device: torch.device, dtype: torch.dtype) -> BackendStatus:
    if name == "xformers" and _xformers_disabled():
        return BackendStatus(name, False, "switched off by XFORMERS_DISABLED", "unset XFORMERS_DISABLED")
    if not _serves(name, device, dtype):
        return BackendStatus(name, False, f"not used for {dtype} on {device.type}: half precision on CUDA only")
    if name == "xformers" and not _version(name):
        return BackendStatus(name, False, "not installed", "pip install 'medssl[xformers]'")
    try:
        error = _trial_error(_KERNELS[name], device, dtype)
    except Exception as fault:  # whatever a foreign kernel raises is the answer to the question
        return BackendStatus(name, False, _first_line(fault), _fix_for(name))
    if not error <= 0.05:  # bfloat16 is good for about 0.01; NaN fails too
        return BackendStatus(name, False, f"wrong numbers: off by {error:.3g}", _fix_for(name))
    return BackendStatus(name, True, f"forward and backward ran with {dtype} on {device}")


def _fix_for(name: str) -> str:
    if name != "xformers":
        return ""
    if (torch.version.cuda or "").startswith("12") or _cudart_path() is not None:
        return "install the xformers that matches this torch, or set XFORMERS_DISABLED=1"
    return "pip install nvidia-cuda-runtime-cu12, whose libcudart.so.12 the xformers wheel needs"


def _trial_error(kernel: Kernel, device: torch.device, dtype: torch.dtype) -> float:
    """Largest deviation of a packed forward and backward from softmax in float64, at head width 64."""
    groups: Groups = ((2, 16), (1, 24))

    def forward_backward(kernel: Kernel, values: Tensor) -> tuple[Tensor, Tensor]:
        values = values.detach().requires_grad_()
        out = kernel(values[0], values[1], values[2], groups)
        out.square().sum().backward()
        assert values.grad is not None
        return out.detach(), values.grad

    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        # no random numbers: a probe must not move the run's generators
        start = torch.arange(3 * token_count(groups) * 2 * 64, dtype=torch.float64).mul(0.37).sin()
        start = start.view(3, token_count(groups), 2, 64)
        # both start from the same rounded numbers, so that the difference is the kernel's alone
        rounded = start.to(dtype)
        expected = forward_backward(_attend_plain, rounded.double())
        found = forward_backward(kernel, rounded.to(device))
        return max(
            float((a - b.cpu().double()).abs().max() / a.abs().max()) for a, b in zip(expected, found, strict=True)
        )


def _first_line(fault: Exception) -> str:
    lines = [line.strip() for line in str(fault).splitlines() if line.strip()]
    return f"{type(fault).__name__}: {' '.join(lines)[:300]}"


# --- kernels ---------------------------------------------------------------------------------------------------------


def _attend_plain(q_TAE: Tensor, k_TAE: Tensor, v_TAE: Tensor, groups: Groups) -> Tensor:
    def one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        wide = scores if scores.dtype == torch.float64 else scores.float()
        return wide.softmax(-1).to(v.dtype) @ v

    return _by_group(one, q_TAE, k_TAE, v_TAE, groups)


def _attend_sdpa(q_TAE: Tensor, k_TAE: Tensor, v_TAE: Tensor, groups: Groups) -> Tensor:
    return _by_group(F.scaled_dot_product_attention, q_TAE, k_TAE, v_TAE, groups)


def _by_group(
    one: Callable[[Tensor, Tensor, Tensor], Tensor], q_TAE: Tensor, k_TAE: Tensor, v_TAE: Tensor, groups: Groups
) -> Tensor:
    """One call on (B, A, N, E) for each group; views only, but for the last joining of several groups."""
    if len(groups) == 1:
        pieces = [(q_TAE, k_TAE, v_TAE)]
    else:
        sizes = [samples * tokens for samples, tokens in groups]
        # split, not slices: its backward is one concatenation
        pieces = list(zip(q_TAE.split(sizes), k_TAE.split(sizes), v_TAE.split(sizes), strict=True))
    outs = [
        one(*(part.unflatten(0, group).transpose(1, 2) for part in piece)).transpose(1, 2).flatten(0, 1)
        for piece, group in zip(pieces, groups, strict=True)
    ]
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _attend_varlen(q_TAE: Tensor, k_TAE: Tensor, v_TAE: Tensor, groups: Groups) -> Tensor:
    varlen = importlib.import_module("torch.nn.attention.varlen")  # from torch 2.10 on
    starts = _starts(groups, str(q_TAE.device))
    longest = max(tokens for _, tokens in groups)
    return varlen.varlen_attn(q_TAE, k_TAE, v_TAE, starts, starts, longest, longest)


@functools.lru_cache(maxsize=32)
def _starts(groups: Groups, device: str) -> Tensor:
    lengths = [tokens for samples, tokens in groups for _ in range(samples)]
    with torch.inference_mode(False):  # kept beyond this call
        return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def _attend_xformers(q_TAE: Tensor, k_TAE: Tensor, v_TAE: Tensor, groups: Groups) -> Tensor:
    ops, _ = _import_xformers()
    if len(groups) == 1:
        q, k, v = (part.unflatten(0, groups[0]) for part in (q_TAE, k_TAE, v_TAE))
        return ops.memory_efficient_attention(q, k, v).flatten(0, 1)
    mask = _block_mask(groups, str(q_TAE.device))
    return ops.memory_efficient_attention(q_TAE[None], k_TAE[None], v_TAE[None], attn_bias=mask)[0]


@functools.lru_cache(maxsize=32)
def _block_mask(groups: Groups, device: str) -> object:
    """Block-diagonal mask of a packed batch; kept, because building one costs a transfer to the device."""
    _, biases = _import_xformers()
    lengths = [tokens for samples, tokens in groups for _ in range(samples)]
    with torch.inference_mode(False):
        return biases.BlockDiagonalMask.from_seqlens(lengths, device=torch.device(device))


_KERNELS: dict[str, Kernel] = {
    "xformers": _attend_xformers,
    "sdpa": _attend_sdpa,
    "varlen": _attend_varlen,
    "plain": _attend_plain,
}


# --- xformers --------------------------------------------------------------------------------------------------------


def _xformers_disabled() -> bool:
    return os.environ.get("XFORMERS_DISABLED", "").strip().lower() in ("1", "true", "yes", "on")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@functools.cache
def _import_xformers() -> tuple[ModuleType, ModuleType]:
    """xformers' operators and its mask types, imported without its noise."""
    _preload_cudart()
    noisy = logging.getLogger("xformers")
    level = noisy.level
    noisy.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module("xformers.ops"), importlib.import_module("xformers.ops.fmha.attn_bias")
    finally:
        noisy.setLevel(level)


def _preload_cudart() -> None:
    """Put CUDA 12's runtime where the xformers wheel, linked to it, finds it beside a torch built for CUDA 13."""
    path = None if (torch.version.cuda or "").startswith("12") else _cudart_path()
    if path is not None:
        try:
            ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            logger.warning("%s cannot be loaded: %s", path.name, error)


def _cudart_path() -> Path | None:
    """libcudart.so.12 of the package nvidia-cuda-runtime-cu12, if it is installed."""
    try:
        files = metadata.files("nvidia-cuda-runtime-cu12") or []
    except metadata.PackageNotFoundError:
        return None
    found = [Path(str(file.locate())) for file in files if file.name == "libcudart.so.12"]
    return found[0] if found and found[0].is_file() else None
