"""Configuration: one YAML is one whole run; every fault is reported at once with the nearest valid name.

Precedence: default < file < flag < trailing ``KEY=VALUE``. Names are dotted as in DINOv2 (``optim.base_lr=1e-4``).
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from medssl_cli.core.errors import ConfigError

REMARK = "_comment"
"""Key at the top of a file that holds a remark and nothing else, for JSON has no comments."""
_REMARKS = ("comment", "comments", "remark", "remarks", "note", "notes")


class Config(BaseModel):
    """Base of every configuration class: frozen, unknown keys forbidden, field texts kept as descriptions."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


ConfigT = TypeVar("ConfigT", bound=Config)


def load_config(
    kind: type[ConfigT],
    source: str | Path | None,
    *,
    recipes: str,
    flags: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
    aliases: Mapping[str, str] | None = None,
) -> ConfigT:
    """Read a configuration, or say everything that is wrong with it; a file may hold a remark under ``REMARK``.

    Args:
        kind: The class to fill.
        source: Path of a YAML or JSON file, the bare name of a shipped recipe, or None for the defaults.
        recipes: Folder of shipped recipes below ``configs/``, e.g. ``pretrain``.
        flags: Dotted names set by command-line options; None values are left out.
        overrides: ``KEY=VALUE`` texts, values read as YAML.
        aliases: Other names of keys at the top, in the file and among the overrides -> the key.

    Raises:
        ConfigError: Unreadable file, unknown keys, wrong types: all of them in one message.
    """
    faults: list[str] = []
    values = {} if source is None else _renamed(read_config_file(source, recipes), aliases or {}, faults)
    values.pop(REMARK, None)
    for key, value in (flags or {}).items():
        if value is not None:
            _set_dotted(values, key, value, faults)
    for text in overrides:
        key, equals, value_text = text.partition("=")
        if not equals or not key:
            faults.append(f"{text!r} is not of the form KEY=VALUE")
            continue
        try:
            value = yaml.safe_load(value_text) if value_text else ""
        except yaml.YAMLError:
            value = value_text
        _set_dotted(values, (aliases or {}).get(key.strip(), key.strip()), value, faults)
    config: ConfigT | None = None
    try:
        config = kind.model_validate(values)
    except ValidationError as error:
        faults += [_say(kind, e) for e in error.errors(include_url=False)]
    if faults or config is None:
        count = "One fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise ConfigError(
            f"{count} in the configuration.",
            where="\n".join(faults),
            fix=f"correct {'it' if len(faults) == 1 else 'them'} in {source or 'the command line'}; "
            "nothing was written",
            code="config_invalid",
        )
    return config


def read_config_file(source: str | Path, recipes: str) -> dict[str, Any]:
    """Plain data of a YAML or JSON file, or of a shipped recipe named without path or suffix."""
    path = Path(source)
    if path.suffix.lower() not in (".yaml", ".yml", ".json"):
        return _read_recipe(str(source), recipes)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            "The configuration file cannot be read.",
            where=f"{path}: {error.strerror}",
            fix=f"give an existing file or a recipe of: {', '.join(name for name, _ in list_recipes(recipes))}",
            code="config_missing",
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(
            "The configuration file is not plain YAML.",
            where=f"{path}: {' '.join(str(error).split())[:300]}",
            fix="keep it to keys and plain values; tags such as !!python are refused",
            code="config_unreadable",
        ) from error
    return _as_mapping(data, str(path))


def list_recipes(recipes: str) -> list[tuple[str, str]]:
    """(name, first comment line) of the shipped recipes of one command, sorted by name."""
    return [(name, _headline(text)) for name, text in sorted(_recipe_texts(recipes))]


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML that ``load_config`` reads back to the same value."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Dotted names of the leaves that differ between two dumped configurations, sorted."""
    a, b = dict(leaves(old)), dict(leaves(new))
    return sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key))


