"""A run folder: what is held back until it begins, and what it tells when it ends badly."""

from __future__ import annotations

import json
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from medssl_cli.core.errors import ConfigError, Interrupted, NonFiniteError, ResourceError
from medssl_cli.core.volume import Volume
from medssl_cli.data.images import read_image, read_volume, write_image, write_volume
from medssl_cli.models import attention
from medssl_cli.models.zoo import read_weights
from medssl_cli.services import run_folder
from medssl_cli.services.run_folder import HeldLog, RunFolder, stoppable, without_home

log = logging.getLogger("test")


def test_lines_are_held_back_and_then_written_as_they_come(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    path = tmp_path / "log.txt"
    with HeldLog() as lines:
        log.info("early")
        assert not path.exists()
        lines.write_to(path)
        assert path.read_text().endswith("INFO early\n")
        log.info("late")
        assert path.read_text().endswith("INFO late\n")
        lines.note("for the file alone")
    log.info("after")
    texts = [line.split(" ", 3)[3] for line in path.read_text().splitlines()]
    assert texts == ["early", "late", "for the file alone"]
    assert "for the file alone" not in caplog.text


def test_an_error_stands_in_the_log_of_a_run_that_began(tmp_path: Path) -> None:
    def fail(folder: RunFolder, begin: bool) -> None:
        if begin:
            folder.begin()
        raise ResourceError("No room.", where="here")

    for name, begin in (("begun", True), ("never", False)):
        with HeldLog() as lines, pytest.raises(ResourceError), RunFolder(tmp_path / name, "pretrain", lines) as folder:
            fail(folder, begin)
    assert "ERROR error: No room.\n  where: here" in (tmp_path / "begun/log.txt").read_text()
    assert not (tmp_path / "never/log.txt").exists()


def test_nothing_goes_before_the_run_begins(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "notes.md").write_text("mine")
    with HeldLog() as lines, RunFolder(tmp_path, "pretrain", lines, overwrite=True) as folder:
        assert (tmp_path / "notes.md").exists()
        with (
            pytest.raises(ConfigError, match="Another process"),
            RunFolder(tmp_path, "pretrain", lines, overwrite=True),
        ):
            pass
        folder.begin()
        assert {p.name for p in tmp_path.iterdir()} == {".lock", ".medssl.json", "log.txt"}
        with pytest.raises(ConfigError, match="Another process"), RunFolder(tmp_path, "pretrain", lines):
            pass
    (tmp_path / "checkpoints").mkdir()
    with HeldLog() as lines, RunFolder(tmp_path, "pretrain", lines) as folder:
        folder.begin(clear=("checkpoints", "log.txt", "absent"))
        assert not (tmp_path / "checkpoints").exists()
        assert (tmp_path / "log.txt").read_text() == ""


def test_a_folder_with_an_input_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "data/P1").mkdir(parents=True)
    lines = HeldLog()
    with (
        pytest.raises(ConfigError) as caught,
        RunFolder(tmp_path, "pretrain", lines, overwrite=True, inputs=[tmp_path / "data"]),
    ):
        pass
    assert caught.value.code == "out_holds_source"
    assert [p.name for p in tmp_path.iterdir()] == ["data"]
    with lines, RunFolder(tmp_path, "pretrain", lines, overwrite=True) as folder:
        folder.inputs = (tmp_path / "data",)  # as if it had come while the run was prepared
        with pytest.raises(ConfigError, match="more than old results"):
            folder.begin()
    assert (tmp_path / "data/P1").is_dir()


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (NonFiniteError("A loss became NaN."), "failed", "A loss became NaN."),
        (Interrupted("SIGTERM came."), "interrupted", "SIGTERM came."),
        (KeyboardInterrupt(), "interrupted", "KeyboardInterrupt"),
        (ZeroDivisionError(), "failed", "ZeroDivisionError"),
    ],
)
def test_the_end_is_told(tmp_path: Path, error: BaseException, status: str, reason: str) -> None:
    with HeldLog() as lines, RunFolder(tmp_path, "pretrain", lines) as folder:
        folder.facts = {"recipe": "tiny"}
        with pytest.raises(type(error)), folder.telling_the_end(lambda: {"step": 3}):
            raise error
    record = json.loads((tmp_path / "run.json").read_text())
    assert record == {"recipe": "tiny", "status": status, "reason": reason, "step": 3}


