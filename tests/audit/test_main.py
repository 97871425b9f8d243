"""audit: the story of every mask, planted faults in the first fifth, withheld masks closed, verdicts taken in."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.loop_command import OPEN_GATE, SMALL, run_loop
from helpers.planted_faults import plant

from kmine.audit import __main__ as audit
from kmine.audit.evidence import (
    load_reference_models,
    rank_all_masks,
)
from kmine.audit.history import COLUMNS
from kmine.audit.rounds import load_rounds, select_round
from kmine.cli import Terminal, parse
from kmine.config import LoopConfig
from kmine.data.cache.sample_cache import SampleCache
from kmine.feedback.verdicts import FORMAT, mask_signature, read_verdicts
from kmine.io.files import encode_png
from kmine.setup.open import open_for_audit
from kmine.setup.preflight import preflight
from kmine.store.run_folder import RunFolder

TINY = {
    **SMALL,
    **OPEN_GATE,
    "gate.mode": "thresholds",
    "data.num_samples": 40,
    "data.label_fraction": 0.4,
    "fit.steps": 8,
    "fit.round_steps": 4,
    "fit.val_every": 4,
    "adapt.folds": 2,
    "adopt_tolerance": 1,
    "rounds": 2,
    "refine.ask_local": "false",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A finished run, with the models of its parts."""
    folder = tmp_path_factory.mktemp("audit") / "run"
    assert run_loop(TINY, folder) == 0
    assert audit.main([str(folder), "--device", "cpu"]) == 0
    return folder


@pytest.fixture
def run(made, tmp_path) -> Path:
    """The same, to be changed."""
    return Path(shutil.copytree(made, tmp_path / "run"))


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "audit.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def opened(run: Path):
    cfg = parse(LoopConfig, ["--config", str(run / "config.yaml")], prog="test", description="")
    source, store = preflight(cfg), RunFolder(run)
    return open_for_audit(cfg, source, store, Terminal()), store


def test_every_mask_has_one_row_with_its_whole_story(made):
    found = rows(made / "audit")
    assert tuple(found[0]) == COLUMNS
    pseudo = [row for row in found if row["kind"] == "pseudo"]
    last = max(int(p.name[-2:]) for p in made.glob("round_*"))
    masks = list((made / f"round_{last:02}" / "pseudo_masks").glob("*.png"))
    assert len(pseudo) == len(masks) > 3
    assert [int(row["rank"]) for row in pseudo] == list(range(1, len(pseudo) + 1))
    values = [float(row["suspicion"]) for row in pseudo]
    assert values == sorted(values, reverse=True)
    for row in pseudo:
        assert row["made_by"] and row["model_sha256"] and row["segmenter"] == "ellipse" and row["reason"]
        assert row["withheld_dice"] == "" and int(row["entered"]) <= int(row["round"])
    labeled = [row for row in found if row["kind"] == "labeled"]
    assert {row["sample_id"] for row in labeled} == {
        row["sample_id"] for row in csv.DictReader((made / "splits.csv").open()) if row["split"] == "labeled"
    }


def test_the_page_shows_what_the_table_says(made):
    data = (made / "audit" / "audit_data" / "index_0.js").read_text().removeprefix('kmineAudit.take("index",0,')
    index = json.loads(data.rstrip().removesuffix(");"))
    table = {(row["kind"], row["sample_id"]): row for row in rows(made / "audit")}
    assert len(index["rows"]) == len(table) > 3 and {"area", "signal_area"} <= set(index["facts"])
    for row in index["rows"]:
        facts = dict(zip(index["facts"], row[-len(index["facts"]) :], strict=True))
        for name in ("area", "ignored", "signal_area", "signal_conflict"):
            told = table[row[1], row[0]][name]
            assert facts[name] == (pytest.approx(float(told), rel=1e-3, abs=1e-6) if told else None)


def test_nobody_who_learned_a_mask_is_asked_about_it(made):
    for row in rows(made / "audit"):
        asked = row["asked_models"].split()
        # A given mask: the model whose part it is. A mined one: those of the parts, and round 0 where another asked.
        assert len(asked) == 1 if row["kind"] == "labeled" else {"fold_0", "fold_1"} <= set(asked)
        assert row["kind"] == "pseudo" or asked[0].startswith("fold_")
        assert row["asked_by"] not in asked


