"""The commands at tiny sizes: what they print and leave, and errors of one line."""

import importlib.metadata
import itertools
import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from nsa_compile import NSACache, NSAConfig, NSALanguageModel, cli, demo, options, terminal
from nsa_compile.checkpoints import find_checkpoint
from nsa_compile.custom_ops import dispatch
from nsa_compile.metrics import METRICS_FILE

SIZES = {
    "seq-len": 24, "batch-size": 2, "warmup": 2, "eval-batches": 1, "n-layers": 1, "dim": 16, "n-heads": 2,
    "n-kv-groups": 1, "d-k": 8, "d-v": 8, "l": 4, "d": 2, "l-sel": 4, "n-sel": 3, "w": 6,
}  # fmt: skip
TINY = ["--no-compile", *itertools.chain.from_iterable((f"--{name}", size) for name, size in SIZES.items())]


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def losses(folder):
    return [(m["step"], m["loss"]) for m in map(json.loads, (folder / METRICS_FILE).read_text().splitlines())]


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
    """A finished run: its folder and what the command printed."""
    folder = tmp_path_factory.mktemp("run") / "run"
    result = run("train", "--text", text, "--out", folder, "--steps", 6, *TINY)
    assert result.exit_code == 0, result.output
    return folder, result.stdout


def one_line_error(result, *words):
    assert result.exit_code == 2
    assert re.fullmatch(r"error: [^\n]+\n", result.stderr), result.stderr
    assert all(word in result.stderr for word in words), result.stderr


def test_demo_shows_what_it_did_and_leaves_its_files(text, tmp_path):
    out = tmp_path / "demo"
    result = run("demo", "--text", text, "--out", out, "--steps", 3, "--no-compile")
    assert result.exit_code == 0, result.output
    shown = " ".join(result.stdout.split())
    for words in ("step 3/3 loss", "tokens/s", "nominal / actual", "Gates on held-out text", "within 1e-09",
                  "entropy of single bytes", str(out / METRICS_FILE)):  # fmt: skip
        assert words in shown
    assert [step for step, _ in losses(out)] == [1, 2, 3]
    steps = [json.loads(line) for line in (out / demo.DECODE_FILE).read_text().splitlines()]
    model = demo.DEMO_MODEL
    assert [step["cached"] for step in steps] == list(range(demo.DEMO_PROMPT, demo.DEMO_PROMPT + demo.DEMO_NEW))
    for step in steps:
        cmp, slc, win = (step["cached"] - model.l) // model.d + 1, model.n_sel * model.l_sel, model.w
        assert step["nominal"] == [cmp, slc, win, cmp + slc + win]
        for read in (group for layer in step["actual"] for group in layer):
            assert read[0] == cmp and 0 < read[1] <= slc and read[2] == win and read[3] == sum(read[:3])
    assert max(model.n_sel * model.l_sel, model.w) < demo.DEMO_PROMPT  # blocks are dropped
    NSALanguageModel.from_pretrained(find_checkpoint(out))
    one_line_error(run("demo", "--text", text, "--out", out, "--steps", 3, "--no-compile"), "out:", "step-000003")


def test_demo_refuses_short_text_before_it_trains(tmp_path):
    (tmp_path / "a.txt").write_text("short\n" * 3000)
    result = run("demo", "--text", tmp_path / "a.txt", "--out", tmp_path / "demo", "--no-compile")
    one_line_error(result, "text: expected enough to hold out 2048 bytes, got")
    assert "step 1" not in result.stdout


def test_demo_fails_where_decode_differs(text, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "decode_difference", lambda model, prompt, new: 1e-3)
    result = run("demo", "--text", text, "--out", tmp_path / "demo", "--steps", 1, "--no-compile")
    assert result.exit_code == 1
    assert "NOT within 1e-09" in " ".join(result.stdout.split())


def test_decode_difference_sees_a_wrong_cache(monkeypatch):
    torch.manual_seed(0)
    model = NSALanguageModel(demo.DEMO_MODEL)
    prompt, new = list(range(100, 164)), list(range(8))
    assert demo.decode_difference(model, prompt, new) <= demo.DECODE_TOLERANCE
    reserve = NSACache.reserve

    def lose_a_key(cache, counts):
        reserve(cache, counts)
        if counts == 1:
            cache.layers[0].buffers["k_slc"][:, 3] += 1.0

    monkeypatch.setattr(NSACache, "reserve", lose_a_key)
    assert demo.decode_difference(model, prompt, new) > demo.DECODE_TOLERANCE


def test_without_a_compiler_the_demo_says_so_and_runs(text, tmp_path, monkeypatch):
    monkeypatch.setattr(terminal, "cpp_compiler", lambda: None)
    result = run("demo", "--text", text, "--out", tmp_path / "demo", "--steps", 1)
    assert result.exit_code == 0, result.output
    assert "no C++ compiler on PATH" in result.stdout and "not compiled" in result.stdout


