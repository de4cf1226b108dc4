"""The fake server, started anew for every test."""

import threading
from collections.abc import Iterator

import pytest
from fake_server import FakeServer, Handler, HttpServer


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = FakeServer()
    http = HttpServer(("127.0.0.1", 0), type("Handler", (Handler,), {"fake": fake}))
    fake.port = http.server_port
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield fake
    http.shutdown()
    thread.join()
    http.server_close()
