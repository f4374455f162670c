"""Text in, token shards out: readers, tokenizers, building, and what is wrong with files on disk."""

import gzip
import hashlib
import json
import math
import pickle
import sys

import numpy as np
import pytest
import torch

from nsa_compile.data import (
    ByteTokenizer,
    FileTokenizer,
    TokenShards,
    build_shards,
    find_text,
    load_tokenizer,
    open_shards,
    unigram_entropy,
)
from nsa_compile.data import sources as sources_module
from nsa_compile.data import tokenizer as tokenizer_module
from nsa_compile.data.shards import CHECKED_FILE, MANIFEST, PARTS, Shard, token_type

pyarrow = pytest.importorskip("pyarrow")
tokenizers = pytest.importorskip("tokenizers")


def documents(tokens: TokenShards) -> list[bytes]:
    """The documents of a part of bytes, without their ends."""
    found = [bytes(tokens.document(i).tolist()) for i in range(tokens.n_documents)]
    assert all(document.endswith(b"\0") for document in found)
    return [document[:-1] for document in found]


def every_document(corpus) -> list[bytes]:
    return documents(corpus.train) + documents(corpus.validation)


def files_of(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != CHECKED_FILE}


def write_rows(path, rows, field="text"):
    path.write_text("".join(json.dumps({field: row, "n": i}) + "\n" for i, row in enumerate(rows)))
    return path


def write_parquet(path, columns, **options):
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path, **options)
    return path


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    (folder / "b").mkdir(parents=True)
    (folder / "b" / "two.txt").write_text("second")
    (folder / "a.txt").write_text("first")
    (folder / "c.md").write_bytes("third ümlaut\r\nwith CRLF\r\n".encode())
    (folder / "image.bin").write_bytes(b"\xff\xfe\x00")
    (folder / "zero.txt").write_bytes(b"a\x00b")
    (folder / "empty.txt").write_bytes(b"")
    for hidden in (".git", "__pycache__"):
        (folder / hidden).mkdir()
        (folder / hidden / "d.txt").write_text("not this")
    return folder


