"""Three converters behind one function: the files of one checked volume in, a volume out.

dcm2niix sees a folder of links to exactly these files and nothing else, so that its series detection cannot mix or
split; its return code and its file names (``_ph``, ``_e2``, ``_Eq_1``, ``_Tilt_1``, letters) are not believed: exactly
one NIfTI file has to be there, and ``dicom_gates.check_converted`` compares it with the headers. Compressed pixels that
an engine cannot read are unpacked by pydicom and given to it again.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import pydicom

from medssl_cli.core.errors import DataError, ResourceError
from medssl_cli.core.volume import Volume
from medssl_cli.data.dicom import quiet_pydicom
from medssl_cli.data.images import read_volume

logger = logging.getLogger(__name__)

TIMEOUT_S = 600.0
"""Longest time for one volume; a converter that hangs on a damaged file must not hang the cohort."""


@dataclass(frozen=True)
class EngineResult:
    """What an engine made of one volume's files.

    Args:
        volume: (Z, Y, X), or (T, Z, Y, X) where the files hold several volumes.
        b_values: (T,) from the engine's ``.bval``, or None.
        b_vectors: (3, T) from its ``.bvec``, or None.
    """

    volume: Volume
    b_values: np.ndarray | None = None
    b_vectors: np.ndarray | None = None


def convert_files(engine: str, files: Sequence[Path], work: Path, *, is_compressed: bool = False) -> EngineResult:
    """Convert the files of one volume.

    Args:
        engine: A name of ``ENGINES``.
        files: All files of the volume in slice order, or the one multi-frame file of several volumes.
        work: Empty folder for temporary files, on a disk with room for the volume.
        is_compressed: Whether to unpack the pixels and try again when the engine fails.

    Raises:
        DataError: The engine failed, timed out, or did not make exactly one volume.
        ResourceError: The engine is not installed.
    """
    run = ENGINES[engine]
    try:
        return run(files, _fresh(work / "first"))
    except DataError as error:
        if not is_compressed:
            raise
        logger.debug("%s; unpacking the pixels first", error.what)
    return run(_decompressed(files, _fresh(work / "unpacked")), _fresh(work / "second"))


def extract_frames(path: Path, frames: Sequence[int], target: Path) -> None:
    """Write some frames of a multi-frame file as a file of their own, so that an engine sees one volume alone.

    Raises:
        DataError: The pixels cannot be unpacked.
    """
    try:
        with quiet_pydicom():
            image = pydicom.dcmread(path)
            if image.file_meta.TransferSyntaxUID.is_compressed:
                image.decompress(generate_instance_uid=False)
            size = int(image.Rows) * int(image.Columns) * int(image.BitsAllocated) // 8
            pixels = image.PixelData
            image.PixelData = b"".join(pixels[i * size : (i + 1) * size] for i in frames)
            image.PerFrameFunctionalGroupsSequence = [image.PerFrameFunctionalGroupsSequence[i] for i in frames]
            image.NumberOfFrames = len(frames)
            image.save_as(target)
    except Exception as error:  # each decoder raises its own kinds
        raise _failed("pydicom", f"{path.name}: {type(error).__name__}: {error}") from error


def engine_version(engine: str) -> str:
    """Version of the package that brings the engine.

    Raises:
        ResourceError: It is not installed.
    """
    package = {"simpleitk": "SimpleITK"}.get(engine, engine)
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError as error:
        raise _missing(engine, package) from error


def _run_dcm2niix(files: Sequence[Path], work: Path) -> EngineResult:
    try:
        import dcm2niix
    except ImportError as error:
        raise _missing("dcm2niix", "dcm2niix") from error
    out = _fresh(work / "out")
    inputs = _linked(files, _fresh(work / "in"))
    said = ""
    # auto-merging first; if it splits what the gates know to be one volume, merge whatever differs between slices
    for merge in ("2", "y"):
        _fresh(out)
        # -g i: a defaults file in the user's home must not change what we get
        words = [
            dcm2niix.bin,
            "-g",
            "i",
            "-b",
            "n",
            "-z",
            "n",
            "-m",
            merge,
            "-f",
            "volume",
            "-o",
            str(out),
            str(inputs),
        ]
        said = _run_program(words)
        found = sorted(out.glob("*.nii"))
        if len(found) == 1:
            return _read_result(found[0])
    names = ", ".join(path.name for path in sorted(out.iterdir())) or "nothing"
    raise _failed("dcm2niix", f"it wrote {names} where one volume was due; it said: {said[-300:]}")


def _run_program(words: list[str]) -> str:
    """What the program printed; the return code is left aside, since it is 0 after many failures."""
    try:
        # its own session: a Ctrl-C in the terminal stops us, and we stop it
        done = subprocess.run(
            words, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S, start_new_session=True
        )
    except subprocess.TimeoutExpired as error:
        raise _failed(Path(words[0]).name, f"no result after {TIMEOUT_S:g} s") from error
    except OSError as error:
        raise ResourceError(
            "The converter cannot be started.",
            where=f"{words[0]}: {error.strerror}",
            fix="pip install --force-reinstall dcm2niix, or choose another --engine",
            code="engine_missing",
        ) from error
    return " ".join((done.stdout + " " + done.stderr).split())


def _read_result(path: Path) -> EngineResult:
    stem = path.name.removesuffix(".nii")
    b_values = _read_numbers(path.with_name(f"{stem}.bval"))
    b_vectors = _read_numbers(path.with_name(f"{stem}.bvec"))
    return EngineResult(read_volume(path), None if b_values is None else b_values.ravel(), b_vectors)


def _read_numbers(path: Path) -> np.ndarray | None:
    return np.loadtxt(path, ndmin=2) if path.is_file() and path.stat().st_size else None


def _run_dicom2nifti(files: Sequence[Path], work: Path) -> EngineResult:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of its own imports
            import dicom2nifti
            import dicom2nifti.settings
            from dicom2nifti.exceptions import ConversionError, ConversionValidationError
    except ImportError as error:
        raise _missing("dicom2nifti", "dicom2nifti") from error
    dicom2nifti.settings.disable_validate_slicecount()  # it wants four slices; our gates have counted them
    inputs = _linked(files, _fresh(work / "in"))
    target = work / "volume.nii.gz"
    try:
        with quiet_pydicom():
            dicom2nifti.dicom_series_to_nifti(inputs, target, reorient_nifti=False)
    except (ConversionError, ConversionValidationError) as error:
        raise _failed("dicom2nifti", str(error) or type(error).__name__) from error
    except Exception as error:  # it lets pydicom's, gdcm's and its own attribute errors through
        raise _failed("dicom2nifti", f"{type(error).__name__}: {error}") from error
    if not target.is_file():
        raise _failed("dicom2nifti", "it wrote nothing")
    return EngineResult(read_volume(target))


def _run_simpleitk(files: Sequence[Path], work: Path) -> EngineResult:
    try:
        import SimpleITK as sitk
    except ImportError as error:
        raise _missing("simpleitk", "SimpleITK") from error
    sitk.ProcessObject.SetGlobalWarningDisplay(False)  # it warns of uneven slices, which the gates refuse by themselves
    try:
        if len(files) == 1:
            image = sitk.ReadImage(str(files[0]), imageIO="GDCMImageIO")
        else:
            reader = sitk.ImageSeriesReader()
            reader.SetImageIO("GDCMImageIO")
            reader.SetFileNames([str(path) for path in files])
            image = reader.Execute()
    except RuntimeError as error:
        raise _failed("simpleitk", str(error).splitlines()[-1]) from error
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        raise _failed("simpleitk", f"it read {image.GetDimension()} dimensions")
    return EngineResult(Volume(sitk.GetArrayFromImage(image), _itk_affine(image)))


def _itk_affine(image: object) -> np.ndarray:
    """Voxel (x, y, z) -> mm, RAS+, of an ITK image, which counts to the left and the back."""
    direction = np.array(image.GetDirection()).reshape(3, 3)  # type: ignore[attr-defined]
    affine = np.eye(4)
    affine[:3, :3] = direction * np.array(image.GetSpacing())  # type: ignore[attr-defined]
    affine[:3, 3] = image.GetOrigin()  # type: ignore[attr-defined]
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def _decompressed(files: Sequence[Path], folder: Path) -> list[Path]:
    unpacked = []
    for i, path in enumerate(files):
        target = folder / f"{i:06d}.dcm"
        try:
            with quiet_pydicom():
                image = pydicom.dcmread(path)
                if image.file_meta.TransferSyntaxUID.is_compressed:
                    image.decompress(generate_instance_uid=False)
                image.save_as(target)
        except Exception as error:  # each decoder raises its own kinds
            raise _failed("pydicom", f"{path.name}: {type(error).__name__}: {error}") from error
        unpacked.append(target)
    return unpacked


def _linked(files: Sequence[Path], folder: Path) -> Path:
    """A folder with exactly these files, numbered in order."""
    for i, path in enumerate(files):
        target = folder / f"{i:06d}.dcm"
        try:
            target.symlink_to(path.resolve())
        except OSError:  # a file system without links
            shutil.copyfile(path, target)
    return folder


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    return folder


def _failed(engine: str, detail: str) -> DataError:
    return DataError(
        f"{engine} made no volume of the series.",
        where=" ".join(detail.split())[:500],
        fix="try another --engine, or leave the series out with the mapping",
        code="dicom_engine_failed",
    )


def _missing(engine: str, package: str) -> ResourceError:
    return ResourceError(
        f"The engine {engine} is not installed.",
        where=f"no package {package}",
        fix=f"pip install {package}, or choose another --engine",
        code="engine_missing",
    )


ENGINES: dict[str, Callable[[Sequence[Path], Path], EngineResult]] = {
    "dcm2niix": _run_dcm2niix,
    "dicom2nifti": _run_dicom2nifti,
    "simpleitk": _run_simpleitk,
}
