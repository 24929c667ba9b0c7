"""A server on this machine that answers as the Hugging Face hub does, for encoders."""

import contextlib
import hashlib
import http.server
import json
import threading


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def _answer(self, body):
        path = self.path.split("?")[0]
        self.server.asked.append(path)
        files, commit, name = self.server.files, self.server.commit, self.server.name
        if path.startswith(f"/api/models/{name}/revision/"):
            if path.rpartition("/")[2] not in (commit, "main"):
                return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
            entry = {"id": name, "sha": commit, "siblings": [{"rfilename": f} for f in files]}
            return self._json(entry, body)
        if path.startswith(f"/api/models/{name}/tree/"):
            listing = [
                {"type": "file", "path": f, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                for f, c in files.items()
            ]
            return self._json(listing, body)
        file = path.removeprefix(f"/{name}/resolve/{commit}/")
        if file not in files:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"}, body)
        tag = hashlib.sha256(files[file]).hexdigest()
        return self._send(200, files[file], {"ETag": f'"{tag}"', "X-Repo-Commit": commit}, body)

    def _json(self, value, body):
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"}, body)

    def _send(self, code, content, headers, body):
        self.send_response(code)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content)


@contextlib.contextmanager
def serving(folder, commit="0123456789abcdef0123456789abcdef01234567", name="someone/encoder"):
    """Serves the files of a folder as one repository; yields the server, whose `asked` is a log."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.files = {file.name: file.read_bytes() for file in sorted(folder.iterdir())}
    server.commit, server.name, server.asked = commit, name, []
    server.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
