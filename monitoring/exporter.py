"""A role's small HTTP server: /metrics for Prometheus, /status for people and programs, decisions of the organizer.

Who may decide is for those who take a decision to say: it is signed, and asks for no other password.
"""

import errno
from collections.abc import Callable
from types import TracebackType
from typing import Self

import msgspec
from aiohttp import web
from prometheus_client.exposition import choose_encoder

from dugnad.monitoring.metrics import Metrics

Status = Callable[[], dict[str, object]]
Decide = Callable[[bytes], str | None]
"""Takes a signed decision; why it is refused, or None."""
Decisions = Callable[[], list[dict[str, object]]]
"""What was decided, oldest first."""
MAX_DECISION_BYTES = 4096

_INDEX = """dugnad

/metrics   for Prometheus
/status    what this role does now, as JSON
/decisions what the organizer has decided about peers and tickets, as JSON; POST /decision takes another
"""
_OPENMETRICS = "application/openmetrics-text"
_SHUTDOWN_S = 0.1  # a scraper that is answered too late asks again; nobody who leaves should wait for it


class PortTaken(Exception):
    """Another program listens on the port for metrics."""

    code = "E202"

    def __init__(self, host: str, port: int) -> None:
        super().__init__(
            f"{self.code} port {port} on {host}, for metrics and status, is taken by another program. "
            "Choose another --metrics-port; 0 takes any free one."
        )
        self.port = port


class Exporter:
    """Serves `metrics` and what `status` returns while it is entered; port 0 takes any free one.

    decide, decisions: where the organizer is heard; nowhere unless told.
    Entering raises PortTaken if another program listens there, and OSError if `host` can't be listened on at all.
    """

    def __init__(
        self,
        metrics: Metrics,
        status: Status,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        decide: Decide = lambda raw: "nobody decides anything here",
        decisions: Decisions = list,
    ) -> None:
        self._decide, self._decisions = decide, decisions
        self._metrics = metrics
        self._status = status
        self._host = host
        self._port = port
        self._url: str | None = None

    @property
    def url(self) -> str:
        """Where it listens, without a slash at the end."""
        assert self._url is not None, "the exporter is not entered"
        return self._url

    async def __aenter__(self) -> Self:
        app = web.Application(client_max_size=MAX_DECISION_BYTES)
        app.add_routes(
            [
                web.get("/", _index),
                web.get("/metrics", self._serve_metrics),
                web.get("/status", self._serve_status),
                web.get("/decisions", self._serve_decisions),
                web.post("/decision", self._take_decision),
            ]
        )
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=_SHUTDOWN_S)
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, self._host, self._port).start()
        except OSError as error:
            await self._runner.cleanup()
            if error.errno == errno.EADDRINUSE:
                raise PortTaken(self._host, self._port) from error
            raise
        host, port = self._runner.addresses[0][:2]
        self._url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._runner.cleanup()

    async def _serve_metrics(self, request: web.Request) -> web.Response:
        # not the client's own header: a strange version in it would be an error here
        encode, content_type = choose_encoder(_OPENMETRICS if _OPENMETRICS in request.headers.get("Accept", "") else "")
        body = encode(self._metrics.registry)
        return web.Response(body=body, headers={"Content-Type": content_type})

    async def _serve_status(self, request: web.Request) -> web.Response:
        # msgspec: a loss that is not a number becomes null, where json would write what no parser accepts
        return web.Response(body=msgspec.json.encode(self._status()), content_type="application/json")

    async def _serve_decisions(self, request: web.Request) -> web.Response:
        return web.Response(body=msgspec.json.encode(self._decisions()), content_type="application/json")

    async def _take_decision(self, request: web.Request) -> web.Response:
        refused = self._decide(await request.read())
        return web.Response(body=msgspec.json.encode({"refused": refused}), content_type="application/json")


async def _index(request: web.Request) -> web.Response:
    return web.Response(text=_INDEX)
