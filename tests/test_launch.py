"""The launchers against stand-ins for gcloud, ssh and SLURM, which log their arguments and run what hosts would run."""

import os
import pathlib
import shlex
import signal
import subprocess
import sys

import jax
import pytest

from codebind_jax.runtime import distributed

REPOSITORY = pathlib.Path(__file__).parents[1]
LAUNCH = REPOSITORY / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch"), REPOSITORY / ".ci" / "run"])
ARGUMENTS = ["--config=configs/stage1.py:runlocal", "--workdir=/mnt/codebind/a b's; $(run)"]

# `next FILE DEFAULT` takes a line off a file of answers; every call is logged.
COMMON = """#!/usr/bin/env bash
next() { if [ -s "$1" ]; then head -n 1 "$1"; sed -i 1d "$1"; else echo "$2"; fi; }
printf -v call '%q ' "$@"
echo "$call" >>"$LOGS/${0##*/}.log"
"""
# On a host: ends with the next exit code, or waits to be told to and ends like a trainer that has saved.
PYTHON = """
code=$(next codes 0)
if [ "$code" = wait ]; then
  trap 'kill $!; exit 75' TERM
  tail -f /dev/null & touch "$LOGS/waiting"; echo $$ >"$LOGS/pid"
  wait $!
fi
exit "$code"
"""
PROGRAMS = {
  "gcloud": """
case "$*" in
  *" describe "*) next "$LOGS/states" ACTIVE ;;
  *" create "*) exit "$(next "$LOGS/creates" 0)" ;;
  *codebind_jax.main*) command=${*: -1:1}; HOME=$LOGS/home exec bash -c "${command#--command=}" ;;
  *"tail -n 0"*) exec tail -f /dev/null ;;
esac
""",
  "ssh": """
host=${*: -2:1} command=${*: -1:1}
cd "$LOGS/home/$host" || exit 255
exec bash -c "$command"
""",
  "srun": 'shift; exec "$@"',
  "scancel": 'kill -TERM "$(cat "$LOGS/pid")"',
  "scontrol": "",
}


