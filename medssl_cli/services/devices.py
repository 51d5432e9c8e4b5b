"""The device a command works on: as asked, never another in silence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from medssl_cli.core.errors import ConfigError, ResourceError
from medssl_cli.core.wording import counted


def resolve_device(name: str) -> torch.device:
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N`` to a device that is there.

    Raises:
        ConfigError: Another name.
        ResourceError: The device is absent.
    """
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()) or (kind == "cpu" and index):
        raise ConfigError(
            f"There is no device {name!r}.",
            where=f"--device {name}",
            fix="use auto, cpu, cuda or cuda:N",
            code="device_unknown",
        )
    if kind == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    number = int(index or 0)
    if number >= count:
        build = torch.version.cuda or "no CUDA"
        raise ResourceError(
            f"The device {name} is absent.",
            where=f"{counted(count, 'CUDA device')}; torch {torch.__version__} was built for {build}",
            fix="pass --device cpu, free a GPU, or install a CUDA build of torch; `medssl doctor` tells more",
            code="device_absent",
        )
    return torch.device("cuda", number)


def describe_device(device: torch.device) -> str:
    """Name for logs and ``run.json``."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"cpu ({counted(torch.get_num_threads(), 'thread')})"


@contextmanager
def saying_memory(device: torch.device, keys: str = "batch_size=1, a smaller max_side") -> Iterator[None]:
    """Turn a lack of memory into an error that tells what to do.

    Args:
        device: Where it is computed.
        keys: Settings that need less.

    Raises:
        ResourceError: Out of memory.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise ResourceError(
            "There is not enough memory for this case.",
            where=describe_device(device),
            fix=f"pass {keys}, or --device cpu",
            code="memory_full",
        ) from error
