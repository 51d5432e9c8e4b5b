"""Words of messages that depend on numbers."""

from __future__ import annotations


def counted(n: int, noun: str) -> str:
    """``1 case``, ``2 cases``: for nouns whose plural takes an s."""
    return f"{n} {noun}{'' if n == 1 else 's'}"
