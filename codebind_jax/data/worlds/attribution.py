"""Credits of a built world, written beside the data."""

from collections.abc import Iterable

from codebind_jax.data.worlds.fetch import Package


def text(world: str, packages: Iterable[Package], works: Iterable[str] = ()) -> str:
  """Text of ATTRIBUTION.md.

  Args:
    world: name of the world, for the heading.
    packages: the packages it was built from.
    works: credits within the packages, a line each.
  """
  rows = [f"| {p.name} {p.version} | {_registry(p)} | {p.attribution} | {p.licence} |" for p in packages]
  return "\n".join([
      f"# Attribution: world {world}",
      "",
      "The arrays beside this file were built on this machine from the packages below, for use on this machine. Their",
      "licences differ, and some forbid passing them on under other terms: do not publish the arrays. They were",
      "drawn, resized, rendered, played or simulated from what the packages hold; `manifest.json` says which are",
      "simulated. Debian packages carry their full terms in `usr/share/doc/PACKAGE/copyright`.",
      "",
      "| package | from | credit | licence |",
      "|---|---|---|---|",
      *rows,
      "",
      *(f"- {line}" for line in works),
  ]).rstrip() + "\n"


def _registry(package: Package) -> str:
  return {"npm": "npm", "apt": "Debian", "pip": "PyPI", "pip-sdist": "PyPI (source archive)"}[package.kind]
