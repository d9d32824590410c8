"""Servers of objects on the loopback device, from packages, each a process; and a way between that fails on demand.

`python -m tests.far_servers s3|gs [strict]`: prints its port, and ends when its standard input does. A strict S3 server
takes two requests without looking at keys, and after them those with the keys of its accounts alone: of none.
"""

import os
import socket
import subprocess
import sys
import threading
import urllib.request

from tests.processes import REPOSITORY

# What decides which server is asked and as whom; and no question to the metadata servers of clouds.
VARIABLES = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "STORAGE_EMULATOR_HOST",
             "GOOGLE_APPLICATION_CREDENTIALS")  # fmt: skip
SETTINGS = {"AWS_EC2_METADATA_DISABLED": "true", "AWS_DEFAULT_REGION": "us-east-1", "NO_GCE_CHECK": "true"}
KEYS = {"AWS_ACCESS_KEY_ID": "someone", "AWS_SECRET_ACCESS_KEY": "secret"}


def serve(scheme):
  if scheme == "s3":
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    port = server.get_host_and_port()[1]
  else:
    from gcp_storage_emulator.server import create_server

    server = create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
    server.start()
    port = server._api._httpd.server_port
  sys.stdout.write(f"{port}\n")
  sys.stdout.flush()
  sys.stdin.read()
  server.stop()


class Server:
  """A running server with a bucket called `bucket`."""

  def __init__(self, scheme, strict=False):
    self.scheme = scheme
    env = os.environ | ({"INITIAL_NO_AUTH_ACTION_COUNT": "1"} if strict else {})
    self._process = subprocess.Popen(
      [sys.executable, "-m", "tests.far_servers", scheme], cwd=REPOSITORY, env=env, text=True,
      stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    self.port = int(self._process.stdout.readline())
    if scheme == "s3":
      urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{self.port}/bucket", method="PUT")).close()

  def environment(self, port=None):
    """Variables by which a client finds it, or what listens at another port."""
    place = f"http://127.0.0.1:{port or self.port}"
    return SETTINGS | ({"AWS_ENDPOINT_URL": place, **KEYS} if self.scheme == "s3" else {"STORAGE_EMULATOR_HOST": place})

  def close(self):
    self._process.stdin.close()
    self._process.wait()
    self._process.stdout.close()


class Way:
  """Passes connections on to a port, but for those that `faults` has something for, in order.

  A fault is "silent" (takes all and never answers), a number (answers with that HTTP status), ("cut", n): breaks the
  connection after n bytes of the client have been passed on, or ("lost", n): likewise, but passes none of them on.
  """

  def __init__(self, port):
    self._port, self.faults, self.taken, self._open = port, [], 0, []
    self._listener = socket.create_server(("127.0.0.1", 0))
    self.port = self._listener.getsockname()[1]
    self._threads = [self._start(self._listen)]

  def _start(self, work, *args):
    thread = threading.Thread(target=work, args=args, daemon=True)
    thread.start()
    return thread

  def _listen(self):
    while True:
      try:
        client, _ = self._listener.accept()
      except OSError:
        return
      self.taken += 1
      self._open.append(client)
      self._threads.append(self._start(self._serve, client, self.faults.pop(0) if self.faults else None))

  def _serve(self, client, fault):
    if fault == "silent":
      while _received(client):
        pass
    elif isinstance(fault, int):
      _received(client)
      body = b'{"error": {"code": %d, "message": "so it is"}}' % fault
      _sent(client, b"HTTP/1.1 %d No\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % (fault, len(body)) + body)
      client.close()
    elif fault and fault[0] == "lost":
      left = fault[1]
      while left > 0 and (data := _received(client)):
        left -= len(data)
      client.close()
    else:
      server = socket.create_connection(("127.0.0.1", self._port))
      self._open.append(server)
      self._threads.append(self._start(self._pass, server, client, None))
      self._pass(client, server, fault[1] if fault else None)

  def _pass(self, source, target, most):
    while data := _received(source):
      most = None if most is None else most - len(data)
      if most is not None and most <= 0 or not _sent(target, data):
        break
    for one in (source, target):
      try:
        one.shutdown(socket.SHUT_RDWR)
      except OSError:
        pass

  def close(self):
    for one in (self._listener, *self._open):
      try:
        one.shutdown(socket.SHUT_RDWR)
      except OSError:
        pass
      one.close()
    for thread in self._threads:
      thread.join()


def _received(connection):
  try:
    return connection.recv(1 << 16)
  except OSError:
    return b""


def _sent(connection, data):
  try:
    connection.sendall(data)
  except OSError:
    return False
  return True


if __name__ == "__main__":
  serve(sys.argv[1])
