"""Import Ray's serve.llm where neither vLLM nor SGLang is installed.

Its modules take their classes of requests and answers from one of the two, when they are imported. Twofold needs none
of them: it reads bodies itself. So while they are imported, a module stands in for SGLang's.
"""

import importlib
import sys
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from pydantic import BaseModel, ConfigDict

CLASSES = "ray.llm._internal.serve.core.configs.openai_api_models"
STOOD_IN = "sglang.srt.entrypoints.openai.protocol"


class Anything(BaseModel):
    """A body with any fields."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None


class _Protocol(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything


def import_ray_llm() -> None:
    """Imports the module of `CLASSES`; afterwards no module of SGLang's is there that was not there before.

    Raises:
        ImportError: Ray is not installed with what serve.llm needs.
    """
    if CLASSES in sys.modules:
        return
    if find_spec("vllm") is None and find_spec("sglang") is None:
        parts = STOOD_IN.split(".")
        names = [".".join(parts[: end + 1]) for end in range(len(parts))]
        sys.modules |= {name: _Protocol(name) for name in names}
        try:
            importlib.import_module(CLASSES)
        finally:
            for name in names:
                del sys.modules[name]
    importlib.import_module(CLASSES)
