"""`python -m stillhouse.methods.compression.entropic_student SPLIT IMAGE …`: each image through the device's half, a
string of bytes, and the server's half."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from stillhouse.errors import UserError
from stillhouse.methods.compression.entropic_student.deployment import RoundTrip
from stillhouse.runs.prediction import decoded, shown


def main(arguments: Sequence[str]) -> int:
    """Print a line for each image; returns the exit code: 0, or 2 for a user's mistake."""
    if len(arguments) < 2:
        print(f"usage: python -m {__package__} SPLIT IMAGE …", file=sys.stderr)
        return 2
    try:
        trip = RoundTrip(arguments[0])
        for name in arguments[1:]:
            found = trip.task.predict(trip, [decoded(Path(name))])[0]
            print(f"{shown(Path(name).name, found)} ({sum(trip.sent)} bytes)")
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
