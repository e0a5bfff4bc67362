"""A state of 67 MB between real hosts in network namespaces, whose lines send 20 Mbit/s each."""

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

from tests.net.internet import Internet, internet, why_not
from tests.net.state_peer import Peer

pytestmark = [pytest.mark.net, pytest.mark.timeout(400)]  # starting a dozen hosts takes long where others work too

ROOT = Path(__file__).parent.parent.parent
NUM_DONORS = 4
UP_MBIT = 20
ROWS = 2048
STATE_BYTES = ROWS * 4096 * 8
LIAR, JOINER = NUM_DONORS + 1, NUM_DONORS + 2
"""Numbers of hosts; the honest donors are 1 to NUM_DONORS."""


class Lab:
    """The hosts, and what they say."""

    def __init__(self, net: Internet, folder: Path) -> None:
        self.addresses: dict[int, str] = {}
        """Of the donors."""
        self._net = net
        self._folder = folder
        self._donors: dict[int, subprocess.Popen[str]] = {}
        self._joiners = 0

    @property
    def digest(self) -> str:
        """Of the model that the donors have."""
        return blake3((self._folder / "manifest").read_bytes()).hexdigest()

    def start_donors(self) -> None:
        """Have all donors give, on lines of UP_MBIT."""
        for number in range(1, LIAR + 1):
            self._net.shape(number, UP_MBIT)
            self._donors[number] = self._start("give", self._peer(number, flips_a_byte=number == LIAR))
        for number, process in self._donors.items():
            self.addresses[number] = heard(process)["address"]

    def new_joiner(self) -> Path:
        """The folder of one who has nothing yet."""
        self._joiners += 1
        return self._folder / f"joiner-{self._joiners}"

    def take(self, folder: Path, *donors: int) -> "subprocess.Popen[str]":
        """Have a joiner take the model from these donors."""
        addresses = tuple(self.addresses[number] for number in donors)
        return self._start("take", self._peer(JOINER, folder=str(folder), donors=addresses))

    def stop(self, number: int) -> dict[str, Any]:
        """End a donor; what it says at last."""
        process = self._donors.pop(number)
        said, _ = process.communicate(timeout=30)
        last: dict[str, Any] = json.loads(said.splitlines()[-1])
        return last

    def stop_all(self) -> None:
        """End all donors, whatever state they are in."""
        for process in self._donors.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=10)
            process.kill()
            process.wait()

    def _peer(self, number: int, folder: str = "", **told: Any) -> Peer:
        folder = folder or str(self._folder / f"host-{number}")
        return Peer(self._net.address(number), folder, str(self._folder / "manifest"), ROWS, **told)

    def _start(self, what: str, peer: Peer) -> "subprocess.Popen[str]":
        number = int(peer.ip.rpartition(".")[2])
        command = self._net.command(number, sys.executable, *peer.arguments(what))
        return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def heard(process: "subprocess.Popen[str]") -> dict[str, Any]:
    """The next thing that a process says."""
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, f"it ended with status {process.wait()}"
    said: dict[str, Any] = json.loads(line)
    return said


def result(process: "subprocess.Popen[str]") -> dict[str, Any]:
    """What a joiner says at last."""
    said = list[dict[str, Any]]()
    with process:
        assert process.stdout is not None
        said += map(json.loads, process.stdout)
    assert process.returncode == 0
    return said[-1]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    with internet(JOINER) as net:
        lab = Lab(net, tmp_path_factory.mktemp("lab"))
        try:
            lab.start_donors()
            yield lab
        finally:
            lab.stop_all()


def test_four_donors_give_a_state_at_least_two_and_a_half_times_as_fast_as_one(lab: Lab) -> None:
    one = result(lab.take(lab.new_joiner(), 1))
    four = result(lab.take(lab.new_joiner(), 1, 2, 3, 4))
    assert STATE_BYTES >= 64e6
    assert one["digest"] == four["digest"] == lab.digest
    assert (one["donors"], four["donors"]) == (1, 4)
    assert one["seconds"] > STATE_BYTES / (UP_MBIT * 1e6 / 8) * 0.9, "the line was not shaped"
    assert one["seconds"] / four["seconds"] >= 2.5
    assert four["received_bytes"] < 1.1 * STATE_BYTES, "hardly anything is paid for twice"


def test_a_joiner_that_is_killed_in_the_middle_goes_on_where_it_was(lab: Lab) -> None:
    folder = lab.new_joiner()
    killed = lab.take(folder, 1, 2, 3, 4)
    while heard(killed)["chunks"] < 30:
        pass
    killed.send_signal(signal.SIGKILL)
    with killed:
        pass
    again = result(lab.take(folder, 1, 2, 3, 4))
    assert again["digest"] == lab.digest
    assert again["received_bytes"] < STATE_BYTES - 25 * 2**20


def test_a_flipped_byte_of_one_donor_is_caught_and_the_chunk_comes_from_another(lab: Lab) -> None:
    assert "64 of 64 blobs can't be had" in result(lab.take(lab.new_joiner(), LIAR))["error"]
    said = result(lab.take(lab.new_joiner(), LIAR, 1, 2, 3))
    assert said["digest"] == lab.digest
    assert said["donors"] == 3
    assert lab.stop(LIAR)["given_bytes"] >= 2 * 2**20, "it was asked both times, and gave"
