"""Wrong folders, broken files, full disks and no memory: one line that says so, and nothing left behind."""

import json
import shutil

import pytest
import torch
from test_cli import TINY, one_line_error, run
from test_trust import whole  # noqa: F401

from nsa_compile import NSALanguageModel, cli, train_command
from nsa_compile.checkpoints import RUN_FILE, find_checkpoint
from nsa_compile.metrics import METRICS_FILE


@pytest.fixture
def copied(whole, tmp_path):  # noqa: F811
    """A copy of a run, and its checkpoint."""
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run", find_checkpoint(tmp_path / "run")


@pytest.mark.parametrize("size", [0, 1, 2000, -1])
@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "config.json", RUN_FILE])
def test_a_checkpoint_that_is_cut_short(name, size, copied, text, tmp_path, caplog):
    folder, checkpoint = copied
    content = (checkpoint / name).read_bytes()
    if name == "config.json" and size == -1:
        size = -3  # the last bytes are an end of line and the brace
    (checkpoint / name).write_bytes(content[:size] if size < len(content) else content[: len(content) // 2])
    resume = ("train", "--resume", "--text", text, "--out", folder, "--steps", 3, *TINY)
    commands = {
        "generate": ("generate", folder, "--prompt", "a"),
        "export": ("export", folder, tmp_path / "exported"),
        "profile": ("profile", "prefill", "--checkpoint", folder, "--out", tmp_path / "profile", "--no-compile"),
        "train": resume,
    }
    if name == "config.json":
        commands["info"] = ("info", "--device", "cpu", "--checkpoint", folder)
    if name == RUN_FILE:  # only a resumed run reads it
        commands = {"train": resume} if size not in (-1,) else {}
    for arguments in commands.values():
        result = run(*arguments)
        one_line_error(result, str(checkpoint))
        assert name in result.stderr and "Traceback" not in result.output
    assert not caplog.records or all(record.levelname == "DEBUG" for record in caplog.records)
    assert not (tmp_path / "exported").exists() and not (tmp_path / "profile").exists()


@pytest.mark.parametrize("content", ["[]", "3", '{"dim": "x"}', '{"dim": 0}', '{"no": 1}', "{", "\0"])
def test_a_config_of_something_else(content, copied):
    folder, checkpoint = copied
    (checkpoint / "config.json").write_text(content)
    for arguments in (("generate", folder, "--prompt", "a"), ("info", "--device", "cpu", "--checkpoint", folder)):
        one_line_error(run(*arguments), f"{checkpoint}/config.json: ")


@pytest.mark.parametrize(
    "content", ["3", "{}", '{"step": 2}', '{"step": 2, "text": 3, "config": 3}', '{"step": 2, "text": 3, "config": {}}']
)
def test_a_run_file_of_something_else(content, copied, text):
    folder, checkpoint = copied
    (checkpoint / RUN_FILE).write_text(content)
    one_line_error(run("train", "--resume", "--text", text, "--out", folder, "--steps", 3, *TINY), "resume: expected")


@pytest.mark.parametrize("content", ["{}", '{"dim": 100000000}', '{"dim": 10000000000000}'])
@pytest.mark.parametrize("exported", [False, True])
def test_a_config_of_a_model_that_memory_does_not_hold(content, exported, copied, tmp_path):
    """Refused by what the files of weights hold, before it is made; {} is the paper's sizes."""
    folder = copied[1]
    if exported:
        folder = tmp_path / "model"
        NSALanguageModel.from_pretrained(copied[1]).save_pretrained(folder)
    (folder / "config.json").write_text(content)
    for arguments in (("generate", folder, "--prompt", "a"), ("export", folder, tmp_path / "out")):
        one_line_error(run(*arguments), f"folder: expected weights that fit {folder / 'config.json'}, got")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["x}\n", "{}\n", "[]}\n", '{"step": "a"}\n'])
def test_metrics_of_something_else(content, copied, text):
    folder = copied[0]
    (folder / METRICS_FILE).write_text(content)
    result = run("train", "--resume", "--text", text, "--out", folder, "--steps", 3, *TINY)
    one_line_error(result, f"out: expected metrics of a run in {folder / METRICS_FILE}")


FOLDERS = {
    "tokenize": ("tokenize", "TEXT", "--out", "BAD"),
    "train": ("train", "--text", "TEXT", "--out", "BAD", *TINY),
    "demo": ("demo", "--text", "TEXT", "--out", "BAD", "--no-compile"),
    "export": ("export", "RUN", "BAD"),
    "convert": ("convert", "RUN", "BAD"),
    "bench": ("bench", "--tokens", "64", "--device", "cpu", "--out", "BAD"),
    "profile": ("profile", "prefill", "--device", "cpu", "--out", "BAD", "--no-compile"),
}


@pytest.mark.parametrize("bad", ["file", "file/below", "file/two/below"])
@pytest.mark.parametrize("command", FOLDERS)
def test_a_file_in_the_place_of_a_folder(command, bad, whole, text, tmp_path):  # noqa: F811
    if command == "convert":
        pytest.importorskip("transformers")
    (tmp_path / "file").write_text("mine")
    words = {"TEXT": text, "RUN": whole, "BAD": tmp_path / bad}
    result = run(*(words.get(x, x) for x in FOLDERS[command]))
    one_line_error(result, f"out: expected a folder, got {tmp_path / bad}: {tmp_path / 'file'} is a file")
    assert result.stdout == "" and [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("there", ["nope", "file", "empty"])
@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "X", "--prompt", "a"), ("export", "X", "OUT"), ("convert", "X", "OUT"),
        ("info", "--device", "cpu", "--checkpoint", "X"),
        ("profile", "prefill", "--checkpoint", "X", "--out", "OUT", "--no-compile"),
        ("profile", "--diff", "X", "X"), ("bench", "--compare", "X", "--out", "OUT"), ("tokenize", "--verify", "X"),
        ("train", "--data", "X", "--out", "OUT", *TINY), ("train", "--resume", "--out", "X", *TINY),
        ("tokenize", "TEXT", "--tokenizer", "X", "--out", "OUT"),
        ("train", "--text", "TEXT", "--tokenizer", "X", "--out", "OUT", *TINY),
    ],
    ids=lambda x: "-".join(str(y).strip("-") for y in x[:2]),
)  # fmt: skip
def test_what_is_not_there_or_is_something_else(arguments, there, text, tmp_path):
    if arguments[0] == "convert":
        pytest.importorskip("transformers")
    if "--tokenizer" in arguments:
        pytest.importorskip("tokenizers")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    if arguments[0] == "train" and arguments[1] == "--resume" and there == "file":
        pytest.skip("that is a file in the place of a folder")
    words = {"TEXT": text, "X": tmp_path / there, "OUT": tmp_path / "out"}
    result = run(*(words.get(x, x) for x in arguments))
    one_line_error(result, "expected" if "--tokenizer" not in arguments else "", str(tmp_path / there))
    assert result.stdout == "" and sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file"]


