"""What the sections of the GPU benchmark share: results, timing, images and models."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from segment_anything.modeling import Sam

    from kmine.config import DataConfig
    from kmine.data.pool import Pool
    from kmine.types import Prompts, Sample

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests")]
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# torch.cuda.is_available() must not start CUDA in the parent process, or no forked section could use it.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

SMALL_ENCODER = "tu-mobilenetv3_small_050"
"""Of the rehearsal's local models."""


@dataclass
class Kit:
    """Arguments of every section."""

    device: str
    tiny: bool
    """Smallest sizes, for a rehearsal on a CPU."""
    out: Path
    """Folder for results."""
    work: Path
    """Folder for everything else."""
    data: Path | None
    """Folder with Kvasir-SEG/ and mobilenet_v2_imagenet.safetensors; None: procedural images."""
    ends: float
    """Epoch second at which the section is stopped."""
    section: str = ""

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def encoder_weights(self) -> Path | None:
        """ImageNet weights of MobileNetV2, if there are any."""
        path = self.data / "mobilenet_v2_imagenet.safetensors" if self.data else None
        return path if path and path.is_file() and not self.tiny else None

    def left(self) -> float:
        """Seconds until the section is stopped."""
        return self.ends - time.time()

    def put(self, name: str, value: Any, unit: str = "", predicted: Any = "", note: str = "") -> None:
        """Append a figure to OUT/results.jsonl and print it."""
        row = {"section": self.section, "name": name, "value": value, "unit": unit, "predicted": predicted}
        with (self.out / "results.jsonl").open("a") as file:
            file.write(json.dumps({**row, "note": note}, default=str) + "\n")
        shown = f"{value:.4g}" if isinstance(value, float) else value
        more = (f"  [predicted {predicted}]" if predicted != "" else "") + (f"  {note}" if note else "")
        print(f"{self.section:8} {name:58} {shown} {unit}{more}", flush=True)

    def verdict(self, name: str, good: bool, note: str) -> None:
        """Append the result of a comparison."""
        self.put(name, "PASS" if good else "FAIL", note=note)

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """A block whose failure is a row and does not end the section."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.put(name, "ERROR", note=one_line(error))

    def wait(self) -> None:
        """Wait until the device is idle."""
        import torch

        if self.on_gpu:
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], Any], repeats: int = 3, warm: int = 1) -> float:
        """Median seconds of `work` on the device, after `warm` calls without a clock."""
        for _ in range(warm):
            work()
        took = []
        for _ in range(repeats):
            self.wait()
            began = time.perf_counter()
            work()
            self.wait()
            took.append(time.perf_counter() - began)
        return statistics.median(took)

    def peak_gb(self) -> float:
        """Peak of allocated GPU memory since the last call, in GiB; 0 on a CPU."""
        import torch

        if not self.on_gpu:
            return 0.0
        peak = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.reset_peak_memory_stats()
        return peak


def one_line(error: BaseException) -> str:
    """Class and message of an error."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def source_config(kit: Kit, size: int, count: int = 64) -> DataConfig:
    """Kvasir-SEG if it is there, else `count` procedural images."""
    from kmine.config import DataConfig

    if kit.data and (kit.data / "Kvasir-SEG").is_dir():
        return DataConfig(name="kvasir_seg", root=str(kit.data), size=size, cache_dir=str(kit.work / "cache"))
    return DataConfig(num_samples=count, size=size, cache_dir=str(kit.work / "cache"))


def open_pool(kit: Kit, size: int, count: int = 64) -> Pool:
    """A pool of at most `count` images with true masks."""
    from kmine.data import open_source
    from kmine.data.cache.sample_cache import SampleCache
    from kmine.data.pool import Pool

    cfg = source_config(kit, size, count)
    cache = SampleCache(open_source(cfg), size, kit.work / "cache")
    ids = [ref.sample_id for ref in cache.refs][:count]
    cache.decode_masks(ids)
    return Pool(cache, ids, {i: i for i in ids}, "true")


def prompted_objects(pool: Pool, ids: Sequence[str], jitters: int = 0) -> list[tuple[Sample, Prompts, np.ndarray]]:
    """(sample, prompts, mask) of each image's largest object of at least 20 pixels; images without one are left out."""
    import numpy as np

    from kmine.ops import masks
    from kmine.types import Prompts

    out = []
    for number, sample_id in enumerate(ids):
        sample = pool.sample(sample_id)
        parts = masks.components(sample.mask == 1, 20)
        if parts:
            box = masks.grow_box(masks.tight_box(parts[0]), 0.05, *parts[0].shape)
            boxes = masks.jitter_boxes(box, jitters, 0.1, *parts[0].shape, np.random.default_rng(number))
            out.append((sample, Prompts(1, box, jittered_boxes=boxes, component=parts[0]), parts[0]))
    return out


def random_sam(name: str, side: int, device: str) -> Sam:
    """SAM with random weights, relative positions among them, drawn on the device: seconds for ViT-H."""
    import torch

    from kmine.segmenters.sam.build import build_sam

    torch.manual_seed(0)
    with torch.device(device):
        sam = build_sam(name, None, side)
        with torch.no_grad():
            for key, parameter in sam.image_encoder.named_parameters():
                if "rel_pos" in key or "pos_embed" in key:
                    torch.nn.init.normal_(parameter, std=0.1)
    # pixel_mean and pixel_std are created on the CPU, and SamPredictor takes its device from them.
    return sam.to(device).eval()


def pictures(kit: Kit, count: int) -> list[np.ndarray]:
    """`count` images of native size; procedural ones without data."""
    import cv2
    import numpy as np

    folder = kit.data / "Kvasir-SEG" / "images" if kit.data else None
    if folder and folder.is_dir():
        paths = sorted(folder.glob("*.jpg"))[:count]
        images = [cv2.imread(str(path))[..., ::-1].copy() for path in paths]
        return [images[n % len(images)] for n in range(count)]
    size = (70, 94) if kit.tiny else (700, 940)
    rng = np.random.default_rng(0)
    coarse = [rng.integers(0, 256, (12, 14, 3)).astype(np.uint8) for _ in range(count)]
    return [cv2.resize(c, size[::-1], interpolation=cv2.INTER_CUBIC) for c in coarse]
