"""What layers record, beside the same numbers computed token by token in NumPy."""

import numpy as np
import pytest

from dense_jax.layers.metrics import LONGEST_MEMORY, collecting, record_memory
from tests.builders import fast_jit, model_config, normal, packed, random_model
from tests.helpers import assert_trees_close

T = 8
DOCUMENTS = [[3, 5], [8]]  # No padding, which would count.
HEADS, GAMMAS_H = 2, np.array([1 - 2**-5, 1 - 2**-6])  # gau_retnet's.


def silu(x):
  return x / (1 + np.exp(-x))


def softplus(x):
  return np.log1p(np.exp(x))


def rms(x):
  return np.sqrt(np.mean(np.square(x)))


def spread(name, x):
  return {f"{name}_mean": np.mean(x), f"{name}_std": np.std(x)}


def values(module):
  """A module's parameter or kernel, float64."""
  return np.asarray(getattr(module, "kernel", module)[...], np.float64)


def after_norm(layer, x):
  """RMSNorm of the residual stream, float64."""
  x = np.asarray(x, np.float64)
  mean = np.mean(x**2, axis=-1, keepdims=True)
  return x / np.sqrt(mean + layer.norm.epsilon) * values(layer.norm.scale)


def gate_of(gate, x):
  return silu(silu(x @ values(gate.down)) @ values(gate.up))


def run(family, inject="state", documents=DOCUMENTS, **changed):
  """Runs a model's first two layers, of which the second reads the first.

  Args:
    family: the model's.
    inject: what its second layer fuses.
    documents: the rows' documents.
    **changed: the mixers' parameters that have one value everywhere.

  Returns:
    The layers; what enters and leaves them, [B, T, D]; what each recorded.
  """
  config = model_config(family, 1, inject)
  segments = packed(documents)

  @fast_jit
  def through(layers, x):
    shallow, stream, recorded = (), [x], []
    for layer in layers:
      with collecting() as aux:
        x, _, shared = layer(x, segments, None, shallow)
      shallow = (shared,)
      stream.append(x)
      recorded.append(aux)
    return stream, recorded

  layers = random_model(config).stack.prefix_layers
  for layer in layers:
    for name, value in changed.items():
      parameter = getattr(layer.mixer, name)
      parameter[...] = np.full_like(parameter[...], value)
  return layers, *through(layers, normal(0, len(documents), T, config.width))


def check(recorded, expected):
  """Asserts that these numbers are among those recorded."""
  expected = {name: np.float32(value) for name, value in expected.items()}
  assert_trees_close({name: recorded[name] for name in expected}, expected)


def rotated(x_BTHN):
  """Neighbouring pairs, turned by position times 1 and 1e-4."""
  assert x_BTHN.shape[-1] == 4
  positions_BT = np.asarray([[t for length in row for t in range(length)] for row in DOCUMENTS])
  phase = np.exp(1j * positions_BT[:, :, None, None] * np.array([1.0, 1e-4]))
  turned = (x_BTHN[..., 0::2] + 1j * x_BTHN[..., 1::2]) * phase
  return np.stack([turned.real, turned.imag], axis=-1).reshape(x_BTHN.shape)


def by_head(x):
  return x.reshape(*x.shape[:2], HEADS, -1)


def retention_states(layer, x):
  """h_t = gamma h_{t-1} + v_t k_t^T, which starts again with each document; [B, T, H, P, N]."""
  mixer = layer.mixer
  k = silu(x @ values(mixer.k_proj)) / 2  # sqrt(N) = 2
  k_BTHN, v_BTHP = rotated(by_head(k)), by_head(silu(x @ values(mixer.v_proj)))
  states = np.zeros((*v_BTHP.shape, 4))
  for row, documents in enumerate(DOCUMENTS):
    starts = np.cumsum([0, *documents])
    for t in range(T):
      h = 0 if t in starts else GAMMAS_H[:, None, None] * states[row, t - 1]
      states[row, t] = h + v_BTHP[row, t, :, :, None] * k_BTHN[row, t, :, None, :]
  return states


