"""CoCoSeg on CT-PET slices: data, network and validation of ``medssl segment --task ct-pet`` as one training job.

Letters: B samples, H W pixels; the two channels are CT and PET.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from medssl_cli.core.case import Case
from medssl_cli.core.case import Sequence as CaseSequence
from medssl_cli.core.errors import ConfigError, DataError
from medssl_cli.core.protocols import LabelledBatch
from medssl_cli.core.run import digest_of, hide_home, seed_everything, seed_for
from medssl_cli.core.wording import counted
from medssl_cli.data.copies import find_copies
from medssl_cli.data.ct_pet import CtPetData, Triple, parts_digest, read_ct_pet, read_luminance, split_triples
from medssl_cli.data.labelled_slices import CtPetSource
from medssl_cli.data.manifest import nearest_id, read_ids
from medssl_cli.data.paired_augmentation import PairedAugment
from medssl_cli.data.views import normalize
from medssl_cli.engine.distributed import from_first, rank
from medssl_cli.engine.memory import KeyNames
from medssl_cli.models.dual_encoder import DualEncoderUNet
from medssl_cli.models.vgg import IMAGENET_DIGEST, load_vgg
from medssl_cli.objectives.segmentation import SegmentationLoss
from medssl_cli.services.segment_ct_pet_config import RANDOM, SAFE_KEYS, CtPetConfig, load_ct_pet_config
from medssl_cli.services.segment_ct_pet_validation import Overlays, Validation
from medssl_cli.services.segment_job import SegmentJob
from medssl_cli.services.segment_request import SegmentRequest
from medssl_cli.services.segmenter import network_facts

log = logging.getLogger(__name__)

MEAN, STD = 0.5, 0.5
"""[0, 1] becomes [-1, 1], for the VGG trunks too."""
SEQUENCES = ("CT", "PET")
CLASSES = ("background", "lesion")
IMAGENET, UNVERIFIED, NONE = "imagenet", "unverified", "none"
VGG_WEIGHTS = {
    IMAGENET: "torchvision's ImageNet weights of VGG-19, by their SHA-256",
    UNVERIFIED: "a file of VGG-19 whose SHA-256 is not that of torchvision's ImageNet weights",
    RANDOM: "untrained",
    NONE: "two-way fusion has no trunks",
}
"""What ``vgg_weights`` of ``model.json`` can be."""
WHOLE = 0
"""Tile of a network that is shown whole slices."""
_SHOWN = 8

KEYS = KeyNames(
    batch="bs",
    accumulation=None,
    workers="num_workers",
    less_memory="bs=2 and num_workers=2 suit 4 to 8 GB, --precision bf16 needs less",
    not_finite="lower the learning rate (--lr 5e-5) with loss_type=combined, clip gradients (clip_grad=1), or compute "
    "with --precision fp32",
)
"""Advice as in CoCoSeg's documentation."""

Parts = Mapping[str, tuple[Triple, ...]]


def build_ct_pet_job(request: SegmentRequest, device: torch.device) -> SegmentJob:
    """Everything that the run needs, read, checked and built; nothing is written.

    Raises:
        ConfigError: Faults of the settings.
        DataError: Missing partners, bad pictures or masks, patients or files on two sides.
        CheckpointError: The VGG file is none.
    """
    config = load_ct_pet_config(request)
    seed_everything(seed_for(config.random_seed, "network"))
    network = DualEncoderUNet(config.network())
    vgg = _fill_vgg(network, config)  # before the images: these may take minutes
    data = read_ct_pet(Path(str(config.dataset_root)).expanduser(), dataset_type=config.dataset_type,
                       patient_regex=config.patient_regex)  # fmt: skip
    parts = from_first(lambda: divide(data, config, request.splits))
    log.info("Reading %d slices of %s", len(parts["train"]) + len(parts["val"]), hide_home(str(data.root)))
    train = CtPetSource(parts["train"], mask_threshold=config.mask_threshold, cache_gb=config.cache_gb)
    val = CtPetSource(parts["val"], mask_threshold=config.mask_threshold, cache_gb=config.cache_gb)
    counts = {"train": count_slices(train), "val": count_slices(val)}
    if "test" in parts:
        counts["test"] = {"n_slices": len(parts["test"]), "n_patients": n_patients(parts["test"])}
    network.to(device)
    loss = SegmentationLoss(config.loss(), outputs=1)
    facts = _data_facts(data, parts, counts)
    card = {
        "network": network_facts(network),
        **vgg,
        "sequences": list(SEQUENCES),
        "mean": MEAN,
        "std": STD,
        "tile": WHOLE,
        "pixel_mm": None,
        "context": 0,
        "kind": "images",
        "preprocess": {},
        "mask_threshold": config.mask_threshold,
        "parameters": network.parameter_counts(),
    }
    return SegmentJob(
        task="ct-pet",
        recipe=request.recipe,
        config=config,
        settings=config.training(),
        network=network,
        loss=loss,
        classes=CLASSES,
        groups=[_one_group(network)],
        train=train,
        views=_views(config),
        validate=Validation(val, loss, config, MEAN, STD),
        overlays=Overlays(val, MEAN, STD),
        card=card,
        data_facts=facts,
        keys=KEYS,
        distance_unit="px",
        seen=[(part, triple.name, triple.patient_id) for part in ("train", "val") for triple in parts[part]],
        introduction=[*_introduction(counts, network, vgg), config.loss_line(), _kept_line(train, val)],
        safe_keys=SAFE_KEYS,
        growing_keys=frozenset({"epoch"}),
        batch_keys=frozenset({"bs"}),
        location_keys=frozenset({"dataset_root"}),
        digests={} if vgg["vgg_sha256"] is None else {"vgg_weights": vgg["vgg_sha256"]},
        notes=_notes(counts, vgg),
    )


