"""push_to_hub makes its real calls: a stub of the hub on the loopback interface takes them."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from loading_helpers import logits

import whit

from tiny_models import ARCHITECTURES, save_tiny

PUSH = """
import sys, whit
from transformers import AutoModelForCausalLM
config = whit.QuantizationConfig("int4-g32")
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=config)
model.push_to_hub("someone/small-whit", token="hf_test")
"""


class Stub(BaseHTTPRequestHandler):
    """As much of the hub as one commit of small files needs."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.answer({"error": "Entry not found"}, 404)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.paths.append(self.path)
        if self.path.endswith("/repos/create"):
            self.answer({"url": self.url(), "name": "someone/small-whit", "id": "1"})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            self.answer({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer({"commitUrl": f"{self.url()}/commit/1", "commitOid": "1", "pullRequestUrl": None})
        else:
            self.answer({"errors": [], "warnings": []})

    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}/someone/small-whit"

    def answer(self, value: object, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        if status == 404:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else data)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    server.files, server.paths = {}, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def test_push_to_hub(hub: ThreadingHTTPServer, tmp_path: Path):
    original = save_tiny(tmp_path / "original", "llama")
    local = {k: v for k, v in os.environ.items() if "proxy" not in k.lower() and k != "HF_HUB_OFFLINE"}
    local |= {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", PUSH, str(original)], env=local, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {"config.json", "model.safetensors", "README.md"} <= set(hub.files)
    pulled = tmp_path / "pulled"
    pulled.mkdir()
    for name, content in hub.files.items():
        (pulled / name).write_bytes(content)
    model_class, config = ARCHITECTURES["llama"][0], whit.QuantizationConfig("int4-g32")
    wanted = model_class.from_pretrained(original, quantization_config=config)
    assert torch.equal(logits(model_class.from_pretrained(pulled), "llama"), logits(wanted, "llama"))
