"""The prepared store: what is read is what was prepared; builds are resumable, shared and honest about faults."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import center_of_mass, gaussian_filter

from medssl_cli.core.case import Case, Sequence
from medssl_cli.core.errors import ConfigError, DataError, ResourceError
from medssl_cli.core.volume import Volume
from medssl_cli.data import store as store_module
from medssl_cli.data.images import write_volume
from medssl_cli.data.prepared_file import RECORD
from medssl_cli.data.preprocess import PreprocessConfig, prepare_case
from medssl_cli.data.store import Store, build_store, data_digest, default_cache, estimate_bytes

SEQUENCES = ("t2", "adc", "dwi")
AFFINE = np.diag([0.5, 0.5, 3.0, 1.0])


def file_of(store: Store, case: int) -> Path:
    """The prepared file that holds a case."""
    return store._file(int(store._table[case]["file"]))


def volume_case(
    folder: Path,
    name: str,
    *,
    shape: tuple[int, int, int] = (6, 20, 24),
    sequences: tuple[str, ...] = SEQUENCES,
    roi: bool = True,
    kind: type = np.int16,
) -> Case:
    rng = np.random.default_rng(int(hashlib.sha256(name.encode()).hexdigest()[:8], 16))
    files = {}
    for sequence in sequences:
        path = folder / name / f"{sequence}.nii.gz"
        write_volume(path, Volume((rng.gamma(2, 100, shape)).astype(kind), AFFINE))
        files[sequence] = Sequence(sequence, path)
    mask = None
    if roi:
        mask = folder / name / "roi.nii.gz"
        inside = np.zeros(shape, np.uint8)
        inside[2:4, 5:11, 8:17] = 1
        inside[3, 5, 8:12] = 0
        write_volume(mask, Volume(inside, AFFINE))
    return Case(name, name, files, roi=mask)


def picture_cases(folder: Path, count: int, *, size: tuple[int, int] = (28, 28)) -> list[Case]:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(3)
    cases = []
    for number in range(count):
        path = folder / f"p{number:05d}.png"
        Image.fromarray(rng.integers(0, 256, size).astype(np.uint8)).save(path)
        cases.append(Case(path.name, path.name, {"image": Sequence("image", path)}))
    return cases


def build(cases: list[Case], cache: Path, **settings: object) -> Store:
    return build_store(cases, SEQUENCES, PreprocessConfig(), cache, **settings)  # type: ignore[arg-type]


def pictures(cases: list[Case], cache: Path, **settings: object) -> Store:
    return build_store(cases, ("image",), PreprocessConfig(), cache, kind="images", **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("kind", [np.int16, np.uint8, np.float32])
def test_every_slice_is_that_of_the_prepared_case(tmp_path: Path, axis: int, kind: type) -> None:
    case = volume_case(tmp_path, "a", kind=kind)
    store = build([case], tmp_path / "cache")
    prepared = prepare_case(case, SEQUENCES, PreprocessConfig())
    assert prepared.roi_ZYX is not None
    for index in range(prepared.images_SZYX.shape[1 + axis]):
        plane = store.read_slice(0, axis, index)
        expected = np.moveaxis(prepared.images_SZYX, 1 + axis, 1)[:, index]
        np.testing.assert_array_equal(plane.image_SHW, expected)
        assert plane.image_SHW.dtype == prepared.images_SZYX.dtype
        assert plane.roi_HW is not None
        np.testing.assert_array_equal(plane.roi_HW, np.moveaxis(prepared.roi_ZYX, axis, 0)[index])
        spread = np.percentile(expected.reshape(3, -1), [1, 99], axis=1)
        np.testing.assert_allclose(plane.low_S, spread[0], rtol=1e-6)
        np.testing.assert_allclose(plane.high_S, spread[1], rtol=1e-6)
        by_hand = np.clip((expected - spread[0][:, None, None]) / (spread[1] - spread[0])[:, None, None], 0, 1)
        np.testing.assert_allclose(plane.scaled(), by_hand, atol=1e-5)
    assert plane.spacing == [(0.5, 0.5), (3.0, 0.5), (3.0, 0.5)][axis]


def test_a_window_is_the_part_of_the_slice(tmp_path: Path) -> None:
    store = build([volume_case(tmp_path, "a")], tmp_path / "cache")
    whole, part = store.read_slice(0, 0, 3), store.read_slice(0, 0, 3, window=(4, 5, 9, 11))
    np.testing.assert_array_equal(part.image_SHW, whole.image_SHW[:, 4:13, 5:16])
    assert whole.roi_HW is not None
    assert part.roi_HW is not None
    np.testing.assert_array_equal(part.roi_HW, whole.roi_HW[4:13, 5:16])
    np.testing.assert_array_equal(part.low_S, whole.low_S)  # limits are those of the slice, not of the window
    assert store.read_slice(0, 0, 3, roi=False).roi_HW is None


def test_facts_of_the_roi_are_counts_and_centres_of_mass(tmp_path: Path) -> None:
    store = build([volume_case(tmp_path, "a")], tmp_path / "cache")
    _, roi = store.read_volume(0)
    assert roi is not None
    for axis in range(3):
        facts = store.slice_facts(0, axis)
        planes = np.moveaxis(roi, axis, 0)
        assert facts.roi_pixels_N.tolist() == planes.sum((1, 2)).tolist()
        for index in np.flatnonzero(facts.roi_pixels_N):
            np.testing.assert_allclose(facts.roi_centre_N2[index], center_of_mass(planes[index]), rtol=1e-5)
        assert np.isnan(facts.roi_centre_N2[facts.roi_pixels_N == 0]).all()


def test_missing_sequences_and_rois_are_recorded(tmp_path: Path) -> None:
    cases = [volume_case(tmp_path, "a"), volume_case(tmp_path, "b", sequences=("t2", "dwi"), roi=False)]
    store = build(cases, tmp_path / "cache")
    assert store.case_ids() == ["a", "b"]
    assert store.facts(1).available_S.tolist() == [True, False, True]
    assert [store.facts(n).roi for n in range(2)] == [True, False]
    assert store.roi_cases().tolist() == [0]
    plane = store.read_slice(1, 0, 2)
    assert not plane.scaled()[1].any()
    assert plane.scaled()[0].any()
    assert plane.roi_HW is None
    np.testing.assert_allclose(store.spacings(), [[3, 0.5, 0.5]] * 2)
    np.testing.assert_array_equal(store.facts(0).affine, AFFINE)


def test_fixed_adc_limits_leave_absent_sequences_at_zero(tmp_path: Path) -> None:
    cases = [volume_case(tmp_path, "a"), volume_case(tmp_path, "b", sequences=("t2",))]
    store = build_store(cases, SEQUENCES, PreprocessConfig(adc_scale="fixed"), tmp_path / "cache")
    assert store.slice_facts(0, 0).high_NS[:, 1].tolist() == [3000.0] * 6
    assert not store.slice_facts(1, 0).high_NS[:, 1].any()


def test_a_second_build_prepares_nothing(tmp_path: Path) -> None:
    cases = [volume_case(tmp_path, name) for name in "abc"]
    first = build(cases, tmp_path / "cache")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    seen: list[tuple[int, int]] = []
    second = build(cases, tmp_path / "cache", progress=lambda done, total: seen.append((done, total)))
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    assert before == after
    assert second.digest == first.digest == data_digest(cases, SEQUENCES, PreprocessConfig(), "volumes")
    assert seen == [(3, 3)]


def test_the_digest_follows_every_file_and_setting(tmp_path: Path) -> None:
    cases = [volume_case(tmp_path, name) for name in "ab"]
    config = PreprocessConfig()
    digests = [data_digest(cases, SEQUENCES, config, "volumes")]
    digests.append(data_digest(cases[::-1], SEQUENCES, config, "volumes"))
    digests.append(data_digest(cases, SEQUENCES[:2], config, "volumes"))
    digests.append(data_digest(cases, SEQUENCES, PreprocessConfig(percentiles=(0.5, 99)), "volumes"))
    path = cases[1].sequences["adc"].path
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    digests.append(data_digest(cases, SEQUENCES, config, "volumes"))
    cases[0] = Case("a", "a", cases[0].sequences)
    digests.append(data_digest(cases, SEQUENCES, config, "volumes"))
    assert len(set(digests)) == len(digests)


def test_sets_that_share_cases_share_their_files(tmp_path: Path) -> None:
    cases = [volume_case(tmp_path, name) for name in "abc"]
    build(cases[:2], tmp_path / "cache")
    prepared = set((tmp_path / "cache" / "cases").rglob("*.b2nd"))
    store = build(cases[1:], tmp_path / "cache")
    assert len(set((tmp_path / "cache" / "cases").rglob("*.b2nd")) - prepared) == 1
    assert store.case_ids() == ["b", "c"]


@pytest.mark.slow
def test_two_workers_write_the_same_bytes_as_one(tmp_path: Path) -> None:
    cases = [volume_case(tmp_path, name) for name in "abcde"]
    seen: list[int] = []
    one = build(cases, tmp_path / "one")
    two = build(cases, tmp_path / "two", workers=2, progress=lambda done, total: seen.append(done))
    assert seen == [0, 1, 2, 3, 4, 5, 5]
    for case in range(5):
        assert file_of(one, case).read_bytes() == file_of(two, case).read_bytes()
    for name in ("table.bin", "facts.bin", "ids.bin", "files.bin"):
        assert (one.folder / name).read_bytes() == (two.folder / name).read_bytes()


@pytest.mark.slow
def test_the_first_fault_in_order_comes_through_worker_processes(tmp_path: Path) -> None:
    cases = [volume_case(tmp_path, name) for name in "abcde"]
    for bad in (cases[1], cases[3]):
        bad.sequences["adc"].path.write_bytes(b"\x1f\x8bnothing")
    with pytest.raises(DataError) as caught:
        build(cases, tmp_path / "cache", workers=2)
    assert "case b" in caught.value.where
    assert caught.value.code == "nifti_truncated"
    assert caught.value.fix


def test_bad_cases_are_left_out_and_listed_with_skip(tmp_path: Path) -> None:
    cases = [volume_case(tmp_path, name) for name in "abcd"]
    bad = cases[1].sequences["adc"].path
    bad.write_bytes(b"")
    cases[2].sequences["dwi"].path.unlink()
    store = build(cases, tmp_path / "cache", on_error="skip")
    assert store.case_ids() == ["a", "d"]
    failures = {failure[0]: failure for failure in store.failures}
    assert set(failures) == {"b", "c"}
    assert failures["b"][1] == str(bad)
    assert "empty" in failures["b"][2]
    assert all(len(failure) == 4 and failure[3] for failure in store.failures)
    assert build(cases, tmp_path / "cache", on_error="skip").failures == store.failures
    with pytest.raises(DataError):
        build(cases, tmp_path / "cache", on_error="stop")
    np.testing.assert_array_equal(  # the last case is where it should be although cases before it are gone
        store.read_volume(1)[0], prepare_case(cases[3], SEQUENCES, PreprocessConfig()).images_SZYX
    )


def test_the_fault_stops_the_build_by_default_and_good_cases_stay(tmp_path: Path) -> None:
    cases = [volume_case(tmp_path, name) for name in "abc"]
    cases[1].sequences["adc"].path.write_bytes(b"")
    with pytest.raises(DataError) as caught:
        build(cases, tmp_path / "cache")
    assert caught.value.exit_code == 3
    assert "case b" in caught.value.where
    assert len(list((tmp_path / "cache").rglob("*.b2nd"))) == 1


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    case = volume_case(tmp_path, "a")
    case.sequences["adc"].path.write_bytes(b"")
    with pytest.raises(DataError, match="No case could be prepared") as caught:
        build([case], tmp_path / "cache", on_error="skip")
    assert "a: " in caught.value.where
    with pytest.raises(DataError, match="no cases"):
        build([], tmp_path / "cache")


def test_a_case_id_may_stand_once(tmp_path: Path) -> None:
    case = volume_case(tmp_path, "a")
    with pytest.raises(DataError, match="twice"):
        build([case, case], tmp_path / "cache")


def test_damaged_and_vanished_files_are_named_and_rebuilt(tmp_path: Path) -> None:
    cases = [volume_case(tmp_path, name) for name in "ab"]
    store = build(cases, tmp_path / "cache")
    path = file_of(store, 1)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError) as caught:
        store.read_slice(1, 0, 0)
    assert "case b" in caught.value.where
    assert str(path) in caught.value.where
    assert "delete" in caught.value.fix
    path.unlink()
    again = build(cases, tmp_path / "cache")
    assert again.read_slice(1, 0, 0).image_SHW.any()
    with pytest.raises(DataError, match="no prepared store"):
        Store.open(tmp_path / "cache" / "0000")


def test_the_store_survives_pickling_and_forking(tmp_path: Path) -> None:
    store = build([volume_case(tmp_path, name) for name in "ab"], tmp_path / "cache")
    expected = store.read_slice(1, 1, 7).image_SHW
    copy = pickle.loads(pickle.dumps(store))
    assert len(pickle.dumps(store)) < 5000
    np.testing.assert_array_equal(copy.read_slice(1, 1, 7).image_SHW, expected)
    child = os.fork()
    if child == 0:
        same = np.array_equal(store.read_slice(1, 1, 7).image_SHW, expected)
        os._exit(0 if same and store._local.process == os.getpid() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_few_files_are_open_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "OPEN_FILES", 2)
    store = build([volume_case(tmp_path, name, shape=(2, 8, 8), roi=False) for name in "abcd"], tmp_path / "cache")
    for case in (0, 1, 0, 2, 3):
        store.read_slice(case, 0, 0)
    assert list(store._local.volumes) == [2, 3]


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import pickle
from medssl_cli.data.preprocess import PreprocessConfig
from medssl_cli.data.store import build_store
cases = pickle.loads(Path(sys.argv[2]).read_bytes())
def die(done, total):
    if done == 2:
        os.kill(os.getpid(), signal.SIGKILL)
build_store(cases, ("t2", "adc", "dwi"), PreprocessConfig(), Path(sys.argv[3]), progress=die)
"""


