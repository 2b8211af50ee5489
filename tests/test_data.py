"""What a user of data/prepare.py sees: the files it writes, and the one line it says when it cannot."""

import argparse
import gzip
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import tiktoken

from data import prepare as module
from data.prepare import map_threads, prepare
from data.tokens import load_meta, load_tokenizer, open_tokens

ROOT = Path(__file__).parent.parent


def read_back(folder, split):
    """The documents of a split, decoded."""
    meta, ids = load_meta(folder), open_tokens(folder, split)
    ends = np.flatnonzero(ids == meta["eot"])
    assert len(ids) == 0 or ends[-1] == len(ids) - 1, "the last document must end, too"
    starts = [0, *(ends[:-1] + 1)]
    return [load_tokenizer("byte").decode(ids[start:end].tolist()) for start, end in zip(starts, ends)]


def all_documents(folder):
    return sorted(read_back(folder, "train") + read_back(folder, "val"))


def write_texts(folder, numbers):
    folder.mkdir(parents=True, exist_ok=True)
    for i in numbers:
        (folder / f"{i}.txt").write_text(f"text number {i}\n")


def run(*argv, cwd=None, **env):
    return subprocess.run([sys.executable, ROOT / "data" / "prepare.py", *map(str, argv)], cwd=cwd,
                          env={**os.environ, **env}, capture_output=True, text=True, timeout=120)


def assert_refused(result, *words):
    assert result.returncode == 2, result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("prepare.py: error: "), result.stderr
    for word in words:
        assert word in lines[0]


# ---- tokenizers


