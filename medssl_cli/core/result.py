"""What a use case gives back: lines for people, facts for scripts, and the error to end with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from medssl_cli.core.errors import MedsslError
from medssl_cli.core.run import to_json


@dataclass(frozen=True)
class Result:
    """Outcome of a service.

    Args:
        lines: For people.
        facts: For scripts, with the common header.
        error: Raised by the command after it has printed, when some cases failed.
    """

    lines: list[str]
    facts: dict[str, Any]
    error: MedsslError | None = None

    def summary(self) -> str:
        """A few lines for people."""
        return "\n".join(self.lines)

    def to_json(self) -> str:
        """Strict JSON with the common header."""
        return to_json(self.facts)
