"""tokenizer.json out and in: the ids are those of the library `tokenizers`, and the file goes along
from the data to the checkpoint and to the exported model."""

import itertools
import json
import os
import random
import sys
import unicodedata

import pytest
import tiktoken
from tiktoken_ext import openai_public

import sample
import train
from data.checkpoint import load_checkpoint
from data.prepare import prepare
from data.tokenizer_json import END, JsonTokenizer, to_json
from data.tokens import check_tokenizer, load_meta, load_tokenizer, open_tokens
from tests.reference import theirs
from tests.runs import ROOT, SHORT

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

NAMES = ("r50k_base", "cl100k_base", "o200k_base")
QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TINY = "--batch_tokens 256 --steps 4 --eval_every 4 --save_every 4 --eval_tokens 512".split()
TINY += ["--device", "cpu"]
BITS = [
    *" \t\n\r", "  ", "\r\n", "\n\n", "\xa0", "\u2028", "\x85", "\x0b", "\x1c", "\0", "\ufeff",
    "'s", "'S", "'ſ", "'LL", "’re", "1", "12", "123", "1234567", "٣", "½", "Ⅷ", "a", "the ", "THE",
    "é", "e\u0301", "\u0301", "ß", "中文", "あ", "한", "ا", "🤯", "👨‍👩‍👧", "ǅ", "ʰ", "!",
    "...", "/", "_", "\u200d", "\u200b", "<|", "|>", "x" * 200,
]


def texts():
    """Regular expressions could disagree on the pieces of these texts."""
    rng = random.Random(0)
    yield from ("", *BITS, "".join(BITS))
    for length in [2] * 1000 + [30] * 300:
        yield "".join(rng.choice(BITS) for _ in range(length))


def pattern_of(name, monkeypatch):
    """The pattern of one of tiktoken's own tokenizers, without its vocabulary."""
    for loader in ("load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks"):
        monkeypatch.setattr(openai_public, loader, lambda *_, **__: {})
    return getattr(openai_public, name)()["pat_str"]


@pytest.fixture(scope="module")
def small():
    """A small tokenizer of the library, trained on the project's files."""
    levels = tokenizers.pre_tokenizers
    split = levels.Split(tokenizers.Regex(QWEN), "isolated")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = levels.Sequence([split, levels.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=levels.ByteLevel.alphabet(),
    )
    corpus = [path.read_text() for path in sorted(ROOT.glob("*.py"))] + BITS * 3
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def decoded(tokenizer, ids):
    return b"".join(tokenizer.decode_tokens_bytes(ids)).decode()


def assert_same_ids(ours, theirs):
    for text in texts():
        expected = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, disallowed_special=()) == expected
        assert ours.encode_to_numpy(text, disallowed_special=()).tolist() == expected


# --- out ---


@pytest.mark.parametrize("name", ["byte", *NAMES])
def test_the_library_reads_what_we_write(name, small, monkeypatch):
    if name == "byte":
        ours = load_tokenizer("byte")
    else:
        ranks = {token: i for i, token in JsonTokenizer(small.to_str()).tokens.items() if i}
        pattern, special = pattern_of(name, monkeypatch), {END: 0, "<|endofprompt|>": 700}
        ours = tiktoken.Encoding(
            name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special
        )
    text = to_json(ours)
    theirs = tokenizers.Tokenizer.from_str(text)
    assert_same_ids(ours, theirs)
    assert_same_ids(JsonTokenizer(text), theirs)
    assert JsonTokenizer(text).encode(END) == ours.encode(END, disallowed_special=())
    end = theirs.encode("a<|endoftext|>").ids[-1]
    assert end == ours.eot_token == JsonTokenizer(text).eot_token
    for special in ours.special_tokens_set:
        assert theirs.token_to_id(special) == ours.encode_single_token(special)
    for text in ("naïve 日本語 🤯", " two\n  lines", "it's 1234567"):
        assert theirs.decode(theirs.encode(text).ids) == text


def test_a_token_without_merges_is_a_whole_piece_only():
    ranks = {bytes([byte]): byte for byte in range(256)}
    ranks |= {b"ab": 256, b"QZX": 257}
    ours = tiktoken.Encoding(
        "own", pat_str=QWEN, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 258}
    )
    theirs = tokenizers.Tokenizer.from_str(to_json(ours))
    for text, ids in ("QZX", [257]), ("QZXab", [81, 90, 88, 256]):
        assert theirs.encode(text).ids == ours.encode(text) == ids


