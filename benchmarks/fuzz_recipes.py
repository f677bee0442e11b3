"""Thousands of mutated recipes: each is answered by a config, a plan or a sentence. Prints what was not, and writes
benchmarks/results/fuzz_recipes.json.

    python benchmarks/fuzz_recipes.py --count 5000 [--first 0] [--plan]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from recipe_fuzz import tried  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--first", type=int, default=0, help="number of the first mutation")
    parser.add_argument("--plan", action="store_true", help="plan what loads, as --dry-run does (needs the data)")
    parser.add_argument("--show", type=int, default=10, help="how many different faults to print")
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (24 << 30, 24 << 30))
    sources = sorted((ROOT / "recipes").rglob("*.yaml"))
    os.chdir(ROOT)
    counts: Counter[str] = Counter()
    faults: Counter[str] = Counter()
    slowest, start = 0.0, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.first, options.first + options.count):
            began = time.monotonic()
            answer = tried(sources[number % len(sources)], number, Path(folder), options.plan)
            slowest = max(slowest, time.monotonic() - began)
            counts["fault" if answer.fault else "sentence" if answer.said else "taken"] += 1
            if answer.fault:
                last = answer.fault.strip().splitlines()
                where = next((line.strip() for line in reversed(last) if "stillhouse" in line and "File" in line), "")
                key = f"{last[-1][:160]} | {where[-90:]}"
                faults[key] += 1
                if faults[key] == 1 and len(faults) <= options.show:
                    print(f"--- {number} {sources[number % len(sources)].name} {answer.variant}\n{answer.fault}")
    for key, count in faults.most_common():
        print(count, key)
    result = {"count": options.count, "planned": options.plan, **counts, "slowest_seconds": round(slowest, 2),
              "seconds": round(time.monotonic() - start, 1)}  # fmt: skip
    print(json.dumps(result))
    if options.count >= 5000:
        (ROOT / "benchmarks" / "results" / "fuzz_recipes.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
