"""`InputError`, the one exception for wrong user input."""


class InputError(ValueError):
  """Wrong user input, such as a config value, a path or a file's content.

  The message names the field, its value and what would be valid. Every command prints it without a
  traceback and exits with status 2.
  """
