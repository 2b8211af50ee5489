"""What a user of data/prepare.py sees: the files it writes, and one line where it cannot."""

import argparse
import csv
import errno
import gzip
import hashlib
import http.server
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import tomllib
import tracemalloc
import types
from array import array
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tiktoken

from data import documents
from data import prepare as module
from data.documents import Document, LeftOut, drop_duplicates, find_sources
from data.prepare import map_threads, prepare
from data.split import SEQUENCE, find_cut, hold_out
from data.tokens import (
    TOKENIZERS,
    load_meta,
    load_tokenizer,
    open_tokens,
    token_dtype,
    verify_tokens,
)

ROOT = Path(__file__).parent.parent


def read_back(folder, split):
    """The documents of a split, decoded."""
    meta, ids = load_meta(folder), open_tokens(folder, split)
    ends = np.flatnonzero(ids == meta["eot"])
    assert len(ids) == 0 or ends[-1] == len(ids) - 1, "the last document must end, too"
    starts = [0, *(ends[:-1] + 1)]
    decode = load_tokenizer("byte").decode
    return [decode(ids[start:end].tolist()) for start, end in zip(starts, ends, strict=True)]


def all_documents(folder):
    return sorted(read_back(folder, "train") + read_back(folder, "val"))


def write_texts(folder, numbers):
    folder.mkdir(parents=True, exist_ok=True)
    for i in numbers:
        (folder / f"{i}.txt").write_text(f"text number {i}\n")


def run(*argv, cwd=None, script="data/prepare.py", preexec_fn=None, **env):
    return subprocess.run([sys.executable, ROOT / script, *map(str, argv)], cwd=cwd,
                          env={**os.environ, **env}, capture_output=True, text=True, timeout=300,
                          preexec_fn=preexec_fn)


def assert_refused(result, *words):
    assert result.returncode == 2, result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("prepare.py: error: "), result.stderr
    for word in words:
        assert word in lines[0]


# ---- tokenizers


@pytest.mark.parametrize("text", [
    "", "a", "plain\n", "\r\n\n\t \x0b\x0c\x1c\x85\u2028\u2029", "".join(map(chr, range(0x300))),
    "naïve 日本語 🤯 e\u0301\n" * 100, "x" * 100_000, "\n" * 1000, "<|endoftext|>",
    "a<|endoftext|>b",
])
def test_byte_tokens_are_the_bytes(text):
    tokenizer = load_tokenizer("byte")
    ids = tokenizer.encode(text, disallowed_special=())
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


def test_byte_vocabulary():
    tokenizer = load_tokenizer("byte")
    assert (tokenizer.n_vocab, tokenizer.eot_token) == (257, 256)
    assert all(tokenizer.decode_single_token_bytes(i) == bytes([i]) for i in range(256))


def test_unknown_tokenizer_names_the_nearest():
    with pytest.raises(ValueError, match="unknown tokenizer gtp2: did you mean gpt2"):
        load_tokenizer("gtp2")


def test_no_network_says_which_files_to_copy(tmp_path):
    (tmp_path / "a.txt").write_text("some text\n" * 100)
    closed = "http://127.0.0.1:9"
    result = run(tmp_path / "a.txt", "--out", tmp_path / "out", "--tokenizer", "gpt2",
                 TIKTOKEN_CACHE_DIR=str(tmp_path / "cache"), HTTPS_PROXY=closed, https_proxy=closed,
                 NO_PROXY="", no_proxy="")
    url = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"
    assert_refused(result, "TIKTOKEN_CACHE_DIR", url, hashlib.sha1(url.encode()).hexdigest())
    assert not (tmp_path / "out").exists()


def test_the_files_to_copy_are_those_tiktoken_asks_for(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("tiktoken.load.read_file", lambda url: asked.append(url) or b"")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    for name, urls in TOKENIZERS.items():
        asked.clear()
        if name != "byte":
            with pytest.raises(ValueError, match="Hash mismatch"):
                load_tokenizer(name)
            assert asked and set(asked) <= set(urls)


def test_large_vocabulary_is_stored_as_uint32(tmp_path, monkeypatch):
    ranks = {bytes([i]): i + 65_500 for i in range(256)}
    large = tiktoken.Encoding("large", pat_str="(?s:.)", mergeable_ranks=ranks,
                              special_tokens={"<|endoftext|>": 70_000})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: large)
    (tmp_path / "a.txt").write_text("zebra\n" * 50)
    meta = prepare([str(tmp_path / "a.txt")], str(tmp_path / "out"), tokenizer="cl100k_base")
    ids = open_tokens(str(tmp_path / "out"), "train")
    assert meta["dtype"] == "uint32" and ids.dtype == np.uint32 and meta["vocab_size"] == 70_001
    assert ids[-1] == 70_000 and large.decode(ids[:6].tolist()) == "zebra\n"


def test_two_bytes_hold_65536_tokens():
    dtypes = [token_dtype(types.SimpleNamespace(n_vocab=n)) for n in (65_536, 65_537)]
    assert dtypes == [np.uint16, np.uint32]


# ---- what is written


def test_meta_agrees_with_the_files(tmp_path, strict_disk):
    write_texts(tmp_path / "in", range(200))
    (tmp_path / "in" / "ü.txt").write_text("drei Bytes: €, literally <|endoftext|>\n")
    out = str(tmp_path / "out")
    meta = prepare([str(tmp_path / "in")], out)
    assert meta == load_meta(out)
    assert (meta["tokenizer"], meta["dtype"]) == ("byte", "uint16")
    assert (meta["vocab_size"], meta["eot"]) == (257, 256)
    assert sorted(os.listdir(out)) == ["meta.json", "train.bin", "val.bin", "verified.json"]
    for split in ("train", "val"):
        texts, stored = read_back(out, split), Path(out, f"{split}.bin").read_bytes()
        assert meta[split]["documents"] == len(texts)
        assert meta[split]["bytes"] == sum(len(text.encode()) for text in texts)
        assert meta[split]["tokens"] == meta[split]["bytes"] + len(texts) == len(stored) // 2
        assert meta[split]["sha256"] == hashlib.sha256(stored).hexdigest()
    assert all_documents(out) == sorted(path.read_text() for path in (tmp_path / "in").iterdir())


def n_tokens(folder):
    meta = load_meta(str(folder))
    return meta["train"]["tokens"], meta["val"]["tokens"]


def test_duplicates_and_empty_documents_are_dropped(tmp_path):
    write_texts(tmp_path / "in", range(100))
    write_texts(tmp_path / "in" / "copy", range(7))
    (tmp_path / "in" / "empty.txt").touch()
    write_rows(tmp_path / "in" / "rows.jsonl", ["new", "text number 3\n", "", "new"])
    meta = prepare([str(tmp_path / "in")], str(tmp_path / "out"))
    assert meta["dropped_documents"] == 11
    assert meta["train"]["documents"] + meta["val"]["documents"] == 101


