"""``medssl doctor``: what this machine can run, found by running it, and what to do where it can't."""

from __future__ import annotations

import contextlib
import importlib
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from medssl_cli.core.errors import ResourceError
from medssl_cli.core.run import free_bytes, hide_home, result_header, to_json, usable_cpus, worker_count

REQUIRED = (
    "torch",
    "numpy",
    "scipy",
    "scikit-learn",
    "nibabel",
    "pydicom",
    "dcm2niix",
    "dicom2nifti",
    "SimpleITK",
    "blosc2",
    "isal",
    "matplotlib",
    "pillow",
    "pydantic",
    "PyYAML",
    "rich",
    "safetensors",
    "tensorboard",
    "tqdm",
    "typer",
)
OPTIONAL = ("xformers", "highdicom", "submitit", "distributed", "faster-coco-eval", "monai")
_IMPORTS = {"torch": "torch", "numpy": "numpy", "scipy": "scipy", "nibabel": "nibabel", "blosc2": "blosc2"}
"""What is imported for certain: a package may be installed and still not load."""

LOW_DISK = 10 * 2**30
_ENVIRONMENT = (
    "CUDA_VISIBLE_DEVICES",
    "MEDSSL_CACHE",
    "MEDSSL_HOME",
    "MEDSSL_MODEL",
    "NO_COLOR",
    "OMP_NUM_THREADS",
    "XFORMERS_DISABLED",
)
_SLURM = ("SLURM_JOB_ID", "SLURM_JOB_NUM_NODES", "SLURM_NTASKS", "SLURM_CPUS_PER_TASK", "SLURM_JOB_PARTITION")

SYMPTOMS = (
    ("A path is not found", "give an absolute --data; ids equal folder names; run `medssl check-data`"),
    (
        "Out of memory",
        "train.batch_size_per_gpu 8 to 4; student.arch base to small; crops.global_crops_size to a smaller multiple of "
        "the patch size (14: 196, 182, 168); student.grad_checkpointing=true",
    ),
    (
        "The loss is NaN",
        "optim.base_lr 3.5e-4 to 1e-4; optim.warmup_epochs 30 to 50; keep optim.clip_grad 3.0; check-data",
    ),
    ("The ROI is too small", "crops.crop_from_tumor_foreground=false, a larger data.min_roi_pixels, or --fix-csv"),
    ("xFormers does not work", "XFORMERS_DISABLED=1: torch's own attention is used, with the same numbers"),
    (
        "Several GPUs are no faster",
        "train.num_workers 4 to 8; a larger batch for each GPU; look at data-wait in the log",
    ),
    ("Host memory grows", "train.num_workers down to 2; log less often"),
    ("Is the training healthy?", "the loss falls within 10 to 20 epochs; entropy above 0.1; effective rank above 10"),
)
"""Operating advice, told with ``medssl doctor``."""


@dataclass(frozen=True)
class Finding:
    """One thing that does not work.

    Args:
        essential: Whether training or inference cannot run without it.
        what: What was found.
        fix: What to do.
    """

    essential: bool
    what: str
    fix: str


