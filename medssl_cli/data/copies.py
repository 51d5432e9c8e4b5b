"""The same file under two names on both sides of a split: found by size, then by its ends, then by all its bytes.

Sizes of different compressed images are rarely equal, so hardly anything is read of a set without copies.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path

from medssl_cli.core.case import Case
from medssl_cli.core.errors import DataError

_END_BYTES = 65_536
_SHOWN = 8

Place = tuple[str, str, Path]
"""(split, case id, file)."""


def refuse_copies(splits: Mapping[str, Sequence[Case]]) -> None:
    """Refuse splits that hold one image under two names.

    Raises:
        DataError: ``split_leak``, naming both files of each pair.
    """
    pairs = find_copies(splits)
    if pairs:
        lines = [
            f"{split} ({case_id}) {path} and {other_split} ({other_id}) {other}"
            for (split, case_id, path), (other_split, other_id, other) in pairs[:_SHOWN]
        ]
        raise DataError(
            "The splits hold the same images under two names: scores would be too good.",
            where="\n".join([*lines, *([f"and {len(pairs) - _SHOWN} more"] if len(pairs) > _SHOWN else [])]),
            fix="leave one of each pair out; `medssl check-data` lists all copies",
            code="split_leak",
        )


def find_copies(splits: Mapping[str, Sequence[Case]]) -> list[tuple[Place, Place]]:
    """Pairs of files with the same bytes in two different splits; missing files are left to the readers."""
    places = [
        (split, case.case_id, sequence.path)
        for split, cases in splits.items()
        for case in cases
        for sequence in case.sequences.values()
        if sequence.path.is_file()
    ]
    groups = [places]
    for key in (_size, _ends, _whole):
        groups = [part for group in groups for part in _divide(group, key)]
    return [(group[0], other) for group in groups for other in group[1:] if other[0] != group[0][0]]


def _divide(places: list[Place], key: Callable[[Path], Hashable]) -> list[list[Place]]:
    """The places by the key of their file; only groups that span two splits are kept."""
    groups: dict[Hashable, list[Place]] = defaultdict(list)
    for place in places:
        groups[key(place[2])].append(place)
    return [group for group in groups.values() if len({split for split, _, _ in group}) > 1]


def _size(path: Path) -> int:
    return path.stat().st_size


def _ends(path: Path) -> bytes:
    with path.open("rb") as file:
        start = file.read(_END_BYTES)
        file.seek(max(0, path.stat().st_size - _END_BYTES))
        return hashlib.sha256(start + file.read()).digest()


def _whole(path: Path) -> bytes:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.digest()
