from pathlib import Path

import pytest

from medssl_cli.core.errors import ResourceError
from medssl_cli.services import doctor as module
from medssl_cli.services.doctor import DoctorResult, Finding, doctor


def test_essential_faults_end_with_exit_6() -> None:
    DoctorResult({}, [Finding(False, "no dcm2niix", "install it")]).raise_if_broken()
    with pytest.raises(ResourceError) as caught:
        DoctorResult({}, [Finding(True, "torch does not load", "reinstall it")]).raise_if_broken()
    assert caught.value.exit_code == 6
    assert "torch does not load" in caught.value.where
    assert caught.value.fix == "reinstall it"


def test_a_package_that_is_installed_but_does_not_load_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_IMPORTS", {"typer": "a_module_that_is_not_there", "nothing": "nothing"})
    findings: list[Finding] = []
    module._check_packages({"typer": "1.0", "nothing": None, "rich": None}, findings)
    assert [(f.essential, f.what.split()[0]) for f in findings] == [(True, "typer"), (True, "nothing"), (False, "rich")]
    assert "ModuleNotFoundError" in findings[0].what


@pytest.mark.parametrize(
    ("script", "works", "text"),
    [
        ('echo "Chris Rorden\'s dcm2niiX version v1.0"; echo v1.0; exit 3', True, "v1.0"),
        ("exit 127", False, "return code 127"),
        (None, False, "does not start"),
    ],
)
def test_dcm2niix_is_really_started(tmp_path: Path, script: str | None, works: bool, text: str) -> None:
    path = tmp_path / "dcm2niix"
    if script is not None:
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    answer = module._ask_version(str(path))
    assert answer[0] is works
    assert text in answer[1]


def test_low_disk_is_a_hint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "LOW_DISK", 2**62)
    monkeypatch.setenv("MEDSSL_CACHE", str(tmp_path / "cache"))
    findings: list[Finding] = []
    found = module._disk(findings)
    assert [d["name"] for d in found] == ["here", "MEDSSL_CACHE"]
    assert len(findings) == 2
    assert not findings[0].essential


def test_p40_report_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    import nibabel
    import torch

    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    result = doctor()
    report = result.report
    assert report["versions"]["nibabel"] == nibabel.__version__
    assert report["torch"]["version"] == torch.__version__
    assert report["torch"]["cuda_available"] == torch.cuda.is_available()
    assert set(report["optional"]) >= {"xformers", "monai"}
    assert {b["name"]: b["works"] for b in report["attention"] if b["device"] == "cpu"}["plain"] is True
    assert report["dcm2niix"]["works"] is True
    assert report["slurm"] == {"SLURM_JOB_ID": "4711"}
    assert report["ok"] is True
    text = result.summary()
    for word in ("nibabel", "xformers", "attention plain", "free disk", "SLURM_JOB_ID", "Out of memory"):
        assert word in text
    result.raise_if_broken()
