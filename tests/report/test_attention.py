import numpy as np
import pytest

from medssl_cli.report.attention import rollout, similarity


def test_rollout_of_one_block_by_hand() -> None:
    attention = np.array([[0.2, 0.8, 0.0], [0.0, 1.0, 0.0], [0.5, 0.0, 0.5]])
    np.testing.assert_allclose(rollout([attention], 1), [0.4, 0.0])


def test_rollout_follows_a_path_through_two_blocks() -> None:
    first = np.array([[1.0, 0, 0], [0, 0, 1.0], [0, 0, 1.0]])  # token 1 reads token 2
    second = np.array([[0, 1.0, 0], [0, 1.0, 0], [0, 0, 1.0]])  # CLS reads token 1
    np.testing.assert_allclose(rollout([first, second], 1), [0.25, 0.25])
    np.testing.assert_allclose(rollout([first[None], second[None]], 1), [[0.25, 0.25]])


def test_rollout_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        rollout([], 1)


def test_similarity_is_one_at_the_reference_and_its_twin() -> None:
    patches = np.random.default_rng(0).normal(size=(12, 8))
    patches[7] = 3 * patches[2]
    answer = similarity(patches, patches[2])
    assert {i for i in range(12) if answer[i] > 0.999999} == {2, 7}
    assert np.abs(answer).max() <= 1 + 1e-12
