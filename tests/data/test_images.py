import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from medssl_cli.core.errors import DataError
from medssl_cli.core.volume import Volume
from medssl_cli.data.images import check_finite, read_header, read_image, read_volume, write_image, write_volume


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_what_is_written_is_read(ball: Volume, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"ball{suffix}"
    write_volume(path, ball)
    back = read_volume(path)
    np.testing.assert_array_equal(back.array, ball.array)
    np.testing.assert_allclose(back.affine, ball.affine, atol=1e-5)
    theirs = nib.load(path)
    np.testing.assert_array_equal(np.asarray(theirs.dataobj).T, ball.array)


def test_same_bytes_each_time(ball: Volume, tmp_path: Path) -> None:
    for name in ("a.nii.gz", "b.nii.gz"):
        write_volume(tmp_path / name, ball)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


@pytest.mark.parametrize(
    ("dtype", "values", "written"),
    [
        ("<i8", [-(2**31), 0, 2**31 - 1], "int32"),
        (">i8", [-5, 0, 7], "int32"),
        ("<u8", [0, 1, 2**31 - 1], "int32"),
        ("<i8", [0, 5, 2**31], "float64"),
        ("<i8", [-(2**31) - 1, 5, 0], "float64"),
        ("<i8", [0, 5, 2**40 + 5], "float64"),
        ("<u8", [0, 5, 2**53 - 1], "float64"),
        ("<i8", [-(2**53) + 1, 5, 0], "float64"),
    ],
)
def test_wide_integers_keep_their_values(tmp_path: Path, dtype: str, values: list[int], written: str) -> None:
    path = tmp_path / "a.nii.gz"
    write_volume(path, Volume(np.array(values, dtype).reshape(1, 1, 3), np.eye(4)))
    theirs = nib.load(path)
    assert theirs.get_data_dtype() == np.dtype(written)
    assert [int(value) for value in np.asanyarray(theirs.dataobj).ravel()] == values
    assert [int(value) for value in read_volume(path).array.ravel()] == values


@pytest.mark.parametrize(("dtype", "value"), [("<i8", 2**53), ("<i8", -(2**63)), ("<u8", 2**64 - 1)])
def test_integers_that_fit_nowhere_are_no_file(tmp_path: Path, dtype: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{value} "):
        write_volume(tmp_path / "a.nii.gz", Volume(np.array([[[0, value]]], dtype), np.eye(4)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("slope", "inter"), [(0.0, 0.0), (float("nan"), 0.0), (2.0, -3.0), (1.0, -1024.0)])
@pytest.mark.parametrize("endian", ["<", ">"])
def test_scaling_and_byte_order_agree_with_nibabel(tmp_path: Path, slope: float, inter: float, endian: str) -> None:
    header = nib.Nifti1Header(endianness=endian)
    array = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    header.set_data_shape(array.shape)
    header.set_data_dtype(array.dtype.newbyteorder(endian))
    header.set_sform(np.eye(4), 1)
    header["vox_offset"] = 352
    header["scl_slope"], header["scl_inter"] = slope, inter
    header["magic"] = b"n+1"
    path = tmp_path / "a.nii"
    path.write_bytes(header.binaryblock + b"\0" * 4 + array.astype(array.dtype.newbyteorder(endian)).tobytes("F"))
    theirs = np.asanyarray(nib.load(path).dataobj)
    np.testing.assert_allclose(read_volume(path).array.T, theirs)


def damaged(tmp_path: Path, kind: str) -> Path:
    path = tmp_path / "a.nii.gz"
    write_volume(path, Volume(np.random.default_rng(0).integers(0, 999, (8, 30, 30), dtype=np.int16), np.eye(4)))
    data = path.read_bytes()
    raw = bytearray(gzip.decompress(data))
    if kind == "nifti_truncated":
        path.write_bytes(data[: len(data) // 2])
    elif kind == "file_empty":
        path.write_bytes(b"")
    elif kind == "nifti_magic":
        path.write_bytes(gzip.compress(b"<html>" * 200))
    elif kind == "nifti_huge":
        raw[42:48] = np.array([32000, 32000, 32000], dtype="<i2").tobytes()
        path.write_bytes(gzip.compress(bytes(raw)))
    elif kind == "nifti_header":
        raw[42:44] = np.array([-5], dtype="<i2").tobytes()
        path.write_bytes(gzip.compress(bytes(raw)))
    elif kind == "nifti_oversized":
        path.write_bytes(gzip.compress(bytes(raw) + b"\0" * 10**8))
    elif kind == "affine_singular":
        image = nib.Nifti1Image(np.zeros((2, 2, 2), np.int16), None)
        image.header.set_sform(np.diag([1.0, 0, 1, 1]), 1)
        image.header["qform_code"] = 0
        path.write_bytes(gzip.compress(image.to_bytes()))
    elif kind == "file_missing":
        path.unlink()
    return path


@pytest.mark.parametrize(
    "kind",
    [
        "nifti_truncated",
        "file_empty",
        "nifti_magic",
        "nifti_huge",
        "nifti_header",
        "nifti_oversized",
        "affine_singular",
        "file_missing",
    ],
)
def test_r09_each_damage_has_its_name(tmp_path: Path, kind: str) -> None:
    path = damaged(tmp_path, kind)
    with pytest.raises(DataError) as caught:
        read_volume(path)
    assert caught.value.code == kind
    assert str(path) in caught.value.where
    assert caught.value.fix


def test_nonfinite_voxels_are_named(tmp_path: Path) -> None:
    array = np.zeros((2, 3, 4), np.float32)
    array[1, 2, 3] = np.nan
    with pytest.raises(DataError, match="1 voxel is") as caught:
        check_finite(tmp_path, array)
    assert "(3, 2, 1)" in caught.value.where


def test_one_volume_of_a_series(tmp_path: Path) -> None:
    array = np.arange(2 * 24, dtype=np.int16).reshape(2, 2, 3, 4)
    write_volume(tmp_path / "a.nii.gz", Volume(array, np.eye(4)))
    assert read_header(tmp_path / "a.nii.gz").shape == (4, 3, 2, 2)
    np.testing.assert_array_equal(read_volume(tmp_path / "a.nii.gz", volume_index=1).array, array[1])


def test_pictures_keep_their_depth(tmp_path: Path) -> None:
    from PIL import Image

    deep = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(read_image(tmp_path / "deep.png")[0], deep)
    rgb = np.random.default_rng(0).integers(0, 255, (5, 6, 3), dtype=np.uint8)
    write_image(tmp_path / "rgb.png", rgb)
    np.testing.assert_array_equal(read_image(tmp_path / "rgb.png"), rgb.transpose(2, 0, 1))
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    with pytest.raises(DataError):
        read_image(tmp_path / "bad.png")


def test_real_volume_equals_nibabel(real_data: Path) -> None:
    path = sorted((real_data / "prostate3t_t2" / "nifti").glob("*.nii.gz"))[0]
    theirs = nib.load(path)
    ours = read_volume(path)
    np.testing.assert_array_equal(ours.array.T, np.asanyarray(theirs.dataobj))
    np.testing.assert_array_equal(ours.affine, theirs.affine)


# --- pictures of every depth and kind --------------------------------------------------------------------------------


@pytest.fixture
def deep_rgb() -> np.ndarray:
    """(H, W, 3) uint16, all 16 bits used."""
    return np.random.default_rng(1).integers(0, 65536, (7, 9, 3), dtype=np.uint16)


def write_with_itk(path: Path, array: np.ndarray, *, channels: bool) -> None:
    sitk.WriteImage(sitk.GetImageFromArray(array, isVector=channels), str(path))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_stay_sixteen_bits(tmp_path: Path, deep_rgb: np.ndarray, suffix: str) -> None:
    with_alpha = np.concatenate([deep_rgb, deep_rgb[..., :1]], axis=2)
    for name, array in (("rgb", deep_rgb), ("rgba", with_alpha), ("grey", deep_rgb[..., 0])):
        path = tmp_path / f"{name}.{suffix}"
        write_with_itk(path, np.ascontiguousarray(array), channels=array.ndim == 3)
        read = read_image(path)
        assert read.dtype == np.uint16
        expected = deep_rgb.transpose(2, 0, 1) if array.ndim == 3 else array[None]
        np.testing.assert_array_equal(read, expected)


def test_a_picture_that_would_lose_its_depth_is_refused(tmp_path: Path, deep_rgb: np.ndarray) -> None:
    path = tmp_path / "grey_alpha.png"
    write_with_itk(path, np.ascontiguousarray(deep_rgb[..., :2]), channels=True)
    with pytest.raises(DataError, match="lose its depth") as caught:
        read_image(path)
    assert caught.value.code == "image_depth"
    write_with_itk(tmp_path / "float.tif", deep_rgb.astype(np.float32), channels=True)
    with pytest.raises(DataError):
        read_image(tmp_path / "float.tif")


def test_float_and_big_endian_tiff(tmp_path: Path, deep_rgb: np.ndarray) -> None:
    from PIL import Image

    values = deep_rgb[..., 0].astype(np.float32) / 7 - 100
    Image.fromarray(values).save(tmp_path / "float.tif")
    read = read_image(tmp_path / "float.tif")
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read[0], values)
    big = Image.frombytes("I;16B", (9, 7), deep_rgb[..., 0].astype(">u2").tobytes())
    big.save(tmp_path / "big.tif")
    read = read_image(tmp_path / "big.tif")
    assert read.dtype == np.dtype(np.uint16)
    assert read.dtype.isnative
    np.testing.assert_array_equal(read[0], deep_rgb[..., 0])


def test_palette_alpha_cmyk_and_one_bit(tmp_path: Path) -> None:
    from PIL import Image

    rng = np.random.default_rng(2)
    rgb = rng.integers(0, 256, (6, 5, 3), dtype=np.uint8)
    indices = rng.integers(0, 4, (6, 5), dtype=np.uint8)
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 8, 7]], np.uint8)
    palette = Image.fromarray(indices)
    palette.putpalette(colours.tobytes())
    palette.save(tmp_path / "palette.png")
    np.testing.assert_array_equal(read_image(tmp_path / "palette.png"), colours[indices].transpose(2, 0, 1))
    Image.fromarray(np.dstack([rgb, indices * 60])).save(tmp_path / "alpha.png")
    np.testing.assert_array_equal(read_image(tmp_path / "alpha.png"), rgb.transpose(2, 0, 1))
    Image.fromarray(np.dstack([rgb[..., 0], indices])).save(tmp_path / "grey_alpha.png")
    np.testing.assert_array_equal(read_image(tmp_path / "grey_alpha.png")[0], rgb[..., 0])
    ink = np.dstack([rgb, np.zeros((6, 5), np.uint8)])
    Image.fromarray(ink, mode="CMYK").save(tmp_path / "ink.tif")
    np.testing.assert_array_equal(read_image(tmp_path / "ink.tif"), 255 - rgb.transpose(2, 0, 1))  # without black
    Image.fromarray(indices > 1).save(tmp_path / "bits.png")
    np.testing.assert_array_equal(read_image(tmp_path / "bits.png")[0], np.where(indices > 1, 255, 0))


def test_an_exif_orientation_is_not_applied(tmp_path: Path) -> None:
    from PIL import ExifTags, Image

    rgb = np.random.default_rng(3).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(rgb).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "turned.png"), rgb.transpose(2, 0, 1))


def test_a_file_of_several_pages_is_refused(tmp_path: Path, deep_rgb: np.ndarray) -> None:
    from PIL import Image

    page = Image.fromarray(deep_rgb[..., 0])
    page.save(tmp_path / "stack.tif", save_all=True, append_images=[page, page])
    with pytest.raises(DataError, match="several pages") as caught:
        read_image(tmp_path / "stack.tif")
    assert "3 pages" in caught.value.where
    assert "NIfTI" in caught.value.fix
