"""Draws are pure functions of seed and position; shapes are never stretched; workers change nothing and are watched."""

from __future__ import annotations

import os
import pickle
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import chisquare

from medssl_cli.core.case import Case, Sequence
from medssl_cli.core.errors import ConfigError, DataError, ResourceError
from medssl_cli.core.volume import AXIAL, Volume
from medssl_cli.data.datasets import (
    DataConfig,
    ImageDataset,
    ResumableSampler,
    Sample,
    SliceDataset,
    build_loader,
    collate,
    exposed_rois,
    output_size,
    plan_window,
    prepare_store,
    resize_image,
    resize_mask,
    window_size,
)
from medssl_cli.data.images import write_volume
from medssl_cli.data.preprocess import PreprocessConfig

NAMES = ("t2", "adc")


def write_case(
    folder: Path,
    name: str,
    *,
    shape: tuple[int, int, int] = (8, 40, 36),
    spacing: tuple[float, float, float] = (1.5, 0.8, 0.8),
    roi: bool = True,
    missing: tuple[str, ...] = (),
) -> Case:
    """A case whose voxel values tell their own place: x + 100 y + 10000 z."""
    z, y, x = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
    affine = np.diag([*spacing[::-1], 1.0])
    files = {}
    for number, sequence in enumerate(s for s in NAMES if s not in missing):
        path = folder / name / f"{sequence}.nii.gz"
        write_volume(path, Volume(((x + 100 * y + 10_000 * z) * (1 - 2 * number)).astype(np.int32), affine))
        files[sequence] = Sequence(sequence, path)
    mask = None
    if roi:
        mask = folder / name / "roi.nii.gz"
        inside = np.zeros(shape, np.uint8)
        inside[2, 10:14, 20:26] = 1  # 24 pixels
        inside[3, 4:14, 20:30] = 1  # 100 pixels
        inside[5, 30:33, 5:8] = 1  # 9 pixels
        write_volume(mask, Volume(inside, affine))
    return Case(name, name, files, roi=mask)


def config_of(**values: object) -> DataConfig:
    return DataConfig.model_validate({"mri_sequences": NAMES, "spatial_size": 16, **values})


def dataset_of(cases: list[Case], cache: Path, seed: int = 0, **values: object) -> SliceDataset:
    config = config_of(**values)
    return SliceDataset(prepare_store(cases, config, cache, kind="volumes"), config, seed)


@pytest.fixture
def cases(tmp_path: Path) -> list[Case]:
    return [write_case(tmp_path, f"c{n}") for n in range(5)]


def facts_of(sample: Sample) -> tuple[str, int, int, tuple[int, int, int, int]]:
    return sample.case_id, sample.axis, sample.index, sample.window


# --- slices ----------------------------------------------------------------------------------------------------------


def test_without_random_slices_the_one_with_most_roi_is_taken(tmp_path: Path, cases: list[Case]) -> None:
    dataset = dataset_of(cases, tmp_path / "cache")
    assert {dataset[(position, 1)].index for position in range(20)} == {3}


def test_random_slices_are_uniform_among_those_with_enough_roi(tmp_path: Path, cases: list[Case]) -> None:
    dataset = dataset_of(cases, tmp_path / "cache", random_slices=True, min_roi_pixels=20)
    drawn = [dataset[(position, position % 5)].index for position in range(600)]
    counts = np.bincount(drawn, minlength=8)
    assert set(np.flatnonzero(counts)) == {2, 3}
    assert chisquare(counts[[2, 3]]).pvalue > 1e-3


def test_too_little_roi_everywhere_takes_the_most(tmp_path: Path, cases: list[Case]) -> None:
    dataset = dataset_of(cases, tmp_path / "cache", random_slices=True, min_roi_pixels=500)
    assert {dataset[(position, 0)].index for position in range(10)} == {3}


