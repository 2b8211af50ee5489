"""From the inputs of data/prepare.py to documents. No file and no data set is held in memory."""

import csv
import dataclasses
import gzip
import hashlib
import io
import json
import os
import sqlite3
import sysconfig
import zlib
from array import array
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn
from urllib.parse import urlsplit

from tqdm import tqdm

from data.script import import_optional, naming

# Bytes of text read, tokenised and held per worker at a time. tiktoken fails at a million spaces.
PIECE = 1 << 19

# ---- sources: what the inputs on the command line stand for


class Source(NamedTuple):
    """A file of plain text (then rows is None), or the numbered rows of a file or data set."""

    name: str  # for messages
    path: Path | None
    rows: Iterable[tuple[int, Any]] | None  # each is a dict, a line of JSON, or else a bad row
    found: bool = False  # in a folder, so it may turn out to hold no text


def find_sources(inputs: list[str], field: str, downloads: Path) -> list[Source]:
    """Resolve `inputs` in order, fetching URLs into `downloads`. Raises ValueError or OSError."""
    if not inputs:
        root = sysconfig.get_paths()["stdlib"]
        excluded = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
        paths = [path for path in find_files(root, excluded) if path.suffix == ".py"]
        return [open_source(str(path), path, field, found=True) for path in paths]
    sources = []
    for text in inputs:
        if text.startswith("hf:"):
            sources.append(Source(text, None, open_dataset(text)))
        elif text.lower().startswith(("http://", "https://")):
            path = downloads / f"{len(sources)}-{Path(urlsplit(text).path).name[-100:]}"
            download(text, path)
            sources.append(open_source(text, path, field))
        elif os.path.isfile(text):
            sources.append(open_source(text, Path(text), field))
        elif os.path.isdir(text):
            paths = list(find_files(text))
            if not paths:
                raise FileNotFoundError(f"no files in {text}")
            sources += [open_source(str(path), path, field, found=True) for path in paths]
        else:
            advice = "give a file, a folder, a URL or hf:NAME"
            if any(character in text for character in "*?["):
                advice = "no file matches this pattern, or quotes kept it from the shell"
            raise FileNotFoundError(f"no such input: {text!r}: {advice}")
    return sources


def find_files(root: str, excluded: Iterable[str] = ()) -> Iterator[Path]:
    """The files under the folder `root` in a fixed order, except what is hidden or in `excluded`.

    Links are followed. Each folder is read once, or a link to a folder above it would repeat all.
    """

    def fail(error: OSError) -> NoReturn:
        raise error  # os.walk would pass over a folder that cannot be read

    walked = set()
    for folder, folders, files in os.walk(root, onerror=fail, followlinks=True):
        real = os.path.realpath(folder)
        if real in walked:
            folders.clear()
            continue
        walked.add(real)
        # os.walk descends into what is left in `folders`, in this order
        folders[:] = sorted(name for name in folders if name[0] != "." and name not in excluded)
        for path in (Path(folder, name) for name in sorted(files) if name[0] != "."):
            if path.is_file():
                yield path


def download(url: str, path: Path) -> None:
    """Stream `url` into the new file `path`. Raises OSError if that fails."""
    import requests  # tiktoken brings it along

    headers = {"Accept-Encoding": "identity"}  # a .gz must arrive as it is, not unpacked on the way
    try:
        with (requests.get(url, headers=headers, stream=True, timeout=60) as response,
              open(path, "wb") as file,
              tqdm(desc="downloading", unit="B", unit_scale=True, disable=None) as bar):
            response.raise_for_status()
            if path.suffix.lower() in (".gz", ".zst"):
                # Some servers call this the packing of the transfer, which requests would undo.
                response.raw.headers.pop("Content-Encoding", None)
            for chunk in response.iter_content(PIECE):
                bar.update(file.write(chunk))
    except requests.RequestException as error:
        raise OSError(f"cannot download {url}: {error}") from error


def open_dataset(spec: str) -> Iterator[tuple[int, dict]]:
    """The rows of hf:NAME or hf:NAME:CONFIG, streamed. Raises ValueError if that fails."""
    datasets = import_optional("datasets", spec, extra="datasets")
    name, _, config = spec.removeprefix("hf:").partition(":")
    if not name.strip("/"):
        raise ValueError(f"{spec} names no data set: write hf:NAME or hf:NAME:CONFIG")

    def read() -> Iterator[tuple[int, dict]]:
        try:
            rows = datasets.load_dataset(name, config or None, split="train", streaming=True)
            yield from enumerate(rows, start=1)
        except Exception as error:  # whatever the many libraries under it raise
            raise ValueError(f"cannot read the train split of {spec}: {error}") from error

    rows = read()
    return chain(list(islice(rows, 1)), rows)  # the first row at once: most errors come with it


# ---- files, as pieces of text or as rows


def open_file(path: Path) -> BinaryIO:
    """The bytes of a file, unpacked if its name ends in .gz or .zst."""
    if path.name.lower().endswith(".gz"):
        return gzip.open(path)
    if path.name.lower().endswith(".zst"):
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(open(path, "rb"), "zstd"))
    return open(path, "rb")


