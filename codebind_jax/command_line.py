"""`--config=FILE.py[:ARGUMENT] --config.KEY=VALUE ...`: a config file and what a command changes in it."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from codebind_jax import schema
from codebind_jax.methods.base import method_class, unheeded
from codebind_jax.models.bodies import NO_OPTIONS, body_class
from codebind_jax.trunks import trunk_maker

# Key that names a module -> (key of the module's options, what makes it of them).
_METHOD, _TRUNK, _BODY = ("method_options", method_class), ("options", trunk_maker), ("body_options", body_class)
_CHOICE = re.compile(r"--?config\.((?:[\w.]+\.)?(?:method|trunk|body))(?:=(.*))?")


def define_config() -> flags.FlagHolder:
  """Defines the flag `config`, whose value is the ConfigDict with the command's changes."""
  told = "Config file, optionally with an argument: FILE.py:runlocal."
  holder = config_flags.DEFINE_config_file("config", None, told)
  flags.FLAGS["config"].parser = _FileParser()
  return holder


def parse(argv: Sequence[str]) -> list[str]:
  """absl's parsing, with one clear line where a config key is unknown or a value has the wrong type."""
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
  """The config of FILE.py or FILE.py:ARGUMENT, its methods, trunks and bodies with all their options.

  Args:
    path: file and argument.
    chosen: key that names a module -> another module than the file's, with the defaults of its options.

  Raises:
    ValueError: if there is no such file, or it has no form of that name.
  """
  file, _, argument = path.partition(":")
  if not os.path.isfile(file):
    raise ValueError("there is no such file")
  spec = importlib.util.spec_from_file_location("_config", file)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = (module.get_config(argument) if argument else module.get_config()).unlock()
  for at, part, key, (options, maker) in _choices(config):
    name = chosen.get(at + key, part[key])
    given = part[options].to_dict() if name == part[key] else {}
    try:
      found = schema.defaults(maker(name), NO_OPTIONS) if name else {}
    except ValueError:
      found = {}  # `config.validate` says what is allowed
    part[key], part[options] = name, ConfigDict(found | given)
  if "method" in chosen:
    _forget(config, chosen["method"])
  return config.lock()


def _forget(config: ConfigDict, method: str) -> None:
  """Gives the keys of stages that the file sets for its own method, and the command's does not heed, their defaults."""
  try:
    defaults = unheeded(method)
  except ValueError:
    return  # `config.validate` says what is allowed
  for name, stage in config.get("stages", {}).items():
    for key in (key for key, default in defaults.items() if key in stage and schema.fixed(stage[key]) != default):
      stage[key] = ConfigDict() if isinstance(defaults[key], Mapping) else defaults[key]
      logging.info("config.stages.%s.%s: not heeded by method %r, back to its default", name, key, method)


class _FileParser(flags.ArgumentParser):
  """Value of the flag `config`."""

  def parse(self, argument: str) -> ConfigDict:
    """See `read_file`."""
    return read_file(argument, _chosen(sys.argv))


def _chosen(argv: Sequence[str]) -> dict[str, str]:
  """Keys that name modules, as the command sets them."""
  found = zip(map(_CHOICE.fullmatch, argv), [*argv[1:], ""])
  return {match[1]: following if match[2] is None else match[2] for match, following in found if match}


def _choices(config: ConfigDict) -> Iterator[tuple[str, ConfigDict, str, tuple]]:
  """(path of a section, the section, its key that names a module, that key's options) for all of a config."""
  if "method" in config:
    yield "", config, "method", _METHOD
  for name, tower in config.get("model", {}).get("towers", {}).items():
    for key, of in (("trunk", _TRUNK), ("body", _BODY)):
      yield f"model.towers.{name}.", tower, key, of
  for name, variant in config.get("compare", {}).get("variants", {}).items():
    yield f"compare.variants.{name}.", variant, "method", ("options", method_class)
