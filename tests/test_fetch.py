"""The fetcher against stand-in clients, and the archive readers against archives made here."""

import errno
import json
import os
import re
import shutil
import time
import types
from pathlib import Path

import pytest

from codebind_jax.data.worlds import archives, fetch, names
from tests.world_fixtures import FakeClients, deb, package, put, rcc, tgz, wheel

NPM_DATA, PIP_DATA, DEB_DATA = tgz({"package/a.txt": b"npm"}), wheel({"b.txt": b"pip"}), deb({"usr/c.txt": b"apt"})
NPM = package("icons-a", "npm", "scope-icons-a-1.0.tgz", NPM_DATA, name="@scope/icons-a")
PIP = package("wheel-b", "pip", "wheel_b-1.0-py3-none-any.whl", PIP_DATA, name="wheel-b")
DEB = package("deb-c", "apt", "deb-c_1.0-1_all.deb", DEB_DATA, name="deb-c", version="1.0-1")


@pytest.fixture
def clients(tmp_path, monkeypatch):
  monkeypatch.setattr(fetch, "packages", lambda: {p.id: p for p in (NPM, PIP, DEB)})
  fakes = FakeClients(tmp_path / "bin", monkeypatch)
  fakes.offer("@scope/icons-a@1.0", NPM.file, NPM_DATA)
  fakes.offer("wheel-b==1.0", PIP.file, PIP_DATA)
  fakes.offer("deb-c", DEB.file, DEB_DATA)
  return fakes


def left(root: Path) -> set[str]:
  """Everything below the archives folder but empty folders and the lock."""
  base = root / "archives"
  return {str(p.relative_to(base)) for p in base.rglob("*") if p.is_file() and p.name != ".lock"}


def test_three_clients_fetch_by_pinned_name_once(clients, tmp_path):
  found = fetch.fetch_all(["icons-a", "wheel-b", "deb-c"], root=tmp_path)
  assert {i: p.read_bytes() for i, p in found.items()} == {"icons-a": NPM_DATA, "wheel-b": PIP_DATA, "deb-c": DEB_DATA}
  assert found["icons-a"] == tmp_path / "archives" / NPM.sha256 / NPM.file
  assert left(tmp_path) == {f"{p.sha256}/{p.file}" for p in (NPM, PIP, DEB)}
  calls = clients.calls
  assert sorted(c[0] for c in calls) == ["apt-get", "apt-get", "npm", "python"]
  assert not any("://" in arg for _, _, args in calls for arg in args)
  assert fetch.fetch("wheel-b", root=tmp_path) == found["wheel-b"]
  assert len(clients.calls) == len(calls)


def test_packages_of_one_client_go_in_one_call(clients, tmp_path, monkeypatch):
  data = tgz({"package/x": b"x"})
  other = package("icons-x", "npm", "icons-x-1.0.tgz", data)
  monkeypatch.setattr(fetch, "packages", lambda: {p.id: p for p in (NPM, other)})
  clients.offer("icons-x@1.0", other.file, data)
  fetch.fetch_all(["icons-a", "icons-x"], root=tmp_path)
  assert len(clients.calls) == 1


def test_unknown_package_is_named(clients, tmp_path):
  with pytest.raises(ValueError, match=r"unknown package 'nope'; known: \['deb-c', 'icons-a', 'wheel-b'\]"):
    fetch.fetch("nope", root=tmp_path)


@pytest.mark.parametrize("one, wanted", [(NPM, "@scope/icons-a@1.0"), (PIP, "wheel-b==1.0")])
def test_wrong_checksum_names_file_expected_and_got(clients, tmp_path, one, wanted):
  clients.offer(wanted, one.file, b"something else")
  with pytest.raises(fetch.ChecksumError) as caught:
    fetch.fetch(one.id, root=tmp_path)
  for part in (one.file, one.sha256, str(one.bytes), "14 bytes", "file removed"):
    assert part in str(caught.value)
  assert left(tmp_path) == set()


@pytest.mark.parametrize("damage, want", [
    (lambda b: b[:-7], "bytes"), (lambda b: b[:-1] + bytes([b[-1] ^ 1]), "SHA-256")], ids=["cut", "flipped"])
