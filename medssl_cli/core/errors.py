"""The family of errors that a user may meet, each with its exit code.

MedsslError
├── ConfigError       2   wrong usage or configuration
├── DataError         3   data missing, unreadable, inconsistent or leaking
├── PartialFailure    4   finished, some cases failed and are listed
├── NonFiniteError    5   a loss or a gradient became non-finite
├── ResourceError     6   no device, no memory, no disk, missing optional package
├── CheckpointError   7   checkpoint or weights rejected
└── Interrupted      75   a signal came, the state is saved

Everything else that is raised is a bug and ends with exit code 1 and its traceback.
"""

from __future__ import annotations

from typing import ClassVar


class MedsslError(Exception):
    """What went wrong, where, and how to mend it: the three lines a user reads.

    Args:
        what: One sentence, ending in a full stop.
        where: The file, key, case or voxel concerned; several lines are allowed.
        fix: What to do about it.
        code: Short stable name of the fault for JSON results, e.g. ``nifti_truncated``.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, *, where: str = "", fix: str = "", code: str = "") -> None:
        super().__init__(what)
        self.what, self.where, self.fix, self.code = what, where, fix, code

    def __str__(self) -> str:
        lines = [f"error: {self.what}"]
        for label, text in (("where", self.where), ("fix", self.fix)):
            if text:
                lines.append(f"  {label + ':':<6} " + text.replace("\n", "\n         "))
        return "\n".join(lines)


class ConfigError(MedsslError):
    """Wrong usage or configuration; nothing has been written."""

    exit_code = 2


class DataError(MedsslError):
    """Data that is missing, unreadable, inconsistent or leaking between splits."""

    exit_code = 3


class PartialFailure(MedsslError):
    """The command finished, but some cases failed and are listed in ``failures.csv``."""

    exit_code = 4


class NonFiniteError(MedsslError):
    """A loss or a gradient became NaN or infinite; parameters were not touched."""

    exit_code = 5


class ResourceError(MedsslError):
    """A device, memory, disk space or an optional package is missing."""

    exit_code = 6


class CheckpointError(MedsslError):
    """A checkpoint or a weight file was rejected."""

    exit_code = 7


class Interrupted(MedsslError):
    """A signal came; the state is saved and the same command goes on from there."""

    exit_code = 75