def test_workers_do_not_change_the_output(tmp_path):
    with open(tmp_path / "a.jsonl", "w") as file:
        for i in range(3000):
            print(json.dumps({"text": f"{i} größer\n" * (i % 200)}), file=file)
    rows = [str(tmp_path / "a.jsonl")]
    metas = [prepare(rows, str(tmp_path / str(n)), workers=n) for n in (1, 2)]
    assert metas[0] == metas[1] and metas[0]["train"]["bytes"] > 3 * documents.PIECE


@pytest.mark.parametrize("text", [
    "x日本🤯é" * 300_000, "🤯" * 700_000, ("é" * 400_000 + "\r\n") * 5,
])
def test_large_texts_are_read_in_pieces(tmp_path, text):
    """Several MB with few or no line ends: no character is split, nothing is lost."""
    (tmp_path / "a.txt").write_bytes(text.encode())
    out = str(tmp_path / "out")
    meta = prepare([str(tmp_path / "a.txt")], out)
    assert read_back(out, "train")[0] + read_back(out, "val")[0] == text
    assert meta["train"]["bytes"] + meta["val"]["bytes"] == len(text.encode())
    with open(tmp_path / "a.txt", "rb") as file:
        pieces = list(documents.read_pieces(file))
    assert len(pieces) > 2 and max(map(len, pieces)) <= documents.PIECE
    assert "".join(piece.decode() for piece in pieces) == text


def test_reading_never_runs_far_ahead_of_writing():
    read = 0

    def items():
        nonlocal read
        for read in range(1, 101):
            yield read

    for written, result in enumerate(map_threads(lambda x: -x, items(), workers=3), start=1):
        assert result == -written and read - written <= 2 * 3


# ---- what is held out