def test_numbers_are_cut_where_tiktoken_cuts_them():
    ranks = {bytes([byte]): byte for byte in range(256)}
    ranks |= {b"12": 256, b"123": 257, b"45": 258, b"67": 259, b"4567": 260}
    ours = tiktoken.Encoding(
        "own", pat_str=r"\p{N}{1,3}+", mergeable_ranks=ranks, special_tokens={END: 261}
    )
    theirs = tokenizers.Tokenizer.from_str(to_json(ours))
    assert theirs.encode("1234567").ids == ours.encode("1234567") == [257, 258, 54, 55]


def test_transformers_takes_the_exported_tokenizer(tmp_path):
    from data.hf import export_hf
    from tests.test_hf import ours

    byte = load_tokenizer("byte")
    export_hf(ours(), tmp_path / "hf", byte)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in itertools.islice(texts(), 200):
        assert theirs(text).input_ids == byte.encode(text)
        assert theirs.decode(theirs(text).input_ids) == text
    assert theirs.eos_token_id == theirs.bos_token_id == 256
    assert theirs("a<|endoftext|>").input_ids == [97, 256]
    assert theirs.model_max_length == 128


# --- in ---


def change(tokenizer, path, value):
    """The text of its tokenizer.json, with another value at this place."""
    content = part = json.loads(tokenizer.to_str())
    *parents, last = path.split("/")
    for name in parents:
        part = part[name]
    part[last] = value
    return json.dumps(content)


def added(content, i, **options):
    """An entry of `added_tokens`."""
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": content, "special": True, **plain, **options}


def test_we_have_the_ids_of_the_library(small):
    """What the file says is done, but its length of texts: that is for a transformers' model."""
    content = json.loads(small.to_str())
    content["normalizer"] = {"type": "NFC"}
    content["added_tokens"] += [added("<zwölf>", 600), added("<|im_start|>", 601)]
    content["added_tokens"] += [added("<think>", 602, special=False)]
    content["model"]["vocab"]["<zwölf>"] = 600  # where ö is no byte
    theirs = tokenizers.Tokenizer.from_str(json.dumps(content))
    theirs.enable_truncation(3)
    theirs.enable_padding(length=50)
    ours = JsonTokenizer(theirs.to_str())
    theirs.no_truncation()
    theirs.no_padding()
    assert_same_ids(ours, theirs)
    text = "".join(BITS)
    assert decoded(ours, ours.encode(text)) == unicodedata.normalize("NFC", text)
    assert (ours.n_vocab, ours.eot_token) == (603, 0)
    assert ours.encode("<think>") == [602]
    for special in ("<|im_start|>", "<zwölf>", END):  # in a document it is text
        ids = ours.encode(special)
        assert len(ids) > 1 and decoded(ours, ids) == special
    assert decoded(ours, [600, 601]) == "<zwölf><|im_start|>"


def test_the_end_of_a_document_is_not_in_its_text():
    """A file that looks whole pieces up, and takes a whole text as one piece."""
    content = json.loads(to_json(load_tokenizer("byte")))
    content["model"]["ignore_merges"] = True
    with pytest.raises(ValueError, match="do not spell the text '<.endoftext.>'"):
        JsonTokenizer(json.dumps(content)).encode(END)


def test_a_file_that_transformers_has_saved_is_read(small, tmp_path):
    file = tmp_path / "small.json"
    small.save(str(file))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(file))
    fast.save_pretrained(tmp_path / "saved")
    assert_same_ids(load_tokenizer(str(tmp_path / "saved" / "tokenizer.json")), small)
    export = tmp_path / "byte"
    export.mkdir()
    (export / "tokenizer.json").write_text(to_json(load_tokenizer("byte")))
    (export / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    transformers.AutoTokenizer.from_pretrained(export).save_pretrained(tmp_path / "again")
    again = load_tokenizer(str(tmp_path / "again" / "tokenizer.json"))
    assert again.encode("naïve") == load_tokenizer("byte").encode("naïve")
    file.write_text(f"\n {file.read_text()}")  # a checkpoint has its text
    assert load_tokenizer(load_tokenizer(str(file)).text).encode("a") == small.encode("a").ids


LETTERS = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
UNIGRAM = {"type": "Unigram", "unk_id": 0, "vocab": [["\u2581the", 0.0]]}
BEGIN = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": END, "type_id": 0}}],
         "pair": [], "special_tokens": {END: {"id": END, "ids": [0], "tokens": [END]}}}
