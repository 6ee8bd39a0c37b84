"""Eight simulated devices, set before anything imports jax, and numpy's threads."""

import os
import pathlib

from tests.xla_flags import FAST_TO_COMPILE

# Tests run side by side, and threads of OpenBLAS that wait for each other use whole cores.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join([
    os.environ.get("XLA_FLAGS", ""), FAST_TO_COMPILE, "--xla_force_host_platform_device_count=8",
]).strip()

import jax

from dense_jax import distributed

distributed.reserve_threads()
jax.devices()
# Only this process has eight devices; a test's subprocess reserves threads for its own.
os.environ.pop("PJRT_NPROC")

# A rank that broadcasts silently is a wrong axis more often than not.
jax.config.update("jax_numpy_rank_promotion", "raise")

# Compilation is most of the tests' time; a second run, in this clone or in another one, reads
# what takes long from here.
jax.config.update(
    "jax_compilation_cache_dir", str(pathlib.Path("~/.cache/dense_jax/tests").expanduser())
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