def test_r16_a_killed_build_goes_on_where_it_stopped(tmp_path: Path) -> None:
    cases = [volume_case(tmp_path, name) for name in "abcd"]
    (tmp_path / "cases.pkl").write_bytes(pickle.dumps(cases))
    words = [sys.executable, "-c", KILLED, os.getcwd(), str(tmp_path / "cases.pkl"), str(tmp_path / "cache")]
    assert subprocess.run(words, check=False, timeout=60).returncode == -signal.SIGKILL
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.b2nd")}
    assert len(kept) == 2
    leftover = next(iter(kept)).parent / ".x.1.tmp.b2nd"
    leftover.write_bytes(b"half")
    os.utime(leftover, (0, 0))
    seen: list[int] = []
    store = build(cases, tmp_path / "cache", progress=lambda done, total: seen.append(done))
    assert seen[0] == 2
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert not leftover.exists()
    undisturbed = build(cases, tmp_path / "other")
    for case in range(4):
        assert file_of(store, case).read_bytes() == file_of(undisturbed, case).read_bytes()


def test_r17_two_builds_of_one_store_both_finish(tmp_path: Path) -> None:
    cases = [volume_case(tmp_path, name) for name in "abcdef"]
    prepared: list[int] = []
    with ThreadPoolExecutor(2) as pool:  # flock also keeps two descriptors of one process apart
        builds = [
            pool.submit(build, cases, tmp_path / "cache", progress=lambda done, total: prepared.append(done))
            for _ in range(2)
        ]
        stores = [answer.result(timeout=30) for answer in builds]
    for store in stores:
        for case in range(6):
            expected = prepare_case(cases[case], SEQUENCES, PreprocessConfig()).images_SZYX
            np.testing.assert_array_equal(store.read_volume(case)[0], expected)
    assert sorted(prepared) == [0, 1, 2, 3, 4, 5, 6, 6, 6]  # the second found everything done
    assert not list((tmp_path / "cache").glob(".tmp-*"))


