from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from constructed import noise, read_contrast, with_contrast
from torch import Tensor, nn

from medssl_cli.core.case import Case, Sequence
from medssl_cli.core.errors import NonFiniteError
from medssl_cli.models.convnext import ConvNeXt
from medssl_cli.models.feature_heads import NeighbourHead, build_head
from medssl_cli.services.backbone import Backbone, open_backbone
from medssl_cli.services.embedding import Embedder, ExtractConfig
from medssl_cli.services.head import Head
from medssl_cli.services.head_maps import case_gradient, head_heat, readings_of, relevance
from medssl_cli.services.lookup import find_model

METHODS = ("head", "gradcam")
WriteRun = Callable[..., Path]


def plain_head(
    width: int, *, pool: str = "mean", kind: Any = "linear", weights: np.ndarray | None = None, **card: Any
) -> Head:
    """A head with random or given weights."""
    columns = width * (2 if pool == "meanmax" else 1)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        module = build_head(kind, columns, 1, hidden_dim=8, dropout=0.0)
        if weights is not None:
            module.last.weight.data[0] = torch.from_numpy(weights)
    told = {"task": "binary", "classes": ["bleeding"], "outputs": 1, "kind": kind, "slice_dim": width}
    told |= {"input_width": columns, "pool_mode": pool, "level": "slice" if pool == "none" else "case"}
    told |= {"calibrated": False, "calibration": None}
    return Head(Path("head"), {**told, **card}, module.requires_grad_(False).eval())


def only(index: int, width: int = 32) -> np.ndarray:
    weights = np.zeros(width, np.float32)
    weights[index] = 1
    return weights


def backbone_of(run: Path) -> Backbone:
    return open_backbone(find_model(run), torch.device("cpu"))


def case_of(folder: Path, **arrays: np.ndarray) -> Case:
    """A case of volumes (X, Y, Z), pixels of 1 mm and slices of 3 mm."""
    sequences = {}
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        nib.save(nib.Nifti1Image(array, np.diag([1.0, 1, 3, 1])), folder / f"{name}.nii.gz")
        sequences[name] = Sequence(name, folder / f"{name}.nii.gz")
    return Case("P1", "P1", sequences)


@pytest.fixture(scope="module")
def contrast(tmp_path_factory: pytest.TempPathFactory, write_run: WriteRun) -> Backbone:
    return backbone_of(
        write_run(tmp_path_factory.mktemp("contrast") / "run", ("ax_t2wi", "ax_adc"), edit=read_contrast)
    )


@pytest.fixture(scope="module")
def random_run(tmp_path_factory: pytest.TempPathFactory, write_run: WriteRun) -> Path:
    return write_run(tmp_path_factory.mktemp("random") / "run", ("ax_t2wi", "ax_adc"))


# --- the right place -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pool", ["mean", "meanmax", "none"])
@pytest.mark.parametrize("tokens", [("cls",), ("cls", "mean")])
def test_the_map_peaks_at_the_patch_that_drives_the_head(
    tokens: Any, pool: str, method: Any, contrast: Backbone, tmp_path: Path
) -> None:
    """Pointing game: one patch has what the head reads, another is brighter and has none of it."""
    embedder = Embedder(contrast, ExtractConfig(tokens=tokens, batch_size=2))
    weights = np.concatenate([only(5), only(3)][: len(tokens)])
    head = plain_head(embedder.width, pool=pool, weights=np.tile(weights, 2) if pool == "meanmax" else weights)
    for place, name in (((1, 4, 3), "ax_t2wi"), ((3, 0, 0), "ax_adc"), ((2, 5, 4), "ax_adc")):
        arrays = {"ax_t2wi": noise(1), "ax_adc": noise(2), name: with_contrast(*place)}
        case = case_of(tmp_path, **arrays)
        planes, vectors = embedder.planes(case), embedder.embed(case)
        heat = head_heat(head, embedder, planes, vectors.slices_ND, vectors.indices_N, output=0, method=method)
        z, row, column = np.unravel_index(heat.argmax(), heat.shape)
        # arrays are RAS and slices (Y, X), so that rows and columns of patches are as written
        assert (row, column, z) == place
        assert heat[1, 0, 0] < 0.5 * heat.max()  # the brighter patch


@pytest.mark.parametrize("method", METHODS)
def test_an_absent_sequence_has_no_share(method: Any, contrast: Backbone, tmp_path: Path) -> None:
    embedder = Embedder(contrast, ExtractConfig())
    head = plain_head(32, weights=only(5))
    case = case_of(tmp_path, ax_adc=with_contrast(2, 1, 2))
    planes, vectors = embedder.planes(case), embedder.embed(case)
    heat = head_heat(head, embedder, planes, vectors.slices_ND, vectors.indices_N, output=0, method=method)
    assert np.unravel_index(heat.argmax(), heat.shape) == (2, 2, 1)
    images = embedder.network_input(planes, vectors.indices_N)
    gradient = case_gradient(head, vectors.slices_ND, 0)
    readings = readings_of(contrast.model, images, planes.available_S, embedder.config, gradient)
    changed = [r._replace(tokens_BShwD=r.tokens_BShwD.index_fill(1, torch.tensor([0]), 7.0)) for r in readings]
    torch.testing.assert_close(
        relevance(changed, method, planes.available_S), relevance(readings, method, planes.available_S)
    )


