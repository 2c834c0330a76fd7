"""The OpenAI-compatible server: `twofold serve`. It needs the extra `twofold[server]`."""
