"""Examples to fine-tune on: prompts and responses, from the lines of .jsonl files."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dense_jax.config import invalid
from dense_jax.data.reading import read_lines, whole_characters
from dense_jax.data.templates import NAMED, ROLES, Message, Template, Turn

_VALID = (
    'a JSON object with strings "prompt" and "response", or with "messages", a list of {"role": '
    f'{" or ".join(ROLES)}, "content": a string}} that ends with the assistant\'s,'
)


def check_suffixes(files: Sequence[Path], field: str) -> None:
  """Checks that all files have lines.

  Raises:
    InputError: one has not; the error names it.
  """
  for file in files:
    if ".jsonl" not in file.suffixes[-2:]:
      raise invalid(
          field, str(file), ".jsonl, .jsonl.gz or .jsonl.zst files alone: with "
          "config.data.format=responses each of their lines is an example",
      )


def read_examples(
    file: Path, field: str, template: Template
) -> Iterator[tuple[str, tuple[Turn, ...]]]:
  """Yields (":" and the line's number, turns) for each example of a file.

  A line that is not blank is a JSON object. It has strings `prompt` and `response`, or the list
  `messages` of a chat, which is taken if both are there. Other keys are ignored. A prompt may be
  empty, a response may not.

  Args:
    file: a .jsonl file, compressed or not.
    field: the config field that named it, for error messages.
    template: makes the text before each response.

  Raises:
    InputError: see `dense_jax.data.reading.read_texts`; a line is something else. The error names
      file and line.
  """
  return read_lines(file, field, _VALID, lambda value: _turns(value, template))


def _turns(value: Any, template: Template) -> tuple[Turn, ...]:
  if not isinstance(value, dict):
    raise ValueError("it is no object")
  if "messages" in value:
    messages = _messages(value["messages"])
    if not template.marks_roles:
      others = ", ".join(name for name, other in NAMED.items() if other.marks_roles)
      raise ValueError(
          "its messages need a config.data.template that says who speaks: "
          f"{others}, or a text with {{prompt}} in it"
      )
  else:
    names = {"prompt": "user", "response": "assistant"}
    messages = [Message(role, _string(value, name)) for name, role in names.items()]
    if not messages[-1].content:
      raise ValueError('its "response" is empty')
  return template.lay_out(messages)[0]


def _messages(values: Any) -> list[Message]:
  if not isinstance(values, list) or not values:
    raise ValueError('its "messages" are no list of messages')
  messages = []
  for number, value in enumerate(values, 1):
    try:
      if not isinstance(value, dict):
        raise ValueError("it is no object")
      message = Message(_string(value, "role"), _string(value, "content"))
      if message.role not in ROLES:
        raise ValueError(f"unknown role {message.role!r}")
      if message.role == "assistant" and not message.content:
        raise ValueError("the assistant's content is empty")
    except ValueError as error:
      raise ValueError(f"message {number}: {error}") from error
    messages.append(message)
  if messages[-1].role != "assistant":
    raise ValueError(f"the last message is of the role {messages[-1].role}")
  return messages


def _string(value: dict[str, Any], name: str) -> str:
  if name not in value:
    raise ValueError(f'it has no "{name}"')
  if not isinstance(value[name], str):
    raise ValueError(f'its "{name}" is no string')
  return whole_characters(value[name])
