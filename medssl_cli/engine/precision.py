"""Number formats of a run: fp32 as the default, TF32 matrices, or half precision under autocast.

Parameters, gradients and optimizer state are float32 in every mode. fp32 means fp32: PyTorch's default of TF32
convolutions is turned off for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

from medssl_cli.core.config import Config
from medssl_cli.engine.distributed import NetworkShardingConfig

PrecisionName = Literal["fp32", "tf32", "bf16", "fp16"]
AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Number format of autocast by the name of a precision; the others have none."""


class ComputePrecisionConfig(Config):
    """Number format of the forward and backward pass."""

    precision: PrecisionName = "fp32"
    """fp32, tf32 (matrices with 10 bits of mantissa), bf16 or fp16 under autocast; fp16 scales the loss."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Several processes: ddp keeps whole copies; fsdp cuts student and teacher into pieces, as these sections say."""
    student: NetworkShardingConfig = NetworkShardingConfig()
    """With fsdp: the student's modules."""
    teacher: NetworkShardingConfig = NetworkShardingConfig()
    """With fsdp: the teacher's modules."""


class Precision:
    """Autocast, TF32 switch and loss scale of one run.

    Args:
        name: Number format.
        device: Where the run computes.
    """

    overflow_limit = 20
    """Updates in a row that fp16 may skip before the run is called non-finite; the scale has then fallen 2^20-fold."""

    def __init__(self, name: PrecisionName, device: torch.device) -> None:
        self.name, self.device = name, device
        self.skipped_in_a_row = 0
        self._scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")
        torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
        torch.backends.cudnn.allow_tf32 = name == "tf32"

    @property
    def scales_loss(self) -> bool:
        """True for fp16, where an infinite gradient is normal while the scale settles."""
        return self._scaler.is_enabled()

    def autocast(self) -> AbstractContextManager[Any]:
        """Context of the forward pass."""
        dtype = AUTOCAST_DTYPES.get(self.name)
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype)

    def backward(self, loss: Tensor) -> None:
        """Gradients of the scaled loss."""
        self._scaler.scale(loss).backward()

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Bring the gradients back to their true size; before they are clipped."""
        self._scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """One update."""
        self._scaler.step(optimizer)
        self._scaler.update()
        self.skipped_in_a_row = 0

    def skip(self) -> None:
        """Lower the loss scale in place of an update whose gradient overflowed."""
        self._scaler.update()
        self.skipped_in_a_row += 1

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers for the checkpoint; only fp16 has any."""
        return {"scaler": self._scaler.state_dict(), "skipped": self.skipped_in_a_row} if self.scales_loss else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what ``state_dict`` gave."""
        if self.scales_loss and state:
            self._scaler.load_state_dict(dict(state["scaler"]))
            self.skipped_in_a_row = int(state["skipped"])
