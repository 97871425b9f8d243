"""Plans: what is chosen, what was given, what a run folder keeps."""

from __future__ import annotations

import json

import pytest
from helpers.loop_command import write_pictures
from PIL import Image

from kmine import cli
from kmine.config import LoopConfig
from kmine.config.sweep import SweepConfig
from kmine.data import open_source
from kmine.errors import UserError
from kmine.loop import __main__ as loop
from kmine.loop import folds as folds_engine
from kmine.plan.engine import plan_run, planned_config
from kmine.sweep import __main__ as sweep


@pytest.fixture
def words(tmp_path):
    """Flags for 24 pictures of 32 px."""
    write_pictures(tmp_path, 24)
    where = [f"--data.images={tmp_path / 'images'}", f"--data.masks={tmp_path / 'masks'}", f"--out={tmp_path / 'run'}"]
    return ["--data.name=folder", *where, "--data.label_fraction=0.5"]


def parsed(words, *more, config=LoopConfig):
    cfg = cli.parse(config, [*words, *more], prog="kmine loop", description="")
    return cfg, frozenset(cli.GIVEN)


def planned(words, *more):
    cfg, given = parsed(words, *more)
    return plan_run(cfg, given, open_source(cfg.data))


def test_given_values_stay_and_the_rest_is_chosen(words, measured):
    plan = planned(words, "--fit.steps=70", "--model.encoder=resnet18")
    assert (plan.cfg.fit.steps, plan.cfg.model.encoder, plan.cfg.data.label_fraction) == (70, "resnet18", 0.5)
    assert (plan.cfg.data.size, plan.cfg.rounds, plan.cfg.data.val_fraction) == (32, 2, 0.2)
    by_name = {choice.setting: choice for choice in plan.choices}
    assert by_name["fit.steps"].why == "given" == by_name["data.label_fraction"].why
    assert by_name["fit.batch_size"].by_machine and not by_name["rounds"].by_machine
    assert planned(words).choices == planned(words).choices


def test_the_size_is_the_largest_that_the_time_allows(tmp_path, measured):
    write_pictures(tmp_path, 24)
    for path in (*(tmp_path / "images").iterdir(), *(tmp_path / "masks").iterdir()):
        Image.open(path).resize((300, 300), 0).save(path)
    where = [f"--data.images={tmp_path / 'images'}", f"--data.masks={tmp_path / 'masks'}"]
    chosen = [
        planned(["--data.name=folder", *where], f"--plan_minutes={minutes}").cfg.data.size
        for minutes in (4, 8, 16, 500)
    ]
    assert chosen == sorted(chosen) and chosen[0] < chosen[-1] == 256
    assert measured[-1] == 256, "the chosen size is measured"


def test_a_budget_that_nothing_meets_gives_up_rounds_and_steps_and_says_so(words, measured):
    plan = planned(words, "--plan_minutes=0.2")
    assert (plan.cfg.rounds, plan.cfg.fit.steps, plan.cfg.fit.round_steps) == (1, 300, 150)
    assert any("the budget is exceeded" in line for line in plan.lines())


def test_a_plan_in_words_names_every_choice_and_stage(words, measured):
    plan = planned(words)
    text = "\n".join(plan.lines())
    assert all(choice.setting in text and choice.why in text for choice in plan.choices)
    assert all(stage in text for stage in plan.estimate.seconds)
    assert json.loads(json.dumps(plan.record()))["minutes"] == 20


def test_a_begun_run_keeps_its_plan_and_flags_still_win(words, tmp_path, measured):
    cfg, given = parsed(words)
    new, record = planned_config(cfg, given, open_source(cfg.data), lambda _: None)
    run = tmp_path / "run"
    (run / "round_00").mkdir(parents=True)
    (run / "plan.json").write_text(json.dumps(record))
    (run / "round_00" / "fit_state.safetensors").touch()
    measured.clear()
    assert planned_config(cfg, given, open_source(cfg.data), lambda _: None) == (new, None)
    assert planned_config(cfg, given, None, lambda _: None) == (new, None), "several processes read it"
    more, given = parsed(words, "--rounds=5")
    assert planned_config(more, given, open_source(cfg.data), lambda _: None)[0].rounds == 5
    assert measured == [], "nothing is planned anew"


def test_runs_begun_without_a_plan_the_phantom_and_plan_false_are_left_alone(words, tmp_path, measured):
    def untouched(*more):
        cfg, given = parsed(*more)
        return planned_config(cfg, given, open_source(cfg.data), lambda _: None) == (cfg, None)

    assert untouched(["--config=phantom"]) and untouched(words, "--plan=false")
    (tmp_path / "run" / "round_00").mkdir(parents=True)
    (tmp_path / "run" / "round_00" / "model.safetensors").touch()
    assert untouched(words)
    assert measured == []


