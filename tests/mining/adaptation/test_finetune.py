"""Laws of fine-tuning, on a segmenter with one weight: the share of the box that its mask fills."""

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
    """Fills the share `weight` of the box, from its top; fine-tuning moves `weight` to `target`."""

    fine_tune_defaults = FineTuneDefaults(steps=5, batch_size=3, lr=0.01)

    def __init__(self, weight: float = 0.5, target: float = 1.0, name: str = "filler") -> None:
        self.weight, self.target, self.name = weight, target, name
        self.encoded: list[int] = []
        self.examples: list = []

    @property
    def signature(self) -> str:
        return f"filler {self.weight}"

    def encode(self, images):
        self.encoded += [int(image[0, 0, 0]) for image in images]
        return [Embedding(size=image.shape[:2], image=image) for image in images]

    def decode(self, embeddings, prompts):
        return [[self._candidate(e.size, p) for p in of_image] for e, of_image in zip(embeddings, prompts, strict=True)]

    def _candidate(self, size, prompts):
        mask = np.zeros(size, bool)
        x0, y0, x1, y1 = prompts.box
        rows = round(float(np.clip(self.weight, 0, 1)) * (y1 - y0 + 1))
        mask[round(y0) : round(y0) + rows, round(x0) : round(x1) + 1] = True
        nothing = np.zeros((0, *size), bool)
        return Candidate(mask[None], np.array([0.5], np.float32), np.array([1.0], np.float32), None, nothing)

    def fine_tuner(self):
        return FillerTuner(self)

    def with_weights(self, state):
        out = Filler(float(state["weight"]), self.target, f"{self.name}+adapted")
        out.encoded = self.encoded
        return out


class FillerTuner:
    def __init__(self, filler: Filler) -> None:
        self.filler, self.weight = filler, torch.nn.Parameter(torch.tensor(filler.weight))

    def parameters(self):
        return [self.weight]

    def loss(self, examples, seed):
        self.filler.examples += examples
        return (self.weight - self.filler.target) ** 2

    def state(self):
        return {"weight": self.weight.detach().clone()}


def sample(number: int, *boxes, size: int = 60) -> Sample:
    mask = np.zeros((size, size), np.uint8)
    for x0, y0, x1, y1 in boxes:
        mask[y0 : y1 + 1, x0 : x1 + 1] = 1
    return Sample(f"s{number}", f"s{number}", np.full((size, size, 3), number, np.uint8), mask)


def local_prompts(box, size: int = 60, class_id: int = 1) -> Prompts:
    component = np.zeros((size, size), bool)
    x0, y0, x1, y1 = box
    component[y0 : y1 + 1, x0 : x1 + 1] = True
    return Prompts(class_id, np.array(box, np.float32), component=component)


BOX = (10, 10, 29, 29)
TRAIN = [(sample(n, BOX), [local_prompts(BOX)]) for n in range(3)]
HELD_OUT = [(sample(n, BOX), [local_prompts(BOX)]) for n in range(7, 9)]


def run(segmenter, train=TRAIN, held_out=HELD_OUT, cfg=CFG, seed=0, **kwargs):
    return adapt(segmenter, train, held_out, cfg, seed=seed, **kwargs)


def test_the_fake_is_fine_tunable():
    assert isinstance(Filler(), FineTunable)


def test_a_better_segmenter_is_used_and_named():
    given = Filler(0.5)
    result = run(given)
    assert result.used
    assert result.segmenter.name == "filler+adapted"
    assert result.iou_before == pytest.approx(0.5)
    assert result.iou_after > 0.9
    assert result.best_step in {step for step, _, _ in result.history}
    assert (given.weight, given.name) == (0.5, "filler")
    assert mean_iou(result.segmenter, []) != mean_iou(result.segmenter, [])  # NaN without examples


def test_a_worse_one_is_not_used():
    given = Filler(1.0, target=0.2)
    result = run(given)
    assert not result.used
    assert result.state is None
    assert result.segmenter is given
    assert (result.best_step, result.iou_after) == (0, 1.0)


def test_a_gain_below_the_threshold_is_not_used():
    result = run(Filler(0.9), cfg=AdaptConfig(steps=40, batch_size=2, lr=0.1, val_every=10, min_gain=0.2))
    assert not result.used
    assert result.iou_after > result.iou_before


def test_the_best_check_wins_not_the_last():
    """The weight runs through the best value (1.0 of the box) and beyond to nothing at all."""

    class Overshoot(Filler):
        def _candidate(self, size, prompts):
            self_weight, self.weight = self.weight, 1 - abs(1 - self.weight)
            try:
                return super()._candidate(size, prompts)
            finally:
                self.weight = self_weight

        def with_weights(self, state):
            return Overshoot(float(state["weight"]), self.target)

    result = run(Overshoot(0.5, target=1.9))
    assert result.used
    assert result.best_step < CFG.steps
    assert result.iou_after > result.history[-1][2]


