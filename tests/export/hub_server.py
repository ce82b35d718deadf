"""A stand-in for the Hugging Face Hub on loopback: the endpoints that push, pull and the cache use, in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_stand-in"


class Hub:
    """Repositories: name -> list of (commit, files), newest last."""

    def __init__(self) -> None:
        self.repositories: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.private: set[str] = set()
        self.requests: list[str] = []

    def at(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commits = self.repositories.get(name, [])
        if revision == "main":
            return commits[-1] if commits else None
        return next((one for one in commits if one[0] == revision), None)

    def commit(self, name: str, lines: list[dict[str, Any]]) -> str:
        files = dict(self.repositories[name][-1][1]) if self.repositories[name] else {}
        for line in lines:
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        oid = hashlib.sha1(b"".join(files[path] for path in sorted(files)) + bytes([len(files)])).hexdigest()
        self.repositories[name].append((oid, files))
        return oid


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.split("?")[0]
        self.hub.requests.append(f"{self.command} {path}")
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if self.command == "POST":
            self._post(path, body) if known else self._json(401, {"error": "no login"})
            return
        found = re.fullmatch(
            r"/(?:api/models/)?([\w.-]+/[\w.-]+)(?:/(resolve|revision|tree)/([^/]+)(?:/(.*))?)?", path
        )
        name = found[1] if found else ""
        if found is None or name not in self.hub.repositories or (name in self.hub.private and not known):
            self._json(404 if known else 401, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return
        commit = self.hub.at(name, found[3] or "main")
        if commit is None:
            self._json(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
            return
        oid, files = commit
        if found[2] != "resolve":
            siblings = [{"rfilename": file, "size": len(content)} for file, content in files.items()]
            tree = [{"type": "file", "path": file, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for file, content in files.items()]  # fmt: skip
            info = {"id": name, "sha": oid, "siblings": siblings, "private": name in self.hub.private}
            self._json(200, tree if found[2] == "tree" else info)
        elif found[4] not in files:
            self._json(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        else:
            content = files[found[4]]
            headers = {"X-Repo-Commit": oid, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
            self._send(200, content, headers)

    def _post(self, path: str, body: bytes) -> None:
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            if name in self.hub.repositories:
                self._json(
                    409,
                    {"error": "You already created this model repo", "url": f"http://{self.headers['Host']}/{name}"},
                )
                return
            self.hub.repositories[name] = [("0" * 40, {})]
            if asked.get("private") or asked.get("visibility") == "private":
                self.hub.private.add(name)
            self._json(200, {"url": f"http://{self.headers['Host']}/{name}", "name": name})
        elif path == "/api/validate-yaml":
            self._json(200, {"errors": [], "warnings": []})
        elif found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/(preupload|commit)/main", path):
            if found[2] == "preupload":
                files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                         for file in json.loads(body)["files"]]  # fmt: skip
                self._json(200, {"files": files})
                return
            url = f"http://{self.headers['Host']}/{found[1]}"
            oid = self.hub.commit(found[1], [json.loads(line) for line in body.splitlines() if line])
            self._json(200, {"commitUrl": f"{url}/commit/{oid}", "commitOid": oid, "pullRequestUrl": None})
        else:
            self._json(404, {"error": f"the stand-in has no {path}"})

    def _json(self, code: int, value: Any, headers: dict[str, str] | None = None) -> None:
        self._send(code, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, code: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@contextmanager
def serving() -> Iterator[tuple[Hub, str]]:
    """The hub, and its address, as long as the block runs."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