def test_demo_folders_do_not_collide(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("nsa-demo", "nsa-demo-2", "nsa-demo-3"):
        assert options.free_folder("nsa-demo").name == name
        (tmp_path / name).mkdir()


def test_train_prints_and_leaves_a_run(trained):
    folder, shown = trained
    assert "4 files" in shown and "step 6/6  loss" in shown and "loss on held-out text" in shown
    assert [step for step, _ in losses(folder)] == [1, 2, 3, 4, 5, 6]
    assert find_checkpoint(folder).name == "step-000006"


def test_an_interrupted_train_resumes_with_the_same_losses(text, trained, tmp_path, monkeypatch):
    arguments = ("train", "--text", text, "--out", tmp_path, "--steps", 6, *TINY)
    train = terminal.train

    def interrupted_train(*args, on_step, **kwargs):
        def on_step_then_interrupt(metrics):
            on_step(metrics)
            if metrics.step == 3:
                os.kill(os.getpid(), signal.SIGINT)

        return train(*args, on_step=on_step_then_interrupt, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(terminal, "train", interrupted_train)
        result = run(*arguments)
    assert result.exit_code == 0 and "interrupted after step 3" in result.stdout
    assert run(*arguments, "--resume").exit_code == 0
    assert losses(tmp_path) == losses(trained[0])
    one_line_error(run(*arguments, "--resume", "--lr", 0.5), "resume: expected the run's lr = 0.001, got 0.5")
    one_line_error(run(*arguments, "--resume", "--w", 7), "resume: expected the model's w = 6, got 7")


def test_tokenize_leaves_shards_that_train_takes(text, trained, tmp_path):
    shards = tmp_path / "shards"
    result = run("tokenize", text, "--out", shards, "--shard-tokens", 4000)
    assert result.exit_code == 0, result.output
    shown = " ".join(result.stdout.split())
    assert "4 files" in shown and "bytes to train on" in shown and "vocabulary of 256, left out 0 documents" in shown
    assert (shards / "train-00001.bin").is_file()
    assert run("tokenize", text, "--out", shards, "--shard-tokens", 4000).stdout == result.stdout
    one_line_error(run("tokenize", text, "--out", shards), "out: expected token shards", "other shard_tokens = 4000")
    assert run("tokenize", text, "--out", shards, "--rebuild").exit_code == 0
    assert not (shards / "train-00001.bin").exists()

    result = run("train", "--data", shards, "--out", tmp_path / "run", "--steps", 6, *TINY)
    assert result.exit_code == 0, result.output
    assert losses(tmp_path / "run") == losses(trained[0])
    assert not (tmp_path / "run" / "data").exists() and (trained[0] / "data" / "manifest.json").is_file()
    one_line_error(run("train", "--data", shards, "--text", text, *TINY), "data: expected token shards alone")
    one_line_error(run("train", "--data", text, *TINY), "data: expected a folder of token shards with manifest.json")


def test_a_tokenizer_file_gives_a_model_of_its_vocabulary(text, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="?"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words = ["?", "<stop>", "is", "times", *(str(n) for n in range(600))]
    model.model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?")
    model.save(str(tmp_path / "words.json"))
    arguments = (
        "train",
        "--text",
        text,
        "--tokenizer",
        tmp_path / "words.json",
        "--out",
        tmp_path / "run",
        "--steps",
        1,
    )
    one_line_error(run(*arguments, *TINY), "end_token: expected a token of")
    result = run(*arguments, "--end-token", "<stop>", *TINY)
    assert result.exit_code == 0, result.output
    assert "tokens to train on" in result.stdout and "nats/token" in result.stdout
    assert NSALanguageModel.from_pretrained(find_checkpoint(tmp_path / "run")).config.vocab_size == 604


def test_dense_attention_trains(text, tmp_path):
    result = run(
        "train", "--text", text, "--out", tmp_path, "--steps", 1, "--attention", "dense", "--dtype", "bf16", *TINY
    )
    assert result.exit_code == 0 and "dense attention" in result.stdout


@pytest.mark.parametrize("newest", [True, False])
def test_generate_continues_a_prompt(trained, newest):
    folder = trained[0] if newest else find_checkpoint(trained[0])
    arguments = ("generate", folder, "--prompt", "2 times ü", "--max-new-tokens", 20)
    first, again = run(*arguments, "--seed", 3), run(*arguments, "--seed", 3)
    assert first.exit_code == 0, first.output
    assert first.stdout == again.stdout and first.stdout.endswith("\n")
    assert first.stdout != run(*arguments, "--seed", 4).stdout


def test_a_stream_joins_bytes_to_characters_and_shows_no_control_ones(capsys):
    stream = terminal.TextStream()
    for byte in (*"aü\n\t".encode(), None, 0x1B, 0xC3):
        stream.write(byte)
    stream.close()
    assert capsys.readouterr().out == "aü\n\t\ufffd\ufffd\n"


def test_info_says_which_implementation_runs_and_why(monkeypatch):
    result = run("info", "--device", "cpu")
    assert result.exit_code == 0
    assert torch.__version__ in result.stdout and "C++ compiler" in result.stdout
    for op in cli.OPS:
        assert re.search(rf"{op} +│ reference +│ ", result.stdout)
    monkeypatch.setattr(cli, "cpp_compiler", lambda: None)
    result = run("info", "--device", "cpu")
    assert "none: torch.compile cannot compile for the CPU" in result.stdout
    assert "to do: install a C++ compiler (g++ or clang++" in result.stdout


def test_info_lists_the_ops_that_have_kernels():
    """All that are registered, but for gradients, which go with their op, and two that torch's own operations make."""
    registered = {
        name.removeprefix("nsa_compile::").partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("nsa_compile::")
    }
    forward = {name for name in registered if not name.endswith("_backward")}
    assert sorted(cli.OPS) == sorted(forward - {"rope_turns", "linear_cross_entropy"})


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {"cuda": None},
            "install a build of torch with CUDA, on a machine with an NVIDIA GPU of compute capability 8.0",
        ),
        ({"available": False}, "finds no GPU: see whether nvidia-smi lists one"),
        (
            {"capability": (7, 5)},
            "use a GPU of compute capability 8.0 or newer (A100, L4, RTX 30 and later): on this one",
        ),
        ({"hip": "6.4", "cuda": None}, "use an NVIDIA GPU for the kernels"),
        ({"torch": "2.10.1+cu128"}, "install torch 2.11 or newer"),
        ({"triton": "none"}, "install triton 3.6 or newer: every op runs its reference without it"),
        ({"triton": "3.5.1"}, "install triton 3.6 or newer, the one that comes with torch; this is 3.5.1"),
        ({"compiler": None}, "install a C++ compiler"),
        ({"cc": "no-such-cc"}, "install a C compiler (gcc or clang; CC, if set, must name one)"),
        ({}, None),
    ],
    ids=lambda x: "-".join(x) or "nothing" if isinstance(x, dict) else "",
)
def test_info_says_what_to_do_on_a_machine_that_lacks_something(changes, words, monkeypatch):
    machine = {
        "cuda": "13.0", "hip": None, "available": True, "capability": (9, 0), "torch": "2.11.0+cu130",
        "triton": "3.6.0", "compiler": "/usr/bin/g++", "cc": sys.executable,
    } | changes  # fmt: skip
    monkeypatch.setattr(torch.version, "cuda", machine["cuda"])
    monkeypatch.setattr(torch.version, "hip", machine["hip"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: machine["available"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: machine["capability"])
    monkeypatch.setattr(torch, "__version__", machine["torch"])
    monkeypatch.setattr(cli, "triton_version", lambda: machine["triton"])
    monkeypatch.setenv("CC", machine["cc"])
    device = torch.device("cuda" if machine["available"] and machine["cuda"] else "cpu")
    found = cli.advise(device, machine["compiler"])
    assert [words in line for line in found] == [True] if words else found == []


def test_without_triton_auto_is_the_reference(monkeypatch):
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    choice = dispatch.resolve_impl("window_attention", "auto", "cuda")
    assert choice == ("reference", "its Triton kernels need the package triton, which is not installed", 0)
    with pytest.raises(ValueError, match="got 'triton': its Triton kernels need the package triton"):
        dispatch.resolve_impl("window_attention", "triton", "cuda")


def test_the_oldest_versions_are_those_that_the_package_asks_for():
    wants = importlib.metadata.requires("nsa-compile")
    assert f"torch>={cli.OLDEST_TORCH}" in wants
    assert any(want.startswith(f"triton>={cli.OLDEST_TRITON};") for want in wants)


def test_info_prints_the_memory_of_a_cache(tmp_path):
    """As the formula in README says."""

    def printed(*arguments) -> dict[str, int]:
        result = run("info", "--device", "cpu", *arguments)
        assert result.exit_code == 0, result.output
        rows = re.findall(r"│ (nsa|nsa, tied keys and values|dense) +│ ([\d,]+) +│", result.stdout)
        return {name: int(size.replace(",", "")) for name, size in rows}

    def formula(c: NSAConfig, batch: int, capacity: int, size: int) -> dict[str, int]:
        tied = capacity + -(-capacity // c.d) + c.l + 7
        tokens = {"nsa": tied + c.w + 7, "nsa, tied keys and values": tied, "dense": capacity}
        token, counters = c.n_kv_groups * (c.d_k + c.d_v) * size, 36 + 32 * c.n_kv_groups
        return {name: c.n_layers * batch * (n * token + counters) for name, n in tokens.items()}

    assert printed() == formula(NSAConfig(), 1, 65536, 2)
    config = NSAConfig(
        dim=32, n_heads=6, n_kv_groups=3, d_k=8, d_v=4, l=6, d=3, l_sel=6, w=9, n_layers=5, tie_kv=True, phi="mlp"
    )
    NSALanguageModel(config).save_pretrained(tmp_path)
    arguments = ("--checkpoint", tmp_path, "--batch", 3, "--capacity", 1000, "--dtype", "fp32")
    assert printed(*arguments) == formula(config, 3, 1000, 4)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("train", "--text", "nowhere"), "text: expected files or folders"),
        (("train", "--steps", "0"), "steps: expected at least 1"),
        (("train", "--device", "nonsense"), "device: expected one that torch can use here, got 'nonsense'"),
        (("train", "--l", "5"), "l: expected a multiple of d"),
        (("train", "--phi", "max"), "phi: expected one of 'avg', 'mlp'"),
        (("train", "--resume", "--out", "nothing-here"), "resume: expected a folder with checkpoints"),
        (("generate", "nowhere", "--prompt", "a"), "expected one with config.json"),
        (("info", "--device", "nonsense"), "device: expected"),
        (("info", "--device", "mps"), "arguments from the 'MPS' backend\n"),
        (("info", "--capacity", str(2**31)), "less than or equal to 2147483647"),
    ],
)
def test_errors_are_one_line(arguments, words, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    extra = ("--no-compile", "--text", text) if arguments[0] == "train" else ()
    one_line_error(run(*arguments, *extra), words)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("train", "--no-such"), "No such option: --no-such .*; nsa-compile train --help lists what is accepted"),
        (("train", "--dtype", "fp8"), "Invalid value for '--dtype': .*'fp8' is not one of 'fp32', 'bf16'; nsa-.*"),
        (("--no-such",), "No such option: --no-such; nsa-compile --help lists what is accepted"),
        (("trian",), "No such command 'trian'.*; nsa-compile --help lists what is accepted"),
    ],
)
def test_wrong_usage_is_one_line(arguments, words, monkeypatch):
    result = CliRunner().invoke(cli.app, arguments, prog_name="nsa-compile")
    assert result.exit_code == 2 and result.stdout == ""
    assert re.fullmatch(f"error: {words}\n", result.stderr), result.stderr
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = run(*arguments)  # as the first process says it
    assert (result.exit_code, result.output) == (2, "")


