"""A Hugging Face Hub and a W&B server on this machine, for tests of what is downloaded and uploaded.

Both speak real HTTP to the real clients, which cannot tell them from the services but by their contents. For as long as
the `with` block lasts the clients of this process are pointed at the server, with an empty cache; programs started inside
the block inherit it through their environment.
"""

import base64
import hashlib
import json
import re
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote, unquote, urlsplit

import psutil
import pytest
import wandb
from huggingface_hub import constants, hf_api

WANDB_API_KEY = "0123456789abcdef" * 2 + "01234567"
_OPERATION = re.compile(r"\b(?:query|mutation)\s+(\w+)")


@dataclass
class Hub:
    """What a Hub that a test runs against holds, and what was asked of it. A test may change any of it meanwhile."""

    url: str
    cache: Path
    """Where huggingface_hub keeps what it downloads from it."""
    files: dict[str, bytes]
    """`owner/repo/path` to content; uploads arrive here. A repository exists where it has a file, or is in `repos`."""
    repos: set[str] = field(default_factory=set)
    cut_short: set[str] = field(default_factory=set)
    """Files whose connection breaks in the middle."""
    requests: list[tuple[str, str]] = field(default_factory=list)
    """(method, path) in the order they came."""

    def downloads(self) -> list[str]:
        """The paths whose content was asked for, once for each time."""
        return [path for method, path in self.requests if method == "GET" and "/resolve/" in path]

    @property
    def commit(self) -> str:
        """The revision that the files, as they are now, stand for: 40 hexadecimal digits."""
        digests = {name: hashlib.sha256(content).hexdigest() for name, content in self.files.items()}
        return hashlib.sha1(json.dumps(digests, sort_keys=True).encode()).hexdigest()


@dataclass
class WandbServer:
    """What a W&B server that a test runs against holds, and what was asked of it. A test may change any of it meanwhile."""

    url: str
    runs: dict[str, dict[str, bytes]]
    """`entity/project/run` to its files, by the name that they are stored under (which may have folders)."""
    states: dict[str, str] = field(default_factory=dict)
    """A run's state where it is not "finished"."""
    cut_short: set[str] = field(default_factory=set)
    """Stored names whose connection breaks in the middle."""
    missing: set[str] = field(default_factory=set)
    """Stored names that are listed, and not there when asked for."""
    requests: list[tuple[str, str]] = field(default_factory=list)
    """(GraphQL operation or method, path) in the order they came."""
    taken: dict[str, str] = field(default_factory=dict)
    """The runs that clients have begun, in the order they came: their ids, and the names they are shown by."""
    stop: Callable[[], None] = lambda: None
    """Go away, in the midst of whatever is asked."""

    def downloads(self) -> list[str]:
        """The stored names whose content was asked for, once for each time."""
        return [path.split("/", 5)[5] for method, path in self.requests if method == "GET"]


@contextmanager
def hub(files: Mapping[str, bytes]) -> Iterator[Hub]:
    """A Hugging Face Hub that serves `files`, named `owner/repo/path`, and takes uploads."""
    with tempfile.TemporaryDirectory() as cache, serving(_HubRequest) as server, pytest.MonkeyPatch.context() as patch:
        url = f"http://127.0.0.1:{server.server_port}"
        server.contents = Hub(url, Path(cache), dict(files))
        # huggingface_hub reads its environment once, when it is first imported.
        patch.setattr(constants, "ENDPOINT", url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(constants, "HF_HUB_CACHE", cache)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(hf_api.api, "endpoint", url)
        # transformers has one of its own, which it makes when it first asks.
        patch.setattr("transformers.utils.hub._hf_api", None, raising=False)
        for name, value in {
            "HF_ENDPOINT": url,
            "HF_HUB_CACHE": cache,
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": "hf_any",
        }.items():
            patch.setenv(name, value)
        yield server.contents


@contextmanager
def wandb_server(runs: Mapping[str, Mapping[str, bytes]]) -> Iterator[WandbServer]:
    """A W&B server with `runs`, named `entity/project/run`, each with its files, that takes the figures of new ones."""
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(_WandbRequest) as server,
        pytest.MonkeyPatch.context() as patch,
    ):
        url = f"http://127.0.0.1:{server.server_port}"
        server.contents = WandbServer(url, {run: dict(files) for run, files in runs.items()}, stop=server.stop)
        patch.setenv("WANDB_BASE_URL", url)
        patch.setenv("WANDB_API_KEY", WANDB_API_KEY)
        # Its client makes a folder for every run it looks at, and writes a log.
        patch.setenv("WANDB_DIR", folder)
        patch.setenv("WANDB_CACHE_DIR", folder)
        forget_wandb()
        try:
            yield server.contents
        finally:
            forget_wandb()


