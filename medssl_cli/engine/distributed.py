"""Several processes that train one model: how they find each other, agree, and make their gradients one.

The work is done by PyTorch: a process group, DDP, and FSDP2 (``fully_shard``). A model is written for one device; the
classes ``Alone``, ``Replicated`` and ``Sharded`` wrap it for the trainer. Student and teacher are sharded alike, so the
moving average stays local. What may take long (preparing data, evaluating, reading a checkpoint) is waited for on a
gloo group of its own with a time-out of a day, so the time-out of a training step can be short.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import hashlib
import inspect
import json
import logging
import os
import pickle
import re
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, Protocol, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from medssl_cli.core.config import Config
from medssl_cli.core.errors import ConfigError, Interrupted, MedsslError, ResourceError
from medssl_cli.core.protocols import Objective

log = logging.getLogger(__name__)
T = TypeVar("T")

STEP_TIMEOUT = timedelta(minutes=30)
"""Longest wait inside a training step; a peer that is silent for so long is gone."""
PATIENT_TIMEOUT = timedelta(days=1)
"""Longest wait for one process that prepares, evaluates or saves."""
JOIN_TIMEOUT = timedelta(minutes=10)
"""Longest wait for the other processes at the start."""

ShardingStrategy = Literal["NO_SHARD", "SHARD_GRAD_OP", "FULL_SHARD"]
FloatName = Literal["fp32", "fp16", "bf16"]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


# --- configuration ---------------------------------------------------------------------------------------------------


class MixedPrecisionConfig(Config):
    """Number formats of one sharded module."""

    param_dtype: FloatName | None = None
    """Format in which parameters are gathered; unset: bf16 or fp16 with that precision, else fp32."""
    reduce_dtype: FloatName | None = None
    """Format in which gradients are averaged over the processes; unset: fp32."""
    buffer_dtype: FloatName = "fp32"
    """Format of buffers; they are always fp32."""


class ShardingConfig(Config):
    """How one module is spread over the processes."""

    sharding_strategy: ShardingStrategy = "SHARD_GRAD_OP"
    """FULL_SHARD frees gathered parameters after the forward pass, SHARD_GRAD_OP keeps them until the backward pass is
    done, NO_SHARD keeps everything everywhere (in all modules or in none)."""
    mixed_precision: MixedPrecisionConfig = MixedPrecisionConfig()


class NetworkShardingConfig(Config):
    """Sharding of a network, module by module."""

    backbone: ShardingConfig = ShardingConfig()
    dino_head: ShardingConfig = ShardingConfig()
    ibot_head: ShardingConfig = ShardingConfig()

    def of(self, name: str) -> ShardingConfig:
        """The setting of a module; one without a section of its own has that of the backbone."""
        return getattr(self, name, self.backbone)


# --- joining ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where this process stands among those that train together.

    Args:
        rank, world: Of all processes.
        local_rank, local_world: Of those on this machine; the local rank is the number of the GPU.
        address, port: Where the first process listens.
        source: ``torchrun`` or ``slurm``.
    """

    rank: int
    world: int
    local_rank: int
    local_world: int
    address: str
    port: int
    source: Literal["torchrun", "slurm"]


def find_place(environ: Mapping[str, str]) -> Place | None:
    """The place that torchrun or srun gave to this process; None for a process that trains alone.

    Raises:
        ConfigError: The variables contradict each other.
    """
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return _torchrun_place(environ)
    if "SLURM_PROCID" in environ:
        return _slurm_place(environ)
    return None


def _torchrun_place(environ: Mapping[str, str]) -> Place | None:
    world = _number(environ, "WORLD_SIZE")
    if world == 1:
        return None
    place = Place(
        rank=_number(environ, "RANK"),
        world=world,
        local_rank=_number(environ, "LOCAL_RANK", "0"),
        local_world=_number(environ, "LOCAL_WORLD_SIZE", "1"),
        address=environ.get("MASTER_ADDR", "127.0.0.1"),
        port=_number(environ, "MASTER_PORT", "29500"),
        source="torchrun",
    )
    return _checked(place)


