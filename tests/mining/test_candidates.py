"""Stages of a batch with `prompts.source auto`: prompts from matched proposals, one encoding per image."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from helpers.memory_source import MemorySource
from helpers.small import CFG, context

from kmine.config import PromptsConfig
from kmine.data.cache.sample_cache import SampleCache
from kmine.data.person_prompts import PersonPrompts
from kmine.data.pool import Pool
from kmine.errors import UserError
from kmine.mining import candidates
from kmine.mining.calibration import step as calibration
from kmine.mining.candidates import generate_prompts, median_object_area, predict_probs, previous_masks, segment_prompts
from kmine.mining.context import ImageBatch
from kmine.mining.prompts import prompts_from_probs
from kmine.mining.tables import table_rows
from kmine.ops.masks import grow_box, tight_box
from kmine.segmenters.base import Abilities, proposals_of
from kmine.segmenters.ellipse import Ellipse
from kmine.training import veto
from kmine.types import Candidate, Probs, Prompts, slice_id

AUTO = replace(CFG, rounds=1, prompts=PromptsConfig(source="auto"))
BELIEVED = (slice(4, 14), slice(4, 14))
PROPOSED = (slice(5, 15), slice(5, 15))  # IoU 81 / 119 with BELIEVED
PIECES = ((20, 20), (20, 24), (24, 20), (24, 24))


class Proposing(Ellipse):
    """Proposes one square and the place of the pieces in every image; counts images encoded and proposed for."""

    def __init__(self) -> None:
        self.encoded, self.proposed = 0, 0

    def encode(self, images):
        self.encoded += len(images)
        return super().encode(images)

    def propose(self, embeddings):
        for embedding in embeddings:
            self.proposed += 1
            masks = np.zeros((2, *embedding.size), bool)
            masks[0][PROPOSED] = True
            masks[1, 20:27, 20:27] = True
            yield proposals_of(embedding.size, masks, [0.9, 0.9], [0.9, 0.9])


def probs_of(sample, *places) -> Probs:
    """Foreground probability .9 at the places, .02 elsewhere."""
    foreground = np.full(sample.image.shape[:2], 0.02, np.float32)
    for place in places:
        foreground[place] = 0.9
    return Probs(sample.sample_id, np.stack([1 - foreground, foreground]))


def pieces() -> list:
    """Four squares of 9 px, too small for a component each."""
    return [(slice(y, y + 3), slice(x, x + 3)) for y, x in PIECES]


@pytest.fixture
def opened(task_of):
    task, _ = task_of(AUTO, segmenter=Proposing())
    return task, [task.unlabeled.sample(i) for i in task.unlabeled.ids[:3]]


def boxes(prompts) -> list:
    return [[prompt.box.tolist() for prompt in image] for image in prompts]


def test_the_matched_proposal_becomes_the_prompt_and_the_component_stays(opened) -> None:
    task, images = opened
    batch = ImageBatch(images)
    probs = [probs_of(images[0], BELIEVED), probs_of(images[1]), probs_of(images[2], BELIEVED, *pieces())]
    prompts = generate_prompts(context(task), batch, probs)
    assert [len(image) for image in prompts] == [1, 0, 2]
    assert set(batch.embedded) == {0, 2} and task.segmenter.encoded == 2, "nothing predicted, nothing encoded"
    (prompt,), (own,) = prompts[0], prompts_from_probs(probs[0], AUTO.prompts, seed=AUTO.seed, round_idx=1)
    mask = np.zeros(images[0].image.shape[:2], bool)
    mask[PROPOSED] = True
    assert (prompt.box == grow_box(tight_box(mask), AUTO.prompts.box_margin, *mask.shape)).all()
    assert (prompt.box != own.box).any() and (prompt.component == own.component).all()
    assert prompt.jittered_boxes.shape == (3, 4) and ((prompt.mask_input > 0) == mask).all()
    assert prompts[2][1].component is None and prompts[2][1].box.tolist() == [18, 18, 28, 28]


@pytest.mark.parametrize("passes", [1, 2])
def test_an_image_is_encoded_once_for_proposals_and_candidates(opened, passes) -> None:
    task, images = opened
    ctx = context(replace(task, cfg=replace(AUTO, prompts=replace(AUTO.prompts, passes=passes))))
    batch = ImageBatch(images)
    prompts = generate_prompts(ctx, batch, [probs_of(image, BELIEVED) for image in images])
    _, segmented = segment_prompts(ctx, batch, prompts)
    assert task.segmenter.encoded == 3 and [len(image) for image in segmented] == [1, 1, 1]


class TwoMasks(Ellipse):
    """Returns for each prompt a square and, with a lower predicted IoU, everything else."""

    def decode(self, embeddings, prompts):
        square = np.zeros(embeddings[0].size, bool)
        square[PROPOSED] = True
        masks, scores = np.stack([~square, square]), np.array([0.1, 0.9], np.float32)
        return [[Candidate(masks, scores, scores, None, masks[:0]) for _ in of_image] for of_image in prompts]


def test_the_second_pass_is_prompted_by_the_mask_with_the_highest_predicted_iou(task_of) -> None:
    prompts = replace(CFG.prompts, passes=2)
    task, _ = task_of(replace(CFG, rounds=1, prompts=prompts), segmenter=TwoMasks())
    image = task.unlabeled.sample(task.unlabeled.ids[0])
    ctx, batch = context(task), ImageBatch([image])
    first = generate_prompts(ctx, batch, [probs_of(image, BELIEVED)])
    again, _ = segment_prompts(ctx, batch, first)
    assert (boxes(first), boxes(again)) == ([[[2, 2, 15, 15]]], [[[3, 3, 16, 16]]]), "2 px around each square"


def test_an_image_without_embedding_is_encoded_when_it_is_prompted(opened) -> None:
    task, images = opened
    batch = ImageBatch(images)
    prompts = generate_prompts(context(task), batch, [probs_of(image, BELIEVED) for image in images])
    del batch.embedded[2]  # as of an image whose only prompt comes from an activation map
    task.segmenter.encoded = 0
    segment_prompts(context(task), batch, prompts)
    assert task.segmenter.encoded == 1


def test_jitter_depends_on_seed_round_and_sample_alone(opened) -> None:
    task, images = opened
    probs = [probs_of(image, BELIEVED) for image in images]

    def jitter(task, indices, round_idx: int = 1):
        ctx, batch = context(task, round_idx=round_idx), ImageBatch([images[n] for n in indices])
        return np.stack(
            [image[0].jittered_boxes for image in generate_prompts(ctx, batch, [probs[n] for n in indices])]
        )

    first = jitter(task, (0, 1, 2))
    np.testing.assert_array_equal(first[[2, 0]], jitter(task, (2, 0)))
    assert (first != jitter(task, (0, 1, 2), 2)).any() and (first[0] != first[1]).any()
    assert (first != jitter(replace(task, cfg=replace(task.cfg, seed=1)), (0, 1, 2))).any()


def test_nothing_is_proposed_for_an_image_free_of_the_only_class(opened) -> None:
    task, images = opened
    batch, probs = ImageBatch([replace(images[0], image_label=0)]), [probs_of(images[0], BELIEVED)]
    generate_prompts(context(task), batch, probs)
    assert task.segmenter.encoded == 0
    generate_prompts(context(replace(task, num_classes=3)), batch, probs)
    assert task.segmenter.proposed == 1, "another one of three classes may be there"


def test_a_segmenter_without_proposals_is_refused(opened) -> None:
    task, images = opened
    with pytest.raises(UserError, match=r"prompts\.source: auto .*`ellipse`"):
        generate_prompts(context(task, segmenter=Ellipse()), ImageBatch(images), [probs_of(image) for image in images])


def test_local_prompts_need_neither_proposals_nor_embeddings(opened) -> None:
    task, images = opened
    batch, probs = ImageBatch(images), [probs_of(image, BELIEVED) for image in images]
    prompts = generate_prompts(context(replace(task, cfg=CFG)), batch, probs)
    assert boxes(prompts) == boxes(prompts_from_probs(p, CFG.prompts, seed=CFG.seed, round_idx=1) for p in probs)
    assert batch.embedded == {} and task.segmenter.proposed == task.segmenter.encoded == 0


def test_previous_masks_are_read_only_by_a_cascade_after_round_1(opened) -> None:
    task, _ = opened
    cascade = replace(task, cfg=replace(CFG, prompts=PromptsConfig(source="cascade")))
    assert previous_masks(cascade, 1) == previous_masks(cascade, 2) == {}, "no round was mined"


def test_the_gate_is_calibrated_with_the_prompts_of_mining(opened, monkeypatch) -> None:
    task, _ = opened
    ids = task.labeled.ids[:2]
    samples = [task.labeled.sample(i) for i in ids]
    probs = [probs_of(sample, BELIEVED, *pieces()) for sample in samples]
    monkeypatch.setattr(veto, "infer", lambda model, pool, ids, **settings: (p for p in probs if p.sample_id in ids))
    seen, real = [], candidates.segment_prompts

    def segment(ctx, batch, prompts):
        assert all(image.mask is None and image.image_label is None for image in batch.images)
        seen.extend(prompts)
        return real(ctx, batch, prompts)

    monkeypatch.setattr(candidates, "segment_prompts", segment)
    ctx = replace(context(task, round_idx=0), pool=task.labeled)
    rows = list(calibration.evidence_rows(ctx, ids))
    assert boxes(seen) == boxes(generate_prompts(ctx, ImageBatch(samples), probs))
    assert [len(image) for image in seen] == [2, 2] and len(rows) == 4
    # Where the local model has no object of its own, its mask is empty.
    assert [row["dice_local"] for row in rows[1::2]] == [0.0, 0.0]


@pytest.mark.parametrize(("rim", "share"), [(0, 0.1), (2, 0.125)])
def test_object_areas_are_medians_per_class_and_shares_of_the_image_without_its_rim(rim, share):
    class TwoImages:
        ids = ("a", "b")

        def blank_mask(self, sample_id):
            return np.pad(np.zeros((10 - rim, 10), np.uint8), ((0, rim), (0, 0)), constant_values=255)

        def mask_resized(self, sample_id):
            mask = np.zeros((10, 10), np.uint8)
            mask[:2, :5] = 1  # 10 %
            mask[5:7, :2] = 1 if sample_id == "a" else 0  # 4 %
            return mask

    assert median_object_area(TwoImages(), 3) == {1: pytest.approx(share)}


def middling(sample, *places) -> Probs:
    """Foreground probability .3 at the places, .02 elsewhere."""
    probs = probs_of(sample, *places).probs[1]
    foreground = np.where(probs > 0.5, np.float32(0.3), probs)
    return Probs(sample.sample_id, np.stack([1 - foreground, foreground]))


ELSEWHERE = (slice(20, 28), slice(2, 10))


def test_places_of_middling_probability_follow_the_objects_and_pass_the_gate_without_a_component(opened) -> None:
    task, images = opened
    local = replace(task, cfg=replace(CFG, prompts=PromptsConfig(doubtful=0.2)))
    both = probs_of(images[0], BELIEVED).probs.max(axis=0), middling(images[0], ELSEWHERE).probs[1]
    foreground = np.maximum(probs_of(images[0], BELIEVED).probs[1], both[1])
    probs = [Probs(images[0].sample_id, np.stack([1 - foreground, foreground])), middling(images[1], ELSEWHERE)]
    ctx, batch = context(local), ImageBatch(images[:2])
    prompts = generate_prompts(ctx, batch, probs)
    assert [[p.component is None for p in of_image] for of_image in prompts] == [[False, True], [True]]
    assert prompts[0][1].box.tolist() == prompts[1][0].box.tolist() == [0, 18, 11, 29]
    assert prompts[0][1].mask_input is None and prompts[0][0].mask_input is not None
    (decision,) = candidates.gate_batch(ctx, batch, probs, *segment_prompts(ctx, batch, prompts), [None, None])[1]
    assert np.isnan(decision.evidence.agreement_iou) and 0.1 < decision.evidence.confidence_inside < 0.31
    free = ImageBatch([replace(image, image_label=0) for image in images[:2]])
    assert generate_prompts(ctx, free, probs) == [[], []]


def test_proposals_take_the_middling_places_that_they_cover(opened) -> None:
    task, images = opened
    ctx = context(replace(task, cfg=replace(AUTO, prompts=replace(AUTO.prompts, doubtful=0.2))))
    batch = ImageBatch(images)
    probs = [middling(images[0], BELIEVED), probs_of(images[1]), middling(images[2], BELIEVED, ELSEWHERE)]
    prompts = generate_prompts(ctx, batch, probs)
    assert [len(of_image) for of_image in prompts] == [1, 0, 2] and set(batch.embedded) == {0, 2}
    mask = np.zeros(images[0].image.shape[:2], bool)
    mask[PROPOSED] = True
    box = grow_box(tight_box(mask), AUTO.prompts.box_margin, *mask.shape).tolist()
    assert [of_image[0].box.tolist() for of_image in (prompts[0], prompts[2])] == [box, box]
    assert prompts[2][1].box.tolist() == [0, 18, 11, 29]
    assert all(prompt.component is None for of_image in prompts for prompt in of_image)


def test_an_object_of_several_boxes_has_one_candidate_and_one_decision(opened) -> None:
    task, images = opened
    ctx = context(replace(task, cfg=replace(CFG, prompts=PromptsConfig(box_scales=(1.0, 1.2, 1.5)))))
    batch, probs = ImageBatch(images), [probs_of(image, BELIEVED) for image in images]
    prompts, segmented = segment_prompts(ctx, batch, generate_prompts(ctx, batch, probs))
    assert [len(of_image) for of_image in segmented] == [1, 1, 1]
    assert segmented[0][0].jittered_masks.shape[0] == 2 + 3 and prompts[0][0].scaled_boxes.shape == (2, 4)


class NoPoints(Ellipse):
    abilities = Abilities(points=False, mask_input=False)


def test_a_person_s_prompts_come_first_and_are_marked_in_the_table(task_of) -> None:
    box, point = np.array([3, 3, 15, 15], np.float32), np.array([[25, 25]], np.float32)
    task, _ = task_of(replace(CFG, rounds=1), segmenter=NoPoints())
    images = [task.unlabeled.sample(i) for i in task.unlabeled.ids[:2]]
    marks = {"point_coords": point, "point_labels": np.array([1], np.int64), "origin": "person"}
    drawn = (Prompts(1, box, **marks), Prompts(1, None, **marks))
    ctx = context(replace(task, person=PersonPrompts({images[0].sample_id: drawn})))
    batch, probs = ImageBatch(images), [probs_of(image, BELIEVED) for image in images]
    prompts = generate_prompts(ctx, batch, probs)
    # The object of the model lies in the person's box; a point where it sees nothing has no box, which is needed here.
    assert [[own.origin for own in of_image] for of_image in prompts] == [["person"], ["model"]]
    assert prompts[0][0].point_coords is None and prompts[0][0].mask_input is None, "not taken, so not recorded"
    prompts, found = segment_prompts(ctx, batch, prompts)
    decisions = candidates.gate_batch(ctx, batch, probs, prompts, found, [None] * len(probs))
    rows, _ = table_rows(images, prompts, found, decisions, [None, None])
    assert [row.origin for row in rows] == ["person", "model"]
    assert [row.to_prompts().origin for row in rows] == ["person", "model"]


def test_masks_of_neighbouring_slices_are_predicted_whatever_the_batch(opened, tmp_path, monkeypatch) -> None:
    task, images = opened
    names = [slice_id("volume", n) for n in range(4)]
    source = MemorySource(dict.fromkeys(names, images[0].image), {})
    pool = Pool(SampleCache(source, 32, tmp_path, "stop"), names, dict.fromkeys(names, "volume"))
    predicted = {i: probs_of(pool.sample(i), *[BELIEVED] * (n % 2)) for n, i in enumerate(names)}
    infer = lambda model, pool, own, **_: [predicted[image.sample_id] for image in own]  # noqa: E731
    monkeypatch.setattr(candidates, "infer_by_labels", infer)
    ctx, batch = replace(context(task), pool=pool), ImageBatch([pool.sample(names[1])])
    probs = predict_probs(ctx, batch)
    assert probs == [predicted[names[1]]] and set(batch.slices) == {names[0], names[2]} and not batch.vetoed
    objects = segment_prompts(ctx, batch, generate_prompts(ctx, batch, probs))
    (alone,) = candidates.gate_batch(ctx, batch, probs, *objects, [None])
    assert [d.evidence.slice_dice for d in alone] == [0.0]
    predicted[names[0]] = replace(predicted[names[3]], sample_id=names[0])
    predict_probs(ctx, batch)
    (beside,) = candidates.gate_batch(ctx, batch, probs, *objects, [None])
    iou = beside[0].evidence.agreement_iou
    assert beside[0].evidence.slice_dice == pytest.approx(2 * iou / (1 + iou)) and iou > 0