class Hosts:
  """Stand-ins on PATH, what they were called with, and what they shall answer."""

  def __init__(self, folder):
    self.folder = folder
    # Hosts get none of the variables that say where this suite runs.
    own = {name: value for name, value in os.environ.items() if name not in ("VENV", "PYTHON", "EXTRAS")}
    self.env = own | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "LOGS": str(folder)}
    for name, text in PROGRAMS.items():
      self._program(folder / "bin" / name, text)
    self.checkout()

  def _program(self, path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(COMMON + text)
    path.chmod(0o755)

  def checkout(self, host="."):
    """This repository as a host has it."""
    checkout = self.folder / "home" / host / "codebind_jax"
    self._program(checkout / ".venv" / "bin" / "python", PYTHON)
    (checkout / "launch").symlink_to(LAUNCH)
    return checkout

  def answer(self, file, *lines):
    (self.folder / file).write_text("".join(f"{line}\n" for line in lines))

  def start(self, script, *arguments):
    extra = {"SLURM_SUBMIT_DIR": str(self.folder / "home" / "codebind_jax"), "SLURM_JOB_ID": "7"}
    return subprocess.Popen(["bash", str(LAUNCH / script), *arguments], env=self.env | extra, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip

  def run(self, script, *arguments):
    """(exit code, output, errors) of a launcher; one that leaves a process behind never ends."""
    process = self.start(script, *arguments)
    return (lambda out, err: (process.returncode, out, err))(*process.communicate(timeout=60))

  def calls(self, name):
    """Arguments of every call."""
    log = self.folder / f"{name}.log"
    return [shlex.split(line) for line in log.read_text().splitlines()] if log.exists() else []

  def wait(self, process):
    """Until a trainer waits to be told to end."""
    while process.poll() is None and not (self.folder / "pid").exists():
      pass


@pytest.fixture
def hosts(tmp_path, monkeypatch):
  monkeypatch.setenv("VENV", "this suite's")  # as where it was named for launch/test.sh
  return Hosts(tmp_path)


def verbs(calls):
  """What gcloud was asked for, without looks at the state."""
  names = {"queued-resources": lambda c: c[3], "tpu-vm": lambda c: c[3] + ("" if "--worker=all" in c else " 0")}
  return [names[c[2]](c) for c in calls if c[3] != "describe"]


POD = ("up", "my-pod", "--zone=us-west4-a", "--type=v5litepod-16", "--poll=0")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script):
  found = subprocess.run(
    [pathlib.Path(sys.executable).with_name("shellcheck"), "-x", script], cwd=REPOSITORY, capture_output=True, text=True
  )
  assert found.returncode == 0, found.stdout


def test_a_pod_is_made_used_and_deleted(hosts):
  hosts.answer("states", "", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
  code, _, err = hosts.run("tpu_pod.sh", *POD, "--spot", "--project=p", "--nfs=10.0.0.2:/runs", "--", *ARGUMENTS)
  assert code == 0, err
  calls = hosts.calls("gcloud")
  made = next(call for call in calls if call[3] == "create")
  assert made[2:] == ["queued-resources", "create", "my-pod", "--project=p", "--zone=us-west4-a", "--node-id=my-pod",
                      "--spot", "--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite"]
  found = verbs(calls)
  assert [verb for verb in found if verb != "ssh 0"] == ["create", "scp", "ssh", "ssh", "ssh", "delete"]
  assert found.count("ssh 0") == 1, "nobody showed the log"
  assert any("mount -t nfs 10.0.0.2:/runs /mnt/codebind" in call[-1] for call in calls)
  assert {"--force", "--quiet"} <= set(calls[-1]) and "--zone=us-west4-a" in calls[-1]
  assert hosts.calls("python") == [["-m", "codebind_jax.main", "--stopped_exit_code=75", *ARGUMENTS]]


def test_a_pod_keeps_its_run_in_a_bucket_and_says_what_would_be_lost(hosts):
  bucket = ["--config=configs/stage1.py", "--workdir=gs://bucket/run"]
  code, _, err = hosts.run("tpu_pod.sh", *POD, "--", *bucket)
  assert code == 0 and "warning" not in err
  assert hosts.calls("python") == [["-m", "codebind_jax.main", "--stopped_exit_code=75", *bucket]]
  calls = [call[-1] for call in hosts.calls("gcloud")]
  assert not any("nfs" in call for call in calls) and any("EXTRAS=tpu,gcs" in call for call in calls)
  for share, warned in (([], True), (["--nfs=10.0.0.2:/runs"], False)):
    code, _, err = hosts.run("tpu_pod.sh", *POD, *share, "--", *ARGUMENTS)
    assert code == 0 and ("warning: --workdir is on the workers' own disks" in err) == warned


@pytest.mark.parametrize(
  ("codes", "states", "runs", "code"),
  [
    ((75, 0), ("", "ACTIVE", "SUSPENDED", "", "ACTIVE"), 2, 0),
    ((1, 0), ("", "ACTIVE", "SUSPENDING", "", "ACTIVE"), 2, 0),  # a worker was lost first
    ((0,), ("", "SUSPENDED", "", "ACTIVE"), 1, 0),  # before anything ran
    ((1,), ("", "ACTIVE", "ACTIVE"), 1, 1),  # the run's own error
    ((75, 75, 75, 75), ("", "ACTIVE", "") * 4, 3, 75),
  ],
  ids=["told", "lost", "never_there", "error", "too_often"],
)
def test_a_pod_taken_away_is_asked_for_again_and_an_error_is_not(hosts, codes, states, runs, code):
  hosts.answer("home/codebind_jax/codes", *codes)
  hosts.answer("states", *states)
  found, _, err = hosts.run("tpu_pod.sh", *POD, "--spot", "--restarts=2", "--", *ARGUMENTS)
  assert found == code, err
  assert len(hosts.calls("python")) == runs
  found = verbs(hosts.calls("gcloud"))
  assert found[-1] == "delete" and found.count("create") == found.count("delete"), "something is still paid for"


def test_a_refused_request_is_not_repeated(hosts):
  hosts.answer("creates", 3)
  hosts.answer("states", "", "")
  code, _, _ = hosts.run("tpu_pod.sh", *POD, "--", *ARGUMENTS)
  assert code == 3
  assert verbs(hosts.calls("gcloud")) == ["create"]


def test_an_installation_that_fails_runs_nothing(hosts):
  (hosts.folder / "bin" / "gcloud").write_text(COMMON + 'case "$*" in *describe*) echo ACTIVE ;; *scp*) exit 9 ;; esac')
  code, _, _ = hosts.run("tpu_pod.sh", *POD, "--keep", "--", *ARGUMENTS)
  assert code == 9
  assert verbs(hosts.calls("gcloud")) == ["scp"]


def test_a_dry_run_only_prints(hosts):
  code, out, err = hosts.run("tpu_pod.sh", *POD, "--dry-run", "--spot", "--", *ARGUMENTS)
  assert code == 0, err
  assert hosts.calls("gcloud") == []
  printed = [line for line in out.splitlines() if line.startswith("gcloud compute tpus ")]
  assert [line.split()[4] for line in printed if "tail" not in line] == ["create", "scp", "ssh", "ssh", "ssh", "delete"]


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (("up",), "usage: bash launch/tpu_pod.sh up"),
    (("up", "my pod", "--zone=z"), "NAME: got 'my pod'; allowed: lower-case letters"),
    (("up", "pod", "--type=t"), "--zone: not given"),
    (("up", "pod", "--zone=z"), "--type: not given"),
    (("run", "pod", "--zone=z"), "run: no arguments for codebind_jax.main"),
    (("up", "pod", "--zone=z", "--sport"), "--sport: unknown option"),
    (("fly", "pod", "--zone=z"), "fly: unknown command; allowed: up, create"),
  ],
)
def test_a_bad_call_names_what_is_wrong_before_anything_costs(hosts, arguments, message):
  code, _, err = hosts.run("tpu_pod.sh", *arguments)
  assert code == 2 and f"error: {message}" in err
  assert hosts.calls("gcloud") == []


