"""Turn text into token files that train.py can memory-map.

    python data/prepare.py                              # Python's own source -> data/stdlib
    python data/prepare.py input.txt --out data/shakespeare
    python data/prepare.py notes/ logs/*.txt --tokenizer gpt2 --out data/mine
    python data/prepare.py https://example.com/pages.jsonl.gz --field body --out data/pages
    python data/prepare.py hf:roneneldan/TinyStories --out data/stories
    python data/prepare.py --verify data/mine           # read all tokens of a prepared folder

An INPUT is a file, a folder with all that is in it, the URL of a file, or hf:NAME[:CONFIG], the
train split of a Hugging Face data set. Files that end in .jsonl, .ndjson, .json (one JSON object a
line), .csv or .parquet hold rows, and each row is a document. Any other file is plain text and one
document. All but .parquet may be packed as .gz or .zst. (hf:, .parquet, .zst: pip install
'.[datasets]'; a tokenizer.json: '.[hf]'.)

The output folder holds train.bin and val.bin (flat token ids, each document ended by the
end-of-text token), meta.json and verified.json. About val_fraction of the tokens are held out for
validation, but at least 1025 (of a text with fewer than 2050 tokens a quarter), and in whole
documents if possible: see data/split.py.

Duplicate and empty documents are dropped. Hidden files are skipped, so are bad rows (more than 1%
of them are an error) and files without text in a folder. A row must fit in memory. However long
other texts are, about 40 bytes are held for each document and 1 kB for each file.
"""

import json
import os
import platform
import sys
from argparse import SUPPRESS
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # Python looks for modules in this file's folder, not in the one above
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
from tqdm import tqdm

from data.documents import PIECE, Document, LeftOut, drop_duplicates, find_sources, read_documents
from data.script import is_taken, naming, new_folder, new_parser, parse_args, run_script
from data.split import SEQUENCE, split_tokens
from data.tokenizer_json import Tokenizer
from data.tokens import (
    SPLITS,
    TOKENIZERS,
    keep_tokenizer,
    load_tokenizer,
    token_dtype,
    verify_tokens,
)

DEFAULT_DATA = "data/stdlib"
Batch = list[tuple[str, bytes | None]]  # names of texts and pieces of them; None ends a text


def make_batches(documents: Iterable[Document], bar: tqdm) -> Iterator[Batch]:
    """The pieces of all documents in batches of about PIECE bytes."""
    batch, size = [], 0
    for document in documents:
        for piece in document.pieces:
            bar.update(len(piece))
            batch.append((document.name, piece))
            size += len(piece)
            if size >= PIECE:
                yield batch
                batch, size = [], 0
        batch.append((document.name, None))
    yield batch


def map_threads(function: Callable, items: Iterable, workers: int) -> Iterator:
    """map(function, items) in threads, in order, with at most 2 * workers results or items waiting.

    Threads use all cores here, since tokenizers let go of Python's lock while they encode.
    """
    with ThreadPoolExecutor(workers) as pool:
        waiting = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def encode(tokenizer: Tokenizer, batch: Batch) -> np.ndarray:
    """The token ids of a batch. Raises ValueError, naming the text, if the tokenizer fails."""
    dtype = token_dtype(tokenizer)
    parts = [np.empty(0, dtype)]
    for name, piece in batch:
        if piece is None:
            parts.append(np.array([tokenizer.eot_token], dtype))
            continue
        try:  # disallowed_special: text that spells a special token is ordinary text
            ids = tokenizer.encode_to_numpy(piece.decode(), disallowed_special=())
        except ValueError as error:
            raise ValueError(f"{name} cannot be tokenised ({error}): mend or omit it, or choose "
                             "another --tokenizer") from error
        parts.append(ids.astype(dtype))
    return np.concatenate(parts)


def write_tokens(path: Path, documents: Iterable[Document], tokenizer: Tokenizer,
                 workers: int, total: int) -> np.ndarray:
    """Write the tokens of all documents to the new file `path`; returns where each ends, (n,).

    The progress bar ends at `total` bytes. Raises what encode raises.
    """
    ends, n_written = [], 0
    bar = tqdm(total=total, unit="B", unit_scale=True, disable=None)
    with open(path, "wb") as file, bar:
        for ids in map_threads(partial(encode, tokenizer), make_batches(documents, bar), workers):
            file.write(ids)
            ends.append(np.flatnonzero(ids == tokenizer.eot_token) + n_written + 1)
            n_written += len(ids)
        bar.update(max(0, total - bar.n))  # what was left out is done, too
    return np.concatenate(ends)


def prepare(inputs: list[str], out: str, tokenizer: str = "byte", field: str | None = None,
            val_fraction: float = 0.05, workers: int | None = None) -> dict[str, Any]:
    """Tokenise `inputs` ([]: the Python standard library) into the new folder `out`.

    Returns its meta.json. `field` is that of the text in rows (None: "text"), `workers` the number
    of threads (None: one a core), which does not change the output. Raises ValueError or OSError
    with a one-line message for bad input; `out` then does not exist, as after an interruption.
    """
    if not 0 < val_fraction <= 0.5:
        raise ValueError(f"--val_fraction must be above 0 and at most 0.5, not {val_fraction:g}")
    workers = os.cpu_count() if workers is None else workers
    if workers < 1:
        raise ValueError(f"--workers must be at least 1, not {workers}")
    if is_taken(out):
        raise FileExistsError(f"{out} already exists: choose another --out")
    loaded = load_tokenizer(tokenizer)
    with naming(out), new_folder(out) as folder:
        meta = write_data(folder, inputs, loaded, field, val_fraction, workers)
        (folder / "meta.json").write_text(f"{json.dumps(meta, indent=2)}\n")
        verify_tokens(str(folder))
    return meta


