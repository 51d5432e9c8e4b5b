"""What is looked at while a run trains: scores on labelled cases, the picture of its curves, its page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import cast

from torch import nn

from medssl_cli.engine.distributed import from_first, rank
from medssl_cli.engine.health import HealthMonitor
from medssl_cli.engine.telemetry import read_metrics
from medssl_cli.report.plots import draw_progress
from medssl_cli.report.run_page import write_run_page
from medssl_cli.services.online_evaluation import Network, OnlineEvaluation, read_history
from medssl_cli.services.run_folder import RunFolder


@dataclass
class RunWatch:
    """Looks on; with several processes the first one does, and the others wait.

    Args:
        folder: Of the run.
        recipe: For the title.
        whole_teacher: The teacher's backbone, whole; called by all processes, the first of which gets it.
        monitor: Of the health figures.
        evaluation: Scores on labelled cases; None without, and in all processes but the first.
        period: Steps between scores, known to all processes; 0 for none.
    """

    folder: RunFolder
    recipe: str
    whole_teacher: Callable[[], nn.Module | None]
    monitor: HealthMonitor
    evaluation: OnlineEvaluation | None = None
    period: int = 0

    def start(self, step: int) -> None:
        """Before the first step of this call: the level of the start, or the scores up to the checkpoint."""
        if self.evaluation is not None and step:
            self.evaluation.resume(step)
        if step == 0:
            self._score(step)

    def after_checkpoint(self, step: int) -> None:
        """Score when it is due, then draw and write what people look at."""
        if self.period and step % self.period == 0:
            self._score(step)
        if rank() == 0:
            self.folder.say("running", step=step)
            self.show(f"{self.recipe}, step {step}")

    def finish(self, step: int) -> None:
        """Score the best teacher, or the last one if none was kept, on the cases that were held back."""
        if not self.period:
            return
        last = self.whole_teacher()
        evaluation = self.evaluation
        if evaluation is None or last is None:
            return
        best, kept = evaluation.best_teacher(), evaluation.best()
        if best is not None and kept is not None:
            evaluation.score(best.to(next(last.parameters()).device), int(kept["step"]), final=True)
        else:
            evaluation.score(cast(Network, last), step, final=True)

    def show(self, title: str) -> None:
        """``progress.png`` and ``run.html``."""
        out = self.folder.path
        rows = read_metrics(out / "training_metrics.jsonl")
        draw_progress(rows, out / "progress.png", title, evaluations=read_history(out))
        write_run_page(out, [asdict(alarm) for alarm in self.monitor.alarms])

    def _score(self, step: int) -> None:
        if not self.period:
            return
        teacher = self.whole_teacher()

        def score() -> None:
            if self.evaluation is not None and teacher is not None:
                self.evaluation.score(cast(Network, teacher), step)

        from_first(score)
