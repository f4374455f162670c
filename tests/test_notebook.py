"""The notebook of the selection runs, at small sizes, and is committed with its pictures."""

import json
from pathlib import Path

import pytest

PATH = Path(__file__).parent.parent / "notebooks" / "selection.ipynb"
CELLS = [cell for cell in json.loads(PATH.read_text())["cells"] if cell["cell_type"] == "code"]


def run(changes: dict[str, str]) -> dict:
    """The names that the cells leave, after replacements in their text."""
    pytest.importorskip("matplotlib").use("agg")
    names: dict = {"__name__": "notebook"}
    for number, cell in enumerate(CELLS):
        code = "".join(cell["source"])
        for old, new in changes.items():
            assert number or old in code
            code = code.replace(old, new)
        exec(compile(code, f"{PATH.name} cell {number}", "exec"), names)
    names["plt"].close("all")
    return names


def test_it_runs_small_and_from_a_checkpoint(capsys, monkeypatch):
    monkeypatch.chdir(PATH.parent)  # as Jupyter does
    names = run({"SMALL = 0": "SMALL = 1"})
    assert len(names["seen"].blocks) == len(names["seen"].gates) == names["c"].n_layers
    for chosen in names["free"]:  # forced and chosen blocks together are n_sel
        late = names["position"] >= names["c"].n_sel * names["c"].l_sel
        assert (chosen.sum(-1) + names["forced"].sum(-1)[:, None])[late].eq(names["c"].n_sel).all()
    assert "held-out loss" in capsys.readouterr().out
    again = run({"SMALL = 0": "SMALL = 1", "CHECKPOINT = None": f"CHECKPOINT = {str(names['folder'] / 'run')!r}"})
    assert "held-out loss" not in capsys.readouterr().out
    assert all((a == b).all() for a, b in zip(names["seen"].blocks, again["seen"].blocks, strict=True))


def test_it_was_run_in_order_and_is_small():
    assert [cell["execution_count"] for cell in CELLS] == list(range(1, len(CELLS) + 1))
    outputs = [output for cell in CELLS for output in cell["outputs"]]
    assert not any(output["output_type"] == "error" or output.get("name") == "stderr" for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 4
    assert PATH.stat().st_size < 1.5e6
