"""Tiles of labelled slices and pictures: every pixel keeps its class, and training sees what inference sees."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from medssl_cli.core.case import Case, Sequence
from medssl_cli.core.errors import ConfigError, DataError
from medssl_cli.core.protocols import IGNORE_LABEL
from medssl_cli.core.volume import AXIAL, Volume, affine_spacing
from medssl_cli.data.images import write_volume
from medssl_cli.data.label_maps import LabelSpec
from medssl_cli.data.labelled_slices import build_labelled_loader, collate_labelled
from medssl_cli.data.labelled_volumes import (
    LabelledPictures,
    SliceLabels,
    foreground_slices,
    resize_image,
    resize_labels,
    size_at,
    to_resolution,
)
from medssl_cli.data.preprocess import PreprocessConfig, prepare_case, scale_to_unit, sequence_limits
from medssl_cli.data.store import Store, build_store

SHAPE = (6, 40, 50)
SPEC = LabelSpec(("background", "gland", "lesion"), {0: 0, 1: 1, 2: 2}, (9,))
ONE = LabelSpec(("background", "lesion"), {0: 0, 1: 1})


def case_of(
    folder: Path, name: str, label: np.ndarray, spacing: tuple[float, float, float], **images: np.ndarray
) -> Case:
    affine = np.diag([*spacing[::-1], 1.0])
    files = {}
    for sequence, array in {**images, "label": label}.items():
        write_volume(folder / name / f"{sequence}.nii.gz", Volume(array, affine))
        files[sequence] = Sequence(sequence, folder / name / f"{sequence}.nii.gz")
    return Case(name, name, {s: files[s] for s in images}, roi=files["label"].path)


def label_map() -> np.ndarray:
    """A gland on slices 1 to 3, a lesion of one pixel on slice 3, a rim to be ignored."""
    label = np.zeros(SHAPE, np.uint8)
    label[1:4, 10:30, 12:40] = 1
    label[3, 14, 33] = 2
    label[1, 9, 12:40] = 9
    return label


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Two cases of two sequences on 0.5 mm pixels; the second is all background and lacks ADC."""
    folder = tmp_path_factory.mktemp("labelled")
    rng = np.random.default_rng(0)
    images = [rng.gamma(2, 100, SHAPE).astype(np.int16) for _ in range(3)]
    cases = [
        case_of(folder, "a", label_map(), (3.0, 0.5, 0.5), t2=images[0], adc=images[1]),
        case_of(folder, "b", np.zeros(SHAPE, np.uint8), (3.0, 0.5, 0.5), t2=images[2]),
    ]
    return build_store(cases, ("t2", "adc"), PreprocessConfig(), folder / "cache", kind="labels")


def slices(store: Store, **settings: object) -> SliceLabels:
    values = {"tile": 16, "training": True, **settings}
    return SliceLabels(store, SPEC, **values)  # type: ignore[arg-type]


# --- resolution ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "spacing", "pixel_mm", "expected"),
    [
        ((40, 50), (0.5, 0.5), None, (40, 50)),
        ((40, 50), (0.5, 0.52), None, (40, 50)),  # square for all purposes
        ((40, 50), (1.0, 0.5), None, (80, 50)),
        ((40, 50), (0.5, 0.5), 1.0, (20, 25)),
        ((40, 50), (3.0, 0.5), 1.5, (80, 17)),
        ((1, 1), (0.1, 0.1), 5.0, (1, 1)),
    ],
)
def test_sizes_follow_from_millimetres(
    size: tuple[int, int], spacing: tuple[float, float], pixel_mm: float | None, expected: tuple[int, int]
) -> None:
    assert size_at(size, spacing, pixel_mm) == expected


@pytest.mark.parametrize(
    ("spacing", "pixel_mm"), [((0.5, 0.5), None), ((1.0, 0.5), None), ((0.5, 0.5), 0.3), ((0.5, 0.5), 0.8)]
)
def test_a_lit_pixel_stays_in_place_there_and_back(spacing: tuple[float, float], pixel_mm: float | None) -> None:
    image = torch.zeros(1, 40, 50)
    image[0, 13, 31] = 1.0
    there = to_resolution(image, spacing, pixel_mm)
    h, w = there.shape[1:]
    y, x = (np.arange(n) for n in (h, w))
    mass = there[0].numpy()
    centre = (mass.sum(1) @ y / mass.sum(), mass.sum(0) @ x / mass.sum())
    expected = (13.5 * h / 40 - 0.5, 31.5 * w / 50 - 0.5)
    np.testing.assert_allclose(centre, expected, atol=0.1)  # a pixel that is sampled between is not symmetric
    back = resize_image(there, (40, 50))
    assert divmod(int(back[0].argmax()), 50) == (13, 31)
    labels = np.zeros((40, 50), np.uint8)
    labels[12:15, 30:33] = 2
    seen = resize_labels(labels, (h, w))
    assert seen[round(expected[0]), round(expected[1])] == 2
    np.testing.assert_array_equal(resize_labels(seen, (40, 50))[13, 31], 2)


