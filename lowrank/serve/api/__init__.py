"""The HTTP API: OpenAI's routes, requests, replies and errors."""
