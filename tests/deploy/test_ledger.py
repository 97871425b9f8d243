"""What is done is not made again; what is not ours is not replaced."""

from __future__ import annotations

import pytest

from kmine.deploy.ledger import LEDGER, Ledger
from kmine.records import UserError


@pytest.fixture
def out(tmp_path):
    (tmp_path / "a.png").write_bytes(b"mask")
    ledger = Ledger(tmp_path)
    ledger.add("a", "s1", ["a.png"], {"file": "a"})
    ledger.close()
    return tmp_path


def reopened(out) -> Ledger:
    return Ledger(out)


def test_a_whole_output_of_the_same_signature_is_done(out):
    assert reopened(out).done("a", "s1") == {"file": "a"}
    assert reopened(out).done("a", "s2") is None and reopened(out).done("b", "s1") is None


def test_an_output_that_is_gone_or_cut_short_is_not_done(out):
    (out / "a.png").write_bytes(b"mas")
    assert reopened(out).done("a", "s1") is None
    (out / "a.png").unlink()
    assert reopened(out).done("a", "s1") is None


def test_a_line_that_a_kill_cut_short_costs_that_image_alone(out):
    with (out / LEDGER).open("a") as file:
        file.write('{"name": "b", "sig')
    ledger = reopened(out)
    ledger.add("c", "s1", [], {})
    ledger.close()
    assert reopened(out).done("a", "s1") == {"file": "a"} and reopened(out).done("c", "s1") == {}
    assert reopened(out).done("b", "s1") is None


def test_files_of_others_are_not_replaced(out):
    (out / "theirs.png").write_bytes(b"photo")
    ledger = reopened(out)
    ledger.refuse_foreign(["a.png", "new.png"])
    with pytest.raises(UserError, match=r"theirs\.png, which kmine predict did not write"):
        ledger.refuse_foreign(["a.png", "theirs.png"])


def test_one_process_at_a_time(out):
    first = reopened(out)
    with pytest.raises(UserError, match="another process"):
        reopened(out)
    first.close()
    reopened(out)
