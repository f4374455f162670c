"""Files from strangers: what would run code when it is read is refused, in one line, before anything of it runs."""

import io
import json
import os
import pickle
import shutil
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from test_checkpoints import MODEL, make
from test_cli import TINY, one_line_error, run
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from nsa_compile import NSALanguageModel
from nsa_compile.checkpoints import Checkpoints, find_checkpoint, load_state
from nsa_compile.data import load_tokenizer
from nsa_compile.sharded import MetadataUnpickler, read_metadata

EMBED = "model.embed.weight"


class Evil:
    """Unpickled, it calls a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def shell(folder):
    """What leaves a file behind if it is run, and the file."""
    return Evil(os.system, f"touch '{folder / 'pwned'}'"), folder / "pwned"


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """A run of two updates."""
    folder = tmp_path_factory.mktemp("run") / "run"
    result = run("train", "--text", text, "--out", folder, "--steps", 2, *TINY)
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def stranger(whole, tmp_path):
    """A copy of it to do evil to, and its checkpoint."""
    shutil.copytree(whole, tmp_path / "stranger")
    return tmp_path / "stranger", find_checkpoint(tmp_path / "stranger")


def readers(run_folder, checkpoint, text, tmp_path):
    """Every way to load a checkpoint."""
    yield "from_pretrained", lambda: NSALanguageModel.from_pretrained(checkpoint)
    yield "load_state", lambda: load_state(checkpoint, *make(steps=0, n_layers=1))
    resume = ("train", "--resume", "--text", text, "--out", run_folder, "--steps", 3, *TINY)
    for arguments in (
        ("generate", run_folder, "--prompt", "a"),
        ("generate", checkpoint, "--prompt", "a"),
        ("export", run_folder, tmp_path / "exported"),
        ("profile", "prefill", "--checkpoint", run_folder, "--out", tmp_path / "profile", "--no-compile"),
        resume,
    ):
        yield arguments[0], lambda arguments=arguments: run(*arguments)


def test_metadata_that_runs_code_is_refused_everywhere(stranger, text, tmp_path):
    evil, mark = shell(tmp_path)
    run_folder, checkpoint = stranger
    (checkpoint / ".metadata").write_bytes(pickle.dumps(evil))
    for name, read in readers(run_folder, checkpoint, text, tmp_path):
        if name in ("from_pretrained", "load_state"):
            with pytest.raises(ValueError, match=r"\.metadata: expected what torch.distributed.checkpoint writes, got "
                               r"posix\.system, which could run code and was not loaded$"):  # fmt: skip
                read()
        else:
            one_line_error(read(), ".metadata: expected what", "posix.system, which could run code")
        assert not mark.exists(), name
    assert not (tmp_path / "exported").exists() and not (tmp_path / "profile").exists()
    assert run("info", "--device", "cpu", "--checkpoint", run_folder).exit_code == 0  # reads config.json alone
    assert not mark.exists()
    pickle.loads((checkpoint / ".metadata").read_bytes())
    assert mark.exists()  # it was evil


@pytest.mark.parametrize("where", ["planner_data", "storage_meta", "storage_data", "state_dict_metadata", "version"])
def test_metadata_with_one_evil_part_is_refused(where, stranger, tmp_path):
    evil, mark = shell(tmp_path)
    path = stranger[1] / ".metadata"
    whole = pickle.loads(path.read_bytes())
    setattr(whole, where, {EMBED: evil} if "data" in where and where != "storage_meta" else evil)
    path.write_bytes(pickle.dumps(whole))
    with pytest.raises(ValueError, match=r"got posix\.system, which could run code"):
        NSALanguageModel.from_pretrained(stranger[1])
    assert not mark.exists()


@pytest.mark.parametrize(
    "function, name",
    [
        (eval, "builtins.eval"),
        (getattr, "builtins.getattr"),
        (torch.load, "torch.serialization.load"),
        (torch.hub.load, "torch.hub.load"),
        (torch._utils._rebuild_tensor_v2, "torch._utils._rebuild_tensor_v2"),
        (torch.jit.load, "torch.jit._serialization.load"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_no_other_function_is_even_looked_up(function, name, tmp_path):
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Evil(function, "1")))
    with pytest.raises(ValueError, match=f"got {name}, which could run code"):
        read_metadata(tmp_path / ".metadata")


def by_name(module, name, rest):
    """A pickle of protocol 4 that looks a name up, and goes on."""
    words = b"".join(b"\x8c" + bytes([len(word)]) + word.encode() for word in (module, name))
    return b"\x80\x04" + words + b"\x93" + rest + b"."


@pytest.mark.parametrize(
    "module, name",
    [
        ("torch.distributed.checkpoint.metadata", "os.system"),
        ("torch.distributed.checkpoint.metadata", "Metadata.__init__"),
        ("torch.distributed.checkpoint.metadata", "torch"),
        ("torch.distributed.checkpoint.filesystem", "pickle"),
        ("torch", "os.system"),
        ("torch", "load"),
        ("torch", "Tensor"),
        ("torch", "__builtins__"),
        ("pathlib", "os.system"),
        ("torch.serialization", "load"),
        ("no_such_module_anywhere", "x"),
    ],
)
def test_names_near_those_of_the_writer_are_refused(module, name, tmp_path):
    (tmp_path / ".metadata").write_bytes(by_name(module, name, b""))
    with pytest.raises(ValueError, match=f"got {module}.{name}, which could run code and was not loaded"):
        read_metadata(tmp_path / ".metadata")


def test_a_pickle_changes_no_class_of_torch(tmp_path):
    """Instructions that set attributes find records, of types that each reading has of its own."""
    set_fqn = b"\x8c\x03fqnK\x07s"  # fqn: 7
    for state in (b"}" + set_fqn, b"N}" + set_fqn + b"\x86"):  # into __dict__, and by setattr
        (tmp_path / "m").write_bytes(by_name("torch.distributed.checkpoint.metadata", "MetadataIndex", state + b"b"))
        with pytest.raises(ValueError, match=r"expected what torch\.distributed"):
            read_metadata(tmp_path / "m")
        assert not hasattr(MetadataIndex, "fqn")
    pickled = pickle.dumps([Metadata, torch.float32])
    kinds = [MetadataUnpickler(io.BytesIO(pickled)).load() for _ in range(2)]
    assert kinds[0][0] is not kinds[1][0] and Metadata not in (kinds[0][0], kinds[1][0])


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda m: part(m, relative_path="../x.distcp"), "'../x.distcp', which is no file of shards in this folder"),
        (lambda m: part(m, relative_path="/etc/x.distcp"), "'/etc/x.distcp', which is no file"),
        (lambda m: part(m, relative_path="config.json"), "'config.json', which is no file"),
        (lambda m: part(m, offset=-5), "a part of __0_0.distcp at -5"),
        (lambda m: part(m, length=10**9), "expected at least 1,000,"),
        (lambda m: part(m, transform_descriptors=["x"]), "['x']"),
        (lambda m: setattr(m.state_dict_metadata[EMBED], "size", (256, 16)), "tuple for Size"),
        (lambda m: setattr(m.state_dict_metadata[EMBED], "chunks", []), "expected 4096 elements in its parts, got 0"),
        (lambda m: m.state_dict_metadata.update({EMBED: no_tensor(m)}), "expected Tensor, got BytesStorageMetadata"),
        (lambda m: setattr(m, "storage_data", None), "NoneType for dict"),
        (lambda m: m.state_dict_metadata.pop(EMBED), "Missing key in checkpoint"),
    ],
)  # fmt: skip
def test_metadata_that_lies_is_refused(change, words, stranger):
    path = stranger[1] / ".metadata"
    whole = pickle.loads(path.read_bytes())
    change(whole)
    path.write_bytes(pickle.dumps(whole))
    with pytest.raises(ValueError, match="folder: expected weights that fit") as error:
        NSALanguageModel.from_pretrained(stranger[1])
    assert words in str(error.value)


def part(metadata, item=None, **changes):
    """Change where an item is said to be."""
    found = next(part for key, part in metadata.storage_data.items() if key.fqn == (item or EMBED))
    for name, value in changes.items():
        setattr(found, name, value)


def no_tensor(metadata):
    """Metadata of something that is no tensor."""
    return next(x for x in metadata.state_dict_metadata.values() if type(x).__name__ == "BytesStorageMetadata")


def replace_item(checkpoint, name, content):
    """Put other bytes in the place of an item, in a shard of its own."""
    whole = pickle.loads((checkpoint / ".metadata").read_bytes())
    part(whole, name, relative_path="__9_0.distcp", offset=0, length=len(content))
    (checkpoint / "__9_0.distcp").write_bytes(content)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(whole))


def saved(value, **how):
    buffer = io.BytesIO()
    torch.save(value, buffer, **how)
    return buffer.getvalue()


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_shards_that_run_code_are_refused(legacy, stranger, text, tmp_path):
    evil, mark = shell(tmp_path)
    run_folder, checkpoint = stranger
    content = saved(evil, _use_new_zipfile_serialization=not legacy)
    # what is no tensor: torch itself reads it with weights_only=False
    replace_item(checkpoint, "optimizer.param_groups.0.lr", content)
    with pytest.raises(ValueError, match=r"__9_0\.distcp: expected what .*could run code and was not loaded.*system"):
        load_state(checkpoint, *make(steps=0))
    result = run("train", "--resume", "--text", text, "--out", run_folder, "--steps", 3, *TINY)
    one_line_error(result, "__9_0.distcp: expected what", "could run code and was not loaded")
    assert not mark.exists()
    replace_item(checkpoint, EMBED, content)
    with pytest.raises(ValueError, match=r"__9_0\.distcp: expected what .*could run code and was not loaded"):
        NSALanguageModel.from_pretrained(checkpoint)
    assert not mark.exists()
    torch.load(io.BytesIO(content), weights_only=False)
    assert mark.exists()


def test_metadata_of_one_process_is_not_read_in_place_of_it(stranger, tmp_path):
    evil, mark = shell(tmp_path)
    (stranger[1] / "__0.metadata").write_bytes(pickle.dumps(evil))
    for content in (b"", None):
        if content is None:
            (stranger[1] / ".metadata").unlink()
        else:
            (stranger[1] / ".metadata").write_bytes(content)
        for read in (NSALanguageModel.from_pretrained, lambda path: load_state(path, *make(steps=0))):
            with pytest.raises(ValueError):
                read(stranger[1])
        assert not mark.exists()


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}, {"phi": "mlp", "gate": "sigmoid"}], ids=str)
def test_what_the_writer_wrote_is_admitted(changes, tmp_path):
    """As torch's own unpickler has it."""
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save(1, *make(**changes), {}) / ".metadata"
    checkpoints.wait()
    own, torchs = read_metadata(path), pickle.loads(path.read_bytes())
    assert own.state_dict_metadata.keys() == torchs.state_dict_metadata.keys()
    for name, value in torchs.state_dict_metadata.items():
        found = own.state_dict_metadata[name]
        assert type(found) is type(value)
        if hasattr(value, "chunks"):
            assert (found.size, found.chunks, found.properties.dtype) == (
                value.size, value.chunks, value.properties.dtype
            )  # fmt: skip
    assert {(k, v.relative_path, v.offset, v.length) for k, v in own.storage_data.items()} == {
        (k, v.relative_path, v.offset, v.length) for k, v in torchs.storage_data.items()
    }


