"""The same without the main path: a flat loop on the engine's verbs.   python examples/02_sft.py

Everything `lowrank train` does, minus checkpoints, reports and care. Read this first if you want to write
your own loop.
"""

import sys

from lowrank.adapters.bank import Bank
from lowrank.adapters.variants.lora import Config as Lora
from lowrank.data.config import Config as Data
from lowrank.data.prepare import prepare
from lowrank.data.rendering import Renderer
from lowrank.generate.sampler import Config as Sampling
from lowrank.generate.sampler import Prompt, generate
from lowrank.models import loading
from lowrank.models.config import Config as Model
from lowrank.objectives.sft import Config as Sft
from lowrank.records import Conversation, Message
from lowrank.train.engine import Engine
from lowrank.train.optimizers.adamw import Config as AdamW

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 60

model = Model(path="lowrank/tiny")
data = Data(train="lowrank/demo", eval="lowrank/demo-heldout", batch_size=16)
tokenizer = loading.load_tokenizer(model)
objective = Sft().build()
prepared = prepare(data, tokenizer=tokenizer, record=objective.record, seed=0)

base = loading.load(model, tokenizer=tokenizer)
bank = Bank(base)
engine = Engine(base, bank, micro_batch_tokens=4096)
slot = bank.add(Lora(rank=16), seed=0)
engine.add(slot, objective, AdamW(learning_rate=5e-3), seed=0, neftune_alpha=0.0)

for step in range(STEPS):
    forwarded = engine.forward_backward({slot: prepared.train.next_step()})
    updated = engine.optim_step(slot, learning_rate=5e-3)
    if step % 10 == 0:
        print(f"step {step:3d}  loss {forwarded[slot].loss:.3f}  grad norm {updated.grad_norm:.2f}")

print(f"held out: {engine.evaluate({slot: prepared.eval})[slot].loss:.3f}")

renderer = Renderer(tokenizer, data)
question = Conversation((Message("user", "Who are you?"),))
prompts = [Prompt(renderer.prompt(question), who) for who in (-1, slot)]
for who, answer in zip(
    ("base", "adapter"), generate(base, bank, prompts, Sampling(max_new_tokens=48), stop_tokens=renderer.stop_tokens)
):
    print(f"{who}: {tokenizer.decode(answer)}")
