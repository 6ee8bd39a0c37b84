"""The ids of a prompt, and the text of a continuation."""

from collections.abc import Sequence

from dense_jax.data.templates import Message, Template
from dense_jax.data.tokenizer import Tokenizer


def prompt_ids(tokenizer: Tokenizer, text: str) -> list[int]:
  """Returns the ids of a text that a model is to continue, with bos if the tokenizer adds it.

  The empty text is bos alone, so that there is always a token to predict the next one from.
  """
  ids = tokenizer.encode(text)
  return [tokenizer.bos_id, *ids] if tokenizer.add_bos or not ids else ids


def chat_ids(tokenizer: Tokenizer, template: Template, messages: Sequence[Message]) -> list[int]:
  """Returns the ids that a model continues with the next response of a chat.

  They are those that come before that response in training. For a single prompt they are
  `prompt_ids(tokenizer, template.prompt(text))`.

  Args:
    tokenizer: the model's tokenizer.
    template: the template that the model was trained with.
    messages: the chat so far; it may have responses.
  """
  turns, prompt = template.lay_out(messages)
  ids = [tokenizer.bos_id] if tokenizer.add_bos else []
  for turn in turns:
    ids += [*tokenizer.encode(turn.prompt), *tokenizer.encode(turn.response), tokenizer.eos_id]
  return ids + tokenizer.encode(prompt)


def spell(
    tokenizer: Tokenizer, prompt_ids: Sequence[int], new_ids: Sequence[int]
) -> tuple[str, str]:
  """Decodes a prompt and its continuation together, and splits the text between them.

  Decoded alone, a continuation can lose the space before its first word, because many models
  drop a space at the beginning of a text; and a character whose bytes are split between prompt
  and continuation would be lost.

  Args:
    tokenizer: the tokenizer of the ids.
    prompt_ids: the prompt's ids, without bos.
    new_ids: the continuation's ids.

  Returns:
    The prompt's text and the continuation's text, which join to the text of all ids. A character
    that the continuation completes belongs to the continuation.
  """
  text, alone = tokenizer.decode([*prompt_ids, *new_ids]), tokenizer.decode(prompt_ids)
  pairs = enumerate(zip(alone, text, strict=False))
  border = next((i for i, pair in pairs if pair[0] != pair[1]), min(len(alone), len(text)))
  return text[:border], text[border:]
