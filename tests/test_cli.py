"""The command line: help, one-line errors with exit code 2, flags over YAML."""

from __future__ import annotations

import errno
import re
from dataclasses import is_dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import get_type_hints

import pytest
from helpers.sources import documented

from kmine import cli
from kmine.__main__ import COMMANDS
from kmine.config import DATA_SETTINGS, MAIN_SETTINGS, DataConfig, LoopConfig
from kmine.config.sweep import SWEEP_SETTINGS, SweepConfig
from kmine.errors import UserError
from kmine.io.settings_help import settings_of
from kmine.loop import __main__ as loop


def parsed(*argv: str) -> LoopConfig:
    return cli.parse(LoopConfig, argv, prog="kmine loop", description="words")


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that `argv` is refused with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        parsed(*argv)
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert out == ""
    assert err.startswith("kmine loop: error: ") and err.count("\n") == 1 and err.endswith("\n")
    assert "Traceback" not in err
    return err.removeprefix("kmine loop: error: ").strip()


def written(path: Path, text: str | bytes) -> str:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


# -- help


def all_settings(kind: type = LoopConfig, prefix: str = "") -> dict[str, str]:
    """Help text of every setting by its dotted name."""
    texts = {prefix + name: text for name, text in documented(kind.__name__).items()}
    for name, hint in get_type_hints(kind).items():
        if is_dataclass(hint):
            texts |= all_settings(hint, f"{prefix}{name}.")
    return texts


def test_help_explains_every_setting_in_its_own_words(capsys):
    with pytest.raises(SystemExit) as stop:
        loop.main(["--help", "all"])
    assert stop.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    settings = all_settings()
    assert len(settings) > 50
    for name, text in settings.items():
        begin = shown.index(f"--{name} ")
        assert " ".join(text.split()) in shown[begin : begin + len(text) + 400], name


