"""``bench.py segment``: a training step of CoCoSeg against its two-way ancestor restated plainly, a step and a volume
of a vision transformer with a decoder, and the memory of all of them.

The ancestor is written from the published description of the network, the loss and the step, without anything that
this program does for speed: two encoders one after the other, one attention call a map, AdamW over lists, a moving
average tensor by tensor. It has the weights of the two-way network here, so that both must give the same loss.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measuring import Findings, Mark, Options, measure
from medssl_cli.core.protocols import LabelledBatch
from medssl_cli.engine.optim import apply_schedule, build_adamw, parameter_groups
from medssl_cli.engine.precision import Precision
from medssl_cli.models.dense_decoder import DecoderConfig, DenseNetwork
from medssl_cli.models.dual_encoder import DualEncoderConfig, DualEncoderUNet
from medssl_cli.models.zoo import StudentConfig, build_backbone
from medssl_cli.objectives.segmentation import SegmentationLoss, SegmentationLossConfig
from medssl_cli.objectives.supervised import SupervisedSegmentation
from medssl_cli.services.segmentation_inference import InferSegmentConfig, segment_planes

PLAIN = "two-way ancestor, restated plainly"
OURS = "the same network here"
FOUR_WAY = "four-way, here"
VIT = "ViT and decoder, frozen backbone"
TUNED = "ViT and decoder, backbone trained"


def segment(options: Options) -> Findings:
    """Steps in turns, then a volume, each with the memory that it adds."""
    logging.getLogger("medssl_cli").setLevel(logging.ERROR)
    side = 32 if options.tiny else 512 if options.on_gpu else 192
    batch = 2 if options.tiny or not options.on_gpu else 8
    slices = 4 if options.tiny else 300 if options.on_gpu else 24
    steps = build_steps(options, side, batch)
    timings = measure({name: step.run for name, step in steps.items()}, options.repeat, options.device)
    rows = [{**timings[name].row(name), "kept_mb": kept_mb(steps[name])} for name in steps]
    volume = measure({"volume": lambda: run_volume(options, side, slices)}, max(1, options.repeat // 2), options.device)
    rows.append(volume["volume"].row(f"a slice of a volume of {slices}, {VIT}", per=slices))
    by_name = {name: sorted(timing.seconds(options.clock))[len(timing.wall) // 2] for name, timing in timings.items()}
    return Findings(
        {"picture": f"{side} x {side}", "batch": batch, "precision": options.precision, "decoder": "unetr"},
        rows,
        {f"{name} / {PLAIN}, time": by_name[name] / by_name[PLAIN] for name in (OURS, FOUR_WAY)},
        [
            Mark("two-way step here / restated ancestor, time", by_name[OURS] / by_name[PLAIN], 1.0),
            Mark("loss of both at the same weights, difference", loss_difference(side), 1e-4),
        ],
    )


# --- steps -----------------------------------------------------------------------------------------------------------


@dataclass
class Step:
    """One update of a network.

    Args:
        run: Does it.
        forward: (images) -> logits, for the memory that waits for the backward pass.
        images: Of the batch.
    """

    run: Callable[[], None]
    forward: Callable[[Tensor], Any]
    images: Tensor


def build_steps(options: Options, side: int, batch: int) -> dict[str, Step]:
    """All steps, on the same pictures."""
    device = options.device
    pairs = toy_batch(batch, 2, side, device)
    torch.manual_seed(0)
    two = DualEncoderUNet(DualEncoderConfig(fusion="2way")).to(device)
    plain = PlainTwoWay(two).to(device)
    four = DualEncoderUNet(DualEncoderConfig(fusion="4way")).to(device)
    steps = {PLAIN: plain_step(plain, pairs), OURS: our_step(two, pairs, options)}
    steps[FOUR_WAY] = our_step(four, pairs, options)
    pictures = toy_batch(batch, 3, side, device)
    for name, frozen in ((VIT, True), (TUNED, False)):
        steps[name] = our_step(vit(options, side, freeze=frozen).to(device), pictures, options)
    return steps


def toy_batch(batch: int, channels: int, side: int, device: torch.device) -> LabelledBatch:
    """Noise with a disc in it."""
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(batch, channels, side, side, generator=draw)
    ticks = torch.linspace(-1, 1, side)
    disc = (ticks[:, None] ** 2 + ticks**2 < 0.1).long().expand(batch, -1, -1)
    found = LabelledBatch(
        images_BSHW=images + 2 * disc[:, None],
        label_map_BHW=disc.clone(),
        available_BS=torch.ones(batch, channels, dtype=torch.bool),
        sizes_B2=torch.full((batch, 2), side),
        case_ids=[str(n) for n in range(batch)],
    )
    return found.to(device)


def our_step(network: nn.Module, batch: LabelledBatch, options: Options) -> Step:
    """Loss, gradients, AdamW and moving average as a run has them."""
    loss = SegmentationLoss(SegmentationLossConfig(), 1)
    objective = SupervisedSegmentation(network, loss).train()
    optimizer = build_adamw(parameter_groups(objective.trained_modules(), 0), options.device)
    apply_schedule(optimizer, {"lr": 1e-4, "last_layer_lr": 1e-4, "wd": 1e-4})
    precision = Precision(options.precision, options.device)  # type: ignore[arg-type]

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        with precision.autocast():
            terms = objective.losses(batch, {})
        precision.backward(torch.stack(list(terms.values())).sum())
        precision.unscale(optimizer)
        precision.step(optimizer)
        objective.after_step({})

    return Step(run, network, batch.images_BSHW)


def vit(options: Options, side: int, *, freeze: bool) -> DenseNetwork:
    """A picture backbone at its random start with the decoder of VisionFM."""
    size = {"embed_dim": 32, "depth": 4, "num_heads": 1} if options.tiny else {}
    student = StudentConfig(arch="vit_tiny" if options.tiny else options.arch, patch_size=16, **size)
    torch.manual_seed(0)
    backbone = build_backbone(student, side, None, stochastic_depth=False)
    return DenseNetwork(backbone, 1, DecoderConfig(name="unetr"), freeze_backbone=freeze)


def run_volume(options: Options, side: int, slices: int) -> None:
    """Every slice of a volume through the decoder; the probabilities are taken and let go one by one."""
    network = SimpleNamespace(
        network=vit(options, side, freeze=True).to(options.device).eval(),
        outputs=1,
        device=options.device,
        tile=side,
        pixel_mm=None,
        context=0,
        mean=0.45,
        std=0.22,
    )
    for _ in segment_planes(network, NoiseSlices(slices, side), InferSegmentConfig()):
        pass


class NoiseSlices:
    """Slices of noise, made when they are asked for."""

    def __init__(self, count: int, side: int) -> None:
        self.count, self.side = count, side
        self.spacing = (1.0, 1.0)
        self.available_S = np.ones(1, bool)

    def __len__(self) -> int:
        return self.count

    def scaled(self, index: int) -> np.ndarray:
        """(3, H, W) in [0, 1]."""
        draw = np.random.default_rng(index)
        return draw.random((3, self.side, self.side), dtype=np.float32)


# --- memory ----------------------------------------------------------------------------------------------------------


def kept_mb(step: Step) -> float:
    """What one forward pass keeps for the backward pass, in MB; weights are not counted, one storage once."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = step.forward(step.images)
    del logits
    return sum(kept.values()) / 1e6


