#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster, by xpk; restarts after a crash.
#
#   launch/gke.sh [--dry-run] CLUSTER IMAGE TPU_TYPE NUM_SLICES -- options of biclip train
#   WORKLOAD=qata PROJECT=mine ZONE=us-west4-a launch/gke.sh tpus gcr.io/mine/biclip_jax:1 \
#     v5litepod-16 2 -- --workdir /shared/runs/qata --config qata \
#     --config.data.source=/shared/qata
#
# --workdir is among the options: a folder that all pods mount. Environment: WORKLOAD (the name
# of the job, lower case), PROJECT, ZONE; MAX_RESTARTS (3). --dry-run prints the command and
# runs nothing.
#
# The run resumes from its last checkpoint. The cluster stops after MAX_RESTARTS restarts, and
# immediately if the config or the data is invalid (status 2).
set -u
. "$(dirname "$0")/common.sh"

dry_run=
[ "${1:-}" != --dry-run ] || { dry_run=1 && shift; }
[ $# -ge 5 ] || usage
[ "$5" = -- ] || usage
cluster=$1
image=$2
tpu_type=$3
num_slices=$4
shift 5
require WORKLOAD "a name for the job, such as qata-1"
require PROJECT "the Google Cloud project"
require ZONE "the zone of the cluster, such as us-west4-a"
[[ " $* " =~ \ --workdir[=\ ] ]] || {
  echo "$0: no --workdir among the options; expected a folder that all pods mount;" \
    "add --workdir DIR after --" >&2
  exit 2
}

# By default xpk restarts a job after 42 and 127-255, which does not include a plain crash. 130 and
# 143 are included and stay: here a signal comes from the cluster, which takes a node away, and the
# run resumes on another one. Without exec the signal would end at the shell.
command=(
  xpk workload create
  --cluster="$cluster"
  --workload="$WORKLOAD"
  --project="$PROJECT"
  --zone="$ZONE"
  --docker-image="$image"
  --tpu-type="$tpu_type"
  --num-slices="$num_slices"
  --max-restarts="${MAX_RESTARTS:-3}"
  --restart-on-exit-codes='1,3-126'
  --termination-grace-period-seconds=120
  --env=BICLIP_DISTRIBUTED=auto
  --command="exec $(quoted python3 -m biclip_jax.train "$@")"
)
if [ -n "$dry_run" ]; then quoted "${command[@]}"; else exec "${command[@]}"; fi
