"""Arguments of the server, besides those of the engine."""

import socket
from dataclasses import dataclass, field
from pathlib import Path

from twofold.chat.answers import check_parsers
from twofold.config import EngineConfig
from twofold.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """What `twofold serve` accepts.

    Raises:
        ConfigError: a value is out of range; `field` is its name.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: list[str] | None = field(default=None, repr=False)
    served_model_name: list[str] | None = None
    max_waiting_requests: int = 1024
    max_waiting_tokens: int | None = None
    max_body_bytes: int = 32 << 20
    drain_timeout: float = 60.0
    access_log: bool = False
    chat_template: str | None = None
    tool_call_parser: str = "auto"
    reasoning_parser: str = "auto"

    def __post_init__(self) -> None:
        for name in ("max_waiting_requests", "max_waiting_tokens", "max_body_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}", field=name)
        if not 0 <= self.port < 65536:
            raise ConfigError(f"port must be from 0 to 65535, got {self.port}", field="port")
        if not self.drain_timeout >= 0:
            raise ConfigError(f"drain_timeout must be at least 0, got {self.drain_timeout}", field="drain_timeout")
        check_parsers(self.tool_call_parser, self.reasoning_parser)
        for key in self.api_key or ():
            if not key or not key.isascii() or not key.isprintable() or key != key.strip():
                raise ConfigError(
                    "api_key must be printable ASCII without spaces around it, and not empty", field="api_key"
                )


def read_chat_template(config: ServerConfig, engine: EngineConfig) -> str | None:
    """The text of the file that takes the place of the model's chat template.

    Raises:
        ConfigError: there is no such file, or it is no text.
    """
    if config.chat_template is None:
        return None
    if engine.tokenizer_mode == "mistral":
        message = "mistral-common has no chat templates; leave out chat_template, or tokenizer_mode='mistral'"
        raise ConfigError(message, field="chat_template")
    try:
        return Path(config.chat_template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        message = f"chat_template: cannot read {config.chat_template!r}: {reason}"
        raise ConfigError(message, field="chat_template") from None


def public_name(model: str) -> str:
    """What clients call a model unless told otherwise: a directory or file by its own name, without its path."""
    path = Path(model)
    return path.resolve().name or model if path.exists() else model


def bind(config: ServerConfig) -> socket.socket:
    """Binds the port, before the model is loaded.

    Raises:
        ConfigError: the port is taken, or the address does not exist.
    """
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
    except OSError as error:
        listener.close()
        message = f"cannot listen on {config.host}:{config.port}: {error.strerror or error}"
        raise ConfigError(message, field="port") from None
    return listener
