# SPDX-License-Identifier: Apache-2.0
"""A stand-in for the Hub's HTTP API on the loopback address: as much of it as pushing and loading a model needs."""

import base64
import hashlib
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


ROOT = Path(__file__).parent.parent
TOKEN = "hf_stand_in"
USER = "user"


class Refusal(Exception):
    def __init__(self, status, code, message=""):
        self.status = status
        self.code = code
        self.message = message


class Hub:
    """Repositories in memory. Use as a context manager; `endpoint` is what `HF_ENDPOINT` has to say."""

    def __init__(self):
        self.repos = {}
        self.objects = {}
        self.requests = []
        self.server = ThreadingHTTPServer(
            ("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self})
        )
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        # Large files come from another host, as they do from the real one.
        self.storage = f"http://localhost:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home):
        """The environment of a process that takes this for the Hub, with its cache in `home`."""
        return {
            **{
                name: value
                for name, value in os.environ.items()
                if not name.startswith("HF_")
            },
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }

    def files(self, repo_id):
        """The content of a repository's latest commit, by path."""
        return {
            path: self.content(entry)
            for path, entry in self.repos[repo_id]["commits"][-1]["files"].items()
        }

    def content(self, entry):
        return self.objects[entry["lfs"]] if "lfs" in entry else entry["content"]


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def handle_any(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self.read_chunks()
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        try:
            for method, pattern, action in ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command in method.split():
                    return action(self, body, **match.groupdict())
            raise Refusal(404, "EntryNotFound", f"no route for {self.command} {path}")
        except Refusal as refusal:
            headers = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message}
            self.reply({"error": refusal.message}, refusal.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def read_chunks(self):
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def reply(self, content, status=200, headers=None):
        if not isinstance(content, bytes):
            content, headers = (
                json.dumps(content).encode(),
                {"Content-Type": "application/json", **(headers or {})},
            )
        self.send_response(status)
        for name, value in {
            "Content-Length": str(len(content)),
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def check_token(self):
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise Refusal(401, "", "Invalid username or password.")

    def repo(self, repo_id):
        repo = self.hub.repos.get(repo_id)
        # As the real one does, it does not tell a private repository from one that does not exist.
        if repo is None or (
            repo["private"] and self.headers.get("Authorization") != f"Bearer {TOKEN}"
        ):
            raise Refusal(401, "RepoNotFound", "Repository not found")
        return repo

    def commit(self, repo_id, revision):
        for commit in reversed(self.repo(repo_id)["commits"]):
            if revision in ("main", commit["oid"]):
                return commit
        raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    # What the routes do

    def whoami(self, body):
        self.check_token()
        self.reply(
            {
                "type": "user",
                "name": USER,
                "orgs": [],
                "auth": {"accessToken": {"role": "write"}},
            }
        )

    def create(self, body):
        self.check_token()
        request = json.loads(body)
        repo_id = f"{request.get('organization') or USER}/{request['name']}"
        url = {"url": f"{self.hub.endpoint}/{repo_id}", "name": repo_id}
        if repo_id in self.hub.repos:
            return self.reply(
                {**url, "error": "You already created this model repo"}, 409
            )
        private = request.get("visibility") == "private" or bool(request.get("private"))
        first = {"oid": hashlib.sha1(repo_id.encode()).hexdigest(), "files": {}}
        self.hub.repos[repo_id] = {"private": private, "commits": [first]}
        self.reply(url)

    def validate_yaml(self, body):
        self.reply({"errors": [], "warnings": []})

    def info(self, body, repo, revision="main"):
        commit = self.commit(repo, revision)
        siblings = [{"rfilename": path} for path in commit["files"]]
        about = {
            "private": self.repo(repo)["private"],
            "tags": [],
            "downloads": 0,
            "likes": 0,
        }
        self.reply(
            {
                "_id": repo,
                "id": repo,
                "modelId": repo,
                "sha": commit["oid"],
                "siblings": siblings,
                **about,
            }
        )

    def tree(self, body, repo, revision):
        files = self.commit(repo, revision)["files"]
        self.reply([self.entry(path, file) for path, file in files.items()])

    def entry(self, path, file):
        size = len(self.hub.content(file))
        entry = {"type": "file", "path": path, "size": size, "oid": file["etag"]}
        return (
            {**entry, "lfs": {"oid": file["lfs"], "size": size, "pointerSize": 1}}
            if "lfs" in file
            else entry
        )

    def preupload(self, body, repo, revision):
        self.check_token()
        self.repo(repo)
        large = (".safetensors", ".bin")
        files = [
            {
                "path": f["path"],
                "uploadMode": "lfs" if f["path"].endswith(large) else "regular",
                "shouldIgnore": False,
            }
            for f in json.loads(body)["files"]
        ]
        self.reply({"files": files})

    def lfs_batch(self, body, repo):
        self.check_token()
        self.repo(repo)
        objects = []
        for wanted in json.loads(body)["objects"]:
            upload = {"href": f"{self.hub.endpoint}/lfs/{wanted['oid']}", "header": {}}
            actions = (
                {}
                if wanted["oid"] in self.hub.objects
                else {"actions": {"upload": upload}}
            )
            objects.append({"oid": wanted["oid"], "size": wanted["size"], **actions})
        self.reply({"transfer": "basic", "objects": objects})

    def lfs_upload(self, body, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refusal(400, "", "The content does not have the announced hash")
        self.hub.objects[oid] = body
        self.reply(b"")

    def lfs_download(self, body, oid):
        self.reply(self.hub.objects[oid], headers={"ETag": f'"{oid}"'})

    def push(self, body, repo, revision):
        self.check_token()
        commits = self.repo(repo)["commits"]
        files = dict(commits[-1]["files"])
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                content = base64.b64decode(value["content"])
                files[value["path"]] = {
                    "content": content,
                    "etag": hashlib.sha1(content).hexdigest(),
                }
            elif item["key"] == "lfsFile":
                files[value["path"]] = {"lfs": value["oid"], "etag": value["oid"]}
            elif item["key"] == "deletedFile":
                files.pop(value["path"], None)
        oid = hashlib.sha1(body + commits[-1]["oid"].encode()).hexdigest()
        commits.append({"oid": oid, "files": files})
        url = f"{self.hub.endpoint}/{repo}/commit/{oid}"
        self.reply(
            {"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""}
        )

    def resolve(self, body, repo, revision, path):
        commit = self.commit(repo, revision)
        headers = {"X-Repo-Commit": commit["oid"]}
        if path not in commit["files"]:
            raise Refusal(404, "EntryNotFound", "Entry not found")
        file = commit["files"][path]
        headers["ETag"] = f'"{file["etag"]}"'
        if "lfs" not in file:
            return self.reply(file["content"], headers=headers)
        linked = {
            "X-Linked-ETag": f'"{file["lfs"]}"',
            "X-Linked-Size": str(len(self.hub.objects[file["lfs"]])),
        }
        self.reply(
            b"",
            302,
            {**headers, **linked, "Location": f"{self.hub.storage}/lfs/{file['lfs']}"},
        )


REPO = r"(?P<repo>[^/]+/[^/]+)"
REVISION = r"(?P<revision>[^/]+)"
ROUTES = [
    ("GET", r"/api/whoami-v2", Handler.whoami),
    ("POST", r"/api/repos/create", Handler.create),
    ("POST", r"/api/validate-yaml", Handler.validate_yaml),
    ("GET", rf"/api/models/{REPO}", Handler.info),
    ("GET", rf"/api/models/{REPO}/revision/{REVISION}", Handler.info),
    ("GET", rf"/api/models/{REPO}/tree/{REVISION}", Handler.tree),
    ("POST", rf"/api/models/{REPO}/preupload/{REVISION}", Handler.preupload),
    ("POST", rf"/api/models/{REPO}/commit/{REVISION}", Handler.push),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", r"/lfs/(?P<oid>\w+)", Handler.lfs_upload),
    ("GET HEAD", r"/lfs/(?P<oid>\w+)", Handler.lfs_download),
    ("GET HEAD", rf"/{REPO}/resolve/{REVISION}/(?P<path>.+)", Handler.resolve),
]
