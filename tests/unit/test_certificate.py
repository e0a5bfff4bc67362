"""Certificates of direct connections: kept, renewed in time, and private."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from dugnad.dht.certificate import LASTS, RENEW_BEFORE, Certificate, fingerprint
from dugnad.dht.identity import Identity
from dugnad.dht.meeting import CERTIFICATE_BYTES

ME = Identity.from_seed(bytes(32)).peer_id
NOW = datetime(2026, 11, 27, tzinfo=UTC)


def test_it_is_kept_over_restarts(tmp_path: Path) -> None:
    first = Certificate.load_or_create(tmp_path / "carrier.pem", ME, now=NOW)
    again = Certificate.load_or_create(tmp_path / "carrier.pem", ME, now=NOW + LASTS - RENEW_BEFORE - timedelta(1))
    assert again.fingerprint == first.fingerprint == fingerprint(first.der)
    assert len(first.fingerprint) == 32
    assert len(first.der) <= CERTIFICATE_BYTES


def test_it_is_renewed_before_it_ends(tmp_path: Path) -> None:
    first = Certificate.load_or_create(tmp_path / "carrier.pem", ME, now=NOW)
    later = Certificate.load_or_create(tmp_path / "carrier.pem", ME, now=NOW + LASTS - RENEW_BEFORE)
    assert later.fingerprint != first.fingerprint


def test_only_its_owner_may_read_the_key(tmp_path: Path) -> None:
    Certificate.load_or_create(tmp_path / "carrier.pem", ME, now=NOW)
    assert (tmp_path / "carrier.pem").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("text", ["", "nonsense", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
def test_a_damaged_file_is_replaced(tmp_path: Path, text: str) -> None:
    file = tmp_path / "carrier.pem"
    file.write_text(text)
    made = Certificate.load_or_create(file, ME, now=NOW)
    assert Certificate.load_or_create(file, ME, now=NOW).fingerprint == made.fingerprint
