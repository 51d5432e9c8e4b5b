import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_stub import CPU, Stub, resumed, trainer
from torch import Tensor, nn

from medssl_cli.core.errors import CheckpointError, ConfigError, ResourceError
from medssl_cli.engine import checkpoint as module
from medssl_cli.engine.checkpoint import (
    MODEL,
    OPTIMIZER,
    STATE,
    Checkpoints,
    compare_configs,
    model_tensors,
    optimizer_tensors,
    read,
    read_latest,
    restore,
)
from medssl_cli.engine.optim import build_adamw, parameter_groups

FACTS = {"config": {"a": 1}, "sequence_names": ["t2"], "precision": {}, "telemetry": {}, "extra": {"best": 0.5}}


def save(folder: Path, step: int, value: float = 1.0, **changes: object) -> Path:
    tensors = {"student.w": torch.full((3, 2), value), "centre": torch.tensor(value)}
    return module.save(folder, step, tensors, {"w:exp_avg": torch.full((3, 2), -value)}, {**FACTS, **changes})


def steps_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_round_trip_of_tensors_and_facts(tmp_path: Path) -> None:
    path = save(tmp_path, 12, 0.25)
    assert path == tmp_path / "step_0000012"
    assert sorted(p.name for p in path.iterdir()) == [MODEL, OPTIMIZER, STATE]
    (tmp_path / "plain").touch()
    assert {p.stat().st_mode for p in path.iterdir()} == {(tmp_path / "plain").stat().st_mode}  # as the umask says
    found = read_latest(tmp_path)
    assert found is not None
    assert (found.step, found.config, found.sequence_names, found.extra) == (12, {"a": 1}, ["t2"], {"best": 0.5})
    assert torch.equal(found.model()["student.w"], torch.full((3, 2), 0.25))
    assert torch.equal(found.optimizer()["w:exp_avg"], torch.full((3, 2), -0.25))
    state = json.loads((path / STATE).read_text())
    assert state["files"][MODEL]["tensors"] == {"centre": ["float32", []], "student.w": ["float32", [3, 2]]}
    assert state["versions"]["torch"] == torch.__version__


def test_newest_three_stay_and_last_points_to_the_newest(tmp_path: Path) -> None:
    for step in (5, 10, 9_999_999, 10_000_000):
        save(tmp_path, step)
    assert steps_of(tmp_path) == ["last", "step_0000010", "step_10000000", "step_9999999"]
    assert (tmp_path / "last").readlink() == Path("step_10000000")
    assert read(tmp_path / "last").step == 10_000_000
    moved = tmp_path.with_name("moved")
    shutil.move(tmp_path, moved)
    assert read(moved / "last").step == 10_000_000


def test_nothing_saved_yet(tmp_path: Path) -> None:
    assert read_latest(tmp_path / "none") is None
    assert Checkpoints(tmp_path / "none").latest_path() is None


