import itertools
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import KFold, train_test_split

from medssl_cli.core.errors import ConfigError, DataError
from medssl_cli.data.manifest import patient_of, read_table, row_ids
from medssl_cli.data.split import DEFAULT_RATIOS, Item, check_ratios, fold_items, prevalence, split_items


def plain(n: int) -> list[Item]:
    return [Item(f"case_{i:03d}", f"case_{i:03d}") for i in range(n)]


@pytest.mark.parametrize("n", [4, 7, 10, 20, 41, 100, 400, 997])
@pytest.mark.parametrize("seed", [42, 0])
def test_p08_t24_equals_two_stage_scikit_learn(n: int, seed: int) -> None:
    items = plain(n)
    ids = sorted(item.item_id for item in items)
    train, held = train_test_split(ids, test_size=0.30, random_state=seed)
    val, test = train_test_split(held, test_size=0.5, random_state=seed)
    random.Random(n).shuffle(items)
    assert split_items(items, seed=seed) == {"train": sorted(train), "val": sorted(val), "test": sorted(test)}


def test_p08_other_ratios_equal_scikit_learn() -> None:
    ids = [item.item_id for item in plain(53)]
    train, held = train_test_split(ids, test_size=0.4, random_state=1)
    val, test = train_test_split(held, test_size=0.75, random_state=1)
    split = split_items(plain(53), (0.6, 0.1, 0.3), seed=1)
    assert split == {"train": sorted(train), "val": sorted(val), "test": sorted(test)}


def test_one_study_a_patient_is_the_plain_split() -> None:
    named = [Item(item.item_id, f"patient {99 - i}") for i, item in enumerate(plain(30))]
    assert split_items(named) == split_items(plain(30))


def test_folds_equal_scikit_learn() -> None:
    ids = np.array([item.item_id for item in plain(23)])
    theirs = KFold(5, shuffle=True, random_state=42).split(ids)
    ours = fold_items(plain(23), 5)
    assert [pair["val"] for pair in ours] == [sorted(ids[val]) for _, val in theirs]
    assert all(sorted(pair["train"] + pair["val"]) == sorted(ids) for pair in ours)


def test_zero_share_gives_an_empty_part() -> None:
    split = split_items(plain(10), (0.8, 0.2, 0.0))
    assert [len(split[name]) for name in ("train", "val", "test")] == [8, 2, 0]
    assert len(split_items(plain(4), (1.0, 0.0, 0.0))["train"]) == 4


@pytest.mark.parametrize("ratios", [(0.7, 0.2, 0.2), (1.2, -0.1, -0.1), (0.0, 0.5, 0.5), (float("nan"), 0.5, 0.5)])
def test_ratios_are_checked(ratios: tuple[float, float, float]) -> None:
    with pytest.raises(ConfigError, match="shares of one whole"):
        check_ratios(ratios)


@pytest.mark.parametrize("n", [1, 2])
def test_too_few_groups_are_refused(n: int) -> None:
    with pytest.raises(DataError, match="too few groups") as caught:
        split_items(plain(n))
    assert f"{n} groups" in caught.value.where
    with pytest.raises(DataError, match="too few"):
        fold_items(plain(n), 4)
    with pytest.raises(ConfigError):
        fold_items(plain(3), 1)


def test_small_sets_fill_every_part() -> None:
    for strata in ((), ("y=1",)):
        items = [Item(name, name, strata) for name in "abcd"]
        assert all(split_items(items[:n])[part] for n in (3, 4) for part in ("train", "val", "test"))
        assert all(pair["val"] and pair["train"] for pair in fold_items(items, 4))


def test_ids_are_unique_and_some() -> None:
    with pytest.raises(DataError, match="twice"):
        split_items([*plain(5), Item("case_001", "x")])
    with pytest.raises(DataError, match="nothing to split"):
        split_items([])


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 12), st.sampled_from("abc")), min_size=1, max_size=40),
    st.booleans(),
    st.integers(0, 5),
)
def test_t24_groups_are_never_cut(rows: list[tuple[int, str]], with_strata: bool, seed: int) -> None:
    items = [Item(f"i{n:02d}", f"p{p}", (f"y={y}",) if with_strata else ()) for n, (p, y) in enumerate(rows)]
    if len({item.group for item in items}) < 3:
        with pytest.raises(DataError, match="too few groups"):
            split_items(items, seed=seed)
        return
    split = split_items(items, seed=seed)
    sides = [{item.group for item in items if item.item_id in ids} for ids in split.values()]
    assert not any(a & b for a, b in itertools.combinations(sides, 2))
    assert sorted(itertools.chain(*split.values())) == sorted(item.item_id for item in items)
    shuffled = items[:]
    random.Random(seed).shuffle(shuffled)
    assert split_items(shuffled, seed=seed) == split


def test_strata_are_spread_by_hand() -> None:
    items = [Item(f"{i:03d}", f"{i:03d}", ("y=1",) if i < 20 else ("y=0",)) for i in range(100)]
    split = split_items(items)
    assert [len(split[name]) for name in split] == [70, 15, 15]
    assert [sum(name < "020" for name in split[part]) for part in split] == [14, 3, 3]
    assert prevalence(items, split["val"]) == {"y=0": pytest.approx(0.8), "y=1": pytest.approx(0.2)}
    folds = fold_items(items, 5)
    assert [sum(name < "020" for name in pair["val"]) for pair in folds] == [4] * 5


def test_several_labels_are_spread() -> None:
    rng = np.random.default_rng(0)
    items = []
    for i in range(400):
        strata = tuple(f"{name}=1" for name, p in (("a", 0.5), ("b", 0.1), ("c", 0.03)) if rng.random() < p)
        items.append(Item(f"{i:03d}", f"p{i // 2}", strata or ("none",)))
    split = split_items(items)
    whole = prevalence(items, [item.item_id for item in items])
    for ids in split.values():
        part = prevalence(items, ids)
        assert all(abs(part[name] - whole[name]) < 0.04 for name in whole), (part, whole)


def test_real_marksheet_keeps_patients_and_prevalence(real_data: Path) -> None:
    table = read_table(real_data / "picai_labels_subset/marksheet.csv")
    groups, _ = patient_of(table)
    labels = table.column("case_csPCa")
    items = [Item(i, g, (f"case_csPCa={y}",)) for i, g, y in zip(row_ids(table), groups, labels, strict=True)]
    split = split_items(items)
    assert [len(ids) for ids in split.values()] == [700, 150, 150]
    for ids in split.values():
        assert prevalence(items, ids)["case_csPCa=YES"] == pytest.approx(0.282, abs=0.005)
    several = [g for g, n in Counter(groups).items() if n > 1]
    assert len(several) > 10
    group_of = {item.item_id: item.group for item in items}
    sides = {g: {name for name, ids in split.items() if any(group_of[i] == g for i in ids)} for g in several}
    assert all(len(side) == 1 for side in sides.values())
    assert DEFAULT_RATIOS == (0.70, 0.15, 0.15)
