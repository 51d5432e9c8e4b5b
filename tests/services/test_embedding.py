from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from PIL import Image
from pydantic import ValidationError

from medssl_cli.core.case import Case, Sequence
from medssl_cli.core.errors import CheckpointError, ConfigError, DataError, MedsslError, NonFiniteError
from medssl_cli.core.run import digest_of
from medssl_cli.data.feature_cache import FeatureCache
from medssl_cli.services import embedding_config
from medssl_cli.services.backbone import Backbone, Planes, open_backbone
from medssl_cli.services.embedding import CaseVectors, Embedder, ExtractConfig, embedder_of, pooled
from medssl_cli.services.heatmaps import InferConfig, look
from medssl_cli.services.lookup import find_model
from medssl_cli.services.read_ahead import read_ahead

WriteRun = Callable[..., Path]
THREE = ("ax_t2wi", "ax_adc", "ax_dwi")
LIT = (32, 8, 3)
"""First voxel (x, y, z) of the planted patch in RAS: row 1, column 4 of patches of 8 pixels, slice 3."""


def backbone_of(run: Path) -> Backbone:
    return open_backbone(find_model(run), torch.device("cpu"))


def keep_patches(model: Any) -> None:
    """Patch tokens depend on nothing but their own patch; the first number is its brightness."""
    for block in model.flat_blocks():
        block.ls1.gamma.zero_()
        block.ls2.gamma.zero_()
    model.pos_embed.zero_()
    embedding = model.patch_embed.proj
    embedding.weight.zero_()
    embedding.bias.zero_()
    embedding.weight[0] = 1 / embedding.weight[0].numel()
    embedding.bias[1], embedding.bias[2] = 1.0, -1.0
    if model.seq_embed is not None:
        model.seq_embed.fill_(1e-6)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, write_run: WriteRun) -> Backbone:
    return backbone_of(write_run(tmp_path_factory.mktemp("one") / "run", ("ax_t2wi",)))


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory, write_run: WriteRun) -> Backbone:
    run = write_run(tmp_path_factory.mktemp("three") / "run", THREE, "student.use_mri_seq_embed=true")
    return backbone_of(run)


@pytest.fixture(scope="module")
def bright(tmp_path_factory: pytest.TempPathFactory, write_run: WriteRun) -> Backbone:
    return backbone_of(write_run(tmp_path_factory.mktemp("bright") / "run", THREE, edit=keep_patches))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory, write_run: WriteRun) -> Backbone:
    return backbone_of(write_run(tmp_path_factory.mktemp("pictures") / "run", None))


@pytest.fixture(scope="module")
def head_ct(tmp_path_factory: pytest.TempPathFactory, write_run: WriteRun) -> Backbone:
    """One sequence with MedDINOv3's window and normalisation."""
    preprocess = {"window_hu": [-1000.0, 1000.0]}
    card = {
        "preprocess": preprocess,
        "mean": (65.1084213256836 + 1000) / 2000,
        "std": 178.01663208007812 / 2000,
    }
    return backbone_of(write_run(tmp_path_factory.mktemp("ct") / "run", ("ct",), **card))


def noise(shape: tuple[int, int, int] = (48, 32, 5), seed: int = 0) -> np.ndarray:
    """(X, Y, Z) int16."""
    return np.random.default_rng(seed).integers(100, 140, shape).astype(np.int16)


def planted(seed: int = 0) -> np.ndarray:
    array = noise(seed=seed)
    x, y, z = LIT
    array[x : x + 8, y : y + 8, z] += 900
    return array


def save(path: Path, array_xyz: np.ndarray, codes: str = "RAS") -> Path:
    """Write a RAS array of 1 x 1 x 3 mm in another orientation, turned by nibabel."""
    affine = np.diag([1.0, 1.0, 3.0, 1.0])
    image = nib.Nifti1Image(array_xyz, affine)
    image = image.as_reoriented(ornt_transform(io_orientation(affine), axcodes2ornt(codes)))
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)
    return path


def case_of(case_id: str = "P1", **paths: Path) -> Case:
    return Case(case_id, case_id, {name: Sequence(name, path) for name, path in paths.items()})


