"""`nsa-compile generate` and `info` of folders that transformers' classes wrote."""

from __future__ import annotations

import re

import pytest
import torch
from models import LAYER, randomize
from test_convert import CACHE, SIZES, make_dense
from typer.testing import CliRunner

from nsa_compile import NSAConfig, cli, convert, load_converted
from nsa_compile.hf_command import Streamer

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

from nsa_compile.hf import NsaConfig, NsaForCausalLM  # noqa: E402

WORDS = [f"word{i}" for i in range(39)]
NEW = ("--max-new-tokens", 6, "--temperature", 0)


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def save_tokenizer(folder):
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate([*WORDS, "?"])}, unk_token="?")
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="?").save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A converted model of 40 words, as the command writes it: with the dense one's tokenizer."""
    folder = tmp_path_factory.mktemp("converted")
    make_dense("llama").save_pretrained(folder / "dense")
    save_tokenizer(folder / "dense")
    sizes = [x for name, value in SIZES.items() for x in (f"--{name.replace('_', '-')}", value)]
    result = run("convert", folder / "dense", folder / "nsa", *sizes, "--copy")
    assert result.exit_code == 0, result.output
    return folder / "nsa"


@pytest.fixture(scope="module")
def byte_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bytes")
    convert(make_dense("llama", vocab_size=256), **SIZES).save_pretrained(folder)
    return folder


def test_generate_continues_a_prompt_by_the_tokenizer_of_a_converted_model(folder):
    result = run("generate", folder, "--prompt", "word3 word7 word9", *NEW)
    assert result.exit_code == 0, result.output
    ids = torch.tensor([[3, 7, 9]])
    new = load_converted(folder).generate(ids, max_new_tokens=6, do_sample=False)[0, 3:]
    assert result.stdout.split() == [([*WORDS, "?"])[i] for i in new] and result.stdout.endswith("\n")


def test_draws_are_those_of_the_seed(folder):
    arguments = ("generate", folder, "--prompt", "word3", "--max-new-tokens", 20, "--temperature", 2.0, "--top-p", 1.0)
    state = torch.random.get_rng_state()
    first, again, other = run(*arguments, "--seed", 3), run(*arguments, "--seed", 3), run(*arguments, "--seed", 4)
    assert first.exit_code == 0, first.output
    assert first.stdout == again.stdout != other.stdout
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_converted_model_over_bytes_needs_no_tokenizer(byte_folder):
    result = run("generate", byte_folder, "--prompt", "ab", *NEW)
    assert result.exit_code == 0, result.output
    ids = torch.tensor([list(b"ab")])
    new = load_converted(byte_folder).generate(
        ids, max_new_tokens=6, do_sample=False, eos_token_id=0, pad_token_id=0
    )[0, 2:].tolist()  # fmt: skip
    text = bytes(new[: new.index(0)] if 0 in new else new).decode(errors="replace")
    shown = "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
    assert result.stdout == shown + "\n"


def test_generate_takes_the_package_s_own_model_of_transformers(tmp_path):
    model = randomize(NsaForCausalLM(NsaConfig(**LAYER, n_layers=2, vocab_size=256)).to(torch.float32)).eval()
    model.save_pretrained(tmp_path)
    result = run("generate", tmp_path, "--prompt", "ab", *NEW)
    assert result.exit_code == 0, result.output
    model.to_language_model().save_pretrained(tmp_path / "own")
    assert result.stdout == run("generate", tmp_path / "own", "--prompt", "ab", *NEW).stdout
    shown = run("info", "--checkpoint", tmp_path)
    assert shown.exit_code == 0 and shown.stdout == run("info", "--checkpoint", tmp_path / "own").stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--temperature", -1), "temperature: expected a finite number"),
        (("--top-p", 0), "top_p: expected a number in"),
        (("--max-new-tokens", 0), "max_new_tokens: expected at least 1"),
        (("--compile",), "compile: expected --no-compile on a CPU"),
    ],
)
def test_generate_refuses_what_a_converted_model_does_not_take(folder, arguments, words):
    one_line(run("generate", folder, "--prompt", "word3", *arguments), words)


def one_line(result, words):
    assert result.exit_code == 2, result.output
    assert result.stderr.count("\n") == 1 and re.search(words, result.stderr), result.stderr


def test_other_folders_of_transformers_are_named(folder, tmp_path):
    one_line(run("generate", folder, "--prompt", ""), "prompt: expected tokens below vocab_size = 40, got none")
    dense = folder.parent / "dense"
    for command in (("generate", dense, "--prompt", "a"), ("info", "--checkpoint", dense)):
        one_line(run(*command), "expected a model of type nsa, nsa_llama, .* got 'llama'")
    load_converted(folder).save_pretrained(tmp_path)
    one_line(run("generate", tmp_path, "--prompt", "a"), "checkpoint: expected tokenizer files.* vocab_size of 40")
    (tmp_path / "tokenizer.json").write_text("{")
    one_line(run("generate", tmp_path, "--prompt", "a"), "checkpoint: expected a tokenizer that loads")


@pytest.mark.parametrize(
    ("name", "options"),
    [("llama", {}), ("llama", {"tie_kv": False}), ("mistral-sliding", {"layers": [1], "tie_kv": False})],
)
def test_info_prints_the_memory_of_a_converted_model_s_cache(tmp_path, name, options):
    dense = make_dense(name)
    caches = [transformers.StaticCache(config=dense.config, max_cache_len=100)]
    model = convert(make_dense(name), **SIZES, **options)
    model.save_pretrained(tmp_path)
    caches.append(transformers.StaticCache(config=model.config, max_cache_len=100))
    for used, cache in zip((dense, model), caches, strict=True):
        with torch.no_grad():
            used(torch.ones(3, 2, dtype=torch.int64), **{CACHE: cache})
    expected = [sum(y.nbytes for layer in cache.layers for y in (layer.keys, layer.values)) for cache in caches]
    result = run("info", "--checkpoint", tmp_path, "--batch", 3, "--capacity", 100, "--dtype", "fp32")
    assert result.exit_code == 0, result.output
    sizes = dict(re.findall(r"(converted|dense)\b.*?│ *([\d,]+) *│", result.stdout))
    assert int(sizes["converted"].replace(",", "")) == expected[1]
    if name == "llama":  # a converted layer forgets the dense one's window
        assert int(sizes["dense"].replace(",", "")) == expected[0]


def test_a_stream_shows_whole_characters_and_no_control_ones(capsys):
    class Bytes:
        def decode(self, ids, skip_special_tokens):
            return bytes(ids).decode(errors="replace")

    stream = Streamer(Bytes(), [0])
    stream.put(torch.tensor([[7, 8]]))
    for byte in (*"aü\n\tö".encode(), 0x1B, 0xC3, 0):
        stream.put(torch.tensor([byte]))
    stream.end()
    assert capsys.readouterr().out == "aü\n\tö\ufffd\ufffd\n"


def test_the_package_s_own_folders_are_not_those_of_transformers(tmp_path):
    from nsa_compile.hf_command import is_of_transformers

    assert not is_of_transformers(tmp_path)
    NSAConfig().save(tmp_path / "config.json")
    assert not is_of_transformers(tmp_path)