def forget_wandb() -> None:
    """Have W&B's client forget its server, which else it asks as long as the process lives.

    Its service may go on asking a server that is gone, for hours, and the client would wait for it.
    """
    services = [one for one in psutil.Process().children() if one.name() == "wandb-core"]
    kills = [threading.Timer(3, service.kill) for service in services]
    for kill in kills:
        kill.start()
    wandb.teardown()
    for kill in kills:
        kill.cancel()


# What some W&B servers have and others lack, by the operation that asks for it.
_NOT_HERE = {"OrganizationCoreWeaveOrganizationID": "entity", "ServerFeaturesQuery": "serverInfo"}


class Server(ThreadingHTTPServer):
    daemon_threads = True
    contents: Any

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self._connections: list[socket.socket] = []

    def process_request(self, request: Any, client_address: Any):
        self._connections.append(request)
        super().process_request(request, client_address)

    def stop(self):
        """Take no more connections, and break off those there are."""
        self.shutdown()
        self.server_close()
        for connection in self._connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


@contextmanager
def serving(request: type[BaseHTTPRequestHandler]) -> Iterator[Server]:
    """A server of such requests on a port of its own, stopped on exit."""
    server = Server(("127.0.0.1", 0), request)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join()


class _Request(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(
        self, content: bytes, status: int = 200, headers: Mapping[str, str] | None = None, cut_short: bool = False
    ):
        """Send `content`, or the first half of it, if the connection is to break."""
        self.send_response(status)
        for name, value in ({"Content-Type": "application/octet-stream"} | dict(headers or {})).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut_short else content)
        self.close_connection = self.close_connection or cut_short

    def answer_json(self, value: Any, status: int = 200, headers: Mapping[str, str] | None = None):
        self.answer(json.dumps(value).encode(), status, {"Content-Type": "application/json"} | dict(headers or {}))

    def log_message(self, format: str, *args: Any):
        """Nothing: a test's output is its own."""


class _HubRequest(_Request):
    @property
    def hub(self) -> Hub:
        return cast(Server, self.server).contents

    def do_GET(self):
        path = unquote(urlsplit(self.path).path).strip("/")
        self.hub.requests.append((self.command, path))
        if path.startswith("api/models/"):
            return self._repository("/".join(path.split("/")[2:4]))
        owner, repo, *rest = path.split("/")
        if len(rest) < 3 or rest[0] != "resolve":
            return self._not_found("EntryNotFound")
        return self._file(f"{owner}/{repo}", "/".join(rest[2:]))

    def do_HEAD(self):
        self.do_GET()

    def do_POST(self):
        path = unquote(urlsplit(self.path).path).strip("/")
        body = self.body()
        self.hub.requests.append((self.command, path))
        if path == "api/validate-yaml":
            return self.answer_json({"errors": [], "warnings": []})
        if path == "api/repos/create":
            wanted = json.loads(body)
            repo = f"{wanted['organization']}/{wanted['name']}"
            self.hub.repos.add(repo)
            return self.answer_json({"url": f"{self.hub.url}/{repo}", "name": repo, "id": "0"})
        _, _, owner, name, action, _ = path.split("/", 5)
        repo = f"{owner}/{name}"
        if not self._has(repo):
            return self._not_found("RepoNotFound")
        return self._preupload(json.loads(body)) if action == "preupload" else self._commit(repo, body)

    def _preupload(self, wanted: Mapping[str, Any]):
        """Every file may come inside the commit, which spares the test a store for large files."""
        modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in wanted["files"]]
        return self.answer_json({"files": modes})

    def _commit(self, repo: str, body: bytes):
        for operation in map(json.loads, body.splitlines()):
            if operation["key"] == "file":
                content = base64.b64decode(operation["value"]["content"])
                self.hub.files[f"{repo}/{operation['value']['path']}"] = content
        commit_url = f"{self.hub.url}/{repo}/commit/{self.hub.commit}"
        return self.answer_json({"success": True, "commitOid": self.hub.commit, "commitUrl": commit_url})

    def _has(self, repo: str) -> bool:
        return repo in self.hub.repos or any(name.startswith(f"{repo}/") for name in self.hub.files)

    def _repository(self, repo: str):
        if not self._has(repo):
            return self._not_found("RepoNotFound")
        return self.answer_json({"id": repo, "sha": self.hub.commit, "private": False, "tags": []})

    def _file(self, repo: str, path: str):
        content = self.hub.files.get(f"{repo}/{path}")
        if content is None:
            return self._not_found("EntryNotFound" if self._has(repo) else "RepoNotFound")
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": self.hub.commit}
        cut_short = f"{repo}/{path}" in self.hub.cut_short
        start = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0]
        if start == "0":
            return self.answer(content, headers=headers, cut_short=cut_short)
        headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        return self.answer(content[int(start) :], 206, headers, cut_short)

    def _not_found(self, code: str):
        headers = {"X-Error-Code": code, "X-Error-Message": code, "X-Repo-Commit": self.hub.commit}
        # As the Hub has it: who is not logged in must not learn which repositories exist.
        return self.answer_json({"error": code}, 401 if code == "RepoNotFound" else 404, headers)


