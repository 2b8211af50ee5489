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
import shutil
import signal
import sys
import threading
import tomllib
import tracemalloc
import types
from array import array
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tiktoken

from data import documents
from data import prepare as module
from data.documents import Document, LeftOut, drop_duplicates, find_sources
from data.prepare import main, map_threads, prepare
from data.split import SEQUENCE, find_cut, hold_out
from data.tokens import (
    TOKENIZERS,
    load_meta,
    load_tokenizer,
    open_tokens,
    token_dtype,
    verify_tokens,
)
from tests.runs import ROOT, change_token, contents, limit_files, run_process


def write(path, content):
    """Write text or bytes, and make the folders above them."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def write_texts(folder, numbers):
    for i in numbers:
        write(f"{folder}/{i}.txt", f"text number {i}\n")


def read_back(split, folder="out"):
    """The documents of a split, decoded."""
    meta, ids = load_meta(folder), open_tokens(folder, split)
    ends = np.flatnonzero(ids == meta["eot"])
    assert len(ids) == 0 or ends[-1] == len(ids) - 1, "the last document must end, too"
    starts = [0, *(ends[:-1] + 1)]
    decode = load_tokenizer("byte").decode
    return [decode(ids[start:end].tolist()) for start, end in zip(starts, ends, strict=True)]


def all_documents():
    return sorted(read_back("train") + read_back("val"))


def both_parts():
    """What train and val have of a single document, of which the end is held out."""
    (train,), (val,) = read_back("train"), read_back("val")
    return train, val


def n_tokens():
    meta = load_meta("out")
    return meta["train"]["tokens"], meta["val"]["tokens"]


def assert_refused(done, *words):
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("prepare.py: error: ")
    for word in words:
        assert word in line


# ---- what is written


def test_meta_agrees_with_the_files(strict_disk):
    write_texts("in", range(200))
    write("in/ü.txt", "drei Bytes: €, literally <|endoftext|>\n")
    meta = prepare(["in"], "out")
    assert meta == load_meta("out")
    assert (meta["tokenizer"], meta["dtype"]) == ("byte", "uint16")
    assert (meta["vocab_size"], meta["eot"]) == (257, 256)
    assert sorted(os.listdir("out")) == ["meta.json", "train.bin", "val.bin", "verified.json"]
    for split in ("train", "val"):
        texts, stored = read_back(split), Path("out", f"{split}.bin").read_bytes()
        assert meta[split]["documents"] == len(texts)
        assert meta[split]["bytes"] == sum(len(text.encode()) for text in texts)
        assert meta[split]["tokens"] == meta[split]["bytes"] + len(texts) == len(stored) // 2
        assert meta[split]["sha256"] == hashlib.sha256(stored).hexdigest()
    assert all_documents() == sorted(path.read_text() for path in Path("in").iterdir())


def test_duplicates_and_empty_documents_are_dropped():
    write_texts("in", range(100))
    write_texts("in/copy", range(7))
    write("in/empty.txt", "")
    write_rows("in/rows.jsonl", ["new", "text number 3\n", "", "new"])
    meta = prepare(["in"], "out")
    assert meta["dropped_documents"] == 11
    assert meta["train"]["documents"] + meta["val"]["documents"] == 101


def test_the_script_says_what_it_has_done(capsys):
    write_texts("in", range(100))
    write_texts("in/copy", range(7))
    write("in/a.png", PNG)
    write("in/b.png", PNG)
    write("in/rows.jsonl", rows_with(["{}"], 200))
    write("in/z.csv", "a,b\n1,2\n")
    main(["in", "--out", "out"])
    *counts, skipped, examples, wrote = capsys.readouterr().out.splitlines()
    meta = load_meta("out")
    for split, line in zip(("train", "val"), counts, strict=True):
        n = meta[split]
        assert line == (f"{split}: {n['documents']} documents, {n['tokens']:,} byte tokens,"
                        f" {n['bytes']:,} bytes of text")
    assert skipped.startswith("skipped 3 files without text and 1 bad rows; dropped 7 duplicate")
    which = "'in/a.png': not UTF-8 text; 'in/z.csv': no text in the field 'text' (it has a, b)"
    assert examples.startswith(f"skipped are, for example, {which}; in/rows.jsonl:")
    assert wrote == "wrote out"


def test_workers_do_not_change_the_output():
    write_rows("a.jsonl", [f"{i} größer\n" * (i % 200) for i in range(3000)])
    metas = [prepare(["a.jsonl"], f"out-{n}", workers=n) for n in (1, 2)]
    assert metas[0] == metas[1] and metas[0]["train"]["bytes"] > 3 * documents.PIECE


@pytest.mark.parametrize("text", ["x日本🤯é" * 300_000, ("é" * 400_000 + "\r\n") * 5])
def test_large_texts_are_read_in_pieces(text):
    """Several MB with few or no line ends: no character is split, nothing is lost."""
    write("a.txt", text)
    prepare(["a.txt"], "out")
    assert "".join(both_parts()) == text
    with open("a.txt", "rb") as file:
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


def test_an_empty_output_folder_is_used_and_inputs_may_follow_options():
    os.mkdir("out")
    write_texts(".", range(80))
    files = [f"{i}.txt" for i in range(80)]
    main([*files[:40], "--out", "out", "--val_fraction", "0.5", *files[40:]])
    assert all_documents() == sorted(f"text number {i}\n" for i in range(80))


# ---- what is held out


def prose(seed, size):
    """`size` bytes of lines of words."""
    draw = random.Random(seed)
    words = [str(draw.randrange(10**5, 10**6)) for _ in range(size // 6 + 1)]
    return "".join(word + draw.choice("     \n") for word in words)[: size - 1] + "\n"


def test_a_document_keeps_its_side_when_others_are_added():
    for i in range(300):
        write(f"in/{i}.txt", prose(i, 300))
    prepare(["in"], "one")
    held_out = set(read_back("val", "one"))
    assert 5 < len(held_out) < 30  # 5% of 300
    for i in range(300, 500):
        write(f"in/a{i}.txt", prose(i, 300))
    Path("in").rename("elsewhere")
    prepare(["elsewhere"], "two")
    assert held_out < set(read_back("val", "two"))
    assert not held_out & set(read_back("train", "two"))


def test_of_many_documents_none_changes_its_side():
    draw = np.random.default_rng(0)
    digests = draw.integers(0, 2**64, 3000, dtype=np.uint64)
    ends = np.cumsum(draw.integers(100, 500, 3000))
    sides = [ends[:n] > hold_out(None, ends[:n], digests[:n], 0.05, None)
             for n in range(300, 3000, 7)]
    assert all((small == large[: len(small)]).all() for small, large in pairwise(sides))


@pytest.mark.parametrize("names, val_fraction", [("a", 0.1), ("abc", 0.01)])
def test_of_a_few_files_the_ends_are_held_out_from_a_line_on(names, val_fraction):
    texts = ["".join(f"line {i} of {name}\n" for i in range(9000)) for name in names]
    for name, text in zip(names, texts, strict=True):
        write(f"in/{name}.txt", text)
    prepare(["in"], "out", val_fraction=val_fraction)
    parts = list(zip(read_back("train"), read_back("val"), strict=True))
    assert [train + val for train, val in parts] == texts
    for train, val in parts:
        assert train.endswith("\n")
        assert val_fraction <= len(val) / len(train + val) < val_fraction + 0.003


@pytest.mark.parametrize("sizes", [
    [50_000], [10**6, 30, 30, 30], [2100], [4] * 900, [699, 680, 680],
])
def test_both_sides_train_a_context_of_1024_if_there_is_text_for_it(sizes):
    write_rows("a.jsonl", [prose(i, size) for i, size in enumerate(sizes)])
    prepare(["a.jsonl"], "out")
    train, val = n_tokens()
    assert min(train, val) >= SEQUENCE and val <= max(2 * SEQUENCE, 0.1 * (train + val))


def test_a_text_shorter_than_two_sequences_says_which_context_it_allows(capsys):
    write("a.txt", prose(1, 1500))
    main(["a.txt", "--out", "out"])
    train, val = n_tokens()
    assert 375 <= val < 450 < train
    advice = f"with so little text, train.py needs --block_size {val - 1} or less"
    assert advice in capsys.readouterr().err


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


PNG = b"\x89PNG\r\n\x1a\n" + bytes(100)


@pytest.mark.parametrize("name, content", [
    ("picture.png", PNG), ("empty.txt", b""), ("0.txt", b"caf\xe9"),
    ("uncopied.txt", prose(0, 30_000)), ("rows.jsonl", '{"no": "text"}\n'),
    ("a.tar.gz", gzip.compress(PNG, mtime=0)),
])
def test_what_is_no_document_does_not_count_when_sides_are_chosen(name, content):
    """Whatever stands beside three texts, about 5% are held out, and the texts are all there."""
    for i in range(3):
        write(f"in/text{i}.txt", prose(i, 30_000))
    write(f"in/{name}", content)
    meta = prepare(["in"], "out")
    assert meta["skipped_files"] + meta["dropped_documents"] == 1
    train, val = n_tokens()
    assert 0.05 <= val / (train + val) < 0.08
    parts = zip(read_back("train"), read_back("val"), strict=True)
    assert [a + b for a, b in parts] == [prose(i, 30_000) for i in range(3)]


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


@pytest.mark.parametrize("line", ["🤯é" * 20_000, "é" * 40_000 + "\n"])
def test_a_far_line_end_is_no_place_to_cut(line):
    """A licence line and a line of the whole rest: cut between characters, at 95%."""
    text = "Licence: you may use this.\n" + line
    write("a.txt", text)
    prepare(["a.txt"], "out")
    train, val = both_parts()
    assert train + val == text
    assert 0.05 <= len(val.encode()) / len(text.encode()) < 0.051


@pytest.mark.parametrize("share", [0.5, 0.251, 0.101, 0.05, 0.049, 0.02])
def test_no_cut_is_inside_a_character(share):
    text = np.frombuffer("🤯".encode() * 50, np.uint8)
    cut = find_cut(text, share, 0, load_tokenizer("byte"))
    assert cut % 4 == 0 and 0 <= len(text) * (1 - share) - cut < 5
    assert find_cut(text[:4], share, 0, load_tokenizer("byte")) == 5  # too short: not cut


def test_a_cut_at_the_end_of_a_block_of_the_file():
    """95% of this text are 2**20 bytes of tokens: nothing of the rest is in the reader's buffer."""
    text = "0123456789" * 55_188 + "abc"
    write("a.txt", text)
    prepare(["a.txt"], "out")
    train, val = both_parts()
    assert len(train) == 2**19 and train + val == text


