"""Turn text into token files that train.py can memory-map.

    python data/prepare.py                                            # Python's own source -> data/stdlib
    python data/prepare.py input.txt --out data/shakespeare
    python data/prepare.py notes/ 'logs/*.txt' --tokenizer gpt2 --out data/mine
    python data/prepare.py https://example.com/pages.jsonl.gz --field text --out data/pages
    python data/prepare.py hf:roneneldan/TinyStories --out data/stories

An INPUT is a text file, a folder (searched recursively), a glob in quotes, a .jsonl or .jsonl.gz file (one
document a line), a URL of any of these files, or hf:NAME[:CONFIG] (the train split of a Hugging Face data
set). Without INPUT, the source of the Python standard library on this machine is used: no network needed.

The output folder holds train.bin and val.bin (flat token ids, each document ended by the end-of-text token)
and meta.json. Whole documents are held out for validation, chosen by a hash of their name, so a document
keeps its side whatever else is added. Where this would leave all plain-text files on one side, as it does with
one or few, the last part of each is held out instead. Text is tokenised in pieces of about 1 MB, cut at line
ends, so memory stays bounded.
"""

import argparse
import glob
import gzip
import hashlib
import io
import json
import os
import platform
import shutil
import signal
import sys
import sysconfig
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn
from urllib.parse import urlsplit

if __name__ == "__main__":  # Python looks for modules in this file's folder, not in the one above
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import tiktoken
from tqdm import tqdm

from data.script import parse_args, run_script
from data.tokens import SPLITS, TOKENIZERS, keep_tokenizer, load_tokenizer

PIECE = 1 << 20  # bytes of text read, tokenised and held per worker at a time
JSONL = (".jsonl", ".jsonl.gz")

# ---- sources: what the inputs on the command line stand for


class Source(NamedTuple):
    """A plain-text file (rows is None), or the numbered rows of a .jsonl file or data set."""

    name: str  # what messages call it
    key: str  # decides its documents' split: unlike `name`, the same wherever the input's root lies
    path: Path | None
    rows: Iterable[tuple[int, Any]] | None
    found: bool  # in a folder or by a glob, rather than named: may turn out not to be text


def file_source(name: str, key: str, path: Path, found: bool) -> Source:
    """The Source of a file, whose kind its ending decides."""
    return Source(name, key, path, read_jsonl(name, path) if path.name.lower().endswith(JSONL) else None, found)


def find_sources(inputs: list[str], downloads: Path) -> list[Source]:
    """Resolve `inputs` in order, fetching URLs into the folder `downloads`. Raises ValueError or OSError."""
    if not inputs:
        root = sysconfig.get_paths()["stdlib"]
        excluded = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
        return [source for source in find_files(root, excluded) if source.key.endswith(".py")]
    sources = []
    for text in inputs:
        if text.startswith(("http://", "https://")):
            suffix = next((suffix for suffix in JSONL if urlsplit(text).path.endswith(suffix)), ".txt")
            path = downloads / f"{len(sources)}{suffix}"
            download(text, path)
            found = [file_source(text, text, path, False)]
        elif text.startswith("hf:"):
            found = [Source(text, text, None, enumerate(open_dataset(text), start=1), False)]
        elif os.path.isdir(text):
            found = list(find_files(text))
        elif os.path.isfile(text):
            found = [file_source(text, os.path.basename(text), Path(text), False)]
        elif glob.has_magic(text):
            root = Path(text).parent
            while glob.has_magic(str(root)):
                root = root.parent
            paths = [Path(name) for name in sorted(glob.glob(text, recursive=True)) if os.path.isfile(name)]
            found = [file_source(str(path), path.relative_to(root).as_posix(), path, True) for path in paths]
        else:
            raise FileNotFoundError(f"no such input: {text!r}: give a text or .jsonl file, a folder, a glob "
                                    "in quotes, a URL or hf:NAME")
        if not found:
            raise FileNotFoundError(f"no files in {text}")
        sources += found
    return sources


def find_files(root: str, excluded: Iterable[str] = ()) -> Iterator[Source]:
    """The files under the folder `root` in a fixed order, except in hidden folders and those `excluded`."""

    def fail(error: OSError) -> NoReturn:
        raise error  # os.walk would pass over a folder that cannot be read

    for folder, folders, files in os.walk(root, onerror=fail):
        # os.walk descends into what is left in `folders`, in this order
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in excluded)
        for path in (Path(folder, name) for name in sorted(files) if not name.startswith(".")):
            if path.is_file():
                yield file_source(str(path), path.relative_to(root).as_posix(), path, True)