def test_shared_and_strided_tensors_are_saved_apart(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    module.save(tmp_path, 1, {"a": base, "b": base, "c": base[1:], "d": base.T}, {}, FACTS)
    found = read(tmp_path / "step_0000001").model()
    assert all(torch.equal(found[name], tensor) for name, tensor in (("b", base), ("c", base[1:]), ("d", base.T)))


def test_r02_a_whole_step_saved_again_is_never_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = save(tmp_path, 5, 1.0)
    inode, before = first.stat().st_ino, {path.name: path.read_bytes() for path in first.iterdir()}
    (tmp_path / "last").unlink()
    moved: list[str] = []
    replace = os.replace

    def watched(source: Path, target: Path) -> None:
        moved.extend([Path(source).name, Path(target).name])
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    assert save(tmp_path, 5, 2.0) == first
    assert moved == [".tmp-last", "last"]
    assert first.stat().st_ino == inode
    assert {path.name: path.read_bytes() for path in first.iterdir()} == before
    assert steps_of(tmp_path) == ["last", "step_0000005"]


def test_a_damaged_step_saved_again_is_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    flip_byte(save(tmp_path, 5, 1.0) / OPTIMIZER)
    save(tmp_path, 5, 2.0)
    assert "step_0000005 is written anew" in caplog.text
    assert "SHA-256 differs" in caplog.text
    assert steps_of(tmp_path) == ["last", "step_0000005"]
    assert read(tmp_path / "last").model()["centre"] == 2.0


def test_leftovers_are_ignored_and_cleaned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 5)
    (tmp_path / ".tmp-step_0000010").mkdir()
    (tmp_path / ".tmp-step_0000010" / MODEL).write_bytes(b"half")
    (tmp_path / ".tmp-last").symlink_to("step_0000010")
    (tmp_path / "step_0000015").mkdir()
    (tmp_path / "step_0000015" / MODEL).write_bytes(b"half")
    owner = Checkpoints(tmp_path).latest()
    assert owner is not None
    assert owner.step == 5
    assert "step_0000015 was never finished" in caplog.text
    assert steps_of(tmp_path) == ["last", "step_0000005", "step_0000015"]
    save(tmp_path, 15)
    assert read(tmp_path / "last").step == 15


def test_broken_last_falls_back_with_a_log_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 5)
    (tmp_path / "last").unlink()
    (tmp_path / "last").symlink_to("step_0000010")
    found = read_latest(tmp_path)
    assert found is not None
    assert found.step == 5
    assert "leads nowhere; using step_0000005" in caplog.text


def test_last_copied_as_a_folder_becomes_a_link_again(tmp_path: Path) -> None:
    save(tmp_path, 5)
    (tmp_path / "last").unlink()
    shutil.copytree(tmp_path / "step_0000005", tmp_path / "last")
    save(tmp_path, 10)
    assert (tmp_path / "last").readlink() == Path("step_0000010")


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("name", [MODEL, OPTIMIZER])
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-7]), "bytes, "),
        (lambda path: path.write_bytes(b""), "0 bytes, "),
        (lambda path: path.unlink(), "it is missing"),
        (flip_byte, "SHA-256 differs"),
    ],
    ids=["truncated", "empty", "missing", "altered"],
)
def test_damaged_file_is_refused_naming_it_and_the_last_good(
    tmp_path: Path, name: str, damage: Callable[[Path], None], reason: str
) -> None:
    save(tmp_path, 5)
    broken = save(tmp_path, 10) / name
    damage(broken)
    with pytest.raises(CheckpointError, match="damaged") as caught:
        read_latest(tmp_path)
    assert caught.value.exit_code == 7
    assert str(broken) in caught.value.where
    assert reason in caught.value.where
    assert f"go on from {tmp_path / 'step_0000005'}" in caught.value.fix
    shutil.rmtree(broken.parent)  # what the message says
    found = read_latest(tmp_path)
    assert found is not None
    assert found.step == 5


@pytest.mark.parametrize("text", ["{", "[]", '{"step": 1}', "<html>", "\x80\x04"])
def test_damaged_state_is_refused(tmp_path: Path, text: str) -> None:
    (save(tmp_path, 5) / STATE).write_text(text)
    with pytest.raises(CheckpointError, match="damaged") as caught:
        read_latest(tmp_path)
    assert STATE in caught.value.where
    assert "no other checkpoint" in caught.value.fix


def test_w44_no_pickle_is_ever_read(tmp_path: Path) -> None:
    path = save(tmp_path, 5)
    mark = tmp_path / "executed"

    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (mark,)  # type: ignore[return-value]

    torch.save({"w": Bomb()}, path / MODEL)
    state = json.loads((path / STATE).read_text())
    state["files"][MODEL] |= {
        "bytes": (path / MODEL).stat().st_size,
        "sha256": hashlib.sha256((path / MODEL).read_bytes()).hexdigest(),
    }
    (path / STATE).write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match="damaged"):
        read(path).model()
    assert not mark.exists()


# --- restoring -------------------------------------------------------------------------------------------------------