def make_bpe():
    """A tokenizer with tokens of many bytes, of line ends, and of parts of characters."""
    merges = ["\n\n".encode(), "日".encode()[:2], "日".encode(), b"ab", b"abab", b"b\n"]
    ranks = {bytes([byte]): byte for byte in range(256)}
    ranks |= {token: 256 + i for i, token in enumerate(merges)}
    return tiktoken.Encoding("bpe", pat_str="(?s:.+)", mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": 300})


@pytest.mark.parametrize("text", ["abababa\n\n" * 3000, "日本é" * 9000, "a日\n" * 9000])
def test_tokens_of_many_bytes_are_cut_and_counted(monkeypatch, text):
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: make_bpe())
    write("a.txt", text)
    meta = prepare(["a.txt"], "out", tokenizer="gpt2")
    ids = {split: open_tokens("out", split).tolist() for split in ("train", "val")}
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


def test_folder_skips_hidden_files_and_counts_what_is_not_text(capsys):
    write_texts("in/deep/er", range(100))
    write_texts("in/.git", [1000])
    write("in/.hidden", "hidden")
    write("in/latin1.txt", b"caf\xe9")
    write("in/zeros.bin", bytes(100))
    main(["in", "--out", "out"])
    assert "skipped 2 files" in capsys.readouterr().out
    assert all_documents() == sorted(f"text number {i}\n" for i in range(100))


