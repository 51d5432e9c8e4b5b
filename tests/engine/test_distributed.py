from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import distributed_runs as runs
import pytest
import torch

from medssl_cli.core.errors import ConfigError, MedsslError, NonFiniteError, ResourceError
from medssl_cli.engine.checkpoint import read_latest
from medssl_cli.engine.distributed import (
    NetworkShardingConfig,
    Place,
    Sharded,
    _skeleton,
    expand_nodes,
    find_place,
    from_first,
    gather,
    in_turns,
    joined,
    refuse_differences,
    refuse_uneven_sharding,
    together,
    world_size,
)
from medssl_cli.services.launch import launch

SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "node[01-02]",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_JOB_ID": "4711",
}


# --- joining ---------------------------------------------------------------------------------------------------------


def test_a_process_alone_has_no_place() -> None:
    assert find_place({}) is None
    assert find_place({"RANK": "0", "WORLD_SIZE": "1"}) is None
    assert find_place({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}) is None


def test_torchrun_gives_the_place() -> None:
    words = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert find_place({**words, "MASTER_ADDR": "host", "MASTER_PORT": "1234"}) == Place(
        3, 4, 1, 2, "host", 1234, "torchrun"
    )


def test_srun_gives_the_place_and_its_first_node_the_address() -> None:
    place = find_place(SLURM)
    assert place == Place(5, 8, 1, 4, "node01", 15000 + 4711, "slurm")
    assert find_place({**SLURM, "MASTER_ADDR": "head", "MASTER_PORT": "9"}) == Place(5, 8, 1, 4, "head", 9, "slurm")


def test_all_tasks_of_a_step_agree_on_the_port_and_the_next_step_has_another() -> None:
    ports = {find_place({**SLURM, "SLURM_PROCID": str(n)}).port for n in range(8)}  # type: ignore[union-attr]
    assert len(ports) == 1
    other = find_place({**SLURM, "SLURM_STEP_ID": "1"})
    assert other is not None
    assert other.port not in ports
    assert 15000 <= other.port < 35000


def test_torchrun_counts_before_slurm() -> None:
    words = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    place = find_place({**SLURM, **words})
    assert place is not None
    assert (place.source, place.world) == ("torchrun", 2)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("gpu7", ["gpu7"]),
        ("node[01-03,07]", ["node01", "node02", "node03", "node07"]),
        ("a1,b[9-10]", ["a1", "b9", "b10"]),
        ("r[1-2]n[3-4]", ["r1n3", "r1n4", "r2n3", "r2n4"]),
        ("node[098-101].cluster", ["node098.cluster", "node099.cluster", "node100.cluster", "node101.cluster"]),
        ("", []),
    ],
)
def test_lists_of_nodes_are_written_out(text: str, names: list[str]) -> None:
    assert expand_nodes(text) == names


@pytest.mark.parametrize(
    ("change", "where"),
    [({"RANK": "4"}, "rank 4 of 4"), ({"RANK": "x"}, "RANK='x'"), ({"LOCAL_RANK": "2"}, "local rank 2 of 2")],
)
def test_an_impossible_place_is_refused(change: dict[str, str], where: str) -> None:
    words = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", **change}
    with pytest.raises(ConfigError) as caught:
        find_place(words)
    assert where in caught.value.where


def test_peers_that_do_not_come_are_an_error_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from datetime import timedelta

    monkeypatch.setattr("medssl_cli.engine.distributed.JOIN_TIMEOUT", timedelta(seconds=0.5))
    place = Place(0, 2, 0, 2, "127.0.0.1", 0, "slurm")
    with pytest.raises(ResourceError, match="did not find each other") as caught, joined(place, runs.CPU):
        raise AssertionError("nobody else is here")
    assert "rank 0 of 2 (slurm)" in caught.value.where
    assert "--gpus N" in caught.value.fix


def test_alone_everything_is_as_if_there_were_no_group() -> None:
    with joined(None, runs.CPU):
        assert world_size() == 1
        assert gather(3) == [3]
        assert from_first(lambda: 4) == together(lambda: 4) == in_turns(lambda: 4) == 4
        refuse_differences({"a": 1}, "", "")


def test_t26_import_leaves_the_environment_alone() -> None:
    import subprocess

    script = (
        "import os; before = dict(os.environ)\n"
        "import medssl_cli.engine.distributed, medssl_cli.services.launch, medssl_cli.services.pretrain\n"
        "changed = {k for k in before.keys() | os.environ.keys() if before.get(k) != os.environ.get(k)}\n"
        "assert not {k for k in changed if 'CUDA' in k or 'RANK' in k}, changed\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_student_and_teacher_are_sharded_alike() -> None:
    whole = NetworkShardingConfig.model_validate({"backbone": {"sharding_strategy": "NO_SHARD"}})
    with pytest.raises(ConfigError) as caught:
        refuse_uneven_sharding(whole, NetworkShardingConfig(), ["backbone"])
    assert "compute_precision.student.backbone.sharding_strategy=NO_SHARD" in caught.value.where
    assert "compute_precision.teacher.backbone.sharding_strategy=SHARD_GRAD_OP" in caught.value.where
    refuse_uneven_sharding(whole, whole, ["backbone"])


def test_the_whole_teacher_of_a_sharded_run_lies_where_it_is_evaluated() -> None:
    """On the CPU the scores of a large network would take longer than the training between them."""
    module, sharded = torch.nn.Linear(3, 2), object.__new__(Sharded)
    sharded._skeletons, sharded._device = {id(module): _skeleton(module)}, torch.device("meta")
    whole = sharded.whole(module)
    assert whole is not None
    assert {tensor.device.type for tensor in whole.parameters()} == {"meta"}
    sharded._device = runs.CPU
    whole = sharded.whole(module)
    assert whole is not None
    assert torch.equal(whole.weight, module.weight)
    assert whole.weight is not module.weight


# --- R05: two processes equal one ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scenarios() -> tuple[dict[str, Any], dict[str, Any]]:
    """(two processes of four samples, one process of eight)."""
    return launch(runs.in_group, "train_all_scenarios", processes=2), runs.train_all_scenarios()


@pytest.mark.slow
@pytest.mark.parametrize("name", list(runs.SCENARIOS))
def test_r05_t29_two_processes_equal_one_with_the_joint_batch(
    scenarios: tuple[dict[str, Any], dict[str, Any]], name: str
) -> None:
    two, one = (dict(found[name]) for found in scenarios)
    kind = "Sharded" if name.startswith("fsdp") else "Replicated"
    assert (two.pop("parallel"), one.pop("parallel")) == (kind, "Alone")
    assert two.keys() == one.keys()
    assert sum(".grad." in key for key in two) > 100
    assert any("center" in key for key in two) == ("sinkhorn" not in name)
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-5, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")
    worst = max(float((two[key] - one[key]).abs().max()) for key in one if ".grad." in key)
    assert worst < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True])
