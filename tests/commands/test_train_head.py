"""medssl train-head on raw phantoms and on their features, and a head that finds its backbone again."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medssl_cli.core.errors import CheckpointError, ConfigError
from medssl_cli.data.feature_store import read_features
from medssl_cli.data.manifest import read_cases
from medssl_cli.services.head import is_head_run, open_head
from medssl_cli.services.info import info
from medssl_cli.services.lookup import find_model


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, write_run: Callable[..., Path]) -> dict[str, Path]:
    """Twelve phantoms with labels, a tiny backbone, and a head that was trained on the raw data."""
    from medssl_cli.services.phantom import make_phantom
    from medssl_cli.services.train_head import TrainHeadRequest, train_head

    root = tmp_path_factory.mktemp("train-head")
    make_phantom("prostate", root / "data", cases=12, seed=1, size="small")
    (root / "runs").mkdir()
    write_run(root / "runs" / "ssl")
    request = TrainHeadRequest(
        data=root / "data",
        task="binary",
        out=root / "runs" / "head",
        overrides=("pool=meanmax", "c_values=3", "val_ratio=0.4", "extract.stride=2"),
        labels=root / "data" / "labels.csv",
        target=("label",),
        model=root / "runs" / "ssl",
        cache=root / "cache",
        device="cpu",
    )
    train_head(request)
    return {"root": root, "data": root / "data", "ssl": root / "runs" / "ssl", "head": root / "runs" / "head"}


def test_raw_data_leave_their_features_with_the_run(world: dict[str, Path]) -> None:
    features = read_features(world["head"] / "features")
    card = json.loads((world["head"] / "head.json").read_text())
    assert features.info["pool_mode"] == card["pool_mode"] == "meanmax"
    assert card["input_width"] == 2 * card["slice_dim"] == 64
    assert card["feature_digest"] == features.info["feature_digest"]
    assert card["preprocessing"] == features.info["extraction"]
    assert card["sequences"] == ["ax_t2wi", "ax_adc", "ax_dwi"]
    assert card["ranges"]["slices"]
    assert not any(
        str(Path.home()) in path.read_text() for path in world["head"].glob("*.json") if len(str(Path.home())) > 5
    )


def test_a_head_on_images_equals_the_head_on_features(world: dict[str, Path]) -> None:
    found = find_model(world["head"])
    assert found.head == world["head"]
    assert found.weights.samefile(world["ssl"] / "export" / "teacher_backbone.safetensors")
    head, embedder = open_head(found, torch.device("cpu"), overrides={"batch_size": 3})
    names, values = head.values_of_rows(read_features(world["head"] / "features").part("all"))
    cases = {case.case_id: case for case in read_cases(world["data"], ("ax_t2wi", "ax_adc", "ax_dwi"))}
    for name, value in list(zip(names, values, strict=True))[:3]:
        assert np.allclose(head.values(embedder.embed(cases[name]).slices_ND), value, atol=1e-4)


def test_another_backbone_is_refused(world: dict[str, Path], write_run: Callable[..., Path], tmp_path: Path) -> None:
    def change(model: Any) -> None:
        model.cls_token.add_(1.0)

    other = write_run(tmp_path / "other", edit=change)
    with pytest.raises(CheckpointError, match="not the one") as caught:
        open_head(find_model(world["head"], backbone=other), torch.device("cpu"))
    assert caught.value.exit_code == 7


def test_a_head_finds_its_backbone(world: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = tmp_path / "project" / "runs"
    shutil.copytree(world["root"] / "runs", moved)
    card = json.loads((moved / "head" / "head.json").read_text())
    card["model"]["path"] = str(tmp_path / "gone" / "teacher_backbone.safetensors")
    (moved / "head" / "head.json").write_text(json.dumps(card))
    assert find_model(moved / "head").weights.samefile(moved / "ssl" / "export" / "teacher_backbone.safetensors")
    assert find_model(moved / "head").run is not None
    assert ".." not in str(find_model(moved / "head").run)
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "head").symlink_to(moved / "head")  # its parent is another than its name tells
    assert find_model(tmp_path / "linked" / "head").weights.is_file()
    monkeypatch.chdir(moved.parent)
    monkeypatch.delenv("MEDSSL_MODEL", raising=False)
    os.utime(moved / "head" / "run.json", (2e9, 2e9))
    newest = find_model(None)
    assert newest.head == Path("runs/head")
    assert newest.why.startswith("newest")
    assert info(None).facts["head"]["task"] == "binary"
    shutil.move(moved / "ssl", tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="not where it was") as caught:
        find_model(moved / "head")
    assert "--backbone" in caught.value.fix
    given = find_model(moved / "head", backbone=tmp_path / "elsewhere")
    assert given.weights == tmp_path / "elsewhere" / "export" / "teacher_backbone.safetensors"
    shutil.copytree(tmp_path / "elsewhere" / "export", moved / "head" / "export")
    assert find_model(moved / "head").weights == moved / "head" / "export" / "teacher_backbone.safetensors"
    with pytest.raises(ConfigError, match="of its own"):
        find_model(moved / "head", backbone=tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="no head"):
        find_model(tmp_path / "elsewhere", backbone=tmp_path / "elsewhere")


def test_the_command_prints_what_to_do_next(world: dict[str, Path], medssl: Any, tmp_path: Path) -> None:
    answer = medssl(
        *("train-head", world["head"], "--task", "binary", "--out", tmp_path / "run", "--device", "cpu"),
        *("head=mlp", "epochs=2", "val_ratio=0.4"),
    )
    assert answer.exit_code == 0, answer.output
    assert "validation:" in answer.stdout
    assert "threshold:" in answer.stdout
    assert f"medssl infer CASE --model {tmp_path / 'run'}" in answer.stdout
    assert is_head_run(tmp_path / "run")
    assert (tmp_path / "run" / "progress.png").read_bytes().startswith(b"\x89PNG")


def test_json_is_one_strict_document(world: dict[str, Path], medssl: Any, tmp_path: Path) -> None:
    answer = medssl(
        *("train-head", world["head"] / "features", "--task", "binary", "--out", tmp_path / "run", "--json"),
        *("--device", "cpu", "c_values=1", "val_ratio=0.4"),
    )
    facts = json.loads(answer.stdout, parse_constant=pytest.fail)
    assert facts["command"] == "train-head"
    assert facts["head"]["task"] == "binary"
    assert facts["num_train"] > 0


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (("DATA",), 2, "--task"),
        (("DATA", "--task", "landmark"), 2, "Landmarks"),
        (("DATA", "--task", "binary", "--backbone-lr-scale", "0.1"), 2, "--finetune"),
        (("nowhere", "--task", "binary"), 3, "no features and no data"),
        (("DATA", "--task", "binary", "--target", "absent"), 3, "do not hold these labels"),
        (("DATA", "--task", "binary", "--model", "runs/x"), 2, "no effect on stored features"),
        (("DATA", "--task", "binary", "--cache", "x"), 2, "--cache"),
        (("DATA", "--task", "binary", "hed=mlp"), 2, "did you mean head"),
        (("DATA", "--task", "binary", "--device", "cuda:99"), 6, "cuda:99"),
    ],
)
def test_bad_words_end_in_three_lines(
    world: dict[str, Path], medssl: Any, tmp_path: Path, words: tuple[str, ...], code: int, text: str
) -> None:
    named = [world["head"] if word == "DATA" else word for word in words]
    answer = medssl("train-head", *named, "--out", tmp_path / "run")
    assert answer.exit_code == code
    assert text in answer.stderr
    assert "fix:" in answer.stderr
    assert not (tmp_path / "run" / "head.json").exists()


def test_a_cache_of_the_environment_is_no_option(world: dict[str, Path], medssl: Any, tmp_path: Path) -> None:
    """MEDSSL_CACHE stands in the profile of whoever works here; features are read all the same."""
    env = {"MEDSSL_CACHE": str(tmp_path / "cache")}
    words = ("--device", "cpu", "c_values=1", "val_ratio=0.4")
    answer = medssl("train-head", world["head"], "--task", "binary", "--out", tmp_path / "run", *words, env=env)
    assert answer.exit_code == 0, answer.stderr
    data = ("--data", world["head"], "--split", "train", "--draws", "10")
    answer = medssl("eval", "--model", tmp_path / "run", *data, "--out", tmp_path / "eval", env=env)
    assert answer.exit_code == 0, answer.stderr
    assert not (tmp_path / "cache").exists()


def test_raw_data_without_labels_cost_no_forward_pass(
    world: dict[str, Path], medssl: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medssl_cli.services.embedding import Embedder

    monkeypatch.setattr(Embedder, "embed_many", lambda *_, **__: pytest.fail("vectors were computed"))
    words = ("train-head", world["data"], "--task", "binary", "--model", world["ssl"], "--device", "cpu")
    answer = medssl(*words, "--out", tmp_path / "run", "--cache", tmp_path / "cache")
    assert answer.exit_code == 3
    assert "to --target" in answer.stderr
    assert "labels.csv: case_id" in answer.stderr


def test_recipes_are_listed_and_load(medssl: Any) -> None:
    from medssl_cli.core.config import list_recipes, load_config
    from medssl_cli.services.head_config import HeadConfig, check_head_config

    assert "ich" in medssl("train-head", "--list-configs").stdout
    for name, line in list_recipes("train_head"):
        assert line
        if name == "ich":
            config = load_config(HeadConfig, name, recipes="train_head")
            check_head_config(config, "multilabel")
            assert config.kind("multilabel") == "mlp"


def test_a_bad_case_is_listed_with_skip(world: dict[str, Path], medssl: Any, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(world["data"], data)
    bad = sorted(path for path in data.iterdir() if path.is_dir())[0]
    victim = next(iter(sorted(bad.glob("ax_t2wi*"))))
    victim.write_bytes(victim.read_bytes()[:200])
    words = ("train-head", data, "--task", "binary", "--model", world["ssl"], "--labels", data / "labels.csv")
    more = ("--target", "label", "--device", "cpu", "c_values=1", "val_ratio=0.4")
    env = {"MEDSSL_CACHE": str(world["root"] / "cache")}
    assert medssl(*words, *more, "--out", tmp_path / "a", env=env).exit_code == 3
    answer = medssl(*words, *more, "--out", tmp_path / "b", "--on-error", "skip", env=env)
    assert answer.exit_code == 4, answer.output
    with (tmp_path / "b" / "failures.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["case_id"] for row in rows] == [bad.name]
    assert rows[0]["fix"]
    assert is_head_run(tmp_path / "b")


@pytest.mark.parametrize(
    ("words", "model"),
    [
        (("train-head", "DATA", "--finetune", "--task", "binary", "--labels", "LABELS", "--target", "label"), "ssl"),
        (("train-head", "DATA", "--task", "binary", "--labels", "LABELS", "--target", "label"), "ssl"),
        (("eval", "--data", "HEAD", "--split", "all"), "head"),
        (("extract", "DATA"), "ssl"),
    ],
)
def test_overwrite_never_empties_the_model_that_was_looked_up(
    world: dict[str, Path], medssl: Any, words: tuple[str, ...], model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDSSL_MODEL", str(world[model]))
    before = sorted(path for path in world[model].rglob("*") if path.name != ".lock")
    places = {"DATA": world["data"], "HEAD": world["head"], "LABELS": world["data"] / "labels.csv"}
    answer = medssl(*(places.get(word, word) for word in words), "--out", world[model], "--overwrite")
    assert answer.exit_code == 2, answer.stderr
    assert "more than old results" in answer.stderr or "holds" in answer.stderr
    assert sorted(path for path in world[model].rglob("*") if path.name != ".lock") == before
