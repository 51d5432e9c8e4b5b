"""``medssl extract`` as it is typed: files, keys, lines and exit codes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from medssl_cli.core.config import load_config
from medssl_cli.core.volume import Volume
from medssl_cli.services.embedding_config import ExtractConfig
from medssl_cli.services.extract_case import similarity_map

Medssl = Callable[..., Any]
GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
SUMMARY_KEYS = (
    *("input", "output_dir", "num_slices", "stride", "resize", "embedding_dim", "elapsed_s", "gpu_mem_mb"),
    *("cpu_rss_mb", "similarity_map", "similarity_slice_index", "similarity_map_png"),
)
HEADER_KEYS = ("schema_version", "medssl_version", "command", "started_at", "elapsed_s")
CASE_FILES = (
    *("embedding_mean.npy", "similarity_map.npy", "similarity_map.png", "slice_embeddings.npy"),
    *("slice_indices.npy", "summary.json"),
)


def no_constant(name: str) -> float:
    raise AssertionError(f"{name} is no JSON")


def strict(text: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(text, parse_constant=no_constant)
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, write_run: Callable[..., Path]) -> Path:
    return write_run(tmp_path_factory.mktemp("model") / "prostate")


@pytest.fixture(scope="module")
def ct_run(tmp_path_factory: pytest.TempPathFactory, write_run: Callable[..., Path]) -> Path:
    return write_run(tmp_path_factory.mktemp("model") / "ct", ("ax_ct",))


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory: pytest.TempPathFactory, write_run: Callable[..., Path]) -> Path:
    return write_run(tmp_path_factory.mktemp("model") / "plain", None)


@pytest.fixture(scope="module")
def ct(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve slices of 40 x 24 voxels."""
    path = tmp_path_factory.mktemp("ct") / "head.nii.gz"
    voxels = np.random.default_rng(0).integers(-1000, 1000, (40, 24, 12)).astype(np.int16)
    nib.save(nib.Nifti1Image(voxels, np.diag([1.0, 1, 5, 1])), path)
    return path


@pytest.fixture
def extract(medssl: Medssl, tmp_path: Path) -> Medssl:
    """The command on the CPU with a cache and an output folder of this test."""

    def call(*words: object, out: str = "out") -> Any:
        return medssl("extract", *words, "--out", tmp_path / out, "--device", "cpu", "--cache", tmp_path / "cache")

    return call


# --- one case --------------------------------------------------------------------------------------------------------


def test_one_volume_gives_every_file_with_its_shape(extract: Medssl, ct: Path, ct_run: Path, tmp_path: Path) -> None:
    answer = extract(ct, "--model", ct_run, "--config", "ich", "resize=48")
    assert answer.exit_code == 0, answer.stderr
    assert "head: 12 slices, 32 numbers each" in answer.stdout
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir() if not path.name.startswith(".")) == list(CASE_FILES)
    slices, indices = np.load(out / "slice_embeddings.npy"), np.load(out / "slice_indices.npy")
    assert (slices.shape, slices.dtype) == ((12, 32), np.float32)
    assert (indices.tolist(), indices.dtype) == (list(range(12)), np.int32)
    np.testing.assert_allclose(np.load(out / "embedding_mean.npy"), slices.astype(np.float64).mean(0), atol=1e-6)
    similarity = np.load(out / "similarity_map.npy")
    assert (similarity.shape, similarity.dtype) == ((6, 6), np.float32)
    assert similarity[3, 3] == 1
    with Image.open(out / "similarity_map.png") as picture:
        assert picture.mode == "RGB"
    summary = strict((out / "summary.json").read_text(encoding="utf-8"))
    assert all(key in summary for key in (*SUMMARY_KEYS, *HEADER_KEYS))
    assert summary["similarity_slice_index"] == 6
    assert summary["resize"] == [48, 48]
    assert summary["orientation"] == "ras-axial"
    assert len(summary["model_sha256"]) == 64
    assert summary["gpu_mem_mb"] is None
    assert summary["null_reasons"]["gpu_mem_mb"]
    assert "research use only" in summary["note"]


def test_the_similarity_map_is_never_called_a_lesion_map(
    extract: Medssl, ct: Path, ct_run: Path, tmp_path: Path
) -> None:
    answer = extract(ct, "--model", ct_run)
    text = answer.stdout + answer.stderr + (tmp_path / "out" / "summary.json").read_text(encoding="utf-8")
    assert "no map of lesions" in text
    assert "lesion map" not in text.lower()
    assert not [path for path in (tmp_path / "out").iterdir() if "lesion" in path.name]


