"""medssl download on the command line; the service is tried against a server in tests/services/test_download.py."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No connection at all, in an empty working directory."""

    def refuse(*_: Any) -> None:
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEDSSL_HOME", str(tmp_path / "home"))


def test_list_names_what_there_is(medssl: Callable[..., Any]) -> None:
    answer = medssl("download", "--list", "--json")
    assert answer.exit_code == 0
    models = json.loads(answer.stdout)["models"]
    assert [model["name"] for model in models] == ["meddinov3", "dinov3"]
    assert models[0]["path"] is None
    assert "not here" in medssl("download", "--list").stdout


def test_without_a_network_it_ends_with_6_and_three_lines(medssl: Callable[..., Any]) -> None:
    env = {"DOWNLOAD_RETRIES": "0"}
    for words in (["meddinov3"], ["meddinov3", "--check-size"]):
        answer = medssl("download", *words, env=env)
        assert answer.exit_code == 6
        assert [line.split(":")[0].strip() for line in answer.stderr.splitlines() if ": " in line][:2] == [
            "error",
            "where",
        ]


def test_wrong_words_end_with_2(medssl: Callable[..., Any], tmp_path: Path) -> None:
    assert medssl("download").exit_code == 2
    assert medssl("download", "resnet").exit_code == 2
    assert medssl("download", "meddinov3", "--sha256", "xyz").exit_code == 2
    assert medssl("download", "meddinov3", "--url", "file:///etc/passwd").exit_code == 2
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize(
    "words",
    [
        ("--list", "meddinov3"),
        ("--list", "--force"),
        ("--list", "--timeout", "5"),
        ("meddinov3", "--check-size", "--force"),
        ("meddinov3", "--check-size", "--sha256", "0" * 64),
    ],
)
def test_options_without_effect_are_refused(medssl: Callable[..., Any], words: tuple[str, ...]) -> None:
    answer = medssl("download", *words)
    assert answer.exit_code == 2
    assert "no effect" in answer.stderr


def test_a_file_is_no_folder_for_weights(medssl: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "file.pth").write_bytes(b"mine")
    answer = medssl("download", "meddinov3", "--out", tmp_path / "file.pth")
    assert answer.exit_code == 2
    assert "is a file" in answer.stderr
    answer = medssl("download", "meddinov3", "--out", tmp_path / "file.pth" / "x", env={"DOWNLOAD_RETRIES": "0"})
    assert answer.exit_code == 6
    assert (tmp_path / "file.pth").read_bytes() == b"mine"


def test_dotenv_of_the_working_directory_counts(medssl: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("DINOV3_URL=https://example.org/dinov3_vitb16.pth\n", encoding="utf-8")
    models = json.loads(medssl("download", "--list", "--json").stdout)["models"]
    assert models[1]["urls"] == ["https://example.org/dinov3_vitb16.pth"]
    (tmp_path / ".env").write_text("rm -rf everything\n", encoding="utf-8")
    answer = medssl("download", "--list")
    assert answer.exit_code == 2
    assert "line 1" in answer.stderr