def picture_case(path: Path, seed: int = 0, size: tuple[int, int] = (48, 40), case_id: str = "") -> Case:
    """Write a grey picture of 8 bits; (height, width)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)).save(path)
    return case_of(case_id or path.name, image=path)


@pytest.fixture
def cohort(tmp_path: Path) -> list[Case]:
    """Four cases of 5, 5, 3 and 5 slices in two sizes, the second without ADC."""
    cases = []
    for n, shape in enumerate([(48, 32, 5), (48, 32, 5), (40, 40, 3), (48, 32, 5)]):
        names = [name for name in THREE if (n, name) != (1, "ax_adc")]
        paths = {name: save(tmp_path / f"P{n}/{name}.nii.gz", noise(shape, 10 * n + len(name))) for name in names}
        cases.append(case_of(f"P{n}", **paths))
    return cases


def vectors_of(embedder: Embedder, cases: list[Case], **more: Any) -> list[CaseVectors]:
    found = []
    for _, _, result in embedder.embed_many(cases, **more):
        assert isinstance(result, CaseVectors), result
        found.append(result)
    return found


def equal(a: CaseVectors, b: CaseVectors) -> None:
    np.testing.assert_array_equal(a.slices_ND, b.slices_ND)
    np.testing.assert_array_equal(a.indices_N, b.indices_N)
    assert a.slices_ND.dtype == b.slices_ND.dtype == np.float32
    assert a.indices_N.dtype == b.indices_N.dtype == np.int32
    assert a.facts == b.facts
    assert (a.patches_NShwD is None) == (b.patches_NShwD is None)
    if a.patches_NShwD is not None and b.patches_NShwD is not None:
        np.testing.assert_array_equal(a.patches_NShwD, b.patches_NShwD)


# --- against Hugging Face --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["dinov2", "registers"])
def foreign(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Backbone]:
    """A random network of Hugging Face and the same weights converted."""
    import transformers as hf

    from medssl_cli.services.convert_weights import WeightsRequest, convert_weights

    size = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 1, "image_size": 56, "patch_size": 14}
    torch.manual_seed(0)
    theirs: Any = (
        hf.Dinov2Model(hf.Dinov2Config(**size))
        if request.param == "dinov2"
        else hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**size, num_register_tokens=4))
    )
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    folder = tmp_path_factory.mktemp("foreign")
    torch.save(theirs.state_dict(), folder / "weights.pth")
    convert_weights(WeightsRequest(folder / "weights.pth", folder / "out"))
    return theirs.eval(), backbone_of(folder / "out")


def test_m09_w22_w36_layers_mean_and_patches_are_those_of_hugging_face(
    foreign: tuple[Any, Backbone], tmp_path: Path
) -> None:
    """CLS of the last two blocks shallow to deep, then the mean patch, all through the final norm; no register in it.

    The picture is read and prepared by Pillow and torch alone.
    """
    theirs, backbone = foreign
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    config = ExtractConfig(tokens=("cls", "mean", "patch"), layers=2, resize=56)
    found = Embedder(backbone, config).embed(case_of(image=tmp_path / "a.png"))

    image = torch.from_numpy(np.array(Image.open(tmp_path / "a.png"))).permute(2, 0, 1)[None] / 255
    image = torch.nn.functional.interpolate(image, (56, 56), mode="bilinear", align_corners=False)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        hidden = theirs((image - mean) / std, output_hidden_states=True).hidden_states
        shallow, deep = (theirs.layernorm(hidden[n])[0] for n in (-2, -1))
    patches = deep[len(deep) - 16 :]
    expected = torch.cat([shallow[0], deep[0], patches.mean(0)])
    np.testing.assert_allclose(found.slices_ND, expected[None], atol=1e-5)
    assert found.patches_NShwD is not None
    assert found.patches_NShwD.shape == (1, 1, 4, 4, 64)
    np.testing.assert_allclose(found.patches_NShwD[0, 0].reshape(16, 64), patches, atol=1e-5)

    short = Embedder(backbone, ExtractConfig(resize=56)).embed(case_of(image=tmp_path / "a.png"))
    np.testing.assert_allclose(short.slices_ND, deep[None, 0], atol=1e-5)


@pytest.mark.parametrize("antialias", [False, True])
def test_antialias_is_as_asked_and_in_the_key(antialias: bool, one: Backbone, tmp_path: Path) -> None:
    case = case_of(ax_t2wi=save(tmp_path / "a.nii.gz", noise((80, 80, 3))))
    embedder = Embedder(one, ExtractConfig(resize=32, antialias=antialias))
    planes = embedder.planes(case)
    plain = (torch.from_numpy(planes.batch(np.array([1]))) - 0.5) / 0.5
    wanted = torch.nn.functional.interpolate(plain, (32, 32), mode="bilinear", antialias=antialias)
    found = embedder.network_input(planes, np.array([1]))
    shift, scale = (torch.tensor(v) for v in (one.mean, one.std))
    torch.testing.assert_close(found, (wanted * 0.5 + 0.5 - shift) / scale, atol=1e-5, rtol=0)
    assert embedder.settings["antialias"] is antialias


def test_without_resize_slices_are_shown_as_infer_shows_them(three: Backbone, cohort: list[Case]) -> None:
    embedder = Embedder(three, ExtractConfig(max_side=40))
    planes = embedder.planes(cohort[0])
    seen = look(planes, three, InferConfig(max_side=40), heatmap=False)
    found = embedder.embed(cohort[0])
    np.testing.assert_allclose(found.slices_ND, seen.cls_ND, atol=2e-6)
    np.testing.assert_array_equal(found.indices_N, seen.indices_N)


# --- the same numbers however they are computed ----------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [("cls",), ("cls", "mean", "patch")])
def test_m10_batches_of_one_and_of_eight_agree(tokens: Any, three: Backbone, cohort: list[Case]) -> None:
    alone = vectors_of(Embedder(three, ExtractConfig(tokens=tokens, batch_size=1)), cohort)
    joined = vectors_of(Embedder(three, ExtractConfig(tokens=tokens, batch_size=8)), cohort)
    for a, b, case in zip(alone, joined, cohort, strict=True):
        np.testing.assert_allclose(a.slices_ND, b.slices_ND, atol=1e-5)
        single = Embedder(three, ExtractConfig(tokens=tokens)).embed(case)
        np.testing.assert_allclose(single.slices_ND, b.slices_ND, atol=1e-5)
        if b.patches_NShwD is not None:
            assert a.patches_NShwD is not None
            np.testing.assert_allclose(a.patches_NShwD, b.patches_NShwD, atol=1e-5)


def test_slices_of_several_cases_share_batches(three: Backbone, cohort: list[Case]) -> None:
    """15 slices of one size and 3 of another: two batches of eight and one of three, no more."""
    sizes = []

    class Telling(Embedder):
        def forward(self, images_BSHW: torch.Tensor, available_BS: np.ndarray) -> Any:
            sizes.append(len(images_BSHW))
            return super().forward(images_BSHW, available_BS)

    embedder = Telling(three, ExtractConfig(batch_size=8))
    vectors_of(embedder, cohort)
    assert sorted(sizes) == [3, 7, 8]
    assert embedder.forward_passes == 18


def test_m10_w21_two_extractions_are_equal_bit_for_bit_even_in_training_mode(
    three: Backbone, cohort: list[Case]
) -> None:
    three.model.drop_rates = [0.5] * len(three.model.drop_rates)
    first = vectors_of(Embedder(three, ExtractConfig()), cohort)
    three.model.train()
    try:
        again = vectors_of(Embedder(three, ExtractConfig()), cohort)
        assert three.model.training
    finally:
        three.model.eval()
        three.model.drop_rates = [0.0] * len(three.model.drop_rates)
    for a, b in zip(first, again, strict=True):
        equal(a, b)


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PSR"])
def test_m11_three_stored_orientations_give_one_embedding_and_the_right_corner(
    codes: str, bright: Backbone, tmp_path: Path
) -> None:
    paths = {name: save(tmp_path / codes / f"{name}.nii.gz", planted(), codes) for name in THREE}
    straight = {name: save(tmp_path / "straight" / f"{name}.nii.gz", planted()) for name in THREE}
    config = ExtractConfig(tokens=("cls", "mean", "patch"))
    found = Embedder(bright, config).embed(case_of(**paths))
    wanted = Embedder(bright, config).embed(case_of(**straight))
    np.testing.assert_array_equal(found.slices_ND, wanted.slices_ND)
    assert found.patches_NShwD is not None
    assert found.patches_NShwD.shape == (5, 3, 4, 6, 32)
    z, _, row, column = np.unravel_index(found.patches_NShwD[..., 0].argmax(), found.patches_NShwD.shape[:-1])
    x, y, slice_index = LIT
    assert (found.indices_N[z], row, column) == (slice_index, y // 8, x // 8)


def test_t16_a_patch_of_the_second_sequence_has_its_place_there(bright: Backbone, tmp_path: Path) -> None:
    paths = {name: save(tmp_path / f"{name}.nii.gz", noise(seed=n)) for n, name in enumerate(THREE)}
    save(paths["ax_adc"], planted())
    embedder = Embedder(bright, ExtractConfig(tokens=("patch",)))
    found = embedder.embed(case_of(**paths))
    assert embedder.config.tokens == ("cls", "patch")
    assert found.patches_NShwD is not None
    # percentiles scale every slice by itself: the one planted patch of its slice stands out from noise
    centred = found.patches_NShwD[..., 0] - found.patches_NShwD[..., 0].mean((2, 3), keepdims=True)
    assert np.unravel_index(np.abs(centred[3]).argmax(), centred[3].shape) == (1, LIT[1] // 8, LIT[0] // 8)
    direct = embedder.patch_tokens(embedder.planes(case_of(**paths)), found.indices_N)
    np.testing.assert_allclose(direct, found.patches_NShwD, atol=1e-6)


# --- slices ----------------------------------------------------------------------------------------------------------


def test_stored_slices_are_those_of_the_third_axis_as_x_y(head_ct: Backbone, tmp_path: Path) -> None:
    """A file that is stored sagittally: nothing is turned, and a map finds its way back."""
    ras = np.random.default_rng(0).integers(-900, 900, (9, 8, 7)).astype(np.int16)
    path = save(tmp_path / "a.nii.gz", ras, "PSR")
    stored = np.asarray(nib.load(path).dataobj)  # (x, y, z) of the file
    embedder = Embedder(head_ct, ExtractConfig(orientation="stored", resize=8))
    planes = embedder.planes(case_of(ct=path))
    assert len(planes) == stored.shape[2]
    for k in range(stored.shape[2]):
        np.testing.assert_allclose(planes.scaled(k)[0], (stored[:, :, k] + 1000) / 2000, atol=1e-6)
    zooms = nib.load(path).header.get_zooms()
    assert planes.spacing == pytest.approx((zooms[0], zooms[1]))
    assert planes.prepared is not None
    back = planes.prepared.restore.restore(planes.stored_SNHW[0])
    np.testing.assert_array_equal(back.array.T, stored)
    np.testing.assert_allclose(back.affine, nib.load(path).affine)
    axial = Embedder(head_ct, ExtractConfig(resize=8)).embed(case_of(ct=path))
    assert len(axial.indices_N) == ras.shape[2]
    assert embedder.settings["orientation"] == "stored"


def test_m12_slope_and_intercept_count_and_the_first_volume_is_taken_and_told(
    head_ct: Backbone, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    raw = np.random.default_rng(0).integers(0, 1000, (10, 8, 6, 3)).astype(np.int16)
    image = nib.Nifti1Image(raw, np.eye(4))
    image.header.set_slope_inter(2, -1024)
    nib.save(image, tmp_path / "a.nii.gz")
    assert np.asarray(nib.load(tmp_path / "a.nii.gz").dataobj).max() > 900  # nibabel applies both
    hu = 2.0 * raw[..., 0] - 1024
    embedder = Embedder(head_ct, ExtractConfig())
    case = case_of(ct=tmp_path / "a.nii.gz")
    with caplog.at_level(logging.WARNING):
        planes = embedder.planes(case)
    assert "holds 3 volumes: the first is taken" in caplog.text
    for z in range(6):
        np.testing.assert_allclose(planes.scaled(z)[0], np.clip((hu[:, :, z].T + 1000) / 2000, 0, 1), atol=1e-6)
    one_volume = nib.Nifti1Image(hu.astype(np.float32), np.eye(4))
    nib.save(one_volume, tmp_path / "b.nii.gz")
    alone = embedder.embed(case_of(ct=tmp_path / "b.nii.gz"))
    np.testing.assert_array_equal(embedder.embed(case).slices_ND, alone.slices_ND)
    second = replace(case, sequences={"ct": Sequence("ct", tmp_path / "a.nii.gz", 1)})
    assert np.abs(embedder.embed(second).slices_ND - alone.slices_ND).max() > 1e-4


class Deep:
    """As many slices as said."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count


