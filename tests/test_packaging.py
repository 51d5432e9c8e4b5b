"""sdist -> wheel -> a working program with its recipes, elsewhere; what is declared is what is used."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
IMPORT_NAMES = {
    "scikit-learn": "sklearn",
    "python-gdcm": "gdcm",
    "pyyaml": "yaml",
    "pillow": "PIL",
    "simpleitk": "SimpleITK",
}
BY_PLUGIN = {"python-gdcm": "pydicom decodes JPEG through it", "tensorboard": "torch.utils.tensorboard needs it"}
OPTIONAL = {"xformers", "highdicom"}
BY_OTHERS = {"rich": "Typer draws help with it"}


def imported_packages() -> set[str]:
    found: set[str] = set()
    for path in [*(ROOT / "medssl_cli").rglob("*.py"), *(ROOT / "commands").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - {"medssl_cli"}


def declared() -> dict[str, str]:
    names = [re.split(r"[<>=!~; \[]", line)[0].lower() for line in PROJECT["dependencies"]]
    return {name: IMPORT_NAMES.get(name, name) for name in names}


def test_nothing_used_is_missing() -> None:
    assert imported_packages() - set(declared().values()) - OPTIONAL == set()


def test_nothing_unused_is_declared() -> None:
    used = imported_packages()
    unused = {name for name, module in declared().items() if module not in used}
    assert unused <= BY_PLUGIN.keys() | BY_OTHERS.keys(), unused


def test_torch_is_pinned_in_dev_only() -> None:
    assert "torch>=2.8" in PROJECT["dependencies"]
    assert any(line.startswith("torch==") for line in PROJECT["optional-dependencies"]["dev"])


@pytest.mark.slow
def test_sdist_to_wheel_works_elsewhere(tmp_path: Path) -> None:
    def run(*words: str, **options: object) -> str:
        answer = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False, **options)  # type: ignore[call-overload]
        assert answer.returncode == 0, answer.stdout + answer.stderr
        return answer.stdout

    source = tmp_path / "source"
    run("git", "clone", "-q", str(ROOT), str(source)) if (ROOT / ".git").exists() else None
    for name in ("medssl_cli", "commands", "configs", "pyproject.toml", "README.md", "LICENSE"):
        run("cp", "-rT", str(ROOT / name), str(source / name))
    run(sys.executable, "-m", "build", "--no-isolation", "-q", "-o", str(tmp_path / "dist"), str(source))
    wheel = next((tmp_path / "dist").glob("*.whl"))
    assert next((tmp_path / "dist").glob("*.tar.gz"))
    site = tmp_path / "site"
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), str(wheel))
    environment = {"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    script = "import medssl_cli; print(medssl_cli.__file__)"
    assert str(site) in run(sys.executable, "-c", script, cwd=tmp_path, env=environment)
    assert "pretrain" in run(sys.executable, "-m", "medssl_cli", "--help", cwd=tmp_path, env=environment)
    listing = run(sys.executable, "-m", "medssl_cli", "pretrain", "--list-configs", cwd=tmp_path, env=environment)
    assert "prostate_vitb14" in listing
    shipped = {p.relative_to(ROOT / "configs") for p in (ROOT / "configs").rglob("*.yaml")}
    assert shipped == {
        p.relative_to(site / "medssl_cli/configs") for p in (site / "medssl_cli/configs").rglob("*.yaml")
    }
