"""Compiles an experiment's train step for a TPU v5e 2x2 and prints its memory as JSON.

Run in a process of its own, by test_tpu_compile.py: the TPU compiler must not be found by
the tests' own jax.
"""

import dataclasses
import json
import sys

from jax.experimental import topologies

from dense_jax import experiment, sharding
from dense_jax.ops import dispatch
from dense_jax.training.step import Trainer


def main(file: str, sequences_per_chip: int) -> None:
  topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
  batch_size = sequences_per_chip * len(topology.devices)
  overrides = [("mesh.data", "1"), ("mesh.fsdp", "-1"), ("train.batch_size", str(batch_size))]
  config = experiment.load(file, overrides)
  mesh = sharding.make_mesh(config.mesh, list(topology.devices))
  with dispatch.compiling_for("tpu"):
    trainer = Trainer(config, mesh)
    batch = trainer.batch_shapes(batch_size, config.data.seq_len)
    compiled = trainer.train_step.lower(trainer.state_shapes, batch).compile()
  memory = compiled.memory_analysis()
  print(json.dumps({
      "arguments": memory.argument_size_in_bytes,
      "temporaries": memory.temp_size_in_bytes,
      "mesh": dict(mesh.shape),
      "model": dataclasses.asdict(config.model),
  }))


if __name__ == "__main__":
  main(sys.argv[1], int(sys.argv[2]))