def test_m27_the_map_is_one_where_an_equal_token_was_planted(rng: np.random.Generator) -> None:
    patches = rng.standard_normal((1, 4, 5, 16)).astype(np.float32)
    patches[0, 1, 2] = 3 * patches[0, 2, 3]
    found = similarity_map(patches, np.array([True]), (2, 3))
    assert {(int(i), int(j)) for i, j in np.argwhere(found == 1)} == {(1, 2), (2, 3)}
    for i in range(4):
        for j in range(5):
            a, b = patches[0, i, j].astype(np.float64), patches[0, 2, 3].astype(np.float64)
            assert found[i, j] == pytest.approx(a @ b / np.sqrt((a @ a) * (b @ b)), abs=1e-6)


def test_m27_a_missing_sequence_does_not_count_in_the_map(rng: np.random.Generator) -> None:
    patches = rng.standard_normal((2, 3, 3, 8)).astype(np.float32)
    both = similarity_map(patches, np.array([True, True]), (0, 1))
    first = similarity_map(patches, np.array([True, False]), (0, 1))
    np.testing.assert_array_equal(first, similarity_map(patches[:1], np.array([True]), (0, 1)))
    assert np.abs(both - first).max() > 0.01


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_m27_slice_and_patch_of_the_map_are_those_asked_for(
    extract: Medssl, ct: Path, ct_run: Path, tmp_path: Path
) -> None:
    from medssl_cli.core.case import Case, Sequence
    from medssl_cli.services.backbone import open_backbone
    from medssl_cli.services.embedding import Embedder
    from medssl_cli.services.lookup import find_model

    answer = extract(ct, "--model", ct_run, "sim_slice=2", "sim_patch=1,0", "resize=32")
    assert answer.exit_code == 0, answer.stderr
    found = np.load(tmp_path / "out" / "similarity_map.npy")
    embedder = Embedder(open_backbone(find_model(ct_run), torch.device("cpu")), ExtractConfig(resize=32))
    case = Case("head", "head", {"ax_ct": Sequence("ax_ct", ct)})
    tokens = embedder.patch_tokens(embedder.planes(case), np.array([2]))[0, 0].astype(np.float64)
    unit = tokens / np.linalg.norm(tokens, axis=-1, keepdims=True)
    np.testing.assert_allclose(found, unit @ unit[1, 0], atol=1e-5)
    answer = extract(ct, "--model", ct_run, "sim_slice=-1", "sim_patch=center", "resize=32", "--json")
    facts = strict(answer.stdout)
    assert (facts["similarity_slice_index"], facts["similarity_reference_patch"]) == (6, [2, 2])


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("sim_patch=middle",), 2),
        (("sim_patch=1",), 2),
        (("sim_patch=1,2,3",), 2),
        (("sim_slice=-2",), 2),
        (("sim_slice=12",), 3),
        (("resize=32", "sim_patch=4,0"), 3),
        (("resize=33",), 2),
        (("--tokens", "cls,colour"), 2),
        (("resiz=32",), 2),
    ],
)
def test_malformed_or_outside_is_an_error(
    extract: Medssl, ct: Path, ct_run: Path, tmp_path: Path, words: tuple[str, ...], code: int
) -> None:
    answer = extract(ct, "--model", ct_run, *words)
    assert answer.exit_code == code, answer.stderr
    assert "fix:" in answer.stderr
    assert not (tmp_path / "out" / "summary.json").exists()


def test_a_second_look_at_one_case_computes_nothing(extract: Medssl, ct: Path, ct_run: Path, tmp_path: Path) -> None:
    assert "13 forward passes, 0 slices from the cache" in extract(ct, "--model", ct_run).stdout
    first = {name: (tmp_path / "out" / name).read_bytes() for name in CASE_FILES[:-1]}
    assert "0 forward passes, 12 slices from the cache" in extract(ct, "--model", ct_run).stdout
    assert first == {name: (tmp_path / "out" / name).read_bytes() for name in CASE_FILES[:-1]}


def test_patch_tokens_of_a_case_folder_keep_their_axes(
    extract: Medssl, prostate_tree: Path, run: Path, tmp_path: Path
) -> None:
    answer = extract(prostate_tree / "PT-0000", "--model", run, "--tokens", "patch,mean,cls", "max_slices=3")
    assert answer.exit_code == 0, answer.stderr
    tokens = np.load(tmp_path / "out" / "patch_tokens.npy")
    assert tokens.shape == (3, 3, 12, 12, 32)
    slices = np.load(tmp_path / "out" / "slice_embeddings.npy")
    np.testing.assert_allclose(slices[:, 32:], tokens.mean((1, 2, 3)), atol=1e-5)
    assert np.load(tmp_path / "out" / "slice_indices.npy").tolist() == [0, 6, 11]


