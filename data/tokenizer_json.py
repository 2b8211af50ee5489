"""tokenizer.json, the file that transformers has for a tokenizer, out of and into tiktoken.

Both hold a byte-level BPE. A pattern cuts text into pieces. In each piece, neighbouring tokens are
merged again and again, and the pair that comes first in a list is merged first. tiktoken lists the
tokens by id. tokenizer.json lists the pairs, and writes each byte as a letter, as GPT-2 did.
"""

import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from itertools import pairwise

import numpy as np
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

END = "<|endoftext|>"  # the token that ends a document
PIECES = "(?s:.{1,64})"  # a pattern for tokenizers without merges: any pieces will do
POSSESSIVE = re.compile(r"(\{\d+(?:,\d*)?\})\+")  # tokenizers reads \p{N}{1,3}+ as more
WORDS = re.compile(r"\\[wWbB]")  # tokenizers counts ½ to a word, tiktoken U+200D


def byte_letters() -> list[str]:
    """The letter of each byte: the byte's own where that prints, else one from U+0100 on."""
    prints = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in prints else next(others)) for byte in range(256)]


LETTERS = byte_letters()
BYTES = {letter: byte for byte, letter in enumerate(LETTERS)}


def spell(token: bytes) -> str:
    """A token in letters."""
    return "".join(LETTERS[byte] for byte in token)


def unspell(token: str) -> bytes:
    """The token that is spelt so. Raises ValueError for a letter that is no byte's."""
    try:
        return bytes(BYTES[letter] for letter in token)
    except KeyError as error:
        raise ValueError(f"the token {token!r}, which is not spelt in bytes") from error


def find_merges(ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """The last pair that tiktoken merges to make each token, in the order of ranks. Tokens that no
    merge makes are left out: tiktoken uses these only where they are a whole piece of text."""
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            found = [ranks.get(a + b, rank) for a, b in pairwise(parts)]
            first = min(found)
            if first >= rank:
                break
            i = found.index(first)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            yield parts[0], parts[1]


def to_json(tokenizer: tiktoken.Encoding) -> str:
    """The text of a tokenizer.json with which transformers has the same ids."""
    if isinstance(tokenizer, JsonTokenizer):
        return tokenizer.text
    ranks = tokenizer._mergeable_ranks
    merges = [[spell(a), spell(b)] for a, b in find_merges(ranks)]
    letters = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
               "use_regex": False}
    cut = letters
    if merges:
        pattern = POSSESSIVE.sub(r"\1", tokenizer._pat_str)
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated",
                 "invert": False}
        cut = {"type": "Sequence", "pretokenizers": [split, letters]}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    special = tokenizer._special_tokens
    vocab = {spell(token): rank for token, rank in ranks.items()}
    content = {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": name, **plain, "special": True}
                         for name, i in special.items()],
        "normalizer": None,
        "pre_tokenizer": cut,
        "post_processor": None,
        "decoder": letters,
        # Added tokens keep their ids only if they are in the vocabulary, too.
        "model": {"type": "BPE", "ignore_merges": True, "vocab": vocab | special, "merges": merges},
    }  # fmt: skip
    return json.dumps(content, ensure_ascii=False)


class JsonTokenizer(tiktoken.Encoding):
    """The tokenizer of a tokenizer.json, given its text. Its ids are those of transformers, but
    text that spells one of its added tokens, such as <|endoftext|>, stays text.

    `name` is what messages call it. Raises ValueError, in one line, if it is no byte-level BPE that
    tiktoken computes, or if it has no <|endoftext|>.
    """

    def __init__(self, text: str, name: str = "tokenizer.json"):
        self.text = text.lstrip()
        try:
            content = json.loads(text)
            check_kind(content)
            model, self.to_nfc = content["model"], content.get("normalizer") is not None
            pattern = read_pattern(content["pre_tokenizer"], bool(model["merges"]))
            added = place_added(content.get("added_tokens", ()), model["vocab"])
            ranks = {unspell(token): i for token, i in model["vocab"].items() if token not in added}
            check_tokens(model, ranks, added)
            check_pattern(pattern)
            super().__init__(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=added)
            self.n_bytes = np.zeros(self.n_vocab, np.int64)  # of each token
            self.n_bytes[list(ranks.values())] = list(map(len, ranks))
        except (
            json.JSONDecodeError, RecursionError, LookupError, TypeError, AttributeError,
            OverflowError,
        ) as error:  # fmt: skip
            raise ValueError(f"{name} is damaged or no tokenizer.json ({error!r})") from error
        except ValueError as error:
            raise ValueError(f"cannot use the tokenizer {name}, which has {error}") from error

    def encode(self, text: str, **options) -> list[int]:
        return super().encode(self.normalize(text), **options)

    def encode_to_numpy(self, text: str, **options) -> np.ndarray:
        """Raises ValueError if the pattern leaves a part of this text out, as one may that takes
        each character alone."""
        text = self.normalize(text)
        ids = super().encode_to_numpy(text, **options)
        if self.n_bytes[ids].sum() != len(text.encode()):
            raise ValueError("the tokenizer's pattern leaves a part of it out")
        return ids

    def normalize(self, text: str) -> str:
        """The text in Unicode's form NFC, if the file says so."""
        return unicodedata.normalize("NFC", text) if self.to_nfc else text


