"""Where a role listens, as its user wants it."""

from dataclasses import dataclass

from dugnad.dht.budget import GIVE_MBIT
from dugnad.dht.endpoint import Endpoint
from dugnad.dht.invite import Invite
from dugnad.dht.multiaddrs import is_local, on_tcp


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

    @property
    def bulk(self) -> Endpoint:
        """Where direct connections are accepted."""
        following = self.port + 1 if self.port else 0
        return Endpoint(self.host, following if self.bulk_port is None else self.bulk_port)

    @property
    def listen(self) -> str:
        """The multiaddr to listen on."""
        return self.listen_on(self.port)

    def listen_on(self, port: int) -> str:
        """The multiaddr of another port on the same host."""
        return on_tcp(self.host, port)


def host_for(invite: Invite) -> str:
    """Where a volunteer listens that was not told: all interfaces, unless the whole run is on this machine."""
    return "127.0.0.1" if all(is_local(address) for address in invite.addresses) else "0.0.0.0"
