"""A stand-in for W&B's server on loopback: it keeps what clients send of runs, and can fall silent.

It answers the operations that wandb 0.31 asks for, as its client expects them: it shows what the client does,
not what W&B would.
"""

from __future__ import annotations

import gzip
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "a" * 40


class Server:
    """Runs by id: name, group, config, history and summary.

    Attributes:
        environment: what a client needs.
        silent: while it is set, requests are taken and never answered.
    """

    def __init__(self) -> None:
        self.runs: dict[str, dict[str, Any]] = {}
        self.silent, self._over = threading.Event(), threading.Event()
        handler = type("Handler", (_Handler,), {"server_of": self})
        self._server = _Quiet(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.environment = {
            "WANDB_MODE": "online",
            "WANDB_BASE_URL": self.url,
            "WANDB_API_KEY": KEY,
        }

    def stop(self) -> None:
        """Let go of everybody."""
        self._over.set()
        self._server.shutdown()
        self._server.server_close()

    def hold(self) -> bool:
        """Whether a request is not to be answered; it is kept until the end."""
        return self.silent.is_set() and self._over.wait()

    def history(self, run: str, name: str) -> list[Any]:
        """The values of a metric, as they were sent."""
        lines = [json.loads(line) for line in self.runs.get(run, {}).get("history", [])]
        return [line[name] for line in lines if name in line]

    def answer(self, operation: str, told: dict[str, Any]) -> dict[str, Any]:
        """Of GraphQL."""
        project = {"id": "p", "name": "p", "entity": {"id": "e", "name": "local"}}
        if operation == "UpsertBucket":
            run = self.runs.setdefault(told["name"], {"history": [], "summary": {}})
            kept = {
                k: told[k] for k in ("displayName", "groupName", "jobType", "tags") if told.get(k)
            }
            run |= kept | ({"config": json.loads(told["config"])} if told.get("config") else {})
            bucket = {
                "id": "r", "name": told["name"], "displayName": run.get("displayName"),
                "description": "", "config": told.get("config"), "sweepName": None,
                "project": project, "historyLineCount": len(run["history"]),
            }  # fmt: skip
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if operation == "CreateRunFiles":
            files = [{"name": f, "uploadUrl": f"{self.url}/file"} for f in told.get("files", [])]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        if operation == "Viewer":
            team = {"edges": [{"node": {"id": "t", "name": "local"}}]}
            viewer = {
                "id": "u",
                "entity": "local",
                "username": "local",
                "flags": "{}",
                "teams": team,
            }
            return {"viewer": {**viewer, "admin": False, "apiKeys": {"edges": []}}}
        if operation == "ServerFeaturesQuery":
            return {"serverInfo": {"features": []}}
        if operation == "RunResumeStatus":
            run = self.runs.get(told["name"])
            return {
                "model": {**project, "bucket": self._resumed(told["name"], run) if run else None}
            }
        return {}

    def _resumed(self, name: str, run: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": "r", "name": name, "displayName": run.get("displayName"), "tags": run.get("tags", []),
            "historyLineCount": len(run["history"]), "eventsLineCount": 0, "logLineCount": 0,
            "historyTail": json.dumps(run["history"][-1:]), "summaryMetrics": json.dumps(run["summary"]),
            "config": json.dumps(run.get("config", {})), "eventsTail": "[]", "wandbConfig": '{"t": 1}',
        }  # fmt: skip

    def stream(self, run: str, files: dict[str, Any]) -> None:
        """History and summary come in pieces, each with its first line's number."""
        kept = self.runs[run]
        if piece := files.get("wandb-history.jsonl"):
            kept["history"][piece["offset"] :] = piece["content"]
        if piece := files.get("wandb-summary.json"):
            kept["summary"] = json.loads(piece["content"][-1])


class _Quiet(ThreadingHTTPServer):
    def handle_error(self, *unused: Any) -> None:
        """Clients that hang up are no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_of: Server

    def log_message(self, *unused: Any) -> None:
        """Say nothing."""

    def _read(self) -> bytes:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        zipped = self.headers.get("Content-Encoding") == "gzip"
        return gzip.decompress(content) if zipped else content

    def _say(self, answer: Any) -> None:
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        if not self.server_of.hold():
            self._say({})

    def do_PUT(self) -> None:
        self._read()
        if not self.server_of.hold():
            self._say({})

    def do_POST(self) -> None:
        content = self._read()
        if self.server_of.hold():
            return
        known = self.path.endswith(("/graphql", "/file_stream"))
        asked = json.loads(content) if known else {}  # the client tells its own health, too
        if self.path.endswith("/graphql"):
            found = re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])
            operation = found[1] if found else ""
            self._say({"data": self.server_of.answer(operation, asked.get("variables") or {})})
            return
        if self.path.endswith("/file_stream"):
            self.server_of.stream(self.path.split("/")[-2], asked.get("files") or {})
        self._say({"exitcode": None, "limits": {}})
