"""Try real clients in an environment of their own against a server: those of tests/server/other_clients.py.

    python benchmarks/clients.py --model tiny -pcp 2 --python /path/to/python --output-json F

The tests have the same clients in the environment of Twofold. There instructor runs without the older jiter and rich
that it asks for; here it has them, and so an older openai. The Python of the environment is given:

    python -m venv E
    E/bin/pip install openai langchain-openai instructor litellm "pydantic-ai-slim[openai]" openai-agents
"""

import json
import subprocess
import sys
from pathlib import Path

from server_common import arguments, start, write

CLIENTS = Path(__file__).parents[1] / "tests" / "server" / "other_clients.py"
PACKAGES = ("openai", "langchain-openai", "instructor", "litellm", "pydantic-ai-slim", "openai-agents")
SHOW = "import importlib.metadata as m, json, sys; print(json.dumps({p: m.version(p) for p in sys.argv[1:]}))"


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--python", default=sys.executable)
    args = parser.parse_args()
    versions = json.loads(subprocess.check_output([args.python, "-c", SHOW, *PACKAGES]))
    results = {}
    with start(args) as server:
        for name in ("openai", "langchain", "instructor", "litellm", "pydantic_ai", "openai_agents"):
            command = [args.python, str(CLIENTS), name, server.url, "model"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=180)
            results[name] = "passed" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["?"])[-1]
            print(done.stderr, file=sys.stderr)
            print(f"{name}: {results[name]}", file=sys.stderr)
        server.assert_idle()
    write(args, {"client_versions": versions, "clients": results})
    return 0 if set(results.values()) == {"passed"} else 1


if __name__ == "__main__":
    sys.exit(main())
