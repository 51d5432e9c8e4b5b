"""The README's real run, typed as it stands there, on DICOM phantoms; only the network is made small."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
SMALL = "demo train.OFFICIAL_EPOCH_LENGTH=2 optim.epochs=2 optim.warmup_epochs=1 train.saveckp_freq=1 student.depth=2"


def readme_block(heading: str) -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.split(f"## {heading}\n", 1)[1]
    block = re.search(r"```bash\n(.*?)```", section, flags=re.S)
    assert block is not None
    return [line.split("  #")[0].strip() for line in block.group(1).splitlines()]


@pytest.mark.slow
def test_w39_the_real_run_of_the_readme(tmp_path: Path) -> None:
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "MEDSSL_CACHE": str(tmp_path / "cache"),
    }

    def run(line: str) -> str:
        answer = subprocess.run(
            line.split(), cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert answer.returncode == 0, f"{line}\n{answer.stdout}\n{answer.stderr}"
        return answer.stdout

    lines = readme_block("A real run")
    assert [line.split()[1] for line in lines] == [
        *("convert", "split", "check-data", "pretrain", "extract", "train-head", "eval", "infer")
    ]
    run("medssl phantom prostate-dicom DICOM --cases 12")
    for line in lines:
        if "check-data" in line:
            line += " --allow-missing"  # the phantom holds one case without ADC on purpose
        line = line.replace("labels.csv", "DICOM/labels.csv").replace("csPCa", "label")
        run(line.replace("prostate_vits14", SMALL).replace("P0001", "PT-0000"))
    result = tmp_path / "infer" / "PT-0000"
    heat, reference = nib.load(result / "heatmap.nii.gz"), nib.load(tmp_path / "cases/PT-0000/ax_t2wi.nii.gz")
    assert heat.shape == reference.shape
    np.testing.assert_array_equal(heat.affine, reference.affine)
    summary = json.loads((result / "summary.json").read_text())
    assert (summary["case_id"], list(summary["probabilities"])) == ("PT-0000", ["label"])
    metrics = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert metrics["n"] == len((tmp_path / "split" / "test.csv").read_text().splitlines()) - 1
    assert "://" not in (result / "report.html").read_text()