@dataclass(frozen=True)
class DoctorResult:
    """Everything found.

    Args:
        report: The JSON document.
        findings: What does not work, essential things first.
    """

    report: dict[str, Any]
    findings: list[Finding] = field(default_factory=list)

    def to_json(self) -> str:
        """One strict JSON document."""
        return to_json(self.report)

    def raise_if_broken(self) -> None:
        """End with exit code 6 when something essential is broken.

        Raises:
            ResourceError: Naming each.
        """
        broken = [f for f in self.findings if f.essential]
        if broken:
            raise ResourceError(
                "Something essential does not work.",
                where="\n".join(f.what for f in broken),
                fix="; ".join(dict.fromkeys(f.fix for f in broken)),
                code="doctor_broken",
            )

    def summary(self) -> str:
        """The report as lines for a terminal."""
        r = self.report
        lines = [f"medssl {r['medssl_version']}, Python {r['python']}, {r['platform']}", ""]
        lines += [_line(name, version or "absent") for name, version in r["versions"].items()]
        lines += [_line(name, version or "absent (optional)") for name, version in r["optional"].items()]
        torch = r["torch"]
        lines += [
            "",
            _line("CUDA", _cuda_text(torch)),
            _line("CPU", f"{r['cpus']} usable, {_gib(r['memory_bytes'])} memory"),
        ]
        for device in torch["devices"]:
            memory = (
                f", {_gib(device['free_bytes'])} of {_gib(device['total_bytes'])} free" if device["total_bytes"] else ""
            )
            lines.append(_line(device["device"], device["name"] + memory))
        lines += [""] + [
            _line(f"attention {b['name']}", ("works" if b["works"] else "no") + f" on {b['device']}: {b['detail']}")
            for b in r["attention"]
        ]
        lines += ["", _line("dcm2niix", r["dcm2niix"]["detail"]), _line("workers", str(r["workers"]))]
        lines += [_line("free disk", f"{_gib(d['free_bytes'])} at {d['path']}") for d in r["disk"]]
        lines += [_line(name, value) for name, value in {**r["slurm"], **r["environment"]}.items()]
        lines += [""] + [f"{'broken' if f.essential else 'hint'}: {f.what}\n  fix: {f.fix}" for f in self.findings]
        lines += ["Known symptoms"] + [f"  {symptom}: {advice}" for symptom, advice in SYMPTOMS]
        return "\n".join(lines)


def doctor() -> DoctorResult:
    """Look at packages, devices, attention kernels, dcm2niix, memory and disk; most of it by trying it."""
    started = time.time()
    findings: list[Finding] = []
    versions = {name: _version(name) for name in REQUIRED}
    _check_packages(versions, findings)
    torch_facts = _torch_facts(findings)
    attention = (
        _attention([d["device"] for d in torch_facts["devices"]] or ["cpu"], findings) if torch_facts["version"] else []
    )
    report = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "optional": {name: _version(name) for name in OPTIONAL},
        "torch": torch_facts,
        "attention": attention,
        "cpus": usable_cpus(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "workers": worker_count(),
        "disk": _disk(findings),
        "dcm2niix": _dcm2niix(findings),
        "slurm": {name: os.environ[name] for name in _SLURM if name in os.environ},
        "environment": {name: hide_home(os.environ[name]) for name in _ENVIRONMENT if name in os.environ},
    }
    findings.sort(key=lambda f: not f.essential)
    report["findings"] = [asdict(f) for f in findings]
    report["ok"] = not any(f.essential for f in findings)
    report["symptoms"] = [{"symptom": symptom, "advice": advice} for symptom, advice in SYMPTOMS]
    return DoctorResult({**result_header("doctor", started), **report}, findings)


# --- packages and devices --------------------------------------------------------------------------------------------


def _version(name: str) -> str | None:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(name)
    return None


def _check_packages(versions: dict[str, str | None], findings: list[Finding]) -> None:
    for name, version in versions.items():
        if version is None:
            findings.append(Finding(name in _IMPORTS, f"{name} is not installed.", f"pip install {name}"))
        elif name in _IMPORTS and name != "torch":
            fault = _import_fault(_IMPORTS[name])
            if fault:
                findings.append(
                    Finding(True, f"{name} {version} does not load: {fault}", f"pip install --force-reinstall {name}")
                )


def _import_fault(module: str) -> str:
    """Empty when the module loads, else one line of what went wrong."""
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken package may raise anything; the report says what
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return ""