def test_generate_refuses_what_no_memory_holds(trained):
    arguments = ("generate", trained[0], "--prompt", "a", "--max-new-tokens", 10**15)
    one_line_error(run(*arguments), "max_new_tokens: expected a cache within the", f"got {10**15} (a cache of")


def test_generate_refuses_bad_sampling_and_prompts(trained):
    for arguments, words in (
        (("--prompt", "a", "--temperature", "-1"), "temperature: expected a finite number >= 0, got -1.0"),
        (("--prompt", "a", "--top-p", "0"), "top_p: expected a number in (0, 1], got 0.0"),
        (("--prompt", ""), "prompts: expected at least 1 token in every row"),
        (("--prompt", "a", "--max-new-tokens", "0"), "max_new_tokens: expected at least 1"),
    ):
        one_line_error(run("generate", trained[0], *arguments), words)


def test_a_loss_that_is_not_finite_is_one_line(text, tmp_path):
    result = run("train", "--text", text, "--out", tmp_path, "--steps", 20, *TINY, "--lr", 1e30, "--clip", 1e30)
    one_line_error(result, "expected a finite number at step")


def test_traceback_shows_where_an_error_comes_from():
    result = run("--traceback", "train", "--steps", 0)
    assert isinstance(result.exception, ValueError)


@pytest.mark.parametrize("command", ["", "demo", "tokenize", "train", "export", "generate", "bench", "profile", "info"])
def test_help_tells_what_a_command_does(command):
    result = run(*([command] if command else []), "--help")
    assert result.exit_code == 0
    words = {
        "": "demo",
        "demo": "exit code 1",
        "tokenize": "token shards",
        "train": "--resume",
        "export": "safetensors",
        "generate": "streaming",
        "bench": "--threshold",
        "profile": "Perfetto",
        "info": "compiler",
    }
    assert words[command] in result.stdout


def test_the_entry_point_prints_no_traceback():
    command = [sys.executable, "-c", "from nsa_compile.cli import main; main()", "generate", "nowhere", "--prompt", "a"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