def test_a_frozen_backbone_trains_in_all_processes_once_it_is_free(fsdp: bool) -> None:
    two = launch(runs.in_group, "train_through_a_freeze", fsdp, processes=2)
    one = runs.train_through_a_freeze(fsdp)
    weight = "student.backbone.blocks.0.attn.qkv.weight"
    assert torch.equal(two[f"0.{weight}"], two[f"1.{weight}"])
    assert not torch.equal(two[f"2.{weight}"], two[f"3.{weight}"])
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-5, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_sharded_half_precision_follows_replicated_half_precision(precision: str) -> None:
    ddp, fsdp = (
        launch(runs.in_group, "train_in_half_precision", parallel, precision, processes=2)
        for parallel in ("ddp", "fsdp")
    )
    assert fsdp["dtypes"] == ddp["dtypes"] == {"torch.float32"}
    assert fsdp["skipped"] == ddp["skipped"]
    assert fsdp["losses"][0] == pytest.approx(ddp["losses"][0], rel=0.005)
    assert fsdp["losses"][2] == pytest.approx(ddp["losses"][2], rel=0.2)  # Adam's first steps magnify rounding
    assert fsdp["losses"][2] < fsdp["losses"][0]


# --- R04: checkpoints move -------------------------------------------------------------------------------------------


def same(a: dict[str, Any], first: str, b: dict[str, Any], second: str) -> None:
    left = {key.removeprefix(first): value for key, value in a.items() if key.startswith(first)}
    right = {key.removeprefix(second): value for key, value in b.items() if key.startswith(second)}
    assert len(left) > 20
    assert left.keys() == right.keys()
    assert [key for key in left if not torch.equal(left[key], right[key])] == []


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_r04_checkpoints_go_from_two_to_one_to_two(tmp_path: Path, parallel: str) -> None:
    out, overrides = str(tmp_path), [f"compute_precision.parallel={parallel}"]
    first = launch(runs.in_group, "train_and_save", out, overrides, 3, processes=2)
    newest = read_latest(tmp_path)
    assert newest is not None
    assert newest.pieces == (parallel == "fsdp")
    assert not [path for path in newest.path.rglob("*") if path.suffix not in ("", ".safetensors", ".json")]
    second = runs.train_and_save(out, overrides, 5)
    same(first, "after.", second, "before.")
    third = launch(runs.in_group, "train_and_save", out, overrides, 6, processes=2)
    same(second, "after.", third, "before.")
    alone = runs.train_and_save(out, overrides, 6)
    same(third, "after.", alone, "before.")
    same(third, "teacher.", alone, "teacher.")


@pytest.mark.slow
def test_r04_sharded_checkpoint_becomes_replicated_and_back(tmp_path: Path) -> None:
    out, fsdp = str(tmp_path), ["compute_precision.parallel=fsdp"]
    first = launch(runs.in_group, "train_and_save", out, fsdp, 2, processes=2)
    second = launch(runs.in_group, "train_and_save", out, [], 4, processes=2)
    same(first, "after.", second, "before.")
    third = launch(runs.in_group, "train_and_save", out, fsdp, 5, processes=2)
    same(second, "after.", third, "before.")


# --- faults ----------------------------------------------------------------------------------------------------------


@contextmanager
def raised(kind: type[BaseException], name: str, *words: Any) -> Iterator[Any]:
    with pytest.raises(kind) as caught:
        launch(runs.in_group, name, *words, processes=2)
    yield caught.value


@pytest.mark.slow
def test_r06_a_bad_image_of_one_process_is_named_for_all() -> None:
    with raised(NonFiniteError, "spoil", "image") as error:
        assert error.exit_code == 5
        assert "An image of step 2" in error.what
        assert "whose own image is not finite: PT-4" in error.where


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "kind"), [("loader", ResourceError), ("bug", RuntimeError), ("exit", ResourceError)])
def test_an_error_of_one_process_ends_all_and_is_told_once(fault: str, kind: type[BaseException]) -> None:
    with raised(kind, "spoil", fault) as error:
        expected = {"loader": "Loader worker 0 died", "bug": "IndexError: a bug of one process", "exit": "SIGABRT"}
        assert expected[fault] in str(error)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "text"),
    [("settings", "optim.base_lr: 0.1 (rank 0); 0.2 (rank 1)"), ("prepare", "rank 1"), ("first", "rank 0")],
)
def test_processes_that_disagree_do_not_start(name: str, text: str) -> None:
    with raised(MedsslError, "differ", name) as error:
        assert text in error.where
        assert "same" not in error.where
