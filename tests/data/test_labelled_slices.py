"""Epochs are a pure function of seed and position; nothing is dropped; what training sees is what inference sees."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from medssl_cli.core.errors import DataError
from medssl_cli.core.protocols import IGNORE_LABEL, LabelledBatch
from medssl_cli.core.run import seed_for
from medssl_cli.data.ct_pet import Triple, read_pair
from medssl_cli.data.datasets import Key
from medssl_cli.data.labelled_slices import (
    CtPetSource,
    EpochSampler,
    LabelledSample,
    build_labelled_loader,
    collate_labelled,
    ordered_batches,
)


class Numbers:
    """Slices that hold their index and what was drawn of their position; every third one is narrower."""

    def __init__(self, count: int, *, broken: int | None = None) -> None:
        self.count, self.broken = count, broken

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, key: Key) -> LabelledSample:
        position, index = key
        if index == self.broken:
            raise DataError("The slice is broken.", where=self.case_id(index))
        drawn = np.random.default_rng(seed_for(0, "window", position)).random()
        image = torch.stack([torch.full((4, 3 if index % 3 else 2), float(value)) for value in (index, drawn)])
        label = torch.full(image.shape[1:], index % 2, dtype=torch.uint8)
        return LabelledSample(image, label, torch.tensor([True, False]), self.case_id(index))

    def case_id(self, index: int) -> str:
        return f"slice {index}"


def keys(start_step: int, n_batches: int, *ranks: int, world: int = 1, batch_size: int = 4, **more: int) -> list[Key]:
    samplers = [EpochSampler(11, batch_size, 7, start_step, rank, world, **more) for rank in ranks or (0,)]
    return [key for number in range(n_batches) for sampler in samplers for key in sampler.batch_at(number)]


def equal(a: LabelledBatch, b: LabelledBatch) -> bool:
    parts = ("images_BSHW", "label_map_BHW", "available_BS", "sizes_B2")
    return a.case_ids == b.case_ids and all(torch.equal(getattr(a, part), getattr(b, part)) for part in parts)


# --- sampler ---------------------------------------------------------------------------------------------------------


def test_every_epoch_is_a_new_order_of_all_slices_and_none_is_dropped() -> None:
    sampler = EpochSampler(11, 4, seed=7)
    assert sampler.epoch_steps == 3
    epochs = [[key for step in range(3) for key in sampler.batch_at(3 * e + step)] for e in range(4)]
    for number, epoch in enumerate(epochs):
        assert sorted(index for _, index in epoch) == list(range(11))
        assert [position for position, _ in epoch] == list(range(11 * number, 11 * number + 11))
    assert len({tuple(index for _, index in epoch) for epoch in epochs}) == 4
    assert len(sampler.batch_at(2)) == 3
    assert EpochSampler(11, 4, seed=8).batch_at(0) != sampler.batch_at(0)


@pytest.mark.parametrize("start_step", [1, 3, 4, 8])
def test_a_resumed_stream_is_the_rest_of_the_undisturbed_one(start_step: int) -> None:
    sampler = EpochSampler(11, 4, 7)
    whole = [sampler.batch_at(number) for number in range(12)]
    resumed = EpochSampler(11, 4, 7, start_step)
    assert [resumed.batch_at(number) for number in range(12 - start_step)] == whole[start_step:]
    stream = resumed.batches()
    assert [next(stream) for _ in range(3)] == whole[start_step : start_step + 3]


def test_ranks_and_micro_batches_see_together_what_one_process_sees() -> None:
    alone = keys(0, 6)
    assert keys(0, 6, 0, 1, world=2, batch_size=2) == alone
    assert keys(0, 12, batch_size=2, accumulation=2) == alone
    assert keys(0, 4, 0, 1, world=2, batch_size=1, accumulation=2) == alone[:8]
    assert keys(2, 4) == keys(2, 4, 0, 1, world=2, batch_size=2) == alone[8:]


def test_no_rank_is_without_a_sample_in_the_last_step() -> None:
    """9 slices, 4 ranks of 2: the last step has one slice; three ranks repeat the first three as drawn there."""
    samplers = [EpochSampler(9, 2, 7, rank=rank, world=4) for rank in range(4)]
    assert [s.epoch_steps for s in samplers] == [2] * 4
    first = [key for s in samplers for key in s.batch_at(0)]
    last = [s.batch_at(1) for s in samplers]
    assert [len(batch) for batch in last] == [1] * 4
    assert [batch[0] for batch in last[1:]] == first[:3]
    assert last[0][0][0] == 8
    assert [key[0] for s in samplers for key in s.batch_at(2)] == list(range(9, 17))
    tiny = EpochSampler(1, 2, 7, rank=2, world=3)
    assert (tiny.epoch_steps, tiny.batch_at(5)) == (1, [(5, 0)])


def test_the_last_step_is_shared_evenly() -> None:
    samplers = [EpochSampler(13, 4, 7, rank=rank, world=2) for rank in range(2)]
    assert [[len(s.batch_at(step)) for s in samplers] for step in range(2)] == [[4, 4], [3, 2]]


def test_impossible_streams_are_refused() -> None:
    for wrong in ((0, 4, 7, 0, 0, 1), (4, 0, 7, 0, 0, 1), (4, 4, 7, -1, 0, 1), (4, 4, 7, 0, 2, 2)):
        with pytest.raises(ValueError, match="no epochs"):
            EpochSampler(*wrong)


# --- batches ---------------------------------------------------------------------------------------------------------


def test_padding_is_zero_in_images_and_ignored_in_labels() -> None:
    batch = collate_labelled([Numbers(9)[(0, 5)], Numbers(9)[(1, 3)]])
    assert batch.images_BSHW.shape == (2, 2, 4, 3)
    assert batch.images_BSHW.dtype == torch.float32
    assert batch.label_map_BHW.dtype == torch.int64
    assert batch.sizes_B2.tolist() == [[4, 3], [4, 2]]
    assert batch.available_BS.tolist() == [[True, False]] * 2
    assert batch.images_BSHW[1, :, :, 2].abs().sum() == 0
    assert batch.label_map_BHW[1].tolist() == [[1, 1, IGNORE_LABEL]] * 4
    assert batch.case_ids == ["slice 5", "slice 3"]


def test_ordered_batches_give_each_slice_once_and_never_pad() -> None:
    batches = list(ordered_batches(Numbers(8), 2))
    assert [name for batch in batches for name in batch.case_ids] == [f"slice {n}" for n in range(8)]
    assert [len(batch.case_ids) for batch in batches] == [1, 2, 1, 2, 1, 1]
    assert not any((batch.label_map_BHW == IGNORE_LABEL).any() for batch in batches)
    assert list(ordered_batches(Numbers(0), 2)) == []


@pytest.mark.parametrize("start_step", [0, 4])
def test_workers_change_nothing(start_step: int) -> None:
    loaders = [
        build_labelled_loader(Numbers(7), batch_size=3, seed=1, start_step=start_step, workers=workers)
        for workers in (0, 2)
    ]
    for _ in range(5):
        first, second = (next(loader) for loader in loaders)
        assert equal(first, second)
    loaders[1].close()


def test_a_resumed_loader_gives_the_same_batches() -> None:
    whole = build_labelled_loader(Numbers(7), batch_size=2, seed=1, accumulation=2)
    batches = [next(whole) for _ in range(12)]
    resumed = build_labelled_loader(Numbers(7), batch_size=2, seed=1, accumulation=2, start_step=3)
    assert all(equal(next(resumed), batch) for batch in batches[6:])


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_arrives_whole(workers: int) -> None:
    loader = build_labelled_loader(Numbers(3, broken=1), batch_size=3, seed=1, workers=workers)
    with pytest.raises(DataError, match="broken") as caught:
        next(loader)
    assert caught.value.where == "slice 1"


# --- CT-PET ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def triples(tmp_path_factory: pytest.TempPathFactory) -> list[Triple]:
    """Five slices: random grey, a pure green one, one of maximum 1 and one of 16 bits."""
    root = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(0)
    images = list(rng.integers(0, 256, (5, 2, 16, 18), dtype=np.uint8))
    images[1] = np.zeros((2, 16, 18, 3), np.uint8)
    images[1][..., 1] = 255
    images[2] = images[2] % 2
    images[3] = rng.integers(0, 65536, (2, 16, 18), dtype=np.uint16)
    found = []
    for number, (ct, pet) in enumerate(images):
        mask = np.zeros((16, 18), np.uint8)
        mask[4:8, 5 : 6 + number] = 255
        files = []
        for kind, array in (("CT", ct), ("PET", pet), ("masks", mask)):
            files.append(root / kind / f"p{number}_slice_1.png")
            files[-1].parent.mkdir(exist_ok=True)
            Image.fromarray(array).save(files[-1])
        found.append(Triple(files[0].name, f"p{number}", *files))
    return found


@pytest.mark.parametrize("cache_gb", [0.0, 1.0])
def test_c01_c02_c05_training_and_inference_see_the_same_pixels(triples: list[Triple], cache_gb: float) -> None:
    source = CtPetSource(triples, cache_gb=cache_gb)
    for index, triple in enumerate(triples):
        sample = source[(index, index)]
        assert torch.equal(sample.image_SHW, torch.from_numpy(read_pair(triple)))
    assert source[(0, 1)].image_SHW.unique().tolist() == [np.float32(150 / 255)]
    assert source[(0, 2)].image_SHW.unique().tolist() == [0, np.float32(1 / 255)]
    batch = next(ordered_batches(source, 5))
    assert batch.label_map_BHW.flatten(1).sum(1).tolist() == [4, 8, 12, 16, 20]
    assert batch.label_map_BHW.unique().tolist() == [0, 1]


def test_the_cache_keeps_its_limit_and_lasts_when_files_go(triples: list[Triple], tmp_path: Path) -> None:
    one = 3 * 16 * 18  # bytes of a slice of 8 bits; the fourth has 16
    assert [CtPetSource(triples, cache_gb=n * one / 1e9).kept for n in (0.5, 1, 2.9, 5, 8)] == [0, 1, 2, 4, 5]
    copies = []
    for triple in triples:
        files = [tmp_path / path.parent.name / path.name for path in triple.files.values()]
        for old, new in zip(triple.files.values(), files, strict=True):
            new.parent.mkdir(exist_ok=True)
            new.write_bytes(old.read_bytes())
        copies.append(Triple(triple.name, triple.patient_id, *files))
    source = CtPetSource(copies)
    before = [source[(0, index)] for index in range(5)]
    for triple in copies:
        triple.ct.unlink()
    assert all(torch.equal(source[(1, i)].image_SHW, before[i].image_SHW) for i in range(5))
    again = pickle.loads(pickle.dumps(source))
    assert again.kept == 0
    with pytest.raises(DataError, match="missing"):
        again[(0, 0)]


def test_bad_files_are_told_before_the_first_epoch(triples: list[Triple]) -> None:
    bad = [*triples[:2], Triple("x.png", "x", triples[0].ct, triples[0].pet, triples[0].ct)]
    with pytest.raises(DataError, match="mask holds other values"):
        CtPetSource(bad)
    assert len(CtPetSource(bad, cache_gb=0)) == 3
    thresholded = CtPetSource(bad, mask_threshold=127)[(0, 2)]
    assert 100 < int(thresholded.label_HW.sum()) < 188


def test_batches_of_pairs_are_the_same_with_a_worker(triples: list[Triple]) -> None:
    source = CtPetSource(triples)
    alone, forked = (build_labelled_loader(source, batch_size=2, seed=3, workers=n) for n in (0, 1))
    assert all(equal(next(alone), next(forked)) for _ in range(4))
    forked.close()
