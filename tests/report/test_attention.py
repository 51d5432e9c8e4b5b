import numpy as np

from medssl_cli.report.attention import similarity


def test_similarity_is_one_at_the_reference_and_its_twin() -> None:
    patches = np.random.default_rng(0).normal(size=(12, 8)).astype(np.float32)
    patches[7] = 3 * patches[2]
    answer = similarity(patches, patches[2])
    assert list(np.flatnonzero(answer == 1.0)) == [2, 7]
    assert answer.dtype == np.float32


def test_similarity_is_the_cosine() -> None:
    reference = np.array([1.0, 2.0, 2.0])
    patches = np.array([[[2.0, 4.0, 4.0], [-1.0, -2.0, -2.0]], [[2.0, -1.0, 0.0], [3.0, 0.0, 4.0]]])
    np.testing.assert_allclose(similarity(patches, reference), [[1, -1], [0, 11 / 15]], atol=1e-7)


def test_similarity_of_a_zero_token_is_zero() -> None:
    assert similarity(np.zeros((1, 3)), np.ones(3))[0] == 0
