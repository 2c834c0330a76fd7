"""The OpenAI-compatible server: `twofold serve`."""
