"""The hosts of the lab behave like those of volunteers: who lets whom in, what ports become, what lines do."""

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests.net.lab import KINDS, Kind, Lab, Line, lab, why_not

pytestmark = [pytest.mark.net, pytest.mark.skipif(why_not() is not None, reason=why_not() or "")]

PORT, FROM_PORT = 5000, 6000
SERVER = """
import socket, sys
server = socket.create_server(("0.0.0.0", int(sys.argv[1])))
print("listening", flush=True)
while True:
    connection, peer = server.accept()
    connection.sendall(f"{peer[0]} {peer[1]}".encode())
    connection.close()
"""
CLIENT = """
import json, socket, sys, time
own_port, host, port, wait_s = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
began = time.monotonic()
try:
    connection = socket.create_connection((host, port), wait_s, ("0.0.0.0", own_port))
    print(json.dumps({"seen": connection.recv(100).decode(), "seconds": time.monotonic() - began}))
except TimeoutError:
    print(json.dumps({"seen": None}))
"""
PUNCHER = """
import json, socket, sys, time
own_port, host, port = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
for _ in range(20):
    with socket.socket() as attempt:
        attempt.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        attempt.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        attempt.bind(("0.0.0.0", own_port))
        attempt.settimeout(0.1)
        try:
            attempt.connect((host, port))
            attempt.sendall(b"hello")
            print(json.dumps({"heard": attempt.recv(5).decode()}))
            break
        except OSError:
            continue
else:
    print(json.dumps({"heard": None}))
"""
HOSTS: dict[str, Kind] = {**{kind: kind for kind in KINDS}, "hub": "public", "far": "cone"}


@pytest.fixture(scope="module")
def net() -> Iterator[Lab]:
    with lab(HOSTS, lines={"far": Line(up_mbit=20, delay_s=0.05)}) as made:
        servers = [start(made, name, SERVER, PORT) for name in HOSTS]
        try:
            for server in servers:
                assert server.stdout is not None
                assert server.stdout.readline() == "listening\n"
            yield made
        finally:
            for server in servers:
                server.kill()
                server.communicate()


def start(net: Lab, name: str, script: str, *arguments: object) -> "subprocess.Popen[str]":
    command = net.command(name, sys.executable, "-c", script, *map(str, arguments))
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def said(process: "subprocess.Popen[str]") -> dict[str, Any]:
    text, _ = process.communicate(timeout=30)
    answer: dict[str, Any] = json.loads(text)
    return answer


def test_everyone_gets_out_under_an_address_of_its_own_and_all_but_the_symmetric_keep_their_port(net: Lab) -> None:
    for kind in KINDS:
        seen = said(start(net, kind, CLIENT, FROM_PORT, net.address("hub"), PORT, 5))["seen"]
        address, port = seen.split()
        assert address == net.address(kind)
        assert (port == str(FROM_PORT)) == (kind != "symmetric"), kind
        assert (net.inside(kind) == address) == (kind in ("public", "firewall"))


def test_only_the_public_let_strangers_in(net: Lab) -> None:
    tries = {kind: start(net, "hub", CLIENT, 0, net.address(kind), PORT, 1) for kind in KINDS}
    assert [kind for kind, process in tries.items() if said(process)["seen"]] == ["public"]


@pytest.mark.parametrize(
    ("one", "other", "met"),
    [
        ("cone", "carrier", True),
        ("cone", "firewall", True),
        ("carrier", "firewall", True),
        ("cone", "symmetric", False),
    ],
)
def test_two_that_keep_their_ports_meet_when_both_dial(net: Lab, one: str, other: str, met: bool) -> None:
    port = 7000
    pair = [start(net, a, PUNCHER, port, net.address(b), port) for a, b in ((one, other), (other, one))]
    assert [said(process)["heard"] for process in pair] == ["hello" if met else None] * 2


def test_a_long_line_takes_its_time_both_ways(net: Lab) -> None:
    answer = said(start(net, "far", CLIENT, 0, net.address("hub"), PORT, 5))
    assert 0.15 <= answer["seconds"] < 0.4, "a round trip to connect, and what was sent meanwhile"


def test_a_host_that_is_cut_off_is_gone_until_it_is_back(net: Lab) -> None:
    net.cut("public")
    assert said(start(net, "hub", CLIENT, 0, net.address("public"), PORT, 0.5))["seen"] is None
    net.mend("public")
    assert said(start(net, "hub", CLIENT, 0, net.address("public"), PORT, 5))["seen"]


def test_a_lossy_line_loses_what_it_is_told_to() -> None:
    sender = """
import socket
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as line:
    for number in range(1000):
        line.sendto(b"x", ("11.0.1.1", 9))
"""
    with lab({"hub": "public", "far": "public"}, lines={"far": Line(loss_rate=0.2)}) as net:
        start(net, "far", sender).communicate(timeout=30)
        sent, arrived = net.sent_bytes("far"), net.received_bytes("hub")
    assert 0.7 * sent < arrived < 0.9 * sent
