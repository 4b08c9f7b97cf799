"""docker/: what the files promise, and every command of the images run natively under the same restrictions.

There is no engine here. What stands for one: the wheel beside nothing but its own requirements, an ordinary user
without any capability, a root file system that is mounted read-only, a fresh /tmp.
"""

import fnmatch
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import compose_spec
import psutil
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from graft import workers
from graft.db import Database
from graft.settings import Settings

from .api.bucket import KEY_ID, SECRET, S3Server, set_credentials
from .processes import DATA, KEY, ROOT, TERMINAL, cut, wait_for
from .services import RedisServer

DOCKER = ROOT / "docker"
USER = 10001
SECRETS = {"GRAFT_API_KEY": KEY, "POSTGRES_PASSWORD": "p4ss", "S3_ACCESS_KEY": "key", "S3_SECRET_KEY": "secret"}
OURS = ("migrate", "bucket", "api", "worker")


# -- Dockerfiles --------------------------------------------------------------------------------------------------


def instructions(name: str) -> list[tuple[str, str]]:
    """Of the last stage."""
    text = re.sub(r"\\\n", " ", (DOCKER / name).read_text())
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    found = [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in lines]
    starts = [index for index, (word, _) in enumerate(found) if word == "FROM"]
    return found[starts[-1] :]


