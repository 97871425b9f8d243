"""`kmine weights`: listing, fetching, checking and carrying checkpoints, made-up ones from a server on this machine."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile

import numpy as np
import pytest
import torch
from helpers.hub_cache import hub_file
from helpers.local_server import serving
from safetensors.torch import save

from kmine import weights
from kmine.models.encoder_hub import encoder_record
from kmine.segmenters import weights as known
from kmine.segmenters.weights import Weights

CONTENT = np.random.default_rng(0).bytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server(monkeypatch):
    with serving(CONTENT, monkeypatch) as running:
        monkeypatch.setitem(known.OFFICIAL_WEIGHTS, "sam_vit_b", Weights(running.url("b.pth"), SHA256))
        yield running


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def main(folder):
    return lambda *words: weights.main([*map(str, words), "--cache_dir", str(folder)])


def refused(main, capsys, *words) -> str:
    """The one line that says why."""
    capsys.readouterr()
    assert main(*words) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


def bundle_of(path, members: dict[str, bytes], **extra) -> None:
    """A tar file of anything."""
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for key, value in extra.items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(content))


def test_get_goes_on_where_it_broke_off_and_asks_no_server_again(server, main, folder, capsys):
    folder.mkdir()
    (folder / "b.pth.part").write_bytes(CONTENT[:100_000])
    assert main("get", "sam_vit_b") == 0
    assert (folder / "b.pth").read_bytes() == CONTENT and server.ranges == ["bytes=100000-"]
    assert main("get", "sam_vit_b") == 0
    assert len(server.ranges) == 1 and "is there and whole" in capsys.readouterr().out


def test_list_says_what_is_here(server, main, folder, capsys):
    folder.mkdir()

    def state() -> str:
        capsys.readouterr()
        assert main("list") == 0
        return next(line for line in capsys.readouterr().out.splitlines() if line.startswith("sam_vit_b"))

    assert state().endswith("not here")
    (folder / "b.pth.part").write_bytes(CONTENT[:100_000])
    assert state().endswith("begun: 0.1 MB are here")
    (folder / "b.pth").write_bytes(CONTENT)
    assert state().endswith("here, whole")
    (folder / "b.pth").write_bytes(CONTENT[:-1])
    assert state().endswith("not the official file")


def test_list_knows_what_ships_with_kmine(main, capsys):
    assert main("list") == 0
    out = capsys.readouterr().out
    assert "tiny" in out.splitlines()[0] and "here, whole (ships with kmine)" in out.splitlines()[0]
    assert all(name in out and entry.sha256 in out for name, entry in known.OFFICIAL_WEIGHTS.items())


def test_verify_tells_the_official_file_from_another(server, main, folder, tmp_path, capsys):
    folder.mkdir()
    assert main("verify") == 0
    assert "nothing in" in capsys.readouterr().out
    (folder / "b.pth").write_bytes(CONTENT)
    other = tmp_path / "renamed.bin"
    other.write_bytes(CONTENT)
    assert main("verify") == 0 and main("verify", other) == 0
    assert "the official sam_vit_b" in capsys.readouterr().out
    other.write_bytes(CONTENT + b"x")
    assert main("verify", other) == 1
    assert "expected a file" in refused(main, capsys, "verify", tmp_path / "nothing")


def test_a_bundle_carries_weights_to_a_machine_without_network(server, main, folder, tmp_path):
    assert main("bundle", tmp_path / "w.tar", "sam_vit_b") == 0
    asked = len(server.ranges)
    there = tmp_path / "there"
    words = ["unbundle", str(tmp_path / "w.tar"), "--cache_dir", str(there), "--offline"]
    assert weights.main(words) == 0 and weights.main(words) == 0
    assert [path.name for path in there.iterdir()] == ["b.pth"]
    assert (there / "b.pth").read_bytes() == CONTENT and len(server.ranges) == asked
    with tarfile.open(tmp_path / "w.tar") as tar:
        assert json.loads(tar.extractfile("kmine-weights.json").read()) == {"sam_vit_b": SHA256}


@pytest.mark.parametrize("name", ["../b.pth", "/b.pth", "other.pth", "sub/b.pth"])
def test_a_bundle_writes_no_name_but_those_that_are_known(server, main, folder, tmp_path, capsys, name):
    bundle_of(tmp_path / "w.tar", {name: CONTENT})
    assert repr(name) in refused(main, capsys, "unbundle", tmp_path / "w.tar")
    assert not folder.exists() and not (tmp_path / "b.pth").exists()


def test_a_link_in_a_bundle_is_refused(server, main, folder, tmp_path, capsys):
    bundle_of(tmp_path / "w.tar", {"b.pth": b""}, type=tarfile.SYMTYPE, linkname="/etc/passwd")
    assert "expected what `kmine weights bundle` writes" in refused(main, capsys, "unbundle", tmp_path / "w.tar")
    assert not folder.exists()


def test_wrong_content_in_a_bundle_leaves_nothing(server, main, folder, tmp_path, capsys):
    bundle_of(tmp_path / "w.tar", {"b.pth": CONTENT[:-1] + b"x"})
    assert f"expected SHA-256 {SHA256}" in refused(main, capsys, "unbundle", tmp_path / "w.tar")
    assert not any(folder.iterdir())


def test_a_bundle_cut_short_leaves_nothing(server, main, folder, tmp_path, capsys):
    bundle_of(tmp_path / "w.tar", {"b.pth": CONTENT})
    (tmp_path / "w.tar").write_bytes((tmp_path / "w.tar").read_bytes()[:150_000])
    assert "w.tar" in refused(main, capsys, "unbundle", tmp_path / "w.tar")
    assert not any(folder.glob("b.pth"))


@pytest.mark.parametrize(
    "headers",
    [
        {"GNU.sparse.map": "a,b"},
        {"GNU.sparse.map": "0,10", "GNU.sparse.size": "x"},
        {"GNU.sparse.map": "0,10", "GNU.sparse.size": str(10**15)},
        {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "1000"},
        {"size": "9" * 20},
    ],
)
def test_hostile_headers_of_a_bundle_are_one_error(server, main, folder, tmp_path, capsys, headers):
    bundle_of(tmp_path / "w.tar", {"b.pth": CONTENT}, pax_headers=headers)
    assert "w.tar" in refused(main, capsys, "unbundle", tmp_path / "w.tar")
    assert not folder.exists()


def test_mistakes_name_the_cure(server, main, folder, tmp_path, capsys):
    assert "did you mean get" in refused(main, capsys, "gett", "sam_vit_b")
    assert "did you mean sam_vit_b" in refused(main, capsys, "get", "sam_vitb")
    assert "ships with kmine" in refused(main, capsys, "get", "tiny")
    assert "expected a name" in refused(main, capsys, "get")
    assert "--offline forbids" in refused(main, capsys, "get", "sam_vit_b", "--offline")
    assert "expected a file to write" in refused(main, capsys, "bundle", "w.tar")
    (tmp_path / "w.tar").write_bytes(b"")
    assert "found one" in refused(main, capsys, "bundle", tmp_path / "w.tar", "sam_vit_b")
    assert server.ranges == []


ENCODER = save({"conv1.weight": torch.zeros(3)})
RECORD = {
    "sha256": hashlib.sha256(ENCODER).hexdigest(),
    "source": "https://huggingface.co/smp-hub/resnet34.imagenet",
    "revision": "7a57b34f723329ff020b3f8bc41771163c519d0c",
    "normalization": "imagenet",
}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The hub's cache with ImageNet's resnet34."""
    hub_file(monkeypatch, tmp_path / "hub", "resnet34").write_bytes(ENCODER)


