"""answer over HTTP, as OpenAI's API does

Without --api-key anyone who reaches the port may use it: by default only this machine can. SIGTERM and Ctrl-C let the
answers under way finish; a second signal does not. Progress of a long prefill is in comments of the event stream.
"""

import os
import sys
from argparse import ArgumentParser, Namespace

from twofold.cli.arguments import add_engine_arguments, add_fields, chosen
from twofold.config import EngineConfig
from twofold.errors import ConfigError
from twofold.server.config import ServerConfig, bind

SERVER_HELP = {
    "host": "address to listen on; 0.0.0.0 is every one",
    "port": "0 takes a free one",
    "api_key": "clients must send it; may be given more than once (default: $TWOFOLD_API_KEY)",
    "served_model_name": "what clients call the model; may be given more than once (default: MODEL)",
    "max_waiting_requests": "prompts that wait for their first token, at most; more are refused with 429",
    "max_waiting_tokens": "tokens of prompts that wait, at most (default: 4 x max_model_len, at least 1000000)",
    "max_body_bytes": "size of a request, at most",
    "drain_timeout": "seconds that answers under way may take after SIGTERM",
    "access_log": "a line on stderr for each request",
}


def configure(parser: ArgumentParser) -> None:
    add_fields(parser.add_argument_group("server"), ServerConfig, SERVER_HELP)
    add_engine_arguments(parser, positional_model=True)


def run(args: Namespace) -> int:
    # What can be wrong without a model is told before PyTorch is imported, and before minutes of loading.
    given = chosen(args, ServerConfig)
    if key := os.environ.get("TWOFOLD_API_KEY"):
        given.setdefault("api_key", [key])
    server, config = ServerConfig(**given), EngineConfig(**chosen(args, EngineConfig))
    if not server.api_key and server.host not in ("127.0.0.1", "::1", "localhost"):
        print(f"warning: no --api-key: whoever reaches {server.host}:{server.port} may use it", file=sys.stderr)
    with bind(server) as listener:
        try:
            from twofold.server.run import load, serve
        except ModuleNotFoundError as error:
            raise ConfigError(f"{error.name} is not installed; run: pip install 'twofold[server]'") from None
        return serve(server, load(config), listener)