@pytest.mark.parametrize("command", COMMANDS)
def test_the_short_help_of_a_command_fits_a_screen(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        import_module(f"kmine.{command}{'' if command in ('fetch', 'next', 'weights') else '.__main__'}").main(
            ["--help"]
        )
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    assert shown.startswith(f"usage: kmine {command} ") and shown.count("\n") <= 40
    assert "--help all" in shown and "Optional[" not in shown


def test_the_main_settings_exist():
    for config_class, names in (
        (LoopConfig, MAIN_SETTINGS),
        (LoopConfig, DATA_SETTINGS),
        (SweepConfig, SWEEP_SETTINGS),
    ):
        assert set(names) <= {setting.name for setting in settings_of(config_class)}


# -- flags and YAML


def test_without_words_every_default_holds():
    assert parsed() == LoopConfig()


def test_flags_after_the_file_win_and_the_rest_of_the_file_stays(tmp_path):
    file = written(tmp_path / "a.yaml", "rounds: 5\ndata:\n  size: 64\n  num_samples: 40\nfit:\n  lr: 1e-4\n")
    cfg = parsed("--config", file, "--rounds", "2", "--data.size=128")
    assert (cfg.rounds, cfg.data.size, cfg.data.num_samples, cfg.fit.lr) == (2, 128, 40, 1e-4)


def test_what_a_run_saves_is_what_a_command_reads(tmp_path):
    import yaml

    cfg = parsed("--rounds", "2", "--data.root", "somewhere", "--fit.augment", "false", "--gate.keep", "0.3")
    cfg = replace(cfg, data=replace(cfg.data, window=(-100.0, 300.5), fine_groups=3))
    file = written(tmp_path / "saved.yaml", yaml.safe_dump(cli.to_dict(cfg)))
    assert parsed("--config", file) == cfg


def test_two_numbers_are_a_list_in_brackets():
    assert parsed("--data.window", "[-100,300]").data.window == (-100.0, 300.0)
    assert parsed("--data.window", "null").data.window is None
    assert parsed("--data.class_names", "[background,a b]").data.class_names == ("background", "a b")


@pytest.mark.parametrize(
    ("words", "offline"),
    [
        (["--offline"], True),
        (["--offline", "--rounds", "1"], True),
        (["--offline", "true"], True),
        (["--offline=false"], False),
        (["--offline", "false", "--rounds", "1"], False),
    ],
)
def test_a_switch_may_stand_alone(words, offline):
    assert parsed(*words).offline is offline


def test_a_value_that_ends_like_a_switch_stays_as_it_is():
    assert parsed("--out", "myoffline").out == "myoffline"


def test_lists_on_the_command_line_and_in_yaml_are_equal(tmp_path):
    file = written(tmp_path / "c.yaml", "seeds: [3, 4]\nfractions: [0.5]\nmethods: [mining]\nset: [mining.fit.lr=1]\n")

    def sweep(*argv: str) -> SweepConfig:
        return cli.parse(SweepConfig, argv, prog="kmine sweep", description="words")

    words = "--seeds 3 --fractions [0.5] --methods mining --set mining.fit.lr=1 --seeds=4"
    assert sweep(*words.split()) == sweep("--config", file)
    assert sweep("--seeds", "5", "--config", file).seeds == [5]


def test_override_changes_the_named_settings_only():
    before = DataConfig(size=64, window=(-1.0, 2.0))
    assert cli.override(DataConfig, cli.to_dict(before), {"val_fraction": "0.3"}, "here") == replace(
        before, val_fraction=0.3
    )
    for name, message in (
        ("sise", "here: unknown setting sise; did you mean size?"),
        ("size", "here: data.size: expected"),
    ):
        with pytest.raises(UserError, match=f"^{re.escape(message)}"):
            cli.override(DataConfig, cli.to_dict(before), {name: "1"}, "here")


# -- refusals


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--data.sise", "3"], "unknown setting data.sise; did you mean data.size?"),
        (["--dta.size", "3"], "unknown setting dta.size; did you mean data.size?"),
        (["--no_offline"], "unknown setting no_offline; did you mean offline?"),
        (["--round", "2"], "unknown setting round; did you mean rounds?"),
        (["--rounds", "two"], "rounds: expected int, got 'two'"),
        (["--rounds", "1.5"], "rounds: expected int, got '1.5'"),
        (["--offline=maybe"], "offline: expected bool, got 'maybe'"),
        (["--fit.lr", "nan"], "fit.lr: expected float, got 'nan'"),
        (["--data.on_error", "skipp"], "data.on_error: expected one of stop, skip, got 'skipp'; did you mean skip?"),
        (["--data.kind", "mri"], "data.kind: expected one of polyp, ct, xray, got 'mri'"),
        (["--data.window", "-160", "240"], "data.window: expected a list in brackets, such as [1, 2], got '-160'"),
        (["--data.window", "[1]"], "data.window: expected a list of 2 in brackets, got '[1]'"),
        (["--data.window", "[1,x]"], "data.window: expected float, got 'x'"),
        (["--data.fine_groups", "few"], "data.fine_groups: expected float or null, got 'few'"),
        (["--data.size", "7"], "data.size: expected 32 to 4096 pixels, got 7"),
        (["--rounds=-1"], "rounds: expected 0 or more, got -1"),
        (["--rounds"], "--rounds: expected a value after it, got none"),
        (["--data", "3"], "data: it is a section, not a setting; set one of its own, as in --data.NAME VALUE"),
    ],
    ids=" ".join,
)
def test_a_wrong_flag_is_one_line_that_names_it(capsys, argv, said):
    assert refused(capsys, *argv) == said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("data:\n  label_fractoin: 0.1\n", "unknown setting data.label_fractoin; did you mean data.label_fraction?"),
        ("round: 1\n", "unknown setting round; did you mean rounds?"),
        ("dtaa:\n  size: 64\n", "unknown setting dtaa; did you mean data?"),
        ("data.sise: 64\n", "unknown setting data.sise; did you mean data.size?"),
        ("data: 3\n", "data: expected settings indented below it, got '3'"),
        ("data:\n", "data: expected settings indented below it, got nothing"),
        ("- rounds\n- 1\n", "expected lines `name: value`, got a list"),
        ("rounds\n", "expected lines `name: value`, got 'rounds'"),
        ("", "expected lines `name: value`, got nothing"),
        ("rounds: 1\nseed: [1\n", "line 3, column 1: not YAML"),
        (b"\xff\xfe\x00", "expected a text file, got other bytes"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_the_file_and_the_place(tmp_path, capsys, text, said):
    file = written(tmp_path / "a.yaml", text)
    for words in (["--config", file], [f"--config={file}"]):
        assert refused(capsys, *words).startswith(f"--config {file}: {said}")


def test_values_in_a_file_are_checked_like_flags(tmp_path, capsys):
    file = written(tmp_path / "a.yaml", "data:\n  size: many\n")
    assert refused(capsys, "--config", file) == f"--config {file}: data.size: expected int, got 'many'"
    file = written(tmp_path / "a.yaml", "data:\n  kind: polip\n")
    assert "did you mean polyp?" in refused(capsys, "--config", file)


def test_a_missing_file_and_a_folder_are_named(tmp_path, capsys):
    assert "no.yaml: cannot be read (No such file" in refused(capsys, "--config", str(tmp_path / "no.yaml"))
    assert "cannot be read (Is a directory)" in refused(capsys, "--config", str(tmp_path))
    assert refused(capsys, "--config") == "--config: expected a value after it, got none"


# -- exit codes


def raising(error: BaseException):
    def work() -> int:
        raise error

    return work


def test_guarded_turns_what_a_user_can_mend_into_a_line_and_a_code(capsys):
    assert cli.guarded("kmine x", lambda: 0) == 0
    assert cli.guarded("kmine x", raising(UserError("expected a,\n  got b"))) == 2
    assert capsys.readouterr().err == "kmine x: error: expected a, got b\n"
    assert cli.guarded("kmine x", raising(KeyboardInterrupt())) == 130
    assert "the same command resumes" in capsys.readouterr().err
    assert cli.guarded("kmine x", raising(OSError(errno.ENOSPC, "No space left on device"))) == 2
    assert "the disk is full; free some space and run the same command again" in capsys.readouterr().err
    assert cli.guarded("kmine x", raising(FloatingPointError("NaN logits; lower fit.lr"))) == 2
    assert "lower fit.lr" in capsys.readouterr().err


@pytest.mark.parametrize("error", [RuntimeError("ours"), OSError(errno.EIO, "ours")])
def test_guarded_does_not_hide_our_own_mistakes(error):
    with pytest.raises(type(error), match="ours"):
        cli.guarded("kmine x", raising(error))


# -- values that YAML would change, paths, and the file that has a wrong value


@pytest.mark.parametrize("text", ["#1 patients", "&x", "~x", "2024", "007", "- a", "[a]", "1: 2", "no", "!!str x"])
def test_names_are_taken_as_they_are_typed_and_as_a_file_spells_them(tmp_path, text):
    assert parsed("--data.images", f"./{text}").data.images == f"./{text}"
    if not text.startswith("~"):
        assert parsed(f"--data.images={text}", f"--model.name={text}").data.images == text
        file = written(tmp_path / "a.yaml", f'data:\n  images: "{text}"\nout: "{text}"\n')
        cfg = parsed("--config", file)
        assert (cfg.data.images, cfg.out) == (text, text)
        sweep = cli.override(LoopConfig, cli.to_dict(cfg), {"verdicts": text, "seed": "3"}, "here")
        assert (sweep.data.images, sweep.verdicts, sweep.seed) == (text, text, 3)


@pytest.mark.parametrize("text", ["2024", "007", "2024-01-01", "no", "1_000", "1:30", "1e3", "0x10"])
def test_unquoted_words_in_a_file_stay_words_where_a_name_is_expected(tmp_path, text):
    file = written(tmp_path / "a.yaml", f"data:\n  images: {text}\n  class_names: [background, {text}]\n")
    data = parsed("--config", file).data
    assert (data.images, data.class_names) == (text, ("background", text))
    assert parsed("--data.class_names", f"[background, {text}]").data.class_names == ("background", text)


def test_null_is_nothing_unless_quoted(tmp_path):
    file = written(tmp_path / "a.yaml", "data:\n  root: ~\n  images: null\n  masks: 'null'\n  window: null\n")
    data = parsed("--config", file).data
    assert (data.root, data.images, data.masks, data.window) == (None, None, "null", None)
    assert parsed("--config", file, "--data.masks", "null").data.masks is None


def test_choices_that_look_like_numbers_are_choices(tmp_path):
    cfg = parsed("--config", written(tmp_path / "a.yaml", "fit:\n  precision: 16\nmodel:\n  name: sks\n  levels: 3\n"))
    assert (cfg.fit.precision, cfg.model.levels) == ("16", 3)


def test_home_is_expanded_in_every_path_however_it_is_given(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    file = written(tmp_path / "a.yaml", "out: ~/run\ndata: {images: ~/i, split_file: '~/a,~/b'}\nverdicts: ~/v.json\n")
    cfg = parsed("--config=~/a.yaml", "--segmenter.checkpoint=~/s.pth", "--model.encoder_weights", "~/w")
    assert file == f"{tmp_path}/a.yaml"
    assert (cfg.out, cfg.data.images, cfg.verdicts) == (f"{tmp_path}/run", f"{tmp_path}/i", f"{tmp_path}/v.json")
    assert (cfg.segmenter.checkpoint, cfg.model.encoder_weights) == (f"{tmp_path}/s.pth", f"{tmp_path}/w")
    assert cli.override(LoopConfig, cli.to_dict(cfg), {"data.root": "~/r"}, "here").data.root == f"{tmp_path}/r"


def test_a_home_that_is_not_there_is_one_line(capsys):
    said = "~nosuchuser/x: no home folder of that name; give the whole path, or set HOME"
    assert refused(capsys, "--data.images", "~nosuchuser/x") == said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("data: {size: 7}", "data.size: expected 32 to 4096 pixels, got 7"),
        (
            "data: {val_fraction: 0.6, test_fraction: 0.6}",
            "data.val_fraction + data.test_fraction: expected less than 1",
        ),
        ("gate: {target_dice: 1.5}", "gate.target_dice: expected between 0 and 1, got 1.5"),
        ("rounds: 1:30", "rounds: expected int, got '1:30'"),
        ("rounds: &a 0b_", "rounds: invalid literal for int()"),
        ("seed: '[[[['", "seed: expected int, got '[[[['"),
        ("out: ~", "out: expected a value, or a list of values where several fit, got nothing"),
        ("data: {window: [[1], 2]}", "data.window: expected a value, or a list"),
        ("offline: maybe", "offline: expected bool, got 'maybe'"),
    ],
)
def test_a_wrong_value_names_the_file_that_has_it(tmp_path, capsys, text, said):
    file = written(tmp_path / "a.yaml", text)
    assert refused(capsys, "--config", file, "--fit.lr", "1").startswith(f"--config {file}: {said}")
    with pytest.raises(UserError, match=f"^{re.escape(f'{file}: {said}')}"):
        cli.load_config(LoopConfig, Path(file))


