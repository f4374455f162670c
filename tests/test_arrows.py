"""The house rules a machine can read: who imports whom, what an import does, how long files are."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import nsa_compile

ROOT = Path(nsa_compile.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
LAYERS = {
    "config": set(),
    "ops": set(),
    "custom_ops": {"ops"},
    "graphs": {"ops", "custom_ops"},
    "module": {"ops", "custom_ops", "config"},
    "storage": set(),
    "launch": set(),
    "sharded": {"storage", "launch"},
    "model": {"ops", "custom_ops", "config", "graphs", "module", "storage", "sharded"},
    "data": {"storage"},
    "rows": {"ops"},
    "hf": {"ops", "custom_ops", "config", "graphs", "hf_config", "hf_generation", "module", "model", "rows"},
    "hf_config": {"config"},
    "hf_command": {"config", "convert", "hf", "ops", "terminal"},
    "hf_generation": set(),
    "generate": {"ops", "custom_ops", "config", "graphs", "module", "model"},
    "checkpoints": {"model", "data", "storage", "sharded", "launch"},
    "metrics": {"ops", "custom_ops", "config", "module", "model", "data", "storage"},
    "faults": set(),
    "train": {
        "config",
        "model",
        "data",
        "parallel",
        "recompute",
        "precision",
        "checkpoints",
        "metrics",
        "faults",
        "launch",
        "storage",
    },
    "train_command": {
        "config",
        "model",
        "data",
        "parallel",
        "checkpoints",
        "metrics",
        "launch",
        "train",
        "options",
        "storage",
        "terminal",
    },
    "recompute": set(),
    "precision": set(),
    "convert": {"ops", "custom_ops", "config", "hf_generation", "module", "rows", "storage"},
    "options": set(),
    "parallel": {"ops", "custom_ops", "config", "graphs", "module", "model"},
    "terminal": {"model", "data", "train"},
    "bench": {"", "storage", "ops", "custom_ops", "config", "graphs", "module", "options", "terminal"},
    "profile": {
        "checkpoints",
        "custom_ops",
        "config",
        "graphs",
        "module",
        "model",
        "data",
        "train",
        "options",
        "storage",
        "terminal",
    },
}
"""What each part may import of ours; the command line, its demo and the package itself may import all."""

FREE = ("__init__", "__main__", "cli", "demo")


def part_of(module: str) -> str:
    """The part of the package that a dotted name below it belongs to."""
    return module.removeprefix("nsa_compile").removeprefix(".").split(".")[0]


def imports(path: Path) -> set[str]:
    """Parts of ours that a file imports when it runs (not for type checking alone)."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module]
        found |= {part_of(name) for name in names if name.split(".")[0] == "nsa_compile"}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_imports_follow_the_arrows(path):
    part = path.relative_to(ROOT).parts[0].removesuffix(".py")
    if part not in FREE:
        assert imports(path) <= LAYERS[part] | {part}


def test_every_part_has_its_arrows():
    parts = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in FILES}
    assert parts - set(FREE) == set(LAYERS)


@pytest.mark.parametrize("path", FILES + sorted(Path(__file__).parent.glob("*.py")), ids=lambda p: p.name)
def test_files_stay_under_600_lines(path):
    assert len(path.read_text().splitlines()) < 600


def test_all_is_a_literal_list_of_what_is_there():
    tree = ast.parse((ROOT / "__init__.py").read_text())
    (value,) = (node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "__all__")
    names = ast.literal_eval(value)
    assert names == sorted(names) == sorted(set(names))
    assert all(hasattr(nsa_compile, name) for name in names)


def test_importing_compiles_nothing_and_touches_no_global_state():
    script = """
import os, random, torch
def state():
    return (
        torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), torch.initial_seed(),
        torch.get_rng_state().sum().item(), torch.get_float32_matmul_precision(), torch.cuda.is_initialized(),
        torch.are_deterministic_algorithms_enabled(), dict(os.environ), random.getstate(),
    )
before = state()
import nsa_compile, sys
assert state() == before
assert "torch._inductor.compile_fx" not in sys.modules
import nsa_compile.cli
extras = {"matplotlib", "tensorboard", "torch_tb_profiler", "tokenizers", "pyarrow", "transformers", "flash_attn"}
assert not extras & set(sys.modules)
print("ok")
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.stdout == "ok\n", result.stderr