def prose(seed, size):
    """`size` bytes of lines of words."""
    draw = random.Random(seed)
    words = [str(draw.randrange(10**5, 10**6)) for _ in range(size // 6 + 1)]
    return "".join(word + draw.choice("     \n") for word in words)[: size - 1] + "\n"


def test_a_document_keeps_its_side_when_others_are_added(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(300):
        (tmp_path / "in" / f"{i}.txt").write_text(prose(i, 300))
    prepare([str(tmp_path / "in")], str(tmp_path / "one"))
    held_out = set(read_back(str(tmp_path / "one"), "val"))
    assert 5 < len(held_out) < 30  # 5% of 300
    for i in range(300, 500):
        (tmp_path / "in" / f"a{i}.txt").write_text(prose(i, 300))
    (tmp_path / "in").rename(tmp_path / "elsewhere")
    prepare([str(tmp_path / "elsewhere")], str(tmp_path / "two"))
    assert held_out < set(read_back(str(tmp_path / "two"), "val"))
    assert not held_out & set(read_back(str(tmp_path / "two"), "train"))


def test_of_many_documents_none_changes_its_side():
    draw = np.random.default_rng(0)
    digests = draw.integers(0, 2**64, 3000, dtype=np.uint64)
    ends = np.cumsum(draw.integers(100, 500, 3000))
    sides = [ends[:n] > hold_out(None, ends[:n], digests[:n], 0.05, None)
             for n in range(300, 3000, 7)]
    assert all((small == large[: len(small)]).all() for small, large in pairwise(sides))


PNG = b"\x89PNG\r\n\x1a\n" + bytes(100)


@pytest.mark.parametrize("name, content", [
    ("picture.png", PNG), ("25.png", PNG), ("empty.txt", b""), ("0.txt", b"caf\xe9"),
    ("uncopied.txt", prose(0, 30_000).encode()), ("rows.jsonl", b'{"no": "text"}\n'),
    ("a.tar.gz", gzip.compress(PNG, mtime=0)),
])
def test_what_is_no_document_does_not_count_when_sides_are_chosen(tmp_path, name, content):
    """Whatever stands beside three texts, about 5% are held out, and the texts are all there."""
    (tmp_path / "in").mkdir()
    for i in range(3):
        (tmp_path / "in" / f"text{i}.txt").write_text(prose(i, 30_000))
    (tmp_path / "in" / name).write_bytes(content)
    out = str(tmp_path / "out")
    meta = prepare([str(tmp_path / "in")], out)
    assert meta["skipped_files"] + meta["dropped_documents"] == 1
    train, val = n_tokens(out)
    assert 0.05 <= val / (train + val) < 0.08
    parts = zip(read_back(out, "train"), read_back(out, "val"), strict=True)
    assert [a + b for a, b in parts] == [prose(i, 30_000) for i in range(3)]


@pytest.mark.parametrize("small", [range(0, 60, 20), range(7), [3], [59]])
def test_a_side_is_never_tiny(tmp_path, small):
    """Of sixty files a few have 100 bytes, the others 23 kB: whole files, about 5% of the bytes."""
    (tmp_path / "in").mkdir()
    for i in range(60):
        size = 100 if i in small else 23_000
        (tmp_path / "in" / f"{i}.txt").write_text(prose(i, size))
    meta = prepare([str(tmp_path / "in")], str(tmp_path / "out"))
    train, val = meta["train"], meta["val"]
    assert 0.025 <= val["bytes"] / (train["bytes"] + val["bytes"]) <= 0.1
    assert train["documents"] + val["documents"] == 60


@pytest.mark.parametrize("sizes", [
    [50_000], [20_000] * 2, [10**6, 30, 30, 30], [3000] * 4, [2100], [4100, 1], [700, 1400, 700],
    [10**6, *[900] * 55], [4] * 900, [90_000, 8000], [699, 680, 680],
])
def test_both_sides_train_a_context_of_1024_if_there_is_text_for_it(tmp_path, sizes):
    rows = [json.dumps({"text": prose(i, size)}) for i, size in enumerate(sizes)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    prepare([str(tmp_path / "a.jsonl")], str(tmp_path / "out"))
    train, val = n_tokens(tmp_path / "out")
    assert min(train, val) >= SEQUENCE and val <= max(2 * SEQUENCE, 0.1 * (train + val))


def test_held_out_are_whole_documents_where_that_is_possible():
    """On 3000 lists of lengths: each side gets its share, and only what is too long is divided."""
    draw = np.random.default_rng(1)
    tokenizer = load_tokenizer("byte")
    for _ in range(3000):
        n, largest = draw.integers(1, 40), draw.uniform(6, 11)
        lengths = np.exp(draw.uniform(5, largest, n)).astype(int)
        total, ends = lengths.sum(), np.cumsum(lengths)
        if total < 2 * SEQUENCE:
            continue
        tokens = np.where(draw.random(total) < 0.01, ord("\n"), ord("a"))
        digests = draw.integers(0, 2**64, n, dtype=np.uint64)
        val_fraction = draw.choice([0.001, 0.05, 0.3, 0.5])
        held = ends - hold_out(tokens, ends, digests, val_fraction, tokenizer)
        divided = (held > 0) & (held < lengths)
        assert min(held.sum(), total - held.sum() + divided.sum()) >= SEQUENCE
        wanted = max(val_fraction * total, SEQUENCE)
        assert wanted / 2 <= held.sum() <= 2 * wanted + divided.sum()
        assert total - held.sum() + divided.sum() >= (total - wanted) / 2
        order = draw.permutation(n)
        again = np.cumsum(lengths[order])
        other = again - hold_out(tokens, again, digests[order], val_fraction, tokenizer)
        assert divided.any() or (other == held[order]).all()  # whatever the order of the inputs
        if total > 3 * wanted:
            whole = lengths[lengths <= 2 * wanted].sum() >= max(wanted / 2, SEQUENCE)
            assert divided.any() != whole
            assert not divided[lengths <= 2 * wanted].any()


def test_a_text_shorter_than_two_sequences_says_which_context_it_allows(tmp_path):
    (tmp_path / "a.txt").write_text(prose(1, 1500))
    result = run(tmp_path / "a.txt", "--out", tmp_path / "out")
    train, val = n_tokens(tmp_path / "out")
    assert result.returncode == 0 and 375 <= val < 450 < train
    assert f"with so little text, train.py needs --block_size {val - 1} or less" in result.stderr


def test_single_file_holds_out_its_end_at_a_line(tmp_path):
    lines = [f"line {i}\n" for i in range(3000)]
    (tmp_path / "a.txt").write_text("".join(lines))
    out = str(tmp_path / "out")
    prepare([str(tmp_path / "a.txt")], out, val_fraction=0.1)
    (train,), (val,) = read_back(out, "train"), read_back(out, "val")
    assert train + val == "".join(lines) and train.endswith("\n")
    assert 0.1 <= len(val) / len(train + val) < 0.102


def test_a_few_files_hold_out_their_ends(tmp_path):
    texts = ["".join(f"line {i} of {name}\n" for i in range(9000)) for name in "abc"]
    (tmp_path / "in").mkdir()
    for name, text in zip("abc", texts, strict=True):
        (tmp_path / "in" / f"{name}.txt").write_text(text)
    out = str(tmp_path / "out")
    prepare([str(tmp_path / "in")], out, val_fraction=0.01)
    parts = list(zip(read_back(out, "train"), read_back(out, "val"), strict=True))
    assert [train + val for train, val in parts] == texts
    assert all(0.01 <= len(val) / len(train + val) < 0.013 for train, val in parts)


@pytest.mark.parametrize("size, val_fraction, line_end", [
    (2052, 0.05, 1000), (10**6, 0.001, 985_000), (10**6, 0.05, 929_000),
])
def test_a_line_end_is_no_reason_to_miss_what_is_wanted(size, val_fraction, line_end):
    tokens = np.full(size, ord("a"))
    tokens[line_end] = ord("\n")
    ends, digests = np.array([size]), np.array([7], np.uint64)
    (cut,) = hold_out(tokens, ends, digests, val_fraction, load_tokenizer("byte"))
    wanted = max(val_fraction * size, SEQUENCE)
    assert cut + 1 >= SEQUENCE and size - cut == pytest.approx(wanted, abs=2)


def test_a_cut_at_the_end_of_a_block_of_the_file(tmp_path):
    """95% of this text are 2**20 bytes of tokens: nothing of the rest is in the reader's buffer."""
    text = "0123456789" * 55_188 + "abc"
    (tmp_path / "a.txt").write_text(text)
    prepare([str(tmp_path / "a.txt")], str(tmp_path / "out"))
    (train,), (val,) = (read_back(str(tmp_path / "out"), split) for split in ("train", "val"))
    assert len(train) == 2**19 and train + val == text


@pytest.mark.parametrize("share", [0.5, 0.251, 0.101, 0.05, 0.049, 0.02])
def test_no_cut_is_inside_a_character(share):
    text = np.frombuffer("🤯".encode() * 50, np.uint8)
    cut = find_cut(text, share, 0, load_tokenizer("byte"))
    assert cut % 4 == 0 and 0 <= len(text) * (1 - share) - cut < 5
    assert find_cut(text[:4], share, 0, load_tokenizer("byte")) == 5  # too short: not cut


@pytest.mark.parametrize("line", ["x" * 80_000, "日" * 30_000, "🤯é" * 20_000, "é" * 40_000 + "\n"])
def test_a_far_line_end_is_no_place_to_cut(tmp_path, line):
    """A licence line and a line of the whole rest: cut between characters, at 95%."""
    text = "Licence: you may use this.\n" + line
    (tmp_path / "a.txt").write_text(text)
    out = str(tmp_path / "out")
    prepare([str(tmp_path / "a.txt")], out)
    (train,), (val,) = read_back(out, "train"), read_back(out, "val")
    assert train + val == text
    assert 0.05 <= len(val.encode()) / len(text.encode()) < 0.051


def make_bpe():
    """A tokenizer with tokens of many bytes, of line ends, and of parts of characters."""
    merges = ["\n\n".encode(), "日".encode()[:2], "日".encode(), b"ab", b"abab", b"b\n"]
    ranks = {bytes([byte]): byte for byte in range(256)}
    ranks |= {token: 256 + i for i, token in enumerate(merges)}
    return tiktoken.Encoding("bpe", pat_str="(?s:.+)", mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": 300})


@pytest.mark.parametrize("text", [
    "abababa\n\n" * 3000, "日本é" * 9000, "ab" * 20_000, "a日\n" * 9000,
])
def test_tokens_of_many_bytes_are_cut_and_counted(tmp_path, monkeypatch, text):
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: make_bpe())
    (tmp_path / "a.txt").write_text(text)
    out = str(tmp_path / "out")
    meta = prepare([str(tmp_path / "a.txt")], out, tokenizer="gpt2")
    ids = {split: open_tokens(out, split).tolist() for split in ("train", "val")}
    assert {tokens.pop() for tokens in ids.values()} == {300}
    parts = {split: make_bpe().decode_bytes(tokens) for split, tokens in ids.items()}
    assert parts["train"].decode() + parts["val"].decode() == text  # no character is split
    assert all(meta[split]["bytes"] == len(part) for split, part in parts.items())
    assert "\n" not in text or parts["train"].endswith(b"\n")


def test_a_cut_of_a_very_long_text_reads_little_of_it():
    tokenizer, read = load_tokenizer("byte"), []
    text = np.lib.stride_tricks.as_strided(np.array([97, 0], np.uint16), (10**12,), (0,))
    decode = types.SimpleNamespace(
        decode_tokens_bytes=lambda ids: read.append(len(ids)) or tokenizer.decode_tokens_bytes(ids))
    assert find_cut(text, 0.05, 0.02, decode) == 95 * 10**10
    assert sum(read) < 2**21


# ---- inputs


def test_folder_skips_hidden_files_and_counts_what_is_not_text(tmp_path):
    write_texts(tmp_path / "in" / "deep" / "er", range(100))
    write_texts(tmp_path / "in" / ".git", [1000])
    (tmp_path / "in" / ".hidden").write_text("hidden")
    (tmp_path / "in" / "latin1.txt").write_bytes(b"caf\xe9")
    (tmp_path / "in" / "zeros.bin").write_bytes(bytes(100))
    result = run(tmp_path / "in", "--out", tmp_path / "out")
    assert result.returncode == 0 and "skipped 2 files" in result.stdout, result.stderr
    assert all_documents(str(tmp_path / "out")) == sorted(f"text number {i}\n" for i in range(100))


def test_files_come_in_the_same_order_on_every_disk(tmp_path):
    for name in random.Random(0).sample(range(100, 200), 50):
        write_texts(tmp_path / str(name), [2, 1])
    paths = list(documents.find_files(tmp_path))
    assert len(paths) == 100 and paths == sorted(paths)


def test_links_to_folders_are_followed_and_circles_end(tmp_path):
    write_texts(tmp_path / "other" / "deep", range(100, 150))
    write_texts(tmp_path / "in" / "b", range(50))
    (tmp_path / "in" / "a").symlink_to(tmp_path / "other")
    (tmp_path / "in" / "again").symlink_to(tmp_path / "other")
    (tmp_path / "in" / "b" / "one").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "b" / "two").symlink_to(tmp_path / "in" / "b")
    (tmp_path / "other" / "deep" / "back").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "itself").symlink_to("itself")
    (tmp_path / "in" / "nowhere").symlink_to(tmp_path / "none")
    (tmp_path / "in" / "file.txt").symlink_to(tmp_path / "in" / "b" / "7.txt")
    os.mkfifo(tmp_path / "in" / "pipe")
    meta = prepare([str(tmp_path / "in")], str(tmp_path / "out"))
    assert meta["dropped_documents"] == 1  # the link to a file: each folder was walked once
    numbers = [*range(50), *range(100, 150)]
    assert all_documents(str(tmp_path / "out")) == sorted(f"text number {i}\n" for i in numbers)


def test_a_pattern_is_for_the_shell(tmp_path):
    write_texts(tmp_path / "in", range(100))
    result = run(tmp_path / "in" / "*.txt", "--out", tmp_path / "out")
    assert_refused(result, "no such input", "quotes kept it from the shell")
    (tmp_path / "in" / "a[1]*.txt").write_text("a name with the characters of a pattern\n")
    (tmp_path / "in").rename(tmp_path / "in?")
    prepare([str(tmp_path / "in?"), str(tmp_path / "in?" / "a[1]*.txt")], str(tmp_path / "out"))
    assert len(all_documents(str(tmp_path / "out"))) == 101


TEXTS = [f"größer \"{i}\",\n {i}" for i in range(100)]


def pack(name, content):
    """`content` as a file of this name would hold it."""
    if name.lower().endswith(".gz"):
        return gzip.compress(content)
    if name.lower().endswith(".zst"):
        return pytest.importorskip("pyarrow").compress(content, codec="zstd", asbytes=True)
    return content


def write_rows(path, texts, field="text"):
    """A file of rows with these texts, in the format that the ending of its name says."""
    kind = path.name.lower().removesuffix(".gz").removesuffix(".zst")
    rows = [{"id": 7, field: text, "after": None} for text in texts]
    file = io.StringIO()
    if kind.endswith(".csv"):
        writer = csv.DictWriter(file, ["id", field, "after"])
        writer.writeheader()
        writer.writerows(rows)
    elif kind.endswith(".parquet"):
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path)
        return
    else:
        file.writelines(json.dumps(row, ensure_ascii=row["id"] > 9) + "\n\n" for row in rows)
    path.write_bytes(pack(path.name, file.getvalue().encode()))


@pytest.mark.parametrize("ending", [
    ".jsonl", ".ndjson", ".json", ".csv", ".parquet", ".jsonl.gz", ".ndjson.gz", ".json.gz",
    ".csv.gz", ".jsonl.zst", ".ndjson.zst", ".json.zst", ".csv.zst", ".JSONL", ".NdJson.GZ",
    ".CSV", ".Parquet", ".Jsonl.ZST",
])
@pytest.mark.parametrize("inside", ["named", "folder", "url"])
def test_files_of_rows(tmp_path, server, ending, inside):
    write_rows(tmp_path / "www" / f"a{ending}", TEXTS, "body")
    path = {"named": tmp_path / "www" / f"a{ending}", "folder": tmp_path / "www",
            "url": f"{server.replace('http', 'HTTP')}/a{ending}?download=1"}[inside]
    prepare([str(path)], str(tmp_path / "out"), field="body")
    assert all_documents(str(tmp_path / "out")) == sorted(TEXTS)


@pytest.mark.parametrize("ending", [
    ".txt", ".txt.gz", ".TXT.GZ", ".txt.zst", ".md", "", ".jsonl.txt",
])
@pytest.mark.parametrize("inside", ["named", "folder", "url"])
def test_files_of_text(tmp_path, server, ending, inside):
    text = '{"text": "this is a line, not a row"}\n' * 100
    (tmp_path / "www" / f"a{ending}").write_bytes(pack(ending, text.encode()))
    path = {"named": tmp_path / "www" / f"a{ending}", "folder": tmp_path / "www",
            "url": f"{server}/a{ending}"}[inside]
    meta = prepare([str(path)], str(tmp_path / "out"))
    assert meta["sources"] == [str(path)]
    (train,), (val,) = (read_back(str(tmp_path / "out"), split) for split in ("train", "val"))
    assert train + val == text


@pytest.mark.parametrize("ending", [".parquet", ".txt.zst", ".jsonl.ZST"])
def test_a_missing_package_is_named_before_anything_is_read(tmp_path, monkeypatch, ending):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setattr(module, "write_tokens", None)
    write_texts(tmp_path / "in", range(3))
    (tmp_path / "in" / f"a{ending}").write_bytes(b"")
    message = r"a\.\S+ needs the package pyarrow.* pip install '\.\[datasets\]'"
    with pytest.raises(ValueError, match=message):
        prepare([str(tmp_path / "in")], str(tmp_path / "out"))


def test_a_folder_of_code_with_files_of_other_rows(tmp_path):
    write_texts(tmp_path / "in", range(100))
    (tmp_path / "in" / "package.json").write_text('{\n  "name": "x"\n}\n')
    (tmp_path / "in" / "table.csv").write_text("a,b\n1,2\n")
    (tmp_path / "in" / "empty.jsonl").write_text("")
    (tmp_path / "in" / "log.jsonl").write_text('{"step": 1}\n' * 5000)
    result = run(tmp_path / "in", "--out", tmp_path / "out")
    assert result.returncode == 0 and "skipped 4 files without text and 0 bad rows" in result.stdout
    assert len(all_documents(str(tmp_path / "out"))) == 100
    (tmp_path / "in" / "log.jsonl").write_text('{"step": 1}\n' * 99 + '{"text": "one of 100"}\n')
    with pytest.raises(ValueError, match="11 of 11 rows, more than 1%, have no valid text"):
        prepare([str(tmp_path / "in")], str(tmp_path / "again"))


def test_what_a_csv_may_hold(tmp_path):
    """A byte order mark, a very long field, line ends of Windows, and a row that is not UTF-8."""
    rows = [f"row {i}, " * 3000 for i in range(100)]
    texts = ["a line\n" * 20_000, "in a\r\nfield", 'a "quote"', *rows]
    quoted = [text.replace('"', '""') for text in texts]
    rows = ["text,id", *(f'"{text}",{i}' for i, text in enumerate(quoted)), ""]
    content = "\r\n".join(rows).encode("utf-8-sig") + b"caf\xe9,2\r\n"
    (tmp_path / "a.csv").write_bytes(content)
    meta = prepare([str(tmp_path / "a.csv")], str(tmp_path / "out"))
    assert meta["skipped_rows"] == 1
    assert all_documents(str(tmp_path / "out")) == sorted(texts)


@pytest.mark.parametrize("bad", [r'"He said \"hi, you\" there"', '"one "two"\nthree, four"'])
def test_a_csv_with_a_wrong_quote_is_damaged(bad, tmp_path):
    """Python would read the first text as: He said \\hi. After it, rows may begin anywhere."""
    rows = ["id,text", *(f'{i},"row ""{i}"""' for i in range(200))]
    (tmp_path / "a.csv").write_text("\n".join([*rows[:50], f"50,{bad}", *rows[50:]]))
    with pytest.raises(ValueError, match="a.csv is damaged, .*: line 51: .* expected after"):
        prepare([str(tmp_path / "a.csv")], str(tmp_path / "out"))


def test_a_row_of_csv_with_a_comma_too_many_is_a_bad_row(tmp_path):
    """Else its text would end at the comma. A comma at the end of a row cuts nothing."""
    rows = ["id,text", *(f"{i},row {i}" + "," * (i % 2) for i in range(202))]
    rows[-2] += ", and more"
    (tmp_path / "a.csv").write_text("\n".join(rows))
    meta = prepare([str(tmp_path / "a.csv")], str(tmp_path / "out"))
    assert meta["skipped_rows"] == 1
    assert all_documents(str(tmp_path / "out")) == sorted(f"row {i}" for i in {*range(202)} - {200})


def test_a_quote_that_never_closes_does_not_swallow_rows(tmp_path):
    rows = ["text", *(f"row {i}" for i in range(200))]
    (tmp_path / "a.csv").write_text("\n".join([*rows, '"open', *rows]))
    with pytest.raises(ValueError, match="a.csv is damaged, .*: unexpected end of data"):
        prepare([str(tmp_path / "a.csv")], str(tmp_path / "out"))


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".parquet", ".ndjson.gz"])
def test_an_error_shows_which_fields_there_are(tmp_path, ending):
    write_rows(tmp_path / f"a{ending}", TEXTS, "story")
    result = run(tmp_path / f"a{ending}", "--out", tmp_path / "out")
    assert_refused(result, "11 of 11 rows", "'text'", "--field", f"a{ending}:", "story")