def test_files_come_in_the_same_order_on_every_disk():
    for name in random.Random(0).sample(range(100, 200), 50):
        write_texts(f"in/{name}", [2, 1])
    paths = list(documents.find_files("in"))
    assert len(paths) == 100 and paths == sorted(paths)


def test_links_to_folders_are_followed_and_circles_end():
    write_texts("other/deep", range(100, 150))
    write_texts("in/b", range(50))
    links = {"in/a": "other", "in/again": "other", "in/b/one": "in", "in/b/two": "in/b",
             "other/deep/back": "in", "in/file.txt": "in/b/7.txt", "in/nowhere": "none"}
    for link, target in links.items():
        Path(link).symlink_to(Path(target).absolute())
    Path("in/itself").symlink_to("itself")
    os.mkfifo("in/pipe")
    meta = prepare(["in"], "out")
    assert meta["dropped_documents"] == 1  # the link to a file: each folder was walked once
    numbers = [*range(50), *range(100, 150)]
    assert all_documents() == sorted(f"text number {i}\n" for i in numbers)


def test_the_characters_of_a_pattern_may_be_in_a_name():
    write_texts("in?", range(100))
    write("in?/a[1]*.txt", "a name with the characters of a pattern\n")
    prepare(["in?", "in?/a[1]*.txt"], "out")
    assert len(all_documents()) == 101


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
    path = Path(path)
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
    write(path, pack(path.name, file.getvalue().encode()))


def place(ending, inside, server):
    """What names www/a<ending>: itself, its folder, or its address."""
    return {"named": f"www/a{ending}", "folder": "www", "url": f"{server}/a{ending}"}[inside]


@pytest.mark.parametrize("ending", [
    ".jsonl", ".ndjson", ".json", ".csv", ".parquet", ".csv.gz", ".jsonl.zst", ".NdJson.GZ",
    ".Parquet", ".Jsonl.ZST",
])
@pytest.mark.parametrize("inside", ["named", "folder", "url"])
def test_files_of_rows(server, ending, inside):
    write_rows(f"www/a{ending}", TEXTS, "body")
    path = place(ending, inside, server.replace("http", "HTTP"))
    query = "?download=1" if inside == "url" else ""
    write("www/b.txt", "plain text\n")  # --field does not forbid it
    prepare([path + query, "www/b.txt"], "out", field="body")
    assert all_documents() == sorted([*TEXTS, "plain text\n"])


@pytest.mark.parametrize("ending", [".txt", ".TXT.GZ", ".txt.zst", "", ".jsonl.txt"])
@pytest.mark.parametrize("inside", ["named", "folder", "url"])
def test_files_of_text(server, ending, inside):
    text = '{"text": "this is a line, not a row"}\n' * 100
    write(f"www/a{ending}", pack(ending, text.encode()))
    path = place(ending, inside, server)
    assert prepare([path], "out")["sources"] == [path]
    assert "".join(both_parts()) == text


@pytest.mark.parametrize("ending", [".parquet", ".txt.zst", ".jsonl.ZST"])
def test_a_missing_package_is_named_before_anything_is_read(monkeypatch, ending):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setattr(module, "write_tokens", None)
    write_texts("in", range(3))
    write(f"in/a{ending}", b"")
    message = r"a\.\S+ needs the package pyarrow.* pip install '\.\[datasets\]'"
    with pytest.raises(ValueError, match=message):
        prepare(["in"], "out")


