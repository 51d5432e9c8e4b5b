"""Splits and folds of groups: no patient is ever on two sides, and the same input gives the same split.

Two methods. Without strata: scikit-learn's two-stage random split of the sorted groups, number for number. With
strata: iterative stratification (Sechidis et al. 2011) of whole groups, in which the rarest class is dealt first and
each group goes to the split that still wants most of that class.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from medssl_cli.core.errors import ConfigError, DataError

SPLITS = ("train", "val", "test")
DEFAULT_RATIOS = (0.70, 0.15, 0.15)


@dataclass(frozen=True)
class Item:
    """One row of what is split.

    Args:
        item_id: Unique among the items.
        group: Patient, or study, or the item itself: kept on one side.
        strata: Classes that should be spread evenly, e.g. ``("csPCa=YES",)``; several for several labels.
    """

    item_id: str
    group: str
    strata: tuple[str, ...] = ()


def split_items(
    items: Sequence[Item], ratios: tuple[float, float, float] = DEFAULT_RATIOS, seed: int = 42
) -> dict[str, list[str]]:
    """Ids of ``train``, ``val`` and ``test``, each sorted; independent of the order of ``items``.

    With groups of one and no strata the ids are those of ``train_test_split(sorted(ids), test_size=val+test)`` and then
    ``train_test_split(held, test_size=test/(val+test))``, both with ``random_state=seed``. A part with a share that
    rounding would leave empty gets one group of the largest part.

    Raises:
        ConfigError: Ratios that are negative or do not sum to 1.
        DataError: Too few groups for the ratios, or one id twice.
    """
    check_ratios(ratios)
    groups = group_items(items)
    if any(item.strata for item in items):
        chosen = _stratified(groups, ratios, seed)
    else:
        chosen = _two_stage(list(groups), ratios, seed)
    _fill_empty(chosen, ratios)
    for name, ratio, members in zip(SPLITS, ratios, chosen, strict=True):
        if ratio > 0 and not members:
            raise _too_few(len(groups), f"ratio {ratio:g} leaves {name} empty", "--ratios")
    split = {name: _ids(groups, members) for name, members in zip(SPLITS, chosen, strict=True)}
    _assert_apart(items, split)
    return split


def fold_items(items: Sequence[Item], folds: int, seed: int = 42) -> list[dict[str, list[str]]]:
    """``folds`` pairs of ``train`` and ``val`` ids; every item is in exactly one ``val``.

    Without strata the folds are those of scikit-learn's ``KFold(folds, shuffle=True, random_state=seed)`` over the
    sorted groups.

    Raises:
        ConfigError: Fewer than two folds.
        DataError: Fewer groups than folds.
    """
    if folds < 2:
        raise ConfigError("Folds come in twos or more.", where=f"--folds {folds}", fix="pass --folds 5", code="folds")
    groups = group_items(items)
    if len(groups) < folds:
        raise _too_few(len(groups), f"{folds} folds", "--folds")
    if any(item.strata for item in items):
        parts = _stratified(groups, (1 / folds,) * folds, seed)
    else:
        order = np.random.RandomState(seed).permutation(len(groups))
        keys = list(groups)
        parts = [[keys[i] for i in chunk] for chunk in np.array_split(order, folds)]
    _fill_empty(parts, (1 / folds,) * folds)
    pairs = []
    for part in parts:
        held = set(part)
        pair = {"train": _ids(groups, [key for key in groups if key not in held]), "val": _ids(groups, part)}
        _assert_apart(items, pair)
        pairs.append(pair)
    return pairs


def check_ratios(ratios: Sequence[float]) -> None:
    """Refuse ratios that are negative, not finite, without training part, or that do not sum to 1.

    Raises:
        ConfigError: With the sum.
    """
    total = math.fsum(ratios)
    if not all(0 <= r <= 1 for r in ratios) or not math.isclose(total, 1.0, abs_tol=1e-6) or ratios[0] == 0:
        raise ConfigError(
            "The ratios of train, val and test are not shares of one whole.",
            where=f"--ratios {' '.join(f'{r:g}' for r in ratios)}: the sum is {total:g}",
            fix="e.g. --ratios 0.7 0.15 0.15; val or test may be 0",
            code="ratios",
        )


def group_items(items: Sequence[Item]) -> dict[str, list[Item]]:
    """Items by group, each sorted by id; groups in the order of their first id.

    Raises:
        DataError: One id twice, or no item.
    """
    counts = Counter(item.item_id for item in items)
    repeated = sorted(name for name, n in counts.items() if n > 1)
    if repeated or not items:
        raise DataError(
            "One id stands twice." if repeated else "There is nothing to split.",
            where=", ".join(repeated[:8]) or "0 cases",
            fix="make ids unique" if repeated else "check the source",
            code="id_duplicate" if repeated else "ids_none",
        )
    groups: dict[str, list[Item]] = {}
    for item in sorted(items, key=lambda item: item.item_id):
        groups.setdefault(item.group, []).append(item)
    return groups


def prevalence(items: Sequence[Item], ids: Sequence[str]) -> dict[str, float]:
    """Share of the items of ``ids`` that carry each class found in ``items``, by class name."""
    wanted = set(ids)
    counts = Counter(stratum for item in items if item.item_id in wanted for stratum in set(item.strata))
    names = sorted({stratum for item in items for stratum in item.strata})
    return {name: counts[name] / len(ids) if ids else math.nan for name in names}


def _two_stage(groups: list[str], ratios: Sequence[float], seed: int) -> list[list[str]]:
    _, val, test = ratios
    held_ratio = round(val + test, 10)  # 0.15 + 0.15 must not become 0.30000000000000004, whose ceiling differs
    train, held = _shuffle_split(groups, held_ratio, seed)
    kept, tested = _shuffle_split(held, round(test / held_ratio, 10) if held_ratio else 0.0, seed)
    return [train, kept, tested]


def _shuffle_split(names: list[str], test_size: float, seed: int) -> tuple[list[str], list[str]]:
    """(train, test) as of scikit-learn's ``train_test_split``; a test size of 0 or 1 leaves one of them empty."""
    count = math.ceil(test_size * len(names))
    order = np.random.RandomState(seed).permutation(len(names))
    return [names[i] for i in order[count:]], [names[i] for i in order[:count]]


