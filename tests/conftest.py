"""Shared phantoms, and where the real images are."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from medssl_cli.core.volume import Volume

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real images, ``MEDSSL_TEST_DATA``; the test is skipped visibly without it."""
    folder = Path(os.environ.get("MEDSSL_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real images: {folder} is missing; set MEDSSL_TEST_DATA")
    return folder


@pytest.fixture
def ball() -> Volume:
    """A ball of radius 8 mm at RAS (3, -4, 6) mm in noise, on an oblique-free LAS grid of 0.8 x 0.9 x 3 mm."""
    rng = np.random.default_rng(0)
    affine = np.array([[-0.8, 0, 0, 30.0], [0, 0.9, 0, -40.0], [0, 0, 3.0, -30.0], [0, 0, 0, 1]])
    z, y, x = np.meshgrid(np.arange(20), np.arange(80), np.arange(70), indexing="ij")
    world = np.einsum("ij,j...->i...", affine, np.stack([x, y, z, np.ones_like(x)]))[:3]
    inside = ((world - np.array([3.0, -4.0, 6.0]).reshape(3, 1, 1, 1)) ** 2).sum(0) < 64
    return Volume((100 + 10 * rng.standard_normal(x.shape) + 400 * inside).astype(np.int16), affine)


TINY_RECIPE = """\
# A backbone of width 32 on slices of 32 pixels.
data: {spatial_size: 32, random_slices: true}
train:
  {batch_size_per_gpu: 2, OFFICIAL_EPOCH_LENGTH: 4, img_size: 32, num_workers: 0, log_period_iterations: 1,
   saveckp_freq: 1}
student:
  {arch: vit_tiny, embed_dim: 32, depth: 2, num_heads: 2, patch_size: 8, drop_path_rate: 0.1, layerscale: 0.1,
   use_mri_seq_embed: true}
dino: {head_n_prototypes: 64, head_hidden_dim: 32, head_bottleneck_dim: 16}
ibot: {head_n_prototypes: 64, mask_per_channel: true}
crops:
  {global_crops_size: 32, local_crops_size: 16, local_crops_number: 2, global_crops_scale: [0.5, 1.0],
   local_crops_scale: [0.2, 0.5], crop_from_tumor_foreground: true}
optim: {epochs: 2, warmup_epochs: 1, base_lr: 0.01, freeze_last_layer_epochs: 0}
"""


@pytest.fixture(scope="session")
def prostate_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six small prostate phantoms of five patients, the third without ADC; not to be changed."""
    from medssl_cli.services.phantom import make_phantom

    root = tmp_path_factory.mktemp("phantoms") / "prostate"
    make_phantom("prostate", root, cases=6, seed=0, size="small")
    return root


@pytest.fixture(scope="session")
def prepared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all tests, so that phantoms are prepared once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def tiny_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretraining of eight steps, a fraction of a second on one core."""
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(TINY_RECIPE, encoding="utf-8")
    return path


@pytest.fixture
def medssl() -> Iterator[Callable[..., Any]]:
    """The program in this process: ``medssl("pretrain", "--smoke")`` gives exit code, stdout and stderr."""
    from medssl_cli.app import app

    root = logging.getLogger()
    before = (root.level, list(root.handlers))

    def run(*words: object, env: dict[str, str] | None = None) -> Any:
        return CliRunner().invoke(app, [str(word) for word in words], env=env)

    yield run
    root.setLevel(before[0])
    root.handlers[:] = before[1]


@pytest.fixture
def write_dicom() -> Callable[..., Volume]:
    """A function that writes a small DICOM series and returns the volume it must become."""
    return write_dicom_series


def write_dicom_series(
    folder: Path,
    *,
    n_slices: int = 6,
    size: tuple[int, int] = (8, 10),
    spacing: tuple[float, float, float] = (3.0, 0.8, 0.7),
    orientation: tuple[float, ...] = (1, 0, 0, 0, 1, 0),
    origin: tuple[float, float, float] = (-3.0, 5.0, -10.0),
    name: str = "im",
    first_instance: int = 1,
    seed: int = 0,
    per_slice: Callable[[int], dict[str, Any]] | None = None,
    **tags: Any,
) -> Volume:
    """Write one classic MR series; ``tags`` and ``per_slice(k)`` are DICOM keywords, None leaves a tag out.

    Returns:
        Its volume, built from the definition of the DICOM tags: (Z, Y, X), spacing (z, y, x) in mm, RAS+.
    """
    import pydicom
    from pydicom.dataset import FileDataset, FileMetaDataset

    row, column = np.array(orientation[:3], float), np.array(orientation[3:], float)
    normal = np.cross(row, column)
    array = np.random.default_rng(seed).integers(0, 2000, (n_slices, *size)).astype(np.uint16)
    defaults: dict[str, Any] = {
        "SOPClassUID": "1.2.840.10008.5.1.4.1.1.4",
        "PatientName": "Doe^Jane",
        "PatientID": "PAT-1",
        "PatientBirthDate": "19500102",
        "StudyDate": "20200304",
        "StudyTime": "101112",
        "StudyInstanceUID": "1.2.3.4",
        "SeriesInstanceUID": f"1.2.3.4.{seed}",
        "SeriesNumber": 5,
        "SeriesDescription": "t2_tse_tra",
        "Modality": "MR",
        "Manufacturer": "ACME",
        "ImageType": ["ORIGINAL", "PRIMARY", "M"],
        "AcquisitionNumber": 1,
        "EchoTime": 100.0,
        "RepetitionTime": 4000.0,
        "SliceThickness": spacing[0],
        "PixelSpacing": [spacing[1], spacing[2]],
        "ImageOrientationPatient": list(orientation),
        "Rows": size[0],
        "Columns": size[1],
        "BitsAllocated": 16,
        "BitsStored": 12,
        "HighBit": 11,
        "PixelRepresentation": 0,
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
    }
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(n_slices):
        meta = FileMetaDataset()
        meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        values = {
            **defaults,
            "InstanceNumber": first_instance + k,
            "ImagePositionPatient": [round(float(v), 6) for v in np.array(origin) + k * spacing[0] * normal],
            "PixelData": array[k].tobytes(),
            **tags,
            **(per_slice(k) if per_slice else {}),
        }
        values.setdefault("SOPInstanceUID", f"{values['SeriesInstanceUID']}.{values['InstanceNumber']}")
        meta.MediaStorageSOPClassUID = values["SOPClassUID"]
        meta.MediaStorageSOPInstanceUID = values["SOPInstanceUID"]
        image = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
        for keyword, value in values.items():
            if value is not None:
                setattr(image, keyword, value)
        image.save_as(folder / f"{name}{first_instance + k:03d}.dcm", enforce_file_format=True)
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1], affine[:3, 2] = row * spacing[2], column * spacing[1], normal * spacing[0]
    affine[:3, 3] = origin
    return Volume(array, np.diag([-1.0, -1, 1, 1]) @ affine)