def test_optimizer_state_travels_by_name_not_by_order(tmp_path: Path) -> None:
    def build(*order: str) -> tuple[nn.ModuleDict, torch.optim.AdamW]:
        modules = nn.ModuleDict({name: nn.Linear(2, size) for name, size in {"a": 3, "b": 3, "c": 1}.items()})
        groups = parameter_groups({name: modules[name] for name in order}, depth=1)
        return modules, build_adamw(groups, CPU)

    first, optimizer = build("a", "b")
    for index, name in enumerate(("a", "b")):  # c is frozen, so it has no state
        for parameter in first[name].parameters():
            parameter.grad = torch.full_like(parameter, 1.0 + index)
    optimizer.step()
    module.save(tmp_path, 1, model_tensors(first), optimizer_tensors(optimizer), FACTS)
    second, other = build("c", "b", "a")
    restore(read(tmp_path / "last"), second, other)
    assert torch.equal(second["a"].weight, first["a"].weight)
    assert torch.equal(other.state[second["a"].weight]["exp_avg"], optimizer.state[first["a"].weight]["exp_avg"])
    assert torch.equal(other.state[second["b"].bias]["exp_avg_sq"], optimizer.state[first["b"].bias]["exp_avg_sq"])
    assert other.state[second["b"].bias]["step"].item() == 1
    assert second["c"].weight not in other.state


def test_wrapped_modules_share_checkpoints_with_bare_ones(tmp_path: Path) -> None:
    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self._orig_mod = inner

    bare, wrapped = nn.Linear(2, 2), Wrapped(nn.Linear(2, 2))
    module.save(tmp_path, 1, model_tensors(wrapped), {}, FACTS)
    restore(read(tmp_path / "last"), bare)
    assert torch.equal(bare.weight, wrapped._orig_mod.weight)
    restore(read(tmp_path / "last"), wrapped)


def snapshot(stub: Stub) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in stub.state_dict().items()}


def test_mismatch_names_each_tensor_and_changes_nothing(tmp_path: Path) -> None:
    tensors = model_tensors(Stub())
    tensors["student.other"] = tensors.pop("student.dino_head.bias")
    tensors["centre"] = torch.zeros(7)
    module.save(tmp_path, 1, tensors, {}, FACTS)
    stub = Stub()
    stub.centre.fill_(9.0)
    before = snapshot(stub)
    with pytest.raises(CheckpointError, match="does not fit") as caught:
        restore(read(tmp_path / "last"), stub)
    for text in (
        "missing: student.dino_head.bias",
        "unexpected: student.other",
        "shape of centre: saved (7,), needed (4,)",
    ):
        assert text in caught.value.where
    assert all(torch.equal(tensor, before[name]) for name, tensor in stub.state_dict().items())


def test_optimizer_mismatch_changes_nothing_either(tmp_path: Path) -> None:
    module.save(tmp_path, 1, model_tensors(Stub()), {"backbone.9.weight:exp_avg": torch.zeros(1)}, FACTS)
    stub = Stub()
    stub.centre.fill_(9.0)
    optimizer = build_adamw(parameter_groups(stub.trained_modules(), 1), CPU)
    with pytest.raises(CheckpointError, match="does not fit") as caught:
        restore(read(tmp_path / "last"), stub, optimizer)
    assert "unexpected: backbone.9.weight" in caught.value.where
    assert (stub.centre == 9.0).all()


def test_t15_reordered_sequences_are_refused(tmp_path: Path) -> None:
    module.save(tmp_path, 1, model_tensors(Stub()), {}, {**FACTS, "sequence_names": ["t2", "adc"]})
    restore(read(tmp_path / "last"), Stub(), sequence_names=["t2", "adc"])
    with pytest.raises(CheckpointError, match="another order") as caught:
        restore(read(tmp_path / "last"), Stub(), sequence_names=["adc", "t2"])
    assert "t2, adc; now: adc, t2" in caught.value.where


# --- R07 -------------------------------------------------------------------------------------------------------------

SAFE, GROWING = {"num_workers", "train.output_dir"}, {"optim.epochs"}

