"""Folders of CT and PET slices through a ct-pet network: a mask of 0 and 255 for each pair, under the same name.

Letters: H W pixels; 2 is CT, then PET.
"""

from __future__ import annotations

import heapq
import logging
import os
import shutil
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from medssl_cli.core.errors import ConfigError, DataError
from medssl_cli.core.result import Result
from medssl_cli.core.run import (
    RESEARCH_NOTE,
    check_out_folder,
    claim_out_folder,
    hide_home,
    locked,
    plain,
    result_header,
    say_disk_errors,
    temporary_folder,
    write_failures,
    write_json,
)
from medssl_cli.core.wording import counted
from medssl_cli.data.ct_pet import Triple, find_pairs, pair_folders, read_pair
from medssl_cli.data.images import is_image, volume_stem, write_image
from medssl_cli.report.labels import label_colour, painted
from medssl_cli.report.overlay import fitted, montage, resized, window
from medssl_cli.report.segmentation_page import PairRow, pairs_page
from medssl_cli.services.case_results import remove_results, shown
from medssl_cli.services.ct_pet_volume import WINDOW_KEYS
from medssl_cli.services.devices import saying_memory
from medssl_cli.services.infer_cohort import (
    COMMAND,
    Failure,
    InferRequest,
    Progress,
    failure_facts,
    failure_of,
    needless,
    nothing_to_replace_it,
    partial_failure,
)
from medssl_cli.services.lookup import FoundModel
from medssl_cli.services.segment_results import (
    decision_text,
    model_facts,
    provenance_of,
    resource_facts,
    save_array,
)
from medssl_cli.services.segmentation_inference import (
    DEFAULT_THRESHOLD,
    InferSegmentConfig,
    decide,
    segment_pictures,
    threshold_of,
)
from medssl_cli.services.segmenter import Segmenter

log = logging.getLogger(__name__)

PREDICTIONS, PROBABILITIES = "predictions", "probabilities"
CARDS = 60
"""Pairs with pictures in the report, those with the largest segmented areas."""
CARD_SIDE = 192
OVERLAY_PAIRS = 4
OVERLAY_SIDE = 320


# --- what was named --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Folders:
    """Where the pairs lie; two files are one pair."""

    ct: Path
    pet: Path

    def triples(self) -> list[Triple]:
        """The pairs, sorted by name.

        Raises:
            DataError: A picture without its partner, no picture at all, or two whose masks would have one name.
        """
        if self.ct.is_file() and self.pet.is_file():
            return [Triple(self.ct.name, "", self.ct, self.pet)]
        triples = find_pairs(self.ct, self.pet)
        twice = [stem for stem, count in Counter(Path(triple.name).stem for triple in triples).items() if count > 1]
        if twice:
            raise DataError(
                "Pictures differ in their ending alone: their masks would have one name.",
                where=f"{hide_home(str(self.ct))}: {', '.join(sorted(twice)[:5])}",
                fix="give them different names, in both folders",
                code="names_twice",
            )
        return triples


def paired_folders(request: InferRequest) -> Folders | None:
    """What was named as CT and PET pictures; None where cases were named that are none.

    ``--ct`` with ``--pet``, two folders as words, CT first, or one folder that holds both.

    Raises:
        ConfigError: One of the two is missing, they are named twice, or the words stand the wrong way round.
    """
    words = [Path(word) for word in request.cases]
    if request.ct is not None or request.pet is not None:
        if request.ct is None or request.pet is None or words:
            raise ConfigError(
                "--ct and --pet belong together, and stand alone.",
                where=f"--ct {request.ct}, --pet {request.pet}, words: {' '.join(request.cases) or 'none'}",
                fix="medssl infer --ct CT_FOLDER --pet PET_FOLDER --model RUN",
                code="pair_incomplete",
            )
        return Folders(request.ct, request.pet)
    if len(words) == 1 and words[0].is_dir():
        found = pair_folders(words[0])
        if found is None or any(volume_stem(path) is not None for path in found[0].iterdir()):
            return None
        return Folders(*found)
    if len(words) == 2 and all(_holds_pictures(word) for word in words):
        if "pet" in words[0].name.lower() and "pet" not in words[1].name.lower():
            raise ConfigError(
                "The folder of CT slices comes first.",
                where=" ".join(request.cases),
                fix="name the CT folder, then the PET folder, or say which is which with --ct and --pet",
                code="pair_order",
            )
        return Folders(*words)
    return None


def _holds_pictures(folder: Path) -> bool:
    return folder.is_dir() and any(is_image(path) for path in folder.iterdir())


# --- the use case ----------------------------------------------------------------------------------------------------