def test_a_folder_of_code_with_files_of_other_rows(capsys):
    write_texts("in", range(100))
    write("in/package.json", '{\n  "name": "x"\n}\n')
    write("in/table.csv", "a,b\n1,2\n")
    write("in/empty.jsonl", "")
    write("in/log.jsonl", '{"step": 1}\n' * 5000)
    main(["in", "--out", "out"])
    assert "skipped 4 files without text and 0 bad rows" in capsys.readouterr().out
    assert len(all_documents()) == 100
    write("in/log.jsonl", '{"step": 1}\n' * 99 + '{"text": "one of 100"}\n')
    with pytest.raises(ValueError, match="11 of 11 rows, more than 1%, have no valid text"):
        prepare(["in"], "again")


def test_what_a_csv_may_hold():
    """A byte order mark, a very long field, line ends of Windows, and a row that is not UTF-8."""
    rows = [f"row {i}, " * 3000 for i in range(100)]
    texts = ["a line\n" * 20_000, "in a\r\nfield", 'a "quote"', *rows]
    quoted = [text.replace('"', '""') for text in texts]
    rows = ["text,id", *(f'"{text}",{i}' for i, text in enumerate(quoted)), ""]
    content = "\r\n".join(rows).encode("utf-8-sig") + b"caf\xe9,2\r\n"
    write("a.csv", content)
    meta = prepare(["a.csv"], "out")
    assert meta["skipped_rows"] == 1
    assert all_documents() == sorted(texts)


def test_a_csv_with_two_columns_of_text_is_refused():
    write("in/a.csv", "text,id,text\na,1,b\n")
    with pytest.raises(ValueError, match="^in/a.csv has 2 columns named 'text': rename"):
        prepare(["in"], "out")


def test_a_csv_without_text_may_hold_any_quotes():
    """In a folder it is skipped, and does not stop the others."""
    write_texts("in", [1, 2])
    write("in/a.csv", b'name,note\nx,"a"b\ny,"z\n')
    assert prepare(["in"], "out")["skipped_files"] == 1


@pytest.mark.parametrize("bad", [r'"He said \"hi, you\" there"', '"one "two"\nthree, four"'])
def test_a_csv_with_a_wrong_quote_is_damaged(bad):
    """Python would read the first text as: He said \\hi. After it, rows may begin anywhere."""
    rows = ["id,body", *(f'{i},"row ""{i}"""' for i in range(200))]
    write("a.csv", "\n".join([*rows[:50], f"50,{bad}", *rows[50:]]))
    with pytest.raises(ValueError, match="a.csv is damaged, .*: line 51: .* expected after"):
        prepare(["a.csv"], "out", field="body")


def test_a_row_of_csv_with_a_comma_too_many_is_a_bad_row():
    """Else its text would end at the comma. A comma at the end of a row cuts nothing."""
    rows = ["id,text", *(f"{i},row {i}" + "," * (i % 2) for i in range(202))]
    rows[-2] += ", and more"
    write("a.csv", "\n".join(rows))
    meta = prepare(["a.csv"], "out")
    assert meta["skipped_rows"] == 1
    assert all_documents() == sorted(f"row {i}" for i in {*range(202)} - {200})


def test_a_quote_that_never_closes_does_not_swallow_rows():
    rows = ["text", *(f"row {i}" for i in range(200))]
    write("a.csv", "\n".join([*rows, '"open', *rows]))
    with pytest.raises(ValueError, match="a.csv is damaged, .*: unexpected end of data"):
        prepare(["a.csv"], "out")


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".parquet"])
def test_an_error_shows_which_fields_there_are(ending, run_here):
    write_rows(f"a{ending}", TEXTS, "story")
    done = run_here(main, f"a{ending}", "--out", "out")
    assert_refused(done, "11 of 11 rows", "'text'", "--field", f"a{ending}:", "story")


BAD_ROWS = [
    "{not json", "{}", '{"text": null}', '{"body": "x"}', '{"text": 3}', '["text"]', "text", "7",
    r'{"text": "\ud800"}', "[" * 100_000 + "]" * 100_000, "caf\udce9", '{"text": ["a"]}',
    r'{"text": "a\u0000"}',
]


def rows_with(bad, n):
    """n rows, of which the last are the bad ones."""
    rows = [*(json.dumps({"text": f"text {i}"}) for i in range(n - len(bad))), *bad]
    return "\n".join(rows).encode(errors="surrogateescape")


def test_bad_rows_are_skipped_and_counted(capsys):
    write("a.jsonl", rows_with(BAD_ROWS, 1300))
    main(["a.jsonl", "--out", "out"])
    output = capsys.readouterr().out
    assert " 13 bad rows" in output and "skipped are, for example, a.jsonl:" in output
    assert load_meta("out")["skipped_rows"] == 13
    assert len(all_documents()) == 1287


@pytest.mark.parametrize("bad", BAD_ROWS)
def test_many_bad_rows_are_an_error_that_shows_three(bad, run_here):
    write("a.jsonl", rows_with([bad] * 4, 399))
    done = run_here(main, "a.jsonl", "--out", "out")
    assert_refused(done, "4 of 399 rows", "'text'", "--field", "a.jsonl:396: ", "a.jsonl:397: ",
                   f"a.jsonl:398: b'{bad[:5]}" if bad.isascii() else "caf\\xe9")
    assert "a.jsonl:399" not in done.stderr and len(done.stderr) < 1000
    assert os.listdir() == ["a.jsonl"]