def _read_recipe(name: str, recipes: str) -> dict[str, Any]:
    texts = dict(_recipe_texts(recipes))
    if name not in texts:
        near = difflib.get_close_matches(name, texts, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(
            f"There is no recipe {name!r}.",
            where=f"shipped for {recipes}: {', '.join(sorted(texts)) or 'none'}",
            fix=f"{hint}--list-configs shows them; a file of your own needs the suffix .yaml",
            code="recipe_unknown",
        )
    return _as_mapping(yaml.safe_load(texts[name]), name)


def _recipe_texts(recipes: str) -> Iterator[tuple[str, str]]:
    folder = resources.files("medssl_cli.configs") / recipes
    if folder.is_dir():
        for entry in folder.iterdir():
            if entry.name.endswith(".yaml"):
                yield entry.name.removesuffix(".yaml"), entry.read_text(encoding="utf-8")


def _headline(text: str) -> str:
    first = text.splitlines()[0] if text else ""
    return first.lstrip("# ").strip() if first.startswith("#") else ""


def _as_mapping(data: object, source: str) -> dict[str, Any]:
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(
            "A configuration is a mapping of keys to values.",
            where=f"{source} holds a {type(data).__name__}",
            fix="write it as `section: {key: value}`",
            code="config_unreadable",
        )
    return json.loads(json.dumps(data, default=str))  # plain data with text keys, and a copy of our own


def _renamed(values: dict[str, Any], aliases: Mapping[str, str], faults: list[str]) -> dict[str, Any]:
    """The values of a file under the names of the keys; a key that is given under two names is a fault."""
    faults += [f"{name}: another name of {key}, which is given too" for name, key in aliases.items()
               if name in values and key in values]  # fmt: skip
    return {aliases.get(name, name): value for name, value in values.items()}


def _set_dotted(values: dict[str, Any], dotted: str, value: object, faults: list[str]) -> None:
    *parents, leaf = dotted.split(".")
    node = values
    for name in parents:
        child = node.setdefault(name, {})
        if not isinstance(child, dict):
            faults.append(f"{dotted}: {name} is a value, not a section")
            return
        node = child
    node[leaf] = value


def _say(kind: type[BaseModel], error: Any) -> str:
    """One line for one pydantic error."""
    names = [str(part) for part in error["loc"]]
    dotted = ".".join(names)
    if error["type"] == "extra_forbidden":
        return f"{dotted}: unknown key{_hint(kind, dotted)}"
    if error["type"] == "missing":
        return f"{dotted}: missing"
    message = error["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    given = error.get("input")
    shown = f" (got {given!r})" if isinstance(given, (str, int, float, bool, list)) and len(repr(given)) < 80 else ""
    return f"{dotted}: {message}{shown}" if dotted else message  # a fault between sections names its keys itself


def _hint(kind: type[BaseModel], dotted: str) -> str:
    near = nearest_key(kind, dotted)
    if near:
        return f"; did you mean {near}?"
    # no key of ours has letters beyond ASCII: whoever writes one means a remark in his own language
    is_remark = not dotted.isascii() or dotted.strip("_#").lower() in _REMARKS
    return f"; a remark stands under {REMARK}" if is_remark else ""


def nearest_key(kind: type[BaseModel], dotted: str) -> str | None:
    """The valid dotted name that looks most like ``dotted``: the whole name first, then its last part."""
    valid = list(_valid_keys(kind))
    close = difflib.get_close_matches(dotted, valid, n=1, cutoff=0.75)
    if close:
        return close[0]
    by_leaf = {key.rpartition(".")[2]: key for key in reversed(valid)}
    close = difflib.get_close_matches(dotted.rpartition(".")[2], by_leaf, n=1, cutoff=0.7)
    return by_leaf[close[0]] if close else None


def _valid_keys(kind: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, info in kind.model_fields.items():
        yield prefix + (info.alias or name)
        for part in (info.annotation, *get_args(info.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from _valid_keys(part, f"{prefix}{info.alias or name}.")


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of everything in a dumped configuration that is no section."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + str(key), value
