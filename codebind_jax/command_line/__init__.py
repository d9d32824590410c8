"""The flags `--config=FILE.py[:ARGUMENT] --config.KEY=VALUE ...`: a config file, and changes of its keys."""

from __future__ import annotations

import importlib.util
import pathlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from codebind_jax import schema
from codebind_jax.methods.base import method_class, unheeded
from codebind_jax.trunks import trunk_maker

# (key of a module's options, function from the module's name to the class or function that takes the options).
_METHOD, _TRUNK = ("method_options", method_class), ("options", trunk_maker)
_CHOICE = re.compile(r"--?config\.((?:[\w.]+\.)?(?:method|trunk))(?:=(.*))?")


def define_config() -> flags.FlagHolder:
  """Defines the flag `config`, whose value is the ConfigDict with the command's changes."""
  help_text = "Config file, optionally with an argument: FILE.py:runlocal."
  holder = config_flags.DEFINE_config_file("config", None, help_text)
  flags.FLAGS["config"].parser = _FileParser()
  return holder


def parse(argv: Sequence[str]) -> list[str]:
  """absl's parsing, which ends with a one-line error for an unknown config key or a value of the wrong type."""
  try:
    return flags.FLAGS(list(argv))
  except (AttributeError, KeyError) as error:
    path = [arg.removeprefix("--config=") for arg in argv if arg.startswith("--config=")][-1]
    try:
      for key in (arg.removeprefix("--config.").split("=")[0] for arg in argv if arg.startswith("--config.")):
        schema.get(read_file(path, _chosen(argv)), key)
    except ValueError as unknown:
      sys.exit(f"error: {unknown}")
    sys.exit(f"error: {error}")
  except flags.Error as error:
    sys.exit(f"error: {error}")


def read_file(path: str, chosen: Mapping[str, str]) -> ConfigDict:
  """The config of FILE.py or FILE.py:ARGUMENT, its methods and trunks with all their options.

  Args:
    path: file and argument.
    chosen: config key that names a module -> module that replaces the file's; its options get their defaults.

  Raises:
    ValueError: if there is no such file, or it does not know the argument.
  """
  file, _, argument = path.partition(":")
  file = find_file(file)
  spec = importlib.util.spec_from_file_location("_config", file)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = (module.get_config(argument) if argument else module.get_config()).unlock()
  for at, part, key, (options, maker) in _choices(config):
    name = chosen.get(at + key, part[key])
    own = part[options].to_dict() if name == part[key] else {}
    try:
      defaults = schema.defaults(maker(name)) if name else {}
    except ValueError:
      defaults = {}  # `config.validate` names the fault
    part[key], part[options] = name, ConfigDict(defaults | own)
  if "method" in chosen:
    _reset_unheeded(config, chosen["method"])
  return config.lock()


def find_file(path: str) -> str:
  """The config file that a path names: that path, else for `configs/NAME.py` the one that this package brings.

  Raises:
    ValueError: if there is neither.
  """
  shipped = pathlib.Path(schema.__file__).parents[1]  # the checkout, or where pip installed the package
  places = [pathlib.Path(path), *([shipped / path] if pathlib.Path(path).parts[:1] == ("configs",) else [])]
  for place in places:
    if place.is_file():
      return str(place)
  files = (shipped / "configs").glob("*.py")
  names = sorted(file.stem for file in files if "def get_config(" in file.read_text(encoding="utf-8"))
  raise ValueError(f"there is no such file; this package's own are configs/NAME.py, NAME one of {', '.join(names)}")


def _reset_unheeded(config: ConfigDict, method: str) -> None:
  """Sets stage keys that the command's method does not heed back to their defaults; the file set them for its own."""
  try:
    defaults = unheeded(method)
  except ValueError:
    return  # `config.validate` names the fault
  for name, stage in config.get("stages", {}).items():
    for key in (key for key, default in defaults.items() if key in stage and schema.fixed(stage[key]) != default):
      stage[key] = ConfigDict() if isinstance(defaults[key], Mapping) else defaults[key]
      logging.info("config.stages.%s.%s: not heeded by method %r, back to its default", name, key, method)


class _FileParser(flags.ArgumentParser):
  """Parser of the flag `config`."""

  def parse(self, argument: str) -> ConfigDict:
    """See `read_file`."""
    return read_file(argument, _chosen(sys.argv))


def _chosen(argv: Sequence[str]) -> dict[str, str]:
  """Config key that names a module -> module, for those that the command sets."""
  matches = zip(map(_CHOICE.fullmatch, argv), [*argv[1:], ""])
  return {match[1]: following if match[2] is None else match[2] for match, following in matches if match}


def _choices(config: ConfigDict) -> Iterator[tuple[str, ConfigDict, str, tuple]]:
  """(path of a section, the section, its key that names a module, see `_METHOD`) for all such keys of a config."""
  if "method" in config:
    yield "", config, "method", _METHOD
  for name, tower in config.get("model", {}).get("towers", {}).items():
    yield f"model.towers.{name}.", tower, "trunk", _TRUNK
  for name, variant in config.get("compare", {}).get("variants", {}).items():
    yield f"compare.variants.{name}.", variant, "method", ("options", method_class)
