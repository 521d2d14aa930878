"""Where a server is, and short questions to it that are bounded in time and size."""

import contextlib
import http.client
import ssl
import time
import urllib.parse
from dataclasses import dataclass
from typing import Self

from lora_capacity.errors import InputError
from lora_capacity_profiling.errors import ServerError
from lora_capacity_profiling.secrets import without_user

MAX_BODY_BYTES = 64 * 1024**2
"""Longest body that is read: /metrics of a server that has served many combinations of adapters takes megabytes."""


@dataclass(frozen=True)
class Endpoint:
    """Address of a server.

    Attributes:
        host: Name or address.
        port: TCP port.
        tls: Whether the connection is encrypted.
        prefix: Path before the server's own paths, without a slash at its end.
    """

    host: str
    port: int
    tls: bool = False
    prefix: str = ""

    @classmethod
    def from_url(cls, url: str) -> Self:
        """Read an address such as ``http://127.0.0.1:8000``.

        Raises:
            InputError: If it is no such address.
        """
        allowed = "an address such as http://127.0.0.1:8000"
        try:
            parts = urllib.parse.urlsplit(url)
            port = parts.port
        except (ValueError, AttributeError):
            raise InputError("url", without_user(str(url)), allowed) from None
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise InputError("url", without_user(str(url)), allowed)
        if parts.username is not None or parts.password is not None:
            raise InputError("url", without_user(url), allowed, "users and passwords are not sent")
        tls = parts.scheme == "https"
        return cls(parts.hostname, port or (443 if tls else 80), tls, parts.path.rstrip("/").removesuffix("/v1"))

    @property
    def url(self) -> str:
        """The address as text."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.tls else 'http'}://{host}:{self.port}{self.prefix}"

    def get(self, path: str, *, timeout_s: float) -> tuple[int, bytes]:
        """Ask for a path and return status and body of the response.

        Args:
            path: Path on the server, beginning with a slash.
            timeout_s: Most seconds that this takes altogether.

        Raises:
            ServerError: If there is no answer in time, or none that is HTTP.
        """
        deadline = time.monotonic() + timeout_s
        connection: http.client.HTTPConnection
        if self.tls:
            context = ssl.create_default_context()
            connection = http.client.HTTPSConnection(self.host, self.port, timeout=timeout_s, context=context)
        else:
            connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout_s)
        with contextlib.closing(connection):
            try:
                connection.request("GET", self.prefix + path, headers={"Connection": "close"})
                response = connection.getresponse()
                return response.status, _body(response, connection, deadline)
            except TimeoutError:
                raise ServerError(f"{self.url}{path} did not answer within {timeout_s:g} s") from None
            except (OSError, http.client.HTTPException) as error:
                raise ServerError(f"{self.url}{path} cannot be reached: {_reason(error)}") from None


def _body(response: http.client.HTTPResponse, connection: http.client.HTTPConnection, deadline: float) -> bytes:
    """Read a body in pieces: the timeout of a socket starts anew with every piece."""
    pieces, size = [], 0
    while piece := response.read1(1 << 16):
        pieces.append(piece)
        size += len(piece)
        if size > MAX_BODY_BYTES:
            raise http.client.HTTPException(f"its answer is longer than {MAX_BODY_BYTES:,} bytes")
        if time.monotonic() > deadline:
            raise TimeoutError
        if connection.sock is not None:
            connection.sock.settimeout(max(deadline - time.monotonic(), 1e-3))
    return b"".join(pieces)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
