"""A W&B server on this machine, as far as a run needs one: it takes a run's rows in and remembers them.

`wandb sync` sends it what is in offline files: that is how W&B's own reader reads them.
"""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Server(ThreadingHTTPServer):
    """What it was sent: `history`, by run, the rows in their order; `configs`, by run. `refuses` answers every request with 401."""

    daemon_threads = True

    def __init__(self, refuses: bool = False) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.refuses, self.asked = refuses, 0
        self.history: dict[str, dict[int, dict[str, Any]]] = {}
        self.configs: dict[str, Any] = {}
        self._before: dict[str, int] = {}

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def rows(self, run: str) -> list[dict[str, Any]]:
        """The history of a run."""
        lines = self.history.get(run, {})
        return [lines[number] for number in sorted(lines)]

    def values(self, run: str, name: str) -> list[tuple[int, Any]]:
        """One value of it, with its steps."""
        return [(row["_step"], row[name]) for row in self.rows(run) if name in row]

    def take(self, run: str, files: Mapping[str, Any]) -> None:
        """Rows of a run; `offset` is the number of the first one."""
        part = files.get("wandb-history.jsonl")
        if part is not None:
            lines = self.history.setdefault(run, {})
            first = self._before.get(run, 0) + part["offset"]
            lines |= {first + index: json.loads(line) for index, line in enumerate(part["content"])}

    def sitting_ends(self) -> None:
        """What comes from here on is another sitting's, which counts its rows from 0 again."""
        self._before = {run: len(lines) for run, lines in self.history.items()}

    def answer(self, operation: str, variables: Mapping[str, Any]) -> dict[str, Any]:
        """The data that a GraphQL request is answered with."""
        run = {"id": "cnVu", "name": variables.get("name"), "displayName": variables.get("displayName"), "historyLineCount": 0}
        run |= {"project": {"id": "cA==", "name": variables.get("project"), "entity": {"id": "ZQ==", "name": "me"}}}
        if operation == "UpsertBucket":
            if variables.get("config"):
                self.configs[str(variables["name"])] = json.loads(variables["config"])
            return {"upsertBucket": {"bucket": run, "inserted": True}}
        if operation == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.url}/upload"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "cnVu", "uploadHeaders": [], "files": files}}
        return {}


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Server

    def log_message(self, *arguments: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        """Nothing can be had here."""
        self._reply(404, {})

    def do_PUT(self) -> None:
        """An uploaded file."""
        self.do_POST()

    def do_POST(self) -> None:
        """A GraphQL request, rows of a run, or a file."""
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        body = gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body
        self.server.asked += 1
        if self.server.refuses:
            self._reply(401, {"errors": [{"message": "user is not logged in"}]})
        elif self.path == "/graphql":
            request = json.loads(body)
            self._reply(200, {"data": self.server.answer(request.get("operationName", ""), request.get("variables") or {})})
        elif self.path.endswith("/file_stream"):
            self.server.take(self.path.split("/")[-2], json.loads(body).get("files") or {})
            self._reply(200, {})
        else:
            self._reply(200, {})

    def _reply(self, code: int, content: Any) -> None:
        data = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def serving(refuses: bool = False) -> Iterator[Server]:
    """A server that runs meanwhile."""
    server = Server(refuses)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def environment(server: Server, given: Mapping[str, str]) -> dict[str, str]:
    """A process's environment in which W&B is this server."""
    mine = {name: value for name, value in given.items() if not name.startswith("WANDB")}
    return mine | {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "0" * 40, "WANDB_ERROR_REPORTING": "false"}