def test_attention_over_slices_decides_where_the_heat_lies(random_run: Path, tmp_path: Path) -> None:
    """Two equal slices have equal heat; the slices' heat follows the gradient through the attention."""
    array = noise()
    array[..., 3] = array[..., 1]
    embedder = Embedder(backbone_of(random_run), ExtractConfig())
    head = plain_head(32, pool="attention", kind="attention_mil")
    case = case_of(tmp_path, ax_t2wi=array, ax_adc=array)
    planes, vectors = embedder.planes(case), embedder.embed(case)
    heat = head_heat(head, embedder, planes, vectors.slices_ND, vectors.indices_N, output=0, method="head")
    np.testing.assert_allclose(heat[3], heat[1], rtol=1e-3, atol=1e-9)
    assert heat.max() > 0


def test_only_the_deciding_slice_of_a_slice_head_has_heat(random_run: Path, tmp_path: Path) -> None:
    embedder = Embedder(backbone_of(random_run), ExtractConfig())
    head = plain_head(32, pool="none", case_rule="max")
    case = case_of(tmp_path, ax_t2wi=noise(), ax_adc=noise(1))
    planes, vectors = embedder.planes(case), embedder.embed(case)
    heat = head_heat(head, embedder, planes, vectors.slices_ND, vectors.indices_N, output=0, method="head")
    assert set(np.flatnonzero(heat.any((1, 2)))) == {int(head.slice_values(vectors.slices_ND)[:, 0].argmax())}


# --- the right gradient ----------------------------------------------------------------------------------------------


def doubled(run: Path) -> Backbone:
    backbone = backbone_of(run)
    backbone.model.double()
    return backbone


def logit_with(
    model: Any, head: Head, images: Tensor, available: Tensor, layers: int, block: int, moved: Tensor
) -> float:
    """The case's logit with ``moved`` (B*T, D) added to what block ``block`` puts out of its first norm."""
    hook = list(model.flat_blocks())[block].norm1.register_forward_hook(lambda _m, _i, out: out + moved)
    with torch.no_grad():
        found = model.forward_layers(images, range(-layers, 0), None, available)
    hook.remove()
    return float(head.logits(torch.cat([features.cls_BD for features in found], 1))[0])


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize(
    ("pool", "kind"), [("mean", "mlp"), ("meanmax", "linear"), ("attention", "attention_mil"), ("none", "linear")]
)
def test_gradient_equals_finite_differences_in_float64(
    pool: str, kind: str, layers: int, random_run: Path, tmp_path: Path
) -> None:
    """Tokens moved behind the first norm of one block, the others left alone; central differences."""
    backbone = doubled(random_run)
    model: Any = backbone.model
    config = ExtractConfig(layers=layers)
    head = plain_head(32 * layers, pool=pool, kind=kind)
    head.module.double()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, 2, 24, 16, generator=generator, dtype=torch.float64)
    available = torch.tensor([[True, True]] * 3)
    with torch.no_grad():
        found = model.forward_layers(images, range(-layers, 0), None, available)
    slices = torch.cat([features.cls_BD for features in found], 1).numpy()
    gradient = case_gradient(head, slices, 0)
    readings = readings_of(model, images, np.ones(2, bool), config, gradient)
    assert len(readings) == layers
    for reading, block in zip(readings, range(2 - layers, 2), strict=True):
        direction = torch.randn(reading.gradient_BShwD.shape, generator=generator, dtype=torch.float64)
        moved = torch.zeros(3, 1 + 12, 32, dtype=torch.float64)
        moved[:, 1:] = direction.flatten(1, 3)
        h = 1e-5
        plus, minus = (
            logit_with(model, head, images, available, layers, block, sign * h * moved.flatten(0, 1))
            for sign in (1, -1)
        )
        expected = (plus - minus) / (2 * h)
        assert float((reading.gradient_BShwD * direction).sum()) == pytest.approx(expected, rel=1e-4)


def test_the_mean_token_is_explained_to_the_last_bit(random_run: Path, tmp_path: Path) -> None:
    """Mean tokens and a linear head: gradient times token, summed over patches and slices, is the logit itself."""
    embedder = Embedder(backbone_of(random_run), ExtractConfig(tokens=("mean",)))
    head = plain_head(32)
    case = case_of(tmp_path, ax_adc=noise())
    planes, vectors = embedder.planes(case), embedder.embed(case)
    images = embedder.network_input(planes, vectors.indices_N)
    gradient = case_gradient(head, vectors.slices_ND, 0)
    (reading,) = readings_of(embedder.backbone.model, images, planes.available_S, embedder.config, gradient)
    logit = float(head.logits(torch.from_numpy(vectors.slices_ND))[0]) - float(head.module.last.bias[0])
    assert float((reading.tokens_BShwD * reading.gradient_BShwD).sum()) == pytest.approx(logit, rel=1e-4)
    # the same gradient for every patch: both methods are one
    np.testing.assert_allclose(
        *(relevance([reading], method, planes.available_S).numpy() for method in METHODS), rtol=1e-4, atol=1e-7
    )


