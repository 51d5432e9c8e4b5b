"""How a head does when sequences are missing: every smaller set of them, and one dropped at random for each case."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from medssl_cli.core.errors import DataError
from medssl_cli.core.run import seed_for
from medssl_cli.services.evaluate_measures import measure
from medssl_cli.services.evaluate_request import Scored, SequenceScorer
from medssl_cli.services.predictions import decisions

RANDOM = "random"
DEFINITION = (
    "sequences not named are hidden from the network (mask tokens); a case that has none of those named is left out; "
    "random: of each case with several sequences one, drawn by seed and case, is hidden"
)
CSV_HEADER = ("sequences", "n", "n_groups", "metric", "value", "ci_low", "ci_high")


def missing_facts(scored: Scored, scorer: SequenceScorer, draws: int, seed: int) -> list[dict[str, Any]]:
    """Metrics with all sequences of each case, with every smaller set of them, and with one dropped at random.

    Raises:
        DataError: No case has several sequences.
    """
    if all(len(own) < 2 for own in scorer.of_case.values()):
        raise DataError(
            "No case has several sequences: none can be left out.",
            where=f"the model's sequences: {', '.join(scorer.names)}",
            fix="leave --missing-sequences out",
            code="sequences_single",
        )
    table = [_row(scored, "all", scorer.names, scorer.of_case, None, draws, seed)]
    for subset in smaller_sets(scorer.names):
        shown = {case_id: _kept(own, subset) for case_id, own in scorer.of_case.items()}
        table.append(_row(scored, "-".join(subset), subset, _some(shown), scorer, draws, seed))
    dropped = {case_id: drop_one(own, case_id, seed) for case_id, own in scorer.of_case.items()}
    table.append(_row(scored, RANDOM, (), _some(dropped), scorer, draws, seed))
    return table


def smaller_sets(names: Sequence[str]) -> list[tuple[str, ...]]:
    """Every set of at least one and not all of the names, the largest first."""
    return [subset for size in range(len(names) - 1, 0, -1) for subset in itertools.combinations(names, size)]


def drop_one(own: tuple[str, ...], case_id: str, seed: int) -> tuple[str, ...]:
    """What is left of the sequences of a case; nothing of a single one."""
    if len(own) < 2:
        return ()
    dropped = np.random.default_rng(seed_for(seed, "dropped sequence", case_id)).integers(len(own))
    return own[:dropped] + own[dropped + 1 :]


def csv_rows(table: Sequence[Mapping[str, Any]]) -> list[tuple[object, ...]]:
    """One line for each set and metric."""
    return [
        (row["sequences"], row["n"], row["n_groups"], name, metric["value"], metric["ci_low"], metric["ci_high"])
        for row in table
        for name, metric in row["metrics"].items()
    ]


def _kept(own: tuple[str, ...], subset: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in own if name in subset)


def _some(shown: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    return {case_id: names for case_id, names in shown.items() if names}


def _row(
    scored: Scored,
    name: str,
    names: tuple[str, ...],
    shown: Mapping[str, tuple[str, ...]],
    scorer: SequenceScorer | None,
    draws: int,
    seed: int,
) -> dict[str, Any]:
    places = [place for place, case_id in enumerate(scored.table.case_ids) if case_id in shown]
    row: dict[str, Any] = {"sequences": name, "shown": list(names), "n": len(places)}
    if not places:
        return {**row, "n_groups": 0, "metrics": {}, "reason": "no case has any of these sequences"}
    table = scored.table.taken(places)
    if scorer is not None:
        values_NC = scorer.predict({case_id: shown[case_id] for case_id in table.case_ids})
        predicted = decisions(table.task, values_NC, scored.thresholds)
        table = replace(table, values_NC=values_NC, predicted_NC=predicted)
    evaluation = measure(table, scored.thresholds, draws=draws, seed=seed)
    return {**row, "n_groups": evaluation.n_groups, "metrics": evaluation.to_json()["metrics"]}
