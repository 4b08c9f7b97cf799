"""The layout that the imports depend on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_no_regular_package_named_kernels_is_found_from_the_root() -> None:
    """Libraries look for a package of that name when they are imported, with the root first on the path."""
    code = (
        "import sys; from importlib.util import find_spec; sys.path[0] = sys.argv[1]\n"
        "spec = find_spec('kernels')\n"
        "print(spec.origin if spec else None)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True, timeout=60, check=True, cwd=ROOT
    )
    assert result.stdout == "None\n"  # no package, or a plain folder, which gives way to a real one


def test_the_homes_are_plain_folders() -> None:
    for home in ("api", "worker", "kernels", "migrations", "docker"):
        assert not (ROOT / home / "__init__.py").exists()
    assert (ROOT / "api/graft/__init__.py").is_file()
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def test_importing_from_the_root_finds_the_packages() -> None:
    code = "import graft, graft_worker, graft_kernels; print(graft.__file__)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True, cwd=ROOT
    )
    assert Path(result.stdout.strip()) == ROOT / "api/graft/__init__.py"