OLD = {
    "optim": {"base_lr": 1e-3, "epochs": 10},
    "student": {"arch": "vit_base"},
    "data": {"sequences": ["t2", "adc"], "split_csv": "a.csv"},
    "train": {"num_workers": 4, "output_dir": "x", "seed": 0},
}


def changed(**dotted: object) -> dict[str, dict[str, object]]:
    new = json.loads(json.dumps(OLD))
    for key, value in dotted.items():
        section, name = key.split("__")
        new[section][name] = value
    return new


def compare(old: dict[str, Any], new: dict[str, Any], **more: Any) -> list[str]:
    return compare_configs(old, new, safe=SAFE, growing=GROWING, **more)


def test_r07_drift_is_refused_listing_every_key_with_both_values() -> None:
    new = changed(
        optim__base_lr=2e-3, student__arch="vit_small", data__sequences=["adc", "t2"], data__split_csv="b.csv",
        train__num_workers=0, train__new=None,
    )  # fmt: skip
    new["train"]["added"] = 1
    with pytest.raises(ConfigError) as caught:
        compare(OLD, new)
    assert caught.value.exit_code == 2
    assert caught.value.where.splitlines() == [
        'data.sequences: ["t2", "adc"] -> ["adc", "t2"]',
        'data.split_csv: "a.csv" -> "b.csv"',
        "optim.base_lr: 0.001 -> 0.002",
        'student.arch: "vit_base" -> "vit_small"',
        "train.added: not set -> 1",
    ]
    assert "--allow-config-change optim.base_lr" in caught.value.fix


def test_r07_safe_growing_and_allowed_keys_go_on() -> None:
    assert compare(OLD, OLD) == []
    assert compare(OLD, changed(train__num_workers=0, train__output_dir="y")) == [
        "train.num_workers: 4 -> 0",
        'train.output_dir: "x" -> "y"',
    ]
    assert compare(OLD, changed(optim__epochs=20)) == ["optim.epochs: 10 -> 20"]
    with pytest.raises(ConfigError, match="differs") as caught:
        compare(OLD, changed(optim__epochs=5))
    assert caught.value.where == "optim.epochs: 10 -> 5"
    assert len(compare(OLD, changed(optim__base_lr=1.0, data__split_csv="b"), allowed=["optim.base_lr", "data"])) == 2
    with pytest.raises(ConfigError, match="differs"):
        compare(OLD, changed(optim__base_lr=1.0), allowed=["opt", "optim.base"])


# --- R02: SIGKILL at each write boundary -----------------------------------------------------------------------------

KILLED_SAVES = """
import os, shutil, signal, sys
from pathlib import Path
import safetensors.torch, torch
torch.set_num_threads(1)
from engine_stub import trainer

def wrap(owner, name, half=False):
    real = getattr(owner, name)
    def counted(*args, **kwargs):
        boundary()
        if half:  # the file lies there cut in the middle
            real(*args, **kwargs)
            path = Path(args[1])
            data = path.read_bytes()
            path.write_bytes(data[: len(data) // 2])
            boundary()
            path.write_bytes(data)
            return None
        return real(*args, **kwargs)
    setattr(owner, name, counted)

def boundary():
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

out = Path(sys.argv[1])
left = -1
for owner, names in ((os, ("mkdir", "replace", "fsync", "symlink", "rmdir", "unlink")), (Path, ("write_text",))):
    for name in names:
        wrap(owner, name)
wrap(safetensors.torch, "save_file", half=True)

cut = trainer(out / "base", steps=25, telemetry=None)
source = cut.batches(0)
for step in range(1, 21):
    cut.step(source)
    if step in (5, 10, 15):  # three whole checkpoints, so that saving the fourth also prunes
        cut._save()

n = 0
while True:
    n += 1
    shutil.copytree(out / "base", out / f"run{n}", symlinks=True)
    child = os.fork()
    if child == 0:
        cut.checkpoints.folder = out / f"run{n}" / "checkpoints"
        left = n
        cut._save()
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        print("killed", n, flush=True)
    else:
        assert os.WEXITSTATUS(status) == 0, status
        print("whole", n, flush=True)
        break
"""


