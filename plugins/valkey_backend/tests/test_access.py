"""Who may come in, and by which options."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

import pytest
from lmcache_kit_valkey_backend import backend as module
from lmcache_kit_valkey_backend.options import ValkeyOptions

from lmcache_kit.errors import BackendError
from plugins.valkey_backend.tests.calls import KEY, OTHER, Open, Serve, got, put


def test_a_password_opens_the_server(serve: Serve, open_backend: Open, tmp_path: Path) -> None:
    server = serve("--requirepass", "s3cret/word")
    file = tmp_path / "password"
    file.write_text("s3cret/word\n")
    assert put(open_backend(server.options(password_file=file)))
    url = f"redis://:s3cret%2Fword@127.0.0.1:{server.port}"
    assert got(open_backend(server.options(url=url))) == b"data"


@pytest.mark.parametrize("password", ["", "wr0ng"])
def test_without_the_right_password_it_says_what_to_set_and_not_the_password(
    serve: Serve, open_backend: Open, password: str
) -> None:
    server = serve("--requirepass", "s3cret")
    url = f"redis://:{password}@127.0.0.1:{server.port}" if password else None
    backend = open_backend(server.options(**({"url": url} if url else {})))
    with pytest.raises(BackendError, match=f"127.0.0.1:{server.port}") as refused:
        put(backend)
    assert "s3cret" not in str(refused.value)
    assert "wr0ng" not in str(refused.value)


def test_a_user_with_the_rights_of_the_readme_can_do_it_all(
    serve: Serve, open_backend: Open
) -> None:
    server = serve()
    rights = (Path(module.__file__).parents[2] / "README.md").read_text()
    [line] = [line for line in rights.splitlines() if line.startswith("ACL SETUSER kv ")]
    with server.client() as client:
        client.execute_command(*line.split())
    url = f"redis://kv:SECRET@127.0.0.1:{server.port}"
    backend = open_backend(server.options(url=url, ttl_s=100))
    assert put(backend)
    assert got(backend) == b"data"
    assert backend.contains([KEY, OTHER]) == [True, False]
    assert [each.nbytes for each in backend.scan()] == [4]
    assert backend.usage().entries == 1
    backend.remove([KEY])
    assert got(backend) is None


def test_a_user_without_rights_is_told(serve: Serve, open_backend: Open) -> None:
    server = serve()
    with server.client() as client:
        client.execute_command("ACL", "SETUSER", "kv", "on", ">SECRET", "~*", "+hget")
    backend = open_backend(server.options(url=f"redis://kv:SECRET@127.0.0.1:{server.port}"))
    for call in (
        lambda: put(backend),
        lambda: got(backend),
        lambda: backend.contains([KEY]),
        lambda: backend.remove([KEY]),
        lambda: list(backend.scan()),
        backend.usage,
    ):
        with pytest.raises(BackendError, match=rf"{server.port}: .*permissions.*README has the"):
            call()


def test_a_unix_socket_is_a_way_in(serve: Serve, open_backend: Open, tmp_path: Path) -> None:
    server = serve("--unixsocket", str(tmp_path / "kv.sock"), "--requirepass", "s3cret")
    url = f"unix://:s3cret@{tmp_path}/kv.sock"
    backend = open_backend(ValkeyOptions(url=url))  # type: ignore[arg-type]
    assert put(backend)
    assert got(backend) == b"data"
    server.kill()
    with pytest.raises(BackendError, match=r"/kv\.sock: .*Is the server running"):
        got(backend)


def test_a_database_of_its_own_holds_the_blobs(serve: Serve, open_backend: Open) -> None:
    server = serve("--databases", "3")
    url = f"redis://127.0.0.1:{server.port}"
    assert put(open_backend(server.options(url=f"{url}/2")))
    assert got(open_backend(server.options(url=url))) is None
    with server.client(db=2) as client:
        assert client.dbsize() == 1
    with pytest.raises(BackendError, match=r"DB index .*configuration"):
        put(open_backend(server.options(url=f"{url}/3")))


def test_a_replica_that_may_not_be_written_says_which_server_to_name(
    serve: Serve, open_backend: Open
) -> None:
    server = serve("--replicaof", "127.0.0.1", "1", "--replica-serve-stale-data", "yes")
    backend = open_backend(server.options())
    with pytest.raises(BackendError, match=r"read only replica.*Name the primary"):
        put(backend)
    assert got(backend) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "http://x"}, "begins with one of redis, rediss, valkey"),
        ({"url": "redis://x:99999"}, "no number from 0 to 65535"),
        ({"url": "unix://"}, "has the path of a socket"),
        ({"url": "unix://relative/path"}, "unix:///PATH"),
        ({"url": "redis://"}, "names no host"),
        ({"url": "redis://x/zero"}, "number of a database"),
        ({"url": "rediss://x?ssl_cert_reqs=none"}, "a query or a fragment"),
        ({"url": "redis://:word@x", "password_file": "/x"}, "give one of them"),
        ({"ca": "/x"}, "are for TLS"),
        ({"url": "rediss://x", "cert": "/x"}, "need each other"),
        ({"prefix": "a b"}, "pattern"),
        ({"colour": "red"}, "Extra inputs"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ValkeyOptions(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("sign", "@/#%? é")
@pytest.mark.parametrize("form", ["redis://me:{}@host", "unix://:{}@/kv.sock"])
def test_a_password_that_is_not_escaped_is_told_how_to_escape(form: str, sign: str) -> None:
    url = form.format(f"s3{sign}cret")
    with pytest.raises(ValueError, match=r"must be escaped: %40 for @.* password_file") as no:
        ValkeyOptions(url=url)  # type: ignore[arg-type]
    assert "cret" not in str(no.value)
    ValkeyOptions(url=form.format(quote(f"s3{sign}cret:", safe="")))  # type: ignore[arg-type]


def test_lmcaches_name_of_the_protocol_means_the_same() -> None:
    options = ValkeyOptions(url="resp://me:s3%40cret@host:1/2")  # type: ignore[arg-type]
    assert options.url.get_secret_value() == "redis://me:s3%40cret@host:1/2"


def test_a_colon_in_a_password_and_an_at_in_a_path_need_no_escape() -> None:
    ValkeyOptions(url="redis://me:s3:cret@host")  # type: ignore[arg-type]
    ValkeyOptions(url="unix:///run/kv@1/kv.sock")  # type: ignore[arg-type]


def test_a_password_is_never_shown() -> None:
    options = ValkeyOptions(url="redis://me:s3cret@host:1/2")  # type: ignore[arg-type]
    assert "s3cret" not in f"{options!r} {options} {options.model_dump_json()} {options.server}"
    assert options.server == "host:1"
    for wrong in (
        {"url": "http://me:s3cret@host"},
        {"url": "redis://me:s3cret@host", "ca": "/x"},
        {"url": "redis://me:s3cret@h\N{CARE OF}st"},
        {"url": "redis://me:s3cret@[host"},
    ):
        with pytest.raises(ValueError, match=r"url|ca") as refused:
            ValkeyOptions(**wrong)  # type: ignore[arg-type]
        assert "s3cret" not in str(refused.value)
