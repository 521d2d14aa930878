"""Streaming completions over kept-alive HTTP connections, at a few microseconds a token.

A client that is slow makes the server look slow. This one is a protocol of asyncio rather than a stream: what the
socket delivers is parsed by httptools in one callback, and a request costs one future.
"""

import array
import asyncio
import json
import ssl
import time
from dataclasses import dataclass, field
from typing import Any, cast

import httptools

from lora_capacity_profiling.endpoint import Endpoint

_MAX_HEAD_BYTES = 64 * 1024
"""A hundred times the header that vLLM's server sends: what is longer must not fill the memory."""

_MAX_EVENT_BYTES = 1024**2
"""A thousand times the event of a token: what is longer does not come from vLLM, and must not fill the memory."""

_MAX_ERROR_BODY = 64 * 1024
"""Of an error's body; its message, of which a line is shown, stands at its beginning."""

_MAX_ERROR_CHARACTERS = 300
"""Of a message: about three lines of a terminal."""


class RequestFailed(Exception):
    """One request got no complete response; its text says why."""


@dataclass(eq=False, slots=True)
class Response:
    """What came back for one request; times of ``time.perf_counter``, NaN until then.

    Attributes:
        sent_s: When the request was handed to the socket.
        first_s: When its first token came.
        last_s: When its last token so far came.
        pieces: Pieces that came with tokens: most often one token each, more when the server falls behind.
        prompt_tokens: Prompt tokens that the server counted; 0 until it says so.
        output_tokens: Tokens that the server says it generated; likewise.
        piece_s: When each piece came, if asked for.
    """

    sent_s: float = float("nan")
    first_s: float = float("nan")
    last_s: float = float("nan")
    pieces: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    piece_s: "array.array[float] | None" = None


