"""What the cache of vectors holds, and taking entries out of it. No network is loaded."""

from __future__ import annotations

import json
import time
from pathlib import Path

from medssl_cli.core.errors import CheckpointError
from medssl_cli.core.result import Result
from medssl_cli.core.run import hide_home, plain, result_header
from medssl_cli.data.feature_cache import FeatureCache
from medssl_cli.data.store import default_cache
from medssl_cli.services.lookup import find_backbone

COMMAND = "extract"


def cache_info(cache: Path | None) -> Result:
    """Entries and bytes, in all and by model."""
    started = time.time()
    found = FeatureCache(default_cache(cache))
    info = found.info()
    models = {model: {"entries": entries, "bytes": size} for model, (entries, size) in info.models.items()}
    facts = {"cache": hide_home(str(found.folder)), "entries": info.entries, "bytes": info.bytes, "models": models}
    lines = [f"{hide_home(str(found.folder))}: {_entries(info.entries)}, {info.bytes / 1e6:.1f} MB"]
    lines += [
        f"  model {model[:16] or 'unknown'}: {_entries(entries)}, {size / 1e6:.1f} MB"
        for model, (entries, size) in info.models.items()
    ]
    return Result(lines, plain({**result_header(COMMAND, started), **facts}))


def prune_cache(cache: Path | None, *, older_than_days: float | None = None, model: Path | None = None) -> Result:
    """Remove entries: all, or those that are older, or of one model, or both.

    Raises:
        CheckpointError: The model has no card that tells its digest.
        ResourceError: The cache cannot be changed.
    """
    started = time.time()
    found = FeatureCache(default_cache(cache))
    digest = None if model is None else _digest_of(model)
    everything = digest is None and older_than_days is None
    removed, freed = found.prune(older_than_days=older_than_days, model=digest, everything=everything)
    facts = {"cache": hide_home(str(found.folder)), "removed": removed, "freed_bytes": freed}
    lines = [f"{hide_home(str(found.folder))}: {_entries(removed)} removed, {freed / 1e6:.1f} MB freed"]
    return Result(lines, plain({**result_header(COMMAND, started), **facts}))


def _entries(count: int) -> str:
    return "1 entry" if count == 1 else f"{count} entries"


def _digest_of(model: Path) -> str:
    card = find_backbone(model).weights.with_suffix(".json")
    try:
        return str(json.loads(card.read_text(encoding="utf-8"))["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            "The card of the model does not tell its digest.",
            where=hide_home(str(card)),
            fix="name the run folder or weight file that the vectors were made with",
            code="card_incomplete",
        ) from error
