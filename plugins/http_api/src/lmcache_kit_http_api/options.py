"""Options of the REST frontend."""

from __future__ import annotations

import ipaddress
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, SecretStr, StringConstraints
from pydantic.functional_validators import AfterValidator

from lmcache_kit.errors import ConfigError


def _sendable(token: SecretStr) -> SecretStr:
    value = token.get_secret_value()
    if not value or not all("!" <= c <= "~" for c in value):
        raise ValueError("must be printable ASCII without spaces, and not empty")
    return token


class HttpOptions(BaseModel):
    """Where to listen, who may call, and how large a request may be.

    ``max_body_bytes`` holds ``max_tokens`` tokens of ten digits each. ``request_timeout_s`` is
    for the body to arrive and, anew, for the answer; ``shutdown_grace_s`` for requests in flight
    when the frontend stops.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: Annotated[str, StringConstraints(min_length=1)] = "localhost"
    port: int = Field(default=9000, ge=0, le=65535)
    token: Annotated[SecretStr, AfterValidator(_sendable)] | None = None
    insecure: bool = False
    max_body_bytes: int = Field(default=16 * 1024 * 1024, ge=1)
    max_tokens: int = Field(default=1024 * 1024, ge=1)
    request_timeout_s: float = Field(default=30.0, gt=0)
    shutdown_grace_s: float = Field(default=1.0, ge=0)

    def refuse_open_door(self) -> None:
        """Raises ConfigError when anyone on the network could call without a token."""
        if self.token is None and not self.insecure and not is_loopback(self.host):
            raise ConfigError(
                f"the REST frontend would serve {self.host!r} to the network without a token",
                hint="Set LMCACHE_KIT_TOKEN or --token-file, listen on localhost, "
                "or accept the risk with --insecure",
            )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address. Names other than localhost are not."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