def download(url: str, path: Path) -> None:
    """Stream `url` into the new file `path`. Raises OSError if that fails."""
    import requests  # tiktoken brings it along

    headers = {"Accept-Encoding": "identity"}  # a .jsonl.gz must arrive as it is, not unpacked on the way
    try:
        with (requests.get(url, headers=headers, stream=True, timeout=60) as response,
              open(path, "wb") as file,
              tqdm(desc="downloading", unit="B", unit_scale=True, disable=None) as bar):
            response.raise_for_status()
            for chunk in response.iter_content(PIECE):
                bar.update(file.write(chunk))
    except requests.RequestException as error:
        raise OSError(f"cannot download {url}: {error}") from error


def open_dataset(spec: str) -> Iterable[dict]:
    """The rows of hf:NAME or hf:NAME:CONFIG, streamed. Raises ValueError if there is no such data set."""
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"{spec} needs the package datasets: pip install '.[datasets]'") from error
    name, _, config = spec.removeprefix("hf:").partition(":")
    try:
        return datasets.load_dataset(name, config or None, split="train", streaming=True)
    except (ValueError, OSError) as error:
        raise ValueError(f"cannot open the train split of {spec}: {error}") from error


# ---- documents: the units of deduplication and of the train/val split


class Document(NamedTuple):
    """A text: its split, a 16-byte hash of its content, and its UTF-8 bytes, to be read once."""

    split: str
    digest: bytes
    pieces: Iterable[bytes]


def read_documents(sources: list[Source], field: str, val_fraction: float,
                   dropped: Counter) -> Iterator[Document]:
    """All documents of `sources`, in order. Raises ValueError or OSError, naming the file (and line)."""
    sides = {source.key: choose_split(source.key, val_fraction) for source in sources if source.rows is None}
    one_sided = len(set(sides.values())) == 1
    for source in sources:
        try:
            if source.rows is not None:
                yield from read_rows(source, field, val_fraction)
            elif one_sided:
                yield from read_text(source, hold_out_end(source.path, val_fraction), dropped)
            else:
                yield from read_text(source, [(sides[source.key], 0, sys.maxsize)], dropped)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{source.name} is damaged, fetch it again: {error}") from error


def choose_split(key: str, val_fraction: float) -> str:
    """The split of the document `key`: val with probability `val_fraction`, decided by the key alone."""
    draw = int.from_bytes(hashlib.blake2b(os.fsencode(key), digest_size=8).digest())
    return "val" if draw < val_fraction * 2**64 else "train"


def hold_out_end(path: Path, val_fraction: float) -> list[tuple[str, int, int]]:
    """The sections (split, first byte, size) of a text whose end is held out."""
    size = path.stat().st_size
    end = int(size * (1 - val_fraction))
    start = max(end - PIECE, 0)
    with open(path, "rb") as file:
        file.seek(start)
        cut = start + last_cut(file.read(end - start))
    return [("train", 0, cut), ("val", cut, size - cut)]


def read_text(source: Source, sections: list[tuple[str, int, int]], dropped: Counter) -> Iterator[Document]:
    """The sections (split, first byte, size) of a plain-text file, each of them a document.

    A file is read twice, to know its hash before it is tokenised without holding it in memory.
    """
    with open(source.path, "rb") as file:
        for split, start, size in sections:
            file.seek(start)
            try:
                digest = content_hash(check_text(read_pieces(file, size)))
            except ValueError as error:
                if not source.found:
                    raise ValueError(f"{source.name} is not UTF-8 text: convert or omit it") from error
                dropped["skipped_files"] += 1
                return
            file.seek(start)
            yield Document(split, digest, read_pieces(file, size))


def read_rows(source: Source, field: str, val_fraction: float) -> Iterator[Document]:
    """The `field` of every row, each of them a document."""
    for number, row in source.rows:
        where = f"{source.name}:{number}"
        text = row.get(field) if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise ValueError(f"{where}: no text in the field {field!r}: name the field with --field")
        try:
            data = text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{where}: the field {field!r} is not valid Unicode: {error}") from error
        split = choose_split(f"{source.key}:{number}", val_fraction)
        yield Document(split, content_hash([data]), read_pieces(io.BytesIO(data)))