# --- data ------------------------------------------------------------------------------------------------------------


def divide(data: CtPetData, config: CtPetConfig, splits: Path | None) -> dict[str, tuple[Triple, ...]]:
    """Triples by part: folders of a split win, then the lists of ``--splits``, then ``val_ratio``.

    Raises:
        ConfigError: Lists for data whose folders are a split already.
        DataError: Ids that are not there, or patients or CT pictures in several parts.
    """
    if splits is None:
        parts = split_triples(data, val_ratio=config.val_ratio, seed=config.random_seed)
    elif "all" not in data.parts:
        raise ConfigError(
            "The folders of the data are a split already.",
            where=f"{hide_home(str(data.root))} has {', '.join(data.parts)}; --splits {hide_home(str(splits))}",
            fix="leave --splits out, or name a flat folder",
            code="split_twice",
        )
    else:
        listed = listed_triples(data.parts["all"], splits)
        parts = split_triples(replace(data, parts=listed), val_ratio=config.val_ratio, seed=config.random_seed)
    _refuse_copies(parts)
    return parts


def listed_triples(triples: Sequence[Triple], splits: Path) -> dict[str, tuple[Triple, ...]]:
    """Triples by part, as ``train.csv``, ``val.csv`` and ``test.csv`` of ``medssl split`` list patients or slices.

    Raises:
        DataError: A list is missing, or holds an id that is neither a patient nor a slice.
    """
    known: dict[str, set[Triple]] = {}
    for triple in triples:
        for name in (triple.patient_id, triple.name, Path(triple.name).stem):
            known.setdefault(name, set()).add(triple)
    parts: dict[str, tuple[Triple, ...]] = {}
    for part in ("train", "val", "test"):
        path = splits / f"{part}.csv"
        if part == "test" and not path.is_file():
            continue
        wanted: set[Triple] = set()
        for name in read_ids(path).ids:
            found = known.get(name) or known.get(Path(name).name)
            if found is None:
                raise DataError(
                    f"The list {part}.csv names what is not there.",
                    where=f"{hide_home(str(path))}: {name[:120]!r}{nearest_id(name, sorted(known))}",
                    fix="list patients, or file names of CT slices",
                    code="id_unknown",
                )
            wanted |= found
        parts[part] = tuple(triple for triple in triples if triple in wanted)
    left = len(triples) - len(set().union(*parts.values()))
    if left:
        log.warning("%s are in none of the lists of %s", counted(left, "slice"), hide_home(str(splits)))
    return parts


def _refuse_copies(parts: Parts) -> None:
    """Refuse one CT picture under two names on two sides; plain ones, such as air above the patient, may repeat.

    Raises:
        DataError: Naming the pairs.
    """
    cases = {
        part: [Case(t.name, t.patient_id, {"CT": CaseSequence("CT", t.ct)}) for t in triples]
        for part, triples in parts.items()
    }
    pairs = [pair for pair in find_copies(cases) if not _is_plain(pair[0][2])]
    if pairs:
        lines = [f"{part} {path} and {other} {copy}" for (part, _, path), (other, _, copy) in pairs[:_SHOWN]]
        raise DataError(
            "The parts of the split hold the same CT pictures under two names: scores would be too good.",
            where="\n".join([*lines, *([f"and {len(pairs) - _SHOWN} more"] if len(pairs) > _SHOWN else [])]),
            fix="leave one of each pair out; `medssl check-data --task ct-pet` lists all copies",
            code="split_leak",
        )


