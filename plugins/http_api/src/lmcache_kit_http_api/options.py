"""Options of the REST frontend."""

from __future__ import annotations

import ipaddress
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, SecretStr, StringConstraints
from pydantic.functional_validators import AfterValidator, BeforeValidator

from lmcache_kit.errors import ConfigError


def _sendable(token: SecretStr) -> SecretStr:
    value = token.get_secret_value()
    if not value or not all("!" <= c <= "~" for c in value):
        raise ValueError("must be printable ASCII without spaces, and not empty")
    return token


def _listed(value: object) -> object:
    """Split a text with commas, as the command line has it."""
    if isinstance(value, str):
        return tuple(name.strip() for name in value.split(",") if name.strip())
    return value


_HostName = Annotated[str, StringConstraints(pattern=r"^(\*|(\*\.)?[A-Za-z0-9_.-]+)$")]


class HttpOptions(BaseModel):
    """Options of the frontend: address, access, and limits of requests."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: Annotated[str, StringConstraints(min_length=1)] = Field(
        default="localhost", description="address to listen on"
    )
    port: int = Field(
        default=9000, ge=0, le=65535, description="port; 0 lets the system choose one"
    )
    token: Annotated[SecretStr, AfterValidator(_sendable)] | None = Field(
        default=None, description="token that requests must carry"
    )
    insecure: bool = Field(
        default=False, description="allow an address other than loopback without a token"
    )
    allowed_hosts: Annotated[tuple[_HostName, ...], BeforeValidator(_listed)] = Field(
        default=(),
        description="names by which clients may call this server, separated by commas, beside "
        "`localhost`, this host's own name, `host` and every IP address; `*.example` is any name "
        "below `example`, `*` any name. Without a token all others are refused; with a token only "
        "if this is set",
    )
    max_body_bytes: int = Field(
        default=16 * 1024 * 1024,
        ge=1,
        description="bytes of a request's body, at most; the default holds `max_tokens` tokens of "
        "ten digits each",
    )
    max_tokens: int = Field(default=1024 * 1024, ge=1, description="tokens of a request, at most")
    request_timeout_s: float = Field(
        default=30.0,
        gt=0,
        description="seconds for the body to arrive and, anew, for the reply",
    )
    idle_timeout_s: float = Field(
        default=75.0,
        gt=0,
        description="seconds after which a connection ends that has not sent a whole head",
    )
    shutdown_grace_s: float = Field(
        default=1.0, ge=0, description="seconds for requests in flight when the frontend stops"
    )

    def refuse_open_door(self) -> None:
        """Raises ConfigError for an address on the network without a token."""
        if self.token is None and not self.insecure and not is_loopback(self.host):
            raise ConfigError(
                f"the REST frontend would serve {self.host!r} to the network without a token",
                hint="Set LMCACHE_KIT_TOKEN or --token-file, listen on localhost, "
                "or accept the risk with --insecure",
            )


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach the address. Only `localhost` is such a name."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
