"""Draws bitmaps and vector files as square RGB PNGs on white; vector files go through resvg.

Run as a module it is a worker that draws what it reads on standard input. Workers are processes because a damaged
vector file can take its process down, and because they use all cores without touching the caller's JAX.
"""

import collections
import concurrent.futures
import contextlib
import io
import os
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator

SIZE = 192
# What a picture does to the process that draws it; other signals come from outside: SIGKILL where memory is short.
_CRASHES = frozenset({signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE})
_FRAME = struct.Struct(">BHI")  # kind (0 bitmap, 1 vector; in answers 0 good, 1 failed), side in pixels, length


class RenderError(ValueError):
  """A picture that cannot be drawn."""


class RendererKilled(RuntimeError):
  """A worker process was killed, which says nothing of its picture."""


def to_square_png(data: bytes, *, vector: bool, size: int = SIZE) -> bytes:
  """Draws one picture as a square RGB PNG on white.

  Args:
    data: content of an SVG file if `vector`, else of any bitmap that Pillow reads.
    vector: whether `data` is SVG.
    size: side in pixels.

  Raises:
    RenderError: if the picture cannot be read or drawn.
  """
  from PIL import Image, UnidentifiedImageError

  try:
    image = Image.open(io.BytesIO(_rasterise(data, size) if vector else data)).convert("RGBA")
    scale = size / max(image.size)
    wide, high = (max(1, round(side * scale)) for side in image.size)
    if image.size != (wide, high):
      # Premultiplied, so that the colour of transparent pixels does not bleed into the edge.
      image = image.convert("RGBa").resize((wide, high), Image.Resampling.BICUBIC).convert("RGBA")
    square = Image.new("RGBA", (size, size), (255, 255, 255, 255))
    square.alpha_composite(image, ((size - wide) // 2, (size - high) // 2))
    out = io.BytesIO()
    square.convert("RGB").save(out, "png", compress_level=3)
    return out.getvalue()
  except UnidentifiedImageError as error:
    raise RenderError("not an image") from error
  except (OSError, ValueError, SyntaxError) as error:
    raise RenderError(str(error)) from error


def _rasterise(svg: bytes, size: int) -> bytes:
  import resvg_py

  try:
    # Without a dpi resvg-py takes lengths in pt or cm as zero and calls the size invalid.
    return bytes(resvg_py.svg_to_bytes(
        svg_string=svg.decode("utf-8", "replace"), width=size, height=size, dpi=96, skip_system_fonts=True))
  except BaseException as error:  # a Rust panic is a BaseException
    if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
      raise
    raise RenderError(f"resvg: {error}") from error


class Renderer:
  """Worker processes that draw pictures; they start when first needed and end with the `with` block."""

  def __init__(self, size: int = SIZE, workers: int | None = None):
    """Makes a renderer.

    Args:
      size: side of the pictures in pixels.
      workers: number of processes; None for one a core, at most four; 0 draws in this process.
    """
    self._size = size
    self._count = min(4, os.cpu_count() or 1) if workers is None else workers
    self._local, self._started = threading.local(), []
    self._threads = concurrent.futures.ThreadPoolExecutor(max(1, self._count))

  def __enter__(self) -> "Renderer":
    return self

  def __exit__(self, *_) -> None:
    self._threads.shutdown(cancel_futures=True)
    for worker in self._started:
      worker.close()

  def draw(self, pictures: Iterable[tuple[bytes, bool]]) -> Iterator[bytes | RenderError]:
    """Draws pictures, at most sixteen a worker at a time, and gives the results in order.

    Args:
      pictures: pairs of content and whether it is SVG.

    Yields:
      A PNG, or the error for a picture that cannot be drawn, among them one at which two workers crashed.

    Raises:
      RendererKilled: if a worker was killed.
    """
    waiting = collections.deque()
    for picture in pictures:
      waiting.append(self._threads.submit(self._ask, picture))
      if len(waiting) >= 16 * max(1, self._count):
        yield waiting.popleft().result()
    while waiting:
      yield waiting.popleft().result()

  def _ask(self, picture: tuple[bytes, bool]) -> bytes | RenderError:
    data, vector = picture
    if self._count == 0:
      try:
        return to_square_png(data, vector=vector, size=self._size)
      except RenderError as error:
        return error
    for _ in range(2):  # a crash that is not the picture's does not come twice
      if getattr(self._local, "worker", None) is None:
        self._local.worker = _Worker()
        self._started.append(self._local.worker)
      try:
        return self._local.worker.ask(data, vector, self._size)
      except (OSError, EOFError, struct.error):
        worker, self._local.worker = self._local.worker, None
        code = worker.ended()
        if -code not in _CRASHES:
          raise RendererKilled(
            f"a process that draws pictures {_how(code)}, perhaps for want of memory; nothing of the world is kept: "
            "free some, and run the same command again"
          ) from None
    return RenderError(f"the renderer crashes at it ({_how(code)})")


def _how(code: int) -> str:
  """How a process ended."""
  return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"


class _Worker:
  """One rendering subprocess and its two pipes."""

  def __init__(self):
    self.process = subprocess.Popen([sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

  def ask(self, data: bytes, vector: bool, size: int) -> bytes | RenderError:
    self.process.stdin.write(_FRAME.pack(vector, size, len(data)) + data)
    self.process.stdin.flush()
    failed, _, length = _FRAME.unpack(self.process.stdout.read(_FRAME.size))
    answer = self.process.stdout.read(length)
    if len(answer) < length:
      raise EOFError(f"{len(answer)} of {length} bytes of a picture")
    return RenderError(answer.decode()) if failed else answer

  def ended(self) -> int:
    """Exit code of a process that answers no more."""
    self._close_pipes()
    return self.process.wait()

  def close(self) -> None:
    self.process.kill()
    self.process.wait()
    self._close_pipes()

  def _close_pipes(self) -> None:
    with contextlib.suppress(BrokenPipeError):
      self.process.stdin.close()
    self.process.stdout.close()


def _serve() -> None:
  questions, answers = sys.stdin.buffer, sys.stdout.buffer
  while head := questions.read(_FRAME.size):
    vector, size, length = _FRAME.unpack(head)
    try:
      failed, answer = 0, to_square_png(questions.read(length), vector=bool(vector), size=size)
    except RenderError as error:
      failed, answer = 1, str(error).encode()
    answers.write(_FRAME.pack(failed, size, len(answer)) + answer)
    answers.flush()


if __name__ == "__main__":
  _serve()
