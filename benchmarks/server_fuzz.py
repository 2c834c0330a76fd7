"""schemathesis against the server's own OpenAPI schema: no answer may be a 5xx, whatever is asked.

    python benchmarks/server_fuzz.py --model demo -pcp 1 --cases 2000 --schemathesis /path/to/st --output-json F

schemathesis has its own dependencies; `pip install schemathesis` in an environment apart, and name its `st`.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from server_common import arguments, flags, serve, write

OPERATIONS = 5  # of the schema that have parameters or a body; cases are shared among them


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--schemathesis", default=shutil.which("st") or "st")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, serve(args.model, Path(folder), *flags(args), faulty=False) as server:
        command = [args.schemathesis, "run", f"{server.url}/openapi.json", "--phases", "fuzzing", "--mode", "all"]
        command += ["--checks", "not_a_server_error", "--max-examples", str(args.cases // OPERATIONS + 1)]
        command += ["--seed", str(args.seed), "--continue-on-failure", "--request-timeout", "120", "--no-color"]
        done = subprocess.run(command, capture_output=True, text=True)
        server.assert_idle()
        traces = server.log.read_text().count("Traceback")
    print(done.stdout[-6000:], done.stderr[-2000:], file=sys.stderr)
    found = re.search(r"([\d,]+) generated", done.stdout)
    num_cases = int(found[1].replace(",", "")) if found else 0
    write(args, {"cases": num_cases, "exit_code": done.returncode, "tracebacks_in_the_log": traces})
    return 0 if done.returncode == 0 and num_cases >= 0.9 * args.cases and not traces else 1


if __name__ == "__main__":
    sys.exit(main())