def read_jsonl(name: str, path: Path) -> Iterator[tuple[int, Any]]:
    """The line numbers and values of a .jsonl or .jsonl.gz file. Raises ValueError if a line is not JSON."""
    with gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{name}:{number}: not valid JSON: {error}") from error


def content_hash(pieces: Iterable[bytes]) -> bytes:
    """16 bytes, so that deduplication remembers little."""
    state = hashlib.blake2b(digest_size=16)
    for piece in pieces:
        state.update(piece)
    return state.digest()


def check_text(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Pass `pieces` on. Raises ValueError if they are not UTF-8 text; a zero byte betrays a binary file."""
    for piece in pieces:
        if "\0" in piece.decode():
            raise ValueError("zero byte")
        yield piece


def read_pieces(stream: BinaryIO, size: int = sys.maxsize) -> Iterator[bytes]:
    """The next `size` bytes of `stream`, in pieces of at most PIECE bytes that never split a character."""
    rest = b""
    while block := stream.read(min(PIECE - len(rest), size)):
        size -= len(block)
        rest += block
        if len(rest) == PIECE:
            cut = last_cut(rest)
            yield rest[:cut]
            rest = rest[cut:]
    if rest:
        yield rest


def last_cut(block: bytes) -> int:
    """Where to end a piece of text: after its last line end or, if it has none, before its last character."""
    if b"\n" in block:
        return block.rindex(b"\n") + 1
    cut = len(block) - 1
    while cut > 0 and block[cut] & 0xC0 == 0x80:  # the bits 10 mark all but the first byte of a character
        cut -= 1
    return max(cut, 0)


# ---- tokenising: batches of pieces in, token files out


def make_batches(documents: Iterable[Document], counts: dict[str, Counter], dropped: Counter,
                 bar: tqdm) -> Iterator[list[tuple[str, bytes | None]]]:
    """Batches of about PIECE bytes of (split, piece), None marking a document's end, without duplicates."""
    seen = {content_hash([])}  # so that empty documents are dropped as well
    batch, size = [], 0
    for document in documents:
        if document.digest in seen:
            dropped["dropped_documents"] += 1
            continue
        seen.add(document.digest)
        counts[document.split]["documents"] += 1
        for piece in document.pieces:
            counts[document.split]["bytes"] += len(piece)
            bar.update(len(piece))
            batch.append((document.split, piece))
            size += len(piece)
            if size >= PIECE:
                yield batch
                batch, size = [], 0
        batch.append((document.split, None))
    yield batch


def map_threads(function: Callable, items: Iterable, workers: int) -> Iterator:
    """map(function, items) in threads, in order, with at most 2 * workers results or items waiting.

    Threads use all cores here, since tiktoken lets go of Python's lock while it encodes.
    """
    with ThreadPoolExecutor(workers) as pool:
        waiting = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def encode(encoding: tiktoken.Encoding, dtype: str,
           batch: list[tuple[str, bytes | None]]) -> dict[str, np.ndarray]:
    """The token ids of a batch, by split."""
    parts = {split: [np.empty(0, dtype)] for split in SPLITS}
    for split, piece in batch:
        if piece is None:
            ids = np.array([encoding.eot_token])
        else:  # disallowed_special: text that spells a special token is ordinary text
            ids = encoding.encode_to_numpy(piece.decode(), disallowed_special=())
        parts[split].append(ids.astype(dtype))
    return {split: np.concatenate(arrays) for split, arrays in parts.items()}


def write_tokens(work: Path, sources: list[Source], encoding: tiktoken.Encoding, field: str,
                 val_fraction: float, workers: int) -> dict[str, Any]:
    """Write train.bin and val.bin into the folder `work`; returns dtype and counts, as in meta.json."""
    dtype = "uint16" if encoding.n_vocab <= 2**16 else "uint32"
    counts = {split: Counter(documents=0, tokens=0, bytes=0) for split in SPLITS}
    dropped = Counter(skipped_files=0, dropped_documents=0)
    hashes = {split: hashlib.sha256() for split in SPLITS}
    total = sum(source.path.stat().st_size for source in sources if source.path)
    with ExitStack() as stack:
        files = {split: stack.enter_context(open(work / f"{split}.bin", "wb")) for split in SPLITS}
        bar = stack.enter_context(tqdm(total=total, unit="B", unit_scale=True, disable=None))
        batches = make_batches(read_documents(sources, field, val_fraction, dropped), counts, dropped, bar)
        for parts in map_threads(partial(encode, encoding, dtype), batches, workers):
            for split, ids in parts.items():
                files[split].write(ids)
                hashes[split].update(ids)
                counts[split]["tokens"] += len(ids)
        bar.update(max(0, total - bar.n))  # what was dropped is done, too
    documents = sum(counts[split]["documents"] for split in SPLITS)
    for split, change in zip(SPLITS, ("lower", "raise")):
        if not counts[split]["documents"]:
            advice = f" or {change} --val_fraction (now {val_fraction:g})" if documents else ""
            raise ValueError(f"the {split} split would be empty (documents in all: {documents}): add text{advice}")
    splits = {split: dict(counts[split], sha256=hashes[split].hexdigest()) for split in SPLITS}
    return {"dtype": dtype, **dropped, **splits}


def prepare(inputs: list[str], out: str, tokenizer: str = "byte", field: str = "text",
            val_fraction: float = 0.05, workers: int | None = None) -> dict[str, Any]:
    """Tokenise `inputs` ([]: the Python standard library) into the new folder `out`; returns its meta.json.

    `workers` is the number of threads (None: one a core). The output does not depend on it. Raises ValueError
    or OSError with a one-line message for bad input; `out` then does not exist, as after an interruption.
    """
    if not 0 < val_fraction < 1:
        raise ValueError(f"--val_fraction must lie between 0 and 1, not {val_fraction:g}")
    workers = os.cpu_count() if workers is None else workers
    if workers < 1:
        raise ValueError(f"--workers must be at least 1, not {workers}")
    target = Path(out).resolve()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise FileExistsError(f"{out} already exists: delete it or choose another --out")
    encoding = load_tokenizer(tokenizer)
    work = target.with_name(f"{target.name}.tmp-{os.getpid()}")
    work.mkdir(parents=True)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a kill cleans up as an interrupt does
    try:
        downloads = work / "downloads"
        downloads.mkdir()
        sources = find_sources(inputs, downloads)
        written = write_tokens(work, sources, encoding, field, val_fraction, workers)
        meta = {"tokenizer": keep_tokenizer(encoding, work), "vocab_size": encoding.n_vocab, "eot": encoding.eot_token,
                "sources": inputs or [f"the standard library of Python {platform.python_version()}"],
                "val_fraction": val_fraction, **written}
        (work / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
        shutil.rmtree(downloads)
        for path in work.iterdir():
            with open(path, "r+b") as file:
                os.fsync(file.fileno())  # the folder must not appear before its content is on disk
        os.rename(work, target)
    except BaseException:  # a keyboard interrupt, too
        shutil.rmtree(work)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    return meta


def main(argv: list[str]) -> None:
    """The command line. Raises ValueError or OSError for bad input."""
    parser = argparse.ArgumentParser(prog="prepare.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="*", metavar="INPUT")
    parser.add_argument("--out", help="new folder for the token files (data/stdlib if there is no INPUT)")
    parser.add_argument("--tokenizer", default="byte", help=f"one of {', '.join(TOKENIZERS)}, or a tokenizer.json (default: byte)")
    parser.add_argument("--field", default="text", help="of .jsonl and hf: rows, the text (default: text)")
    parser.add_argument("--val_fraction", type=float, default=0.05, help="held out, of 1 (default: 0.05)")
    parser.add_argument("--workers", type=int, help="threads (default: one a core)")
    args = parse_args(parser, argv)
    if args.inputs and not args.out:
        raise ValueError("--out is missing: name the new folder for the token files, such as --out data/mine")
    args.out = args.out or "data/stdlib"
    meta = prepare(**vars(args))
    for split in SPLITS:
        counts = meta[split]
        print(f"{split}: {counts['documents']:,} documents, {counts['tokens']:,} {meta['tokenizer']} tokens, "
              f"{counts['bytes']:,} bytes of text")
    print(f"skipped {meta['skipped_files']:,} files that are not UTF-8 text; "
          f"dropped {meta['dropped_documents']:,} duplicate or empty documents")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run_script(main)
