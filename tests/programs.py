"""What a compiled program costs as a whole."""

from dense_jax.costs.hlo import Cost, program_items, total


def program_cost(text: str, *, open_trips: int | None = None) -> Cost:
  """The cost of one run of a program on one chip; see `program_items`."""
  return total(program_items(text, open_trips=open_trips))
