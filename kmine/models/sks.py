"""SKS: a classifier of image-level labels guides a segmentation network through three skips.

After "Skip and Skip: Segmenting Medical Images with Prompts" (arXiv 2406.14958), without access to its full text.

What is known, our reading of the rest, and which combinations of skips are equivalent: docs/method.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kmine.config import ModelConfig
from kmine.models.base import LocalModel, decoder_channels
from kmine.models.encoder_weights import encoder_errors, load_encoder
from kmine.models.nested_decoder import NestedDecoder
from kmine.models.pyramid import Pyramid, create_encoder

FIRST_STRIDE = 4
"""Stride of the first level that is fused."""
NO_VETO = (1.0, 0.0, 0.0)
"""Slope and offset of the classifier's calibrated logit, and the probability below which an image is vetoed: none."""
VETOED_LOGIT = -1e4
"""Logit of a vetoed lesion; within the range of float16."""
FEATURE_CACHE_BYTES = 1 << 30
"""Limit of cached coarse features; an image of 256 px has 0.5 (MobileNetV2) to 4 MB (Swin-v2-T) of them."""


class Fusion(nn.Conv2d):
    """Coarse and fine features of one level, C channels each -> C fused ones.

    Initialized as pass-through (W = [0 | I], b = 0): exactly the fine ones on a CPU, rounded on a GPU with TF32.
    """

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
    """A pyramid with a linear head on its average-pooled deepest features: the logit of a lesion in the image."""

    def __init__(self, pyramid: Pyramid) -> None:
        super().__init__()
        self.pyramid = pyramid
        self.head = nn.Linear(pyramid.channels[-1], 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B,) logits."""
        return self.logits(self.pyramid(x)[-1])

    def logits(self, deepest: Tensor) -> Tensor:
        """(B, C, h, w) features of the deepest level -> (B,) logits."""
        return self.head(deepest.mean(dim=(2, 3)))[:, 0]

    def activation(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, h, w) class activation map at the deepest level, scaled to a maximum of 1.

        The head's weights applied to the features before pooling; 0 where evidence is negative.
        """
        cam = torch.einsum("bchw,c->bhw", self.pyramid(x)[-1], self.head.weight[0]).relu()
        return cam / cam.amax(dim=(1, 2), keepdim=True).clamp_min(torch.finfo(cam.dtype).tiny)


