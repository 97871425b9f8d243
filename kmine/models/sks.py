"""SKS: a classifier of image-level labels guides a segmentation network through three skips.

After "Skip and Skip: Segmenting Medical Images with Prompts" (arXiv 2406.14958), whose full text was not at hand.

Known from what describes it: few masks, many image-level diagnoses; stage 1 trains a classifier on the diagnoses (the
coarse branch), stage 2 a segmentation network on the masks (the fine branch), fed with the classifier's features; both
are Swin-v2-T pyramids. A skip fuses, at one level, features of the same size and number: `W (f_i + f_k) + b`, + being
concatenation of channels and W in R^{C x 2C}: a biased 1 x 1 convolution and nothing else. *Feature Share Skip*: coarse
features are fused into each layer of the fine branch. *Resolution Compensation Skip*: the fused features go on to the
decoder. A third skip is counted but not described.

Ours, all of it our reading:
- Levels are the features at strides 4, 8, 16 and 32 (`levels` 3: without 32). What an encoder has above them (stride 2)
  goes to the decoder as it is, in every arm. Any timm encoder that can be walked by stages serves, twice.
- `skip_feature_share`: the next stage of the fine encoder reads the fused features. Off: it reads its own.
- `skip_resolution`: the decoder gets the fused features. Off: the fine encoder's own (which with feature share on
  were made from fused ones, one stage earlier). On without feature share: fused for the decoder alone.
- `skip_coarse`, our third skip: what the decoder gets is fused once more with the coarse features, by the same rule
  with weights of its own.
- No fusion has an activation, so some of these say the same in other words: without feature share, `skip_resolution`
  alone and `skip_coarse` alone are one network, and both together add weights but no function; with feature share and
  `skip_coarse` on, `skip_resolution` changes only how the decoder's mixture is written down. An ablation that finds no
  difference there finds nothing new.
- All off: the coarse branch is not run; the fine branch alone, a plain U-Net.
- A fusion starts as pass-through (W = [0 | I], b = 0), so that SKS begins as its fine branch alone: exactly so on a
  CPU, rounded where a GPU multiplies in TF32.
- Frozen (the default), the coarse branch stays in eval mode and without gradient whatever mode the model is in. Not
  frozen, it learns from the masks alone, from the second step on (the fusions start blind to it), and its head, which
  does not, no longer fits: `classify` and `activation_map` are stage 1's only while the branch is frozen.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kmine.config import ModelConfig
from kmine.models.base import LocalModel
from kmine.models.encoder_weights import encoder_errors, load_encoder
from kmine.models.pyramid import Pyramid, create_encoder

FIRST_STRIDE = 4
"""Of the first level of the pyramids."""
FEATURE_CACHE_BYTES = 1 << 30
"""Coarse features remembered at most; an image of 256 px has 0.5 (MobileNetV2) to 4 MB (Swin-v2-T) of them."""


class Fusion(nn.Conv2d):
    """Coarse and fine features of one level, C channels each -> C fused ones; starts by passing the fine ones on."""

    def __init__(self, channels: int) -> None:
        super().__init__(2 * channels, channels, kernel_size=1)
        with torch.no_grad():
            self.weight.zero_()
            self.weight[:, channels:, 0, 0] = torch.eye(channels)
            self.bias.zero_()

    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        """(B, C, H, W) twice -> (B, C, H, W)."""
        return super().forward(torch.cat([coarse, fine], dim=1))


class CoarseBranch(nn.Module):
    """A pyramid with a linear head on the average of its deepest features: does the image hold a lesion?"""

    def __init__(self, pyramid: Pyramid) -> None:
        super().__init__()
        self.pyramid = pyramid
        self.head = nn.Linear(pyramid.channels[-1], 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B,) logits."""
        return self.head(self.pyramid(x)[-1].mean(dim=(2, 3)))[:, 0]

    def activation(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, h, w) at the deepest level: where the logit comes from, [0, 1], highest at 1.

        The head's weights on the features instead of their average; what speaks against a lesion is 0. An image
        without a place that speaks for one is 0 throughout.
        """
        cam = torch.einsum("bchw,c->bhw", self.pyramid(x)[-1], self.head.weight[0]).relu()
        return cam / cam.amax(dim=(1, 2), keepdim=True).clamp_min(torch.finfo(cam.dtype).tiny)


class Decoder(nn.Module):
    """A plain U-Net decoder: upsample, concatenate, two of convolution, norm, ReLU; up to full resolution.

    Args:
        strides: of the features it gets, the finest first; each stride half of the next, down from the deepest.
        channels: theirs.
        width: channels of the deepest step, halved at each step above, at least 8.
        num_classes: K.
    """

    def __init__(self, strides: Sequence[int], channels: Sequence[int], width: int, num_classes: int) -> None:
        super().__init__()
        at = dict(zip(strides, channels, strict=True))
        self.strides = tuple(strides)
        self.steps = nn.ModuleDict()
        incoming, stride = channels[-1], strides[-1] // 2
        while stride >= 1:
            outgoing = max(8, width >> len(self.steps))
            self.steps[str(stride)] = _double_conv(incoming + at.get(stride, 0), outgoing)
            incoming, stride = outgoing, stride // 2
        self.head = nn.Conv2d(incoming, num_classes, kernel_size=3, padding=1)
        nn.init.xavier_uniform_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Features, the finest first -> (B, K, H, W) logits at stride 1."""
        at = dict(zip(self.strides, features, strict=True))
        x = features[-1]
        for stride, step in self.steps.items():
            x = F.interpolate(x, scale_factor=2, mode="nearest")
            x = step(torch.cat([x, at[int(stride)]], dim=1) if int(stride) in at else x)
        return self.head(x)


