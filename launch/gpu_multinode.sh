#!/usr/bin/env bash
# Training on several hosts with GPUs, one process a host with all its GPUs: see launch/README.md.
# Usage, on every host (ID 0 to COUNT - 1; COORDINATOR is HOST:PORT of host 0):
#   bash launch/gpu_multinode.sh node COORDINATOR COUNT ID [ARGUMENTS of codebind_jax.main]
# or from anywhere, over ssh to all of them; Ctrl-C or SIGTERM saves and ends the run:
#   bash launch/gpu_multinode.sh ssh HOST,HOST,... [--dir=DIR] [--port=PORT] [--restarts=N] -- [ARGUMENTS]
# Options: DIR is this checkout on every host (codebind_jax), PORT of host 0 (9876), N how often to start again after a
# host was lost or taken away (0). Variables: VENV as in quickstart.sh.
set -euo pipefail
readonly TAKEN=75  # exit code of a run that was told to end and has saved its state
readonly LOST=255  # what ssh says of a host that does not answer

fail() { echo "error: $1" >&2; exit 2; }

node() {
  [ $# -ge 3 ] || fail "usage: bash launch/gpu_multinode.sh node COORDINATOR COUNT ID [ARGUMENTS]"
  local coordinator=$1 count=$2 id=$3
  shift 3
  cd "$(dirname "$0")/.."
  exec "${VENV:-.venv}/bin/python" -m codebind_jax.main --coordinator="$coordinator" --num_processes="$count" \
    --process_id="$id" --stopped_exit_code="$TAKEN" "$@"
}

started() {  # HOST ID: one process, its lines with the host's name before them
  local remote
  remote="cd $(printf %q "$folder") && echo \$\$ >.run.pid && exec bash launch/gpu_multinode.sh node \
${hosts[0]}:$port ${#hosts[@]} $2$arguments"
  ssh -o BatchMode=yes -o ServerAliveInterval=15 "$1" "$remote" 2>&1 | sed -u "s/^/$1: /"
}

stop() {
  told=1 again=1
  # One process is enough: they agree on a step.
  ssh -o BatchMode=yes "${hosts[0]}" "kill -TERM \"\$(cat $(printf %q "$folder")/.run.pid)\"" || true
}

everywhere() {
  local id process code all=0
  local processes=()
  for id in "${!hosts[@]}"; do
    started "${hosts[$id]}" "$id" &
    processes+=("$!")
  done
  for process in "${processes[@]}"; do
    while
      again='' code=0
      wait "$process" || code=$?
      [ -n "$again" ]  # a signal ended the waiting, not the process
    do :; done
    # A host that was lost explains the errors of the others.
    if [ "$code" -eq "$LOST" ] || [ "$all" -eq 0 ]; then all=$code; fi
  done
  return "$all"
}

over_ssh() {
  [ $# -ge 1 ] || fail "usage: bash launch/gpu_multinode.sh ssh HOST,HOST,... [OPTIONS] -- [ARGUMENTS]"
  IFS=, read -ra hosts <<<"$1"
  shift
  folder=codebind_jax port=9876 told='' again=''
  local restarts=0 host code
  while [ $# -gt 0 ]; do
    case $1 in
      --dir=*) folder=${1#*=} ;;
      --port=*) port=${1#*=} ;;
      --restarts=*) restarts=${1#*=} ;;
      --) shift; break ;;
      *) fail "$1: unknown option; allowed: --dir, --port, --restarts, -- before the arguments of main" ;;
    esac
    shift
  done
  for host in "${hosts[@]}"; do
    [[ $host =~ ^[A-Za-z0-9][-A-Za-z0-9._]*$ ]] || fail "HOST: got '$host'; allowed: names and addresses without user"
  done
  arguments=
  [ $# -eq 0 ] || arguments=$(printf ' %q' "$@")
  trap stop INT TERM
  while :; do
    code=0
    everywhere || code=$?
    if [ -n "$told" ] || { [ "$code" -ne "$TAKEN" ] && [ "$code" -ne "$LOST" ]; } || [ "$restarts" -le 0 ]; then
      return "$code"
    fi
    echo "a host was lost or taken away (exit code $code); starting again, $((--restarts)) more times" >&2
  done
}

case ${1-} in
  node) shift; node "$@" ;;
  ssh) shift; over_ssh "$@" ;;
  *) fail "'${1-}': unknown command; allowed: node, ssh" ;;
esac
