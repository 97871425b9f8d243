"""Segmenters by name: built-in ones, registered ones, those of installed packages."""

from __future__ import annotations

import dataclasses
import doctest
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from helpers.segmenter_suite import SMALL, random_net, random_sam
from safetensors.torch import save_file

from kmine.config import PromptsConfig, SegmenterConfig
from kmine.errors import UserError
from kmine.segmenters import (
    SEGMENTERS,
    check_prompting,
    create_segmenter,
    fetch_weights,
    fitted_prompts,
    needs_box,
    open_segmenter,
    register_segmenter,
    registry,
    weights,
)
from kmine.segmenters.base import Abilities, AutomaticMaskGenerator
from kmine.segmenters.ellipse import Ellipse
from kmine.segmenters.hf import files
from kmine.segmenters.identity import IdentitySegmenter
from kmine.segmenters.registry import NEEDS_BOX, NO_PROPOSALS
from kmine.segmenters.sam.build import ARCHITECTURES, feed_of
from kmine.segmenters.sam.segmenter import SamSegmenter
from kmine.segmenters.tiny.network import TinyNet
from kmine.segmenters.tiny.segmenter import Tiny, open_tiny
from kmine.segmenters.tiny.weights import save_tiny


def test_the_ellipse_takes_no_checkpoint() -> None:
    assert open_segmenter(SegmenterConfig("ellipse"), device="cpu", offline=True).name == "ellipse"
    with pytest.raises(UserError, match="has no weights"):
        open_segmenter(SegmenterConfig("ellipse", checkpoint="x.pth"), device="cpu", offline=True)


def test_the_nearest_name_is_suggested_for_an_unknown_one() -> None:
    with pytest.raises(UserError, match=r"--segmenter.checkpoint FILE.* hf:OWNER/NAME or hf:FOLDER, .*module:Class"):
        open_segmenter(SegmenterConfig(name="medsa"), device="cpu", offline=True)
    with pytest.raises(UserError, match=r"unknown name 'sam_vitb'; did you mean sam_vit_b\?"):
        open_segmenter(SegmenterConfig("sam_vitb"), device="cpu", offline=True)
    with pytest.raises(UserError, match=", ".join(SEGMENTERS.names())):
        open_segmenter(SegmenterConfig("zzz"), device="cpu", offline=True)


def test_a_missing_checkpoint_is_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="no such file"):
        open_segmenter(SegmenterConfig("sam_vit_b", str(tmp_path / "no.pth")), device="cpu", offline=True)