def infer_pairs(
    request: InferRequest,
    found: FoundModel,
    segmenter: Segmenter,
    config: InferSegmentConfig,
    folders: Folders,
    *,
    started: float,
    progress: Progress | None = None,
) -> Result:
    """Segment every pair of two folders.

    Results are complete or not at all: masks are made aside and put in their place together. The folder of masks holds
    those of this run alone; a pair that failed has none.

    Raises:
        ConfigError: Options without effect on pictures.
        DataError: Pictures without their partner, all of them; a pair that cannot be read (with ``on_error: stop``).
    """
    _refuse_idle(request, config)
    triples = folders.triples()
    inputs = [folders.ct, folders.pet, segmenter.run]
    would_go = check_out_folder(request.out, COMMAND, overwrite=request.overwrite, inputs=inputs)
    with locked(request.out, "output folder"):
        if not would_go:
            for leftover in request.out.glob(".tmp-*"):
                shutil.rmtree(leftover)
        temporary = temporary_folder(request.out, "pairs")
        try:
            work = _Work(request, segmenter, config, triples, temporary)
            with saying_memory(segmenter.device, "batch_size=1"):
                work.run(progress)
            if not work.rows:
                raise nothing_to_replace_it(work.failures) if would_go else _all_failed(work.failures)
            summary = _summary(work, found, folders, started)
            _write_pages(work, summary)
            claim_out_folder(request.out, COMMAND, overwrite=request.overwrite, inputs=inputs, keep=(temporary,))
            write_failures(request.out / "failures.csv", work.failures)
            _publish(temporary / "results", request.out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    facts = plain({**result_header(COMMAND, started), "cases": [summary], "failures": failure_facts(work.failures)})
    return Result(_lines(summary, request), facts, partial_failure(work.failures, len(triples), request.out))


def _refuse_idle(request: InferRequest, config: InferSegmentConfig) -> None:
    idle = {"--sequence": request.sequence, "--dicom": request.dicom}
    idle |= {key: getattr(config, key, None) for key in WINDOW_KEYS.values()}
    given = [f"{name} {value}" for name, value in idle.items() if value is not None]
    if given:
        raise needless("This has no effect on pairs of pictures.", ", ".join(given), "leave it out")


def _all_failed(failures: Sequence[Failure]) -> DataError:
    return DataError(
        f"None of {counted(len(failures), 'pair')} could be segmented.",
        where="\n".join(f"{path}: {reason}" for _, path, reason, _ in failures[:5]),
        fix=failures[0][3],
        code="cases_failed",
    )


class _Work:
    """The pairs of one command on their way, and what is known of those that are done."""

    def __init__(
        self,
        request: InferRequest,
        segmenter: Segmenter,
        config: InferSegmentConfig,
        triples: Sequence[Triple],
        temporary: Path,
    ) -> None:
        self.request, self.config = request, config
        self.segmenter = replace(segmenter, tile=0)  # the network learned from whole slices and pads them itself
        self.triples = triples
        self.threshold, self.threshold_source = threshold_of(segmenter, request.threshold)
        self.folder = temporary / "results"
        self.rows: list[PairRow] = []
        self.failures: list[Failure] = []
        self._shown: list[tuple[int, int]] = []
        for name in (PREDICTIONS, *([PROBABILITIES] if config.save_probabilities else [])):
            (self.folder / name).mkdir(parents=True)

    def run(self, progress: Progress | None) -> None:
        """Segment all pairs, or with ``on_error: skip`` all that can be read."""
        going: deque[tuple[Triple, np.ndarray]] = deque()
        for probability_CHW in segment_pictures(self.segmenter, self._read(going), self.config):
            self._keep(*going.popleft(), probability_CHW)
            if progress is not None:
                progress(len(self.rows) + len(self.failures), len(self.triples))

    def _read(self, going: deque[tuple[Triple, np.ndarray]]) -> Iterator[np.ndarray]:
        """The pairs as training reads them; what is on its way stands in ``going``."""
        for triple in self.triples:
            try:
                pair_2HW = read_pair(triple)
            except DataError as error:
                if self.request.on_error == "stop":
                    raise
                log.warning("%s: %s", triple.name, error.what)
                self.failures.append(failure_of(triple.name, triple.ct, error))
                continue
            going.append((triple, pair_2HW))
            yield pair_2HW

    def _keep(self, triple: Triple, pair_2HW: np.ndarray, probability_CHW: np.ndarray) -> None:
        stem = Path(triple.name).stem
        limit = DEFAULT_THRESHOLD if self.threshold is None else self.threshold
        mask_HW = decide(probability_CHW, limit)
        write_image(self.folder / PREDICTIONS / f"{stem}.png", mask_HW * np.uint8(255))
        if self.config.save_probabilities:
            save_array(self.folder / PROBABILITIES / f"{stem}.npy", probability_CHW[0])
        pixels = int(mask_HW.sum())
        place = len(self.rows)
        self.rows.append(PairRow(triple.name, pixels / mask_HW.size, pixels, None))
        heapq.heappush(self._shown, (pixels, -place))
        self._draw(place, pair_2HW, mask_HW)

    def _draw(self, place: int, pair_2HW: np.ndarray, mask_HW: np.ndarray) -> None:
        """Pictures of this pair, and none any more of the one with the smallest area when there are too many."""
        ct, pet = (window(plane_HW, 0.0, 1.0) for plane_HW in pair_2HW)
        overlay = painted(ct, mask_HW, (label_colour(0),))
        small = (_fitting(ct, OVERLAY_SIDE), _fitting(pet, OVERLAY_SIDE), _fitting(overlay, OVERLAY_SIDE))
        self.rows[place] = replace(self.rows[place], pictures=small)
        if len(self._shown) > CARDS:
            _, leaving = heapq.heappop(self._shown)
            self.rows[-leaving] = replace(self.rows[-leaving], pictures=None)


def _fitting(picture: np.ndarray, side: int) -> np.ndarray:
    """The picture with its longer side at most ``side`` pixels."""
    scale = min(1.0, side / max(picture.shape[:2]))
    return resized(picture, *(max(1, round(n * scale)) for n in picture.shape[:2]))


# --- results ---------------------------------------------------------------------------------------------------------


def _summary(work: _Work, found: FoundModel, folders: Folders, started: float) -> dict[str, Any]:
    segmenter, rows = work.segmenter, work.rows
    config = {"threshold": work.request.threshold, "device": work.request.device}
    reasons = {"volume_ml": "pictures have no size in millimetres"}
    return plain(
        {
            **result_header(COMMAND, started),
            "case_id": folders.ct.parent.resolve().name if folders.ct.is_dir() else Path(rows[0].name).stem,
            "inputs": {"CT": shown(folders.ct), "PET": shown(folders.pet)},
            "output_dir": shown(work.request.out),
            "config": {**config, **work.config.model_dump(mode="json")},
            **model_facts(segmenter, found),
            "classes": list(segmenter.classes),
            "n_pairs": len(rows),
            "n_failed": len(work.failures),
            "n_with_lesion": sum(row.pixels > 0 for row in rows),
            "threshold": work.threshold,
            "threshold_source": work.threshold_source,
            "decision": decision_text(segmenter, work.request.threshold, "pixel"),
            "predictions": PREDICTIONS,
            "predictions_definition": "0 and 255, one picture a pair, of its size and under its name",
            "probabilities": PROBABILITIES if work.config.save_probabilities else None,
            "volume_ml": None,
            "pairs": [{"name": row.name, "pixels": row.pixels, "share": row.share} for row in rows],
            "pairs_definition": "pixels of the mask, and their share of the picture",
            "files": ["overlay.png", "report.html"],
            "flags": [],
            **resource_facts(segmenter.device, reasons),
            "note": RESEARCH_NOTE,
        }
    )


def _write_pages(work: _Work, summary: dict[str, Any]) -> None:
    drawn = sorted((row for row in work.rows if row.pictures), key=lambda row: -row.pixels)[:OVERLAY_PAIRS]
    tiles = [fitted(picture, OVERLAY_SIDE) for row in drawn for picture in row.pictures or ()]
    write_image(work.folder / "overlay.png", montage(tiles, columns=3))
    rows = [replace(row, pictures=_thumbnails(row)) for row in work.rows]
    page = pairs_page(
        f"{counted(len(rows), 'CT-PET pair')}",
        rows,
        lead=f"Masks of the network {work.segmenter.run.name}: {', '.join(work.segmenter.classes[1:])}.",
        decided=summary["decision"],
        flags=[],
        facts=provenance_of(summary),
    )
    page.write(work.folder / "report.html")
    write_json(work.folder / "summary.json", summary)


def _thumbnails(row: PairRow) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    if row.pictures is None:
        return None
    ct, pet, overlay = (_fitting(picture, CARD_SIDE) for picture in row.pictures)
    return ct, pet, overlay


def _publish(folder: Path, out: Path) -> None:
    """Move finished results to where they belong; ``summary.json`` goes first and comes last."""
    with say_disk_errors(out):
        remove_results(out)
        for name in (PREDICTIONS, PROBABILITIES):
            if (out / name).is_dir():
                shutil.rmtree(out / name)
        for path in sorted(folder.iterdir(), key=lambda path: path.name == "summary.json"):
            os.replace(path, out / path.name)


def _lines(summary: dict[str, Any], request: InferRequest) -> list[str]:
    done, filled = counted(summary["n_pairs"], "pair"), summary["n_with_lesion"]
    return [
        f"{done} segmented, {filled} with {summary['classes'][1]}",
        f"threshold: {summary['threshold']:g} ({summary['threshold_source']})",
        f"masks:     {request.out / PREDICTIONS}",
        f"report:    {request.out / 'report.html'}",
    ]
