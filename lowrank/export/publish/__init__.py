"""Where an export goes: the Hugging Face hub with a model card, an Ollama server with a Modelfile."""
