"""dense_jax: state space language models with dense hidden connections, in JAX."""
