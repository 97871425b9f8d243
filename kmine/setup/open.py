"""From settings to a task ready to run: data decoded and split, verdicts applied, segmenter and device opened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kmine import cli
from kmine.config import LoopConfig
from kmine.config.checks import require
from kmine.config.sweep import MINING
from kmine.data.cache.sample_cache import SampleCache
from kmine.data.person_prompts import PersonPrompts, read_person_prompts
from kmine.data.pool import Pool, read_file
from kmine.data.quality.intensity import MAX_IMAGES, intensity_ranges
from kmine.data.resize import Resizer
from kmine.data.source import Source
from kmine.data.split_file import GivenSplit, read_split, resolve_splits
from kmine.data.splits import Splits
from kmine.errors import UserError
from kmine.feedback.expected import ExpectedMasks
from kmine.feedback.verdict_effects import NO_VERDICTS, VerdictEffects, resolve_verdicts
from kmine.io.files import read_png, sign
from kmine.io.older_settings import WITHDRAWN
from kmine.models.build import build_model
from kmine.segmenters import fitted_prompts, open_segmenter
from kmine.segmenters.base import Segmenter, check_prompts
from kmine.setup.contents import record_contents, refuse_changed_data
from kmine.setup.data_check import check_before_training, find_issues
from kmine.setup.device import resolve_device
from kmine.setup.encoder import resolve_weights, settle_encoders
from kmine.setup.provenance import provenance
from kmine.setup.resolve import resolve_settings
from kmine.store.run_folder import RunFolder
from kmine.store.settings import signed
from kmine.store.trackers import open_trackers
from kmine.training.distributed import DeviceContext, SingleDevice, make_fabric
from kmine.training.evaluation import Evaluator
from kmine.training.task import Task, auto_dice
from kmine.types import ProgressReporter, Prompts

if TYPE_CHECKING:
    from lightning.fabric import Fabric


@dataclass(frozen=True)
class OpenedData:
    """Decoded images of a run, their splits, and the ids whose masks can be read."""

    cache: SampleCache
    splits: Splits
    given_split: GivenSplit | None
    """Split of data.split_file."""
    labeled: list[str]
    val: list[str]


def begin_run(
    cfg: LoopConfig,
    source: Source,
    run: RunFolder,
    progress: ProgressReporter,
    fabric: DeviceContext | None = None,
    *,
    method: str = MINING,
) -> Task:
    """Claim the run folder for `cfg`, open the task, and record in run.json what made the run.

    `fabric` is that of processes that share the run. Only mining opens a segmenter and needs unlabeled images.

    Raises:
        UserError: the folder belongs to other settings or data, or the task cannot be opened (`open_task`).
    """
    expected = "calibrated or ranked, in another --out if this run began with it"
    require(not cfg.rounds or cfg.gate.mode != WITHDRAWN["gate.mode"], "gate.mode", expected, cfg.gate.mode)
    cfg, run.log = resolve_settings(cfg, source), progress.log

    def contents() -> dict[str, str]:
        progress.log("the data files have other times, or another reader, than before: comparing their content")
        cache, opened = _opened_masks(cfg, source, run)
        refuse_changed_data(source, cache, run, opened)
        return cache.content_fingerprints(opened)

    cfg = resolve_weights(cfg, run, progress.log)
    if not run.follows:
        run.claim(cli.to_dict(cfg), source.fingerprint(), contents)
        open_trackers(run, cfg.log, cli.flat(cli.to_dict(cfg)), offline=cfg.offline)
    task = open_task(cfg, source, run, progress, fabric, mines=method == MINING)
    cache, opened = _opened_masks(cfg, source, run)
    run.update_run(**provenance(cfg, task, source, cache.content_fingerprints(opened)), stopped_by="interrupted")
    if not run.follows:
        record_contents(cache, run, opened)
    return task


def _opened_masks(cfg: LoopConfig, source: Source, run: RunFolder) -> tuple[SampleCache, frozenset[str]]:
    """Decoded images, and the samples whose masks training may read."""
    cache = open_cache(cfg, source)
    splits = open_splits(cfg, cache, run)
    return cache, frozenset((*splits.labeled, *splits.val))


def open_task(
    cfg: LoopConfig,
    source: Source,
    run: RunFolder,
    progress: ProgressReporter,
    fabric: DeviceContext | None = None,
    *,
    mines: bool = True,
) -> Task:
    """Open everything that a method needs; the unlabeled pool without masks, the test split not at all.

    Masks of labeled and validation images are read here, and `kmine.setup.data_check` looks for faults, so that bad
    data stop a run before training. Without `mines` no segmenter is opened, and nothing need be unlabeled.

    Raises:
        UserError: damaged or missing data, verdicts that do not fit, a missing segmenter or device.
    """
    cfg = resolve_settings(cfg, source)
    cfg = resolve_weights(cfg, run, progress.log)
    data = open_data(cfg, source, run, progress)
    review = apply_verdicts(cfg, data, run, progress)
    labeled, unlabeled, val = _open_pools(data, review)
    cfg = settle_encoders(cfg, (labeled, unlabeled), len(source.class_names), run, progress.log)
    run.update_run(intensity=_intensity(data.cache, (*data.splits.labeled, *data.splits.unlabeled)))
    # A run on data that were copied keeps the fingerprint that it began with.
    fingerprint = run.run().get("data_fingerprint") or source.fingerprint()
    verdicts = [review.signature] if review.signature else []
    ids = (data.splits.rows(), list(labeled.ids), list(val.ids))
    resizing = signed("data", {name: getattr(cfg.data, name) for name in ("resize", "mask_resize", "patch")})
    person = open_person_prompts(cfg, data, source, run, progress)
    drawn = [person.sha256] if person.sha256 else []
    signature = sign(fingerprint, cfg.data.size, cfg.seed, *ids, *verdicts, *([resizing] if resizing else []), *drawn)
    examine = partial(find_issues, cfg.data, data.cache, data.splits, data.given_split, labeled, val)
    check_before_training(cfg.data, run, progress, signature, examine)
    model, auxiliary_model = cfg.model.split()
    segmenter = _open_segmenter(cfg, bool(data.splits.unlabeled), progress) if mines else None
    if segmenter is not None:
        cfg = _without_missing(cfg, segmenter, progress)
    return Task(
        cfg=replace(cfg, model=model),
        num_classes=len(source.class_names),
        labeled=labeled,
        unlabeled=unlabeled,
        val=val,
        segmenter=segmenter,
        fabric=fabric or open_fabric(cfg),
        signature=signature,
        progress=progress,
        run=run,
        auxiliary_model=auxiliary_model,
        review=review,
        person=person,
        dice=auto_dice(labeled),
    )


def open_person_prompts(
    cfg: LoopConfig, data: OpenedData, source: Source, run: RunFolder, progress: ProgressReporter
) -> PersonPrompts:
    """Prompts of `prompts.file` on unlabeled images, recorded in run.json; a trained run refuses another file.

    Raises:
        UserError: a file that cannot be read, a box or point that does not fit its image.
    """
    ids = [ref.sample_id for ref in source.refs()]
    person = read_person_prompts(cfg.prompts.file, source.class_names, ids)
    if cfg.prompts.file is None and not run.run().get("prompts_sha256"):
        return person
    run.claim_file("prompts_sha256", "prompts.file", person.sha256)
    unlabeled = set(data.splits.unlabeled)
    used = {i: prompts for i, prompts in person.by_sample.items() if i in unlabeled}
    used = {i: _check_drawn(own, data.cache.native_shape(i), f"{person.places[i]}: {i}") for i, own in used.items()}
    counts = {"images": len(used), "prompts": sum(map(len, used.values()))}
    counts["ignored"] = len(person.by_sample) - len(used)
    run.update_run(person_prompts={"file": cfg.prompts.file, **counts})
    ignored = f"; ignored on {counts['ignored']} images that are not unlabeled" if counts["ignored"] else ""
    progress.log(f"prompts of a person: {counts['prompts']} on {counts['images']} unlabeled images{ignored}")
    return replace(person, by_sample=used)


def _check_drawn(drawn: Sequence[Prompts], size: tuple[int, int], where: str) -> tuple[Prompts, ...]:
    """The prompts of an image of `size` = (H, W), their boxes clipped to it. `UserError` for one that does not fit."""
    try:
        return tuple(check_prompts(prompts, size) for prompts in drawn)
    except ValueError as error:
        raise UserError(f"{where}: {error}; mend it there") from error


def open_data(cfg: LoopConfig, source: Source, run: RunFolder, progress: ProgressReporter) -> OpenedData:
    """Decode all images and the masks of labeled and validation ones, and split; skipped files go to run.json."""
    given_split = read_split(cfg.data.split_file, source)
    run.claim_file("split_file_sha256", "data.split_file", given_split.fingerprint if given_split else "")
    cache = open_cache(cfg, source)
    splits = open_splits(cfg, cache, run, given_split)
    bad_masks = cache.decode_masks((*splits.labeled, *splits.val))
    bad_ids = {s.sample_id for s in bad_masks}
    labeled, val = ([i for i in ids if i not in bad_ids] for ids in (splits.labeled, splits.val))
    skipped = [*source.skipped, *cache.skipped, *bad_masks]
    run.update_run(skipped=[asdict(s) for s in skipped], num_skipped=len(skipped))
    if skipped:
        first = f"{skipped[0].path}: {skipped[0].problem}"
        progress.log(f"{len(skipped)} files skipped, listed in run.json; the first: {first}")
    return OpenedData(cache, splits, given_split, labeled, val)


def open_cache(cfg: LoopConfig, source: Source) -> SampleCache:
    """Decoded images; they are decoded now unless an earlier run did."""
    return SampleCache(source, Resizer.of(cfg.data), cfg.data.cache_dir, cfg.data.on_error)


def open_splits(cfg: LoopConfig, cache: SampleCache, run: RunFolder, given_split: GivenSplit | None = None) -> Splits:
    """Splits of the run's splits.csv; without that file they are drawn and written.

    `given_split` is the split of data.split_file, if it was read before.
    """
    saved = run.read_csv("splits.csv")
    if saved is not None:
        splits = Splits.from_rows((r["sample_id"], r["group_id"], r["split"]) for r in saved)
        _refuse_missing((*splits.labeled, *splits.unlabeled, *splits.val), cache, run.root / "splits.csv")
        return splits
    given_split = given_split or read_split(cfg.data.split_file, cache.source)
    splits = resolve_splits(cfg.data, cfg.seed, cache.refs, cache.hashes, given_split)
    run.write_csv("splits.csv", ("sample_id", "group_id", "split"), splits.rows())
    return splits


def _refuse_missing(ids: Sequence[str], cache: SampleCache, path: Path) -> None:
    known = {ref.sample_id for ref in cache.refs}
    if missing := [sample_id for sample_id in ids if sample_id not in known]:
        raise UserError(
            f"{path}: expected samples of the data set, {len(missing)} of {len(ids)} are missing there, such as "
            f"{missing[0]}; restore them, or that file, or start a new run folder with --out"
        )


def content_fingerprints(cfg: LoopConfig, source: Source, run: RunFolder) -> dict[str, str]:
    """Fingerprints of images and of labeled and validation masks: `SampleCache.content_fingerprints`."""
    cache, opened = _opened_masks(cfg, source, run)
    return cache.content_fingerprints(opened)


def apply_verdicts(cfg: LoopConfig, data: OpenedData, run: RunFolder, progress: ProgressReporter) -> VerdictEffects:
    """Effects of the verdicts file on this run, recorded in run.json; a trained run refuses other verdicts.

    Raises:
        UserError: verdicts that cannot be read or do not fit, a mask of another size than its image.
    """
    if cfg.verdicts is None:
        return NO_VERDICTS
    splits = data.splits
    review = resolve_verdicts(Path(cfg.verdicts), splits.labeled, splits.unlabeled, (*splits.val, *splits.test))
    for sample_id, path in (review.accepted | review.corrected).items():
        expected = ExpectedMasks({sample_id: data.cache.native_shape(sample_id)}, data.cache.source.class_names)
        expected.check(str(path), sample_id, read_png(path))
    run.claim_file("verdicts_signature", "verdicts", review.signature)
    run.update_run(verdicts={"file": cfg.verdicts, **review.summary()})
    counts = ", ".join(f"{count} {kind}" for kind, count in review.summary().items() if count)
    progress.log(f"verdicts of {cfg.verdicts}: {counts or 'none with an effect'}")
    return review


def _open_pools(data: OpenedData, review: VerdictEffects) -> tuple[Pool, Pool, Pool]:
    """Labeled, unlabeled and validation images; the unlabeled ones without masks."""
    labeled = [i for i in data.labeled if i not in review.dropped_labels]
    labeled += [i for i in data.splits.unlabeled if i in review.corrected]
    for name, ids in (("labeled", labeled), ("validation", data.val)):
        if not ids:
            raise UserError(f"no readable {name} image remains; mend the files listed in run.json, or label more")
    corrected = {i: partial(read_file, path) for i, path in review.corrected.items()}
    unlabeled = [i for i in data.splits.unlabeled if i not in review.corrected]
    groups = data.splits.groups
    return (
        Pool(data.cache, labeled, groups, "true", corrected=corrected),
        Pool(data.cache, unlabeled, groups, "withheld"),
        Pool(data.cache, data.val, groups, "true", corrected=corrected),
    )


def _intensity(cache: SampleCache, ids: Sequence[str]) -> dict[str, Any]:
    """Brightness ranges of the training images; `kmine.predict` warns of images outside them."""
    step = max(1, -(-len(ids) // MAX_IMAGES))
    return intensity_ranges(cache.image_resized(sample_id) for sample_id in sorted(ids)[::step])


def open_for_test(cfg: LoopConfig, source: Source, run: RunFolder) -> Evaluator:
    """Open the test split, for `kmine.compare` only; `--data.on_error skip` leaves out damaged masks, as in training.

    Raises:
        UserError: the run has no test split, or a damaged mask.
    """
    cache = open_cache(cfg, source)
    splits = open_splits(cfg, cache, run)
    if not splits.test:
        why = "data.test_fraction 0, or the run on all masks of data.folds"
        raise UserError(f"{run.root}: the run has no test split ({why}); nothing to compare on")
    bad = {s.sample_id for s in cache.decode_masks(splits.test)}
    opened = frozenset((*splits.labeled, *splits.val, *splits.test))
    refuse_changed_data(source, cache, run, opened)
    record_contents(cache, run, opened)
    pool = Pool(cache, [i for i in splits.test if i not in bad], splits.groups, "true")
    fabric = SingleDevice(resolve_device(cfg.device))
    model = build_model(cfg.model.split()[0], len(source.class_names), cfg.seed, pretrained=False)
    return Evaluator(pool, model.with_patch(cfg.data.patch).to(fabric.device), cfg.infer.batch_size, fabric)


def open_for_audit(cfg: LoopConfig, source: Source, run: RunFolder, progress: ProgressReporter) -> Task:
    """Task of a finished run without a segmenter; the unlabeled pool withholds its masks.

    Raises:
        UserError: the data are not those of the run, or cannot be opened.
    """
    cache, opened = _opened_masks(cfg, source, run)
    refuse_changed_data(source, cache, run, opened)
    return open_task(replace(cfg, rounds=0), source, run, progress, SingleDevice(resolve_device(cfg.device)))


def open_withheld(task: Task, source: Source) -> Pool:
    """Masked unlabeled images with their masks, for `kmine.audit --with_withheld` only; run.json logs the opening.

    Raises:
        UserError: no unlabeled image has a mask.
    """
    pool = open_truth(task, source)
    if not len(pool):
        raise UserError(f"{task.run.root}: no unlabeled image has a mask; leave out --with_withheld")
    opened = [*task.run.run().get("withheld_opened", []), datetime.now(timezone.utc).isoformat(timespec="seconds")]
    task.run.update_run(withheld_opened=opened)
    return pool


def open_truth(task: Task, source: Source) -> Pool:
    """Masked unlabeled images of a task with their true masks, for the oracle and for audits only.

    Methods import only from lower layers, so none can call it. `--data.on_error skip` leaves out damaged masks.
    """
    cache = open_cache(task.cfg, source)
    masked = [i for i in task.unlabeled.ids if cache.ref(i).has_mask]
    bad = {s.sample_id for s in cache.decode_masks(masked)}
    ids = [i for i in masked if i not in bad]
    return Pool(cache, ids, {i: task.unlabeled.group_of(i) for i in ids}, "true")


def open_fabric(cfg: LoopConfig) -> Fabric:
    """Device and precision; processes that share the run are joined."""
    return make_fabric(str(resolve_device(cfg.device)), cfg.fit.precision)


def _open_segmenter(cfg: LoopConfig, has_unlabeled: bool, progress: ProgressReporter) -> Segmenter | None:
    if cfg.rounds == 0:
        return None
    if not has_unlabeled:
        if cfg.data.split_file is not None:
            cause = f"the splits of data.split_file {cfg.data.split_file} leave no unlabeled image; make some unlabeled"
        else:
            drawn_by = "label_fraction" if cfg.data.fine_groups is None else "fine_groups"
            cause = f"data.{drawn_by} {getattr(cfg.data, drawn_by)} leaves no unlabeled image; lower it"
        raise UserError(f"nothing to mine: {cause}, or train on the labels alone with --rounds 0")
    device = str(resolve_device(cfg.device))
    return open_segmenter(cfg.segmenter, device=device, offline=cfg.offline, log=progress.log)


def _without_missing(cfg: LoopConfig, segmenter: Segmenter, progress: ProgressReporter) -> LoopConfig:
    """The settings without the prompts that the segmenter does not take, which are logged."""
    prompts = fitted_prompts(segmenter, cfg.prompts)
    names = ("box", "points", "mask_hint")
    left_out = [f"prompts.{name}" for name in names if getattr(prompts, name) != getattr(cfg.prompts, name)]
    if left_out:
        progress.log(f"{segmenter.name} does not take {', '.join(left_out)}: left out of its prompts")
    return replace(cfg, prompts=prompts)
