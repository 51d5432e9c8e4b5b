#!/usr/bin/env python
"""What a threshold on PET finds: ``python scripts/pet_baseline.py TREE OUT``, to hold a network against.

TREE is a CT-PET data set with folders of a split. Two rules are tried on its training part: a fixed grey value, and a
share of the largest value of the slice above a least value. The one with the larger mean Dice over slices is applied to
``test``; masks go to OUT, for ``medssl eval --predictions OUT --reference TREE/test/masks``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from medssl_cli.core.errors import MedsslError
from medssl_cli.data.ct_pet import Triple, read_ct_pet, read_pair, read_pet_ct_mask
from medssl_cli.data.images import write_image

Rule = Callable[[np.ndarray], np.ndarray]
"""PET (H, W) in [0, 1] -> mask."""


def fixed(level: float) -> Rule:
    """Everything at or above one value."""
    return lambda pet_HW: pet_HW >= level


def relative(share: float, least: float) -> Rule:
    """Everything at or above a share of the slice's largest value, where that reaches ``least``."""
    return lambda pet_HW: pet_HW >= max(share * float(pet_HW.max()), least)


def rules() -> dict[str, Rule]:
    """All rules that are tried, by what they are called."""
    found = {f"PET >= {level}/255": fixed(level / 255) for level in range(5, 130, 5)}
    for share in (0.3, 0.41, 0.5):
        for least in (10, 20, 30, 40):
            found[f"PET >= {share:g} of the slice's maximum, at least {least}/255"] = relative(share, least / 255)
    return found


def mean_dice(rule: Rule, pictures: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
    """Mean over slices; 1 where neither holds anything."""
    values = []
    for pet_HW, mask_HW in pictures:
        found = rule(pet_HW)
        both = int(found.sum() + mask_HW.sum())
        values.append(1.0 if both == 0 else 2 * int((found & mask_HW).sum()) / both)
    return float(np.mean(values))


def pictures_of(triples: Sequence[Triple]) -> list[tuple[np.ndarray, np.ndarray]]:
    """PET in [0, 1] and mask of each slice."""
    return [(read_pair(t)[1], read_pet_ct_mask(t.mask) > 0) for t in triples if t.mask is not None]


def main(words: Sequence[str] | None = None) -> int:
    """Choose on train, apply to test."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("tree", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--patient-regex")
    given = parser.parse_args(words)
    try:
        parts = read_ct_pet(given.tree, patient_regex=given.patient_regex).parts
    except MedsslError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    train, test = pictures_of(parts["train"]), pictures_of(parts["test"])
    scores = {name: mean_dice(rule, train) for name, rule in rules().items()}
    best = max(scores, key=lambda name: scores[name])
    rule = rules()[best]
    given.out.mkdir(parents=True, exist_ok=True)
    for triple, (pet_HW, _) in zip(parts["test"], test, strict=True):
        write_image(given.out / triple.name, np.where(rule(pet_HW), np.uint8(255), np.uint8(0)))
    print(f"{best}: mean Dice {scores[best]:.3f} on {len(train)} slices of train, {mean_dice(rule, test):.3f} on test")
    return 0


if __name__ == "__main__":
    sys.exit(main())
