"""Label files of VisionFM, written here after its manual."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medssl_cli.core.errors import DataError
from medssl_cli.data.label_lines import LabelLine, read_label_lines


def written(folder: Path, data: bytes, name: str = "training_labels.txt") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"training/1.jpg;1\n", [("training/1.jpg", ("1",))]),
        (b"training/1.jpg;0,1,0", [("training/1.jpg", ("0", "1", "0"))]),
        (b"\n\n  \ntraining/1.jpg;1\n\n\ntraining/2.jpg;0\n", [("training/1.jpg", ("1",)), ("training/2.jpg", ("0",))]),
        (b"# one class\ntraining/1.jpg;1\n  # more\n", [("training/1.jpg", ("1",))]),
        (b"training/1.jpg;1\r\ntraining/2.jpg;0\r\n", [("training/1.jpg", ("1",)), ("training/2.jpg", ("0",))]),
        (b"training/1.jpg;1\rtraining/2.jpg;0\r", [("training/1.jpg", ("1",)), ("training/2.jpg", ("0",))]),
        (b"training/1.jpg; 0, 1 ,  0 \n", [("training/1.jpg", ("0", "1", "0"))]),
        (b"\xef\xbb\xbftraining/1.jpg;1\n", [("training/1.jpg", ("1",))]),
        (b"/data/IDRiD/training/1.jpg;1\n", [("/data/IDRiD/training/1.jpg", ("1",))]),
        (b"training\\left eye\\1.jpg;1\n", [("training/left eye/1.jpg", ("1",))]),
        (b"training/a,b.jpg;1\n", [("training/a,b.jpg", ("1",))]),
        ("training/Müller.jpg;0.05,337,nan\n".encode(), [("training/Müller.jpg", ("0.05", "337", ""))]),
    ],
)
def test_w25_label_lines(tmp_path: Path, data: bytes, expected: list[tuple[str, tuple[str, ...]]]) -> None:
    found = read_label_lines(written(tmp_path, data))
    assert [(entry.image, entry.values) for entry in found.entries] == expected
    assert not found.is_forecast


def test_w25_all_wrong_lines_are_told_with_their_numbers(tmp_path: Path) -> None:
    lines = (
        "training/1.jpg;1",  # 1, as most are
        "training/2.jpg;1;0",
        "# a comment counts as a line",
        "training/4.jpg",
        "training/5.jpg;one",
        "training/6.jpg;1,",
        ";1",
        "training/8.jpg;inf",
        "training/9.jpg;1_0",
        "training/10.jpg;1,0",
        "training/11.jpg;0",
    )
    with pytest.raises(DataError) as caught:
        read_label_lines(written(tmp_path, "\n".join(lines).encode()))
    where = caught.value.where.splitlines()
    assert [text.split(", ")[1].split(":")[0] for text in where] == [f"line {n}" for n in (2, 4, 5, 6, 7, 8, 9, 10)]
    assert "2 semicolons" in where[0]
    assert "2 labels, others have 1" in where[-1]
    assert caught.value.code == "label_lines"


def test_a_leading_comment_names_classes_or_columns(tmp_path: Path) -> None:
    single = read_label_lines(written(tmp_path, b"# made by hand\n# Classes: healthy, glaucoma\na.jpg;1\n"))
    assert (single.columns, single.class_names) == (("label",), ("healthy", "glaucoma"))
    several = read_label_lines(written(tmp_path, b"# classes: DR, AMD\na.jpg;1,0\n# classes: x, y\n"))
    assert (several.columns, several.class_names) == (("DR", "AMD"), ())
    unnamed = read_label_lines(written(tmp_path, b"a.jpg;1,0\n"))
    assert unnamed.columns == ("label_0", "label_1")
    for text, said in (("a,b,c\na.jpg;1,0", "3 names for 2 labels"), ("a,,b\na.jpg;1,0,1", "stand there twice")):
        with pytest.raises(DataError, match="cannot be read") as caught:
            read_label_lines(written(tmp_path, f"# classes: {text}\n".encode()))
        assert said in caught.value.where


def test_forecasts_have_commas_alone(tmp_path: Path) -> None:
    found = read_label_lines(written(tmp_path, b"training/1.jpg, 1, 309\ntraining/2.jpg,0,690\n"))
    assert found.is_forecast
    assert found.columns == ("label", "interval_days")
    assert [entry.values for entry in found.entries] == [("1", "309"), ("0", "690")]
    for data in (b"training/1.jpg, 2, 309", b"training/1.jpg, 1, soon", b"training/1.jpg, 1"):
        with pytest.raises(DataError):
            read_label_lines(written(tmp_path, data))
    with pytest.raises(DataError) as caught:
        read_label_lines(written(tmp_path, b"training/1.jpg, 1, 309\ntraining/2.jpg;0,690\n"))
    assert "some lines are" in caught.value.where


def test_a_csv_has_columns(tmp_path: Path) -> None:
    text = b"image,label,interval_days,patient_id,split\ntraining/1.jpg,1,309,P1,train\ntraining/2.jpg,0,,P2,train\n"
    found = read_label_lines(written(tmp_path, text, "training_labels.csv"))
    assert found.entries[0] == LabelLine(2, "training/1.jpg", ("1", "309"), "P1")
    assert found.entries[1].values == ("0", "")
    assert found.is_forecast
    assert found.columns == ("label", "interval_days")
    for text in (b"eye,label\n1.jpg,1\n", b"image\n1.jpg\n", b"image,label\n1.jpg,left\n"):
        with pytest.raises(DataError):
            read_label_lines(written(tmp_path, text, "training_labels.csv"))


@pytest.mark.parametrize("data", [b"", b"\n# nothing\n", b"caf\xe9.jpg;1", b"a\0.jpg;1"])
def test_files_that_hold_nothing_readable_are_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(DataError) as caught:
        read_label_lines(written(tmp_path, data))
    assert "training_labels.txt" in caught.value.where
    assert caught.value.fix


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_label_lines(tmp_path / "training_labels.txt")
    assert caught.value.code == "labels_missing"


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200) | st.text(alphabet="a1;,.#: \r\n/\\-e", max_size=200).map(str.encode))
def test_r21_any_bytes_are_read_or_refused(tmp_path: Path, data: bytes) -> None:
    found = None
    with contextlib.suppress(DataError):
        found = read_label_lines(written(tmp_path, data))
    if found is None:
        return
    assert {len(entry.values) for entry in found.entries} == {found.width}
    assert all(entry.image for entry in found.entries)