@pytest.mark.slow
def test_r02_sigkill_at_every_write_boundary(tmp_path: Path, python: Callable[..., object]) -> None:
    answer = python(KILLED_SAVES, tmp_path)
    assert answer.returncode == 0, answer.stderr
    *killed, whole = answer.stdout.splitlines()
    count = len(killed)
    # make the folder, 2 files (before, amid, after), state, 4 + 1 flushes, rename, flush, link, rename, prune
    assert count >= 18, answer.stdout
    assert whole == f"whole {count + 1}"
    straight = trainer(None, steps=25)
    straight.fit()
    expected = straight.objective.state_dict()
    taken_up = []
    for n in range(1, count + 2):
        again = resumed(tmp_path / f"run{n}", steps=25, telemetry=None)
        taken_up.append(again.steps_done)
        again.fit()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in again.objective.state_dict().items()), n
        kept = ["last", "step_0000015", "step_0000020", "step_0000025"]
        assert steps_of(tmp_path / f"run{n}" / "checkpoints") == kept, n
    assert taken_up == sorted(taken_up)
    assert set(taken_up) == {15, 20}


# --- R03: a full disk ------------------------------------------------------------------------------------------------

FULL_DISK = """
import sys
from pathlib import Path
import torch
from medssl_cli.core.errors import ResourceError
from medssl_cli.engine import checkpoint

folder = Path(sys.argv[1])
facts = {"config": {}, "sequence_names": [], "precision": {}, "telemetry": {}, "extra": {}}
checkpoint.save(folder, 5, {"w": torch.ones(50_000)}, {"w:m": torch.ones(50_000)}, facts)
size = int(sys.argv[2])
try:
    checkpoint.save(folder, 10, {"w": torch.zeros(size)}, {"w:m": torch.zeros(size)}, facts)
except ResourceError as error:
    print(error.exit_code, error.code)
    print(error.where)
print(sorted(path.name for path in folder.iterdir()))
found = checkpoint.read_latest(folder)
print(found.step, bool((found.model()["w"] == 1).all()))
"""


@pytest.mark.parametrize("size", [400_000, 100_000], ids=["in the model", "in the optimizer"])
def test_r03_full_disk_names_path_and_bytes_and_keeps_the_last_checkpoint(
    tmp_path: Path, python: Callable[..., object], size: int
) -> None:
    mounted = ("unshare", "-m", "sh", "-c", f'mount -t tmpfs -o size=1M none {tmp_path} && exec "$@"', "sh")
    if shutil.which("unshare") is None or python("", prefix=mounted).returncode != 0:
        pytest.skip("mounting a small tmpfs is not permitted here")
    answer = python(FULL_DISK, tmp_path / "checkpoints", size, prefix=mounted)
    assert answer.returncode == 0, answer.stderr
    lines = answer.stdout.splitlines()
    assert lines[0] == "6 disk_full"
    assert str(tmp_path / "checkpoints" / "step_0000010") in lines[1]
    assert f"{8 * size:,} bytes needed" in lines[1]
    assert lines[2:] == ["['last', 'step_0000005']", "5 True"]


def test_r03_full_disk_without_a_mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same through a writer that fails as the real one does, where no disk can be mounted."""
    save(tmp_path, 5)

    def full(tensors: dict[str, Tensor], path: Path) -> None:
        path.write_bytes(b"half")
        raise module.safetensors.SafetensorError("Error while serializing: I/O error: No space (os error 28)")

    monkeypatch.setattr(module.safetensors.torch, "save_file", full)
    with pytest.raises(ResourceError) as caught:
        save(tmp_path, 10)
    assert caught.value.exit_code == 6
    assert "step_0000010: No space left on device, 52 bytes needed" in caught.value.where
    assert steps_of(tmp_path) == ["last", "step_0000005"]
