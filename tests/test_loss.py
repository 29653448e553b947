"""Packets that the network loses, in a network of its own, where the machine allows to make one."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.acceptance.support import ROOT, new_client
from tests.conftest import LOOP
from tests.test_chaos import chatty_server, everything
from tests.transport.pair import run

NETWORK = """
set -e
ip link set lo mtu 1500 up
nft add table inet loss
nft 'add chain inet loss in { type filter hook input priority 0; }'
nft 'add rule inet loss in numgen inc mod 20 == 7 counter drop'
"$@"
nft list table inet loss
"""
"""A network with nothing but loopback, which loses each twentieth packet, around one program."""

UNSHARE = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--net", "--map-root-user"]


def impossible() -> str:
    """Return why there can be no such network here, or nothing."""
    for tool in ("unshare", "ip", "nft"):
        if shutil.which(tool) is None:
            return f"it needs {tool} (apt install util-linux iproute2 nftables)"
    command = [*UNSHARE, "sh", "-c", NETWORK, "sh", "true"]
    tried = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"no network of its own: {tried.stderr.strip()}" if tried.returncode else ""


def test_everything_arrives_although_packets_are_lost() -> None:
    if reason := impossible():
        pytest.skip(reason)
    command = [*UNSHARE, "sh", "-c", NETWORK, "sh", sys.executable, "-m", "tests.test_loss"]
    environment = os.environ | {"CONDUIT_TEST_LOOP": LOOP, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    (lost,) = re.findall(r"counter packets (\d+)", ran.stdout)
    assert int(lost) > 0, "the network has lost nothing"


async def conversations() -> None:
    """Talk to a server five times, over links of their own."""
    for _ in range(5):
        server, told = chatty_server()
        async with server, new_client(server) as client:
            await everything(client, told)
            assert not told.gone


if __name__ == "__main__":
    run(conversations)
