"""`stillhouse demo`: a teacher and four ways to train the same small student on scikit-learn's handwritten digits,
three seeds each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

RECIPE = Path(__file__).parent / "digits.yaml"


def demo(out: Path, seeds: Sequence[int], overwrite: bool = False) -> None:
    """Run the demonstration in `out`, print the table and write the report. Finished runs are reused."""
    import torch
    from rich.console import Console

    from stillhouse.errors import UserError
    from stillhouse.reporting.comparison import comparison_table, write_comparison_report
    from stillhouse.runs.bench import bench, entries
    from stillhouse.training.display import Bars

    if overwrite and out.exists():
        if not out.is_dir() or any(
            not (p / "recipe.yaml").exists() and p.name not in ("results.json", "report.html") for p in out.iterdir()
        ):
            raise UserError(f"{out} is not a demo's folder, so --overwrite leaves it alone; give another with --out.")
        shutil.rmtree(out)
    console = Console(stderr=True)
    console.print(
        "1,797 scans of handwritten digits, 8 x 8 pixels. A teacher is trained once, then the same small student "
        "alone and with three objectives.\n"
    )
    torch.set_num_threads(1)  # networks this small only lose by sharing a step between threads
    live = Bars()
    try:
        results = bench(
            entries([RECIPE], ["alone", "kd", "nkd", "pld"]),
            seeds,
            out,
            baseline="alone",
            slug="demo",
            live=live,
            cpu=True,
        )
    finally:
        live.close()
    results["title"] = "Handwritten digits"
    results["command"] = "stillhouse demo"
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    report = write_comparison_report(results, out / "report.html")
    Console().print(comparison_table(results))
    print(f"Report: {report or out / 'report.html'}")
    print(f"Use the student: stillhouse.load({str(out / f'kd-s{seeds[0]}')!r})")