def test_withheld_masks_stay_closed_unless_asked_for(run, monkeypatch, capsys):
    store = RunFolder(run)
    mined = {i for one in load_rounds(store) for i in one.decisions}
    store.close()
    opened_masks: list[str] = []
    for name in ("mask_resized", "mask_native"):
        real = getattr(SampleCache, name)
        monkeypatch.setattr(SampleCache, name, lambda self, i, real=real: opened_masks.append(i) or real(self, i))
    assert audit.main([str(run), "--device", "cpu", "--out", str(run / "closed")]) == 0
    assert opened_masks and not mined.intersection(opened_masks)
    assert "withheld_opened" not in json.loads((run / "run.json").read_text())
    assert audit.main([str(run), "--device", "cpu", "--with-withheld"]) == 0
    assert mined.intersection(opened_masks)
    assert len(json.loads((run / "run.json").read_text())["withheld_opened"]) == 1
    found = [row for row in rows(run / "audit") if row["kind"] == "pseudo"]
    assert all(0 <= float(row["withheld_dice"]) <= 1 for row in found)
    assert (run / "audit" / "strata.csv").read_text().startswith("stratum,value,count,mean_dice\nsize,small")


def test_planted_faults_are_in_the_first_fifth(run, monkeypatch):
    """Models that know the truth stand for innocent ones: the ranking is measured, not eight steps of training."""
    task, store = opened(run)
    past = load_rounds(store)
    this = select_round(past, None, run)
    truth = {ref.sample_id: task.val._cache.mask_resized(ref.sample_id) for ref in task.val._cache.refs}

    def blurred(task, models, pool, ids, tta="none"):
        for n, sample_id in enumerate(ids):
            noise = np.random.default_rng(n).normal(0, 0.1, truth[sample_id].shape)
            p = np.clip(np.where(truth[sample_id] == 1, 0.8, 0.1) + noise, 0, 1).astype(np.float32)
            yield sample_id, np.stack([1 - p, p])

    monkeypatch.setattr("kmine.audit.evidence.mean_probabilities", blurred)
    rng = np.random.default_rng(0)
    ids = [i for i in this.pseudo_labeled if truth[i].any()]
    labeled = {i: truth[i] for i in task.labeled.ids}
    wrong = plant({i: truth[i] for i in ids}, 0.2, rng)
    wrong_given = plant(labeled, 0.2, rng)
    for name in ids:
        mask = wrong[name][1] if name in wrong else truth[name]
        store.pseudo_path(this.round_idx, name).write_bytes(encode_png(mask, this.signature, this.round_idx))
    given = task.labeled.with_masks(task.labeled.ids, lambda i: wrong_given[i][1] if i in wrong_given else labeled[i])
    pseudo, found = rank_all_masks(task, past, this, with_labeled=True, labeled=given)
    first = {one.sample_id for one in pseudo if one.sample_id in ids} and [
        o.sample_id for o in pseudo if o.sample_id in ids
    ]
    assert len(wrong) >= 3 and len(wrong.keys() & set(first[: len(wrong) + 1])) >= 0.8 * len(wrong)
    head = {one.sample_id for one in found[: len(wrong_given) + 1]}
    assert len(wrong_given) >= 2 and len(wrong_given.keys() & head) >= 0.7 * len(wrong_given)
    assert all(one.explanations for one in found[:1])
    store.close()


def test_models_of_the_parts_are_trained_only_where_given_masks_are_looked_at(run):
    for folder in run.glob("fold_*"):
        shutil.rmtree(folder)
    task, store = opened(run)
    past = load_rounds(store)
    asked = load_reference_models(task, past, past[-1].pseudo_labeled, train_folds=False)
    assert "round_00" in [one.name for one in asked.references] and not list(run.glob("fold_*"))
    store.close()
    assert audit.main([str(run), "--device", "cpu", "--no-labeled"]) == 0
    assert not list(run.glob("fold_*")) and {row["kind"] for row in rows(run / "audit")} == {"pseudo"}


