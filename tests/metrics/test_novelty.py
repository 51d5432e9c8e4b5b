import math

import numpy as np
import pytest

from medssl_cli.metrics import novelty as module
from medssl_cli.metrics.novelty import Novelty


def embeddings(n: int = 120, width: int = 16, per_patient: int = 3, seed: int = 0) -> tuple[np.ndarray, list[str]]:
    """Rows around a large common vector; those of a patient lie close together."""
    rng = np.random.default_rng(seed)
    patients = rng.normal(size=(-(-n // per_patient), width))
    rows = 20 + np.repeat(patients, per_patient, axis=0)[:n] + 0.05 * rng.normal(size=(n, width))
    return rows.astype(np.float32), [f"p{i // per_patient}" for i in range(n)]


def test_distances_equal_a_loop_from_the_definition() -> None:
    rows, groups = embeddings(20, 4)
    found = Novelty.fit(rows, groups, k=2)
    wide = rows.astype(np.float64)
    centred = wide - wide.mean(0)
    scale = math.sqrt((centred**2).sum(1).mean())

    def vector(row: np.ndarray) -> np.ndarray:
        one = np.append((row - wide.mean(0)) / scale, 1.0)
        return one / math.sqrt((one**2).sum())

    reference = []
    for i in range(20):
        others = [1 - vector(wide[i]) @ vector(wide[j]) for j in range(20) if groups[i] != groups[j]]
        reference.append(np.mean(sorted(others)[:2]))
    assert found.reference_M == pytest.approx(sorted(reference), abs=1e-6)
    new = np.array([21.0, 19, 20, 20])
    distance = np.mean(sorted(1 - vector(new) @ vector(row) for row in wide)[:2])
    score = found.score(new)
    assert score.distance == pytest.approx(distance, abs=1e-6)
    assert score.percentile == pytest.approx(np.mean(np.array(reference) <= distance))
    assert score.limit == pytest.approx(np.percentile(reference, 99), abs=1e-6)


def test_training_rows_are_not_outside() -> None:
    rows, groups = embeddings()
    found = Novelty.fit(rows, groups)
    scores = [found.score(row) for row in rows]
    assert not any(score.is_outside for score in scores)
    assert all(score.distance <= found.limit for score in scores)


def test_new_patients_of_the_same_kind_are_seldom_outside() -> None:
    rows, groups = embeddings(400, per_patient=1)
    found = Novelty.fit(rows[:300], groups[:300])
    scores = [found.score(row) for row in rows[300:]]
    assert sum(bool(score.is_outside) for score in scores) <= 6
    assert np.mean([score.percentile for score in scores]) == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("direction", ["random", "of a training row", "all ones"])
def test_far_away_rows_are_outside_whatever_their_direction(direction: str) -> None:
    rows, groups = embeddings()
    away = {
        "random": np.random.default_rng(7).normal(size=16),
        "of a training row": rows[5] - rows.mean(0),
        "all ones": np.ones(16),
    }[direction]
    score = Novelty.fit(rows, groups).score(rows.mean(0) + 1000 * away)
    assert score.percentile == 1
    assert score.is_outside is True
    assert score.distance > score.limit


def test_a_patient_is_not_compared_with_itself() -> None:
    rows, groups = embeddings()
    together, apart = Novelty.fit(rows, groups), Novelty.fit(rows, [str(i) for i in range(len(rows))])
    assert together.reference_M.mean() > 1.3 * apart.reference_M.mean()


def test_one_patient_has_no_limit_and_says_so() -> None:
    rows, _ = embeddings(10)
    found = Novelty.fit(rows, ["a"] * 10)
    score = found.score(rows[0] + 50)
    assert math.isnan(score.limit)
    assert math.isnan(score.percentile)
    assert score.is_outside is None
    assert score.distance > 0
    assert found.reason == "the training rows are of one group (patient)"


def test_equal_training_rows_tell_equal_from_different() -> None:
    found = Novelty.fit(np.full((6, 3), 0.1, np.float32), list("abcdef"))
    assert found.score(np.full(3, 0.1, np.float32)).is_outside is False
    assert found.score(np.array([0.1, 0.1, 0.4])).is_outside is True


def test_arrays_come_back_with_and_without_their_prefix() -> None:
    rows, groups = embeddings()
    found = Novelty.fit(rows, groups)
    expected = found.score(rows[3] + 0.3)
    assert Novelty.from_tensors(found.tensors()).score(rows[3] + 0.3) == expected
    stored = {f"novelty.{name}": value for name, value in found.tensors().items()} | {"head.weight": np.zeros(2)}
    assert Novelty.from_tensors(stored).score(rows[3] + 0.3) == expected
    with pytest.raises(ValueError, match="mean, scale"):
        Novelty.from_tensors({"rows": np.zeros((1, 2))})
    broken = {**found.tensors(), "mean": np.zeros(3)}
    with pytest.raises(ValueError, match="do not fit"):
        Novelty.from_tensors(broken)


def test_many_rows_are_thinned_by_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, groups = embeddings(300)
    found = Novelty.fit(rows, groups, most=100)
    assert found.rows_MP.shape == (100, 17)
    assert found.mean_P == pytest.approx(rows.mean(0, dtype=np.float64))
    assert (found.rows_MP == Novelty.fit(rows, groups, most=100).rows_MP).all()
    assert (found.rows_MP != Novelty.fit(rows, groups, most=100, seed=1).rows_MP).any()
    monkeypatch.setattr(module, "_BLOCK", 7)
    assert Novelty.fit(rows, groups, most=100).reference_M == pytest.approx(found.reference_M, abs=1e-12)


def test_what_cannot_be_used_is_refused() -> None:
    rows, groups = embeddings(6)
    with pytest.raises(ValueError, match="groups"):
        Novelty.fit(rows, groups[:2])
    with pytest.raises(ValueError, match="not finite"):
        Novelty.fit(np.full((2, 2), np.nan), ["a", "b"])
    with pytest.raises(ValueError, match="training rows"):
        Novelty.fit(rows, groups).score(np.zeros(3))
