"""The memory of SAM 2's video model: masks recalled in images from other images with masks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from kmine.errors import UserError
from kmine.segmenters.hf.segmenter import HfModel, HfSegmenter
from kmine.segmenters.weights import update_digest
from kmine.types import Bool

OBJECT = 1
"""Id of the one object of a session."""
REMEMBERED = 16
"""Images from which SAM 2 takes pointers to the object; fewer of them also as maps."""


class HfMemorySegmenter(HfSegmenter):
    """A `MemorySegmenter` of the SAM 2 family; the memory is loaded when it is first asked.

    Args:
        model, name, encoding: see `HfSegmenter`.
        folder: the model's files.
    """

    def __init__(self, model: HfModel, name: str, folder: Path, **encoding: Any) -> None:
        super().__init__(model, name, **encoding)
        self._model, self._folder = model, folder

    def sign_memory(self) -> str:
        """See `MemorySegmenter.sign_memory`."""
        digest = hashlib.sha256(self.signature.encode())
        update_digest(digest, self._video.state_dict())
        return digest.hexdigest()

    @torch.inference_mode()
    def recall(
        self,
        memory: Sequence[tuple[NDArray[np.uint8], Bool]],
        frames: Iterable[NDArray[np.uint8]],
        *,
        track: bool,
    ) -> Iterator[Bool]:
        """See `MemorySegmenter.recall`."""
        from transformers import Sam2VideoInferenceSession

        places = ("inference_device", "inference_state_device", "video_storage_device")
        session = Sam2VideoInferenceSession(dtype=torch.float32, **dict.fromkeys(places, self._device))
        index, side = session.obj_id_to_idx(OBJECT), self._model.frame.side
        for number, (image, mask) in enumerate(memory):
            shown = torch.from_numpy(mask)[None, None].float()
            shown = F.interpolate(shown, (side, side), mode="bilinear", antialias=True) >= 0.5
            session.add_mask_inputs(index, number, shown)
            session.obj_with_new_inputs = [OBJECT]
            self._show(session, number, image)
        tracked = session.output_dict_per_obj[index]["non_cond_frame_outputs"]
        for offset, image in enumerate(frames):
            number = len(memory) + offset * track
            logits = self._show(session, number, image, run_mem_encoder=track)
            yield (F.interpolate(logits, image.shape[:2], mode="bilinear") > 0)[0, 0].cpu().numpy()
            tracked.pop(number - REMEMBERED if track else number, None)

    def _show(self, session: Any, number: int, image: NDArray[np.uint8], **settings: Any) -> Tensor:
        """(1, 1, h, w) logits of the object in an image, which takes the place of the one shown before."""
        session.cache.clear_all()
        session.processed_frames = None
        return self._video(session, frame_idx=number, frame=self._model.pixels([image]), **settings).pred_masks

    @property
    def _device(self) -> torch.device:
        return self._model.network.device

    @cached_property
    def _video(self) -> Any:
        from transformers import Sam2VideoModel

        settings = {"local_files_only": True, "output_loading_info": True, "dtype": torch.float32}
        network, info = Sam2VideoModel.from_pretrained(self._folder, **settings)
        if lacking := sorted(info["missing_keys"]):
            raise UserError(
                f"{self._folder}: prompts.source memory expects the weights of SAM 2's video model, {len(lacking)} are "
                f"missing, such as {lacking[0]}; download a whole checkpoint of SAM 2.1, or set --prompts.source local"
            )
        return network.to(self._device).eval()