BAD_ROWS = [
    "{not json", "{}", '{"text": null}', '{"body": "x"}', '{"text": 3}', '["text"]', "text", "7",
    r'{"text": "\ud800"}', "[" * 100_000 + "]" * 100_000, "caf\udce9", '{"text": ["a"]}',
]


def rows_with(bad, n, places):
    rows = [json.dumps({"text": f"text {i}"}) for i in range(n)]
    for place in places:
        rows[place] = bad
    return "\n".join(rows).encode(errors="surrogateescape")


@pytest.mark.parametrize("bad", BAD_ROWS)
def test_a_bad_row_is_skipped_and_counted(tmp_path, bad):
    (tmp_path / "a.jsonl").write_bytes(rows_with(bad, 200, [99, 0]))
    result = run("a.jsonl", "--out", "out", cwd=tmp_path)
    assert result.returncode == 0 and " 2 bad rows" in result.stdout, result.stderr
    assert load_meta(str(tmp_path / "out"))["skipped_rows"] == 2
    assert len(all_documents(str(tmp_path / "out"))) == 198


@pytest.mark.parametrize("bad", BAD_ROWS)
def test_many_bad_rows_are_an_error_that_shows_three(tmp_path, bad):
    (tmp_path / "a.jsonl").write_bytes(rows_with(bad, 399, [0, 99, 100, 200]))
    result = run("a.jsonl", "--out", "out", cwd=tmp_path)
    assert_refused(result, "4 of 399 rows", "'text'", "--field", "a.jsonl:1: ", "a.jsonl:100: ",
                   f"a.jsonl:101: b'{bad[:5]}" if bad.isascii() else "caf\\xe9")
    assert "a.jsonl:201" not in result.stderr and len(result.stderr) < 1000
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_bad_rows_are_counted_over_all_files(tmp_path):
    for i in range(10):
        (tmp_path / "in").mkdir(exist_ok=True)
        bad = rows_with("{}", 50, [20] if i == 5 else [])
        (tmp_path / "in" / f"{i}.jsonl").write_bytes(bad.replace(b"text ", f"text {i} ".encode()))
    meta = prepare([str(tmp_path / "in")], str(tmp_path / "out"))
    assert meta["skipped_rows"] == 1 and len(all_documents(str(tmp_path / "out"))) == 499


