"""Unsloth's well-known Alpaca notebook with its import changed, on the base that ships with lowrank: a CPU will do.

python examples/unsloth_alpaca.py [steps] [folder for what is saved]

    was: from unsloth import FastLanguageModel
    is:  from lowrank.compat.unsloth import FastLanguageModel

Needs `pip install 'lowrank-llm[trl]'` and, for the GGUF file, `lowrank-llm[gguf]`.
"""

import sys
import tempfile
from pathlib import Path

import torch
from datasets import load_dataset
from transformers import TextStreamer
from trl import SFTConfig, SFTTrainer

from lowrank.compat.unsloth import FastLanguageModel

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 60
home = Path(sys.argv[2] if len(sys.argv) > 2 else tempfile.mkdtemp())
max_seq_length = 512

model, tokenizer = FastLanguageModel.from_pretrained(
    model_name="lowrank/tiny",
    max_seq_length=max_seq_length,
    dtype=None,
    load_in_4bit=True,
)

model = FastLanguageModel.get_peft_model(
    model,
    r=16,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    lora_alpha=16,
    lora_dropout=0,
    bias="none",
    use_gradient_checkpointing="unsloth",
    random_state=3407,
    use_rslora=False,
    loftq_config=None,
)
model.print_trainable_parameters()

alpaca_prompt = """Below is an instruction that describes a task, paired with an input that provides further context. \
Write a response that appropriately completes the request.

### Instruction:
{}

### Input:
{}

### Response:
{}"""


def formatting_prompts_func(examples):
    """Rows as texts; without EOS at its end the model would never stop."""
    rows = zip(examples["instruction"], examples["input"], examples["output"])
    return {"text": [alpaca_prompt.format(*row) + tokenizer.eos_token for row in rows]}


rows = Path(__file__).parent / "data/orders.json"
dataset = load_dataset("json", data_files=str(rows), split="train").map(formatting_prompts_func, batched=True)

trainer = SFTTrainer(
    model=model,
    processing_class=tokenizer,
    train_dataset=dataset,
    args=SFTConfig(
        dataset_text_field="text",
        max_length=max_seq_length,
        packing=False,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        warmup_steps=5,
        max_steps=steps,
        learning_rate=2e-3,
        logging_steps=1,
        optim="adamw_torch",
        weight_decay=0.01,
        lr_scheduler_type="linear",
        seed=3407,
        output_dir=str(home / "outputs"),
        report_to="none",
        use_cpu=not torch.cuda.is_available(),  # transformers wants to be told
    ),
)
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(f"loss: {losses[0]:.3f} at first, {losses[-1]:.3f} at last")

FastLanguageModel.for_inference(model)
inputs = tokenizer([alpaca_prompt.format("Extract the order.", "Mia wants 7 apples.", "")], return_tensors="pt").to(
    model.device
)
model.generate(**inputs, streamer=TextStreamer(tokenizer), max_new_tokens=48, use_cache=True)

model.save_pretrained(home / "lora_model")
tokenizer.save_pretrained(home / "lora_model")
model.save_pretrained_merged(home / "merged", tokenizer, save_method="merged_16bit")
model.save_pretrained_gguf(home / "gguf", tokenizer, quantization_method="q8_0")
print(f"saved: {', '.join(sorted(path.name for path in home.iterdir()))} in {home}")