@pytest.mark.parametrize("size", [(40, 50), (80, 50), (27, 61), (100, 125)])
def test_images_and_labels_are_resized_as_pytorch_does(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    image = torch.from_numpy(rng.random((3, 40, 50), np.float32))
    expected = torch.nn.functional.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
    torch.testing.assert_close(resize_image(image, size), expected)
    labels = rng.integers(0, 5, (40, 50)).astype(np.uint8)
    nearest = torch.nn.functional.interpolate(torch.from_numpy(labels)[None, None].float(), size, mode="nearest-exact")
    np.testing.assert_array_equal(resize_labels(labels, size), nearest[0, 0].numpy())


# --- slices ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pixel_mm", [None, 0.3, 0.8])
def test_a_training_tile_is_a_part_of_what_inference_sees(store: Store, pixel_mm: float | None) -> None:
    training, whole = slices(store, pixel_mm=pixel_mm), slices(store, pixel_mm=pixel_mm, training=False)
    for position in range(12):
        tile = training[(position, 0)]
        name, number = tile.case_id.split(" slice ")
        assert name == "a"
        full = whole[(0, int(number))]
        assert full.case_id == tile.case_id
        h, w = full.label_HW.shape
        places = [
            (top, left)
            for top in range(h - 15)
            for left in range(w - 15)
            if np.array_equal(full.label_HW[top : top + 16, left : left + 16], tile.label_HW)
            and torch.allclose(full.image_SHW[:, top : top + 16, left : left + 16], tile.image_SHW, atol=1e-5)
        ]
        assert len(places) == 1


def test_a_whole_slice_is_scaled_as_inference_scales_it(store: Store, tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    t2, adc = rng.gamma(2, 100, SHAPE).astype(np.int16), (3000 * rng.random(SHAPE)).astype(np.float32)
    case = case_of(tmp_path, "a", label_map(), (3.0, 0.5, 0.5), t2=t2, adc=adc)
    config = PreprocessConfig(adc_scale="fixed")
    built = build_store([case], ("t2", "adc"), config, tmp_path / "cache", kind="labels")
    prepared = prepare_case(case, ("t2", "adc"), config)
    source = SliceLabels(built, SPEC, tile=16, training=False)
    for number in range(SHAPE[0]):
        low, high = (
            np.array(ends)
            for ends in zip(
                *(
                    (lo[number], hi[number])
                    for lo, hi in (
                        sequence_limits(n, v, AXIAL, config)
                        for n, v in zip(("t2", "adc"), prepared.images_SZYX, strict=True)
                    )
                ),
                strict=True,
            )
        )
        expected = scale_to_unit(prepared.images_SZYX[:, number], low, high)
        np.testing.assert_allclose(source[(0, number)].image_SHW, expected, atol=1e-6)
        np.testing.assert_array_equal(source[(0, number)].label_HW, SPEC.classes_of(label_map()[number]))


def test_neighbours_are_slice_major_and_the_outermost_slice_repeats(store: Store) -> None:
    plain, near = slices(store, training=False), slices(store, training=False, context=2)
    for number in range(SHAPE[0]):
        expected = [min(max(0, n), SHAPE[0] - 1) for n in range(number - 2, number + 3)]
        stacked = torch.cat([plain[(0, n)].image_SHW for n in expected])
        sample = near[(0, number)]
        torch.testing.assert_close(sample.image_SHW, stacked, rtol=0, atol=0)
        torch.testing.assert_close(sample.label_HW, plain[(0, number)].label_HW, rtol=0, atol=0)
        assert sample.available_S.tolist() == [True, True]


def test_slices_of_all_cases_come_in_order_without_training(store: Store) -> None:
    source = slices(store, training=False)
    assert len(source) == 12
    assert [source[(0, n)].case_id for n in (0, 5, 6, 11)] == ["a slice 0", "a slice 5", "b slice 0", "b slice 5"]
    assert [source.case_id(n) for n in (0, 5, 6, 11)] == ["a", "a", "b", "b"]
    absent = source[(0, 7)]
    assert absent.available_S.tolist() == [True, False]
    assert not absent.image_SHW[1].any()


def test_half_of_the_tiles_lie_around_a_structure(store: Store) -> None:
    source = slices(store, foreground_share=1.0, tile=5)
    centres = [int(source[(position, 0)].label_HW[2, 2]) for position in range(200)]
    assert set(centres) <= {1, 2}
    # slice 3 of three has both structures, each drawn alike: a sixth of all, although the lesion is one pixel
    assert 15 <= centres.count(2) <= 55
    shares = []
    for share in (0.0, 0.5):
        mixed = slices(store, foreground_share=share, tile=1)
        shares.append(np.mean([int(mixed[(position, 0)].label_HW[0, 0]) in (1, 2) for position in range(300)]))
    background = (label_map() == 1).mean()
    assert shares[0] == pytest.approx(background, abs=0.06)
    assert shares[1] == pytest.approx(0.5 + 0.5 * background, abs=0.08)


def test_a_case_without_structures_gives_tiles_too(store: Store) -> None:
    source = slices(store, foreground_share=1.0)
    sample = source[(5, 1)]
    assert sample.case_id.startswith("b slice ")
    assert not sample.label_HW.any()


def test_draws_are_functions_of_seed_and_position(store: Store) -> None:
    one, again, other = slices(store, seed=3), slices(store, seed=3), slices(store, seed=4)
    for position in (0, 7, 123456):
        a, b = one[(position, 0)], again[(position, 0)]
        assert a.case_id == b.case_id
        assert torch.equal(a.image_SHW, b.image_SHW)
        assert torch.equal(a.label_HW, b.label_HW)
    drawn = [torch.stack([source[(p, 0)].image_SHW for p in range(4)]) for source in (one, other)]
    assert not torch.equal(*drawn)
    assert not torch.equal(drawn[0][0], drawn[0][1])


def test_an_epoch_draws_each_case_as_often(store: Store) -> None:
    source = slices(store, slices_per_case=3)
    assert len(source) == 6
    assert sorted(source.case_id(n) for n in range(6)) == ["a"] * 3 + ["b"] * 3


def test_slices_smaller_than_a_tile_are_padded_with_ignored_pixels(store: Store) -> None:
    sample = slices(store, tile=64)[(0, 0)]
    assert sample.image_SHW.shape == (2, 64, 64)
    assert (sample.label_HW[40:] == IGNORE_LABEL).all()
    assert (sample.label_HW[:, 50:] == IGNORE_LABEL).all()
    number = int(sample.case_id.rpartition(" ")[2])
    np.testing.assert_array_equal(sample.label_HW[:40, :50], SPEC.classes_of(label_map()[number]))
    assert not sample.image_SHW[:, 40:].any()
    assert not sample.image_SHW[:, :, 50:].any()


def test_values_to_be_ignored_count_nowhere(store: Store) -> None:
    sample = slices(store, training=False)[(0, 1)]
    assert (sample.label_HW[9, 12:40] == IGNORE_LABEL).all()
    assert sorted(sample.label_HW.unique().tolist()) == [0, 1, IGNORE_LABEL]


def test_samples_make_a_batch(store: Store) -> None:
    source = slices(store, context=1)
    batch = collate_labelled([source[(position, position)] for position in range(4)])
    assert batch.images_BSHW.shape == (4, 6, 16, 16)
    assert batch.label_map_BHW.dtype == torch.int64
    assert batch.available_BS.shape == (4, 2)


def test_loader_processes_give_the_same_stream(store: Store) -> None:
    batches = []
    for workers in (0, 1):
        loader = build_labelled_loader(slices(store, context=1), batch_size=3, seed=5, start_step=4, workers=workers)
        batches.append([next(loader) for _ in range(3)])
        loader.close()
    for here, there in zip(*batches, strict=True):
        assert here.case_ids == there.case_ids
        assert torch.equal(here.images_BSHW, there.images_BSHW)
        assert torch.equal(here.label_map_BHW, there.label_map_BHW)


def test_slices_with_structures_are_known_without_reading(store: Store) -> None:
    assert foreground_slices(store.slice_facts(0, AXIAL)).tolist() == [1, 2, 3]
    assert foreground_slices(store.slice_facts(1, AXIAL)).tolist() == []


def test_unknown_values_are_refused_before_training_with_the_cases(store: Store) -> None:
    with pytest.raises(DataError) as error:
        SliceLabels(store, ONE, tile=16)
    assert error.value.code == "label_values"
    assert error.value.where == "case a: 2, 9\nknown are 0 background, 1 lesion"


def test_windows_and_colours_are_of_one_sequence(store: Store) -> None:
    for settings in ({"windows_hu": [("soft", 0, 80)]}, {"colours": 3}):
        with pytest.raises(ConfigError, match="one sequence"):
            slices(store, **settings)


def test_real_ct_windows_become_channels(real_data: Path, tmp_path: Path) -> None:
    folder = real_data / "sts_ct_pet_mr_volumes" / "STS_002"
    case = Case("s", "s", {"ct": Sequence("ct", folder / "CT_image.nii.gz")}, roi=folder / "CT_mask.nii.gz")
    built = build_store([case], ("ct",), PreprocessConfig(), tmp_path, kind="labels")
    windows = [("soft", -160, 240), ("bone", -500, 1300)]
    source = SliceLabels(built, ONE, tile=64, training=False, windows_hu=windows, context=1)
    facts = built.slice_facts(0, AXIAL)
    number = int(facts.roi_pixels_N.argmax())
    sample = source[(0, number)]
    images, labels = built.read_volume(0)
    assert sample.image_SHW.shape[0] == 6
    by_hand = [
        np.clip((images[0, n] - low) / (high - low), 0, 1)
        for n in (number - 1, number, number + 1)
        for _, low, high in windows
    ]
    np.testing.assert_allclose(sample.image_SHW, np.stack(by_hand), atol=1e-6)
    assert labels is not None
    assert int((sample.label_HW == 1).sum()) == int(labels[number].sum()) == int(facts.roi_pixels_N[number])
    grey = SliceLabels(built, ONE, tile=32, colours=3, foreground_share=1.0)[(0, 0)]
    assert grey.image_SHW.shape == (3, 32, 32)
    assert torch.equal(grey.image_SHW[0], grey.image_SHW[2])
    assert grey.label_HW[16, 16] == 1 or (grey.label_HW == 1).any()


def test_real_masks_on_another_grid_lie_over_the_gland(real_data: Path, tmp_path: Path) -> None:
    folder = real_data / "prostate_dx_t2" / "t2_full"
    stem = folder / "ProstateDx-01-0049"
    mask = Path(f"{stem}_prostates_mask.nii.gz")
    case = Case("a", "a", {"t2": Sequence("t2", Path(f"{stem}_t2_norm.nii.gz"))}, roi=mask)
    built = build_store([case], ("t2",), PreprocessConfig(), tmp_path, kind="labels")
    source = SliceLabels(built, ONE, tile=96, pixel_mm=0.5, training=False)
    volume_mm3 = sum(int((source[(0, n)].label_HW == 1).sum()) for n in range(len(source))) * 0.25
    volume_mm3 *= built.facts(0).spacing.z
    image = nib.load(mask)  # type: ignore[attr-defined]
    array = np.asanyarray(image.dataobj)  # type: ignore[attr-defined]
    expected = (array > 0).sum() * np.prod(affine_spacing(image.affine))  # type: ignore[attr-defined]
    assert volume_mm3 == pytest.approx(expected, rel=0.05)


# --- pictures --------------------------------------------------------------------------------------------------------


def picture(folder: Path, name: str, size: tuple[int, int] = (30, 40), value: int = 1, *, colour: bool = True) -> Case:
    rng = np.random.default_rng(len(name))
    folder.mkdir(parents=True, exist_ok=True)
    label = np.zeros(size, np.uint8)
    label[10:20, 5:15] = value
    image = rng.integers(1, 255, (*size, 3) if colour else size).astype(np.uint8)
    Image.fromarray(image).save(folder / f"{name}.png")
    Image.fromarray(label).save(folder / f"{name}_mask.png")
    return Case(name, name, {"image": Sequence("image", folder / f"{name}.png")}, roi=folder / f"{name}_mask.png")


def test_pictures_are_tiles_in_training_and_whole_else(tmp_path: Path) -> None:
    cases = [picture(tmp_path, "a"), picture(tmp_path, "bb", value=255, colour=False)]
    spec = LabelSpec(("background", "x"), {0: 0, 1: 1, 255: 1})
    whole = LabelledPictures(cases, spec, PreprocessConfig(), tile=16, training=False)
    sample = whole[(0, 0)]
    stored = np.asarray(Image.open(tmp_path / "a.png")).transpose(2, 0, 1)
    np.testing.assert_allclose(sample.image_SHW, stored / 255, atol=1e-6)
    np.testing.assert_array_equal(sample.label_HW, np.asarray(Image.open(tmp_path / "a_mask.png")))
    grey = whole[(0, 1)]
    assert grey.image_SHW.shape == (3, 30, 40)
    assert torch.equal(grey.image_SHW[0], grey.image_SHW[1])
    assert int(grey.label_HW.sum()) == 100
    tiles = LabelledPictures(cases, spec, PreprocessConfig(), tile=7, foreground_share=1.0, tiles_per_picture=5)
    assert len(tiles) == 10
    for position in range(20):
        tile = tiles[(position, position % 10)]
        assert tile.image_SHW.shape == (3, 7, 7)
        assert tile.label_HW[3, 3] == 1
        again = tiles[(position, position % 10)]
        assert torch.equal(tile.image_SHW, again.image_SHW)
    padded = LabelledPictures(cases, spec, PreprocessConfig(), tile=64)[(0, 0)]
    assert (padded.label_HW[30:] == IGNORE_LABEL).all()


def test_labels_are_reduced_with_their_picture(tmp_path: Path) -> None:
    case = picture(tmp_path, "a", (60, 80))
    source = LabelledPictures([case], ONE, PreprocessConfig(picture_side=30), tile=16, training=False)
    sample = source[(0, 0)]
    assert sample.image_SHW.shape == (3, 30, 40)
    rows, columns = np.nonzero(sample.label_HW.numpy())
    assert (rows.min(), rows.max() + 1) == (5, 10)
    assert columns.max() + 1 - columns.min() == 5


def test_memory_for_pictures_is_bounded(tmp_path: Path) -> None:
    cases = [picture(tmp_path, "a" * n) for n in range(1, 5)]
    one = 30 * 40 * 4
    source = LabelledPictures(cases, ONE, PreprocessConfig(), tile=8, cache_gb=2.5 * one / 2**30)
    for index in (0, 1, 2, 3, 0):
        source[(0, index)]
    assert list(source._cache._known) == ["aaaa", "a"]
    none = LabelledPictures(cases, ONE, PreprocessConfig(), tile=8, cache_gb=0)
    assert torch.equal(none[(0, 2)].image_SHW, source[(0, 2)].image_SHW)
    assert not none._cache._known


def test_pictures_that_cannot_be_trained_name_the_case(tmp_path: Path) -> None:
    good = picture(tmp_path, "good")
    unequal = Case("unequal", "u", good.sequences, roi=picture(tmp_path, "small", (8, 9)).roi)
    colour = Case("colour", "c", good.sequences, roi=good.sequences["image"].path)
    beyond = picture(tmp_path, "beyond", value=2)
    absent = Case("absent", "a", good.sequences)
    for case, code, told in (
        (unequal, "label_size", "40 x 30 and 9 x 8 pixels"),
        (colour, "label_colour", "good.png"),
        (beyond, "label_values", "2 in 100 pixels, the first at (5, 10)"),
        (absent, "label_missing", "absent"),
    ):
        with pytest.raises(DataError) as error:
            LabelledPictures([case], ONE, PreprocessConfig(), tile=8)[(0, 0)]
        assert error.value.code == code
        assert error.value.where.startswith(f"case {case.case_id}")
        assert told in error.value.where
    with pytest.raises(DataError, match="2 pictures cannot") as error:
        LabelledPictures([unequal, good, absent], ONE, PreprocessConfig(), tile=8)
    assert error.value.where.startswith("case unequal: ")
    assert "\ncase absent (A picture has no label map.)" in error.value.where
    with pytest.raises(DataError) as error:
        LabelledPictures([good], ONE, PreprocessConfig(), tile=8, colours=1)[(0, 0)]
    assert error.value.code == "picture_channels"


def test_real_vessels_stay_on_their_pixels(real_data: Path) -> None:
    folder = real_data / "chase_db1_vessels"
    case = Case(
        "01L",
        "01",
        {"image": Sequence("image", folder / "images" / "Image_01L.jpg")},
        roi=folder / "manual1" / "Image_01L_1stHO.png",
    )
    source = LabelledPictures([case], ONE, PreprocessConfig(picture_side=None), tile=224, training=False)
    sample = source[(0, 0)]
    assert sample.image_SHW.shape == (3, 960, 999)
    green = sample.image_SHW[1].numpy()
    vessel = sample.label_HW.numpy() == 1
    contrast = [  # vessels are darker in green than what surrounds them, most so where they are drawn
        (green - gaussian_filter(green, 12))[np.roll(vessel, shift, axis=1)].mean() for shift in (-6, 0, 6)
    ]
    assert contrast[1] < -0.01
    assert contrast[1] < min(contrast[0], contrast[2]) - 0.005
