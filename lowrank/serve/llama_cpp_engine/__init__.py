"""What the engine for GGUF files is made of besides itself (serve/engines/llama_cpp.py)."""