def test_a_full_disk_at_the_end_does_not_hide_the_first_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(path: Path, data: object) -> None:
        raise ResourceError("The result cannot be written.", where=str(path))

    monkeypatch.setattr(run_folder, "write_json", full)
    folder = RunFolder(tmp_path, "pretrain", HeldLog())
    with pytest.raises(ResourceError) as caught, folder, folder.telling_the_end(dict):
        raise ResourceError("The checkpoint cannot be written.", where="300 bytes needed")
    assert caught.value.where == "300 bytes needed"
    assert "run.json" in caplog.text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_while_preparing_is_an_interruption(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match=f"{number.name} came while preparing"), stoppable("preparing"):
        os.kill(os.getpid(), number)
    assert signal.getsignal(number) == before


READERS: dict[str, tuple[object, str, Callable[[Path], object]]] = {
    "volume": (nib.Nifti1Image, "from_bytes", lambda folder: read_volume(folder / "a.nii.gz")),
    "picture": (Image, "open", lambda folder: read_image(folder / "a.png")),
    "weights": (torch, "load", lambda folder: read_weights(folder / "a.pth")),
    "attention": (attention, "_trial_error", lambda folder: attention.probe_backends(torch.device("cpu"))),
}
"""Where a signal comes, and who takes every Exception there for damage."""


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_inside_a_reader_is_no_damaged_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: signal.Signals
) -> None:
    owner, function, read = READERS[name]
    write_volume(tmp_path / "a.nii.gz", Volume(np.zeros((2, 3, 4), np.int16), np.eye(4)))
    write_image(tmp_path / "a.png", np.zeros((4, 4), np.uint8))
    torch.save({"w": torch.zeros(2)}, tmp_path / "a.pth")
    read(tmp_path)  # is well

    def told(*_: object, **__: object) -> None:
        os.kill(os.getpid(), number)
        raise AssertionError("the signal did not come")

    monkeypatch.setattr(owner, function, told)
    text = f"{number.name} came while preparing; finished parts are whole."
    with pytest.raises(Interrupted, match=text) as caught, stoppable("preparing"):
        read(tmp_path)
    assert caught.value.exit_code == 75
    assert caught.value.fix == "run the same command again"


def test_ctrl_c_stays_what_it_is() -> None:
    with pytest.raises(KeyboardInterrupt), stoppable("preparing"):
        raise KeyboardInterrupt


def test_the_innermost_block_names_what_was_stopped() -> None:
    with pytest.raises(Interrupted, match="while exporting"), stoppable("preparing"), stoppable("exporting"):
        os.kill(os.getpid(), signal.SIGTERM)


def test_the_folder_tells_of_a_signal_that_is_not_yet_an_error(tmp_path: Path) -> None:
    def prepare(lines: HeldLog) -> None:
        with stoppable("preparing"), RunFolder(tmp_path, "pretrain", lines) as folder, folder.telling_the_end(dict):
            folder.begin()
            os.kill(os.getpid(), signal.SIGTERM)

    with HeldLog() as lines, pytest.raises(Interrupted, match="while preparing"):
        prepare(lines)
    text = "SIGTERM came while preparing; finished parts are whole."
    assert json.loads((tmp_path / "run.json").read_text()) == {"status": "interrupted", "reason": text}
    assert text in (tmp_path / "log.txt").read_text()


def test_home_is_hidden_in_every_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/jane")
    data = {"a": ["/home/jane/x", 3, None], "b": {"c": Path("/home/jane")}, "d": (1.5, True)}
    assert without_home(data) == {"a": ["~/x", 3, None], "b": {"c": "~"}, "d": [1.5, True]}
