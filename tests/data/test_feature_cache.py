from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from medssl_cli.core.errors import ConfigError
from medssl_cli.data.feature_cache import FeatureCache

FIELDS: dict[str, Any] = {
    "settings": {"weights_sha256": "a" * 64, "layers": 1, "mean": [0.5, 0.25], "resize": None},
    "sources": {"ax_t2wi": {"sha256": "b" * 64, "volume": 0}},
    "shown": ["ax_t2wi"],
}


def arrays(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "slices_ND": rng.standard_normal((5, 8), np.float32),
        "indices_N": np.arange(5, dtype=np.int32),
        "has_S": np.array([True, False]),
        "spacing_mm": np.empty(0),
    }


def filled(root: Path, fields: dict[str, Any] = FIELDS, seed: int = 0) -> tuple[FeatureCache, str]:
    cache = FeatureCache(root)
    key = cache.key_of(fields)
    cache.write(key, fields, arrays(seed))
    return cache, key


def same(found: dict[str, np.ndarray] | None, wanted: dict[str, np.ndarray]) -> bool:
    assert found is not None
    return found.keys() == wanted.keys() and all(
        found[name].dtype == wanted[name].dtype and np.array_equal(found[name], wanted[name]) for name in wanted
    )


def test_what_is_written_is_read(tmp_path: Path) -> None:
    cache, key = filled(tmp_path)
    assert same(cache.read(key, FIELDS), arrays())
    assert cache.path(key) == tmp_path / "features" / key[:2] / f"{key}.safetensors"
    sidecar = json.loads(cache.path(key).with_suffix(".json").read_text())
    assert sidecar["fields"] == FIELDS
    assert sidecar["arrays"]["slices_ND"] == {"dtype": "float32", "shape": [5, 8]}
    assert cache.read(cache.key_of({}), {}) is None


def test_the_key_is_the_digest_of_the_fields_in_any_order() -> None:
    assert FeatureCache.key_of(FIELDS) == FeatureCache.key_of(dict(reversed(FIELDS.items())))
    others = [{**FIELDS, "shown": []}, {**FIELDS, "settings": {**FIELDS["settings"], "layers": 2}}, {}]
    assert len({FeatureCache.key_of(fields) for fields in (FIELDS, *others)}) == 4


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)


def put_nan(path: Path) -> None:
    held = load_file(path)
    held["slices_ND"][0, 0] = np.nan
    save_file(held, path)


def cut_sidecar(path: Path) -> None:
    truncate(path.with_suffix(".json"))


def other_fields(path: Path) -> None:
    sidecar = path.with_suffix(".json")
    sidecar.write_text(sidecar.read_text().replace('"layers": 1', '"layers": 2'))


def other_shape(path: Path) -> None:
    sidecar = path.with_suffix(".json")
    facts = json.loads(sidecar.read_text())
    facts["arrays"]["slices_ND"]["shape"] = [4, 10]
    sidecar.write_text(json.dumps(facts))


