import numpy as np
import pytest

from medssl_cli.core.errors import DataError
from medssl_cli.core.volume import Volume, affine_orientation


def centre_of_ball(volume: Volume) -> np.ndarray:
    zyx = np.argwhere(volume.array > 350).mean(0)
    return (volume.affine @ np.array([*zyx[::-1], 1.0]))[:3]


@pytest.mark.parametrize("target", ["RAS", "LPS", "SAR", "IPL", "ASL"])
def test_reorienting_keeps_places_in_the_patient(ball: Volume, target: str) -> None:
    turned = ball.reoriented(target)
    assert turned.orientation == target
    np.testing.assert_allclose(centre_of_ball(turned), [3.0, -4.0, 6.0], atol=0.5)
    back = turned.reoriented(ball.orientation)
    np.testing.assert_array_equal(back.array, ball.array)
    np.testing.assert_allclose(back.affine, ball.affine, atol=1e-12)


def test_four_dimensional_volumes_keep_their_first_axis(ball: Volume) -> None:
    both = Volume(np.stack([ball.array, ball.array + 1]), ball.affine).reoriented("RAS")
    np.testing.assert_array_equal(both.array[1], ball.reoriented("RAS").array + 1)


def test_spacing_is_in_array_order(ball: Volume) -> None:
    assert ball.orientation == "LAS"
    np.testing.assert_allclose(ball.spacing, (3.0, 0.9, 0.8))


def test_oblique_axes_never_share_a_code() -> None:
    turn = np.array([[0.71, 0.70, 0.0], [0.70, -0.71, 0.05], [0.0, 0.05, 1.0]])
    affine = np.eye(4)
    affine[:3, :3] = turn
    assert len({"LR", "PA", "IS"} & {p for p in ("LR", "PA", "IS") if set(p) & set(affine_orientation(affine))}) == 3


def test_singular_affine_is_refused() -> None:
    with pytest.raises(DataError, match="singular"):
        affine_orientation(np.diag([1.0, 0.0, 1.0, 1.0]))


def test_grid_difference_names_both_values(ball: Volume) -> None:
    assert ball.grid_difference(ball) is None
    shifted = ball.affine.copy()
    shifted[0, 3] += 10
    assert "10.00 mm" in str(ball.grid_difference(Volume(ball.array, shifted)))
    assert "LAS and RAS" in str(ball.grid_difference(ball.reoriented("RAS")))
    scaled = ball.affine @ np.diag([1.2, 1, 1, 1])
    text = str(ball.grid_difference(Volume(ball.array, scaled)))
    assert "0.8 x 0.9 x 3" in text
    assert "0.96 x 0.9 x 3" in text
