"""Processes find each other before JAX connects them, so that a wrong address, count or number is one line on each.

JAX's own connection ends a process by abort() after a time limit, whatever was wrong. So process 0 listens first at the
port that JAX's service takes afterwards: every other process says its number and how many there are, and hears whether
all are there.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import socket
import time
from typing import Any

_LINE = 1024  # bytes of a message at most
_TRY = 0.5  # seconds between attempts


def parsed(coordinator: str) -> tuple[str, int]:
  """(host, port) of an address.

  Raises:
    ValueError: if it is none, or its host has no address.
  """
  host, _, port = coordinator.rpartition(":")
  host = host.removeprefix("[").removesuffix("]")
  if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
    raise ValueError(f"--coordinator: got {coordinator!r}; allowed: HOST:PORT, a port from 1 to 65535")
  try:
    socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
  except (OSError, UnicodeError) as error:
    raise ValueError(f"--coordinator: got {coordinator!r}, whose host has no address ({error})") from error
  return host, int(port)


def meet(coordinator: str, count: int, number: int, seconds: float) -> None:
  """Returns on every process once all are there.

  Args:
    coordinator: host:port of process 0.
    count: of all processes.
    number: of this one.
    seconds: that a process waits for the others.

  Raises:
    ValueError: on every process that is there, naming what is wrong with the address, the count or the numbers.
  """
  if not 0 <= number < count:
    raise ValueError(f"--process_id: got {number} of --num_processes={count}; allowed: 0 to {count - 1}")
  host, port = parsed(coordinator)
  if number == 0:
    _gather(host, port, count, time.monotonic() + seconds, seconds)
  else:
    _report(host, port, count, number, time.monotonic() + seconds, seconds)


def _gather(host: str, port: int, count: int, deadline: float, seconds: float) -> None:
  """What process 0 does."""
  there: dict[int, tuple[socket.socket, dict[str, Any]]] = {}
  peers: list[socket.socket] = []
  with contextlib.ExitStack() as opened, _listener(port) as listener:
    while len(there) < count - 1:
      listener.settimeout(min(max(deadline - time.monotonic(), 0.01), _TRY))
      fault = ""
      try:
        peer = opened.enter_context(listener.accept()[0])
        peers.append(peer)
      except TimeoutError:
        peer = None
      hello = _received(peer, 5.0) if peer else None
      if hello and {"number", "count", "who"} <= hello.keys():
        number = hello["number"]
        if hello["count"] != count:
          fault = f"--num_processes: process 0 has {count}, process {number} has {hello['count']}"
        elif number in there and there[number][1]["who"] != hello["who"] and not _gone(there[number][0]):
          fault = f"--process_id: {number} is given to two processes, on {_host(there[number][1])} and {_host(hello)}"
        there[number] = peer, hello
      there = {number: found for number, found in there.items() if not _gone(found[0])}
      if not fault and time.monotonic() > deadline and len(there) < count - 1:
        missing = ", ".join(str(n) for n in range(1, count) if n not in there)
        fault = (f"{len(there) + 1} of --num_processes={count} processes have come to {host}:{port} in {seconds:g} s; "
                 f"--process_id missing: {missing}")  # fmt: skip
      if fault:
        for one in peers:
          _send(one, {"fault": fault})
        raise ValueError(fault)
    listener.close()  # the port is free before the others connect by JAX
    for sender, _ in there.values():
      _send(sender, {"fault": ""})


def _report(host: str, port: int, count: int, number: int, deadline: float, seconds: float) -> None:
  """What the other processes do."""
  who = f"{socket.gethostname()}, process {os.getpid()}, {secrets.token_hex(8)}"
  why = "nothing listens there"
  while time.monotonic() < deadline:
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=5.0) as peer:
      _send(peer, {"number": number, "count": count, "who": who})
      # Process 0 says why it gives up a little later than this process would.
      answer = _received(peer, deadline + 5.0 - time.monotonic())
      if answer and "fault" in answer:
        if answer["fault"]:
          raise ValueError(answer["fault"])
        return
      why = "what listens there is no process 0 that waits for others: it may have begun without this one"
    time.sleep(_TRY)
  raise ValueError(f"--coordinator: process 0 did not answer at {host}:{port} in {seconds:g} s; {why}")


def _listener(port: int) -> socket.socket:
  """A socket of all addresses of this host, which no other socket shares."""
  six = socket.has_dualstack_ipv6()
  found = socket.socket(socket.AF_INET6 if six else socket.AF_INET, socket.SOCK_STREAM)
  try:
    if six:
      found.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # of an earlier run, whose connections linger
    found.bind(("::" if six else "0.0.0.0", port))
    found.listen(1024)
  except OSError as error:
    found.close()
    if error.errno == errno.EADDRINUSE:
      raise ValueError(f"--coordinator: port {port} of this host is taken, by another program or by another process "
                       "with --process_id=0") from error  # fmt: skip
    raise
  return found


def _received(peer: socket.socket, seconds: float) -> dict[str, Any] | None:
  """A message; None where none comes."""
  found, deadline = b"", time.monotonic() + seconds
  try:
    while not found.endswith(b"\n") and len(found) < _LINE:
      peer.settimeout(max(deadline - time.monotonic(), 0.01))
      part = peer.recv(_LINE)
      if not part:
        return None
      found += part
    message = json.loads(found)
  except (OSError, ValueError):
    return None
  return message if isinstance(message, dict) else None


def _send(peer: socket.socket, message: dict[str, Any]) -> None:
  with contextlib.suppress(OSError):  # one that has ended
    peer.settimeout(5.0)
    peer.sendall(json.dumps(message).encode() + b"\n")


def _gone(peer: socket.socket) -> bool:
  """Whether the process at the other end has ended."""
  try:
    peer.setblocking(False)
    return peer.recv(1, socket.MSG_PEEK) == b""
  except BlockingIOError:
    return False
  except OSError:
    return True


def _host(hello: dict[str, Any]) -> str:
  return ", ".join(str(hello["who"]).split(", ")[:2])
