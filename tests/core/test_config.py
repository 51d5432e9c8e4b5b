from pathlib import Path

import pytest
from pydantic import PositiveInt

from medssl_cli.core.config import Config, changed_keys, dump_config, load_config
from medssl_cli.core.errors import ConfigError


class Optim(Config):
    base_lr: float = 1e-3
    """Base learning rate."""
    epochs: PositiveInt = 10


class Whole(Config):
    optim: Optim = Optim()
    name: str = "x"


def load(source: object = None, *overrides: str, **flags: object) -> Whole:
    return load_config(Whole, source, recipes="pretrain", flags=flags, overrides=overrides)  # type: ignore[arg-type]


def test_precedence_is_default_file_flag_override(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("optim: {base_lr: 2e-3, epochs: 20}\nname: file\n")
    config = load(path, "optim.base_lr=1e-4", **{"name": "flag", "optim.epochs": None})
    assert (config.optim.base_lr, config.optim.epochs, config.name) == (1e-4, 20, "flag")


def test_all_faults_at_once_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError) as caught:
        load(None, "optim.base_lrr=1", "optim.epochs=ten", "epoch=3", "nonsense")
    text = str(caught.value)
    assert caught.value.exit_code == 2
    assert "4 faults" in text
    assert "optim.base_lrr: unknown key; did you mean optim.base_lr?" in text
    assert "optim.epochs: input should be a valid integer" in text
    assert "epoch: unknown key; did you mean optim.epochs?" in text
    assert "'nonsense' is not of the form KEY=VALUE" in text


def test_python_tags_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(f"name: !!python/object/apply:os.system ['touch {tmp_path}/ran']\n")
    with pytest.raises(ConfigError, match="not plain YAML"):
        load(path)
    assert not (tmp_path / "ran").exists()


def test_json_is_accepted_and_the_dump_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"optim": {"epochs": 3}}')
    config = load(path)
    (tmp_path / "b.yaml").write_text(dump_config(config))
    assert load(tmp_path / "b.yaml") == config


def test_a_file_may_hold_a_remark_and_other_places_for_it_are_told(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"_comment": "mine", "name": "file"}')
    assert load(path).name == "file"
    path.write_text('{"备注": "mine", "Remark": "mine", "name": "file"}', encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert caught.value.where.splitlines() == [
        "备注: unknown key; a remark stands under _comment",
        "Remark: unknown key; a remark stands under _comment",
    ]
    with pytest.raises(ConfigError, match=r"optim\._comment: unknown key"):
        load(None, "optim._comment=x")


def test_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="no recipe 'prostate_vitb1'"):
        load("prostate_vitb1")


def test_changed_keys_are_dotted() -> None:
    a, b = load().model_dump(), load(None, "optim.epochs=3").model_dump()
    assert changed_keys(a, b) == ["optim.epochs"]