def test_damaged_cached_archive_is_an_error_and_removed(clients, tmp_path, damage, want):
  path = put(tmp_path, PIP, damage(PIP_DATA))
  with pytest.raises(fetch.ChecksumError, match=f"{re.escape(str(path))}: expected .*{want}.* got .*; file removed"):
    fetch.fetch("wheel-b", root=tmp_path)
  assert not path.exists()
  assert fetch.fetch("wheel-b", root=tmp_path).read_bytes() == PIP_DATA


def test_missing_client_is_named(clients, tmp_path, monkeypatch):
  real = shutil.which
  monkeypatch.setattr(shutil, "which", lambda name, *a, **k: None if name == "npm" else real(name, *a, **k))
  with pytest.raises(fetch.FetchError, match="no npm on this machine, needed for .*@scope/icons-a") as caught:
    fetch.fetch("icons-a", root=tmp_path)
  assert caught.value.client == "npm"


def test_client_that_says_no_is_quoted_and_the_others_are_kept(clients, tmp_path):
  clients.says("npm", "npm warn old\nnpm error code E404\nnpm error the moon is in the way\n")
  want = "npm could not fetch @scope/icons-a; it said: npm error code E404\nnpm warn old\n(.|\n)*the moon is in the way"
  with pytest.raises(fetch.FetchError, match=want) as caught:
    fetch.fetch_all(["icons-a", "wheel-b"], root=tmp_path)
  assert caught.value.client == "npm"
  assert left(tmp_path) == {f"{PIP.sha256}/{PIP.file}"}


def test_client_that_finishes_without_the_file_is_an_error(clients, tmp_path):
  clients.offer("wheel-b==1.0", "another.whl", PIP_DATA)
  with pytest.raises(fetch.FetchError, match="pip finished but left no wheel_b-1.0"):
    fetch.fetch("wheel-b", root=tmp_path)
  assert left(tmp_path) == set()


def sdist(marker):
  """A source archive with data, whose setup.py and build backend leave a mark when they run."""
  run = f"open({str(marker)!r}, 'a').write('ran')\n".encode()
  project = b'[build-system]\nrequires = ["not-to-be-fetched"]\nbuild-backend = "backend"\nbackend-path = ["."]\n'
  files = {"setup.py": run, "backend.py": run, "pyproject.toml": project, "data/x.txt": b"the data",
           "PKG-INFO": b"Metadata-Version: 2.1\nName: source-d\nVersion: 1.0\n"}
  return tgz({f"source-d-1.0/{name}": content for name, content in files.items()})


@pytest.mark.parametrize("kind", ["right", "wrong", "absent"])
def test_nothing_of_a_source_archive_runs_and_a_wrong_hash_is_named(kind, tmp_path, monkeypatch):
  index, marker = tmp_path / "index", tmp_path / "ran"
  index.mkdir()
  data = sdist(marker)
  one = package("source-d", "pip-sdist", "source-d-1.0.tar.gz", data if kind != "wrong" else data + b" ")
  if kind != "absent":
    (index / one.file).write_bytes(data)
  monkeypatch.setattr(fetch, "packages", lambda: {one.id: one})
  for name, value in (("PIP_NO_INDEX", "1"), ("PIP_FIND_LINKS", str(index)), ("PIP_CONFIG_FILE", os.devnull)):
    monkeypatch.setenv(name, value)
  if kind == "right":
    path = fetch.fetch("source-d", root=tmp_path / "data")
    assert archives.read_members(path, ["source-d-1.0/data/x.txt"]) == {"source-d-1.0/data/x.txt": b"the data"}
  elif kind == "wrong":
    with pytest.raises(fetch.ChecksumError, match=f"source-d==1.0: expected .*{one.sha256}, got .*; file removed"):
      fetch.fetch("source-d", root=tmp_path / "data")
    assert left(tmp_path / "data") == set()
  else:
    with pytest.raises(fetch.FetchError, match="pip's index has no source-d-1.0.tar.gz of source-d==1.0"):
      fetch.fetch("source-d", root=tmp_path / "data")
  assert not marker.exists()