# --- the ancestor ----------------------------------------------------------------------------------------------------


def loss_difference(side: int) -> float:
    """Largest difference of the losses of both networks at the same weights, on a CPU in fp32."""
    torch.manual_seed(1)
    ours = DualEncoderUNet(DualEncoderConfig(fusion="2way")).eval()
    with torch.no_grad():
        for attention in ours.attention:
            attention.gamma.fill_(0.3)  # type: ignore[union-attr, operator]
    batch = toy_batch(1, 2, min(side, 64), torch.device("cpu"))
    with torch.no_grad():
        terms = SegmentationLoss(SegmentationLossConfig(reduction="batch"), 1)(
            ours(batch.images_BSHW), batch.label_map_BHW
        )
        plain = plain_loss(PlainTwoWay(ours)(batch.images_BSHW), batch.label_map_BHW[:, None].float())
    return abs(float(sum(terms.values())) - float(plain))


def plain_step(network: PlainTwoWay, batch: LabelledBatch) -> Step:
    """fp32, gradients, AdamW over lists of tensors, and the average tensor by tensor."""
    target = batch.label_map_BHW[:, None].float()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=1e-4)
    average = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    updates = 0

    def run() -> None:
        nonlocal updates
        optimizer.zero_grad()
        plain_loss(network(batch.images_BSHW), target).backward()
        optimizer.step()
        updates += 1
        decay = min(0.999, (1 + updates) / (10 + updates))
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                average[name] = decay * average[name] + (1 - decay) * parameter.detach()

    return Step(run, network, batch.images_BSHW)


