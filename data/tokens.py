"""Tokenizers, and the token files that data/prepare.py writes and train.py reads."""

import hashlib
import json
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
import torch
from tqdm import tqdm

from data.script import is_taken, nearest
from data.tokenizer_json import END, PIECES, JsonTokenizer, Tokenizer

SPLITS = ("train", "val")
TOKENIZER_FILE = "tokenizer.json"  # a copy of the one that the data were prepared with
CHUNK = 1 << 20  # tokens read at a time

# the files that tiktoken downloads for each tokenizer: users without network are told to copy them
BLOBS = "https://openaipublic.blob.core.windows.net/"
TOKENIZERS = {
    "byte": [],
    "gpt2": [BLOBS + "gpt-2/encodings/main/vocab.bpe", BLOBS + "gpt-2/encodings/main/encoder.json"],
    "cl100k_base": [BLOBS + "encodings/cl100k_base.tiktoken"],
    "o200k_base": [BLOBS + "encodings/o200k_base.tiktoken"],
}


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer `name`: byte (ids 0 to 255 are the bytes, 256 ends a text), one of tiktoken's
    own, the path of a tokenizer.json, or the text of one, as a checkpoint has it.

    tiktoken downloads its own once. Raises ValueError for an unknown name and for a tokenizer.json
    that cannot be used, OSError if a download fails or a file cannot be read.
    """
    if name.startswith("{"):
        return JsonTokenizer(name)
    if name.endswith(".json"):
        return JsonTokenizer(definition(name), name)
    if name not in TOKENIZERS:
        known = f"choose from {', '.join(TOKENIZERS)}, or give the path of a tokenizer.json"
        file = Path(name, TOKENIZER_FILE)
        hint = f"did you mean {file}?" if file.is_file() else nearest(name, TOKENIZERS, known)
        raise ValueError(f"unknown tokenizer {name}: {hint}")
    if name == "byte":
        # without merges, the pattern only says how much text to take at a time; 64 is fastest
        ranks = {bytes([byte]): byte for byte in range(256)}
        return tiktoken.Encoding(name, pat_str=PIECES, mergeable_ranks=ranks,
                                 special_tokens={END: 256})
    try:
        return tiktoken.get_encoding(name)
    except OSError as error:
        copies = ", ".join(f"{url} as {hashlib.sha1(url.encode()).hexdigest()}"
                           for url in TOKENIZERS[name])
        raise OSError(f"cannot download the tokenizer {name} ({type(error).__name__}): without "
                      f"network, put {copies} into a folder and set TIKTOKEN_CACHE_DIR to that "
                      "folder") from error


def definition(name: str) -> str:
    """The text of a tokenizer.json, given its path or that text; else `name` itself, of a tokenizer
    that needs no file."""
    if not name.endswith(".json"):  # a text ends with a brace
        return name
    return Path(name).read_text(encoding="utf-8", errors="replace").lstrip()


def keep_tokenizer(tokenizer: Tokenizer, folder: Path) -> dict[str, str]:
    """What meta.json in `folder` says of a tokenizer: its name. If a tokenizer.json defines it, a
    copy is written into `folder`, and meta.json has the name of that file and its hash."""
    if not isinstance(tokenizer, JsonTokenizer):
        return {"tokenizer": tokenizer.name}
    content = tokenizer.text.encode()
    (folder / TOKENIZER_FILE).write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    return {"tokenizer": TOKENIZER_FILE, "tokenizer_sha256": digest}


def tokenizer_for_checkpoint(tokenizer: Tokenizer) -> str:
    """What a checkpoint holds of a tokenizer: its name, or the text of its tokenizer.json."""
    return tokenizer.text if isinstance(tokenizer, JsonTokenizer) else tokenizer.name


def token_bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """The bytes that a token stands for. Some tokenizers have gaps: an id that is no token is
    U+FFFD."""
    try:
        return tokenizer.decode_single_token_bytes(token)
    except KeyError:
        return "\ufffd".encode()


def all_tokens(tokenizer: Tokenizer) -> list[bytes]:
    """`token_bytes` of each id."""
    return [token_bytes(tokenizer, token) for token in range(tokenizer.n_vocab)]


def text_sizes(tokenizer: Tokenizer) -> np.ndarray:
    """The bytes of text that each id stands for: an end of text for none."""
    sizes = np.array([len(token) for token in all_tokens(tokenizer)])
    sizes[tokenizer.eot_token] = 0
    return sizes


def check_tokenizer(folder: str, name: str) -> None:
    """Raises ValueError if prepared data are not in the tokens of a model's tokenizer. `name` is
    what `load_tokenizer` takes for that."""
    name_of_data = load_meta(folder)["tokenizer"]
    if definition(name_of_data) == definition(name):
        return  # to load a large tokenizer takes seconds
    data, tokenizer = load_tokenizer(name_of_data), load_tokenizer(name)
    if all_tokens(data) == all_tokens(tokenizer):
        return
    place = ""
    if tokenizer.name == TOKENIZER_FILE:  # the text of a file that has lost its path
        place = " (it is in the folder of the model's data)"
    raise ValueError(
        f"{folder} is in tokens of {name_of_data} and the model in those of {tokenizer.name}:"
        f" prepare that text with --tokenizer {tokenizer.name}{place}"
    )


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    """The type of the ids in token files."""
    return np.dtype("uint16" if tokenizer.n_vocab <= 2**16 else "uint32")


def load_meta(folder: str) -> dict[str, Any]:
    """The meta.json of a prepared folder. That its files are there and complete is checked.

    Keys: tokenizer (what load_tokenizer takes), tokenizer_sha256 (if that is a file), vocab_size,
    eot (a token id), sources, val_fraction, dtype (of the .bin files), skipped_files,
    skipped_file_examples ("name: reason"), skipped_rows, skipped_row_examples ("name:number: row"),
    dropped_documents, and for train and val each: documents, tokens, bytes (of UTF-8 text) and
    sha256 (of the .bin file). Nats per token * tokens / bytes / ln 2 are bits per byte. Raises
    FileNotFoundError if a file is missing, ValueError if one is damaged, or if the tokenizer.json
    is not the one of the tokens.
    """
    again = f"delete {folder} and run data/prepare.py again"
    path = Path(folder, "meta.json")
    if not path.is_file():
        if Path(folder).is_file():
            raise FileNotFoundError(f"{folder} is a file: name a folder that data/prepare.py made "
                                    "(python data/prepare.py my_texts --out data/mine makes one)")
        if is_taken(folder):
            raise FileNotFoundError(f"{folder} holds no prepared data: if it holds your texts, run "
                                    f"python data/prepare.py {folder} --out data/mine, and name "
                                    "data/mine here")
        raise FileNotFoundError(f"no prepared data in {folder}: run python data/prepare.py --out "
                                f"{folder} (your own texts, if any, go before --out); the data of "
                                "the studies are made by tests/study.py")
    try:
        meta = json.loads(path.read_bytes())
        sizes = {split: meta[split]["tokens"] * np.dtype(meta["dtype"]).itemsize
                 for split in SPLITS}
        needed = [(meta, ("tokenizer", "vocab_size")),
                  *((meta[split], ("bytes", "sha256")) for split in SPLITS)]
        if not all(key in part for part, keys in needed for key in keys):
            raise KeyError
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {again}") from error
    for split, size in sizes.items():
        path = Path(folder, f"{split}.bin")
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: {again}")
        if path.stat().st_size != size:
            raise ValueError(f"{path} is truncated or changed: it has {path.stat().st_size} bytes, "
                             f"meta.json says {size}: {again}")
    if meta["tokenizer"] == TOKENIZER_FILE:
        path = Path(folder, TOKENIZER_FILE)
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: put it back or {again}")
        if hashlib.sha256(path.read_bytes()).hexdigest() != meta.get("tokenizer_sha256"):
            raise ValueError(f"{path} is not the tokenizer of these data (meta.json does not have "
                             f"its sha256): put the right one back or {again}")
        meta["tokenizer"] = str(path)
    return meta


def open_tokens(folder: str, split: str) -> np.memmap:
    """The token ids of `split` ("train" or "val") of a prepared folder, on disk: 1-D and read-only.

    Raises what load_meta raises.
    """
    return np.memmap(Path(folder, f"{split}.bin"), dtype=load_meta(folder)["dtype"], mode="r")


def verify_tokens(folder: str, trust_stamp: bool = True) -> None:
    """Check that the tokens of a prepared folder are what was prepared, and in the vocabulary.

    To read all of them takes minutes for 100 billion tokens, so it is done once: verified.json then
    holds the size and the time of the last change of each file. If these are still the same, and
    with trust_stamp, nothing is read. A copied folder is read once more. Raises ValueError if the
    tokens are not what was prepared, and what load_meta raises.
    """
    meta = load_meta(folder)
    stamp = {}
    for name in ("meta.json", "train.bin", "val.bin"):
        status = Path(folder, name).stat()
        stamp[name] = [status.st_size, status.st_mtime_ns]
    path = Path(folder, "verified.json")
    if trust_stamp:
        with suppress(OSError, ValueError):  # it is not there, or damaged
            if json.loads(path.read_bytes()) == stamp:
                return
    again = f"delete {folder} and run data/prepare.py again"
    total = sum(meta[split]["tokens"] for split in SPLITS)
    with tqdm(total=total, desc="checking tokens", unit_scale=True, disable=None) as bar:
        for split in SPLITS:
            tokens, digest = open_tokens(folder, split), hashlib.sha256()
            for start in range(0, len(tokens), CHUNK):
                piece = tokens[start : start + CHUNK]
                digest.update(piece)
                if piece.max() >= meta["vocab_size"]:
                    raise ValueError(f"{folder}/{split}.bin has the token {piece.max()}, outside "
                                     f"its vocabulary of {meta['vocab_size']}: {again}")
                bar.update(len(piece))
            if digest.hexdigest() != meta[split]["sha256"]:
                raise ValueError(f"{folder}/{split}.bin has changed since it was prepared (its "
                                 f"hash is not that of meta.json): {again}")
    try:
        path.write_text(json.dumps(stamp) + "\n")
    except OSError as error:
        print(f"warning: {path} cannot be written ({error.strerror}): each start reads all "
              f"{total:,} tokens to check them", file=sys.stderr)


def sequences(tokens: np.ndarray, starts: Iterable[int], length: int) -> torch.Tensor:
    """The length + 1 ids from each of `starts` on, one a row: (len(starts), length + 1)."""
    return torch.from_numpy(np.stack([tokens[s : s + length + 1] for s in starts]).astype(np.int64))


def draw_batch(
    tokens: np.ndarray, batch: int, length: int, seed: int, step: int, rank=0, n_process=1
) -> torch.Tensor:
    """This process's share of the sequences of one update: (batch / n_process, length + 1) ids from
    random places, which are a function of seed and step alone."""
    starts = np.random.default_rng([seed, step]).integers(len(tokens) - length, size=batch)
    return sequences(tokens, starts[rank::n_process], length)