@pytest.mark.parametrize("text", [
    "", "a", "plain\n", "\r\n\n\t \x0b\x0c\x1c\x85\u2028\u2029", "".join(map(chr, range(0x300))),
    "naïve 日本語 🤯 e\u0301\n" * 100, "x" * 100_000, "\n" * 1000, "<|endoftext|>", "a<|endoftext|>b",
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
    for name, urls in module.TOKENIZERS.items():
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


# ---- what is written


def test_meta_agrees_with_the_files(tmp_path):
    write_texts(tmp_path / "in", range(200))
    (tmp_path / "in" / "ü.txt").write_text("drei Bytes: €, literally <|endoftext|>\n")
    out = str(tmp_path / "out")
    meta = prepare([str(tmp_path / "in")], out)
    assert meta == load_meta(out)
    assert (meta["tokenizer"], meta["vocab_size"], meta["eot"], meta["dtype"]) == ("byte", 257, 256, "uint16")
    assert sorted(os.listdir(out)) == ["meta.json", "train.bin", "val.bin"]
    for split in ("train", "val"):
        texts, stored = read_back(out, split), Path(out, f"{split}.bin").read_bytes()
        assert meta[split]["documents"] == len(texts)
        assert meta[split]["bytes"] == sum(len(text.encode()) for text in texts)
        assert meta[split]["tokens"] == meta[split]["bytes"] + len(texts) == len(stored) // 2
        assert meta[split]["sha256"] == hashlib.sha256(stored).hexdigest()
    assert all_documents(out) == sorted(path.read_text() for path in (tmp_path / "in").iterdir())


def test_a_document_keeps_its_side_when_others_are_added(tmp_path):
    write_texts(tmp_path / "in", range(300))
    prepare([str(tmp_path / "in")], str(tmp_path / "one"))
    held_out = set(read_back(str(tmp_path / "one"), "val"))
    assert 3 < len(held_out) < 40  # 5% of 300
    write_texts(tmp_path / "in", range(300, 500))
    (tmp_path / "in").rename(tmp_path / "elsewhere")
    prepare([str(tmp_path / "elsewhere")], str(tmp_path / "two"))
    assert held_out <= set(read_back(str(tmp_path / "two"), "val"))
    assert not held_out & set(read_back(str(tmp_path / "two"), "train"))


def test_duplicates_and_empty_documents_are_dropped(tmp_path):
    write_texts(tmp_path / "in", range(100))
    write_texts(tmp_path / "in" / "copy", range(7))
    (tmp_path / "in" / "empty.txt").touch()
    meta = prepare([str(tmp_path / "in")], str(tmp_path / "out"))
    assert meta["dropped_documents"] == 8
    assert meta["train"]["documents"] + meta["val"]["documents"] == 100


def test_workers_do_not_change_the_output(tmp_path):
    with open(tmp_path / "a.jsonl", "w") as file:
        for i in range(3000):
            print(json.dumps({"text": f"{i} größer\n" * (i % 200)}), file=file)
    metas = [prepare([str(tmp_path / "a.jsonl")], str(tmp_path / str(n)), workers=n) for n in (1, 2)]
    assert metas[0] == metas[1] and metas[0]["train"]["bytes"] > 3 * module.PIECE


def test_single_file_holds_out_its_end_at_a_line(tmp_path):
    lines = [f"line {i}\n" for i in range(1000)]
    (tmp_path / "a.txt").write_text("".join(lines))
    out = str(tmp_path / "out")
    prepare([str(tmp_path / "a.txt")], out, val_fraction=0.1)
    (train,), (val,) = read_back(out, "train"), read_back(out, "val")
    assert train + val == "".join(lines) and train.endswith("\n")
    assert 0.1 <= len(val) / len(train + val) < 0.102


def test_a_few_files_hold_out_their_ends(tmp_path):
    texts = ["".join(f"line {i} of {name}\n" for i in range(1000)) for name in "abc"]
    (tmp_path / "in").mkdir()
    for name, text in zip("abc", texts):
        (tmp_path / "in" / f"{name}.txt").write_text(text)
    out = str(tmp_path / "out")
    prepare([str(tmp_path / "in")], out, val_fraction=0.01)
    assert [train + val for train, val in zip(read_back(out, "train"), read_back(out, "val"))] == texts
    assert all(0.01 <= len(val) / len(text) < 0.013 for val, text in zip(read_back(out, "val"), texts))


@pytest.mark.parametrize("text", ["x日本🤯é" * 300_000, "🤯" * 700_000, ("é" * 400_000 + "\r\n") * 5])
def test_large_texts_are_read_in_pieces(tmp_path, text):
    """Several MB with few or no line ends: no character is split, nothing is lost."""
    (tmp_path / "a.txt").write_bytes(text.encode())
    out = str(tmp_path / "out")
    meta = prepare([str(tmp_path / "a.txt")], out)
    assert read_back(out, "train")[0] + read_back(out, "val")[0] == text
    assert meta["train"]["bytes"] + meta["val"]["bytes"] == len(text.encode())
    with open(tmp_path / "a.txt", "rb") as file:
        pieces = list(module.read_pieces(file))
    assert len(pieces) > 2 and max(map(len, pieces)) <= module.PIECE
    assert "".join(piece.decode() for piece in pieces) == text


def test_reading_never_runs_far_ahead_of_writing():
    read = 0

    def items():
        nonlocal read
        for read in range(1, 101):
            yield read

    for written, result in enumerate(map_threads(lambda x: -x, items(), workers=3), start=1):
        assert result == -written and read - written <= 2 * 3


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


def test_glob(tmp_path):
    write_texts(tmp_path / "in" / "b", range(100))
    (tmp_path / "in" / "b" / "no.md").write_text("not this one")
    prepare([str(tmp_path / "in" / "*" / "*.txt")], str(tmp_path / "out"))
    assert len(all_documents(str(tmp_path / "out"))) == 100


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_jsonl_with_a_field(tmp_path, name):
    rows = [json.dumps({"body": f"größer {i}", "text": None}, ensure_ascii=i % 2 == 0) for i in range(100)]
    with (gzip.open if name.endswith(".gz") else open)(tmp_path / name, "wt", encoding="utf-8") as file:
        file.write("\n".join(rows) + "\n\n")
    prepare([str(tmp_path / name)], str(tmp_path / "out"), field="body")
    assert all_documents(str(tmp_path / "out")) == sorted(f"größer {i}" for i in range(100))


@pytest.fixture
def server(tmp_path):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=tmp_path / "www")

        def log_message(self, *args):
            pass

    (tmp_path / "www").mkdir()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_url_of_a_text(tmp_path, server):
    (tmp_path / "www" / "a.txt").write_text("".join(f"line {i}\n" for i in range(100)))
    meta = prepare([f"{server}/a.txt"], str(tmp_path / "out"))
    assert meta["sources"] == [f"{server}/a.txt"]
    assert "".join(read_back(str(tmp_path / "out"), "train")).startswith("line 0\nline 1\n")
    assert sorted(os.listdir(tmp_path / "out")) == ["meta.json", "train.bin", "val.bin"]


def test_url_of_a_jsonl_gz(tmp_path, server):
    with gzip.open(tmp_path / "www" / "a.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": f"text {i}"}) + "\n" for i in range(100))
    prepare([f"{server}/a.jsonl.gz?download=true"], str(tmp_path / "out"), val_fraction=0.2)
    assert len(all_documents(str(tmp_path / "out"))) == 100


def test_url_with_a_bad_status(tmp_path, server):
    assert_refused(run(f"{server}/none.txt", "--out", tmp_path / "out"), f"{server}/none.txt", "404")
    assert os.listdir(tmp_path) == ["www"]


def test_hugging_face_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"hf:some/name needs .* pip install '\.\[datasets\]'"):
        prepare(["hf:some/name"], str(tmp_path / "out"))
    assert os.listdir(tmp_path) == []


