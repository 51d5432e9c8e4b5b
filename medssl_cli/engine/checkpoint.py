"""Checkpoints: complete or absent, plain tensors and JSON, never pickled.

``checkpoints/step_0001000/`` holds ``model.safetensors`` (student, teacher, centres), ``optimizer.safetensors`` and
``state.json``. It is written under another name, flushed and renamed, so the folder's name is the promise that it is
whole; ``state.json`` lists the files with size and SHA-256. The newest whole checkpoint is the one that counts;
``checkpoints/last`` is a link to it for people and other programs. Random states are not kept because every draw is
a function of seed and step.

Tensors that are cut into pieces over the processes are written by all of them, with PyTorch's distributed checkpoint in
its safetensors form: ``model/`` and ``optimizer/`` then hold one file of each process, and nothing is pickled there
either. Both layouts load into whole and into sharded tensors, on any number of processes.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from medssl_cli.core.config import changed_keys
from medssl_cli.core.digest import file_digest
from medssl_cli.core.errors import CheckpointError, ConfigError, ResourceError
from medssl_cli.core.run import package_version, plain, publish_folder, say_disk_errors, to_json
from medssl_cli.engine.distributed import (
    from_first,
    gather,
    is_sharded,
    local_piece,
    patient_group,
    rank,
    together,
    world_size,
)
from medssl_cli.engine.optim import plain_name

log = logging.getLogger(__name__)

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
PIECES = {"model": MODEL, "optimizer": OPTIMIZER}
"""Folder of the pieces, and the file of whole tensors that it stands for."""
FORMAT, FORMAT_PIECES = 1, 2
KEEP = 3


class Stateful(Protocol):
    """What can be put into a checkpoint; every ``nn.Module`` can."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors by name."""

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> Any:
        """Copy the tensors back."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk; tensors are read when asked for.

    Args:
        path: Its folder.
        step: Optimizer updates done.
        config: Resolved configuration of the run.
        sequence_names: Sequences in channel order.
        precision: State of the loss scale.
        telemetry: State of the log's running medians.
        extra: What the caller wanted kept, e.g. digests of data and split, best score.
        versions: Of medssl and torch.
        shapes: ``model`` and ``optimizer`` -> name -> (dtype, shape) of each whole tensor.
        pieces: Written by several processes, each its own part of the tensors.
    """

    path: Path
    step: int
    config: dict[str, Any]
    sequence_names: list[str]
    precision: dict[str, Any]
    telemetry: dict[str, Any]
    extra: dict[str, Any]
    versions: dict[str, str]
    shapes: dict[str, dict[str, tuple[str, list[int]]]] = field(default_factory=dict)
    pieces: bool = False

    def model(self) -> dict[str, Tensor]:
        """Tensors of the objective by name, whole, on the CPU."""
        return self._whole("model")

    def optimizer(self) -> dict[str, Tensor]:
        """Optimizer state as ``<parameter>:<quantity>``, whole, on the CPU."""
        return self._whole("optimizer")

    def _whole(self, part: str) -> dict[str, Tensor]:
        if not self.pieces:
            return _read_tensors(self.path / PIECES[part])
        tensors = {
            name: torch.empty(shape, dtype=getattr(torch, dtype)) for name, (dtype, shape) in self.shapes[part].items()
        }
        _load_pieces(self.path / part, tensors, alone=True)
        return tensors

    def load_into(self, part: str, tensors: dict[str, Tensor]) -> None:
        """Fill whole or sharded tensors in place, each process its own pieces; all processes come here."""
        _load_pieces(self.path / part if self.pieces else self.path, tensors, alone=world_size() == 1)


