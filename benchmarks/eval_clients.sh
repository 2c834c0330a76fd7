#!/usr/bin/env bash
# Runs lm_eval, guidellm and aiperf against a server of the demo model, each once and small, and ends with 1 if one fails.
# Each gets an environment of its own in FOLDER, which must be outside the repository: benchmarks/eval_clients.sh FOLDER
# The server is `twofold serve demo` with the Python of .venv, or of PYTHON.
set -euo pipefail
folder=$(realpath -m "$1")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-$PWD/.venv/bin/python}
export PYTHONPATH=$PWD/src
mkdir -p "$folder"

install() { # NAME PACKAGE...
    if [ ! -x "$folder/$1/bin/$1" ]; then
        env -u PYTHONPATH "${BASE_PYTHON:-python3}" -m venv "$folder/$1"
        env -u PYTHONPATH "$folder/$1/bin/python" -m pip install -qq --disable-pip-version-check "${@:2}"
    fi
}
install lm_eval 'lm_eval[api]==0.4.13' 'transformers>=5,<6'
install guidellm guidellm==0.8.1
install aiperf aiperf==0.13.0

port=8123 url=http://127.0.0.1:8123
"$python" -m twofold.cli.main serve demo -pcp 2 --port $port 2>"$folder/server.log" &
server=$!
trap 'kill $server' EXIT
until curl -sf $url/health >/dev/null; do
    kill -0 $server
    sleep 1
done
unset PYTHONPATH
tokenizer=$(ls -d "${XDG_CACHE_HOME:-$HOME/.cache}/twofold/SmolLM2-135M-Instruct")

# lm_eval: log-likelihoods of choices (prompts scored by `echo` and `logprobs`) and generated text, of a task made here.
cat >"$folder/facts.jsonl" <<'LINES'
{"question": "The capital of France is", "choices": [" Paris", " a river"], "answer": 0}
{"question": "Two and two is", "choices": [" seven", " four"], "answer": 1}
{"question": "The opposite of hot is", "choices": [" cold", " soup"], "answer": 0}
LINES
cat >"$folder/facts.yaml" <<TASK
task: facts
dataset_path: json
dataset_kwargs: {data_files: {test: $folder/facts.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc}]
TASK
cat >"$folder/words.yaml" <<TASK
task: words
dataset_path: json
dataset_kwargs: {data_files: {test: $folder/facts.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["."], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match}]
TASK
failed=0
echo "== lm_eval"
"$folder/lm_eval/bin/lm_eval" --model local-completions --tasks facts,words --include_path "$folder" \
    --model_args "model=demo,base_url=$url/v1/completions,tokenizer=$tokenizer,num_concurrent=2,tokenized_requests=True" \
    2>"$folder/lm_eval.log" || failed=1
echo "== guidellm"
"$folder/guidellm/bin/guidellm" run --backend kind=openai_http,target=$url,model=demo --profile kind=synchronous \
    --constraint kind=max_requests,count=4 --tokenizer "kind=hf_auto,model=$tokenizer" \
    --data kind=synthetic_text,prompt_tokens=64,output_tokens=16 --disable-progress --output kind=console \
    >"$folder/guidellm.out" 2>"$folder/guidellm.log" || failed=1
grep -o 'completed | .*' "$folder/guidellm.log"
grep -q 'completed | .*successful=4 errored=0' "$folder/guidellm.log" || failed=1 # it ends with 0 whatever the answers
echo "== aiperf"
"$folder/aiperf/bin/aiperf" profile --model demo --url $url --tokenizer "$tokenizer" --endpoint-type chat --streaming \
    --synthetic-input-tokens-mean 64 --output-tokens-mean 16 --request-count 4 --concurrency 2 --ui-type none \
    --artifact-dir "$folder/aiperf.results" >"$folder/aiperf.out" 2>"$folder/aiperf.log" || failed=1
grep -E 'Time to First Token|Request Latency|Error Rate|Request Count' "$folder/aiperf.out"
exit $failed