class SksNet(nn.Module):
    """Both branches, their skips and the decoder; (B, 3, H, W) scaled images -> (B, K, H, W) logits."""

    def __init__(self, fine: Pyramid, coarse: Pyramid, cfg: ModelConfig, num_classes: int) -> None:
        super().__init__()
        self.fine = fine
        self.coarse = CoarseBranch(coarse)
        self.feature_share, self.resolution = cfg.skip_feature_share, cfg.skip_resolution
        self.frozen = cfg.freeze_coarse
        levels = [n for n, stride in enumerate(fine.strides) if stride >= FIRST_STRIDE]
        # Only fusions that something reads: the deepest one has no stage below it.
        fused = levels if self.resolution else levels[:-1] if self.feature_share else []
        self.fusions = nn.ModuleDict({str(n): Fusion(fine.channels[n]) for n in fused})
        self.coarse_fusions = nn.ModuleDict({str(n): Fusion(fine.channels[n]) for n in levels if cfg.skip_coarse})
        self.depth = 1 + max(map(int, [*self.fusions, *self.coarse_fusions]), default=-1)
        """Stages of the coarse branch that the segmentation reads; the others are run for the classifier alone."""
        self.decoder = Decoder(fine.strides, fine.channels, cfg.decoder_channels, num_classes)
        self.coarse.requires_grad_(not self.frozen)
        self.feature_cache: FeatureCache | None = None

    @property
    def uses_classifier(self) -> bool:
        """Whether the segmentation reads the coarse branch at all."""
        return self.depth > 0

    def train(self, mode: bool = True) -> SksNet:
        """As ever, but a frozen coarse branch stays in eval mode."""
        super().train(mode)
        if self.frozen:
            self.coarse.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        guidance = self._guidance(x) if self.uses_classifier else []
        features = []
        for n, stage in enumerate(self.fine.stages):
            own = stage(x)
            fused = self.fusions[str(n)](guidance[n], own) if str(n) in self.fusions else own
            x = fused if self.feature_share else own
            out = fused if self.resolution else own
            features.append(self.coarse_fusions[str(n)](guidance[n], out) if str(n) in self.coarse_fusions else out)
        return self.decoder(features)

    def _guidance(self, x: Tensor) -> list[Tensor]:
        if (
            self.feature_cache is not None
            and self.frozen
            and (self.feature_cache.augmented is False or not self.training)
        ):
            return self.feature_cache(x)
        with torch.no_grad() if self.frozen else nullcontext():
            return self.coarse.pyramid(x, self.depth)


