"""Small tokenizer.json files, trained by Hugging Face's tokenizers library."""

from collections.abc import Sequence

TEXT = [
    f"def function_{i}(self, value):\n    if value > {i}:\n        return self.call({i * 37})\n\n"
    f"the cat sat on number {i}, naïve → \uff21\uff22 \ufb01ne café\n"
    for i in range(200)
]
EOS = "<|endoftext|>"


def byte_level(
    special: Sequence[str] = (EOS,), added: Sequence[str] = (), normalizer=None, size: int = 500
) -> bytes:
  """A byte-level BPE, as GPT-2's and GPT-NeoX's."""
  from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

  tokenizer = Tokenizer(models.BPE())
  tokenizer.normalizer = normalizer
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
      vocab_size=size, special_tokens=[*special], show_progress=False,
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
  )
  tokenizer.train_from_iterator(TEXT, trainer)
  tokenizer.add_tokens([*added])
  return tokenizer.to_str().encode()


def llama() -> bytes:
  """A BPE with byte fallback that puts a space before a text and <s> before that, as LLaMA's."""
  from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers

  tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
  tokenizer.normalizer = normalizers.Sequence(
      [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
  tokenizer.decoder = decoders.Sequence([
      decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
      decoders.Strip(content=" ", left=1),
  ])
  names = ["<unk>", "<s>", "</s>"]
  trainer = trainers.BpeTrainer(
      vocab_size=500, show_progress=False, max_token_length=12,
      special_tokens=[*names, *(f"<0x{byte:02X}>" for byte in range(256))],
  )
  tokenizer.train_from_iterator([line for text in TEXT for line in text.split("\n")], trainer)
  tokenizer.post_processor = processors.TemplateProcessing(
      single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
  import json

  values = json.loads(tokenizer.to_str())
  # The bytes are pieces of the model, not special tokens.
  values["added_tokens"] = [t for t in values["added_tokens"] if t["content"] in names]
  return json.dumps(values).encode()
