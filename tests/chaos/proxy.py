"""A TCP proxy that behaves like a bad network: it delays, swallows, breaks off and refuses, when it is told to."""

import contextlib
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self


@dataclass(frozen=True)
class Weather:
    """How the network behaves at the moment.

    Attributes:
        delay: seconds that every packet is late.
        stalled: packets are taken and not delivered, as by a firewall that drops them; they arrive when this is over.
        refused: no new connection comes about.
    """

    delay: float = 0.0
    stalled: bool = False
    refused: bool = False


FAIR = Weather()


class Proxy:
    """`port` on the loopback leads to a TCP port or to a unix socket. `weather` may be changed at any time."""

    def __init__(self, beyond: int | Path) -> None:
        self._beyond = beyond
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.weather = FAIR
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, name="proxy", daemon=True).start()

    def cut(self) -> None:
        """Reset every connection there is."""
        with self._lock:
            for each in self._open:
                with contextlib.suppress(OSError):
                    # With no time to linger, closing sends RST in place of FIN.
                    each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                    each.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.weather = FAIR
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self.weather.refused:
                client.close()
                continue
            threading.Thread(target=self._serve, args=(client,), name="proxy-connection", daemon=True).start()

    def _connect(self) -> socket.socket:
        if isinstance(self._beyond, int):
            return socket.create_connection(("127.0.0.1", self._beyond), timeout=5)
        server = socket.socket(socket.AF_UNIX)
        try:
            server.settimeout(5)
            server.connect(str(self._beyond))
        except BaseException:
            server.close()
            raise
        return server

    def _serve(self, client: socket.socket) -> None:
        with client:
            try:
                server = self._connect()
            except OSError:
                return
            with server:
                server.settimeout(None)
                with self._lock:
                    self._open |= {client, server}
                back = threading.Thread(target=self._pump, args=(server, client), daemon=True)
                back.start()
                self._pump(client, server)
                back.join()
                with self._lock:
                    self._open -= {client, server}

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if delay := self.weather.delay:
                    time.sleep(delay)
                while self.weather.stalled:
                    time.sleep(0.02)
                target.sendall(data)
        for each in (source, target):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
