"""TLS: whose certificates do, on either side."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trustme
from lmcache_kit_valkey_backend.backend import ValkeyBackend
from lmcache_kit_valkey_backend.options import ValkeyOptions

from lmcache_kit.errors import BackendError
from plugins.valkey_backend.tests.calls import Open, got, put

if TYPE_CHECKING:
    from plugins.valkey_backend.tests.conftest import Served


@pytest.fixture
def authority(tmp_path: Path) -> trustme.CA:
    made = trustme.CA()
    made.cert_pem.write_to_path(tmp_path / "ca.pem")
    return made


def front_of(
    server: Served, authority: trustme.CA, name: str = "127.0.0.1", *, mutual: bool = False
) -> int:
    from plugins.valkey_backend.tests.conftest import TLSFront

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert(name).configure_cert(context)
    if mutual:
        context.verify_mode = ssl.CERT_REQUIRED
        authority.configure_trust(context)
    return TLSFront(server.port, context).port


def test_tls_works_with_the_authority_that_is_named(
    server: Served, open_backend: Open, authority: trustme.CA, tmp_path: Path
) -> None:
    url = f"valkeys://127.0.0.1:{front_of(server, authority)}"
    backend = open_backend(server.options(url=url, ca=tmp_path / "ca.pem"))
    assert put(backend, data=b"x" * 3_000_000)
    assert got(backend) == b"x" * 3_000_000


def test_a_certificate_of_another_authority_is_refused(
    server: Served, open_backend: Open, authority: trustme.CA, tmp_path: Path
) -> None:
    port = front_of(server, trustme.CA())
    for options in ({"ca": tmp_path / "ca.pem"}, {}):
        backend = open_backend(server.options(url=f"rediss://127.0.0.1:{port}", **options))
        with pytest.raises(BackendError, match=r"(?i)certificate"):
            put(backend)


def test_a_certificate_of_another_host_is_refused(
    server: Served, open_backend: Open, authority: trustme.CA, tmp_path: Path
) -> None:
    port = front_of(server, authority, "elsewhere.example")
    url = f"rediss://127.0.0.1:{port}"
    backend = open_backend(server.options(url=url, ca=tmp_path / "ca.pem"))
    with pytest.raises(BackendError, match=r"(?i)certificate|mismatch"):
        put(backend)


def test_a_server_that_asks_for_a_certificate_gets_it(
    server: Served, open_backend: Open, authority: trustme.CA, tmp_path: Path
) -> None:
    url = f"rediss://127.0.0.1:{front_of(server, authority, mutual=True)}"
    ours = authority.issue_cert("cache.example")
    ours.private_key_pem.write_to_path(tmp_path / "key.pem")
    ours.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    options = {"url": url, "ca": tmp_path / "ca.pem"}
    pair = {"cert": tmp_path / "cert.pem", "key": tmp_path / "key.pem"}
    assert put(open_backend(server.options(**options, **pair)))
    with pytest.raises(BackendError, match=r"127\.0\.0\.1"):
        put(open_backend(server.options(**options)))


@pytest.mark.parametrize("option", ["password_file", "ca", "cert", "key"])
def test_a_file_that_is_not_there_is_named_at_once(tmp_path: Path, option: str) -> None:
    options = {each: tmp_path / each for each in {"cert", "key", option}}
    for each in options.keys() - {option}:
        options[each].touch()
    with pytest.raises(BackendError, match=rf"^{option}: .*{tmp_path / option}"):
        ValkeyBackend(ValkeyOptions(url="rediss://localhost", **options))  # type: ignore[arg-type]


def test_tls_to_a_server_without_it_fails_in_time(server: Served, open_backend: Open) -> None:
    url = f"rediss://127.0.0.1:{server.port}"
    with pytest.raises(BackendError, match=str(server.port)):
        put(open_backend(server.options(url=url, timeout_ms=500)))
