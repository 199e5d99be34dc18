"""One run on the workers of Ray Train: it makes the process group, and lowrank trains in it."""

import ray.train
from ray.train.torch import TorchTrainer

import lowrank


def train_loop_per_worker(settings: dict) -> None:
    """Called on every worker; all of them need the same data and see the same `output_dir`."""
    lowrank.train("run.yaml", progress=ray.train.get_context().get_world_rank() == 0, resume=True, **settings)


TorchTrainer(
    train_loop_per_worker,
    train_loop_config={"output_dir": "/shared/runs/first"},
    scaling_config=ray.train.ScalingConfig(num_workers=8, use_gpu=True),
).fit()
