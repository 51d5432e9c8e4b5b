import csv
import gzip
import json
import re
import struct
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from typer.testing import CliRunner

from medssl_cli.app import app
from medssl_cli.core.run import locked
from medssl_cli.core.volume import Volume
from medssl_cli.data.images import write_image, write_volume
from medssl_cli.data.manifest import read_ids

AFFINE = np.diag([0.5, 0.5, 1.0, 1.0])


def medssl(*words: object) -> tuple[int, str, str]:
    answer = CliRunner().invoke(app, ["check-data", *map(str, words)])
    return answer.exit_code, answer.stdout, answer.stderr


def tree(root: Path, *ids: str) -> Path:
    for n, case_id in enumerate(ids):
        (root / case_id).mkdir(parents=True)
        for i, stem in enumerate(("ax_t2wi", "ax_adc", "ax_dwi_b1400")):
            array = np.random.default_rng([n, i]).integers(0, 900, (4, 16, 16)).astype(np.int16)
            write_volume(root / case_id / f"{stem}.nii.gz", Volume(array, AFFINE))
        mask = np.zeros((4, 16, 16), np.uint8)
        mask[2, 4:9, 5:12] = 1
        write_volume(root / case_id / "roi_Prostate.nii.gz", Volume(mask, AFFINE))
    return root


def report(folder: Path) -> dict:
    return json.loads((folder / "check_data.json").read_text())


def test_clean_tree(tmp_path: Path) -> None:
    root = tree(tmp_path / "data", "a", "b")
    code, out, err = medssl(root, "--out", tmp_path / "out")
    assert code == 0, err
    assert "2 of 2 cases without error (pretrain)" in out
    found = report(tmp_path / "out")
    assert (found["n_cases"], found["n_ok"], found["errors"], found["warnings"]) == (2, 2, [], [])
    assert {entry["code"] for entry in found["infos"]} == {"dwi_choice"}
    assert set(found["infos"][0]) == {"code", "case_id", "path", "message", "fix"}
    assert {"schema_version", "medssl_version", "command", "started_at", "elapsed_s"} <= set(found)
    html = (tmp_path / "out/check_data.html").read_text()
    assert html.count("data:image/jpeg") == 2
    assert not (tmp_path / "out/failures.csv").exists()


