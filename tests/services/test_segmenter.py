"""The files of a segmentation network: written whole, read back exactly, refused when they are not what they were."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from medssl_cli.core.digest import file_digest
from medssl_cli.core.errors import CheckpointError, ConfigError
from medssl_cli.models.dense_decoder import DecoderConfig, DenseNetwork
from medssl_cli.models.dual_encoder import DualEncoderConfig, DualEncoderUNet
from medssl_cli.models.vit import VisionTransformer
from medssl_cli.objectives.segmentation import SegmentationLoss, SegmentationLossConfig
from medssl_cli.objectives.supervised import SupervisedSegmentation
from medssl_cli.services import lookup
from medssl_cli.services.info import info
from medssl_cli.services.lookup import find_backbone, find_model, is_segment_run, model_paths
from medssl_cli.services.segmenter import build_network, network_facts, open_segmenter, write_model

CPU = torch.device("cpu")


def _dense(*, freeze: bool = True, seed: int = 0) -> DenseNetwork:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        backbone = VisionTransformer(
            img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, layerscale=1.0, sequences=("a", "b")
        )
        return DenseNetwork(backbone, 1, DecoderConfig(base=8), context=1, freeze_backbone=freeze).eval()


def _write(run: Path, network: nn.Module, **more: Any) -> dict[str, Any]:
    objective = SupervisedSegmentation(network, SegmentationLoss(SegmentationLossConfig(), 1), ema_decay=0.5)
    with torch.no_grad():  # the average differs from the trained network, so that a mix-up of the two shows
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter += 0.25
    card = {
        "task": "semantic",
        "classes": ["background", "gland"],
        "outputs": 1,
        "threshold": 0.35,
        "network": network_facts(network),
        "sequences": ["a", "b"],
        "mean": 0.5,
        "std": [0.25, 0.5],
        "tile": 32,
        "pixel_mm": None,
        "context": 1,
        "preprocess": {"reference": "b"},
        "epoch": 3,
        "n_parameters": {"total": 5},
        **more,
    }
    run.mkdir(parents=True, exist_ok=True)
    (run / "run.json").write_text('{"status": "finished"}', encoding="utf-8")
    return write_model(run, objective.weights(), card)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of a tiny network."""
    _write(tmp_path / "run", _dense())
    return tmp_path / "run"


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    """Three slices of two sequences."""
    return torch.rand(1, 6, 40, 24, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("freeze", [True, False])
def test_the_averaged_network_comes_back_to_the_last_bit(tmp_path: Path, image: torch.Tensor, freeze: bool) -> None:
    network, before = _dense(freeze=freeze), _dense(freeze=freeze)
    _write(tmp_path / "run", network)
    found = open_segmenter(tmp_path / "run", CPU)
    with torch.no_grad():
        assert torch.equal(found.network(image), before(image))  # the average is as the network was
        assert not torch.equal(found.network(image), network(image))
    assert not found.network.training
    assert not any(parameter.requires_grad for parameter in found.network.parameters())


def test_the_card_tells_how_images_are_prepared(run: Path) -> None:
    found = open_segmenter(run, CPU)
    assert (found.task, found.classes, found.outputs, found.threshold) == ("semantic", ("background", "gland"), 1, 0.35)
    assert (found.sequences, found.mean, found.std) == (("a", "b"), 0.5, (0.25, 0.5))
    assert (found.tile, found.pixel_mm, found.context, found.channels) == (32, None, 1, 2)
    assert found.preprocess.reference == "b"
    assert found.card["sha256"] == file_digest(run / "best.safetensors")


def test_a_run_needs_no_file_of_its_backbone(run: Path, tmp_path: Path, image: torch.Tensor) -> None:
    alone = tmp_path / "elsewhere"
    alone.mkdir()
    for name in ("best.safetensors", "model.json"):
        shutil.copy(run / name, alone / name)
    shutil.rmtree(run)
    with torch.no_grad():
        assert torch.equal(open_segmenter(alone, CPU).network(image), _dense()(image))


def test_cocoseg_comes_back(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = DualEncoderUNet(DualEncoderConfig(fusion="2way", skip_attention=True)).eval()
    pair = torch.rand(1, 2, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = network(pair)
    _write(tmp_path / "run", network, task="ct-pet", sequences=["CT", "PET"], context=0)
    found = open_segmenter(tmp_path / "run", CPU)
    with torch.no_grad():
        assert torch.equal(found.network(pair), expected)


def test_building_a_network_leaves_the_generator_alone() -> None:
    before = torch.get_rng_state()
    build_network(network_facts(_dense()))
    assert torch.equal(torch.get_rng_state(), before)


# --- refusals --------------------------------------------------------------------------------------------------------


def _resign(run: Path) -> None:
    """Make the card tell the digest of the weights as they are."""
    card = json.loads((run / "model.json").read_text())
    card["sha256"] = file_digest(run / "best.safetensors")
    (run / "model.json").write_text(json.dumps(card))


def _renamed(run: Path) -> None:
    tensors = load_file(run / "best.safetensors")
    name = next(name for name in tensors if name.startswith("ema."))
    tensors[f"{name}_other"] = tensors.pop(name)
    save_file(tensors, run / "best.safetensors")
    _resign(run)


def _reshaped(run: Path) -> None:
    tensors = load_file(run / "best.safetensors")
    name = next(name for name in tensors if name.startswith("ema.") and tensors[name].ndim == 4)
    tensors[name] = tensors[name][:, :-1].contiguous()
    save_file(tensors, run / "best.safetensors")
    _resign(run)


def _truncated(run: Path) -> None:
    path = run / "best.safetensors"
    os.truncate(path, path.stat().st_size // 2)
    _resign(run)


def _altered(run: Path) -> None:
    path = run / "best.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def _pickled(run: Path) -> None:
    torch.save({"ema.x": torch.zeros(1)}, run / "best.safetensors")
    _resign(run)


def _other_network(run: Path) -> None:
    card = json.loads((run / "model.json").read_text())
    card["network"]["name"] = "someone_elses"
    (run / "model.json").write_text(json.dumps(card))


def _no_mean(run: Path) -> None:
    card = json.loads((run / "model.json").read_text())
    del card["mean"]
    (run / "model.json").write_text(json.dumps(card))


def _no_card(run: Path) -> None:
    (run / "model.json").write_text("[]")


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (_renamed, "_other"),
        (_reshaped, "shape of"),
        (_truncated, "best.safetensors"),
        (_altered, "its card tells"),
        (_pickled, "best.safetensors"),
        (_other_network, "someone_elses"),
        (_no_mean, "mean"),
        (_no_card, "does not tell of a segmentation network"),
    ],
)
def test_r08_a_file_that_is_not_as_it_was_is_refused(run: Path, damage: Callable[[Path], None], told: str) -> None:
    damage(run)
    with pytest.raises(CheckpointError) as caught:
        open_segmenter(run, CPU)
    assert told in caught.value.where
    assert caught.value.fix
    assert caught.value.exit_code == 7


def test_a_failed_write_leaves_the_model_as_it_was(run: Path) -> None:
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    with pytest.raises(ValueError, match="JSON"):  # of a value that no JSON can hold
        write_model(run, {"ema.x": torch.zeros(2)}, {"bad": _NoText()})
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


class _NoText:
    def __str__(self) -> str:
        raise ValueError("no text, no JSON")


# --- lookup ----------------------------------------------------------------------------------------------------------


def test_a_segment_run_is_found_by_folder_and_by_file(run: Path) -> None:
    assert is_segment_run(run)
    for named in (run, run / "best.safetensors"):
        found = find_model(named)
        assert (found.segmenter, found.weights, found.head) == (run, run / "best.safetensors", None)
    assert run in model_paths(run)


def test_the_newest_finished_run_may_be_a_segment_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_run: Callable[..., Path]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MEDSSL_MODEL", raising=False)
    backbone = write_run(tmp_path / "runs" / "backbone")
    _write(tmp_path / "runs" / "gland", _dense())
    _write(tmp_path / "runs" / "running", _dense())
    (tmp_path / "runs" / "running" / "run.json").write_text('{"status": "running"}')
    os.utime(backbone / "run.json", (1, 1))
    found = find_model(None)
    assert found.segmenter == Path("runs/gland")
    assert "newest" in found.why
    assert find_backbone(None).run == Path("runs/backbone")  # a command that needs a backbone passes it over


def test_the_weights_of_a_head_are_no_segmenter(run: Path) -> None:
    (run / lookup.HEAD_CARD).write_text("{}")
    assert find_model(run / "best.safetensors").segmenter is None


def test_a_command_that_needs_a_backbone_says_why_it_refuses(run: Path) -> None:
    with pytest.raises(ConfigError, match="segmentation network") as caught:
        find_backbone(run)
    assert "medssl pretrain" in caught.value.fix
    assert str(run) in caught.value.where or "~" in caught.value.where


@pytest.mark.parametrize("command", [("extract",), ("train-head", "--task", "binary")])
def test_extract_and_train_head_refuse_it(
    command: tuple[str, ...], run: Path, prostate_tree: Path, tmp_path: Path, medssl: Callable[..., Any]
) -> None:
    out = tmp_path / "out"
    result = medssl(*command, prostate_tree, "--model", run, "--out", out)
    assert result.exit_code == 2, result.stderr
    assert "segmentation network" in result.stderr
    assert not [path.name for path in out.glob("*") if not path.name.startswith(".")]  # a lock may be left


def test_info_tells_what_it_is(run: Path) -> None:
    told = info(run)
    assert told.facts["segmenter"]["network"] == "vit_decoder"
    assert told.facts["segmenter"]["classes"] == ["background", "gland"]
    assert told.facts["segmenter"]["weights"]["tensors"] == len(load_file(run / "best.safetensors"))
    assert "threshold:" in told.summary()


def test_info_of_a_damaged_weight_file_is_an_error(run: Path) -> None:
    _truncated(run)
    with pytest.raises(CheckpointError, match="not whole"):
        info(run)
