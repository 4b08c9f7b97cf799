"""Two processes, one job, two changes at the same moment: of two rivals at most one wins (20 rounds of each pair)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

RACES = Path(__file__).parents[2] / "benchmarks" / "races.py"


@pytest.mark.timeout(1800)
def test_of_two_rival_changes_at_most_one_wins(database_url: str) -> None:
    command = [sys.executable, str(RACES), "--rounds", "20", "--database-url", database_url]
    result = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "64 pairs x 20 rounds, 0 wrong" in result.stdout
