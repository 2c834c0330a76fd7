"""The tools that a client offers to a model, and which of them the model must call."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from twofold.errors import RequestError


@dataclass(frozen=True)
class Tools:
    """Tools as OpenAI's chats have them: {"type": "function", "function": {"name", "description", "parameters"}}.

    choice: auto, none, required, or the name of the one that must be called.
    is_named: whether `choice` is a name.

    Raises:
        RequestError: the choice asks for what is not there.
    """

    given: Sequence[Mapping[str, Any]] = ()
    choice: str = "auto"
    is_named: bool = False
    at_most_one: bool = False

    def __post_init__(self) -> None:
        names = [tool["function"]["name"] for tool in self.given]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise RequestError(f"tools has {twice!r} twice; give each a name of its own", field="tools")
        if self.is_named and self.choice not in names:
            message = f"tool_choice names {self.choice!r}, which is not among the tools ({', '.join(names) or 'none'})"
            raise RequestError(message, field="tool_choice")
        if self.choice == "required" and not names:
            raise RequestError("tool_choice is 'required', but there are no tools; give some", field="tool_choice")

    @property
    def offered(self) -> Sequence[Mapping[str, Any]]:
        """Those that the model is told of."""
        return self.given if self.is_named or self.choice != "none" else ()

    @property
    def are_offered(self) -> bool:
        return bool(self.offered)

    @property
    def is_forced(self) -> bool:
        return self.is_named or self.choice == "required"

    @property
    def forced_name(self) -> str | None:
        return self.choice if self.is_named else None

    @property
    def schemas(self) -> dict[str, Mapping[str, Any]]:
        return {tool["function"]["name"]: _parameters(tool) for tool in self.given}

    def answer_schema(self) -> dict[str, Any] | None:
        """The JSON schema of an answer that must call a tool; None if it need not.

        One named tool: its arguments. Otherwise a list of {"name": ..., "parameters": {...}}.
        """
        if not self.is_forced:
            return None
        if self.is_named:
            return dict(self.schemas[self.choice])
        calls, definitions = [], {}
        for number, (name, schema) in enumerate(self.schemas.items()):
            inner = _with_own_names(schema, f"{number}.")
            definitions.update(inner.pop("$defs", {}))
            properties = {"name": {"type": "string", "enum": [name]}, "parameters": inner}
            form = {"type": "object", "properties": properties, "required": ["name", "parameters"]}
            calls.append({**form, "additionalProperties": False})
        answer: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": calls} if calls[1:] else calls[0]}
        if self.at_most_one:
            answer["maxItems"] = 1
        return answer | ({"$defs": definitions} if definitions else {})


def _with_own_names(schema: Any, prefix: str) -> Any:
    """A schema whose definitions have names of their own, and can stand beside those of others.

    References to definitions begin at the root, so the definitions have to go there.
    """
    if isinstance(schema, list):
        return [_with_own_names(one, prefix) for one in schema]
    if not isinstance(schema, Mapping):
        return schema
    changed: dict[str, Any] = {}
    for key, value in schema.items():
        if key in ("$defs", "definitions") and isinstance(value, Mapping):
            renamed = {prefix + name: _with_own_names(one, prefix) for name, one in value.items()}
            changed.setdefault("$defs", {}).update(renamed)
        elif key == "$ref" and isinstance(value, str):
            changed[key] = re.sub("^#/(\\$defs|definitions)/", f"#/$defs/{prefix}", value)
        else:
            changed[key] = _with_own_names(value, prefix)
    return changed


def _parameters(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    parameters = tool["function"].get("parameters")
    return parameters if isinstance(parameters, Mapping) and parameters else {"type": "object", "properties": {}}
