"""Clients that people bring, with all that they depend on, ask a server for tools, structured answers and streams.

    python tests/server/other_clients.py NAME URL MODEL

Each runs in a process of its own: here as a test, and in an environment of its own by benchmarks/clients.py.
"""

import asyncio
import os
import sys
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

QUESTION = "How is the weather in Köln?"
KEY = "none"


class Weather(BaseModel):
    """The weather of a city."""  # bounded, since models of random weights write anything

    model_config = ConfigDict(extra="forbid")
    city: Annotated[str, Field(max_length=8)]
    days: Annotated[int, Field(ge=1, le=9)]


def get_weather(city: Annotated[str, Field(max_length=8)], days: Annotated[int, Field(ge=1, le=9)]) -> str:
    """Tells the weather of a city."""
    return f"rain in {city} for {days} days"


def try_openai(url: str, name: str) -> None:
    import openai

    client = openai.OpenAI(base_url=url, api_key=KEY)
    asked: Any = [{"role": "user", "content": QUESTION}]

    def parse(**given: Any) -> Any:
        for _ in range(5):
            try:
                return client.chat.completions.parse(model=name, messages=asked, **given)
            except openai.LengthFinishReasonError:  # a model of random weights may write spaces for ever
                continue
        raise AssertionError("five answers had no end")

    parsed = parse(response_format=Weather)
    assert isinstance(parsed.choices[0].message.parsed, Weather)
    tool = openai.pydantic_function_tool(Weather)
    called = parse(tools=[tool], tool_choice="required")
    assert isinstance(called.choices[0].message.tool_calls[0].function.parsed_arguments, Weather)
    response = client.responses.parse(model=name, input=asked, text_format=Weather)
    assert isinstance(response.output_parsed, Weather)


def try_langchain(url: str, name: str) -> None:
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_openai import ChatOpenAI

    for uses_responses in (False, True):
        chat = ChatOpenAI(model=name, base_url=url, api_key=KEY, use_responses_api=uses_responses)
        for method in ("json_schema", "function_calling"):
            assert isinstance(chat.with_structured_output(Weather, method=method).invoke(QUESTION), Weather)
        bound = chat.bind_tools([get_weather], tool_choice="any", parallel_tool_calls=False)
        answer = bound.invoke(QUESTION)
        [call] = answer.tool_calls
        result = ToolMessage(get_weather(**call["args"]), tool_call_id=call["id"])
        assert chat.bind(max_tokens=8).invoke([HumanMessage(QUESTION), answer, result]).content
        streamed = None
        for chunk in bound.stream(QUESTION):
            streamed = chunk if streamed is None else streamed + chunk
        assert len(streamed.tool_calls) == 1


def try_instructor(url: str, name: str) -> None:
    import instructor
    import openai

    for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
        client = instructor.from_openai(openai.OpenAI(base_url=url, api_key=KEY), mode=mode)
        asked: Any = [{"role": "user", "content": QUESTION}]
        assert isinstance(client.create(model=name, messages=asked, response_model=Weather), Weather)


def try_litellm(url: str, name: str) -> None:
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it would fetch prices
    import litellm

    schema = {"name": "get_weather", "parameters": Weather.model_json_schema()}
    told: Any = {"messages": [{"role": "user", "content": QUESTION}], "api_key": KEY, "api_base": url}
    tools = {"tools": [{"type": "function", "function": schema}], "tool_choice": "required"}
    answer = litellm.completion(model=f"hosted_vllm/{name}", parallel_tool_calls=False, **told, **tools)
    [call] = answer.choices[0].message.tool_calls
    Weather.model_validate_json(call.function.arguments)
    formed = litellm.completion(model=f"openai/{name}", response_format=Weather, **told)
    Weather.model_validate_json(formed.choices[0].message.content)


def try_pydantic_ai(url: str, name: str) -> None:
    from pydantic_ai import Agent, NativeOutput, ToolOutput
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
    from pydantic_ai.providers.openai import OpenAIProvider

    provider = OpenAIProvider(base_url=url, api_key=KEY)
    for model in (OpenAIChatModel(name, provider=provider), OpenAIResponsesModel(name, provider=provider)):
        for output in (ToolOutput(Weather), NativeOutput(Weather)):
            agent = Agent(model, output_type=output)
            assert isinstance(asyncio.run(agent.run(QUESTION)).output, Weather)


def try_openai_agents(url: str, name: str) -> None:
    import openai
    from agents import Agent, ModelSettings, Runner, function_tool, set_tracing_disabled
    from agents.models.openai_chatcompletions import OpenAIChatCompletionsModel
    from agents.models.openai_responses import OpenAIResponsesModel

    set_tracing_disabled(True)
    calls = []

    @function_tool
    def tell(city: Annotated[str, Field(max_length=8)], days: Annotated[int, Field(ge=1, le=9)]) -> str:
        """Tells the weather of a city."""
        calls.append(city)
        return get_weather(city, days)

    async def run() -> None:
        client = openai.AsyncOpenAI(base_url=url, api_key=KEY)
        for kind in (OpenAIChatCompletionsModel, OpenAIResponsesModel):
            model = kind(model=name, openai_client=client)
            formed = await Runner.run(Agent(name="one", model=model, output_type=Weather), QUESTION)
            assert isinstance(formed.final_output, Weather)
            # It must call; with the result it must answer in the form.
            settings = ModelSettings(tool_choice="required", parallel_tool_calls=False)
            agent = Agent(name="two", model=model, tools=[tell], model_settings=settings, output_type=Weather)
            calls.clear()
            answer = Runner.run_streamed(agent, QUESTION, max_turns=2)
            async for _ in answer.stream_events():
                pass
            assert len(calls) == 1
            assert isinstance(answer.final_output, Weather)

    asyncio.run(run())


CLIENTS = {
    "openai": try_openai,
    "langchain": try_langchain,
    "instructor": try_instructor,
    "litellm": try_litellm,
    "pydantic_ai": try_pydantic_ai,
    "openai_agents": try_openai_agents,
}

if __name__ == "__main__":
    client, url, name = sys.argv[1:]
    CLIENTS[client](f"{url}/v1", name)
