"""Templates: how a prompt, or the messages of a chat, become the text before a response.

Fine-tuning (`config.data.format=responses`) and generation use the same template, so that a model
is asked in the form in which it was taught.
"""

import dataclasses
import json
import string
from collections.abc import Sequence
from typing import NamedTuple

from etils import epath

from dense_jax.config import DataConfig, invalid
from dense_jax.data.tokenizer_files import DESCRIPTION, TEMPLATE, read_description
from dense_jax.errors import InputError, did_you_mean

FIELD = "config.data.template"
ROLES = ("system", "user", "assistant")


class Message(NamedTuple):
  """A message of a chat; its role is one of `ROLES`."""

  role: str
  content: str


class Turn(NamedTuple):
  """A response, and the text between the one before it, or the beginning, and this one."""

  prompt: str
  response: str


@dataclasses.dataclass(frozen=True)
class Template:
  """The text around the messages of a chat.

  A conversation is tokenized turn by turn, prompt and response apart, as

      [bos] prompt response [eos] prompt response [eos] ...

  in which responses and their eos count in the loss.

  Attributes:
    system: the texts before and after a system message.
    user: the texts before and after a user's message.
    assistant: the text before each response.
    after: the text between a response's eos and what follows it.
  """

  system: tuple[str, str] = ("", "\n\n")
  user: tuple[str, str] = ("", "")
  assistant: str = ""
  after: str = ""

  @property
  def marks_roles(self) -> bool:
    """True if a model can tell who speaks, as it must in a chat."""
    return bool(self.assistant or any(self.user))

  def prompt(self, text: str) -> str:
    """Returns the text that a model continues to answer a single prompt."""
    return self.lay_out([Message("user", text)])[1]

  def lay_out(self, messages: Sequence[Message]) -> tuple[tuple[Turn, ...], str]:
    """Returns the turns that are answered, and the text that asks for one more response."""
    turns = []
    prompt = ""
    for role, content in messages:
      if role == "assistant":
        turns.append(Turn(prompt + self.assistant, content))
        prompt = self.after
      else:
        before, behind = self.system if role == "system" else self.user
        prompt += before + content + behind
    return tuple(turns), prompt + self.assistant

  def jinja(self) -> str:
    """Returns the template as transformers' `apply_chat_template` takes it, as Jinja.

    Rendered with `add_generation_prompt`, it gives bos, the turns with eos after each response, and
    the text that asks for one more.
    """
    def message(before: str, behind: str) -> str:
      return f"{_literal(before)}{{{{ message['content'] }}}}{behind}"

    system = message(self.system[0], _literal(self.system[1]))
    user = message(self.user[0], _literal(self.user[1]))
    assistant = message(self.assistant, f"{{{{ eos_token }}}}{_literal(self.after)}")
    return (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}" + system
        + "{% elif message['role'] == 'user' %}" + user + "{% else %}" + assistant
        + "{% endif %}{% endfor %}{% if add_generation_prompt %}" + _literal(self.assistant)
        + "{% endif %}"
    )


def _literal(text: str) -> str:
  """Returns Jinja that gives the text; Jinja would drop a line end after a block."""
  return "{{ " + json.dumps(text, ensure_ascii=False) + " }}" if text else ""


NAMED = {
    "plain": Template(),
    "dialogue": Template(user=("User:\n", "\n\n"), assistant="Assistant:\n", after="\n\n"),
    "instruction": Template(
        user=("### Instruction:\n", "\n\n"), assistant="### Response:\n", after="\n\n"
    ),
    "chatml": Template(
        system=("<|im_start|>system\n", "<|im_end|>\n"),
        user=("<|im_start|>user\n", "<|im_end|>\n"), assistant="<|im_start|>assistant\n",
        after="\n",
    ),
}


def parse_template(text: str) -> Template:
  r"""Parses `config.data.template`.

  Args:
    text: a name in `NAMED`, or the text around a prompt, such as "Q: {prompt}\nA:", in which {{ and
      }} stand for braces, and a backslash with an n for a line end, which shells cannot easily
      write.

  Raises:
    InputError: it is neither.
  """
  if text in NAMED:
    return NAMED[text]
  names = ", ".join(NAMED)
  valid = f"one of {names}, or a text with {{prompt}} in it once, such as 'Q: {{prompt}}\\nA:'"
  if "{" not in text and "}" not in text:
    raise invalid(FIELD, text, f"{valid}{did_you_mean(text, NAMED).rstrip('.')}")
  try:
    parts = list(string.Formatter().parse(text.replace("\\n", "\n")))
  except ValueError as error:
    raise invalid(FIELD, text, f"{valid} ({error}; {{{{ and }}}} stand for braces)") from error
  fields = [part[1:] for part in parts if part[1] is not None]
  for name, form, conversion in fields:
    if name != "prompt" or form or conversion:
      written = f"{name}{'!' + conversion if conversion else ''}{':' + form if form else ''}"
      raise invalid(FIELD, text, f"{valid}; {{{written}}} is no field ({{{{ stands for a brace)")
  if len(fields) != 1:
    raise invalid(FIELD, text, f"{valid}; it has {len(fields)}")
  border = next(i for i, part in enumerate(parts) if part[1] is not None)
  before = "".join(part[0] for part in parts[: border + 1])
  return Template(user=(before, "".join(part[0] for part in parts[border + 1 :])))


def template_of(config: DataConfig) -> Template | None:
  """Returns the template of a configuration; None means that it trains on plain text.

  Raises:
    InputError: the template is not valid, or there is one although the text is plain.
  """
  if config.format == "responses":
    return parse_template(config.template)
  if config.template != "plain":
    raise invalid(
        FIELD, config.template, "plain with config.data.format=text; with "
        "config.data.format=responses there are prompts for a template",
    )
  return None


def load_saved_template(directory: epath.PathLike) -> Template | None:
  """Loads the template of a folder that the command `convert` wrote.

  Returns:
    The template; None means that the model was not trained on responses, or by another program.

  Raises:
    InputError: the folder's tokenizer_config.json is damaged.
  """
  file = epath.Path(directory) / DESCRIPTION
  text = read_description(epath.Path(directory)).get(TEMPLATE)
  if text is None:
    return None
  if not isinstance(text, str):
    raise InputError(f'{file} is not valid: expected "{TEMPLATE}": a template')
  return parse_template(text)
