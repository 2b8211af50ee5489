"""tokenizer.json, the file that transformers has for a tokenizer: into a run, and out of tiktoken.

tiktoken and tokenizer.json both hold a byte-level BPE. A pattern cuts text into pieces. In each
piece, neighbouring tokens are merged again and again, and the pair that comes first in a list is
merged first. tiktoken lists the tokens by id. tokenizer.json lists the pairs, and writes each byte
as a letter, as GPT-2 did.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import tiktoken

from data.script import import_optional

END = "<|endoftext|>"  # the token that ends a document
PIECES = "(?s:.{1,64})"  # a pattern for tokenizers without merges: any pieces will do
POSSESSIVE = re.compile(r"(\{\d+(?:,\d*)?\})\+")  # tokenizers reads \p{N}{1,3}+ as more


def byte_letters() -> list[str]:
    """The letter of each byte: the byte's own where that prints, else one from U+0100 on."""
    prints = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in prints else next(others)) for byte in range(256)]


LETTERS = byte_letters()
BYTES = {letter: byte for byte, letter in enumerate(LETTERS)}


@contextmanager
def errors_of_library(message: str) -> Iterator[None]:
    """A context in which errors of the library `tokenizers` become ValueErrors; also a panic of its
    Rust code, which is a BaseException and no Exception."""
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise ValueError(f"{message} ({error})") from error


class JsonTokenizer:
    """The tokenizer of a tokenizer.json, given its text: the library `tokenizers` with the methods
    of a tiktoken.Encoding that are used here. Its ids are those of transformers, but text that
    spells a special token, such as <|endoftext|>, stays text.

    `name` is what messages call it. Raises ValueError, in one line, if the library is missing, or
    if the file is damaged or no byte-level BPE that ends documents by <|endoftext|>.
    """

    def __init__(self, text: str, name: str = "tokenizer.json"):
        module = import_optional("tokenizers", f"the tokenizer {name}", extra="hf")
        self.text, self.name = text, name
        reads = f"no tokenizer.json that tokenizers {module.__version__} reads"
        with errors_of_library(f"{name} is damaged, or {reads}"):
            self.library = library = module.Tokenizer.from_str(text)
        library.encode_special_tokens = True  # as text
        library.no_truncation()
        library.no_padding()
        added = library.get_added_tokens_decoder()
        vocab = library.get_vocab(with_added_tokens=False).items()
        spelt = {i: token for token, i in vocab if i not in added}
        self.tokens = {i: token.content.encode() for i, token in added.items()}
        self.tokens |= {i: bytes(map(BYTES.get, token)) for i, token in spelt.items()
                        if BYTES.keys() >= set(token)}
        self.n_vocab, self.eot_token = max(self.tokens, default=0) + 1, library.token_to_id(END)
        others = [token for i, token in spelt.items() if i not in self.tokens]
        normalizer, model = library.normalizer, library.model
        for wrong, what in [
            (others, f"the token {others[:1]}, not spelt in bytes: use a byte-level BPE"),
            ({bytes([i]) for i in range(256)} - set(self.tokens.values()), "no token for a byte"),
            (normalizer and type(normalizer).__name__ != "NFC", f"a normalizer, {normalizer}"),
            (getattr(model, "dropout", None), "dropout: set it to null"),
            (library.num_special_tokens_to_add(False),
             "a post_processor that adds tokens: set it to null"),
            (self.eot_token not in added or not added[self.eot_token].special,
             f"no special token {END}, which ends documents here: add it by"
             f' Tokenizer.from_file(PATH).add_special_tokens(["{END}"]), then save(PATH)'),
        ]:
            if wrong:
                raise ValueError(f"cannot use the tokenizer {name}, which has {what}")
        self.encode("a b")  # a file that loses spaces is refused now, not in the middle of a text

    def encode(self, text: str, disallowed_special=()) -> list[int]:
        """Raises ValueError if the tokens do not spell the text (in Unicode's form NFC, if the file
        says so): some tokenizers leave characters out, or add a space."""
        normalizer = self.library.normalizer
        with errors_of_library(f"the tokenizer {self.name} fails"):
            [found] = self.library.encode_batch_fast([text])
            wanted = normalizer.normalize_str(text) if normalizer else text
        ids = found.ids
        spelt = b"".join(self.decode_tokens_bytes(ids))
        if spelt != wanted.encode() or self.eot_token in ids:
            raise ValueError(f"the tokens of {self.name} do not spell the text {wanted!r:.80}")
        return ids

    def encode_to_numpy(self, text: str, disallowed_special=()) -> np.ndarray:
        return np.array(self.encode(text), np.uint32)

    def decode_tokens_bytes(self, ids: list[int]) -> list[bytes]:
        return [self.tokens[i] for i in ids]

    def decode_single_token_bytes(self, token: int) -> bytes:
        """Raises KeyError for a gap in the ids."""
        return self.tokens[token]


Tokenizer = tiktoken.Encoding | JsonTokenizer


def spell(token: bytes) -> str:
    """A token in letters."""
    return "".join(LETTERS[byte] for byte in token)


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


def to_json(tokenizer: Tokenizer) -> str:
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
        # Without merges, a whole text could be looked up there, and be the end of a document.
        "model": {"type": "BPE", "ignore_merges": bool(merges), "vocab": vocab | special,
                  "merges": merges},
    }
    return json.dumps(content, ensure_ascii=False)
