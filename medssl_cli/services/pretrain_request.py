"""What the user typed for ``medssl pretrain``, and the configuration that follows from it."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medssl_cli.core.config import load_config
from medssl_cli.core.errors import ConfigError
from medssl_cli.data.store import default_cache
from medssl_cli.services.pretrain_config import PRESETS, PretrainConfig, dataset_string_as_overrides

log = logging.getLogger(__name__)

SMOKE_ROOT = "PROSTATE_DATA_ROOT"
"""Environment variable with the data root of ``--smoke``, where nothing else names one."""


@dataclass(frozen=True)
class PretrainRequest:
    """What the user typed. Names as the options of ``medssl pretrain``."""

    config: str | None = None
    overrides: tuple[str, ...] = ()
    data: Path | None = None
    split_csv: Path | None = None
    out: Path | None = None
    gpus: int = 1
    resume: bool = True
    init: Path | None = None
    init_from: str | None = None
    preset: str | None = None
    device: str = "auto"
    precision: str | None = None
    attention: str | None = None
    seed: int | None = None
    workers: int | None = None
    cache: Path | None = None
    on_error: str | None = None
    dry_run: bool = False
    smoke: bool = False
    allowed_changes: tuple[str, ...] = ()
    overwrite: bool = False
    submit: str | None = None
    nodes: int = 1
    slurm: tuple[str, ...] = ()

    @property
    def recipe(self) -> str:
        """Name of the recipe or config file, for people."""
        return Path(self.config).stem if self.config else "pretrain"


def resolve_config(request: PretrainRequest) -> PretrainConfig:
    """The configuration in force: default < file < flag < KEY=VALUE.

    Raises:
        ConfigError: Unreadable file, unknown keys, wrong types: all of them in one message.
    """
    flags = {
        "data.root": None if request.data is None else str(request.data),
        "data.split_csv": None if request.split_csv is None else str(request.split_csv),
        "data.on_error": request.on_error,
        "train.seed": request.seed,
        "train.num_workers": request.workers,
        "train.output_dir": None if request.out is None else str(request.out),
        "compute_precision.precision": request.precision,
        "MODEL.WEIGHTS": None if request.init is None else str(request.init),
        "MODEL.init_from": request.init_from,
        **_preset(request.preset),
    }
    config = load_config(
        PretrainConfig, request.config, recipes="pretrain", flags=flags, overrides=_spelt_out(request.overrides)
    )
    root = os.environ.get(SMOKE_ROOT)
    if request.smoke and root and not config.data.root:
        log.info("data: %s, as %s says", root, SMOKE_ROOT)
        config = config.model_copy(update={"data": config.data.model_copy(update={"root": root})})
    return config


def _preset(name: str | None) -> dict[str, Any]:
    if name is None:
        return {}
    if name not in PRESETS:
        raise ConfigError(
            f"There is no preset {name!r}.",
            where=f"--preset {name}",
            fix=f"choose one of: {', '.join(PRESETS)}",
            code="preset_unknown",
        )
    return PRESETS[name]


def _spelt_out(overrides: tuple[str, ...]) -> list[str]:
    """The overrides; a dataset string among them is followed by what it sets, so that it counts as an override."""
    texts = []
    for text in overrides:
        texts.append(text)
        key, _, value = text.partition("=")
        if key.strip() == "train.dataset_path" and value:
            texts += dataset_string_as_overrides(value)
    return texts


def check_request(request: PretrainRequest) -> None:
    """Refuse options that exclude each other.

    Raises:
        ConfigError: Naming them.
    """
    if request.nodes > 1 or request.slurm:
        raise ConfigError(
            "--nodes and --slurm describe a job.",
            where=" ".join([f"--nodes {request.nodes}", *(f"--slurm {text}" for text in request.slurm)]),
            fix="add --submit slurm; under torchrun or srun leave them out",
            code="flags_exclude",
        )
    if request.smoke and request.dry_run:
        raise ConfigError("--smoke and --dry-run exclude each other.", fix="pass one of them", code="flags_exclude")


def run_folder_of(request: PretrainRequest, config: PretrainConfig) -> Path:
    """Where the run goes: ``--out``, ``train.output_dir``, or ``runs/NAME OF CONFIG``."""
    named = config.train.output_dir
    return Path(named) if named not in ("", ".") else Path("runs") / request.recipe


def inputs_of(request: PretrainRequest, config: PretrainConfig) -> list[Path]:
    """What the run reads, and the cache that other runs share."""
    named = (config.data.root, config.data.split_csv, request.config, config.initial_weights)
    return [default_cache(request.cache), *(Path(path) for path in named if path and Path(path).exists())]