def read_pieces(stream: BinaryIO) -> Iterator[bytes]:
    """All of `stream` in pieces of at most PIECE bytes, cut at line ends or else characters."""
    rest = b""
    while block := stream.read(PIECE - len(rest)):
        rest += block
        if len(rest) == PIECE:
            cut = rest.rfind(b"\n") + 1
            if not cut:
                cut = PIECE - 1
                while cut > 0 and rest[cut] & 0xC0 == 0x80:  # not the first byte of a character
                    cut -= 1
            yield rest[:cut]
            rest = rest[cut:]
    if rest:
        yield rest


def open_source(name: str, path: Path, field: str, found: bool = False) -> Source:
    """The source that a file is. The ending of its name says whether it has rows, and which."""
    ending, rows = path.name.lower(), None
    kind = Path(ending.removesuffix(".gz").removesuffix(".zst")).suffix
    if kind == ".parquet" and not ending.endswith(kind):
        raise ValueError(f"{name} is packed twice, as a .parquet is packed itself: unpack it")
    if kind == ".parquet" or ending.endswith(".zst"):  # now, not when it is read after hours
        import_optional("pyarrow.parquet", name, extra="datasets")
    if kind in (".jsonl", ".ndjson", ".json"):
        rows = read_jsonl(path)
    elif kind == ".csv":
        rows = read_csv(path, field)
    elif kind == ".parquet":
        rows = read_parquet(path, field)
    return Source(name, path, rows, found)


def read_jsonl(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that are not empty, numbered."""
    with open_file(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line


def read_csv(path: Path, field: str) -> Iterator[tuple[int, dict[str, str] | csv.Error]]:
    """The rows after the first, which names the fields, each with the number of its last line. A
    row with text after the named fields becomes an error, which is a bad row. Raises csv.Error for
    a wrong quote in a file that has the `field`, because what follows it may be cut anywhere, and
    ValueError if two columns have the field's name."""
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is shorter than many a text
    # surrogateescape: bytes that are not UTF-8 make their own row a bad one, and no other
    how = {"encoding": "utf-8-sig", "errors": "surrogateescape", "newline": ""}
    with io.TextIOWrapper(open_file(path), **how) as file:
        n_named = next(csv.reader(file), []).count(field)
    if n_named > 1:
        raise ValueError(f"{path} has {n_named} columns named {field!r}: rename all but one")
    with io.TextIOWrapper(open_file(path), **how) as file:
        # strict, or a wrong quote would change the text; without the field there is no text
        reader = csv.DictReader(file, strict=n_named > 0)
        try:
            for row in reader:
                extra = row.pop(None, [])
                if any(extra):  # as after a comma in a text without quotes
                    row = csv.Error(f"{len(extra)} fields too many")
                yield reader.line_num, row
        except csv.Error as error:
            raise csv.Error(f"line {reader.reader.line_num}: {error}") from error


def read_parquet(path: Path, field: str) -> Iterator[tuple[int, dict]]:
    """The rows, numbered: of their fields only `field`, or all if it is not among them."""
    import pyarrow.parquet

    try:
        # By default pyarrow holds the whole file.
        file = pyarrow.parquet.ParquetFile(open_file(path), buffer_size=PIECE, pre_buffer=False)
        fields = [field] if field in file.schema_arrow.names else None
        batches = file.iter_batches(batch_size=100, columns=fields)
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)
    except pyarrow.ArrowException as error:
        raise OSError(error) from error


# ---- documents


class Document(NamedTuple):
    """A text."""

    name: str  # for messages: a file or FILE:ROW
    digest: int  # see content_hash
    pieces: Iterable[bytes]  # the text in UTF-8


@dataclasses.dataclass
class LeftOut:
    """Counts what does not become a document."""

    skipped_files: int = 0  # in folders, without text
    # reason -> the first file that was skipped for it, as "name: reason"
    file_examples: dict[str, str] = dataclasses.field(default_factory=dict)
    dropped_documents: int = 0  # duplicate or empty
    skipped_rows: int = 0
    rows: int = 0  # the skipped ones included
    row_examples: tuple[str, ...] = ()  # the first three skipped rows

    def skip_file(self, name: str, why: str) -> None:
        """Count a file in a folder that has no text."""
        self.skipped_files += 1
        self.file_examples.setdefault(why, f"{name!r}: {why}")

    def check_rows(self, field: str, at_least: int = 0) -> None:
        """Raises ValueError if more than 1% of the rows, or of `at_least`, were skipped."""
        if self.skipped_rows > max(self.rows, at_least) / 100:
            raise ValueError(f"{self.skipped_rows:,} of {self.rows:,} rows, more than 1%, have no "
                             f"valid text in the field {field!r}: name another --field, or mend "
                             "them (of JSON each line is a row, and a comma separates fields of a "
                             f".csv). They are {'; '.join(self.row_examples)}")


