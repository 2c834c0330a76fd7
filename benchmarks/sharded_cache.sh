#!/usr/bin/env bash
# All that is to be shown of a sharded KV cache on two GPUs: benchmarks/sharded_cache.sh OUT STAGE
#   tests       tests/gpu/test_cache_shares.py
#   capacity    tokens that fit into 8 GiB a rank, with either holding
#   layouts     TTFT and decodes of Llama-3.1-8B's shape, replicated and sharded in one call; LENS, DECODES
#   million     one request of LEN tokens (1,000,000); needs 141 GB a GPU
# With the Python that has PyTorch for CUDA: PYTHON=/path/to/python
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=$1 stage=$2 python=${PYTHON:-python3}
export HF_HUB_OFFLINE=1 PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$out"
case $stage in
  tests) "$python" -m pytest tests/gpu/test_cache_shares.py -x -q -p no:benchmark --disable-warnings ;;
  capacity) "$python" benchmarks/long_context.py -pcp 2 --capacity 8 --output-json "$out/capacity.json" ;;
  layouts)
    "$python" -c "
import sys; sys.path.insert(0, 'benchmarks')
from pathlib import Path
from long_context import write_config
Path('$out/model').mkdir(exist_ok=True); write_config(Path('$out/model'), 131072)"
    for holding in replicated sharded; do
      "$python" benchmarks/layouts.py --model "$out/model" --load-format dummy -pcp 2 --kv-cache $holding \
        --lens "${LENS-1024,2048,8192,32768}" --decodes "${DECODES-1024x1,1024x8,32768x1}" \
        --output-json "$out/layouts-$holding.json"
    done ;;
  million)
    "$python" benchmarks/long_context.py -pcp 2 --len "${LEN-1000000}" --flops "${FLOPS-600e12}" \
      --bandwidth "${BANDWIDTH-2.3e12}" --output-json "$out/million.json" ;;
  *) echo "unknown stage $stage" >&2; exit 2 ;;
esac