def test_before_the_norm_gradient_times_token_would_be_empty(random_run: Path) -> None:
    """Why the gradient is taken behind the norm: the output does not change when a token before it is scaled."""
    model: Any = doubled(random_run).model.requires_grad_(False)
    kept: list[Tensor] = []

    def keep(_module: nn.Module, given: Any) -> Any:
        kept.append(given[0].detach().requires_grad_())
        return (kept[-1], *given[1:])

    block = list(model.flat_blocks())[-1]
    hook = block.register_forward_pre_hook(keep)
    images = torch.randn(1, 2, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = torch.randn(32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    cls = model(images, None, torch.ones(1, 2, dtype=torch.bool)).cls_BD
    hook.remove()
    (gradient,) = torch.autograd.grad((cls[0] * weights).sum(), kept[0])
    before = (kept[0].detach() * gradient)[1:].sum(-1).abs()
    (reading,) = readings_of(model, images, np.ones(2, bool), ExtractConfig(), weights[None])
    behind = (reading.tokens_BShwD * reading.gradient_BShwD).sum(-1).abs()
    assert float(before.max()) < 1e-3 * float(behind.max())


@pytest.mark.parametrize("tokens", [("cls",), ("mean",), ("cls", "mean")])
def test_a_convolutional_network(tokens: Any) -> None:
    torch.manual_seed(0)
    model = ConvNeXt(depths=(1, 1, 1, 1), dims=(4, 8, 8, 16), in_chans=3).eval()
    images = torch.rand(2, 3, 64, 96)
    features = model(images)
    parts = {"cls": features.cls_BD, "mean": features.patches_BND.mean(1)}
    gradient = torch.randn(2, 16 * len(tokens))
    readings = readings_of(model, images, np.ones(1, bool), ExtractConfig(tokens=tokens), gradient)
    assert [tuple(reading.tokens_BShwD.shape) for reading in readings] == [(2, 1, 2, 3, 16)] * len(tokens)
    if "mean" in tokens:
        summed = (readings[-1].tokens_BShwD * readings[-1].gradient_BShwD).sum((1, 2, 3, 4))
        torch.testing.assert_close(summed, (parts["mean"] * gradient[:, -16:]).sum(1))
    if "cls" in tokens:  # the mean passes one gradient to all places
        spread = readings[0].gradient_BShwD
        torch.testing.assert_close(spread, spread[:, :, :1, :1].expand_as(spread))
        moved = readings[0].tokens_BShwD.flatten(1, 3).mean(1)
        torch.testing.assert_close(model.norm(moved), parts["cls"])
    for method in METHODS:
        assert relevance(readings, method, np.ones(1, bool)).shape == (2, 2, 3)


# --- bounds ----------------------------------------------------------------------------------------------------------


def test_slices_in_any_batches_and_parameters_as_before(random_run: Path, tmp_path: Path) -> None:
    backbone = backbone_of(random_run)
    head = plain_head(64, kind="mlp")
    case = case_of(tmp_path, ax_t2wi=noise(), ax_adc=noise(1))
    found = []
    for size in (1, 4):
        embedder = Embedder(backbone, ExtractConfig(layers=2, batch_size=size))
        planes, vectors = embedder.planes(case), embedder.embed(case)
        told: list[tuple[int, int]] = []
        found.append(
            head_heat(
                head,
                embedder,
                planes,
                vectors.slices_ND,
                vectors.indices_N,
                output=0,
                method="head",
                progress=lambda done, total, told=told: told.append((done, total)),
            )
        )
        assert told[-1] == (5, 5)
        assert len(told) == -(-5 // size)
    np.testing.assert_allclose(found[0], found[1], rtol=1e-3, atol=1e-8)
    assert found[0].dtype == np.float32
    assert (found[0] >= 0).all()
    assert all(parameter.requires_grad and parameter.grad is None for parameter in backbone.model.parameters())


def test_neighbours_have_a_gradient_too(random_run: Path) -> None:
    rows = torch.randn(20, 32, generator=torch.Generator().manual_seed(0))
    module = NeighbourHead(rows, (rows[:, :1] > 0).float(), 5, "sigmoid")
    head = Head(Path("head"), {**plain_head(32).card, "kind": "knn"}, module)
    gradient = case_gradient(head, rows[:3].numpy() + 0.1, 0)
    assert gradient.shape == (3, 32)
    assert torch.isfinite(gradient).all()


def test_a_gradient_that_is_not_finite_stops(random_run: Path, tmp_path: Path) -> None:
    embedder = Embedder(backbone_of(random_run), ExtractConfig())
    head = plain_head(32, weights=np.full(32, np.inf, np.float32))
    case = case_of(tmp_path, ax_t2wi=noise(), ax_adc=noise(1))
    planes, vectors = embedder.planes(case), embedder.embed(case)
    with pytest.raises(NonFiniteError) as caught:
        head_heat(head, embedder, planes, vectors.slices_ND, vectors.indices_N, output=0, method="head")
    assert "bleeding" in caught.value.where