class Decoder(nn.Module):
    """A plain U-Net decoder up to full resolution. A step: upsample, concatenate, twice convolution, norm, ReLU.

    `strides` and `channels` are of the input features, finest first; each stride is half of the next. `widths` are the
    channels of the steps, deepest first, the last one at stride 1.
    """

    def __init__(
        self, strides: Sequence[int], channels: Sequence[int], widths: Sequence[int], num_classes: int
    ) -> None:
        super().__init__()
        at = dict(zip(strides, channels, strict=True))
        self.strides = tuple(strides)
        self.steps = nn.ModuleDict()
        incoming, stride = channels[-1], strides[-1] // 2
        for outgoing in widths:
            self.steps[str(stride)] = _double_conv(incoming + at.get(stride, 0), outgoing)
            incoming, stride = outgoing, stride // 2
        self.head = nn.Conv2d(incoming, num_classes, kernel_size=3, padding=1)
        nn.init.xavier_uniform_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Features, finest first -> (B, K, H, W) logits at stride 1."""
        at = dict(zip(self.strides, features, strict=True))
        x = features[-1]
        for stride, step in self.steps.items():
            x = F.interpolate(x, scale_factor=2, mode="nearest")
            x = step(torch.cat([x, at[int(stride)]], dim=1) if int(stride) in at else x)
        return self.head(x)


class SksNet(nn.Module):
    """Both branches, their skips and the decoder: (B, 3, H, W) scaled images -> (B, K, H, W) logits.

    A frozen coarse branch is always in eval mode and has no gradient. Otherwise it is trained on the masks, from the
    second step on, since a new fusion passes no gradient to it, and no longer fits its head, which is not trained.

    With `cfg.veto`, in eval mode, an image whose calibrated probability of a lesion is below the threshold of the
    buffer `veto` has no pixel of the last class, the lesion (`kmine.training.veto` chooses them).
    """

    veto: Tensor | None
    """(3,) slope, offset and threshold, see `NO_VETO`; None without `cfg.veto`."""

    def __init__(self, fine: Pyramid, coarse: Pyramid, cfg: ModelConfig, num_classes: int) -> None:
        super().__init__()
        self.fine = fine
        self.coarse = CoarseBranch(coarse)
        self.feature_share, self.resolution = cfg.skip_feature_share, cfg.skip_resolution
        self.frozen = cfg.freeze_coarse
        levels = [n for n, stride in enumerate(fine.strides) if stride >= FIRST_STRIDE]
        # Only fusions whose output is used: with feature share alone the deepest level has no next stage.
        fused = levels if self.resolution else levels[:-1] if self.feature_share else []
        self.fusions = nn.ModuleDict({str(n): Fusion(fine.channels[n]) for n in fused})
        self.coarse_fusions = nn.ModuleDict({str(n): Fusion(fine.channels[n]) for n in levels if cfg.skip_coarse})
        self.num_guided = 1 + max(map(int, [*self.fusions, *self.coarse_fusions]), default=-1)
        self.depth = len(fine.strides) if cfg.veto else self.num_guided
        """Number of coarse stages that the segmentation uses; the others are run for the classifier only."""
        self.register_buffer("veto", torch.tensor(NO_VETO) if cfg.veto else None)
        decoder = NestedDecoder if cfg.decoder == "unetpp" else Decoder
        self.decoder = decoder(fine.strides, fine.channels, decoder_widths(cfg, fine.strides[-1]), num_classes)
        self.coarse.requires_grad_(not self.frozen)
        self.feature_cache: FeatureCache | None = None

    def train(self, mode: bool = True) -> SksNet:
        """See the class."""
        super().train(mode)
        if self.frozen:
            self.coarse.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        vetoing = self.veto is not None and not self.training
        coarse = self._coarse_features(x) if self.num_guided or vetoing else []
        features = []
        for n, stage in enumerate(self.fine.stages):
            own = stage(x)
            fused = self.fusions[str(n)](coarse[n], own) if str(n) in self.fusions else own
            x = fused if self.feature_share else own
            out = fused if self.resolution else own
            features.append(self.coarse_fusions[str(n)](coarse[n], out) if str(n) in self.coarse_fusions else out)
        logits = self.decoder(features)
        return self._vetoed(logits, self.coarse.logits(coarse[-1])) if vetoing else logits

    def _vetoed(self, logits: Tensor, of_lesion: Tensor) -> Tensor:
        slope, offset, threshold = self.veto
        is_vetoed = (slope * of_lesion.float() + offset).sigmoid() < threshold
        lesion = logits[:, -1:].masked_fill(is_vetoed[:, None, None, None], VETOED_LOGIT)
        return torch.cat([logits[:, :-1], lesion], dim=1)

    def _coarse_features(self, x: Tensor) -> list[Tensor]:
        cache = self.feature_cache
        if cache is not None and self.frozen and not (cache.augmented and self.training):
            return cache(x)
        with torch.no_grad() if self.frozen else nullcontext():
            return self.coarse.pyramid(x, self.depth)


class FeatureCache:
    """Coarse features of a frozen branch by image content; images pass it one at a time, so batches do not matter.

    A full cache takes no further images: as they come in turn, evicting the oldest would evict the next one needed.
    """

    def __init__(self, features: Callable[[Tensor], list[Tensor]], *, augmented: bool) -> None:
        self.features = features
        self.augmented = augmented
        """Whether training images differ at every step; then only images in eval mode are cached."""
        self.num_bytes = 0
        self.entries: dict[bytes, list[Tensor]] = {}

    def __call__(self, x: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> (B, C, h, w) of each level, finest first."""
        rows = [self._lookup(image[None]) for image in x]
        return [torch.cat(level) for level in zip(*rows, strict=True)]

    def _lookup(self, image: Tensor) -> list[Tensor]:
        # Contiguous: a slice of a batch may have other strides than the same image in a batch of one.
        content = image.contiguous().cpu().numpy().tobytes()
        mixed = torch.is_autocast_enabled(image.device.type)  # may differ between training and validation
        key = hashlib.blake2b(content + bytes([mixed]), digest_size=16).digest()
        if key in self.entries:
            return self.entries[key]
        # Tensors created in inference mode could not be used in training later.
        with torch.inference_mode(False), torch.no_grad():
            levels = self.features(image.clone())
        size = sum(level.nbytes for level in levels)
        if self.num_bytes + size <= FEATURE_CACHE_BYTES:
            self.entries[key], self.num_bytes = levels, self.num_bytes + size
        return levels