def _slurm_place(environ: Mapping[str, str]) -> Place | None:
    world = _number(environ, "SLURM_STEP_NUM_TASKS", environ.get("SLURM_NTASKS", "1"))
    if world == 1:
        return None
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or environ.get("SLURM_NODELIST", "")
    first = expand_nodes(nodes)[:1]
    local_rank = _number(environ, "SLURM_LOCALID", "0")
    tasks = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE", "")
    counts = _tasks_per_node(tasks)
    node = _number(environ, "SLURM_NODEID", "0")
    return _checked(
        Place(
            rank=_number(environ, "SLURM_PROCID"),
            world=world,
            local_rank=local_rank,
            local_world=counts[node] if node < len(counts) else max(1, local_rank + 1),
            address=environ.get("MASTER_ADDR") or (first[0] if first else "127.0.0.1"),
            port=_number(environ, "MASTER_PORT", str(_slurm_port(environ))),
            source="slurm",
        )
    )


def _slurm_port(environ: Mapping[str, str]) -> int:
    """One port for all tasks of a step, another for the next step: between 15000 and 34999."""
    numbers = [re.sub(r"\D", "", environ.get(name, "")) or "0" for name in ("SLURM_JOB_ID", "SLURM_STEP_ID")]
    return 15000 + (int(numbers[0]) + 7919 * int(numbers[1])) % 20000


def _checked(place: Place) -> Place:
    if not (0 <= place.rank < place.world and 0 <= place.local_rank < place.local_world <= place.world):
        raise ConfigError(
            "The environment gives this process an impossible place.",
            where=f"{place.source}: rank {place.rank} of {place.world}, "
            f"local rank {place.local_rank} of {place.local_world}",
            fix="start all processes with one torchrun or srun",
            code="place_impossible",
        )
    return place


def _number(environ: Mapping[str, str], name: str, default: str = "") -> int:
    text = environ.get(name, default).strip()
    if not text.isdigit():
        raise ConfigError(
            "An environment variable of the launcher is no number.",
            where=f"{name}={text!r}",
            fix="start all processes with one torchrun or srun, or unset it",
            code="place_impossible",
        )
    return int(text)


def expand_nodes(text: str) -> list[str]:
    """SLURM's short form of a list of hosts, written out: ``node[01-02,07],gpu5`` -> node01 node02 node07 gpu5."""
    names: list[str] = []
    for part in re.findall(r"[^,\[\]]+(?:\[[^\]]*\][^,\[\]]*)*", text):
        names += _expand_one(part)
    return names


def _expand_one(part: str) -> list[str]:
    found = re.match(r"([^\[]*)\[([^\]]*)\](.*)", part)
    if found is None:
        return [part]
    head, ranges, tail = found.groups()
    numbers: list[str] = []
    for piece in ranges.split(","):
        low, _, high = piece.partition("-")
        numbers += [str(n).zfill(len(low)) for n in range(int(low), int(high or low) + 1)]
    return [f"{head}{number}{rest}" for number in numbers for rest in _expand_one(tail)]


