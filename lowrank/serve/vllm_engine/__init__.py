"""What the engine on vLLM (serve/engines/vllm.py) is made of besides itself. vLLM is imported when it is started."""