def verdicts(run: Path, **changes: object) -> Path:
    found = rows(run / "audit")
    said = [
        {name: row[name] for name in ("sample_id", "kind", "mask_signature")} | {"verdict": word, "note": ""}
        for row, word in zip(found, ("reject", "accept", "unsure"), strict=False)
    ]
    value = {"format": FORMAT, "run": "run", "run_signature": "", "verdicts": said} | changes
    (run.parent / "verdicts.json").write_text(json.dumps(value))
    return run.parent / "verdicts.json"


def test_verdicts_and_corrected_masks_are_taken_in(run, capsys):
    assert audit.main([str(run), "--device", "cpu", "--export", "masks"]) == 0
    found = rows(run / "audit")
    masks = run / "audit" / "masks"
    assert len(list(masks.glob("*.png"))) == len(found)
    name = found[0]["sample_id"]
    from PIL import Image

    drawn = np.asarray(Image.open(masks / f"{name}.png")).copy()
    drawn[:3, :3] = 1
    Image.fromarray((drawn == 1).astype(np.uint8) * 255).save(masks / f"{name}.png")
    words = [str(run), "--device", "cpu", "--verdicts", str(verdicts(run)), "--corrected", str(masks)]
    assert audit.main(words) == 0
    assert "1 accept, 1 reject, 1 unsure, 1 corrected" in capsys.readouterr().err
    kept = read_verdicts(run / "verdicts.json")
    assert kept.rejected == {name} and kept.run_signature and set(kept.corrected) == {name}
    assert (np.asarray(Image.open(kept.corrected[name])) == (drawn == 1)).all()
    entry = json.loads((run / "verdicts.json").read_text())["corrected"][name]
    assert entry["mask_signature"] == mask_signature((drawn == 1).astype(np.uint8))


def test_a_verdict_does_not_pass_over_to_another_mask(run, capsys):
    store = RunFolder(run)
    row = rows(run / "audit")[0]
    path = store.pseudo_path(int(row["round"]), row["sample_id"])
    path.write_bytes(encode_png(1 - np.minimum(store.pseudo_mask(int(row["round"]), row["sample_id"]), 1), "x", 1))
    store.close()
    assert audit.main([str(run), "--device", "cpu", "--verdicts", str(verdicts(run))]) == 0
    assert f"1 verdicts on masks that have changed or are no longer used were left out: {row['sample_id']}" in (
        capsys.readouterr().err
    )
    assert read_verdicts(run / "verdicts.json").rejected == frozenset()


def refused(words: list[str], capsys: pytest.CaptureFixture[str], said: str) -> None:
    capsys.readouterr()
    assert audit.main([*words, "--device", "cpu"]) == 2
    err = capsys.readouterr().err
    last = err.splitlines()[-1]
    assert last.startswith("kmine audit: error: ") and said in last and "Traceback" not in err


def test_bad_input_is_one_line(run, tmp_path, capsys):
    refused([str(tmp_path)], capsys, "expected a run folder")
    refused([str(run), str(run)], capsys, "one run folder")
    refused([str(run), "--round", "9"], capsys, "--round 9: expected one of 1, 2")
    refused([str(run), "--verdicts", str(tmp_path / "none.json")], capsys, "no such file")
    strange = [{"sample_id": "nobody", "kind": "pseudo", "verdict": "accept"}]
    refused([str(run), "--verdicts", str(verdicts(run, verdicts=strange))], capsys, "nobody (pseudo)")
    (tmp_path / "small").mkdir()
    from PIL import Image

    name = rows(run / "audit")[0]["sample_id"]
    Image.fromarray(np.zeros((5, 4), np.uint8)).save(tmp_path / "small" / f"{name}.png")
    refused([str(run), "--corrected", str(tmp_path / "small")], capsys, "got 4 x 5")
    assert not (run / "corrected").exists() and not (run / "verdicts.json").exists()
    path = next((run / f"round_{rows(run / 'audit')[0]['round']:0>2}" / "pseudo_masks").glob("*.png"))
    whole = path.read_bytes()
    path.write_bytes(whole[:40])
    refused([str(run)], capsys, "cannot be read")
    path.write_bytes(whole)
    about = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(about | {"stopped_by": "interrupted"}))
    refused([str(run)], capsys, "not finished")
    (run / "run.json").write_text(json.dumps(about))
    for folder in run.glob("round_0[12]"):
        shutil.rmtree(folder)
    refused([str(run)], capsys, "found no pseudo masks")