def test_val_and_test_draw_nothing(tmp_path: Path, cases: list[Case]) -> None:
    cases[4] = write_case(tmp_path, "bare", roi=False)
    for split in ("VAL", "TEST"):
        dataset = dataset_of(cases, tmp_path / "cache", split=split, random_slices=True, random_axes=True)
        assert {facts_of(dataset[(position, 0)])[1:3] for position in range(10)} == {(AXIAL, 3)}
        assert {facts_of(dataset[(position, 4)])[1:3] for position in range(10)} == {(AXIAL, 4)}  # the middle of 8


def test_without_roi_training_takes_any_slice(tmp_path: Path) -> None:
    dataset = dataset_of([write_case(tmp_path, "bare", roi=False)], tmp_path / "cache")
    drawn = [dataset[(position, 0)].index for position in range(400)]
    assert chisquare(np.bincount(drawn, minlength=8)).pvalue > 1e-3
    assert not dataset.with_roi
    assert dataset[(0, 0)].roi_HW is None


def test_the_window_lies_around_the_roi_and_is_the_same_for_all_sequences(tmp_path: Path, cases: list[Case]) -> None:
    dataset = dataset_of(cases, tmp_path / "cache")
    sample = dataset[(0, 0)]
    # rows 4..13 have their middle at 8.5, columns 20..29 at 24.5: a window of 16 begins at 1 and 17
    assert sample.window == (1, 17, 16, 16)
    stored = dataset.store.read_slice(0, AXIAL, 3)
    expected = stored.scaled()[:, 1:17, 17:33]
    np.testing.assert_array_equal(sample.image_SHW.numpy(), expected)
    assert sample.roi_HW is not None
    assert stored.roi_HW is not None
    np.testing.assert_array_equal(sample.roi_HW.numpy(), stored.roi_HW[1:17, 17:33])
    raw = stored.image_SHW[:, 1:17, 17:33]
    np.testing.assert_array_equal(raw[0], -raw[1])  # the same voxels of both sequences
    assert raw[0, 0, 0] == 17 + 100 * 1 + 10_000 * 3


@pytest.mark.parametrize(
    ("shape", "size", "centre", "window"),
    [
        ((320, 320), (224, 224), None, (48, 48, 224, 224)),
        ((320, 320), (224, 224), (10.0, 310.0), (0, 96, 224, 224)),
        ((100, 300), (224, 224), (50.0, 150.0), (0, 39, 100, 224)),
        ((20, 20), (4, 4), (9.0, 9.5), (8, 8, 4, 4)),
        ((7, 9), (224, 224), (1.0, 1.0), (0, 0, 7, 9)),
    ],
)
def test_windows_are_clamped_and_shrunk(
    shape: tuple[int, int], size: tuple[int, int], centre: tuple[float, float] | None, window: tuple[int, ...]
) -> None:
    assert plan_window(shape, size, centre) == window


def test_missing_sequences_stay_zero(tmp_path: Path) -> None:
    dataset = dataset_of([write_case(tmp_path, "a", missing=("adc",))], tmp_path / "cache")
    sample = dataset[(0, 0)]
    assert sample.available_S.tolist() == [True, False]
    assert not sample.image_SHW[1].any()
    assert sample.image_SHW[0].min() > 0


def test_draws_depend_on_seed_and_position_only(tmp_path: Path, cases: list[Case]) -> None:
    settings = {"random_slices": True, "random_axes": True}
    one = dataset_of(cases, tmp_path / "cache", **settings)
    again = dataset_of(cases, tmp_path / "cache", **settings)
    order = np.random.default_rng(0).permutation(60)
    drawn = {int(p): facts_of(again[(int(p), 2)]) for p in order}
    assert [facts_of(one[(p, 2)]) for p in range(60)] == [drawn[p] for p in range(60)]
    other = dataset_of(cases, tmp_path / "cache", seed=1, **settings)
    assert [facts_of(other[(p, 2)]) for p in range(60)] != [drawn[p] for p in range(60)]


def test_axes_are_drawn_alike(tmp_path: Path, cases: list[Case]) -> None:
    dataset = dataset_of(cases, tmp_path / "cache", random_axes=True, random_slices=True)
    axes = np.bincount([dataset[(position, 0)].axis for position in range(600)], minlength=3)
    assert chisquare(axes).pvalue > 1e-3


