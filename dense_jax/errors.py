"""What a user can get wrong, as one kind of error."""


class InputError(ValueError):
  """The user's input is wrong: a config value, a path, a file's content.

  Its message names the field, the value and what would be valid. Every command
  line prints it without a traceback and ends with status 2.
  """
