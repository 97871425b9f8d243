"""Laws of adaptation, on a segmenter with one weight: how much of the box its mask fills."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kmine.config import AdaptConfig
from kmine.mining.adaptation.finetune import adapt, mean_iou, measured_jitter
from kmine.segmenters.base import Embedding, FineTunable, FineTuneDefaults
from kmine.types import Candidate, Prompts, Sample

CFG = AdaptConfig(steps=40, batch_size=2, lr=0.1, val_every=10, min_gain=0.01)


class Filler:
    """Fills the share `weight` of the box, from its top; learns the share that `target` names."""

    fine_tune_defaults = FineTuneDefaults(steps=5, batch_size=3, lr=0.01)

    def __init__(self, weight: float = 0.5, target: float = 1.0, name: str = "filler") -> None:
        self.weight, self.target, self.name = weight, target, name
        self.encoded: list[int] = []
        self.lessons: list = []

    @property
    def signature(self) -> str:
        return f"filler {self.weight}"

    def encode(self, images):
        self.encoded += [int(image[0, 0, 0]) for image in images]
        return [Embedding(size=image.shape[:2], image=image) for image in images]

    def decode(self, embeddings, prompts):
        return [[self._answer(e.size, one) for one in asked] for e, asked in zip(embeddings, prompts, strict=True)]

    def _answer(self, size, prompts):
        mask = np.zeros(size, bool)
        x0, y0, x1, y1 = prompts.box
        rows = round(float(np.clip(self.weight, 0, 1)) * (y1 - y0 + 1))
        mask[round(y0) : round(y0) + rows, round(x0) : round(x1) + 1] = True
        nothing = np.zeros((0, *size), bool)
        return Candidate(mask[None], np.array([0.5], np.float32), np.array([1.0], np.float32), None, nothing)

    def fine_tuner(self):
        return Pupil(self)

    def with_weights(self, state):
        out = Filler(float(state["weight"]), self.target, f"{self.name}+adapted")
        out.encoded = self.encoded
        return out


class Pupil:
    def __init__(self, of: Filler) -> None:
        self.of, self.weight = of, torch.nn.Parameter(torch.tensor(of.weight))

    def parameters(self):
        return [self.weight]

    def loss(self, lessons, seed):
        self.of.lessons += lessons
        return (self.weight - self.of.target) ** 2

    def state(self):
        return {"weight": self.weight.detach().clone()}


def sample(number: int, *boxes, size: int = 60) -> Sample:
    mask = np.zeros((size, size), np.uint8)
    for x0, y0, x1, y1 in boxes:
        mask[y0 : y1 + 1, x0 : x1 + 1] = 1
    return Sample(f"s{number}", f"s{number}", np.full((size, size, 3), number, np.uint8), mask)


def asked(box, size: int = 60, class_id: int = 1) -> Prompts:
    part = np.zeros((size, size), bool)
    x0, y0, x1, y1 = box
    part[y0 : y1 + 1, x0 : x1 + 1] = True
    return Prompts(class_id, np.array(box, np.float32), component=part)


BOX = (10, 10, 29, 29)
TRAIN = [(sample(n, BOX), [asked(BOX)]) for n in range(3)]
HELD_OUT = [(sample(n, BOX), [asked(BOX)]) for n in range(7, 9)]


def run(segmenter, train=TRAIN, held_out=HELD_OUT, cfg=CFG, seed=0, **kwargs):
    return adapt(segmenter, train, held_out, cfg, seed=seed, **kwargs)


def test_the_fake_is_adaptable():
    assert isinstance(Filler(), FineTunable)


def test_a_better_segmenter_is_used_and_named():
    given = Filler(0.5)
    found = run(given)
    assert found.used
    assert found.segmenter.name == "filler+adapted"
    assert found.iou_before == pytest.approx(0.5)
    assert found.iou_after > 0.9
    assert found.best_step in {step for step, _, _ in found.history}
    assert (given.weight, given.name) == (0.5, "filler")
    assert mean_iou(found.segmenter, []) != mean_iou(found.segmenter, [])  # NaN without lessons


def test_a_worse_one_is_not_used():
    given = Filler(1.0, target=0.2)
    found = run(given)
    assert not found.used
    assert found.state is None
    assert found.segmenter is given
    assert (found.best_step, found.iou_after) == (0, 1.0)


def test_a_gain_below_the_threshold_is_not_used():
    found = run(Filler(0.9), cfg=AdaptConfig(steps=40, batch_size=2, lr=0.1, val_every=10, min_gain=0.2))
    assert not found.used
    assert found.iou_after > found.iou_before


def test_the_best_check_wins_not_the_last():
    """The weight runs through the best value (1.0 of the box) and beyond to nothing at all."""

    class Overshoot(Filler):
        def _answer(self, size, prompts):
            self_weight, self.weight = self.weight, 1 - abs(1 - self.weight)
            try:
                return super()._answer(size, prompts)
            finally:
                self.weight = self_weight

        def with_weights(self, state):
            return Overshoot(float(state["weight"]), self.target)

    found = run(Overshoot(0.5, target=1.9))
    assert found.used
    assert found.best_step < CFG.steps
    assert found.iou_after > found.history[-1][2]


def test_each_image_is_encoded_once():
    given = Filler()
    run(given)
    assert sorted(given.encoded) == [0, 1, 2, 7, 8]


def test_lessons_are_local_prompts_and_shaken_true_boxes():
    given = Filler()
    run(given, train=[(sample(1, BOX, (40, 40, 55, 50)), [asked((8, 9, 31, 28))])])
    local = [one for one in given.lessons if one.prompts.component is not None]
    shaken = [one for one in given.lessons if one.prompts.component is None]
    assert len(local) > 10
    assert len(shaken) > 10
    assert {int(one.mask.sum()) for one in local} == {400}  # the object that the prompt means
    assert {int(one.mask.sum()) for one in shaken} == {400, 176}
    assert len({tuple(one.prompts.box) for one in shaken}) == len(shaken)


def test_a_false_alarm_teaches_an_empty_mask_and_another_class_is_one():
    given = Filler()
    run(given, train=[(sample(1, BOX), [asked((40, 40, 50, 50)), asked(BOX, class_id=2)])])
    local = [one for one in given.lessons if one.prompts.component is not None]
    assert local
    assert not any(one.mask.any() for one in local)


def test_the_same_seed_gives_the_same_lessons_and_another_others():
    def boxes(seed):
        given = Filler()
        run(given, seed=seed)
        return [tuple(one.prompts.box) for one in given.lessons]

    assert boxes(0) == boxes(0)
    assert boxes(0) != boxes(1)


def test_held_out_images_are_asked_as_the_local_model_asks():
    found = run(Filler(), held_out=[(sample(1, BOX, (40, 40, 55, 50)), [asked(BOX), asked((35, 5, 50, 9))])])
    assert (found.held_out_prompts, found.num_held_out) == ("local", 1)


def test_shaken_boxes_judge_where_the_local_model_found_nothing():
    found = run(Filler(), held_out=[(sample(1, BOX, (40, 40, 55, 50)), [])])
    assert (found.held_out_prompts, found.num_held_out) == ("shaken", 2)


@pytest.mark.parametrize(
    ("train", "held_out"),
    [([], HELD_OUT), (TRAIN, []), ([(sample(1), [])], HELD_OUT), (TRAIN, [(sample(2), [])])],
    ids=["no training", "no validation", "nothing labeled", "nothing in validation"],
)
def test_nothing_to_learn_from_or_to_judge_by(train, held_out):
    given = Filler()
    found = run(given, train=train, held_out=held_out)
    assert (found.used, found.segmenter, found.history) == (False, given, ())


def test_objects_of_a_few_pixels_are_not_taught():
    assert run(Filler(), train=[(sample(1, (5, 5, 8, 8)), [])]).num_objects == 0


def test_the_plan_fills_what_the_settings_leave_open():
    given = Filler()
    found = run(given, cfg=AdaptConfig(val_every=2))
    assert [step for step, _, _ in found.history] == [0, 2, 4, 5]
    assert len(given.lessons) == 15


def test_a_given_jitter_is_kept_and_a_missing_one_is_measured():
    assert run(Filler(), jitter=0.07).jitter == 0.07
    assert run(Filler()).jitter == 0.05  # the local boxes are the true ones: the least there is


def test_progress_is_told_after_every_step():
    told = []
    run(Filler(), progress=lambda done, loss, iou: told.append((done, np.isfinite(iou))))
    assert told == [(n + 1, (n + 1) % 10 == 0) for n in range(40)]


def test_a_loss_that_is_not_finite_stops():
    class Broken(Pupil):
        def loss(self, lessons, seed):
            return self.weight * float("nan")

    class Bad(Filler):
        def fine_tuner(self):
            return Broken(self)

    with pytest.raises(FloatingPointError, match=r"lower adapt\.lr"):
        run(Bad())


def test_measured_jitter_by_hand():
    truth = asked((10, 10, 30, 50)).component  # sides 20 and 40
    # Edges off by 2, 4, 2, 4: a tenth of the side each; uniform jitter of twice that has this mean.
    assert measured_jitter([(asked((8, 6, 32, 54)), truth)]) == pytest.approx(0.2)
    assert measured_jitter([(asked((10, 10, 30, 50)), truth)]) == 0.05  # never less
    assert measured_jitter([(asked((0, 0, 59, 59)), truth)]) == 0.3  # never more
    assert measured_jitter([]) == pytest.approx(0.175)
    assert measured_jitter([(asked((0, 0, 59, 59)), np.zeros((60, 60), bool))]) == pytest.approx(0.175)