@pytest.mark.parametrize(
    "damage", [truncate, empty, flip_a_bit, put_nan, cut_sidecar, other_fields, other_shape], ids=lambda f: f.__name__
)
def test_m17_a_damaged_entry_is_told_and_written_anew(
    damage: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache, key = filled(tmp_path)
    damage(cache.path(key))
    with caplog.at_level(logging.WARNING):
        assert cache.read(key, FIELDS) is None
    assert "damaged and are computed again" in caplog.text
    cache.write(key, FIELDS, arrays())
    assert same(cache.read(key, FIELDS), arrays())


def test_no_array_with_nan_is_given_even_where_its_check_sum_is_right(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache, key = FeatureCache(tmp_path), FeatureCache.key_of(FIELDS)
    cache.write(key, FIELDS, {"slices_ND": np.array([[np.inf]], np.float32)})
    assert cache.read(key, FIELDS) is None
    assert "slices_ND holds NaN or infinity" in caplog.text


@pytest.mark.parametrize("name", ["../x", "a/../../b", "\0", "x" * 400])
def test_m18_no_id_gets_into_a_file_name(name: str, tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path / "cache")
    fields = {**FIELDS, "sources": {name: {"sha256": name}}}
    cache.write(cache.key_of(fields), fields, arrays())
    assert same(cache.read(cache.key_of(fields), fields), arrays())
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    assert all(len(path.stem) == 64 for path in (tmp_path / "cache/features").glob("*/*"))
    with pytest.raises(ValueError, match="64 hex digits"):
        cache.path(name)


def test_r16_an_entry_without_its_sidecar_is_no_entry(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As a writer that was killed between the two files leaves it."""
    cache, key = filled(tmp_path)
    cache.path(key).with_suffix(".json").unlink()
    assert cache.read(key, FIELDS) is None
    assert cache.info().entries == 0
    assert not caplog.records


WRITER = """
import sys, numpy as np
from pathlib import Path
from medssl_cli.data.feature_cache import FeatureCache
cache, seed = FeatureCache(Path(sys.argv[1])), int(sys.argv[2])
for turn in range(40):
    fields = {"settings": {"weights_sha256": "c"}, "case": turn % 4}
    key = cache.key_of(fields)
    # the last bits of two processes may differ, as those of different batches do
    cache.write(key, fields, {"slices_ND": np.full((300, 64), seed + turn % 4, np.float32)})
    found = cache.read(key, fields)
    assert found is not None and len(np.unique(found["slices_ND"])) == 1, "a mixture"
"""


def test_r17_two_processes_fill_one_cache(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", WRITER, str(tmp_path)]
    running = [subprocess.Popen([*command, seed], stderr=subprocess.PIPE, text=True) for seed in ("0", "100")]
    for process in running:
        _, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (0, "")
    cache = FeatureCache(tmp_path)
    for case in range(4):
        fields = {"settings": {"weights_sha256": "c"}, "case": case}
        found = cache.read(cache.key_of(fields), fields)
        assert found is not None
        assert found["slices_ND"][0, 0] in (case, 100 + case)
    assert cache.info().models == {"c": (4, cache.info().bytes)}


FULL = """
import sys, resource, numpy as np
from pathlib import Path
from medssl_cli.core.errors import ResourceError
from medssl_cli.data.feature_cache import FeatureCache
cache = FeatureCache(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    cache.write(sys.argv[2], {}, {"slices_ND": np.zeros((1000, 64), np.float32)})
except ResourceError as error:
    print(error.code)
"""


def test_r16_a_disk_without_room_is_told_and_what_was_there_stays(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk."""
    cache, key = filled(tmp_path)
    command = [sys.executable, "-c", FULL, str(tmp_path), key]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "cache_not_writable"
    assert same(cache.read(key, FIELDS), arrays())
    assert len(list(cache.path(key).parent.iterdir())) == 2


def test_info_and_prune(tmp_path: Path) -> None:
    cache, old = filled(tmp_path)
    assert FeatureCache(tmp_path / "none").info().entries == 0
    fields = {**FIELDS, "settings": {"weights_sha256": "d" * 64}}
    _, new = filled(tmp_path, fields)
    third = {**fields, "shown": []}
    filled(tmp_path, third)
    for path in (cache.path(old), cache.path(old).with_suffix(".json")):
        os.utime(path, (1e9, 1e9))
    info = cache.info()
    assert info.entries == 3
    assert {model: count for model, (count, _) in info.models.items()} == {"a" * 64: 1, "d" * 64: 2}
    assert info.bytes == sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    kept = tmp_path / "features" / "ab" / "notes.txt"
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("mine")

    with pytest.raises(ConfigError, match="Nothing was chosen"):
        cache.prune()
    assert cache.prune(older_than_days=1, model="dd") == (0, 0)
    removed, freed = cache.prune(older_than_days=1)
    assert (removed, freed) == (1, info.models["a" * 64][1])
    assert cache.read(old, FIELDS) is None
    assert same(cache.read(new, fields), arrays())
    assert cache.prune(model="dddd")[0] == 2
    assert cache.info().entries == 0
    filled(tmp_path)
    assert cache.prune(everything=True)[0] == 1
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [kept]


def test_prune_takes_what_killed_writers_left_but_not_what_is_being_written(tmp_path: Path) -> None:
    cache, key = filled(tmp_path)
    leftover, at_work = (cache.path(key).with_name(f".{name}.tmp.safetensors") for name in ("old", "new"))
    for path in (leftover, at_work):
        path.write_bytes(b"x")
    os.utime(leftover, (1e9, 1e9))
    assert cache.prune(everything=True)[0] == 1
    assert not leftover.exists()
    assert at_work.exists()


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(ConfigError, match="is a file") as caught:
        FeatureCache(tmp_path / "cache")
    assert "--cache" in caught.value.fix
