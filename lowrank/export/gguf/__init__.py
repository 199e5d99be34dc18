"""GGUF, the file format of llama.cpp, Ollama and LM Studio: written, quantized and checked without a compiler.

    checkpoint folder --convert--> model.gguf (f32, f16, bf16, q8_0) --quantize--> model-Q4_K_M.gguf
    PEFT adapter      --convert_adapter--> adapter.gguf, loaded by llama.cpp over the base's file

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. `families/` has one file for each
group of architectures; what is not there is refused by name. Every conversion can be held against llama.cpp
itself through `llama_cpp`, which runs in a child process because llama.cpp ends the process where it disagrees.
"""
