import json
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from medssl_cli.core import run
from medssl_cli.core.errors import ConfigError, DataError, ResourceError


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    run.write_json(path, {"x": math.nan, "y": np.float32(1.5), "p": tmp_path})
    assert json.loads(path.read_text()) == {"x": None, "y": 1.5, "p": str(tmp_path)}
    with pytest.raises(FileNotFoundError), run.atomic_path(path) as temporary:
        temporary.with_name("absent").rename(temporary)  # as if the writer had failed half-way
    assert json.loads(path.read_text())["y"] == 1.5
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_file_where_a_folder_is_needed_is_no_bug_of_ours(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    with pytest.raises(ResourceError, match="cannot be written") as caught, run.locked(tmp_path / "file" / "x", "run"):
        pass
    assert (caught.value.code, caught.value.exit_code) == ("not_writable", 6)
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


def test_full_disk_names_path_and_bytes(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="cannot be written") as caught, run.say_disk_errors(tmp_path, 12345):
        raise OSError(28, "No space left on device")
    assert "12,345 bytes needed" in caught.value.where
    assert caught.value.exit_code == 6


def test_foreign_folder_is_refused_with_both_ways_out(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError) as caught:
        run.claim_out_folder(tmp_path, "split")
    assert "--overwrite" in caught.value.fix
    assert "--out" in caught.value.fix
    run.claim_out_folder(tmp_path, "split", overwrite=True)
    assert not (tmp_path / "thesis.txt").exists()
    run.claim_out_folder(tmp_path, "split")
    (tmp_path / "train.csv").write_text("patient_id\n")
    with pytest.raises(ConfigError):
        run.claim_out_folder(tmp_path, "pretrain")


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """``out``, which holds a data set that no command made, and a link to it beside."""
    (tmp_path / "out/data/P1").mkdir(parents=True)
    (tmp_path / "out/data/P1/ax_t2wi.nii.gz").write_text("scan")
    (tmp_path / "out/labels.csv").write_text("id,label")
    (tmp_path / "link").symlink_to(tmp_path / "out/data")
    (tmp_path / "linked/P1").mkdir(parents=True)
    (tmp_path / "linked/P1/x.nii.gz").symlink_to(tmp_path / "out/data/P1/ax_t2wi.nii.gz")
    (tmp_path / "linked/loop").symlink_to(tmp_path / "linked/loop")
    (tmp_path / "out/elsewhere").symlink_to("/usr")
    return tmp_path / "out"


def contents(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    "name",
    [
        "out",
        "out/data",
        "out/data/P1/ax_t2wi.nii.gz",
        "out/labels.csv",
        "link",
        "linked",
        "out/elsewhere",
        ".",
        "out/..",
    ],
)
def test_overwrite_never_deletes_an_input(foreign: Path, name: str) -> None:
    before = contents(foreign)
    beside = foreign.parent / "beside.csv"
    for step in (run.check_out_folder, run.claim_out_folder):
        with pytest.raises(ConfigError) as caught:
            step(foreign, "split", overwrite=True, inputs=[beside, foreign.parent / name])
        assert (caught.value.code, caught.value.exit_code) == ("out_holds_source", 2)
        assert str(foreign.parent / name) in caught.value.where
    assert contents(foreign) == before
    run.claim_out_folder(foreign, "split", overwrite=True, inputs=[beside, foreign.parent / "absent/x.csv"])
    assert [p.name for p in foreign.iterdir()] == [".medssl.json"]


def test_an_input_inside_is_fine_where_nothing_goes(tmp_path: Path) -> None:
    run.claim_out_folder(tmp_path, "split", inputs=[tmp_path])
    (tmp_path / "labels.csv").write_text("mine")
    run.claim_out_folder(tmp_path, "split", overwrite=True, inputs=[tmp_path / "labels.csv", tmp_path])
    assert (tmp_path / "labels.csv").read_text() == "mine"


def test_the_working_directory_and_home_are_never_emptied(foreign: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(foreign)
    with monkeypatch.context() as at:
        at.chdir(foreign)
        for out in (Path(), Path(".."), foreign):
            with pytest.raises(ConfigError, match="more than old results") as caught:
                run.claim_out_folder(out, "split", overwrite=True)
            assert "working directory" in caught.value.where
    with monkeypatch.context() as at:
        at.setenv("HOME", str(foreign / "data"))
        with pytest.raises(ConfigError) as caught:
            run.claim_out_folder(foreign, "split", overwrite=True)
        assert "home folder" in caught.value.where
    assert contents(foreign) == before


def test_claiming_spares_the_lock_and_what_is_kept(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "thesis").mkdir()
    with run.locked(tmp_path, "output folder"):
        assert run.check_out_folder(tmp_path, "infer", overwrite=True, keep=[tmp_path / "scratch"]) == [
            tmp_path / "thesis"
        ]
        run.claim_out_folder(tmp_path, "infer", overwrite=True, keep=[tmp_path / "scratch"])
    assert {p.name for p in tmp_path.iterdir()} == {".lock", ".medssl.json", "scratch"}


@pytest.mark.parametrize("name", ["a.json", "ax_t2wi.nii.gz", "ä東" * 40 + ".npy"])
def test_r17_writers_of_one_process_id_do_not_meet(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with run.atomic_path(path) as first:
        first.write_text("fir")
        with run.atomic_path(path) as second:  # as in another container, where processes are counted anew
            second.write_text("second")
            assert {first, second} == {*tmp_path.glob(".*.tmp*")}  # the pattern by which leftovers are removed
            assert first.name.endswith("".join(path.suffixes))
        assert path.read_text() == "second"
        with first.open("a") as file:
            file.write("st")
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_r17_a_second_process_is_refused(tmp_path: Path) -> None:
    with run.locked(tmp_path, "run folder"), pytest.raises(ConfigError, match="Another process"):
        run.locked(tmp_path, "run folder").__enter__()
    with run.locked(tmp_path, "run folder"):
        pass


@pytest.mark.parametrize("name", ["../a", "/etc/passwd", "a/../../b", "a\0b", "x" * 300])
def test_r13_paths_stay_inside(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="refused"):
        run.contained(tmp_path, name)


def test_r13_links_out_of_the_root_are_refused(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(tmp_path)
    with pytest.raises(DataError):
        run.contained(root, "link/file")
    assert run.contained(root, "Fall 7 ä") == root / "Fall 7 ä"


def test_seeds_are_functions_of_their_purpose() -> None:
    # half of `printf 0/views/3 | b2sum -l 64`, read as little-endian; what an earlier release drew must stay
    assert run.seed_for(0, "views", 3) == 3971230131169731477
    assert len({run.seed_for(0, "views", i) for i in range(1000)}) == 1000


def test_workers_follow_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "5")
    assert run.worker_count() == 4
    assert run.worker_count(0) == 0


def test_a_killed_run_whose_workers_linger_is_waited_for(tmp_path: Path) -> None:
    """Workers inherit the lock of a run that was killed, and notice its death only after seconds."""
    script = (
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from medssl_cli.core.run import locked\n"
        f"lock = locked(Path({str(tmp_path)!r}), 'run folder'); lock.__enter__()\n"
        "if os.fork() == 0:\n"
        "    print('ready', flush=True); time.sleep(1.5); os._exit(0)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"ready\n"
        with pytest.raises(ConfigError, match="Another process"):
            run.locked(tmp_path, "run folder").__enter__()
        holder.kill()
        holder.wait()
        started = time.monotonic()
        with run.locked(tmp_path, "run folder"):
            assert 0.2 < time.monotonic() - started < 10


def test_a_folder_in_which_a_command_was_refused_is_free_for_others(tmp_path: Path) -> None:
    run.claim_out_folder(tmp_path / "out", "train-head")
    run.claim_out_folder(tmp_path / "out", "eval")
    (tmp_path / "out" / "metrics.json").write_text("{}")
    with pytest.raises(ConfigError, match="not empty"):
        run.claim_out_folder(tmp_path / "out", "infer")
