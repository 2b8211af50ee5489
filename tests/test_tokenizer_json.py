"""tokenizer.json out and in: the ids are those of the library `tokenizers`, and the file goes along
from the data to the checkpoint and to the exported model."""

import copy
import itertools
import json
import os
import random
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
LINES = r"^[a-z]+|\s+|\S"  # ^ is the start of each line there
TINY = "--batch_tokens 256 --steps 4 --eval_every 4 --save_every 4 --eval_tokens 512".split()
TINY += ["--device", "cpu"]
BITS = [
    *" \t\n\r", "  ", "\r\n", "\n\n", "\xa0", "\u2028", "\x85", "\x0b", "\x1c", "\0", "\ufeff",
    "'s", "'S", "'ſ", "'LL", "’re", "1", "12", "123", "1234567", "٣", "½", "Ⅷ", "a", "the ", "THE",
    "é", "e\u0301", "\u0301", "ß", "中文", "あ", "한", "ا", "🤯", "👨‍👩‍👧", "ǅ", "ʰ", "!",
    "...", "/", "_", "\u200d", "\u200b", "<|", "|>", "x" * 200,
]  # fmt: skip


def texts():
    """Texts on whose pieces regular expressions could disagree."""
    rng = random.Random(0)
    yield from ("", *BITS, "".join(BITS))
    for length in [2] * 1000 + [30] * 300:
        yield "".join(rng.choice(BITS) for _ in range(length))


def pattern_of(name, monkeypatch):
    """The pattern of one of tiktoken's own tokenizers, without its vocabulary."""
    for loader in ("load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks"):
        monkeypatch.setattr(openai_public, loader, lambda *_, **__: {})
    return getattr(openai_public, name)()["pat_str"]


def trained(pattern=QWEN, normalizer=None):
    """A small tokenizer of the library, trained on the project's files."""
    levels = tokenizers.pre_tokenizers
    split = levels.Split(tokenizers.Regex(pattern), "isolated")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = levels.Sequence([split, levels.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=levels.ByteLevel.alphabet(),
    )  # fmt: skip
    corpus = [path.read_text() for path in sorted(ROOT.glob("*.py"))] + BITS * 3
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


@pytest.fixture(scope="module")
def small():
    return trained()


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
        ranks = JsonTokenizer(small.to_str())._mergeable_ranks
        pattern, special = pattern_of(name, monkeypatch), {END: 0, "<|endofprompt|>": 700}
        ours = tiktoken.Encoding(
            name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special
        )
    text = to_json(ours)
    theirs = tokenizers.Tokenizer.from_str(text)
    assert_same_ids(ours, theirs)
    assert_same_ids(JsonTokenizer(text), theirs)
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


@pytest.mark.parametrize(
    "pattern,normalizer", [*itertools.product([QWEN, *NAMES], [None, "NFC"]), (LINES, None)]
)
def test_we_have_the_ids_of_the_library(pattern, normalizer, monkeypatch):
    if pattern in NAMES:
        pattern = pattern_of(pattern, monkeypatch).replace("{1,3}+", "{1,3}")
    nfc = tokenizers.normalizers.NFC() if normalizer else None
    theirs = trained(pattern, nfc)
    ours = JsonTokenizer(theirs.to_str())
    assert_same_ids(ours, theirs)
    assert (ours.n_vocab, ours.eot_token) == (theirs.get_vocab_size(), 0)
    text = "".join(BITS)
    plain = unicodedata.normalize("NFC", text) if normalizer else text
    assert ours.decode(ours.encode(text)) == plain


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


def test_older_forms_of_the_file_are_read(small):
    content = json.loads(small.to_str())
    model = content["model"]
    model["merges"] = [" ".join(pair) for pair in model["merges"]]
    assert_same_ids(JsonTokenizer(json.dumps(content, indent=1)), small)

    content["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False,
                                "trim_offsets": True}  # fmt: skip
    text = json.dumps(content)  # GPT-2's: the pattern is not in the file
    assert_same_ids(JsonTokenizer(text), tokenizers.Tokenizer.from_str(text))

    content["added_tokens"][0]["id"] = model["vocab"]["<|endoftext|>"] = 601
    content["added_tokens"].append(dict(content["added_tokens"][0], id=600, content="<think>"))
    text = json.dumps(content)
    ours = JsonTokenizer(text)
    assert (ours.n_vocab, ours.eot_token) == (602, 601)
    assert tokenizers.Tokenizer.from_str(text).token_to_id("<think>") == 600
    assert_same_ids(ours, tokenizers.Tokenizer.from_str(text))
    spelt = ours.encode("<think>", disallowed_special=())  # in a document it is text
    assert ours.decode(spelt) == "<think>" and 600 not in spelt

    content = json.loads(small.to_str())  # two tokens that are not in the vocabulary
    for i, name in ((600, "<think>"), (601, "<call>")):
        content["added_tokens"].append(dict(content["added_tokens"][0], id=i, content=name))
    text = json.dumps(content)
    assert tokenizers.Tokenizer.from_str(text).token_to_id("<call>") == 601
    assert JsonTokenizer(text).decode([601]) == "<call>"


def change(content, path, value):
    *parents, last = path.split("/")
    for name in parents:
        content = content[int(name) if name.isdigit() else name]
    if value == "removed":
        del content[last]
    else:
        content[last] = value


def split_by(*patterns):
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    splits = [{**split, "pattern": {"Regex": pattern}} for pattern in patterns]
    letters = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [*splits, letters]}


