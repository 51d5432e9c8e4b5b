"""Words of summaries and of errors that stand for many."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from medssl_cli.core.run import hide_home


def up_to_date(n: int) -> str:
    """The end of a summary that tells what was done before; empty where nothing was."""
    return f", {n} {'was' if n == 1 else 'were'} up to date" if n else ""


def first_and_more(reasons: Sequence[str], listed_in: Path | None) -> str:
    """The first of several reasons, how many more there are, and the file that lists them all, if there is one."""
    if len(reasons) == 1:
        return reasons[0]
    listed = "" if listed_in is None else f", all in {hide_home(str(listed_in))}"
    return f"{reasons[0]}\nand {len(reasons) - 1} more{listed}"