def test_python_without_pip_gets_a_hint(clients, tmp_path):
  clients.says("python", "/usr/bin/python: No module named pip\n")
  with pytest.raises(fetch.FetchError, match="has no pip: run .* -m ensurepip"):
    fetch.fetch("wheel-b", root=tmp_path)


def test_killed_run_resumes_with_what_arrived_whole(clients, tmp_path, monkeypatch):
  data = tgz({"package/x": b"x" * 100})
  other = package("icons-x", "npm", "icons-x-1.0.tgz", data)
  monkeypatch.setattr(fetch, "packages", lambda: {p.id: p for p in (NPM, other)})
  clients.offer("icons-x@1.0", other.file, data)
  incoming = tmp_path / "archives" / "incoming" / "npm"
  incoming.mkdir(parents=True)
  (incoming / NPM.file).write_bytes(NPM_DATA)
  (incoming / other.file).write_bytes(data[:20])
  found = fetch.fetch_all(["icons-a", "icons-x"], root=tmp_path)
  assert found["icons-a"].read_bytes() == NPM_DATA and found["icons-x"].read_bytes() == data
  (_, _, args), = clients.calls
  assert "icons-x@1.0" in args and "@scope/icons-a@1.0" not in args


def test_interrupt_stops_the_client_and_leaves_nothing(clients, tmp_path, monkeypatch):
  clients.hangs("npm")

  def interrupted(*_):
    for _ in range(200):
      if clients.calls:
        raise KeyboardInterrupt
      time.sleep(0.05)

  monkeypatch.setattr(fetch, "_show_progress", interrupted)
  with pytest.raises(KeyboardInterrupt):
    fetch.fetch("icons-a", root=tmp_path)
  assert left(tmp_path) == set() and not (tmp_path / "archives" / "incoming").exists()
  (_, pid, _), = clients.calls
  with pytest.raises(ProcessLookupError):
    os.kill(pid, 0)


def test_debian_archive_of_another_revision_is_kept_and_logged(clients, tmp_path, caplog):
  newer = deb({"usr/c.txt": b"newer"})
  clients.offer("deb-c", "deb-c_1%3a1.0-2_all.deb", newer)
  path = fetch.fetch("deb-c", root=tmp_path)
  assert path.name == "deb-c_1%3a1.0-2_all.deb" and path.read_bytes() == newer
  assert "this Debian release has deb-c_1%3a1.0-2_all.deb, not deb-c_1.0-1_all.deb" in caplog.text
  calls = len(clients.calls)
  assert fetch.fetch("deb-c", root=tmp_path) == path and len(clients.calls) == calls


def test_debian_lists_are_private_and_filled_before_the_download(clients, tmp_path):
  fetch.fetch("deb-c", root=tmp_path)
  update, download = (args for client, _, args in clients.calls)
  assert update[-1] == "update" and download[-2:] == ["download", "deb-c"]
  assert any(a.startswith("Dir::State::lists=" + str(tmp_path)) for a in update)


def test_too_little_space_is_said_before_any_work(clients, tmp_path, monkeypatch):
  monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
  with pytest.raises(OSError, match=r"no space: .* MB needed, 0 MB free") as caught:
    fetch.fetch("wheel-b", root=tmp_path)
  assert caught.value.errno == errno.ENOSPC and clients.calls == [] and left(tmp_path) == set()


def test_folder_that_cannot_be_made_is_named(clients, tmp_path):
  (tmp_path / "file").write_text("in the way")
  with pytest.raises(OSError, match="cannot write to the data folder .*CODEBIND_DATA.*file/archives"):
    fetch.fetch("wheel-b", root=tmp_path / "file")


def test_folder_without_write_permission_is_named(clients, tmp_path, monkeypatch):
  if os.geteuid() == 0:  # root may write anywhere, so the answer of the system is made up

    def denied(*_, **__):
      raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(fetch.tempfile, "TemporaryFile", denied)
  else:
    (tmp_path / "archives").mkdir(mode=0o555)
  with pytest.raises(PermissionError, match="cannot write to the data folder .Permission denied."):
    fetch.fetch("wheel-b", root=tmp_path)
  assert clients.calls == []


