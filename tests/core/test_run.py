import json
import math
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
    with pytest.raises(ConfigError):
        run.claim_out_folder(tmp_path, "pretrain")


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
    assert run.seed_for(0, "views", 3) == run.seed_for(0, "views", 3)
    assert len({run.seed_for(0, "views", i) for i in range(1000)}) == 1000


def test_workers_follow_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "5")
    assert run.worker_count() == 4
    assert run.worker_count(0) == 0