# --- other files that users exchange ---------------------------------------------------------------------------------


def test_a_config_is_data(tmp_path):
    NSALanguageModel(MODEL).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "evil.Evil"}}))
    with pytest.raises(ValueError, match="got auto_map"):
        NSALanguageModel.from_pretrained(tmp_path)


def test_pickled_weights_beside_a_config_are_not_read(tmp_path):
    evil, mark = shell(tmp_path)
    NSALanguageModel(MODEL).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.pt"):
        (tmp_path / "model" / name).write_bytes(saved(evil))
    with pytest.raises(ValueError, match=r"expected one with model\.safetensors"):
        NSALanguageModel.from_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(pickle.dumps(evil))
    with pytest.raises(ValueError, match="folder: expected a whole file of weights"):
        NSALanguageModel.from_pretrained(tmp_path / "model")
    assert not mark.exists()


def test_a_converted_model_of_a_stranger_runs_no_code(tmp_path):
    transformers = pytest.importorskip("transformers")
    from nsa_compile import convert, load_converted

    evil, mark = shell(tmp_path)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    folder = tmp_path / "model"
    convert(transformers.LlamaForCausalLM(config), l=4, d=2, l_sel=4, n_sel=3, w=6).save_pretrained(folder)
    (folder / "evil.py").write_text(f"import os; os.system(\"touch '{mark}'\")\nclass Evil: pass\n")
    settings = json.loads((folder / "config.json").read_text())
    settings["auto_map"] = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    (folder / "config.json").write_text(json.dumps(settings))
    load_converted(folder)
    assert not mark.exists()
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(saved({"model.embed_tokens.weight": evil}))
    with pytest.raises(ValueError, match="folder: expected") as error:
        load_converted(folder)
    assert "\n" not in str(error.value) and not mark.exists()