def read_pattern(cut: dict, merges: bool) -> str:
    """The pattern of a pre_tokenizer. Only one without merges may leave text whole. Raises
    ValueError for what tiktoken cannot do."""
    *splits, letters = cut["pretokenizers"] if cut["type"] == "Sequence" else [cut]
    if letters["type"] == "ByteLevel" and not letters["add_prefix_space"] and len(splits) < 2:
        cuts = letters.get("use_regex", True)
        if not splits and (cuts or not merges):
            return r50k_pat_str if cuts else PIECES
        split = splits[0] if splits else {}
        pattern = split.get("pattern", {}).get("Regex")
        how = split.get("type"), split.get("behavior"), split.get("invert")
        keeps = ("Split", "Isolated", False), ("Split", "Removed", True)
        differs = pattern and (POSSESSIVE.search(pattern) or WORDS.search(pattern))
        if how in keeps and not cuts and pattern and not differs:
            return f"(?m){pattern}"  # ^ and $ are of lines there
    raise ValueError(f"the pre_tokenizer {json.dumps(cut)[:200]}")


def check_pattern(pattern: str) -> None:
    """Raises ValueError for a pattern that leaves characters out, or that makes empty pieces, at
    which tiktoken panics."""
    empty = 256  # here an empty piece has a token, and the others are those of the bytes
    ranks = {b"": empty} | {bytes([byte]): byte for byte in range(256)}
    tokenizer = tiktoken.Encoding("", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    numbers = [*range(0xD800), *range(0xE000, 0x110000)]  # between them are surrogates
    characters = "".join(map(chr, numbers))
    ids = tokenizer.encode_to_numpy(characters, disallowed_special=())
    if empty in ids:
        raise ValueError("a pattern that makes empty pieces")
    if ids.astype(np.uint8).tobytes() != characters.encode():
        raise ValueError("a pattern that leaves characters out")


def check_kind(content: dict) -> None:
    """Raises ValueError if a tokenizer.json is no BPE, or if it changes text or adds tokens."""
    model, last = content["model"], content.get("post_processor") or {"type": "ByteLevel"}
    for wrong, what in [
        (model["type"] != "BPE", f"a model of type {model['type']}, not BPE"),
        (model.get("dropout"), "dropout"),
        (model.get("continuing_subword_prefix"), "a continuing_subword_prefix"),
        (model.get("end_of_word_suffix"), "an end_of_word_suffix"),
        (model.get("byte_fallback"), "byte_fallback, so its tokens are not of bytes"),
        (content.get("normalizer") not in (None, {"type": "NFC"}),
         f"the normalizer {json.dumps(content.get('normalizer'))[:200]}"),
        (not all(adds_nothing(part) for part in last.get("processors", [last])),
         f"a post_processor ({last['type']}) that adds tokens: set it to null"),
    ]:  # fmt: skip
        if wrong:
            raise ValueError(what)


def adds_nothing(processor: dict) -> bool:
    """Whether a post_processor leaves tokens as they are."""
    is_template = processor["type"] == "TemplateProcessing"
    return processor["type"] == "ByteLevel" or is_template and not processor["special_tokens"]


def place_added(tokens: Iterable[dict], vocab: dict[str, int]) -> dict[str, int]:
    """The ids of added tokens. Raises ValueError if transformers gives them others: it takes that
    of the vocabulary, and numbers those that are not in it from the vocabulary's length on."""
    added, n_new = {}, 0
    for token in tokens:
        text = token["content"]
        if text in vocab:
            added[text] = vocab[text]
        elif text not in added:
            added[text] = len(vocab) + n_new
            n_new += 1
        if added[text] != token["id"] or not text:
            raise ValueError(f"the added token {text!r} with the id {token['id']}, which"
                             f" transformers takes for {added[text]}")
    return added


def check_tokens(model: dict, ranks: dict[bytes, int], added: dict[str, int]) -> None:
    """Raises ValueError if a tokenizer.json makes other tokens than tiktoken with these ranks, or
    lacks one that has to be there."""
    ids = [*ranks.values(), *added.values()]
    for wrong, what in [
        (END not in added, f"no added token {END}, which ends documents here"),
        (sum(len(token) == 1 for token in ranks) < 256, "no tokens for some bytes"),
        (len(set(ids)) < len(ids), "two tokens of one id"),
        (not are_in_order(model, ranks), "merges that are not in the order of its ids"),
    ]:
        if wrong:
            raise ValueError(what)


def are_in_order(model: dict, ranks: dict[bytes, int]) -> bool:
    """Whether the merges of a tokenizer.json make the same tokens as `ranks`."""
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    merges = [(unspell(a), unspell(b)) for a, b in merges]
    order = [ranks[a + b] for a, b in merges]
    ours = list(find_merges(ranks))
    if order != sorted(order) or not set(ours) <= set(merges):
        return False
    # Other pairs for these tokens, as some files have, are never met: ours come first.
    made = {a + b for a, b in ours}
    if any(a + b not in made for a, b in merges):
        return False
    # Other tokens can only be whole pieces in tiktoken. There ignore_merges means the same.
    return len(made) + 256 == len(ranks) or bool(model.get("ignore_merges"))