NO_SPACES = {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, LETTERS]}


@pytest.mark.parametrize(
    "path,value,message",
    [
        ("added_tokens", [], "which has no special token <|endoftext|>"),
        ("added_tokens", [added(END, 0, special=False)], "<|endoftext|>.*: add it by"),
        ("model", UNIGRAM, "the token .'\u2581the'., not spelt in bytes: use a byte-level BPE"),
        ("model", {"type": "BPE", "vocab": {END: 0, "a": 1}, "merges": []}, "no token for a byte"),
        ("model/dropout", 0.1, "which has dropout: set it to null"),
        ("normalizer", {"type": "Lowercase"}, "which has a normalizer, .*Lowercase"),
        ("post_processor", BEGIN, "which has a post_processor that adds tokens: set it to null"),
        ("pre_tokenizer", {"type": "Own"}, "no tokenizer.json that tokenizers .* reads"),
        ("pre_tokenizer", dict(LETTERS, add_prefix_space=True), "do not spell the text 'a b'"),
        ("pre_tokenizer", NO_SPACES, "do not spell the text 'a b'"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line(path, value, message, small, tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_text(change(small, path, value))
    with pytest.raises(ValueError, match=message.replace("|", "\\|")) as error:
        load_tokenizer(str(file))
    assert "\n" not in str(error.value) and str(file) in str(error.value)


def test_the_folder_of_a_model_is_not_its_tokenizer(small, tmp_path):
    small.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=f"did you mean {tmp_path}/tokenizer.json"):
        load_tokenizer(str(tmp_path))


def test_without_the_library_a_line_says_what_to_install(small, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    message = r"the tokenizer tokenizer.json needs the package tokenizers: pip install '.\[hf\]'"
    with pytest.raises(ValueError, match=message):
        JsonTokenizer(small.to_str())


@pytest.mark.parametrize("content", ["", "[]", "{}", "{", '"a"', "\0\xff", "null"])
def test_no_tokenizer_json_is_one_line(content, tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match="tokenizer.json is damaged, or no tokenizer.json"):
        load_tokenizer(str(file))


# --- text that is hard on a pattern ---


@pytest.mark.parametrize("unit", [" ", "\n", "a", "1", "\u3000"])
def test_a_very_long_run_of_one_character_is_tokenised(unit, small, tmp_path):
    content = unit * 3_000_000 + "b"
    (tmp_path / "long.txt").write_text(content)
    (tmp_path / "tokenizer.json").write_text(small.to_str())
    out = str(tmp_path / "out")
    prepare([str(tmp_path / "long.txt")], out, tokenizer=str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    texts = [decoded(tokenizer, open_tokens(out, split).tolist()) for split in ("train", "val")]
    assert "".join(texts).replace("<|endoftext|>", "") == content


@pytest.mark.parametrize("name", ["bad.txt", "rows.jsonl"])
def test_a_text_that_the_tokens_do_not_spell_is_named(name, small, tmp_path):
    """A token that takes the space before it, which it does not spell."""
    file, folder = tmp_path / "tokenizer.json", tmp_path / "in"
    think = added("<think>", 600, special=False, lstrip=True)
    file.write_text(change(small, "added_tokens", [added(END, 0), think]))
    folder.mkdir()
    for i in range(20):
        (folder / f"{i}.txt").write_text(f"good <{i}>")
    rows = "".join(json.dumps({"text": text}) + "\n" for text in ("good", "a <think>"))
    (folder / name).write_text("a <think>" if name == "bad.txt" else rows)
    place = f"in/{name}" if name == "bad.txt" else f"in/{name}:2"
    message = f"{place} cannot be tokenised .the tokens of {file} do not spell the text 'a <think>'"
    with pytest.raises(ValueError, match=message):
        prepare([str(folder)], str(tmp_path / "out"), tokenizer=str(file))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "tokenizer.json"]


def test_a_text_at_which_the_library_panics_is_named(small, tmp_path):
    """Its regular expressions give up after millions of steps."""
    file, text = tmp_path / "tokenizer.json", tmp_path / "bad.txt"
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    split["pattern"] = {"Regex": r"(?:a|aa)+$|[^c]|c"}
    cut = {"type": "Sequence", "pretokenizers": [split, dict(LETTERS, use_regex=False)]}
    file.write_text(change(small, "pre_tokenizer", cut))
    text.write_text("a" * 300 + "b")
    with pytest.raises(ValueError, match=f"{text} cannot be tokenised .the tokenizer {file} fails"):
        prepare([str(text)], str(tmp_path / "out"), tokenizer=str(file))


# --- the file goes along ---


def sample_from(out, *words):
    sample.main(["--checkpoint", str(out), "--device", "cpu", *map(str, words)])


def test_the_file_goes_along(small, text, data, tmp_path, capfd):
    source, own, out = tmp_path / "my.json", tmp_path / "own", tmp_path / "out"
    small.save(str(source))
    content = source.read_text()
    prepare([text], str(own), tokenizer=str(source))
    source.unlink()
    meta = load_meta(own)
    assert meta["tokenizer"] == str(own / "tokenizer.json")
    assert (meta["vocab_size"], meta["eot"]) == (600, 0)
    train.main([*SHORT, "--vocab_size", "640", "--data", str(own), "--out", str(out)])
    assert load_checkpoint(out)[1]["tokenizer"] == content
    assert '"model"' not in (out / "log.jsonl").read_text()  # the file is not in the log

    sample_from(out, "--evaluate", own)
    assert "bits per byte" in capfd.readouterr().out
    message = f"{data} is in tokens of byte and the model in those of tokenizer.json"
    with pytest.raises(ValueError, match=message):
        sample_from(out, "--evaluate", data)

    (own / "tokenizer.json").unlink()  # the checkpoint is enough
    sample_from(out, "--prompt", "3 and", "--temperature", 0)
    assert capfd.readouterr().out.startswith("3 and")
    sample_from(out, "--export_hf", tmp_path / "hf")
    assert (tmp_path / "hf" / "tokenizer.json").read_text() == content


def test_a_replaced_file_is_refused(small, text, tmp_path):
    """Also one of the same size and time, in which two letters have changed places."""
    own, out = tmp_path / "own", tmp_path / "out"
    small.save(str(tmp_path / "my.json"))
    prepare([text], str(own), tokenizer=str(tmp_path / "my.json"))
    path = own / "tokenizer.json"
    before, status = path.read_text(), path.stat()
    swapped = before.replace('"a": 65', '"a": 66').replace('"b": 66', '"b": 65')
    assert decoded(load_tokenizer(swapped), [65]) == "b"
    moved = before.replace('"id": 0', '"id": 600').replace(f'"{END}": 0', f'"{END}": 600')
    assert (load_tokenizer(moved).eot_token, load_tokenizer(moved).n_vocab) == (600, 601)
    check_tokenizer(str(own), json.dumps(json.loads(before), indent=4))
    for other in (swapped, moved):
        with pytest.raises(ValueError, match=f"{own} is in tokens of {path} and the model in"):
            check_tokenizer(str(own), other)
    path.write_text(swapped)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    words = [*SHORT, "--vocab_size", "640", "--data", str(own), "--out", str(out)]
    with pytest.raises(ValueError, match=f"{path} is not the tokenizer of .*: put the right"):
        train.main(words)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"{path} is missing: put it back or delete {own}"):
        train.main(words)
    assert not out.exists()
    path.write_text(before)
    train.main(words)


def test_a_model_trains_on_in_its_own_tokens_only(small, text, data, tmp_path):
    model, own, out = tmp_path / "qwen", tmp_path / "own", tmp_path / "out"
    theirs(vocab_size=640).save_pretrained(model)
    words = ["--init", str(model), "--block_size", "32", "--micro_batch", "4", *TINY]
    words += ["--out", str(out)]
    with pytest.raises(FileNotFoundError, match="tokenizer.json is missing"):
        train.main([*words, "--data", str(data)])
    small.save(str(model / "tokenizer.json"))
    message = f"{data} is in tokens of byte and the model in those of {model}/tokenizer.json"
    with pytest.raises(ValueError, match=message):
        train.main([*words, "--data", str(data)])
    assert not out.exists()
    prepare([text], str(own), tokenizer=str(model / "tokenizer.json"))
    train.main([*words, "--data", str(own)])
    assert load_checkpoint(out)[0].config.n_embd == 24
