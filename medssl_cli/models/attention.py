"""Attention over packed tokens, and the one place where its kernel is chosen.

Sequences of several lengths lie end to end in one tensor; ``groups`` says how: ((samples, tokens each), …). Nothing
looks across two samples. A kernel counts as available only after a tiny forward and backward gave the right numbers on
the very device: an import, or what a library says about itself, proves nothing. A run that knows its shapes lets
``choose_by_trial`` time what works and keep the fastest; without a trial the first that works is taken.

Letters: T tokens of all groups together, A heads, E width of one head.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import logging
import math
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from itertools import accumulate
from pathlib import Path
from types import ModuleType
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from medssl_cli.core.errors import ConfigError, ResourceError

logger = logging.getLogger(__name__)

Groups = tuple[tuple[int, int], ...]
"""(number of samples, tokens of each), in the order in which they lie in the packed tensor."""

Kernel = Callable[[Tensor, Tensor, Tensor, Groups], Tensor]

BACKENDS = ("xformers", "sdpa", "sdpa_flash", "sdpa_cudnn", "sdpa_efficient", "varlen", "plain")
"""In the order in which they are tried. ``sdpa`` is whichever kernel PyTorch picks, the next three are its kernels."""

HALF = (torch.float16, torch.bfloat16)

TIE = {"cuda": 0.03, "cpu": 0.15}
"""A kernel must be faster than an earlier one of ``BACKENDS`` by this share to be taken instead; beside other jobs a
CPU repeats a measurement no better, and a choice that flips between two runs would cost equal numbers."""

WORTH_TIMING_MS = 1.0
"""On a CPU a pass that takes less is not told apart from noise: the first kernel stays."""

TRIAL_SECONDS = 1.0
"""Time after which a trial begins no further turn."""

CPU_TRIAL_WEIGHTS = 20_000_000
"""Attention weights of a pass in a trial on a CPU, if its samples can be that few. Not fewer: with the weights of one
sample in its cache ``plain`` looks twice as fast as it is in a run."""


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


@dataclass(frozen=True)
class BackendTiming:
    """How long one kernel took for a forward and backward pass.

    Args:
        name: One of ``BACKENDS``.
        milliseconds: Fastest of the repetitions; None if it was not timed.
        detail: What was timed, or why nothing was.
    """

    name: str
    milliseconds: float | None
    detail: str


@dataclass(frozen=True)
class AttentionChoice:
    """The kernel in use and how it came to be.

    Args:
        name: One of ``BACKENDS``.
        reason: In a few words.
        timings: Of a trial; empty if there was none.
    """

    name: str
    reason: str
    timings: list[BackendTiming] = field(default_factory=list)

    def line(self) -> str:
        """For the log: ``attention: sdpa 1.9 ms, plain 4.0 ms -> sdpa (fastest)``, and what was left out."""
        timed = sorted((t for t in self.timings if t.milliseconds is not None), key=lambda t: t.milliseconds or 0.0)
        figures = ", ".join(f"{t.name} {t.milliseconds:.3g} ms" for t in timed)
        skipped = "; ".join(f"{t.name}: {t.detail}" for t in self.timings if t.milliseconds is None)
        text = f"{figures} -> {self.name}" if figures else self.name
        return f"attention: {text} ({self.reason})" + (f"; not timed: {skipped}" if skipped else "")


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
    key = _key(device, dtype)
    if key not in _chosen:
        _chosen[key] = _decide(device, dtype)
    return _chosen[key]


# The whole effect of torch.compiler.assume_constant_result, which would import torch._dynamo here: 2 s at every start.
choose_backend.__dict__["_dynamo_marked_constant"] = True


def _key(device: torch.device, dtype: torch.dtype) -> tuple[str, torch.dtype, str | None, bool]:
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return str(device), dtype, _forced, _xformers_disabled()


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
    if not _say_broken_xformers(first, last.name, device, dtype):
        logger.debug("attention on %s with %s: %s", device, dtype, last.name)


def _say_broken_xformers(xformers: BackendStatus, name: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Warn if xformers is installed for nothing; True if so."""
    tried = _serves("xformers", device, dtype) and not _xformers_disabled() and _version("xformers")
    if not tried or xformers.works:
        return False
    why = f"xformers {_version('xformers')} is installed but does not work: {xformers.detail}; {xformers.fix}"
    logger.warning("attention on %s: %s (%s)", device, name, why)
    return True


# --- trial -----------------------------------------------------------------------------------------------------------