def test_errors_give_exit_3_after_everything_is_written(tmp_path: Path) -> None:
    root = tree(tmp_path / "data", "a", "b", "c")
    (root / "a/ax_adc.nii.gz").write_bytes(b"")
    (root / "b/ax_t2wi.nii.gz").unlink()
    code, out, err = medssl(root, "--out", tmp_path / "out", "--fix-csv", tmp_path / "good.csv")
    assert code == 3
    assert "error file_empty a: " in out
    assert "2 errors in 2 of 3 cases" in err
    found = report(tmp_path / "out")
    assert [(e["code"], e["case_id"]) for e in found["errors"]] == [("file_empty", "a"), ("sequence_missing", "b")]
    assert found["errors"][0]["path"].endswith("a/ax_adc.nii.gz")
    assert found["n_ok"] == 1
    assert read_ids(tmp_path / "good.csv").ids == ("c",)
    with (tmp_path / "out/failures.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["case_id", "path", "reason", "fix"]
    assert [row[0] for row in rows[1:]] == ["a", "b"]
    assert medssl(root, "--split-csv", tmp_path / "good.csv")[0] == 0
    assert medssl(root, "--out", tmp_path / "out", "--on-error", "skip")[0] == 4
    (root / "b/ax_t2wi.nii.gz").symlink_to(root / "b/ax_adc.nii.gz")
    (root / "a/ax_adc.nii.gz").unlink()
    assert medssl(root, "--allow-missing", "--out", tmp_path / "out")[0] == 0
    assert report(tmp_path / "out")["warnings"][0]["code"] == "sequence_missing"
    assert not (tmp_path / "out/failures.csv").exists()


def test_json_is_one_document(tmp_path: Path) -> None:
    root = tree(tmp_path / "data", "a")
    (root / "a/ax_adc.nii.gz").write_bytes(b"junk")
    code, out, err = medssl(root, "--json")
    assert code == 3
    assert json.loads(out)["errors"][0]["code"] == "nifti_truncated"
    assert err.startswith("error: ")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data"]


@pytest.mark.slow
def test_workers_give_the_same_report(tmp_path: Path) -> None:
    root = tree(tmp_path / "data", *"abcdef")
    (root / "c/ax_adc.nii.gz").write_bytes(b"")
    (root / "e/ax_dwi_b1400.nii.gz").write_bytes((root / "a/ax_dwi_b1400.nii.gz").read_bytes())
    reports = []
    for workers in (1, 2):
        assert medssl(root, "--out", tmp_path / "out", "--workers", workers)[0] == 3
        found = report(tmp_path / "out")
        reports.append({k: v for k, v in found.items() if k not in ("started_at", "elapsed_s")})
    assert reports[0] == reports[1]
    assert [e["code"] for e in reports[0]["warnings"]] == ["duplicate_content", "duplicate_content"]


def test_r12_leaks_between_split_files(tmp_path: Path) -> None:
    root = tree(tmp_path / "data", "a", "b", "c", "d")
    (root / "cases.csv").write_text("case_id,patient_id\na,p1\nb,p1\nc,p3\nd,p4\n")
    folder = tmp_path / "split"
    folder.mkdir()
    for name, ids in (("train", "ac"), ("val", "b"), ("test", "d")):
        (folder / f"{name}.csv").write_text("patient_id\n" + "\n".join(ids) + "\n")
    for words in (("--split-csv", folder), ("--split-csv", folder / "train.csv", "--split-csv", folder / "val.csv")):
        assert medssl(root, *words, "--out", tmp_path / "out")[0] == 3
        assert {e["code"] for e in report(tmp_path / "out")["errors"]} == {"patient_across_splits"}
    assert medssl(root, "--split-csv", folder / "train.csv")[0] == 3  # val.csv beside it
    (root / "cases.csv").unlink()
    assert medssl(root, "--split-csv", folder)[0] == 0
    (root / "d/ax_adc.nii.gz").write_bytes((root / "a/ax_adc.nii.gz").read_bytes())
    assert medssl(root, "--split-csv", folder, "--out", tmp_path / "out", "--on-error", "skip")[0] == 3
    assert [(e["code"], e["case_id"]) for e in report(tmp_path / "out")["errors"]] == [
        ("duplicate_across_splits", "a"),
        ("duplicate_across_splits", "d"),
    ]
    (folder / "val.csv").write_text("patient_id\na\n")
    code, out, _ = medssl(root, "--split-csv", folder)
    assert code == 3
    assert "id_across_splits" in out


def test_r15_r20_page_is_inert_and_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    root = tree(tmp_path / "data", "<script>alert(1)<x", "[red]b")
    for case in root.iterdir():
        (case / "ax_adc.nii.gz").write_bytes(b"")
    code, out, _ = medssl(root, "--out", tmp_path / "out")
    assert code == 3
    html = (tmp_path / "out/check_data.html").read_text()
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)&lt;x" in html
    assert not re.search(r"(src|href)=\"(?!data:|#)", html)
    for text in (html, json.dumps(report(tmp_path / "out"))):
        assert str(tmp_path) not in text.replace(f"{tmp_path}/out", "").replace(json.dumps(str(tmp_path)), "")
        assert "~/data" in text
    assert "[red]b" in out


def test_r13_ids_of_the_csv_stay_inside(tmp_path: Path) -> None:
    root = tree(tmp_path / "data", "a")
    (tmp_path / "s.csv").write_text("patient_id\na\n../data/a\n/etc\n007\n")
    assert medssl(root, "--split-csv", tmp_path / "s.csv", "--out", tmp_path / "out")[0] == 3
    assert [e["code"] for e in report(tmp_path / "out")["errors"]] == ["path_escapes", "path_escapes", "folder_missing"]


