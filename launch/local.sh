#!/usr/bin/env bash
# Trains on all devices of this machine; restarts after a crash.
#
#   launch/local.sh [--dry-run] WORKDIR [options of biclip train]
#   launch/local.sh runs/qata --config qata --config.data.source=/data/qata
#
# --dry-run prints the command and runs nothing.
#
# The run resumes from its last checkpoint. The script stops after MAX_RESTARTS (3) restarts, and
# immediately if the config or the data is invalid (status 2) or the run was stopped by a signal
# (130, 143). A signal to this script is sent to the run, which saves and exits.
set -u
. "$(dirname "$0")/common.sh"
dry_run=
[ "${1:-}" != --dry-run ] || { dry_run=1 && shift; }
[ $# -ge 1 ] || usage
workdir=$1
shift
command=(python -m biclip_jax.train --workdir "$workdir" "$@")
if [ -n "$dry_run" ]; then
  quoted "${command[@]}"
  exit 0
fi
child=
trap '[ -z "$child" ] || kill -TERM "$child"' TERM INT
for attempt in $(seq 0 "${MAX_RESTARTS:-3}"); do
  [ "$attempt" = 0 ] || echo "restart $attempt" >&2
  "${command[@]}" &
  child=$!
  wait_for "$child"
  status=$?
  case $status in 0 | 2 | 130 | 143) exit $status ;; esac
done
exit $status
