"""From settings to a task: data opened, decoded, split; segmenter and device made ready. Shared by the commands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kmine.config import LoopConfig
from kmine.data.cache.sample_cache import SampleCache
from kmine.data.pool import MaskReader, Pool
from kmine.data.quality.intensity import MAX_IMAGES, intensity_ranges
from kmine.data.source import Source
from kmine.data.split_file import GivenSplit, read_split, resolve_splits
from kmine.data.splits import Splits
from kmine.errors import UserError
from kmine.feedback.verdict_effects import (
    NO_VERDICTS,
    VerdictEffects,
    read_mask,
    resolve_verdicts,
)
from kmine.io.files import sign
from kmine.models.base import LocalModel
from kmine.models.build import build_model
from kmine.segmenters import open_segmenter
from kmine.setup.data_check import check_before_training, find_issues
from kmine.store.run_folder import RunFolder
from kmine.training.distributed import DeviceContext, SingleDevice, make_fabric
from kmine.training.task import Task
from kmine.types import Finding, ProgressReporter

if TYPE_CHECKING:
    from lightning.fabric import Fabric


def open_cache(cfg: LoopConfig, source: Source) -> SampleCache:
    """The decoded images, decoded now where no run has done so before."""
    folder = Path(cfg.data.cache_dir).expanduser() if cfg.data.cache_dir else None
    return SampleCache(source, cfg.data.size, folder, cfg.data.on_error)


def open_splits(cfg: LoopConfig, cache: SampleCache, store: RunFolder, given_split: GivenSplit | None = None) -> Splits:
    """The run's splits: read where they were settled before, else settled and written.

    `given_split` is what data.split_file says, where that was read already.
    """
    saved = store.read_csv("splits.csv")
    if saved is not None:
        return Splits.from_rows((r["sample_id"], r["group_id"], r["split"]) for r in saved)
    given_split = given_split or read_split(cfg.data.split_file, cache.source)
    splits = resolve_splits(cfg.data, cfg.seed, cache.refs, cache.hashes, given_split)
    store.write_csv("splits.csv", ("sample_id", "group_id", "split"), splits.rows())
    return splits


def content_fingerprints(cfg: LoopConfig, source: Source, store: RunFolder) -> dict[str, str]:
    """What the images, and the masks of labeled and validation ones, are; see `SampleCache.content_fingerprints`."""
    cache = open_cache(cfg, source)
    splits = open_splits(cfg, cache, store)
    return cache.content_fingerprints((*splits.labeled, *splits.val))


def open_task(
    cfg: LoopConfig,
    source: Source,
    store: RunFolder,
    progress: ProgressReporter,
    fabric: DeviceContext | None = None,
    *,
    mines: bool = True,
) -> Task:
    """Everything a method needs. Masks of labeled and validation images are read here, so that a bad one stops early.

    Where `mines` is false no segmenter is opened, and there may be nothing unlabeled.

    The unlabeled pool is opened without masks, the test split not at all. What can be seen at once to spoil the result
    stops here, too (`kmine.setup.data_check`). `fabric` is that of processes that share the run, where they do.
    """
    given_split = read_split(cfg.data.split_file, source)
    store.claim_split(given_split.fingerprint if given_split else "")
    cache = open_cache(cfg, source)
    splits = open_splits(cfg, cache, store, given_split)
    bad_masks = cache.decode_masks((*splits.labeled, *splits.val))
    bad_ids = {s.sample_id for s in bad_masks}
    labeled, val = ([i for i in ids if i not in bad_ids] for ids in (splits.labeled, splits.val))
    skipped = [*source.skipped, *cache.skipped, *bad_masks]
    store.update_run(skipped=[asdict(s) for s in skipped], num_skipped=len(skipped))
    if skipped:
        progress.log(
            f"{len(skipped)} files skipped, listed in run.json; the first: {skipped[0].path}: {skipped[0].problem}"
        )
    review = _resolve_review(cfg, splits, cache, store, progress)
    labeled = [i for i in labeled if i not in review.dropped_labels]
    labeled += [i for i in splits.unlabeled if i in review.corrected]
    for name, ids in (("labeled", labeled), ("validation", val)):
        if not ids:
            raise UserError(f"no readable {name} image remains; mend the files listed in run.json, or label more")
    corrected_masks = {i: _reader(path) for i, path in review.corrected.items()}
    with_masks = [Pool(cache, ids, splits.groups, "true", corrected=corrected_masks) for ids in (labeled, val)]
    store.update_run(intensity=_intensity(cache, (*splits.labeled, *splits.unlabeled)))
    num_classes = len(source.class_names)
    review_signature = [review.signature] if review.signature else []
    fingerprint = store.run().get("data_fingerprint") or source.fingerprint()  # of data that were copied since, the old
    signature = sign(fingerprint, cfg.data.size, cfg.seed, splits.rows(), labeled, val, *review_signature)

    model, auxiliary_model = cfg.model.split()

    def examine() -> list[Finding]:
        return find_issues(cfg.data, cache, splits, given_split, num_classes, *with_masks)

    check_before_training(cfg.data, store, progress, signature, examine)
    return Task(
        cfg=replace(cfg, model=model),
        num_classes=num_classes,
        labeled=with_masks[0],
        unlabeled=Pool(cache, [i for i in splits.unlabeled if i not in review.corrected], splits.groups, "withheld"),
        val=with_masks[1],
        segmenter=_open_segmenter(cfg, bool(splits.unlabeled), progress) if mines else None,
        fabric=fabric or open_fabric(cfg),
        signature=signature,
        progress=progress,
        run=store,
        auxiliary_model=auxiliary_model,
        review=review,
    )


def _resolve_review(
    cfg: LoopConfig, splits: Splits, cache: SampleCache, store: RunFolder, progress: ProgressReporter
) -> VerdictEffects:
    """What the verdicts that the run was given mean for it; a run that has begun is held to them."""
    if cfg.verdicts is None:
        return NO_VERDICTS
    review = resolve_verdicts(Path(cfg.verdicts), splits.labeled, splits.unlabeled, (*splits.val, *splits.test))
    for sample_id, path in (review.accepted | review.corrected).items():
        shape, expected = read_mask(path).shape, cache.native_shape(sample_id)
        if shape != expected:
            raise UserError(f"{path}: expected a mask of {expected} for {sample_id}, got {shape}; correct it anew")
    store.claim_verdicts(review.signature)
    store.update_run(verdicts={"file": cfg.verdicts, **review.summary()})
    counts = ", ".join(f"{count} {kind}" for kind, count in review.summary().items() if count)
    progress.log(f"verdicts of {cfg.verdicts}: {counts or 'none that says anything'}")
    return review


def _reader(path: Path) -> MaskReader:
    return lambda sample_id: read_mask(path)


def _intensity(cache: SampleCache, ids: Sequence[str]) -> dict[str, Any]:
    """How bright the training images are: `kmine.predict` warns of those that are far from it."""
    every = -(-len(ids) // MAX_IMAGES)
    return intensity_ranges(cache.image_resized(sample_id) for sample_id in sorted(ids)[:: max(1, every)])


def open_for_test(cfg: LoopConfig, source: Source, store: RunFolder) -> tuple[Pool, LocalModel, dict[str, Any]]:
    """The test split with its masks, a model to load weights into, and further arguments of `evaluate_checkpoint`.

    For `kmine.compare` alone. Damaged masks stop it, or are left out with `--data.on_error skip`, as in training.
    """
    cache = open_cache(cfg, source)
    splits = open_splits(cfg, cache, store)
    if not splits.test:
        raise UserError(
            f"{store.root}: the run has no test split (data.test_fraction 0); there is nothing to compare on"
        )
    bad = {s.sample_id for s in cache.decode_masks(splits.test)}
    pool = Pool(cache, [i for i in splits.test if i not in bad], splits.groups, "true")
    fabric = _single_device(cfg)
    model = build_model(cfg.model.split()[0], len(source.class_names), cfg.seed, pretrained=False).to(fabric.device)
    return pool, model, {"batch_size": cfg.infer.batch_size, "fabric": fabric}


def open_for_audit(cfg: LoopConfig, source: Source, store: RunFolder, progress: ProgressReporter) -> Task:
    """A finished run once more, without a segmenter: nobody is asked. The unlabeled pool withholds its masks."""
    return open_task(replace(cfg, rounds=0), source, store, progress, _single_device(cfg))


def open_withheld(task: Task, source: Source) -> Pool:
    """The unlabeled images that have a mask, with it. For `kmine.audit` alone, where it was asked to; run.json says so.

    Raises:
        UserError: when none of them has a mask.
    """
    pool = open_truth(task, source)
    if not len(pool):
        raise UserError(f"{task.run.root}: no unlabeled image has a mask; leave out --with_withheld")
    opened = [*task.run.run().get("withheld_opened", []), datetime.now(timezone.utc).isoformat(timespec="seconds")]
    task.run.update_run(withheld_opened=opened)
    return pool


def open_truth(task: Task, source: Source) -> Pool:
    """The unlabeled images of a task that have a mask, with their true masks: for the oracle and for audits alone.

    Nothing below this floor can call it, so no method can. Damaged masks stop it, or are left out with
    `--data.on_error skip`.
    """
    cache = open_cache(task.cfg, source)
    masked = [i for i in task.unlabeled.ids if cache.ref(i).has_mask]
    bad = {s.sample_id for s in cache.decode_masks(masked)}
    ids = [i for i in masked if i not in bad]
    return Pool(cache, ids, {i: task.unlabeled.group_of(i) for i in ids}, "true")


def _open_segmenter(cfg: LoopConfig, anything_to_mine: bool, progress: ProgressReporter) -> Any:
    if cfg.rounds == 0:
        return None
    if not anything_to_mine:
        if cfg.data.split_file is not None:
            raise UserError(
                f"nothing to mine: the splits of data.split_file {cfg.data.split_file} leave no unlabeled image; make "
                "some unlabeled, or train on the labels alone with --rounds 0"
            )
        drawn_by = "label_fraction" if cfg.data.fine_groups is None else "fine_groups"
        raise UserError(
            f"nothing to mine: data.{drawn_by} {getattr(cfg.data, drawn_by)} leaves no unlabeled image; "
            "lower it, or train on the labels alone with --rounds 0"
        )
    return open_segmenter(cfg.segmenter, device=_device(cfg.device), offline=cfg.offline, log=progress.log)


def _device(name: str) -> str:
    import torch

    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device: expected a GPU for {name!r}, none is there; use --device cpu or auto")
    number = name.partition(":")[2]
    if number and int(number) >= torch.cuda.device_count():
        raise UserError(f"device: expected one of {torch.cuda.device_count()} GPUs, cuda:0 first, got {name!r}")
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


def open_fabric(cfg: LoopConfig) -> Fabric:
    """Device and precision; where several processes share a run, this one joins the others."""
    return make_fabric(_device(cfg.device), cfg.fit.precision)


def _single_device(cfg: LoopConfig) -> SingleDevice:
    import torch

    return SingleDevice(torch.device(_device(cfg.device)))
