"""A real exporter on loopback, scraped as Prometheus scrapes it."""

import asyncio
import json
import logging
import math
import socket
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

import aiohttp
import pytest
from prometheus_client import Metric
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from dugnad.monitoring.exporter import Exporter, PortTaken
from dugnad.monitoring.metrics import Metrics

pytestmark = pytest.mark.net

PROMETHEUS = "application/openmetrics-text; version=1.0.0,text/plain;version=0.0.4;q=0.5"
ODD = "application/openmetrics-text; version=one"


@pytest.fixture
def metrics() -> Metrics:
    return Metrics("volunteer", "ab12cd34", nickname="amber-otter")


@pytest.fixture
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


def nothing() -> dict[str, object]:
    return {}


def value(families: list[Metric], name: str, **labels: str) -> float:
    """The one sample of that name and those labels."""
    samples = [sample for family in families for sample in family.samples]
    [found] = [sample.value for sample in samples if sample.name == name and sample.labels == labels]
    return found


async def test_a_scrape_says_what_was_measured(metrics: Metrics, client: aiohttp.ClientSession) -> None:
    metrics.round_committed(7, 140, 33.0)
    metrics.bytes_moved("sent", "upload", 1000)
    async with Exporter(metrics, nothing) as exporter, client.get(f"{exporter.url}/metrics") as reply:
        assert reply.status == 200
        assert reply.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        families = list(text_string_to_metric_families(await reply.text()))
    assert value(families, "dugnad_round") == 7
    assert value(families, "dugnad_bytes_total", direction="sent", kind="upload") == 1000
    assert value(families, "dugnad_round_duration_seconds_sum") == 33.0
    assert value(families, "dugnad_run_info", role="volunteer", run="ab12cd34", nickname="amber-otter") == 1


async def test_each_scrape_is_fresh(metrics: Metrics, client: aiohttp.ClientSession) -> None:
    async with Exporter(metrics, nothing) as exporter:
        for round_ in (1, 2):
            metrics.round_committed(round_, round_ * 20, 1.0)
            async with client.get(f"{exporter.url}/metrics") as reply:
                assert value(list(text_string_to_metric_families(await reply.text())), "dugnad_round") == round_


@pytest.mark.parametrize("accept", [PROMETHEUS, ODD])
async def test_who_asks_for_openmetrics_gets_it(metrics: Metrics, client: aiohttp.ClientSession, accept: str) -> None:
    metrics.phase_took("train", 2.0)
    headers = {"Accept": accept}
    async with Exporter(metrics, nothing) as exporter, client.get(f"{exporter.url}/metrics", headers=headers) as reply:
        assert reply.headers["Content-Type"].startswith("application/openmetrics-text; version=1.0.0")
        families = list(openmetrics.text_string_to_metric_families(await reply.text()))  # type: ignore[no-untyped-call]
    assert value(families, "dugnad_phase_duration_seconds_count", phase="train") == 1


async def test_status_is_the_callables_answer_of_that_moment(metrics: Metrics, client: aiohttp.ClientSession) -> None:
    said: dict[str, object] = {"state": "wait", "peers": [{"nickname": "amber-otter"}]}
    async with Exporter(metrics, lambda: said) as exporter:
        async with client.get(f"{exporter.url}/status") as reply:
            assert reply.content_type == "application/json"
            assert await reply.json() == said
        said = {"state": "train"}
        async with client.get(f"{exporter.url}/status") as reply:
            assert await reply.json() == {"state": "train"}


async def test_a_loss_that_is_not_a_number_leaves_the_status_readable(
    metrics: Metrics, client: aiohttp.ClientSession
) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    said = {"loss": math.nan}
    async with Exporter(metrics, lambda: dict(said)) as exporter, client.get(f"{exporter.url}/status") as reply:
        assert json.loads(await reply.text(), parse_constant=refuse) == {"loss": None}


async def test_the_first_page_names_the_others_and_unknown_pages_are_refused(
    metrics: Metrics, client: aiohttp.ClientSession
) -> None:
    async with Exporter(metrics, nothing) as exporter:
        async with client.get(f"{exporter.url}/") as reply:
            assert reply.content_type == "text/plain"
            text = await reply.text()
            assert "/metrics" in text
            assert "/status" in text
        async with client.get(f"{exporter.url}/keys") as reply:
            assert reply.status == 404


async def test_a_taken_port_is_named_with_what_to_do(metrics: Metrics) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(PortTaken, match=rf"port {port} .* another --metrics-port; 0 takes any"):
            await Exporter(metrics, nothing, port=port).__aenter__()


async def test_it_listens_on_loopback_only_unless_told(metrics: Metrics) -> None:
    async with Exporter(metrics, nothing) as exporter:
        assert urlsplit(exporter.url).hostname == "127.0.0.1"


async def test_leaving_waits_for_no_scraper_and_frees_the_port(metrics: Metrics, client: aiohttp.ClientSession) -> None:
    async with Exporter(metrics, nothing) as exporter:
        url = urlsplit(exporter.url)
        async with client.get(f"{exporter.url}/metrics") as reply:
            await reply.read()  # the client keeps its connection
        answers, half = await asyncio.open_connection(url.hostname, url.port)
        half.write(b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n")  # its rest never comes
        await answers.readline()
        since = asyncio.get_running_loop().time()
    assert asyncio.get_running_loop().time() - since < 1.0
    half.close()
    async with Exporter(metrics, nothing, port=url.port or 0) as again:
        assert urlsplit(again.url).port == url.port


async def test_scrapes_are_not_logged(
    metrics: Metrics, client: aiohttp.ClientSession, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    async with Exporter(metrics, nothing) as exporter, client.get(f"{exporter.url}/metrics") as reply:
        await reply.read()
    assert not [record for record in caplog.records if record.name.startswith("aiohttp")]
