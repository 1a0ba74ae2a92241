#!/usr/bin/env bash
# Runs all GPU benchmarks of docs/performance.md; keeps the parts that already exist.
#
#   benchmarks/gpu_all.sh [--small] FOLDER [options of benchmarks.bench]
#   benchmarks/gpu_all.sh docs/results/gpu --cases matmul_4096 published_train
#
# Needs the extras `gpu` and `parity`, with a PyTorch for this GPU, and nothing else on the GPU.
# Writes machine.txt, bench.jsonl, bench.md, bench.png, and profile.jsonl of one train step, whose
# trace is in FOLDER/trace. --small is a trial with a tiny BiCLIP on any device.
set -euo pipefail
small=
[ "${1:-}" != --small ] || { small=1 && shift; }
[ $# -ge 1 ] || { echo "usage: $0 [--small] FOLDER [options of benchmarks.bench]" >&2; exit 2; }
mkdir -p "$1"
folder=$(cd "$1" && pwd)
shift
cd "$(dirname "$0")/.."

{
  nvidia-smi --query-gpu=name,memory.total,driver_version,clocks.max.sm --format=csv 2>/dev/null ||
    echo "no nvidia-smi"
  python -c 'import jax, jaxlib, torch; print(*jax.devices(), jax.__version__, torch.__version__)'
} >"$folder/machine.txt"

python -m benchmarks.bench --suite gpu ${small:+--small} --output "$folder/bench.jsonl" "$@"
python -m benchmarks.bench --table "$folder/bench.jsonl" --plot "$folder/bench.png" \
  >"$folder/bench.md"

if [ ! -e "$folder/profile.jsonl" ]; then
  config=(--config qata --config.batch_size=64 --config.model.dtype=bfloat16)
  [ -z "$small" ] || config=(--config qata:smoke)
  python -m benchmarks.profile "${config[@]}" --output "$folder/trace" >"$folder/profile.part"
  mv "$folder/profile.part" "$folder/profile.jsonl"
fi