@dataclass
class Checkpoints:
    """The checkpoint folder of the run that owns it, with what every checkpoint of the run says about itself.

    Args:
        folder: ``RUN/checkpoints``.
        config: Resolved configuration as plain data.
        sequence_names: Sequences in channel order.
        extra: Plain data kept with each checkpoint; may be changed while training.
        keep: How many of the newest stay.
    """

    folder: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    sequence_names: Sequence[str] = ()
    extra: dict[str, Any] = field(default_factory=dict)
    keep: int = KEEP

    def save(
        self,
        step: int,
        objective: Stateful,
        optimizer: torch.optim.Optimizer,
        precision: Mapping[str, Any],
        telemetry: Mapping[str, Any],
    ) -> Path:
        """Write one checkpoint and drop the oldest; see ``save``.

        Whole tensors are written by the process that calls this. For sharded ones all processes come here.
        """
        facts = {
            "config": self.config,
            "sequence_names": list(self.sequence_names),
            "precision": precision,
            "telemetry": telemetry,
            "extra": self.extra,
        }
        model, moments = model_tensors(objective), optimizer_tensors(optimizer)
        if any(is_sharded(tensor) for tensor in model.values()):
            return _save_pieces(self.folder, step, {"model": model, "optimizer": moments}, facts, self.keep)
        return save(self.folder, step, model, moments, facts, keep=self.keep)

    def latest(self) -> Checkpoint | None:
        """The newest whole checkpoint; leftovers of a killed save are removed first."""
        _clean(self.folder)
        return read_latest(self.folder)

    def latest_path(self) -> Path | None:
        """Folder of the newest checkpoint for messages, without reading it."""
        return next(_newest_first(self.folder), None)


# --- writing ---------------------------------------------------------------------------------------------------------


def save(
    folder: Path,
    step: int,
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    *,
    keep: int = KEEP,
) -> Path:
    """Write ``folder/step_…`` whole or not at all, point ``last`` to it and keep the newest ``keep``.

    A step that is there whole stays as it is: the state of a run is a function of its step, and there is no moment
    at which a folder could be exchanged for another without being absent in between.

    Args:
        folder: Checkpoint folder of one run, owned by this process.
        step: Optimizer updates done.
        model: Tensors of the objective.
        optimizer: Tensors of the optimizer.
        facts: ``config``, ``sequence_names``, ``precision``, ``telemetry``, ``extra``: plain data.
        keep: At least 1.

    Raises:
        ResourceError: Disk full or not writable; earlier checkpoints are as they were.
    """
    final, temporary = _names(folder, step)
    needed = sum(tensor.nbytes for tensors in (model, optimizer) for tensor in tensors.values())
    with say_disk_errors(final, needed):
        folder.mkdir(parents=True, exist_ok=True)
        _clean(folder)
        if not _is_whole(final):
            _publish(temporary, final, step, model, optimizer, facts)
    return _make_last(folder, final, keep)


def _names(folder: Path, step: int) -> tuple[Path, Path]:
    final = folder / f"step_{step:07d}"
    return final, folder / f".tmp-{final.name}"


def _make_last(folder: Path, final: Path, keep: int) -> Path:
    _point_last(folder, final)
    for old in list(_newest_first(folder))[max(1, keep) :]:
        _remove(old)
    return final


def _is_whole(path: Path) -> bool:
    try:
        read(path)
    except CheckpointError as error:
        if path.exists():
            log.warning("%s is written anew: %s", path, error.where)
        return False
    return True


def _publish(
    temporary: Path,
    final: Path,
    step: int,
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    facts: Mapping[str, Any],
) -> None:
    """Write all files under the other name, then give the folder its own; what bore it before was not whole."""
    try:
        temporary.mkdir()
        _write_tensors(temporary / MODEL, model)
        _write_tensors(temporary / OPTIMIZER, optimizer)
        _write_state(temporary, step, model, optimizer, facts)
        for name in (MODEL, OPTIMIZER):  # safetensors makes files for the owner alone, against the umask
            shutil.copymode(temporary / STATE, temporary / name)
        _remove(final)
        publish_folder(temporary, final)
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)


def model_tensors(objective: Stateful) -> dict[str, Tensor]:
    """Tensors of the objective under their plain names."""
    return {plain_name(name): tensor for name, tensor in objective.state_dict().items()}


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Optimizer state as ``<parameter>:<quantity>``; a parameter that was never updated has none.

    Raises:
        ValueError: The optimizer was built without parameter names, or keeps something else than tensors.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in _named_parameters(optimizer):
        for quantity, value in optimizer.state.get(parameter, {}).items():
            if value is None:
                continue
            if not isinstance(value, Tensor):
                raise ValueError(f"optimizer state {name}:{quantity} is a {type(value).__name__}, not a tensor")
            tensors[f"{name}:{quantity}"] = value
    return tensors


