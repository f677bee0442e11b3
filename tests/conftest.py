"""Where tests find data, and a cache of their own."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory):
    """Stages and decoded data go to a folder of this session."""
    before = os.environ.get("STILLHOUSE_CACHE")
    os.environ["STILLHOUSE_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["STILLHOUSE_CACHE"]
    else:
        os.environ["STILLHOUSE_CACHE"] = before


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real data, STILLHOUSE_DATA."""
    root = os.environ.get("STILLHOUSE_DATA")
    if not root or not Path(root).is_dir():
        pytest.skip("STILLHOUSE_DATA is not set: no real data here")
    return Path(root)


@pytest.fixture
def recipe_file(tmp_path: Path):
    """Write a recipe and return its path."""

    def write(text: str, name: str = "recipe.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    """Run the command in this process, in an empty folder; (exit code, stdout, stderr)."""
    from stillhouse import cli

    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["stillhouse", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1 if stop.code else 0
        out = capsys.readouterr()
        return code, out.out, out.err

    return run
