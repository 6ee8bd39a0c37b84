"""Descriptions of GPUs for their compiler, which asks a GPU itself where there is one.

The figures are those that CUDA reports for each GPU, as OpenXLA lists them in
xla/backends/gpu/target_config/specs (h100_sxm.txtpb and h200.txtpb); both GPUs have the same cores.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class _Gpu:
  """The properties in which GPUs of compute capability 9.0a differ."""

  name: str
  memory: int
  memory_bandwidth: int


_GPUS = {
    "h100": _Gpu("NVIDIA H100 80GB HBM3", 84942979072, 3352320000000),
    "h200": _Gpu("NVIDIA H200 141GB HBM3e", 151397597184, 4800000000000),
}
_CLOCK, _MATRIX_CLOCK = 1.98, 1.8295201
# Number of a dtype in XLA's PrimitiveType -> units of a core and operations of each per clock.
_SCALAR_UNITS = {
    4: (64, 1), 8: (64, 1), 10: (128, 2), 11: (128, 1), 12: (64, 1), 16: (128, 2),
}
_MATRIX_UNITS = {
    **dict.fromkeys((2, 6, 19, 20, 23, 24, 25, 28, 29, 33, 35, 36), (4, 1024)),
    **dict.fromkeys((10, 16), (4, 512)), 11: (4, 256), 12: (4, 32),
}
_LIMITS = {
    "threads_per_block_limit": 1024,
    "threads_per_warp": 32,
    "shared_memory_per_block": 49152,
    "shared_memory_per_block_optin": 232448,
    "shared_memory_per_core": 233472,
    "threads_per_core_limit": 2048,
    "registers_per_core_limit": 65536,
    "registers_per_block_limit": 65536,
    "core_count": 132,
    "fpus_per_core": 128,
    "block_dim_limit_x": 2147483647,
    "block_dim_limit_y": 65535,
    "block_dim_limit_z": 65535,
    "thread_dim_limit_x": 1024,
    "thread_dim_limit_y": 1024,
    "thread_dim_limit_z": 64,
    "l2_cache_size": 52428800,
    "clock_rate_ghz": _CLOCK,
    "device_address_bits": 64,
    "pcie_bandwidth": 34359738368,
}


def target_config(kind: str) -> str:
  """Returns the description of a GPU ("h100" or "h200") as a GpuTargetConfigProto in text form."""
  gpu = _GPUS[kind]
  limits = "\n".join(f"  {name}: {value}" for name, value in _LIMITS.items())
  return f"""gpu_device_info {{
{limits}
  memory_bandwidth: {gpu.memory_bandwidth}
  device_memory_size: {gpu.memory}
  cuda_compute_capability {{ major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }}
  scalar_unit_description {{ {_rates(_SCALAR_UNITS, _CLOCK)} }}
  matrix_unit_description {{ {_rates(_MATRIX_UNITS, _MATRIX_CLOCK)} }}
  device_vendor: "NVIDIA Corporation"
  ecc_enabled: true
  name: "{gpu.name}"
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
  device_interconnect_info {{ active_links: 18 }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{gpu.name}"
"""


def _rates(units: dict[int, tuple[int, int]], clock: float) -> str:
  return " ".join(
      f"rate_infos {{ key: {dtype} value {{ clock_rate_ghz: {clock} units_per_core: {count} "
      f"ops_per_clock: {operations} }} }}"
      for dtype, (count, operations) in units.items()
  )
