"""Tasks: which pools have masks, what a second opening keeps, and what is refused before training."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest
from helpers.memory_source import noise_source
from helpers.small import CFG, Silent, truth_of

from kmine.config import SegmenterConfig
from kmine.data import open_source
from kmine.data.datasets.phantom.dataset import PhantomSource
from kmine.errors import UserError, WithheldMaskError
from kmine.feedback.verdict_effects import NO_VERDICTS
from kmine.io.files import encode_png
from kmine.segmenters.base import Abilities
from kmine.segmenters.ellipse import Ellipse
from kmine.setup.open import (
    begin_run,
    content_fingerprints,
    open_cache,
    open_data,
    open_for_audit,
    open_for_test,
    open_splits,
    open_task,
    open_truth,
    open_withheld,
)
from kmine.store.run_folder import RunFolder

LABELS_ONLY = replace(CFG, rounds=0, device="cpu", segmenter=SegmenterConfig("ellipse"))


@pytest.fixture
def cfg(tmp_path):
    return replace(LABELS_ONLY, data=replace(CFG.data, cache_dir=str(tmp_path / "cache")))


@pytest.fixture
def run(tmp_path):
    folder = RunFolder(tmp_path / "run")
    yield folder
    folder.close()


def with_data(cfg, **changes):
    return replace(cfg, data=replace(cfg.data, **changes))


# -- pools


def test_splits_that_name_a_sample_the_data_lack_are_refused_with_their_file(cfg, run):
    source = open_source(cfg.data)
    rows = list(open_splits(cfg, open_cache(cfg, source), run).rows())
    rows[0] = ("gone", rows[0][1], "labeled")
    run.write_csv("splits.csv", ("sample_id", "group_id", "split"), rows)
    with pytest.raises(UserError, match=r"splits\.csv: expected samples of the data set, 1 of \d+ .* such as gone;"):
        open_task(cfg, source, run, Silent())


def test_pools_are_the_splits_without_test_and_unlabeled_masks_are_withheld(cfg, run):
    task = open_task(cfg, open_source(cfg.data), run, Silent())
    split = {row["sample_id"]: row["split"] for row in run.read_csv("splits.csv")}
    pools = {"labeled": task.labeled, "unlabeled": task.unlabeled, "val": task.val}
    assert {name: set(pool.ids) for name, pool in pools.items()} == {
        name: {i for i, side in split.items() if side == name} for name in pools
    }
    assert "test" in split.values() and task.segmenter is None
    for sample_id in task.unlabeled.ids:
        assert task.unlabeled.sample(sample_id).mask is None
        with pytest.raises(WithheldMaskError):
            task.unlabeled.mask_resized(sample_id)


def test_only_masks_of_labeled_and_validation_images_are_read(cfg, run, monkeypatch):
    read, real = set(), PhantomSource.mask
    monkeypatch.setattr(PhantomSource, "mask", lambda self, i: read.add(i) or real(self, i))
    task = open_task(cfg, open_source(cfg.data), run, Silent())
    assert read == {*task.labeled.ids, *task.val.ids}


def test_the_true_masks_of_unlabeled_images_are_a_pool_of_its_own(cfg, run):
    source = open_source(cfg.data)
    task = open_task(cfg, source, run, Silent())
    truth = open_truth(task, source)
    assert truth.ids == task.unlabeled.ids
    for sample_id in truth.ids:
        assert np.array_equal(truth.mask_resized(sample_id), truth_of(task).mask_resized(sample_id))


def test_opening_withheld_masks_is_recorded_each_time(cfg, run):
    source = open_source(cfg.data)
    task = open_for_audit(cfg, source, run, Silent())
    assert "withheld_opened" not in run.run()
    assert open_withheld(task, source).ids == open_withheld(task, source).ids == task.unlabeled.ids
    assert len(run.run()["withheld_opened"]) == 2


def test_the_test_split_is_opened_with_its_masks_and_an_absent_one_is_refused(cfg, run, tmp_path):
    source = open_source(cfg.data)
    test = open_for_test(cfg, source, run).pool
    assert set(test.ids) == {row["sample_id"] for row in run.read_csv("splits.csv") if row["split"] == "test"}
    assert test.mask_resized(test.ids[0]).shape == (32, 32)
    other, without_test = RunFolder(tmp_path / "other"), with_data(cfg, test_fraction=0)
    with pytest.raises(UserError, match=r"has no test split \(data\.test_fraction 0, or"):
        open_for_test(without_test, source, other)
    other.close()


# -- splits and contents


def test_splits_are_drawn_once_and_read_back_under_other_settings(cfg, run):
    cache = open_cache(cfg, open_source(cfg.data))
    drawn = open_splits(cfg, cache, run)
    again = open_splits(replace(with_data(cfg, label_fraction=0.9), seed=5), cache, run)
    assert (again.labeled, again.unlabeled, again.val, again.test) == (
        *(drawn.labeled, drawn.unlabeled, drawn.val, drawn.test),
    )


def test_contents_depend_on_labeled_masks_and_not_on_unlabeled_ones(cfg, run, tmp_path):
    source = noise_source(12)
    splits = open_splits(cfg, open_cache(cfg, source), run)
    before = content_fingerprints(cfg, source, run)

    def changed(sample_id: str) -> dict[str, str]:
        other = noise_source(12)
        other.masks[sample_id][0, 0] ^= 1
        return content_fingerprints(with_data(cfg, size=256), other, run)

    whole = content_fingerprints(with_data(cfg, size=256), source, run)
    assert whole.keys() == before.keys()
    assert changed(splits.labeled[0]) != whole and changed(splits.val[0]) != whole
    assert changed(splits.unlabeled[0]) == whole


def test_a_damaged_mask_is_listed_and_its_image_is_in_no_pool(cfg, run, tmp_path):
    splits = open_splits(cfg, open_cache(cfg, noise_source(12)), run)
    bad = splits.labeled[0]
    skipping = with_data(cfg, on_error="skip")
    lines = Silent()
    data = open_data(skipping, noise_source(12, broken_masks=[bad]), run, lines)
    assert bad not in data.labeled and {bad, *data.labeled} == set(splits.labeled) and data.val == list(splits.val)
    assert [(s["sample_id"], s["problem"]) for s in run.run()["skipped"]] == [(bad, "broken mask")]
    assert lines.said == [f"1 files skipped, listed in run.json; the first: {bad}.png: broken mask"]


def test_a_corrected_mask_is_that_of_its_file_in_another_process_too(cfg, run, tmp_path, monkeypatch):
    source = open_source(cfg.data)
    sample_id = open_task(cfg, source, run, Silent()).unlabeled.ids[0]
    mask = np.eye(*open_cache(cfg, source).native_shape(sample_id), dtype=np.uint8)
    (tmp_path / "drawn.png").write_bytes(encode_png(mask, "", 0))
    review = replace(NO_VERDICTS, corrected={sample_id: tmp_path / "drawn.png"})
    monkeypatch.setattr("kmine.setup.open.apply_verdicts", lambda *_: review)
    labeled = pickle.loads(pickle.dumps(open_task(cfg, source, run, Silent()).labeled))
    assert np.array_equal(labeled.mask_native(sample_id), mask)


# -- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_fraction": 1}, "nothing to mine: data.label_fraction 1 leaves no unlabeled image; lower it, or train"),
        ({"fine_groups": 13}, "nothing to mine: data.fine_groups 13 leaves no unlabeled image; lower it, or train"),
    ],
)
def test_mining_without_unlabeled_images_is_refused_by_its_setting(cfg, run, changes, message):
    cfg = replace(with_data(cfg, **changes), rounds=1)
    with pytest.raises(UserError, match=message):
        open_task(cfg, open_source(cfg.data), run, Silent())
    assert open_task(cfg, open_source(cfg.data), run, Silent(), mines=False).segmenter is None


def test_a_given_split_without_unlabeled_images_is_refused_by_its_file(cfg, run, tmp_path):
    rows = [f"polyp_{n:06},polyp_{n:06},{('labeled', 'labeled', 'val', 'test')[n % 4]}" for n in range(24)]
    (tmp_path / "given.csv").write_text("\n".join(["sample_id,group_id,split", *rows]))
    cfg = replace(with_data(cfg, split_file=str(tmp_path / "given.csv")), rounds=1)
    with pytest.raises(UserError, match=r"given\.csv leave no unlabeled image; make some unlabeled, or train on"):
        open_task(cfg, open_source(cfg.data), run, Silent())


def test_a_begun_run_records_its_origin_and_refuses_other_settings(cfg, tmp_path):
    source = open_source(cfg.data)
    run = RunFolder(tmp_path / "begun")
    task = begin_run(cfg, source, run, Silent())
    fields = run.run()
    assert (fields["stopped_by"], fields["data_fingerprint"]) == ("interrupted", source.fingerprint())
    assert fields["splits"]["labeled"] == len(task.labeled) and "git_commit" in fields
    task.run.save_tensors(run.round_dir(0) / "model.safetensors", {}, "")  # training has begun
    with pytest.raises(UserError, match="holds a run with seed = 0, this command has 1"):
        begin_run(replace(cfg, seed=1), source, run, Silent())
    run.close()


# -- prompts of a person


def test_prompts_of_a_person_are_kept_on_unlabeled_images_alone_and_recorded(cfg, run, tmp_path):
    source = open_source(cfg.data)
    plain = open_task(cfg, source, run, Silent())
    rows = [
        f"{plain.unlabeled.ids[0]},2 3 20 22",
        f"{plain.unlabeled.ids[0]},1 1 9 9",
        f"{plain.labeled.ids[0]},1 1 9 9",
    ]
    path = tmp_path / "drawn.csv"
    path.write_text("\n".join(["sample_id,box", *rows]))
    drawn, said = replace(cfg, prompts=replace(cfg.prompts, file=str(path))), Silent()
    task = open_task(drawn, source, run, said)
    assert {i: len(prompts) for i, prompts in task.person.by_sample.items()} == {plain.unlabeled.ids[0]: 2}
    assert task.signature != plain.signature and run.run()["prompts_sha256"] == task.person.sha256
    assert run.run()["person_prompts"] == {"file": str(path), "images": 1, "prompts": 2, "ignored": 1}
    assert any("2 on 1 unlabeled images; ignored on 1 images" in line for line in said.said)
    path.write_text(f"sample_id,box\n{plain.unlabeled.ids[0]},900 3 990 22\n")
    with pytest.raises(UserError, match=r"drawn.csv, line 2: .* lies entirely outside the image.*mend it there"):
        open_task(drawn, source, run, Silent())
    run.round_dir(0).mkdir(parents=True)
    (run.round_dir(0) / "model.safetensors").write_bytes(b"trained")
    path.write_text("sample_id,box\n")
    with pytest.raises(UserError, match=r"prompts\.file has changed since this run began"):
        open_task(drawn, source, run, Silent())


def test_the_box_of_a_person_is_clipped_to_its_image(cfg, run, tmp_path):
    source = open_source(cfg.data)
    ids = open_task(cfg, source, run, Silent()).unlabeled.ids
    height, width = open_cache(cfg, source).native_shape(ids[1])
    path = tmp_path / "drawn.csv"
    path.write_text(f"sample_id,box\n{ids[0]},2 3 20 22\n{ids[1]},-1 -2 {width + 7} {height + 8}\n")
    task = open_task(replace(cfg, prompts=replace(cfg.prompts, file=str(path))), source, run, Silent())
    boxes = [prompts.box.tolist() for i in ids[:2] for prompts in task.person.by_sample[i]]
    assert boxes == [[2, 3, 20, 22], [0, 0, width, height]]


def test_what_the_segmenter_does_not_take_is_left_out_of_the_settings(cfg, run, monkeypatch):
    class NoHint(Ellipse):
        abilities = Abilities(mask_input=False)

    monkeypatch.setattr("kmine.setup.open.open_segmenter", lambda *args, **kwargs: NoHint())
    said = Silent()
    task = open_task(replace(cfg, rounds=1), open_source(cfg.data), run, said)
    assert task.cfg.prompts == replace(cfg.prompts, mask_hint=False)
    assert any("ellipse does not take prompts.mask_hint" in line for line in said.said)
