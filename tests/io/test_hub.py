"""Within a session the hub's library is offline where that is asked or the hub does not answer."""

from __future__ import annotations

import socket

import pytest
from huggingface_hub import constants

from kmine.io import hub
from kmine.io.hub import hub_session


def test_offline_is_passed_on_and_taken_back(monkeypatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "create_connection", None)  # not even tried
    with hub_session(offline=True):
        assert constants.HF_HUB_OFFLINE
    assert not constants.HF_HUB_OFFLINE


@pytest.mark.parametrize("answers", [True, False])
def test_a_hub_that_does_not_answer_is_not_asked_again(monkeypatch, answers) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "getproxies", dict)

    def connect(*address):
        if not answers:
            raise TimeoutError
        return socket.socket()

    monkeypatch.setattr(socket, "create_connection", connect)
    with pytest.raises(KeyError), hub_session(offline=False):
        assert (not answers) == constants.HF_HUB_OFFLINE
        raise KeyError
    assert not constants.HF_HUB_OFFLINE
