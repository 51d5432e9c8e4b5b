"""Arrows point down, no cycles, the package list is complete, and help never loads torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parents[1]
FLOORS = {
    "core": set(),
    **{name: {"core"} for name in ("data", "models", "objectives", "engine", "metrics", "report")},
    "services": {"core", "data", "models", "objectives", "engine", "metrics", "report", "configs"},
    "commands": {"core", "services"},
    "configs": set(),
}
TORCH_IN_DATA = {
    "transforms",
    "views",
    "datasets",
    "tiles",
    "labelled_slices",
    "labelled_volumes",
    "paired_augmentation",
}


def source_files() -> list[tuple[str, str, Path]]:
    """(floor, module, path) of every file of the package."""
    found = []
    for path in sorted([*(ROOT / "medssl_cli").rglob("*.py"), *(ROOT / "commands").rglob("*.py")]):
        relative = path.relative_to(ROOT)
        parts = relative.with_suffix("").parts
        if parts[0] == "commands":
            found.append(("commands", "medssl_cli." + ".".join(parts), path))
        elif len(parts) > 2:
            found.append((parts[1], ".".join(parts), path))
    return found


def imports_of(path: Path, *, top_level_only: bool) -> list[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names: list[str] = []
    body = list(tree.body) if top_level_only else list(ast.walk(tree))
    for node in body:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.append(node.module or "")
            if (node.module or "") in {"medssl_cli", *(f"medssl_cli.{floor}" for floor in FLOORS)}:
                names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


@pytest.mark.parametrize(("floor", "module", "path"), source_files(), ids=lambda v: v if isinstance(v, str) else "")
def test_imports_point_down(floor: str, module: str, path: Path) -> None:
    allowed = FLOORS[floor] | {floor}
    for name in imports_of(path, top_level_only=False):
        parts = name.split(".")
        if parts[0] == "medssl_cli" and len(parts) > 1:
            assert parts[1] in allowed, f"{module} imports {name}: {floor} may import {sorted(allowed)}"
        assert parts[0] not in {"torchvision", "timm", "commands", "configs"}, f"{module} imports {name}"


@pytest.mark.parametrize(("floor", "module", "path"), source_files(), ids=lambda v: v if isinstance(v, str) else "")
def test_torch_stays_on_its_floors(floor: str, module: str, path: Path) -> None:
    name = module.rpartition(".")[2]
    may = floor in {"models", "objectives", "engine", "services"} or (floor == "data" and name in TORCH_IN_DATA)
    if not may:
        assert not [n for n in imports_of(path, top_level_only=True) if n.split(".")[0] == "torch"], module


def test_commands_import_services_inside_functions() -> None:
    for floor, module, path in source_files():
        if floor == "commands":
            tops = [n for n in imports_of(path, top_level_only=True) if n.startswith("medssl_cli.services")]
            assert not tops, f"{module} imports {tops} at the top"


def test_no_import_cycles() -> None:
    graph = {m: {n for n in imports_of(p, top_level_only=True) if n != m} for _, m, p in source_files()}
    done: set[str] = set()

    def walk(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name in done or name not in graph:
            return
        for target in graph[name]:
            walk(target, (*trail, name))
        done.add(name)

    for name in graph:
        walk(name, ())


def test_hubs_are_empty() -> None:
    for path in [*(ROOT / "medssl_cli").rglob("__init__.py"), ROOT / "commands/__init__.py"]:
        assert not imports_of(path, top_level_only=True), path


def test_package_list_is_complete() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {"medssl_cli.commands", "medssl_cli.configs"}
    for init in (ROOT / "medssl_cli").rglob("__init__.py"):
        folders.add(".".join(init.parent.relative_to(ROOT).parts))
    assert set(settings["packages"]) == folders
    code = {p.parent for p in (ROOT / "medssl_cli").rglob("*.py")}
    assert all((folder / "__init__.py").exists() for folder in code)


def run_and_list_modules(*words: str) -> set[str]:
    script = (
        "import sys\n"
        f"sys.argv = ['medssl', *{list(words)!r}]\n"
        "from medssl_cli.app import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "print('MODULES ' + ' '.join(sorted({m.split('.')[0] for m in sys.modules})))\n"
    )
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return set(answer.stdout.rsplit("MODULES ", 1)[1].split())


HEAVY = {"torch", "monai", "numpy", "pandas", "scipy", "sklearn", "nibabel", "pydicom", "SimpleITK", "matplotlib"}


def command_names() -> list[str]:
    from medssl_cli.app import COMMANDS

    return list(COMMANDS)


@pytest.mark.parametrize("name", ["", *command_names()])
def test_help_loads_nothing_heavy(name: str) -> None:
    loaded = run_and_list_modules(*([name] if name else []), "--help")
    assert not loaded & HEAVY


IMPORT_ALL = """
import importlib, os, pkgutil, sys, warnings
warnings.simplefilter("ignore")
for name in ("torchvision", "timm", "xformers", "transformers", "monai", "highdicom", "submitit", "pandas", "cuml"):
    sys.modules[name] = None  # a module that is None cannot be imported
before = dict(os.environ)
import medssl_cli
for info in pkgutil.walk_packages(medssl_cli.__path__, "medssl_cli."):
    importlib.import_module(info.name)
for name in ("commands", "configs"):
    package = importlib.import_module(f"medssl_cli.{name}")
    for info in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(info.name)
ours = ("CUDA", "NVIDIA", "RANK", "LOCAL", "WORLD", "MASTER", "NCCL", "SLURM", "OMP", "MEDSSL")
names = {k for k in before.keys() | os.environ.keys() if k.startswith(ours)}
changed = {k for k in names if before.get(k) != os.environ.get(k)}
assert not changed, changed
import torch
assert not torch.cuda.is_initialized() and not torch.distributed.is_initialized()
print("imported", sum(name.startswith("medssl_cli.") for name in sys.modules))
"""


def test_t26_t37_every_module_imports_alone_and_changes_nothing() -> None:
    """No optional package is needed to import, no device is taken, no variable that steers devices is set."""
    answer = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL], capture_output=True, text=True, timeout=120, check=False
    )
    assert answer.returncode == 0, answer.stderr
    assert int(answer.stdout.split()[-1]) > 60
