"""Published weights: downloaded by their library, or an answer within seconds where there is no network."""

from __future__ import annotations

import http.client
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any
from unittest import mock

from stillhouse.errors import UserError

PATIENCE = 4.0
"""Seconds in which a server must be found and take a connection."""
TORCHVISION = "https://download.pytorch.org"


def hub() -> str:
    """The address of the Hugging Face hub, as the user set it."""
    with suppress(ImportError):
        from huggingface_hub import constants

        return str(constants.ENDPOINT)
    return "https://huggingface.co"


def published(name: str, pretrained: bool, make: Callable[[], Any], address: str | None = None) -> Any:
    """Run what may download; whatever goes wrong there (no network, no such weights) becomes one sentence.

    Without a network, what was downloaded before is still found.

    Args:
        name: of the network.
        pretrained: whether it may download.
        make: calls the library.
        address: where its weights are; default: the Hugging Face hub.

    Raises:
        UserError: the weights could not be had.
    """
    if not pretrained:
        return make()
    address = address or hub()
    there = reachable(address)
    try:
        if there:
            return make()
        with offline():
            return make()
    except UserError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        why = lines[0].rstrip(".") if there else f"{address} cannot be reached, and they were not downloaded before"
        raise UserError(
            f"Could not get the published weights of '{name}' ({'no network?' if there else 'no network'}): {why}. "
            "Give a `checkpoint`, or a folder with weights, to work without a network."
        ) from error


def reachable(address: str) -> bool:
    """Whether a server gives any answer within `PATIENCE` seconds, through the user's proxy where there is one."""
    found = threading.Event()

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=PATIENCE).close()
        except urllib.error.HTTPError:
            pass  # an answer, whatever it is
        except (OSError, ValueError, http.client.HTTPException):
            return
        found.set()

    thread = threading.Thread(target=ask, daemon=True)  # a name server that does not answer cannot be interrupted
    thread.start()
    thread.join(PATIENCE)
    return found.is_set()


@contextmanager
def offline() -> Iterator[None]:
    """Inside, libraries look for weights on this machine alone, and do not wait for a network that is not there."""

    def no_network(*args: Any, **options: Any) -> Any:
        raise socket.gaierror("no network")

    with mock.patch.object(socket, "getaddrinfo", no_network):
        try:
            from huggingface_hub import constants
        except ImportError:
            yield
            return
        with mock.patch.object(constants, "HF_HUB_OFFLINE", True):
            yield
