"""What the README says is so: its Python runs as it stands, its commands at small sizes, its figures add up."""

import gzip
import json
import math
import re
import shlex
from pathlib import Path

import pytest
from models import needs_compiler
from typer.testing import CliRunner

from nsa_compile import NSAConfig, cli, num_cmp

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.S)
LINES = "\n".join(re.findall(r"```bash\n(.*?)```", README, flags=re.S)).replace("\\\n", " ").splitlines()
COMMANDS = [shlex.split(command, comments=True) for line in LINES for command in line.split(" && ") if command]

MODEL = "--n-layers 1 --dim 16 --n-heads 2 --n-kv-groups 1 --d-k 8 --d-v 8 --l 4 --d 2 --l-sel 4 --n-sel 3 --w 6"
SMALLER = {
    "tokenize": "",
    "train": f"--steps 1 --seq-len 32 --batch-size 8 --eval-batches 1 --device cpu --no-compile {MODEL}",
    "export": "",
    "generate": "--max-new-tokens 4",
    "profile": f"--no-compile --tokens 16 --vocab-size 16 --warmup 1 --active 1 {MODEL}",
    "bench": "--tokens 64 --heads 4 --groups 2 --d-k 16 --d-v 16 --l 8 --d 4 --l-sel 16 --n-sel 3 --w 16 --repeats 2"
    " --what window --what gated_sum --beside none --dtype fp32 --device cpu",
}
"""Commands of the README that the test runs, and the options after which they take seconds on a CPU."""
NOT_RUN = {
    "pip": "the environment has what it installs; test_release.py installs the wheel",
    "pytest": "runs here",
    "torchrun": "test_parallel.py and test_faults.py start processes",
    "nsa-compile demo": "test_cli.py",
}


@needs_compiler
@pytest.mark.parametrize("index", range(len(SNIPPETS)))
def test_snippet_runs(index, capsys):
    exec(compile(SNIPPETS[index], f"README.md snippet {index}", "exec"), {"__name__": "readme"})
    if "print(cache.positions)" in SNIPPETS[index]:
        assert capsys.readouterr().out.startswith("tensor([120, 120], dtype=torch.int32)")


def test_each_recipe_has_a_snippet():
    recipes = README.partition("\n## Recipes\n")[2].partition("\n## ")[0].split("\n### ")[1:]
    assert len(recipes) == 8 and all("```python\n" in recipe for recipe in recipes)


def write_text(folder: Path) -> None:
    """The files that the commands name."""
    import pyarrow
    import pyarrow.parquet

    texts = [f"{i} squared is {i * i}\n" * 4 for i in range(400)]
    (folder / "corpus").mkdir()
    (folder / "corpus" / "a.txt").write_text("".join(texts))
    with gzip.open(folder / "more.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), folder / "web.parquet")


def test_commands_run(tmp_path, monkeypatch):
    """One after the other in one folder, as the README has them but for sizes and device."""
    pytest.importorskip("pyarrow")
    pytest.importorskip("tensorboard")
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path)

    ran = set()
    for words in COMMANDS:
        if {words[0], " ".join(words)} & set(NOT_RUN):
            continue
        assert words[0] == "nsa-compile"
        extra = "" if "--diff" in words else SMALLER[words[1]]
        for _ in range(2 if words[1:] == ["profile", "train"] else 1):  # --diff compares two
            result = CliRunner().invoke(cli.app, [*words[1:], *extra.split()])
            # such short times may all be slower than before: nothing follows the count then
            slower = "--compare" in words and re.search(r": [1-9]\d* slower(, |$)", result.output, re.M)
            assert result.exit_code == bool(slower), f"{' '.join(words)}\n{result.output}"
        ran.add(words[1])
    assert ran == set(SMALLER)


def test_sizes_read_what_the_table_says():
    rows = re.findall(r"^\| (\d+) \| ([\d, ]+?)(?: \(the paper's\))? \| (\d+) \| ([\d.]+) % \|$", README, flags=re.M)
    assert len(rows) >= 5
    for context, sizes, keys, share in rows:
        l, d, l_sel, n_sel, w = (int(x) for x in sizes.split(","))
        NSAConfig(l=l, d=d, l_sel=l_sel, n_sel=n_sel, w=w)
        S = int(context)
        assert int(keys) == num_cmp(S, l, d) + n_sel * l_sel + w
        assert share == f"{100 * int(keys) / S:.1f}"


def test_the_picture_has_the_papers_sizes():
    c, S = NSAConfig(), 65536
    cmp, slc = num_cmp(S, c.l, c.d), c.n_sel * c.l_sel
    picture = (ROOT / "docs" / "branches.svg").read_text()
    reads = (f"{cmp} means", f"{slc} tokens", f"{c.w} tokens", f"{cmp} + {slc} + {c.w} = {cmp + slc + c.w} keys")
    sizes = (f"l = {c.l} tokens, every d = {c.d}", f"n_sel = {c.n_sel} blocks of l_sel = {c.l_sel} tokens")
    assert all(words in picture for words in (*reads, *sizes))


def test_measured_crossover_is_that_of_the_file():
    record = json.loads((ROOT / "profiles" / "h100-2026-11-25-bench.json").read_text())
    ms = {
        (row["impl"], row["tokens"]): row["ms"]
        for row in record["rows"]
        if row["what"] in ("nsa", "dense") and row["pass"] == "forward+backward" and row["status"] == "ok"
    }
    limits = README.partition("\n## Limits")[2].partition("\n## ")[0].replace("\n ", "")
    dense, ours = ([ms[impl, t] for t in (2048, 8192, 65536)] for impl in ("flash-attn 4", "auto"))
    assert f"takes {dense[0]:.1f} ms at 2048 tokens and {dense[1]:.1f} at 8192" in limits
    assert f"`nsa_attention` {ours[0]:.1f} and {ours[1]:.1f}; at 65536 it is {dense[2]:.0f} to {ours[2]:.0f}" in limits
    ahead, behind = (math.log(ours[i] / dense[i]) for i in (1, 2))
    crossing = 8192 * math.exp(math.log(8) * ahead / (ahead - behind))
    assert f"cross at about {500 * round(crossing / 500)} tokens" in limits


def test_links_lead_to_files():
    links = re.findall(r"\]\((?!https?:|#)([^)]+)\)", README)
    assert len(links) >= 5 and all((ROOT / link).is_file() for link in links)
