import asyncio
import contextlib
import math
import socket
import threading
import time
from collections.abc import Sequence

import pytest
from lora_capacity_profiling.client import Client, RequestFailed, Response
from lora_capacity_profiling.endpoint import Endpoint

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
TOKEN = b'data: {"id":"c","choices":[{"index":0,"text":" w343\\u00e9","finish_reason":null}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":3,"total_tokens":5,"completion_tokens":2}}\n\n'
DONE = b"data: [DONE]\n\n"


def chunks(*pieces: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


def ask(sent: Sequence[bytes], times: int = 1) -> tuple[Response, Client]:
    """Ask a server, which answers with these bytes and closes, so many times; return the last response."""

    def respond(listener: socket.socket) -> None:
        for _ in range(times):
            connection, _ = listener.accept()
            with connection, contextlib.suppress(ConnectionError):
                connection.recv(1 << 16)
                for piece in sent:
                    connection.sendall(piece)
                    time.sleep(0.001)

    async def run(endpoint: Endpoint) -> tuple[Response, Client]:
        client = Client(endpoint)
        try:
            for _ in range(times):
                response = Response()
                await client.complete(client.completion_request("m", "4,5,6", 2), response)
        finally:
            client.close()
            await asyncio.sleep(0)
        return response, client

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(30)
        thread = threading.Thread(target=respond, args=[listener])
        thread.start()
        try:
            return asyncio.run(asyncio.wait_for(run(Endpoint(*listener.getsockname())), 30))
        finally:
            thread.join()


WHOLE = HEAD + chunks(TOKEN, TOKEN, USAGE, DONE)


@pytest.mark.parametrize("size", [1, 7, 100, len(WHOLE)])
def test_answer_is_the_same_however_it_is_cut(size: int) -> None:
    response, _ = ask([WHOLE[at : at + size] for at in range(0, len(WHOLE), size)])
    assert (response.pieces, response.prompt_tokens, response.output_tokens) == (2, 3, 2)
    assert response.sent_s < response.first_s <= response.last_s


def test_events_need_not_keep_to_chunks() -> None:
    stream = TOKEN + b": a comment\n\n" + TOKEN + USAGE + DONE
    response, _ = ask([HEAD + chunks(stream[:10], stream[10:200], stream[200:])])
    assert (response.pieces, response.output_tokens) == (2, 2)


def test_connection_that_the_server_closed_is_made_anew() -> None:
    response, client = ask([WHOLE], times=3)
    assert response.pieces == 2
    assert client.opened == 3


@pytest.mark.parametrize(
    ("sent", "text"),
    [
        (b"", "the server closed the connection before the answer was complete"),
        (HEAD + chunks(TOKEN, TOKEN)[:-5], "the server closed the connection before the answer was complete"),
        (HEAD + chunks(TOKEN, TOKEN), "the answer stopped before it said that it was complete"),
        (HEAD + b"zz\r\n", "the answer is not what vLLM sends"),
        (HEAD + chunks(b"data: {oops}\n\n"), "the answer is not what vLLM sends"),
        (HEAD + b"7fffffff\r\n" + b"x" * (2 << 20), "a piece too long"),
        (b"SSH-2.0-OpenSSH_9.6\r\n\r\n", "the answer is not what vLLM sends"),
        (b"x" * 200_000, "the answer is not what vLLM sends"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 200_000, "no end of the header"),
        (WHOLE[:-5], "the server closed the connection before the answer was complete"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + TOKEN, "the server closed the connection before the answer was complete"),
        (
            HEAD + chunks(TOKEN, b'data: {"error":{"message":"EngineCore died","code":500}}\n\n', DONE),
            "the server answered 200: EngineCore died",
        ),
        (
            b'HTTP/1.1 404 X\r\nContent-Length: 47\r\n\r\n{"error":{"message":"The model `m`\\n is no more"}}',
            "the server answered 404: ",
        ),
        (b"HTTP/1.1 500 X\r\nContent-Length: 5\r\n\r\nboom!", "the server answered 500: boom!"),
        (b"HTTP/1.1 503 X\r\nContent-Length: 0\r\n\r\n", "the server answered 503: "),
    ],
)
def test_bad_answer_is_told_in_one_line(sent: bytes, text: str) -> None:
    with pytest.raises(RequestFailed) as error:
        ask([sent])
    assert text in str(error.value)
    assert "\n" not in str(error.value)


def test_no_server_is_told() -> None:
    async def run() -> Response:
        response = Response()
        with pytest.raises(RequestFailed, match="no connection: "):
            await Client(Endpoint("127.0.0.1", 1)).complete(b"", response)
        return response

    assert math.isnan(asyncio.run(run()).sent_s)