def test_encoders_are_fetched_listed_and_verified(main, hub, folder, capsys):
    assert main("get", "encoder:resnet34", "--offline") == 0
    path = folder / "encoder-resnet34.safetensors"
    assert path.read_bytes() == ENCODER and json.loads(path.with_suffix(".json").read_text()) == RECORD
    assert main("get", "encoder:resnet34") == main("list") == main("verify") == 0
    out = capsys.readouterr().out
    assert "encoder:resnet34 is there and whole" in out and "input imagenet" in out and RECORD["revision"] in out
    assert f"encoder:resnet34 of {RECORD['source']}" in out
    path.write_bytes(ENCODER[:-1])
    assert main("verify") == 1 and main("list") == 0
    assert "here, but not the official file" in capsys.readouterr().out
    assert "remove the file" in refused(main, capsys, "get", "encoder:resnet34")


def test_encoders_travel_in_bundles(main, hub, tmp_path):
    assert main("bundle", tmp_path / "w.tar", "encoder:resnet34") == 0
    there = tmp_path / "there"
    words = ["unbundle", str(tmp_path / "w.tar"), "--cache_dir", str(there), "--offline"]
    assert weights.main(words) == 0 and weights.main(words) == 0
    path = there / "encoder-resnet34.safetensors"
    assert path.read_bytes() == ENCODER and encoder_record(path).normalization == "imagenet"
    assert sorted(file.name for file in there.iterdir()) == [path.with_suffix(".json").name, path.name]


def encoder_bundle(
    path, name: str, content: bytes = ENCODER, entry: str = "encoder:resnet34", **changes: object
) -> None:
    manifest = json.dumps({entry: RECORD | {"sha256": hashlib.sha256(content).hexdigest()} | changes}).encode()
    bundle_of(path, {"kmine-weights.json": manifest, name: content})


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("encoder-resnet18.safetensors", "encoder:resnet34"),
        ("encoder-../x.safetensors", "encoder:../x"),
        ("../encoder-resnet34.safetensors", "encoder:resnet34"),
        ("encoder-resnet34.safetensors", "encoder:encoder-resnet34"),
        ("encoder-resnet34.json", "encoder:resnet34"),
        ("encoder-resnet34.safetensors", "resnet34"),
    ],
)
def test_a_bundle_writes_encoders_under_their_own_names_only(main, folder, tmp_path, capsys, name, entry):
    encoder_bundle(tmp_path / "w.tar", name, entry=entry)
    assert repr(name) in refused(main, capsys, "unbundle", tmp_path / "w.tar")
    assert not folder.exists() and not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("content", "changes", "message"),
    [
        (ENCODER, {"sha256": "0" * 64}, "expected SHA-256 000"),
        (b"\x80\x04pickle", {}, "expected safetensors in encoder-resnet34.safetensors, got torch"),
        (ENCODER, {"normalization": "other"}, "expected what `kmine weights bundle` writes"),
        (ENCODER, {"source": "x\x1b[31m"}, "expected what `kmine weights bundle` writes"),
    ],
)
def test_an_encoder_that_is_not_as_recorded_leaves_nothing(main, folder, tmp_path, capsys, content, changes, message):
    encoder_bundle(tmp_path / "w.tar", "encoder-resnet34.safetensors", content, **changes)
    assert message in refused(main, capsys, "unbundle", tmp_path / "w.tar")
    assert not folder.exists() or not any(folder.iterdir())


def test_a_manifest_that_is_no_json_is_one_error(main, folder, tmp_path, capsys):
    bundle_of(tmp_path / "w.tar", {"kmine-weights.json": b"[" * 10**5, "encoder-resnet34.safetensors": ENCODER})
    assert "kmine-weights.json" in refused(main, capsys, "unbundle", tmp_path / "w.tar")
    assert not folder.exists()
