"""Token shards as they were built: what is new or changed is read once, before anything is trained on it."""

import json
import os
import shutil
from pathlib import Path

import pytest
from test_cli import TINY, one_line_error, run

from nsa_compile.data import build_shards, open_shards
from nsa_compile.data.shards import CHECKED_FILE, MANIFEST, Shard


@pytest.fixture
def built(text, tmp_path):
    """A folder of several shards."""
    return build_shards([text], tmp_path / "shards", shard_tokens=4000, workers=1).folder


@pytest.fixture
def read(monkeypatch):
    """Names of the shards that were read to compare checksums."""
    names, total = [], Shard.sum
    monkeypatch.setattr(Shard, "sum", lambda shard, folder: (names.append(shard.name), total(shard, folder))[1])
    return names


def overwrite(path, n=500, at=1000, byte=b"x"):
    with path.open("r+b") as file:
        file.seek(at)
        file.write(byte * n)


@pytest.mark.parametrize("n", [1, 500])
def test_an_overwritten_shard_is_not_trained_on(n, built, text, tmp_path):
    overwrite(built / "train-00001.bin", n)
    arguments = ("train", "--data", built, "--out", tmp_path / "run", "--steps", 2, *TINY)
    words = "train-00001.bin and its .ends as they were built, got other bytes"
    for _ in range(2):
        one_line_error(run(*arguments), "data: expected", words)
    assert not (tmp_path / "run").exists()
    result = run(*arguments, "--no-verify")
    assert result.exit_code == 0, result.output
    one_line_error(run("tokenize", "--verify", built), "data: expected", words)
    one_line_error(run("tokenize", text, "--out", built, "--shard-tokens", 4000), "data: expected", words)


def test_shards_of_a_run_are_looked_at_when_it_goes_on(text, tmp_path):
    arguments = ("train", "--text", text, "--out", tmp_path / "run", "--steps", 2, *TINY)
    assert run(*arguments).exit_code == 0
    overwrite(tmp_path / "run" / "data" / "train-00000.bin")
    one_line_error(run(*arguments, "--resume", "--steps", 3), "data: expected", "as they were built")


def test_times_that_were_put_back_hide_nothing(built):
    path = built / "train-00000.bin"
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    overwrite(path)
    os.utime(path, ns=times)
    with pytest.raises(ValueError, match="as they were built"):
        open_shards(built)


def test_each_shard_is_read_once_until_it_changes(text, tmp_path, read):
    folder = build_shards([text], tmp_path / "shards", shard_tokens=4000, workers=1).folder
    names = sorted(path.stem for path in folder.glob("*.bin"))
    assert sorted(read) == names and len(names) == 3  # when it was built
    read.clear()
    open_shards(folder)
    build_shards([text], folder, shard_tokens=4000)
    assert read == []
    shutil.copytree(folder, tmp_path / "copy")  # with the times of the files, and what is known of them
    open_shards(tmp_path / "copy")
    assert sorted(read) == names
    read.clear()
    open_shards(tmp_path / "copy")
    assert read == []
    (tmp_path / "copy" / "train-00001.ends").touch()
    open_shards(tmp_path / "copy")
    assert read == ["train-00001"]
    read.clear()
    open_shards(tmp_path / "copy", verify=True)
    assert sorted(read) == names
    read.clear()
    open_shards(tmp_path / "copy", verify=False)
    assert read == []


def test_a_damaged_copy_is_found_and_the_rest_is_known(built, tmp_path, read):
    shutil.copytree(built, tmp_path / "copy")
    for name in ("train-00001", "validation-00000"):
        overwrite(tmp_path / "copy" / f"{name}.bin")
    with pytest.raises(
        ValueError, match=r"train-00001\.bin and .* got other bytes \(and validation-00000\); copy them"
    ):
        open_shards(tmp_path / "copy")
    read.clear()
    for name in ("train-00001", "validation-00000"):
        shutil.copy(built / f"{name}.bin", tmp_path / "copy")
    open_shards(tmp_path / "copy")
    assert sorted(read) == ["train-00001", "validation-00000"]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"train-00000": 3}', b'{"train-00000": [[1], 2]}', b"\xff"])
def test_a_broken_note_of_what_was_read_is_written_anew(content, built, read):
    whole = (built / CHECKED_FILE).read_bytes()
    (built / CHECKED_FILE).write_bytes(content)
    open_shards(built)
    assert read and (built / CHECKED_FILE).read_bytes() == whole


def test_a_folder_that_cannot_be_written_to_is_said(built, monkeypatch):
    (built / CHECKED_FILE).unlink()

    def fail(*args):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.warns(UserWarning, match=r"checked.json: cannot be written \(Read-only file system\)"):
        open_shards(built)
    assert not (built / CHECKED_FILE).exists()


def test_manifests_without_checksums_open_and_say_so(built):
    manifest = json.loads((built / MANIFEST).read_text())
    for part in ("train", "validation"):
        for shard in manifest[part]:
            del shard["sha256"]
    (built / MANIFEST).write_text(json.dumps(manifest))
    with pytest.warns(UserWarning, match=r"manifest.json has no checksums of \d shards") as said:
        corpus = open_shards(built)
    assert len(said) == 1 and corpus.train.n_documents == 3


def test_much_to_read_is_said(built, monkeypatch):
    said = []
    monkeypatch.setattr("nsa_compile.data.shards.MUCH", 1000)
    open_shards(built, say=said.append)
    assert said == []
    (built / CHECKED_FILE).unlink()
    open_shards(built, say=said.append)
    assert len(said) == 1 and said[0].startswith("comparing checksums of ")


def test_verify_reads_the_shards_it_is_given(built, read, monkeypatch):
    read.clear()
    monkeypatch.chdir(built.parent)
    n = len(list(built.glob("*.bin")))
    for arguments in (("--verify", built), (built, "--verify"), ("--verify", "--out", built)):
        result = run("tokenize", *arguments)
        assert result.exit_code == 0 and f"{n} shards" in result.stdout and "every byte as it was" in result.stdout
        assert len(read) == n
        read.clear()
    one_line_error(
        run("tokenize", "--verify"), "data: expected a folder of token shards with manifest.json, got nsa-data"
    )
    one_line_error(run("tokenize", "--verify", "--rebuild"), "verify: expected it without --rebuild")


def test_a_manifest_names_no_files_elsewhere(built, tmp_path):
    manifest = json.loads((built / MANIFEST).read_text())
    manifest["train"][0]["name"] = "../train-00000"
    (built / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"expected a manifest of token shards, .*a shard '\.\./train-00000'"):
        open_shards(built)


def test_another_tokenizer_beside_the_shards_is_found(text, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    for name, words in (("a", ["?", "</s>", "is"]), ("b", ["?", "</s>", "times"])):
        model = tokenizers.Tokenizer(
            tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?")
        )
        model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        model.save(str(tmp_path / name))
    corpus = build_shards([text], tmp_path / "shards", tokenizer=tmp_path / "a", workers=1)
    assert corpus.tokenizer().vocab_size == 3
    shutil.copy(tmp_path / "b", corpus.folder / "tokenizer.json")
    with pytest.raises(ValueError, match=r"data: expected .*tokenizer\.json as the shards were made by, got another"):
        corpus.tokenizer()