def add_begin():
    """A post_processor that begins each text with a token, as Llama's does."""
    end = {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}}
    return {"type": "TemplateProcessing", "special_tokens": end}


DIGITS = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True},
          {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]}  # fmt: skip


@pytest.mark.parametrize(
    "path,value,message",
    [
        ("model/type", "Unigram", "which has a model of type Unigram, not BPE"),
        ("model/dropout", 0.1, "which has dropout"),
        ("model/byte_fallback", True, "which has byte_fallback"),
        ("model/end_of_word_suffix", "</w>", "which has an end_of_word_suffix"),
        ("model/continuing_subword_prefix", "##", "which has a continuing_subword_prefix"),
        ("normalizer", {"type": "Lowercase"}, "which has the normalizer .*Lowercase"),
        ("post_processor", add_begin(), "a post_processor .TemplateProcessing. that adds tokens"),
        ("post_processor", {"type": "Sequence", "processors": [{"type": "ByteLevel"}, add_begin()]},
         "a post_processor .Sequence. that adds tokens"),
        ("pre_tokenizer", DIGITS, "which has the pre_tokenizer .*Digits"),
        ("pre_tokenizer", {"type": "Metaspace", "replacement": "_"}, "pre_tokenizer .*Metaspace"),
        ("pre_tokenizer", split_by("[0-9]{1,3}+|."), "which has the pre_tokenizer"),
        ("pre_tokenizer", split_by("[a-z]+| +"), "which has a pattern that leaves characters out"),
        ("pre_tokenizer", split_by("none"), "which has a pattern that leaves characters out"),
        ("pre_tokenizer", split_by("x*"), "which has a pattern that makes empty pieces"),
        ("pre_tokenizer", split_by("(?=x)"), "which has a pattern that makes empty pieces"),
        ("pre_tokenizer", split_by("x+|[^x]*?"), "which has a pattern that makes empty pieces"),
        ("pre_tokenizer", split_by("([a-z]+"), "cannot use the tokenizer"),
        ("pre_tokenizer", split_by(r"\w+|\W"), "which has the pre_tokenizer"),
        ("pre_tokenizer", split_by(r"[a-z]+\b|(?s:.)"), "which has the pre_tokenizer"),
        ("pre_tokenizer", split_by("x|[^x]+", ".+|\n"), "which has the pre_tokenizer"),
        ("pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True},
         "which has the pre_tokenizer .*prefix_space.: true"),
        ("pre_tokenizer", split_by()["pretokenizers"][0], "which has the pre_tokenizer"),
        ("pre_tokenizer", None, "damaged or no tokenizer.json"),
        ("added_tokens", [], "which has no added token <|endoftext|>"),
        ("added_tokens", [{"content": END, "id": 0}, {"content": "", "id": 600}],
         "the added token '' with the id 600"),
        ("model/vocab/a", 300, "which has two tokens of one id"),
        ("added_tokens/0/id", 600, "id 600, which transformers takes for 0"),
        ("added_tokens/0/content", "<end>", "id 0, which transformers takes for 600"),
        ("model/vocab/\u0100", "removed", "which has no tokens for some bytes"),
        ("model/vocab/\u2581the", 700, "which has the token .\u2581the., which is not spelt in"),
        ("model/merges", [], "which has the pre_tokenizer"),
        ("model", "removed", "damaged or no tokenizer.json"),
    ],
)  # fmt: skip
def test_what_tiktoken_cannot_compute_is_refused(path, value, message, small, tmp_path):
    content = json.loads(small.to_str())
    change(content, path, value)
    if path == "model/merges":
        content["pre_tokenizer"] = {"type": "Whitespace"}
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message.replace("|", "\\|")) as error:
        load_tokenizer(str(file))
    assert "\n" not in str(error.value) and str(file) in str(error.value)


def test_merges_in_another_order_are_refused(small):
    content = json.loads(small.to_str())
    merges = content["model"]["merges"]
    swapped, missing, extra = (copy.deepcopy(content) for _ in range(3))
    swapped["model"]["merges"][3:5] = merges[4], merges[3]
    del missing["model"]["merges"][-1]
    unmade = "QZX"  # a token that no merge makes
    extra["model"]["vocab"][unmade] = 900
    for wrong in (swapped, missing, extra):
        with pytest.raises(ValueError, match="merges that are not in the order of its ids"):
            JsonTokenizer(json.dumps(wrong))
    extra["model"]["ignore_merges"] = True  # then the token is for the whole piece only
    text = json.dumps(extra)
    ours, theirs = JsonTokenizer(text), tokenizers.Tokenizer.from_str(text)
    assert ours.encode("QZX QZX") == theirs.encode("QZX QZX").ids
    assert ours.encode("QZX")[0] == 900


