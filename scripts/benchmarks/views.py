"""``bench.py views``: all crops and masks of a sample, on one core and on the device in use."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.measuring import Findings, Mark, Options, Parts, Rows, measure, one_thread
from benchmarks.recipe import SEQUENCES, crop_sizes, pretrain_config, random_slices
from medssl_cli.core.protocols import SliceBatch
from medssl_cli.data.views import MultiCrop
from medssl_cli.services.build import build_views
from medssl_cli.services.devices import describe_device

RATIOS = ((2, "rc"), (3, "colour jitter"))
COLOURS = "crops, blur, colour jitter, grey, solarise"


def make_next(make: MultiCrop, slices: SliceBatch, seeds: Iterator[int]) -> None:
    """The views of the next seed."""
    make(slices, next(seeds))


def views(options: Options) -> Findings:
    """All crops and masks of a sample: on one core, and on the device in use."""
    rows: Rows = []
    batch = options.batch[0]
    changes = {
        "crops alone": ("intensity_aug=none", "blur_probs=[0,0,0]", "gamma_range=[1,1]"),
        "crops, blur, gamma": ("intensity_aug=none",),
        "crops, blur, gamma, rc": ("intensity_aug=rc",),
        COLOURS: ("intensity_aug=color_jittering",),
    }
    for device in {"cpu": torch.device("cpu"), options.device.type: options.device}.values():
        slices = random_slices(pretrain_config(options, batch), device)
        parts: Parts = {}
        for name, overrides in changes.items():
            config = pretrain_config(options, batch, *(f"crops.{text}" for text in overrides))
            sequences = 1 if name == COLOURS else len(SEQUENCES)  # one picture of three colours
            parts[name] = partial(make_next, build_views(config, sequences), slices, itertools.count())
        with one_thread() if device.type == "cpu" else contextlib.nullcontext():
            timings = measure(parts, options.repeat, device)
        place = "one core" if device.type == "cpu" else describe_device(device)
        rows += [timing.row(f"{name}; {place}", batch) for name, timing in timings.items()]
    times = {row["what"]: row["cpu_ms"] for row in rows}
    return Findings(
        {"batch": batch, **crop_sizes(config)},
        rows,
        {f"{short} / crops alone, one core, cpu": rows[i]["cpu_ms"] / rows[0]["cpu_ms"] for i, short in RATIOS},
        [
            Mark("ms a sample, crops alone, one core", times["crops alone; one core"], 14),
            Mark("ms a sample, rc, one core", times["crops, blur, gamma, rc; one core"], 150),
        ],
    )
