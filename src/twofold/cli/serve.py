"""answer over HTTP with OpenAI's API

Without --api-key everyone who reaches the port can use the server; by default only this machine reaches it. SIGTERM and
Ctrl-C let the answers under way finish, a second signal does not. Comments of the event stream tell the progress of a
long prefill.
"""

import os
import sys
from argparse import ArgumentParser, Namespace

from twofold.chat.answers import CHOICES, REASONING
from twofold.chat.tool_formats import FORMATS
from twofold.engine_args import EngineArgs
from twofold.flags import add_engine_arguments, add_fields, chosen
from twofold.server.config import ServerConfig, bind, read_chat_template

SERVER_HELP = {
    "host": "address to listen on; 0.0.0.0 is all addresses",
    "port": "port to listen on; 0 takes a free one",
    "api_key": "key that clients must send; may be given more than once",
    "served_model_name": "name of the model for clients; may be given more than once",
    "max_waiting_requests": "prompts that may wait for their first token; more are refused with 429",
    "max_waiting_tokens": "tokens that waiting prompts may have",
    "max_body_bytes": "largest size of a request: 32M",
    "drain_timeout": "seconds that answers under way may still take after SIGTERM",
    "chat_template": "file with a chat template to use in place of the model's",
    "tool_call_parser": f"how the model writes calls of tools: {', '.join((*CHOICES, *FORMATS))}",
    "reasoning_parser": f"how the model writes its reasoning: {', '.join((*CHOICES, *REASONING))}",
    "access_log": "write a line to stderr for each request",
}

CHOSEN_LATER = {
    "api_key": "$TWOFOLD_API_KEY",
    "served_model_name": "MODEL without its path",
    "max_waiting_tokens": "4 x max_model_len, at least 1000000",
}


def configure(parser: ArgumentParser) -> None:
    add_fields(parser.add_argument_group("server"), ServerConfig, SERVER_HELP, CHOSEN_LATER)
    add_engine_arguments(parser, positional_model=True)


def run(args: Namespace) -> int:
    # All errors that need no model are reported before PyTorch is imported and the model loaded.
    given = chosen(args, ServerConfig)
    if key := os.environ.get("TWOFOLD_API_KEY"):
        given.setdefault("api_key", [key])
    server, config = ServerConfig(**given), EngineArgs.from_cli_args(args)
    read_chat_template(server, config)
    if not server.api_key and server.host not in ("127.0.0.1", "::1", "localhost"):
        print(f"warning: no --api-key: everyone who reaches {server.host}:{server.port} can use it", file=sys.stderr)
    with bind(server) as listener:
        from twofold.server.run import load, serve

        return serve(server, load(config), listener)
