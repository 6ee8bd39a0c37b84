"""Documents stay true: what they name exists, and their commands parse.

What is checked, of README.md, WORKSPACE.md, docs/ and launch/README.md (`tests/documents/`):

- a command (python, dense-jax, make, pytest, pip, sbatch; in a code block or in backticks) is given
  to its own parser, and its experiment and config keys are loaded; nothing runs. A command above a
  line "error: ..." must be refused in these words;
- a path in backticks exists, from the root, from dense_jax/ or beside the document; a bare file
  name exists somewhere; a file that a run writes (`config.json`) is spelled in the sources;
- `model.dense.depth`, `dense.depth` and `depth=2` are config keys, and the value is valid;
- `dense_jax.x.y`, `module.name` and `Class.name` resolve; `CamelCase`, `snake_case` and `call()`
  are words of the sources; a name "of", "in" or before (`file.py`) is defined in that file;
- options (`--text`) are those of a parser of ours; links and their anchors lead somewhere;
- in ```python blocks, imports, attributes, arguments and config keys exist.

Anything else in backticks (mathematics, `lax.scan`, `mamba`) says nothing that could be checked.
<name> and words in capitals (FILE) stand for something else.
"""

import pytest

from tests.documents.reading import false_statements, read
from tests.helpers import ROOT

DOCUMENTS = ["README.md", "WORKSPACE.md", "launch/README.md",
             *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))]
SMOKE = "--config experiments/smoke.py"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_document_is_true(name):
  problems = list(false_statements(read(ROOT / name)))
  assert not problems, "\n".join(["", *problems])


def found(text: str) -> list[str]:
  return list(false_statements(read(ROOT / "README.md", text)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("See `ops/recurence.py`.", "README.md:1: there is no `ops/recurence.py`"),
        ("\nIn `attic/`.", "README.md:2: `attic/` is neither in the tree nor in the code"),
        ("`interopp/<name>.py`", "`interopp` is neither in"),
        ("It writes `metrics.yaml`.", "`metrics.yaml` is neither in"),
        ("`tests/test_files.py -k drifft`", "tests/test_files.py has no drifft"),
        ("`dense_jax.cli.trian`", "there is no `dense_jax.cli.trian`"),
        ("`dense_jax.config.ModelConf`", "there is no `dense_jax.config.ModelConf`"),
        ("`sharding.constrian`", "no module sharding has constrian"),
        ("`LanguageModel.stepp`", "LanguageModel has no stepp"),
        ("`LangModel`", "`LangModel` is no word of the sources"),
        ("`own_querry`", "`own_querry` is no word of the sources"),
        ("`load_hff(folder)`", "`load_hff` is no word of the sources"),
        ("`PARAMETERS` of `training/optimizer.py`", "`PARAMETERS` is not defined in training/opt"),
        ("`load_hf`, `DenseConfig.depth` in `interop/hugging_face.py`",
         "`DenseConfig.depth` is not defined in interop/hugging_face.py"),
        ("`LanguageModel` (`models/registry.py`)", "`LanguageModel` is not defined in models/reg"),
        ("`model.dense.depht`", "there is no config key model.dense.depht"),
        ("`config.modle`", "there is no config key modle"),
        ("`dense.colour`", "there is no config key dense.colour"),
        ("`depth=two`", "two is no value of the config key depth"),
        ("`depth=1 sauce=fused`", "there is no config key sauce"),
        ("`model.implementation=magic`", "magic is no value of the config key model"),
        ("`--config.data.pathh`", "there is no config key data.pathh"),
        ("`--tezt`", "no parser of ours has --tezt"),
        ("[x](docs/none.md)", "the link docs/none.md leads nowhere"),
        ("[x](docs/dense.md#none)", "dense.md has no heading #none"),
        ("`make trian`", "the Makefile has no target trian"),
        ("    make test ARGS='tests/none.py'", "there is no tests/none.py"),
        ("    make test PYTHONN=x", "the Makefile has no variable PYTHONN"),
        ("    make train ARGS='--config.train.stepz=1'", "unknown key config.train.stepz"),
        ("    python -m pytest -q tests/none.py", "there is no tests/none.py"),
        ("    pip install -e '.[tpuu]'", "pyproject.toml has no extra tpuu"),
        ("    python -m dense_jax.cli.trian", "there is no module dense_jax.cli.trian"),
        ("    dense-jax trian", "did you mean train?"),
        ("    dense-jax report --workdirr x", "required: --workdir"),
        (f"    dense-jax train {SMOKE} --workdir x --steps 3", "unrecognized arguments: --steps 3"),
        (f"a\n\n    dense-jax train {SMOKE} \\\n        --workdir x --config.train.stepz=1\n",
         "README.md:3: dense-jax train"),
        (f"```bash\nX=1 python -m dense_jax.cli.train {SMOKE} --workdir x --config.seed=-1\n```",
         "README.md:2: X=1 python -m dense_jax.cli.train"),
        ("`dense-jax train --config experiments/none.py --workdir x`", "experiments/none.py"),
        ("`dense-jax train --config FILE --workdir x --config.train.stepz=1`", "train.stepz;"),
        ("    python launch/local.py --processes 2 -- dense-jax trian", "did you mean train?"),
        ("    python -m experiments.benchmarks.cpu --quik", "unrecognized arguments: --quik"),
        (f"    sbatch launch/slurm.sbatch {SMOKE} --workdir x --config.sed=1", "config.seed?"),
        (f"    $ dense-jax train {SMOKE} --workdir x\n    error: no", "does not end with the"),
        ("```python\nfrom dense_jax.interop import load_hff\n```", "no dense_jax.interop.load_hff"),
        ("```python\nfrom dense_jax import files\nfiles.lod()\n```", "files has no lod"),
        ("```python\nfrom dense_jax import experiment\nexperiment.load('x', changes=())\n```",
         "got an unexpected keyword argument 'changes'"),
        ("```python\noverrides = [('model.dense.depht', '2')]\n```", "no config key model.dense"),
    ],
)
def test_a_planted_falsehood_is_found(text, message):
  (problem,) = found(text)
  assert message in problem


