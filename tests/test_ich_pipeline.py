"""The way from a series table of head CT to a tested head, as ``scripts/ich_pipeline.sh`` goes it."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from medssl_cli.core.errors import ConfigError, DataError

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("epidural", "intraparenchymal", "intraventricular", "subarachnoid", "subdural")
LABELS = tuple(f"label_{name}" for name in ("any", *KINDS))
HEADER = ("rel_dir", "patient_id", "study_uid", "series_uid", "nifti_path", *LABELS)


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pipeline_summary", ROOT / "scripts" / "pipeline_summary.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script()


def row(series: str, study: str, patient: str, kinds: Sequence[int]) -> list[object]:
    return [f"{study}/{series}", patient, study, series, f"{study}/{series}/ct.nii.gz", int(any(kinds)), *kinds]


def write_table(path: Path, rows: Sequence[Sequence[object]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([HEADER, *rows])
    return path


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def split_of(medssl: Callable[..., Any], table: Path, out: Path) -> dict[str, list[dict[str, str]]]:
    answer = medssl("split", table, "--out", out, "--stratify", ",".join(LABELS))
    assert answer.exit_code == 0, answer.stderr
    return {part: read_rows(out / f"{part}.csv") for part in ("train", "val", "test")}


def cohort(patients: int, seed: int) -> list[list[object]]:
    """Series of patients with one to three studies of one or two series, labels by study."""
    draw = random.Random(seed)
    rows = []
    for patient in range(patients):
        for study in range(draw.randint(1, 3)):
            kinds = [int(draw.random() < 0.2) for _ in KINDS]
            name = f"ST{patient:03d}-{study}"
            rows += [row(f"{name}-{n}", name, f"P{patient:03d}", kinds) for n in range(draw.randint(1, 2))]
    return rows


# --- split -----------------------------------------------------------------------------------------------------------


def test_m19_patients_stay_on_one_side_and_row_order_does_not_matter(
    medssl: Callable[..., Any], tmp_path: Path
) -> None:
    rows = cohort(40, 0)
    parts = split_of(medssl, write_table(tmp_path / "a.csv", rows), tmp_path / "a")
    for column in ("patient_id", "study_uid"):
        sides = [{line[column] for line in part} for part in parts.values()]
        assert not sides[0] & sides[1] | sides[0] & sides[2] | sides[1] & sides[2]
    shuffled = list(rows)
    random.Random(1).shuffle(shuffled)
    again = split_of(medssl, write_table(tmp_path / "b.csv", shuffled), tmp_path / "b")
    for name, part in parts.items():
        assert {line["series_uid"] for line in part} == {line["series_uid"] for line in again[name]}


@pytest.mark.parametrize("others", [0, 24])
def test_m20_six_singleton_strata_do_not_all_go_to_test(
    medssl: Callable[..., Any], tmp_path: Path, others: int
) -> None:
    """Six studies, each with a combination of labels that no other has, alone or among ordinary ones."""
    combinations = [
        (1, 1, 0, 0, 0),
        (0, 1, 1, 0, 0),
        (0, 0, 1, 1, 0),
        (0, 0, 0, 1, 1),
        (1, 0, 0, 0, 1),
        (1, 1, 1, 1, 1),
    ]
    rows = [row(f"R{n}-1", f"R{n}", f"P{n}", kinds) for n, kinds in enumerate(combinations)]
    rows += [row(f"N{n}-1", f"N{n}", f"Q{n}", (0, 0, 0, 0, 0)) for n in range(others)]
    parts = split_of(medssl, write_table(tmp_path / "t.csv", rows), tmp_path / "s")
    rare = {name: sum(line["study_uid"].startswith("R") for line in part) for name, part in parts.items()}
    assert sum(rare.values()) == 6
    assert rare["train"] >= 3
    assert rare["test"] <= 2


def test_lists_of_a_table_name_their_part(medssl: Callable[..., Any], tmp_path: Path) -> None:
    rows = cohort(20, 2)
    table = write_table(tmp_path / "t.csv", rows)
    parts = split_of(medssl, table, tmp_path / "s")
    for name, part in parts.items():
        assert list(part[0]) == [*HEADER, "split"]
        assert {line["split"] for line in part} == {name}
    joined = [line for part in parts.values() for line in part]
    with (tmp_path / "joined.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [*HEADER, "split"])
        writer.writeheader()
        writer.writerows({**line, "split": "val"} for line in joined)
    again = split_of(medssl, tmp_path / "joined.csv", tmp_path / "again")
    assert [list(part[0]) for part in again.values()] == [[*HEADER, "split"]] * 3
    assert {name: {line["split"] for line in part} for name, part in again.items()} == {n: {n} for n in again}


# --- labels and summary ----------------------------------------------------------------------------------------------


def test_any_must_be_the_largest_of_the_kinds(script: ModuleType, tmp_path: Path) -> None:
    good = [row("a-1", "a", "p", (0, 1, 0, 0, 0)), row("b-1", "b", "q", (0, 0, 0, 0, 0))]
    script.check_labels(write_table(tmp_path / "good.csv", good))
    wrong = [good[0], [*good[1][:5], 1, *good[1][6:]]]
    with pytest.raises(DataError) as refused:
        script.check_labels(write_table(tmp_path / "wrong.csv", wrong))
    assert (refused.value.code, refused.value.exit_code) == ("labels_inconsistent", 3)
    assert refused.value.where.endswith("line 3")
    unknown = [[*good[0][:5], "", *good[0][6:]], [*good[1][:6], "", *good[1][7:]]]
    script.check_labels(write_table(tmp_path / "unknown.csv", unknown))
    with pytest.raises(DataError, match="no number"):
        script.check_labels(write_table(tmp_path / "text.csv", [[*good[0][:5], "yes", *good[0][6:]]]))


def test_counts_of_a_split_by_hand(script: ModuleType, tmp_path: Path) -> None:
    rows = [
        row("a-1", "a", "p", (0, 1, 0, 0, 1)),
        row("a-2", "a", "p", (0, 1, 0, 0, 1)),
        row("b-1", "b", "q", (0, 0, 0, 0, 0)),
        [*row("c-1", "c", "r", (0, 0, 0, 0, 0))[:5], "0.7", "", "0", "2", "0", "nan"],
    ]
    counts = script.count_split(write_table(tmp_path / "train.csv", rows))
    assert counts == {"num_series": 4, "num_studies": 3, "positive_counts": [3, 0, 2, 1, 0, 2]}


def test_missing_step_is_named(script: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        script.write_summary(tmp_path, [])
    assert "features.json" in refused.value.where


def test_wrong_words_of_the_pipeline_end_with_2() -> None:
    for words in ([], ["a", "b"], ["a.csv", "run", "out", "nonsense"], ["a.csv", "run", "out", "split.ratios=1"],
                  ["a.csv", "run", "out", "split.ratio=0.7 0.2 0.1"]):  # fmt: skip
        answer = subprocess.run(
            ["bash", str(ROOT / "scripts" / "ich_pipeline.sh"), *words], capture_output=True, text=True, check=False
        )
        assert answer.returncode == 2, answer.stderr


def test_keys_of_the_head_are_checked_before_hours_of_extraction(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = str(write_table(tmp_path / "t.csv", cohort(3, 0)))
    assert script.main(["check", table, "epochs=3", "hidden_dim=64"]) == 0
    assert script.main(["check", table, "epoch=3"]) == 2
    assert "did you mean epochs?" in capsys.readouterr().err
    assert script.main(["check", table, "head.config=ich_logistic", "c_values=5"]) == 0
    assert script.main(["check", table, "head.config=ich_logistic", "epochs=3"]) == 2  # a key of other heads
    assert script.main(["check", table, "head=knn", "knn_k=3"]) == 2  # the recipe names keys that only an MLP has
    assert "knn head does not use it" in capsys.readouterr().err


def test_a_folder_of_features_is_never_taken_for_the_link(tmp_path: Path) -> None:
    """``ln`` would put the link inside the folder, and the head would learn from what lies there."""
    (tmp_path / "out" / "features").mkdir(parents=True)
    words = (write_table(tmp_path / "t.csv", cohort(3, 0)), tmp_path / "run", tmp_path / "out")
    answer = subprocess.run(
        ["bash", str(ROOT / "scripts" / "ich_pipeline.sh"), *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 2
    assert "in the way" in answer.stderr
    assert list((tmp_path / "out").iterdir()) == [tmp_path / "out" / "features"]


# --- the whole way ---------------------------------------------------------------------------------------------------


def write_series(root: Path, patients: int, slices: int = 12) -> Path:
    """NIfTI volumes of 32 x 32 pixels in which a bright block of its own place stands for each kind."""
    draw = np.random.default_rng(0)
    rows = []
    for n in range(patients):
        kinds = [int(n % 6 == k + 1 or (n % 12 == 0 and k == n // 12 % 5)) for k in range(5)]
        voxels = draw.normal(35, 4, (32, 32, slices))
        for k, kind in enumerate(kinds):
            if kind:
                voxels[4 + 5 * k : 9 + 5 * k, 10:20, 4:8] = 75
        name = f"ST{n:02d}"
        line = row(f"{name}-1", name, f"P{n:02d}", kinds)
        path = root / str(line[4])
        path.parent.mkdir(parents=True)
        nib.Nifti1Image(np.rint(voxels).astype(np.int16), np.diag([-1.0, 1, 5, 1])).to_filename(path)
        rows.append(line)
    return write_table(root / "series.csv", rows)


@pytest.mark.slow
def test_whole_chain_runs_on_a_cpu_and_writes_every_file(write_run: Callable[..., Path], tmp_path: Path) -> None:
    """Section 13.1 of the acceptance list: a tiny random ViT, volumes of 12 slices, no network."""
    table = write_series(tmp_path / "data", 36)
    model = write_run(
        tmp_path / "run",
        None,
        "data.as_pictures=true",
        "data.mri_sequences=[image]",
        "data.preprocess.window_hu=[0,80]",
    )
    out = tmp_path / "out"
    words = ["split.ratios=0.6 0.2 0.2", "extract.resize=32", "epochs=3", "device=cpu", f"cache={tmp_path / 'cache'}"]
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "MEDSSL_CACHE": str(tmp_path / "cache"),
        "http_proxy": "http://127.0.0.1:9",
        "https_proxy": "http://127.0.0.1:9",
        "OMP_NUM_THREADS": "1",
    }
    answer = subprocess.run(
        ["bash", str(ROOT / "scripts" / "ich_pipeline.sh"), str(table), str(model), str(out), *words],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert answer.returncode == 0, answer.stderr[-3000:]
    summary = json.loads((out / "pipeline_summary.json").read_text(encoding="utf-8"), parse_constant=_refuse)
    sizes = {part: facts["num_series"] for part, facts in summary["splits"].items()}
    assert sum(sizes.values()) == 36
    for part, count in sizes.items():
        assert {line["split"] for line in read_rows(out / "splits" / f"{part}.csv")} == {part}
        assert np.load(out / "features" / f"{part}_embeddings.npy").shape == (count, 32)
        labels = np.load(out / "features" / f"{part}_labels.npy")
        assert labels.sum(0).tolist() == summary["splits"][part]["positive_counts"]
        assert len(read_rows(out / "features" / f"{part}_ids.csv")) == count
    for name in ("best.safetensors", "last.safetensors", "head.json", "train_summary.json", "progress.png"):
        assert (out / "head" / name).stat().st_size > 0
    assert np.load(out / "test_probs.npy").shape == (sizes["test"], 6)
    json.loads((out / "test_metrics.json").read_text(encoding="utf-8"), parse_constant=_refuse)
    assert "research" in summary["note"].lower()
    assert summary["train_summary"]
    assert summary["test_metrics"]
    assert str(Path.home()) not in json.dumps(summary)


def _refuse(text: str) -> float:
    raise AssertionError(f"{text} is no strict JSON")
