"""Templates: text around prompts and messages; the prompt of generation begins what is trained."""

import pytest

from dense_jax.config import DataConfig
from dense_jax.data.converted import converted_files
from dense_jax.data.spelling import chat_ids, prompt_ids
from dense_jax.data.templates import (
  NAMED,
  Message,
  Turn,
  load_saved_template,
  parse_template,
  template_of,
)
from dense_jax.data.tokenizer import ByteTokenizer, load_saved_tokenizer
from dense_jax.errors import InputError

CHAT = [Message("system", "Be brief."), Message("user", "1+1?"), Message("assistant", "2"),
        Message("user", "2+2?"), Message("assistant", "4")]


@pytest.mark.parametrize(("text", "first", "second"), [
    ("dialogue", "Be brief.\n\nUser:\n1+1?\n\nAssistant:\n", "\n\nUser:\n2+2?\n\nAssistant:\n"),
    ("instruction", "Be brief.\n\n### Instruction:\n1+1?\n\n### Response:\n",
     "\n\n### Instruction:\n2+2?\n\n### Response:\n"),
    ("chatml", "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n"
     "<|im_start|>assistant\n",
     "\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"),
    ("Q: {prompt}\nA: ", "Be brief.\n\nQ: 1+1?\nA: ", "Q: 2+2?\nA: "),
    (r"{{Q}}\n{prompt}\n=", "Be brief.\n\n{Q}\n1+1?\n=", "{Q}\n2+2?\n="),
    ("plain", "Be brief.\n\n1+1?", "2+2?"),
])
def test_turns(text, first, second):
  template = parse_template(text)
  turns, asked = template.lay_out(CHAT)
  assert turns == (Turn(first, "2"), Turn(second, "4"))
  assert asked == template.after + template.assistant
  assert template.lay_out(CHAT[:4]) == (turns[:1], second)
  system = template.system[0] + "Be brief." + template.system[1]
  assert system + template.prompt("1+1?") == first
  assert template.marks_roles == (text != "plain")


def test_a_prompt_is_taken_as_it_is():
  """What a prompt says in braces is no field."""
  assert parse_template("<{prompt}>").prompt("{prompt} {x} {{ \\n") == "<{prompt} {x} {{ \\n>"
  assert {name for name in NAMED if parse_template(name).prompt("") == ""} == {"plain"}


@pytest.mark.parametrize("name", [*NAMED, "Q: {prompt}\nA:"])
def test_the_ids_of_generation_begin_those_of_training(name):
  tokenizer, template = ByteTokenizer(), parse_template(name)
  whole = [tokenizer.bos_id]
  for turn in template.lay_out(CHAT)[0]:
    whole += tokenizer.encode(turn.prompt)
    asked = len(whole)
    whole += [*tokenizer.encode(turn.response), tokenizer.eos_id]
  ids = chat_ids(tokenizer, template, CHAT[:4])
  assert ids == whole[:asked] and tokenizer.decode(whole[asked:]) == "4"
  single = chat_ids(tokenizer, template, [Message("user", "1+1?")])
  assert single == prompt_ids(tokenizer, template.prompt("1+1?"))


@pytest.mark.parametrize(("text", "why"), [
    ("chatlm", "did you mean chatml"), ("", "expected one of plain"), ("no field", "expected one"),
    ("{prompt} {prompt}", "it has 2"), ("{{x}}", "it has 0"), ("{question}", r"\{question\} is no"),
    ("{prompt} {response}", r"\{response\} is no field"), ("{}", r"\{\} is no field"),
    ("{prompt!r}", r"\{prompt!r\} is no field"), ("{prompt:5}", r"\{prompt:5\} is no field"),
    ("{prompt", "stand for braces"), ("{prompt}}", "stand for braces"), ("{0}", r"\{0\} is no"),
    ("{prompt.x}", r"\{prompt.x\} is no field"),
])
def test_a_template_that_is_none_is_named(text, why):
  with pytest.raises(InputError, match=rf"(?s)^config\.data\.template = .* is not valid.*{why}"):
    parse_template(text)


def test_a_template_without_prompts_is_named():
  assert template_of(DataConfig()) is None
  assert template_of(DataConfig(format="responses", template="chatml")) == NAMED["chatml"]
  with pytest.raises(InputError, match=r"^config\.data\.template = 'chatml' .*format=responses"):
    template_of(DataConfig(template="chatml"))


def test_transformers_is_given_the_same_template():
  assert parse_template('"{prompt}"\nA:').jinja() == (
      "{{ bos_token }}{% for message in messages %}"
      "{% if message['role'] == 'system' %}{{ message['content'] }}{{ \"\\n\\n\" }}"
      "{% elif message['role'] == 'user' %}"
      '{{ "\\"" }}{{ message[\'content\'] }}{{ "\\"\\nA:" }}'
      "{% else %}{{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
      "{% if add_generation_prompt %}{% endif %}"
  )


@pytest.mark.parametrize("text", ["chatml", "Q: {prompt}\\nA:"])
def test_a_converted_folder_says_its_template(tmp_path, text):
  for name, content in converted_files(ByteTokenizer(), text).items():
    (tmp_path / name).write_bytes(content)
  assert load_saved_template(tmp_path) == parse_template(text)
  assert isinstance(load_saved_tokenizer(tmp_path), ByteTokenizer)
  ByteTokenizer().save(tmp_path)
  assert load_saved_template(tmp_path) is None
  (tmp_path / "tokenizer_config.json").write_text('{"dense_jax_template": 3}')
  with pytest.raises(InputError, match=r"tokenizer_config\.json is not valid.*dense_jax_template"):
    load_saved_template(tmp_path)
