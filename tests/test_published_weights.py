"""Published weights without a network: an answer in seconds, and what was downloaded before is found."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from stillhouse.config.specs import ModelSpec
from stillhouse.errors import UserError
from stillhouse.models import build, published


@pytest.fixture(params=["nobody listens", "nobody answers"])
def no_network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """All requests go to a port where nothing listens, or where connections are taken and never answered."""
    listener = socket.create_server(("127.0.0.1", 0))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{listener.getsockname()[1]}")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(published, "PATIENCE", 0.5)
    if request.param == "nobody listens":
        listener.close()
    yield
    listener.close()


@pytest.mark.parametrize("model", ["timm:resnet18", "torchvision:resnet18", "hf:an-owner/a-model"])
def test_weights_that_cannot_be_had_are_a_sentence_in_seconds(model: str, no_network: None) -> None:
    pytest.importorskip(model.partition(":")[0].replace("hf", "transformers"))
    build(ModelSpec(model="stillhouse:mlp", options={"widths": [2]}), 2, (3,))  # imports are not counted
    with pytest.raises(UserError, match="Could not get the published weights of") as told:
        build(ModelSpec(model=model, pretrained=True), 10, (3, 32, 32))
    assert "\n" not in str(told.value)


def test_what_was_downloaded_before_is_found(no_network: None) -> None:
    def make() -> str:
        from huggingface_hub import constants

        assert constants.HF_HUB_OFFLINE
        with pytest.raises(OSError, match="no network"):
            http.client.HTTPConnection("huggingface.co").connect()
        return "from the cache"

    assert published.published("x", True, make) == "from the cache"
