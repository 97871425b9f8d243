"""The Hugging Face hub within time limits, and offline."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit
from urllib.request import getproxies

HUB_TIMEOUT_S = 5.0


@contextmanager
def hub_session(offline: bool) -> Iterator[None]:
    """Keep the hub's library to its cache within the block if `offline`, or where the hub does not answer at once.

    Else it retries for minutes.
    """
    from huggingface_hub import constants

    url, before = urlsplit(constants.ENDPOINT), constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or offline
    if not (offline or getproxies()):
        try:
            port = url.port or (80 if url.scheme == "http" else 443)
            socket.create_connection((url.hostname or "", port), HUB_TIMEOUT_S).close()
        except OSError:
            constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
