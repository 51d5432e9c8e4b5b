"""One dispatch: every backend gives the same numbers, and only what really ran is chosen."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.nn.attention import SDPBackend

from medssl_cli.core.errors import ConfigError, ResourceError
from medssl_cli.models import attention

GROUPS = ((2, 9), (3, 5))
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh_choice() -> Iterator[None]:
    def forget() -> None:
        attention._chosen.clear()
        attention._forced = None
        attention._import_xformers.cache_clear()
        attention._block_mask.cache_clear()
        attention._kept_starts.cache_clear()

    forget()
    yield
    forget()


def packed(seed: int = 0, tokens: int = 33) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, 3, 2, 16, generator=generator).unbind(1)  # type: ignore[return-value]


def by_definition(q: Tensor, k: Tensor, v: Tensor, groups: attention.Groups) -> Tensor:
    """softmax(q k / sqrt(E)) v in float64, token by token."""
    out, start = torch.zeros_like(q, dtype=torch.float64), 0
    for samples, tokens in groups:
        for _ in range(samples):
            span = slice(start, start + tokens)
            for head in range(q.shape[1]):
                for i in range(start, start + tokens):
                    scores = (k[span, head].double() * q[i, head].double()).sum(-1) / q.shape[-1] ** 0.5
                    weights = scores.exp() / scores.exp().sum()
                    out[i, head] = (weights[:, None] * v[span, head].double()).sum(0)
            start += tokens
    return out


@pytest.mark.parametrize("name", ["sdpa", "plain"])
def test_packed_attention_is_the_definition_within_each_sample(name: str) -> None:
    q, k, v = packed()
    attention.set_backend(name)
    torch.testing.assert_close(
        attention.attend(q, k, v, GROUPS).double(), by_definition(q, k, v, GROUPS), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("batched", [False, True])
def test_plain_and_sdpa_agree_in_values_and_gradients(batched: bool) -> None:
    found = []
    for name in ("plain", "sdpa"):
        attention.set_backend(name)
        qkv = torch.stack(packed(), 1).requires_grad_()
        parts = qkv[:30].unflatten(0, (3, 10)).unbind(2) if batched else qkv.unbind(1)
        out = attention.attend(*parts, None if batched else GROUPS)
        (out * torch.arange(out.numel()).view(out.shape).cos()).sum().backward()
        assert qkv.grad is not None
        found.append((out.detach(), qkv.grad))
    assert found[0][1].abs().max() > 0.1
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=0)


def test_batched_equals_packed_of_one_group() -> None:
    q, k, v = (part[:30] for part in packed())
    batched = attention.attend(*(part.unflatten(0, (3, 10)) for part in (q, k, v)))
    assert torch.equal(batched.flatten(0, 1), attention.attend(q, k, v, ((3, 10),)))


def test_groups_that_do_not_add_up_are_refused() -> None:
    with pytest.raises(ValueError, match="hold 32 tokens, the tensor 33"):
        attention.attend(*packed(), ((2, 16),))


def test_choice_on_a_cpu_is_sdpa_and_moves_no_generator() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with torch.inference_mode():
        assert attention.choose_backend(CPU, torch.float32) == "sdpa"
    assert torch.equal(before, torch.get_rng_state())


def test_choice_within_a_compiled_function() -> None:
    q, k, v = packed()
    compiled = torch.compile(lambda a, b, c: attention.attend(a, b, c, GROUPS), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), attention.attend(q, k, v, GROUPS))


def test_probe_names_every_backend_and_what_is_missing() -> None:
    statuses = {status.name: status for status in attention.probe_backends("cpu")}
    assert set(statuses) == set(attention.BACKENDS)
    assert statuses["sdpa"].works
    assert statuses["plain"].works
    assert not statuses["xformers"].works
    assert "CUDA" in statuses["xformers"].detail


def test_a_kernel_with_wrong_numbers_or_nan_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    for spoil in (lambda out: out * 1.2, lambda out: out * float("nan")):
        kernel = lambda q, k, v, g, spoil=spoil: spoil(attention._attend_plain(q, k, v, g))  # noqa: E731
        monkeypatch.setitem(attention._KERNELS, "sdpa", kernel)
        status = attention._status("sdpa", CPU, torch.float32)
        assert not status.works
        assert "wrong numbers" in status.detail


def test_an_impossible_override_is_a_resource_error() -> None:
    with pytest.raises(ResourceError) as caught:
        attention.set_backend("xformers", "cpu")
    assert caught.value.exit_code == 6
    assert "CUDA" in caught.value.where
    assert attention.choose_backend(CPU, torch.float32) == "sdpa"  # the choice is as it was
    with pytest.raises(ConfigError, match="no attention backend"):
        attention.set_backend("flash9")


def test_no_backend_at_all_is_a_resource_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Tensor:
        raise RuntimeError("no kernel image")

    for name in attention.BACKENDS:
        monkeypatch.setitem(attention._KERNELS, name, broken)
    with pytest.raises(ResourceError) as caught:
        attention.choose_backend(CPU, torch.float32)
    assert "no kernel image" in caught.value.where


# --- trial -----------------------------------------------------------------------------------------------------------

SHAPES = ((2, 96), (4, 24))


def slowed(kernel: attention.Kernel, seconds: float) -> attention.Kernel:
    def slow(q: Tensor, k: Tensor, v: Tensor, groups: attention.Groups) -> Tensor:
        time.sleep(seconds)
        return kernel(q, k, v, groups)

    return slow


def slow_down(monkeypatch: pytest.MonkeyPatch, **seconds: float) -> None:
    for name, pause in seconds.items():
        monkeypatch.setitem(attention._KERNELS, name, slowed(attention._KERNELS[name], pause))


def test_a_trial_takes_the_fastest_for_the_process_and_moves_no_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    slow_down(monkeypatch, sdpa=0.02, plain=0.002)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with torch.inference_mode():
        choice = attention.choose_by_trial(CPU, torch.float32, SHAPES, 2, 16, repeats=2)
    assert torch.equal(before, torch.get_rng_state())
    assert (choice.name, choice.reason) == ("plain", "fastest")
    assert attention.choose_backend(CPU, torch.float32) == "plain"
    assert attention.choose_backend(CPU, torch.bfloat16) == "sdpa", "another number type was not tried"
    assert [t.name for t in choice.timings if (t.milliseconds or 0) > 1] == ["sdpa", "plain"]
    assert choice.line().startswith("attention: plain ")
    assert choice.line().endswith(" ms -> plain (fastest)")


@pytest.mark.parametrize(
    ("device", "sdpa", "plain", "name"),
    [
        ("cuda", 1.02, 1.00, "sdpa"),  # within 3 %: the earlier
        ("cuda", 1.05, 1.00, "plain"),
        ("cpu", 10.5, 10.0, "sdpa"),
        ("cpu", 15.0, 10.0, "plain"),
        ("cpu", 0.9, 0.3, None),  # too short to tell from noise
    ],
)
def test_ties_keep_the_earlier_kernel(device: str, sdpa: float, plain: float, name: str | None) -> None:
    timings = [
        attention.BackendTiming("xformers", None, "not installed"),
        attention.BackendTiming("sdpa", sdpa, ""),
        attention.BackendTiming("plain", plain, ""),
    ]
    assert attention._fastest(timings, torch.device(device))[0] == name


def test_a_short_pass_leaves_the_first_kernel_whatever_an_earlier_trial_found(monkeypatch: pytest.MonkeyPatch) -> None:
    attention._chosen[attention._key(CPU, torch.float32)] = "plain"
    choice = attention.choose_by_trial(CPU, torch.float32, ((1, 4),), 1, 8, repeats=2)
    assert choice.name == attention.choose_backend(CPU, torch.float32) == "sdpa"
    assert "too short" in choice.reason


def test_r01_the_kernel_of_a_checkpoint_is_taken_without_a_trial(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    slow_down(monkeypatch, plain=0.02)
    choice = attention.choose_by_trial(CPU, torch.float32, SHAPES, 2, 16, preferred="plain")
    assert (choice.name, choice.timings) == ("plain", [])
    assert attention.choose_backend(CPU, torch.float32) == "plain"
    assert not caplog.records
    for gone, why in (("sdpa_flash", "half precision on CUDA only"), ("flash9", "no such kernel")):
        caplog.clear()
        choice = attention.choose_by_trial(CPU, torch.float32, SHAPES, 2, 16, preferred=gone, repeats=1)
        assert choice.name == "sdpa"
        assert why in caplog.records[0].getMessage()


def test_a_kernel_asked_for_by_name_is_not_put_to_a_trial() -> None:
    attention.set_backend("plain")
    choice = attention.choose_by_trial(CPU, torch.float32, SHAPES, 2, 16, preferred="sdpa")
    assert (choice.name, choice.reason, choice.line()) == ("plain", "asked for", "attention: plain (asked for)")


def test_what_fails_on_the_real_shapes_is_said_and_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = attention._KERNELS["sdpa"]

    def small_only(q: Tensor, k: Tensor, v: Tensor, groups: attention.Groups) -> Tensor:
        if len(q) > 100:
            raise torch.OutOfMemoryError("tried to allocate 80.00 GiB")
        return whole(q, k, v, groups)

    monkeypatch.setitem(attention._KERNELS, "sdpa", small_only)
    slow_down(monkeypatch, plain=0.002)
    choice = attention.choose_by_trial(CPU, torch.float32, SHAPES, 2, 16, repeats=1)
    assert choice.name == "plain"
    assert "not timed: sdpa: OutOfMemoryError: tried to allocate 80.00 GiB" in choice.line()


def test_plain_takes_no_part_where_its_weights_would_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_free_memory", lambda: 2**30)
    # 12 layers of 16 * 2 * 769^2 weights, each kept in float32 once and once in bfloat16
    gib = 12 * 16 * 2 * 769**2 * 6 / 2**30
    detail = attention._not_timed("plain", CPU, torch.bfloat16, ((2, 769),), 16, 12)
    assert detail == f"would keep {gib:.1f} GiB of attention weights, 1.0 GiB are free"
    assert attention._not_timed("sdpa", CPU, torch.bfloat16, ((2, 769),), 16, 12) == ""
    monkeypatch.setattr(attention, "_free_memory", lambda: 2**40)
    assert attention._not_timed("plain", CPU, torch.bfloat16, ((2, 769),), 16, 12) == ""


@pytest.mark.parametrize(
    ("groups", "heads", "expected"),
    [
        (((16, 769), (64, 193)), 12, ((2, 769), (8, 193))),
        (((16, 769), (64, 193)), 1, ((16, 769), (64, 193))),
        (((7, 769), (28, 193)), 12, ((1, 769), (4, 193))),
        (((7, 3000), (27, 193)), 12, ((7, 3000), (27, 193))),  # no common divisor: nothing can be left out
    ],
)
def test_a_cpu_is_tried_with_fewer_samples_in_proportion(
    groups: attention.Groups, heads: int, expected: attention.Groups
) -> None:
    assert attention._fewer_samples(groups, heads) == expected


def test_the_kernels_of_sdpa_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch has a flash kernel for the CPU too; held to a kernel that it lacks there, it says so."""
    q, k, v = packed()
    monkeypatch.setattr(attention, "_serves", lambda *_: True)
    attention.set_backend("sdpa_flash")
    torch.testing.assert_close(
        attention.attend(q, k, v, GROUPS).double(), by_definition(q, k, v, GROUPS), atol=1e-5, rtol=0
    )
    compiled = torch.compile(lambda a, b, c: attention.attend(a, b, c, GROUPS), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), attention.attend(q, k, v, GROUPS))
    for name in ("sdpa_cudnn", "sdpa_efficient"):
        with pytest.raises(ResourceError) as caught:
            attention.set_backend(name)
        assert "backend for scaled_dot_product_attention" in caught.value.where
    assert attention._forced == "sdpa_flash"


