"""A stand-in for vLLM's server: the recorded answers to the recorded requests, and no others."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

FILE = Path(__file__).parents[1] / "data" / "engine" / "qwen3_moe_http.json"


def exchanges(case: str) -> list[dict[str, Any]]:
    """What tools/engine/serve.py recorded of a case, turn by turn."""
    samples = json.loads(FILE.read_text(encoding="utf-8"))["samples"]
    (sample,) = [sample for sample in samples if sample["case"] == case]
    return list(sample.get("turns", [sample]))


@contextlib.contextmanager
def server() -> Iterator[str]:
    """Its address. What nobody recorded is answered by status 404."""
    known = [e for case in ("n=2", "multi-turn") for e in exchanges(case)]

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            found = [
                e["response"] for e in known if (e["path"], e["request"]) == (self.path, request)
            ]
            body = json.dumps(found[0] if found else {"error": "not recorded"}).encode()
            self.send_response(200 if found else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            """Nothing."""

    with HTTPServer(("127.0.0.1", 0), Handler) as served:
        thread = threading.Thread(target=served.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{served.server_port}"
        finally:
            served.shutdown()
            thread.join()
