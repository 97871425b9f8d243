"""Segment Anything as a segmenter: batched prompts, answers equal to the official predictor's.

`sam_embed.py` encodes, in batches and each image once; `sam_encoder.py` makes that fast. The mask decoder can be
adapted on embeddings at hand; `sam_train.py` holds the loss. `sam_auto.py` proposes masks unprompted.

Legend: H, W the image's own frame; E the side of the padded square that the encoder sees (1024); S = E / 4 the side of
the decoder's logits (256) and of a mask hint; B prompts decoded at once, M masks of each, P points.

Three frames: the image's own (H, W); the same resized so that its longest side is E (or S), by the official
`ResizeLongestSide`, which converts boxes and points, too; and that padded below and on the right to a square.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from segment_anything.modeling import MaskDecoder, Sam
from segment_anything.utils.transforms import ResizeLongestSide

from kmine.segmenters.base import (
    ADAPTED,
    Embedding,
    FineTuneDefaults,
    Proposals,
    check_images,
    check_logits,
    check_pairs,
    check_prompts,
    stability_from_logits,
)
from kmine.segmenters.embedding_cache import EmbeddingCache
from kmine.segmenters.sam.build import PROMPT_DIM, build_sam
from kmine.segmenters.sam.embedder import Embedder, update
from kmine.segmenters.sam.finetune import DECODER, SamFineTuner
from kmine.segmenters.sam.proposals import propose
from kmine.types import Candidate, Prompts

__all__ = ["SamSegmenter", "build_sam"]

MASK_INPUT_CLIP = 7.0
"""Hints are clipped to +- this: about the range of SAM's own logits; sigmoid(7) is 0.999."""
MAX_LOGITS = 2**27
"""Floats of upscaled logits held at once (0.5 GB): bounds how many prompts share a decoder batch."""
MAX_QUERIES = 64
"""Prompts in one decoder batch at most."""
CPU_FLOATS = 2**23
"""On a CPU, the decoder's widest tensor stays below this (32 MB), which the C library keeps for the next one. Larger
ones come from the kernel page by page: twelve prompts at a time took 28 % longer than three at 1024 px."""


@dataclass(frozen=True)
class DecoderQuery:
    """One line of a decoder batch: a prompt's own box, or one of its jittered boxes, with the same points and hint."""

    owner: int
    """Index of its `Prompts` in the image's list."""
    jittered: bool
    box: NDArray[np.float32] | None
    prompts: Prompts
    mask_input: torch.Tensor | None
    """(1, S, S) in the padded frame."""

    @property
    def form(self) -> tuple[bool, int, bool]:
        """What must be equal within a batch: has a box, number of points, has a hint."""
        coords = self.prompts.point_coords
        return self.box is not None, 0 if coords is None else len(coords), self.mask_input is not None


@dataclass(frozen=True)
class _DecoderOutput:
    masks: NDArray[np.bool_]  # (M, H, W)
    predicted_iou: NDArray[np.float32]  # (M,), as SAM gives it
    stability: NDArray[np.float32]  # (M,); NaN for a jittered box, whose stability nobody asks for
    low_res: NDArray[np.float32]  # (M, S, S)


