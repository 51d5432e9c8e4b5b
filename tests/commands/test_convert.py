"""medssl convert as it is typed: exit codes, tables, JSON alone on stdout."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from medssl_cli.app import app
from medssl_cli.core.volume import Volume

Writer = Callable[..., Volume]
runner = CliRunner()


def medssl(*words: object) -> tuple[int, str, str]:
    result = runner.invoke(app, [str(word) for word in words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def test_convert_and_convert_again(tmp_path: Path, write_dicom: Writer) -> None:
    write_dicom(tmp_path / "src")
    code, out, _ = medssl("convert", "dicom", tmp_path / "src", tmp_path / "out", "--workers", 0)
    assert code == 0
    assert "1 case\nconverted: 1 volume;" in out
    assert (tmp_path / "out/PAT-1/ax_t2wi.nii.gz").is_file()
    code, out, _ = medssl("convert", "dicom", tmp_path / "src", tmp_path / "out", "--workers", 0)
    assert (code, "1 was up to date" in out) == (0, True)


def test_dry_run_prints_a_table_and_writes_nothing(tmp_path: Path, write_dicom: Writer) -> None:
    write_dicom(tmp_path / "src/a")
    write_dicom(tmp_path / "src/b", seed=1, SeriesInstanceUID="1.2.9", SeriesNumber=7, SeriesDescription="t1 vibe")
    code, out, _ = medssl("convert", "dicom", tmp_path / "src", tmp_path / "out", "--dry-run", "--workers", 0)
    lines = out.splitlines()
    assert code == 0
    assert lines[0].split()[:2] == ["case", "sequence"]
    assert lines[1].split() == ["PAT-1", "ax_t2wi", "5", "t2_tse_tra", "6", "1", "3", "0.8", "0.7", "planned"]
    assert lines[2].split(maxsplit=5)[-1] == "left alone: no rule names it"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("mode", "expected"), [("stop", 3), ("skip", 4)])
def test_exit_codes_of_refused_series(tmp_path: Path, write_dicom: Writer, mode: str, expected: int) -> None:
    write_dicom(tmp_path / "src")
    (tmp_path / "src/im003.dcm").unlink()
    code, out, err = medssl("convert", "dicom", tmp_path / "src", tmp_path / "out", "--on-error", mode, "--workers", 0)
    assert code == expected
    assert "error: 1 series was refused" in err
    assert "where: series 5 t2_tse_tra for ax_t2wi: The slices are not evenly spaced" in err
    assert "fix:" in err
    assert "1 series refused" in out
    assert not list((tmp_path / "out").rglob("*.nii.gz"))


def test_usage_errors_exit_2_and_write_nothing(tmp_path: Path, write_dicom: Writer) -> None:
    write_dicom(tmp_path / "src")
    (tmp_path / "m.yaml").write_text("ax_t2wi: {SeriesDescripton: x}\n")
    for words in (
        ("--engine", "dcm2nii"),
        ("--mapping", tmp_path / "m.yaml"),
        ("--reference", "t3"),
        ("--on-error", "go"),
    ):
        code, _, err = medssl("convert", "dicom", tmp_path / "src", tmp_path / "out", *words)
        assert (code, err.startswith("error:")) == (2, True)
    assert not (tmp_path / "out").exists()
    assert medssl("convert", "dicom", tmp_path / "nowhere", tmp_path / "out")[0] == 3


def test_json_is_alone_on_stdout_also_when_series_are_refused(tmp_path: Path, write_dicom: Writer) -> None:
    write_dicom(tmp_path / "src")
    (tmp_path / "src/im003.dcm").unlink()
    words = [
        "convert",
        "dicom",
        str(tmp_path / "src"),
        str(tmp_path / "out"),
        "--json",
        "--on-error",
        "skip",
        "--workers",
        "0",
    ]
    answer = subprocess.run([sys.executable, "-m", "medssl_cli", *words], capture_output=True, text=True, check=False)
    assert answer.returncode == 4
    report = json.loads(answer.stdout, parse_constant=lambda name: pytest.fail(f"{name} is no strict JSON"))
    assert report == {
        **json.loads((tmp_path / "out/convert_report.json").read_text()),
        "elapsed_s": report["elapsed_s"],
    }
    assert report["failures"][0]["code"] == "dicom_uneven_slices"


def test_align_and_list(tmp_path: Path, write_dicom: Writer) -> None:
    write_dicom(tmp_path / "src/a")
    write_dicom(
        tmp_path / "src/b",
        seed=1,
        spacing=(3.0, 1.6, 1.4),
        SeriesInstanceUID="1.2.9",
        SeriesDescription="adc",
        SeriesNumber=6,
    )
    assert medssl("convert", "dicom", tmp_path / "src", tmp_path / "tree", "--workers", 0)[0] == 0
    code, out, _ = medssl(
        "convert", "align", tmp_path / "tree", tmp_path / "out", "--reference", "ax_t2wi", "--workers", 0
    )
    assert (code, "aligned: 2 volumes" in out) == (0, True)
    code, out, _ = medssl(
        "convert", "align", tmp_path / "tree", tmp_path / "out", "--reference", "ax_t2wi", "--json", "--workers", 0
    )
    assert json.loads(out)["n_up_to_date"] == 2
    assert medssl("convert", "align", tmp_path / "tree", tmp_path / "out2", "--reference", "ct", "--workers", 0)[0] == 2
    assert not (tmp_path / "out2").exists()
    code, out, _ = medssl("convert", "dicom", "--list-configs")
    assert (code, out.split()[0]) == (0, "default")


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def foreign_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network in DINOv2's names, as a training checkpoint holds it."""
    import torch

    from medssl_cli.models.vit import VisionTransformer

    torch.manual_seed(0)
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=1, layerscale=1.0)
    state = {f"backbone.{name}": tensor for name, tensor in model.state_dict().items()}
    path = tmp_path_factory.mktemp("weights") / "foreign.pth"
    torch.save({"teacher": {**state, "dino_head.last_layer.weight": torch.zeros(3)}}, path)
    return path


