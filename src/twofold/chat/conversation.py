"""What a chat template makes a prompt of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from twofold.chat.tools import Tools


@dataclass(frozen=True)
class Conversation:
    """Messages in OpenAI's form, and all else that a template is told.

    effort: of the reasoning; "none" is for none.
    thinks: whether there is to be reasoning; None leaves it to the template.
    variables: of the template.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Tools = field(default_factory=Tools)
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    effort: str | None = None
    thinks: bool | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
