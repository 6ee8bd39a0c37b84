"""Pure functions on arrays: recurrences, their reads, convolutions, the loss."""
