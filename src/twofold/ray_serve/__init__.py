"""Twofold under Ray Serve LLM: replicas, autoscaling and routing are Ray's, requests and answers Twofold's server's.

Needs `twofold[ray-serve]`. `LLMConfig` is Ray's own: importing `ray.serve.llm` first would ask for vLLM or SGLang.
"""

from twofold.ray_serve.stand_in import import_ray_llm

import_ray_llm()

from ray.serve.llm import LLMConfig  # noqa: E402

from twofold.ray_serve.ingress import TwofoldIngress, build_openai_app  # noqa: E402
from twofold.ray_serve.server import TwofoldServer  # noqa: E402

__all__ = ["LLMConfig", "TwofoldIngress", "TwofoldServer", "build_openai_app"]
