"""Copies of a file are found whatever they are called; nothing else is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medssl_cli.core.case import Case, Sequence
from medssl_cli.core.errors import DataError
from medssl_cli.data import copies
from medssl_cli.data.copies import find_copies, refuse_copies


def case(folder: Path, name: str, data: bytes) -> Case:
    path = folder / name / "t2.nii"
    path.parent.mkdir()
    path.write_bytes(data)
    return Case(name, name, {"t2": Sequence("t2", path)})


def test_r12_the_same_bytes_under_two_names_are_a_leak(tmp_path: Path) -> None:
    data = np.random.default_rng(0).bytes(300_000)
    splits = {"train": [case(tmp_path, "a", data), case(tmp_path, "b", data[:-1])], "val": [case(tmp_path, "c", data)]}
    ((one, other),) = find_copies(splits)
    assert (one[:2], other[:2]) == (("train", "a"), ("val", "c"))
    with pytest.raises(DataError) as caught:
        refuse_copies(splits)
    assert caught.value.code == "split_leak"
    assert f"train (a) {tmp_path}/a/t2.nii and val (c) {tmp_path}/c/t2.nii" in caught.value.where


@pytest.mark.parametrize("place", [0, 150_000, 299_999])
def test_one_byte_makes_another_file(tmp_path: Path, place: int) -> None:
    data = bytearray(np.random.default_rng(0).bytes(300_000))
    one = case(tmp_path, "a", bytes(data))
    data[place] ^= 1
    assert find_copies({"train": [one], "val": [case(tmp_path, "b", bytes(data))]}) == []


def test_copies_on_one_side_and_missing_files_are_not_our_matter(tmp_path: Path) -> None:
    same = [case(tmp_path, "a", b"x" * 500), case(tmp_path, "b", b"x" * 500)]
    gone = Case("gone", "gone", {"t2": Sequence("t2", tmp_path / "gone.nii")})
    refuse_copies({"train": same, "val": [gone], "test": [Case("bare", "bare")]})


def test_files_of_different_sizes_are_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []
    monkeypatch.setattr(copies, "_ends", lambda path: opened.append(path))
    splits = {"train": [case(tmp_path, "a", b"1" * 10)], "val": [case(tmp_path, "b", b"1" * 11)]}
    assert find_copies(splits) == []
    assert opened == []
