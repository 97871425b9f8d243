"""A plan: fingerprint, rules, probe, estimate; its table, and its record in the run folder."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from kmine import cli
from kmine.config import LoopConfig
from kmine.data.source import Source
from kmine.io.console import duration
from kmine.io.files import nan_to_none
from kmine.io.json_file import json_field, load_json
from kmine.plan.estimate import Estimate, estimate_run
from kmine.plan.fingerprint import Fingerprint, SampledData, take_fingerprint
from kmine.plan.machine import Machine, this_machine
from kmine.plan.probe import SegmenterSpeed, Speed, measure_network, measure_segmenter
from kmine.plan.rules import (
    MINUTES,
    OBJECT_PX,
    PLANNED,
    Choice,
    cheaper,
    needed_side,
    network_choices,
    own_data_choices,
    patch_choices,
    shape_choices,
    sizes,
    step_choices,
)
from kmine.setup.resolve import resolve_settings

ConfigT = TypeVar("ConfigT", bound=LoopConfig)
PLAN = "plan.json"
TRAINED = ("round_*/*.safetensors", "*/round_*/*.safetensors", "cells/*/round_*/*.safetensors")
PROBE_SIZE = 96
UNPLANNED = "phantom"
MEMORY_SHARE, PRECISION = 0.8, 1.1
"""Largest share of the free memory that a plan takes; of the time budget, as a probe is not more precise."""
CURE = "remove it, or choose another --out"


@dataclass(frozen=True)
class RunPlan:
    """Settings of a run, why (in the order of `PLANNED`, given ones among them), and what the run will take."""

    cfg: LoopConfig
    choices: tuple[Choice, ...]
    data: Fingerprint
    machine: Machine
    speed: Speed
    segmenter: SegmenterSpeed
    estimate: Estimate
    minutes: float

    def record(self) -> dict[str, Any]:
        """Content of plan.json."""
        parts = {name: asdict(getattr(self, name)) for name in ("data", "machine", "speed", "segmenter", "estimate")}
        choices = [asdict(choice) for choice in self.choices]
        return dict(nan_to_none({"minutes": self.minutes, "choices": choices, **parts}))

    def lines(self) -> Iterator[str]:
        """The plan as text."""
        yield from _data_lines(self.data)
        machine, speed = self.machine, self.speed
        gpu = f" with {machine.gpu_gb:.0f} GB" if machine.is_gpu else ""
        yield f"machine: {machine.device}{gpu}, {machine.cores} cores, {machine.ram_gb:.0f} GB of memory free"
        yield f"measured: {1 / speed.step:.1f} training steps and {1 / speed.infer:.0f} predicted images a second"
        if (runs := self.cfg.data.num_runs) > 1:
            yield f"{runs} runs, {runs - 1} folds and one on all masks, with the same settings; times are of all"
        rows = [(c.setting, str(c.value), c.why + " (this machine)" * c.by_machine) for c in self.choices]
        yield from _columns([("setting", "value", "why"), *rows])
        took = [(stage, duration(seconds)) for stage, seconds in self.estimate.seconds.items()]
        yield from _columns([("stage", "time"), *took, ("in all", f"about {duration(self.estimate.total)}")])
        kind, budget = "of the GPU" if machine.is_gpu else "of the process", duration(60 * self.minutes)
        yield f"memory {kind}: about {self.estimate.peak_gb:.1f} GB; time budget (plan_minutes): {budget}"
        if speed.busy > 1.3:
            yield f"other processes use the cores now: while they do, all takes {speed.busy:.1f} times as long"
        if self.estimate.total > PRECISION * 60 * self.minutes:
            yield "the budget is exceeded: the given settings, or the smallest that make sense, take longer"
        if (needed := min(needed_side(self.data), self.data.side)) > self.cfg.data.size:
            small = f"small objects ({self.data.small_object_px:.0f} px of images of {self.data.side} px)"
            yield f"{small} have fewer than {OBJECT_PX} px at data.size {self.cfg.data.size}; {needed} would keep more"


def plan_run(cfg: ConfigT, given: Collection[str], source: Source) -> RunPlan:
    """Choose the settings of `PLANNED` that are not `given`; seconds. `cfg` may be that of a sweep.

    Raises:
        UserError: data or settings with which the loop would stop, too.
    """
    default = set(PLANNED) - {*given} if cfg.data.name == UNPLANNED else set()
    planner = _Planner(cfg, frozenset(given) | default, source)
    planner.choose(own_data_choices(cfg))
    sampled = take_fingerprint(planner.cfg.data.of_all_masks(), cfg.seed, source)
    machine = this_machine(cfg.device)
    planner.choose(shape_choices(sampled.fingerprint))
    planner.choose(network_choices(cfg, sampled.fingerprint, machine))
    planner.choose(step_choices(planner.cfg.fit.batch_size, sampled.fingerprint, machine))
    measured = planner.fit_budget(sampled, machine)
    values = cli.flat(cli.to_dict(planner.cfg))
    fixed = {n: Choice(n, values[n], "default" if n in default else "given") for n in planner.given & values.keys()}
    every = fixed | planner.choices
    choices = [every[name] for name in PLANNED if name in every and every[name].value is not None]
    return RunPlan(
        planner.cfg, tuple(choices), sampled.fingerprint, machine, *measured, minutes=planner.minutes(machine)
    )


class _Planner:
    """Settings in the making."""

    def __init__(self, cfg: LoopConfig, given: frozenset[str], source: Source) -> None:
        self.cfg, self.given, self.source = cfg, given, source
        self.choices: dict[str, Choice] = {}

    def choose(self, choices: Iterable[Choice]) -> None:
        """Take over what was not given."""
        chosen = {choice.setting: choice for choice in choices if choice.setting not in self.given}
        self.choices |= chosen
        self.cfg = apply_values(self.cfg, {name: choice.value for name, choice in chosen.items()}, "plan")

    def minutes(self, machine: Machine) -> float:
        """The time budget, of folds for all runs together; by default that of a single run for each of them."""
        return self.cfg.plan_minutes or MINUTES[machine.is_gpu] * self.cfg.data.num_runs

    def fit_budget(self, sampled: SampledData, machine: Machine) -> tuple[Speed, SegmenterSpeed, Estimate]:
        """Choose the size; then probe it, and give up what exceeds the time."""
        data, seconds = sampled.fingerprint, 60 * self.minutes(machine)
        segmenter = measure_segmenter(self.cfg, self.source, sampled.labeled, "cuda" if machine.is_gpu else "cpu")

        def estimated(speed: Speed) -> Estimate:
            return estimate_run(resolve_settings(self.cfg, self.source), data, machine, speed, segmenter)

        speed = None
        if "data.size" not in self.given:
            smallest = self.cfg.data.patch or PROBE_SIZE
            self.cfg = replace(self.cfg, data=replace(self.cfg.data, size=smallest))
            speed = self._probe(sampled, machine)
            options, why = sizes(data, machine)
            options = [size for size in options if size >= (self.cfg.data.patch or 0)] or [smallest]
            fitting = [size for size in options if estimated(speed.at(size)).total <= seconds]
            is_largest = bool(fitting) and fitting[0] == options[0]
            reason = why if is_largest else f"the largest within {duration(seconds)}" if fitting else "the smallest"
            self.choose([Choice("data.size", (fitting or options[-1:])[0], reason, not is_largest)])
            if "data.patch" not in self.given and (patches := list(patch_choices(self.cfg, data))):
                self.choose(patches)
                speed = None
        if speed is None or speed.size != self.cfg.data.size:
            speed = self._probe(sampled, machine)
        estimate = estimated(speed)
        for choices in cheaper(self.cfg, self.given):
            if estimate.total > PRECISION * seconds:
                self.choose(choices)
                estimate = estimated(speed)
        return speed, segmenter, estimate

    def _probe(self, sampled: SampledData, machine: Machine) -> Speed:
        """Measure the network; the batch is halved until it fits the memory, unless it was given."""
        import torch

        memory = machine.gpu_gb if machine.is_gpu else machine.ram_gb
        while True:
            batch_size = self.cfg.fit.batch_size
            is_free = "fit.batch_size" not in self.given and batch_size > 2
            try:
                speed = measure_network(resolve_settings(self.cfg, self.source), self.source, sampled.labeled)
            except torch.OutOfMemoryError:
                if not is_free:
                    raise
            else:
                if speed.peak_gb <= MEMORY_SHARE * memory or not is_free:
                    return speed
            self.choose([Choice("fit.batch_size", batch_size // 2, "what the memory allows", True)])


def apply_values(cfg: ConfigT, values: Mapping[str, Any], where: str) -> ConfigT:
    """`cfg` with settings by dotted name. Raises `UserError` that begins with `where`."""
    return cli.override(type(cfg), cli.to_dict(cfg), {name: str(value) for name, value in values.items()}, where)


def planned_config(
    cfg: ConfigT, given: Collection[str], source: Source | None, log: Callable[[str], None]
) -> tuple[ConfigT, dict[str, Any] | None]:
    """Settings of a command with those that were not `given` from a plan, and the record of a new plan.

    A run folder in which something was trained keeps its plan, or stays without one; so does the phantom, whose figures
    are published. `source` None, where several processes share the run: only a saved plan is used.

    Raises:
        UserError: as `plan_run`; a damaged plan.json.
    """
    root = Path(cfg.out)
    if not cfg.plan or cfg.data.name == UNPLANNED:
        return cfg, None
    if source is None or any(next(root.glob(pattern), None) for pattern in TRAINED):
        saved = saved_values(root, given)
        return (apply_values(cfg, saved, str(root / PLAN)) if saved else cfg), None
    plan = plan_run(cfg, given, source)
    for line in plan.lines():
        log(line)
    return plan.cfg, plan.record()  # type: ignore[return-value]


def saved_values(root: Path, given: Collection[str]) -> dict[str, Any]:
    """Settings of the plan in a run folder, without those `given`; none without a plan."""
    path, words = root / PLAN, {"where": str(root / PLAN), "cure": CURE}
    if not path.exists():
        return {}
    choices = json_field(load_json(path, "the plan of a run", CURE), "choices", list, **words)
    values = {json_field(c, "setting", str, **words): json_field(c, "value", str, float, **words) for c in choices}
    return {name: value for name, value in values.items() if name in PLANNED and name not in given}


def _data_lines(data: Fingerprint) -> Iterator[str]:
    labels = f"{data.num_masks} with masks, {data.num_image_labels} with image-level labels, {data.num_groups} groups"
    splits = f"{data.num_labeled} labeled, {data.num_unlabeled} unlabeled, {data.num_val} validation"
    yield f"data: {data.num_images} images, {labels}; {splits}"
    shape = f"{data.width} x {data.height} px, {'grey' if data.is_grey else 'colour'}"
    shape += f", width / height {data.aspect_low:.2f} to {data.aspect_high:.2f}"
    objects = f"; objects of {data.object_px:.0f} px, small ones {data.small_object_px:.0f}"
    yield f"images: {shape}" + f"{objects}, {data.num_objects:.1f} an image" * (data.object_px > 0)


def _columns(rows: list[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  " + "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