@contextmanager
def small_disk(folder: Path, options: str) -> Iterator[Path]:
    disk = folder / "disk"
    disk.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", options, "none", str(disk)]
    if subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_r03_a_full_disk_keeps_finished_cases_and_says_how_much_is_needed(tmp_path: Path) -> None:
    cases = [volume_case(tmp_path, name, shape=(6, 60, 60)) for name in "abcdef"]
    with small_disk(tmp_path, "size=256k") as disk:
        with pytest.raises(ResourceError) as caught:
            build(cases, disk / "cache")
        assert caught.value.exit_code == 6
        assert "bytes needed" in caught.value.where
        assert str(disk) in caught.value.where
        finished = list(disk.rglob("*.b2nd"))
        assert 1 <= len(finished) < 6
        assert not list(disk.rglob("*.tmp*"))
        subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
        before = {path: path.stat().st_mtime_ns for path in finished}
        store = build(cases, disk / "cache")
        assert {path: path.stat().st_mtime_ns for path in finished} == before
        assert len(store) == 6


def test_a_cache_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    case = volume_case(tmp_path, "a")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="is a file"):
        build([case], tmp_path / "file")
    with (
        small_disk(tmp_path, "ro,size=256k") as disk,
        pytest.raises(ResourceError, match="cannot be written") as caught,
    ):
        build([case], disk / "cache")
    assert caught.value.code == "not_writable"


