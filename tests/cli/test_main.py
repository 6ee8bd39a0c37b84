"""The console command: `dense-jax COMMAND`."""

import ast
import sys
import tomllib

import pytest

from dense_jax.cli import common, generate, main
from dense_jax.errors import InputError
from tests.helpers import ROOT
from tests.syntax import parse


def test_every_command_is_listed_in_one_line(capsys):
  width = max(map(len, main.COMMANDS))
  for arguments in ([], ["help"], ["-h"], ["--help"]):
    assert main.main(arguments) == 0
    out = capsys.readouterr().out
    for name, does in main.COMMANDS.items():
      assert f"  {name.ljust(width)}  {does}\n" in out
    assert all(len(line) <= 100 for line in out.splitlines())


def test_every_command_is_a_module_with_a_main():
  for name in main.COMMANDS:
    tree = parse((ROOT / "dense_jax" / "cli" / f"{name}.py").read_text(encoding="utf-8"))
    assert "main" in [node.name for node in tree.body if isinstance(node, ast.FunctionDef)], name


def test_a_command_gets_what_follows_its_name(monkeypatch):
  seen = []
  monkeypatch.setattr(generate, "main", lambda arguments: seen.append(arguments) or 7)
  assert main.main(["generate", "--workdir", "x"]) == 7
  assert main.main(["help", "generate"]) == 7
  assert seen == [["--workdir", "x"], ["--help"]]


@pytest.mark.parametrize(
    ("name", "message"),
    [("trian", "unknown command trian; did you mean train? Commands: train, evaluate, report"),
     ("xyz", "unknown command xyz. Commands: train"),
     ("--workdir", "unknown command --workdir. Commands: train")],
)
def test_an_unknown_command_names_the_nearest(name, message):
  with pytest.raises(InputError) as error:
    main.main([name])
  assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("called", "usage"),
    [("/home/x/.venv/bin/dense-jax", "usage: dense-jax generate "),
     ("/x/dense_jax/cli/generate.py", "usage: python -m dense_jax.cli.generate ")],
)
def test_usage_has_the_name_under_which_it_was_called(called, usage, monkeypatch, capsys):
  monkeypatch.setattr(sys, "argv", [called])
  with pytest.raises(SystemExit, match="0"):
    generate.main(["--help"])
  assert capsys.readouterr().out.startswith(usage)


def test_status_and_words_are_those_of_every_command(monkeypatch, capsys):
  monkeypatch.setattr(sys, "argv", ["dense-jax", "trian"])
  monkeypatch.setattr(common, "keep_compiled_programs", lambda: None)
  name, outcome = main.run, common._outcome(main.main)
  assert outcome[0] == 2 and outcome[1].startswith("error: unknown command trian")
  scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
  assert scripts == {"dense-jax": f"{name.__module__}:{name.__name__}"}
