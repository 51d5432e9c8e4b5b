"""The teacher scored on labelled cases while it trains: probes on its frozen cls tokens, and the best teacher kept.

Nothing of it flows back: the teacher is looked at in evaluation mode without gradients, modes and random states are put
back, and a run with evaluation has the numbers of one without. Selection looks at the validation part alone; the test
part is scored once, when the caller asks for it at the end.

Below the run folder: ``eval/step_0001000/results.json`` for each score, ``eval/history.jsonl`` with one line each, and
``eval/best/`` with the teacher whose first metric on the validation part was highest.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import logging
import math
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from medssl_cli.core.case import Case
from medssl_cli.core.errors import CheckpointError
from medssl_cli.core.run import (
    digest_of,
    plain,
    publish_folder,
    result_header,
    say_disk_errors,
    seed_for,
    temporary_folder,
    write_json,
    write_text,
)
from medssl_cli.core.wording import counted
from medssl_cli.data.datasets import DataConfig, prepare_store
from medssl_cli.metrics.classification import (
    DEFINITIONS,
    LogisticProbe,
    c_grid,
    f1,
    fit_logistic,
    knn_probabilities,
    multiclass_auc,
    score_classes,
)
from medssl_cli.models.convnext import ConvNeXt
from medssl_cli.models.vit import VisionTransformer
from medssl_cli.models.zoo import load_backbone, save_backbone
from medssl_cli.services.backbone import Backbone
from medssl_cli.services.labelled_data import EvaluationConfig, LabelledData, Probe, count_seen, read_labelled_data
from medssl_cli.services.labelled_images import Autocast, LabelledImages
from medssl_cli.services.lookup import FoundModel

log = logging.getLogger(__name__)

FOLDER = "eval"
_TOKENS = {"cls": "cls token", "mean": "mean patch token", "cls_mean": "cls and mean patch token"}
BEST_WEIGHTS = "teacher_checkpoint.safetensors"
RANDOM_SUBSET = "random"
_OLD_BEST = ".best-before"

Network = VisionTransformer | ConvNeXt
Card = Callable[[int], Mapping[str, Any]]
"""Step -> what the card of exported weights says besides the network."""


@dataclass(frozen=True)
class Look:
    """How images become what the network takes; as in training.

    Args:
        mean, std: Of ``normalize``: one number, or one a channel.
        autocast: Number format of the run.
    """

    mean: float | tuple[float, ...] = 0.45
    std: float | tuple[float, ...] = 0.22
    autocast: Autocast = nullcontext


def prepare_evaluation(
    config: EvaluationConfig,
    data: DataConfig,
    out: Path,
    *,
    cache: Path,
    look: Look,
    card: Card,
    labelled: LabelledData | None = None,
    pretraining: Sequence[Case] = (),
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> OnlineEvaluation:
    """Read the labelled cases and prepare their images, once for the whole run.

    Args:
        config: Of the evaluation.
        data: Of the run; labelled images are prepared alike, in the same cache.
        out: Run folder; nothing is written yet.
        cache: Of prepared images.
        look: Normalisation and number format of the run.
        card: For the weights of the best teacher.
        labelled: The cases, where they were read before.
        pretraining: Cases of the run, to count how many labelled ones it sees.
        workers: Processes that prepare.
        progress: Told (cases prepared, cases in all).

    Raises:
        ConfigError: Labels are not named as they must be.
        DataError: Labels or images missing or damaged, too few classes, or a leak between the parts.
    """
    labelled = read_labelled_data(config, data) if labelled is None else labelled
    data = labelled.config
    store = prepare_store(labelled.cases, data, cache, kind=labelled.kind, workers=workers, progress=progress)
    images = LabelledImages(
        store,
        data,
        slices=config.slices,
        max_side=config.max_side,
        batch_size=config.batch_size,
        tokens=config.tokens,
    )
    return OnlineEvaluation(
        config=config,
        data=data,
        labelled=labelled,
        images=images,
        out=out,
        look=look,
        card=card,
        seen_in_pretraining=count_seen(labelled.cases, pretraining),
    )


@dataclass
class OnlineEvaluation:
    """Scores teachers of one run; used by one process only.

    Args:
        config: What is scored, and by what.
        data: Of the run.
        labelled: Cases and classes.
        images: Theirs, prepared.
        out: Run folder.
        look: Normalisation and number format.
        card: For the weights of the best teacher.
        seen_in_pretraining: Labelled cases whose patient or files the run is pretrained on.
    """

    config: EvaluationConfig
    data: DataConfig
    labelled: LabelledData
    images: LabelledImages
    out: Path
    look: Look
    card: Card
    seen_in_pretraining: int = 0

    def __post_init__(self) -> None:
        settings = self.config.model_dump(mode="json", exclude={"eval_period_iterations", "batch_size"})
        self.digest = digest_of("evaluation", settings, self.labelled.digest)
        self._recover_best()

    @property
    def folder(self) -> Path:
        """``RUN/eval``."""
        return self.out / FOLDER

    # --- what the run calls ---

    def score(self, teacher: Network, step: int, *, final: bool = False) -> dict[str, Any]:
        """Score one teacher and write what was found; keep it if it is the best so far.

        A step that is scored already is read back. Step 0 is the level of the start and never the best teacher.

        Args:
            teacher: Its backbone, whole in this process, on any device.
            step: Updates done.
            final: At the end of a run: also score the test part, into ``eval/final``; nothing is selected.

        Returns:
            The contents of ``results.json``.

        Raises:
            DataError: A prepared file is missing or damaged.
            ResourceError: The disk is full; the best teacher so far is intact.
        """
        folder = self.folder / ("final" if final else f"step_{step:07d}")
        known = None if final else self._known(folder, step)
        if known is not None:
            return known
        started = time.time()
        with undisturbed(teacher):
            backbone = self._backbone(teacher, step)
            train = self._embed("train", backbone)
            probes = self._fit(train)
            scores = {
                part: self._score_part(part, backbone, probes) for part in ("val", "test") if self._has(part, final)
            }
            missing = self._score_missing(backbone, probes) if self.config.missing_sequences else {}
        results = self._results(step, probes, scores, started)
        if not final:
            results["is_best"] = self._keep_if_best(teacher, step, results)
        self._write(folder, results, missing)
        if not final:
            self._append(results)
            self._tell(results)
        return results

    def resume(self, step: int) -> None:
        """Forget scores beyond ``step``: those steps are done again. The best teacher stays."""
        for folder in self.folder.glob("step_*"):
            number = folder.name.removeprefix("step_").partition("_")[0]
            if number.isdigit() and int(number) > step:
                shutil.rmtree(folder)
        lines = self.history()
        kept = [line for line in lines if line["iteration"] <= step]
        if len(kept) < len(lines):
            self._write_history(kept)

    def history(self) -> list[dict[str, Any]]:
        """One line for each score so far, in order of the steps."""
        return read_history(self.out)

    def best(self) -> dict[str, Any] | None:
        """Results of the best teacher so far; None if there is none."""
        return _read_json(self.folder / "best/results.json")

    def best_teacher(self) -> Network | None:
        """The best teacher so far, on the CPU; None if there is none."""
        path = self.folder / "best" / BEST_WEIGHTS
        return load_backbone(path)[0] if path.is_file() else None

    # --- features and probes ---

    def _backbone(self, teacher: Network, step: int) -> Backbone:
        return Backbone(
            found=FoundModel(self.out, self.out, f"teacher of step {step}"),
            model=cast(VisionTransformer, teacher),  # a ConvNeXt is asked the same
            card={},
            preprocess=self.data.preprocess,
            mean=self.look.mean,
            std=self.look.std,
            spatial_size=self.data.spatial_size,
            device=next(teacher.parameters()).device,
        )

    def _has(self, part: str, final: bool) -> bool:
        return part == "val" or (final and part in self.labelled.parts)

    def _embed(self, part: str, backbone: Backbone, shown: Mapping[str, np.ndarray] | None = None) -> _Embedded:
        cases = self.images.held(self.labelled.parts[part])
        if shown is not None:
            cases = [case for case in cases if (self.images.available(case) & shown[case.case_id]).any()]
        place = {label: number for number, label in enumerate(self.labelled.classes)}
        reference = np.array([place[case.label] for case in cases], dtype=int)
        features = self.images.embed(cases, backbone, self.look.autocast, shown)
        return _Embedded(cases, features, reference)

    def _fit(self, train: _Embedded) -> dict[Probe, _Fitted]:
        if not np.isfinite(train.features_ND).all() or len(np.unique(train.reference_N)) < 2:
            return {}
        classes = len(self.labelled.classes)
        fitted: dict[Probe, _Fitted] = {}
        if "knn" in self.config.probes:
            tell = partial(_knn, train.features_ND, train.reference_N, classes, self.config.knn_k)
            fitted["knn"] = _Fitted(tell, {"k": min(self.config.knn_k, len(train.cases)), "n_fitted": len(train.cases)})
        if "linear" in self.config.probes:
            probe = self._fit_linear(train, classes)
            fitted["linear"] = _Fitted(probe.probabilities, _say_fit(probe, len(self.labelled.held)))
        return fitted

    def _fit_linear(self, train: _Embedded, classes: int) -> LogisticProbe:
        held_N = np.array([case.case_id in self.labelled.held for case in train.cases])
        values = c_grid(self.config.c_values) if self.config.c_values > 1 else np.ones(1)
        chooser = partial(score_classes, self.config.metric_types[0])
        return fit_logistic(
            train.features_ND, train.reference_N, classes, held_N=held_N, c_values=values, score=chooser
        )

    def _score_part(
        self,
        part: str,
        backbone: Backbone,
        probes: Mapping[Probe, _Fitted],
        shown: Mapping[str, np.ndarray] | None = None,
    ) -> dict[str, Any]:
        """Metrics of each probe on one part, plain data."""
        told = self._embed(part, backbone, shown)
        finite = bool(np.isfinite(told.features_ND).all())
        found: dict[str, Any] = {}
        for name, fitted in probes.items():
            if finite and len(told.cases):
                found[name] = self._metrics(fitted.probabilities(told.features_ND), told.reference_N)
        return {"n": len(told.cases), "probes": found, "reason": self._why_nothing(told, finite, probes)}

    def _metrics(self, probabilities_NK: np.ndarray, reference: np.ndarray) -> dict[str, Any]:
        classes = self.labelled.classes
        names = [name for name in DEFINITIONS if name != "binary_auc" or len(classes) == 2]
        values = {name: score_classes(name, probabilities_NK, reference) for name in names}
        skipped = multiclass_auc(probabilities_NK, reference).skipped
        per_class = f1(probabilities_NK.argmax(1), reference, len(classes))
        return {
            **values,
            "f1_per_class": dict(zip(classes, per_class, strict=True)),
            "auc_skipped": [classes[k] for k in skipped],
        }

    def _why_nothing(self, told: _Embedded, finite: bool, probes: Mapping[Probe, _Fitted]) -> str | None:
        if not probes:
            return "the embeddings of the training part are not finite, or only one class of it could be prepared"
        if not finite:
            return "the embeddings are not finite"
        return None if len(told.cases) else "no case to score"

    # --- sequences left out ---

    def _score_missing(self, backbone: Backbone, probes: Mapping[Probe, _Fitted]) -> dict[str, dict[str, Any]]:
        """Scores of the validation part with sequences left out; the probes are those of whole cases."""
        names = self.images.sequences
        if names is None or len(names) < 2:
            return {}
        cases = self.labelled.parts["val"]
        found = {}
        for subset in subsets(names):
            shown_S = np.array([name in subset for name in names])
            shown = {case.case_id: shown_S for case in cases}
            found["-".join(subset)] = self._score_part("val", backbone, probes, shown)
        dropped = {case.case_id: self._one_dropped(case) for case in self.images.held(cases)}
        found[RANDOM_SUBSET] = self._score_part("val", backbone, probes, dropped)
        return found

    def _one_dropped(self, case: Case) -> np.ndarray:
        """(S,) bool: all but one of its sequences, the same one at every step; a case's only sequence stays."""
        available = self.images.available(case)
        shown, present = np.ones(len(available), dtype=bool), np.flatnonzero(available)
        if len(present) > 1:
            draw = np.random.default_rng(seed_for(0, "dropped sequence", case.case_id))
            shown[present[draw.integers(len(present))]] = False
        return shown

    # --- results ---

    def _results(
        self, step: int, probes: Mapping[Probe, _Fitted], scores: Mapping[str, Mapping[str, Any]], started: float
    ) -> dict[str, Any]:
        metric, probe = self.config.metric_types[0], self.config.deciding_probe
        value = scores["val"]["probes"].get(probe, {}).get(metric)
        return plain(
            {
                **result_header("pretrain", started),
                "step": step,
                "is_start": step == 0,
                "metric": metric,
                "probe": probe,
                "value": value,
                "metric_types": self.config.metric_types,
                "scores": scores,
                "probes": {name: fitted.facts for name, fitted in probes.items()},
                "undefined": _undefined(scores),
                "definitions": {**DEFINITIONS, "images": self._say_images()},
                "classes": self.labelled.classes,
                "n_cases": self.labelled.counts(),
                "split": {
                    "division": self.labelled.division,
                    "group_by": self.labelled.group_level,
                    "digest": self.labelled.digest,
                },
                "seen_in_pretraining": self.seen_in_pretraining,
                "evaluation_digest": self.digest,
            }
        )

    def _say_images(self) -> str:
        tokens = _TOKENS[self.config.tokens]
        if self.labelled.kind == "images":
            return f"{tokens} of the whole picture, longer side at most {self.config.max_side} pixels"
        which = "the axial slice with most region of interest, or the middle one"
        if self.config.slices > 1:
            which = f"the mean over {self.config.slices} axial slices"
        return f"{tokens} of {which}, in the training window of {self.data.spatial_size} pixels"

    def _write(self, folder: Path, results: Mapping[str, Any], missing: Mapping[str, Mapping[str, Any]]) -> None:
        """Subsets first: a step counts as scored once its own results are there."""
        common = {
            key: value for key, value in results.items() if key not in ("scores", "value", "undefined", "is_best")
        }
        for name, scores in missing.items():
            value = scores["probes"].get(results["probe"], {}).get(results["metric"])
            subset = {"mri_sequences": name, "value": value, "scores": {"val": scores}}
            write_json(
                folder.with_name(f"{folder.name}_mri_sequences-{name}") / "results.json",
                {**common, **subset, "undefined": _undefined({"val": scores}), "sequences_left_out": _LEFT_OUT},
            )
        best = self.best()
        if missing and best is not None and best["step"] == results["step"]:
            table = _subset_table(missing, results)
            write_text(self.folder / "best_mri_sequences_eval_metrics.csv", table)
        write_json(folder / "results.json", results)

    def _known(self, folder: Path, step: int) -> dict[str, Any] | None:
        """Results of a step that was scored with the same cases and settings, as after a kill and resume."""
        found = _read_json(folder / "results.json")
        if found is None or found.get("evaluation_digest") != self.digest or found.get("step") != step:
            return None
        if step not in {line["iteration"] for line in self.history()}:
            self._append(found)
        return found

    def _append(self, results: Mapping[str, Any]) -> None:
        """Add the line of a step; lines of this step and of later ones, from before a resume, go."""
        step = results["step"]
        metrics = {
            f"{probe}_{name}": values[name]
            for probe, values in results["scores"]["val"]["probes"].items()
            for name in DEFINITIONS
            if name in values
        }
        line = {
            "iteration": step,
            "metric": f"{results['probe']}_{results['metric']}",
            "value": results["value"],
            **metrics,
            "is_best": results["is_best"],
            "seconds": results["elapsed_s"],
            "n_val": results["scores"]["val"]["n"],
        }
        self._write_history([*(old for old in self.history() if old["iteration"] < step), line])

    def _write_history(self, lines: Sequence[Mapping[str, Any]]) -> None:
        text = "".join(json.dumps(plain(line), ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
        write_text(self.folder / "history.jsonl", text)

    def _tell(self, results: Mapping[str, Any]) -> None:
        parts = []
        for probe, values in results["scores"]["val"]["probes"].items():
            shown = ", ".join(f"{name} {_show(values.get(name))}" for name in self.config.metric_types)
            parts.append(f"{probe} {shown}")
        reason = results["scores"]["val"]["reason"]
        log.info(
            "[eval %d] %s%s (%s, %.1f s)",
            results["step"],
            "; ".join(parts) or f"undefined: {reason}",
            "; best so far" if results["is_best"] else "",
            counted(results["scores"]["val"]["n"], "case"),
            results["elapsed_s"],
        )

    # --- the best teacher ---

    def _keep_if_best(self, teacher: Network, step: int, results: Mapping[str, Any]) -> bool:
        """Keep a teacher whose value is above the best one's; an undefined value never is, nor is the start."""
        value, best = results["value"], self.best()
        if best is not None and best.get("evaluation_digest") != self.digest:
            log.warning("eval/best was chosen with other cases or settings; it is replaced by the next best teacher.")
            best = None
        if best is not None and best["step"] == step:  # kept before a kill came
            return bool(best["value"] == value)
        if value is None or step == 0 or (best is not None and value <= best["value"]):
            return False
        temporary = temporary_folder(self.folder, "best")
        try:
            with say_disk_errors(self.folder):
                facts = {**self.card(step), "evaluation": {k: results[k] for k in ("metric", "probe", "value")}}
                save_backbone(temporary / BEST_WEIGHTS, teacher, facts)
                write_json(temporary / "results.json", {**results, "is_best": True})
                self._replace_best(temporary)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return True

    def _replace_best(self, temporary: Path) -> None:
        """Put the new folder in the place of the old one.

        Folders cannot be exchanged in one step: the old one steps aside, and comes back if the new one never came.
        """
        final, old = self.folder / "best", self.folder / _OLD_BEST
        if final.exists():
            final.rename(old)
        publish_folder(temporary, final)
        shutil.rmtree(old, ignore_errors=True)

    def _recover_best(self) -> None:
        final, old = self.folder / "best", self.folder / _OLD_BEST
        if old.exists() and not final.exists():
            old.rename(final)
        for leftover in (*self.folder.glob(".tmp-best-*"), old):
            shutil.rmtree(leftover, ignore_errors=True)


@dataclass(frozen=True)
class _Embedded:
    """Cases with their embeddings and classes."""

    cases: list[Case]
    features_ND: np.ndarray
    reference_N: np.ndarray


@dataclass(frozen=True)
class _Fitted:
    """A probe that tells probabilities (M, K) of embeddings (M, D), and what is to be said of it."""

    probabilities: Callable[[np.ndarray], np.ndarray]
    facts: dict[str, Any]


_LEFT_OUT = "tokens of sequences left out are mask tokens; the probes were fitted to cases with all their sequences"


@contextmanager
def undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """The block sees ``model`` in evaluation mode without gradients; modes and random states are put back after it."""
    modes = [(module, module.training) for module in model.modules()]
    python, numpy_state = random.getstate(), np.random.get_state()
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(device.index for device in devices)), torch.no_grad():
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
            random.setstate(python)
            np.random.set_state(numpy_state)


def subsets(names: Sequence[str]) -> list[tuple[str, ...]]:
    """Every choice of some of the names, single ones first, all of them last."""
    return [chosen for size in range(1, len(names) + 1) for chosen in itertools.combinations(names, size)]


def read_history(out: Path) -> list[dict[str, Any]]:
    """Lines of ``eval/history.jsonl`` of a run folder; empty if there is none."""
    path = out / FOLDER / "history.jsonl"
    if not path.is_file():
        return []
    try:
        return [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise _damaged(path, error) from error


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        "Results of an evaluation are damaged.",
        where=f"{path}: {' '.join(str(error).split())[:200]}",
        fix="remove this file; it is written again",
        code="results_damaged",
    )


def _knn(train_ND: np.ndarray, reference_N: np.ndarray, classes: int, k: int, features_MD: np.ndarray) -> np.ndarray:
    return knn_probabilities(train_ND, reference_N, features_MD, classes, k)


def _say_fit(probe: LogisticProbe, held: int) -> dict[str, Any]:
    defined = [value for _, value in probe.sweep if not math.isnan(value)]
    return {
        "c": probe.c,
        "c_chosen_on": f"{counted(held, 'training case')}, by the first metric" if defined else "not chosen: 1",
        "converged": probe.converged,
        "n_fitted": probe.n_train,
        "sweep": [list(pair) for pair in probe.sweep],
    }


def _undefined(scores: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Why a number is null, by its place."""
    found = {}
    for part, told in scores.items():
        if told["reason"]:
            found[part] = told["reason"]
        for probe, values in told["probes"].items():
            place = f"{part}.{probe}"
            for name in DEFINITIONS:
                if name in values and (values[name] is None or math.isnan(values[name])):
                    found[f"{place}.{name}"] = "only one class among the cases scored"
            for label, value in values["f1_per_class"].items():
                if value is None or math.isnan(value):
                    found[f"{place}.f1_per_class.{label}"] = "no case is or was told to be of this class"
    return found


def _subset_table(missing: Mapping[str, Mapping[str, Any]], results: Mapping[str, Any]) -> str:
    """CSV of the best teacher with sequences left out: one row a subset and probe."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(("mri_sequences", "step", "probe", "n", *DEFINITIONS))
    for name, scores in missing.items():
        for probe, values in scores["probes"].items():
            cells = [_cell(values.get(metric)) for metric in DEFINITIONS]
            writer.writerow((name, results["step"], probe, scores["n"], *cells))
    return file.getvalue()


def _cell(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else repr(float(value))


def _show(value: float | None) -> str:
    return "n/a" if value is None or math.isnan(value) else f"{value:.3f}"
