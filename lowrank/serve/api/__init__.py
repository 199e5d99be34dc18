"""The HTTP face: OpenAI's routes, requests, replies and errors."""
