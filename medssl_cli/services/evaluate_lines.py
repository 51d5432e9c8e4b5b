"""Lines on the terminal that every evaluation has: numbers, tests, and the cases that were left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medssl_cli.core.errors import PartialFailure
from medssl_cli.core.run import hide_home
from medssl_cli.core.wording import counted
from medssl_cli.services.evaluate_request import Failure


def short_number(value: float) -> str:
    """Three decimals below 10, else four digits."""
    return f"{round(value, 3) + 0.0:.3f}" if abs(value) < 10 else f"{value:.4g}"  # + 0.0: never -0.000


def said_interval(metric: Mapping[str, Any]) -> str:
    """``  (0.851 to 0.962)``; empty where a metric has no interval."""
    if metric["ci_low"] is None:
        return ""
    return f"  ({short_number(metric['ci_low'])} to {short_number(metric['ci_high'])})"


def said_test(name: str, test: Mapping[str, Any]) -> str:
    """``  compared, Dice: +0.034, p = 0.02 (paired permutation)``."""
    difference = "-" if test["difference"] is None else f"{round(test['difference'], 3) + 0.0:+.3f}"
    p = "-" if test["p"] is None else f"{test['p']:.3g}"
    return f"  compared, {name}: {difference}, p = {p} ({test['method']})"


def partly_evaluated(failures: Sequence[Failure], out: Path, done: str = "read") -> PartialFailure | None:
    """The error to end with where cases failed; ``done`` is what could not be done with them."""
    if not failures:
        return None
    return PartialFailure(
        f"{counted(len(failures), 'case')} could not be {done} and {'is' if len(failures) == 1 else 'are'} "
        "not evaluated.",
        where=hide_home(str(out / "failures.csv")),
        fix="see the reasons there; the other cases are evaluated",
        code="cases_failed",
    )
