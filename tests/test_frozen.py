"""The contract of files and commands: names, columns, keys, seeds, signatures, defaults, exit codes; old runs resume.

A deliberate change edits the lists below and is named in CHANGELOG.md. `fixtures` holds files of older code (see its
README). Every assertion holds on any machine: none compares the last digits of a computed number.
"""

from __future__ import annotations

import ast
import csv
import json
import re
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import yaml
from helpers.loop_command import OPEN_GATE, SMALL, words
from PIL import Image

from kmine import cli
from kmine.__main__ import COMMANDS, main
from kmine.config import SegmenterConfig
from kmine.io.files import sign
from kmine.ops.seeding import derive_seed
from kmine.segmenters import open_segmenter
from kmine.types import EVIDENCE_COLUMNS, REASONS, STOPPED_BY

FIXTURES = Path(__file__).with_name("fixtures")
PACKAGE = Path(__file__).resolve().parents[1] / "kmine"

EVIDENCE = (
    *("predicted_iou", "stability_score", "agreement_iou", "jitter_dice", "confidence_inside", "confidence_outside"),
    *("area_ratio", "tta_std", "witness_dice", "slice_dice"),
)
"""Fields of `Evidence` in their order: a calibrator on disk holds one weight for each."""
GATE_REASONS = (
    *("kept", "kept_local", "accepted", "rejected", "lesion_free", "no_component", "vetoed", "empty_candidate"),
    *("low_predicted_iou", "low_stability", "low_agreement", "low_jitter_dice", "low_confidence"),
    *("high_confidence_outside", "high_tta_std", "area_outlier", "contradicts_image_label", "low_estimated_dice"),
    "low_rank",
)
"""In their order in charts; those between `empty_candidate` and `contradicts_image_label` are of older runs."""
ESTIMATES = ("estimated_dice", "estimated_segmenter", "estimated_local")
OBJECT = ("sample_id", "object_idx", "class_id")
SIGNALS = ("conflict", "unlike", "doubt", "disagreement", "area", "position", "shape", "edge")
TABLES = {
    "decisions.parquet": (
        *(*OBJECT, "kept", "reason", "source", "in_training", *EVIDENCE, *ESTIMATES),
        *("height", "width", "local_rle", "segmenter_rle"),
    ),
    "prompts.parquet": (
        *OBJECT,
        "box",
        "point_coords",
        "point_labels",
        "has_mask_input",
        "jittered_boxes",
        "scaled_boxes",
        "origin",
    ),
    "splits.csv": ("sample_id", "group_id", "split"),
    "results.csv": (
        *("round", "num_labeled", "num_pseudo", "dice", "iou", "hd95", "num_missed", "dice_final", "adopted"),
        *("supervised_dice", "supervised_dice_final", "changed_pixels", "supervised_adopted", "reason", "difference"),
        *("difference_low", "difference_high", "num_new", "num_readmitted", "num_expelled", "taught_pixels"),
        *("ignored_pixels", "num_empty", "num_clean", "dice_lesion", "false_alarm_rate", "supervised_dice_lesion"),
        *("supervised_false_alarm_rate", "retrained", "kept", "segmenter"),
        *("seconds_changes", "seconds_evaluate", "seconds_fit", "seconds_gate", "seconds_infer", "seconds_prompts"),
        *("seconds_read", "seconds_refine", "seconds_segment", "seconds_store", "supervised_once_dice"),
        *("supervised_once_dice_lesion", "supervised_once_false_alarm_rate"),
    ),
    "audit.csv": (
        *("sample_id", "kind", "rank", "suspicion", "causes", "group_id", "image_label", "classes", "height", "width"),
        *("area", "ignored", "round", "entered", "rounds_taught", "num_objects", "num_kept", "reason", "source"),
        *(*EVIDENCE, *ESTIMATES, "dice_with_round_before", *(f"signal_{name}" for name in SIGNALS)),
        *("otherwise", "outside", "asked_models", "asked_by", "made_by", "model_signature", "model_sha256"),
        *("segmenter", "segmenter_sha256", "mask_signature", "withheld_dice"),
    ),
    "predictions.csv": (
        *("file", "mask", "kind", "width", "height", "slices", "square_px", "square_mm2", "square_mm3"),
        *("square_components", "num_objects", "estimated_dice", "mean_max_probability", "warning", "error"),
    ),
    "objects.csv": ("file", "slice", "class", "px", "x0", "y0", "x1", "y1", "estimated_dice"),
    "sweep.csv": (
        *("method", "model", "label_fraction", "seed", "status", "error", "run", "num_labeled", "num_unlabeled"),
        *("steps", "val_dice", "val_dice_final", "seconds", "peak_memory_mb", "num_parameters", "val_score"),
    ),
    "test_table.csv": (
        *("method", "model", "label_fraction", "num_labeled", "seeds", "dice", "dice_sd", "dice_final", "iou", "hd95"),
        *("num_missed", "is_baseline", "difference", "low", "high", "p_value", "p_holm", "num_pairs", "seconds"),
        *("peak_memory_mb", "num_parameters", "num_empty", "dice_lesion", "num_clean", "false_alarm_rate", "shown"),
    ),
    "test_cases.csv": (
        *("run", "arm", "checkpoint", "sample_id", "dice", "iou", "hd95", "num_missed"),
        *("group_id", "model", "label_fraction", "seed", "score"),
    ),
}
"""Columns in their order, by the name of the file."""
CELL = ("method", "model", "label_fraction", "seed")
KEYS = {
    "changes.json": {
        *("signature", "num_teaching", "num_new", "num_kept_on", "num_readmitted", "num_expelled"),
        *("segmenter_changed_nothing", "training_set_unchanged", "noop", "num_unlabeled", "new", "kept_on"),
        *("readmitted", "expelled", "num_remasked", "num_differing", "num_empty", "changed_pixels", "taught_pixels"),
        *("ignored_pixels", "labeled_shares", "pseudo_shares"),
    },
    "threshold.json": {
        *("signature", "threshold", "mean_estimate", "coverage", "num_objects", "target", "num_images"),
    },
    "calibration.json": {
        *("signature", "target", "confidence", "num_objects", "quality", "difference", "promise", "rank_correlation"),
        *("mean_dice", "risk_coverage", "reliability", "alone"),
    },
    "fold_0.json": {"signature", "objects"},
    "alone_0.json": {"signature", "objects"},
    "metrics.json": {
        *("signature", "round_idx", "num_labeled", "num_pseudo", "metrics", "final_metrics", "adopted", "seconds"),
        *("reason", "difference", "difference_low", "difference_high"),
    },
    "run.json": {
        *("data_fingerprint", "skipped", "num_skipped", "intensity", "check", "command", "git_commit", "seed"),
        *("dataset", "class_names", "segmenter", "segmenter_sha256", "device", "precision", "threads", "python"),
        *("versions", "data_contents", "splits", "stopped_by", "preparation_seconds", "adopted_round"),
        *("peak_memory_mb", "seconds_of_last_session", "test_opened"),
    },
    "test_metrics.json": {"signature", "num_parameters", "arms"},
    "verdicts.json": {"signature", "format", "run", "run_signature", "verdicts", "corrected", "accepted"},
    "sweep.json": {"data_fingerprint", "cells"},
    "cell.json": {
        *(*CELL, "steps", "peak_memory_mb", "seconds", "num_labeled", "num_unlabeled", "val_dice"),
        *("val_dice_final", "num_parameters", "status", "ended", "took"),
    },
    "classes.json": {"classes", "model", "round", "signature", "estimated_dice"},
}
"""Keys of JSON files, by file name; further keys may join them. `NESTED` lists those one level deeper."""
NESTED = {
    ("calibration.json", "quality"): {"features", "fill", "scale", "weights", "intercept", "knots"},
    ("calibration.json", "promise"): {"threshold", "kept", "lower_bound", "mean", "coverage", "num_objects"},
    ("calibration.json", "alone"): {"labeled_area", "prompts", "by_tta", "num_parts"},
    ("metrics.json", "metrics"): {"cases", "dice", "iou", "hd95", "num_missed", "num_empty"},
    ("metrics.json", "seconds"): {
        *("read", "infer", "prompts", "segment", "gate", "refine", "store", "changes", "fit", "evaluate"),
    },
}
TRAINED = ("model.safetensors", "model_final.safetensors")
MINED = ("changes.json", "decisions.parquet", "prompts.parquet", "pseudo_masks/00000.parquet", "threshold.json")
RUN_FILES = {
    *("config.yaml", "run.json", "splits.csv", "results.csv", "report.html", ".lock"),
    *(f"calibration/{name}.json" for name in ("calibration", "fold_0", "fold_1", "alone_0", "alone_1")),
    *(f"fold_{number}/round_00/{name}" for number in (0, 1) for name in TRAINED),
    *(f"witness_fold_{number}/round_00/{name}" for number in (0, 1) for name in TRAINED),
    *(f"witness/round_00/{name}" for name in TRAINED),
    *(f"{folder}/{name}" for folder in ("round_00", "round_01") for name in (*TRAINED, "metrics.json")),
    *(f"{name}/round_01/{file}" for name in ("supervised", "supervised_once") for file in (*TRAINED, "metrics.json")),
    *(f"round_01/{name}" for name in MINED),
    *("verdicts.json", "accepted/ID.png", "audit/audit.csv", "audit/audit.html", "audit/pictures/ID.jpg"),
    *("test_metrics.json", "test_table.md", "test_table.csv", "test_table.tex", "test_table.html", "test_cases.csv"),
}
"""Files of the run `made`: an auxiliary model, a calibrated gate, a baseline, an audit and a comparison."""
SEED_KEYS = {
    *("activation", "adapt", "calibration", "classifier", "contact sheet", "exam", "fit", "folds", "images", "model"),
    *("pilot", "shuffled image labels"),
}
SIGNED = {"alone", "audit", "changes", "fold", "threshold", "truth", "verdicts"}
LITERALS = {
    *("cutmix", "second pass", "shaken", "witness", "+adapted", "interrupted", "kmine-verdicts-1", "kmine.signature"),
    *("kmine.round", "KMINE_CACHE", ".kmine-predict.jsonl", ".kmine-fetch", "kmine-weights.json", "sam encoder "),
    *("tiny ", "echo: the component of the prompts"),
}
"""Texts that reach seeds, signatures or files other than as literal arguments of `derive_seed` and `sign`."""