def test_the_cache_is_named_by_flag_then_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MEDSSL_CACHE", str(tmp_path / "env"))
    assert default_cache(tmp_path / "flag") == tmp_path / "flag"
    assert default_cache() == tmp_path / "env"
    monkeypatch.delenv("MEDSSL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache() == tmp_path / "xdg" / "medssl"


def test_no_home_folder_is_written_into_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    cases = [volume_case(tmp_path, name) for name in "ab"]
    cases[1].sequences["t2"].path.write_bytes(b"")
    store = build(cases, tmp_path / "cache", on_error="skip")
    text = (store.folder / "store.json").read_text()
    assert str(tmp_path) not in text
    assert json.loads(text)["failures"][0][1] == "~/b/t2.nii.gz"


def test_small_pictures_are_packed_and_read_back(tmp_path: Path) -> None:
    cases = picture_cases(tmp_path / "images", 300)
    store = pictures(cases, tmp_path / "cache")
    assert len(list((tmp_path / "cache").rglob("*.pack"))) == 3
    assert len(store) == 300
    assert store.channels == 1
    for number in (0, 127, 128, 299):
        image, low, high = store.read_picture(number)
        np.testing.assert_array_equal(image[0], np.asarray(Image.open(cases[number].sequences["image"].path)))
        assert (low, high) == (0.0, 255.0)
        assert store.case_id(number) == cases[number].case_id


def test_mixed_pictures_keep_size_depth_and_channels(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    arrays = [
        rng.integers(0, 256, (30, 41, 3)).astype(np.uint8),
        rng.integers(0, 60000, (25, 19)).astype(np.uint16),
        rng.integers(0, 256, (64, 12)).astype(np.uint8),
    ]
    cases = []
    for number, array in enumerate(arrays):
        path = tmp_path / f"{number}.png"
        Image.fromarray(array).save(path)
        cases.append(Case(path.name, path.name, {"image": Sequence("image", path)}))
    store = pictures(cases, tmp_path / "cache")
    assert store.channels == 3
    for number, array in enumerate(arrays):
        image, _, _ = store.read_picture(number)
        np.testing.assert_array_equal(image, array.transpose(2, 0, 1) if array.ndim == 3 else array[None])
        assert store.facts(number).shape == image.shape
    np.testing.assert_allclose(store.read_picture(1)[1:], np.percentile(arrays[1], [1, 99]), rtol=1e-6)


def test_bad_pictures_are_left_out_or_stop_the_build(tmp_path: Path) -> None:
    cases = picture_cases(tmp_path / "images", 6)
    cases[2].sequences["image"].path.write_bytes(b"\x89PNG")
    store = pictures(cases, tmp_path / "cache", on_error="skip")
    assert len(store) == 5
    assert [failure[0] for failure in store.failures] == [cases[2].case_id]
    np.testing.assert_array_equal(store.read_picture(2)[0][0], np.asarray(Image.open(cases[3].sequences["image"].path)))
    assert pictures(cases, tmp_path / "cache", on_error="skip").failures == store.failures
    with pytest.raises(DataError) as caught:
        pictures(cases, tmp_path / "cache")
    assert cases[2].case_id in caught.value.where


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    cases = picture_cases(tmp_path / "images", 3)
    store = pictures(cases, tmp_path / "cache")
    path = file_of(store, 0)
    path.write_bytes(path.read_bytes()[:10])
    with pytest.raises(DataError) as caught:
        Store.open(store.folder).read_picture(2)
    assert str(path) in caught.value.where
    assert cases[2].case_id in caught.value.where


def test_opening_costs_the_same_for_many_cases(tmp_path: Path) -> None:
    store = build([volume_case(tmp_path, name) for name in "ab"], tmp_path / "cache")
    store.facts(0)
    many = tmp_path / "cache" / "many"
    many.mkdir()
    repeat = 10_000
    (many / "table.bin").write_bytes(np.tile(np.fromfile(store.folder / "table.bin", RECORD), repeat // 2).tobytes())
    for name in ("facts.bin", "ids.bin", "files.bin"):
        (many / name).write_bytes((store.folder / name).read_bytes())
    about = {**json.loads((store.folder / "store.json").read_text()), "cases": repeat}
    (many / "store.json").write_text(json.dumps(about))

    def seconds(folder: Path) -> float:
        started = time.perf_counter()
        opened = Store.open(folder)
        opened.facts(len(opened) - 1)
        return time.perf_counter() - started

    few, lots = min(seconds(store.folder) for _ in range(5)), min(seconds(many) for _ in range(5))
    assert len(Store.open(many)) == repeat
    assert lots < 3 * few + 0.005


@pytest.mark.slow
def test_a_slice_is_much_faster_than_from_nifti_and_the_store_is_smaller(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sequences, total = {}, 0
    for name in SEQUENCES:
        texture = gaussian_filter(rng.standard_normal((24, 320, 320)), (1, 3, 3))
        voxels = texture / texture.std() * 200 + 600 + rng.standard_normal(texture.shape) * 20
        path = tmp_path / f"{name}.nii.gz"
        nib.save(nib.Nifti1Image(np.clip(voxels, 0, 4000).astype(np.int16).T, AFFINE), path)
        sequences[name] = Sequence(name, path)
        total += path.stat().st_size
    roi = np.zeros((24, 320, 320), np.uint8)
    roi[6:18, 120:200, 110:210] = 1
    nib.save(nib.Nifti1Image(roi.T, AFFINE), tmp_path / "roi.nii.gz")
    total += (tmp_path / "roi.nii.gz").stat().st_size
    case = Case("a", "a", sequences, roi=tmp_path / "roi.nii.gz")
    store = build([case], tmp_path / "cache")
    assert store.size_bytes < 1.3 * total
    assert estimate_bytes([case]) > store.size_bytes

    def median(read: object, times: int) -> float:
        spans = []
        for _ in range(times + 1):
            started = time.perf_counter()
            read()  # type: ignore[operator]
            spans.append(time.perf_counter() - started)
        return sorted(spans[1:])[times // 2]

    paths = [*(s.path for s in sequences.values()), tmp_path / "roi.nii.gz"]
    nifti = median(lambda: [np.asarray(nib.load(path).dataobj[..., 12]) for path in paths], 5)
    ours = median(lambda: store.read_slice(0, 0, 12), 21)
    assert nifti / ours > 25


def test_settings_that_came_later_leave_the_names_of_older_stores(tmp_path: Path) -> None:
    cases = [volume_case(tmp_path, "a")]
    from medssl_cli.data.store import _base

    known = {
        "orientation": "RAS",
        "reference": None,
        "percentiles": [1.0, 99.0],
        "adc_scale": "percentile",
        "adc_range": [0.0, 3000.0],
        "resample_mm": None,
        "picture_side": 512,
    }  # what a key was made of before there were windows
    assert _base(SEQUENCES, PreprocessConfig(), "volumes") == (2, "volumes", SEQUENCES, known)
    windowed = PreprocessConfig(window_hu=(-1000, 1000))
    one, other = (data_digest(cases, SEQUENCES, config, "volumes") for config in (PreprocessConfig(), windowed))
    assert one != other


# --- label maps ------------------------------------------------------------------------------------------------------


def labelled_case(folder: Path, name: str, label: Volume | None, *, sequences: tuple[str, ...] = SEQUENCES) -> Case:
    case = volume_case(folder, name, roi=False, sequences=sequences)
    if label is None:
        return case
    path = folder / name / "label.nii.gz"
    write_volume(path, label)
    return Case(name, name, case.sequences, roi=path)


def classes(shape: tuple[int, int, int] = (6, 20, 24)) -> np.ndarray:
    label = np.zeros(shape, np.uint8)
    label[2:4, 5:11, 8:17] = 1
    label[3, 6:8, 9:12] = 2
    label[4, 1, 1] = 255
    return label


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.float32])
def test_a_store_of_labels_keeps_their_values(tmp_path: Path, kind: type) -> None:
    label = classes().astype(kind)
    case = labelled_case(tmp_path, "a", Volume(label, AFFINE))
    store = build([case, volume_case(tmp_path, "b")], tmp_path / "cache", kind="labels")
    assert (store.kind, store.label_values(0).tolist(), store.label_values(1).tolist()) == (
        "labels",
        [0, 1, 2, 255],
        [0, 1],
    )
    _, kept = store.read_volume(0)
    assert kept is not None
    assert kept.dtype == np.uint8
    prepared = prepare_case(case, SEQUENCES, PreprocessConfig(), roi_values=True)
    np.testing.assert_array_equal(kept, prepared.roi_ZYX)
    np.testing.assert_array_equal(kept, label)
    for axis in range(3):
        facts = store.slice_facts(0, axis)
        assert facts.roi_pixels_N.tolist() == np.count_nonzero(np.moveaxis(label, axis, 0), axis=(1, 2)).tolist()
        plane = store.read_slice(0, axis, 3, window=(1, 2, 4, 5))
        expected = np.moveaxis(label, axis, 0)[3]
        assert plane.labels_HW is not None
        assert plane.roi_HW is not None
        np.testing.assert_array_equal(plane.labels_HW, expected[1:5, 2:7])
        np.testing.assert_array_equal(plane.roi_HW, expected[1:5, 2:7] != 0)
        np.testing.assert_array_equal(store.read_labels(0, axis, 3), expected)
    assert store.read_slice(0, 0, 3, roi=False).labels_HW is None


def test_labels_and_regions_of_the_same_files_do_not_meet_in_the_cache(tmp_path: Path) -> None:
    case = labelled_case(tmp_path, "a", Volume(classes(), AFFINE))
    volumes, labels = (build([case], tmp_path / "cache", kind=kind) for kind in ("volumes", "labels"))
    assert volumes.digest != labels.digest
    assert file_of(volumes, 0) != file_of(labels, 0)
    assert volumes.read_slice(0, 0, 3).labels_HW is None
    with pytest.raises(ValueError, match="no label maps"):
        volumes.label_values(0)
    again = build([case], tmp_path / "cache", kind="labels")
    assert again.digest == labels.digest
    np.testing.assert_array_equal(again.read_labels(0, 0, 3), classes()[3])


def test_a_label_map_of_another_grid_is_moved_by_nearest_in_world_coordinates(tmp_path: Path) -> None:
    fine = np.diag([0.25, 0.25, 1.5, 1.0])
    fine[:3, 3] = (-0.125, -0.125, -0.75)  # two voxels of the fine grid fill one of the coarse along each axis
    label = classes().repeat(2, 0).repeat(2, 1).repeat(2, 2)
    store = build([labelled_case(tmp_path, "a", Volume(label, fine))], tmp_path / "cache", kind="labels")
    _, kept = store.read_volume(0)
    np.testing.assert_array_equal(kept, classes())


@pytest.mark.parametrize(
    ("label", "code"),
    [
        (None, "label_missing"),
        (Volume(np.full((6, 20, 24), 0.5, np.float32), AFFINE), "label_values"),
        (Volume(np.full((6, 20, 24), -1, np.int16), AFFINE), "label_values"),
        (Volume(np.full((6, 20, 24), 256, np.int16), AFFINE), "label_values"),
        (Volume(np.zeros((2, 6, 20, 24), np.uint8), AFFINE), "volume_4d"),
        (Volume(classes(), AFFINE + np.pad([[1000.0]] * 3, ((0, 1), (3, 0)))), "grids_apart"),
    ],
)
def test_label_maps_that_cannot_be_trained_name_the_case(tmp_path: Path, label: Volume | None, code: str) -> None:
    good = labelled_case(tmp_path, "good", Volume(classes(), AFFINE))
    bad = labelled_case(tmp_path, "bad", label)
    with pytest.raises(DataError) as error:
        build([good, bad], tmp_path / "cache", kind="labels")
    assert error.value.code == code
    assert error.value.where.startswith("case bad")
    assert "label map" in error.value.what
    store = build([good, bad], tmp_path / "cache", kind="labels", on_error="skip")
    assert store.case_ids() == ["good"]
    assert [failure[0] for failure in store.failures] == ["bad"]
    assert store.label_values(0).tolist() == [0, 1, 2, 255]


def test_a_structure_lost_between_the_slices_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    label = np.zeros((18, 20, 24), np.uint8)
    label[3] = 1
    label[4, 5, 6] = 7  # 1 mm off the nearest slice of the image
    with caplog.at_level("WARNING"):
        build([labelled_case(tmp_path, "a", Volume(label, np.diag([0.5, 0.5, 1, 1.0])))], tmp_path / "c", kind="labels")
    assert "nothing is left of the value 7" in caplog.text


def test_real_masks_on_another_grid_keep_their_volume(real_data: Path, tmp_path: Path) -> None:
    folder = real_data / "prostate_dx_t2" / "t2_full"
    image = folder / "ProstateDx-01-0049_t2_norm.nii.gz"
    for name in ("prostates", "seminal_vesicles"):
        mask = folder / f"ProstateDx-01-0049_{name}_mask.nii.gz"
        case = Case("a", "a", {"t2": Sequence("t2", image)}, roi=mask)
        store = build_store([case], ("t2",), PreprocessConfig(), tmp_path, kind="labels")
        source = nib.load(mask)  # type: ignore[attr-defined]
        array = np.asanyarray(source.dataobj)  # type: ignore[attr-defined]
        _, kept = store.read_volume(0)
        assert kept is not None
        assert kept.shape != array.T.shape
        millilitres = (array > 0).sum() * abs(np.linalg.det(source.affine[:3, :3])) / 1000  # type: ignore[attr-defined]
        kept_ml = (kept > 0).sum() * abs(np.linalg.det(store.facts(0).affine[:3, :3])) / 1000
        assert kept_ml == pytest.approx(millilitres, rel=0.05)
        here = nib.affines.apply_affine(source.affine, np.argwhere(array > 0).mean(0))  # type: ignore[attr-defined]
        there = nib.affines.apply_affine(store.facts(0).affine, np.argwhere(kept > 0).mean(0)[::-1])
        np.testing.assert_allclose(here, there, atol=0.5)