@pytest.mark.parametrize(
    ("count", "keys", "wanted"),
    [
        (100, {"max_slices": 10}, [0, 11, 22, 33, 44, 55, 66, 77, 88, 99]),
        (100, {"max_slices": 10, "slice_selection": "first"}, list(range(10))),
        (10, {"stride": 3}, [0, 3, 6, 9]),
        (10, {"stride": 3, "max_slices": 2}, [0, 9]),
        (10, {"stride": 3, "max_slices": 4}, [0, 3, 6, 9]),
        (9, {"max_slices": 1}, [4]),
        (1, {"stride": 5, "max_slices": 3}, [0]),
    ],
)
def test_m13_limited_slices_span_the_volume(count: int, keys: dict[str, Any], wanted: list[int], one: Backbone) -> None:
    planes: Any = Deep(count)
    found = Embedder(one, ExtractConfig(**keys)).indices(planes)
    assert found.tolist() == wanted
    assert found.dtype == np.int32


def test_m14_a_size_that_patches_do_not_divide_is_refused(one: Backbone) -> None:
    with pytest.raises(ConfigError, match="does not fit") as caught:
        Embedder(one, ExtractConfig(resize=225, layers=3))
    assert "resize=225" in caught.value.where
    assert "layers=3, the network has 2 blocks" in caught.value.where
    assert "resize=224 or 232" in caught.value.fix