# -- the sources


@cache
def literals() -> dict[str, set[str]]:
    """Every text of the package's sources, docstrings included; those in calls of a function below its name."""
    found: dict[str, set[str]] = {"": set(), "sign": set(), "derive_seed": set()}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str | bytes):
                found[""].add(node.value if isinstance(node.value, str) else node.value.decode("latin-1"))
            name = getattr(node.func, "id", "") if isinstance(node, ast.Call) else ""
            if name in found and name:
                found[name] |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
    return found


@pytest.mark.parametrize(("function", "frozen"), [("derive_seed", SEED_KEYS), ("sign", SIGNED), ("", LITERALS)])
def test_texts_that_reach_seeds_and_signatures_stay(function, frozen):
    assert not frozen - literals()[function]


def test_seeds_and_signatures_of_given_keys_stay():
    assert derive_seed(0, "model") == 7250982863315377352
    assert derive_seed(3, 1, "polyp_000001", 0, "second pass") == 1391494095008023621
    assert sign("threshold", 64, {"b": [1, 2.5, None], "a": "é"}, (True, Path("x"))) == "f45738a2c77797c0"
    ellipse = open_segmenter(SegmenterConfig(name="ellipse"), device="cpu", offline=True)
    assert ellipse.signature == "329bf3266c8d136907d3346c75e3109f55e457b3de6b59be44c8f87e5c79dc0a"