def test_convert_weights_then_info_and_infer(foreign_weights: Path, tmp_path: Path) -> None:
    from medssl_cli.data.images import write_image

    code, out, err = medssl("convert", "weights", foreign_weights, tmp_path / "w", "--image-size", 64, "modality=mr")
    assert code == 0, err
    for word in ("recognised as dinov2 weights", "resized 1: pos_embed: 4 x 4 to 8 x 8", "unexpected 1: dino_head"):
        assert word in out
    assert not list((tmp_path / "w").glob(".*tmp*"))
    code, out, _ = medssl("info", tmp_path / "w", "--json")
    told = json.loads(out)
    assert (code, told["source"], told["family"], told["modality"]) == (0, "dinov2", "vit", "mr")
    assert told["parameters"] == told["card"]["n_parameters"]
    rng = np.random.default_rng(0)
    write_image(tmp_path / "a.png", rng.integers(0, 255, (40, 48), dtype=np.uint8))
    for model in (tmp_path / "w", tmp_path / "w" / "teacher_backbone.safetensors"):
        code, out, err = medssl("infer", tmp_path / "a.png", "--model", model, "--out", tmp_path / f"out-{model.name}")
        assert code == 0, err
    code, out, _ = medssl("convert", "weights", foreign_weights, tmp_path / "w.safetensors", "--json")
    assert json.loads(out)["card"]["source_file"] == "foreign.pth"
    assert (tmp_path / "w.safetensors").is_file()


def test_infer_with_a_convnext_makes_a_map_without_attention(tmp_path: Path) -> None:
    import torch

    from medssl_cli.data.images import write_image
    from medssl_cli.models.convnext import ConvNeXt

    torch.manual_seed(0)
    torch.save(ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16)).state_dict(), tmp_path / "c.pth")
    assert medssl("convert", "weights", tmp_path / "c.pth", tmp_path / "w")[0] == 0
    write_image(tmp_path / "a.png", np.random.default_rng(0).integers(0, 255, (70, 100), dtype=np.uint8))
    infer = ("infer", tmp_path / "a.png", "--model", tmp_path / "w", "--heatmap")
    code, out, err = medssl(*infer, "--out", tmp_path / "o1")
    assert code == 0, err
    assert "(similarity)" in out
    code, _, err = medssl(*infer, "--out", tmp_path / "o2", "heatmap_method=rollout")
    assert (code, "heatmap_method=similarity" in err) == (2, True)


def test_w01_r08_faults_of_convert_weights(foreign_weights: Path, tmp_path: Path) -> None:
    code, _, err = medssl("convert", "weights", tmp_path / "mistyped.pth", tmp_path / "w")
    assert (code, "No such file" in err) == (7, True)
    (tmp_path / "page.pth").write_text("<!DOCTYPE html><html>404</html>")
    code, _, err = medssl("convert", "weights", tmp_path / "page.pth", tmp_path / "w")
    assert (code, "it is a web page" in err) == (7, True)
    code, _, err = medssl("convert", "weights", foreign_weights, tmp_path / "w", "--source", "meddinov3")
    assert (code, "its names are those of dinov2" in err) == (7, True)
    code, _, err = medssl("convert", "weights", foreign_weights, tmp_path / "w", "modalty=ct")
    assert (code, "did you mean modality" in err) == (2, True)
    assert not (tmp_path / "w").exists()