def test_images_and_their_labels(tmp_path: Path) -> None:
    root = tmp_path / "images"
    for i in range(6):
        (root / f"P{i}_L.png").parent.mkdir(exist_ok=True)
        write_image(root / f"P{i}_L.png", np.random.default_rng(i).integers(0, 255, (40, 40, 3), dtype=np.uint8))
    assert medssl(root, "--out", tmp_path / "out")[0] == 0
    assert report(tmp_path / "out")["task"] == "images"
    labels = tmp_path / "labels.csv"
    labels.write_text("image,patient,grade\n" + "".join(f"images/P{i}_L.png,P{i},{i % 2}\n" for i in range(6)))
    words = ("--task", "classify", "--labels", labels)
    assert medssl(root, *words, "--target", "grade")[0] == 0
    code, _, err = medssl(root, *words)
    assert code == 2
    assert "--target" in err
    labels.write_text("image,grade\n" + "".join(f"P{i}_L.png,{i % 2}\n" for i in range(5)))
    assert medssl(root, *words, "--out", tmp_path / "out", "--fix-csv", tmp_path / "f.csv")[0] == 3
    assert [(e["code"], e["case_id"]) for e in report(tmp_path / "out")["errors"]] == [("label_missing", "P5_L.png")]
    assert len(read_ids(tmp_path / "f.csv").ids) == 5
    (tmp_path / "s.csv").write_text("patient_id,site\nP0_L.png,x\nP1_L.png,y\n")
    write_image(root / "P1_L.png", np.zeros((40, 40), np.uint8))
    assert medssl(root, "--split-csv", tmp_path / "s.csv", "--fix-csv", tmp_path / "f.csv")[0] == 3
    assert (tmp_path / "f.csv").read_text() == "patient_id,site\nP0_L.png,x\n"


def test_series_table(tmp_path: Path) -> None:
    root = tree(tmp_path / "data", "a", "b")
    table = tmp_path / "series.csv"
    table.write_text("study_uid,series_uid,nifti_path\n1,x,data/a/ax_t2wi.nii.gz\n2,y,data/none.nii.gz\n")
    assert medssl(table, "--out", tmp_path / "out", "--fix-csv", tmp_path / "f.csv")[0] == 3
    assert [(e["code"], e["case_id"]) for e in report(tmp_path / "out")["errors"]] == [("file_missing", "2__y")]
    assert len((tmp_path / "f.csv").read_text().splitlines()) == 2
    assert root.is_dir()


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["--task", "coco"], 2, "pretrain, images, classify"),
        (["--task", "coco"], 2, "not part of this version"),
        (["--task", "pretrian"], 2, "did you mean 'pretrain'?"),
        (["--task", "images"], 2, "--task pretrain"),
        (["--task", "classify"], 2, "--labels"),
        (["--on-error", "ignore"], 2, "'stop', 'skip'"),
        (["--sequences", ","], 2, "ax_t2wi"),
        (["--split-csv", "nowhere.csv"], 3, "cannot be read"),
    ],
)
def test_wrong_usage(tmp_path: Path, words: list[str], code: int, text: str) -> None:
    root = tree(tmp_path / "data", "a")
    found, _, err = medssl(root, *words, "--out", tmp_path / "out")
    assert found == code, err
    assert text in err
    assert not (tmp_path / "out").exists()


def test_foreign_folder_is_kept(tmp_path: Path) -> None:
    root = tree(tmp_path / "data", "a")
    code, _, err = medssl(root, "--out", root)
    assert code == 2
    assert "--overwrite" in err
    assert medssl(tmp_path / "nowhere")[0] == 3


def files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file() and p.name != ".lock"}