def test_data_folder_from_argument_environment_cache(monkeypatch, tmp_path):
  monkeypatch.setenv("CODEBIND_DATA", str(tmp_path / "env"))
  assert fetch.data_dir(tmp_path / "arg") == tmp_path / "arg"
  assert fetch.data_dir() == tmp_path / "env"
  monkeypatch.delenv("CODEBIND_DATA")
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
  assert fetch.data_dir() == tmp_path / "xdg" / "codebind_jax"
  monkeypatch.delenv("XDG_CACHE_HOME")
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  assert fetch.data_dir() == tmp_path / "home" / ".cache" / "codebind_jax"


def test_shipped_package_table_is_whole():
  table = fetch.packages()
  assert len(table) == 36 and len({p.sha256 for p in table.values()}) == 36
  for one in table.values():
    assert re.fullmatch(r"[0-9a-f]{64}", one.sha256) and one.bytes > 0 and one.kind in fetch.CLIENT
    assert one.licence and one.attribution and "://" not in one.name
  assert (table["minilm"].bytes, table["efflite0"].bytes) == (83506384, 17364911)
  assert "://" not in names.table_bytes("packages").decode()


@pytest.mark.parametrize("make, file", [(tgz, "a.tgz"), (wheel, "a.whl"), (deb, "a.deb")])
def test_readers_give_the_named_files(make, file, tmp_path):
  path = tmp_path / file
  path.write_bytes(make({"usr/x.txt": b"x", "usr/y.txt": b"why", "z": b""}))
  assert archives.read_members(path, ["usr/y.txt", "z", "absent"]) == {"usr/y.txt": b"why", "z": b""}


@pytest.mark.parametrize("make, file", [(tgz, "a.tgz"), (wheel, "a.whl"), (deb, "a.deb")])
@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"<html>" + b[6:]], ids=["cut", "head"])
def test_damaged_archives_are_named(make, file, damage, tmp_path):
  path = tmp_path / file
  path.write_bytes(damage(make({"usr/x.txt": os.urandom(3000), "usr/y.txt": b"why"})))
  with pytest.raises(ValueError, match=f"{re.escape(str(path))}: damaged archive"):
    archives.read_members(path, ["usr/x.txt", "usr/y.txt"])


def test_unknown_archive_kind_is_named(tmp_path):
  with pytest.raises(ValueError, match=r"a\.rar: unknown kind of archive; allowed: \.tgz"):
    archives.read_members(tmp_path / "a.rar", ["x"])


@pytest.mark.parametrize("version", [1, 2, 3])
def test_qt_resource_file(version):
  files = {"a.svg": (b"plain", "plain"), "é.png": (b"zip" * 50, "zlib"), "c.webp": (b"std" * 50, "zstd")}
  assert archives.read_rcc(rcc(files, version)) == {f"top/{name}": content for name, (content, _) in files.items()}


@pytest.mark.parametrize("packing", ["plain", "zlib", "zstd"])
def test_damaged_qt_resource_file(packing):
  good = rcc({"a": (json.dumps(list(range(99))).encode(), packing)})
  with pytest.raises(ValueError, match="does not begin with 'qres'"):
    archives.read_rcc(b"quux" + good[4:])
  with pytest.raises(ValueError, match="damaged|cut short"):
    archives.read_rcc(good[:90])


def test_all_prepares_every_packaged_world(monkeypatch):
  from codebind_jax.tools import prepare

  asked = []
  for flag, value in (("_PROFILE", "auto"), ("_DATA_DIR", None)):
    monkeypatch.setattr(prepare, flag, types.SimpleNamespace(value=value))
  monkeypatch.setattr(prepare, "ensure", lambda world, profile, root, again: asked.append((world, profile)))
  prepare.main(["prepare", "all"])
  prepare.main(["prepare", "icons", "evoked"])
  assert asked == [(w, "auto") for w in ("icons", "household", "materials", "menagerie", "evoked", "icons", "evoked")]