def test_evidence_reasons_and_ends_of_a_run_keep_their_names_and_order():
    assert EVIDENCE_COLUMNS == EVIDENCE
    assert REASONS == GATE_REASONS
    assert set(STOPPED_BY) == {"rounds", "refused_twice", "no_pseudo_masks"}


# -- commands


def test_commands_keep_their_names():
    assert set(COMMANDS) >= {"loop", "sweep", "compare", "audit", "predict", "check", "fetch", "weights"}


@pytest.mark.parametrize("command", ["loop", "sweep", "compare", "audit", "predict", "check", "weights", "fetch"])
def test_settings_keep_their_names_and_defaults(command, capsys):
    frozen = yaml.safe_load((FIXTURES / "settings.yaml").read_text("utf-8"))
    wanted = frozen["loop"] if command in ("loop", "check") else frozen[command]
    wanted = frozen["loop"] | wanted if command == "sweep" else wanted
    positional = [] if command in ("loop", "sweep", "check") else ["X"]
    with pytest.raises(SystemExit) as end:
        main([command, *positional, "--print_config"])
    assert end.value.code in (0, None)
    today = cli.flat(yaml.safe_load(capsys.readouterr().out))
    assert cli.flat(wanted).items() <= {name: value for name, value in today.items() if value != {}}.items()


