"""A server that speaks S3, on this machine, and a gate before it that can refuse, break off and answer for it."""

from __future__ import annotations

import contextlib
import itertools
import logging
import socket
import threading
from typing import Any, Self

import boto3
import pytest
from botocore.config import Config
from moto.server import ThreadedMotoServer

KEY_ID, SECRET = "AKIAGRAFTTESTS", "a-secret-that-no-log-may-show"
_numbers = itertools.count(1)


def set_credentials(patch: pytest.MonkeyPatch) -> dict[str, str]:
    """What boto3 finds, in this process and in those it starts: these credentials and no others."""
    environment = {
        "AWS_ACCESS_KEY_ID": KEY_ID,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": "/dev/null",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
    }
    for name, value in environment.items():
        patch.setenv(name, value)
    return environment


class Gate(threading.Thread):
    """A port that leads to another one. All connections of one test go through it."""

    def __init__(self, port: int) -> None:
        super().__init__(name="gate", daemon=True)
        self._beyond = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.requests: list[bytes] = []  # everything that was sent, by connection
        self.canned: list[bytes] = []  # answers to give instead of the server's, one a connection
        self.cuts: list[int] = []  # after how many bytes to break off an answer, one a connection
        self.start()

    def run(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def shut(self) -> None:
        """From now on connections are refused."""
        # A thread in `accept` keeps the port until it is woken.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.join()

    def reopen(self) -> Gate:
        again = Gate.__new__(Gate)
        threading.Thread.__init__(again, name="gate", daemon=True)
        again._beyond, again.port = self._beyond, self.port
        again._listener = socket.create_server(("127.0.0.1", self.port))
        again.requests, again.canned, again.cuts = [], [], []
        again.start()
        return again

    def _serve(self, client: socket.socket) -> None:
        with client:
            number = len(self.requests)
            self.requests.append(b"")
            if self.canned:
                self.requests[number] += client.recv(65536)
                client.sendall(self.canned.pop(0))
                return
            cut = self.cuts.pop(0) if self.cuts else None
            with socket.create_connection(("127.0.0.1", self._beyond)) as server, contextlib.suppress(OSError):
                back = threading.Thread(target=self._answer, args=(server, client, cut), daemon=True)
                back.start()
                while data := client.recv(65536):
                    self.requests[number] += data
                    server.sendall(data)
                server.shutdown(socket.SHUT_WR)
                back.join()

    @staticmethod
    def _answer(server: socket.socket, client: socket.socket, cut: int | None) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(65536):
                if cut is not None:
                    data, cut = data[:cut], cut - len(data)
                client.sendall(data)
                if cut is not None and cut <= 0:
                    break
            client.shutdown(socket.SHUT_RDWR)


class S3Server:
    """Moto's server. What is in it is lost with the process."""

    def __enter__(self) -> Self:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._server.start()
        self.port: int = self._server.get_host_and_port()[1]
        self.client: Any = boto3.client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{self.port}",
            region_name="us-east-1",
            aws_access_key_id=KEY_ID,
            aws_secret_access_key=SECRET,
            config=Config(s3={"addressing_style": "path"}),
        )
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.stop()

    def bucket(self) -> Bucket:
        return Bucket(self, f"graft-{next(_numbers)}")


class Bucket:
    """An empty bucket, and what lies in it as its owner sees it."""

    def __init__(self, server: S3Server, name: str) -> None:
        self.server, self.name = server, name
        server.client.create_bucket(Bucket=name)

    def url(self, port: int | None = None) -> str:
        """For GRAFT_STORAGE_URL; `port`: that of a gate."""
        return f"s3://{self.name}/content?endpoint=http://127.0.0.1:{port or self.server.port}"

    def keys(self) -> list[str]:
        return [each["Key"] for each in self.server.client.list_objects_v2(Bucket=self.name).get("Contents", ())]

    def uploads(self) -> list[str]:
        """The uploads in parts that have not ended."""
        return [each["Key"] for each in self.server.client.list_multipart_uploads(Bucket=self.name).get("Uploads", ())]

    def get(self, key: str) -> bytes:
        data: bytes = self.server.client.get_object(Bucket=self.name, Key=key)["Body"].read()
        return data

    def put(self, key: str, data: bytes) -> None:
        self.server.client.put_object(Bucket=self.name, Key=key, Body=data)

    def delete(self, key: str) -> None:
        self.server.client.delete_object(Bucket=self.name, Key=key)