def test_each_image_is_encoded_once():
    given = Filler()
    run(given)
    assert sorted(given.encoded) == [0, 1, 2, 7, 8]


def test_examples_have_local_prompts_or_jittered_true_boxes():
    given = Filler()
    run(given, train=[(sample(1, BOX, (40, 40, 55, 50)), [local_prompts((8, 9, 31, 28))])])
    local = [example for example in given.examples if example.prompts.component is not None]
    jittered = [example for example in given.examples if example.prompts.component is None]
    assert len(local) > 10
    assert len(jittered) > 10
    assert {int(example.mask.sum()) for example in local} == {400}  # the object that matches the prompt
    assert {int(example.mask.sum()) for example in jittered} == {400, 176}
    assert len({tuple(example.prompts.box) for example in jittered}) == len(jittered)


def test_a_false_alarm_or_another_class_is_an_example_with_an_empty_mask():
    given = Filler()
    run(given, train=[(sample(1, BOX), [local_prompts((40, 40, 50, 50)), local_prompts(BOX, class_id=2)])])
    local = [example for example in given.examples if example.prompts.component is not None]
    assert local
    assert not any(example.mask.any() for example in local)


def test_the_seed_determines_the_examples():
    def boxes(seed):
        given = Filler()
        run(given, seed=seed)
        return [tuple(example.prompts.box) for example in given.examples]

    assert boxes(0) == boxes(0)
    assert boxes(0) != boxes(1)


def test_held_out_images_are_prompted_by_the_local_model():
    result = run(
        Filler(), held_out=[(sample(1, BOX, (40, 40, 55, 50)), [local_prompts(BOX), local_prompts((35, 5, 50, 9))])]
    )
    assert (result.held_out_prompts, result.num_held_out) == ("local", 1)


def test_jittered_boxes_validate_where_the_local_model_found_nothing():
    result = run(Filler(), held_out=[(sample(1, BOX, (40, 40, 55, 50)), [])])
    assert (result.held_out_prompts, result.num_held_out) == ("shaken", 2)


@pytest.mark.parametrize(
    ("train", "held_out"),
    [([], HELD_OUT), (TRAIN, []), ([(sample(1), [])], HELD_OUT), (TRAIN, [(sample(2), [])])],
    ids=["no training", "no validation", "nothing labeled", "nothing in validation"],
)
def test_without_objects_the_segmenter_stays_as_it_is(train, held_out):
    given = Filler()
    result = run(given, train=train, held_out=held_out)
    assert (result.used, result.segmenter, result.history) == (False, given, ())


def test_objects_of_a_few_pixels_are_not_used():
    assert run(Filler(), train=[(sample(1, (5, 5, 8, 8)), [])]).num_objects == 0


def test_defaults_of_the_segmenter_fill_open_settings():
    given = Filler()
    result = run(given, cfg=AdaptConfig(val_every=2))
    assert [step for step, _, _ in result.history] == [0, 2, 4, 5]
    assert len(given.examples) == 15


def test_a_given_jitter_is_kept_and_a_missing_one_is_measured():
    assert run(Filler(), jitter=0.07).jitter == 0.07
    assert run(Filler()).jitter == 0.05  # local boxes equal the true ones: the lower limit


def test_progress_is_reported_after_every_step():
    calls = []
    run(Filler(), progress=lambda done, loss, iou: calls.append((done, np.isfinite(iou))))
    assert calls == [(n + 1, (n + 1) % 10 == 0) for n in range(40)]


def test_a_loss_that_is_not_finite_stops():
    class Broken(FillerTuner):
        def loss(self, examples, seed):
            return self.weight * float("nan")

    class Bad(Filler):
        def fine_tuner(self):
            return Broken(self)

    with pytest.raises(FloatingPointError, match=r"lower adapt\.lr"):
        run(Bad())


def test_measured_jitter_by_hand():
    truth = local_prompts((10, 10, 30, 50)).component  # sides 20 and 40
    # Edges off by 2, 4, 2, 4: a tenth of the side each; uniform jitter of twice that has this mean.
    assert measured_jitter([(local_prompts((8, 6, 32, 54)), truth)]) == pytest.approx(0.2)
    assert measured_jitter([(local_prompts((10, 10, 30, 50)), truth)]) == 0.05  # never less
    assert measured_jitter([(local_prompts((0, 0, 59, 59)), truth)]) == 0.3  # never more
    assert measured_jitter([]) == pytest.approx(0.175)
    assert measured_jitter([(local_prompts((0, 0, 59, 59)), np.zeros((60, 60), bool))]) == pytest.approx(0.175)