# --- T18: shape ------------------------------------------------------------------------------------------------------


def test_t18_random_axes_leave_out_distorted_planes_case_by_case(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    thick = write_case(tmp_path, "thick", shape=(8, 40, 36), spacing=(3.0, 0.5, 0.5))
    cubes = write_case(tmp_path, "cubes", shape=(8, 40, 36), spacing=(1.5, 0.8, 0.8))
    dataset = dataset_of([thick, cubes], tmp_path / "cache", random_axes=True)
    drawn = {case: [dataset[(position, case)].axis for position in range(300)] for case in (0, 1)}
    assert set(drawn[0]) == {AXIAL}
    assert chisquare(np.bincount(drawn[1], minlength=3)).pvalue > 1e-3
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert line == (
        "Random axes: coronal and sagittal slices are left out in 1 of 2 cases, e.g. thick: spacing z 3, y 0.5, x 0.5 "
        "mm, where they would be badly distorted; data.preprocess.resample_mm=[0.5,0.5,0.5] brings them in."
    )
    again = dataset_of([thick, cubes], tmp_path / "cache", random_axes=True)
    assert [again[(position, 1)].axis for position in range(299, -1, -1)] == drawn[1][::-1]


def test_t18_without_random_axes_thick_slices_are_no_matter(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    thick = write_case(tmp_path, "thick", shape=(8, 40, 36), spacing=(3.0, 0.5, 0.5))
    assert dataset_of([thick], tmp_path / "cache").axes == (AXIAL,)
    assert dataset_of([thick], tmp_path / "cache", random_axes=True, split="VAL").axes == (AXIAL,)
    resampled = {"resample_mm": (0.5, 0.5, 0.5)}
    cured = dataset_of([thick], tmp_path / "cache", random_axes=True, preprocess=resampled)
    assert cured.store.facts(0).shape == (48, 40, 36)
    assert {cured[(position, 0)].axis for position in range(40)} == {0, 1, 2}
    assert not [record for record in caplog.records if "Random axes" in record.getMessage()]


def test_t18_a_sagittal_stack_is_refused_even_axially(tmp_path: Path) -> None:
    sagittal = write_case(tmp_path, "sagittal", shape=(30, 30, 8), spacing=(0.5, 0.5, 4.0))
    for random_axes in (False, True):
        with pytest.raises(ConfigError, match="Axial slices") as caught:
            dataset_of([sagittal], tmp_path / "cache", random_axes=random_axes)
        assert caught.value.where == "1 of 1 cases, e.g. sagittal: spacing z 0.5, y 0.5, x 4 mm"
        assert caught.value.fix == "set data.preprocess.resample_mm=[0.5,0.5,0.5]"


def ball_case(folder: Path, spacing: tuple[float, float, float]) -> Case:
    """A ball of radius 9 mm in the middle of a box of 36 mm."""
    shape = tuple(round(36 / mm) for mm in spacing)
    places = np.meshgrid(
        *((np.arange(n) - (n - 1) / 2) * mm for n, mm in zip(shape, spacing, strict=True)), indexing="ij"
    )
    inside = sum(p**2 for p in places) <= 81
    noise = np.random.default_rng(0).integers(0, 3, shape)
    path = folder / "ball.nii.gz"
    write_volume(path, Volume((100 * inside + noise).astype(np.int16), np.diag([*spacing[::-1], 1.0])))
    return Case("ball", "ball", {"t2": Sequence("t2", path)})


@pytest.mark.parametrize("spacing", [(1.5, 0.5, 0.5), (1.0, 0.5, 0.5), (0.6, 0.6, 1.2)])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_t18_a_ball_is_round_on_every_axis(
    tmp_path: Path, spacing: tuple[float, float, float], axis: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = dataset_of([ball_case(tmp_path, spacing)], tmp_path / "cache", split="VAL", spatial_size=72)
    dataset.axes = (axis,)
    image = dataset[(0, 0)].image_SHW[0] > 0.5
    height, width = (int(n) for n in (image.any(1).sum(), image.any(0).sum()))
    assert abs(height - width) <= 0.12 * max(height, width)
    assert max(image.shape) == 72
    assert abs(height / image.shape[0] - 18 / 36) < 0.06  # and of the right size: half of the box


def test_t18_a_narrow_slice_keeps_its_shape() -> None:
    assert output_size((224, 24), (1.0, 1.0), 224) == (224, 24)
    assert output_size((112, 56), (0.8, 0.8), 224) == (224, 112)
    assert output_size((224, 224), (0.5, 0.5), 224) == (224, 224)
    assert window_size(224, (3.0, 1.0)) == (75, 224)
    assert output_size((75, 224), (3.0, 1.0), 224) == (224, 223)


def bilinear_by_hand(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Half-pixel centres, edges repeated; float64, pixel by pixel."""
    out = np.zeros(size)
    height, width = image.shape
    for row in range(size[0]):
        for column in range(size[1]):
            y = min(max((row + 0.5) * height / size[0] - 0.5, 0), height - 1)
            x = min(max((column + 0.5) * width / size[1] - 0.5, 0), width - 1)
            y0, x0 = int(y), int(x)
            y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
            top = image[y0, x0] * (1 - (x - x0)) + image[y0, x1] * (x - x0)
            bottom = image[y1, x0] * (1 - (x - x0)) + image[y1, x1] * (x - x0)
            out[row, column] = top * (1 - (y - y0)) + bottom * (y - y0)
    return out


def test_images_are_resized_bilinearly_and_masks_by_nearest() -> None:
    image = np.random.default_rng(0).random((7, 5))
    resized = resize_image(torch.from_numpy(image.astype(np.float32))[None], (16, 11))[0]
    np.testing.assert_allclose(resized.numpy(), bilinear_by_hand(image, (16, 11)), atol=1e-6)
    mask = image > 0.6
    nearest = resize_mask(torch.from_numpy(mask), (16, 11)).numpy()
    for row in range(16):
        for column in range(11):
            assert nearest[row, column] == mask[int((row + 0.5) * 7 / 16), int((column + 0.5) * 5 / 11)]


# --- T19: the share of masks -----------------------------------------------------------------------------------------


def test_t19_share_0_gives_the_stream_of_a_folder_without_masks(tmp_path: Path, cases: list[Case]) -> None:
    settings = {"percentage_labels": 0.0, "random_slices": True}
    before = dataset_of(cases, tmp_path / "cache", **settings)
    stream = [facts_of(before[(p, p % 5)]) for p in range(30)]
    assert not before.with_roi
    assert before.store.roi_cases().size == 0
    for case in cases:
        assert case.roi is not None
        case.roi.write_bytes(b"not even a NIfTI file")  # never opened
    spoiled = dataset_of(cases, tmp_path / "cache", **settings)
    for case in cases:
        assert case.roi is not None
        case.roi.unlink()
    bare = [Case(c.case_id, c.patient_id, c.sequences) for c in cases]
    after = dataset_of(bare, tmp_path / "cache", **settings)
    for dataset in (spoiled, after):
        assert dataset.store.digest == before.store.digest
        assert [facts_of(dataset[(p, p % 5)]) for p in range(30)] == stream


def test_t19_a_case_outside_the_share_does_not_use_its_mask(tmp_path: Path, cases: list[Case]) -> None:
    dataset = dataset_of(cases, tmp_path / "cache", percentage_labels=0.4, random_slices=True)
    inside = exposed_rois(dataset.store, 0.4, 0)
    assert len(inside) == 2
    bare = dataset_of(
        [Case(c.case_id, c.patient_id, c.sequences) for c in cases], tmp_path / "bare", random_slices=True
    )
    for position in range(20):
        for case in range(5):
            sample = dataset[(position, case)]
            assert sample.roi_HW is not None
            assert bool(sample.roi_HW.any()) == (case in inside)
            if case not in inside:
                assert facts_of(sample) == facts_of(bare[(position, case)])


def test_the_share_is_nested_and_follows_the_seed(tmp_path: Path, cases: list[Case]) -> None:
    store = dataset_of(cases, tmp_path / "cache").store
    shares = [exposed_rois(store, share, 3) for share in (0.0, 0.2, 0.6, 1.0)]
    assert [len(s) for s in shares] == [0, 1, 3, 5]
    assert shares[0] < shares[1] < shares[2] < shares[3]
    assert len({exposed_rois(store, 0.4, seed) for seed in range(20)}) > 3


# --- configuration ---------------------------------------------------------------------------------------------------


def test_data_config_reads_texts_and_lists(caplog: pytest.LogCaptureFixture) -> None:
    assert DataConfig().mri_sequences == ("ax_t2wi", "ax_adc", "ax_dwi")
    assert DataConfig.model_validate({"mri_sequences": "a, b"}).mri_sequences == ("a", "b")
    assert DataConfig.model_validate({"split": "val", "spatial_size": 96.0}).split == "VAL"
    assert DataConfig.model_validate({"percentage_labels": 50}).percentage_labels == 1.0
    assert "taken as 1.0" in caplog.text
    for bad in ({"mri_sequences": "a,a"}, {"mri_sequences": ""}, {"split": "x"}, {"min_roi_pixels": 0}, {"rooot": "x"}):
        with pytest.raises(ValueError, match="validation error"):
            DataConfig.model_validate(bad)


# --- pictures --------------------------------------------------------------------------------------------------------


def image_dataset(folder: Path, arrays: list[np.ndarray]) -> ImageDataset:
    cases = []
    for number, array in enumerate(arrays):
        path = folder / f"{number}.png"
        Image.fromarray(array).save(path)
        cases.append(Case(path.name, path.name, {"image": Sequence("image", path)}))
    return ImageDataset(prepare_store(cases, DataConfig(), folder / "cache", kind="images"))


def test_pictures_come_whole_and_are_padded_in_the_batch(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 256, (12, 20, 3)).astype(np.uint8), rng.integers(0, 256, (16, 9)).astype(np.uint8)]
    dataset = image_dataset(tmp_path, arrays)
    batch = collate([dataset[(0, 0)], dataset[(1, 1)]])
    assert batch.images_BSHW.shape == (2, 3, 16, 20)
    assert batch.sizes_B2.tolist() == [[12, 20], [16, 9]]
    assert batch.roi_BHW is None
    assert batch.available_BS.all()
    assert batch.case_ids == ["0.png", "1.png"]
    np.testing.assert_allclose(batch.images_BSHW[0, :, :12].numpy(), arrays[0].transpose(2, 0, 1) / 255, atol=1e-6)
    for channel in range(3):
        np.testing.assert_allclose(batch.images_BSHW[1, channel, :, :9].numpy(), arrays[1] / 255, atol=1e-6)
    assert not batch.images_BSHW[0, :, 12:].any()
    assert not batch.images_BSHW[1, :, :, 9:].any()


# --- the stream ------------------------------------------------------------------------------------------------------


def keys(sampler: ResumableSampler, batches: int) -> list[tuple[int, int]]:
    return [key for number in range(batches) for key in sampler.batch_at(number)]


def test_each_pass_shows_every_case_once_in_a_new_order() -> None:
    stream = keys(ResumableSampler(10, 5, seed=3), 6)
    passes = [[case for _, case in stream[start : start + 10]] for start in (0, 10, 20)]
    assert all(sorted(p) == list(range(10)) for p in passes)
    assert len({tuple(p) for p in passes}) == 3
    assert [position for position, _ in stream] == list(range(30))


def test_a_resumed_stream_is_the_rest_of_the_first() -> None:
    whole = keys(ResumableSampler(7, 3, seed=1), 20)
    for start in (3, 12, 57):
        assert keys(ResumableSampler(7, 3, seed=1, start_position=start), 1) == whole[start : start + 3]
    far = ResumableSampler(7, 3, seed=1, start_position=3 * 10**9)
    assert far.batch_at(0)[0][0] == 3 * 10**9
    with pytest.raises(ValueError, match="not the start of a batch"):
        ResumableSampler(7, 3, seed=1, start_position=4)


def test_r05_ranks_and_accumulation_cut_one_stream() -> None:
    one = keys(ResumableSampler(11, 8, seed=2), 6)
    halves = [ResumableSampler(11, 4, seed=2, rank=rank, world=2) for rank in range(2)]
    joined = [key for number in range(6) for half in halves for key in half.batch_at(number)]
    assert joined == one
    assert keys(ResumableSampler(11, 4, seed=2), 12) == one  # two micro-batches of 4 a step
    first, second = (set(keys(half, 6)) for half in halves)
    assert not first & second


class Streamed:
    """A source whose samples tell their key; slow or faulty at chosen cases."""

    def __init__(self, count: int, *, asleep: int = -1, killed: int = -1, bad: int = -1) -> None:
        self.count, self.asleep, self.killed, self.bad = count, asleep, killed, bad

    def __len__(self) -> int:
        return self.count

    def case_id(self, case: int) -> str:
        return f"case-{case}"

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        position, case = key
        if case == self.asleep:
            time.sleep(60)
        if case == self.killed:
            os.kill(os.getpid(), signal.SIGKILL)
        if case == self.bad:
            raise DataError("The file is cut short.", where=f"case {case}: x.b2nd", fix="copy it again", code="cut")
        draw = np.random.default_rng(position).random()
        image = torch.tensor([[[float(position), float(case), float(draw)]]])
        return Sample(image, torch.ones(1, dtype=torch.bool), self.case_id(case))


@pytest.mark.parametrize("workers", [1, 2])
def test_t21_the_stream_is_the_same_for_any_number_of_workers(workers: int) -> None:
    source = Streamed(6)
    plain = build_loader(source, batch_size=4, seed=0, workers=0)
    loader = build_loader(source, batch_size=4, seed=0, workers=workers, start_step=0)
    drawn = []
    for _ in range(6):
        here, there = next(plain), next(loader)
        assert torch.equal(here.images_BSHW, there.images_BSHW)
        assert here.case_ids == there.case_ids
        drawn += there.images_BSHW[:, 0, 0, 2].tolist()
    loader.close()
    assert len(set(drawn)) == 24  # four passes over six cases: no draw is repeated between workers or epochs


@pytest.mark.slow
def test_t21_real_slices_are_the_same_for_any_number_of_workers(tmp_path: Path, cases: list[Case]) -> None:
    dataset = dataset_of(cases, tmp_path / "cache", random_slices=True, random_axes=True)
    dataset[(0, 0)]  # files are open before the fork
    streams = []
    for workers in (0, 1, 2):
        loader = build_loader(dataset, batch_size=3, seed=5, workers=workers)
        streams.append([next(loader) for _ in range(8)])
        loader.close()
    for batches in streams[1:]:
        for one, other in zip(streams[0], batches, strict=True):
            assert torch.equal(one.images_BSHW, other.images_BSHW)
            assert one.roi_BHW is not None
            assert other.roi_BHW is not None
            assert torch.equal(one.roi_BHW, other.roi_BHW)
            assert torch.equal(one.sizes_B2, other.sizes_B2)
            assert one.case_ids == other.case_ids


def test_r01_a_loader_resumes_at_a_step() -> None:
    source = Streamed(7)
    straight = build_loader(source, batch_size=2, seed=0, accumulation=3)
    batches = [next(straight).images_BSHW for _ in range(12)]
    resumed = build_loader(source, batch_size=2, seed=0, accumulation=3, start_step=2)
    for expected in batches[6:]:
        assert torch.equal(next(resumed).images_BSHW, expected)


def test_a_loader_leaves_the_random_state_of_the_run_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    loader = build_loader(Streamed(4), batch_size=2, seed=0, workers=1)
    next(loader)
    loader.close()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_a_sample_arrives_whole(workers: int) -> None:
    loader = build_loader(Streamed(4, bad=2), batch_size=4, seed=0, workers=workers)
    with pytest.raises(DataError) as caught:
        next(loader)
    error = caught.value
    assert (error.what, error.where, error.fix, error.code) == (
        "The file is cut short.",
        "case 2: x.b2nd",
        "copy it again",
        "cut",
    )


def test_a_damaged_store_names_the_case_through_a_worker(tmp_path: Path, cases: list[Case]) -> None:
    dataset = dataset_of(cases, tmp_path / "cache")
    store = dataset.store
    store._file(int(store._table[3]["file"])).write_bytes(b"nothing")
    loader = build_loader(dataset, batch_size=5, seed=0, workers=1)
    with pytest.raises(DataError, match="damaged") as caught:
        next(loader)
    assert "case c3" in caught.value.where


def test_r19_a_sleeping_worker_ends_the_run_in_time_and_is_named() -> None:
    loader = build_loader(Streamed(8, asleep=5), batch_size=8, seed=0, workers=1, timeout_s=1.0)
    workers = loader._batches._workers
    started = time.monotonic()
    with pytest.raises(ResourceError, match=r"worker 0 gave nothing for 1 s") as caught:
        next(loader)
    assert time.monotonic() - started < 5
    assert "at case case-5" in caught.value.where
    assert f"process {workers[0].pid}" in caught.value.where
    assert caught.value.code == "loader_stuck"
    for worker in workers:
        worker.join(timeout=5)
        assert not worker.is_alive()


def test_r19_a_killed_worker_is_named_where_the_next_batch_is_asked_for() -> None:
    loader = build_loader(Streamed(8, killed=5), batch_size=8, seed=0, workers=1, timeout_s=30)
    deadline = time.monotonic() + 10
    while loader._batches._workers[0].is_alive() and time.monotonic() < deadline:
        time.sleep(0.02)  # the main process is busy elsewhere, and is not disturbed
    started = time.monotonic()
    with pytest.raises(ResourceError, match=r"worker 0 died \(killed by SIGKILL\)") as caught:
        next(loader)
    assert time.monotonic() - started < 5
    assert "at case case-5" in caught.value.where
    assert caught.value.code == "loader_worker_died"


def test_workers_that_were_asked_to_end_do_not_end_the_run(caplog: pytest.LogCaptureFixture) -> None:
    plain = build_loader(Streamed(6), batch_size=2, seed=0)
    loader = build_loader(Streamed(6), batch_size=2, seed=0, workers=1)
    assert torch.equal(next(loader).images_BSHW, next(plain).images_BSHW)
    os.kill(loader._batches._workers[0].pid, signal.SIGTERM)
    for _ in range(6):
        assert torch.equal(next(loader).images_BSHW, next(plain).images_BSHW)
    assert "asked to end" in caplog.text


def test_datasets_travel_to_another_process(tmp_path: Path, cases: list[Case]) -> None:
    dataset = dataset_of(cases, tmp_path / "cache", random_slices=True)
    expected = dataset[(4, 2)]
    copy = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(copy[(4, 2)].image_SHW, expected.image_SHW)


def test_real_slices_are_cut_and_scaled(tmp_path: Path, real_data: Path) -> None:
    folder = real_data / "prostatex_mpmri" / "ProstateX-0000" / "nifti"
    files = {
        "ax_t2wi": "4_t2_tse_tra",
        "ax_adc": "7_ep2d_diff_tra_DYNDIST_ADC",
        "ax_dwi": "8_ep2d_diff_tra_DYNDISTCALC_BVAL",
    }
    sequences = {name: Sequence(name, folder / f"{stem}.nii.gz") for name, stem in files.items()}
    config = DataConfig(preprocess=PreprocessConfig(adc_scale="fixed"))
    store = prepare_store([Case("X", "X", sequences)], config, tmp_path, kind="volumes")
    dataset = SliceDataset(store, config, 0)
    batch = collate([dataset[(position, 0)] for position in range(4)])
    assert batch.images_BSHW.shape == (4, 3, 224, 224)
    assert 0 <= batch.images_BSHW.min() < 0.01
    assert batch.images_BSHW.max() == 1
    assert batch.available_BS.all()
    assert (batch.images_BSHW.std(dim=(0, 2, 3)) > 0.05).all()
