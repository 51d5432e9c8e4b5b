"""``run.html``: how a pretraining run stands, as one page that needs nothing else.

It is made of what lies in the run folder, so it can be written again at any time and never disagrees with the files.
A file that is not there yet leaves its section out; one that is damaged is said to be.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import yaml

from medssl_cli.core.config import leaves
from medssl_cli.core.run import hide_home
from medssl_cli.report.page import Content, Html, Page, chip, escaped, image, joined

PAGE = "run.html"
SHOWN_CHECKPOINTS = 20
SHOWN_SCORES = 30

_STATUS = {
    "running": ("info", "The run is at work; this page is written anew at each checkpoint."),
    "finished": ("ok", "The run is finished."),
    "interrupted": ("warning", "The run was interrupted and its state is saved."),
    "failed": ("error", "The run ended with an error."),
}
_LAST = (
    ("total_loss", "total loss"),
    ("dino_global_crops_loss", "DINO, global crops"),
    ("dino_local_crops_loss", "DINO, local crops"),
    ("ibot_loss", "iBOT"),
    ("koleo_loss", "KoLeo"),
    ("teacher_entropy", "teacher entropy / ln K"),
    ("effective_rank", "effective rank"),
    ("dino_agreement", "student and teacher agree"),
    ("center_norm", "length of the centre"),
    ("lr", "learning rate"),
    ("mom", "teacher momentum"),
    ("images_per_s", "images a second"),
    ("data_wait_percent", "waiting for data, %"),
    ("memory_gib", "peak memory, GiB"),
)
"""Figures of the last logged step, in this order."""

_PROBES = {"linear": "linear", "knn": "k-NN"}
_SUMMARY = (
    ("student.arch", "backbone"),
    ("student.patch_size", "patch size"),
    ("crops.global_crops_size", "global crops, pixels"),
    ("crops.local_crops_size", "local crops, pixels"),
    ("crops.local_crops_number", "local crops"),
    ("train.batch_size_per_gpu", "batch a process"),
    ("train.grad_accumulation", "micro-batches a step"),
    ("optim.epochs", "epochs"),
    ("optim.base_lr", "base learning rate"),
    ("train.centering", "centring"),
    ("dino.head_n_prototypes", "prototypes"),
    ("compute_precision.precision", "precision"),
    ("train.seed", "seed"),
)
"""Keys of the configuration that tell one run from another."""


@dataclass
class _Folder:
    """What lies in a run folder; ``faults`` names files that could not be read."""

    path: Path
    faults: list[str] = field(default_factory=list)

    def json(self, name: str) -> dict[str, Any]:
        """A JSON object; empty if there is none."""
        data = self._parsed(name, json.loads)
        return data if isinstance(data, dict) else {}

    def lines(self, name: str) -> list[dict[str, Any]]:
        """Lines of JSON; a last one cut short by a kill is left out."""
        text = self._text(name)
        found = []
        for line in text.splitlines(keepends=True):
            if line.endswith("\n"):
                data = self._parsed(name, json.loads, line)
                found += [data] if isinstance(data, dict) else []
        return found

    def config(self) -> dict[str, Any]:
        """Dotted keys of ``config.yaml``."""
        data = self._parsed("config.yaml", yaml.safe_load)
        return dict(leaves(data)) if isinstance(data, dict) else {}

    def bytes(self, name: str) -> bytes:
        """A file as it is; nothing if there is none."""
        path = self.path / name
        return path.read_bytes() if path.is_file() else b""

    def _text(self, name: str) -> str:
        path = self.path / name
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""

    def _parsed(self, name: str, parse: Any, text: str | None = None) -> Any:
        text = self._text(name) if text is None else text
        if not text.strip():
            return None
        try:
            return parse(text)
        except (ValueError, yaml.YAMLError) as error:
            fault = f"{name}: {' '.join(str(error).split())[:120]}"
            if fault not in self.faults:
                self.faults.append(fault)
            return None


def write_run_page(run: Path, alarms: Sequence[Mapping[str, Any]] = ()) -> Path:
    """Write ``run.html`` of a run folder, whole or not at all.

    Args:
        run: Folder of the run.
        alarms: Health alarms so far, as plain data: step, name, value, threshold, side, meaning, fix, is_collapse.

    Returns:
        The page.

    Raises:
        ResourceError: The disk is full; an older page is as it was.
    """
    folder = _Folder(run)
    record, rows = folder.json("run.json"), folder.lines("training_metrics.jsonl")
    page = Page(f"Pretraining {record.get('recipe') or run.name}", _lead(record, rows))
    _add_status(page, record, rows, run)
    _add_alarms(page, alarms)
    _add_curves(page, folder, rows)
    _add_scores(page, folder)
    _add_files(page, run, record)
    _add_config(page, folder.config(), record)
    _add_environment(page, record)
    for fault in folder.faults:
        page.note(f"A file of the run could not be read. {fault}", "warning")
    page.write(run / PAGE)
    return run / PAGE


# --- sections --------------------------------------------------------------------------------------------------------


def _lead(record: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    step, total = _step(record, rows), record.get("total_steps")
    where = f"step {step:,} of {total:,}" if isinstance(total, int) else f"step {step:,}"
    device = record.get("device")
    return f"{where}, on {device}" if device else where


def _add_status(page: Page, record: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], run: Path) -> None:
    status = str(record.get("status", "unknown"))
    kind, text = _STATUS.get(status, ("warning", "run.json does not tell how the run stands."))
    page.note(joined([chip(status, kind), text, record.get("reason") or ""]), kind)
    last = rows[-1] if rows else {}
    facts: list[tuple[str, Content]] = [("step", f"{_step(record, rows):,}")]
    if isinstance(record.get("total_steps"), int):
        share = 100 * _step(record, rows) / max(record["total_steps"], 1)
        facts.append(("done", f"{share:.0f} % of {record['total_steps']:,} steps"))
    if status == "running" and _is_number(last.get("eta_s")):
        facts.append(("time left", str(timedelta(seconds=round(last["eta_s"])))))
    if _is_number(record.get("elapsed_s")):
        facts.append(("time taken", str(timedelta(seconds=round(record["elapsed_s"])))))
    facts += [
        (name, record[key]) for key, name in (("n_cases", "cases"), ("n_failed", "cases left out")) if key in record
    ]
    page.facts(facts)
    if status != "finished":
        page.text(joined(["The same command goes on from the newest checkpoint:", _code(_command(record, run))]))


def _add_alarms(page: Page, alarms: Sequence[Mapping[str, Any]]) -> None:
    page.heading("Health", "health")
    if not alarms:
        page.text("No alarm was raised.")
        return
    rows = [
        (
            alarm.get("step"),
            chip(
                "collapse?" if alarm.get("is_collapse") else "odd", "error" if alarm.get("is_collapse") else "warning"
            ),
            str(alarm.get("name", "")),
            alarm.get("value"),
            f"{alarm.get('side', '')} {_short(alarm.get('threshold'))}",
            str(alarm.get("meaning", "")),
            str(alarm.get("fix", "")),
        )
        for alarm in alarms
    ]
    page.table(("step", "", "figure", "value", "limit", "what it says", "what helps"), rows, caption="Alarms")


def _add_curves(page: Page, folder: _Folder, rows: Sequence[Mapping[str, Any]]) -> None:
    data = folder.bytes("progress.png")
    last = rows[-1] if rows else {}
    if data or last:
        page.heading("Progress", "progress")
    if data:
        page.style(".curves img{min-width:56rem}")  # a narrow screen scrolls rather than shrinks them
        curves = image(data, "Curves of the run")
        page.add(Html(f'<div class="scroll curves" tabindex="0" role="region" aria-label="Curves">{curves}</div>'))
    norms = sorted(name for name in last if name.startswith("grad_norm_"))
    names = (*_LAST, *((name, f"gradient norm, {name.removeprefix('grad_norm_')}") for name in norms))
    shown = [(text, last[name]) for name, text in names if _is_number(last.get(name))]
    if shown:
        page.text(f"At step {last.get('iteration')}; losses and norms are medians of the last 20 updates.")
        page.facts(shown)


def _add_scores(page: Page, folder: _Folder) -> None:
    history = folder.lines("eval/history.jsonl")
    if not history:
        return
    page.heading("Scores on labelled cases", "scores")
    best, final = folder.json("eval/best/results.json"), folder.json("eval/final/results.json")
    newest = folder.json(f"eval/step_{int(history[-1].get('iteration', 0)):07d}/results.json")
    page.facts(list(_best_facts(history, best)))
    source = newest or best
    if source:
        page.text(_about_scores(source))
    names = _metric_names(history)
    shown = _thinned(history)
    rows = [
        (line.get("iteration"), chip("best so far", "ok") if line.get("is_best") else "", *map(line.get, names))
        for line in shown
    ]
    left_out = f"; {len(history) - len(shown)} lines left out" if len(shown) < len(history) else ""
    caption = f"Validation cases; step 0 is the start; other metrics stand in eval/step_*/results.json{left_out}"
    page.table(("step", "", *(_metric_title(name) for name in names)), rows, caption=caption)
    if final.get("scores", {}).get("test"):
        test = [
            (probe, values.get(final.get("metric")), values.get("binary_auc", values.get("multiclass_auc")))
            for probe, values in final["scores"]["test"].get("probes", {}).items()
        ]
        page.table(("probe", str(final.get("metric")), "AUC"), test,
                   caption=f"Test cases, scored once at the end: {final['scores']['test'].get('n')}")  # fmt: skip


def _best_facts(history: Sequence[Mapping[str, Any]], best: Mapping[str, Any]) -> Iterator[tuple[str, Content]]:
    if best:
        yield f"best {best.get('probe')} {best.get('metric')}", best.get("value")
        yield "at step", best.get("step")
    start = next((line for line in history if line.get("iteration") == 0), None)
    if start is not None:
        yield "at the start", start.get("value")
    yield "newest", history[-1].get("value")


def _about_scores(results: Mapping[str, Any]) -> str:
    counts = {part: sum(of.values()) for part, of in results.get("n_cases", {}).items()}
    parts = ", ".join(f"{count} {part}" for part, count in counts.items())
    classes = ", ".join(str(name) for name in results.get("classes", []))
    seen = results.get("seen_in_pretraining", 0)
    return (
        f"Probes on frozen cls tokens; labels are never trained on. Cases: {parts}; classes: {classes}; "
        f"divided {results.get('split', {}).get('division', '')}. {seen} of them are seen in pretraining, without "
        "their labels."
    )


def _add_files(page: Page, run: Path, record: Mapping[str, Any]) -> None:
    page.heading("Files", "files")
    checkpoints = sorted((run / "checkpoints").glob("step_*"), reverse=True) if (run / "checkpoints").is_dir() else []
    rows: list[tuple[Content, Content, Content]] = []
    for path in checkpoints[:SHOWN_CHECKPOINTS]:
        rows.append(("checkpoint", f"checkpoints/{path.name}", _size_mb(path)))
    for name, text in (
        ("export/teacher_backbone.safetensors", "exported teacher"),
        ("eval/best/teacher_checkpoint.safetensors", "best teacher by the validation cases"),
        ("log.txt", "log"),
        ("training_metrics.jsonl", "figures of each logged step"),
        ("failures.csv", "cases left out, with reasons"),
    ):
        if (run / name).is_file():
            rows.append((text, name, _size_mb(run / name)))
    page.table(("what", "where, below the run folder", "MB"), rows)
    if (run / "export/teacher_backbone.safetensors").is_file():
        page.text(joined(["How to go on:", _code(f"medssl infer CASE --model {hide_home(str(run))} --heatmap")]))


def _add_config(page: Page, config: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    if not config:
        return
    page.heading("Configuration", "configuration")
    sequences = record.get("sequences")
    shown = [] if sequences is None else [("images", _say(sequences) if sequences else "plain pictures")]
    page.facts([*shown, *((text, _say(config[key])) for key, text in _SUMMARY if key in config)])
    rows = "".join(f"<tr><td>{escaped(key)}</td><td>{escaped(_say(value))}</td></tr>" for key, value in config.items())
    page.add(
        Html(
            f"<details><summary>All {len(config)} keys</summary>"
            f'<div class="scroll" tabindex="0" role="region" aria-label="All keys"><table><thead><tr>'
            f'<th scope="col">key</th><th scope="col">value</th></tr></thead><tbody>{rows}</tbody></table></div>'
            "</details>"
        )
    )


def _add_environment(page: Page, record: Mapping[str, Any]) -> None:
    facts: list[tuple[str, Content]] = [
        (name, str(record[key])[:16] if key.endswith("_digest") else str(record[key]))
        for key, name in (
            ("device", "device"),
            ("attention", "attention"),
            ("precision", "precision"),
            ("python", "Python"),
            ("platform", "platform"),
            ("slurm_job_id", "SLURM job"),
            ("started_at", "started"),
            ("data_digest", "data digest"),
            ("split_digest", "split digest"),
        )
        if record.get(key)
    ]
    facts += [(str(name), str(version)) for name, version in (record.get("versions") or {}).items()]
    git = record.get("git")
    if isinstance(git, dict):
        facts.append(("code", f"{str(git.get('commit'))[:12]}{', changed' if git.get('dirty') else ''}"))
    if facts:
        page.heading("Environment", "environment")
        page.facts(facts)


# --- words -----------------------------------------------------------------------------------------------------------


def _step(record: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> int:
    """The newest that any file tells of."""
    known = [record.get("step"), rows[-1].get("iteration") if rows else None]
    return max((int(value) for value in known if _is_number(value)), default=0)  # type: ignore[arg-type]


def _metric_names(history: Sequence[Mapping[str, Any]]) -> list[str]:
    """The deciding metric and areas under the curve where any line has them; the deciding probe first."""
    probe, _, metric = str(history[-1].get("metric", "")).partition("_")
    metrics = dict.fromkeys((metric, "binary_auc", "multiclass_auc"))
    every = [f"{one}_{name}" for name in metrics for one in sorted(_PROBES, key=lambda other: other != probe)]
    known = [name for name in every if any(_is_number(line.get(name)) for line in history)]
    two_classes = any(name.endswith("_binary_auc") for name in known)
    return [name for name in known if not (two_classes and name.endswith("_multiclass_auc") and metric not in name)]


def _metric_title(name: str) -> str:
    probe, _, metric = name.partition("_")
    return f"{_PROBES.get(probe, probe)} {metric.replace('_', ' ')}"


def _thinned(history: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The start, the newest lines, and every one that was best."""
    newest = len(history) - SHOWN_SCORES
    return [line for i, line in enumerate(history) if i == 0 or i >= newest or line.get("is_best")]


def _size_mb(path: Path) -> float:
    files = path.rglob("*") if path.is_dir() else [path]
    return round(sum(file.stat().st_size for file in files if file.is_file()) / 1e6, 1)


def _command(record: Mapping[str, Any], run: Path) -> str:
    words = [str(word) for word in record.get("command_line") or []][1:] or ["pretrain", "--out", run.name]
    return " ".join(["medssl", *(shlex.quote(word) if set(word) & set(" \t\n'\"$") else word for word in words)])


def _code(text: str) -> Html:
    return Html(f"<code>{escaped(hide_home(text))}</code>")


def _say(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(str(part) for part in value)
    return hide_home(str(value))


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