def test_offline_without_weights_the_error_names_their_place(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("KMINE_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"weights/sam_vit_b_01ec64.pth.*--offline.*--segmenter.checkpoint"):
        open_segmenter(SegmenterConfig("sam_vit_b"), device="cpu", offline=True)


def test_an_own_checkpoint_is_part_of_the_name_and_the_official_one_is_not(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(ARCHITECTURES, "sam_vit_b", SMALL)
    path = tmp_path / "medsam.safetensors"
    save_file(random_sam(image_size=1024).state_dict(), path)
    cfg = SegmenterConfig("sam_vit_b", str(path))
    assert open_segmenter(cfg, device="cpu", offline=True).name == "sam_vit_b:medsam"
    official = weights.Weights("http://127.0.0.1/x.pth", weights.sha256_of(path))
    monkeypatch.setitem(weights.OFFICIAL_WEIGHTS, "sam_vit_b", official)
    assert open_segmenter(cfg, device="cpu", offline=True).name == "sam_vit_b"


def test_importing_the_package_loads_no_torch() -> None:
    code = "import sys, kmine.segmenters; sys.exit('torch' in sys.modules or 'segment_anything' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_cache_settings_reach_the_segmenter(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(ARCHITECTURES, "sam_vit_b", SMALL)
    monkeypatch.setenv("KMINE_CACHE", str(tmp_path / "root"))
    save_file(random_sam(image_size=1024).state_dict(), tmp_path / "w.safetensors")

    def opened(**settings) -> SamSegmenter:
        cfg = SegmenterConfig("sam_vit_b", str(tmp_path / "w.safetensors"), **settings)
        return open_segmenter(cfg, device="cpu", offline=True)

    default = opened()._embedder
    assert default._cache.folder == tmp_path / "root/embeddings"
    assert default._cache._max_bytes is None
    assert default._dtype == np.float16
    own = opened(cache_dir=str(tmp_path / "own"), cache_gb=0.5, cache_dtype="float32")._embedder
    assert (own._cache.folder, own._cache._max_bytes) == (tmp_path / "own", 5 * 10**8)
    assert own._dtype == np.float32
    assert opened(cache_gb=0)._embedder._cache is None
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [("cache_gb", -1), ("cache_gb", float("nan")), ("cache_gb", 1e9), ("cache_dir", ""), ("cache_dtype", "bfloat16")],
)
def test_unfit_cache_settings_are_refused(name, value) -> None:
    with pytest.raises(UserError, match=f"segmenter.{name}: expected"):
        SegmenterConfig(**{name: value})


def test_the_early_check_refuses_what_the_segmenter_does_not_take() -> None:
    kinds = {"ellipse": Ellipse(), "tiny": Tiny(TinyNet()), "sam_vit_b": SamSegmenter(random_sam(), name="sam_vit_b")}
    assert {*NEEDS_BOX, *NO_PROPOSALS} <= set(SEGMENTERS.names())
    for name, segmenter in kinds.items():
        assert isinstance(segmenter, AutomaticMaskGenerator) == (name not in NO_PROPOSALS)
        assert needs_box(segmenter) == (name in NEEDS_BOX)
    check_prompting("ellipse", PromptsConfig(points=True))
    check_prompting("sam_vit_h", PromptsConfig(source="auto", box=False, points=True))
    with pytest.raises(UserError, match=r"prompts\.source: auto.*`ellipse`.*--prompts\.source local.*tiny"):
        check_prompting("ellipse", PromptsConfig(source="auto"))
    with pytest.raises(UserError, match=r"prompts\.box.*`tiny` expects a box.*--prompts\.box true"):
        check_prompting("tiny", PromptsConfig(box=False, points=True))


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "tiny.safetensors"
    save_tiny(random_net(), path, {"script": "by hand", "seed": 3})
    return path


def test_an_own_checkpoint_of_tiny_is_part_of_its_name(saved) -> None:
    own = open_segmenter(SegmenterConfig("tiny", str(saved)), device="cpu", offline=True)
    assert own.name == "tiny:tiny"
    assert own.signature == open_tiny(saved).signature
    with pytest.raises(UserError, match=r"none\.safetensors: no such file; .*--segmenter\.checkpoint FILE"):
        open_segmenter(SegmenterConfig("tiny", "none.safetensors"), device="cpu", offline=True)


def entry_point(monkeypatch, folder: Path, module: str) -> None:
    """Install a package `my-package` with the segmenter `my_segmenter` in a module of that content."""
    (folder / "my_package-1.0.dist-info").mkdir()
    (folder / "my_package-1.0.dist-info/METADATA").write_text("Name: my-package\nVersion: 1.0\n")
    text = "[kmine.segmenters]\nmy_segmenter = my_package_segmenter:open_it\n"
    (folder / "my_package-1.0.dist-info/entry_points.txt").write_text(text)
    (folder / "my_package_segmenter.py").write_text(module)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(SEGMENTERS, "_registered", {})
    monkeypatch.delitem(sys.modules, "my_package_segmenter", raising=False)


OPEN_IT = """
from kmine.segmenters.ellipse import Ellipse
def open_it(cfg, device, offline, log):
    segmenter = Ellipse()
    segmenter.name = f"{cfg.name} {cfg.checkpoint} {device} {offline}"
    return segmenter
"""


def test_a_segmenter_of_an_installed_package_is_opened_by_its_name(tmp_path, monkeypatch) -> None:
    entry_point(monkeypatch, tmp_path, OPEN_IT)
    assert "my_segmenter" in SEGMENTERS.names() and "my_package_segmenter" not in sys.modules
    segmenter = create_segmenter("my_segmenter", checkpoint="a/b.pt", device="cuda:1", offline=True)
    assert segmenter.name == "my_segmenter a/b.pt cuda:1 True"
    fetch_weights(SegmenterConfig("my_segmenter", "not a file"), offline=True)  # the package's own affair


def test_a_registered_segmenter_is_opened_by_its_name(monkeypatch) -> None:
    monkeypatch.setattr(SEGMENTERS, "_registered", {})
    segmenter = IdentitySegmenter()
    register_segmenter("mine", lambda *_: segmenter)
    assert create_segmenter("mine") is segmenter
    with pytest.raises(UserError, match=r"segmenter\.name: expected a new name, got 'tiny'"):
        register_segmenter("tiny", lambda *_: segmenter)


def test_creating_is_opening_with_the_default_settings() -> None:
    created, opened = create_segmenter(), open_segmenter(SegmenterConfig(), device="cpu", offline=True)
    assert (created.name, created.signature) == (opened.name, opened.signature)


def test_the_examples_of_the_documentation_run(monkeypatch) -> None:
    monkeypatch.setattr(SEGMENTERS, "_registered", {})
    result = doctest.testmod(registry)
    assert result.attempted >= 8 and result.failed == 0


class Lacking(Ellipse):
    """A segmenter with abilities of its own, as a plug-in's class."""

    def __init__(self, *given) -> None:
        self.abilities = given[0] if isinstance(given[0], Abilities) else Abilities()
        self.given = given


def test_a_class_is_named_by_its_module(monkeypatch) -> None:
    monkeypatch.setattr(SEGMENTERS, "_registered", {})
    monkeypatch.setitem(sys.modules, "my_module", types.SimpleNamespace(Mine=Lacking))
    segmenter = open_segmenter(SegmenterConfig("my_module:Mine"), device="cuda:1", offline=True)
    assert segmenter.given[1:3] == ("cuda:1", True)
    with pytest.raises(UserError, match=r"'no_module_x:Mine' cannot be imported: ModuleNotFoundError.*PYTHONPATH"):
        open_segmenter(SegmenterConfig("no_module_x:Mine"), device="cpu", offline=True)
    with pytest.raises(UserError, match="'my_module:Nothing' cannot be imported: AttributeError"):
        SEGMENTERS.get("my_module:Nothing")
    monkeypatch.setitem(sys.modules, "other_module", types.SimpleNamespace(make=lambda *given: object()))
    with pytest.raises(UserError, match="got a object without name, signature, encode, decode"):
        open_segmenter(SegmenterConfig("other_module:make"), device="cpu", offline=True)


def test_prompts_that_a_segmenter_does_not_take_are_left_out() -> None:
    asked = PromptsConfig(points=True)
    no_hint = fitted_prompts(Lacking(Abilities(mask_input=False)), asked)
    assert no_hint == dataclasses.replace(asked, mask_hint=False)
    assert not fitted_prompts(Lacking(Abilities(points=False)), asked).points
    assert not fitted_prompts(Lacking(Abilities(box=False)), asked).box
    assert fitted_prompts(Lacking(Abilities()), asked) == asked
    with pytest.raises(UserError, match=r"takes points, no boxes.*--prompts.points true"):
        fitted_prompts(Lacking(Abilities(box=False)), PromptsConfig())
    with pytest.raises(UserError, match=r"expects a box.*--prompts.box true"):
        fitted_prompts(Lacking(Abilities(points=False)), PromptsConfig(box=False, points=True))
    for source in (Lacking(Abilities()), SamSegmenter(random_sam(), name="s", feed=feed_of("medsam", 256))):
        with pytest.raises(UserError, match=r"prompts\.source: auto expects a segmenter that proposes masks"):
            fitted_prompts(source, PromptsConfig(source="auto"))
    with pytest.raises(UserError, match="cascade expects a segmenter that takes mask prompts"):
        fitted_prompts(Lacking(Abilities(mask_input=False)), PromptsConfig(source="cascade"))


def test_models_of_transformers_are_known_by_their_prefix(monkeypatch) -> None:
    assert SEGMENTERS.is_builtin("hf:facebook/sam-vit-base") and not SEGMENTERS.is_builtin("hfx")
    monkeypatch.setattr(files, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"need the package transformers, .*pip install 'kmine\[hf\]'"):
        check_prompting("hf:facebook/sam-vit-base", PromptsConfig())
    with pytest.raises(UserError, match="need the package transformers"):
        open_segmenter(SegmenterConfig("hf:facebook/sam-vit-base"), device="cpu", offline=True)


def test_lite_medsam_has_no_address() -> None:
    with pytest.raises(UserError, match=r"weights of lite_medsam have no address.*--segmenter.checkpoint FILE"):
        open_segmenter(SegmenterConfig("lite_medsam"), device="cpu", offline=True)
