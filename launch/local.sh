#!/usr/bin/env bash
# One run on this machine, on all its devices; runs again after a crash.
#
#   launch/local.sh [--dry-run] WORKDIR [options of biclip_jax.train]
#   launch/local.sh runs/qata --config qata --config.data.source=/data/qata
#
# --dry-run prints the command and runs nothing.
#
# The run goes on from its last checkpoint each time. It is given up after MAX_RESTARTS (3)
# failures, and at once when the configuration or the data does not fit (status 2) or when
# somebody stopped it (130, 143). A signal to this script goes to the run, which saves and leaves.
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
