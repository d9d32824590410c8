"""A hub on the loopback interface, as far as huggingface_hub asks it: model info, trees, files, and commits."""

import base64
import hashlib
import http.server
import json
import re
import threading
import urllib.parse

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
  """Models by name, each a dict of file -> content; `requests` are the paths that were asked for."""

  def __init__(self):
    self.models, self.private, self.requests = {}, {}, []
    handler = type("Handler", (_Handler,), {"hub": self})
    self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    self.url = f"http://127.0.0.1:{self.server.server_port}"
    threading.Thread(target=self.server.serve_forever, daemon=True).start()

  def close(self):
    self.server.shutdown()
    self.server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
  hub: Hub

  def log_message(self, *_):
    pass

  def answer(self, content, status=200, **headers):
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    self.send_response(status)
    for name, value in {"Content-Length": str(len(body)), **headers}.items():
      self.send_header(name.replace("_", "-"), value)
    self.end_headers()
    if self.command != "HEAD":
      self.wfile.write(body)

  def do_GET(self):
    path = urllib.parse.unquote(self.path.split("?")[0])
    self.hub.requests.append(path)
    if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/.*)?", path):
      files = self.hub.models.get(match[1])
      if files is None:
        return self.answer({"error": "none"}, 404, X_Error_Code="RepoNotFound")
      return self.answer({"id": match[1], "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]})
    if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/.*", path):
      files = self.hub.models[match[1]]
      return self.answer([{"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                          for name, content in files.items()])  # fmt: skip
    if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.*)", path):
      content = self.hub.models[match[1]].get(match[2])
      if content is None:
        return self.answer({"error": "none"}, 404, X_Error_Code="EntryNotFound")
      return self.answer(content, X_Repo_Commit=COMMIT, ETag=f'"{hashlib.sha1(content).hexdigest()}"')
    return self.answer({"error": path}, 404)

  do_HEAD = do_GET

  def do_POST(self):
    path, body = self.path.split("?")[0], self.rfile.read(int(self.headers.get("Content-Length", 0)))
    self.hub.requests.append(path)
    if path == "/api/repos/create":
      wanted = json.loads(body)
      name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
      self.hub.models.setdefault(name, {})
      self.hub.private[name] = bool(wanted.get("private")) or wanted.get("visibility") == "private"
      return self.answer({"url": f"{self.hub.url}/{name}", "name": name})
    if path == "/api/validate-yaml":
      return self.answer({"errors": [], "warnings": []})
    if match := re.fullmatch(r"/api/models/(.+)/preupload/.*", path):
      plain = {"uploadMode": "regular", "shouldIgnore": False}
      return self.answer({"files": [{"path": file["path"], **plain} for file in json.loads(body)["files"]]})
    if match := re.fullmatch(r"/api/models/(.+)/commit/.*", path):
      for line in map(json.loads, body.decode().splitlines()):
        if line["key"] == "file":
          self.hub.models[match[1]][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
      url = f"{self.hub.url}/{match[1]}/commit/{COMMIT}"
      return self.answer({"success": True, "commitOid": COMMIT, "commitUrl": url})
    return self.answer({"error": path}, 404)
