"""Runs a Ray Serve application on a cluster of its own until it is killed; says on stdout when it serves."""

import json
import sys

import ray
from ray import serve

from twofold.ray_serve import build_openai_app


def main() -> None:
    config, port, folder = json.loads(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    ray.init(
        num_cpus=4, include_dashboard=False, object_store_memory=80_000_000, _temp_dir=folder, logging_level="WARNING"
    )
    serve.start(http_options={"port": port})
    serve.run(build_openai_app(config))
    print("serving", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