def choose_by_trial(
    device: torch.device,
    dtype: torch.dtype,
    groups: Groups,
    heads: int,
    head_dim: int,
    *,
    preferred: str | None = None,
    layers: int = 1,
    repeats: int = 5,
) -> AttentionChoice:
    """Time every kernel that works on the shapes of a run and use the fastest from now on.

    Call it before anything is compiled: a compiled block keeps the kernel it was compiled with.

    Args:
        device: Where the run computes.
        dtype: Number type of queries, keys and values.
        groups: How the samples of a student's pass lie in its packed tensor.
        heads: A.
        head_dim: E.
        preferred: Kernel of an earlier part of the run, or of another process: taken without a trial if it works, so
            that a resumed run computes the same numbers.
        layers: Blocks that keep their activations for the backward pass.
        repeats: Passes of each kernel at most.

    Returns:
        The choice; ``line()`` is for the log.

    Raises:
        ResourceError: No kernel works here, or not the one that ``set_backend`` asked for.
    """
    if _forced is not None:
        return AttentionChoice(choose_backend(device, dtype), "asked for")
    if preferred is not None:
        status = _status(preferred, device, dtype) if preferred in BACKENDS else None
        if status is not None and status.works:
            _chosen[_key(device, dtype)] = preferred
            return AttentionChoice(preferred, "as before")
        why = "no such kernel" if status is None else status.detail
        logger.warning("attention: %s, used before, does not work here (%s); numbers may differ", preferred, why)
    names = [name for name in BACKENDS if _serves(name, device, dtype)]
    timings = time_backends(device, dtype, groups, heads, head_dim, names=names, layers=layers, repeats=repeats)
    name, reason = _fastest(timings, device)
    if name is None:
        _chosen.pop(_key(device, dtype), None)  # of another trial
        return AttentionChoice(choose_backend(device, dtype), reason, timings)
    _chosen[_key(device, dtype)] = name
    _say_broken_xformers(_status("xformers", device, dtype), name, device, dtype)
    return AttentionChoice(name, reason, timings)


def time_backends(
    device: torch.device,
    dtype: torch.dtype,
    groups: Groups,
    heads: int,
    head_dim: int,
    *,
    names: Sequence[str] = BACKENDS,
    layers: int = 1,
    repeats: int = 5,
) -> list[BackendTiming]:
    """Forward and backward of each kernel on packed queries, keys and values, in turns.

    On a CPU there are fewer samples in the proportion of the groups, so that a pass takes a fraction of a second. No
    generator is moved, and the memory is given back.

    Args:
        device: Where to compute.
        dtype: Number type.
        groups: How the samples lie in T.
        heads: A.
        head_dim: E.
        names: Kernels to time.
        layers: Blocks that would keep the weights of ``plain`` for the backward pass.
        repeats: Passes of each kernel at most; fewer when they take longer than ``TRIAL_SECONDS``.
    """
    skipped = {name: detail for name in names if (detail := _not_timed(name, device, dtype, groups, heads, layers))}
    if device.type == "cuda" and any(name not in skipped and name != "plain" for name in names):
        skipped.setdefault("plain", "would hold all attention weights at once, and others work")
    groups = groups if device.type == "cuda" else _fewer_samples(groups, heads)
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        timed = [name for name in names if name not in skipped]
        seconds, faults = _time_in_turns(timed, _trial_tokens(device, dtype, groups, heads, head_dim), groups, repeats)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    skipped |= faults
    shape = " + ".join(f"{samples} x {tokens}" for samples, tokens in groups)
    return [
        BackendTiming(name, None, skipped[name])
        if name in skipped
        else BackendTiming(name, 1e3 * min(seconds[name]), f"{shape} tokens, {heads} heads of {head_dim}")
        for name in names
    ]


def _fastest(timings: Sequence[BackendTiming], device: torch.device) -> tuple[str | None, str]:
    """The kernel to take and why; None where timing tells nothing."""
    timed = [(timing.name, timing.milliseconds) for timing in timings if timing.milliseconds is not None]
    if not timed:
        return None, "none could be timed: the first that works"
    least = min(milliseconds for _, milliseconds in timed)
    if device.type != "cuda" and least < WORTH_TIMING_MS:
        return None, "the first that works: too short to be timed"
    limit = least / (1 - TIE.get(device.type, TIE["cpu"]))
    return next((name, "fastest" if ms == least else "as fast as any") for name, ms in timed if ms <= limit)


def _not_timed(name: str, device: torch.device, dtype: torch.dtype, groups: Groups, heads: int, layers: int) -> str:
    """Why a kernel takes no part in a trial; empty if it does."""
    status = _status(name, device, dtype)
    if not status.works:
        return status.detail
    if name == "plain" and device.type == "cpu":
        kept, free = layers * _weights_count(groups, heads) * (4 + dtype.itemsize), _free_memory()
        if free is not None and kept > free / 4:
            return f"would keep {kept / 2**30:.1f} GiB of attention weights, {free / 2**30:.1f} GiB are free"
    return ""


