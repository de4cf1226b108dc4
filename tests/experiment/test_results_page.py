"""docs/results.md and README's table are up to date with the committed results."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_pages_are_made_of_the_results() -> None:
    made = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "results_page.py"), "--check"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert made.returncode == 0, made.stdout + made.stderr