def test_a_tokenizer_is_data(tmp_path):
    pytest.importorskip("tokenizers")
    evil, mark = shell(tmp_path)
    for content in (pickle.dumps(evil, protocol=0), b"__import__('os').system('touch x')"):
        (tmp_path / "tokenizer.json").write_bytes(content)
        with pytest.raises(ValueError, match="tokenizer: expected a file of the package tokenizers"):
            load_tokenizer(tmp_path / "tokenizer.json")
    assert not mark.exists()


def test_records_of_benches_and_profiles_are_data(tmp_path):
    evil, mark = shell(tmp_path)
    (tmp_path / "x.json").write_bytes(pickle.dumps(evil))
    one_line_error(run("bench", "--compare", tmp_path / "x.json"), "compare: expected")
    one_line_error(run("profile", "--diff", tmp_path / "x.json", tmp_path / "x.json"), "diff: expected")
    assert not mark.exists()


def test_nothing_in_the_package_unpickles_or_evaluates(tmp_path):
    """New places have to be looked at, and said in README, "What is safe to load"."""
    import nsa_compile

    root = Path(nsa_compile.__file__).parent
    words = ("pickle.load", "Unpickler(", "weights_only=False", "allow_pickle=True", " eval(", " exec(", "yaml.",
             "trust_remote_code=True", "torch.hub", "dill", "joblib", "marshal", "shelve")  # fmt: skip
    found = {
        (path.relative_to(root).as_posix(), word)
        for path in root.rglob("*.py")
        for word in words
        if word in path.read_text()
    }
    assert found == {("sharded.py", "Unpickler(")}


def test_an_exported_program_is_code(tmp_path):
    """torch reads some of it by pickle: README says so. Should it no longer, say that instead."""
    evil, mark = shell(tmp_path)
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),))
    torch.export.save(program, tmp_path / "a.pt2")
    with zipfile.ZipFile(tmp_path / "a.pt2") as old, zipfile.ZipFile(tmp_path / "b.pt2", "w") as new:
        for name in old.namelist():
            inputs = "sample_inputs" in name and name.endswith(".pt")
            new.writestr(name, saved(evil) if inputs else old.read(name))
    with suppress(Exception):  # the exit code of a command is no input of a program
        torch.export.load(tmp_path / "b.pt2")
    assert mark.exists()