def plain_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Half Dice, half cross-entropy, over the whole batch."""
    probability = torch.sigmoid(logits)
    overlap = (probability * target).sum()
    dice = 1 - (2 * overlap + 1e-6) / (probability.sum() + target.sum() + 1e-6)
    return 0.5 * dice + 0.5 * F.binary_cross_entropy_with_logits(logits, target)


class PlainTwoWay(nn.Module):
    """CT and PET U-Net encoders, attention and fusion at three levels, decoder; layer by layer as described.

    Args:
        ours: Where the weights come from.
    """

    def __init__(self, ours: DualEncoderUNet) -> None:
        super().__init__()
        self.ct, self.pet = (plain_convs(unet) for unet in (ours.unet_ct, ours.unet_pet))
        self.attention = copy.deepcopy(ours.attention)
        self.projections = copy.deepcopy(ours.projections)
        self.decoder = plain_convs(ours.decoder)
        self.activation = nn.LeakyReLU(0.2)
        self.norms = nn.ModuleDict({str(width): nn.InstanceNorm2d(width) for width in (32, 64, 128, 256)})

    def forward(self, images_B2HW: Tensor) -> Tensor:
        """(B, 2, H, W) -> logits (B, 1, H, W); sides are multiples of 16."""
        maps = [self._encode(convs, images_B2HW[:, n : n + 1]) for n, convs in enumerate((self.ct, self.pet))]
        fused = [self._fuse(level, [maps[0][level + 1], maps[1][level + 1]]) for level in range(3)]
        half, quarter, eighth = fused
        convs = self.decoder
        x = convs["deconv6"](self._twice(eighth))
        x = torch.cat([x, quarter], 1)
        x = self._step(convs["conv7_2"], self._step(convs["conv7_1"], x))
        x = convs["deconv7"](self._twice(x))
        x = torch.cat([x, half], 1)
        x = self._step(convs["conv8_2"], self._step(convs["conv8_1"], x))
        x = convs["deconv8"](self._twice(x))
        x = torch.cat([x, maps[0][0], maps[1][0]], 1)
        x = self._step(convs["conv9_1"], x)
        return convs["conv10"](self.activation(convs["conv9_2"](x)))

    def _encode(self, convs: nn.ModuleDict, x: Tensor) -> list[Tensor]:
        maps = []
        for level in range(1, 5):
            x = F.max_pool2d(x, 2) if maps else x
            x = self._step(convs[f"conv{level}_2"], self._step(convs[f"conv{level}_1"], x))
            maps.append(x)
        return maps

    def _step(self, conv: nn.Module, x: Tensor) -> Tensor:
        x = self.activation(conv(x))
        return self.norms[str(x.shape[1])](x)

    def _fuse(self, level: int, maps: list[Tensor]) -> Tensor:
        attended = [self._attend(self.attention[level], each) for each in maps]
        x = self.projections[level](torch.cat(attended, 1))
        return self.norms[str(x.shape[1])](x)

    @staticmethod
    def _attend(attention: Any, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        query = attention.query(x).view(batch, channels, -1)
        key = attention.key(x).view(batch, channels, -1).permute(0, 2, 1)
        value = attention.value(x).view(batch, channels, -1)
        energy = torch.bmm(query, key) / (height * width)
        energy = torch.max(energy, -1, keepdim=True)[0].expand_as(energy) - energy
        out = torch.bmm(torch.softmax(energy, -1), value).view(batch, channels, height, width)
        return attention.gamma * out + value.view(batch, channels, height, width)

    @staticmethod
    def _twice(x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


def plain_convs(module: nn.Module) -> nn.ModuleDict:
    """Its convolutions as plain ones with the same weights, by name."""
    return nn.ModuleDict({name: as_plain(conv) for name, conv in module.named_children()})


def as_plain(conv: nn.Module) -> nn.Conv2d:
    """The convolution alone, without what follows it here."""
    assert isinstance(conv, nn.Conv2d)
    plain = nn.Conv2d(conv.in_channels, conv.out_channels, 3, padding=conv.padding)
    plain.kernel_size = conv.kernel_size
    plain.weight = nn.Parameter(conv.weight.detach().clone())
    plain.bias = nn.Parameter(conv.bias.detach().clone()) if conv.bias is not None else None
    return plain