def test_bad_rows_are_counted_over_all_files():
    for i in range(10):
        rows = rows_with(["{}"] if i == 5 else [], 50)
        write(f"in/{i}.jsonl", rows.replace(b"text ", f"text {i} ".encode()))
    meta = prepare(["in"], "out")
    assert meta["skipped_rows"] == 1 and len(all_documents()) == 499


def test_a_json_file_that_is_one_list_is_refused_with_a_hint(run_here):
    write("a.json", '[\n  {"text": "a"},\n  {"text": "b"}\n]\n')
    done = run_here(main, "a.json", "--out", "out")
    assert_refused(done, "3 of 4 rows", "of JSON each line is a row")


@pytest.fixture
def server():
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory="www")

        def end_headers(self):  # some servers take a packed file for a packed answer
            asked = "gzip" in self.headers["Accept-Encoding"] or "unasked" in self.path
            packed = ".gz" in self.path and asked
            if packed:
                self.send_header("Content-Encoding", "gzip")
            super().end_headers()

        def log_message(self, *args):
            pass

    os.mkdir("www")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_packed_file_is_unpacked_once_whatever_the_server_says(server):
    Path("www/unasked.txt.gz").write_bytes(gzip.compress(b"some text\n" * 300))
    prepare([f"{server}/unasked.txt.gz"], "out")
    assert b"".join(text.encode() for text in all_documents()) == b"some text\n" * 300


def test_url_with_a_bad_status(server):
    with pytest.raises(OSError, match=f"{server}/none.txt.*404|404.*{server}/none.txt"):
        prepare([f"{server}/none.txt"], "out")
    assert os.listdir() == ["www"]


def test_hugging_face_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"hf:some/name needs .* pip install '\.\[datasets\]'"):
        prepare(["hf:some/name"], "out")
    assert os.listdir() == []


def test_hugging_face_data_set():
    pytest.importorskip("datasets")
    configs = ""
    for name in ("one", "two"):
        write_rows(f"set/{name}.jsonl", [f"{name} {i}" for i in range(100)], "story")
        configs += f"- config_name: {name}\n  data_files: {name}.jsonl\n"
    write("set/README.md", f"---\nconfigs:\n{configs}---\n")
    prepare(["hf:set:two"], "out", field="story", val_fraction=0.2)
    assert all_documents() == sorted(f"two {i}" for i in range(100))


def test_default_is_the_standard_library_without_tests():
    main([])
    texts = read_back("train", "data/stdlib"), read_back("val", "data/stdlib")
    assert len(texts[0]) > 300 and len(texts[1]) > 10
    texts = texts[0] + texts[1]
    assert Path(argparse.__file__).read_text() in texts
    assert Path(pytest.__file__).read_text() not in texts
    assert "\nclass TestArgumentParsing(" not in "".join(texts)
    root = Path(argparse.__file__).parent
    paths = [source.path.relative_to(root) for source in find_sources([], "text", Path("none"))]
    excluded = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    assert paths and not any(excluded & set(path.parts) for path in paths)


@pytest.mark.parametrize("spec, message", [
    ("hf:", "hf: names no data set"), ("hf:/", "hf:/ names no data set"),
    ("hf:scripted", "cannot read the train split of hf:scripted: .*cripts"),
    ("hf:empty", "cannot read the train split of hf:empty"),
    ("hf:only_test", "cannot read the train split of hf:only_test: .*train"),
    ("hf:damaged", "cannot read the train split of hf:damaged: "),
])
def test_a_data_set_that_cannot_be_read(monkeypatch, spec, message):
    pytest.importorskip("datasets")
    os.mkdir("empty")
    write("scripted/scripted.py", "raise SystemExit('code of a data set ran')")
    write("only_test/test.jsonl", '{"text": "not the train split"}')
    write("damaged/train.jsonl", rows_with([], 10_000) + b'{"text": ')
    write_texts("in", [1])
    if spec != "hf:damaged":
        monkeypatch.setattr(module, "write_tokens", None)  # no input before it has been read
    with pytest.raises(ValueError, match=message):
        prepare(["in", spec], "out")
    assert sorted(os.listdir()) == ["damaged", "empty", "in", "only_test", "scripted"]


def test_rows_of_a_data_set_are_read_one_at_a_time():
    read = []
    rows = ((i, read.append(i) or {"text": "some"}) for i in range(200))
    source = documents.Source("hf:some", None, rows)
    assert next(documents.read_rows(source, "text", LeftOut())).name == "hf:some:0"
    assert read == [0]


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


# ---- bad input: one line, exit code 2, nothing left behind


