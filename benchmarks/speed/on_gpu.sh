#!/usr/bin/env bash
# One prepared run of at most 8 minutes on one GPU. The table keeps what was measured until then.
#
#     bash benchmarks/speed/on_gpu.sh [FLAGS OF run.py]
#     bash benchmarks/speed/on_gpu.sh --device cpu --small --output /tmp/speed      # a dry run without a GPU
#
# Nothing is downloaded: weights are random, made from configurations.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHONPATH="$PWD" HF_HUB_OFFLINE=1
rows=(gpu_loss_step loss loss_memory gpu_training gpu_memory gpu_trainer)
exec timeout 480 python -m benchmarks.speed.run --device cuda --rows "${rows[@]}" "$@"