def test_a_wrong_flag_over_a_file_does_not_blame_the_file(tmp_path, capsys):
    file = written(tmp_path / "a.yaml", "data: {size: 64}")
    assert refused(capsys, "--config", file, "--data.size", "7") == "data.size: expected 32 to 4096 pixels, got 7"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("data.masks: /d/m is no folder; check the path", "--config FILE: data.masks: /d/m is no folder"),
        ("/d/m: expected masks, found nothing", "--config FILE: data.masks: /d/m: expected masks"),
        (
            "expected masks in /d/m/a, found none; check data.masks",
            "--config FILE: data.masks: expected masks in /d/m/a",
        ),
        ("segmenter.name: unknown name 'medsam'; Known: tiny", "--config FILE: segmenter.name: unknown name 'medsam'"),
        ("device: expected cpu, got 'cuda:7'", "device: expected cpu"),  # a flag
        ("runs/one: rounds has changed since this run began", "--config FILE: out: runs/one: rounds has changed"),
        ("--out runs/one: read-only", "--config FILE: --out runs/one: read-only"),
        ("/d/m/a.png: damaged", "/d/m/a.png: damaged"),  # of the data, not of the settings
        ("/x/medsam.pt: no such file", "/x/medsam.pt: no such file"),
        ("data.masks_of: x", "data.masks_of: x"),
        ("data.csv: x", "data.csv: x"),
    ],
)
def test_what_fails_later_names_the_settings_file_that_has_it(tmp_path, capsys, error, said):
    text = "out: ./runs/one/\ndevice: cuda:6\ndata: {images: /d, masks: /d/m}\nsegmenter: {name: medsam}\n"
    file = written(tmp_path / "a.yaml", text)
    parsed("--config", file, "--device", "cuda:7")
    assert cli.guarded("kmine loop", raising(UserError(error))) == 2
    assert capsys.readouterr().err.startswith(f"kmine loop: error: {said}".replace("FILE", file))
    parsed("--rounds", "1")
    cli.guarded("kmine loop", raising(UserError(error)))
    assert capsys.readouterr().err == f"kmine loop: error: {error}\n"


def test_settings_of_one_run_are_named_those_of_several_are_not(tmp_path, capsys):
    files = [written(tmp_path / name, "out: runs/one\ndata: {masks: /d/m}\nverdicts: /v.json\n") for name in "ab"]
    error = UserError("/v.json: expected verdicts, found nothing")
    parsed("--rounds", "1")
    cli.load_config(LoopConfig, Path(files[0]), ["--data.masks", "/e"])
    for message, said in [(error, f"{files[0]}: verdicts: {error}"), (UserError("runs/one: busy"), "runs/one: busy")]:
        cli.guarded("kmine audit", raising(message))
        assert capsys.readouterr().err == f"kmine audit: error: {said}\n"
    cli.guarded("kmine audit", raising(UserError("/d/m: expected masks")))  # a flag has other masks
    assert capsys.readouterr().err == "kmine audit: error: /d/m: expected masks\n"
    cli.load_config(LoopConfig, Path(files[1]))
    cli.guarded("kmine compare", raising(error))
    assert capsys.readouterr().err == f"kmine compare: error: {error}\n"