def test_an_interruption_leaves_nothing(monkeypatch):
    write_texts("in", range(100))
    monkeypatch.setattr(module, "encode", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prepare(["in"], "out")
    assert os.listdir() == ["in"]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_kill_and_a_closed_terminal_leave_nothing(name, monkeypatch):
    write_texts("in", range(100))
    number, split = getattr(signal, name), module.split_tokens

    def split_later(*args):
        signal.raise_signal(number)
        return split(*args)

    monkeypatch.setattr(module, "split_tokens", split_later)
    before = signal.signal(number, lambda *_: None)  # this test must outlive the signal
    try:
        own = signal.getsignal(number)
        with pytest.raises(SystemExit) as end:
            prepare(["in"], "out")
        assert end.value.code == 128 + number
        assert os.listdir() == ["in"]
        assert signal.getsignal(number) is own
        signal.signal(number, signal.SIG_IGN)  # as nohup does with SIGHUP
        prepare(["in"], "out")
        assert sorted(os.listdir()) == ["in", "out"]
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("ending", [".jsonl.gz", ".jsonl.zst", ".txt.gz", ".txt.zst", ".parquet"])
@pytest.mark.parametrize("folder", [False, True], ids=["named", "in a folder"])
def test_a_damaged_file_is_named(ending, folder):
    path = f"in/a{ending}"
    os.mkdir("in")
    write_rows(path, [f"text {i}" for i in range(1000)])
    whole = Path(path).read_bytes()
    contents = [whole[: len(whole) // 2], b"not what it is called"]
    if ".zst" not in ending:  # pyarrow writes no checksums there, zstd does
        contents.append(whole[:100] + b"\xff" * 50 + whole[150:])
    for damaged in contents:
        write(path, damaged)
        with pytest.raises(ValueError, match=rf"a\{ending} is damaged, fetch it again"):
            prepare(["in" if folder else path], "out")
    assert os.listdir() == ["in"]


@pytest.mark.parametrize("ending", [".txt.gz", ".txt.zst", ".parquet"])
def test_a_files_name_may_hold_any_bytes(ending):
    pytest.importorskip("pyarrow")
    os.mkdir("in")
    write_rows(f"a{ending}", ["some text\n" * 300, "more\n" * 300])
    os.rename(f"a{ending}", os.fsdecode(b"in/\xff") + ending)
    assert prepare(["in"], "out")["skipped_files"] == 0


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_packed_parquet_file_is_not_called_damaged(ending):
    write(f"in/a.parquet{ending}", b"")
    with pytest.raises(ValueError, match=rf"a.parquet\{ending} is packed twice.*: unpack it"):
        prepare(["in"], "out")


def test_a_file_that_zstd_packed_with_long_is_not_called_damaged():
    pytest.importorskip("pyarrow")
    # A frame of zstd that asks for a window of 2 GiB, and holds "hello" as it is.
    write("a.txt.zst", bytes.fromhex("28b52ffd 00 a8 290000") + b"hello")
    with pytest.raises(ValueError, match="a.txt.zst was packed with zstd --long"):
        prepare(["a.txt.zst"], "out")


@pytest.mark.parametrize("reading", [1, 2])
def test_a_disk_that_fails_is_not_called_a_damaged_file(reading, monkeypatch):
    """A file of text is read twice."""
    read, started = documents.read_pieces, []

    def fail(stream):
        started.append(stream)
        yield from read(stream)
        if len(started) == reading:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(documents, "read_pieces", fail)
    write_texts("in", [1])
    with pytest.raises(OSError, match="Input/output error") as error:
        prepare(["in"], "out")
    assert error.value.filename == "in/1.txt"


def test_a_file_that_is_cut_while_it_is_read_is_named(monkeypatch):
    """Between its two readings."""
    write("a.txt.gz", gzip.compress(b"some text\n" * 1000))
    check = documents.check_text

    def cut(pieces):
        yield from check(pieces)
        os.truncate("a.txt.gz", 30)

    monkeypatch.setattr(documents, "check_text", cut)
    with pytest.raises(ValueError, match="a.txt.gz is damaged, fetch it again"):
        prepare(["a.txt.gz"], "out")


@pytest.mark.parametrize("n_lines", [30, 5000], ids=["meta.json", "train.bin"])
def test_a_full_disk_is_one_line_and_leaves_nothing(n_lines, run_here):
    """The line names the folder. 30 lines are 302 bytes of tokens, meta.json has some 500."""
    write("a.txt", "line\n" * n_lines)
    with limit_files(400):
        done = run_here(main, "a.txt", "--out", "out")
    assert_refused(done, "error: out: File too large")
    assert os.listdir() == ["a.txt"]


@pytest.mark.parametrize("content", [
    b"caf\xe9\n" * 100, "wide".encode("utf-16"), b"a\n" * 5000 + bytes(9),
])
def test_a_named_file_must_be_text(content):
    write("a.txt", content)
    with pytest.raises(ValueError, match="a.txt is not UTF-8 text"):
        prepare(["a.txt"], "out")
    assert os.listdir() == ["a.txt"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read all")
def test_an_unreadable_file(run_here):
    write_texts("in", range(50))
    Path("in/7.txt").chmod(0)
    assert_refused(run_here(main, "in", "--out", "out"), "7.txt: Permission denied")


@pytest.mark.parametrize("argv, words", [
    (["none.txt", "--out", "out"], ["none.txt"]),
    (["*.txt", "--out", "out"], ["no such input: '*.txt'", "pattern", "kept it from the shell"]),
    (["none[1].txt", "--out", "out"], ["no such input: 'none[1].txt'", "pattern"]),
    (["one", "--out", "out", "--field", ""], ["no text", "1 files in folders"]),
    (["a.txt", "--out", "out", "--field", "text"], ["--field text is for rows", "leave it out"]),
    (["--verify", "full", "--out", "out"], ["--verify FOLDER", "nothing else"]),
    (["--verify", "none"], ["no prepared data in none: run python data/prepare.py --out none"]),
    (["--verify", "full"], ["full holds no prepared data", "data/prepare.py full --out data/mine"]),
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
    (["a.txt", "--out", "out", "--tokenizer", "gtp2"], ["tokenizer gtp2: did you mean gpt2?"]),
    (["a.txt", "--out", "out", "--tokenizer", "own"], ["choose from byte, gpt2,", "a tokenizer."]),
    (["empty", "--out", "out"], ["no files in empty"]),
    (["one", "--out", "out"], ["2 tokens of text are too few", "add more text"]),
    (["nothing.jsonl", "--out", "out"], ["no text"]),
    (["binary", "--out", "out"],
     ["no text", "1 files in folders were skipped ('binary/a.png': not UTF-8 text)"]),
    (["deep.jsonl", "--out", "out"], ["1 of 1 rows", "no valid text", "deep.jsonl:1: "]),
    (["a.txt", "--out", "full"], ["full already exists"]),
    (["a.txt", "--out", "a.txt"], ["a.txt already exists"]),
])
def test_bad_arguments(argv, words, run_here):
    write("a.txt", "line\n" * 100)
    os.mkdir("empty")
    write("one/rows.JSONL", '{"text": "a"}\n')
    write("binary/a.png", PNG)
    write("nothing.jsonl", "")
    write("deep.jsonl", "[" * 100_000 + "]" * 100_000)
    write_texts("full", [0])
    before = contents(Path("."))
    assert_refused(run_here(main, *argv), *words)
    assert contents(Path(".")) == before


# ---- other runs, other packages


@pytest.mark.parametrize("script", [
    "data/prepare.py", "train.py", "tests/study.py", "tests/bench.py",
])
def test_an_installed_package_called_data_does_no_harm(script):
    write("data/__init__.py", "raise SystemExit('this is another package')")
    done = run_process("--help", script=script, env={"PYTHONPATH": os.getcwd()})
    assert done.returncode == 0 and done.stdout.startswith("usage: "), done.stderr


def meanwhile(monkeypatch, action):
    """Run `action` when the next folder is finished, just before it gets its name."""
    fsync = os.fsync

    def first(number):
        monkeypatch.setattr(os, "fsync", fsync)
        action()
        fsync(number)

    monkeypatch.setattr(os, "fsync", first)


def test_the_later_of_two_runs_is_refused(monkeypatch):
    write_texts("in", range(100))
    earlier = []
    meanwhile(monkeypatch, lambda: earlier.append(prepare(["in"], "out")))
    with pytest.raises(FileExistsError, match="out appeared meanwhile.* another folder"):
        prepare(["in"], "out")
    meanwhile(monkeypatch, lambda: write_texts("notes", [1]))
    with pytest.raises(FileExistsError, match="notes appeared meanwhile"):
        prepare(["in"], "notes")
    assert earlier == [load_meta("out")] and sorted(os.listdir()) == ["in", "notes", "out"]


def test_default_data_that_another_machine_prepares_meanwhile_are_used(prepared, monkeypatch):
    def prepare(inputs, folder):
        shutil.copytree("out", folder)
        raise FileExistsError(f"{folder} has appeared meanwhile")

    monkeypatch.setattr(module, "prepare", prepare)
    module.find_data(module.DEFAULT_DATA)
    assert load_meta(module.DEFAULT_DATA) == load_meta("out")


def test_what_a_killed_run_left_is_in_nobodys_way():
    write_texts("in", range(100))
    left = f"out.tmp-{os.getpid()}"
    write_texts(left, [1])
    prepare(["in"], "out")
    assert os.listdir(left) == ["1.txt"] and Path("out/train.bin").is_file()


# ---- tokenizers


def test_byte_tokens_are_the_bytes():
    tokenizer = load_tokenizer("byte")
    assert (tokenizer.n_vocab, tokenizer.eot_token) == (257, 256)
    assert all(tokenizer.decode_single_token_bytes(i) == bytes([i]) for i in range(256))
    for text in (
        "", "plain\n", "\r\n\n\t \x0b\x0c\x1c\x85\u2028\u2029", "".join(map(chr, range(0x300))),
        "naïve 日本語 🤯 e\u0301\n" * 100, "x" * 100_000, "\n" * 1000, "a<|endoftext|>b",
    ):
        ids = tokenizer.encode(text, disallowed_special=())
        assert ids == list(text.encode())
        assert tokenizer.decode(ids) == text


def test_no_network_says_which_files_to_copy(monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "cache")
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # a closed port
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "")
    write("a.txt", "some text\n" * 100)
    url = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"
    with pytest.raises(OSError, match="TIKTOKEN_CACHE_DIR") as error:
        prepare(["a.txt"], "out", tokenizer="gpt2")
    assert url in str(error.value) and hashlib.sha1(url.encode()).hexdigest() in str(error.value)
    assert not Path("out").exists()


def test_the_files_to_copy_are_those_tiktoken_asks_for(monkeypatch):
    asked = []
    monkeypatch.setattr("tiktoken.load.read_file", lambda url: asked.append(url) or b"")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "cache")
    for name, urls in TOKENIZERS.items():
        asked.clear()
        if name != "byte":
            with pytest.raises(ValueError, match="Hash mismatch"):
                load_tokenizer(name)
            assert asked and set(asked) <= set(urls)


def test_large_vocabulary_is_stored_as_uint32(monkeypatch):
    ranks = {bytes([i]): i + 65_500 for i in range(256)}
    large = tiktoken.Encoding("large", pat_str="(?s:.)", mergeable_ranks=ranks,
                              special_tokens={"<|endoftext|>": 70_000})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: large)
    write("a.txt", "zebra\n" * 50)
    meta = prepare(["a.txt"], "out", tokenizer="cl100k_base")
    ids = open_tokens("out", "train")
    assert meta["dtype"] == "uint32" and ids.dtype == np.uint32 and meta["vocab_size"] == 70_001
    assert ids[-1] == 70_000 and large.decode(ids[:6].tolist()) == "zebra\n"
    dtypes = [token_dtype(types.SimpleNamespace(n_vocab=n)) for n in (65_536, 65_537)]
    assert dtypes == [np.uint16, np.uint32]


# ---- reading damaged folders


@pytest.fixture
def prepared():
    """The folder out."""
    write("a.txt", "line\n" * 100)
    prepare(["a.txt"], "out")


def test_missing_folder_says_how_to_make_it():
    for read in (load_meta, lambda folder: open_tokens(folder, "train")):
        with pytest.raises(FileNotFoundError, match="data/prepare.py --out .*none"):
            read("none")


def test_missing_token_file(prepared):
    Path("out/val.bin").unlink()
    with pytest.raises(FileNotFoundError, match="val.bin is missing: .*prepare.py again"):
        open_tokens("out", "val")


def test_truncated_token_file(prepared):
    os.truncate("out/train.bin", 100)
    with pytest.raises(ValueError, match="train.bin is truncated .*prepare.py again"):
        open_tokens("out", "train")


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
    Path("out/meta.json").write_text(damage(Path("out/meta.json").read_text()))
    with pytest.raises(ValueError, match="meta.json is damaged: .*prepare.py again"):
        load_meta("out")


def test_tokens_are_read_only(prepared):
    with pytest.raises(ValueError):
        open_tokens("out", "train")[0] = 1


def change_unnoticed(path):
    """Change a token, and put the times of the file back."""
    status = os.stat(path)
    change_token(path, 7)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("split", ["train", "val"])
def test_what_has_changed_is_found(prepared, split):
    verify_tokens("out")
    change_token(f"out/{split}.bin", 7)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"{split}.bin has changed since it was prepared"):
            verify_tokens("out")


