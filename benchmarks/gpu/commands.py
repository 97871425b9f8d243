"""Sections predict, mine, tests: kmine's commands and its tests on the GPU."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import predict as predict_benchmark
import torch
from equality import FINETUNED
from helpers.loop_command import OPEN_GATE
from helpers.made_up_run import make_run
from kit import HERE, ROOT, SMALL_ENCODER, Kit, source_config

from kmine.config import DataConfig, ModelConfig
from kmine.predict import stream
from kmine.predict.run_model import load_model, open_run_model
from kmine.training.inference import predict_resized

PREDICTED_MS = {"infer": "8-14", "prompts": "9-13", "gate": "2-4", "refine": "10-14", "store": "6-10", "read": "4-8"}
"""Of the mining stages, for an image; `segment` differs between rounds."""
PREDICTED_ROUNDS = {1: ("50-65", "8-11"), 2: ("18-25", "13-18")}
"""Of rounds 1 and 2: ms an image of `segment`, images a second of all stages."""
LOOP_TESTS = "tests/loop/test_resume.py tests/loop/test_adapt.py tests/loop/test_auto.py tests/loop/test_stops.py"
PART_TESTS = (
    "tests/models tests/training tests/mining tests/segmenters/sam tests/segmenters/tiny/test_segmenter.py "
    "tests/data/test_batches.py tests/data/test_augment.py tests/data/cache"
)


def predict(kit: Kit) -> None:
    """Images a second of `kmine predict` beside a plain loop with the same network on the same device."""
    size, count, frame = (32, 6, (53, 62)) if kit.tiny else (256, 320, (532, 626))
    batch, folder = 4 if kit.tiny else 32, kit.work / "predict"
    shutil.rmtree(folder, ignore_errors=True)
    model = ModelConfig(name="unetpp", encoder=SMALL_ENCODER if kit.tiny else "mobilenet_v2")
    data = DataConfig(name="folder", images="IMAGES", class_names=("background", "polyp"), size=size)
    run = make_run(folder / "run", model=model, data=data, seeds=(0,))
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("  batch_size: 3\n  tta", f"  batch_size: {batch}\n  tta"))
    predict_benchmark.draw(folder / "warm", batch, *frame)
    paths = predict_benchmark.draw(folder / "in", count, *frame)
    with kit.attempt("plain"):
        took = kit.seconds(lambda: _plain_loop(kit, run, paths, folder / "plain", size, batch), 1)
        kit.put(f"plain cv2 + smp loop, {size} px, batch {batch}", count / took, "images/s", "100-130")
    predict_benchmark.ours(run, folder / "warm", folder / "out-warm")
    for threads, predicted in ((stream.THREADS, "180-260"), (6, "350-500")):
        with kit.attempt(f"kmine predict, {threads} threads"):
            stream.THREADS = threads
            began = time.perf_counter()
            predict_benchmark.ours(run, folder / "in", folder / f"out-{threads}")
            rate = count / (time.perf_counter() - began)
            kit.put(f"kmine predict (the whole command), {threads} threads a side", rate, "images/s", predicted)
    with kit.attempt("network"):
        network, images = load_model(open_run_model(run, None, "best")), np.zeros((batch, size, size, 3), np.uint8)
        network, device = network.to(kit.device).eval(), torch.device(kit.device)
        took = kit.seconds(lambda: predict_resized(network, images, "none", device), 5)
        kit.put("the network without reading and writing (fp32)", batch / took, "images/s", "2000-3000")


def _plain_loop(kit: Kit, run: Path, paths: list[Path], out: Path, size: int, batch: int) -> None:
    net = load_model(open_run_model(run, None, "best")).net.eval().to(kit.device)
    out.mkdir(parents=True, exist_ok=True)
    for first in range(0, len(paths), batch):
        images = [cv2.imread(str(path))[..., ::-1] for path in paths[first : first + batch]]
        small = np.stack([cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA) for image in images])
        with torch.inference_mode():
            x = torch.from_numpy(small).to(kit.device).permute(0, 3, 1, 2).float() / 127.5 - 1
            probs = net(x.contiguous(memory_format=torch.channels_last)).softmax(dim=1).cpu().numpy()
        for path, image, of_image in zip(paths[first : first + batch], images, probs, strict=True):
            grown = [cv2.resize(p, image.shape[1::-1], interpolation=cv2.INTER_LINEAR) for p in of_image]
            cv2.imwrite(str(out / f"{path.stem}.png"), np.argmax(grown, axis=0).astype(np.uint8))


def mine(kit: Kit) -> None:
    """A run of the loop with SAM, two rounds: seconds of each stage, of the second round with cached embeddings."""
    data = source_config(kit, 32 if kit.tiny else 352, 40)
    settings: dict[str, object] = {
        **{
            "plan": "false",
            "rounds": 2,
            "baseline": "false",
            "device": kit.device,
            "offline": "true",
            "out": kit.work / "mine",
        },
        **{"data.name": data.name, "data.size": data.size, "data.cache_dir": data.cache_dir},
        **({"data.root": data.root} if data.root else {"data.num_samples": 40}),
        # The gate is open, so that there is a second round whatever the masks are.
        **{**OPEN_GATE, "gate.mode": "ranked", "refine.ask_local": "false"},
        **{"refine.min_vote": 0.51, "adapt.enabled": "false"},
        **{"fit.steps": 150, "fit.round_steps": 40, "fit.batch_size": 16, "fit.num_workers": 8},
    }
    checkpoint = kit.work / FINETUNED
    if kit.tiny:
        settings |= {"model.encoder": SMALL_ENCODER, "model.encoder_depth": 3}
        settings |= {"fit.steps": 20, "fit.round_steps": 3, "fit.num_workers": 0}
    elif checkpoint.is_file():
        settings |= {"segmenter.name": "sam_vit_b", "segmenter.checkpoint": checkpoint, "segmenter.batch_size": 8}
        settings |= {"segmenter.cache_dir": kit.work / "mine-embeddings"}
    if kit.encoder_weights:
        settings |= {"model.encoder": "mobilenet_v2", "model.encoder_weights": kit.encoder_weights}
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    began = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "kmine.loop", *words],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=max(10.0, kit.left() - 6),
        )
        note = " ".join(done.stderr.split())[-300:] if done.returncode else ""
        kit.put("exit code of kmine loop", done.returncode, note=note)
    except subprocess.TimeoutExpired:
        kit.put("exit code of kmine loop", "CUT OFF", note="out of time; finished rounds are below")
    kit.put("kmine loop, the whole command", time.perf_counter() - began, "s")
    _put_rounds(kit)


def _put_rounds(kit: Kit) -> None:
    """Seconds of each stage from results.csv, which is written after every round."""
    run = json.loads((kit.work / "mine" / "run.json").read_text())
    table = kit.work / "mine" / "results.csv"
    if "splits" not in run or not table.is_file():
        return  # stopped before the first round
    unlabeled = run["splits"]["unlabeled"]
    for row in list(csv.DictReader(table.open(newline="")))[1:]:
        round_idx = int(row["round"])
        segment, all_stages = PREDICTED_ROUNDS.get(round_idx, ("", ""))
        seconds = {k.removeprefix("seconds_"): float(v) for k, v in row.items() if k.startswith("seconds_") and v}
        of_mining = {stage: value for stage, value in seconds.items() if stage not in ("fit", "evaluate", "changes")}
        for stage, value in seconds.items():
            if stage in of_mining:
                predicted = segment if stage == "segment" else PREDICTED_MS.get(stage, "")
                kit.put(f"round {round_idx}, {stage}", 1e3 * value / unlabeled, "ms an image", predicted)
            else:
                kit.put(f"round {round_idx}, {stage}", value, "s")
        if mined := sum(of_mining.values()):
            note = f"{unlabeled} images, {row.get('num_pseudo', '?')} pseudo masks; "
            note += f"10,000 would take {mined / unlabeled * 1e4 / 60:.0f} minutes"
            kit.put(f"round {round_idx}, mining, all stages", unlabeled / mined, "images/s", all_stages, note)


def tests(kit: Kit) -> None:
    """kmine's tests: those of the loop on the GPU, others as they are."""
    loops, parts = ("tests/ops/test_masks.py", "tests/ops/test_metrics.py") if kit.tiny else (LOOP_TESTS, PART_TESTS)
    plugin = ["-p", "gpu_plugin"] if kit.on_gpu else []
    _put_tests(kit, "of the loop, on the GPU", [*plugin, *loops.split()], 0.6)
    _put_tests(kit, "of the parts, on the CPU", parts.split(), 1.0)


def _put_tests(kit: Kit, name: str, words: list[str], share: float) -> None:
    """Run pytest in a process of its own, within a share of the time that is left."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    environment.pop("KMINE_CACHE", None)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--maxfail", "40", "--durations", "5"]
    command += [*([] if kit.tiny else ["-n", "4"]), *words]
    path, limit = kit.out / "pytest.txt", max(15.0, (kit.left() - 6) * share)
    with path.open("a") as file:
        file.write(f"\n==== {name}\n")
        file.flush()
        try:
            done = subprocess.run(
                command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, check=False, env=environment, timeout=limit
            )
            code = str(done.returncode)
        except subprocess.TimeoutExpired:
            code = "out of time"
    lines = [line for line in path.read_text().split(f"==== {name}\n")[-1].splitlines() if line.strip()]
    summary = [line for line in lines if " passed" in line or " failed" in line or " error" in line]
    kit.put(f"pytest {name}", (summary or ["no summary"])[-1].strip("= ")[:150], note=f"exit code {code}; pytest.txt")
    for line in [line for line in lines if line.startswith(("FAILED", "ERROR"))][:12]:
        kit.put("failed", line[:250])
