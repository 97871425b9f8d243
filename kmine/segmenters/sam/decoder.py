"""SAM's prompt encoder and mask decoder: prompts in the image's frame to logits, for inference and fine-tuning.

B prompts are decoded at once, with M masks of each; `SquareFrame` has E and S.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from segment_anything.modeling import MaskDecoder, Sam
from torch import Tensor

from kmine.segmenters.base import Embedding
from kmine.segmenters.batched import DecoderQuery, QueryDecoder
from kmine.segmenters.sam.build import PROMPT_DIM, Feed, feed_of
from kmine.segmenters.weights import load_adapted

STATE_PREFIX = "mask_decoder."
"""Of the keys of a state, as in a checkpoint of the whole SAM."""


class PromptDecoder(QueryDecoder):
    """Decodes prompts on embeddings with the prompt encoder and the mask decoder of a SAM.

    Only the mask decoder's parameters get gradients.
    """

    mask_threshold = Sam.mask_threshold

    def __init__(self, sam: Sam, name: str, feed: Feed | None = None) -> None:
        """Wrap a model on its device; `name` is the segmenter's, for errors, `feed` that of its embedder."""
        self.sam = sam
        self._name = name
        self._feed = feed or feed_of("", sam.image_encoder.img_size)
        super().__init__(self._feed.frame, sam.prompt_encoder.mask_input_size[0], self._feed.abilities)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.sam.device

    @property
    def mask_decoder(self) -> MaskDecoder:
        """The trainable part."""
        return self.sam.mask_decoder

    def copy(self) -> PromptDecoder:
        """A decoder with its own mask decoder; image encoder and prompt encoder are shared."""
        sam = self.sam
        pixels = sam.pixel_mean.flatten().tolist(), sam.pixel_std.flatten().tolist()
        twin = Sam(sam.image_encoder, sam.prompt_encoder, copy.deepcopy(sam.mask_decoder), *pixels)
        return PromptDecoder(twin.to(sam.device).eval(), self._name, self._feed)

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
        return torch.tensor(embedding.features, device=self.sam.device).float()[None]

    def low_res(
        self, features: Tensor, size: tuple[int, int], queries: Sequence[DecoderQuery], multimask: bool
    ) -> tuple[Tensor, Tensor]:
        """Decode a batch: (B, M, S, S) logits in the frame and (B, M) predicted IoU, not clipped.

        `features` are of one image of `size` = (H, W), `queries` of that image, equal in `form`; M is 3 with
        `multimask`, else 1.
        """
        sam, (points, labels, boxes, masks) = self.sam, self.framed(queries, size)
        # Copies share the prompt encoder, so it is not trained.
        with torch.no_grad():
            pair = None if points is None else (points, labels)
            sparse, dense = sam.prompt_encoder(points=pair, boxes=boxes, masks=masks)
            positions = sam.prompt_encoder.get_dense_pe()
        return sam.mask_decoder(
            image_embeddings=features,
            image_pe=positions,
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=multimask,
        )