def _tasks_per_node(text: str) -> list[int]:
    """SLURM's short form of tasks on each node: ``8(x2),4`` -> 8 8 4."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, times in found for _ in range(int(times or 1))]


# --- the group -------------------------------------------------------------------------------------------------------


@dataclass
class _Host:
    """What lives beside the default group: the patient group, and a store for a last word."""

    group: dist.ProcessGroup | None = None
    store: dist.Store | None = None
    place: Place | None = None


_host = _Host()


@contextmanager
def joined(place: Place | None, device: torch.device) -> Iterator[None]:
    """Belong to the group for the time of the block; nothing happens for a process that trains alone.

    An error of one process is told to the others, which leave with the same one. Of several processes that end with the
    same error only the first speaks: the others leave with its exit code alone.

    Args:
        place: From ``find_place``.
        device: Of this process: NCCL for CUDA, gloo for the CPU.

    Raises:
        ResourceError: The others did not come.
    """
    if place is None:
        yield
        return
    store = _open_store(place)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, store=dist.PrefixStore("group", store), rank=place.rank, world_size=place.world, timeout=STEP_TIMEOUT
    )
    _host.group, _host.store, _host.place = dist.new_group(backend="gloo", timeout=PATIENT_TIMEOUT), store, place
    try:
        with _telling_peers(place):
            yield
    except (MedsslError, SystemExit):
        _host.group = _host.store = _host.place = None  # a peer may be gone: the group ends with the process
        raise
    else:
        leave()


def leave() -> None:
    """End the group in order: all processes come here."""
    barrier()
    _host.group = _host.store = _host.place = None
    dist.destroy_process_group()


def _open_store(place: Place) -> dist.Store:
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        shared = dist.TCPStore(
            place.address,
            place.port,
            place.world,
            is_master=place.rank == 0 and not agent,
            timeout=JOIN_TIMEOUT,
            wait_for_workers=False,
        )
        store = dist.PrefixStore(f"medssl/{attempt}", shared)
        store.set(f"host{place.rank}", socket.gethostname())
        store.wait([f"host{rank}" for rank in range(place.world)], JOIN_TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise ResourceError(
            "The processes of this run did not find each other.",
            where=f"rank {place.rank} of {place.world} ({place.source}), {place.address}:{place.port}: "
            f"{str(error).splitlines()[0][:200]}",
            fix="start all processes with one torchrun or srun; in a batch script without srun: one task and --gpus N",
            code="peers_missing",
        ) from error
    return store


@contextmanager
def _telling_peers(place: Place) -> Iterator[None]:
    try:
        yield
    except MedsslError as error:
        _post(error)
        _leave_with(error, place)
    except RuntimeError as error:
        told = _posted()  # a collective breaks when a peer is gone: its own words say more
        if told is None:
            raise
        _leave_with(told, place, error)


def _post(error: MedsslError) -> None:
    if _host.store is not None:
        words = {name: getattr(error, name) for name in ("what", "where", "fix", "code")}
        with contextlib.suppress(RuntimeError):
            _host.store.compare_set("fault", "", json.dumps({"kind": type(error).__name__, **words}))


def _posted() -> MedsslError | None:
    if _host.store is None:
        return None
    try:
        _host.store.wait(["fault"], timedelta(seconds=3))
        words = json.loads(_host.store.get("fault"))
    except RuntimeError:
        return None
    kinds = {kind.__name__: kind for kind in MedsslError.__subclasses__()}
    return kinds.get(words.pop("kind"), MedsslError)(words.pop("what"), **words)


def _leave_with(error: MedsslError, place: Place, cause: BaseException | None = None) -> None:
    """Raise the error in the first process; in the others too unless the first one has said the same."""
    # an interruption is agreed on and saved: whoever leaves before the first would have the launcher stop that one
    if place.rank and _first_says(error.exit_code, patience_s=120 if isinstance(error, Interrupted) else 3):
        time.sleep(3)  # a launcher that sees this one end stops the first, which has yet to speak
        sys.exit(error.exit_code)
    if place.rank == 0 and _host.store is not None:
        with contextlib.suppress(RuntimeError):
            _host.store.set("first", str(error.exit_code))
            time.sleep(0.5)  # it may hold the store
    if cause is not None:
        raise error from cause
    raise error


def _first_says(exit_code: int, patience_s: float) -> bool:
    if _host.store is None:
        return False
    try:
        _host.store.wait(["first"], timedelta(seconds=patience_s))
        return int(_host.store.get("first")) == exit_code
    except RuntimeError:
        return False


def local_world() -> int:
    """Processes of the run on this machine."""
    return 1 if _host.place is None else _host.place.local_world


def local_rank() -> int:
    """Number of this process among those of the run on this machine."""
    return 0 if _host.place is None else _host.place.local_rank


def world_size() -> int:
    """Processes that train together."""
    return dist.get_world_size() if _has_peers() else 1


def rank() -> int:
    """Number of this process, from 0; the first one writes."""
    return dist.get_rank() if _has_peers() else 0


def _has_peers() -> bool:
    return dist.is_available() and dist.is_initialized()


# --- agreeing --------------------------------------------------------------------------------------------------------


def barrier() -> None:
    """Wait until all processes are here, for as long as one of them prepares, evaluates or saves."""
    if world_size() > 1:
        dist.barrier(group=_host.group)


def patient_group() -> dist.ProcessGroup | None:
    """The gloo group for what may take long; None stands for the default group."""
    return _host.group


def gather(value: T) -> list[T]:
    """The values of all processes by rank; plain data, small."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=_host.group)
    return values


