"""Every command has help and stands in the README; README commands parse; every recipe loads."""

from __future__ import annotations

import inspect
import re
import shlex
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from medssl_cli.app import COMMANDS, app
from medssl_cli.core.config import list_recipes, load_config

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def tree() -> typer.core.TyperGroup:
    group = typer.main.get_command(app)
    assert isinstance(group, typer.core.TyperGroup)
    return group


def find(words: list[str]) -> tuple[object, list[str]]:
    """The command that ``words`` name, and what is left of them."""
    node: object = tree()
    while words and isinstance(node, typer.core.TyperGroup) and words[0] in node.commands:
        node, words = node.commands[words[0]], words[1:]
    return node, words


def readme_commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.S)
    spans = re.findall(r"`(medssl [^`]+)`", README)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in [*lines, *(span.replace("\n", " ") for span in spans)] if line.startswith("medssl ")]


@pytest.mark.parametrize("line", readme_commands())
def test_commands_in_the_readme_parse(line: str) -> None:
    command, rest = find(shlex.split(line)[1:])
    assert not isinstance(command, typer.core.TyperGroup) or not rest, f"{line}: no such command"
    known = {name for param in command.params for name in (*param.opts, *param.secondary_opts)}  # type: ignore[attr-defined]
    for word in rest:
        if word.startswith("--"):
            assert word in known, f"{line}: no option {word}"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_stands_in_the_readme(name: str) -> None:
    assert f"medssl {name}" in README
    answer = CliRunner().invoke(app, [name, "--help"])
    assert answer.exit_code == 0
    node, _ = find([name])
    leaves = list(node.commands.values()) if isinstance(node, typer.core.TyperGroup) else [node]
    for leaf in leaves:
        assert inspect.cleandoc(leaf.help or ""), leaf.name
        for param in leaf.params:
            assert getattr(param, "help", None) or param.name == "help", f"{leaf.name}: {param.name} has no help"


@pytest.mark.parametrize("name", [name for name, _ in list_recipes("pretrain")])
def test_every_recipe_loads_and_has_a_headline(name: str) -> None:
    from medssl_cli.services.pretrain_config import PretrainConfig

    load_config(PretrainConfig, name, recipes="pretrain")
    assert dict(list_recipes("pretrain"))[name]


@pytest.mark.parametrize("name", [name for name, _ in list_recipes("extract")])
def test_every_recipe_of_extract_loads_and_has_a_headline(name: str) -> None:
    from medssl_cli.services.embedding_config import ExtractConfig

    load_config(ExtractConfig, name, recipes="extract")
    assert dict(list_recipes("extract"))[name]


@pytest.mark.parametrize("name", [name for name, _ in list_recipes("train_head")])
def test_every_recipe_of_train_head_loads_and_has_a_headline(name: str) -> None:
    from medssl_cli.services.head_config import HeadConfig

    load_config(HeadConfig, name, recipes="train_head")
    assert dict(list_recipes("train_head"))[name]


@pytest.mark.parametrize("name", [name for name, _ in list_recipes("segment")])
def test_every_recipe_of_segment_loads_and_has_a_headline(name: str) -> None:
    from medssl_cli.services.segment_ct_pet_config import CtPetConfig
    from medssl_cli.services.segment_semantic_config import SemanticConfig

    load_config(CtPetConfig if name.startswith("cocoseg") else SemanticConfig, name, recipes="segment")
    assert dict(list_recipes("segment"))[name]


def test_the_project_speaks_of_itself_alone() -> None:
    words = re.compile(r"/work/|/opt/(wheels|pypi)|\.library|helper session", re.I)
    for path in ROOT.rglob("*"):
        inside = path.relative_to(ROOT).parts
        if path.suffix in {".py", ".md", ".yaml", ".toml"} and not inside[0].startswith((".", "build", "demo")):
            if path.name == "test_docs.py":
                continue
            found = words.search(path.read_text(encoding="utf-8"))
            assert not found, f"{path}: {found and found.group()}"
