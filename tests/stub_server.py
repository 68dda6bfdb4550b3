"""A model hub on localhost: enough of Hugging Face's, ModelScope's and GitHub's file APIs for tests.

    with StubHub(models={"BAAI/bge-m3": {"config.json": b"{}"}}) as hub:
        os.environ["HF_ENDPOINT"] = hub.url
        ...
        hub.truncate["pytorch_model.bin"] = 1000    # the connection ends after byte 1000
        hub.corrupt.add("tokenizer.json")           # right length, wrong bytes
        hub.errors["colbert_linear.pt"] = 500       # requests with this in their path are answered 500
    hub.down = True                             # every request is answered 503
        hub.requests                                # [("GET", "/BAAI/bge-m3/resolve/…", "bytes=1000-"), …]

One server answers for all three hosts; a test that needs one of them down starts one server for each.
"""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

MAX_REQUESTS = 300  # a client that retries for ever gets 500 from here on, and the test ends


class StubHub:
    """Serve `models` and `datasets` ({repo: {file: bytes}}) and `raw` ({url path: bytes})."""

    def __init__(self, models=None, datasets=None, raw=None):
        self.repos = {"models": models or {}, "datasets": datasets or {}}
        self.raw = raw or {}
        self.truncate = {}
        self.corrupt = set()
        self.errors = {}
        self.down = False
        self.requests = []

    def __enter__(self):
        hub = self

        class Handler(_Handler):
            stub = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *exc_info):
        self._server.shutdown()
        self._server.server_close()

    def asked_for(self, part):
        """The requests whose path holds `part`, as (method, path, Range header)."""
        return [request for request in self.requests if part in request[1]]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    stub = None

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self._answer()

    def log_message(self, *args):
        pass

    def _answer(self):
        stub = self.stub
        stub.requests.append((self.command, self.path, self.headers.get("Range")))
        if stub.down:
            return self._send(503, b"down for a test", "text/plain")
        if len(stub.requests) > MAX_REQUESTS:
            return self._send(500, b"too many requests for a test", "text/plain")
        for part, status in stub.errors.items():
            if part in self.path:
                return self._send(status, b"an error for a test", "text/plain")
        url = urlsplit(self.path)
        path, query = unquote(url.path), {key: values[0] for key, values in parse_qs(url.query).items()}
        if path == "/":
            return self._send(200, b"stub", "text/plain")
        if path in stub.raw:
            return self._send_file(path.rsplit("/", 1)[-1], stub.raw[path])
        if path.startswith("/api/v1/"):
            return self._modelscope(path.removeprefix("/api/v1/"), query)
        if path.startswith("/api/"):
            return self._hf_api(path.removeprefix("/api/"))
        return self._hf_resolve(path)

    # ------------------------------------------------------------------------------------- Hugging Face

    def _hf_api(self, path):
        """/api/{models,datasets}/OWNER/NAME/{tree,revision}/REVISION"""
        kind, owner, name, action, revision, *_ = [*path.split("/"), *[""] * 5]
        files = self.stub.repos.get(kind, {}).get(f"{owner}/{name}")
        if files is None or action not in ("tree", "revision"):
            return self._send(404, b"{}", headers={"X-Error-Code": "RepoNotFound"})
        if action == "revision":
            siblings = [{"rfilename": path} for path in files]
            return self._send_json({"id": f"{owner}/{name}", "sha": revision, "siblings": siblings})
        return self._send_json([_hf_entry(path, data) for path, data in files.items()])

    def _hf_resolve(self, path):
        """/[datasets/]OWNER/NAME/resolve/REVISION/FILE"""
        kind, path = ("datasets", path[10:]) if path.startswith("/datasets/") else ("models", path[1:])
        repo, _, rest = path.partition("/resolve/")
        revision, _, name = rest.partition("/")
        data = self.stub.repos[kind].get(repo, {}).get(name)
        if data is None:
            return self._send(404, b"", headers={"X-Error-Code": "EntryNotFound", "X-Repo-Commit": revision})
        return self._send_file(name, data, {"X-Repo-Commit": revision, "ETag": f'"{_sha256(data)}"'})

    # --------------------------------------------------------------------------------------- ModelScope

    def _modelscope(self, path, query):
        """/api/v1/{models,datasets}/OWNER/NAME/{repo/files,repo/tree,repo}"""
        if path == "repos/internalAccelerationInfo":
            return self._send_json({"Code": 200, "Data": {"InternalRegionQueryAddress": ""}})
        kind, owner, name, *action = path.split("/")
        files = self.stub.repos.get(kind, {}).get(f"{owner}/{name}")
        if files is None:
            return self._send_json({"Code": 404, "Message": "no such repository"}, 404)
        if action == ["repo"]:
            wanted = query.get("FilePath", "")
            if wanted not in files:
                return self._send_json({"Code": 404, "Message": "no such file"}, 404)
            return self._send_file(wanted, files[wanted])
        root = query.get("Root", "").strip("/")
        entries = [
            {"Path": path, "Name": path, "Type": "blob", "Size": len(data), "Sha256": _sha256(data)}
            for path, data in files.items()
            if path.startswith(root)
        ]
        return self._send_json({"Code": 200, "Data": {"Files": entries, "TotalCount": len(entries)}})

    # ------------------------------------------------------------------------------------------ answers

    def _send_json(self, value, status=200):
        self._send(status, json.dumps(value).encode())

    def _send(self, status, body, content_type="application/json", headers=None):
        self.send_response(status)
        for key, value in {
            "Content-Type": content_type,
            "Content-Length": str(len(body)),
            **(headers or {}),
        }.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _send_file(self, name, data, headers=None):
        """The whole file, or the part its Range header asks for; as `truncate` and `corrupt` say."""
        if name in self.stub.corrupt:
            data = bytes(byte ^ 0xFF for byte in data)
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        if start >= len(data) > 0:
            return self._send(416, b"", headers={"Content-Range": f"bytes */{len(data)}"})
        body = data[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Accept-Ranges", "bytes")
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return None
        if name in self.stub.truncate:
            self.wfile.write(body[: max(0, self.stub.truncate[name] - start)])
            self.close_connection = True  # the rest never comes
            return None
        self.wfile.write(body)
        return None


def _hf_entry(path, data):
    """One row of Hugging Face's file listing; large files carry their sha256 as `lfs`."""
    entry = {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
    if path.endswith((".bin", ".pt", ".safetensors", ".parquet", ".model", "tokenizer.json")):
        entry["lfs"] = {"oid": _sha256(data), "size": len(data), "pointerSize": 130}
    return entry


def _sha256(data):
    return hashlib.sha256(data).hexdigest()
