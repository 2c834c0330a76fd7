"""What `twofold serve` takes beside the engine's arguments."""

import socket
from dataclasses import dataclass, field

from twofold.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Raises ConfigError where a value is out of range."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: list[str] | None = field(default=None, repr=False)
    served_model_name: list[str] | None = None
    max_waiting_requests: int = 1024
    max_waiting_tokens: int | None = None
    max_body_bytes: int = 32 << 20
    drain_timeout: float = 60.0
    access_log: bool = False

    def __post_init__(self) -> None:
        for name in ("max_waiting_requests", "max_waiting_tokens", "max_body_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        if not 0 <= self.port < 65536:
            raise ConfigError(f"port must be from 0 to 65535, got {self.port}")
        if not self.drain_timeout >= 0:
            raise ConfigError(f"drain_timeout must be at least 0, got {self.drain_timeout}")
        for key in self.api_key or ():
            if not key or not key.isascii() or not key.isprintable() or key != key.strip():
                raise ConfigError("api_key must be printable ASCII without spaces around it, and not empty")


def bind(config: ServerConfig) -> socket.socket:
    """Takes the port before the model is loaded.

    Raises:
        ConfigError: it cannot be had.
    """
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {config.host}:{config.port}: {error.strerror or error}") from None
    return listener
