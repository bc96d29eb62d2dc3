"""A PostgreSQL server of a test's own, from the system's packages: in a folder that is thrown away, on a free port."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def programs() -> Path:
    """Return the folder of PostgreSQL's server programs, the newest of several; skip where there are none."""
    places = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    found = shutil.which("initdb")
    places += [Path(found).resolve().parent] if found else []
    usable = [place for place in places if (place / "initdb").exists() and (place / "pg_ctl").exists()]
    if not usable:
        pytest.skip("no PostgreSQL server is installed: apt-get install postgresql")
    return usable[-1]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


class Server:
    """A server that can be stopped and started; it trusts whoever is on this machine."""

    def __init__(self, place: Path, folder: Path, user: str | None) -> None:
        self._place, self._data, self._user = place, folder / "data", user
        self.port = free_port()
        #: without a driver, as people write it
        self.url = f"postgresql://tester@127.0.0.1:{self.port}/postgres"
        self._run("initdb", "-D", str(self._data), "-U", "tester", "-A", "trust", "--no-sync", "-E", "UTF8")

    def start(self) -> None:
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={self._data} -c fsync=off"
        self._run("pg_ctl", "-D", str(self._data), "-w", "-l", str(self._data / "log"), "-o", options, "start")

    def stop(self, how: str = "fast") -> None:
        self._run("pg_ctl", "-D", str(self._data), "-w", "-m", how, "stop")

    def _run(self, name: str, *arguments: str) -> None:
        # the server refuses to be run by root
        as_whom = {"user": self._user, "extra_groups": [], "cwd": self._data.parent} if self._user else {}
        done = subprocess.run(
            [str(self._place / name), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if name == "initdb" else subprocess.DEVNULL,  # the server would keep a pipe open
            stderr=subprocess.STDOUT,
            check=False,
            **as_whom,  # type: ignore[call-overload]
        )
        assert done.returncode == 0, (done.stdout or b"").decode()[-2000:]


@contextmanager
def server() -> Iterator[Server]:
    """Run a server while the context lasts."""
    place, user = programs(), None
    folder = Path(tempfile.mkdtemp(prefix="autoprec-postgres-"))
    if os.geteuid() == 0:
        try:
            user = pwd.getpwnam("postgres").pw_name
        except KeyError:
            pytest.skip("PostgreSQL is not run by root, and there is no user postgres: apt-get install postgresql")
        os.chown(folder, pwd.getpwnam(user).pw_uid, -1)
    try:
        running = Server(place, folder, user)
        running.start()
        try:
            yield running
        finally:
            running.stop("immediate")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