def test_a_json_file_that_is_one_list_is_refused_with_a_hint(tmp_path):
    (tmp_path / "a.json").write_text('[\n  {"text": "a"},\n  {"text": "b"}\n]\n')
    result = run(tmp_path / "a.json", "--out", tmp_path / "out")
    assert_refused(result, "3 of 4 rows", "of JSON each line is a row")


def test_a_wrong_field_is_noted_early(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n' * 100_000)
    result = run(tmp_path / "a.jsonl", "--out", tmp_path / "out")
    assert_refused(result, "11 of 11 rows", '{"body": "x"}')


@pytest.fixture
def server(tmp_path):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=tmp_path / "www")

        def end_headers(self):  # some servers take a packed file for a packed answer
            packed = ".gz" in self.path and "gzip" in self.headers["Accept-Encoding"]
            if packed:
                self.send_header("Content-Encoding", "gzip")
            super().end_headers()

        def log_message(self, *args):
            pass

    (tmp_path / "www").mkdir()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_url_with_a_bad_status(tmp_path, server):
    result = run(f"{server}/none.txt", "--out", tmp_path / "out")
    assert_refused(result, f"{server}/none.txt", "404")
    assert os.listdir(tmp_path) == ["www"]


def test_hugging_face_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"hf:some/name needs .* pip install '\.\[datasets\]'"):
        prepare(["hf:some/name"], str(tmp_path / "out"))
    assert os.listdir(tmp_path) == []


