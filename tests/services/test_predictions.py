"""The table of predictions: written, read back to the same bits, joined with what is true."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medssl_cli.core.errors import ConfigError, DataError, MedsslError
from medssl_cli.services.predictions import (
    decisions,
    join_reference,
    prediction_table,
    read_predictions,
    read_reference,
    write_predictions,
)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_a_multilabel_table_is_read_back_to_the_same_bits(tmp_path: Path) -> None:
    values = np.array([[0.1, np.float32(0.7)], [1 / 3, 0.5], [0.0, 1.0]])
    labels = np.array([[0, 1], [1, np.nan], [0, 0]])
    table = prediction_table(
        "multilabel", ("any", "sub dural"), ("007", "c,2", "ä"), values, thresholds=(0.2, 0.5),
        patient_ids=("p1", "p1", "p2"), splits=("test",) * 3, labels_NC=labels,
    )  # fmt: skip
    write_predictions(tmp_path / "predictions.csv", table)
    lines = (tmp_path / "predictions.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == (
        "case_id,patient_id,split,label_any,label_sub dural,prob_any,prob_sub dural,pred_any,pred_sub dural"
    )
    assert lines[1].startswith("007,p1,test,0,1,0.1,0.699999988079071,0,1")
    back = read_predictions(tmp_path / "predictions.csv")
    assert back.task == "multilabel"
    assert back.case_ids == table.case_ids
    assert back.patient_ids == table.patient_ids
    assert back.values_NC.tobytes() == table.values_NC.tobytes()
    assert back.labels_NC is not None
    assert back.predicted_NC is not None
    assert table.predicted_NC is not None
    np.testing.assert_array_equal(back.labels_NC, labels)
    np.testing.assert_array_equal(back.predicted_NC, table.predicted_NC)  # of the thresholds 0.2 and 0.5


def test_exclusive_classes_have_one_label_and_one_decision_by_name(tmp_path: Path) -> None:
    values = np.array([[0.2, 0.5, 0.3], [0.4, 0.4, 0.2]])
    table = prediction_table(
        "multiclass", ("G1", "G2", "G3"), ("a", "b"), values, labels_NC=np.array([[2.0], [np.nan]])
    )
    write_predictions(tmp_path / "p.csv", table)
    assert (tmp_path / "p.csv").read_text().splitlines() == [
        "case_id,patient_id,split,label,pred,prob_G1,prob_G2,prob_G3",
        "a,a,,G3,G2,0.2,0.5,0.3",
        "b,b,,,G1,0.4,0.4,0.2",
    ]
    back = read_predictions(tmp_path / "p.csv")
    assert back.task == "multiclass"
    assert back.labels_NC is not None
    np.testing.assert_array_equal(back.labels_NC, [[2], [np.nan]])


def test_predicted_numbers_have_value_columns(tmp_path: Path) -> None:
    table = prediction_table(
        "regression", ("age",), ("a", "b"), np.array([[61.5], [-3e-20]]), labels_NC=np.array([[60], [np.nan]])
    )
    write_predictions(tmp_path / "p.csv", table)
    assert (tmp_path / "p.csv").read_text().splitlines()[1] == "a,a,,60,61.5"
    back = read_predictions(tmp_path / "p.csv")
    assert back.task == "regression"
    assert back.predicted_NC is None
    assert back.values_NC.tobytes() == table.values_NC.tobytes()


def test_m25_a_probability_at_the_threshold_is_positive() -> None:
    values = np.array([[0.5, np.nextafter(0.5, 0)], [0.3, 0.3]])
    np.testing.assert_array_equal(decisions("multilabel", values), [[1, 0], [0, 0]])
    np.testing.assert_array_equal(decisions("multilabel", values, (0.3, 0.3)), [[1, 1], [1, 1]])


@pytest.mark.parametrize(
    ("header", "row", "task"),
    [
        ("id,probability", "a,0.5", "binary"),
        ("image,Score", "a,0.5", "binary"),
        ("id,prob_x", "a,0.5", "binary"),
        ("id,prob_x,prob_y,pred", "a,0.5,0.5,x", "multiclass"),
        ("id,prob_x,prob_y,label", "a,0.5,0.5,y", "multiclass"),
        ("id,prob_x,prob_y,pred_x", "a,0.5,0.9,1", "multilabel"),
        ("id,value_age", "a,61", "regression"),
    ],
)
def test_the_columns_tell_the_task(tmp_path: Path, header: str, row: str, task: str) -> None:
    assert read_predictions(write(tmp_path / "p.csv", f"{header}\n{row}\n")).task == task


def test_several_probabilities_alone_do_not_tell_the_task(tmp_path: Path) -> None:
    path = write(tmp_path / "p.csv", "id,prob_x,prob_y\na,0.4,0.6\n")
    with pytest.raises(ConfigError, match="exclude one another") as caught:
        read_predictions(path)
    assert "--task multiclass" in caught.value.fix
    assert read_predictions(path, "multiclass").task == "multiclass"
    assert read_predictions(path, "multilabel").task == "multilabel"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("id,score\na,1.2\n", "probability_range"),
        ("id,score\na,-2\n", "probability_range"),
        ("id,score\na,nan\n", "cell_not_number"),
        ("id,score\na,\n", "cell_not_number"),
        ("id,score\na,inf\n", "cell_not_number"),
        ("id,score\na,0.1\na,0.2\n", "id_duplicate"),
        ("id,score\n,0.1\n", "id_empty"),
        ("id,score\n", "no_rows"),
        ("id,shoe_size\na,0.1\n", "predictions_missing"),
        ("id,prob_x,prob_y,pred\na,0.9,0.9,x\n", "probability_sum"),
        ("id,prob_x,prob_y,pred\na,0.5,0.5,z\n", "label_unknown"),
    ],
)
def test_bad_predictions_are_refused_with_their_place(tmp_path: Path, text: str, code: str) -> None:
    with pytest.raises(DataError) as caught:
        read_predictions(write(tmp_path / "p.csv", text))
    assert caught.value.code == code
    assert "p.csv" in caught.value.where
    assert caught.value.fix


def test_a_reference_is_joined_by_the_column_that_shares_ids(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    predictions = read_predictions(write(tmp_path / "p.csv", "id,score\n001,0.1\n002,0.8\n003,0.4\n"))
    text = "\ufeffpatient_id;case_id;label\r\n# a comment\r\nP2;002;1\r\n\r\nP1;001;0\r\n"
    reference = read_reference(write(tmp_path / "r.csv", text), predictions)
    with caplog.at_level(logging.WARNING):
        joined = join_reference(predictions, reference)
    assert joined.case_ids == ("001", "002")
    assert joined.patient_ids == ("P1", "P2")
    assert joined.values_NC[:, 0].tolist() == [0.1, 0.8]
    assert joined.labels_NC is not None
    assert joined.labels_NC[:, 0].tolist() == [0, 1]
    assert "1 prediction without a reference left out: '003'" in caplog.text
    by_patient = read_predictions(write(tmp_path / "q.csv", "id,score\nP1,0.1\nP2,0.8\n"))
    again = join_reference(by_patient, read_reference(tmp_path / "r.csv", by_patient))
    assert again.case_ids == ("P1", "P2")


def test_a_missing_prediction_is_an_error_that_names_the_case(tmp_path: Path) -> None:
    predictions = read_predictions(write(tmp_path / "p.csv", "id,score\na,0.1\n"))
    reference = read_reference(write(tmp_path / "r.csv", "id,label\na,1\nb,0\nc,0\n"), predictions)
    with pytest.raises(DataError, match="2 cases of the reference have no prediction") as caught:
        join_reference(predictions, reference)
    assert caught.value.code == "prediction_missing"
    assert "'b', 'c', of 3" in caught.value.where


def test_labels_are_numbers_words_or_the_name_of_the_class(tmp_path: Path) -> None:
    predictions = read_predictions(write(tmp_path / "p.csv", "id,prob_cancer\na,0.1\nb,0.5\nc,0.9\nd,0\n"))

    def labels(cells: str, *targets: str) -> list[float]:
        rows = "".join(f"{name},{cell}\n" for name, cell in zip("abcd", cells.split("|"), strict=True))
        reference = read_reference(write(tmp_path / "r.csv", f"id,cancer\n{rows}"), predictions, targets=targets)
        return [float(value) for value in reference.labels_MC[:, 0]]

    np.testing.assert_array_equal(labels("0|1|1.0|"), [0, 1, 1, np.nan])
    np.testing.assert_array_equal(labels("no|yes|True|n/a"), [0, 1, 1, np.nan])
    np.testing.assert_array_equal(labels("benign|cancer|cancer|benign", "cancer"), [0, 1, 1, 0])
    for bad, code in (("0|1|2|0", "label_not_binary"), ("0|1|maybe|0", "cell_not_number")):
        with pytest.raises(DataError) as caught:
            labels(bad)
        assert caught.value.code == code
        assert "line 4" in caught.value.where


def test_columns_of_labels_are_found_or_named(tmp_path: Path) -> None:
    predictions = read_predictions(write(tmp_path / "p.csv", "id,prob_x,prob_y,pred_x\na,0.1,1,0\n"))
    path = write(tmp_path / "r.csv", "id,truth_x,truth_y\na,0,1\n")
    with pytest.raises(DataError, match="no column of labels"):
        read_reference(path, predictions)
    reference = read_reference(path, predictions, targets=("truth_x", "truth_y"))
    assert reference.labels_MC.tolist() == [[0, 1]]
    with pytest.raises(ConfigError, match="2 columns of labels"):
        read_reference(path, predictions, targets=("truth_x",))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(alphabet="id,prob_xsvalue\n\"'#;\t01.-eNaN\0é", max_size=80))
def test_r21_no_table_raises_anything_but_the_error_family(tmp_path: Path, text: str) -> None:
    path = tmp_path / "p.csv"
    path.write_bytes(b"id,score\n" + text.encode())
    try:
        table = read_predictions(path)
    except MedsslError:
        return
    assert len(table) == len(table.values_NC) > 0
