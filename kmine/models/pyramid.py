"""A timm encoder split into stages, so that features can be changed between one stage and the next.

Works for encoders that timm's `FeatureListNet` wraps (Swin, ResNet, ConvNeXt, ...), EfficientNets and MobileNets.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from kmine.errors import UserError

EXAMPLE_ENCODERS = "swinv2_tiny_window8_256, mobilenetv2_050, mobilenetv3_small_050, resnet18, convnext_atto"
"""Listed in error messages."""
_PROBE = 64
"""Side in pixels of the image on which a new pyramid is verified."""


class Stage(nn.Module):
    """The modules between one level of features and the next; (B, C, H, W) in and out.

    Swin-v2's attention windows keep the encoder's side w (8 patches in `swinv2_tiny_window8_256`) at every input size:
    timm's own `set_input_size` would double them from 256 to 512 px, at four times the cost per patch and with an
    interpolated position bias. A level with a smaller grid (the deepest below 256 px) has a single window of that size,
    not shifted, with an interpolated bias. timm pads grids that are no multiple of w.
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
            # Tensors created in inference mode could not be used in a later training.
            with torch.inference_mode(False), torch.no_grad():
                module.set_input_size(feat_size=grid, window_size=self.window)


class Pyramid(nn.Module):
    """The stages of an encoder down to the level of stride `deepest`; deeper stages are dropped.

    `encoder` is one of `timm.create_model(..., features_only=True)`, `name` its name, for error messages.

    Raises:
        UserError: the encoder is no chain of stages, has no level of that stride, or needs images of a fixed size.
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
        nhwc, window = str(getattr(encoder, "output_fmt", "NCHW")).endswith("NHWC"), _window(encoder)
        self.stages = nn.ModuleList(
            Stage(modules, window, nhwc_in=nhwc and n > 0, nhwc_out=nhwc) for n, modules in enumerate(groups[:count])
        )
        self._verify(encoder, name)

    def forward(self, x: Tensor, depth: int | None = None) -> list[Tensor]:
        """(B, 3, H, W) -> (B, C, H / stride, W / stride) of each level, finest first; of the first `depth` if given."""
        features = []
        for stage in list(self.stages)[:depth]:
            x = stage(x)
            features.append(x)
        return features

    def _verify(self, encoder: nn.Module, name: str) -> None:
        """Raise `UserError` unless the stages give exactly the features of the whole encoder."""
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
                    f"model.encoder {name!r} cannot be run stage by stage: its features would differ; "
                    f"encoders that can: {EXAMPLE_ENCODERS}"
                )


def create_encoder(name: str) -> nn.Module:
    """The timm encoder `name` (with or without the prefix tu-), with random weights.

    Raises:
        UserError: timm has no such model; the nearest name is suggested.
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
    return timm.create_model(name, pretrained=False, features_only=True, **any_size)


def _groups(encoder: nn.Module, name: str) -> Iterator[list[nn.Module]]:
    """Modules of each stage, in order of execution."""
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
    """Side of Swin-v2's attention windows in patches; 0 for encoders without windows or with fixed ones."""
    from timm.models.swin_transformer_v2 import SwinTransformerV2Block

    return max((m.window_size[0] for m in encoder.modules() if isinstance(m, SwinTransformerV2Block)), default=0)
