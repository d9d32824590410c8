"""The flags `--config=FILE.py[:ARGUMENT] --config.KEY=VALUE ...`: a config file, and changes of its keys."""

from __future__ import annotations

import importlib.util
import inspect
import pathlib
import re
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from codebind_jax import schema
from codebind_jax.config import Config
from codebind_jax.methods.base import method_class, unheeded
from codebind_jax.trunks import trunk_maker

# (key of a module's options, function from the module's name to the class or function that takes the options).
_METHOD, _TRUNK = ("method_options", method_class), ("options", trunk_maker)
_KEY = re.compile(r"--?config\.([\w.-]+)(?:=.*)?", re.DOTALL)
_CHOICE = re.compile(r"--?config\.((?:[\w.]+\.)?(?:method|trunk))(?:=(.*))?")


def define_config() -> flags.FlagHolder:
  """Defines the flag `config`, whose value is the ConfigDict with the command's changes."""
  help_text = "Config file, optionally with an argument: FILE.py:runlocal."
  holder = config_flags.DEFINE_config_file("config", None, help_text)
  flags.FLAGS["config"].parser = _FileParser()
  return holder


def parse(argv: Sequence[str]) -> list[str]:
  """absl's parsing, which ends with a one-line error for whatever is wrong with the command."""
  try:
    left = flags.FLAGS(list(argv))
  except (AttributeError, KeyError, flags.Error) as error:
    sys.exit(f"error: {_said(error, argv)}")
  if len(left) > 1:
    sys.exit(f"error: {left[1]!r} is no flag; a key of the config is set by --config.KEY=VALUE, without spaces at =")
  return left


def config_argument(argv: Sequence[str]) -> str:
  """FILE.py[:ARGUMENT] of the last `--config=FILE.py` or `--config FILE.py`; "" where there is none."""
  found = ""
  for at, word in enumerate(argv):
    name, given, value = word.partition("=")
    if name in ("--config", "-config"):
      found = value if given else argv[at + 1] if at + 1 < len(argv) else ""
  return found


def _said(error: Exception, argv: Sequence[str]) -> str:
  """One line for an error of absl or ml_collections."""
  if "in argv before a value" in str(error):
    return f"--config=FILE.py comes first, then the keys that change it ({str(error).split(' in argv')[0]})"
  if isinstance(error, flags.IllegalFlagValueError):
    if lacking := re.match(r"flag --([\w.]+)=--", str(error)):
      return f"{lacking[1]}: needs a value, --{lacking[1]}=VALUE"
    if several := re.match(r"flag --([\w.]+)=(.*?): .* as tuple", str(error), re.DOTALL):
      return f"{several[1]}: got {several[2]}; several values are given as --{several[1]}=\"('a', 'b')\""
    return str(error)
  if not isinstance(error, flags.Error):
    try:
      config = read_file(config_argument(argv), argv)
      for word in argv:
        if key := re.match(r"--?(?:no)?config\.([^=]+)", word):
          schema.get(config, key[1])
    except ValueError as unknown:
      return str(unknown)
  return str(error)


def read_file(path: str, argv: Sequence[str] = ()) -> ConfigDict:
  """The config of FILE.py or FILE.py:ARGUMENT, its methods and trunks with all their options.

  Args:
    path: file and argument.
    argv: words of the command, whose values are set afterwards. A module that it names replaces the file's and gets its
      options with their defaults. A name that it sets in a mapping such as `stages.NAME.losses` is added with the
      value 0, "" or (); `validation.validate` says which names are allowed.

  Raises:
    ValueError: if there is no such file, or it does not know the argument.
  """
  file, _, argument = path.partition(":")
  replaced = chosen(argv)
  config = _run_file(find_file(file), argument).unlock()
  for at, part, key, (options, maker) in _choices(config):
    name = replaced.get(at + key, part[key])
    own = part[options].to_dict() if name == part[key] else {}
    try:
      defaults = schema.defaults(maker(name)) if name else {}
    except ValueError:
      defaults = {}  # `validation.validate` names the fault
    part[key], part[options] = name, ConfigDict(defaults | own)
  if "method" in replaced:
    _reset_unheeded(config, replaced["method"])
  for parents, _, key in (path.rpartition(".") for path in named(argv)):
    if entry := schema.entry_type(Config, parents.split(".")):
      try:
        section = schema.get(config, parents)
      except ValueError:
        continue  # which `_said` names when the command's value is set
      if key not in section:
        section[key] = entry()
  return config.lock()


def _run_file(file: str, argument: str) -> ConfigDict:
  """What a file's `get_config` gives."""
  spec = importlib.util.spec_from_file_location("_config", file)
  if spec is None:
    raise ValueError(f"{file}: a config is a Python file, NAME.py")
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
    make = getattr(module, "get_config", None)
    if make is None:
      raise ValueError(f"{file}: has no function get_config")
    if argument and not inspect.signature(make).parameters:
      raise ValueError(f"{file}:{argument}: takes no argument after the colon")
    config = make(argument) if argument else make()
  except ValueError:
    raise
  except Exception as error:
    at = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    line = f":{at[-1]}" if at else ""
    raise ValueError(f"{file}{line}: {type(error).__name__}: {error}") from error
  if not isinstance(config, ConfigDict):
    raise ValueError(f"{file}: get_config gave {type(config).__name__}; needed: a ConfigDict")
  return config


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
    return  # `validation.validate` names the fault
  for name, stage in config.get("stages", {}).items():
    for key in (key for key, default in defaults.items() if key in stage and schema.fixed(stage[key]) != default):
      stage[key] = ConfigDict() if isinstance(defaults[key], Mapping) else defaults[key]
      logging.info("config.stages.%s.%s: not heeded by method %r, back to its default", name, key, method)


class _FileParser(flags.ArgumentParser):
  """Parser of the flag `config`."""

  def parse(self, argument: str) -> ConfigDict:
    """See `read_file`."""
    return read_file(argument, sys.argv)


def chosen(argv: Sequence[str]) -> dict[str, str]:
  """Config key that names a module -> module, for those that the command sets."""
  matches = zip(map(_CHOICE.fullmatch, argv), [*argv[1:], ""])
  return {match[1]: following if match[2] is None else match[2] for match, following in matches if match}


def named(argv: Iterable[str]) -> list[str]:
  """Config keys that the command sets."""
  return [match[1] for match in map(_KEY.fullmatch, argv) if match]


def _choices(config: ConfigDict) -> Iterator[tuple[str, ConfigDict, str, tuple]]:
  """(path of a section, the section, its key that names a module, see `_METHOD`) for all such keys of a config."""
  if "method" in config:
    yield "", config, "method", _METHOD
  for name, tower in config.get("model", {}).get("towers", {}).items():
    yield f"model.towers.{name}.", tower, "trunk", _TRUNK
  for name, variant in config.get("compare", {}).get("variants", {}).items():
    yield f"compare.variants.{name}.", variant, "method", ("options", method_class)
