"""A case to one vector a slice: the same numbers whether computed alone, in a cohort, or taken from the cache.

What decides the numbers is written down as plain JSON, ``Embedder.settings``. It travels with features and heads, is
the larger part of the cache key, and rebuilds the same embedder later.

Letters: N slices of a case that are looked at (1 for a picture), B slices computed together, S sequences or colour
channels, H W pixels of a slice, h w patches, D width of a slice vector, E width of the network.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional

from medssl_cli.core.case import Case
from medssl_cli.core.case import Sequence as CaseSequence
from medssl_cli.core.config import changed_keys
from medssl_cli.core.digest import file_digest
from medssl_cli.core.errors import CheckpointError, ConfigError, DataError, MedsslError, NonFiniteError
from medssl_cli.core.protocols import Features
from medssl_cli.core.run import digest_of, hide_home, plain, seed_for
from medssl_cli.core.volume import affine_spacing
from medssl_cli.data.feature_cache import FeatureCache
from medssl_cli.data.feature_store import ImageFacts
from medssl_cli.data.images import is_image, read_header
from medssl_cli.data.preprocess import Prepared, Restore, naming_case, prepare_case
from medssl_cli.data.resample import Grid
from medssl_cli.data.views import normalize
from medssl_cli.models.convnext import ConvNeXt
from medssl_cli.models.vit import VisionTransformer
from medssl_cli.services.backbone import PLAIN, Backbone, Planes, planes_of, read_planes
from medssl_cli.services.case_vectors import CaseVectors, of_arrays, pooled, to_arrays
from medssl_cli.services.devices import saying_memory
from medssl_cli.services.embedding_config import ExtractConfig, backbone_facts, check_fits, decisions
from medssl_cli.services.joined_slices import Job, Joined
from medssl_cli.services.read_ahead import read_ahead

__all__ = ["CaseVectors", "Embedder", "ExtractConfig", "backbone_facts", "embedder_of", "pooled"]

log = logging.getLogger(__name__)

CASES_AHEAD = 2
"""Decoded cases that wait for the network; with the one being read and the one being computed, four in memory."""
BATCHES_HELD = 16
"""Vectors of at most so many batches wait for those of a case before them; with patch tokens of one batch."""
COMPANIONS = 15
"""Patch tokens that go with each cls token through the end of the last block. Matrix products of a few rows are summed
in another order than those of many: with 16 rows an image, each vector has the same bits in a batch of any size."""
_PERCENTILES = (1.0, 50.0, 99.0)


class Embedder:
    """Cases to slice vectors.

    Args:
        backbone: In evaluation mode.
        config: What is computed, and how many slices at a time.
        cache: Where vectors are kept; None computes them every time.

    Raises:
        ConfigError: The settings do not fit the network.
    """

    def __init__(self, backbone: Backbone, config: ExtractConfig, cache: FeatureCache | None = None) -> None:
        self.backbone, self.config, self.cache = backbone, config, cache
        self.forward_passes = 0
        self.cache_hits = 0
        check_fits(backbone, config)
        self.settings: dict[str, Any] = plain(decisions(config) | backbone_facts(backbone))

    @property
    def width(self) -> int:
        """D, of a slice vector."""
        parts = self.config.layers * ("cls" in self.config.tokens) + ("mean" in self.config.tokens)
        return int(parts * self.backbone.model.embed_dim)

    # --- one case ----------------------------------------------------------------------------------------------------

    def embed(self, case: Case, *, shown: tuple[str, ...] | None = None, view: int = 0) -> CaseVectors:
        """The vectors of one case, from the cache if they are there.

        Args:
            case: Its region of interest is not read.
            shown: Sequences that count; the tokens of all others are mask tokens. None: all that the case has.
            view: 0 as it is; further ones of a picture with flips that are drawn by the case's id and this number.

        Raises:
            ConfigError: ``shown`` names a sequence that the model does not have, or a view of a volume.
            DataError: Images missing, damaged, constant, or none of those that count; names the case.
            NonFiniteError: The network gave NaN or infinity.
            ResourceError: Out of memory, or the cache cannot be written.
        """
        self._check_request([case], shown, view + 1)
        ((_, _, result),) = self._results(iter(self._jobs(case, shown, (view,))))
        if isinstance(result, MedsslError):
            raise result
        return result

    def embed_planes(self, case: Case, planes: Planes) -> CaseVectors:
        """The vectors of a case whose slices were read already, by ``planes``; not through the cache.

        Raises:
            NonFiniteError: The network gave NaN or infinity.
            ResourceError: Out of memory.
        """
        job = Job(case, 0, "", {}, planes=planes, facts=self._facts(case, planes), indices_N=self.indices(planes))
        job.available_S, job.left = planes.available_S, len(job.indices_N)
        joined = Joined(self, self.config.batch_size)
        joined.add(job)
        joined.finish_all()
        result = self._checked(job)
        if isinstance(result, MedsslError):
            raise result
        return result

    def planes(self, case: Case) -> Planes:
        """The slices of a case in the chosen orientation; of a 4-D file those of its first volume.

        Raises:
            DataError: As ``read_planes``.
        """
        case = replace(case, roi=None)
        if _is_picture(case):
            return read_planes(case, self.backbone)
        with naming_case(case):
            case = self._first_volumes(case)
        return self._as_stored(case) if self.config.orientation == "stored" else read_planes(case, self.backbone)

    def indices(self, planes: Planes) -> np.ndarray:
        """(N,) int32, positions of the slices that are looked at, rising."""
        every = np.arange(0, len(planes), self.config.stride, dtype=np.int32)
        most = self.config.max_slices
        if not most or len(every) <= most:
            return every
        if self.config.slice_selection == "first":
            return every[:most]
        places = [len(every) // 2] if most == 1 else np.linspace(0, len(every) - 1, most).round().astype(int)
        return every[places]

    def network_size(self, planes: Planes) -> tuple[int, int]:
        """(height, width) in pixels of a slice as the network sees it."""
        if self.config.resize is not None:
            return self.config.resize, self.config.resize
        return self.backbone.network_size(planes.size, planes.spacing, self.config.max_side)

    def network_input(self, planes: Planes, indices: np.ndarray) -> Tensor:
        """(B, S, H, W) of some slices on the network's device: limits applied, resized, normalised."""
        size = self.network_size(planes)
        with saying_memory(self.backbone.device):
            images = planes.batch(indices)
            if self.config.resize is None:
                return self.backbone.to_network(images, size)
            images_BSHW = torch.from_numpy(images).to(self.backbone.device)
            if tuple(images_BSHW.shape[-2:]) != size:
                how: dict[str, Any] = {"mode": "bilinear", "align_corners": False, "antialias": self.config.antialias}
                images_BSHW = functional.interpolate(images_BSHW, size, **how)
            return normalize(images_BSHW, self.backbone.mean, self.backbone.std)

    def patch_tokens(self, planes: Planes, indices: np.ndarray) -> np.ndarray:
        """(B, S, h, w, E) patch tokens of some slices after the final norm; not through the cache.

        Raises:
            NonFiniteError: The network gave NaN or infinity.
        """
        available_BS = np.repeat(planes.available_S[None], len(indices), axis=0)
        with saying_memory(self.backbone.device):
            _, patches = self._compute(self.network_input(planes, indices), available_BS, with_patches=True)
        self.forward_passes += len(indices)
        assert patches is not None
        found = patches.cpu().numpy()
        if not np.isfinite(found).all():
            raise self._nonfinite("")
        return found

    # --- many cases --------------------------------------------------------------------------------------------------

    def embed_many(
        self, cases: Sequence[Case], *, shown: tuple[str, ...] | None = None, views: int = 1
    ) -> Iterator[tuple[Case, int, CaseVectors | MedsslError]]:
        """(case, view, vectors) in the order of the cases, while a thread reads the next ones.

        A case that fails gives its error once, in place of the first view that fails, and the others go on. What
        concerns all of them, a full disk or a faulty request, is raised.

        Args:
            cases: Pictures where there are several views.
            shown: As in ``embed``.
            views: Of each case, from 0.

        Raises:
            ConfigError: As ``embed``.
            ResourceError: Out of memory, or the cache cannot be written.
        """
        self._check_request(cases, shown, views)
        jobs = (job for case in cases for job in self._jobs(case, shown, range(views)))
        with closing(read_ahead(jobs, CASES_AHEAD)) as ahead:
            yield from self._results(ahead)

    def _check_request(self, cases: Sequence[Case], shown: tuple[str, ...] | None, views: int) -> None:
        if shown is not None:
            self._check_shown(shown)
        volume = next((case for case in cases if not _is_picture(case)), None) if views > 1 else None
        if volume is not None:
            raise ConfigError(
                "Several views are made of pictures only.",
                where=f"views={views}; case {volume.case_id} is a volume",
                fix="leave views out: the slices of a volume are many views already",
                code="views_of_volume",
            )

    def _check_shown(self, shown: tuple[str, ...]) -> None:
        own = self.backbone.model.sequences or ()
        unknown = [name for name in shown if name not in own]
        if unknown or not shown:
            raise ConfigError(
                "The model does not have the sequences that are to count.",
                where=f"asked for {', '.join(shown) or 'none'}; it has {', '.join(own) or 'plain pictures'}",
                fix="name some of the model's sequences" if own else "leave the choice of sequences out",
                code="shown_unknown",
            )

    def _results(self, jobs: Iterator[Job]) -> Iterator[tuple[Case, int, CaseVectors | MedsslError]]:
        """Compute what the cache does not hold; results in the order of the jobs."""
        joined = Joined(self, self.config.batch_size)
        most_held = self.config.batch_size * (1 if "patch" in self.config.tokens else BATCHES_HELD)
        open_jobs: deque[Job] = deque()
        for job in jobs:
            open_jobs.append(job)
            joined.add(job)
            if sum(one.count for one in open_jobs) > most_held:
                joined.finish(open_jobs[0])
            yield from self._done(open_jobs)
        joined.finish_all()
        yield from self._done(open_jobs)

    def _done(self, open_jobs: deque[Job]) -> Iterator[tuple[Case, int, CaseVectors | MedsslError]]:
        """Take the finished jobs from the front of the queue."""
        while open_jobs and not open_jobs[0].left:
            job = open_jobs.popleft()
            yield job.case, job.view, self._result(job)

    def _result(self, job: Job) -> CaseVectors | MedsslError:
        if job.result is not None:
            if isinstance(job.result, CaseVectors):
                self.cache_hits += len(job.result.indices_N)
            return job.result
        vectors = self._checked(job)
        if self.cache is not None and isinstance(vectors, CaseVectors):
            self.cache.write(job.key, job.fields, to_arrays(vectors, self.backbone.sequences))
        return vectors

    def _checked(self, job: Job) -> CaseVectors | MedsslError:
        assert job.slices_ND is not None
        assert job.facts is not None
        for array in (job.slices_ND, job.patches_NShwD):
            if array is not None and not np.isfinite(array).all():
                return self._nonfinite(job.case.case_id)
        return CaseVectors(job.slices_ND, job.indices_N, job.facts, job.patches_NShwD)

    def _nonfinite(self, case_id: str) -> NonFiniteError:
        return NonFiniteError(
            "The backbone gives NaN or infinite features.",
            where=f"case {case_id}, " * bool(case_id) + hide_home(str(self.backbone.found.weights)),
            fix="use an earlier checkpoint, another model or precision=fp32; the images themselves are finite",
            code="features_nonfinite",
        )

    # --- reading -----------------------------------------------------------------------------------------------------

    def _jobs(self, case: Case, shown: tuple[str, ...] | None, views: Sequence[int]) -> Iterator[Job]:
        """The views of a case: what the cache holds of them, and the decoded images of the others."""
        planes: Planes | None = None
        facts: ImageFacts | None = None
        view = views[0]
        try:
            with naming_case(case):
                used = self._used(case)
                counting = self._counting(case, used, shown)
                sources = {name: self._source(sequence) for name, sequence in used.items()}
            for view in views:
                flips = _flips(case.case_id, view)
                fields = self._fields(sources, counting, flips)
                job = Job(case, view, FeatureCache.key_of(fields), fields, flips=flips)
                job.result = self._cached(job)
                if job.result is None:
                    if planes is None or facts is None:
                        with saying_memory(self.backbone.device):
                            planes = self.planes(case)
                            facts = self._facts(case, planes)
                    job.planes, job.facts, job.indices_N = planes, facts, self.indices(planes)
                    job.available_S = self._available(planes, counting)
                    job.left = len(job.indices_N)
                yield job
        except DataError as error:
            yield Job(case, view, "", {}, result=error)

    def _used(self, case: Case) -> dict[str, CaseSequence]:
        """The files that decide the vectors, by the name of their sequence."""
        if _is_picture(case):
            return dict(zip(PLAIN, case.sequences.values(), strict=False))  # of a picture there is one
        return {name: case.sequences[name] for name in self.backbone.sequences if name in case.sequences}

    def _counting(self, case: Case, used: Mapping[str, CaseSequence], shown: tuple[str, ...] | None) -> tuple[str, ...]:
        counting = tuple(name for name in used if shown is None or name in shown)
        if not counting:
            raise DataError(
                "A case has none of the sequences that are to count.",
                where=f"asked for {', '.join(shown or self.backbone.sequences)}; "
                f"there are: {', '.join(case.sequences) or 'none'}",
                fix="check the file names, or leave the case out",
                code="sequences_missing",
            )
        return counting

    def _source(self, sequence: CaseSequence) -> dict[str, Any]:
        """What tells a file, and the volume in it, from any other; asked before the cache is."""
        path = sequence.path
        try:
            facts: dict[str, Any] = {"sha256": file_digest(path)} if self.config.digest == "content" else _fast(path)
        except OSError as error:
            is_missing = isinstance(error, FileNotFoundError)
            raise DataError(
                "The file is missing." if is_missing else "The file cannot be read.",
                where=hide_home(str(path)) if is_missing else f"{hide_home(str(path))}: {error.strerror}",
                fix="check the path",
                code="file_missing" if is_missing else "file_unreadable",
            ) from error
        return {**facts, "volume": sequence.volume_index or 0}

    def _fields(
        self, sources: Mapping[str, Any], counting: tuple[str, ...], flips: tuple[bool, bool]
    ) -> dict[str, Any]:
        """Everything that decides the vectors of one view of one case."""
        return {
            "settings": self.settings,
            "patch_tokens": "patch" in self.config.tokens,
            "sources": dict(sources),
            "shown": list(counting),
            "view": {"flip_rows": flips[0], "flip_columns": flips[1]},
        }

    def _cached(self, job: Job) -> CaseVectors | None:
        arrays = None if self.cache is None else self.cache.read(job.key, job.fields)
        return None if arrays is None else of_arrays(arrays, self.backbone.sequences)

    def _available(self, planes: Planes, counting: tuple[str, ...]) -> np.ndarray:
        if self.backbone.model.sequences is None or len(planes.available_S) != len(self.backbone.sequences):
            return planes.available_S
        return planes.available_S & np.isin(self.backbone.sequences, counting)

    def _first_volumes(self, case: Case) -> Case:
        """The same case, 4-D files replaced by their first volume, which is said."""
        chosen = dict(case.sequences)
        for name, sequence in self._used(case).items():
            shape = read_header(sequence.path).shape
            if sequence.volume_index is None and len(shape) > 3:
                log.warning("%s holds %d volumes: the first is taken", hide_home(str(sequence.path)), shape[3])
                chosen[name] = replace(sequence, volume_index=0)
        return replace(case, sequences=chosen)

    def _as_stored(self, case: Case) -> Planes:
        """Slices along the third axis of the file, as [x, y]: nothing is turned, flipped or resampled."""
        config = self.backbone.preprocess.model_copy(update={"resample_mm": None})
        prepared = prepare_case(case, self.backbone.sequences, config)
        source = prepared.restore.source
        volume_ZYX = prepared.restore.restore(prepared.images_SZYX[0]).array
        stored_SZXY = volume_ZYX.transpose(0, 2, 1)[None]
        affine = source.affine[:, [1, 0, 2, 3]]
        turned = Prepared(
            case_id=case.case_id,
            images_SZYX=np.ascontiguousarray(stored_SZXY),
            affine=affine,
            roi_ZYX=None,
            available_S=prepared.available_S,
            resampled_S=prepared.resampled_S,
            restore=Restore(source, Grid(stored_SZXY.shape[1:], affine)),
        )
        return planes_of(turned, self.backbone)

    def _facts(self, case: Case, planes: Planes) -> ImageFacts:
        if planes.prepared is None:
            return ImageFacts(None, (1, *planes.size), {PLAIN[0]: _percentiles(planes.stored_SNHW)}, ())
        source, names = planes.prepared.restore.source, self.backbone.sequences
        images_SZYX, has_S = planes.prepared.images_SZYX, planes.prepared.available_S
        spacing = affine_spacing(source.affine)
        intensity = {name: _percentiles(images_SZYX[s]) for s, name in enumerate(names) if has_S[s]}
        return ImageFacts((spacing.z, spacing.y, spacing.x), source.shape, intensity, case.missing(names))

    # --- the network -------------------------------------------------------------------------------------------------

    def forward(self, images_BSHW: Tensor, available_BS: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Normalised slices to vectors (B, D) and, with the token ``patch``, patch tokens (B, S, h, w, E); float32.

        Raises:
            ResourceError: Out of memory.
        """
        with_patches = "patch" in self.config.tokens
        with saying_memory(self.backbone.device):
            vectors_BD, patches_BShwE = self._compute(images_BSHW, available_BS, with_patches=with_patches)
            self.forward_passes += len(images_BSHW)
            return vectors_BD.cpu().numpy(), None if patches_BShwE is None else patches_BShwE.cpu().numpy()

    def _compute(
        self, images_BSHW: Tensor, available_BS: np.ndarray, *, with_patches: bool
    ) -> tuple[Tensor, Tensor | None]:
        model, device = self.backbone.model, self.backbone.device
        available = None
        if model.sequences is not None and not available_BS.all():
            available = torch.from_numpy(available_BS).to(device)
        bf16 = torch.autocast(device.type, torch.bfloat16, enabled=self.config.precision == "bf16")
        with torch.inference_mode(), _evaluating(model), bf16:
            if self.config.tokens == ("cls",) and self.config.layers == 1 and not with_patches:
                return self._cls_alone(images_BSHW, available), None
            layers = last_layers(model, images_BSHW, available, self.config.layers)
            vectors_BD = token_vectors(layers, available, self.config.tokens)
            return vectors_BD, _patches(layers[-1]) if with_patches else None

    def _cls_alone(self, images_BSHW: Tensor, available_BS: Tensor | None) -> Tensor:
        """(B, E) of the last block, whose end is computed for the cls token and a few patch tokens alone."""
        patch, model = self.backbone.model.patch_size, self.backbone.model
        sequences = 1 if model.sequences is None else len(model.sequences)
        count = sequences * (images_BSHW.shape[2] // patch) * (images_BSHW.shape[3] // patch)
        first_B1 = torch.arange(len(images_BSHW), device=images_BSHW.device)[:, None] * count
        beside_K = torch.arange(min(count, COMPANIONS), device=images_BSHW.device)
        index = (first_B1 + beside_K).flatten()
        ((cls_BE, _),) = model.forward_needed([images_BSHW], [None], [available_BS], [index])
        return cls_BE.float()


def embedder_of(
    settings: Mapping[str, Any],
    backbone: Backbone,
    cache: FeatureCache | None = None,
    *,
    batch_size: int = 8,
    digest: Literal["content", "fast"] = "content",
) -> Embedder:
    """The embedder that ``settings`` come from, with the same backbone.

    Args:
        settings: ``Embedder.settings``, as features and heads keep them.
        backbone: Compared with what they say of it.
        cache: As in ``Embedder``.
        batch_size: Slices computed together; decides no number.
        digest: As in ``ExtractConfig``.

    Raises:
        CheckpointError: They come from another backbone, or are none; names the keys that differ.
    """
    own = backbone_facts(backbone)
    differing = changed_keys({key: settings.get(key) for key in own}, plain(own))
    if differing:
        raise CheckpointError(
            "The backbone is not the one that the features come from.",
            where=f"{hide_home(str(backbone.found.weights))}: {_compared(settings, own, differing)}",
            fix="pass the backbone that they were extracted with, or extract them again",
            code="backbone_differs",
        )
    free = ExtractConfig(batch_size=batch_size, digest=digest)  # a fault here is none of the settings
    keys = [key for key in decisions(free) if key != "schema"]
    given = {key: settings[key] for key in keys if settings.get(key) is not None}
    try:
        config = ExtractConfig.model_validate({**given, "batch_size": free.batch_size, "digest": free.digest})
        embedder = Embedder(backbone, config, cache)
    except (ValidationError, ConfigError) as error:
        raise _strange_settings(" ".join(str(error).split())[:200]) from error
    if differing := changed_keys(settings, embedder.settings):
        raise _strange_settings(", ".join(differing))
    return embedder


def _strange_settings(detail: str) -> CheckpointError:
    return CheckpointError(
        "The settings of the extraction cannot be followed.",
        where=detail,
        fix="extract the features again with this version",
        code="extraction_unknown",
    )


def _compared(settings: Mapping[str, Any], own: Mapping[str, Any], differing: Sequence[str]) -> str:
    """The keys that differ, short values with both."""
    texts = []
    for key in differing:
        there, here = settings.get(key), plain(own).get(key)
        short = "." not in key and len(f"{there}{here}") < 80
        texts.append(f"{key} (there {there}, here {here})" if short else key)
    return ", ".join(texts)


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode for a while: stochastic depth must not reach features."""
    if not model.training:
        yield
        return
    model.eval()
    try:
        yield
    finally:
        model.train()


def last_layers(
    model: VisionTransformer | ConvNeXt, images_BSHW: Tensor, available_BS: Tensor | None, count: int
) -> list[Features]:
    """Features after the last ``count`` blocks, shallow to deep, each through the final norm."""
    if count == 1:
        return [model(images_BSHW, None, available_BS)]
    return model.forward_layers(images_BSHW, range(-count, 0), None, available_BS)


def token_vectors(layers: Sequence[Features], available_BS: Tensor | None, tokens: Sequence[str]) -> Tensor:
    """(B, D) float32: the cls tokens of all layers, the mean patch token of the last one, or both end to end."""
    parts = [features.cls_BD.float() for features in layers] if "cls" in tokens else []
    if "mean" in tokens:
        parts.append(_mean_patch(_patches(layers[-1]), available_BS))
    return torch.cat(parts, dim=1)


def _patches(features: Features) -> Tensor:
    """(B, S, h, w, E) float32."""
    return features.patches_BND.float().unflatten(1, features.grid)


def _mean_patch(patches_BShwE: Tensor, available_BS: Tensor | None) -> Tensor:
    """(B, E): mean over the patches of the sequences that exist."""
    mean_BSE = patches_BShwE.mean((2, 3))
    if available_BS is None:
        return mean_BSE.mean(1)
    share_BS = available_BS.to(mean_BSE.dtype)
    return (mean_BSE * share_BS[..., None]).sum(1) / share_BS.sum(1, keepdim=True)


def _is_picture(case: Case) -> bool:
    return all(is_image(sequence.path) for sequence in case.sequences.values())


def _flips(case_id: str, view: int) -> tuple[bool, bool]:
    """Whether rows and columns of a view are turned round; never those of view 0."""
    if view == 0:
        return False, False
    rows, columns = np.random.default_rng(seed_for(0, "view", case_id, view)).random(2) < 0.5
    return bool(rows), bool(columns)


def _fast(path: Path) -> dict[str, Any]:
    """Size and time of change; the path as well, because copies of a cohort often share both."""
    stat = path.stat()
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "path_sha256": digest_of(str(path.absolute()))}


def _percentiles(values: np.ndarray) -> tuple[float, float, float]:
    """1st, 50th and 99th, linearly interpolated."""
    low, middle, high = np.percentile(values, _PERCENTILES).tolist()
    return low, middle, high
