"""Compiled blocks give the same numbers, a compiler that fails costs one warning, and what cannot be is refused."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from medssl_cli.core.errors import ConfigError
from medssl_cli.engine import acceleration
from medssl_cli.engine.acceleration import AccelerationConfig, accelerate, compiled_blocks, missing_for_compile

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Rows(nn.Module):
    """A block."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).tanh()


class Network(nn.Module):
    """Some blocks that it can list."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Rows() for _ in range(depth))

    def flat_blocks(self) -> Iterator[nn.Module]:
        yield from self.blocks

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Pair(nn.Module):
    """Student and teacher as an objective holds them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.student = nn.ModuleDict({"backbone": Network()})
        self.teacher = nn.ModuleDict({"backbone": copy.deepcopy(self.student["backbone"])})
        self.teacher.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.student["backbone"](x) - self.teacher["backbone"](x)


@pytest.fixture(autouse=True)
def with_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every machine had what is needed."""
    monkeypatch.setattr(acceleration, "missing_for_compile", lambda _: "")


class Recorder:
    """In the place of ``nn.Module.compile``: remembers how, and compiles with a backend that does nothing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[dict[str, object]] = []
        recorder = self

        def record(module: nn.Module, **how: object) -> None:
            recorder.asked.append(how)
            module._compiled_call_impl = module._call_impl  # type: ignore[assignment]

        monkeypatch.setattr(nn.Module, "compile", record)


@pytest.mark.parametrize(
    ("wanted", "device", "precision", "steps", "expected"),
    [
        ("auto", CUDA, "bf16", 1000, True),
        ("auto", CUDA, "fp16", 1000, True),
        ("auto", CUDA, "tf32", 1000, True),
        ("auto", CUDA, "fp32", 10**6, False),
        ("auto", CUDA, "bf16", 999, False),
        ("auto", CPU, "bf16", 10**6, False),
        (True, CPU, "fp32", 1, True),
        (False, CUDA, "bf16", 10**6, False),
    ],
)
def test_auto_is_for_long_runs_on_a_gpu(
    wanted: str | bool,
    device: torch.device,
    precision: str,
    steps: int,
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recorder, pair = Recorder(monkeypatch), Pair()
    config = AccelerationConfig.model_validate({"compile": wanted})
    lines = accelerate(pair, config, device, precision, steps)  # type: ignore[arg-type]
    assert bool(compiled_blocks(pair)) is expected
    assert len(recorder.asked) == (6 if expected else 0)
    assert lines[0].startswith("compile: 6 blocks (" if expected else "compile: off (")


def test_the_last_block_may_meet_several_numbers_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Network, "forward_needed", Network.forward, raising=False)
    recorder = Recorder(monkeypatch)
    accelerate(Pair(), AccelerationConfig(compile=True), CPU, "fp32", 5)
    assert recorder.asked == [{"dynamic": False}, {"dynamic": False}, {}] * 2


def test_cuda_graphs_are_the_teachers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Network, "forward_needed", Network.forward, raising=False)
    recorder, pair, begun = Recorder(monkeypatch), Pair(), []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: begun.append(1))
    lines = accelerate(pair, AccelerationConfig(compile=True, cudagraphs=True), CUDA, "bf16", 5)
    graphs = {"dynamic": False, "mode": "reduce-overhead"}
    assert recorder.asked == [{"dynamic": False}, {"dynamic": False}, {}, graphs, graphs, {}]
    assert lines[1] == "CUDA graphs: the teacher's blocks"
    pair(torch.ones(2, 4))
    assert begun == [1], "once a pass of the teacher"
    pair.teacher["backbone"].forward_needed(torch.ones(2, 4))  # type: ignore[operator]
    assert begun == [1, 1], "whatever the name under which the network is called"
    pair.student["backbone"](torch.ones(2, 4))
    assert begun == [1, 1], "the student has no graphs"


