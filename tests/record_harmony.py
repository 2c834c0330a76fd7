"""Record answers of GPT-OSS, written and read by openai-harmony, for tests/unit/test_tool_formats.py.

    TIKTOKEN_ENCODINGS_BASE=FOLDER python tests/record_harmony.py >tests/unit/harmony_answers.json

The package has no vocabulary. FOLDER has o200k_base.tiktoken; without it, the package downloads that.
"""

import json
from typing import Any

import openai_harmony as oh

JSON = "<|constrain|>json"


def said(channel: str, text: str, recipient: str | None = None, kind: str | None = None) -> oh.Message:
    message = oh.Message.from_role_and_content(oh.Role.ASSISTANT, text).with_channel(channel)
    message = message if recipient is None else message.with_recipient(recipient)
    return message if kind is None else message.with_content_type(kind)


ANSWERS = {
    "final only": [said("final", "Es regnet in Köln. 🌧")],
    "reasoning": [said("analysis", "The user asks.\n\nSo I answer."), said("final", "Yes: `a <| b`.\n")],
    "a call": [
        said("analysis", "I need the tool."),
        said("commentary", '{"city": "Köln", "days": 3}', "functions.get_weather", JSON),
    ],
    "a preamble and a call": [
        said("analysis", "Hm."),
        said("commentary", "I look at two things."),
        said("commentary", '{"city":"東京"}', "functions.get_time", JSON),
    ],
    "a call without a type": [said("commentary", "{}", "functions.get_time")],
    "a call while it reasons": [said("analysis", '{"city": "Bonn"}', "functions.get_weather", JSON)],
    "two calls": [
        said("commentary", '{"city": "Bonn"}', "functions.get_weather", JSON),
        said("commentary", '{"city": "Ulm"}', "functions.get_weather", JSON),
    ],
    "reasoning twice": [said("analysis", "One."), said("analysis", "Two."), said("final", "3")],
}


def texts_of(encoding: oh.HarmonyEncoding, tokens: list[int]) -> list[str]:
    """The text of each token, as a stream has it: a character comes when its last byte does."""
    texts, start = [], 0
    for end in range(1, len(tokens) + 1):
        text = encoding.decode(tokens[start:end])
        if "\ufffd" not in text:
            texts.append(text)
            start = end
    return texts


def record(encoding: oh.HarmonyEncoding, messages: list[oh.Message]) -> dict[str, Any]:
    """An answer as a model ends it: with the last call, or with the end of what it says."""
    asked = [oh.Message.from_role_and_content(oh.Role.USER, "How is the weather?")]
    before = encoding.render_conversation_for_completion(oh.Conversation.from_messages(asked), oh.Role.ASSISTANT)
    whole, config = (
        oh.Conversation.from_messages(asked + messages),
        oh.RenderConversationConfig(auto_drop_analysis=False),
    )
    tokens = encoding.render_conversation_for_training(whole, config)[len(before) :]
    if messages[-1].recipient is None and messages[-1].channel != "final":
        raise ValueError("an answer ends with a call or with the channel final")
    read = encoding.parse_messages_from_completion_tokens(tokens, oh.Role.ASSISTANT)
    told = [{"channel": one.channel, "to": one.recipient, "text": one.content[0].text} for one in read]
    return {"prompt": encoding.decode(before), "deltas": texts_of(encoding, tokens), "messages": told}


def main() -> None:
    encoding = oh.load_harmony_encoding(oh.HarmonyEncodingName.HARMONY_GPT_OSS)
    print(json.dumps({name: record(encoding, messages) for name, messages in ANSWERS.items()}, indent=1))


if __name__ == "__main__":
    main()
