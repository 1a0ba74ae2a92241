#!/usr/bin/env bash
# Trains on several nodes of a Slurm cluster, one process per node; restarts after a crash.
#
#   launch/slurm.sh [--dry-run] NODES WORKDIR [options of biclip train]
#   launch/slurm.sh 4 /shared/runs/qata --config qata --config.data.source=/shared/qata
#
# WORKDIR is in a folder that all nodes share. Environment: GPUS_PER_NODE (1; 0 for none),
# MAX_RESTARTS (3), and to override the defaults of the cluster CPUS_PER_NODE, TIME, PARTITION.
# --dry-run prints the command and runs nothing.
#
# The run resumes from its last checkpoint. The script stops after MAX_RESTARTS restarts, if the
# config or the data is invalid (status 2), and if the run was stopped by a signal or the time
# limit. To stop a run after it has saved: scancel --batch --signal=TERM JOB.
set -u

# Runs on the first node, with the srun command as its arguments. It sources nothing: sbatch copies
# only this file.
run_job() {
  max_restarts=$1
  shift
  stopped=
  # scancel signals the processes of the step: srun itself would treat the signal as SIGKILL.
  trap 'stopped=1; scancel --signal=TERM "$SLURM_JOB_ID"' TERM
  for attempt in $(seq 0 "$max_restarts"); do
    [ "$attempt" = 0 ] || echo "restart $attempt" >&2
    "$@" &
    child=$!
    wait "$child"
    status=$?
    # A signal ends `wait` early; the run itself is still saving.
    while kill -0 "$child" 2>/dev/null; do
      wait "$child"
      status=$?
    done
    case $status in 0 | 2 | 130) exit "$status" ;; esac
    # srun returns the highest status of all processes, and after the loss of one process Slurm
    # ends the others by SIGTERM: 143 means a stop only if this script received a signal.
    [ -z "$stopped" ] || exit "$status"
  done
  exit "$status"
}

if [ "${1:-}" = --job ]; then
  shift
  run_job "$@"
fi
. "$(dirname "$0")/common.sh"
dry_run=
[ "${1:-}" != --dry-run ] || { dry_run=1 && shift; }
[ $# -ge 2 ] || usage
nodes=$1
workdir=$2
shift 2
[[ $nodes =~ ^[1-9][0-9]*$ ]] ||
  { echo "$0: NODES is '$nodes'; expected a number from 1; see $0 without arguments" >&2; exit 2; }
gpus=${GPUS_PER_NODE:-1}
[[ $gpus =~ ^[0-9]+$ ]] ||
  { echo "$0: GPUS_PER_NODE is '$gpus'; expected a number; give 0 for none" >&2; exit 2; }

tasks=(--nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1)
# srun does not inherit this option from sbatch (Slurm 22.05 and later).
[ -z "${CPUS_PER_NODE:-}" ] || tasks+=(--cpus-per-task="$CPUS_PER_NODE")
# B: the signal goes to this script, which forwards it and so knows about it. Slurm may send it a
# minute earlier; the 120 seconds are for the current train step and the checkpoint.
job=("${tasks[@]}" --job-name=biclip_jax --signal=B:TERM@120 --requeue --open-mode=append)
[ "$gpus" = 0 ] || job+=(--gpus-per-node="$gpus")
[ -z "${TIME:-}" ] || job+=(--time="$TIME")
[ -z "${PARTITION:-}" ] || job+=(--partition="$PARTITION")

# Without --kill-on-bad-exit the other processes would wait for the lost one.
step=(srun "${tasks[@]}" --kill-on-bad-exit=1)
# Under Slurm, jax uses one GPU per process by default.
[ "$gpus" = 0 ] || step+=(env JAX_LOCAL_DEVICE_IDS="$(seq -s , 0 $((gpus - 1)))")
step+=(python -m biclip_jax.train --workdir "$workdir" "$@")

command=(sbatch "${job[@]}" "$0" --job "${MAX_RESTARTS:-3}" "${step[@]}")
if [ -n "$dry_run" ]; then quoted "${command[@]}"; else exec "${command[@]}"; fi