@pytest.mark.parametrize("content", ["", "[]", "{}", "{", '"a"', "\0\xff", "null"])
def test_no_tokenizer_json_is_one_line(content, tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match="tokenizer.json is damaged or no tokenizer.json"):
        load_tokenizer(str(file))


# --- text that is hard on a pattern ---


@pytest.mark.parametrize("unit", [" ", "\n", "a", "1", "\u3000"])
def test_a_very_long_run_of_one_character_is_tokenised(unit, small, tmp_path):
    """tiktoken fails at a million spaces in a row."""
    content = unit * 3_000_000 + "b"
    (tmp_path / "long.txt").write_text(content)
    (tmp_path / "tokenizer.json").write_text(small.to_str())
    out = str(tmp_path / "out")
    prepare([str(tmp_path / "long.txt")], out, tokenizer=str(tmp_path / "tokenizer.json"))
    decode = load_tokenizer(str(tmp_path / "tokenizer.json")).decode
    texts = [decode(open_tokens(out, split).tolist()) for split in ("train", "val")]
    assert "".join(texts).replace("<|endoftext|>", "") == content


@pytest.mark.parametrize(
    "pattern,text,message",
    [
        (r"(?:(?!x)[a-z])+?(?=x|[^a-z]|$)|x+|[^a-z]+", "a" * 600_000, "Regex error"),
        # It takes every character, but not every text.
        (r"[a-z]+(?!\d)|[^a-z]+", "b2", "the tokenizer's pattern leaves a part of it out"),
    ],
)
@pytest.mark.parametrize("name", ["bad.txt", "rows.jsonl"])
def test_a_text_at_which_the_tokenizer_fails_is_named(
    pattern, text, message, name, small, tmp_path
):
    content = json.loads(small.to_str())
    content["pre_tokenizer"] = split_by(pattern)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(20):
        (folder / f"{i}.txt").write_text(f"good {i}\n" * 100)
    rows = ["good", text, "also good"]
    if name == "bad.txt":
        (folder / name).write_text(text)
    else:
        (folder / name).write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    place = f"in/{name}" if name == "bad.txt" else f"in/{name}:2"
    with pytest.raises(ValueError, match=f"{place} cannot be tokenised .*{message}.*omit it"):
        prepare([str(folder)], str(tmp_path / "out"), tokenizer=str(tmp_path / "tokenizer.json"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "tokenizer.json"]


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


def test_a_replaced_file_is_refused(small, text, tmp_path, monkeypatch):
    """Also one of the same size and time, in which two letters have changed places."""
    monkeypatch.setattr("data.tokenizer_json.check_pattern", lambda _: None)  # takes a second
    own, out = tmp_path / "own", tmp_path / "out"
    small.save(str(tmp_path / "my.json"))
    prepare([text], str(own), tokenizer=str(tmp_path / "my.json"))
    path = own / "tokenizer.json"
    before, status = path.read_text(), path.stat()
    swapped = before.replace('"a": 65', '"a": 66').replace('"b": 66', '"b": 65')
    assert load_tokenizer(swapped).decode([65]) == "b"
    moved = before.replace('"id": 0', '"id": 600').replace(f'"{END}": 0', f'"{END}": 600')
    assert load_tokenizer(moved).eot_token == 600
    check_tokenizer(str(own), json.dumps(json.loads(before), indent=4))
    for other in (swapped, moved):
        with pytest.raises(ValueError, match=f"{own} is in tokens of {path} and the model in"):
            check_tokenizer(str(own), other)
    path.write_text(swapped)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    words = [*SHORT, "--vocab_size", "640", "--data", str(own), "--out", str(out)]
    with pytest.raises(ValueError, match=f"{path} is not known to .*: put the right one back or"):
        train.main(words)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"{path} is missing: put it back or delete {own}"):
        train.main(words)
    assert not out.exists()
    path.write_text(before)
    train.main(words)


def test_data_of_a_version_that_kept_no_hash_of_the_file_are_refused(small, text, tmp_path):
    own = tmp_path / "own"
    small.save(str(tmp_path / "my.json"))
    meta = prepare([text], str(own), tokenizer=str(tmp_path / "my.json"))
    del meta["tokenizer_sha256"]
    (own / "meta.json").write_text(json.dumps(meta))
    message = f"if an earlier version prepared them, delete {own} and run data/prepare.py again"
    with pytest.raises(ValueError, match=message):
        load_meta(str(own))


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
