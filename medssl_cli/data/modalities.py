"""The eight kinds of eye pictures of VisionFM, each with its statistics, under every name that is in use for them."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass
from pathlib import Path

from medssl_cli.core.errors import ConfigError

_OWN_STATISTICS = "pass crops.mean and crops.std, or compute them with `medssl check-data --stats`"


@dataclass(frozen=True)
class Modality:
    """One kind of picture.

    Args:
        name: Canonical, lower case.
        mean, std: Of red, green and blue in [0, 1], as VisionFM normalises (Qiu et al. 2024).
        aliases: Other spellings; capitals, blanks and signs never count.
    """

    name: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    aliases: tuple[str, ...] = ()


MODALITIES = (
    Modality(
        "fundus",
        (0.423737496, 0.260946065, 0.128403902),
        (0.294825345, 0.201673657, 0.136680201),
        ("cfp", "color fundus", "colour fundus", "fundus photograph", "fundus photography"),
    ),
    Modality(
        "oct",
        (0.21091926, 0.21091926, 0.21091919),
        (0.17598894, 0.17598891, 0.17598893),
        ("optical coherence tomography",),
    ),
    Modality(
        "external",
        (0.4936253, 0.36324808, 0.25956994),
        (0.32001, 0.27109432, 0.21991591),
        ("external eye", "external eye photograph"),
    ),
    Modality("ubm", (0.096110865,) * 3, (0.20977867,) * 3, ("ultrasound biomicroscopy",)),
    Modality(
        "ultrasound",
        (0.05989236, 0.05978666, 0.056694973),
        (0.154277, 0.15504874, 0.14464583),
        ("b-ultrasound", "b-scan", "b-scan ultrasound", "ocular ultrasound"),
    ),
    Modality("mri", (0.17368862,) * 3, (0.16198656,) * 3, ("mr", "magnetic resonance imaging")),
    Modality(
        "slitlamp",
        (0.5556667, 0.40288574, 0.38857886),
        (0.26516676, 0.23311588, 0.23903583),
        ("silt lamp", "slit lamp photograph"),
    ),
    Modality(
        "ffa",
        (0.2020487, 0.20205145, 0.20201068),
        (0.17406046, 0.17404206, 0.17401208),
        ("fluorescein angiography", "fundus fluorescein angiography"),
    ),
)


def find_modality(text: str) -> Modality | None:
    """The modality of that name in any spelling, or None."""
    return _BY_ALIAS.get(_bare(text))


def resolve_modality(text: str) -> Modality:
    """The modality of that name in any spelling.

    Raises:
        ConfigError: With the nearest name, and what to do for pictures of another kind.
    """
    modality = find_modality(text)
    if modality is None:
        known = ", ".join(each.name for each in MODALITIES)
        raise ConfigError(
            unknown_modality(text).partition(";")[0] + ".",
            where=f"data.modality; there are: {known}",
            fix=f"take one of these, or {_OWN_STATISTICS}",
            code="modality_unknown",
        )
    return modality


def unknown_modality(text: str) -> str:
    """What to say of a name that is none: the nearest, and the way without a name."""
    near = difflib.get_close_matches(_bare(text), _BY_ALIAS, n=1, cutoff=0.6)
    meant = f" (did you mean {_BY_ALIAS[near[0]].name}?)" if near else ""
    return f"unknown modality {text[:60]!r}{meant}; {_OWN_STATISTICS}"


def modality_folder(root: Path, name: str) -> Path:
    """The folder of ``root`` that is named as the modality in any spelling, else ``root`` itself.

    Raises:
        ConfigError: Several folders mean it.
    """
    modality = resolve_modality(name)
    if not root.is_dir():
        return root
    with os.scandir(root) as entries:
        found = sorted(e.name for e in entries if not e.name.startswith(".") and find_modality(e.name) is modality)
    found = [name for name in found if (root / name).is_dir()]
    if len(found) > 1:
        raise ConfigError(
            f"Several folders mean the modality {modality.name}.",
            where=f"{root}: {', '.join(found)}",
            fix="join them, or name one of them as the data root",
            code="modality_twice",
        )
    return root / found[0] if found else root


def _bare(text: str) -> str:
    return "".join(char for char in text.casefold() if char.isalnum())


_BY_ALIAS = {_bare(name): modality for modality in MODALITIES for name in (modality.name, *modality.aliases)}
