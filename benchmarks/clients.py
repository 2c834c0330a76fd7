"""Try real clients, with all that they depend on, against a server: tools, structured answers, streams.

    python benchmarks/clients.py --model tiny -pcp 2 --python /path/to/python --output-json F

The clients pin versions of what they share, so they have an environment of their own, whose Python is given:

    python -m venv E && E/bin/pip install openai langchain-openai instructor litellm "pydantic-ai-slim[openai]"

`--only NAME --url URL` is what runs there.
"""

import asyncio
import subprocess
import sys
from argparse import SUPPRESS, ArgumentParser
from typing import Any

QUESTION = "How is the weather in Köln?"


def models() -> tuple[Any, Any]:
    """A form of answers, and a tool. Bounded, since the tiny model writes anything."""
    from typing import Annotated

    from pydantic import BaseModel, ConfigDict, Field

    class Weather(BaseModel):
        """The weather of a city."""

        model_config = ConfigDict(extra="forbid")
        city: Annotated[str, Field(max_length=8)]
        days: Annotated[int, Field(ge=1, le=9)]

    def get_weather(city: Annotated[str, Field(max_length=8)], days: Annotated[int, Field(ge=1, le=9)]) -> str:
        """Tells the weather of a city."""
        return f"rain in {city} for {days} days"

    return Weather, get_weather


def try_openai(url: str) -> None:
    import openai

    weather, _ = models()
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    asked: Any = [{"role": "user", "content": QUESTION}]
    parsed = client.chat.completions.parse(model="model", messages=asked, response_format=weather)
    assert isinstance(parsed.choices[0].message.parsed, weather)
    tool = openai.pydantic_function_tool(weather)
    called = client.chat.completions.parse(model="model", messages=asked, tools=[tool], tool_choice="required")
    assert isinstance(called.choices[0].message.tool_calls[0].function.parsed_arguments, weather)
    response = client.responses.parse(model="model", input=asked, text_format=weather)
    assert isinstance(response.output_parsed, weather)


def try_langchain(url: str) -> None:
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_openai import ChatOpenAI

    weather, get_weather = models()
    for uses_responses in (False, True):
        chat = ChatOpenAI(model="model", base_url=f"{url}/v1", api_key="none", use_responses_api=uses_responses)
        for method in ("json_schema", "function_calling"):
            assert isinstance(chat.with_structured_output(weather, method=method).invoke(QUESTION), weather)
        bound = chat.bind_tools([get_weather], tool_choice="any", parallel_tool_calls=False)
        answer = bound.invoke(QUESTION)
        [call] = answer.tool_calls
        result = ToolMessage(get_weather(**call["args"]), tool_call_id=call["id"])
        assert chat.bind(max_tokens=8).invoke([HumanMessage(QUESTION), answer, result]).content
        streamed = None
        for chunk in bound.stream(QUESTION):
            streamed = chunk if streamed is None else streamed + chunk
        assert len(streamed.tool_calls) == 1


def try_instructor(url: str) -> None:
    import instructor
    import openai

    weather, _ = models()
    for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
        client = instructor.from_openai(openai.OpenAI(base_url=f"{url}/v1", api_key="none"), mode=mode)
        asked: Any = [{"role": "user", "content": QUESTION}]
        assert isinstance(client.create(model="model", messages=asked, response_model=weather), weather)


def try_litellm(url: str) -> None:
    import litellm

    weather, _ = models()
    schema = {"name": "get_weather", "parameters": weather.model_json_schema()}
    told: Any = {"messages": [{"role": "user", "content": QUESTION}], "api_key": "none"}
    tools = {"tools": [{"type": "function", "function": schema}], "tool_choice": "required"}
    answer = litellm.completion(
        model="hosted_vllm/model", api_base=f"{url}/v1", parallel_tool_calls=False, **told, **tools
    )
    [call] = answer.choices[0].message.tool_calls
    weather.model_validate_json(call.function.arguments)
    formed = litellm.completion(model="openai/model", api_base=f"{url}/v1", response_format=weather, **told)
    weather.model_validate_json(formed.choices[0].message.content)


def try_pydantic_ai(url: str) -> None:
    from pydantic_ai import Agent, NativeOutput, ToolOutput
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    weather, _ = models()
    model = OpenAIChatModel("model", provider=OpenAIProvider(base_url=f"{url}/v1", api_key="none"))
    for output in (ToolOutput(weather), NativeOutput(weather)):
        agent = Agent(model, output_type=output)
        assert isinstance(asyncio.run(agent.run(QUESTION)).output, weather)


CLIENTS = {
    "openai": try_openai,
    "langchain": try_langchain,
    "instructor": try_instructor,
    "litellm": try_litellm,
    "pydantic_ai": try_pydantic_ai,
}


def main() -> int:
    from server_common import arguments, start, write

    parser = arguments(__doc__)
    parser.add_argument("--python", default=sys.executable)
    args = parser.parse_args()
    results = {}
    with start(args) as server:
        for name in CLIENTS:
            command = [args.python, __file__, "--only", name, "--url", server.url]
            done = subprocess.run(command, capture_output=True, text=True, timeout=180)
            results[name] = "passed" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["?"])[-1]
            print(done.stderr, file=sys.stderr)
            print(f"{name}: {results[name]}", file=sys.stderr)
        server.assert_idle()
    write(args, {"clients": results})
    return 0 if set(results.values()) == {"passed"} else 1


if __name__ == "__main__":
    inner = ArgumentParser(add_help=False)
    inner.add_argument("--only", help=SUPPRESS)
    inner.add_argument("--url", help=SUPPRESS)
    chosen, _ = inner.parse_known_args()
    if chosen.only:
        CLIENTS[chosen.only](chosen.url)
    else:
        sys.exit(main())