@pytest.mark.parametrize("content", ["", "[]", "3", '{"format": 1}', '{"format": 1, "rows": [3]}', "\x00"])
def test_records_of_something_else(content, tmp_path):
    (tmp_path / "x.json").write_text(content)
    one_line_error(run("bench", "--compare", tmp_path / "x.json", "--out", tmp_path / "out"), "compare: expected")
    one_line_error(run("profile", "--diff", tmp_path / "x.json", tmp_path / "x.json"), "diff: expected")
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


# --- full disks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0, 100, 5000])
def test_an_export_onto_a_full_disk_is_none(limit, whole, tmp_path, file_limit):  # noqa: F811
    file_limit(limit)
    result = run("export", whole, tmp_path / "new" / "out")
    file_limit(None)
    one_line_error(result, "File too large", "new/out")
    assert list(tmp_path.iterdir()) == []
    assert run("export", whole, tmp_path / "out").exit_code == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert set(before) == {"config.json", "model.safetensors"}
    file_limit(limit)
    result = run("export", whole, tmp_path / "out", "--dtype", "bf16")
    file_limit(None)
    one_line_error(result, "File too large")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_other_commands_on_a_full_disk(whole, text, tmp_path, file_limit):  # noqa: F811
    commands = {
        "shards": ("tokenize", text, "--out", tmp_path / "shards", "--workers", 1),
        "run": ("train", "--text", text, "--out", tmp_path / "run", "--workers", 1, "--steps", 2, *TINY),
        "out": ("profile", "prefill", "--device", "cpu", "--out", tmp_path / "out", "--no-compile", "--no-memory"),
        "bench": (
            "bench", "--device", "cpu", "--out", tmp_path / "bench", "--tokens", 64, "--what", "window", "--no-plot",
            "--repeats", 2, "--beside", "none", "--no-backward", "--heads", 2, "--groups", 1,
        ),
    }  # fmt: skip
    for name, arguments in commands.items():
        file_limit(1000 if name != "bench" else 100)
        result = run(*arguments)
        file_limit(None)
        words = {"shards": ".shards.part", "out": "trace.json"}  # of a profile torch writes it to a folder for a while
        one_line_error(result, words.get(name, str(tmp_path / name)))


