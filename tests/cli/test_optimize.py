"""`optimize`: the main job from the command line."""

import json

import pytest

import jaxopt_llm as jo
from jaxopt_llm.checkpoints import read_config
from jaxopt_llm.cli import optimize as command
from jaxopt_llm.models import abstract
from jaxopt_llm.optimize import Outcome, Report

QUICK = [
    f"--set=measure.{setting}"
    for setting in ("window=64", "windows=2", "prompt_tokens=8", "output_tokens=4", "answer_tokens=8")
]
FIELDS = {
    "parameters",
    "file_bytes",
    "bytes",
    "zeros",
    "perplexity",
    "kld_mean",
    "same_top_p",
    "prefill_tokens_per_s",
    "decode_tokens_per_s",
}
STEP_FIELDS = ("parameters", "bytes", "perplexity", "kld_mean", "same_top_p")


@pytest.fixture
def optimize(run_cli, shallow):
    def run(*arguments):
        return run_cli("optimize", f"--model={shallow}", "--config=int8", *QUICK, *arguments)

    return run


def assert_refused(done, message):
    assert (done.code, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1].startswith("jaxopt-llm: error: ")
    assert message in done.stderr.splitlines()[-1]


def test_json(optimize, tmp_path):
    done = optimize(f"--out={tmp_path / 'out'}", "--json")
    assert done.code == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report.keys() == {"before", "after", "steps", "sample", "out"}
    (step,) = report["steps"]
    assert step.keys() == set(command.STEPS)
    assert step["step"] == "quantize"
    assert {name: step[name] for name in STEP_FIELDS} == {name: report["after"][name] for name in STEP_FIELDS}
    assert report["before"].keys() == report["after"].keys() == FIELDS
    assert report["out"] == str(tmp_path / "out")
    assert report["after"]["bytes"] < 0.3 * report["before"]["bytes"]
    assert (report["before"]["kld_mean"], report["before"]["same_top_p"]) == (0, 1)
    model, tokenizer = jo.load(tmp_path / "out")
    messages = [{"role": "user", "content": "Why is the sky blue?"}]
    assert jo.generate(model, tokenizer, [messages], max_tokens=8)[0].text == report["sample"]


def test_for_people(optimize, tmp_path, data_dir):
    done = optimize(f"--out={tmp_path / 'out'}", f"--text={data_dir / 'wikitext.txt'}")
    assert done.code == 0, done.stderr
    table, _, rest = done.stdout.partition("\n\n")
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == list(command.ROWS.values())
    assert rest.startswith("> Why is the sky blue?\n")
    assert rest.endswith(f"saved to {tmp_path / 'out'}\n")
    assert "timing the result" in done.stderr


def test_several_steps_are_a_table_of_their_own(optimize, tmp_path):
    recipe = tmp_path / "twice.py"
    recipe.write_text(
        "from jaxopt_llm.optimize import Quantize, Recipe, Sparsify\n\n\n"
        "def config():\n"
        "    return Recipe(steps=(Sparsify(method='magnitude'), Quantize()))\n"
    )
    done = optimize(f"--config={recipe}", f"--out={tmp_path / 'out'}")
    assert done.code == 0, done.stderr
    _, table, _ = done.stdout.split("\n\n", 2)
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert cells[0] == list(command.STEPS.values())
    assert [row[0] for row in cells[2:4]] == ["sparsify", "quantize"]


def test_growth_is_said(capsys, shallow, tmp_path):
    model = abstract(read_config(shallow)[0])
    figures = dict.fromkeys(FIELDS, 1.0) | {
        "zeros": 0.0,
        "parameters": 1000,
        "bytes": 1000,
        "file_bytes": 600,
    }
    before = Report(**figures)
    after = Report(**figures | {"file_bytes": 1100})
    tell = lambda **reports: command.tell(
        Outcome(model=model, steps=(), sample="x", **reports), "?", tmp_path
    )
    tell(before=before, after=after)
    assert "larger than the file it came from" in capsys.readouterr().out
    tell(before=after, after=before)
    assert "larger" not in capsys.readouterr().out


def test_an_own_checkpoint_is_replaced(optimize, shallow, tmp_path):
    jo.save(*jo.load(shallow), tmp_path / "out")
    before = (tmp_path / "out" / "jaxopt_llm.json").read_text()
    assert optimize(f"--out={tmp_path / 'out'}").code == 0
    assert (tmp_path / "out" / "jaxopt_llm.json").read_text() != before


def test_places_that_cannot_be_written_to(run_cli, tmp_path):
    """Before anything is loaded: the default model would have to be downloaded."""
    run = lambda out: run_cli("optimize", "--config=int8", f"--out={out}")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("mine")
    assert_refused(run(tmp_path / "file"), "file: not replaced, since it is no checkpoint")
    assert_refused(run(tmp_path / "folder"), "folder: not replaced")
    assert_refused(run(tmp_path / "file" / "below"), "file: a file, so no directory can be made below it")
    assert_refused(run("gs://bucket/model"), "is remote; name a local path")
    assert_refused(run(""), "--out is empty")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder", "thesis.tex"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=int9"], "no config 'int9' (did you mean int8?)"),
        (["--set=steps.0.format=int9"], "unknown quantization 'int9'"),
        (["--set=measure.windows=0"], "windows=0 must be at least 1"),
        (["--set=measure.window=513"], "window=513 is longer than the model's context of 512"),
        (["--text=nowhere.txt"], "nowhere.txt: No such file"),
        (["--config=mixed5", "--set=steps.1.target_bits=0"], "target_bits=0.0 must be above 0"),
    ],
)
def test_mistakes(optimize, tmp_path, arguments, message):
    assert_refused(optimize(f"--out={tmp_path / 'out'}", *arguments), message)
    assert not any(tmp_path.iterdir())


def test_configs_of_another_kind_are_refused(run_cli, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("from jaxopt_llm.models import Rope as config\n")
    done = run_cli("optimize", f"--out={tmp_path / 'out'}", f"--config={path}")
    assert_refused(done, "mine.py is a Rope; optimize takes a Recipe")


def test_dtype_and_mesh(optimize, tmp_path):
    done = optimize(f"--out={tmp_path / 'out'}", "--dtype=bfloat16", "--mesh=tensor=4", "--json")
    assert done.code == 0, done.stderr
    before = json.loads(done.stdout.splitlines()[-1])["before"]
    assert before["bytes"] == 2 * before["parameters"]
    assert jo.load(tmp_path / "out")[0].dtype == "bfloat16"
