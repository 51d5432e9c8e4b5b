"""NumPy files: shapes, types and damage; nothing is unpickled."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from medssl_cli.core.errors import DataError
from medssl_cli.data.images import check_finite, is_image, read_header, read_image, read_volume
from medssl_cli.data.npy import npy_kind

RNG = np.random.default_rng(0)


def saved(path: Path, array: np.ndarray) -> Path:
    np.save(path, array)
    return path


def with_header(path: Path, header: bytes, body: bytes = b"") -> Path:
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + body)
    return path


@pytest.mark.parametrize(
    ("shape", "channels"),
    [((7, 9), 1), ((7, 9, 3), 3), ((3, 7, 9), 3), ((1, 7, 9), 1), ((7, 9, 1), 1)],
)
def test_pictures_of_every_shape(tmp_path: Path, shape: tuple[int, ...], channels: int) -> None:
    array = RNG.integers(0, 256, shape).astype(np.uint8)
    path = saved(tmp_path / "a.npy", array)
    picture = read_image(path)
    assert picture.shape == (channels, 7, 9)
    plane = picture[0]
    expected = array if array.ndim == 2 else array[..., 0] if shape[-1] == channels else array[0]
    np.testing.assert_array_equal(plane, expected)
    assert is_image(path)
    assert npy_kind(path) == ("picture" if len(shape) == 2 else "either")


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [
        (">u2", np.uint16),
        ("<f8", np.float32),
        ("<f2", np.float32),
        ("<i8", np.int16),
        ("<u4", np.int16),
        ("|b1", np.uint8),
        (">i2", np.int16),
    ],
)
def test_types_become_those_of_the_store_with_the_same_values(tmp_path: Path, dtype: str, kept: type) -> None:
    values = np.array([[0, 1, 300], [1, 0, 2]]).astype(dtype)
    read = read_image(saved(tmp_path / "a.npy", values))[0]
    assert read.dtype == kept
    assert read.dtype.isnative
    np.testing.assert_array_equal(read, values * 255 if dtype == "|b1" else values)


@pytest.mark.parametrize("order", ["C", "F"])
def test_a_volume_is_z_y_x_with_voxels_of_one_millimetre(tmp_path: Path, order: str) -> None:
    array = np.asarray(RNG.integers(-1000, 1000, (5, 6, 7)), np.int16, order=order)  # type: ignore[call-overload]
    path = saved(tmp_path / "ct.npy", array)
    volume, header = read_volume(path), read_header(path)
    np.testing.assert_array_equal(volume.array, array)
    assert (volume.spacing, volume.orientation) == ((1, 1, 1), "RAS")
    assert (header.shape, header.n_axes) == ((7, 6, 5), 3)
    assert npy_kind(path) == "volume"


def test_r14_objects_are_never_unpickled(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    np.save(tmp_path / "a.npy", np.array([[Trap()]], dtype=object), allow_pickle=True)
    import pickle

    (tmp_path / "b.npy").write_bytes(pickle.dumps(Trap()))
    for name, code in (("a.npy", "npy_objects"), ("b.npy", "npy_magic")):
        for read in (read_image, read_volume, read_header):
            with pytest.raises(DataError) as caught:
                read(tmp_path / name)
            assert caught.value.code == code
    assert not (tmp_path / "sprung").exists()


def test_r09_damaged_files_are_named(tmp_path: Path) -> None:
    whole = saved(tmp_path / "whole.npy", RNG.normal(size=(8, 9))).read_bytes()
    (tmp_path / "npy_truncated.npy").write_bytes(whole[:-3])
    (tmp_path / "file_empty.npy").write_bytes(b"")
    (tmp_path / "npy_magic.npy").write_bytes(b"PK\x03\x04" + bytes(200))
    (tmp_path / "npy_header.npy").write_bytes(whole[:40])
    with_header(tmp_path / "npy_header_long.npy", b"{'descr': '<i2'}" + b" " * 30_000)
    with_header(tmp_path / "npy_header_code.npy", b"{'descr': print('x'), 'fortran_order': False, 'shape': (2, 2)}")
    huge = b"{'descr': '<i2', 'fortran_order': False, 'shape': (99999999, 999999)}"
    with_header(tmp_path / "npy_truncated_huge.npy", huge)
    saved(tmp_path / "npy_dtype.npy", np.array([["a", "b"]]))
    saved(tmp_path / "npy_dtype_complex.npy", np.zeros((2, 2), complex))
    saved(tmp_path / "npy_shape.npy", np.zeros((2, 3, 4, 5)))
    saved(tmp_path / "npy_shape_none.npy", np.zeros((0, 4)))
    saved(tmp_path / "npy_shape_volume.npy", np.zeros((8, 9, 10)))
    for path in sorted(tmp_path.glob("*_*.npy")):
        with pytest.raises(DataError) as caught:
            read_image(path)
        assert path.stem.startswith(caught.value.code)
        assert str(path) in caught.value.where
        assert caught.value.fix
    with pytest.raises(DataError, match="missing"):
        read_image(tmp_path / "no.npy")


def test_a_plane_is_no_volume(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.npy", np.zeros((4, 5)))
    for read in (read_volume, read_header):
        with pytest.raises(DataError, match="no volume"):
            read(path)


def test_values_beyond_float32_are_infinite_and_so_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.npy", np.array([[1e300, 0.0]]))
    with pytest.raises(DataError, match="NaN or infinite"):
        check_finite(path, read_image(path))