class SamSegmenter:
    """A `Segmenter` around one SAM, which it owns from then on: its weights must not change any more.

    `FineTunable`: a twin with a decoder of its own learns, encoder and prompt encoder are shared and stay as they are.
    """

    # The decoder of any SAM, forwards and back, takes 0.2 s a lesson at 1024 px on one CPU core: 200 steps of 4 take
    # 3 minutes, less than the encoder takes for 10 images there. Rate: published fine-tunings of SAM's decoder take
    # from 1e-4 (MedSAM, Ma et al. 2024, with the encoder) down to 1e-5; so few steps want the upper end.
    fine_tune_defaults: FineTuneDefaults = FineTuneDefaults(steps=200, batch_size=4, lr=1e-4)

    def __init__(
        self,
        sam: Sam,
        *,
        name: str,
        device: str = "cpu",
        batch_size: int = 4,
        multimask: bool | None = None,
        cache: EmbeddingCache | None = None,
        dtype: str = "float32",
        log: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Takes a model to a device.

        Args:
            sam: from `build_sam`.
            name: as tables name it.
            device: a torch device.
            batch_size: images per forward pass of the encoder; halved, once and for all, where a GPU's memory is too
                small for it.
            multimask: three masks per prompt (True) or one (False). None: three for a lone point, which may mean a part
                as well as the whole, and one for a box, a hint or several points.
            cache: of embeddings; None encodes every time.
            dtype: float32 or float16, to which embeddings are rounded, cached or not.
            log: is told what the user should know.
        """
        self.name = name
        self._sam = sam.to(device).eval()
        self._embedder = Embedder(self._sam, batch_size=batch_size, cache=cache, dtype=dtype, log=log)
        self._multimask = multimask
        self._resize = ResizeLongestSide(sam.image_encoder.img_size)
        self._mask_input_side: int = sam.prompt_encoder.mask_input_size[0]

    @cached_property
    def signature(self) -> str:
        """sha256 over every parameter and buffer and the image size; the same for the same weights in another file."""
        digest = hashlib.sha256(f"sam {self._sam.image_encoder.img_size}".encode())
        update(digest, self._sam.state_dict())
        return digest.hexdigest()

    def encode(self, images: Sequence[NDArray[np.uint8]]) -> list[Embedding]:
        """Embeds (H, W, 3) uint8 RGB images of any sizes; those in the cache are read, the others go in batches.

        Returns:
            Per image, features (256, E/16, E/16) float32 on the CPU.

        Raises:
            ValueError: an image is not (H, W, 3) uint8.
            UserError: the GPU's memory does not take a single image.
        """
        check_images(images)
        made = self._embedder.features(images)
        return [
            Embedding((image.shape[0], image.shape[1]), features) for image, features in zip(images, made, strict=True)
        ]

    @torch.inference_mode()
    def decode(self, embeddings: Sequence[Embedding], prompts: Sequence[Sequence[Prompts]]) -> list[list[Candidate]]:
        """Answers the prompts of each image; those of one form share a batch of the decoder, jittered boxes included.

        Masks are the logits upscaled to (H, W) as in `Sam.postprocess_masks`, above 0. `predicted_iou` is SAM's own,
        clipped to [0, 1], which its regression may leave. `stability_score` is taken on the upscaled logits, as in the
        official automatic mask generator. `low_res_logits` are (M, S, S) in the padded frame.

        Raises:
            ValueError: features of another model, or prompts that do not fit their image.
        """
        check_pairs(embeddings, prompts)
        return [
            self._decode_image(embedding, of_image) for embedding, of_image in zip(embeddings, prompts, strict=True)
        ]

    @torch.inference_mode()
    def propose(self, embeddings: Sequence[Embedding]) -> Iterator[Proposals]:
        """What SAM's own automatic mask generator finds, on embeddings that are there; see `sam_auto`.

        Raises:
            ValueError: features of another model.
        """
        for embedding in embeddings:
            at_once = self._queries_at_once(embedding.size, 3)
            yield propose(self._sam, self.features(embedding), embedding.size, points_at_once=at_once)

    def fine_tuner(self) -> SamFineTuner:
        """A twin to teach, with a copy of the mask decoder; see `SamFineTuner`."""
        return SamFineTuner(self._with_decoder(copy.deepcopy(self.decoder), self.name))

    def with_weights(self, state: Mapping[str, torch.Tensor]) -> SamSegmenter:
        """This segmenter with the decoder of a `SamTrainee.state`; everything else is shared, not copied.

        Raises:
            ValueError: tensors of another architecture.
        """
        decoder = copy.deepcopy(self.decoder)
        try:
            decoder.load_state_dict({_bare(key): tensor for key, tensor in state.items()})
        except RuntimeError as error:
            reasons = " ".join(str(error).split())[:400]
            raise ValueError(
                f"expected the mask decoder of {self.name}, got tensors that do not fit: {reasons}; adapt this one anew"
            ) from error
        return self._with_decoder(decoder, self.name.removesuffix(ADAPTED) + ADAPTED)

    def _with_decoder(self, decoder: MaskDecoder, name: str) -> SamSegmenter:
        sam = self._sam
        pixels = (sam.pixel_mean.flatten().tolist(), sam.pixel_std.flatten().tolist())
        segmenter = SamSegmenter(
            Sam(sam.image_encoder, sam.prompt_encoder, decoder, *pixels),
            name=name,
            device=str(sam.device),
            multimask=self._multimask,
        )
        segmenter._embedder = self._embedder  # one encoder, one cache
        return segmenter

    @property
    def decoder(self) -> MaskDecoder:
        """The part that a trainee learns."""
        return self._sam.mask_decoder

    def _decode_image(self, embedding: Embedding, prompts: Sequence[Prompts]) -> list[Candidate]:
        queries = [
            query for owner, prompt in enumerate(prompts) for query in self.queries(owner, prompt, embedding.size)
        ]
        outputs: list[tuple[DecoderQuery, _DecoderOutput]] = []
        features = self.features(embedding) if queries else None
        for form in dict.fromkeys(query.form for query in queries):
            same_form = [query for query in queries if query.form == form]
            multimask = self._multimask if self._multimask is not None else form == (False, 1, False)
            step = self._queries_at_once(embedding.size, 3 if multimask else 1)
            for start in range(0, len(same_form), step):
                batch = same_form[start : start + step]
                outputs += zip(batch, self._decode_batch(features, embedding.size, batch, multimask), strict=True)
        return [_candidate([pair for pair in outputs if pair[0].owner == owner]) for owner in range(len(prompts))]

    def _queries_at_once(self, size: tuple[int, int], num_masks: int) -> int:
        """How many rows may share a batch, so that upscaled logits stay below `MAX_LOGITS`, and see `CPU_FLOATS`."""
        square = self._resize.target_length**2
        count = min(MAX_QUERIES, MAX_LOGITS // (max(size[0] * size[1], square) * num_masks))
        if self._sam.device.type == "cpu":
            # 32 channels at a quarter of E: 2 E^2 floats a row.
            count = min(count, (CPU_FLOATS - 1) // (2 * square))
        return max(1, count)

    def features(self, embedding: Embedding) -> torch.Tensor:
        """(1, 256, E/16, E/16) float32 on the device, as the decoder takes them; a cache may hold float16.

        Raises:
            ValueError: features of another model.
        """
        expected = (PROMPT_DIM, *self._sam.prompt_encoder.image_embedding_size)
        if embedding.features is None or embedding.features.shape != expected:
            actual = None if embedding.features is None else embedding.features.shape
            raise ValueError(
                f"embedding: expected features {expected} of {self.name}, got {actual}; encode the image again"
            )
        return torch.from_numpy(embedding.features.astype(np.float32)).to(self._sam.device)[None]

    def queries(self, owner: int, prompts: Prompts, size: tuple[int, int]) -> Iterator[DecoderQuery]:
        """What `Prompts` ask of the decoder: its own row first, then one per jittered box; `size` is (H, W).

        Raises:
            ValueError: prompts that do not fit their image, see `check_prompts`.
        """
        checked = check_prompts(prompts, size)
        mask_input = None if checked.mask_input is None else self._mask_input(checked.mask_input)
        yield DecoderQuery(owner, False, checked.box, checked, mask_input)
        for box in checked.jittered_boxes:
            yield DecoderQuery(owner, True, box, checked, mask_input)

    def _mask_input(self, logits: NDArray[np.float32]) -> torch.Tensor:
        """(H, W) logits to (1, S, S): clipped, resized to the longest side S, padded with -HINT_LIMIT.

        The padding holds no object, so it says "surely background", as a network trained on masks that are zero there
        answers itself. Zeros would say "undecided" and put an edge where the image ends.
        """
        clipped = np.clip(logits, -MASK_INPUT_CLIP, MASK_INPUT_CLIP, dtype=np.float32)
        side, (height, width) = self._mask_input_side, self.unpadded(logits.shape)
        resized = torch.nn.functional.interpolate(
            torch.from_numpy(clipped).to(self._sam.device)[None, None],
            (height, width),
            mode="bilinear",
            align_corners=False,
            antialias=True,
        )
        return torch.nn.functional.pad(resized, (0, side - width, 0, side - height), value=-MASK_INPUT_CLIP)[0]

    def unpadded(self, size: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) that an image of `size` = (H, W) takes of (S, S) logits and hints; the rest is padding."""
        height, width = self._resize.get_preprocess_shape(*size, self._mask_input_side)
        # An extremely long image would round to no rows at all.
        return max(1, height), max(1, width)

    def low_res(
        self, features: torch.Tensor, size: tuple[int, int], queries: Sequence[DecoderQuery], multimask: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Decodes rows of one form in one batch; the only place where boxes and points change frame.

        Args:
            features: of one image, see `features`.
            size: its (H, W).
            queries: of that image, equal in `form`.
            multimask: M = 3 instead of 1.

        Returns:
            (B, M, S, S) logits in the padded frame and (B, M) predicted IoU as SAM gives it. The decoder's parameters
            alone get gradients.
        """
        sam, (has_box, num_points, has_mask_input) = self._sam, queries[0].form
        points = boxes = None
        if num_points:
            coords = self._resize.apply_coords(np.stack([query.prompts.point_coords for query in queries]), size)
            labels = np.stack([query.prompts.point_labels for query in queries])
            points = (self._tensor(coords, torch.float32), self._tensor(labels, torch.int32))
        if has_box:
            boxes = self._tensor(
                self._resize.apply_boxes(np.stack([query.box for query in queries]), size), torch.float32
            )
        mask_inputs = torch.stack([query.mask_input for query in queries]) if has_mask_input else None
        # Twins share the prompt encoder, so none of them may teach it.
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

    def upscaled(self, low_res: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """(B, M, S, S) logits in the image's own frame, (B, M, H, W), for `size` = (H, W)."""
        input_size = self._resize.get_preprocess_shape(*size, self._resize.target_length)
        return self._sam.postprocess_masks(low_res, input_size, size)

    def _decode_batch(
        self, features: torch.Tensor, size: tuple[int, int], queries: Sequence[DecoderQuery], multimask: bool
    ) -> list[_DecoderOutput]:
        low_res, iou = self.low_res(features, size, queries, multimask)
        check_logits(bool(torch.isfinite(low_res).all() and torch.isfinite(iou).all()), self.name)
        logits, threshold = self.upscaled(low_res, size), self._sam.mask_threshold
        return [
            _DecoderOutput(
                masks=(logits[i] > threshold).cpu().numpy(),
                predicted_iou=iou[i].cpu().numpy(),
                stability=np.full(len(iou[i]), np.nan, np.float32)
                if query.jittered
                else stability_from_logits(logits[i].cpu().numpy(), threshold),
                low_res=low_res[i].cpu().numpy().copy(),
            )
            for i, query in enumerate(queries)
        ]

    def _tensor(self, array: NDArray[np.generic], dtype: torch.dtype) -> torch.Tensor:
        return torch.as_tensor(array, dtype=dtype, device=self._sam.device)


def _bare(key: str) -> str:
    """A trainee's key as the decoder names it; others are left as they are, which loading then refuses."""
    return key.removeprefix(DECODER) if key.startswith(DECODER) else f"not {DECODER}: {key}"


def _candidate(outputs: Sequence[tuple[DecoderQuery, _DecoderOutput]]) -> Candidate:
    """The answers to one `Prompts`, its own first and then its jittered boxes in order."""
    (_, own), *rest = outputs
    best = [output.masks[int(output.predicted_iou.argmax())] for _, output in rest]
    return Candidate(
        masks=own.masks,
        predicted_iou=own.predicted_iou.clip(0, 1),
        stability_score=own.stability,
        low_res_logits=own.low_res,
        jittered_masks=np.stack(best) if best else np.zeros((0, *own.masks.shape[1:]), np.bool_),
    )
