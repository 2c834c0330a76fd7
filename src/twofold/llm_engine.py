"""The step loop in a script's own hands, with vLLM's methods."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

from twofold.config import EngineConfig
from twofold.contract import Breakdown
from twofold.engine.engine import LLMEngine as Engine
from twofold.engine.prompts import Prompt, check_extras
from twofold.errors import RequestError
from twofold.launch import start_engine
from twofold.metrics import Metric, read_metrics
from twofold.outputs import RequestOutput
from twofold.sampling_params import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class LLMEngine:
    """Takes requests at any time; each `step` moves all of them on. Not for several threads at once."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    @classmethod
    def from_engine_args(cls, engine_args: EngineConfig) -> Self:
        """Starts an engine.

        Raises:
            ConfigError, ModelError: the arguments, the model and the machine do not fit together.
        """
        return cls(start_engine(engine_args))

    def add_request(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams,
        *,
        lora_request: object = None,
        priority: int = 0,
    ) -> None:
        """Queues a prompt.

        Raises:
            RequestError: the prompt or its parameters cannot be served; nothing else is touched.
        """
        check_extras(lora_request, priority)
        self.engine.add_request(request_id, prompt, params)

    def step(self) -> list[RequestOutput]:
        """One step of all ranks → the outputs that are due, as the `output_kind` of their parameters says.

        Lost ranks are replaced.
        """
        return self.engine.step_or_recover()

    def abort_request(self, request_id: str | Sequence[str]) -> None:
        """Ends requests; those that are not there are left out."""
        for one in [request_id] if isinstance(request_id, str) else request_id:
            self.engine.abort_request(one)

    def has_unfinished_requests(self) -> bool:
        return self.engine.has_work

    def get_num_unfinished_requests(self) -> int:
        return len(self.engine.outputs.user_requests)

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase | None":
        """None with `skip_tokenizer_init`."""
        return self.engine.tokenizer

    def get_tokenizer(self) -> "PreTrainedTokenizerBase | None":
        return self.tokenizer

    def get_metrics(self) -> list[Metric]:
        return read_metrics(self.engine.snapshot(), self.engine.runtime.engine.model)

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        """Forgets all cached prefixes; False, and nothing is forgotten, while requests hold blocks.

        reset_connector: vLLM's; KV entries are nowhere else.

        Raises:
            RequestError: there are requests, and `reset_running_requests` asks to take their blocks.
        """
        if reset_running_requests and self.has_unfinished_requests():
            raise RequestError(
                "reset_running_requests=True is not supported while requests run; abort them, or wait for them",
                field="reset_running_requests",
            )
        return self.engine.reset_prefix_cache()

    def start_profile(self, profile_prefix: str | None = None) -> None:
        """Starts timing the kernels of every rank's GPU. Nothing is timed on a CPU.

        profile_prefix: vLLM's, for the names of trace files. There are none.
        """
        self.engine.profile(True)

    def stop_profile(self) -> list[Breakdown | None]:
        """→ where each rank's time went since `start_profile`; None on a CPU."""
        return self.engine.profile(False)

    def shutdown(self) -> None:
        """Ends the ranks. The object cannot be used afterwards."""
        self.engine.shutdown()