def _fewer_samples(groups: Groups, heads: int) -> Groups:
    common = math.gcd(*(samples for samples, _ in groups))
    fitting = [
        parts
        for parts in range(1, common)
        if common % parts == 0 and _weights_count(groups, heads) <= parts * CPU_TRIAL_WEIGHTS
    ]
    parts = fitting[0] if fitting else common
    return tuple((samples // parts, tokens) for samples, tokens in groups)


def _weights_count(groups: Groups, heads: int) -> int:
    return heads * sum(samples * tokens**2 for samples, tokens in groups)


def _trial_tokens(device: torch.device, dtype: torch.dtype, groups: Groups, heads: int, head_dim: int) -> Tensor:
    """(T, 3, A, E) as the linear layer before attention gives it; of no generator."""
    rows = torch.arange(token_count(groups), device=device).mul(0.37).sin().to(dtype)
    columns = torch.arange(3 * heads * head_dim, device=device).mul(0.11).cos().to(dtype)
    return (rows[:, None] * columns).unflatten(1, (3, heads, head_dim)).requires_grad_()


def _time_in_turns(
    names: Sequence[str], qkv_T3AE: Tensor, groups: Groups, repeats: int
) -> tuple[Mapping[str, list[float]], dict[str, str]]:
    """Seconds of each pass by name, and why a name has none; the first pass of each is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in names}
    faults: dict[str, str] = {}
    grad_TAE = torch.ones_like(qkv_T3AE[:, 0])
    started = time.perf_counter()
    for turn in range(repeats + 1):
        for name in [name for name in names if name not in faults]:
            try:
                took = _timed_pass(_KERNELS[name], qkv_T3AE, grad_TAE, groups)
            except (RuntimeError, ValueError, AssertionError) as fault:  # memory, or shapes that it does not take
                faults[name] = _first_line(fault)
                continue
            if turn:
                seconds[name].append(took)
        if turn == 0:
            started = time.perf_counter()
        elif time.perf_counter() - started > TRIAL_SECONDS:
            break
    return seconds, faults


def _timed_pass(kernel: Kernel, qkv_T3AE: Tensor, grad_TAE: Tensor, groups: Groups) -> float:
    _synchronize(qkv_T3AE.device)
    started = time.perf_counter()
    q, k, v = qkv_T3AE.unbind(1)
    torch.autograd.grad(kernel(q, k, v, groups), qkv_T3AE, grad_TAE)
    _synchronize(qkv_T3AE.device)
    return time.perf_counter() - started


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _free_memory() -> int | None:
    """Bytes of main memory that a new allocation may take; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None


# --- whether a kernel works ------------------------------------------------------------------------------------------


def _serves(name: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a kernel is made for such tensors at all; but for PyTorch's own choice and ``plain``, only on CUDA."""
    if name in ("sdpa", "plain"):
        return True
    return device.type == "cuda" and (dtype in HALF or (name == "sdpa_efficient" and dtype == torch.float32))


def _status(name: str, device: torch.device, dtype: torch.dtype) -> BackendStatus:
    if name == "xformers" and _xformers_disabled():
        return BackendStatus(name, False, "switched off by XFORMERS_DISABLED", "unset XFORMERS_DISABLED")
    if not _serves(name, device, dtype):
        kinds = "CUDA only" if name == "sdpa_efficient" else "half precision on CUDA only"
        return BackendStatus(name, False, f"not used for {dtype} on {device.type}: {kinds}")
    if name == "xformers" and not _version(name):
        return BackendStatus(name, False, "not installed", "pip install 'medssl[xformers]'")
    with warnings.catch_warnings(record=True) as told:  # PyTorch warns why it did not take a kernel
        warnings.simplefilter("always")
        try:
            error = _trial_error(_KERNELS[name], device, dtype)
        except Exception as fault:  # whatever a foreign kernel raises is the answer to the question
            reasons = "; ".join(dict.fromkeys(str(warning.message).split(" (Triggered")[0] for warning in told))
            detail = _first_line(fault) + (f" ({reasons[:300]})" if reasons else "")
            return BackendStatus(name, False, detail, _fix_for(name))
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


def _one_of_sdpa(kernel: SDPBackend) -> Kernel:
    """PyTorch's attention held to one of its kernels; the backward pass follows what the forward pass took."""

    def attend_with(q_TAE: Tensor, k_TAE: Tensor, v_TAE: Tensor, groups: Groups) -> Tensor:
        with sdpa_kernel(kernel):
            return _attend_sdpa(q_TAE, k_TAE, v_TAE, groups)

    return attend_with


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
    from torch.nn.attention.varlen import varlen_attn  # from torch 2.10 on; a statement, or no block could be traced

    starts = _starts(groups, str(q_TAE.device))
    longest = max(tokens for _, tokens in groups)
    return cast(Tensor, varlen_attn(q_TAE, k_TAE, v_TAE, starts, starts, longest, longest))


def _starts(groups: Groups, device: str) -> Tensor:
    """Where each sample begins, and the end; for a compiled block a constant that lies on the device."""
    return _kept_starts(groups, device)


_starts.__dict__["_dynamo_marked_constant"] = True


@functools.lru_cache(maxsize=32)
def _kept_starts(groups: Groups, device: str) -> Tensor:
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
    "sdpa_flash": _one_of_sdpa(SDPBackend.FLASH_ATTENTION),
    "sdpa_cudnn": _one_of_sdpa(SDPBackend.CUDNN_ATTENTION),
    "sdpa_efficient": _one_of_sdpa(SDPBackend.EFFICIENT_ATTENTION),
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
