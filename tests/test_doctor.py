"""The doctor says what is there, and what is not."""

import pathlib

import jax
import pytest

import codebind_jax
from codebind_jax.tools import doctor


def run(capsys):
  with pytest.raises(SystemExit) as end:
    doctor.main([])
  lines = [line.partition(": ") for line in capsys.readouterr().out.splitlines()]
  return end.value.code, {name: text for name, _, text in lines}


def test_a_sound_installation(tmp_path, monkeypatch, capsys):
  (tmp_path / "npm").write_text("#!/bin/sh\necho 10.9.9\n")
  (tmp_path / "npm").chmod(0o755)
  monkeypatch.setenv("PATH", str(tmp_path))
  monkeypatch.setenv("CODEBIND_DATA", str(tmp_path / "data"))
  code, found = run(capsys)
  assert code == 0
  assert found["codebind_jax"].startswith(f"{codebind_jax.__version__}, Python 3.")
  assert found["jax"] == jax.__version__
  assert found["devices"] == f"{len(jax.devices())} x cpu (cpu)"
  assert "test yes" in found["extras"]
  assert found["data folder"].startswith(f"{tmp_path / 'data'}, ")
  assert found["client npm"] == "10.9.9"
  assert found["client apt-get"].startswith("does not answer")
  assert found["client pip"].startswith("pip ")


def test_what_no_run_can_do_without(tmp_path, monkeypatch, capsys):
  (tmp_path / "file").write_text("")
  monkeypatch.setenv("CODEBIND_DATA", str(tmp_path / "file"))
  monkeypatch.setattr(doctor, "LIBRARIES", ("jax", "no-such-library"))
  code, found = run(capsys)
  assert code == 1
  assert found["! no-such-library"] == "missing: pip install -e ."
  assert "cannot write to the data folder" in found["! data folder"]


def test_every_extra_is_known():
  text = (pathlib.Path(__file__).parents[1] / "setup.cfg").read_text()
  section = text.split("[options.extras_require]\n")[1].split("\n[")[0]
  assert {line.removesuffix(" =") for line in section.splitlines() if line.endswith(" =")} == set(doctor.EXTRAS)