def _stratified(groups: Mapping[str, list[Item]], ratios: Sequence[float], seed: int) -> list[list[str]]:
    """Iterative stratification of whole groups.

    The class with the fewest items left is dealt first, its largest groups first, ties in an order drawn from the
    seed. A group goes where most of that class is still wanted; ties to where most items are wanted, then leftmost.
    """
    counts = {
        key: Counter(stratum for item in members for stratum in set(item.strata)) for key, members in groups.items()
    }
    keys = list(groups)
    rank = {keys[i]: place for place, i in enumerate(np.random.RandomState(seed).permutation(len(keys)))}
    total: Counter[str] = sum(counts.values(), Counter())
    wanted = [{name: ratio * n for name, n in total.items()} for ratio in ratios]
    room = [ratio * sum(len(members) for members in groups.values()) for ratio in ratios]
    open_splits = [i for i, ratio in enumerate(ratios) if ratio > 0]
    parts: list[list[str]] = [[] for _ in ratios]
    left = set(keys)
    while left:
        rest: Counter[str] = sum((counts[key] for key in left), Counter())
        rarest = min(rest, key=lambda name: (rest[name], name)) if rest else ""
        holders = [key for key in left if not rarest or counts[key][rarest]]
        for key in sorted(holders, key=lambda key: (-counts[key][rarest], rank[key])):
            best = max(open_splits, key=lambda i: (round(wanted[i].get(rarest, 0.0), 9), round(room[i], 9), -i))
            parts[best].append(key)
            room[best] -= len(groups[key])
            for name, n in counts[key].items():
                wanted[best][name] -= n
        left.difference_update(holders)
    return parts


def _fill_empty(parts: list[list[str]], ratios: Sequence[float]) -> None:
    """Move the group dealt last of the largest part into each empty part that has a share, while there are some."""
    for part, ratio in zip(parts, ratios, strict=True):
        largest = max(parts, key=len)
        if ratio > 0 and not part and len(largest) > 1:
            part.append(largest.pop())


def _ids(groups: Mapping[str, list[Item]], keys: Sequence[str]) -> list[str]:
    return sorted(item.item_id for key in keys for item in groups[key])


def _assert_apart(items: Sequence[Item], split: Mapping[str, Sequence[str]]) -> None:
    """Every item on exactly one side, every group too."""
    group_of = {item.item_id: item.group for item in items}
    sides = [{group_of[name] for name in ids} for ids in split.values()]
    for i, side in enumerate(sides):
        for other in sides[i + 1 :]:
            assert not side & other, f"groups on two sides: {sorted(side & other)[:5]}"
    assert sorted(name for ids in split.values() for name in ids) == sorted(group_of), "the union is not all items"


def _too_few(groups: int, detail: str, option: str) -> DataError:
    return DataError(
        "There are too few groups for this split.",
        where=f"{groups} groups; {detail}",
        fix=f"add cases or change {option}; patients are never cut in two",
        code="too_few_groups",
    )