def test_tokens_are_read_once_and_when_asked(prepared, run_here):
    """What looks unchanged is not read, so it costs no time; --verify reads it."""
    change_unnoticed("out/train.bin")
    verify_tokens("out")
    assert_refused(run_here(main, "--verify", "out"), "train.bin has changed since it was prepared")


def test_verify_of_a_whole_folder(prepared, capsys):
    os.remove("out/verified.json")
    main(["--verify", "out"])
    assert capsys.readouterr().out == "out holds what was prepared\n"
    assert Path("out/verified.json").is_file()


@pytest.mark.parametrize("stamp", ["", "{", "[]", "null", '{"train.bin": 1}', "\xff"])
def test_a_damaged_stamp_is_as_good_as_none(prepared, stamp):
    Path("out/verified.json").write_bytes(stamp.encode("latin1"))
    change_unnoticed("out/train.bin")
    with pytest.raises(ValueError, match="train.bin has changed"):
        verify_tokens("out")


def test_a_copy_is_read_once(prepared):
    shutil.copytree("out", "copy")
    for path in Path("copy").iterdir():
        os.utime(path, (1, 1))
    assert json.loads(Path("copy/verified.json").read_text())["train.bin"][1] != 10**9
    verify_tokens("copy")
    change_unnoticed("copy/train.bin")
    verify_tokens("copy")
    os.utime("copy/train.bin", (2, 2))
    with pytest.raises(ValueError, match="train.bin has changed"):
        verify_tokens("copy")


def test_another_meta_is_another_folder(prepared):
    text = Path("out/meta.json").read_text()
    Path("out/meta.json").write_text(text.replace('"vocab_size": 257', '"vocab_size": 256'))
    with pytest.raises(ValueError, match="has the token 256, outside its vocabulary of 256"):
        verify_tokens("out")


def test_a_folder_that_cannot_be_written_is_read_each_time_and_says_so(prepared, capsys):
    Path("out/verified.json").unlink()
    Path("out/verified.json").mkdir()  # as if read-only: root may write everything
    for _ in range(2):
        verify_tokens("out")
        warning = capsys.readouterr().err.splitlines()[-1]
        assert "verified.json cannot be written" in warning and "each start reads all" in warning
    change_token("out/train.bin", 7)
    with pytest.raises(ValueError, match="train.bin has changed"):
        verify_tokens("out")
