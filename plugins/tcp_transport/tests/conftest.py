from __future__ import annotations

import contextlib
import datetime
import ipaddress
import os
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from lmcache_kit_tcp_transport.transport import TcpTransport
from xxhash import xxh3_64_intdigest

from lmcache_kit.interfaces import Link, ReadableRegion, Region
from tests.support.proxies import Proxy

WAIT_S = 20.0


class Host:
    """A cache process's memory and transport, and a listener that takes dialled connections."""

    def __init__(self, nbytes: int, tls: ssl.SSLContext | None = None) -> None:
        self.memory = memoryview(bytearray(nbytes))
        self.transport = TcpTransport(self.memory, "127.0.0.1")
        self._tls = tls
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._used = 0
        self.links: list[Link] = []
        self.serving: list[threading.Thread] = []
        self._accepting = threading.Thread(target=self._accept)
        self._accepting.start()

    def link_to(
        self,
        source: Host,
        dial: Callable[[float], socket.socket] | None = None,
        timeout_s: float = WAIT_S,
    ) -> Link:
        address = source.transport.address()
        self.links.append(self.transport.connect(address, dial or source.dial, timeout_s))
        return self.links[-1]

    def offer(self, payloads: Sequence[bytes]) -> bytes:
        """Put these into memory, one after the other, and offer them."""
        offered = []
        for payload in payloads:
            region = self.allocate(len(payload))
            self.memory[region.offset : region.offset + region.nbytes] = payload
            offered.append(ReadableRegion(region, xxh3_64_intdigest(payload)))
        return self.transport.offer(offered)

    def allocate(self, nbytes: int) -> Region:
        self._used += nbytes
        assert self._used <= len(self.memory)
        return Region(self._used - nbytes, nbytes)

    def bytes_of(self, region: Region) -> bytes:
        return bytes(self.memory[region.offset : region.offset + region.nbytes])

    def dial(self, timeout_s: float = WAIT_S) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout_s)
        connection.settimeout(None)
        return connection

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self.transport.close()
        self._accepting.join(WAIT_S)
        self._listener.close()
        for thread in self.serving:
            thread.join(WAIT_S)
        assert not any(thread.is_alive() for thread in (self._accepting, *self.serving))

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                thread = threading.Thread(target=self._serve, args=[connection])
                self.serving.append(thread)
                thread.start()

    def _serve(self, connection: socket.socket) -> None:
        if self._tls:
            connection = self._tls.wrap_socket(connection, server_side=True)
        self.transport.serve(connection)


@pytest.fixture
def new_host() -> Iterator[Callable[..., Host]]:
    with contextlib.ExitStack() as stack:

        def build(nbytes: int = 4 << 20, tls: ssl.SSLContext | None = None) -> Host:
            host = Host(nbytes, tls)
            stack.callback(host.close)
            return host

        yield build


@pytest.fixture
def source(new_host: Callable[..., Host]) -> Host:
    return new_host()


@pytest.fixture
def sink(new_host: Callable[..., Host]) -> Host:
    return new_host()


@pytest.fixture
def link(source: Host, sink: Host) -> Link:
    """From the sink to the source."""
    return sink.link_to(source)


@pytest.fixture
def proxy_to() -> Iterator[Callable[..., Proxy]]:
    with contextlib.ExitStack() as stack:

        def build(host: Host, change: Callable[[int, bytes], bytes | None]) -> Proxy:
            proxy = Proxy(host.port, change)
            stack.callback(proxy.close)
            return proxy

        yield build


@pytest.fixture(params=["TCP", "TLS"])
def over(
    request: pytest.FixtureRequest,
    new_host: Callable[..., Host],
    proxy_to: Callable[..., Proxy],
    tls: tuple[ssl.SSLContext, ssl.SSLContext],
) -> Callable[..., tuple[Host, Host, Link]]:
    """A source, a sink, and a link between them: plain, and over TLS; through a proxy if there is
    a ``change``."""
    secure = request.param == "TLS"

    def build(
        nbytes: int = 4 << 20, change: Callable[[int, bytes], bytes | None] | None = None
    ) -> tuple[Host, Host, Link]:
        source, sink = new_host(nbytes, tls[0] if secure else None), new_host(nbytes)
        way = proxy_to(source, change) if change else source

        def dial(timeout_s: float) -> socket.socket:
            connection = way.dial(timeout_s)
            if secure:
                return tls[1].wrap_socket(connection, server_hostname="127.0.0.1")
            return connection

        return source, sink, sink.link_to(source, dial)

    return build


@pytest.fixture
def link_through(
    source: Host, sink: Host, proxy_to: Callable[..., Proxy]
) -> Callable[[Callable[[int, bytes], bytes | None]], Link]:
    """From the sink to the source, through a proxy."""
    return lambda change: sink.link_to(source, proxy_to(source, change).dial)


@pytest.fixture(scope="session")
def tls(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A server's and a client's side, which both show certificates of one CA."""
    folder = tmp_path_factory.mktemp("tls")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(names, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    file = folder / "both.pem"
    file.write_bytes(
        certificate.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    for context in (server, client):
        context.load_cert_chain(file)
        context.load_verify_locations(file)
        context.verify_mode = ssl.CERT_REQUIRED
    return server, client


@pytest.fixture
def serving_process() -> Iterator[tuple[subprocess.Popen[str], int, bytes]]:
    """A process that offers four regions of 32 MiB to the first who dials; its port, the offer.
    It says ``served`` when it no longer does."""
    process = subprocess.Popen(
        [sys.executable, Path(__file__).with_name("serving_process.py")],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    with process:
        assert process.stdout
        port, offer = process.stdout.readline().split()
        yield process, int(port), bytes.fromhex(offer)
        process.kill()