def test_m15_clipping_comes_before_scaling_and_worked_values_hold(head_ct: Backbone, tmp_path: Path) -> None:
    """-1000 -> -5.983, 0 -> -.3657, 1000 -> 5.2517; what lies outside is as the end of the window."""
    values = np.array([-2000, -1000, 0, 1000, 3000], np.int16)
    nib.save(nib.Nifti1Image(np.tile(values[:, None, None], (1, 8, 3)), np.eye(4)), tmp_path / "a.nii.gz")
    embedder = Embedder(head_ct, ExtractConfig())
    planes = embedder.planes(case_of(ct=tmp_path / "a.nii.gz"))
    stored = torch.from_numpy(planes.batch(np.array([0])))
    normal = (stored - head_ct.mean) / head_ct.std
    np.testing.assert_allclose(normal[0, 0, 0], [-5.983, -5.983, -0.3657, 5.2517, 5.2517], atol=1e-3)
    # the same on the way into the network, where 16 x 16 blocks of one value keep it
    big = np.kron(values[:, None], np.ones((16, 32)))[:, :, None].repeat(2, 2)
    nib.save(nib.Nifti1Image(big.astype(np.int16), np.eye(4)), tmp_path / "b.nii.gz")
    square = Embedder(head_ct, ExtractConfig(resize=80))
    seen = square.network_input(square.planes(case_of(ct=tmp_path / "b.nii.gz")), np.array([0]))
    np.testing.assert_allclose(seen[0, 0, 40, 8::16], [-5.983, -5.983, -0.3657, 5.2517, 5.2517], atol=1e-3)


# --- which sequences count -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [("cls",), ("mean",), ("cls", "mean")])
def test_hidden_sequences_are_as_if_they_were_absent(tokens: Any, three: Backbone, cohort: list[Case]) -> None:
    embedder = Embedder(three, ExtractConfig(tokens=tokens))
    whole = cohort[0]
    without = replace(whole, sequences={name: whole.sequences[name] for name in ("ax_t2wi", "ax_dwi")})
    hidden = embedder.embed(whole, shown=("ax_t2wi", "ax_dwi"))
    absent = embedder.embed(without)
    np.testing.assert_array_equal(hidden.slices_ND, absent.slices_ND)
    assert (hidden.facts.missing, absent.facts.missing) == ((), ("ax_adc",))
    assert np.abs(embedder.embed(whole).slices_ND - absent.slices_ND).max() > 1e-4


def test_the_mean_is_over_the_sequences_that_exist(three: Backbone, cohort: list[Case]) -> None:
    found = Embedder(three, ExtractConfig(tokens=("mean", "patch"))).embed(cohort[1])  # without ADC
    assert found.patches_NShwD is not None
    wanted = found.patches_NShwD[:, [0, 2]].astype(np.float64).mean((1, 2, 3))
    np.testing.assert_allclose(found.slices_ND, wanted, atol=1e-6)


def test_sequences_that_the_model_or_the_case_lacks_are_told(three: Backbone, cohort: list[Case]) -> None:
    embedder = Embedder(three, ExtractConfig())
    for shown in (("ax_t2wi", "ax_adx"), ()):
        with pytest.raises(ConfigError, match="does not have the sequences") as wrong:
            embedder.embed(cohort[0], shown=shown)
        assert "ax_t2wi, ax_adc, ax_dwi" in wrong.value.where
    with pytest.raises(DataError, match="none of the sequences") as lacking:
        embedder.embed(cohort[1], shown=("ax_adc",))
    assert lacking.value.where.startswith("case P1: ")


# --- the cache -------------------------------------------------------------------------------------------------------


def passes(backbone: Backbone, case: Case, cache: Path, shown: tuple[str, ...] | None = None, **keys: Any) -> int:
    embedder = Embedder(backbone, ExtractConfig(**keys), FeatureCache(cache))
    found = embedder.embed(case, shown=shown)
    assert embedder.forward_passes + embedder.cache_hits == len(found.indices_N)
    return embedder.forward_passes


CHANGES: list[dict[str, Any]] = [
    {"tokens": ("mean",)},
    {"tokens": ("cls", "patch")},
    {"layers": 2},
    {"stride": 2},
    {"max_slices": 3},
    {"max_slices": 3, "slice_selection": "first"},
    {"resize": 32},
    {"resize": 40},
    {"resize": 32, "antialias": True},
    {"max_side": 24},
    {"precision": "bf16"},
    {"shown": ("ax_t2wi",)},
]


