"""Every Python snippet of the README runs as it stands."""

import re
from pathlib import Path

import pytest
from models import needs_compiler

SNIPPETS = re.findall(r"```python\n(.*?)```", (Path(__file__).parent.parent / "README.md").read_text(), flags=re.S)


@needs_compiler
@pytest.mark.parametrize("index", range(len(SNIPPETS)))
def test_snippet_runs(index, capsys):
    exec(compile(SNIPPETS[index], f"README.md snippet {index}", "exec"), {"__name__": "readme"})
    if "print(cache.positions)" in SNIPPETS[index]:
        assert capsys.readouterr().out.startswith("tensor([120, 120], dtype=torch.int32)")


def test_there_are_snippets():
    assert len(SNIPPETS) >= 2