def _named_parameters(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    for group in optimizer.param_groups:
        if "param_names" not in group:
            raise ValueError("an optimizer is saved by parameter names: give it (name, parameter) pairs")
        yield from zip(group["param_names"], group["params"], strict=True)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    with _as_os_error():
        safetensors.torch.save_file(_apart(tensors), path)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by name, each with memory of its own: the format knows no shared storage."""
    seen: set[int] = set()
    apart: dict[str, Tensor] = {}
    for name, tensor in sorted(tensors.items()):
        whole = tensor.detach().contiguous()
        storage = local_piece(whole).untyped_storage().data_ptr()
        apart[name] = whole.clone() if storage in seen else whole
        seen.add(storage)
    return apart


@contextmanager
def _as_os_error() -> Iterator[None]:
    """safetensors reports a full disk as its own error with the number in the text."""
    try:
        yield
    except safetensors.SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number.group(1)), os.strerror(int(number.group(1)))) from error


def _write_state(
    folder: Path, step: int, model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> None:
    files = {
        name: {**_describe(folder / name), "tensors": _shapes(tensors)}
        for name, tensors in ((MODEL, model), (OPTIMIZER, optimizer))
    }
    state = {"format": FORMAT, "step": step, **_versions(), **plain(facts), "files": files}
    (folder / STATE).write_text(to_json(state) + "\n", encoding="utf-8")


def _describe(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": file_digest(path)}


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {key: [str(t.dtype).removeprefix("torch."), list(t.shape)] for key, t in sorted(tensors.items())}


def _versions() -> dict[str, Any]:
    return {"versions": {"medssl": package_version(), "torch": torch.__version__}}


def _point_last(folder: Path, target: Path) -> None:
    """Replace the link ``last`` in one step; a checkpoint is whole without it, so a failure is only reported."""
    last, link = folder / "last", folder / ".tmp-last"
    try:
        if last.is_dir() and not last.is_symlink():
            _remove(last)  # a copy made by a tool that follows links
        link.unlink(missing_ok=True)
        link.symlink_to(target.name)
        os.replace(link, last)
    except OSError as error:
        log.warning("The link %s could not be set to %s: %s", last, target.name, error.strerror)


def _remove(path: Path) -> None:
    """Delete a folder so that a half-deleted one never bears its name; a failure is only reported."""
    if not path.exists():
        return
    aside = path.with_name(f".tmp-old-{path.name}")
    try:
        os.replace(path, aside)
        shutil.rmtree(aside)
    except OSError as error:
        log.warning("The old checkpoint %s could not be deleted: %s", path, error.strerror)


def _clean(folder: Path) -> None:
    """Remove what a killed save left behind."""
    for leftover in folder.glob(".tmp-*"):
        log.info("Removing %s, left by a save that did not finish.", leftover)
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


# --- pieces ----------------------------------------------------------------------------------------------------------


def _save_pieces(
    folder: Path, step: int, tensors: Mapping[str, dict[str, Tensor]], facts: Mapping[str, Any], keep: int
) -> Path:
    """``save`` for sharded tensors: each process writes its pieces, the first one publishes the folder."""
    final, temporary = _names(folder, step)
    needed = sum(tensor.nbytes for part in tensors.values() for tensor in part.values())
    if from_first(lambda: _begin_pieces(final, temporary, tensors, needed)):
        for part in PIECES:
            _write_pieces(temporary / part, tensors[part], final, needed)
        files: dict[str, Any] = {}
        for found in gather(together(lambda: _own_files(temporary, final))):
            files |= found
        from_first(lambda: _publish_pieces(temporary, final, step, tensors, facts, files))
    return from_first(lambda: _make_last(folder, final, keep))


def _begin_pieces(final: Path, temporary: Path, tensors: Mapping[str, Mapping[str, Tensor]], needed: int) -> list[str]:
    """Make the folders of the pieces; an empty list if this step is there whole."""
    with say_disk_errors(final, needed):
        final.parent.mkdir(parents=True, exist_ok=True)
        _clean(final.parent)
        if _is_whole(final):
            return []
        for part in tensors:
            (temporary / part).mkdir(parents=True)
    return list(tensors)


def _write_pieces(folder: Path, tensors: Mapping[str, Tensor], final: Path, needed: int) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with say_disk_errors(final, needed), _as_os_error():
        try:
            dcp.save(_apart(tensors), storage_writer=writer, process_group=patient_group())
        except CheckpointException as error:  # the same in all processes
            for fault, _ in error.failures.values():
                if isinstance(fault, (OSError, safetensors.SafetensorError)):
                    raise fault from error
            raise


def _own_files(temporary: Path, final: Path) -> dict[str, Any]:
    """Size and digest of the files that this process wrote, flushed to the disk."""
    with say_disk_errors(final):
        own = sorted(temporary.glob(f"*/shard-{rank() + 1:05d}-*.safetensors"))
        for path in own:
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        return {path.relative_to(temporary).as_posix(): _describe(path) for path in own}


def _publish_pieces(
    temporary: Path,
    final: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    facts: Mapping[str, Any],
    files: Mapping[str, Any],
) -> None:
    missing = [name for name, facts_ in files.items() if _size(temporary / name) != facts_["bytes"]]
    if missing:
        raise ResourceError(
            "The processes of this run do not write to one folder.",
            where=f"{final}: {missing[0]} was written by another process and is not here",
            fix="put --out on a disk that all machines share",
            code="out_not_shared",
        )
    state = {"format": FORMAT_PIECES, "step": step, **_versions(), **plain(facts), "files": files}
    state["tensors"] = {part: _shapes(found) for part, found in tensors.items()}
    with say_disk_errors(final):
        (temporary / STATE).write_text(to_json(state) + "\n", encoding="utf-8")
        _remove(final)
        publish_folder(temporary, final)


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _load_pieces(folder: Path, tensors: dict[str, Tensor], *, alone: bool) -> None:
    """Fill tensors in place from the files of a folder, whatever pieces these hold."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    reader = dcp.HuggingFaceStorageReader(str(folder))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            group = None if alone else patient_group()
            dcp.load(cast(dict[str, Any], tensors), storage_reader=reader, no_dist=alone, process_group=group)
    except (OSError, safetensors.SafetensorError, CheckpointException) as error:
        raise _damaged(folder, str(error).splitlines()[0]) from error


# --- reading ---------------------------------------------------------------------------------------------------------


def read_latest(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint of a run, or None.

    Folders without ``state.json`` were never finished and are passed over with a log line.

    Raises:
        CheckpointError: The newest one is damaged; the message names the one before it.
    """
    last = folder / "last"
    for path in _newest_first(folder):
        if last.is_symlink() and not last.exists():
            log.warning("%s leads nowhere; using %s, the newest whole checkpoint.", last, path.name)
        try:
            return read(path)
        except CheckpointError as error:
            if not path.exists():  # the running training has just dropped it
                continue
            raise _with_way_out(error, path) from error
    return None


def read(path: Path) -> Checkpoint:
    """Open one checkpoint and check each file against its size and SHA-256.

    Raises:
        CheckpointError: A file is missing, cut short, altered or of another kind.
    """
    state = _read_state(path / STATE)
    for name, expected in state["files"].items():
        _check_file(path / name, expected)
    return Checkpoint(
        path=path,
        step=state["step"],
        config=state["config"],
        sequence_names=state["sequence_names"],
        precision=state["precision"],
        telemetry=state["telemetry"],
        extra=state["extra"],
        versions=state["versions"],
        shapes=state["tensors"],
        pieces=state["format"] == FORMAT_PIECES,
    )


def _newest_first(folder: Path) -> Iterator[Path]:
    named = [path for path in folder.glob("step_*") if re.fullmatch(r"step_\d{7,}", path.name) and path.is_dir()]
    for path in sorted(named, key=lambda path: int(path.name.removeprefix("step_")), reverse=True):
        if (path / STATE).is_file():
            yield path
        else:
            log.warning("%s was never finished (it has no %s) and is ignored.", path, STATE)


def _read_state(path: Path) -> dict[str, Any]:
    keys = {"format", "step", "config", "sequence_names", "precision", "telemetry", "extra", "versions", "files"}
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not JSON"
        raise _damaged(path, str(reason)) from error
    if not isinstance(state, dict) or not keys <= state.keys():
        raise _damaged(path, "it does not describe a checkpoint")
    if state["format"] == FORMAT and set(state["files"]) == {MODEL, OPTIMIZER}:
        state["tensors"] = {part: state["files"][name].get("tensors", {}) for part, name in PIECES.items()}
        return state
    if state["format"] not in (FORMAT, FORMAT_PIECES):
        raise _damaged(path, f"format {state['format']}, this version reads {FORMAT} and {FORMAT_PIECES}")
    if state["format"] == FORMAT or "tensors" not in state or not _are_pieces(state["files"]):
        raise _damaged(path, "it does not describe a checkpoint")
    return state


def _are_pieces(names: Collection[str]) -> bool:
    """Whether a list of files, which may come from anywhere, names pieces inside its folder alone."""
    return all(re.fullmatch(rf"({'|'.join(PIECES)})/shard-[\w-]+\.safetensors", name) for name in names)


def _check_file(path: Path, expected: Mapping[str, Any]) -> None:
    if not path.is_file():
        raise _damaged(path, "it is missing")
    size = path.stat().st_size
    if size != expected["bytes"]:
        raise _damaged(path, f"{size:,} bytes, {expected['bytes']:,} were written")
    if file_digest(path) != expected["sha256"]:
        raise _damaged(path, "its content was altered: the SHA-256 differs")


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise _damaged(path, str(error)) from error


def _damaged(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        "A checkpoint is damaged.",
        where=f"{path}: {reason}",
        fix="copy it again, or resume from another checkpoint",
        code="checkpoint_damaged",
    )


def _with_way_out(error: CheckpointError, path: Path) -> CheckpointError:
    fix = f"start again with --no-resume: there is no other checkpoint in {path.parent}"
    for earlier in _newest_first(path.parent):
        with suppress(CheckpointError):
            if int(earlier.name[5:]) < int(path.name[5:]) and read(earlier):
                fix = f"delete {path} to go on from {earlier}, the last good checkpoint"
                break
    return CheckpointError(error.what, where=error.where, fix=fix, code=error.code)


# --- restoring -------------------------------------------------------------------------------------------------------


def restore(
    checkpoint: Checkpoint,
    objective: Stateful,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    sequence_names: Sequence[str] | None = None,
) -> int:
    """Copy a checkpoint into objective and optimizer, everything or nothing.

    Args:
        checkpoint: As read.
        objective: Built from the same configuration.
        optimizer: Built with parameter names; left alone if None.
        sequence_names: Sequences in the channel order of this run; compared if given.

    Returns:
        Updates done.

    Raises:
        CheckpointError: Tensors missing, unexpected or of another shape; sequences that differ.
    """
    if sequence_names is not None and list(sequence_names) != checkpoint.sequence_names:
        raise CheckpointError(
            "The checkpoint was trained on other sequences, or on the same in another order.",
            where=f"{checkpoint.path}: {', '.join(checkpoint.sequence_names)}; now: {', '.join(sequence_names)}",
            fix="give the sequences in the checkpoint's order",
            code="checkpoint_sequences",
        )
    own = objective.state_dict()
    if any(is_sharded(tensor) for tensor in own.values()):
        return _restore_pieces(checkpoint, own, optimizer)
    saved = checkpoint.model()
    _check_tensors(checkpoint.path / MODEL, saved, {plain_name(name): tensor for name, tensor in own.items()})
    state = None if optimizer is None else _optimizer_state(checkpoint, optimizer)
    objective.load_state_dict({name: saved[plain_name(name)] for name in own})
    if optimizer is not None and state is not None:
        optimizer.load_state_dict(state)
    return checkpoint.step


def _restore_pieces(checkpoint: Checkpoint, own: Mapping[str, Tensor], optimizer: torch.optim.Optimizer | None) -> int:
    """``restore`` into sharded tensors: everything is compared by name and shape first, then read piece by piece."""
    model = {plain_name(name): tensor for name, tensor in own.items()}
    _check_tensors(checkpoint.path / MODEL, _empty(checkpoint, "model"), model)
    state = None if optimizer is None else _optimizer_state(checkpoint, optimizer, _pieces_of_state)
    checkpoint.load_into("model", model)
    if optimizer is not None and state is not None:
        optimizer.load_state_dict(state)
    return checkpoint.step


def _empty(checkpoint: Checkpoint, part: str) -> dict[str, Tensor]:
    """Tensors of the right shape that hold nothing."""
    shapes = checkpoint.shapes[part].items()
    return {name: torch.empty(shape, dtype=getattr(torch, dtype), device="meta") for name, (dtype, shape) in shapes}


def _pieces_of_state(checkpoint: Checkpoint, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Optimizer state by name, sharded like the parameters that it belongs to."""
    parameters = dict(_named_parameters(optimizer))
    tensors: dict[str, Tensor] = {}
    for key, empty in _empty(checkpoint, "optimizer").items():
        parameter = parameters.get(key.rpartition(":")[0])
        fits = parameter is not None and parameter.shape == empty.shape
        tensors[key] = torch.zeros_like(cast(Tensor, parameter)) if fits else torch.zeros_like(empty, device="cpu")
    checkpoint.load_into("optimizer", tensors)
    return tensors


def _check_tensors(path: Path, saved: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    faults = [f"missing: {name}" for name in sorted(own.keys() - saved.keys())]
    faults += [f"unexpected: {name}" for name in sorted(saved.keys() - own.keys())]
    faults += [
        f"shape of {name}: saved {tuple(saved[name].shape)}, needed {tuple(own[name].shape)}"
        for name in sorted(own.keys() & saved.keys())
        if saved[name].shape != own[name].shape
    ]
    if faults:
        raise _mismatch(path, faults, matched=len(own.keys() & saved.keys()))


def _mismatch(path: Path, faults: list[str], matched: int) -> CheckpointError:
    shown = faults[:10] + ([f"and {len(faults) - 10} more"] if len(faults) > 10 else [])
    return CheckpointError(
        "The checkpoint does not fit the model.",
        where="\n".join([f"{path}: {matched} tensors have a counterpart, {len(faults)} faults", *shown]),
        fix="resume with the configuration that the checkpoint was trained with",
        code="checkpoint_mismatch",
    )


def _optimizer_state(
    checkpoint: Checkpoint,
    optimizer: torch.optim.Optimizer,
    read_state: Callable[[Checkpoint, torch.optim.Optimizer], dict[str, Tensor]] = lambda saved, _: saved.optimizer(),
) -> dict[str, Any]:
    """The saved tensors in the form of ``Optimizer.load_state_dict``, which puts them onto the right device."""
    by_name: dict[str, dict[str, Tensor]] = {}
    for key, tensor in read_state(checkpoint, optimizer).items():
        name, _, quantity = key.rpartition(":")
        by_name.setdefault(name, {})[quantity] = tensor.clone()  # no longer backed by the file, which will be pruned
    parameters = dict(_named_parameters(optimizer))
    faults = [f"unexpected: {name}" for name in sorted(by_name.keys() - parameters.keys())]
    faults += [
        f"shape of {name}:{quantity}: saved {tuple(tensor.shape)}, needed {tuple(parameters[name].shape)}"
        for name in sorted(by_name.keys() & parameters.keys())
        for quantity, tensor in by_name[name].items()
        if tensor.ndim and tensor.shape != parameters[name].shape
    ]
    if faults:
        raise _mismatch(checkpoint.path / OPTIMIZER, faults, matched=len(by_name.keys() & parameters.keys()))
    state = {index: by_name[name] for index, name in enumerate(parameters) if name in by_name}
    return {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}


# --- configuration ---------------------------------------------------------------------------------------------------


def compare_configs(
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    *,
    safe: Collection[str],
    growing: Collection[str],
    allowed: Collection[str] = (),
) -> list[str]:
    """Compare the configuration of a checkpoint with the one of now.

    Args:
        old: As stored in the checkpoint.
        new: Of this run, dumped as plain data.
        safe: Keys that change no result: whole dotted names or last parts.
        growing: Dotted names of numbers that may rise.
        allowed: Dotted names, or whole sections, that the user lets change.

    Returns:
        ``key: old -> new`` of each permitted change, for the log.

    Raises:
        ConfigError: Any other key changed; all are listed with both values.
    """
    old, new = plain(old), plain(new)
    permitted: list[str] = []
    refused: list[str] = []
    for key in changed_keys(old, new):
        before, after = _value(old, key), _value(new, key)
        rises = key in growing and _is_number(before) and _is_number(after) and after > before
        fine = key in safe or key.rpartition(".")[2] in safe or rises
        fine = fine or any(key == name or key.startswith(f"{name}.") for name in allowed)
        (permitted if fine else refused).append(f"{key}: {_show(before)} -> {_show(after)}")
    if refused:
        words = " ".join(f"--allow-config-change {line.partition(':')[0]}" for line in refused)
        raise ConfigError(
            "The configuration differs from that of the run to be resumed.",
            where="\n".join(refused),
            fix=f"restore these values, choose another --out, start anew with --no-resume, or pass {words}",
            code="config_changed",
        )
    return permitted


_ABSENT = object()


def _value(config: Any, dotted: str) -> Any:
    for name in dotted.split("."):
        if not isinstance(config, Mapping) or name not in config:
            return _ABSENT
        config = config[name]
    return config


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _show(value: Any) -> str:
    return "not set" if value is _ABSENT else json.dumps(value, ensure_ascii=False)
