"""A Hugging Face Hub on this machine that takes uploads as the real one does: preupload, LFS, commits on branches.

For as long as the `with` block lasts, the huggingface_hub of this process talks to it, with an empty cache. Uploads go
through LFS and not Xet, whose protocol is another.
"""

import base64
import hashlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from huggingface_hub import constants, hf_api

from tests.servers import Server, serving

TOKEN = "hf_of_the_test"


@dataclass
class Commit:
    """What one commit did, and what it said."""

    repo: str
    branch: str
    message: str
    paths: list[str]


@dataclass
class UploadHub:
    """What the Hub holds and what was done to it. A test may change any of it meanwhile."""

    url: str
    branches: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    """By repository, by branch: each file's content by its path."""
    visibility: dict[str, str | None] = field(default_factory=dict)
    commits: list[Commit] = field(default_factory=list)
    lfs: dict[str, bytes] = field(default_factory=dict)
    """What was put into large file storage, by its sha256."""
    requests: list[tuple[str, str]] = field(default_factory=list)
    """(method, path) in the order they came."""

    def make(self, repo: str, files: dict[str, bytes] | None = None) -> None:
        """A repository that is there already."""
        self.branches[repo] = {"main": dict(files or {})}

    def write(self, repo: str, folder: Path, branch: str = "main") -> Path:
        """The files of a branch, in a folder."""
        for name, content in self.branches[repo][branch].items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        return folder

    @property
    def changes(self) -> list[tuple[str, str]]:
        """The requests that change something."""
        return [(method, path) for method, path in self.requests if method not in ("GET", "HEAD")]


