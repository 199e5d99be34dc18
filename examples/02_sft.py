"""The same without the main path: a flat loop on the engine's verbs.   python examples/02_sft.py

Everything `lowrank train` does, minus checkpoints, reports and care. Read this first if you want to write
your own loop.
"""

from lowrank.adapters.bank import Bank
from lowrank.config import validate_settings
from lowrank.models.loading import pretrained
from lowrank.pipelines.job_data import prepare_all
from lowrank.train.engine import Engine

STEPS = 60

settings = validate_settings(
    {
        "model": "lowrank/tiny",
        "data": {"train": "lowrank/demo", "eval": "lowrank/demo-heldout", "batch_size": 16},
        "jobs": [{"name": "r4", "adapter": {"rank": 4}}, {"name": "r16", "adapter": {"rank": 16}}],
        "output_dir": "unused",
    }
)
tokenizer = pretrained.load_tokenizer(settings.model)
prepared = prepare_all(settings.jobs, settings.model, tokenizer, lambda event: None, strict=False)

base = pretrained.load(settings.model, tokenizer=tokenizer)
engine = Engine(base, Bank(base), micro_batch_tokens=4096)
slots = [engine.bank.add(job.adapter, seed=job.seed) for job in settings.jobs]
for slot, job in zip(slots, settings.jobs):
    engine.add(slot, job.objective.build(), job.optimizer, seed=job.seed, neftune_alpha=0.0)

for step in range(STEPS):
    work = {slot: own.train.next_step() for slot, own in zip(slots, prepared)}
    forwarded = engine.forward_backward(work)  # one pass for both jobs
    for slot in slots:
        engine.optim_step(slot, learning_rate=5e-3)
    if step % 10 == 0:
        print(f"step {step:3d}", *(f"{job.name} {forwarded[slot].loss:.3f}" for slot, job in zip(slots, settings.jobs)))

held_out = engine.evaluate({slot: own.eval for slot, own in zip(slots, prepared)})
print("held out", *(f"{job.name} {held_out[slot].loss:.3f}" for slot, job in zip(slots, settings.jobs)))
