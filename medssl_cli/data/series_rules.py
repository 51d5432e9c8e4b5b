"""Which series becomes which sequence: rules read from YAML, applied to tags, planes and b-values.

A mapping is ``stem: rule`` or ``stem: [rule, rule]``. All conditions of a rule must hold, one glob of a list is enough,
and an earlier rule is preferred to a later one. Globs know no case. Beside DICOM keywords a rule may hold ``plane``,
``min_slices``, ``b`` and ``not``; a series is excluded when all of its images match a ``not``.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from medssl_cli.core.config import read_config_file
from medssl_cli.core.errors import ConfigError
from medssl_cli.data.dicom import SeriesEntry, SeriesFacts

PLANES = ("axial", "coronal", "sagittal")
SPECIAL_KEYS = ("not", "plane", "min_slices", "b")
_STEM = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Rule:
    """One way to recognise a sequence.

    Args:
        stem: File name of the sequence, without suffix.
        tags: Globs by DICOM keyword, lower case.
        excluded: The same for images that are not wanted.
        plane: Asked-for plane, or empty.
        min_slices: Fewest slices, to leave localizers out.
        b: ``all`` or ``highest`` b-value, or the wanted ones; empty where diffusion plays no part.
    """

    stem: str
    tags: tuple[tuple[str, tuple[str, ...]], ...] = ()
    excluded: tuple[tuple[str, tuple[str, ...]], ...] = ()
    plane: str = ""
    min_slices: int = 1
    b: str | tuple[int, ...] = ""

    def matches(self, entry: SeriesEntry) -> bool:
        """Whether the tags of a series fit; plane and slices are seen later."""
        fits = all(any(_fits(value, globs) for value in entry.tags.get(tag, [])) for tag, globs in self.tags)
        return fits and not any(
            entry.tags.get(tag) and all(_fits(value, globs) for value in entry.tags[tag])
            for tag, globs in self.excluded
        )

    def accepts_geometry(self, facts: SeriesFacts) -> bool:
        """Whether plane and number of slices fit; a series without one readable image is left to the gates."""
        if not facts.frames:
            return True
        return (not self.plane or facts.plane == self.plane) and len(facts.frames) >= self.min_slices

    def accepts_image(self, image_type: str) -> bool:
        """Whether one volume of a series that mixes image types, such as trace and ADC, is meant."""
        wanted = dict(self.tags).get("ImageType")
        unwanted = dict(self.excluded).get("ImageType")
        return (not wanted or _fits(image_type, wanted)) and not (unwanted and _fits(image_type, unwanted))


@dataclass(frozen=True)
class SeriesRules:
    """All rules of a mapping, in their order."""

    rules: tuple[Rule, ...]

    @property
    def keywords(self) -> tuple[str, ...]:
        """Every DICOM keyword that a rule looks at."""
        return tuple(sorted({tag for rule in self.rules for tag, _ in (*rule.tags, *rule.excluded)}))

    def rank(self, rule: Rule) -> int:
        """Position of a rule; lower is preferred."""
        return self.rules.index(rule)


def read_mapping(source: str | None) -> SeriesRules:
    """Read a mapping from a YAML file, or a shipped one by its bare name; ``default`` if None.

    Raises:
        ConfigError: Unreadable, or unknown keys and wrong values: all of them in one message.
    """
    return parse_mapping(read_config_file(source or "default", "convert"), source or "default")


def parse_mapping(data: Mapping[str, Any], source: str) -> SeriesRules:
    """Rules from plain data; ``sequences:`` or ``mappings:`` around the stems is allowed."""
    for wrapper in ("sequences", "mappings"):
        inner = data.get(wrapper)
        if (
            len(data) == 1
            and isinstance(inner, Mapping)
            and all(isinstance(v, (Mapping, list)) for v in inner.values())
        ):
            data = inner
    faults: list[str] = []
    rules: list[Rule] = []
    for stem, value in data.items():
        if not _STEM.fullmatch(stem):
            faults.append(f"{stem!r}: a stem is a file name of letters, digits, dots, dashes and underscores")
            continue
        entries = value if isinstance(value, list) else [value]
        for i, entry in enumerate(entries):
            where = f"{stem}[{i}]" if isinstance(value, list) else stem
            if not isinstance(entry, Mapping) or not entry:
                faults.append(f"{where}: a rule is a mapping of tags to globs, got {entry!r}")
            else:
                rules.append(_parse_rule(stem, entry, where, faults))
    if not rules and not faults:
        faults.append("no sequence is named")
    if faults:
        raise ConfigError(
            f"{len(faults)} fault{'s' if len(faults) > 1 else ''} in the mapping.",
            where="\n".join(faults),
            fix=f"correct {source}; nothing was written",
            code="mapping_invalid",
        )
    return SeriesRules(tuple(rules))


def preference(facts: SeriesFacts, rank: int) -> tuple[Any, ...]:
    """Sort key among series that fit one sequence: best first.

    The rule that stands first, then original before derived images, then the most slices, then the latest.
    """
    number = int(facts.entry.number) if facts.entry.number.lstrip("-").isdigit() else 0
    return (
        rank,
        not facts.is_original,
        -len(facts.frames),
        -_seconds(facts.acquisition_time),
        -number,
        facts.entry.series_uid,
    )


def diffusion_stem(stem: str, b: int) -> str:
    """``ax_dwi`` and 1000 -> ``ax_dwi_b1000``; a stem that ends in a b-value already keeps it."""
    return stem if named_b(stem) is not None else f"{stem}_b{b}"


def named_b(stem: str) -> int | None:
    """The b-value at the end of a stem: 1000 of ``ax_dwi_b1000``."""
    match = re.search(r"_b(\d+)$", stem)
    return int(match.group(1)) if match else None


def _parse_rule(stem: str, entry: Mapping[str, Any], where: str, faults: list[str]) -> Rule:
    tags: list[tuple[str, tuple[str, ...]]] = []
    values: dict[str, Any] = {}
    for key, value in entry.items():
        name = _known_key(str(key))
        if name is None:
            faults.append(f"{where}.{key}: unknown key{_nearest(str(key))}")
        elif name in SPECIAL_KEYS:
            values[name] = value
        else:
            tags.append((name, _globs(value, f"{where}.{key}", faults)))
    excluded: list[tuple[str, tuple[str, ...]]] = []
    if not isinstance(values.get("not", {}), Mapping):
        faults.append(f"{where}.not: a mapping of tags to globs, got {values['not']!r}")
    else:
        for key, value in values.get("not", {}).items():
            name = _known_key(str(key))
            if name is None or name in SPECIAL_KEYS:
                faults.append(f"{where}.not.{key}: unknown tag{_nearest(str(key))}")
            else:
                excluded.append((name, _globs(value, f"{where}.not.{key}", faults)))
    b = _b_values(values.get("b", ""), where, faults)
    named = named_b(stem)
    if named is not None and b not in ("", (named,)):
        faults.append(
            f"{where}.b: the stem names b = {named}, the rule asks for {values['b']}; leave _b{named} out of it"
        )
    if named is not None:
        b = (named,)
    if not tags:
        faults.append(f"{where}: name at least one DICOM tag")
    return Rule(
        stem=stem,
        tags=tuple(tags),
        excluded=tuple(excluded),
        plane=_plane(values.get("plane", ""), where, faults),
        min_slices=_min_slices(values.get("min_slices", 1), where, faults),
        b=b,
    )


def _plane(value: Any, where: str, faults: list[str]) -> str:
    if value not in ("", *PLANES):
        faults.append(f"{where}.plane: one of {', '.join(PLANES)}, got {value!r}")
        return ""
    return str(value)


def _min_slices(value: Any, where: str, faults: list[str]) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        faults.append(f"{where}.min_slices: a whole number from 1, got {value!r}")
        return 1
    return value


def _b_values(value: Any, where: str, faults: list[str]) -> str | tuple[int, ...]:
    if value in ("", "all", "highest"):
        return str(value)
    wanted = value if isinstance(value, list) else [value]
    if not wanted or not all(isinstance(b, int) and not isinstance(b, bool) and b >= 0 for b in wanted):
        faults.append(f"{where}.b: all, highest, or b-values in s/mm2, got {value!r}")
        return ""
    return tuple(wanted)


def _globs(value: Any, where: str, faults: list[str]) -> tuple[str, ...]:
    globs = value if isinstance(value, list) else [value]
    if not globs or not all(isinstance(glob, (str, int, float)) and not isinstance(glob, bool) for glob in globs):
        faults.append(f"{where}: a glob or a list of globs, got {value!r}")
        return ()
    return tuple(str(glob).casefold() for glob in globs)


def _fits(value: str, globs: Sequence[str]) -> bool:
    """Whether the whole value or one of its backslash-separated parts fits a glob."""
    value = value.casefold()
    return any(fnmatch.fnmatchcase(part, glob) for glob in globs for part in dict.fromkeys((value, *value.split("\\"))))


def _known_key(key: str) -> str | None:
    if key in SPECIAL_KEYS:
        return key
    folded = re.sub(r"[\s_]", "", key).casefold()
    return _keywords().get(folded)


def _nearest(key: str) -> str:
    folded = re.sub(r"[\s_]", "", key).casefold()
    keywords = _keywords()
    # names of everyday tags first: of several thousand keywords an odd one is often a letter nearer
    everyday = {name.casefold(): name for name in _EVERYDAY} | {name: name for name in SPECIAL_KEYS}
    for names in (everyday, keywords):
        close = difflib.get_close_matches(folded, names, n=1, cutoff=0.7)
        if close:
            return f"; did you mean {names[close[0]]}?"
    return ""


def _keywords() -> dict[str, str]:
    if not _KEYWORDS:
        from pydicom.datadict import keyword_dict

        _KEYWORDS.update({keyword.casefold(): keyword for keyword in keyword_dict if keyword})
    return _KEYWORDS


_KEYWORDS: dict[str, str] = {}
_EVERYDAY = (
    "SeriesDescription",
    "ProtocolName",
    "SequenceName",
    "Modality",
    "ImageType",
    "Manufacturer",
    "ManufacturerModelName",
    "StudyDescription",
    "BodyPartExamined",
    "SeriesNumber",
    "ScanningSequence",
    "ConvolutionKernel",
    "EchoTime",
    "Units",
)


def _seconds(time: str) -> float:
    digits = re.match(r"(\d{2})(\d{2})(\d{2}(?:\.\d+)?)", time)
    return int(digits[1]) * 3600 + int(digits[2]) * 60 + float(digits[3]) if digits else 0.0