def from_first(make: Callable[[], T]) -> T:
    """What ``make`` gives in the first process, for all; its error is raised in all.

    Values travel pickled between the processes of one run, which trust each other.
    """
    if world_size() == 1:
        return make()
    answer: list[Any] = [None, None]
    if rank() == 0:
        answer = list(_tried(make))
    dist.broadcast_object_list(answer, src=0, group=_host.group)
    if answer[1] is not None:
        raise answer[1]
    return cast(T, answer[0])


def together(make: Callable[[], T]) -> T:
    """Run ``make`` in every process; if one fails, all raise the error of the first that did."""
    value, error = _tried(make)
    errors = [found for found in gather(error) if found is not None]
    if errors:
        raise errors[0]
    return cast(T, value)


def in_turns(make: Callable[[], T]) -> T:
    """Run ``make`` in the first process, then in the first of every other machine, then in the rest.

    For work whose result lies on a disk that machines may or may not share: whoever comes later finds it done.
    """
    if world_size() == 1:
        return make()
    value: Any = None
    turn = 0 if rank() == 0 else 1 if local_rank() == 0 else 2
    for now in range(3):
        done = together(make if turn == now else _nothing)
        value = done if turn == now else value
    return cast(T, value)


def _nothing() -> Any:
    return None


def _tried(make: Callable[[], T]) -> tuple[T | None, MedsslError | None]:
    try:
        return make(), None
    except MedsslError as error:
        return None, pickle.loads(pickle.dumps(error))  # without its traceback, which cannot travel


def refuse_differences(facts: Mapping[str, Any], what: str, fix: str) -> None:
    """Refuse to start when the processes were given different things.

    Args:
        facts: Names and plain values of this process.
        what: What differs, as a sentence.
        fix: What to do.

    Raises:
        ConfigError: A value differs; names the ranks and both values.
    """
    texts = {name: json.dumps(value, sort_keys=True, default=str) for name, value in facts.items()}
    digest = hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()
    if len(set(gather(digest))) == 1:
        return
    everyone = gather(texts)
    lines = []
    for name in sorted({name for each in everyone for name in each}):
        ranks: dict[str, list[int]] = {}
        for number, each in enumerate(everyone):
            ranks.setdefault(each.get(name, "not set"), []).append(number)
        if len(ranks) > 1:
            lines.append(f"{name}: " + "; ".join(f"{value} (rank {_some(held)})" for value, held in ranks.items()))
    raise ConfigError(what, where="\n".join(lines[:20]), fix=fix, code="ranks_differ")


def _some(numbers: Sequence[int]) -> str:
    more = f" and {len(numbers) - 4} more" if len(numbers) > 4 else ""
    return ", ".join(map(str, numbers[:4])) + more


