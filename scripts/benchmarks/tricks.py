"""``bench.py step --tricks``: what each trick of a step is worth, by leaving out one at a time within one run."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.measuring import Findings, Options, Parts, Rows, measure
from benchmarks.recipe import SEQUENCES, build_trainer, crop_sizes, pretrain_config, tflop_per_sample
from benchmarks.ways import Switch, Way, average_one_by_one, clip_one_by_one, kept_gib
from medssl_cli.engine.acceleration import missing_for_compile
from medssl_cli.engine.optim import clip_gradients
from medssl_cli.engine.precision import AUTOCAST_DTYPES
from medssl_cli.engine.trainer import Trainer
from medssl_cli.models.attention import choose_by_trial, time_backends
from medssl_cli.services.pretrain_config import PretrainConfig

PLAIN = "restated plainly: sdpa, one pass a size, all tokens, tensor by tensor"


def ways(options: Options) -> dict[str, Way]:
    """medssl's step and its variants, by name."""
    found = {
        "medssl": Way(),
        "all tokens through the last block": Way(needed=False),
        "one pass for each crop size": Way(packed=False, needed=False),
        "moving average and clipping one by one": Way(together=False),
        "activation checkpointing": Way(checkpointing=True),
        PLAIN: (plain := Way(packed=False, needed=False, together=False, fused=False, kernel="sdpa")),
    }
    if options.precision != "fp32":
        found[f"{PLAIN}, in fp32"] = replace(plain, precision="fp32")
    if options.compile:
        found["compiled blocks"] = Way(compiled=True)
    others = ("fp32", "tf32", "bf16", "fp16") if options.on_gpu else ("fp32", "bf16")
    return found | {f"in {name}": Way(precision=name) for name in others if name != options.precision}


def tricks(options: Options) -> Findings:
    """Steps of all ways in turns; the passes over all parameters and the attention kernels by themselves."""
    batch = options.batch[0]
    config = pretrain_config(options, batch)
    trainer = build_trainer(config, options)
    foreach = torch.optim.AdamW(
        [{**group, "foreach": True, "fused": False} for group in trainer.optimizer.param_groups], lr=0.0
    )
    choose_kernels(config, options)
    rows = step_rows(trainer, foreach, options, batch)
    medssl = rows[0]
    rows += parameter_rows(trainer, foreach, options)
    del trainer, foreach
    gc.collect()
    rows += attention_rows(config, options)
    clock = f"{options.clock}_ms"
    ratios = {f"{row['what']} / medssl, {clock}": row["against_medssl"] for row in rows[1:] if "against_medssl" in row}
    sizes = {"arch": options.arch, "size": config.student.size, "batch": batch, **crop_sizes(config)}
    sizes |= {"prototypes": config.dino.head_n_prototypes, "tflop_a_sample": tflop_per_sample(config)}
    compiled = "compiled" if options.compile else missing_for_compile(options.device) or "pass --compile to measure it"
    return Findings({**sizes, "compile": compiled, "samples_per_s": medssl["samples_per_s"]}, rows, ratios)


def step_rows(trainer: Trainer, foreach: torch.optim.Optimizer, options: Options, batch: int) -> Rows:
    """A row a way; ``against_medssl`` above 1 is slower than medssl's own step."""
    switch, source = Switch(trainer, foreach), trainer.batches(0)
    kept: dict[str, float] = {}

    def settle(way: Way) -> None:
        """Switch, and take a step that is not timed: after another way the memory lies otherwise, at up to 8 %."""
        switch.take(way)
        trainer.step(source)

    def update() -> None:
        trainer.step(source)

    wanted = ways(options)
    try:
        for name, way in wanted.items():
            switch.take(way)
            kept[name] = kept_gib(trainer)
        parts: Parts = dict.fromkeys(wanted, update)
        before: Parts = {name: partial(settle, way) for name, way in wanted.items()}
        timings = measure(parts, options.repeat, options.device, warmup=1, before=before)
    finally:
        switch.restore()
    own = statistics.median(timings["medssl"].seconds(options.clock))
    return [
        {
            **timing.row(name),
            "against_medssl": statistics.median(timing.seconds(options.clock)) / own,
            "samples_per_s": batch / statistics.median(timing.wall),
            "kept_gib": kept[name],
        }
        for name, timing in timings.items()
    ]


def parameter_rows(trainer: Trainer, foreach: torch.optim.Optimizer, options: Options) -> Rows:
    """The passes over all parameters by themselves: clipping, the optimizer, the moving average."""
    objective: Any = trainer.objective
    modules, values = objective.trained_modules(), trainer.schedules.at(1)
    give_gradients(objective.student)
    parts: dict[str, Callable[[], object]] = {
        "clipping, together": lambda: clip_gradients(modules, 3.0),
        "clipping, one by one": lambda: clip_one_by_one(modules, 3.0),
        "moving average, together": lambda: objective.after_step(values),
        "moving average, one by one": lambda: average_one_by_one(objective, values),
        "AdamW, fused": trainer.optimizer.step,
        "AdamW, lists of tensors": foreach.step,
    }
    timings = measure(parts, options.repeat, options.device, warmup=2)
    objective.student.zero_grad(set_to_none=True)
    return [timing.row(name) for name, timing in timings.items()]


def give_gradients(network: nn.Module) -> None:
    """A gradient for every parameter."""
    for parameter in network.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)


def choose_kernels(config: PretrainConfig, options: Options) -> None:
    """Let a trial on the run's shapes choose the attention kernel for every precision, as pretraining does."""
    width, depth, heads = config.student.size
    groups = packed_groups(config)
    precisions = {way.precision or options.precision for way in ways(options).values()}
    for dtype in {AUTOCAST_DTYPES.get(precision, torch.float32) for precision in precisions}:
        choose_by_trial(options.device, dtype, groups, heads, width // heads, layers=depth)


def attention_rows(config: PretrainConfig, options: Options) -> Rows:
    """Forward and backward of each attention kernel on the packed shapes of a student's pass."""
    _, _, heads = config.student.size
    head_dim = config.student.size[0] // heads
    dtype = AUTOCAST_DTYPES.get(options.precision, torch.float32)
    groups = packed_groups(config)
    found = time_backends(options.device, dtype, groups, heads, head_dim, repeats=max(5, options.repeat))
    return [
        {"what": f"attention {timing.name}", "fastest_ms": timing.milliseconds}
        if timing.milliseconds is not None
        else {"what": f"attention {timing.name}: {timing.detail[:80]}"}
        for timing in found
    ]


def packed_groups(config: PretrainConfig) -> tuple[tuple[int, int], ...]:
    """((global crops, tokens each), (local crops, tokens each)) of a student's pass."""
    crops, batch = config.crops, config.train.batch_size_per_gpu

    def tokens(side: int) -> int:
        prefix = 1 + config.student.num_register_tokens
        return prefix + len(SEQUENCES) * (side // config.student.patch_size) ** 2

    groups = [(2 * batch, tokens(crops.global_crops_size))]
    if crops.local_crops_number:
        groups.append((crops.local_crops_number * batch, tokens(crops.local_crops_size)))
    return tuple(groups)