class FeatureCache:
    """Coarse features by image content: what a frozen branch makes of an image never changes.

    Images go through the branch one at a time, so that their features do not depend on whom they came with. When
    `FEATURE_CACHE_BYTES` are full, nothing more is remembered: with images that come round in turn, forgetting the oldest
    would forget every one just before it is wanted.
    """

    def __init__(self, features: Callable[[Tensor], list[Tensor]], *, augmented: bool) -> None:
        self.features = features
        self.augmented = augmented
        """Whether training images differ at every step; then only those of validation are worth remembering."""
        self.num_bytes = 0
        self.entries: dict[bytes, list[Tensor]] = {}

    def __call__(self, x: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> the levels, the finest first, each (B, C, h, w)."""
        rows = [self._lookup(image[None]) for image in x]
        return [torch.cat(level) for level in zip(*rows, strict=True)]

    def _lookup(self, image: Tensor) -> list[Tensor]:
        # The strides are no content: a slice of a batch may carry others than the same image alone.
        content = image.contiguous().cpu().numpy().tobytes()
        mixed = bytes([torch.is_autocast_enabled(image.device.type)])  # training may run in another precision
        key = hashlib.blake2b(content + mixed, digest_size=16).digest()
        if key in self.entries:
            return self.entries[key]
        # What is made in inference mode could not be used in training later.
        with torch.inference_mode(False), torch.no_grad():
            levels = self.features(image.clone())
        size = sum(level.nbytes for level in levels)
        if self.num_bytes + size <= FEATURE_CACHE_BYTES:
            self.entries[key], self.num_bytes = levels, self.num_bytes + size
        return levels


class Classifier(nn.Module):
    """The coarse branch as a network of its own: (B, 3, H, W) images in [0, 255] -> (B,) logits of "holds a lesion".

    It shares its weights with the model it comes from, so that what it learns, or loads, is the model's.
    """

    def __init__(self, coarse: CoarseBranch, prepare: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.coarse = coarse
        self.prepare = prepare

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        return self.coarse(self.prepare(images))


class SksModel(LocalModel):
    """SKS on plain images of any size, with the classifier's own answers beside the segmentation.

    Sides that do not divide are padded by repeating the border, for both branches: the classifier's average runs over
    the padded part, too.
    """

    net: SksNet

    @property
    def uses_classifier(self) -> bool:
        """False where every skip is off: then stage 1 changes nothing of the segmentation."""
        return self.net.uses_classifier

    @property
    def classifier(self) -> Classifier:
        """The coarse branch as a network of its own; load what stage 1 chose into it."""
        return Classifier(self.net.coarse, self.prepare)

    @contextmanager
    def unfrozen(self) -> Iterator[Classifier]:
        """The classifier, free to learn inside the block; afterwards frozen again where it was."""
        self.net.coarse.requires_grad_(True)
        try:
            yield self.classifier
        finally:
            self.net.coarse.requires_grad_(not self.net.frozen)
            self.net.train(self.net.training)

    @contextmanager
    def caching_features(self, *, augmented: bool) -> Iterator[None]:
        """Inside the block each image passes the frozen coarse branch once, wherever images come back unchanged.

        `augmented` says that training images do not. The classifier must not learn meanwhile.
        """
        net = self.net
        net.feature_cache = FeatureCache(lambda x: net.coarse.pyramid(x, net.depth), augmented=augmented)
        try:
            yield
        finally:
            net.feature_cache = None

    def classify(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 255] -> (B,) logits of the image-level label."""
        return self.classifier(images)

    @torch.no_grad()
    def activation_map(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 255] -> (B, H, W) in [0, 1]: where the classifier sees a lesion, by its deepest level.

        The class activation map of each image, scaled by its highest value, resized (bilinear) to the image. How sure
        the classifier is, `classify` says: the map of a healthy image, too, has its highest place.
        """
        height, width = images.shape[-2:]
        x = self.prepare(images)
        cam = self.net.coarse.activation(x).float()[:, None]
        return F.interpolate(cam, size=x.shape[-2:], mode="bilinear", align_corners=False)[:, 0, :height, :width]


def build_sks(cfg: ModelConfig, num_classes: int, *, offline: bool = False) -> SksModel:
    """SKS of `cfg`, random parts drawn from torch's generator as it stands (`build_model` sets it).

    Raises:
        UserError: an encoder that timm does not know or that cannot be walked by stages; weights as in `build_model`.
    """
    deepest = FIRST_STRIDE * 2 ** (cfg.levels - 1)
    with encoder_errors(cfg, f"model.levels {cfg.levels}", offline):
        pretrained = cfg.encoder_weights == "hub"
        fine = create_encoder(cfg.encoder, pretrained)
        coarse = copy.deepcopy(fine) if pretrained else create_encoder(cfg.encoder, False)
    for encoder in (fine, coarse):
        load_encoder(encoder, cfg.encoder_weights, cfg.encoder)
    net = SksNet(Pyramid(fine, cfg.encoder, deepest), Pyramid(coarse, cfg.encoder, deepest), cfg, num_classes)
    return SksModel(net, num_classes, deepest, cfg.normalization)


def _double_conv(incoming: int, outgoing: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (incoming, outgoing):
        conv = nn.Conv2d(channels, outgoing, kernel_size=3, padding=1, bias=False)
        nn.init.kaiming_uniform_(conv.weight, mode="fan_in", nonlinearity="relu")
        layers += [conv, nn.BatchNorm2d(outgoing), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)