class _WandbRequest(_Request):
    @property
    def wandb(self) -> WandbServer:
        return cast(Server, self.server).contents

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.wandb.requests.append((self.command, path))
        if path == "/":
            return self.answer(b"W&B")
        _, _, entity, project, run, name = path.split("/", 5)
        content = self.wandb.runs.get(f"{entity}/{project}/{run}", {}).get(name)
        if content is None or name in self.wandb.missing:
            return self.answer(b"no such file", 404)
        return self.answer(content, cut_short=name in self.wandb.cut_short)

    def do_POST(self):
        body = self.body()
        path = urlsplit(self.path).path
        if path.startswith("/sdk/"):
            # The client's own telemetry comes when it likes, from an earlier test's client too: it asks nothing of us.
            return self.answer(b"")
        if path != "/graphql":
            self.wandb.requests.append((self.command, path))
            return self.answer_json({"exitcode": None, "limits": {}}) if "file_stream" in path else self.answer(b"")
        asked = json.loads(body)
        operation, variables = _OPERATION.findall(asked["query"])[0], asked.get("variables") or {}
        self.wandb.requests.append((operation, "/graphql"))
        if operation in ("Viewer", "GetDefaultEntity"):
            return self.answer_json({"data": {"viewer": self._viewer()}})
        if operation == "UpsertBucket":
            return self.answer_json({"data": {"upsertBucket": self._taken(variables)}})
        if operation in _NOT_HERE:
            return self.answer_json({"data": {_NOT_HERE[operation]: None}})
        path = "/".join(str(variables.get(part)) for part in ("entity", "project", "name"))
        answers = {"Run": self._run, "RunFiles": self._files}
        if operation not in answers:
            return self.answer_json({"errors": [{"message": f"this server does not know {operation}"}]}, 400)
        run = answers[operation](path, variables) if path in self.wandb.runs else None
        return self.answer_json({"data": {"project": {"run": run} if run else None}})

    def _viewer(self) -> dict[str, Any] | None:
        key = base64.b64decode(self.headers.get("Authorization", "Basic ").split()[-1]).decode().removeprefix("api:")
        if key != WANDB_API_KEY:
            return None
        return {"id": "1", "entity": "me", "username": "me", "email": "", "flags": "{}", "teams": {"edges": []}}

    def _taken(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        """What a client is told of a run that it begins."""
        # What is told later of the same run does not name it again.
        name = self.wandb.taken.setdefault(variables["name"], variables.get("displayName") or variables["name"])
        project = {"id": "1", "name": variables.get("project"), "entity": {"id": "1", "name": "me"}}
        nulls = dict.fromkeys(("description", "sweepName"))
        bucket = {"id": variables["name"], "name": variables["name"], "displayName": name, "config": "{}", **nulls}
        return {"bucket": {**bucket, "project": project, "historyLineCount": 0}, "inserted": True}

    def _run(self, path: str, variables: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "id": "1",
            "projectId": "1",
            "name": variables["name"],
            "displayName": variables["name"],
            "state": self.wandb.states.get(path, "finished"),
            "user": {"name": "Me", "username": "me"},
            **dict.fromkeys(("config", "systemMetrics", "summaryMetrics"), "{}"),
            **dict.fromkeys(("description", "notes", "group", "jobType", "commit", "sweepName", "historyKeys")),
        }

    def _files(self, path: str, variables: Mapping[str, Any]) -> dict[str, Any]:
        """A page of the run's files; the cursor is how many came before."""
        names, first = sorted(self.wandb.runs[path]), int(variables.get("fileCursor") or 0)
        page = names[first : first + (variables.get("fileLimit") or 50)]
        edges = [
            {"node": self._node(path, name), "cursor": str(index)} for index, name in enumerate(page, start=first + 1)
        ]
        last = str(first + len(page))
        page_info = {"endCursor": last, "hasNextPage": int(last) < len(names)}
        return {"fileCount": len(names), "files": {"edges": edges, "pageInfo": page_info}}

    def _node(self, path: str, name: str) -> dict[str, Any]:
        url = f"{self.wandb.url}/files/{path}/{quote(name)}"
        size, nulls = len(self.wandb.runs[path][name]), dict.fromkeys(("mimetype", "updatedAt", "md5"))
        return {"id": name, "name": name, "url": url, "directUrl": url, "sizeBytes": size, **nulls}
