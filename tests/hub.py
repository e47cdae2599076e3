"""A Hugging Face hub on this machine: after `from hub import serve_hub  # noqa: F401` it is the
fixture "hub"."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants


class Handler(BaseHTTPRequestHandler):
    """What hf_hub_download asks for: HEAD, then GET owner/repository/resolve/main/file."""

    def do_GET(self):
        self.server.asked.append(f"{self.command} {self.path}")
        name = self.path.lstrip("/").replace("/resolve/main/", "/")
        content = self.server.files.get(name, b"")
        if self.command == "GET":
            content = self.server.sent.get(name, content)
        self.send_response(200 if name in self.server.files else 404)
        if name not in self.server.files:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture(name="hub")
def serve_hub(monkeypatch, tmp_path):
    """hub.files["owner/repository/file"] = bytes; the user's cache is empty.

    hub.sent: what a GET request gets instead. hub.asked: the requests so far. hub.shutdown() and
    hub.server_close(): there is no network any more.
    """
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as hub:
        hub.files, hub.sent, hub.asked = {}, {}, []
        url = f"http://127.0.0.1:{hub.server_port}"
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", url)  # read when the library is imported
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_ENDPOINT", url)  # of a program that a test starts
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
        threading.Thread(target=hub.serve_forever, args=[0.01], daemon=True).start()
        yield hub
        hub.shutdown()