def sum_over_processes(values: Tensor) -> Tensor:
    """The sum of a small tensor over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


# --- gradients -------------------------------------------------------------------------------------------------------


class Parallel(Protocol):
    """How the losses of a batch are computed and the gradients of the processes become one."""

    def losses(self, batch: Any, values: Mapping[str, float]) -> dict[str, Tensor]:
        """Terms of this process's part of the batch."""

    def synchronising(self, last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward of one micro-batch; gradients are averaged in the ``last`` one of a step."""

    def whole(self, module: nn.Module) -> nn.Module | None:
        """A module of the teacher with whole tensors, to evaluate or export it: in the first process, None elsewhere.

        All processes come here.
        """


@dataclass
class Alone:
    """One process: nothing to do."""

    objective: Objective

    def losses(self, batch: Any, values: Mapping[str, float]) -> dict[str, Tensor]:
        """As the objective says."""
        return self.objective.losses(batch, values)

    def synchronising(self, last: bool) -> AbstractContextManager[Any]:
        """Nothing."""
        return nullcontext()

    def whole(self, module: nn.Module) -> nn.Module | None:
        """The module itself."""
        return module


_DDP_OPTIONS = inspect.signature(nn.parallel.DistributedDataParallel.__init__).parameters
_BUFFERS_STAY: dict[str, Any] = {
    name: False for name in ("forward_sync_buffers", "broadcast_buffers") if name in _DDP_OPTIONS
}
if len(_BUFFERS_STAY) > 1:  # the later name of the same switch
    del _BUFFERS_STAY["broadcast_buffers"]


class Replicated:
    """DistributedDataParallel around the whole objective, made anew when other parameters are to be trained.

    DDP waits for the gradient of every parameter that was trainable when it was made, so freezing and unfreezing
    change it. Parameters that a batch does not reach (no masked token, no label) are looked for in each step. Buffers
    are left alone: the centres are equal by construction.

    Args:
        objective: On its device; ``forward`` is ``losses``. Its tensors become those of the first process.
    """

    def __init__(self, objective: nn.Module) -> None:
        self._objective = objective
        self._wrapped: nn.parallel.DistributedDataParallel | None = None
        self._trained: tuple[bool, ...] = ()

    def losses(self, batch: Any, values: Mapping[str, float]) -> dict[str, Tensor]:
        """Through the wrapper, whose hooks average the gradients while the backward pass goes on."""
        return self._wrapper()(batch, values)

    @contextmanager
    def synchronising(self, last: bool) -> Iterator[None]:
        """Gradients of all but the last micro-batch stay in this process."""
        with nullcontext() if last else self._wrapper().no_sync():
            yield

    def whole(self, module: nn.Module) -> nn.Module | None:
        """The module itself, in the first process."""
        return module if rank() == 0 else None

    def _wrapper(self) -> nn.parallel.DistributedDataParallel:
        trained = tuple(parameter.requires_grad for parameter in self._objective.parameters())
        if self._wrapped is None or trained != self._trained:
            first = self._wrapped is None
            if not first:
                self._wrapped = None
                gc.collect()  # the hooks of the old wrapper go with it
            self._wrapped = nn.parallel.DistributedDataParallel(
                self._objective,
                **_BUFFERS_STAY,
                gradient_as_bucket_view=True,
                find_unused_parameters=True,
                init_sync=first,
            )
            self._trained = trained
        return self._wrapped


class Sharded:
    """FSDP2: each module of student and teacher is cut into one piece for each process.

    Parameters become DTensors, so this comes before the optimizer is built.

    Args:
        objective: On its device; the tensors of the first process are taken.
        student, teacher: Sharding of their modules.
        precision: Of the run; decides the format of gathered parameters where it is not given.
        device: Of this process.

    Raises:
        ConfigError: Student and teacher are not sharded alike, or NO_SHARD is mixed with the others.
    """

    def __init__(
        self,
        objective: nn.Module,
        student: NetworkShardingConfig,
        teacher: NetworkShardingConfig,
        *,
        precision: str,
        device: torch.device,
    ) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        trained = cast(Objective, objective).trained_modules()
        averaged = dict(cast(nn.ModuleDict, getattr(objective, "teacher", nn.ModuleDict())).items())
        refuse_uneven_sharding(student, teacher, trained)
        for tensor in [*objective.parameters(), *objective.buffers()]:
            dist.broadcast(tensor.data, 0)
        self._skeletons = {id(module): _skeleton(module) for module in averaged.values()}
        mesh = init_device_mesh(device.type, (world_size(),))
        for modules, config in ((trained, student), (averaged, teacher)):
            for name, module in modules.items():
                _shard_module(module, config.of(name), mesh, precision)
        loose = [name for name, p in objective.named_parameters() if p.requires_grad and not is_sharded(p)]
        if loose:
            raise ValueError(f"parameters outside the trained modules are not sharded: {loose[:5]}")
        # features are views of the last block's tokens; nothing here changes them in place
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        self._objective, self._trained, self._device = cast(Objective, objective), trained, device

    def losses(self, batch: Any, values: Mapping[str, float]) -> dict[str, Tensor]:
        """As the objective says; the modules gather their parameters by themselves."""
        return self._objective.losses(batch, values)

    @contextmanager
    def synchronising(self, last: bool) -> Iterator[None]:
        """Gradients of all but the last micro-batch are kept whole and not yet averaged."""
        for module in self._trained.values():
            cast(Any, module).set_requires_gradient_sync(last)
        yield
        for module in self._trained.values():
            if not any(parameter.requires_grad for parameter in module.parameters()):
                _free_gathered(module)  # a frozen module has no backward pass that would do it

    def whole(self, module: nn.Module) -> nn.Module | None:
        """A copy on the device, in the first process; gathered on the CPU."""
        state = whole_state(module)
        if rank():
            return None
        copy_ = copy.deepcopy(self._skeletons[id(module)])
        copy_.load_state_dict(state, assign=True)
        return copy_.requires_grad_(False).eval().to(self._device)  # to be evaluated: the other processes wait for it


def refuse_uneven_sharding(
    student: NetworkShardingConfig, teacher: NetworkShardingConfig, names: Iterable[str]
) -> None:
    """Refuse what cannot be averaged locally.

    Raises:
        ConfigError: Some modules are sharded and others are not.
    """
    whole = {
        f"{network}.{name}": config.of(name).sharding_strategy
        for network, config in (("student", student), ("teacher", teacher))
        for name in names
    }
    if len({strategy == "NO_SHARD" for strategy in whole.values()}) > 1:
        raise ConfigError(
            "Some modules are sharded and others are not.",
            where="\n".join(f"compute_precision.{key}.sharding_strategy={value}" for key, value in whole.items()),
            fix="set NO_SHARD in all of student and teacher or in none: the teacher is averaged piece by piece",
            code="sharding_uneven",
        )


def _free_gathered(module: nn.Module) -> None:
    from torch.distributed.fsdp import FSDPModule

    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def _skeleton(module: nn.Module) -> nn.Module:
    """A copy of a module whose saved tensors hold nothing yet."""
    saved = {id(tensor) for tensor in module.state_dict(keep_vars=True).values()}
    memo: dict[int, Any] = {}
    for tensor in [*module.parameters(), *module.buffers()]:
        empty = torch.empty_like(tensor, device="meta") if id(tensor) in saved else tensor.detach().cpu()
        memo[id(tensor)] = nn.Parameter(empty) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(module, memo)


def _shard_module(module: nn.Module, config: ShardingConfig, mesh: Any, precision: str) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    formats = config.mixed_precision
    param = formats.param_dtype or (precision if precision in ("bf16", "fp16") else "fp32")
    policy = MixedPrecisionPolicy(
        param_dtype=None if param == "fp32" else DTYPES[param], reduce_dtype=DTYPES[formats.reduce_dtype or "fp32"]
    )
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": policy,
        "reshard_after_forward": config.sharding_strategy == "FULL_SHARD",
    }
    for block in getattr(module, "flat_blocks", list)():
        fully_shard(block, **options)
    fully_shard(module, **options)
    for name in ("forward_list", "forward_needed", "forward_layers"):
        if hasattr(module, name):
            register_fsdp_forward_method(module, name)


def build_parallel(
    objective: nn.Module,
    *,
    fsdp: bool,
    student: NetworkShardingConfig,
    teacher: NetworkShardingConfig,
    precision: str,
    device: torch.device,
) -> Parallel:
    """The wrapper that a run asks for; before the optimizer is built. NO_SHARD everywhere is DDP."""
    if world_size() == 1:
        return Alone(cast(Objective, objective))
    names = list(cast(Objective, objective).trained_modules())
    refuse_uneven_sharding(student, teacher, names)
    if not fsdp or student.of(names[0]).sharding_strategy == "NO_SHARD":
        return Replicated(objective)
    for each in (student, teacher):
        if any(each.of(name).mixed_precision.buffer_dtype != "fp32" for name in names):
            log.warning("No effect: mixed_precision.buffer_dtype: buffers are always fp32.")
            break
    return Sharded(objective, student, teacher, precision=precision, device=device)


# --- tensors in pieces -----------------------------------------------------------------------------------------------


def is_sharded(tensor: Tensor) -> bool:
    """Whether each process holds a piece of it only."""
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local_piece(tensor: Tensor) -> Tensor:
    """The piece of this process, sharing its memory; a whole tensor as it is."""
    return cast(Any, tensor).to_local() if is_sharded(tensor) else tensor


def whole_tensor(tensor: Tensor) -> Tensor:
    """The whole of a tensor; all processes come here if it is in pieces."""
    return cast(Any, tensor).full_tensor() if is_sharded(tensor) else tensor


def whole_state(module: nn.Module) -> dict[str, Tensor]:
    """State of a module with whole tensors on the CPU, one gathered at a time; only the first process keeps them."""
    state: dict[str, Tensor] = {}
    for name, tensor in module.state_dict().items():
        found = whole_tensor(tensor.detach())
        if rank() == 0:
            state[name] = found.cpu()
    return state