def test_overwrite_never_deletes_what_is_checked(tmp_path: Path) -> None:
    root = tree(tmp_path / "data", "a", "b")
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables/some.csv").write_text("patient_id\na\n")
    (tmp_path / "tables/labels.csv").write_text("patient_id,label\na,1\nb,0\n")
    table = tmp_path / "series.csv"
    table.write_text(f"patient_id,path\na,{root / 'a/ax_t2wi.nii.gz'}\n")
    before = files(tmp_path)
    tables = tmp_path / "tables"
    for words in (
        (root, "--out", root),
        (root, "--out", root / "a"),
        (root, "--out", tmp_path),
        (table, "--out", root),
        (root, "--split-csv", tables / "some.csv", "--out", tables),
        (root, "--task", "classify", "--labels", tables / "labels.csv", "--out", tables),
    ):
        code, _, err = medssl(*words, "--overwrite")
        assert code == 2, err
        assert "more than old results" in err
    assert files(tmp_path) == before


def test_old_results_go_only_once_there_are_new_ones(tmp_path: Path) -> None:
    root = tree(tmp_path / "data", "a")
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with locked(out, "output folder"):
        code, _, err = medssl(root, "--out", out, "--overwrite")
        assert code == 2
        assert "Another process" in err
        assert files(out) == {"thesis.txt": b"mine"}
    (tmp_path / "labels.csv").write_text("")
    code, _, err = medssl(root, "--task", "classify", "--labels", tmp_path / "labels.csv", "--out", out, "--overwrite")
    assert code == 3, err
    assert files(out) == {"thesis.txt": b"mine"}
    code, _, err = medssl(root, "--out", out, "--overwrite", "--fix-csv", out / "good.csv")
    assert code == 0, err
    assert files(out).keys() == {".medssl.json", "check_data.json", "check_data.html", "good.csv"}


def test_real_study_needs_alignment(real_data: Path, tmp_path: Path) -> None:
    source = real_data / "prostatex_mpmri/ProstateX-0000/nifti"
    folder = tmp_path / "data/ProstateX-0000"
    folder.mkdir(parents=True)
    for stem, name in (
        ("ax_t2wi", "4_t2_tse_tra"),
        ("ax_adc", "7_ep2d_diff_tra_DYNDIST_ADC"),
        ("ax_dwi_b1400", "8_ep2d_diff_tra_DYNDISTCALC_BVAL"),
    ):
        (folder / f"{stem}.nii.gz").write_bytes((source / f"{name}.nii.gz").read_bytes())
    code, out, _ = medssl(tmp_path / "data", "--out", tmp_path / "out")
    assert code == 3
    assert "grid_shape" in out
    assert "convert align" in report(tmp_path / "out")["errors"][0]["fix"]
    assert medssl(tmp_path / "data", "--sequences", "ax_adc,ax_dwi")[0] == 0


