"""The OpenAI-compatible server: `twofold serve`. It needs the extra `server`."""
