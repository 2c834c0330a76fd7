"""What a chat is to a model, and what its answer is to a client: messages, tools, reasoning."""