def write_data(folder: Path, inputs: list[str], tokenizer: Tokenizer, field: str | None,
               val_fraction: float, workers: int) -> dict[str, Any]:
    """Write the tokens of `inputs` into `folder`, and downloads beside it. Returns meta.json. The
    arguments are those of `prepare`, with the tokenizer loaded. Raises ValueError if there is no
    text, and what the functions called here raise."""
    key = "text" if field is None else field
    sources = find_sources(inputs, key, downloads=folder.parent)
    if field is not None and all(source.rows is None for source in sources):
        raise ValueError(f"--field {field} is for rows, and no INPUT has any: leave it out")
    digests, left_out = array("Q"), LeftOut()
    documents = drop_duplicates(read_documents(sources, key, left_out), digests, left_out)
    total = sum(source.path.stat().st_size for source in sources if source.path)
    ends = write_tokens(folder / "train.bin", documents, tokenizer, workers, total)
    if not digests:
        examples = "; ".join(left_out.file_examples.values())
        why = f" ({examples})" if examples else ""
        raise ValueError(f"no text: {left_out.skipped_files:,} files in folders were skipped{why}, "
                         f"{left_out.dropped_documents:,} documents are empty: name other files "
                         "or, for rows, another --field")
    splits = split_tokens(folder, ends, np.frombuffer(digests, np.uint64), val_fraction, tokenizer)
    stdlib = f"the standard library of Python {platform.python_version()}"
    return {**keep_tokenizer(tokenizer, folder), "vocab_size": tokenizer.n_vocab,
            "eot": tokenizer.eot_token, "dtype": token_dtype(tokenizer).name,
            "sources": inputs or [stdlib], "val_fraction": val_fraction,
            "skipped_files": left_out.skipped_files, "skipped_rows": left_out.skipped_rows,
            "skipped_file_examples": [*left_out.file_examples.values()],
            "skipped_row_examples": [*left_out.row_examples],
            "dropped_documents": left_out.dropped_documents, **splits}


def find_data(folder: str) -> None:
    """Prepare the default data if they are missing, and do `verify_tokens`."""
    if folder == DEFAULT_DATA and not os.path.exists(folder):
        with suppress(FileExistsError):  # another machine was faster
            prepare([], folder)
    verify_tokens(folder)


def main(argv: list[str]) -> None:
    """The command line. Raises ValueError or OSError for bad input."""
    parser = new_parser("prepare.py", __doc__, argument_default=SUPPRESS)
    parser.add_argument("inputs", nargs="*", metavar="INPUT")
    parser.add_argument("--out",
                        help=f"new folder for the token files (without INPUT: {DEFAULT_DATA})")
    parser.add_argument("--tokenizer", help=f"one of {', '.join(TOKENIZERS)} (default: byte), or "
                        "the path of a tokenizer.json")
    parser.add_argument("--field", help="the field of rows that holds the text, one name for all"
                        " inputs (default: text)")
    parser.add_argument("--val_fraction", type=float, help="held out, of 1 (default: 0.05)")
    parser.add_argument("--workers", type=int, help="threads (default: one a core)")
    parser.add_argument("--verify", metavar="FOLDER", help="read all tokens of a prepared folder")
    args = vars(parse_args(parser, argv))
    if "verify" in args:
        if len(args) > 1:
            raise ValueError("--verify FOLDER only reads what is prepared: give nothing else")
        verify_tokens(args["verify"], trust_stamp=False)
        print(f"{args['verify']} holds what was prepared")
        return
    if "inputs" in args and "out" not in args:
        raise ValueError("--out is missing: name the new folder for the token files, such as "
                         "--out data/mine")
    args = {"inputs": [], "out": DEFAULT_DATA, **args}
    meta = prepare(**args)
    for split in SPLITS:
        counts = meta[split]
        print(f"{split}: {counts['documents']:,} documents, {counts['tokens']:,} "
              f"{meta['tokenizer']} tokens, {counts['bytes']:,} bytes of text")
    print(f"skipped {meta['skipped_files']:,} files without text and {meta['skipped_rows']:,} bad "
          f"rows; dropped {meta['dropped_documents']:,} duplicate or empty documents")
    if examples := meta["skipped_file_examples"] + meta["skipped_row_examples"]:
        print(f"skipped are, for example, {'; '.join(examples)}")
    if (shorter := min(meta[split]["tokens"] for split in SPLITS)) < SEQUENCE:
        print(f"prepare.py: warning: with so little text, train.py needs --block_size "
              f"{shorter - 1} or less", file=sys.stderr)
    print(f"wrote {args['out']}")


if __name__ == "__main__":
    run_script(main)