@pytest.mark.parametrize(
    "text",
    [
        "`h_t = a_t h_{t-1} + u_t`, `[B, T, N]`, `x_BTD`, `_BTE`, `lax.scan`, `mamba`, `S`",
        "`ops/`, `layers/<family>.py`, `dense_jax/types.py`, `smoke.py`, `.ci/run`",
        "`config.json`, `metrics.jsonl`, `tokenizer/`, `checkpoints/<step>/`, `.jsonl.gz`",
        "`~/.cache/dense_jax`, `gs://BUCKET/...`, `corpus/*.jsonl.zst`, `.venv/xpk`",
        "`model.dense.`, `config.mesh`, `dense.depth`, `mixer.context`, `depth=1 source=fused`",
        "`fsdp=16`, `learning_rate=1e-3`, `XLA_FLAGS=--x=4`, `--config.KEY=VALUE`, `--config.`",
        "`DenseConfig.fusion` in `config/dense.py`, `FAMILIES` of `models/registry.py`",
        "`ExperimentConfig`, `sharding.constrain`, `LanguageModel.init_state`, `nnx.split`",
        "[x](docs/dense.md#options), [y](https://arxiv.org/abs/2403.00818)",
        "`make`, `make test-slow ARGS='-k drift'`, `pip install -e '.[gcs]'`",
        "`dense-jax report`, `dense-jax COMMAND --help`, `dense-jax train --help`",
        "`python -m experiments.<name>`, `python -m experiments.benchmarks.cpu --json FILE`",
        f"    $ dense-jax train {SMOKE} --workdir x --config.train.z_loss=-1\n"
        "    error: config.train.z_loss = -1.0 is not valid: expected a number >= 0",
        "    step 350/350  loss 5.6376\n    resume    python -m dense_jax.cli.trian\n",
        "```python\nimport jax\nfrom dense_jax import experiment\nexperiment.load('x', [])\n```",
    ],
)
def test_what_is_true_or_says_nothing_passes(text):
  assert not found(text)
