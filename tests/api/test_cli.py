"""The operator's commands, as the operator runs them."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import pytest

from graft import cli
from graft.db import Database

from . import given

GRAFT = [sys.executable, "-m", "graft.cli"]


def graft(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*GRAFT, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def complaint(result: subprocess.CompletedProcess[str]) -> str:
    """The one line of an error that the operator can mend."""
    assert result.returncode == 1, result.stdout + result.stderr
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("graft: ")
    return lines[0]


def test_a_port_that_is_taken_is_said_in_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = graft("serve", "--port", port, "--workers", "0", "--data-dir", str(tmp_path))
    line = complaint(result)
    assert f"Cannot listen on 127.0.0.1 port {port}" in line
    assert "--port" in line
    assert list(tmp_path.iterdir()) == []  # nothing was begun


def test_the_body_of_an_answer_does_not_wait_until_its_head_is_acknowledged() -> None:
    seen: list[int] = []

    async def meet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()

    async def serve() -> None:
        listener = cli._listen("127.0.0.1", 0)
        async with await asyncio.start_server(meet, sock=listener):
            reader, writer = await asyncio.open_connection(*listener.getsockname())
            await reader.read()
            writer.close()

    asyncio.run(serve())
    assert seen == [1]


def test_keys_are_made_listed_and_revoked(tmp_path: Path) -> None:
    here = {"GRAFT_DATA_DIR": str(tmp_path)}
    assert "Run `graft migrate`" in complaint(graft("keys", "list", **here))
    first = graft("migrate", **here)
    assert first.returncode == 0
    assert len(re.findall(r"sk-graft-[A-Za-z0-9]{40}", first.stdout)) == 1

    made = graft("keys", "create", "laptop", **here)
    found = re.match(r"(\S+)  (sk-graft-[A-Za-z0-9]{40})\n", made.stdout)
    assert found is not None, made.stdout + made.stderr
    key_id, key = found.groups()
    listed = graft("keys", "list", **here).stdout
    assert key not in listed
    line = next(line for line in listed.splitlines() if line.startswith(key_id))
    assert key[:16] in line
    assert "live" in line
    assert line.endswith("laptop")

    assert graft("keys", "revoke", key_id, **here).returncode == 0
    line = next(line for line in graft("keys", "list", **here).stdout.splitlines() if line.startswith(key_id))
    assert "revoked" in line
    assert "no live key" in complaint(graft("keys", "revoke", key_id, **here))


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"GRAFT_DATABASE": "x"}, "Did you mean GRAFT_DATABASE_URL?"),
        ({"GRAFT_MIN_EXAMPLES": "x"}, "GRAFT_MIN_EXAMPLES"),
        ({"GRAFT_LOG_LEVEL": "LOUD"}, "GRAFT_LOG_LEVEL: 'LOUD' is not a level"),
        ({"GRAFT_MODELS": "/nothing.toml"}, "/nothing.toml cannot be read"),
        ({"GRAFT_DATABASE_URL": "mysql://x/y"}, "'mysql' is not supported"),
        ({"GRAFT_DATABASE_URL": "sqlite+aiosqlite:///x.db"}, "'sqlite+aiosqlite' is not supported"),
        ({"GRAFT_DATABASE_URL": "sqlite:////no/such/folder/x.db"}, "cannot be opened"),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, dict) else "",
)
def test_a_setting_that_cannot_be_used_is_said_in_one_line(
    tmp_path: Path, environment: dict[str, str], words: str
) -> None:
    result = graft("serve", "--port", "0", "--workers", "0", "--data-dir", str(tmp_path), **environment)
    assert words in complaint(result)


def test_a_service_starts_makes_a_key_answers_and_stops(tmp_path: Path) -> None:
    environment = {**os.environ, "GRAFT_MODELS": str(given.write_catalogue(tmp_path))}
    command = [*GRAFT, "serve", "--port", "0", "--workers", "0", "--data-dir", str(tmp_path / "data")]
    log = tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 30
        while (
            not (found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text())) or "sk-graft" not in log.read_text()
        ):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        key = re.search(r"sk-graft-[A-Za-z0-9]{40}", log.read_text())
        assert key is not None
        with httpx2.Client(base_url=found.group(), timeout=10) as http:
            assert http.get("/healthz").json() == {"status": "ok"}
            assert http.get("/v1/models").status_code == 401
            listed = http.get("/v1/models", headers={"Authorization": f"Bearer {key.group()}"}).json()
            assert "tiny" in [model["id"] for model in listed["data"]]
            answer = http.post("/v1/nothing", content=b"x")
            assert answer.json()["error"]["code"] == "unknown_url"
            assert "uvicorn" not in answer.headers.get("server", "")
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 0, log.read_text()
        assert "Traceback" not in log.read_text()
    finally:
        process.kill()
        process.wait()


def test_projects_are_listed_and_given_their_shares(tmp_path: Path) -> None:
    here = {"GRAFT_DATA_DIR": str(tmp_path)}
    assert graft("migrate", **here).returncode == 0
    listed = graft("projects", "list", **here).stdout
    assert listed.startswith("proj_default  weight 1  0 running (no limit)  0 queued  0.0 GPU-hours")
    assert listed.endswith("default\n")
    set_to = ("projects", "limits", "proj_default", "--weight", "2.5", "--max-running-jobs", "4")
    assert graft(*set_to, **here).returncode == 0
    assert "weight 2.5  0 running (at most 4)" in graft("projects", "list", **here).stdout
    assert "weight must be above 0" in complaint(graft(*set_to[:3], "--weight", "0", **here))
    assert "There is no project 'proj_x'" in complaint(graft("projects", "limits", "proj_x", "--weight", "1", **here))
    assert "Say which project and what to set" in complaint(graft("projects", "limits", "proj_default", **here))


def test_workers_are_listed(tmp_path: Path) -> None:
    here = {"GRAFT_DATA_DIR": str(tmp_path)}
    assert graft("migrate", **here).returncode == 0
    assert graft("workers", **here).stdout == ""
    database = Database(f"sqlite:///{tmp_path / 'graft.db'}")
    given.worker(database, "gone", 24 * 2**30)
    given.time_passes(database, 100)
    given.worker(database, "host-7", base_model="tiny")
    database.dispose()
    gone, here_now = graft("workers", **here).stdout.splitlines()
    assert gone.startswith("gone  NVIDIA H100, 24.0 GiB  gone  -  ")
    assert here_now.startswith("host-7  NVIDIA H100, any memory  idle  tiny  ")


def test_the_light_half_loads_nothing_heavy() -> None:
    """An API on a small machine needs neither the libraries of the worker nor the time to load them."""
    heavy = ("torch", "transformers", "triton", "bitsandbytes", "peft", "numpy", "graft_worker", "graft_kernels")
    code = f"import sys, graft, graft.app, graft.cli; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True, cwd="/"
    )
    assert result.stdout == "[]\n"


def test_the_version_is_told() -> None:
    assert graft("--version").stdout.startswith("graft 0.")


def test_bench_runs_the_benchmark_of_the_checkout_with_its_options() -> None:
    told = graft("bench", "train", "--help")
    assert told.returncode == 0
    assert "--contenders" in told.stdout
    refused = graft("bench", "train", "--parts", "nothing")
    assert refused.returncode == 2
    assert "known are shapes" in refused.stderr
