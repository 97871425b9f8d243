"""SAM's prompt encoder and mask decoder: prompts in the image's frame to logits, for inference and fine-tuning.

The padded frame: the image's own (H, W), resized to the longest side E (1024; S = E / 4 for logits and mask inputs) by
the official `ResizeLongestSide`, padded below and on the right. B prompts are decoded at once, with M masks of each.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from segment_anything.modeling import MaskDecoder, Sam
from segment_anything.utils.transforms import ResizeLongestSide
from torch import Tensor

from kmine.segmenters.base import MASK_INPUT_CLIP, Embedding, check_prompts
from kmine.segmenters.sam.build import PROMPT_DIM
from kmine.segmenters.weights import load_adapted
from kmine.types import Prompts

STATE_PREFIX = "mask_decoder."
"""Of the keys of a state, as in a checkpoint of the whole SAM."""


@dataclass(frozen=True)
class DecoderQuery:
    """One row of a decoder batch: a prompt's box or one of its jittered boxes, with its points and mask input."""

    owner: int
    """Index of its `Prompts` in the image's list."""
    jittered: bool
    box: NDArray[np.float32] | None
    prompts: Prompts
    mask_input: Tensor | None
    """(1, S, S) in the padded frame."""

    @property
    def form(self) -> tuple[bool, int, bool]:
        """(has a box, number of points, has a mask input), equal for all rows of a batch."""
        coords = self.prompts.point_coords
        return self.box is not None, 0 if coords is None else len(coords), self.mask_input is not None


class PromptDecoder:
    """Decodes prompts on embeddings with the prompt encoder and the mask decoder of a SAM.

    Only the mask decoder's parameters get gradients.
    """

    def __init__(self, sam: Sam, name: str) -> None:
        """Wrap a model on its device; `name` is the segmenter's, for errors."""
        self.sam = sam
        self._name = name
        self._resize = ResizeLongestSide(sam.image_encoder.img_size)
        self._mask_input_side: int = sam.prompt_encoder.mask_input_size[0]

    @property
    def mask_decoder(self) -> MaskDecoder:
        """The trainable part."""
        return self.sam.mask_decoder

    def copy(self) -> PromptDecoder:
        """A decoder with its own mask decoder; image encoder and prompt encoder are shared."""
        sam = self.sam
        pixels = sam.pixel_mean.flatten().tolist(), sam.pixel_std.flatten().tolist()
        twin = Sam(sam.image_encoder, sam.prompt_encoder, copy.deepcopy(sam.mask_decoder), *pixels)
        return PromptDecoder(twin.to(sam.device).eval(), self._name)

    def state(self) -> dict[str, Tensor]:
        """Copies of the mask decoder's tensors on the CPU, named as in a checkpoint of the whole SAM."""
        tensors = self.mask_decoder.state_dict()
        return {f"{STATE_PREFIX}{key}": tensor.detach().to("cpu", copy=True) for key, tensor in tensors.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Replace the mask decoder's tensors by those of `state`; `ValueError` for those of another architecture."""
        # Keys without the prefix become names that loading refuses.
        own = {
            key.removeprefix(STATE_PREFIX) if key.startswith(STATE_PREFIX) else f"not {STATE_PREFIX}: {key}": tensor
            for key, tensor in state.items()
        }
        load_adapted(self.mask_decoder, own, f"the mask decoder of {self._name}")

    def features(self, embedding: Embedding) -> Tensor:
        """(1, 256, E/16, E/16) float32 on the device, also from float16; `ValueError` for those of another model."""
        expected = (PROMPT_DIM, *self.sam.prompt_encoder.image_embedding_size)
        actual = None if embedding.features is None else embedding.features.shape
        if actual != expected:
            raise ValueError(
                f"embedding: expected features {expected} of {self._name}, got {actual}; encode the image again"
            )
        return torch.from_numpy(embedding.features.astype(np.float32)).to(self.sam.device)[None]

    def queries(self, owner: int, prompts: Prompts, size: tuple[int, int]) -> Iterator[DecoderQuery]:
        """Rows of a `Prompts` on an image of `size` = (H, W): its own, then its jittered boxes; see `check_prompts`."""
        checked = check_prompts(prompts, size)
        mask_input = None if checked.mask_input is None else self.mask_input(checked.mask_input)
        for number, box in enumerate([checked.box, *checked.jittered_boxes]):
            yield DecoderQuery(owner, number > 0, box, checked, mask_input)

    def mask_input(self, logits: NDArray[np.float32]) -> Tensor:
        """(H, W) logits to (1, S, S): clipped, resized to the longest side S, padded with -`MASK_INPUT_CLIP`.

        The padding holds no object, so it is set to certain background, the output of a network trained on masks that
        are zero there. Zeros would mean p = 1/2 and make an edge at the image's border.
        """
        clipped = np.clip(logits, -MASK_INPUT_CLIP, MASK_INPUT_CLIP, dtype=np.float32)
        side, (height, width) = self._mask_input_side, self.unpadded(logits.shape)
        plane = torch.from_numpy(clipped).to(self.sam.device)[None, None]
        resized = F.interpolate(plane, (height, width), mode="bilinear", align_corners=False, antialias=True)
        return F.pad(resized, (0, side - width, 0, side - height), value=-MASK_INPUT_CLIP)[0]

    def unpadded(self, size: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of (S, S) logits that an image of `size` = (H, W) covers; the rest is padding."""
        height, width = self._resize.get_preprocess_shape(*size, self._mask_input_side)
        # The short side of an extremely long image would round to 0.
        return max(1, height), max(1, width)

    def low_res(
        self, features: Tensor, size: tuple[int, int], queries: Sequence[DecoderQuery], multimask: bool
    ) -> tuple[Tensor, Tensor]:
        """Decode a batch; the only place where boxes and points change frame.

        `features` are of one image of `size` = (H, W), `queries` of that image, equal in `form`. Returns (B, M, S, S)
        logits in the padded frame and (B, M) predicted IoU, not clipped; M is 3 with `multimask`, else 1.
        """
        sam, (has_box, num_points, has_mask_input) = self.sam, queries[0].form
        points = boxes = None
        if num_points:
            coords = self._resize.apply_coords(np.stack([query.prompts.point_coords for query in queries]), size)
            labels = np.stack([query.prompts.point_labels for query in queries])
            points = self._tensor(coords, torch.float32), self._tensor(labels, torch.int32)
        if has_box:
            moved = self._resize.apply_boxes(np.stack([query.box for query in queries]), size)
            boxes = self._tensor(moved, torch.float32)
        mask_inputs = torch.stack([query.mask_input for query in queries]) if has_mask_input else None
        # Copies share the prompt encoder, so it is not trained.
        with torch.no_grad():
            sparse, dense = sam.prompt_encoder(points=points, boxes=boxes, masks=mask_inputs)
            positions = sam.prompt_encoder.get_dense_pe()
        return sam.mask_decoder(
            image_embeddings=features,
            image_pe=positions,
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=multimask,
        )

    def upscaled(self, low_res: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, M, S, S) logits to (B, M, H, W) in the frame of an image of `size` = (H, W)."""
        input_size = self._resize.get_preprocess_shape(*size, self._resize.target_length)
        return self.sam.postprocess_masks(low_res, input_size, size)

    def _tensor(self, array: NDArray[np.generic], dtype: torch.dtype) -> Tensor:
        return torch.as_tensor(array, dtype=dtype, device=self.sam.device)
