"""Pictures of any kind to one form: PNG, RGB, square, composited on white. Vector files go through resvg.

Run as a module it is a worker that renders what it is sent on standard input: a subprocess, because a damaged vector
file can take its process down, and because two of them keep two cores busy without touching the caller's JAX.
"""

import io
import struct
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator

SIZE = 192
_FRAME = struct.Struct(">BHI")  # kind (0 bitmap, 1 vector; in answers 0 good, 1 failed), side in pixels, length


class RenderError(ValueError):
  """A picture that cannot be drawn."""


def to_square_png(data: bytes, *, vector: bool, size: int = SIZE) -> bytes:
  """Draws one picture as a square RGB PNG on white.

  Args:
    data: content of an SVG file if `vector`, else of any bitmap that Pillow reads.
    vector: whether `data` is SVG.
    size: side in pixels.

  Raises:
    RenderError: if the picture cannot be read or drawn.
  """
  from PIL import Image

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
  except (OSError, ValueError, SyntaxError) as error:
    raise RenderError(str(error)) from error


def _rasterise(svg: bytes, size: int) -> bytes:
  import resvg_py

  try:
    # Without a dpi resvg-py takes lengths in pt or cm for nothing and calls the size invalid.
    return bytes(resvg_py.svg_to_bytes(
        svg_string=svg.decode("utf-8", "replace"), width=size, height=size, dpi=96, skip_system_fonts=True))
  except BaseException as error:  # a Rust panic is a BaseException
    if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
      raise
    raise RenderError(f"resvg: {error}") from error


def render_all(
    pictures: Iterable[tuple[bytes, bool]], *, size: int = SIZE, workers: int = 2
) -> Iterator[bytes | RenderError]:
  """Draws many pictures in worker processes; answers come in the order of the questions.

  Args:
    pictures: pairs of content and whether it is SVG.
    size: side in pixels.
    workers: number of processes; 0 draws in this one.

  Yields:
    A PNG, or the error for a picture that cannot be drawn.
  """
  if workers == 0:
    for data, vector in pictures:
      try:
        yield to_square_png(data, vector=vector, size=size)
      except RenderError as error:
        yield error
    return
  from concurrent.futures import ThreadPoolExecutor

  local, started = threading.local(), []

  def ask(picture: tuple[bytes, bool]) -> bytes | RenderError:
    if getattr(local, "worker", None) is None:
      local.worker = _Worker()
      started.append(local.worker)
    try:
      return local.worker.ask(*picture, size)
    except (OSError, struct.error) as error:
      local.worker.close()
      local.worker = None
      return RenderError(f"the renderer died ({error})")

  with ThreadPoolExecutor(workers) as pool:
    try:
      yield from _in_order(pool, ask, pictures, ahead=16 * workers)
    finally:
      for worker in started:
        worker.close()


def _in_order(pool, ask, pictures, ahead: int) -> Iterator[bytes | RenderError]:
  """Like `pool.map`, with at most `ahead` pictures under way."""
  import collections

  waiting = collections.deque()
  for picture in pictures:
    waiting.append(pool.submit(ask, picture))
    if len(waiting) >= ahead:
      yield waiting.popleft().result()
  while waiting:
    yield waiting.popleft().result()


class _Worker:
  """One rendering subprocess and its two pipes."""

  def __init__(self):
    self.process = subprocess.Popen([sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

  def ask(self, data: bytes, vector: bool, size: int) -> bytes | RenderError:
    self.process.stdin.write(_FRAME.pack(vector, size, len(data)) + data)
    self.process.stdin.flush()
    failed, _, length = _FRAME.unpack(self.process.stdout.read(_FRAME.size))
    answer = self.process.stdout.read(length)
    return RenderError(answer.decode()) if failed else answer

  def close(self) -> None:
    self.process.kill()
    self.process.wait()
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
