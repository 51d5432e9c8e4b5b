"""``bench.py startup``: how long the command line takes to answer, and what it loads."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

from benchmarks.measuring import Findings, Mark, Options, Parts, measure

HEAVY = ("torch", "numpy", "scipy", "sklearn", "SimpleITK", "nibabel", "matplotlib", "blosc2", "pydicom", "pydantic")


def startup(options: Options) -> Findings:
    """How long the command line takes to answer, and what it loads."""
    starts = {
        "python -c pass": ["-c", "pass"],
        "import typer and rich": ["-c", "import typer, rich.console, rich.table"],
        "medssl --help": ["-m", "medssl_cli", "--help"],
    }
    parts: Parts = {name: partial(run_python, *words) for name, words in starts.items()}
    timings = measure(parts, options.repeat)
    rows = [timing.row(name) for name, timing in timings.items()]
    answer = rows[-1]
    spy = (
        "import atexit, sys; atexit.register(lambda: sys.stderr.write(' '.join(sys.modules)));"
        "sys.argv = ['medssl', '--help']; from medssl_cli.app import main; main()"
    )
    modules = run_python("-c", spy).stderr.split()
    heavy = [name for name in HEAVY if name in modules]
    ratio = answer["cpu_ms"] / rows[0]["cpu_ms"]
    return Findings(
        {"modules": len(modules), "heavy_modules": heavy},
        rows,
        {"medssl --help / python -c pass, cpu": ratio},
        [Mark("s for medssl --help", answer["wall_ms"] / 1e3, 0.35), Mark("times python -c pass", ratio, 15)],
    )


def run_python(*words: str) -> subprocess.CompletedProcess[str]:
    """Start a fresh interpreter and wait for it."""
    return subprocess.run([sys.executable, *words], check=True, capture_output=True, text=True)