def test_reads_and_gates_of_an_injected_state():
  (shallow, deep), (before, between, after), recorded = run("gau_retnet")
  x = after_norm(deep, between)
  q_BTHN = rotated(by_head(silu(x @ values(deep.mixer.q_proj))))
  gate = gate_of(deep.mixer.dense.transition.channel_gates[0], x)

  def read(layer, x):
    return np.einsum("bthpn,bthn->bthp", retention_states(layer, x), q_BTHN)

  own = rms(read(deep, x))
  source = rms(by_head(gate) * read(shallow, after_norm(shallow, before)))
  check(recorded[1], {
      "own_read_rms": own, "source_1_read_rms": source, "source_1_ratio": source / own,
      **spread("gate_1", gate), "residual_rms": rms(np.asarray(after)),
  })
  assert np.std(gate) > 0.01 and 0.001 < source / own < 1000


def test_inputs_and_gates_where_inputs_are_injected():
  (shallow, deep), (before, between, _), recorded = run("gau_retnet", "inputs")
  x, x_below = after_norm(deep, between), after_norm(shallow, before)
  k, k_below = (
      silu(x @ values(layer.mixer.k_proj)) / 2 for layer, x in ((deep, x), (shallow, x_below))
  )
  gate = gate_of(deep.mixer.dense.gates["k"][0], x)
  check(recorded[1], {
      "k_rms": rms(k), "k_source_1_rms": rms(gate * k_below),
      "k_source_1_ratio": rms(gate * k_below) / rms(k), **spread("k_gate_1", gate),
  })


def mamba2_decay(layer, x):
  """exp(dt A), [B, T, H]."""
  mixer = layer.mixer
  dt_H = softplus((x @ values(mixer.bcdt_proj))[..., -mixer.heads :] + values(mixer.dt_bias))
  return np.exp(-dt_H * np.exp(values(mixer.a_log)))


def mamba_decay(layer, x):
  """exp(dt A), [B, T, N, E]."""
  mixer = layer.mixer
  kernel_WE, wide = values(mixer.conv.kernel), x @ values(mixer.in_proj)
  taps = len(kernel_WE)
  padded = np.pad(wide, ((0, 0), (taps - 1, 0), (0, 0)))
  conv = sum(kernel_WE[tap] * padded[:, tap : tap + T] for tap in range(taps))
  low = (silu(conv + values(mixer.conv.bias)) @ values(mixer.x_proj))[..., : mixer.dt_rank]
  dt_E = softplus(low @ values(mixer.dt_proj) + values(mixer.dt_bias))
  return np.exp(-dt_E[..., None, :] * np.exp(values(mixer.a_log)))


def s4d_decay(layer, x):
  """|exp(dt a)|, [N / 2, E]."""
  del x
  return np.exp(-np.exp(values(layer.mixer.log_dt)) * np.exp(values(layer.mixer.log_a)))


@pytest.mark.parametrize(("family", "decay"), [
    ("gau_retnet", lambda layer, x: GAMMAS_H), ("mamba2", mamba2_decay), ("mamba", mamba_decay),
    ("s4d", s4d_decay),
])
def test_the_memory_in_tokens(family, decay):
  layers, stream, recorded = run(family, documents=[[8], [8]])
  for layer, x, aux in zip(layers, stream, recorded, strict=False):
    check(aux, spread("memory_tokens", 1 / (1 - decay(layer, after_norm(layer, x)))))
  if family == "gau_retnet":  # 32 and 64 tokens.
    check(recorded[0], {"memory_tokens_mean": 48, "memory_tokens_std": 16})


def test_steps_that_underflow_leave_finite_metrics():
  with collecting() as aux:
    record_memory(lambda: np.float32([0.0, -0.0, -1e-30, -np.inf]))
  check(aux, spread("memory_tokens", [LONGEST_MEMORY] * 3 + [1]))
  _, _, recorded = run("mamba2", dt_bias=-200)  # Step sizes underflow.
  for aux in recorded:
    check(aux, {"memory_tokens_mean": LONGEST_MEMORY, "memory_tokens_std": 0, "own_read_rms": 0})
  check(recorded[1], {"source_1_ratio": 0})
