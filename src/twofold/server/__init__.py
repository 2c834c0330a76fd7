"""The OpenAI-compatible server: `twofold serve`. Needs the extra `twofold[server]`."""