def test_exit_codes_stay(tmp_path, monkeypatch, capsys):
    def code(*argv: object) -> Any:
        try:
            return main([str(word) for word in argv])
        except SystemExit as end:
            return end.code

    monkeypatch.chdir(tmp_path)
    assert code("--version") == 0 and code("loop", "--help") == 0
    assert code("nothing") == code("loop", "--nothing=1") == code("audit", tmp_path / "nothing") == 2
    phantom = ("--data.num_samples=12", "--data.size=32", f"--out={tmp_path / 'check'}")
    assert code("check", *phantom, "--data.label_fraction=0.5") == 0
    assert code("check", *phantom, "--data.label_fraction=0.01") == 1, "a fault: no labeled image would be left"

    def interrupted() -> int:
        raise KeyboardInterrupt

    assert cli.guarded("kmine", interrupted) == 130


# -- files that the commands write


class Made(NamedTuple):
    run: Path
    predictions: Path
    sweep: Path
    cell: Path


def square(number: int) -> tuple[np.ndarray, np.ndarray]:
    """A bright square on a dark ground, in whole numbers: easy to find. Image (32, 32, 3) and mask of 0 and 255."""
    rng = np.random.default_rng([5, number])
    y, x, height, width = (int(rng.integers(low, high)) for low, high in ((2, 12), (2, 12), (8, 16), (8, 16)))
    image = np.full((32, 32, 3), int(rng.integers(45, 75)), np.uint8)
    image[y : y + height, x : x + width] = (200, 90, 110)
    mask = np.zeros((32, 32), np.uint8)
    mask[y : y + height, x : x + width] = 255
    return image, mask