@pytest.fixture(params=["api.Dockerfile", "worker.Dockerfile"])
def dockerfile(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.skipif(shutil.which("hadolint", path=str(Path(sys.executable).parent)) is None, reason="no hadolint wheel")
def test_a_linter_finds_nothing(dockerfile: str) -> None:
    linter = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([linter, DOCKER / dockerfile], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_an_image_runs_as_an_ordinary_user_and_says_how_it_is(dockerfile: str) -> None:
    last = dict(instructions(dockerfile))
    assert last["USER"] == f"{USER}:{USER}"
    part = dockerfile.partition(".")[0]
    assert last["HEALTHCHECK"].endswith(f'CMD ["graft", "health", "{part}"]')
    assert json.loads(last["ENTRYPOINT"]) == ["graft"]
    assert json.loads(last["CMD"]) == [{"api": "serve", "worker": "worker"}[part]]
    assert last["STOPSIGNAL"] == "SIGTERM"


def test_an_image_is_built_from_pinned_versions_and_known_settings(dockerfile: str) -> None:
    text = (DOCKER / dockerfile).read_text()
    assert "PIP_CONSTRAINT=/src/constraints.txt" in text
    assert re.findall(r"^FROM (\S+)", text, re.MULTILINE) == ["python:3.11-slim-bookworm"] * 2
    known = {f"GRAFT_{name.upper()}" for name in Settings.model_fields}
    assert set(re.findall(r"\b(GRAFT_\w+)=", text)) <= known
    # What is copied exists, and reaches the engine.
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for line in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE):
        for source in line.split():
            assert (ROOT / source).exists(), source
            assert any(fnmatch.fnmatch(source, pattern) for pattern in allowed), source


# -- compose.yaml -------------------------------------------------------------------------------------------------


def substituted(text: str, values: dict[str, str]) -> str:
    """Compose's own `${NAME}`, `${NAME:-default}` and `${NAME:?message}`."""

    def value(found: re.Match[str]) -> str:
        name, kind, rest = found.groups()
        if values.get(name):
            return values[name]
        assert kind == "-", f"{name}: {rest}"
        return str(rest)

    return re.sub(r"\$\{(\w+)(?::([-?])([^}]*))?\}", value, text)


@pytest.fixture
def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(substituted((DOCKER / "compose.yaml").read_text(), SECRETS))
    return found


def test_the_compose_file_follows_the_specification(compose: dict[str, Any]) -> None:
    compose_spec.PyCompose.from_yaml(yaml.safe_dump(compose)).validate()
    compose["services"]["api"]["read_onyl"] = True
    with pytest.raises(ValueError, match="read_onyl"):
        compose_spec.PyCompose.from_yaml(yaml.safe_dump(compose))


def test_every_container_is_locked_down(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert all("size=" in mount for mount in service["tmpfs"]), name
        assert "privileged" not in service
        # Compose makes the file inside the container, and so refuses one that is read-only.
        assert not service.keys() & {"configs", "secrets"}, name
        if "build" not in service:
            assert re.fullmatch(r"\S+:[\w.-]*\d[\w.-]*", service["image"]), name
            assert service["user"].partition(":")[0] not in ("0", "root"), name
        is_one_shot = service["restart"] == "on-failure"
        assert is_one_shot or "healthcheck" in service or name in ("api", "worker"), name
    (port,) = compose["services"]["api"]["ports"]
    assert port.startswith("127.0.0.1:")
    assert [name for name, service in compose["services"].items() if "ports" in service] == ["api"]
    assert compose["networks"]["inside"] == {"internal": True}
    for name in ("postgres", "redis", "s3"):
        assert compose["services"][name]["networks"] == ["inside"]
    (device,) = compose["services"]["worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]


def test_a_secret_comes_from_the_environment_alone() -> None:
    text = (DOCKER / "compose.yaml").read_text()
    asked = set(re.findall(r"\$\{(\w+):\?", text))
    assert asked == set(SECRETS)
    offered = re.findall(r"^(\w+)=(.*)$", (DOCKER / "example.env").read_text(), re.MULTILINE)
    assert {name for name, _ in offered} == asked
    assert {value for _, value in offered} == {""}
    with pytest.raises(AssertionError, match="S3_SECRET_KEY"):
        substituted(text, {**SECRETS, "S3_SECRET_KEY": ""})


def test_the_services_settings_are_known_and_fit_the_other_containers(
    compose: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    services = compose["services"]
    for name in OURS:
        for variable, value in services[name]["environment"].items():
            monkeypatch.setenv(variable, value)
        settings = Settings()
        assert (
            settings.database_url
            == f"postgresql://graft:p4ss@postgres:5432/{services['postgres']['environment']['POSTGRES_DB']}"
        )
        assert settings.broker_url == "redis://redis:6379/0"
        assert settings.storage_url is not None
        assert settings.storage_url.startswith("s3://graft/")
        assert services[name]["stop_grace_period" if name in ("api", "worker") else "image"]
    assert "yes" in services["redis"]["command"]
    assert services["s3"]["environment"] == {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
    assert services["s3"]["environment"].items() <= services["api"]["environment"].items()
    # Compose sends SIGKILL only after the worker had its time to save.
    grace = int(services["worker"]["stop_grace_period"].removesuffix("s"))
    assert grace > Settings().grace_seconds + 5
    for name in ("api", "worker"):
        assert services[name]["depends_on"]["migrate"] == {"condition": "service_completed_successfully"}


def test_the_bucket_is_made_once(compose: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    (program,) = compose["services"]["bucket"]["command"]
    with S3Server() as server:
        set_credentials(monkeypatch)
        endpoint = f"http://127.0.0.1:{server.port}"
        client = boto3.client(
            "s3", endpoint_url=endpoint, aws_access_key_id=KEY_ID, aws_secret_access_key=SECRET, region_name="us-east-1"
        )

        def names() -> list[str]:  # moto keeps its buckets for the whole process: those of other tests are there too
            return sorted(bucket["Name"] for bucket in client.list_buckets()["Buckets"])

        before = names()
        program = program.replace("http://s3:8333", endpoint)
        for _ in range(2):
            done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
            assert done.returncode == 0, done.stderr
        assert names() == sorted([*before, "graft"])


# -- the images' commands, natively -------------------------------------------------------------------------------


def closure(*extras: str) -> set[str]:
    """The names of all distributions that `graft-server` with these extras needs, as installed here."""
    seen, waiting = set(), [("graft-server", frozenset(extras))]
    while waiting:
        name, wanted = waiting.pop()
        if (name, wanted) in seen:
            continue
        seen.add((name, wanted))
        for line in importlib.metadata.distribution(name).requires or ():
            needed = Requirement(line)
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in ("", *wanted)):
                waiting.append((canonicalize_name(needed.name), frozenset(needed.extras)))
    return {name for name, _ in seen} - {"graft-server"}


@pytest.fixture(scope="module")
def light(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What `pip install '.[s3]'` makes in the API's image: the wheel and its requirements, and nothing else."""
    out = tmp_path_factory.mktemp("wheel")
    built = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(out)]
    subprocess.run(built, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = out.glob("graft_server-*.whl")
    with tempfile.TemporaryDirectory(prefix="graft-image-") as folder:
        site = Path(folder) / "site"
        zipfile.ZipFile(wheel).extractall(site)
        for name in closure("s3"):
            for file in importlib.metadata.distribution(name).files or ():
                source, target = Path(str(file.locate())), site / file
                if ".." in file.parts or not source.is_file():
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                try:
                    os.link(source, target)
                except OSError:
                    shutil.copy2(source, target)
        subprocess.run([sys.executable, "-m", "compileall", "-q", site], check=True)  # as pip does
        Path(folder).chmod(0o755)
        yield site


def may_build_a_container() -> bool:
    probe = ["unshare", "--mount", "--propagation", "private", "sh", "-c", "mount -t tmpfs tmpfs /mnt"]
    tools = all(shutil.which(tool) for tool in ("unshare", "setpriv", "mount"))
    return tools and os.geteuid() == 0 and subprocess.run(probe, capture_output=True).returncode == 0


needs_root = pytest.mark.skipif(
    not may_build_a_container(), reason="only root (with mount) can take everything away from a process"
)

# A mount namespace of its own with everything read-only but /tmp and /data, then a user without capabilities.
ENTER = """
set -e
mount -t tmpfs -o size=64m,mode=755 tmpfs /mnt
mkdir /mnt/python /mnt/data
mount --bind "$1" /mnt/python; mount --bind "$2" /mnt/data; shift 2
for each in $1; do
    mkdir /mnt/${each%%=*}; mount --bind "${each#*=}" /mnt/${each%%=*}; mount -o remount,bind,ro /mnt/${each%%=*}
done; shift
mount -t tmpfs -o size=64m,mode=1777,noexec,nosuid,nodev tmpfs /tmp
mount -o remount,bind,ro /mnt/python
mount -o remount,bind,ro /
mount -o remount,ro /mnt
cd /mnt/data
exec setpriv --reuid=10001 --regid=10001 --clear-groups --no-new-privs --inh-caps=-all --ambient-caps=-all \
    --bounding-set=-all "$@"
"""


class Container:
    """Runs commands as the images do."""

    def __init__(self, data: Path, folders: dict[str, Path], **environment: str) -> None:
        self._binds = " ".join(f"{name}={path}" for name, path in folders.items())
        self._data = data
        os.chown(data, USER, USER)
        self._environment = {
            "PATH": "/usr/bin:/bin",
            "PYTHONPATH": ":".join(f"/mnt/{name}" for name in folders),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONUNBUFFERED": "1",
            "LD_LIBRARY_PATH": "/mnt/python/lib",
            "HOME": "/mnt/data",
            "GRAFT_DATA_DIR": "/mnt/data",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            **environment,
        }

    def command(self, *arguments: str) -> list[str]:
        enter = ["unshare", "--mount", "--propagation", "private", "sh", "-c", ENTER, "sh"]
        python = f"/mnt/python/bin/python{sys.version_info.major}.{sys.version_info.minor}"
        return [*enter, sys.base_prefix, str(self._data), self._binds, python, *arguments]

    def run(self, *arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments), env=self._environment, capture_output=True, text=True, timeout=timeout
        )

    def start(self, log: Path, *arguments: str) -> subprocess.Popen[bytes]:
        with log.open("wb") as output:
            return subprocess.Popen(
                self.command(*arguments), env=self._environment, stdout=output, stderr=subprocess.STDOUT
            )


def test_the_light_half_needs_nothing_of_the_heavy_one(light: Path) -> None:
    # Isolated (-I -S): nothing of this environment can be found by chance.
    code = (
        f"import sys; sys.path.insert(0, {str(light)!r})\n"
        "import importlib.util, graft.app, graft.cli, graft.db, boto3\n"
        "print(graft.app.__file__, graft.db.head_revision(), importlib.util.find_spec('torch'))"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(light))
    assert done.stdout.endswith("None\n")


def test_health_tells_of_this_machines_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import socket

    from graft.cli import main

    database = Database(f"sqlite:///{tmp_path / 'graft.db'}")
    database.migrate()
    health = ["health", "worker", "--data-dir", str(tmp_path)]
    assert main(health) == 1
    with database.write() as session:
        workers.register(session, "elsewhere-7", device="cpu", device_bytes=None)
    assert main(health) == 1
    assert "no worker of" in capsys.readouterr().out
    with database.write() as session:
        workers.register(session, f"{socket.gethostname()}-7", device="cpu", device_bytes=None)
    assert main(health) == 0
    monkeypatch.setenv("GRAFT_HEARTBEAT_SECONDS", "0.1")
    time.sleep(0.5)
    assert main(health) == 1
    database.dispose()


@needs_root
def test_the_images_commands_run_without_any_privilege(
    light: Path, redis_url: str, redis_server: RedisServer, tmp_path: Path
) -> None:
    with tempfile.TemporaryDirectory(prefix="graft-data-") as folder:
        port = 20000 + os.getpid() % 10000
        settings = {
            "GRAFT_API_KEY": KEY,
            "GRAFT_PORT": str(port),
            "GRAFT_HOST": "0.0.0.0",
            "GRAFT_WORKERS": "0",
            "GRAFT_BROKER_URL": redis_url,
        }
        image = Container(Path(folder), {"site": light}, **settings)

        # It is as locked up as it says.
        probe = (
            "import os; from pathlib import Path\n"
            "status = dict(line.split(':', 1) for line in open('/proc/self/status'))\n"
            "capabilities = [int(status[name], 16) for name in ('CapEff', 'CapBnd')]\n"
            "print(os.getuid(), *capabilities, status['NoNewPrivs'].strip())\n"
            "for place in ('/', '/mnt', '/mnt/site', '/usr', '/tmp', '/mnt/data'):\n"
            "    try: Path(place, 'file').write_text('x'); print(place)\n"
            "    except OSError: pass\n"
        )
        done = image.run("-c", probe)
        assert done.stdout.split() == [str(USER), "0", "0", "1", "/tmp", "/mnt/data"], done.stderr

        refused = image.run("-m", "graft.cli", "worker")
        assert refused.returncode == 1
        assert "pip install 'graft-server[worker]'" in refused.stderr
        assert image.run("-m", "graft.cli", "health", "api").returncode == 1
        for _ in range(2):
            done = image.run("-m", "graft.cli", "migrate")
            assert (done.returncode, done.stdout) == (0, "The database is up to date.\n"), done.stderr

        packages = Path(importlib.metadata.distribution("torch").locate_file(""))
        heavy = Container(Path(folder), {"site": light, "packages": packages}, GRAFT_BROKER_URL=redis_url)
        api = image.start(tmp_path / "api.log", "-m", "graft.cli", "serve")
        worker = heavy.start(tmp_path / "worker.log", "-m", "graft.cli", "worker")
        try:
            wait_for("a healthy API", lambda: image.run("-m", "graft.cli", "health", "api").returncode == 0, 30)
            # Large enough to pass through /tmp.
            large = tmp_path / "large.jsonl"
            large.write_bytes((DATA / "train.jsonl").read_bytes() * 40)
            assert large.stat().st_size > 2 * 2**20
            uploaded = [upload(port, path) for path in (large, cut(tmp_path / "rows.jsonl", 12))]
            body = {
                "model": "graft-tiny",
                "training_file": uploaded[-1],
                "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1, "batch_size": 4}}},
                "max_seq_length": 128,
            }
            job = ask(port, "POST", "/v1/fine_tuning/jobs", json.dumps(body).encode(), "application/json")
            path = f"/v1/fine_tuning/jobs/{job['id']}"
            logs = lambda: "".join(each.read_text() for each in tmp_path.glob("*.log"))  # noqa: E731
            wait_for("the end of the job", lambda: ask(port, "GET", path)["status"] in TERMINAL, 60)
            assert ask(port, "GET", path)["status"] == "succeeded", logs()
        finally:
            for process in (worker, api):
                process.terminate()
            codes = [process.wait(40) for process in (worker, api)]
        assert codes == [0, 0], logs()
        assert "Traceback" not in logs()
        assert not [each for each in psutil.process_iter(["uids"]) if each.info["uids"].real == USER]


def upload(port: int, path: Path) -> str:
    body = (
        b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="rows.jsonl"\r\n\r\n'
        + path.read_bytes()
        + b"\r\n--b--\r\n"
    )
    file_id: str = ask(port, "POST", "/v1/files", body, "multipart/form-data; boundary=b")["id"]
    return file_id


def ask(port: int, method: str, path: str, body: bytes | None = None, kind: str = "") -> Any:
    headers = {"Authorization": f"Bearer {KEY}", **({"Content-Type": kind} if kind else {})}
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data=body, method=method, headers=headers)
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.loads(answer.read())
