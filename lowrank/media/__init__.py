"""Pictures: files as they lie in data, and the model's own processor that turns them into pixels and placeholders."""