SQUARES = {
    **{name: value for name, value in SMALL.items() if name != "data.num_samples"},
    **OPEN_GATE,
    "data.name": "folder",
    "data.class_names": "[background,square]",
    "data.duplicate_distance": -1,
    "data.on_fault": "say",
    "data.label_fraction": 0.85,
    "data.test_fraction": 0.1,
    "model.name": "unet+unet",
    "model.encoder": "tu-test_resnet",
    "fit.steps": 30,
    "fit.round_steps": 4,
    "fit.val_every": 30,
    "fit.lr": 1e-2,
    "fit.batch_size": 4,
    "fit.augment": "false",
    "adapt.folds": 2,
    "adapt.fold_steps": 30,
    "gate.target_dice": 0.95,
    "gate.confidence": 0.99,
    "baseline": "true",
    "adopt_tolerance": 1,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    """A finished run with its audit, comparison and predictions, and a sweep of one cell."""
    base = tmp_path_factory.mktemp("frozen")
    for number in range(56):
        for name, pixels in zip(("images", "masks"), square(number), strict=True):
            (base / name).mkdir(exist_ok=True)
            Image.fromarray(pixels).save(base / name / f"s{number:02d}.png")
    data = {"data.images": base / "images", "data.masks": base / "masks"}
    run = base / "run"
    assert main(["loop", *words(SQUARES | data, run)]) == 0
    assert main(["audit", str(run), "--device=cpu"]) == 0
    accepted = next(row["sample_id"] for row in rows_of(run / "audit" / "audit.csv") if row["kind"] == "pseudo")
    verdict = {"sample_id": accepted, "kind": "pseudo", "verdict": "accept", "mask_signature": "", "note": ""}
    page = {"format": "kmine-verdicts-1", "run": "run", "run_signature": "", "verdicts": [verdict]}
    (base / "page.json").write_text(json.dumps(page))
    assert main(["audit", str(run), f"--verdicts={base / 'page.json'}", "--device=cpu"]) == 0
    assert main(["compare", str(run), "--device=cpu"]) == 0
    predictions = base / "predictions"
    assert main(["predict", str(run), str(base / "images" / "s00.png"), f"--out={predictions}", "--device=cpu"]) == 0
    few = SQUARES | data | {"model.name": "unet", "fit.steps": 4}
    cell = ["--fractions", "0.5", "--seeds", "0", "--methods", "supervised"]
    assert main(["sweep", *words(few, base / "sweep"), *cell]) == 0
    return Made(run, predictions, base / "sweep", base / "sweep" / "cells" / "unet-0.5-0-supervised")


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def found(made: Made, name: str) -> Path:
    """The file of that name: of round 1 where rounds have one each."""
    run = made.run
    folders = (run / "round_01", run, run / "calibration", run / "audit", made.predictions, made.sweep, made.cell)
    return next(folder / name for folder in folders if (folder / name).is_file())


def columns(path: Path) -> tuple[str, ...]:
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            return tuple(next(csv.reader(file)))
    import pyarrow.parquet as pq

    return tuple(pq.read_schema(path).names)


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLES)
def test_tables_keep_their_columns_and_their_order(made, name):
    assert columns(found(made, name)) == TABLES[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", KEYS)
def test_files_keep_their_keys(made, name):
    value = json.loads(found(made, name).read_text("utf-8"))
    assert not KEYS[name] - value.keys()
    for (file, key), names in NESTED.items():
        if file == name:
            assert not names - value[key].keys(), key


@pytest.mark.slow
def test_a_run_folder_keeps_the_names_of_its_files(made):
    there = {path.relative_to(made.run).as_posix() for path in made.run.rglob("*") if path.is_file()}
    assert not RUN_FILES - {re.sub(r"s\d\d(?=\.(png|jpg)$)", "ID", name) for name in there}
    assert (made.predictions / "masks" / "s00.png").is_file()
    assert (made.predictions / ".kmine-predict.jsonl").is_file()
    assert (made.cell / "cell.json").is_file() and (made.sweep / "config.yaml").is_file()


@pytest.mark.slow
def test_a_seed_keeps_its_splits(made):
    split = {row["sample_id"]: row["split"] for row in rows_of(made.run / "splits.csv")}
    assert (
        "".join(split[name][0] for name in sorted(split)) == "tllvlllllllltvlvvvultlllllvulvuluvlullllvlvulllvtttlllll"
    )


# -- files of older code


def records(path: Path) -> tuple[list[dict[str, Any]], str]:
    """Rows of a table of a round, and its signature."""
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    return table.to_pylist(), table.schema.metadata[b"signature"].decode()


def contents(folder: Path, *patterns: str) -> dict[str, tuple[bytes, int]]:
    """Bytes and modification time of files, by their path in the folder."""
    paths: Iterator[Path] = (path for pattern in patterns for path in folder.glob(pattern))
    return {
        path.relative_to(folder).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in paths
        if path.is_file()
    }


def half_done(name: str, out: Path, old: str, new: str) -> list[str]:
    """Command that goes on with a copy of a half-done run of older code, `old` in its settings replaced by `new`."""
    shutil.copytree(FIXTURES / "half_done_run" / name, out)
    text = (out / "config.yaml").read_text("utf-8")
    assert old in text
    (out / "config.yaml").write_text(text.replace(old, new), "utf-8")
    return ["loop", f"--config={out / 'config.yaml'}", f"--out={out}", f"--data.cache_dir={out.parent / 'cache'}"]


@pytest.mark.parametrize("name", ["mining", "training"])
def test_a_run_of_the_limits_of_older_code_is_not_continued_and_stays_as_it_is(name, tmp_path, capsys):
    command = half_done(name, tmp_path / "run", "", "")
    before = contents(tmp_path / "run", "**/*.*")
    assert main(command) == 2
    expected = "gate.mode: expected calibrated or ranked, in another --out if this run began with it, got 'thresholds'"
    assert expected in capsys.readouterr().err
    today = ["loop", f"--out={tmp_path / 'run'}", "--rounds=1", "--plan=false", "--device=cpu"]
    assert main(today) == 2
    err = capsys.readouterr().err
    assert "gate.mode = 'thresholds', this command has 'calibrated'; choose another --out" in err and "give" not in err
    after = contents(tmp_path / "run", "**/*.*")
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize("name", ["mining", "training"])
def test_a_half_done_run_of_older_code_goes_on_from_what_is_still_valid(name, tmp_path):
    out = tmp_path / "run"
    command = half_done(name, out, "mode: thresholds", "mode: ranked")
    before = contents(out, "round_00/*", "splits.csv")
    assert main(command) == 0
    assert before and before == contents(out, "round_00/*", "splits.csv"), "finished files are not written anew"
    run = json.loads((out / "run.json").read_text("utf-8"))
    assert (run["stopped_by"], run["segmenter"]) == ("rounds", "ellipse")
    assert [row["round"] for row in rows_of(out / "results.csv")] == ["0", "1"]
    assert (out / "report.html").is_file() and not (out / "round_01" / ".parts").exists()
    rows, _ = records(out / "round_01" / "decisions.parquet")
    split = {row["sample_id"]: row["split"] for row in rows_of(out / "splits.csv")}
    assert {row["sample_id"] for row in rows} == {name for name, of in split.items() if of == "unlabeled"}
    assert {row["reason"] for row in rows} <= {"kept", "low_rank", "no_component"}, "mined anew, none by a limit"
    assert not (out / "round_01" / "fit_state.safetensors").exists() and not list(out.glob("part_*"))


@pytest.mark.parametrize("number", [1, 2])
def test_an_exported_model_of_every_format_predicts(number, tmp_path):
    pytest.importorskip("onnxruntime")
    image = np.full((64, 48, 3), 60, np.uint8)
    image[16:44, 15:36] = (200, 90, 110)
    Image.fromarray(image).save(tmp_path / "picture.png")
    out = tmp_path / "out"
    model = FIXTURES / f"model_format_{number}.onnx"
    assert main(["predict", str(model), str(tmp_path / "picture.png"), f"--out={out}", "--device=cpu"]) == 0
    mask = np.asarray(Image.open(out / "masks" / "picture.png"))
    assert mask.shape == (64, 48) and set(np.unique(mask)) == {0, 1}
    assert mask[22:38, 20:31].all() and not mask[:8].any() and not mask[52:].any()
    assert [one["name"] for one in json.loads((out / "classes.json").read_text())["classes"]] == [
        "background",
        "square",
    ]
    (row,) = rows_of(out / "predictions.csv")
    assert (row["error"], row["kind"], row["square_components"]) == ("", "picture", "1")
    assert bool(row["estimated_dice"]) == (number == 2), "the first format has no calibration"