def test_a_picture_and_a_dicom_folder_are_one_case(
    extract: Medssl, write_dicom: Callable[..., Volume], run: Path, plain_run: Path, tmp_path: Path
) -> None:
    colours = np.random.default_rng(0).integers(0, 255, (40, 32, 3), dtype=np.uint8)
    Image.fromarray(colours).save(tmp_path / "eye.png")
    answer = extract(tmp_path / "eye.png", "--model", plain_run, out="eye")
    assert answer.exit_code == 0, answer.stderr
    assert np.load(tmp_path / "eye" / "slice_embeddings.npy").shape == (1, 32)
    write_dicom(tmp_path / "study" / "series", size=(24, 24))
    for place, name in ((tmp_path / "study", "a"), (tmp_path / "study" / "series", "b")):
        answer = extract(place, "--model", run, out=name)
        assert answer.exit_code == 0, answer.stderr
        assert np.load(tmp_path / name / "slice_embeddings.npy").shape == (6, 32)
    assert "0 forward passes" in answer.stdout
    assert "PAT-1" not in (tmp_path / "b" / "summary.json").read_text(encoding="utf-8")


def test_options_of_a_cohort_are_refused_for_one_case(extract: Medssl, ct: Path, ct_run: Path, tmp_path: Path) -> None:
    for words in (("--pool", "none"), ("--target", "y"), ("--splits", tmp_path), ("views=2",), ("--on-error", "skip")):
        answer = extract(ct, "--model", ct_run, *words)
        assert answer.exit_code == 2
        assert "no effect on a single case" in answer.stderr


# --- a cohort --------------------------------------------------------------------------------------------------------


def test_a_tree_in_json_and_in_lines(extract: Medssl, prostate_tree: Path, run: Path, tmp_path: Path) -> None:
    answer = extract(prostate_tree, "--model", run, "--target", "label", "--json")
    assert answer.exit_code == 0, answer.stderr
    facts = strict(answer.stdout)
    assert facts["command"] == "extract"
    assert facts["forward_passes"] == 72
    on_disk = strict((tmp_path / "out" / "features" / "features.json").read_text(encoding="utf-8"))
    assert on_disk == facts
    answer = extract(prostate_tree, "--model", run, "--target", "label")
    assert "all: 6 cases of 5 patients, 6 rows of 32 numbers" in answer.stdout
    assert "label: 0 3, 1 3" in answer.stdout
    assert "0 forward passes, 72 slices from the cache" in answer.stdout
    assert f"written to {tmp_path / 'out' / 'features'}" in answer.stdout


def test_a_case_replaces_a_cohort_and_the_other_way_round(
    extract: Medssl, prostate_tree: Path, run: Path, tmp_path: Path
) -> None:
    def names() -> list[str]:
        return sorted(path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith("."))

    extract(prostate_tree, "--model", run, "stride=6")
    assert names() == ["features"]
    extract(prostate_tree / "PT-0000", "--model", run, "stride=6")
    assert names() == list(CASE_FILES)
    extract(prostate_tree, "--model", run, "stride=6")
    assert names() == ["features"]


def test_similarity_keys_are_refused_for_a_cohort(extract: Medssl, prostate_tree: Path, run: Path) -> None:
    answer = extract(prostate_tree, "--model", run, "sim_slice=2")
    assert answer.exit_code == 2
    assert "sim_slice" in answer.stderr


def test_a_skipped_case_ends_with_four_and_is_listed(extract: Medssl, ct: Path, ct_run: Path, tmp_path: Path) -> None:
    table = ct.parent / "t.csv"
    table.write_text("series_uid,nifti_path\na,head.nii.gz\nb,gone.nii.gz\n", encoding="utf-8")
    answer = extract(table, "--model", ct_run)
    assert answer.exit_code == 3
    for words in (("--on-error", "skip"), ("--skip-invalid-nifti",)):
        answer = extract(table, "--model", ct_run, *words)
        assert answer.exit_code == 4, answer.stderr
        assert "all: 1 case" in answer.stdout
        assert "gone.nii.gz" in (tmp_path / "out" / "failures.csv").read_text(encoding="utf-8")
    table.write_text("series_uid,nifti_path\na,head.nii.gz\n", encoding="utf-8")
    assert extract(table, "--model", ct_run).exit_code == 0
    assert not (tmp_path / "out" / "failures.csv").exists()