@pytest.mark.parametrize("text", ["{", "[]", '{"choices": 3}', '{"choices": [{"setting": "fit.steps", "value": {}}]}'])
def test_a_damaged_plan_is_one_line(words, tmp_path, text):
    (tmp_path / "run" / "round_00").mkdir(parents=True)
    (tmp_path / "run" / "round_00" / "model.safetensors").touch()
    (tmp_path / "run" / "plan.json").write_text(text)
    cfg, given = parsed(words)
    with pytest.raises(UserError, match=r"plan\.json.*remove it"):
        planned_config(cfg, given, None, lambda _: None)


def test_a_foreign_plan_cannot_set_other_settings(words, tmp_path):
    (tmp_path / "run" / "round_00").mkdir(parents=True)
    (tmp_path / "run" / "round_00" / "model.safetensors").touch()
    choices = [{"setting": "segmenter.checkpoint", "value": "/etc/passwd"}, {"setting": "fit.steps", "value": 33}]
    (tmp_path / "run" / "plan.json").write_text(json.dumps({"choices": choices}))
    cfg, given = parsed(words)
    found = planned_config(cfg, given, None, lambda _: None)[0]
    assert (found.segmenter.checkpoint, found.fit.steps) == (None, 33)


def test_a_sweep_is_planned_once_for_all_trials(words, tmp_path, measured):
    more = ["--fractions", "0.5", "1", "--models", "unet", "unetpp", f"--out={tmp_path / 'sweep'}"]
    cfg, given = parsed(words, *more, config=SweepConfig)
    found, record = sweep._planned(cfg, given, cli.Terminal(quiet=True))
    assert (found.data.size, found.fit.steps, found.models) == (32, 600, ["unet", "unetpp"])
    assert (found.model, found.data.label_fraction) == (cfg.model, cfg.data.label_fraction)
    assert {"data.size", "fit.steps"} <= {choice["setting"] for choice in record["choices"]}


def test_the_loop_trains_by_its_plan_and_resumes_it(words, tmp_path, measured, capsys):
    few = ["--fit.steps=2", "--fit.round_steps=2", "--rounds=0", "--device=cpu", "--data.test_fraction=0"]
    net = ["--model.name=unet", "--model.encoder=tu-mobilenetv3_small_050", f"--data.cache_dir={tmp_path / 'cache'}"]
    assert loop.main([*words, *few, *net]) == 0
    run = tmp_path / "run"
    record, config = json.loads((run / "plan.json").read_text()), (run / "config.yaml").read_text()
    assert "size: 32" in config and record["estimate"]["seconds"]
    assert "in all" in capsys.readouterr().err
    assert loop.main([*words, *few, *net]) == 0
    assert (run / "config.yaml").read_text() == config
    assert loop.main([*words, *few, *net, "--data.size=96"]) == 2
    assert "data.size = 32, this command has 96" in capsys.readouterr().err


def test_a_plan_of_folds_is_for_all_runs_and_says_so(words, measured):
    single, folds = planned(words), planned(words, "--data.folds=3")
    assert folds.data.num_val + folds.data.num_labeled + folds.data.num_unlabeled == 24, "the run on all masks"
    assert folds.estimate.total > 3 * single.estimate.total and folds.minutes == 4 * single.minutes
    assert folds.cfg.fit == single.cfg.fit and folds.cfg.data.size == single.cfg.data.size, "the recipe of one run"
    assert planned(words, "--data.folds=3", "--plan_minutes=0.2").cfg.rounds == 1, "a given time is for all of them"
    assert any(line.startswith("4 runs, 3 folds and one on all masks") for line in folds.lines())
    assert folds.cfg.data.folds == 3 and folds.cfg.data.fold is None


def test_every_fold_keeps_the_plan_of_all_runs(words, tmp_path, monkeypatch):
    cfg, _ = parsed(words, "--data.folds=3")
    begun = []
    monkeypatch.setattr(folds_engine, "run_rounds", lambda own, progress, source, plan: begun.append((own, plan)))
    plan = {"choices": [{"setting": "fit.steps", "value": 70}]}
    folds_engine.run_folds(cfg, cli.Terminal(quiet=True), open_source(cfg.data), plan)
    folds_engine.run_folds(cfg, cli.Terminal(quiet=True), open_source(cfg.data), None)
    assert [plan for _, plan in begun] == [plan] * 8
    assert json.loads((tmp_path / "run" / "plan.json").read_text()) == plan
