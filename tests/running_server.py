"""Run the HTTP server inside the test process. Importing this module requires httpx and the `serve` extra."""

from __future__ import annotations

import socket
import threading
import time
from typing import Any

import httpx
import uvicorn

from tinylm.model.state import DecodingModel
from tinylm.serving import server
from tinylm.tokenizer import Tokenizer

NAME = "tiny"


class RunningServer:
    """A server on a free port in a background thread."""

    def __init__(
        self, decoder: DecodingModel[Any], tokenizer: Tokenizer, limits: Any, api_key: str | None = None, **options: Any
    ) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        access = server.Access(("127.0.0.1", "localhost"), api_key)
        app = server.create_app(decoder, tokenizer, NAME, limits=limits, access=access, **options)
        protocol = app.state.connections.protocol
        self._server = uvicorn.Server(uvicorn.Config(app, http=protocol, log_level="error", lifespan="on"))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]})
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)

    def complete(self, **body: Any) -> Any:
        return httpx.post(f"{self.address}/v1/completions", json=body, timeout=60)

    def wait_until_idle(self, timeout: float = 5.0) -> bool:
        """Wait until no sample is running or queued. Return False after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            load = httpx.get(f"{self.address}/health").json()
            if load["generating"] == load["waiting"] == 0:
                return True
            time.sleep(0.02)
        return False

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join()
