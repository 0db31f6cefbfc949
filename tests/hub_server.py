"""A small Hub on this machine: what huggingface_hub asks to make, fill and read repositories."""

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_the_tests"


class Hub(ThreadingHTTPServer):
    """The repositories, each with its files by revision, and what was asked for."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def put(self, repo: str, files: dict[str, bytes], revision: str = "main") -> None:
        """Commit files; the commit can be read by the name of the revision and by its hash."""
        revisions = self.repos.setdefault(repo, {"main": {}})
        now = {**revisions.get(revision, {}), **files}
        revisions[revision] = revisions[_commit(now)] = now


def _commit(files: dict[str, bytes]) -> str:
    said = b"".join(name.encode() + data for name, data in sorted(files.items()))
    return hashlib.sha1(said).hexdigest()


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._file()

    def do_GET(self) -> None:
        self._file()

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(f"POST {path}")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._say(401, {"error": "Invalid username or password."})
        if path == "/api/validate-yaml":
            return self._say(200, {"warnings": [], "errors": []})
        if path == "/api/repos/create":
            said = json.loads(body)
            repo = f"{said['organization'] or 'me'}/{said['name']}"
            known = repo in self.server.repos
            self.server.repos.setdefault(repo, {"main": {}})
            return self._say(409 if known else 200, {"url": f"{self.server.url}/{repo}"})
        _, _, _, user, name, action, revision = path.split("/")
        repo = f"{user}/{name}"
        if action == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for file in json.loads(body)["files"]
            ]
            return self._say(200, {"files": files})
        assert action == "commit"
        entries = [json.loads(line)["value"] for line in body.splitlines()]
        added = {e["path"]: base64.b64decode(e["content"]) for e in entries if "content" in e}
        self.server.put(repo, added, revision)
        commit = _commit(self.server.repos[repo][revision])
        url = f"{self.server.url}/{repo}/commit/{commit}"
        return self._say(200, {"success": True, "commitUrl": url, "commitOid": commit})

    def _file(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(f"{self.command} {path}")
        user, name, _, revision, file = path.strip("/").split("/", 4)
        revisions = self.server.repos.get(f"{user}/{name}")
        if revisions is None:
            return self._say(404, {"error": "Repository not found"}, code="RepoNotFound")
        if revision not in revisions:
            return self._say(404, {"error": "Invalid rev id"}, code="RevisionNotFound")
        files = revisions[revision]
        if file not in files:
            return self._say(404, {"error": "Entry not found"}, code="EntryNotFound")
        data = files[file]
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", _commit(files))
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)
        return None

    def _say(self, status: int, what: dict[str, Any], code: str = "") -> None:
        data = json.dumps(what).encode()
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