class _Connection(asyncio.Protocol):
    """One connection: writes a request, reads its response, and can do so again."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.usable = True
        self._done: asyncio.Future[None] | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._now_s = 0.0
        self._begin(Response())

    def _begin(self, response: Response) -> None:
        self.heard = False
        self._response = response
        self._status = 0
        self._head_bytes = 0
        self._keep = True
        self._told_end = False
        self._error_text = ""
        self._events = b""

    @property
    def reusable(self) -> bool:
        """Whether the last response has been read to its end, so that another request may follow."""
        return self.usable and self._done is not None and self._done.done() and not self._done.cancelled()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, error: Exception | None) -> None:
        self._break("the server closed the connection before the answer was complete")

    def send(self, request: bytes, response: Response) -> "asyncio.Future[None]":
        """Write a request; the future is done when its response is complete."""
        self._begin(response)
        self._done = asyncio.get_running_loop().create_future()
        response.sent_s = time.perf_counter()
        if self.transport is not None:
            self.transport.write(request)
        return self._done

    def close(self) -> None:
        """Close at once, dropping what is in flight."""
        self.usable = False
        if self.transport is not None:
            self.transport.abort()

    def data_received(self, data: bytes) -> None:
        self._now_s = time.perf_counter()
        if self._done is None or self._done.done():  # nothing was asked
            self.close()
            return
        self.heard = True
        try:
            self._parser.feed_data(data)  # calls the three methods below
            self._head_bytes += len(data)
            if not self._status and self._head_bytes > _MAX_HEAD_BYTES:
                raise ValueError("no end of the header")
        except (httptools.HttpParserError, ValueError) as error:
            # What a callback raises is the context of the parser's own exception.
            self._break(f"the answer is not what vLLM sends: {error.__context__ or error!r}")

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()
        self._keep = self._parser.should_keep_alive()

    def on_body(self, piece: bytes) -> None:
        if self._status != 200:
            self._error_text = (self._error_text + piece.decode(errors="replace"))[:_MAX_ERROR_BODY]
            return
        # vLLM sends an event a chunk (`completion_stream_generator`), but a proxy may cut elsewhere.
        *events, self._events = (self._events + piece).split(b"\n\n")
        if len(self._events) > _MAX_EVENT_BYTES:
            raise ValueError("a piece too long")
        for event in events:
            if event.startswith(b"data: {"):
                self._read_event(json.loads(event[6:]))
            elif event == b"data: [DONE]":
                self._told_end = True

    def on_message_complete(self) -> None:
        if not self._keep:
            self.close()
        if self._status != 200 or self._error_text:
            self._end(f"the server answered {self._status}: {_shorten(self._error_text)}")
        else:
            self._end("" if self._told_end else "the answer stopped before it said that it was complete")

    def _read_event(self, event: dict[str, Any]) -> None:
        response, now_s = self._response, self._now_s
        if event.get("choices"):
            if not response.pieces:
                response.first_s = now_s
            response.last_s = now_s
            response.pieces += 1
            if response.piece_s is not None:
                response.piece_s.append(now_s)
        if usage := event.get("usage"):
            response.prompt_tokens = int(usage["prompt_tokens"])
            response.output_tokens = int(usage["completion_tokens"])
        if error := event.get("error"):
            self._error_text = json.dumps(error)

    def _break(self, why: str) -> None:
        self.close()
        self._end(why)

    def _end(self, failure: str) -> None:
        if self._done is not None and not self._done.done():
            if failure:
                self._done.set_exception(RequestFailed(failure))
            else:
                self._done.set_result(None)


@dataclass(eq=False)
class Client:
    """Connections to one server, kept between requests; to be closed when done.

    Attributes:
        endpoint: The server.
        connect_timeout_s: Most seconds for a connection to be made.
        opened: Connections made so far.
    """

    endpoint: Endpoint
    connect_timeout_s: float = 30.0
    opened: int = 0
    _idle: list[_Connection] = field(default_factory=list, repr=False)
    _all: set[_Connection] = field(default_factory=set, repr=False)

    async def complete(self, request: bytes, response: Response) -> None:
        """Send a request and wait for its response.

        Args:
            request: As :meth:`completion_request` makes it.
            response: Filled as the response comes in.

        Raises:
            RequestFailed: If there is no connection, or no complete and good response.
        """
        again = True
        while again:
            connection, used_before = await self._connection()
            again = False
            try:
                await connection.send(request, response)
            except RequestFailed:
                # A server closes what is idle for long; that is found out only by writing to it.
                again = used_before and not connection.heard
                if not again:
                    raise
            finally:
                self._put_back(connection)

    def completion_request(self, model: str, prompt: str, output_tokens: int) -> bytes:
        """Return a request for a streamed completion of an exact length.

        ``ignore_eos`` alone makes it so. ``min_tokens`` would too, but adds work to every step of the server, which the
        traffic that is imitated does not. Special tokens are not skipped: a server sends nothing for a token without
        text, and a model made to go on past its end generates many.

        Args:
            model: Name of the model or adapter.
            prompt: Token numbers with commas between.
            output_tokens: Tokens to generate, whatever the model would rather do.
        """
        body = (
            f'{{"model":{json.dumps(model)},"prompt":[{prompt}],"max_tokens":{output_tokens},'
            '"ignore_eos":true,"skip_special_tokens":false,"temperature":0.0,"stream":true,'
            '"stream_options":{"include_usage":true}}'
        ).encode()
        head = (
            f"POST {self.endpoint.prefix}/v1/completions HTTP/1.1\r\n"
            f"Host: {self.endpoint.host}:{self.endpoint.port}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body

    def close(self) -> None:
        """Close all connections at once; a server takes that as a wish to abort what still runs."""
        for connection in self._all:
            connection.close()
        self._all.clear()
        self._idle.clear()

    def _put_back(self, connection: _Connection) -> None:
        if connection.reusable:
            self._idle.append(connection)
        else:
            connection.close()
            self._all.discard(connection)

    async def _connection(self) -> tuple[_Connection, bool]:
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                return connection, True
            self._all.discard(connection)
        context = ssl.create_default_context() if self.endpoint.tls else None
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self.connect_timeout_s):
                _, connection = await loop.create_connection(
                    _Connection, self.endpoint.host, self.endpoint.port, ssl=context
                )
        except (OSError, TimeoutError) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise RequestFailed(f"no connection: {reason}") from None
        self.opened += 1
        self._all.add(connection)
        return connection, False


def _shorten(text: str) -> str:
    try:
        content = json.loads(text)
        content = content.get("error", content)
        text = str(content.get("message", content))
    except (ValueError, AttributeError):
        pass
    text = " ".join(text.split())
    return text if len(text) <= _MAX_ERROR_CHARACTERS else f"{text[: _MAX_ERROR_CHARACTERS - 3]}..."
