#!/usr/bin/env bash
# A TPU pod slice from request to deletion, through queued resources: see launch/README.md.
# Usage: bash launch/tpu_pod.sh COMMAND NAME [OPTIONS] [-- ARGUMENTS of codebind_jax.main]
# Commands:
#   up        create, install, run; again after a preemption, until the run is done; then delete (unless --keep)
#   create    request the slice, if it is not there, and wait for it
#   install   copy this commit to every worker, make the environment, mount the shared folder if there is one
#   run       train on every worker, showing worker 0's log; ends with the run's exit code
#   logs      follow worker 0's log (after the connection of `run` was lost)
#   state     print the state of the request
#   delete    delete slice and request: only this ends the bill
# Options:
#   --zone=ZONE --type=ACCELERATOR     needed (the type by `up` and `create`), e.g. us-west4-a, v5litepod-256
#   --version=RUNTIME                  software of the workers (v2-alpha-tpuv5-lite)
#   --project=PROJECT
#   --spot                             cheap, and taken away at any time
#   --reserved                         from a reservation of the project's
#   --nfs=HOST:/SHARE                  shared folder, mounted at /mnt/codebind: for the runs and the data, where these are
#                                      not in a bucket (--workdir=gs://BUCKET/RUN)
#   --restarts=N                       how often `up` asks for a slice again (20)
#   --poll=SECONDS                     between looks at the state of the request (30)
#   --keep                             `up` does not delete the slice at the end
#   --dry-run                          print the gcloud commands, run none
set -euo pipefail
cd "$(dirname "$0")/.."
readonly TAKEN=75  # exit code of a run that was told to end and has saved its state

fail() { echo "error: $1" >&2; exit 2; }

[ $# -ge 2 ] || fail "usage: bash launch/tpu_pod.sh up|create|install|run|logs|state|delete NAME [OPTIONS] -- ..."
command=$1 name=$2
shift 2
zone='' accelerator='' version=v2-alpha-tpuv5-lite nfs='' restarts=20 poll=30 keep='' dry=''
place=() request=("--node-id=$name")
while [ $# -gt 0 ]; do
  case $1 in
    --zone=*) zone=${1#*=} ;;
    --type=*) accelerator=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --project=*) place+=("$1") ;;
    --spot | --reserved) request+=("$1") ;;
    --nfs=*) nfs=${1#*=} ;;
    --restarts=*) restarts=${1#*=} ;;
    --poll=*) poll=${1#*=} ;;
    --keep) keep=1 ;;
    --dry-run) dry=1 ;;
    --) shift; break ;;
    *) fail "$1: unknown option; allowed: those in the head of launch/tpu_pod.sh" ;;
  esac
  shift
done
[[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || fail "NAME: got '$name'; allowed: lower-case letters, digits and -"
[ -n "$zone" ] || fail "--zone: not given"
case $command in up | create) [ -n "$accelerator" ] || fail "--type: not given" ;; esac
case $command in up | run) [ $# -gt 0 ] || fail "$command: no arguments for codebind_jax.main after --" ;; esac
if [ -z "$nfs" ] && [[ " $* " == *" --workdir="* ]] && [[ " $* " != *" --workdir=gs://"* ]]; then
  echo "warning: --workdir is on the workers' own disks, which go with them, and which they do not share; use" \
    "--workdir=gs://BUCKET/RUN, or --nfs" >&2
fi
place+=("--zone=$zone")
request+=("--accelerator-type=$accelerator" "--runtime-version=$version")

tpus() {
  if [ -n "$dry" ]; then printf 'gcloud compute tpus'; printf ' %q' "$@"; echo; else gcloud compute tpus "$@"; fi
}
on() { tpus tpu-vm ssh "$name" "${place[@]}" --worker="$1" --command="$2"; }

state() {  # nothing if there is no such request
  [ -z "$dry" ] || return 0
  gcloud compute tpus queued-resources describe "$name" "${place[@]}" --format='value(state.state)' 2>/dev/null || true
}

create() {
  [ -n "$(state)" ] || tpus queued-resources create "$name" "${place[@]}" "${request[@]}" || return
  [ -z "$dry" ] || return 0
  local now
  while now=$(state) && [ "$now" != ACTIVE ]; do
    case $now in
      SUSPENDING | SUSPENDED) return "$TAKEN" ;;
      FAILED) echo "error: the request for $name has failed" >&2; return 1 ;;
    esac
    echo "$name: ${now:-no answer}" >&2
    sleep "$poll"
  done
}

# A bucket or a shared folder outlives the workers; in another place a run begins anew after a preemption.
folder=/mnt/codebind
unpack="set -e; mkdir -p ~/codebind_jax; tar -xzf ~/codebind_jax.tgz -C ~/codebind_jax; cd ~/codebind_jax
python3 -m pip install --quiet --user uv
[ -x .venv/bin/python ] || python3 -m uv venv --quiet --seed --python 3.12 .venv
PYTHON=.venv/bin/python EXTRAS=tpu,gcs; . launch/environment.sh"
if [ -n "$nfs" ]; then
  mount="mountpoint -q $folder || { sudo apt-get install -y -q nfs-common && sudo mkdir -p $folder &&
sudo mount -t nfs $(printf %q "$nfs") $folder && sudo chmod a+rwx $folder; }"
else
  mount="sudo mkdir -p $folder && sudo chown \"\$USER\" $folder"
fi

install() {
  local there code=0
  there=$(mktemp -d)
  git archive --format=tar.gz --output="$there/codebind_jax.tgz" HEAD &&
    tpus tpu-vm scp "$there/codebind_jax.tgz" "$name:" "${place[@]}" --worker=all &&
    on all "$mount" && on all "$unpack" || code=$?
  rm -r "$there"
  return "$code"
}

# The trainer writes to a file and holds a lock: it outlives this connection, and a second `run` waits for the first.
run() {
  local code=0
  set -m  # a process group of its own, so that all of the follower can be ended
  on 0 'touch ~/run.log; tail -n 0 -F ~/run.log' &
  follower=$!
  set +m
  trap 'kill -- "-$follower" 2>/dev/null || true' EXIT
  on all "cd ~/codebind_jax && CODEBIND_DATA=$folder/data flock ~/run.lock .venv/bin/python -m codebind_jax.main\
 --stopped_exit_code=$TAKEN$(printf ' %q' "$@") >>~/run.log 2>&1 </dev/null" || code=$?
  [ -n "$dry" ] || kill -- "-$follower" 2>/dev/null || true
  wait "$follower" 2>/dev/null || true
  return "$code"
}

delete() { tpus queued-resources delete "$name" "${place[@]}" --force --quiet; }

up() {
  local code left
  for ((left = restarts; ; left--)); do
    code=0
    create || code=$?
    if [ "$code" -eq 0 ]; then
      { install && run "$@"; } || code=$?
      [ "$code" -ne 0 ] || break
      sleep "$poll"  # workers that lost one of theirs end with an error before the request says why
      [ "$(state)" = ACTIVE ] || code=$TAKEN
    fi
    [ "$code" -eq "$TAKEN" ] || break
    echo "$name was taken away; $left more requests" >&2
    delete || true
    [ "$left" -gt 0 ] || return "$TAKEN"
  done
  if [ -z "$keep" ] && [ -n "$dry$(state)" ]; then delete || return; fi
  return "$code"
}

case $command in
  up | create | install | run | state | delete) "$command" "$@" ;;
  logs) on 0 'tail -n 100 -F ~/run.log' ;;
  *) fail "$command: unknown command; allowed: up, create, install, run, logs, state, delete" ;;
esac