@pytest.mark.slow
def test_r18_memory_does_not_grow_with_cases(tmp_path: Path) -> None:
    import subprocess
    import sys

    script = (
        "import resource, sys\nfrom pathlib import Path\n"
        "from medssl_cli.services.check_data import check_data\n"
        "check_data(Path(sys.argv[1]), out=Path(sys.argv[2]), workers=1)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    peaks = []
    for n in (20, 200):
        root = tree(tmp_path / f"data{n}", *(f"{i:03d}" for i in range(n)))
        words = [sys.executable, "-c", script, str(root), str(tmp_path / f"out{n}")]
        answer = subprocess.run(words, capture_output=True, text=True, check=True)
        peaks.append(int(answer.stdout.split()[-1]))
    assert peaks[1] < 1.1 * peaks[0], peaks


def test_r09_legal_but_unusual_formats_are_told(tmp_path: Path) -> None:
    root = tree(tmp_path / "data", "nan", "swapped", "uint16", "float64", "zero")
    for case_id, slope in (("nan", float("nan")), ("zero", 0.0)):  # byte by byte: nibabel writes a slope of its own
        path = root / case_id / "ax_adc.nii.gz"
        header = bytearray(gzip.decompress(path.read_bytes()))
        struct.pack_into("<f", header, 112, slope)
        path.write_bytes(gzip.compress(header))
    for case_id, header in (("swapped", nib.Nifti1Header(endianness=">")), ("uint16", None), ("float64", None)):
        array = np.random.default_rng(len(case_id) * 10).integers(0, 900, (16, 16, 4))
        array = array.astype("int16" if case_id == "swapped" else case_id) + (case_id == "swapped")
        nib.Nifti1Image(array, AFFINE, header).to_filename(root / case_id / "ax_adc.nii.gz")
    code, out, err = medssl(root, "--json")
    assert code == 0, err
    told = json.loads(out)
    found = {e["case_id"]: e["code"] for e in told["infos"] if e["code"] != "dwi_choice"}
    assert found == {"swapped": "big_endian", "uint16": "dtype", "float64": "dtype", "zero": "scl_slope"}
    assert [(e["case_id"], e["code"]) for e in told["warnings"]] == [("nan", "scl_slope")]
    text = medssl(root)[1]
    for code_of in ("big_endian", "dtype", "scl_slope"):
        assert code_of in text


def test_the_last_error_is_short_and_gives_the_fix_of_all(tmp_path: Path) -> None:
    root = tree(tmp_path / "data", "a", "b")
    (root / "a/ax_adc.nii.gz").unlink()
    code, out, err = medssl(root, "--out", tmp_path / "out")
    assert code == 3
    what, where, fix = err.splitlines()
    assert what == "error: 1 error in 1 of 2 cases."
    assert "first: a sequence_missing; all in " in where
    assert where.endswith("out/check_data.json")
    assert "--allow-missing" in fix
    assert "failures.csv" in out
    code, out, err = medssl(root, "--on-error", "skip")
    assert code == 4
    assert "failures.csv" not in out + err


def test_no_color_leaves_no_escape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tree(tmp_path / "data", "a")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    assert "\x1b" in medssl(root)[1]
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in medssl(root)[1]


def test_help_and_choices(tmp_path: Path) -> None:
    _, out, _ = medssl("--help")
    assert "list[" not in out
    for words in (("--task", "nonsense"), ("--on-error", "go")):
        code, _, err = medssl(tree(tmp_path / words[1], "a"), *words)
        assert code == 2
        assert words[0] in err


# --- tables, layouts, windows, statistics ----------------------------------------------------------------------------


def series_table(folder: Path, patients: str = "ppqr") -> Path:
    """One CT a row; a patient may have several."""
    rows = ["patient_id,series_uid,nifti_path"]
    for i, patient in enumerate(patients):
        array = np.random.default_rng(i).integers(-900, 900, (4, 16, 16)).astype(np.int16)
        write_volume(folder / f"nii/{i}.nii.gz", Volume(array, AFFINE))
        rows.append(f"{patient},s{i},nii/{i}.nii.gz")
    (folder / "series.csv").write_text("\n".join(rows) + "\n")
    return folder / "series.csv"


def test_r12_a_split_table_is_held_apart_by_patient(tmp_path: Path) -> None:
    table = series_table(tmp_path)
    header, *rows = table.read_text().splitlines()
    (tmp_path / "s").mkdir()
    for name, part in (("train", rows[:2]), ("val", rows[2:3]), ("test", rows[3:])):
        (tmp_path / f"s/{name}.csv").write_text("\n".join([header, *part]) + "\n")
    assert medssl(table, "--split-csv", tmp_path / "s", "--out", tmp_path / "o")[0] == 0
    assert report(tmp_path / "o")["splits"] == {"train": 2, "val": 1, "test": 1}
    (tmp_path / "s/val.csv").write_text("\n".join([header, rows[1]]) + "\n")
    (tmp_path / "s/train.csv").write_text("\n".join([header, rows[0]]) + "\n")
    assert medssl(table, "--split-csv", tmp_path / "s/train.csv", "--out", tmp_path / "o")[0] == 3
    errors = report(tmp_path / "o")["errors"]
    assert {entry["code"] for entry in errors} == {"patient_across_splits"}
    assert "The patient p stands in train and val" in errors[0]["message"]


def test_the_bad_row_of_a_split_table_alone_is_left_out(tmp_path: Path) -> None:
    table = series_table(tmp_path)
    (tmp_path / "nii/1.nii.gz").write_bytes(b"")
    fixed = tmp_path / "fixed.csv"
    part = tmp_path / "part.csv"
    part.write_text("\n".join(table.read_text().splitlines()[:4]) + "\n")
    assert medssl(table, "--split-csv", part, "--fix-csv", fixed)[0] == 3
    assert [line.split(",")[1] for line in fixed.read_text().splitlines()] == ["series_uid", "s0", "s2"]
    patients = tmp_path / "patients.csv"
    patients.write_text("patient_id\np\nq\n")
    assert medssl(table, "--split-csv", patients, "--fix-csv", fixed)[0] == 3
    assert fixed.read_text().split() == ["patient_id", "q"]


def test_other_layouts_are_checked_as_they_stand(tmp_path: Path) -> None:
    root = tmp_path / "Dataset001_P"
    (root / "imagesTr").mkdir(parents=True)
    (root / "dataset.json").write_text('{"channel_names": {"0": "T2", "1": "ADC"}, "file_ending": ".nii.gz"}')
    for i, shape in enumerate(((4, 16, 16), (4, 16, 16), (4, 8, 8))):
        for channel in range(2):
            array = np.random.default_rng([i, channel]).integers(0, 900, shape if channel else (4, 16, 16))
            write_volume(root / f"imagesTr/c{i}_{channel:04d}.nii.gz", Volume(array.astype(np.int16), AFFINE))
    code, out, err = medssl(root, "--out", tmp_path / "o")
    assert code == 3, err
    found = report(tmp_path / "o")
    assert (found["layout"], found["sequences"], found["n_cases"], found["n_ok"]) == ("nnunet", ["t2", "adc"], 3, 2)
    assert [(entry["code"], entry["case_id"]) for entry in found["errors"]] == [("grid_shape", "c2")]
    assert "2 of 3 cases without error (pretrain)" in out
    ids = tmp_path / "ids.csv"
    ids.write_text("patient_id\nc0\nc1\n")
    assert medssl(root, "--split-csv", ids)[0] == 0
    code, _, err = medssl(root, "--layout", "template")
    assert code == 2
    assert "--template" in err
    code, _, err = medssl(root, "--template", "{case}/{sequence}.nii")
    assert code == 2
    assert "{subject}" in err
    words = ("--template", "imagesTr/{subject}_{sequence}.nii.gz", "--sequences", "0000", "--roi", "")
    assert medssl(root, *words, "--out", tmp_path / "o")[0] == 0
    assert (report(tmp_path / "o")["layout"], report(tmp_path / "o")["n_cases"]) == ("template", 3)


def test_a_window_that_expects_hu_warns(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 256, (4, 16, 16)).astype(np.uint8)
    write_volume(tmp_path / "t/P/ct.nii.gz", Volume(array, AFFINE))
    words = (tmp_path / "t", "--sequences", "ct", "--out", tmp_path / "o")
    for window, told in (("-1000,1000", True), ("0,80", False)):
        assert medssl(*words, f"--window-hu={window}")[0] == 0
        assert ("ct_not_hu" in [entry["code"] for entry in report(tmp_path / "o")["warnings"]]) is told
    for bad in ("x", "1", "80,0", "nan,1", "1,2,3"):
        assert medssl(*words, f"--window-hu={bad}")[0] == 2


def test_stats_of_pictures_equal_numpy_and_are_yaml(tmp_path: Path) -> None:
    import yaml

    rng = np.random.default_rng(0)
    colour, grey = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8), rng.integers(0, 256, (33, 40), dtype=np.uint8)
    root = tmp_path / "set/Fundus"
    root.mkdir(parents=True)
    write_image(root / "a.png", colour)
    write_image(root / "b.png", grey)
    (root / "z.png").write_bytes(b"no picture")
    code, out, _ = medssl(tmp_path / "set", "--modality", "fundus", "--stats", "--out", tmp_path / "o")
    assert code == 3  # the bad picture, which the figures leave out
    pixels = np.concatenate([colour.reshape(-1, 3), np.repeat(grey.reshape(-1, 1), 3, axis=1)]) / 255
    stats = report(tmp_path / "o")["stats"]
    assert (stats["channels"], stats["n_cases"], stats["pixels"]) == (["red", "green", "blue"], 2, [3320])
    np.testing.assert_allclose(stats["mean"], pixels.mean(axis=0), atol=1e-7)
    np.testing.assert_allclose(stats["std"], pixels.std(axis=0), atol=1e-7)
    snippet = yaml.safe_load("\n".join(line for line in out.splitlines() if line.startswith("crops:")))
    np.testing.assert_allclose(snippet["crops"]["mean"], stats["mean"], atol=1e-8)
    assert medssl(tmp_path / "set", "--out", tmp_path / "o")[0] == 3
    assert report(tmp_path / "o")["stats"] is None