class Classifier(nn.Module):
    """The coarse branch as a separate network: (B, 3, H, W) images in [0, 255] -> (B,) logits of a lesion.

    Its weights are those of the model, so training it or loading weights into it changes the model.
    """

    def __init__(self, coarse: CoarseBranch, prepare: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.coarse = coarse
        self.prepare = prepare

    def encoders(self) -> list[nn.Module]:
        """The encoder, without the head."""
        return [self.coarse.pyramid]

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        return self.coarse(self.prepare(images))


class SksModel(LocalModel):
    """SKS on unscaled images of any size; they are padded for both branches, also for the classifier's pooling."""

    net: SksNet

    @property
    def uses_classifier(self) -> bool:
        """False if every skip and the veto are off: stage 1 has no effect on the segmentation then."""
        return self.net.depth > 0

    @property
    def classifier(self) -> Classifier:
        """The coarse branch as a separate network, for training and loading its weights."""
        return Classifier(self.net.coarse, self.prepare)

    def encoders(self) -> list[nn.Module]:
        """Both encoders."""
        return [self.net.fine, self.net.coarse.pyramid]

    @contextmanager
    def unfrozen(self) -> Iterator[Classifier]:
        """The classifier, trainable within the block; its frozen state is restored afterwards."""
        self.net.coarse.requires_grad_(True)
        try:
            yield self.classifier
        finally:
            self.net.coarse.requires_grad_(not self.net.frozen)
            self.net.train(self.net.training)

    @contextmanager
    def caching_features(self, *, augmented: bool) -> Iterator[None]:
        """Within the block each unchanged image passes the frozen coarse branch once.

        `augmented`: training images differ at every step. The classifier must not be trained within the block.
        """
        net = self.net
        net.feature_cache = FeatureCache(lambda x: net.coarse.pyramid(x, net.depth), augmented=augmented)
        try:
            yield
        finally:
            net.feature_cache = None

    @torch.no_grad()
    def activation_map(self, images: Tensor) -> Tensor:
        """Class activation map: (B, 3, H, W) in [0, 255] -> (B, H, W) in [0, 1], resized (bilinear) to the image.

        Scaled by the maximum of each image, so it shows a place but no confidence: that is the classifier's logit.
        """
        height, width = images.shape[-2:]
        x = self.prepare(images)
        cam = self.net.coarse.activation(x).float()[:, None]
        return F.interpolate(cam, size=x.shape[-2:], mode="bilinear", align_corners=False)[:, 0, :height, :width]


def build_sks(cfg: ModelConfig, num_classes: int) -> SksModel:
    """SKS of `cfg`; random weights are drawn from torch's generator, which `build_model` seeds.

    Raises:
        UserError: an encoder that timm lacks or that cannot be run stage by stage; weights as in `build_model`.
    """
    deepest = FIRST_STRIDE * 2 ** (cfg.levels - 1)
    with encoder_errors(cfg, f"model.levels {cfg.levels}"):
        fine, coarse = create_encoder(cfg.encoder), create_encoder(cfg.encoder)
    for encoder in (fine, coarse):
        load_encoder(encoder, cfg.encoder_weights, cfg.encoder)
    net = SksNet(Pyramid(fine, cfg.encoder, deepest), Pyramid(coarse, cfg.encoder, deepest), cfg, num_classes)
    return SksModel(net, num_classes, deepest, cfg.normalization)


def decoder_widths(cfg: ModelConfig, deepest: int) -> list[int]:
    """Channels of the decoder's steps above stride `deepest`, deepest first: as many as in U-Net and U-Net++."""
    return list(decoder_channels(cfg, [deepest >> n for n in range(1, deepest.bit_length())]))


def _double_conv(incoming: int, outgoing: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (incoming, outgoing):
        conv = nn.Conv2d(channels, outgoing, kernel_size=3, padding=1, bias=False)
        nn.init.kaiming_uniform_(conv.weight, mode="fan_in", nonlinearity="relu")
        layers += [conv, nn.BatchNorm2d(outgoing), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)
