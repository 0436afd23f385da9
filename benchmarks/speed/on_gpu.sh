#!/usr/bin/env bash
# One prepared run of at most 8 minutes on one GPU. The table keeps what was measured until then.
#
#     bash benchmarks/speed/on_gpu.sh [PHOTOGRAPHS] [FLAGS OF run.py]
#     bash benchmarks/speed/on_gpu.sh --device cpu --small --output /tmp/speed      # a dry run without a GPU
#
# PHOTOGRAPHS is a data set for `examples/finetune.py`, such as CIFAR-100 as train/CLASS/*.png and test/CLASS/*.png.
# Nothing is downloaded: weights are random, made from configurations.
set -euo pipefail
cd "$(dirname "$0")/../.."
rows=(precision gpu_loss_step loss loss_memory gpu_training gpu_memory gpu_text)
photographs=()
if [[ $# -gt 0 && $1 != -* ]]; then
    photographs=(--photographs "$1")
    rows+=(gpu_finetune)
    shift
fi
rows+=(compile)
export PYTHONPATH="$PWD" HF_HUB_OFFLINE=1
exec timeout 480 python benchmarks/speed/run.py --device cuda --rows "${rows[@]}" "${photographs[@]}" "$@"
