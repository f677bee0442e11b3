"""Where tests find data, and a cache of their own."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

os.environ.setdefault("OMP_NUM_THREADS", "1")


def of_session(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all processes of this session of tests."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[], Any]], Any]:
    """`once(name, make)`: JSON data that one process of this session makes, and the others read."""

    def get(name: str, make: Callable[[], Any]) -> Any:
        path = of_session(tmp_path_factory) / f"{name}.json"
        with FileLock(f"{path}.lock"):
            if not path.exists():
                path.write_text(json.dumps(make()))
            return json.loads(path.read_text())

    return get


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory):
    """Stages, such as trained teachers, and decoded data go to a folder of this session, which its processes share."""
    before = os.environ.get("STILLHOUSE_CACHE")
    os.environ["STILLHOUSE_CACHE"] = str(of_session(tmp_path_factory) / "cache")
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
