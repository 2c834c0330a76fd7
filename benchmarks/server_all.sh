#!/usr/bin/env bash
# What strangers and machines do to a server, all of it: about 20 minutes on two cores that nobody else uses.
# The results go to benchmarks/results; a line tells of each benchmark whether it passed. Arguments name some of them:
#     benchmarks/server_all.sh
#     benchmarks/server_all.sh queue ends
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH=$PWD/src HF_HUB_OFFLINE=1
declare -A flags=(
  [faults]="--longest 1500 --faults 100"
  [paced]="--longest 1500 --seconds 120"
  [queue]="--longest 300 --requests 10000 --connections 500"
  [ends]="--ends 50"
  [disk]="--longest 1500"
)
failed=0
for name in ${*:-paced queue disk ends faults}; do
  begin=$SECONDS log=$(mktemp)
  # shellcheck disable=SC2086 # flags are words
  .venv/bin/python "benchmarks/server_$name.py" --model tiny -pcp 2 ${flags[$name]} \
    --output-json "benchmarks/results/server-$name.json" >"$log" 2>&1
  code=$?
  [ $code = 0 ] && verdict=passed || { verdict="FAILED, see $log" failed=1; }
  printf '%-8s %5d s  %s\n' "$name" $((SECONDS - begin)) "$verdict"
  grep -E '^ "[a-z_0-9% ]+": [0-9.]+,?$|not survived' "$log"
done
exit $failed