def test_stats_of_volumes_by_sequence_and_by_window(tmp_path: Path) -> None:
    root = tree(tmp_path / "data", "a", "b")
    assert medssl(root, "--stats", "--out", tmp_path / "o")[0] == 0
    stats = report(tmp_path / "o")["stats"]
    assert stats["channels"] == ["ax_t2wi", "ax_adc", "ax_dwi"]
    assert all(0.4 < value < 0.6 for value in stats["mean"])  # noise between its percentiles
    table = series_table(tmp_path)
    words = ("--stats", "--window-hu=-1000,1000", "--window-hu=0,80", "--out", tmp_path / "o")
    assert medssl(table, *words)[0] == 0
    stats = report(tmp_path / "o")["stats"]
    assert stats["channels"] == ["-1000 to 1000 HU", "0 to 80 HU"]
    arrays = [np.random.default_rng(i).integers(-900, 900, (4, 16, 16)) for i in range(4)]
    for mean, low, high in zip(stats["mean"], (-1000, 0), (1000, 80), strict=True):
        assert mean == pytest.approx(np.mean([np.clip((a - low) / (high - low), 0, 1) for a in arrays]), abs=1e-6)
    assert medssl(root, *words)[0] == 2  # several windows of several sequences


def test_real_fundus_statistics_equal_numpy(tmp_path: Path, real_data: Path) -> None:
    from medssl_cli.data.images import read_image

    ids = [f"Patient{n:03d}_{eye}.jpg" for n in range(1, 200) for eye in "LR"]
    paths = [path for name in ids if (path := real_data / "fundus_dr_grading/images" / name).exists()][:6]
    (tmp_path / "ids.csv").write_text("image\n" + "".join(f"{path.name}\n" for path in paths))
    words = ("--split-csv", tmp_path / "ids.csv", "--stats", "--out", tmp_path / "o")
    assert medssl(real_data / "fundus_dr_grading/images", *words)[0] == 0
    stats = report(tmp_path / "o")["stats"]
    pixels = np.concatenate([read_image(path).reshape(3, -1) for path in paths], axis=1) / 255.0
    np.testing.assert_allclose(stats["mean"], pixels.mean(axis=1), rtol=1e-6)
    np.testing.assert_allclose(stats["std"], pixels.std(axis=1), rtol=1e-6)
