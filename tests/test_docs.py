"""What docs/ says is still so: the tests it names exist, its manifests parse, its settings and queries are known."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from sqlalchemy import text

from graft.db import Database
from graft.settings import Settings

from .chaos.faults import FAULTS
from .processes import ROOT

DOCS = ROOT / "docs"


def names_in(path: Path) -> set[str]:
    return {
        node.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_every_fault_has_its_row_and_every_test_it_names_exists() -> None:
    table = (DOCS / "faults.md").read_text()
    rows = re.findall(r"^\| (F\d+) \|(.+)$", table, re.MULTILINE)
    assert [name for name, _ in rows] == [f"F{number}" for number in range(1, 43)]
    for name, row in rows:
        assert "`tests/" in row or "not injected:" in row, name
    missing = []
    for path, test in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", table):
        if not (ROOT / path).is_file() or test not in names_in(ROOT / path):
            missing.append(f"{path}::{test}")
    assert missing == []
    known = {fault.name for fault in FAULTS}
    for cell in re.findall(r"chaos: ([^|(]+)", table):
        assert cell.strip() in known | {"one job in ten"}, cell


def manifests() -> list[dict[str, Any]]:
    blocks = re.findall(r"```yaml\n(.*?)```", (DOCS / "kubernetes.md").read_text(), re.DOTALL)
    return [each for block in blocks for each in yaml.safe_load_all(block)]


def test_the_manifests_lock_their_containers_down_and_give_time_to_save() -> None:
    kinds = [(each["kind"], each["metadata"]["name"]) for each in manifests()]
    assert ("Deployment", "graft-api") in kinds
    assert ("ScaledObject", "graft-worker") in kinds
    for each in manifests():
        assert {"apiVersion", "kind", "metadata", "spec"} <= each.keys()
        if each["kind"] not in ("Job", "Deployment"):
            continue
        pod = each["spec"]["template"]["spec"]
        assert pod["enableServiceLinks"] is False  # a Service's variables would be taken for settings
        if each["kind"] == "Job":
            continue
        assert each["spec"]["selector"]["matchLabels"] == each["spec"]["template"]["metadata"]["labels"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        (container,) = pod["containers"]
        assert container["securityContext"] == {
            "readOnlyRootFilesystem": True,
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        if container["name"] == "worker":
            assert pod["terminationGracePeriodSeconds"] > Settings().grace_seconds + 5


def test_the_query_that_scales_workers_counts_the_jobs_that_need_one(database_url: str) -> None:
    (scaled,) = [each for each in manifests() if each["kind"] == "ScaledObject"]
    database = Database(database_url)
    database.migrate()
    with database.read() as session:
        assert session.scalar(text(scaled["spec"]["triggers"][0]["metadata"]["query"])) == 0
    database.dispose()


@pytest.mark.parametrize("name", ["operations.md", "kubernetes.md", "faults.md"])
def test_every_setting_that_is_named_is_known(name: str) -> None:
    known = {f"GRAFT_{field.upper()}" for field in Settings.model_fields}
    assert set(re.findall(r"\bGRAFT_[A-Z_]+[A-Z]\b", (DOCS / name).read_text())) <= known


def test_every_link_leads_somewhere() -> None:
    for page in DOCS.glob("*.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (DOCS / target).exists(), f"{page.name}: {target}"
