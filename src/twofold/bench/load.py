"""The load of `bench serve`: requests that are sent at their times, and how their answers come."""

import asyncio
import json
import math
import time
from argparse import Namespace
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from twofold.bench.prompts import Prompt
from twofold.errors import EngineError

if TYPE_CHECKING:
    import httpx


@dataclass(slots=True)
class Outcome:
    """A request and its answer. Times are in seconds."""

    prompt_len: int
    turn: int = 1  # of its conversation
    cached_len: int | None = None  # tokens of the prompt that were in the prefix cache, if the server tells
    start: float = 0.0  # since the start of the run
    success: bool = False
    ttft: float = 0.0
    latency: float = 0.0
    itl: list[float] = field(default_factory=list)
    num_tokens: int = 0
    text: str = ""
    error: str = ""

    @property
    def tpot(self) -> float:
        return (self.latency - self.ttft) / (self.num_tokens - 1) if self.num_tokens > 1 else 0.0


class Bench:
    """Sends prompts at their times, and times the answers."""

    def __init__(self, args: Namespace, url: str, headers: dict[str, str]) -> None:
        self.args, self.url, self.headers = args, url, headers
        self.max_concurrent = 0
        self._num_running = 0

    async def run(self, prompts: Sequence[Prompt]) -> tuple[list[Outcome], float]:
        """Sends each prompt, and what follows it in its conversation.

        → the outcome of each request, and seconds from the first request to the end of the last.
        """
        import httpx

        args = self.args
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with httpx.AsyncClient(timeout=None, limits=limits, headers=self.headers) as client:
            for _ in range(1 + args.num_warmups):
                outcome = await self._ask(client, self._warmup(prompts[0]), time.perf_counter())
                if not outcome.success:
                    raise EngineError(f"the first request failed: {outcome.error}")
            gate = asyncio.Semaphore(args.max_concurrency or len(prompts))
            with tqdm(total=args.num_prompts, disable=args.disable_tqdm) as bar:
                begin = time.perf_counter()

                async def talk(prompt: Prompt) -> list[Outcome]:
                    outcomes = []
                    while True:
                        async with gate:
                            outcomes.append(await self._ask(client, prompt, begin))
                        bar.update()
                        if not prompt.later or not outcomes[-1].success:
                            return outcomes
                        prompt = prompt.next(outcomes[-1].text)
                        await asyncio.sleep(args.think_time)

                tasks = [asyncio.create_task(talk(prompt)) async for prompt in self._arrivals(prompts)]
                outcomes = [outcome for talked in await asyncio.gather(*tasks) for outcome in talked]
                return outcomes, time.perf_counter() - begin

    def _warmup(self, prompt: Prompt) -> Prompt:
        """What no conversation begins with: it would be in the cache when they begin."""
        return Prompt("Hello", 0, prompt.max_tokens) if self.args.dataset_name == "conversations" else prompt

    async def _arrivals(self, prompts: Sequence[Prompt]) -> AsyncIterator[Prompt]:
        """Yields each prompt at its time. Gaps have a gamma distribution; with burstiness 1 an exponential one."""
        rate, shape = self.args.request_rate, self.args.burstiness
        rng = np.random.default_rng(self.args.seed + 1)
        due = time.perf_counter()
        for prompt in prompts:
            yield prompt
            if rate < math.inf:
                due += rng.gamma(shape, 1 / (rate * shape))
                await asyncio.sleep(max(due - time.perf_counter(), 0))

    async def _ask(self, client: "httpx.AsyncClient", prompt: Prompt, begin: float) -> Outcome:
        import httpx

        outcome = Outcome(prompt.num_tokens, prompt.turn)
        self._num_running += 1
        self.max_concurrent = max(self.max_concurrent, self._num_running)
        start = last = time.perf_counter()
        outcome.start = start - begin
        try:
            async with client.stream("POST", self.url, json=self._body(prompt)) as response:
                if response.status_code != 200:
                    outcome.error = f"{response.status_code}: {(await response.aread()).decode(errors='replace')[:500]}"
                    return outcome
                async for line in response.aiter_lines():
                    if not line.startswith("data: ") or line == "data: [DONE]":
                        continue
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        outcome.error = str(event["error"])
                        return outcome
                    now = time.perf_counter()
                    if usage := event.get("usage"):
                        outcome.num_tokens = usage["completion_tokens"]
                        outcome.prompt_len = usage["prompt_tokens"]
                        outcome.cached_len = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
                    if event["choices"]:
                        if outcome.ttft:
                            outcome.itl.append(now - last)
                        else:
                            outcome.ttft = now - start
                        last = now
                        choice = event["choices"][0]
                        outcome.text += choice.get("text") or choice.get("delta", {}).get("content") or ""
                outcome.latency, outcome.success = last - start, outcome.ttft > 0
        except (httpx.HTTPError, ValueError, KeyError) as error:
            outcome.error = f"{type(error).__name__}: {error}"
        finally:
            self._num_running -= 1
        return outcome

    def _body(self, prompt: Prompt) -> dict[str, Any]:
        args = self.args
        body: dict[str, Any] = {
            "model": args.model,
            "temperature": args.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if args.ignore_eos:
            body["ignore_eos"] = True
        if args.backend == "openai-chat":
            messages = [*prompt.history, {"role": "user", "content": prompt.content}]
            return body | {"messages": messages, "max_completion_tokens": prompt.max_tokens}
        content = prompt.content
        if isinstance(content, str):
            content = "".join(message["content"] for message in prompt.history) + content
        return body | {"prompt": content, "max_tokens": prompt.max_tokens}