@pytest.fixture(scope="session")
def write_run() -> Callable[..., Path]:
    """A function that writes a finished run with a tiny random backbone."""
    return write_run_folder


def write_run_folder(
    run: Path,
    sequences: tuple[str, ...] | None = ("ax_t2wi", "ax_adc", "ax_dwi"),
    *overrides: str,
    edit: Callable[[Any], None] | None = None,
    in_chans: int = 3,
    **card: Any,
) -> Path:
    """Write ``run`` with an exported backbone of width 32, patches of 8 pixels and two blocks.

    Args:
        run: Folder.
        sequences: Of the backbone; None for plain pictures.
        overrides: KEY=VALUE of the pretraining config.
        edit: Changes the backbone before it is saved.
        in_chans: Channels of its patch convolution.
        card: Entries of the card that differ from those of the config.
    """
    import json

    import torch

    from medssl_cli.core.config import load_config
    from medssl_cli.models.zoo import build_backbone, save_backbone
    from medssl_cli.services.build import card_facts
    from medssl_cli.services.pretrain_config import PretrainConfig

    student = ["arch=vit_tiny", "embed_dim=32", "depth=2", "num_heads=2", "patch_size=8", "layerscale=1.0"]
    defaults = [*(f"student.{text}" for text in student), "train.img_size=32", "data.spatial_size=32"]
    crops = ["crops.global_crops_size=32", "crops.local_crops_size=16"]
    config = load_config(PretrainConfig, None, recipes="pretrain", overrides=[*defaults, *crops, *overrides])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_backbone(config.student, 32, sequences, in_chans, stochastic_depth=False)
    with torch.no_grad():
        if edit is not None:
            edit(model)
    facts = {**card_facts(config, "tiny", 1, {"data_digest": "0" * 64}), **card}
    save_backbone(run / "export" / "teacher_backbone.safetensors", model, facts)
    (run / "run.json").write_text(json.dumps({"status": "finished", "step": 1}), encoding="utf-8")
    return run
