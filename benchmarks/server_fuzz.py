"""Run schemathesis against the server's own OpenAPI schema, and check that no answer has a 5xx status.

    python benchmarks/server_fuzz.py --model tiny -pcp 2 --engine "--max-model-len 128" --cases 5000 \
        --schemathesis /path/to/st --output-json F

schemathesis has its own dependencies: run `pip install schemathesis` in a separate environment, and pass the path of
its `st`. Under Python 3.11 it may end with an error of its own (SystemError in `ast`); 3.13 has none. A valid request
without max_tokens is answered up to max_model_len, so --max-model-len decides how long the benchmark takes.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from server_common import arguments, start, write

OPERATIONS = 8  # of the schema that have parameters or a body; they share the cases


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--schemathesis", default=shutil.which("st") or "st")
    args = parser.parse_args()
    with start(args) as server, tempfile.TemporaryDirectory() as folder:
        command = [args.schemathesis, "run", f"{server.url}/openapi.json", "--phases", "coverage,fuzzing"]
        command += ["--mode", "all", "--checks", "not_a_server_error", "--continue-on-failure"]
        command += ["--max-examples", str(args.cases // OPERATIONS + 1), "--workers", "4", "--seed", str(args.seed)]
        command += ["--request-timeout", "120", "--no-color", "--report", "har", "--report-har-path", "har.json"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        print(done.stdout[-6000:], done.stderr[-2000:], file=sys.stderr)
        server.assert_idle()
        traces = server.log.read_text().count("Traceback")
        paths = server.http.get("/openapi.json").json()["paths"]
        answers = count_answers(Path(folder, "har.json"))
    with_body = [f"POST {path}" for path, methods in paths.items() if "requestBody" in methods.get("post", {})]
    found = re.search(r"([\d,]+) generated", done.stdout)
    num_cases = int(found[1].replace(",", "")) if found else 0
    num_5xx = sum(num for each in answers.values() for status, num in each.items() if status >= 500)
    result = {
        "cases": num_cases,
        "answers_5xx": num_5xx,
        "tracebacks_in_the_log": traces,
        "exit_code": done.returncode,
        "answers_by_status": {operation: answers[operation] for operation in with_body},
    }
    write(args, result)
    well = done.returncode == num_5xx == traces == 0 and num_cases >= args.cases
    return 0 if well and all(answers[operation][200] for operation in with_body) else 1


def count_answers(har: Path) -> dict[str, Counter[int]]:
    """Counts answers: operation -> status -> number."""
    answers: dict[str, Counter[int]] = {}
    for entry in json.loads(har.read_text())["log"]["entries"]:
        request: dict[str, Any] = entry["request"]
        operation = f"{request['method']} {urlsplit(request['url']).path}"
        answers.setdefault(operation, Counter())[entry["response"]["status"]] += 1
    return answers


if __name__ == "__main__":
    sys.exit(main())