@pytest.mark.parametrize("kernel", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
def test_a_compiled_function_keeps_to_the_kernel_that_was_named(kernel: SDPBackend) -> None:
    operators: list[str] = []

    def note(graph: torch.fx.GraphModule, _: object) -> object:
        operators.extend(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    held = attention._one_of_sdpa(kernel)
    compiled = torch.compile(
        lambda q, k, v: held(q, k, v, GROUPS), backend=aot_autograd(fw_compiler=note), fullgraph=True
    )
    compiled(*(part.requires_grad_() for part in packed())).sum().backward()
    assert any("flash_attention" in name for name in operators) is (kernel is SDPBackend.FLASH_ATTENTION)


# --- xformers, by a written stand-in ---------------------------------------------------------------------------------

STUB_OPS = """
import torch
calls = []
def memory_efficient_attention(query, key, value, attn_bias=None):
    calls.append(attn_bias)
    b, t, h, e = query.shape
    bias = torch.zeros(t, t) if attn_bias is None else attn_bias.materialize(t)
    scores = torch.einsum("bqhe,bkhe->bhqk", query, key) * e ** -0.5 + bias.to(query.dtype)
    return torch.einsum("bhqk,bkhe->bqhe", scores.softmax(-1), value)
"""
STUB_BIAS = """
import torch
made = []
class BlockDiagonalMask:
    def __init__(self, lengths):
        self.lengths = lengths
    @classmethod
    def from_seqlens(cls, lengths, *, device):
        made.append((tuple(lengths), str(device)))
        return cls(lengths)
    def materialize(self, total):
        which = torch.repeat_interleave(torch.arange(len(self.lengths)), torch.tensor(self.lengths))
        assert len(which) == total
        return torch.where(which[:, None] == which[None], 0.0, float("-inf"))
"""


def install_stub(folder: Path, monkeypatch: pytest.MonkeyPatch, ops: str = STUB_OPS) -> None:
    """A package named xformers with its version record, first on the path and gone after the test."""
    (folder / "xformers/ops/fmha").mkdir(parents=True)
    (folder / "xformers/__init__.py").write_text("")
    (folder / "xformers/ops/__init__.py").write_text(ops)
    (folder / "xformers/ops/fmha/__init__.py").write_text("")
    (folder / "xformers/ops/fmha/attn_bias.py").write_text(STUB_BIAS)
    (folder / "xformers-9.9.dist-info").mkdir()
    (folder / "xformers-9.9.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: xformers\nVersion: 9.9\n")
    for name in [name for name in sys.modules if name.split(".")[0] == "xformers"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delenv("XFORMERS_DISABLED", raising=False)
    # the stand-in computes on the CPU; the real one is asked on CUDA only
    monkeypatch.setattr(attention, "_serves", lambda *_: True)


@pytest.fixture
def forget_stub() -> Iterator[None]:
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "xformers"]:
        del sys.modules[name]


@pytest.mark.usefixtures("forget_stub")
def test_xformers_branch_gives_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = packed()
    attention.set_backend("plain")
    expected = attention.attend(q, k, v, GROUPS)
    expected_batched = attention.attend(q[:30], k[:30], v[:30], ((3, 10),))
    install_stub(tmp_path, monkeypatch)
    attention.set_backend(None)
    assert attention.choose_backend(CPU, torch.float32) == "xformers"
    bias = sys.modules["xformers.ops.fmha.attn_bias"]
    bias.made.clear()  # type: ignore[attr-defined]
    for _ in range(2):
        torch.testing.assert_close(attention.attend(q, k, v, GROUPS), expected, atol=1e-5, rtol=0)
    assert bias.made == [((9, 9, 5, 5, 5), "cpu")]  # type: ignore[attr-defined]  # made once, kept
    torch.testing.assert_close(
        attention.attend(q[:30], k[:30], v[:30], ((3, 10),)), expected_batched, atol=1e-5, rtol=0
    )
    assert sys.modules["xformers.ops"].calls[-1] is None  # type: ignore[attr-defined]  # one group needs no mask


@pytest.mark.usefixtures("forget_stub")
@pytest.mark.parametrize("value", ["1", "true", "TRUE"])
def test_t02_xformers_disabled_never_imports_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    install_stub(tmp_path, monkeypatch)
    monkeypatch.setenv("XFORMERS_DISABLED", value)
    assert attention.choose_backend(CPU, torch.float32) == "sdpa"
    status = attention.probe_backends("cpu")[0]
    assert (status.name, status.works) == ("xformers", False)
    assert "XFORMERS_DISABLED" in status.detail
    assert "xformers" not in sys.modules
    with pytest.raises(ResourceError):
        attention.set_backend("xformers")


@pytest.mark.usefixtures("forget_stub")
def test_an_installed_xformers_that_does_not_run_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = "def memory_efficient_attention(*a, **k):\n    raise NotImplementedError('not built with CUDA support')\n"
    install_stub(tmp_path, monkeypatch, ops=broken)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            attention.attend(*packed(), GROUPS)
    assert len(caplog.records) == 1
    text = caplog.records[0].getMessage()
    assert "attention on cpu: sdpa" in text
    assert "xformers 9.9 is installed but does not work" in text
    assert "not built with CUDA support" in text
    assert "nvidia-cuda-runtime-cu12" in text
    caplog.clear()
    slow_down(monkeypatch, plain=0.05, sdpa=0.005)  # long enough to be timed
    with caplog.at_level(logging.WARNING):
        choice = attention.choose_by_trial(CPU, torch.float32, SHAPES, 2, 16, repeats=1)
    assert choice.name == "sdpa"
    assert [record.getMessage() for record in caplog.records] == [text], "a trial says it too"


def test_xformers_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_serves", lambda name, *_: name != "varlen")
    monkeypatch.setattr(attention, "_version", lambda _: None)
    status = attention.probe_backends("cpu")[0]
    assert (status.works, status.detail) == (False, "not installed")
    assert "medssl[xformers]" in status.fix
    assert attention.choose_backend(CPU, torch.float32) == "sdpa"


def test_a_cudart_that_cannot_be_loaded_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    library = tmp_path / "libcudart.so.12"
    library.write_bytes(b"no library")
    (tmp_path / "nvidia_cuda_runtime_cu12-12.9.dist-info").mkdir()
    record = tmp_path / "nvidia_cuda_runtime_cu12-12.9.dist-info"
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: nvidia-cuda-runtime-cu12\nVersion: 12.9\n")
    (record / "RECORD").write_text("libcudart.so.12,,\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert attention._cudart_path() == library
    with caplog.at_level(logging.WARNING):
        attention._preload_cudart()
    assert "libcudart.so.12 cannot be loaded" in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_backend_that_says_it_works_agrees_on_a_gpu(dtype: torch.dtype) -> None:
    device = torch.device("cuda")
    q, k, v = (part.to(device, dtype) for part in torch.randn(33, 3, 2, 64).unbind(1))
    for status in attention.probe_backends(device, dtype):
        if status.works:
            attention.set_backend(status.name, device, dtype)
            out = attention.attend(q, k, v, GROUPS).double().cpu()
            expected = by_definition(q.cpu(), k.cpu(), v.cpu(), GROUPS)
            torch.testing.assert_close(out, expected, atol=2e-2, rtol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trial_on_a_gpu_leaves_plain_out_and_gives_its_memory_back(dtype: torch.dtype) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    before = torch.cuda.memory_allocated(device)
    choice = attention.choose_by_trial(device, dtype, ((4, 769), (16, 193)), 12, 64)
    assert torch.cuda.memory_allocated(device) - before < 2**20
    assert "others work" in next(t.detail for t in choice.timings if t.name == "plain")
    assert attention.choose_backend(torch.device("cuda"), dtype) == choice.name


def test_varlen_attention_is_one_graph_with_the_starts_as_a_constant(monkeypatch: pytest.MonkeyPatch) -> None:
    """A break would cut every compiled block in two, and a list of starts would be copied to the device in each."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")

    def in_the_open(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, *_: object) -> Tensor:
        return q + k + v + starts[-1]

    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    monkeypatch.setattr(varlen, "varlen_attn", in_the_open)
    q, k, v = packed()
    found = torch.compile(attention._attend_varlen, backend=keep, fullgraph=True)(q, k, v, GROUPS)
    assert torch.equal(found, q + k + v + 33)
    assert len(graphs) == 1
    assert [name for name, _ in graphs[0].named_buffers()] == ["sub_starts"] or "torch.tensor" not in graphs[0].code
    assert attention._starts(GROUPS, "cpu").tolist() == [0, 9, 18, 23, 28, 33]


def test_a_kernel_that_refuses_the_shapes_of_a_run_takes_no_part_in_its_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = attention._KERNELS["sdpa"]

    def small_only(q: Tensor, k: Tensor, v: Tensor, groups: attention.Groups) -> Tensor:
        if q.shape[-1] == 16:
            raise ValueError("this operator takes no width of 16")
        return whole(q, k, v, groups)

    monkeypatch.setitem(attention._KERNELS, "sdpa", small_only)
    choice = attention.choose_by_trial(CPU, torch.float32, ((8, 300),), 2, 16)
    assert choice.name == "plain"
    assert "not timed: sdpa: ValueError: this operator takes no width of 16" in choice.line()