def test_hugging_face_data_set(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    with open(tmp_path / "set" / "train.jsonl", "w") as file:
        file.writelines(json.dumps({"story": f"text {i}"}) + "\n" for i in range(100))
    prepare([f"hf:{tmp_path / 'set'}"], str(tmp_path / "out"), field="story", val_fraction=0.2)
    assert all_documents(str(tmp_path / "out")) == sorted(f"text {i}" for i in range(100))


def test_default_is_the_standard_library_without_tests(tmp_path):
    result = run(cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    out = str(tmp_path / "data" / "stdlib")
    train, val = (read_back(out, split) for split in ("train", "val"))
    assert len(train) > 300 and len(val) > 10
    assert Path(argparse.__file__).read_text() in train + val
    assert Path(pytest.__file__).read_text() not in train + val
    assert "\nclass TestArgumentParsing(" not in "".join(train + val)
    folders = {part for source in module.find_sources([], tmp_path) for part in Path(source.key).parts}
    assert not folders & {"test", "tests", "idle_test", "site-packages", "dist-packages"}


# ---- bad input: one line, exit code 2, nothing left behind


@pytest.mark.parametrize("line, message", [
    ("{not json", "not valid JSON"), ('{"body": "x"}', "'text'"), ('{"text": 3}', "'text'"),
    ('["text"]', "'text'"), (r'{"text": "\ud800"}', "not valid Unicode"),
])
def test_a_bad_row_names_file_and_line_and_leaves_nothing(tmp_path, line, message):
    rows = [json.dumps({"text": f"text {i}"}) for i in range(200)]
    rows[99] = line
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    assert_refused(run("a.jsonl", "--out", "out", cwd=tmp_path), "error: a.jsonl:100: ", message)
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_an_interruption_leaves_nothing(tmp_path, monkeypatch):
    write_texts(tmp_path / "in", range(100))
    monkeypatch.setattr(module, "encode", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prepare([str(tmp_path / "in")], str(tmp_path / "out"))
    assert os.listdir(tmp_path) == ["in"]


def test_damaged_gzip(tmp_path):
    whole = gzip.compress("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(1000)).encode())
    truncated, garbled = whole[: len(whole) // 2], whole[:100] + b"\xff" * 50 + whole[150:]
    for i, damaged in enumerate([truncated, garbled, b"not gzip"]):
        (tmp_path / f"{i}.jsonl.gz").write_bytes(damaged)
        assert_refused(run(tmp_path / f"{i}.jsonl.gz", "--out", tmp_path / "out"), f"{i}.jsonl.gz", "damaged")


@pytest.mark.parametrize("content", [b"caf\xe9\n" * 100, "wide".encode("utf-16"), b"a\n" * 5000 + bytes(9)])
def test_a_named_file_must_be_text(tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    assert_refused(run(tmp_path / "a.txt", "--out", tmp_path / "out"), "a.txt is not UTF-8 text")
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file(tmp_path):
    write_texts(tmp_path / "in", range(50))
    (tmp_path / "in" / "7.txt").chmod(0)
    assert_refused(run(tmp_path / "in", "--out", tmp_path / "out"), "7.txt: Permission denied")


@pytest.mark.parametrize("argv, words", [
    (["none.txt", "--out", "out"], ["none.txt"]),
    (["*.none", "--out", "out"], ["no files in *.none"]),
    (["a.txt"], ["--out"]),
    (["a.txt", "--otu", "out"], ["unknown option --otu: did you mean --out?"]),
    (["a.txt", "--tokenzier=byte"], ["unknown option --tokenzier: did you mean --tokenizer?"]),
    (["a.txt", "--out", "out", "--work", "2"], ["unknown option --work", "--workers"]),
    (["a.txt", "--out", "out", "--workers", "two"], ["--workers", "two"]),
    (["a.txt", "--out"], ["--out"]),
    (["a.txt", "--out", "out", "--workers", "0"], ["--workers"]),
    (["a.txt", "--out", "out", "--val_fraction", "1"], ["--val_fraction"]),
    (["a.txt", "--out", "out", "--tokenizer", "bite"], ["unknown tokenizer bite", "byte"]),
    (["empty", "--out", "out"], ["no files in empty"]),
    (["two", "--out", "out", "--val_fraction", "1e-9"], ["val split would be empty", "raise --val_fraction"]),
    (["nothing.jsonl", "--out", "out"], ["(documents in all: 0): add text"]),
    (["deep.jsonl", "--out", "out"], ["deep.jsonl:1: not valid JSON"]),
    (["a.txt", "--out", "full"], ["full already exists"]),
    (["a.txt", "--out", "a.txt"], ["a.txt already exists"]),
])
def test_bad_arguments(tmp_path, argv, words):
    (tmp_path / "a.txt").write_text("line\n" * 100)
    (tmp_path / "empty").mkdir()
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "rows.JSONL").write_text('{"text": "a"}\n{"text": "b"}\n')
    (tmp_path / "nothing.jsonl").write_text("")
    (tmp_path / "deep.jsonl").write_text("[" * 100_000 + "]" * 100_000)
    write_texts(tmp_path / "full", range(1))
    before = sorted(os.listdir(tmp_path))
    assert_refused(run(*argv, cwd=tmp_path), *words)
    assert sorted(os.listdir(tmp_path)) == before
    assert os.listdir(tmp_path / "full") == ["0.txt"] and (tmp_path / "a.txt").read_text() == "line\n" * 100


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
