"""Hosts of ours on the hosts of the lab, all in this process: each in a thread of its own, which enters its namespace.

What a thread opens, its daemon included, is in the namespace of that thread. It saves importing hivemind for each.
"""

import asyncio
import os
import signal
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from dugnad.dht.directory import import_hivemind
from dugnad.dht.host import Host
from dugnad.dht.identity import Identity, PeerId
from dugnad.dht.paths import Path as Way
from tests.net.forwarder import enter
from tests.net.hosts import ignore, owner_of
from tests.net.lab import Lab

CHANNEL = "test/reach/1"
REACHED_S = 10.0
T = TypeVar("T")


async def echo(sender: PeerId, payload: bytes) -> bytes:
    """What whoever asks on CHANNEL is answered."""
    return payload


class PlacedHost:
    """A host on a host of the lab, from `start` until `close`; settings: what `Host` takes."""

    def __init__(self, net: Lab, name: str, folder: Path, **settings: Any) -> None:
        self.name = name
        self._namespace = net.namespace(name)
        self._settings = {"listen": ("/ip4/0.0.0.0/tcp/0",), "state_dir": folder / name, **settings}
        self._thread = threading.Thread(target=self._run, name=name)
        self._entered: Future[Host] = Future()
        self._loop = asyncio.new_event_loop()
        self._over = asyncio.Event()

    def start(self) -> None:
        """Begin; `host` waits until it is there."""
        self._thread.start()

    @property
    def host(self) -> Host:
        """The host; what it says of itself at once may be asked from any thread."""
        return self._entered.result(timeout=60)

    def call(self, what: Callable[[Host], Awaitable[T]]) -> T:
        """The result of something that the host does."""
        host = self.host

        async def called() -> T:
            return await what(host)

        return asyncio.run_coroutine_threadsafe(called(), self._loop).result(timeout=60)

    def kill(self) -> None:
        """SIGKILL for its daemon: to the others, it is gone."""
        os.kill(self.host.daemon_pid, signal.SIGKILL)

    def until(self, condition: Callable[[Host], bool], within_s: float, what: str) -> None:
        """Wait until it is so."""
        deadline = time.monotonic() + within_s
        while not condition(self.host):
            assert time.monotonic() < deadline, f"{self.name}: no {what} in {within_s:.0f} s: {self.host.addresses()}"
            time.sleep(0.05)

    def close(self) -> None:
        """End it."""
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join()

    def _run(self) -> None:
        try:
            enter(self._namespace)
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                runner.run(self._live())
        except BaseException as error:
            if self._entered.done():
                raise
            self._entered.set_exception(error)

    async def _live(self) -> None:
        async with Host(Identity.generate(), meter=ignore, owner_of=owner_of, **self._settings) as host:
            await host.serve(CHANNEL, echo)
            self._entered.set_result(host)
            await self._over.wait()


class Peers(dict[str, PlacedHost]):
    """The hosts, by name."""

    def __init__(self, net: Lab, folder: Path) -> None:
        import_hivemind()
        super().__init__()
        self._net = net
        self._folder = folder

    def begin(self, name: str, **settings: Any) -> PlacedHost:
        """Start the host of that name."""
        self[name] = PlacedHost(self._net, name, self._folder, **settings)
        self[name].start()
        return self[name]

    def asks(self, one: str, other: str, num_bytes: int) -> tuple[float, Way | None]:
        """How long it takes one host to be answered by another, in seconds, and by which way."""
        asked, payload = self[other].host, os.urandom(num_bytes)

        async def ask(host: Host) -> tuple[float, Way | None]:
            await host.learn(asked.peer_id, asked.addresses())
            since = time.perf_counter()
            assert await host.request(asked.peer_id, CHANNEL, payload, timeout_s=REACHED_S) == payload
            took_s, route = time.perf_counter() - since, await host.route_to(asked.peer_id)
            return took_s, route.path if route is not None else None

        return self[one].call(ask)

    def close(self) -> None:
        """End all."""
        for peer in self.values():
            peer.close()