@contextmanager
def upload_hub() -> Iterator[UploadHub]:
    """An empty Hub."""
    with tempfile.TemporaryDirectory() as cache, pytest.MonkeyPatch.context() as patch, serving(_Request) as server:
        server.contents = UploadHub(f"http://127.0.0.1:{server.server_port}")
        url = server.contents.url
        patch.setattr(constants, "ENDPOINT", url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(constants, "HF_HUB_CACHE", cache)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(hf_api.api, "endpoint", url)
        patch.setenv("HF_TOKEN", TOKEN)
        yield server.contents


class _Request(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self):
        _, path = self._begin()
        match path.split("/"):
            case ["api", "models", owner, name]:
                self._info(f"{owner}/{name}", "main")
            case ["api", "models", owner, name, "revision", branch]:
                self._info(f"{owner}/{name}", branch)
            case ["api", "models", owner, name, "tree", branch]:
                self._tree(f"{owner}/{name}", branch)
            case [owner, name, "resolve", branch, *rest]:
                self._file(f"{owner}/{name}", branch, "/".join(rest))
            case _:
                self._refuse(404, "EntryNotFound")

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self):
        body, path = self._begin()
        if path == "api/validate-yaml":
            return self._answer(self._problems(json.loads(body)["content"]))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._refuse(401, "Unauthorized")
        match path.split("/"):
            case ["api", "repos", "create"]:
                return self._create(json.loads(body))
            case ["api", "models", owner, name, "branch", branch]:
                return self._branch(f"{owner}/{name}", branch)
            case ["api", "models", owner, name, "preupload", branch]:
                return self._preupload(f"{owner}/{name}", branch, json.loads(body)["files"])
            case ["api", "models", owner, name, "commit", branch]:
                return self._commit(f"{owner}/{name}", branch, [json.loads(line) for line in body.splitlines()])
            case [_, _, "info", "lfs", "objects", "batch"]:
                return self._lfs_batch(json.loads(body)["objects"])
            case ["lfs", oid, "verify"]:
                return self._answer({}, 200 if oid in self.hub.lfs else 404)
            case _:
                return self._refuse(404, "EntryNotFound")

    def do_PUT(self):
        body, path = self._begin()
        oid = path.removeprefix("lfs/")
        if hashlib.sha256(body).hexdigest() != oid:
            return self._refuse(400, "WrongHash")
        self.hub.lfs[oid] = body
        return self._answer({})

    @property
    def hub(self) -> UploadHub:
        return self.server.contents

    def _begin(self) -> tuple[bytes, str]:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = urlsplit(self.path).path.strip("/")
        self.hub.requests.append((self.command, unquote(path)))
        # A branch may have a slash in its name, which is quoted.
        return body, "/".join(unquote(part).replace("/", "%2F") for part in path.split("/"))

    def _files(self, repo: str, branch: str) -> dict[str, bytes] | None:
        """The files of a branch, or None once the request has been refused."""
        if repo not in self.hub.branches:
            self._refuse(404, "RepoNotFound")
        elif unquote(branch) not in self.hub.branches[repo]:
            self._refuse(404, "RevisionNotFound")
        else:
            return self.hub.branches[repo][unquote(branch)]
        return None

    def _info(self, repo: str, branch: str) -> None:
        if (files := self._files(repo, branch)) is not None:
            siblings = [{"rfilename": name} for name in sorted(files)]
            self._answer({"id": repo, "sha": _oid(files), "private": False, "tags": [], "siblings": siblings})

    def _tree(self, repo: str, branch: str) -> None:
        if (files := self._files(repo, branch)) is not None:
            sizes = {name: len(content) for name, content in sorted(files.items())}
            self._answer([{"type": "file", "path": name, "size": size, "oid": "0"} for name, size in sizes.items()])

    def _file(self, repo: str, branch: str, path: str) -> None:
        if (files := self._files(repo, branch)) is None:
            return None
        if path not in files:
            return self._refuse(404, "EntryNotFound")
        headers = {"ETag": f'"{hashlib.sha256(files[path]).hexdigest()}"', "X-Repo-Commit": _oid(files)}
        return self._answer(files[path], headers=headers)

    def _create(self, wanted: dict[str, Any]) -> None:
        repo = f"{wanted['organization']}/{wanted['name']}"
        url = f"{self.hub.url}/{repo}"
        if repo in self.hub.branches:
            return self._answer({"error": "You already created this model repo", "url": url}, 409)
        self.hub.make(repo)
        # Older clients send `private`.
        asked = {True: "private", False: "public", None: None}[wanted.get("private")]
        self.hub.visibility[repo] = wanted.get("visibility", asked)
        return self._answer({"url": url, "name": repo, "id": "0"})

    def _branch(self, repo: str, branch: str) -> None:
        if (files := self._files(repo, "main")) is not None:
            self.hub.branches[repo][unquote(branch)] = dict(files)
            self._answer({})

    def _preupload(self, repo: str, branch: str, files: list[dict[str, Any]]) -> None:
        if self._files(repo, branch) is not None:
            modes = {f["path"]: "lfs" if f["path"].endswith(".safetensors") else "regular" for f in files}
            known = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]
            self._answer({"files": known})

    def _lfs_batch(self, objects: list[dict[str, Any]]) -> None:
        answers = []
        for wanted in objects:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.lfs:
                href = f"{self.hub.url}/lfs/{wanted['oid']}"
                answer["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
            answers.append(answer)
        self._answer({"transfer": "basic", "objects": answers})

    def _commit(self, repo: str, branch: str, operations: list[dict[str, Any]]) -> None:
        if (files := self._files(repo, branch)) is None:
            return
        commit = Commit(repo, unquote(branch), operations[0]["value"]["summary"], [])
        for operation in operations[1:]:
            value = operation["value"]
            commit.paths.append(value["path"])
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.hub.lfs[value["oid"]]
            else:
                del files[value["path"]]
        self.hub.commits.append(commit)
        oid = _oid(files)
        self._answer({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo}/commit/{oid}"})

    def _problems(self, card: str) -> dict[str, Any]:
        """What the Hub has against a README's YAML: here, that it is none, or has no library."""
        _, front_matter, _ = card.split("---\n", 2)
        metadata = yaml.safe_load(front_matter)
        errors = [] if isinstance(metadata, dict) and "library_name" in metadata else [{"message": "no library_name"}]
        return {"errors": errors, "warnings": []}

    def _refuse(self, status: int, code: str) -> None:
        self._answer({"error": code}, status, {"X-Error-Code": code, "X-Error-Message": code})

    def _answer(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(value, bytes) else "application/json"
        for name, text in ({"Content-Type": kind, "Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any):
        """Nothing: a test's output is its own."""


def _oid(files: dict[str, bytes]) -> str:
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