def _torch_facts(findings: list[Finding]) -> dict[str, Any]:
    nothing: dict[str, Any] = {"version": None, "cuda_build": None, "cuda_available": False, "devices": []}
    fault = _import_fault("torch")
    if fault:
        findings.append(Finding(True, f"torch does not load: {fault}", "pip install --force-reinstall torch"))
        return nothing
    import torch

    available = torch.cuda.is_available()
    if torch.version.cuda and not available:
        what = f"torch {torch.__version__} was built for CUDA {torch.version.cuda}, but no GPU answers."
        findings.append(Finding(False, what, "check the driver with nvidia-smi; without a GPU --device cpu works"))
    devices: list[dict[str, Any]] = [
        {"device": "cpu", "name": platform.processor() or platform.machine(), "free_bytes": None, "total_bytes": None}
    ]
    for i in range(torch.cuda.device_count() if available else 0):
        free, total = torch.cuda.mem_get_info(i)
        name = torch.cuda.get_device_name(i)
        devices.append({"device": f"cuda:{i}", "name": name, "free_bytes": free, "total_bytes": total})
    return {
        "version": torch.__version__,
        "cuda_build": torch.version.cuda,
        "cuda_available": available,
        "cudnn": torch.backends.cudnn.version() if available else None,
        "devices": devices,
    }


def _attention(devices: Sequence[str], findings: list[Finding]) -> list[dict[str, Any]]:
    """Which kernels gave the right numbers in a tiny forward and backward, on each device."""
    from medssl_cli.models.attention import probe_backends

    found = []
    for device in devices:
        statuses = probe_backends(device)
        for status in statuses:
            found.append({"device": device, **asdict(status)})
            if not status.works and status.fix:
                findings.append(Finding(False, f"attention {status.name} on {device}: {status.detail}", status.fix))
        if not any(status.works for status in statuses):
            findings.append(
                Finding(True, f"no attention backend works on {device}.", "reinstall torch for this machine")
            )
    return found


# --- disk and tools --------------------------------------------------------------------------------------------------


def _disk(findings: list[Finding]) -> list[dict[str, Any]]:
    places = {"here": Path.cwd()}
    if os.environ.get("MEDSSL_CACHE"):
        places["MEDSSL_CACHE"] = Path(os.environ["MEDSSL_CACHE"]).expanduser()
    found = []
    for name, path in places.items():
        free = free_bytes(path)
        shown = hide_home(str(path))
        found.append({"name": name, "path": shown, "free_bytes": free})
        if free < LOW_DISK:
            what = f"only {_gib(free)} are free at {shown}."
            findings.append(
                Finding(False, what, "a prepared store needs about the size of the decoded images; set MEDSSL_CACHE")
            )
    return found


def _dcm2niix(findings: list[Finding]) -> dict[str, Any]:
    """Whether the converter really starts, and which version answers."""
    path = None
    with contextlib.suppress(ImportError):
        path = str(importlib.import_module("dcm2niix").bin)
    path = path if path and Path(path).exists() else shutil.which("dcm2niix")
    works, detail = (False, "not found") if path is None else _ask_version(path)
    if not works:
        fix = "pip install --force-reinstall dcm2niix, or convert with --engine simpleitk"
        findings.append(Finding(False, f"dcm2niix {detail}", fix))
    return {"path": path and hide_home(path), "works": works, "detail": detail}


def _ask_version(path: str) -> tuple[bool, str]:
    """Whether a dcm2niix starts, and its last line; some versions return 3 when asked for it."""
    try:
        answer = subprocess.run((path, "-v"), capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        return False, f"does not start: {error}"
    words = [line.strip() for line in answer.stdout.splitlines() if line.strip()]
    if "dcm2niix" in answer.stdout.lower():
        return True, words[-1]
    return False, f"gives no version: return code {answer.returncode}"


# --- words -----------------------------------------------------------------------------------------------------------


def _line(name: str, value: str) -> str:
    return f"{name:<24} {value}"


def _gib(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 2**30:.1f} GiB"


def _cuda_text(torch: dict[str, Any]) -> str:
    if torch["version"] is None:
        return "unknown: torch does not load"
    build = f"torch built for CUDA {torch['cuda_build']}" if torch["cuda_build"] else "torch built without CUDA"
    return f"{'available' if torch['cuda_available'] else 'not available'}, {build}"