def read_documents(sources: list[Source], field: str, left_out: LeftOut) -> Iterator[Document]:
    """All documents of `sources`, in order. Raises ValueError or OSError, naming the file."""
    for source in sources:
        with reading(source):
            if source.rows is None:
                yield from read_text(source, left_out)
            else:
                yield from read_rows(source, field, left_out)
    left_out.check_rows(field)


@contextmanager
def reading(source: Source) -> Iterator[None]:
    """A context in which an error of reading becomes one that names the source."""
    try:
        with naming(source.name):
            yield
    except (EOFError, zlib.error, csv.Error, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # of the system, not of what is read
            raise
        advice = "is damaged, fetch it again"
        if "too much memory" in str(error):  # pyarrow unpacks windows of at most 128 MiB
            advice = "was packed with zstd --long: unpack it, or pack it again without that"
        raise ValueError(f"{source.name} {advice}: {error}") from error


def read_text(source: Source, left_out: LeftOut) -> Iterator[Document]:
    """A plain-text file. It may not fit in memory, so it is read twice: for its hash, as text."""
    try:
        with open_file(source.path) as file:
            digest = content_hash(check_text(read_pieces(file)))
    except ValueError as error:
        if not source.found:
            raise ValueError(
                f"{source.name} is not UTF-8 text ({error}): convert or omit it, or unpack it"
                " (only .gz and .zst are read packed)") from error
        left_out.skip_file(source.name, "not UTF-8 text")
        return
    yield Document(source.name, digest, read_again(source))


def read_again(source: Source) -> Iterator[bytes]:
    """The pieces of a plain-text file. They are read when the document is written, which is outside
    of `read_documents`, so an error gets its name here."""
    with reading(source), open_file(source.path) as file:
        yield from read_pieces(file)


def check_text(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Pass `pieces` on. Raises ValueError if they are not UTF-8, or hold a zero byte: that is no
    text."""
    for piece in pieces:
        if "\0" in piece.decode():
            raise ValueError("zero byte")
        yield piece


def read_rows(source: Source, field: str, left_out: LeftOut) -> Iterator[Document]:
    """The texts of rows. A file in a folder is skipped if its first 100 rows have none."""
    rows = iter(source.rows)
    first = list(islice(rows, 100 if source.found else 0))
    if source.found and all(row_text(row, field) is None for _, row in first):
        found = sorted({name for _, row in first for name in row_fields(row)})
        there = f" (it has {', '.join(found[:5])})" if found else ""
        left_out.skip_file(source.name, f"no text in the field {field!r}{there}")
        return
    for number, row in chain(first, rows):
        left_out.rows += 1
        name, text = f"{source.name}:{number}", row_text(row, field)
        if text is not None:
            yield Document(name, content_hash([text]), read_pieces(io.BytesIO(text)))
            continue
        left_out.skipped_rows += 1
        if left_out.skipped_rows <= 3:
            left_out.row_examples += (f"{name}: {row!r:.80}",)
        left_out.check_rows(field, at_least=1000)  # not after hours; ten may come first


def row_text(row: Any, field: str) -> bytes | None:
    """The UTF-8 text in the `field` of a row; None if it has none. A zero byte is in no text."""
    try:
        text = row_fields(row)[field].encode()
    except (KeyError, AttributeError, UnicodeEncodeError):
        return None
    return None if b"\0" in text else text


def row_fields(row: Any) -> dict[str, Any]:
    """The fields of a row, of which the one of text may be missing; none if it is damaged."""
    try:
        row = json.loads(row) if isinstance(row, bytes) else row
    except (ValueError, RecursionError):
        return {}
    return row if isinstance(row, dict) else {}


def drop_duplicates(documents: Iterable[Document], digests: array,
                    left_out: LeftOut) -> Iterator[Document]:
    """The documents that are not empty and not seen before; appends their hashes.

    SQLite looks the hashes up: what exceeds its cache is on the disk.
    """
    insert = "INSERT OR IGNORE INTO seen VALUES (?)"
    try:
        with closing(sqlite3.connect("")) as table:
            table.execute("PRAGMA cache_size = -65536")  # KiB
            table.execute("CREATE TABLE seen (digest INTEGER PRIMARY KEY)")  # from -2**63 on
            table.execute(insert, [content_hash([]) - 2**63])
            for document in documents:
                if table.execute(insert, [document.digest - 2**63]).rowcount:
                    digests.append(document.digest)
                    yield document
                else:
                    left_out.dropped_documents += 1
    except sqlite3.OperationalError as error:
        raise OSError(f"cannot store the hashes of all documents: {error}: set TMPDIR to a folder "
                      "with more room") from error


def content_hash(pieces: Iterable[bytes]) -> int:
    """A hash of 64 bits. The chance that any two of 100 million texts share theirs is 0.03%."""
    state = hashlib.blake2b(digest_size=8)
    for piece in pieces:
        state.update(piece)
    return int.from_bytes(state.digest())
