"""Options of the backend ``ValkeyBackend``."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from lmcache_kit.errors import BackendError

SCHEMES = ("redis", "rediss", "valkey", "valkeys", "unix")
ENCRYPTED = ("rediss", "valkeys")
_USER = re.compile(r"\w+://(?!/)(?P<user>.*)@", re.DOTALL)
_ESCAPED = re.compile(r"(?:[A-Za-z0-9._~!$&'()*+,;=:-]|%[0-9A-Fa-f]{2})*")  # RFC 3986, 3.2.1


class ValkeyOptions(BaseModel):
    """Options of the backend: the server, the connections to it, and the keys on it."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    url: SecretStr = Field(
        default=SecretStr("valkey://localhost:6379"),
        description="`valkey://[USER[:PASSWORD]@]HOST[:PORT][/DATABASE]`, `valkeys://` for TLS, "
        "the same with `redis`, or `unix://PATH`",
    )
    password_file: Path | None = Field(
        default=None, description="file whose first line is the password"
    )
    ca: Path | None = Field(
        default=None, description="authorities to trust (PEM); those of the system if absent"
    )
    cert: Path | None = Field(
        default=None, description="certificate of this client (PEM), if the server asks for one"
    )
    key: Path | None = Field(default=None, description="key of `cert` (PEM)")
    prefix: str = Field(
        default="lmcache_kit:",
        max_length=100,
        pattern=r"^[!-~]*$",
        description="prefix of all keys on the server; instances with the same prefix share KV",
    )
    timeout_ms: int = Field(
        default=1000, ge=1, le=60_000, description="milliseconds to wait for an answer"
    )
    connections: int = Field(
        default=10,
        ge=1,
        le=256,
        description="connections at a time, at most; a lookup reads four chunks at once",
    )
    ttl_s: int | None = Field(
        default=None, ge=1, description="seconds after which a blob that nothing reads expires"
    )

    @field_validator("url")
    @classmethod
    def _of_a_server(cls, url: SecretStr) -> SecretStr:
        parts = _split(url.get_secret_value())
        if parts.scheme == "resp":  # LMCache's name for a client of the same servers
            parts = parts._replace(scheme="redis")
            url = SecretStr(parts.geturl())
        if parts.scheme not in SCHEMES:
            raise ValueError(f"a URL begins with one of {', '.join(SCHEMES)}, then ://")
        try:
            _ = parts.port
        except ValueError:
            raise ValueError("the port of the URL is no number from 0 to 65535") from None
        if parts.query or parts.fragment:  # the client would take ?ssl_cert_reqs=none from there
            raise ValueError("the URL must not have a query or a fragment; use the other options")
        if parts.scheme == "unix":
            if parts.hostname or not parts.path:
                raise ValueError("a unix:// URL has the path of a socket: unix:///PATH")
        elif not parts.hostname:
            raise ValueError("the URL names no host")
        elif parts.path.strip("/") and not parts.path.strip("/").isdecimal():
            raise ValueError("the path of the URL must be the number of a database")
        return url

    @model_validator(mode="after")
    def _consistent(self) -> ValkeyOptions:
        if any((self.ca, self.cert, self.key)) and not self.encrypted:
            raise ValueError(f"ca, cert and key are for TLS: {' or '.join(ENCRYPTED)}://")
        if (self.cert is None) != (self.key is None):
            raise ValueError("cert and key need each other")
        if self.password_file is not None and urlsplit(self.url.get_secret_value()).password:
            raise ValueError("there is a password in url and a password_file; give one of them")
        return self

    def password(self) -> str:
        """Return the password in ``password_file``. Raises BackendError if it cannot be read."""
        assert self.password_file is not None
        return _text("password_file", self.password_file).split("\n")[0].strip()

    def tls(self) -> dict[str, str | None]:
        """Return the files for TLS, by option. Raises BackendError when one cannot be read."""
        files = {"ca": self.ca, "cert": self.cert, "key": self.key}
        for option, path in files.items():
            if path is not None:
                _text(option, path)
        return {option: str(path) if path else None for option, path in files.items()}

    @property
    def encrypted(self) -> bool:
        """Whether the connection uses TLS."""
        return urlsplit(self.url.get_secret_value()).scheme in ENCRYPTED

    @property
    def server(self) -> str:
        """Host and port, or socket path, for messages: without user and password."""
        parts = urlsplit(self.url.get_secret_value())
        if parts.scheme == "unix":
            return parts.path
        return f"{parts.hostname or 'localhost'}:{parts.port or 6379}"


def _split(url: str) -> SplitResult:
    """Split a URL. Raises ValueError, without a part of it, if its user or password has signs that
    a URL has for other purposes: they would end it early, or change it."""
    found = _USER.match(url)
    if found and not _ESCAPED.fullmatch(found["user"]):
        raise ValueError(
            "user and password must be escaped: %40 for @, %2F for /, %23 for #, %25 for %, "
            "%3F for ?, %20 for a blank, as urllib.parse.quote(password, safe='') does it; or give "
            "password_file"
        )
    try:
        return urlsplit(url)
    except ValueError:
        raise ValueError("the URL has a host that is none") from None


def _text(option: str, path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise BackendError(f"{option}: {error}") from None
