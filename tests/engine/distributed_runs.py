"""What one of several processes does in the tests: training of a tiny ViT on its part of batches that all know."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medssl_cli.core.config import load_config
from medssl_cli.core.errors import ResourceError
from medssl_cli.core.protocols import Batch, SliceBatch
from medssl_cli.engine.checkpoint import Checkpoints, optimizer_tensors
from medssl_cli.engine.distributed import find_place, from_first, joined, rank, whole_tensor, world_size
from medssl_cli.engine.optim import parameter_groups
from medssl_cli.engine.precision import Precision
from medssl_cli.engine.schedules import Schedules
from medssl_cli.engine.trainer import Trainer
from medssl_cli.services.build import build_gradients, build_objective, build_optimizer
from medssl_cli.services.pretrain_config import PretrainConfig

CPU = torch.device("cpu")
SAMPLES = 8
TINY = [
    *("student.arch=vit_tiny", "student.embed_dim=32", "student.depth=2", "student.num_heads=2"),
    *("student.patch_size=8", "student.layerscale=1.0", "student.drop_path_rate=0", "student.use_mri_seq_embed=true"),
    *("train.img_size=32", "data.spatial_size=32", "crops.global_crops_size=32", "crops.local_crops_size=16"),
    *("dino.head_n_prototypes=64", "dino.head_hidden_dim=32", "dino.head_bottleneck_dim=16"),
    *("dino.koleo_loss_weight=0", "ibot.separate_head=true", "ibot.head_n_prototypes=64"),
    *("ibot.head_hidden_dim=32", "ibot.head_bottleneck_dim=16"),
]
SEQUENCES = ("ax_t2wi", "ax_adc", "ax_dwi")
SCENARIOS: dict[str, tuple[list[str], int]] = {
    "ddp": ([], 1),
    "ddp, sinkhorn, two micro-batches": (["train.centering=sinkhorn_knopp"], 2),
    "fsdp": (["compute_precision.parallel=fsdp"], 1),
    "fsdp, full shard, sinkhorn, two micro-batches": (
        [
            *("compute_precision.parallel=fsdp", "train.centering=sinkhorn_knopp"),
            *(f"compute_precision.{n}.backbone.sharding_strategy=FULL_SHARD" for n in ("student", "teacher")),
        ],
        2,
    ),
    "no shard": (
        [
            "compute_precision.parallel=fsdp",
            *(
                f"compute_precision.{network}.{module}.sharding_strategy=NO_SHARD"
                for network in ("student", "teacher")
                for module in ("backbone", "dino_head", "ibot_head")
            ),
        ],
        1,
    ),
}


def config_of(*overrides: str) -> PretrainConfig:
    return load_config(PretrainConfig, None, recipes="pretrain", overrides=[*TINY, *overrides])


def joint_batch(step: int, micro: int) -> Batch:
    """Crops and masks of all samples of all processes; the halves hold unequal numbers of targets."""
    generator = torch.Generator().manual_seed(1000 * step + micro)
    mask = torch.rand(2 * SAMPLES, 3 * 16, generator=generator) < 0.4
    mask[: SAMPLES // 2, :16] = False
    available = torch.ones(SAMPLES, 3, dtype=torch.bool)
    available[1, 2] = False
    images = torch.randn(2 * SAMPLES, 3, 32, 32, generator=generator)
    local = torch.randn(2 * SAMPLES, 3, 16, 16, generator=generator)
    return Batch(images, local, mask, available, [f"PT-{i}" for i in range(SAMPLES)])


def own_part(batch: Batch) -> Batch:
    """The samples of this process, all views of each."""
    size = SAMPLES // world_size()
    keep = slice(rank() * size, (rank() + 1) * size)

    def cut(crops: Tensor) -> Tensor:
        return crops.unflatten(0, (-1, SAMPLES))[:, keep].flatten(0, 1)

    assert batch.local_VSHW is not None
    return Batch(
        cut(batch.global_VSHW),
        cut(batch.local_VSHW),
        cut(batch.token_mask_VN),
        batch.available_BS[keep],
        batch.case_ids[keep],
    )


def slices(step: int) -> Iterator[SliceBatch]:
    while True:
        size = SAMPLES // world_size()
        ids = [f"PT-{rank() * size + i}" for i in range(size)]
        yield SliceBatch(torch.zeros(size, 3, 4, 4), torch.full((size, 2), 4), torch.ones(size, 3).bool(), None, ids)


def views(batch: SliceBatch, step: int, micro: int) -> Batch:
    return own_part(joint_batch(step, micro))


def make_trainer(
    *overrides: str, accumulation: int = 1, steps: int = 4, plain_descent: bool = False, **changes: Any
) -> Trainer:
    """The trainer of a pretraining, as the service builds it."""
    config = config_of(*overrides)
    precision = config.compute_precision.precision
    objective = build_objective(config, SEQUENCES, CPU, None)
    parallel = build_gradients(config, objective, CPU)
    if plain_descent:  # Adam's first steps are signs of gradients, which rounding may turn
        groups = parameter_groups(objective.trained_modules(), 2)
        optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, lr=0.0)
    else:
        optimizer = build_optimizer(config, objective, CPU)
    settings: dict[str, Any] = {
        "schedules": Schedules(
            total_steps=steps, epoch_steps=1, lr=0.01, warmup_epochs=0, freeze_last_layer_epochs=0, momentum=0.9
        ),
        "batches": slices,
        "views": views,
        "total_steps": steps,
        "device": CPU,
        "precision": Precision(precision, CPU),
        "accumulation": accumulation,
        "parallel": parallel,
    }
    return Trainer(objective=objective, optimizer=optimizer, **{**settings, **changes})


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    """Every tensor of objective and optimizer, whole."""
    tensors = {**trainer.objective.state_dict(), **optimizer_tensors(trainer.optimizer)}
    return {name: whole_tensor(tensor.detach()).clone() for name, tensor in tensors.items()}


def in_group(name: str, *words: Any) -> Any:
    """Join and run a function of this module; the value of the first process."""
    torch.set_num_threads(1)
    with joined(find_place(os.environ), CPU):
        return globals()[name](*words)


# --- what is run ------------------------------------------------------------------------------------------------------


def train_all_scenarios() -> dict[str, dict[str, Any]]:
    """Losses, gradients before each update and final tensors of each scenario."""
    found: dict[str, dict[str, Any]] = {}
    for name, (overrides, accumulation) in SCENARIOS.items():
        trainer = make_trainer(*overrides, accumulation=accumulation, plain_descent=True)
        results: dict[str, Any] = {"parallel": type(trainer.parallel).__name__}
        trainer.optimizer.register_step_pre_hook(_Recorder(trainer, results))
        source = trainer.batches(0)
        for step in range(3):
            record = trainer.step(source)
            results |= {f"{step}.{key}": torch.tensor(value) for key, value in record.losses.items()}
            results |= {f"{step}.norm.{key}": torch.tensor(value) for key, value in record.gradient_norms.items()}
        found[name] = results | state_of(trainer)
    return found


class _Recorder:
    def __init__(self, trainer: Trainer, results: dict[str, Any]) -> None:
        self.trainer, self.results = trainer, results

    def __call__(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                assert parameter.grad is not None, name
                key = f"{self.trainer.steps_done}.grad.{name}"
                self.results[key] = whole_tensor(parameter.grad.detach()).clone()


def train_through_a_freeze(fsdp: bool) -> dict[str, Tensor]:
    """Two epochs with the backbone frozen, two without."""
    overrides = ["compute_precision.parallel=fsdp"] if fsdp else []
    schedules = Schedules(
        total_steps=4, epoch_steps=1, lr=0.01, warmup_epochs=0, freeze_backbone_epochs=2, freeze_last_layer_epochs=0
    )
    trainer = make_trainer(*overrides, schedules=schedules, plain_descent=True)
    source = trainer.batches(0)
    states: dict[str, Tensor] = {}
    for step in range(4):
        trainer.step(source)
        states |= {f"{step}.{name}": tensor for name, tensor in state_of(trainer).items()}
    return states


def train_and_save(out: str, overrides: list[str], last: int) -> dict[str, Tensor]:
    """Take up what is there, train up to step ``last``, save; tensors as taken up and as saved."""
    checkpoints = Checkpoints(Path(out), sequence_names=SEQUENCES)
    trainer = make_trainer(*overrides, steps=last, checkpoints=checkpoints)
    newest = from_first(checkpoints.latest)
    states: dict[str, Tensor] = {}
    if newest is not None:
        trainer.restore(newest)
        states = {f"before.{name}": tensor for name, tensor in state_of(trainer).items()}
    trainer.fit()
    states |= {f"after.{name}": tensor for name, tensor in state_of(trainer).items()}
    teacher = trainer.parallel.whole(trainer.objective.teacher["backbone"])  # type: ignore[attr-defined, union-attr]
    if rank() == 0:
        assert teacher is not None
        states |= {f"teacher.{name}": tensor.detach().clone() for name, tensor in teacher.state_dict().items()}
    return states


def train_in_half_precision(parallel: str, precision: str) -> dict[str, Any]:
    """Losses of three steps, and how often fp16 skipped an update."""
    trainer = make_trainer(f"compute_precision.parallel={parallel}", f"compute_precision.precision={precision}")
    source = trainer.batches(0)
    records = [trainer.step(source) for _ in range(3)]
    return {
        "losses": [record.total_loss for record in records],
        "skipped": [record.loss_scale_skipped for record in records],
        "dtypes": {str(tensor.dtype) for tensor in state_of(trainer).values()},
    }


def spoil(what: str) -> None:
    """One of the processes meets a fault in the second step."""

    def spoiled(batch: SliceBatch, step: int, micro: int) -> Batch:
        crops = views(batch, step, micro)
        if step == 1 and rank() == world_size() - 1:
            if what == "image":
                crops.global_VSHW[0, 0, 0, 0] = torch.nan
            if what == "loader":
                raise ResourceError(
                    "Loader worker 0 died.", where="at case PT-7", fix="look", code="loader_worker_died"
                )
            if what == "bug":
                raise IndexError("a bug of one process")
            if what == "exit":
                os.abort()
        return crops

    make_trainer(views=spoiled).fit()


def differ(name: str) -> None:
    """The processes disagree, or one of them fails to prepare."""
    from medssl_cli.engine.distributed import refuse_differences, together

    if name == "settings":
        refuse_differences({"optim.base_lr": 0.1 * (1 + rank()), "same": 1}, "They differ.", "make them equal")
    if name == "prepare":
        together(_fail_second)
    if name == "first":
        from_first(_fail)


def _fail() -> None:
    raise ResourceError("No disk.", where=f"rank {rank()}", fix="mount it", code="no_disk")


def _fail_second() -> None:
    if rank() == 1:
        _fail()
