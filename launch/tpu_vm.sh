#!/usr/bin/env bash
# Trains on all hosts of a Cloud TPU VM; restarts after a crash.
#
#   launch/tpu_vm.sh [--dry-run] create NAME [options of gcloud, such as --spot]
#   launch/tpu_vm.sh [--dry-run] install NAME WHEEL_HERE | URL | /PATH/ON/THE/HOSTS
#   launch/tpu_vm.sh [--dry-run] train NAME WORKDIR [options of biclip train]
#   launch/tpu_vm.sh [--dry-run] stop NAME
#   launch/tpu_vm.sh [--dry-run] delete NAME
#
# WORKDIR is the absolute path of a folder that all hosts share. Environment: PROJECT and
# ZONE; for create also TYPE, such as v5litepod-16, and VERSION, such as v2-alpha-tpuv5-lite;
# PYTHON (python3) of the hosts, 3.11 or later; MAX_RESTARTS (3); RESTART_PAUSE (30), seconds.
# --dry-run prints the commands and runs none.
#
# The run resumes from its last checkpoint. The script stops after MAX_RESTARTS restarts, and
# immediately if the config or the data is invalid (status 2) or the run was stopped by a signal
# (130, 143). stop, or a signal to this script, ends the run on all hosts after it has saved.
set -u
. "$(dirname "$0")/common.sh"

run() {
  if [ -n "$dry_run" ]; then quoted "$@"; else "$@"; fi
}

tpu_vm() {
  local verb=$1
  shift
  run gcloud compute tpus tpu-vm "$verb" "$@" --project="$PROJECT" --zone="$ZONE"
}

on_all_hosts() {
  tpu_vm ssh "$name" --worker=all --command="$1"
}

install() {
  local target
  if [ -f "$1" ]; then
    tpu_vm scp "$1" "$name:" --worker=all || return
    target="./$(basename "$1")[tpu,train]"
  elif [[ $1 = *://* ]]; then
    target="biclip_jax[tpu,train] @ $1"
  elif [[ $1 = /* ]]; then
    target="$1[tpu,train]"
  else
    echo "$0: $1: no such file here; expected a wheel, a URL or an absolute path of the hosts;" \
      "build a wheel with: python -m build --wheel" >&2
    return 2
  fi
  on_all_hosts "$(quoted "$python" -m pip install "$target")"
}

# The brackets keep the pattern from matching the shell that contains it. Only the oldest process gets
# the signal, once: a second signal would end a run that is saving.
stop() {
  # shellcheck disable=SC2016 # the hosts expand it
  on_all_hosts 'pkill -TERM -o -f "[b]iclip_jax[.]train" || exit 0; '\
'for _ in $(seq 60); do sleep 2; pgrep -f "[b]iclip_jax[.]train" || exit 0; done; '\
'pkill -KILL -f "[b]iclip_jax[.]train"'
}

train() {
  local workdir=$1 command stopped='' attempt status
  shift
  [[ $workdir = /* ]] || {
    echo "$0: WORKDIR is '$workdir'; expected an absolute path;" \
      "give a folder that all hosts share" >&2
    return 2
  }
  # exec: the program replaces the shell, so that the pattern above matches only the program.
  command="exec env BICLIP_DISTRIBUTED=auto $(
    quoted "$python" -m biclip_jax.train --workdir "$workdir" "$@"
  )"
  if [ -n "$dry_run" ]; then
    on_all_hosts "$command"
    return
  fi
  trap 'stopped=1; stop' TERM INT
  for attempt in $(seq 0 "${MAX_RESTARTS:-3}"); do
    if [ "$attempt" != 0 ]; then
      echo "restart $attempt" >&2
      sleep "${RESTART_PAUSE:-30}"
      # After a lost connection the run may continue on its host and hold the TPU and the workdir.
      stop
      [ -z "$stopped" ] || return 143
    fi
    on_all_hosts "$command" &
    wait_for $!
    status=$?
    case $status in 0 | 2 | 130 | 143) return "$status" ;; esac
    [ -z "$stopped" ] || return "$status"
  done
  return "$status"
}

dry_run=
[ "${1:-}" != --dry-run ] || { dry_run=1 && shift; }
[ $# -ge 2 ] || usage
verb=$1
name=$2
shift 2
python=${PYTHON:-python3}
require PROJECT "the Google Cloud project"
require ZONE "the zone of the TPU, such as us-west4-a"
case $verb in
  create)
    require TYPE "the kind and number of chips, such as v5litepod-16"
    require VERSION "the TPU software version, such as v2-alpha-tpuv5-lite"
    tpu_vm create "$name" --accelerator-type="$TYPE" --version="$VERSION" "$@"
    ;;
  install)
    [ $# = 1 ] || usage
    install "$1"
    ;;
  train)
    [ $# -ge 1 ] || usage
    train "$@"
    ;;
  stop) stop ;;
  delete) tpu_vm delete "$name" --quiet ;;
  *) usage ;;
esac
