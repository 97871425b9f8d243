"""A timm encoder taken apart into stages, so that something can be done between one stage and the next.

timm's `features_only` encoders hand out the features of all levels at once. Two kinds of them are plain chains of
modules and can be walked stage by stage: those that timm wraps itself (Swin, Swin-v2, ResNet, ConvNeXt, PVT-v2, RegNet,
...) and the EfficientNet and MobileNet families. Every other one is refused.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from kmine.errors import UserError

EXAMPLE_ENCODERS = "swinv2_tiny_window8_256, mobilenetv2_050, mobilenetv3_small_050, resnet18, convnext_atto"
"""Named in errors."""
_PROBE = 64
"""Pixels of the image that a new pyramid is tried on."""


class Stage(nn.Module):
    """The modules between one level of features and the next; (B, C, H, W) in and out, whatever lies between.

    Swin-v2 looks through windows. Their side w is the encoder's own (8 patches in `swinv2_tiny_window8_256`) at every
    input size, and where the grid of a level is smaller, that of the grid: then one window sees everything and is not
    shifted. timm fixes both for the size an encoder was made for; here they follow the input. At 256 px the grids are
    64, 32, 16 and 8: four levels of windows of 8, the last a single one. At 512 px they are 128, 64, 32 and 16: windows
    stay 8 (timm's own `set_input_size` would double them, at four times the cost a patch, and stretch the learnt
    position bias), so the last level is now four windows, shifted in every second block, each seeing 256 px. Below
    256 px the deepest windows shrink (128 px: 4) and a learnt position bias is squeezed into them; grids that w does
    not divide are padded by timm.
    """

    def __init__(self, modules: list[nn.Module], window: int, nhwc_in: bool, nhwc_out: bool) -> None:
        super().__init__()
        self.parts = nn.ModuleList(modules)
        self.window = window
        self.nhwc_in = nhwc_in
        self.nhwc_out = nhwc_out

    def forward(self, x: Tensor) -> Tensor:
        """Features of the level above (or the image) -> features of this level."""
        if self.nhwc_in:
            x = x.permute(0, 2, 3, 1)
        for module in self.parts:
            if self.window and hasattr(module, "set_input_size") and hasattr(module, "input_resolution"):
                self._fit_windows(module, tuple(x.shape[1:3]))
            x = module(x)
        return x.permute(0, 3, 1, 2) if self.nhwc_out else x

    def _fit_windows(self, module: nn.Module, grid: tuple[int, int]) -> None:
        if tuple(module.input_resolution) != grid:
            # The tables made here must be fit for a later training, even where this is a prediction.
            with torch.inference_mode(False), torch.no_grad():
                module.set_input_size(feat_size=grid, window_size=self.window)


class Pyramid(nn.Module):
    """The stages of an encoder down to its deepest level at stride `strides[-1]`; what lies below is dropped.

    Args:
        encoder: of `timm.create_model(..., features_only=True)`.
        name: of it, for errors.
        deepest: stride of the deepest level wanted.

    Raises:
        UserError: it is no chain of stages, has no level of that stride, or does not take images of any size.
    """

    def __init__(self, encoder: nn.Module, name: str, deepest: int) -> None:
        super().__init__()
        groups = list(_groups(encoder, name))
        strides, channels = encoder.feature_info.reduction(), encoder.feature_info.channels()
        if deepest not in strides:
            raise UserError(
                f"model.encoder {name!r} has features at strides {', '.join(map(str, strides))}, none at {deepest}; "
                f"lower model.levels or take another encoder, such as {EXAMPLE_ENCODERS}"
            )
        count = strides.index(deepest) + 1
        self.strides = tuple(strides[:count])
        """Pixels per feature, level by level."""
        self.channels = tuple(channels[:count])
        nhwc = str(getattr(encoder, "output_fmt", "NCHW")).endswith("NHWC")
        window = _window(encoder)
        self.stages = nn.ModuleList(
            Stage(modules, window, nhwc_in=nhwc and n > 0, nhwc_out=nhwc) for n, modules in enumerate(groups[:count])
        )
        self._try_out(encoder, name)

    def forward(self, x: Tensor, depth: int | None = None) -> list[Tensor]:
        """(B, 3, H, W) -> (B, C, H / stride, W / stride) of every level, or the first `depth`, the finest first."""
        features = []
        for stage in list(self.stages)[:depth]:
            x = stage(x)
            features.append(x)
        return features

    def _try_out(self, encoder: nn.Module, name: str) -> None:
        """Walked by stages, the encoder must say what it says when run whole."""
        training = encoder.training
        encoder.eval()
        self.eval()
        try:
            with torch.no_grad():
                image = torch.linspace(-1, 1, 3 * _PROBE * _PROBE).view(1, 3, _PROBE, _PROBE)
                staged, whole = self(image), encoder(image)
        except (RuntimeError, ValueError, AssertionError, TypeError, AttributeError) as error:
            raise UserError(
                f"model.encoder {name!r} does not take an image of {_PROBE} x {_PROBE} stage by stage ({error}); "
                f"encoders that do: {EXAMPLE_ENCODERS}"
            ) from error
        finally:
            encoder.train(training)
            self.train(training)
        for actual, expected, channels, stride in zip(staged, whole, self.channels, self.strides, strict=False):
            expected = expected.permute(0, 3, 1, 2) if self.stages[-1].nhwc_out else expected
            if actual.shape != (1, channels, _PROBE // stride, _PROBE // stride) or not torch.equal(actual, expected):
                raise UserError(
                    f"model.encoder {name!r} cannot be run stage by stage: its features come out differently; "
                    f"encoders that can: {EXAMPLE_ENCODERS}"
                )


def create_encoder(name: str, pretrained: bool) -> nn.Module:
    """The timm encoder `name` (`tu-` in front or not), all its levels, with random or ImageNet (downloaded) weights.

    Raises:
        UserError: timm has no such model.
    """
    import timm

    name = name.removeprefix("tu-")
    if not timm.is_model(name):
        by_plain_name = {encoder_name.replace("_", ""): encoder_name for encoder_name in timm.list_models()}
        near = difflib.get_close_matches(name.replace("_", ""), by_plain_name, n=1)
        suggestion = f"did you mean {by_plain_name[near[0]]}? " if near else ""
        raise UserError(
            f"model.encoder: timm has no {name!r}; {suggestion}Encoders that work, among others: {EXAMPLE_ENCODERS}"
        )
    any_size = {"strict_img_size": False} if name.startswith("swin") else {}
    return timm.create_model(name, pretrained=pretrained, features_only=True, **any_size)


def _groups(encoder: nn.Module, name: str) -> Iterator[list[nn.Module]]:
    """The modules of each stage, in the order in which they run."""
    from timm.models import FeatureListNet

    if type(encoder) is FeatureListNet and not encoder.concat:
        chain = [(module, key in encoder.return_layers) for key, module in encoder.items()]
    elif hasattr(encoder, "_stage_out_idx") and getattr(encoder, "feature_hooks", 0) is None:
        taps = encoder._stage_out_idx
        stem = [m for n in ("conv_stem", "bn1", "act1") if (m := getattr(encoder, n, None)) is not None]
        chain = [(module, 0 in taps and module is stem[-1]) for module in stem]
        chain += [(block, n in taps) for n, block in enumerate(encoder.blocks, start=1)]
    else:
        raise UserError(
            f"model.encoder {name!r} cannot be run stage by stage ({type(encoder).__name__}); "
            f"encoders that can: {EXAMPLE_ENCODERS}, and others of their families"
        )
    modules: list[nn.Module] = []
    for module, is_level in chain:
        modules.append(module)
        if is_level:
            yield modules
            modules = []


def _window(encoder: nn.Module) -> int:
    """Side of Swin-v2's attention windows, in patches; 0 for encoders without, or whose windows cannot change."""
    from timm.models.swin_transformer_v2 import SwinTransformerV2Block

    return max((m.window_size[0] for m in encoder.modules() if isinstance(m, SwinTransformerV2Block)), default=0)
