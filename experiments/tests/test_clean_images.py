"""Clean images in the tables of the experiments: a false alarm costs, silence does not, whichever arm it is."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest

NAN = float("nan")


def script(name: str) -> ModuleType:
    path = Path(__file__).resolve().parents[1] / name
    spec = importlib.util.spec_from_file_location(f"experiment_{path.parent.name}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_room_counts_every_image_of_both(tmp_path):
    rows = [("r0", "b", NAN), ("r0", "a", 0.5), ("r1", "a", 0.7), ("r1", "b", 0.0)]
    cases = pd.DataFrame(
        [{"run": r, "arm": "mining", "checkpoint": "chosen", "sample_id": i, "dice": d} for r, i, d in rows]
    )
    cases.to_csv(tmp_path / "test_cases.csv")
    room = script("room.py")
    assert room.scores(tmp_path, "mining").tolist() == [[0.5, 1.0], [0.7, 0.0]]
    cases.assign(score=[0.9, 0.6, 0.7, 0.1]).to_csv(tmp_path / "test_cases.csv")
    assert room.scores(tmp_path, "mining").tolist() == [[0.6, 0.9], [0.7, 0.1]]


def test_the_mining_engine_pairs_clean_images_and_leaves_out_those_that_a_seed_lacks(tmp_path):
    engine = script("mining_engine/run.py")

    def cell(seed: int, arm: str, **dice: float) -> None:
        rows = [
            {"split": split, "checkpoint": "chosen", "sample_id": i, "dice": d, "clean": i > "l"}
            for split in ("val", "test")
            for i, d in dice.items()
        ]
        path = tmp_path / f"covid-30-{seed}" / f"{arm}.csv"
        path.parent.mkdir(exist_ok=True)
        pd.DataFrame(rows).to_csv(path, index=False)

    cell(0, "supervised", a=0.5, x=NAN, y=NAN)
    cell(1, "supervised", a=0.5, z=NAN)
    cell(0, "mining", a=0.6, x=0.0, y=NAN)
    cell(1, "mining", a=0.5, z=NAN)
    cell(0, "supervised_once", a=0.4, x=NAN, y=NAN)
    cell(1, "supervised_once", a=0.7, z=NAN)
    read = engine.read(tmp_path, "results")
    rows = engine.with_baseline(read).query("split == 'test'")
    baseline = rows[rows["arm"] == engine.BASELINE].set_index(["seed", "sample_id"])["dice"]
    assert (baseline[0, "a"], baseline[1, "a"]) == (0.5, 0.7), "the better one on validation, cell by cell"
    gain = (0.1 - 1 + 0 + 0 + 0) / 5  # five pairs: y and z are silent in both, a seed lacks x and y, the other z
    assert engine._gap(rows, "mining", "supervised").startswith(f"{gain:+.3f} [")
    assert engine._clean_figures(rows[rows["arm"] == "mining"]) == ["0.550", "33% of 1"]
    (tmp_path / "csv").mkdir()
    read.to_csv(tmp_path / "csv" / "results.csv", index=False)
    pd.testing.assert_frame_equal(engine.read(tmp_path / "csv", "results"), read, check_dtype=False)
    only = read[read["arm"] == "mining"]
    assert engine.with_baseline(only).shape == only.shape and engine._gap(only, "mining", "baseline") == "–"


def test_the_table_of_sks_has_false_alarms_beside_dice(tmp_path):
    sks = script("sks/run.py")
    counts = {"unetpp": ((2, 4, 4), (0, 0, 0), (0, 0, 0)), "sks": ((3, 4, 4), (0, 5, 0), (0, 0, 0))}
    for arm, rows in counts.items():
        frame = pd.DataFrame(rows, columns=["both", "found", "truth"])
        frame = frame.assign(image=["a", "b", "c"], group=["a", "b", "c"], veto=arm == "sks", score=[0.5, 1, 1])
        frame.loc[[0, 1], "score"] = [0.75, 0.0] if arm == "sks" else [0.5, 1.0]
        frame.to_csv(tmp_path / f"ct-{arm}-0.csv")
    lines = sks.table(tmp_path).splitlines()
    assert "| unetpp | 1 | 0.833 | 0.500 | 0.000 | 0.000 |  |" in lines
    assert "| sks+veto | 1 | 0.583 | 0.750 | 0.500 | 0.000 |  |" in lines
    assert any(line.startswith("| ct | unetpp | all | -0.250 [") for line in lines)


def test_ingredients_pair_clean_images():
    def frame(*dice: float) -> pd.DataFrame:
        return pd.DataFrame({"split": "test", "checkpoint": "chosen", "sample_id": ["a", "b"], "dice": dice})

    found = script("ingredients/run.py")._difference({"0": frame(0.5, NAN)}, {"0": frame(0.5, 0.0)})
    assert found.startswith("-0.500 [")


@pytest.mark.parametrize(
    ("columns", "chosen"), [(("val_dice",), [False, True]), (("val_dice", "val_score"), [True, False])]
)
def test_tuning_chooses_by_the_score(tmp_path, columns, chosen):
    tune = script("baselines/tune.py")
    for number, figures in enumerate(({"val_dice": 0.5, "val_score": 0.9}, {"val_dice": 0.6, "val_score": 0.7})):
        (tmp_path / f"mining-{number}").mkdir()
        row = {"status": "done", **{name: figures[name] for name in columns}}
        pd.DataFrame([row]).to_csv(tmp_path / f"mining-{number}" / "sweep.csv")
    assert list(tune.table(tmp_path)["chosen"]) == chosen
