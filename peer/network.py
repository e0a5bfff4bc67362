"""Where a role listens: as its user says, or said the last time, and on the ports that it took then."""

import logging
from dataclasses import dataclass, replace
from typing import Self

import msgspec

from dugnad.dht.budget import GIVE_MBIT
from dugnad.dht.endpoint import Endpoint
from dugnad.dht.invite import Invite
from dugnad.dht.listening import check_free
from dugnad.dht.multiaddrs import is_local, on_tcp
from dugnad.dht.transport import ListenError, PortInUse

log = logging.getLogger(__name__)


class Said(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a user said of where a role listens and is reached; None: nothing."""

    host: str | None = None
    port: int | None = None
    """0: any free one."""
    bulk_port: int | None = None
    announce: str | None = None
    """A multiaddr; empty: none any more."""

    def over(self, before: "Said") -> "Said":
        """The same, and what was said before where this says nothing."""
        news = {name: value for name, value in msgspec.structs.asdict(self).items() if value is not None}
        return msgspec.structs.replace(before, **news)


class Listened(msgspec.Struct, frozen=True, kw_only=True):
    """Where a role listened last, as its folder keeps it."""

    said: Said
    port: int
    bulk_port: int
    addresses: tuple[str, ...]
    """Those by which invites led to it, each with /p2p/ and its peer id."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """Where a role listens (`port` and `metrics_port` 0 take any free one), and what it gives to those who fetch."""

    host: str = "127.0.0.1"
    port: int = 0
    bulk_port: int | None = None
    """Of direct connections; None: the one after `port`, or any where that is 0."""
    metrics_port: int = 0
    give_mbit: float = GIVE_MBIT
    """Megabits a second."""
    announce: str | None = None
    """A multiaddr at which, by the user's word, everyone reaches this role; see `Ways`."""
    said: Said = Said()  # noqa: RUF009  # frozen
    """What of this the user said, now or earlier, to be kept for the next time."""

    @classmethod
    def of(
        cls, said: Said, last: Listened | None, *, host: str, metrics_port: int = 0, give_mbit: float = GIVE_MBIT
    ) -> Self:
        """As `said`, and else as the last time; host: where to listen if that was never said."""
        known = said if last is None else said.over(last.said)
        port, bulk_port = known.port or 0, known.bulk_port
        if last is not None and said.port is None:
            port = last.port
            bulk_port = last.bulk_port if said.bulk_port is None else said.bulk_port
        return cls(
            host=known.host or host,
            port=port,
            bulk_port=bulk_port,
            metrics_port=metrics_port,
            give_mbit=give_mbit,
            announce=known.announce or None,
            said=known,
        )

    @property
    def bulk(self) -> Endpoint:
        """Where direct connections are accepted."""
        following = self.port + 1 if self.port else 0
        return Endpoint(self.host, following if self.bulk_port is None else self.bulk_port)

    @property
    def listen(self) -> str:
        """The multiaddr to listen on."""
        return on_tcp(self.host, self.port)

    def moved(self, *, stays: bool) -> Self:
        """The same with any port in place of one that nobody asked for and that is taken by now.

        stays: on `port` all the same, as invites name it.
        """
        port, bulk_port = self.port, self.bulk.port
        asked_bulk = bool(self.said.port if self.said.bulk_port is None else self.said.bulk_port)
        if port and not stays and not self.said.port and self._is_taken(port):
            port = 0
        if bulk_port and not asked_bulk and self._is_taken(bulk_port):
            bulk_port = 0
        return replace(self, port=port, bulk_port=bulk_port)

    def _is_taken(self, port: int) -> bool:
        try:
            check_free(on_tcp(self.host, port))
        except PortInUse:
            log.warning("port %d, where this role listened the last time, is taken: it takes another one", port)
            return True
        except ListenError:
            pass  # the host is at fault, and whoever listens there says how
        return False


def host_for(invite: Invite) -> str:
    """Where a volunteer listens that was not told: all interfaces, unless the whole run is on this machine."""
    return "127.0.0.1" if all(is_local(address) for address in invite.addresses) else "0.0.0.0"
