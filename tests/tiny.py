"""The tiny config as a config file: --config=tests/tiny.py:MANIFEST,ROOT"""

import pathlib

from tests.train_fixtures import tiny_config


def get_config(arg):
  return tiny_config(*map(pathlib.Path, arg.split(",")))
