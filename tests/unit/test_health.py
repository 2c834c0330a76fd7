"""What /health says while new ranks wait for places."""

import asyncio
import json
from types import SimpleNamespace

from twofold.engine.async_engine import State
from twofold.server.app import Routes


def test_health_says_what_new_ranks_wait_for() -> None:
    """Else nobody knows whether to wait or to start a node."""
    routes = Routes.__new__(Routes)
    for state, reason, code, body in (
        (State.RUNNING, None, 200, {"status": "ok"}),
        (State.RECOVERING, None, 503, {"status": "recovering"}),
        (State.RECOVERING, "2 CPUs", 503, {"status": "recovering", "waits_for": "2 CPUs"}),
    ):
        routes._engine = SimpleNamespace(state=state, waits_for=reason)  # type: ignore[assignment]
        answer = asyncio.run(routes.health())
        assert (answer.status_code, json.loads(bytes(answer.body))) == (code, body)