def test_hugging_face_data_set(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    for name in ("one", "two"):
        with open(tmp_path / "set" / f"{name}.jsonl", "w") as file:
            file.writelines(json.dumps({"story": f"{name} {i}"}) + "\n" for i in range(100))
    configs = [f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("one", "two")]
    (tmp_path / "set" / "README.md").write_text(f"---\nconfigs:\n{''.join(configs)}---\n")
    prepare([f"hf:{tmp_path / 'set'}:two"], str(tmp_path / "out"), field="story", val_fraction=0.2)
    assert all_documents(str(tmp_path / "out")) == sorted(f"two {i}" for i in range(100))


def test_default_is_the_standard_library_without_tests(tmp_path):
    result = run(cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    out = str(tmp_path / "data" / "stdlib")
    train, val = (read_back(out, split) for split in ("train", "val"))
    assert len(train) > 300 and len(val) > 10
    assert Path(argparse.__file__).read_text() in train + val
    assert Path(pytest.__file__).read_text() not in train + val
    assert "\nclass TestArgumentParsing(" not in "".join(train + val)
    root = Path(argparse.__file__).parent
    paths = [source.path.relative_to(root) for source in find_sources([], "text", tmp_path)]
    excluded = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    assert paths and not any(excluded & set(path.parts) for path in paths)


@pytest.mark.parametrize("spec, message", [
    ("hf:", "hf: names no data set"), ("hf:/", "hf:/ names no data set"),
    ("hf:scripted", "cannot read the train split of hf:scripted: .*cripts"),
    ("hf:empty", "cannot read the train split of hf:empty"),
    ("hf:only_test", "cannot read the train split of hf:only_test: .*train"),
    ("hf:damaged", "cannot read the train split of hf:damaged: "),
])
def test_a_data_set_that_cannot_be_read(tmp_path, monkeypatch, spec, message):
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    for name in ("scripted", "empty", "only_test", "damaged"):
        (tmp_path / name).mkdir()
    (tmp_path / "scripted" / "scripted.py").write_text("raise SystemExit('code of a data set ran')")
    (tmp_path / "only_test" / "test.jsonl").write_text('{"text": "not the train split"}')
    rows = [json.dumps({"text": f"text {i}"}) for i in range(10_000)]
    (tmp_path / "damaged" / "train.jsonl").write_text("\n".join(rows) + '{"text": ')
    write_texts(tmp_path / "in", [1])
    if spec != "hf:damaged":
        monkeypatch.setattr(module, "write_tokens", None)  # no input before it has been read
    with pytest.raises(ValueError, match=message):
        prepare(["in", spec], "out")
    assert sorted(os.listdir(tmp_path)) == ["damaged", "empty", "in", "only_test", "scripted"]


def test_duplicates_are_found_without_a_set_in_memory():
    digests, left_out = array("Q"), LeftOut()
    texts = (Document("a", i % 2**16 * 2**47, [b"text"]) for i in range(2**17))
    tracemalloc.start()
    assert sum(1 for _ in drop_duplicates(texts, digests, left_out)) == 2**16
    assert tracemalloc.get_traced_memory()[1] < 20 * 2**16
    tracemalloc.stop()
    assert list(digests) == [i * 2**47 for i in range(2**16)]
    assert left_out.dropped_documents == 2**16


def test_the_oldest_tiktoken_that_works():
    """Version 0.12 takes half an hour for 1 MB of one character, and cannot be interrupted."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "tiktoken>=0.13" in project["dependencies"]


# ---- other runs, other packages


@pytest.mark.parametrize("script", ["data/prepare.py", "train.py"])
def test_an_installed_package_called_data_does_no_harm(tmp_path, script):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "__init__.py").write_text("raise SystemExit('this is another package')")
    result = run("--help", script=script, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert result.returncode == 0 and "--out" in result.stdout, result.stderr


def meanwhile(monkeypatch, action):
    """Run `action` when the next folder is finished, just before it gets its name."""
    fsync = os.fsync

    def first(number):
        monkeypatch.setattr(os, "fsync", fsync)
        action()
        fsync(number)

    monkeypatch.setattr(os, "fsync", first)


def test_the_later_of_two_equal_runs_uses_what_is_there(tmp_path, monkeypatch):
    write_texts(tmp_path / "in", range(100))
    inputs, out, earlier = [str(tmp_path / "in")], str(tmp_path / "out"), []
    meanwhile(monkeypatch, lambda: earlier.append(prepare(inputs, out)))
    assert [prepare(inputs, out)] == earlier == [load_meta(out)]
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]


def test_the_later_of_two_different_runs_is_refused(tmp_path, monkeypatch):
    write_texts(tmp_path / "in", range(100))
    inputs, out, earlier = [str(tmp_path / "in")], str(tmp_path / "out"), []
    meanwhile(monkeypatch, lambda: earlier.append(prepare(inputs, out, val_fraction=0.5)))
    with pytest.raises(FileExistsError, match="out has appeared meanwhile.* another folder"):
        prepare(inputs, out)
    meanwhile(monkeypatch, lambda: write_texts(tmp_path / "notes", [1]))
    with pytest.raises(FileExistsError, match="notes has appeared meanwhile"):
        prepare(inputs, str(tmp_path / "notes"))
    assert earlier == [load_meta(out)] and sorted(os.listdir(tmp_path)) == ["in", "notes", "out"]


def test_default_data_that_another_machine_prepares_meanwhile_are_used(prepared, monkeypatch):
    def prepare(inputs, folder):
        shutil.copytree(prepared, folder)
        raise FileExistsError(f"{folder} has appeared meanwhile")

    monkeypatch.setattr(module, "prepare", prepare)
    module.find_data(module.DEFAULT_DATA)


def test_what_a_killed_run_left_is_in_nobodys_way(tmp_path):
    write_texts(tmp_path / "in", range(100))
    left = tmp_path / f"out.tmp-{os.getpid()}"
    write_texts(left, [1])
    prepare([str(tmp_path / "in")], str(tmp_path / "out"))
    assert os.listdir(left) == ["1.txt"] and (tmp_path / "out" / "train.bin").is_file()


@pytest.mark.skipif(os.name != "posix", reason="permissions")
def test_others_may_read_what_was_prepared(tmp_path):
    write_texts(tmp_path / "in", range(100))
    before = os.umask(0o022)
    try:
        prepare([str(tmp_path / "in")], str(tmp_path / "out"))
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755 and set(modes.values()) == {0o644}


# ---- bad input: one line, exit code 2, nothing left behind


def test_an_interruption_leaves_nothing(tmp_path, monkeypatch):
    write_texts(tmp_path / "in", range(100))
    monkeypatch.setattr(module, "encode", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prepare([str(tmp_path / "in")], str(tmp_path / "out"))
    assert os.listdir(tmp_path) == ["in"]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_kill_and_a_closed_terminal_leave_nothing(name, tmp_path, monkeypatch):
    write_texts(tmp_path / "in", range(100))
    number, split = getattr(signal, name), module.split_tokens

    def split_later(*args):
        signal.raise_signal(number)
        return split(*args)

    monkeypatch.setattr(module, "split_tokens", split_later)
    before = signal.signal(number, lambda *_: None)  # this test must outlive the signal
    try:
        own = signal.getsignal(number)
        with pytest.raises(SystemExit) as end:
            prepare([str(tmp_path / "in")], str(tmp_path / "out"))
        assert end.value.code == 128 + number
        assert os.listdir(tmp_path) == ["in"]
        assert signal.getsignal(number) is own
        signal.signal(number, signal.SIG_IGN)  # as nohup does with SIGHUP
        prepare([str(tmp_path / "in")], str(tmp_path / "out"))
        assert sorted(os.listdir(tmp_path)) == ["in", "out"]
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("ending", [".jsonl.gz", ".jsonl.zst", ".txt.gz", ".txt.zst", ".parquet"])
@pytest.mark.parametrize("inside", ["named", "folder"])
def test_a_damaged_file_is_named(tmp_path, ending, inside):
    (tmp_path / "in").mkdir()
    write_rows(tmp_path / "in" / f"a{ending}", [f"text {i}" for i in range(1000)])
    whole = (tmp_path / "in" / f"a{ending}").read_bytes()
    contents = [whole[: len(whole) // 2], b"not what it is called"]
    if ".zst" not in ending:  # pyarrow writes no checksums there, zstd does
        contents.append(whole[:100] + b"\xff" * 50 + whole[150:])
    for damaged in contents:
        (tmp_path / "in" / f"a{ending}").write_bytes(damaged)
        path = tmp_path / "in" / f"a{ending}" if inside == "named" else tmp_path / "in"
        with pytest.raises(ValueError, match=rf"a\{ending} is damaged, fetch it again"):
            prepare([str(path)], str(tmp_path / "out"))
    assert os.listdir(tmp_path) == ["in"]


@pytest.mark.parametrize("reading", [1, 2])
def test_a_disk_that_fails_is_not_called_a_damaged_file(reading, tmp_path, monkeypatch):
    """A file of text is read twice."""
    read, started = documents.read_pieces, []

    def fail(stream):
        started.append(stream)
        yield from read(stream)
        if len(started) == reading:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(documents, "read_pieces", fail)
    write_texts(tmp_path / "in", [1])
    with pytest.raises(OSError, match="Input/output error") as error:
        prepare([str(tmp_path / "in")], str(tmp_path / "out"))
    assert error.value.filename == str(tmp_path / "in" / "1.txt")


def test_a_file_that_is_cut_while_it_is_read_is_named(tmp_path, monkeypatch):
    """Between its two readings."""
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"some text\n" * 1000))
    check = documents.check_text

    def cut(pieces):
        yield from check(pieces)
        path.write_bytes(path.read_bytes()[:30])

    monkeypatch.setattr(documents, "check_text", cut)
    with pytest.raises(ValueError, match="a.txt.gz is damaged, fetch it again"):
        prepare([str(path)], str(tmp_path / "out"))


@pytest.mark.parametrize("n_lines", [30, 5000], ids=["meta.json", "train.bin"])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, n_lines):
    """The line names the folder. 30 lines are 302 bytes of tokens, meta.json has some 500."""
    (tmp_path / "a.txt").write_text("line\n" * n_lines)
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (400, resource.RLIM_INFINITY))
    result = run("a.txt", "--out", "out", cwd=tmp_path, preexec_fn=limit,
                 PYTHONDONTWRITEBYTECODE="1")
    assert_refused(result, "error: out: File too large")
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("content", [
    b"caf\xe9\n" * 100, "wide".encode("utf-16"), b"a\n" * 5000 + bytes(9),
])
def test_a_named_file_must_be_text(tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    assert_refused(run(tmp_path / "a.txt", "--out", tmp_path / "out"), "a.txt is not UTF-8 text")
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read all")
def test_an_unreadable_file(tmp_path):
    write_texts(tmp_path / "in", range(50))
    (tmp_path / "in" / "7.txt").chmod(0)
    assert_refused(run(tmp_path / "in", "--out", tmp_path / "out"), "7.txt: Permission denied")


@pytest.mark.parametrize("argv, words", [
    (["none.txt", "--out", "out"], ["none.txt"]),
    (["*.none", "--out", "out"], ["no such input: '*.none'", "pattern", "shell"]),
    (["one", "--out", "out", "--field", ""], ["no text", "1 files in folders"]),
    (["a.txt", "--out", "out", "--field", "text"], ["--field text is for rows", "leave it out"]),
    (["none[1].txt", "--out", "out"], ["no such input: 'none[1].txt'", "pattern"]),
    (["--verify", "full", "--out", "out"], ["--verify FOLDER", "nothing else"]),
    (["--verify", "full"], ["no prepared data in full"]),
    (["--verify", ""], ["--verify is empty: give it a value, or leave it out"]),
    (["a.txt", "--out", ""], ["--out is empty: give it a value, or leave it out"]),
    (["a.txt"], ["--out"]),
    (["a.txt", "--otu", "out"], ["unknown option --otu: did you mean --out?"]),
    (["a.txt", "--tokenzier=byte"], ["unknown option --tokenzier: did you mean --tokenizer?"]),
    (["a.txt", "--out", "out", "--work", "2"], ["unknown option --work", "--workers"]),
    (["a.txt", "--out", "out", "--workers", "two"], ["--workers", "two"]),
    (["a.txt", "--out"], ["--out"]),
    (["a.txt", "--out", "out", "--workers", "0"], ["--workers"]),
    (["a.txt", "--out", "out", "--val_fraction", "0.51"], ["--val_fraction", "at most 0.5"]),
    (["a.txt", "--out", "out", "--val_fraction", "nan"], ["--val_fraction"]),
    (["a.txt", "--out", "out", "--tokenizer", "bite"], ["unknown tokenizer bite", "byte"]),
    (["empty", "--out", "out"], ["no files in empty"]),
    (["one", "--out", "out"], ["2 tokens of text are too few", "add more text"]),
    (["nothing.jsonl", "--out", "out"], ["no text"]),
    (["binary", "--out", "out"], ["no text", "1 files in folders were skipped"]),
    (["deep.jsonl", "--out", "out"], ["1 of 1 rows", "no valid text", "deep.jsonl:1: "]),
    (["a.txt", "--out", "full"], ["full already exists"]),
    (["a.txt", "--out", "a.txt"], ["a.txt already exists"]),
])
def test_bad_arguments(tmp_path, argv, words):
    (tmp_path / "a.txt").write_text("line\n" * 100)
    (tmp_path / "empty").mkdir()
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "rows.JSONL").write_text('{"text": "a"}\n')
    (tmp_path / "binary").mkdir()
    (tmp_path / "binary" / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    (tmp_path / "nothing.jsonl").write_text("")
    (tmp_path / "deep.jsonl").write_text("[" * 100_000 + "]" * 100_000)
    write_texts(tmp_path / "full", range(1))
    before = sorted(os.listdir(tmp_path))
    assert_refused(run(*argv, cwd=tmp_path), *words)
    assert sorted(os.listdir(tmp_path)) == before
    assert os.listdir(tmp_path / "full") == ["0.txt"]
    assert (tmp_path / "a.txt").read_text() == "line\n" * 100


def test_an_empty_output_folder_is_used_and_inputs_may_follow_options(tmp_path):
    (tmp_path / "out").mkdir()
    write_texts(tmp_path, range(80))
    names = [f"{i}.txt" for i in range(80)]
    result = run(*names[:40], "--out", "out", "--val_fraction", "0.5", *names[40:], cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert all_documents(str(tmp_path / "out")) == sorted(f"text number {i}\n" for i in range(80))


# ---- reading damaged folders


@pytest.fixture
def prepared(tmp_path):
    (tmp_path / "a.txt").write_text("line\n" * 100)
    prepare([str(tmp_path / "a.txt")], str(tmp_path / "out"))
    return tmp_path / "out"


def test_missing_folder_says_how_to_make_it(tmp_path):
    for read in (load_meta, lambda folder: open_tokens(folder, "train")):
        with pytest.raises(FileNotFoundError, match="data/prepare.py --out .*none"):
            read(str(tmp_path / "none"))


def test_missing_token_file(prepared):
    (prepared / "val.bin").unlink()
    with pytest.raises(FileNotFoundError, match="val.bin is missing: .*prepare.py again"):
        open_tokens(str(prepared), "val")


def test_truncated_token_file(prepared):
    os.truncate(prepared / "train.bin", 100)
    with pytest.raises(ValueError, match="train.bin is truncated .*prepare.py again"):
        open_tokens(str(prepared), "train")


@pytest.mark.parametrize("damage", [
    lambda whole: "",
    lambda whole: "{}",
    lambda whole: "[]",
    lambda whole: '{"dtype": "uint16"',
    lambda whole: '{"dtype": "nonsense"}',
    lambda whole: whole.replace('"tokenizer"', '"else"'),
    lambda whole: whole.replace('"sha256"', '"else"'),
])
def test_damaged_meta(prepared, damage):
    (prepared / "meta.json").write_text(damage((prepared / "meta.json").read_text()))
    with pytest.raises(ValueError, match="meta.json is damaged: .*prepare.py again"):
        load_meta(str(prepared))


def test_tokens_are_read_only(prepared):
    with pytest.raises(ValueError):
        open_tokens(str(prepared), "train")[0] = 1


def change_a_token(path, times=None):
    """Another valid token in the middle; the time of the last change is put back to `times`."""
    tokens = np.fromfile(path, np.uint16)
    tokens[len(tokens) // 2] = 7
    tokens.tofile(path)
    if times:
        os.utime(path, ns=times)


def times_of(path):
    status = path.stat()
    return status.st_atime_ns, status.st_mtime_ns


@pytest.mark.parametrize("split", ["train", "val"])
def test_what_has_changed_is_found(prepared, split):
    verify_tokens(str(prepared))
    change_a_token(prepared / f"{split}.bin")
    for _ in range(2):
        with pytest.raises(ValueError, match=f"{split}.bin has changed since it was prepared"):
            verify_tokens(str(prepared))


def test_tokens_are_read_once_and_when_asked(prepared):
    """What looks unchanged is not read, so it costs no time; --verify reads it."""
    change_a_token(prepared / "train.bin", times_of(prepared / "train.bin"))
    verify_tokens(str(prepared))
    assert_refused(run("--verify", prepared), "train.bin has changed since it was prepared")


def test_verify_of_a_whole_folder(prepared):
    (prepared / "verified.json").unlink()
    result = run("--verify", prepared)
    assert (result.returncode, result.stdout) == (0, f"{prepared} holds what was prepared\n")
    assert (prepared / "verified.json").is_file()


@pytest.mark.parametrize("stamp", ["", "{", "[]", "null", '{"train.bin": 1}', "\xff"])
def test_a_damaged_stamp_is_as_good_as_none(prepared, stamp):
    (prepared / "verified.json").write_bytes(stamp.encode("latin1"))
    change_a_token(prepared / "train.bin", times_of(prepared / "train.bin"))
    with pytest.raises(ValueError, match="train.bin has changed"):
        verify_tokens(str(prepared))


def test_a_copy_is_read_once(prepared, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in prepared.iterdir():
        shutil.copyfile(path, copy / path.name)
        os.utime(copy / path.name, (1, 1))
    assert json.loads((copy / "verified.json").read_text())["train.bin"][1] != 10**9
    verify_tokens(str(copy))
    change_a_token(copy / "train.bin", times_of(copy / "train.bin"))
    verify_tokens(str(copy))
    os.utime(copy / "train.bin", (2, 2))
    with pytest.raises(ValueError, match="train.bin has changed"):
        verify_tokens(str(copy))


def test_another_meta_is_another_folder(prepared):
    text = (prepared / "meta.json").read_text()
    (prepared / "meta.json").write_text(text.replace('"vocab_size": 257', '"vocab_size": 100'))
    with pytest.raises(ValueError, match="has the token 256, outside its vocabulary of 100"):
        verify_tokens(str(prepared))


def test_a_folder_that_cannot_be_written_is_read_each_time_and_says_so(prepared, capsys):
    (prepared / "verified.json").unlink()
    (prepared / "verified.json").mkdir()  # as if read-only: root may write everything
    for _ in range(2):
        verify_tokens(str(prepared))
        warning = capsys.readouterr().err.splitlines()[-1]
        assert "verified.json cannot be written" in warning and "each start reads all" in warning
    change_a_token(prepared / "train.bin")
    with pytest.raises(ValueError, match="train.bin has changed"):
        verify_tokens(str(prepared))
