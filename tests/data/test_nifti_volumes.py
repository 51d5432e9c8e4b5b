"""Channels of a 4-D file as files of their own, compared with nibabel."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from medssl_cli.core.errors import DataError
from medssl_cli.data.nifti_volumes import cut_volumes

AFFINE = np.array([[-0.7, 0.1, 0, 12.5], [0.1, 0.8, 0.02, -3.25], [0, -0.02, 3.1, 40.125], [0, 0, 0, 1]])


def written(path: Path, kind: type = nib.Nifti1Image, dtype: str = "<i2", **more: Any) -> nib.Nifti1Image:
    array = np.random.default_rng(0).integers(0, 3000, (5, 4, 3, 2)).astype(dtype)
    header = kind.header_class(endianness=dtype[0] if dtype[0] in "<>" else "<")
    image = kind(array, AFFINE, header=header)
    image.set_data_dtype(dtype)
    image.set_sform(AFFINE, code=1)
    image.set_qform(AFFINE, code=2, strip_shears=True)
    if more.get("scaled"):
        image.header.set_slope_inter(0.5, -1024)
    if more.get("extended"):
        image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"from the scanner"))
    nib.save(image, path)
    return image


@pytest.mark.parametrize(
    ("name", "kind", "dtype", "more"),
    [
        ("a.nii.gz", nib.Nifti1Image, "<i2", {}),
        ("a.nii", nib.Nifti1Image, "<i2", {"scaled": True}),
        ("a.nii.gz", nib.Nifti1Image, ">f4", {}),
        ("a.nii.gz", nib.Nifti2Image, "<u1", {}),
        ("a.nii.gz", nib.Nifti2Image, ">i4", {"scaled": True}),
        ("a.nii.gz", nib.Nifti1Image, "<f8", {"extended": True}),
    ],
)
def test_each_volume_keeps_voxels_geometry_and_scaling(
    tmp_path: Path, name: str, kind: type, dtype: str, more: dict[str, Any]
) -> None:
    written(tmp_path / name, kind, dtype, **more)
    whole = nib.load(tmp_path / name)
    cut_volumes(tmp_path / name, {0: tmp_path / "out/t2.nii.gz", 1: tmp_path / "out/adc.nii.gz"})
    for number, stem in enumerate(("t2", "adc")):
        one = nib.load(tmp_path / f"out/{stem}.nii.gz")
        assert type(one) is kind
        assert one.shape == (5, 4, 3)
        assert one.get_data_dtype() == whole.get_data_dtype()
        assert np.array_equal(one.dataobj.get_unscaled(), whole.dataobj.get_unscaled()[..., number])
        assert np.array_equal(one.get_fdata(), whole.get_fdata()[..., number])
        for form in ("get_sform", "get_qform"):
            assert np.array_equal(getattr(one, form)(), getattr(whole, form)())
        kept = [key for key in whole.header if key != "dim"]
        assert [one.header[key].tobytes() for key in kept] == [whole.header[key].tobytes() for key in kept]
        assert [e.get_content() for e in one.header.extensions] == [e.get_content() for e in whole.header.extensions]


def test_a_file_of_three_axes_has_one_volume(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(np.ones((3, 4, 5), np.uint8), AFFINE), tmp_path / "a.nii.gz")
    cut_volumes(tmp_path / "a.nii.gz", {0: tmp_path / "b.nii.gz"})
    assert nib.load(tmp_path / "b.nii.gz").shape == (3, 4, 5)
    with pytest.raises(DataError) as caught:
        cut_volumes(tmp_path / "a.nii.gz", {1: tmp_path / "c.nii.gz"})
    assert caught.value.code == "volume_absent"
    assert not (tmp_path / "c.nii.gz").exists()


def test_r09_a_truncated_file_leaves_no_volume_that_is_not_whole(tmp_path: Path) -> None:
    written(tmp_path / "a.nii.gz")
    plain = gzip.decompress((tmp_path / "a.nii.gz").read_bytes())
    for name, data in (
        ("short.nii", plain[:-1]),
        ("short.nii.gz", gzip.compress(plain[:-1])),
        ("cut.nii.gz", (tmp_path / "a.nii.gz").read_bytes()[:-40]),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError) as caught:
            cut_volumes(tmp_path / name, {1: tmp_path / "out" / name})
        assert caught.value.code == "nifti_truncated"
        assert name in caught.value.where
        assert not list((tmp_path / "out").glob("*"))
