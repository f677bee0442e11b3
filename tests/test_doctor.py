"""`stillhouse doctor`: what a bug report needs, also of an installation that is broken."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stillhouse import cli
from stillhouse.reporting import installation
from stillhouse.reporting.installation import PURPOSES, devices, folders, report, requirements

ROOT = Path(__file__).resolve().parents[1]


def test_every_extra_of_users_has_a_purpose() -> None:
    text = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    assert set(re.findall(r"^(\w+) = ", text, re.MULTILINE)) - {"test", "bench", "dev"} == set(PURPOSES)


def test_the_command_prints_versions_devices_folders_and_extras(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("STILLHOUSE_SERVER_KEY", "a secret")
    (tmp_path / "cache" / "stages").mkdir(parents=True)
    (tmp_path / "cache" / "stages" / "weights").write_bytes(bytes(3 * 2**20))
    monkeypatch.setattr(sys, "argv", ["stillhouse", "doctor", "--data-root", str(tmp_path / "nowhere")])
    try:
        cli.main()
    except SystemExit as stop:
        assert not stop.code
    shown = capsys.readouterr().out
    assert f"torch {torch.__version__.partition('+')[0]}" in shown and "cores" in shown and "runs take: " in shown
    assert "3.0 MiB (stages 3.0 MiB)" in shown and "PROBLEM: there is no such folder" in shown
    assert all(re.search(rf"^  {extra} +(installed|missing|unknown)  +for ", shown, re.MULTILINE) for extra in PURPOSES)
    assert "a secret" not in shown


def distribution(folder: Path, name: str, version: str, needs: tuple[str, ...] = ()) -> None:
    """An installed package, as pip leaves it."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {n}" for n in needs)]
    (info / "METADATA").write_text("\n".join(lines) + "\n")


def test_what_is_missing_or_too_old_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs = (
        "alpha>=2",
        "beta>=1; python_version >= '3'",
        "gamma; extra == 'onnx'",
        "beta; extra == 'text'",
        "delta; extra == 'dev'",
    )
    distribution(tmp_path, "house", "1.0", needs)
    distribution(tmp_path, "alpha", "1.5")
    distribution(tmp_path, "beta", "1.0")
    monkeypatch.syspath_prepend(tmp_path)
    known = requirements("house")
    assert [(r.name, r.installed, r.fits) for r in known[""]] == [("alpha", "1.5", False), ("beta", "1.0", True)]
    assert [(r.name, r.fits) for r in known["onnx"]] == [("gamma", False)] and [r.fits for r in known["text"]] == [True]
    assert requirements("no-such-package") == {}
    monkeypatch.setattr(installation, "requirements", lambda: known)
    shown = "\n".join(report())
    assert "PROBLEM: alpha 1.5 (needs >=2); pip install 'alpha>=2'" in shown
    assert re.search(r"onnx +missing +for export to ONNX: pip install 'stillhouse\[onnx\]' \(gamma is missing\)", shown)


def test_a_torch_that_cannot_be_imported_is_a_line_of_the_report(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so: cannot open shared object file')\n")
    code = "from stillhouse.reporting.installation import report; print('\\n'.join(report()))"
    path = [str(tmp_path), *filter(None, sys.path)]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:] = {path!r}; {code}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "PROBLEM: torch cannot be imported: OSError: libcudart.so" in done.stdout and "Extras" in done.stdout


def test_the_home_folder_is_not_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("STILLHOUSE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("STILLHOUSE_DATA", str(tmp_path / "data"))
    (tmp_path / "data").mkdir()
    assert list(folders()) == ["data root: ~/data", "cache: ~/.cache/stillhouse, not there yet"]


def test_gpus_are_listed_as_torch_sees_them() -> None:
    lines = list(devices())
    assert (
        [line for line in lines if line.startswith("cuda:")]
        if torch.cuda.is_available()
        else any("cuda: none" in line for line in lines)
    )