@pytest.fixture
def rows(tmp_path):
    """A JSON Lines file of rows of many lengths, and the rows."""
    rows = [f"row {i} " + "ü" * (i * 37 % 90) for i in range(300)]
    return write_rows(tmp_path / "rows.jsonl", rows), [row.encode() for row in rows]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """A tokenizer file of bytes and a few merges, trained here, that would cut and pad if it were let."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<pad>", "<|endoftext|>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    model.train_from_iterator(["the cat sat on the mat and the rat sat on the cat"] * 9, trainer)
    model.enable_truncation(5)
    model.enable_padding(length=8)
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    model.save(str(path))
    return path


def test_folders_give_their_text_files_in_order(texts, tmp_path):
    corpus = build_shards([texts], tmp_path / "out")
    assert (corpus.n_files, corpus.n_skipped, corpus.source) == (3, 3, str(texts))
    order = [b"first", b"second", "third ümlaut\r\nwith CRLF\r\n".encode()]
    assert sorted(every_document(corpus)) == order
    assert documents(corpus.train) == [text for text in order if text in documents(corpus.train)]
    assert corpus.validation.n_documents == 1  # whole files are held out, here one
    assert [name for name, _ in find_text([texts, texts / "a.txt"])] == sorted(name for name, _ in find_text([texts]))


def test_what_is_held_out_of_files_depends_on_names_only(tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        for i in range(40):
            (tmp_path / folder / f"{i}.txt").write_text(f"{folder} file {i}")
    x, y = (build_shards([tmp_path / f], tmp_path / f"out-{f}", held_out=0.3) for f in ("x", "y"))
    assert [d.replace(b"x", b"y") for d in documents(x.validation)] == documents(y.validation)
    assert 4 <= x.validation.n_documents <= 20
    by_hash = sorted(range(40), key=lambda i: hashlib.sha256(f"{i}.txt".encode()).digest())
    assert {int(d.split()[-1]) for d in documents(x.validation)} == set(by_hash[: x.validation.n_documents])


@pytest.mark.parametrize("held_out, n", [(1e-9, 1), (1 - 1e-9, 39)])
def test_at_least_one_document_is_held_out_and_never_all(tmp_path, held_out, n):
    path = write_rows(tmp_path / "rows.jsonl", [f"row {i}" for i in range(40)])
    corpus = build_shards([path], tmp_path / "out", held_out=held_out)
    assert (corpus.train.n_documents, corpus.validation.n_documents) == (40 - n, n)
    assert len(set(every_document(corpus))) == 40


def test_of_a_single_document_the_end_is_held_out(tmp_path):
    (tmp_path / "a.txt").write_text("0123456789" * 10)
    corpus = build_shards([tmp_path / "a.txt"], tmp_path / "out", held_out=0.1)
    assert (corpus.train.n_tokens, corpus.validation.n_tokens) == (91, 11)
    (tmp_path / "b.txt").write_text("ü" * 5)
    corpus = build_shards([tmp_path / "b.txt"], tmp_path / "out-b", held_out=0.3)
    assert [d.decode() for d in every_document(corpus)] == ["üüüü", "ü"]  # whole characters


def test_equal_rows_stay_together(tmp_path):
    rows = [f"row {i % 20}" for i in range(60)]
    corpus = build_shards([write_rows(tmp_path / "rows.jsonl", rows)], tmp_path / "out", held_out=0.3)
    assert not set(documents(corpus.train)) & set(documents(corpus.validation))
    with pytest.raises(ValueError, match="text: expected documents that differ, to hold some out, got equal ones"):
        build_shards([write_rows(tmp_path / "same.jsonl", ["same"] * 5)], tmp_path / "same")


def test_the_default_text_is_the_standard_library():
    names = [name for name, _ in find_text()]
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    assert all(name.endswith(".py") and "site-packages" not in name for name in names)


def test_json_lines_and_parquet_give_their_rows(rows, tmp_path):
    path, wanted = rows
    with gzip.open(tmp_path / "rows.jsonl.gz", "wb") as file:
        file.write(path.read_bytes())
    write_parquet(tmp_path / "rows.parquet", {"n": range(300), "text": [w.decode() for w in wanted]}, row_group_size=70)
    corpora = [
        build_shards([tmp_path / f"rows.{kind}"], tmp_path / kind, held_out=0.1, unit_bytes=700)
        for kind in ("jsonl", "jsonl.gz", "parquet")
    ]
    for corpus in corpora:
        assert sorted(every_document(corpus)) == sorted(wanted)
        assert documents(corpus.train) == [row for row in wanted if row in set(documents(corpus.train))]
        assert 10 <= corpus.validation.n_documents <= 50 and corpus.n_files == 1
    assert len({corpus.digest() for corpus in corpora}) == 1


@pytest.mark.parametrize("unit_bytes", [1, 2, 7, 30, 1000])
def test_parts_of_a_file_share_its_lines_among_them(tmp_path, unit_bytes):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n\n{"text": "b"}\r\n  \n{"text": "' + b"c" * 50 + b'"}\n{"text": "d"}')
    units = sources_module.plan_units(find_text([path]), unit_bytes=unit_bytes)
    assert sum(unit.n_bytes for unit in units) == path.stat().st_size
    found = [document.text for unit in units for document in sources_module.read_documents(unit, "text")]
    assert found == [b"a", b"b", b"c" * 50, b"d"]


def test_rows_that_are_no_text_are_left_out(tmp_path):
    write_rows(tmp_path / "a.jsonl", ["one", "", "nul \0", None, "half a pair \ud800", "two"])
    write_parquet(tmp_path / "b.parquet", {"text": ["three", None, ""]})
    corpus = build_shards([tmp_path / "a.jsonl", tmp_path / "b.parquet"], tmp_path / "out")
    assert sorted(every_document(corpus)) == [b"one", b"three", b"two"]
    assert corpus.n_skipped == 6


def test_a_field_may_be_inside_another(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"meta": {"text": "in"}}\n{"meta.text": "plain"}\n')
    write_parquet(tmp_path / "b.parquet", {"meta": [{"text": "there", "x": 1}]})
    corpus = build_shards([path, tmp_path / "b.parquet"], tmp_path / "out", field="meta.text")
    assert sorted(every_document(corpus)) == [b"in", b"plain", b"there"]


@pytest.mark.parametrize(
    "line, words",
    [
        (b'{"text": "a"', "expected JSON with text in 'text', Expecting ',' delimiter"),
        (b'{"body": "a"}', "got no 'text' among 'body'"),
        (b"{}", "got no 'text' among no fields"),
        (b'{"text": 3}', "got int"),
        (b'["text"]', "got list where 'text' should be"),
        (b'{"text": "\xff"}', "'utf-8' codec can't decode byte 0xff"),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz"])
def test_a_bad_line_is_named(tmp_path, line, words, kind):
    path = tmp_path / f"bad.{kind}"
    content = b"".join(b'{"text": "%d"}\n\n' % i for i in range(20)) + line + b'\n{"text": "after"}\n'
    path.write_bytes(gzip.compress(content) if kind.endswith("gz") else content)
    with pytest.raises(ValueError) as error:
        build_shards([path], tmp_path / "out", unit_bytes=64)
    assert str(error.value).startswith(f"{path}, line 41: ") and words in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name]  # nothing half built


def test_bad_files_are_named(tmp_path):
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(b'{"text": "abc"}\n' * 99)[:-12])
    noise = tmp_path / "noise.jsonl.gz"
    noise.write_bytes(gzip.compress(b"")[:10] + b"\xff" * 20)
    no_parquet = tmp_path / "no.parquet"
    no_parquet.write_bytes(b"PAR1 this is none")
    no_footer = write_parquet(tmp_path / "footer.parquet", {"text": ["a"]})
    content = no_footer.read_bytes()
    no_footer.write_bytes(content[:-60] + b"\xff" * 52 + content[-8:])
    no_column = write_parquet(tmp_path / "column.parquet", {"body": ["a"], "n": [1]})
    no_text = write_parquet(tmp_path / "numbers.parquet", {"text": [1, 2]})
    for path, words in (
        (cut, f"expected a whole gzip file, got {cut}"),
        (noise, f"expected a whole gzip file, got {noise}"),
        (no_parquet, f"expected a Parquet file, got {no_parquet}"),
        (no_footer, f"expected a Parquet file, got {no_footer}"),
        (no_column, f"{no_column}: expected a column 'text', got 'body', 'n'"),
        (no_text, f"{no_text}, row 1 of row group 0: expected text in 'text', got int"),
    ):
        with pytest.raises(ValueError) as error:
            build_shards([path], tmp_path / "out")
        assert words in str(error.value)
    assert not list(tmp_path.glob("*out*")) and not list(tmp_path.glob(".*"))


def test_text_that_is_not_there_is_an_error(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"text: expected files or folders, got .*nowhere, which does not exist"):
        build_shards([tmp_path / "nowhere"], out)
    with pytest.raises(ValueError, match="text: expected text files, got none in"):
        build_shards([tmp_path], out)
    (tmp_path / "image").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="text: expected UTF-8 text, got none in"):
        build_shards([tmp_path], out)
    for name, value in (("held_out", 0.0), ("held_out", 1.0), ("workers", 0), ("shard_tokens", 0)):
        with pytest.raises(ValueError, match=f"{name}: expected .*, got {value}"):
            build_shards([tmp_path], out, **{name: value})


@pytest.mark.skipif(sys.platform != "linux", reason="needs a file that cannot be read whoever asks")
def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("fine")
    (tmp_path / "b.txt").symlink_to("/proc/self/mem")
    with pytest.raises(OSError, match=r"/proc/\d+/mem"):
        build_shards([tmp_path], tmp_path / "out")


@pytest.mark.parametrize("size", [50_000, 500], ids=["writing", "closing"])
def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, size, file_limit):
    (tmp_path / "a.txt").write_text("x" * size)
    (tmp_path / "b.txt").write_text("y" * size)
    file_limit(size * 2 // 5)
    with pytest.raises(OSError, match=r"out\.part/unit-0-(train|validation)"):
        build_shards([tmp_path / "a.txt", tmp_path / "b.txt"], tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "b.txt"]


def test_the_shards_do_not_depend_on_the_workers(rows, texts, tmp_path):
    options = {"held_out": 0.1, "shard_tokens": 4000}
    paths = [rows[0], texts]
    seen = []
    one = build_shards(paths, tmp_path / "one", workers=1, unit_bytes=1500, on_progress=seen.append, **options)
    many = build_shards(paths, tmp_path / "many", workers=3, unit_bytes=800, **options)
    assert files_of(one.folder) == files_of(many.folder)
    assert len(one.train.shards) > 2 and all(shard.tokens >= 4000 for shard in one.train.shards[:-1])
    assert seen[-1].n_bytes == seen[-1].total_bytes > seen[0].n_bytes > 0
    assert seen[-1].n_tokens == one.train.n_tokens + one.validation.n_tokens
    assert seen[-1].n_documents == one.train.n_documents + one.validation.n_documents


def test_an_error_in_a_worker_comes_out(rows, tmp_path):
    with rows[0].open("a") as file:
        file.write('{"text": 1}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 301: .*got int"):
        build_shards([rows[0]], tmp_path / "out", workers=2, unit_bytes=2000)
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.part").exists()


def test_the_same_text_is_built_once(rows, tmp_path):
    calls = []
    options = {"on_progress": calls.append}
    first = build_shards([rows[0]], tmp_path / "out", **options)
    assert len(calls) == 1
    assert build_shards([rows[0]], tmp_path / "out", **options).digest() == first.digest() and len(calls) == 1
    build_shards([rows[0]], tmp_path / "out", rebuild=True, **options)
    assert len(calls) == 2
    with pytest.raises(ValueError, match=r"out: expected .*, got ones of other held_out = 0\.05, not 0\.1; rebuild"):
        build_shards([rows[0]], tmp_path / "out", held_out=0.1)
    with pytest.raises(ValueError, match="of other field = 'text', not 'body'"):
        build_shards([rows[0]], tmp_path / "out", field="body")
    with rows[0].open("a") as file:
        file.write('{"text": "one more"}\n')
    before = files_of(tmp_path / "out")
    with pytest.raises(ValueError, match="got ones of other sources; rebuild them"):
        build_shards([rows[0]], tmp_path / "out")
    assert files_of(tmp_path / "out") == before
    assert b"one more" in every_document(build_shards([rows[0]], tmp_path / "out", rebuild=True))


def test_a_folder_of_something_else_is_left_alone(texts, tmp_path):
    for rebuild in (False, True):
        with pytest.raises(
            ValueError, match=r"out: expected a new folder or one of token shards, got .*something else"
        ):
            build_shards([texts], texts, rebuild=rebuild)
    (tmp_path / "empty").mkdir()
    (tmp_path / ".empty.part").mkdir()  # of a build that died
    assert build_shards([texts], tmp_path / "empty").n_files == 3
    assert not (tmp_path / ".empty.part").exists()


def test_a_failed_rebuild_keeps_what_was_there(rows, tmp_path):
    build_shards([rows[0]], tmp_path / "out")
    before = files_of(tmp_path / "out")
    rows[0].write_text("no JSON\n")
    with pytest.raises(ValueError, match="line 1"):
        build_shards([rows[0]], tmp_path / "out", rebuild=True)
    assert files_of(tmp_path / "out") == before


@pytest.mark.parametrize("vocab_size, size", [(2, 1), (256, 1), (257, 2), (65536, 2), (65537, 4)])
def test_the_type_of_tokens_follows_the_vocabulary(vocab_size, size):
    assert token_type(vocab_size) == np.dtype(f"<u{size}")


def test_a_tokenizer_file_gives_its_ids(bpe, tmp_path):
    text = "the cat <|endoftext|> sat\r\n ünder the <pad> mat"
    write_rows(tmp_path / "rows.jsonl", [text, "the mat", "rat"])
    corpus = build_shards([tmp_path / "rows.jsonl"], tmp_path / "out", tokenizer=bpe)
    tokenizer = corpus.tokenizer()
    assert (corpus.end_token, corpus.unit, corpus.train.type) == (1, "token", np.dtype("<u2"))
    assert corpus.vocab_size == tokenizer.model.get_vocab_size() > 258
    found = [part.document(i).tolist() for part in (corpus.train, corpus.validation) for i in range(part.n_documents)]
    assert sorted(tokenizer.decode(ids) for ids in found) == sorted(
        f"{t}<|endoftext|>".encode() for t in (text, "the mat", "rat")
    )
    for ids in found:  # special tokens that a text spells out are text
        assert ids[-1] == 1 and not {0, 1} & set(ids[:-1])
    assert max(map(len, found)) > 8  # nothing was cut
    assert tokenizer.digest == FileTokenizer(bpe).digest
    with pytest.raises(ValueError, match="got ones of other tokenizer; rebuild"):
        build_shards([tmp_path / "rows.jsonl"], tmp_path / "out")
    other = FileTokenizer(bpe, end_token="<pad>")
    assert other.end_token == 0 and other.digest != tokenizer.digest
    assert pickle.loads(pickle.dumps(other)).encode(b"the cat").tolist() == other.encode(b"the cat").tolist()


def test_long_texts_are_encoded_in_pieces(bpe, monkeypatch):
    tokenizer = FileTokenizer(bpe)
    text = ("the cat sat\n" * 20 + "the rat sat on " * 20).encode()
    whole = tokenizer.encode(text)
    monkeypatch.setattr(tokenizer_module, "PIECE", 100)
    assert len(tokenizer_module._pieces(text.decode())) > 4
    pieces = tokenizer.encode(text)
    assert tokenizer.decode(pieces) == tokenizer.decode(whole) == text
    assert len(pieces) <= len(whole) + 8
    assert tokenizer.encode(b"").tolist() == []


def test_tokenizers_that_do_not_work_say_why(bpe, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_tokenizer(tmp_path / "nowhere.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer: expected a file of the package tokenizers, got .*bad\.json"):
        load_tokenizer(tmp_path / "bad.json")
    with pytest.raises(ValueError, match=r"end_token: expected a token of .*, got none named '<stop>'"):
        load_tokenizer(bpe, end_token="<stop>")
    with pytest.raises(ValueError, match="end_token: expected None without a tokenizer file"):
        load_tokenizer(None, end_token="<stop>")
    assert isinstance(load_tokenizer(None), ByteTokenizer)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"pip install 'nsa-compile\[train\]'"):
        load_tokenizer(bpe)


def test_a_bytes_tokenizer_is_the_bytes():
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("aü".encode()).tolist() == [97, 195, 188]
    assert tokenizer.decode([97, 195, 188]) == "aü".encode()


def test_reading_crosses_shards(rows, tmp_path):
    corpus = build_shards([rows[0]], tmp_path / "out", shard_tokens=500)
    tokens = corpus.train
    everything = tokens.read(0, tokens.n_tokens)
    assert everything.dtype == torch.int64 and len(tokens.shards) > 10
    assert bytes(everything.tolist()) == b"".join(d + b"\0" for d in documents(tokens))
    generator = torch.Generator().manual_seed(0)
    for start, stop in torch.randint(tokens.n_tokens + 1, (50, 2), generator=generator).sort().values.tolist():
        assert torch.equal(tokens.read(start, stop), everything[start:stop])
    for start, stop in ((-1, 2), (2, 1), (0, tokens.n_tokens + 1)):
        with pytest.raises(IndexError, match="tokens: expected 0 <= start <= stop"):
            tokens.read(start, stop)


def test_shards_are_pickled_without_what_they_hold(rows, tmp_path):
    tokens = build_shards([rows[0]], tmp_path / "out").train
    tokens.read(0, 10)
    pickled = pickle.dumps(tokens)
    assert len(pickled) < tokens.n_tokens / 2
    assert torch.equal(pickle.loads(pickled).read(5, 50), tokens.read(5, 50))


def test_shards_that_are_damaged_are_named(rows, tmp_path):
    build_shards([rows[0]], tmp_path / "out", shard_tokens=2000)
    path, ends = (tmp_path / "out" / f"train-00001.{kind}" for kind in ("bin", "ends"))
    good = path.read_bytes(), ends.read_bytes()

    path.write_bytes(good[0][:-1])
    with pytest.raises(ValueError, match=rf"data: expected {path} of [\d,]+ bytes, got [\d,]+; build the shards anew"):
        open_shards(tmp_path / "out")
    path.unlink()
    with pytest.raises(ValueError, match=rf"data: expected {path} of [\d,]+ bytes, got no such file"):
        open_shards(tmp_path / "out")
    path.write_bytes(bytes([good[0][0] ^ 1]) + good[0][1:])
    open_shards(tmp_path / "out", verify=False)
    for verify in (None, True, None):
        with pytest.raises(ValueError, match=f"data: expected {path} and its .ends as they were built"):
            open_shards(tmp_path / "out", verify=verify)
    path.write_bytes(good[0])
    ends.write_bytes(good[1][8:16] + good[1][:8] + good[1][16:])
    with pytest.raises(ValueError, match=f"data: expected {ends} with ends that rise to"):
        open_shards(tmp_path / "out")
    ends.write_bytes(good[1])
    tokens = open_shards(tmp_path / "out", verify=True).train
    tokens.read(0, tokens.n_tokens)
    path.write_bytes(b"")  # under a memory map: to read on would be a bus error
    with pytest.raises(ValueError, match=rf"data: expected {path} of [\d,]+ bytes, got 0"):
        tokens.read(0, tokens.n_tokens)


def test_manifests_that_are_damaged_are_named(texts, tmp_path):
    with pytest.raises(ValueError, match=f"data: expected a folder of token shards with {MANIFEST}, got {texts}"):
        open_shards(texts)
    path = build_shards([texts], tmp_path / "out").folder / MANIFEST
    good = json.loads(path.read_text())
    assert {"format", "vocab_size", "end_token", "settings", *PARTS} <= set(good)
    path.write_text(json.dumps(good | {"format": 99}))
    with pytest.raises(ValueError, match=rf"data: expected {path} of format 1, got 99"):
        open_shards(tmp_path / "out")
    without = [{k: v for k, v in good.items() if k != name} for name in good]
    for bad in ("{", *without, good | {"train": [{"name": "x"}]}, good | {"train": 3}, good | {"vocab_size": "many"}):
        path.write_text(bad if isinstance(bad, str) else json.dumps(bad))
        with pytest.raises(ValueError, match=f"data: expected a manifest of token shards, got {path}"):
            open_shards(tmp_path / "out")


def test_offsets_pass_2_to_the_31(tmp_path):
    """A shard that takes no room on the disk but is 3 GiB long."""
    n = 3 * 2**30
    with (tmp_path / "big.bin").open("wb") as file:
        file.truncate(n)
        file.seek(n - 5)
        file.write(b"abcd\0")
    np.array([n - 5, n], "<i8").tofile(tmp_path / "big.ends")
    (tmp_path / "small.bin").write_bytes(b"xyz\0")
    np.array([4], "<i8").tofile(tmp_path / "small.ends")
    tokens = TokenShards(tmp_path, [Shard("big", n, 2, ""), Shard("small", 4, 1, "")], vocab_size=256)
    assert tokens.n_tokens == n + 4 and tokens.starts.tolist() == [0, n - 5, n, n + 4]
    assert bytes(tokens.document(1).tolist()) == b"abcd\0" and bytes(tokens.document(2).tolist()) == b"xyz\0"
    assert bytes(tokens.read(n - 3, n + 2).tolist()) == b"cd\0xy"
    entropy = unigram_entropy(tokens, most=2**22)
    assert 0 < entropy < 1e-4  # evenly spaced places, the last one included


def test_unigram_entropy_is_that_of_the_tokens(tmp_path):
    (tmp_path / "a.txt").write_bytes(bytes(range(1, 128)) * 2)
    tokens = build_shards([tmp_path / "a.txt"], tmp_path / "out", held_out=0.5).train
    assert tokens.n_tokens == 128
    assert unigram_entropy(tokens) == pytest.approx(math.log(128))