def test_cuda_graphs_of_sharded_networks_are_refused() -> None:
    config = AccelerationConfig(compile=True, cudagraphs=True)
    with pytest.raises(ConfigError) as caught:
        accelerate(Pair(), config, CUDA, "bf16", 10**6, sharded=True)
    assert caught.value.code == "cudagraphs_need_whole_parameters"
    assert "compute_precision.parallel: fsdp" in caught.value.where


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of DDP and of the compiler
def test_compiled_blocks_stay_whole_inside_ddp_and_take_any_number_of_tokens() -> None:
    """PyTorch would cut each graph at the border of a gradient bucket, 1 MiB here, and fail at the second number."""
    graphs: list[int] = []

    def count(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        graphs.append(len(graph.graph.find_nodes(op="call_function", target=torch._C._nn.linear)))
        return graph

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(400, 400) for _ in range(4))

        def forward(self, x: Tensor, tokens: int) -> Tensor:
            for layer in self.layers:
                x = layer(x).unflatten(0, (-1, tokens)).flatten(0, 1)
            return x

    class Whole(Network):
        def forward(self, x: Tensor, tokens: int) -> Tensor:  # type: ignore[override]
            return self.blocks[0](x, tokens).sum()

    network = Whole(depth=0)
    network.blocks.append(Wide())
    torch._dynamo.reset()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with torch._dynamo.config.patch(optimize_ddp=True), pytest.MonkeyPatch.context() as patch:
            compile_ = nn.Module.compile
            patch.setattr(nn.Module, "compile", lambda module, **how: compile_(module, backend=count, **how))
            network.forward_needed = network.forward  # type: ignore[assignment]  # so that the block may vary
            accelerate(network, AccelerationConfig(compile=True), CPU, "fp32", 5)
            wrapped = nn.parallel.DistributedDataParallel(network)
            for tokens in (2, 3, 5):
                wrapped(torch.ones(2 * tokens, 400), tokens).backward()
    finally:
        dist.destroy_process_group()
        torch._dynamo.reset()
    assert compiled_blocks(network) == 1, "nothing fell back"
    assert graphs == [4, 4], "one graph for the first number of tokens, one for all others"


@pytest.mark.parametrize(
    ("device", "compile_", "code"), [(CPU, True, "cudagraphs_need_cuda"), (CUDA, False, "cudagraphs_need_compile")]
)
def test_cuda_graphs_that_cannot_be_are_refused(device: torch.device, compile_: bool, code: str) -> None:
    with pytest.raises(ConfigError) as caught:
        accelerate(Pair(), AccelerationConfig(compile=compile_, cudagraphs=True), device, "bf16", 10**6)
    assert caught.value.code == code
    assert "train.cudagraphs" in caught.value.where


def test_nothing_to_compile_is_said(caplog: pytest.LogCaptureFixture) -> None:
    assert accelerate(nn.Linear(2, 2), AccelerationConfig(compile=True), CPU, "fp32", 5) == [
        "compile: off (no network here is made of blocks)"
    ]
    assert len(caplog.records) == 1
    caplog.clear()
    accelerate(nn.Linear(2, 2), AccelerationConfig(), CUDA, "bf16", 10**6)
    assert not caplog.records, "auto asks for nothing"


def test_a_missing_compiler_is_one_warning(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(acceleration, "missing_for_compile", missing_for_compile)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    pair = Pair()
    lines = accelerate(pair, AccelerationConfig(compile=True), CPU, "fp32", 5)
    assert lines == ["compile: off (no compiler was found; install g++)"]
    assert [record.getMessage() for record in caplog.records] == [
        "The blocks are not compiled: no compiler was found; install g++."
    ]
    assert compiled_blocks(pair) == 0


def fail_to_compile(*_: object) -> None:
    raise OSError("g++: internal compiler error")


def test_a_compiler_that_fails_costs_one_warning_and_no_number(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module, **how: plain(module, backend=fail_to_compile, **how))
    pair, x = Pair(), torch.linspace(-1, 1, 12).view(3, 4)
    with torch.no_grad():
        pair.teacher["backbone"].blocks[0].linear.weight.mul_(2)  # so that the difference is not 0
    expected = pair(x)
    accelerate(pair, AccelerationConfig(compile=True), CPU, "fp32", 5)
    assert compiled_blocks(pair) == 6
    assert torch.equal(pair(x), expected)
    assert torch.equal(pair(x), expected)
    assert compiled_blocks(pair) == 0
    warnings = [record for record in caplog.records if record.name == acceleration.__name__]
    assert len(warnings) == 1
    assert "g++: internal compiler error" in warnings[0].getMessage()


def test_other_faults_of_a_step_pass_through(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: object, **__: object) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def compile_to_exhausted(module: nn.Module, **_: object) -> None:
        module._compiled_call_impl = exhausted  # type: ignore[assignment]

    monkeypatch.setattr(nn.Module, "compile", compile_to_exhausted)
    pair = Pair()
    accelerate(pair, AccelerationConfig(compile=True), CPU, "fp32", 5)
    with pytest.raises(torch.OutOfMemoryError):
        pair(torch.ones(2, 4))
    assert compiled_blocks(pair) == 6


def test_names_of_tensors_and_copies_stay_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    Recorder(monkeypatch)
    pair = Pair()
    names = list(pair.state_dict())
    accelerate(pair, AccelerationConfig(compile=True), CPU, "fp32", 5)
    assert list(pair.state_dict()) == names
    assert compiled_blocks(copy.deepcopy(pair)) == 0


def test_the_limit_of_variants_is_raised_and_never_lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    Recorder(monkeypatch)
    limits = torch._dynamo.config
    for before, after in ((8, acceleration.GRAPHS_A_BLOCK), (500, 500)):
        with limits.patch(recompile_limit=before):  # monkeypatch cannot put these back
            accelerate(Pair(), AccelerationConfig(compile=True), CPU, "fp32", 5)
            assert limits.recompile_limit == after