def _is_plain(path: Path) -> bool:
    image_HW = read_luminance(path)
    return bool((image_HW == image_HW[0, 0]).all())


def count_slices(source: CtPetSource) -> dict[str, int]:
    """``n_slices``, ``n_patients``, ``n_with_lesion``."""
    return {
        "n_slices": len(source),
        "n_patients": n_patients(source.triples),
        "n_with_lesion": len(source.with_lesion()),
    }


def n_patients(triples: Sequence[Triple]) -> int:
    """Different patients."""
    return len({triple.patient_id for triple in triples})


def _data_facts(data: CtPetData, parts: Parts, counts: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    files = [path for part in ("train", "val") for triple in parts[part] for path in triple.files.values()]
    stats = [(str(path.relative_to(data.root)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    digests = parts_digest(parts)
    return {
        "layout": data.layout,
        "counts": counts,
        "split_digests": digests,
        "split_digest": digest_of(digests["train"], digests["val"]),
        "data_digest": digest_of(sorted(stats)),
    }


def _introduction(
    counts: Mapping[str, Mapping[str, int]], network: DualEncoderUNet, vgg: Mapping[str, Any]
) -> list[str]:
    lines = []
    for part, of in counts.items():
        slices, patients = counted(of["n_slices"], "slice"), counted(of["n_patients"], "patient")
        lesions = f"{of['n_with_lesion']} with lesion" if "n_with_lesion" in of else "never opened"
        lines.append(f"{part + ':':<6} {slices} of {patients}, {lesions}")
    groups = network.parameter_counts().items()
    lines.append("network: " + ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in groups))
    return [*lines, f"VGG weights: {vgg['vgg_weights']}, {VGG_WEIGHTS[vgg['vgg_weights']]}"]


def _kept_line(*sources: CtPetSource) -> str:
    kept, every = sum(source.kept for source in sources), sum(map(len, sources))
    others = "" if kept == every else "; the others are read again each time"
    return f"{kept} of {counted(every, 'slice')} stay decoded in memory{others}"


def _notes(counts: Mapping[str, Mapping[str, int]], vgg: Mapping[str, Any]) -> list[str]:
    notes = []
    if vgg["vgg_weights"] == RANDOM:
        notes.append("The VGG trunks are random: features of ImageNet are missing, and model.json says so.")
    if vgg["vgg_weights"] == UNVERIFIED:
        notes.append(
            f"The VGG weights (SHA-256 {vgg['vgg_sha256'][:12]}…) are not torchvision's ImageNet weights as far as can "
            f"be told, whose SHA-256 begins with {IMAGENET_DIGEST}: model.json calls them unverified."
        )
    for part in ("train", "val"):
        if not counts[part]["n_with_lesion"]:
            notes.append(f"No slice of {part} has a lesion.")
    return notes


# --- network ---------------------------------------------------------------------------------------------------------


def _fill_vgg(network: DualEncoderUNet, config: CtPetConfig) -> dict[str, Any]:
    """Load the trunks as the settings say; ``vgg_sha256`` of the file, and ``vgg_weights`` as ``VGG_WEIGHTS`` tells."""
    if config.fusion == "2way":
        return {"vgg_weights": NONE, "vgg_sha256": None}
    if config.vgg_weights == RANDOM:
        return {"vgg_weights": RANDOM, "vgg_sha256": None}
    origin = load_vgg(network, Path(str(config.vgg_weights)).expanduser())
    return {"vgg_weights": IMAGENET if origin.is_imagenet else UNVERIFIED, "vgg_sha256": origin.sha256}


def _one_group(network: DualEncoderUNet) -> dict[str, Any]:
    """All trained tensors alike, biases with weight decay too, as in CoCoSeg."""
    named = [(f"network.{name}", tensor) for name, tensor in network.named_parameters() if tensor.requires_grad]
    return {"params": named, "lr_multiplier": 1.0, "wd_multiplier": 1.0, "is_last_layer": False}


def _views(config: CtPetConfig) -> Any:
    augment, seed = PairedAugment(config.augment), config.random_seed

    def views(batch: LabelledBatch, step: int, micro: int) -> LabelledBatch:
        draws = augment.draw(batch, seed_for(seed, "augment", step, micro, rank()))
        changed = augment.apply(batch, draws)
        return replace(changed, images_BSHW=normalize(changed.images_BSHW, MEAN, STD))

    return views