def test_a_folder_with_other_things_is_not_touched(extract: Medssl, ct: Path, ct_run: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine", encoding="utf-8")
    answer = extract(ct, "--model", ct_run)
    assert answer.exit_code == 2
    assert "--overwrite" in answer.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["thesis.txt"]
    assert extract(ct, "--model", ct_run, "--overwrite").exit_code == 0
    assert not (tmp_path / "out" / "thesis.txt").exists()


# --- usage -----------------------------------------------------------------------------------------------------------


def test_what_is_missing_is_said(medssl: Medssl, extract: Medssl, ct: Path, ct_run: Path, tmp_path: Path) -> None:
    assert medssl("extract", "--out", tmp_path / "o").exit_code == 2
    answer = medssl("extract", ct)
    assert answer.exit_code == 2
    assert "--out" in answer.stderr
    answer = extract(ct, ct.parent, "--model", ct_run)
    assert answer.exit_code == 2
    assert "one input at a time" in answer.stderr
    answer = extract(tmp_path / "nothing", "--model", ct_run)
    assert answer.exit_code == 3
    assert "does not exist" in answer.stderr


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(("--device", "cuda:9"), marks=pytest.mark.skipif(GPUS > 9, reason="there are ten GPUs")),
        pytest.param(("--device", "cuda"), marks=pytest.mark.skipif(GPUS > 0, reason="there is a GPU")),
        pytest.param(
            ("--gpus", "2", "--device", "cuda"), marks=pytest.mark.skipif(GPUS > 1, reason="there are two GPUs")
        ),
    ],
    ids=" ".join,
)
def test_m29_an_absent_device_is_an_error(
    words: tuple[str, ...], medssl: Medssl, ct: Path, ct_run: Path, tmp_path: Path
) -> None:
    answer = medssl("extract", ct, "--model", ct_run, "--out", tmp_path / "out", *words)
    assert answer.exit_code == 6, answer.stderr
    assert not (tmp_path / "out").exists()


def test_a_bad_key_is_told_before_processes_start(extract: Medssl, ct: Path, ct_run: Path) -> None:
    answer = extract(ct, "--model", ct_run, "--gpus", "2", "resize=7.5")
    assert answer.exit_code == 2
    assert "resize" in answer.stderr


def test_recipes_are_listed(medssl: Medssl) -> None:
    answer = medssl("extract", "--list-configs")
    assert answer.exit_code == 0
    assert answer.stdout.startswith("ich  Head CT")
    config = load_config(ExtractConfig, "ich", recipes="extract")
    assert (config.tokens, config.resize, config.antialias) == (("cls",), 224, False)
    assert (config.stride, config.max_slices, config.orientation, config.batch_size) == (1, 0, "ras-axial", 8)


def test_the_cache_is_told_and_emptied(medssl: Medssl, extract: Medssl, ct: Path, ct_run: Path, tmp_path: Path) -> None:
    extract(ct, "--model", ct_run)
    cache = ("--cache", tmp_path / "cache")
    answer = medssl("extract", "--cache-info", *cache)
    assert "2 entries" in answer.stdout  # the vectors, and the slice of the similarity map
    facts = strict(medssl("extract", "--cache-info", *cache, "--json").stdout)
    assert facts["entries"] == 2
    sha256 = json.loads((ct_run / "export" / "teacher_backbone.json").read_text(encoding="utf-8"))["sha256"]
    assert facts["models"][sha256]["entries"] == 2
    kept = medssl("extract", "--cache-prune", "--older-than", "1", *cache)
    assert "0 entries removed" in kept.stdout
    assert "2 entries removed" in medssl("extract", "--cache-prune", "--model", ct_run, *cache).stdout
    assert "0 entries" in medssl("extract", "--cache-info", *cache).stdout
    assert "13 forward passes" in extract(ct, "--model", ct_run).stdout


def test_options_without_effect_on_the_cache_are_refused(medssl: Medssl, tmp_path: Path) -> None:
    cache, out = ("--cache", tmp_path / "cache"), ("--out", tmp_path / "out")
    for words, told in (
        (("x.nii", *out, "--older-than", 0), "--older-than has no effect without --cache-prune"),
        (("--cache-info", "--older-than", 3), "--older-than would"),
        (("--cache-info", "--model", tmp_path), "--model would"),
        (("--cache-info", "--cache-prune"), "--cache-prune would"),
        (("--cache-prune", "x.nii", *out), "--out, INPUT and KEY=VALUE would"),
    ):
        answer = medssl("extract", *words, *cache)
        assert answer.exit_code == 2, words
        assert told in answer.stderr
    assert not (tmp_path / "cache").exists()


def test_the_cache_of_the_environment_is_used_where_none_is_typed(
    medssl: Medssl, ct: Path, ct_run: Path, tmp_path: Path
) -> None:
    env = {"MEDSSL_CACHE": str(tmp_path / "env")}
    words = ("extract", ct, "--model", ct_run, "--out", tmp_path / "out", "--device", "cpu")
    assert medssl(*words, env=env).exit_code == 0
    assert "2 entries" in medssl("extract", "--cache-info", env=env).stdout
    assert "0 entries" in medssl("extract", "--cache-info", "--cache", tmp_path / "typed", env=env).stdout