def test_a_converted_model_on_a_full_disk_is_none(tmp_path, file_limit):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    file_limit(5000)
    arguments = ("--l", 4, "--d", 2, "--l-sel", 4, "--n-sel", 3, "--w", 6)
    result = run("convert", tmp_path / "dense", tmp_path / "out", *arguments)
    file_limit(None)
    one_line_error(result, "File too large", str(tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes, words",
    [
        (("--dim", 100_000_000), "model: expected one that fits in the memory of cpu"),
        (("--dim", 10**13), "model: expected sizes that torch can hold"),
        (("--d-k", 10**9, "--d-v", 10**9), "model: expected one that fits in the memory of cpu"),
    ],
)
def test_a_model_that_memory_does_not_hold_is_one_line(sizes, words, text, tmp_path):
    result = run("train", "--text", text, "--out", tmp_path / "run", *TINY, *sizes)
    one_line_error(result, words)
    assert result.stdout == "" and list(tmp_path.iterdir()) == []


def test_memory_that_runs_out_is_one_line(whole, text, tmp_path, monkeypatch):  # noqa: F811
    """On the CPU as torch says it, by an allocation that is really refused; on a GPU; in Python and numpy."""

    def refused():
        torch.empty(2**59, dtype=torch.uint8)

    def overflow():
        torch.empty(2**62, 2**62)

    def gpu():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation")

    def python():
        raise MemoryError

    for fail in (refused, overflow, gpu, python):
        monkeypatch.setattr(train_command, "check_memory", lambda *args, fail=fail: fail())
        result = run("train", "--text", text, "--out", tmp_path / "run", *TINY)
        one_line_error(result, "memory: expected enough for these sizes, got: ", "smaller ones take less")
        monkeypatch.setattr(cli.NSALanguageModel, "from_pretrained", lambda *args, fail=fail, **how: fail())
        one_line_error(run("generate", whole, "--prompt", "a"), "memory: expected enough for these sizes")
        result = run("--traceback", "generate", whole, "--prompt", "a")
        assert isinstance(result.exception, (RuntimeError, MemoryError))
    monkeypatch.setattr(train_command, "check_memory", lambda *args: [][1])  # other faults of ours are no input
    assert isinstance(run("train", "--text", text, "--out", tmp_path / "run", *TINY).exception, IndexError)


def test_info_checks_its_checkpoint_before_it_prints(tmp_path):
    result = run("info", "--device", "cpu", "--checkpoint", tmp_path / "nope")
    one_line_error(result, f"checkpoint: expected a run, a checkpoint or an exported model, got {tmp_path / 'nope'}")
    assert result.stdout == ""


def test_an_export_is_what_it_was(whole, tmp_path):  # noqa: F811
    """Other files of the folder stay, and it loads."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README").write_text("mine")
    assert run("export", whole, tmp_path / "out").exit_code == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"README", "config.json", "model.safetensors"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dim"] == 16
    NSALanguageModel.from_pretrained(tmp_path / "out")