def test_hosts_with_gpus_get_their_numbers_and_arguments(hosts):
  for host in "ab":
    hosts.checkout(host)
  code, _, err = hosts.run("gpu_multinode.sh", "ssh", "a,b", "--port=1234", "--", *ARGUMENTS)
  assert code == 0, err
  same = ["-m", "codebind_jax.main", "--coordinator=a:1234", "--num_processes=2"]
  rest = ["--stopped_exit_code=75", *ARGUMENTS]
  assert sorted(hosts.calls("python")) == [[*same, f"--process_id={i}", *rest] for i in range(2)]


@pytest.mark.parametrize(
  ("codes", "restarts", "runs", "code"),
  [((75,), 0, 2, 75), ((75, 0), 1, 4, 0), ((255, 0), 1, 4, 0), ((4,), 1, 2, 4)],
  ids=["no_restarts", "told", "lost", "error"],
)
def test_hosts_start_again_only_after_one_was_taken_away(hosts, codes, restarts, runs, code):
  for host in "ab":
    hosts.checkout(host)
  # The others end with an error before it is known why.
  hosts.answer("home/a/codebind_jax/codes", *({255: 1}.get(c, c) for c in codes))
  hosts.answer("home/b/codebind_jax/codes", *codes)
  found, _, err = hosts.run("gpu_multinode.sh", "ssh", "a,b", f"--restarts={restarts}", "--", *ARGUMENTS)
  assert found == code, err
  assert len(hosts.calls("python")) == runs


def test_ending_the_launcher_ends_the_hosts(hosts):
  hosts.checkout("a")
  hosts.answer("home/a/codebind_jax/codes", "wait")
  process = hosts.start("gpu_multinode.sh", "ssh", "a", "--restarts=5", "--", *ARGUMENTS)
  hosts.wait(process)
  process.send_signal(signal.SIGTERM)
  process.communicate(timeout=60)
  assert process.returncode == 75
  assert len(hosts.calls("python")) == 1


@pytest.mark.parametrize(("told", "code", "queued"), [(False, 75, True), (False, 0, False), (False, 4, False),
                                                      (True, 75, True)])  # fmt: skip
def test_slurm_queues_again_what_was_told_to_end(hosts, told, code, queued):
  hosts.answer("home/codebind_jax/codes", "wait" if told else code)
  process = hosts.start("slurm.sbatch", *ARGUMENTS)
  if told:
    hosts.wait(process)
    process.send_signal(signal.SIGTERM)
  _, err = process.communicate(timeout=60)
  assert process.returncode == code, err
  assert hosts.calls("scontrol") == ([["requeue", "7"]] if queued else [])
  assert hosts.calls("scancel") == ([["--signal=TERM", "7"]] if told else [])
  assert hosts.calls("python") == [["-m", "codebind_jax.main", "--stopped_exit_code=75", *ARGUMENTS]]
  assert hosts.calls("srun")[0][0] == "--kill-on-bad-exit=0"


def test_a_cloud_tpu_vm_finds_its_pod_and_another_machine_is_alone(monkeypatch):
  found = []
  monkeypatch.setattr(jax.distributed, "initialize", lambda *given, **_: found.append(given))
  for name in ("TPU_ML_PLATFORM", "TPU_SKIP_MDS_QUERY"):
    monkeypatch.delenv(name, raising=False)
  distributed.start()
  monkeypatch.setenv("TPU_ML_PLATFORM", "JAX")
  distributed.start()
  assert found == [(None, None, None)]
  monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")  # as without metadata
  distributed.start()
  assert len(found) == 1