def test_m16_each_change_is_computed_anew_and_nothing_else(
    three: Backbone, cohort: list[Case], tmp_path: Path, write_run: WriteRun
) -> None:
    case, cache = cohort[0], tmp_path / "cache"
    assert passes(three, case, cache) == 5
    assert passes(three, case, cache) == 0
    assert passes(three, case, cache, batch_size=2) == 0  # decides no number
    for change in CHANGES:
        assert passes(three, case, cache, **change) > 0, change
        assert passes(three, case, cache, **change) == 0, change
    assert passes(three, replace(case, case_id="P9"), cache) == 0  # the content counts, not the name

    def shift(model: Any) -> None:
        model.cls_token.add_(0.01)

    other = write_run(tmp_path / "other", THREE, "student.use_mri_seq_embed=true", edit=shift)
    assert passes(backbone_of(other), case, cache) == 5
    for field, value in {
        "mean": 0.4,
        "std": 0.3,
        "spatial_size": 48,
        "preprocess": three.preprocess.model_copy(update={"percentiles": (2.0, 98.0)}),
        "windows_hu": (),
    }.items():
        expected = 0 if field == "windows_hu" else 5  # equal to what it was
        assert passes(replace(three, **{field: value}), case, cache) == expected, field


def test_m16_the_schema_of_the_code_and_the_architecture_are_in_the_key(
    one: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other code may compute other numbers of the same weights, and so may another architecture of one digest."""
    case, cache = case_of(ax_t2wi=save(tmp_path / "a.nii.gz", noise())), tmp_path / "cache"
    assert passes(one, case, cache) == 5
    other = replace(one, card={**one.card, "arch": f"{one.card['arch']}_of_another_kind"})
    for expected in (5, 0):
        assert passes(other, case, cache) == expected
    with monkeypatch.context() as patch:
        patch.setattr(embedding_config, "SCHEMA", embedding_config.SCHEMA + 1)
        for expected in (5, 0):
            assert passes(one, case, cache) == expected
    assert passes(one, case, cache) == 0  # what was there is still there


def test_m16_the_orientation_is_in_the_key(head_ct: Backbone, tmp_path: Path) -> None:
    case = case_of(ct=save(tmp_path / "a.nii.gz", noise()))
    assert passes(head_ct, case, tmp_path / "cache") == 5
    assert passes(head_ct, case, tmp_path / "cache", orientation="stored") == 5
    assert passes(head_ct, case, tmp_path / "cache", orientation="stored") == 0
    windows = replace(head_ct, windows_hu=(("brain", 0.0, 80.0),))
    assert passes(windows, case, tmp_path / "cache") == 5


@pytest.mark.parametrize("digest", ["content", "fast"])
def test_m16_the_source_is_looked_at_before_the_cache(digest: str, one: Backbone, tmp_path: Path) -> None:
    path, cache = tmp_path / "a.nii.gz", tmp_path / "cache"
    case = case_of(ax_t2wi=save(path, noise()))
    assert passes(one, case, cache, digest=digest) == 5
    save(path, noise(seed=1))
    assert passes(one, case, cache, digest=digest) == 5
    assert passes(one, case, cache, digest=digest) == 0
    path.unlink()
    with pytest.raises(DataError, match="missing") as caught:
        passes(one, case, cache, digest=digest)
    assert caught.value.where.startswith("case P1: ")


def test_m16_copies_with_equal_times_are_no_equal_files_in_fast_mode(one: Backbone, tmp_path: Path) -> None:
    """Uncompressed files of one shape have one size, and an archive may give all of them one time."""
    import os

    cases = [case_of(n, ax_t2wi=save(tmp_path / f"{n}.nii", noise(seed=int(n)))) for n in "12"]
    for case in cases:
        os.utime(case.sequences["ax_t2wi"].path, (1e9, 1e9))
    sizes = {case.sequences["ax_t2wi"].path.stat().st_size for case in cases}
    assert len(sizes) == 1
    assert [passes(one, case, tmp_path / "cache", digest="fast") for case in cases] == [5, 5]


def test_m16_what_the_cache_gives_is_what_was_computed(three: Backbone, cohort: list[Case], tmp_path: Path) -> None:
    config = ExtractConfig(tokens=("cls", "mean", "patch"), layers=2)
    computed = vectors_of(Embedder(three, config, FeatureCache(tmp_path / "cache")), cohort)
    reader = Embedder(three, config, FeatureCache(tmp_path / "cache"))
    for a, b in zip(computed, vectors_of(reader, cohort), strict=True):
        equal(a, b)
    assert (reader.forward_passes, reader.cache_hits) == (0, 18)
    sidecars = "".join(path.read_text() for path in (tmp_path / "cache").rglob("*.json"))
    assert str(tmp_path) not in sidecars
    assert '"P0"' not in sidecars


def test_m17_a_truncated_entry_is_computed_again(
    three: Backbone, cohort: list[Case], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = Embedder(three, ExtractConfig(), FeatureCache(tmp_path / "cache")).embed(cohort[0])
    (entry,) = (tmp_path / "cache").rglob("*.safetensors")
    entry.write_bytes(entry.read_bytes()[:100])
    embedder = Embedder(three, ExtractConfig(), FeatureCache(tmp_path / "cache"))
    with caplog.at_level(logging.WARNING):
        equal(embedder.embed(cohort[0]), wanted)
    assert "damaged" in caplog.text
    assert embedder.forward_passes == 5
    assert passes(three, cohort[0], tmp_path / "cache") == 0


def test_m18_an_id_with_dots_and_slashes_stays_in_the_cache(one: Backbone, tmp_path: Path) -> None:
    case = case_of("../../x", ax_t2wi=save(tmp_path / "in/a.nii.gz", noise()))
    assert passes(one, case, tmp_path / "deep/cache") == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "in"]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["cache"]


def test_r16_a_broken_off_cohort_goes_on_with_the_missing_cases(
    three: Backbone, cohort: list[Case], tmp_path: Path
) -> None:
    undisturbed = vectors_of(Embedder(three, ExtractConfig(batch_size=4)), cohort)
    stream = Embedder(three, ExtractConfig(batch_size=4), FeatureCache(tmp_path / "cache")).embed_many(cohort)
    next(stream)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert FeatureCache(tmp_path / "cache").info().entries == 2
    again = Embedder(three, ExtractConfig(batch_size=4), FeatureCache(tmp_path / "cache"))
    for a, b in zip(vectors_of(again, cohort), undisturbed, strict=True):
        np.testing.assert_allclose(a.slices_ND, b.slices_ND, atol=1e-6)
    assert (again.forward_passes, again.cache_hits) == (8, 10)


def test_planes_that_were_read_already_give_the_same_vectors(three: Backbone, cohort: list[Case]) -> None:
    embedder = Embedder(three, ExtractConfig(tokens=("cls", "patch"), stride=2))
    equal(embedder.embed_planes(cohort[1], embedder.planes(cohort[1])), embedder.embed(cohort[1]))
    assert embedder.forward_passes == 6


# --- pictures --------------------------------------------------------------------------------------------------------


def test_w24_names_that_agree_up_to_the_first_dot_are_two_pictures(pictures: Backbone, tmp_path: Path) -> None:
    cases = [picture_case(tmp_path / name, seed) for seed, name in enumerate(("a.b.png", "a.c.png"))]
    embedder = Embedder(pictures, ExtractConfig(), FeatureCache(tmp_path / "cache"))
    first, second = vectors_of(embedder, cases)
    assert np.abs(first.slices_ND - second.slices_ND).max() > 1e-4
    assert FeatureCache(tmp_path / "cache").info().entries == 2


def test_w21_views_are_drawn_flips_and_the_first_is_none(pictures: Backbone, tmp_path: Path) -> None:
    case = picture_case(tmp_path / "a.png", size=(48, 40))
    pixels = np.asarray(Image.open(tmp_path / "a.png"))
    turned: dict[tuple[int, int], np.ndarray] = {}
    for rows in (1, -1):
        for columns in (1, -1):
            path = tmp_path / f"turned{rows}{columns}.png"
            Image.fromarray(np.ascontiguousarray(pixels[::rows, ::columns])).save(path)
            turned[rows, columns] = Embedder(pictures, ExtractConfig()).embed(case_of(image=path)).slices_ND
    found = [result for _, _, result in Embedder(pictures, ExtractConfig()).embed_many([case], views=12)]
    drawn = set()
    for view, result in enumerate(found):
        assert isinstance(result, CaseVectors)
        distance = {key: np.abs(vector - result.slices_ND).max() for key, vector in turned.items()}
        best = min(distance, key=lambda key: distance[key])
        assert distance[best] < 2e-6
        assert sorted(distance.values())[1] > 1e-4
        assert view or best == (1, 1)
        drawn.add(best)
    assert len(drawn) == 4
    again = [result for _, _, result in Embedder(pictures, ExtractConfig()).embed_many([case], views=12)]
    for a, b in zip(found, again, strict=True):
        assert isinstance(a, CaseVectors)
        assert isinstance(b, CaseVectors)
        equal(a, b)
    alone = Embedder(pictures, ExtractConfig()).embed(case, view=7)
    assert isinstance(found[7], CaseVectors)
    np.testing.assert_allclose(alone.slices_ND, found[7].slices_ND, atol=1e-5)


def test_a_failing_view_is_told_once_after_those_that_the_cache_holds(pictures: Backbone, tmp_path: Path) -> None:
    case, cache = picture_case(tmp_path / "a.png"), FeatureCache(tmp_path / "cache")
    Embedder(pictures, ExtractConfig(), cache).embed(case)

    class Failing(Embedder):
        def planes(self, case: Case) -> Planes:
            raise DataError("No more.", where=case.case_id)

    found = list(Failing(pictures, ExtractConfig(), cache).embed_many([case], views=9))
    assert isinstance(found[0][2], CaseVectors)
    assert [isinstance(result, DataError) for _, _, result in found].count(True) == 1
    assert isinstance(found[-1][2], DataError)
    assert [view for _, view, _ in found] == list(range(len(found)))


def test_views_of_a_volume_are_refused(one: Backbone, tmp_path: Path) -> None:
    case = case_of(ax_t2wi=save(tmp_path / "a.nii.gz", noise()))
    with pytest.raises(ConfigError, match="pictures only") as caught:
        next(Embedder(one, ExtractConfig()).embed_many([case], views=2))
    assert "case P1 is a volume" in caught.value.where


# --- many cases ------------------------------------------------------------------------------------------------------


def test_results_come_in_order_whatever_waits(pictures: Backbone, tmp_path: Path) -> None:
    """One picture of an odd size before forty others: the others are held back only so long."""
    sizes = [(64, 32), *([(32, 32)] * 40), (64, 32)]
    cases = [picture_case(tmp_path / f"{n}.png", n, size) for n, size in enumerate(sizes)]
    embedder = Embedder(pictures, ExtractConfig(batch_size=2))
    order, most = [], 0
    for case, view, result in embedder.embed_many(cases):
        assert isinstance(result, CaseVectors)
        assert view == 0
        order.append(case.case_id)
        most = max(most, embedder.forward_passes - len(order))
    assert order == [case.case_id for case in cases]
    assert most <= 33
    assert embedder.forward_passes == 42


def test_a_bad_case_gives_its_error_in_its_place_and_the_others_go_on(
    three: Backbone, cohort: list[Case], tmp_path: Path
) -> None:
    broken = case_of("bad", ax_t2wi=tmp_path / "bad.nii.gz")
    (tmp_path / "bad.nii.gz").write_bytes(b"no image")
    constant = case_of("flat", ax_t2wi=save(tmp_path / "flat.nii.gz", np.ones((16, 16, 4), np.int16)))
    hole = np.full((16, 16, 4), 5, np.float32)
    hole[3, 4, 2] = np.nan
    hollow = case_of("nan", ax_t2wi=save(tmp_path / "nan.nii.gz", hole))
    absent = case_of("gone", ax_t2wi=tmp_path / "gone.nii.gz")
    found = list(Embedder(three, ExtractConfig()).embed_many([broken, cohort[0], constant, hollow, absent, cohort[1]]))
    assert [(case.case_id, view) for case, view, _ in found] == [
        (n, 0) for n in ("bad", "P0", "flat", "nan", "gone", "P1")
    ]
    codes = [result.code if isinstance(result, MedsslError) else "" for _, _, result in found]
    assert codes == ["nifti_truncated", "", "volume_constant", "voxels_nonfinite", "file_missing", ""]
    for case, _, result in found:
        if isinstance(result, DataError):
            assert result.where.startswith(f"case {case.case_id}: ")
            assert result.fix


def test_features_that_are_no_numbers_are_an_error_of_their_case(
    tmp_path: Path, write_run: WriteRun, cohort: list[Case]
) -> None:
    def spoil(model: Any) -> None:
        model.norm.bias[0] = float("inf")

    backbone = backbone_of(write_run(tmp_path / "run", THREE, edit=spoil))
    cache = FeatureCache(tmp_path / "cache")
    results = [result for _, _, result in Embedder(backbone, ExtractConfig(), cache).embed_many(cohort)]
    assert all(isinstance(result, NonFiniteError) for result in results)
    assert "case P2" in str(results[2])
    assert cache.info().entries == 0


def test_a_bug_while_reading_is_not_lost_in_the_thread(three: Backbone, cohort: list[Case]) -> None:
    class Buggy(Embedder):
        def planes(self, case: Case) -> Planes:
            if case.case_id == "P2":
                raise ZeroDivisionError("a bug")
            return super().planes(case)

    results = Buggy(three, ExtractConfig(batch_size=1)).embed_many(cohort)
    assert [next(results)[0].case_id for _ in range(2)] == ["P0", "P1"]
    with pytest.raises(ZeroDivisionError, match="a bug"):
        next(results)
    assert not readers()


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "read-ahead"]


def test_r18_only_a_few_cases_are_read_ahead_and_leaving_early_ends_the_thread(one: Backbone, tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii.gz", noise())
    cases = [case_of(f"P{n}", ax_t2wi=path) for n in range(50)]

    class Counting(Embedder):
        decoded = 0

        def planes(self, case: Case) -> Planes:
            self.decoded += 1
            return super().planes(case)

    embedder = Counting(one, ExtractConfig(batch_size=5))
    results = embedder.embed_many(cases)
    for taken in range(1, 6):
        next(results)
        threading.Event().wait(0.05)
        assert embedder.decoded <= taken + 4
    results.close()  # type: ignore[attr-defined]
    assert not readers()
    assert embedder.decoded < 12


def test_r18_no_images_are_kept_of_finished_cases(one: Backbone, tmp_path: Path) -> None:
    import weakref

    path = save(tmp_path / "a.nii.gz", noise())
    cases = [case_of(f"P{n}", ax_t2wi=path) for n in range(30)]
    alive: list[weakref.ref[Planes]] = []

    class Watching(Embedder):
        def planes(self, case: Case) -> Planes:
            planes = super().planes(case)
            alive.append(weakref.ref(planes))
            return planes

    most = 0
    for _ in Watching(one, ExtractConfig(batch_size=8)).embed_many(cases):
        most = max(most, sum(ref() is not None for ref in alive))
    assert len(alive) == 30
    assert most <= 5


def test_read_ahead_gives_what_it_is_given() -> None:
    assert list(read_ahead(iter(range(20)), 3)) == list(range(20))
    assert list(read_ahead(iter(()), 1)) == []

    def fails() -> Iterator[int]:
        yield 1
        raise KeyError("late")

    items = read_ahead(fails(), 2)
    assert next(items) == 1
    with pytest.raises(KeyError, match="late"):
        next(items)


# --- settings --------------------------------------------------------------------------------------------------------


def test_settings_are_plain_and_rebuild_the_same_embedder(three: Backbone, cohort: list[Case]) -> None:
    config = ExtractConfig(tokens=("mean", "cls", "patch"), layers=2, resize=32, antialias=True, stride=2, max_slices=2)
    embedder = Embedder(three, config)
    stored = json.loads(json.dumps(embedder.settings, allow_nan=False))
    assert stored == embedder.settings == Embedder(three, config).settings
    rebuilt = embedder_of(stored, three, batch_size=2)
    assert rebuilt.settings == embedder.settings
    assert rebuilt.width == embedder.width == 96
    assert rebuilt.config.tokens == ("cls", "mean")  # patch tokens are no part of the vector
    np.testing.assert_allclose(rebuilt.embed(cohort[0]).slices_ND, embedder.embed(cohort[0]).slices_ND, atol=1e-6)
    for config in (
        ExtractConfig(),
        ExtractConfig(max_side=64, max_slices=4, slice_selection="first", precision="bf16"),
    ):
        settings = Embedder(three, config).settings
        assert embedder_of(settings, three).settings == settings


def test_another_backbone_is_refused_with_the_keys_that_differ(three: Backbone, one: Backbone, tmp_path: Path) -> None:
    settings = Embedder(three, ExtractConfig(resize=32)).settings
    with pytest.raises(CheckpointError, match="not the one") as caught:
        embedder_of(settings, one)
    assert "weights_sha256" in caught.value.where
    assert "sequences (there ['ax_t2wi', 'ax_adc', 'ax_dwi'], here ['ax_t2wi'])" in caught.value.where
    assert caught.value.exit_code == 7
    changed = {
        "mean": replace(three, mean=0.125),
        "preprocess.window_hu": replace(
            three, preprocess=three.preprocess.model_copy(update={"window_hu": (-100.0, 200.0)})
        ),
        "windows_hu": replace(three, windows_hu=(("brain", 0.0, 80.0),)),
    }
    for key, backbone in changed.items():
        with pytest.raises(CheckpointError, match="not the one") as caught:
            embedder_of(settings, backbone)
        assert key in caught.value.where
        assert "weights_sha256" not in caught.value.where
    for strange in ({**settings, "schema": 99}, {**settings, "layers": "x"}, {**settings, "new": 1}):
        with pytest.raises(CheckpointError, match="cannot be followed"):
            embedder_of(strange, three)
    with pytest.raises(CheckpointError, match="not the one"):
        embedder_of({}, three)


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"layers": 2, "tokens": ("mean",)}, "layers counts for the cls token"),
        ({"antialias": True}, "antialias counts for resize"),
        ({"max_side": 64, "resize": 32}, "max_side counts without resize"),
        ({"slice_selection": "first"}, "slice_selection counts for max_slices"),
        ({"tokens": ()}, "one or more different tokens"),
        ({"tokens": ("cls", "cls")}, "one or more different tokens"),
        ({"tokens": "cls,head"}, "tokens"),
    ],
)
def test_keys_without_effect_are_refused(keys: dict[str, Any], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        ExtractConfig(**keys)


def test_tokens_are_read_from_text_and_put_in_order() -> None:
    assert ExtractConfig.model_validate({"tokens": "patch, mean,cls"}).tokens == ("cls", "mean", "patch")
    assert ExtractConfig.model_validate(ExtractConfig(tokens=("mean",)).model_dump(mode="json")).tokens == ("mean",)


def test_a_convolutional_network_has_its_last_stage_alone(tmp_path: Path, write_run: WriteRun) -> None:
    import transformers as hf

    from medssl_cli.services.convert_weights import WeightsRequest, convert_weights

    smaller: dict[str, Any] = {"layer_scale_init_value": 0.5, "layer_norm_eps": 1e-6}
    config = hf.ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], **smaller)
    torch.manual_seed(0)
    theirs = hf.ConvNextModel(config).eval()
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    convert_weights(WeightsRequest(tmp_path / "weights.pth", tmp_path / "out"))
    backbone = backbone_of(tmp_path / "out")
    with pytest.raises(ConfigError, match="does not fit") as caught:
        Embedder(backbone, ExtractConfig(layers=2, resize=50))
    assert "one last stage" in caught.value.where
    assert "resize=32 or 64" in caught.value.fix
    case = picture_case(tmp_path / "a.png", size=(64, 64))
    embedder = Embedder(backbone, ExtractConfig(resize=64))
    planes = embedder.planes(case)
    with torch.no_grad():
        wanted = theirs(embedder.network_input(planes, np.array([0]))).pooler_output
    np.testing.assert_allclose(embedder.embed(case).slices_ND, wanted, atol=1e-5)


def test_several_sequences_have_no_stored_orientation(three: Backbone) -> None:
    with pytest.raises(ConfigError, match="does not fit") as caught:
        Embedder(three, ExtractConfig(orientation="stored"))
    assert "3 sequences" in caught.value.where


def test_bf16_is_near_fp32(three: Backbone, cohort: list[Case]) -> None:
    full = Embedder(three, ExtractConfig()).embed(cohort[0]).slices_ND
    half = Embedder(three, ExtractConfig(precision="bf16")).embed(cohort[0]).slices_ND
    assert half.dtype == np.float32
    assert 0 < np.abs(half - full).max() < 0.05


# --- facts and pooling -----------------------------------------------------------------------------------------------


def test_facts_are_those_of_the_files(three: Backbone, tmp_path: Path) -> None:
    """Stored sagittally; percentiles as NumPy takes them of what nibabel reads."""
    paths = {name: save(tmp_path / f"{name}.nii.gz", noise((20, 16, 6), n), "PSR") for n, name in enumerate(THREE[:2])}
    facts = Embedder(three, ExtractConfig()).embed(case_of(**paths)).facts
    image = nib.load(paths["ax_t2wi"])
    assert facts.spacing_mm == pytest.approx(image.header.get_zooms()[::-1])
    assert facts.shape == image.shape[::-1]
    assert facts.missing == ("ax_dwi",)
    assert facts.intensity.keys() == set(paths)
    for name, path in paths.items():
        wanted = np.percentile(nib.load(path).get_fdata(), (1, 50, 99))
        np.testing.assert_allclose(facts.intensity[name], wanted)


def test_facts_of_a_picture(pictures: Backbone, tmp_path: Path) -> None:
    facts = Embedder(pictures, ExtractConfig()).embed(picture_case(tmp_path / "a.png", size=(48, 40))).facts
    wanted = np.percentile(np.asarray(Image.open(tmp_path / "a.png")), (1, 50, 99))
    assert (facts.spacing_mm, facts.shape, facts.missing) == (None, (1, 48, 40), ())
    np.testing.assert_allclose(facts.intensity["image"], wanted)


def test_pooling_by_hand() -> None:
    slices = np.array([[1, 5], [2, -1], [6, 2]], np.float32)
    assert pooled(slices, "mean").tolist() == [3, 2]
    assert pooled(slices, "meanmax").tolist() == [3, 2, 6, 5]
    assert pooled(slices, "meanmax").dtype == np.float32


def test_the_key_holds_every_setting_and_every_source(three: Backbone, cohort: list[Case], tmp_path: Path) -> None:
    embedder = Embedder(three, ExtractConfig(), FeatureCache(tmp_path / "cache"))
    embedder.embed(cohort[0])
    (sidecar,) = (tmp_path / "cache").rglob("*.json")
    fields = json.loads(sidecar.read_text())["fields"]
    assert fields["settings"] == embedder.settings
    assert fields["sources"].keys() == set(THREE)
    assert digest_of(fields) == sidecar.stem
