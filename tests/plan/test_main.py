"""`kmine plan` as a command: it prints, writes settings that the loop reads, and refuses what the loop refuses."""

from __future__ import annotations

import pytest
from helpers.loop_command import write_pictures

from kmine import cli
from kmine.config import LoopConfig
from kmine.plan import __main__ as command


def test_a_plan_is_printed_and_its_settings_are_written(tmp_path, measured, capsys):
    write_pictures(tmp_path, 24)
    where = ["--data.images", str(tmp_path / "images"), "--data.masks", str(tmp_path / "masks")]
    words = ["--data.name", "folder", *where, "--segmenter.name", "ellipse"]
    assert command.main(words) == 0
    assert "to write them: --out FILE.yaml" in capsys.readouterr().out
    out = tmp_path / "mine.yaml"
    assert command.main([*words, "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert f"kmine loop --config {out}" in shown and "data.size" in shown
    cfg = cli.parse(LoopConfig, ["--config", str(out)], prog="kmine loop", description="")
    assert (cfg.out, cfg.data.images, cfg.segmenter.name) == ("runs/mine", where[1], "ellipse")
    assert (cfg.data.size, cfg.data.label_fraction, cfg.fit.steps) == (32, 1.0, 600)
    assert {"data.size", "fit.steps", "rounds", "data.name"} <= cli.GIVEN


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--data.name", "kvasir_seg"], "data.root: expected the folder that holds Kvasir-SEG, got nothing"),
        (["--data.name", "kvasir"], "data.name: unknown name 'kvasir'; did you mean kvasir_seg?"),
        (["--device", "gpu"], "device: expected auto, cpu, cuda or cuda:N, got 'gpu'"),
        (["--data.num_samples=4", "--data.label_fraction=0.01"], "data.label_fraction: expected at least one labeled"),
    ],
)
def test_errors_are_those_of_the_loop(words, said, capsys):
    assert command.main(words) == 2
    assert f"kmine plan: error: {said}" in capsys.readouterr().err
