"""What is held out for validation: whole documents, or the ends of long ones.

If there are many documents, the hash of a text decides on which side it is. So it stays there when
others are added.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator
from itertools import chain, cycle, groupby, pairwise
from operator import itemgetter
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from data.tokenizer_json import Tokenizer
from data.tokens import CHUNK, SPLITS, text_sizes, token_dtype

SEQUENCE = 1025  # tokens: a side that is shorter cannot train models with a block_size of 1024


def split_tokens(folder: Path, ends: np.ndarray, digests: np.ndarray, val_fraction: float,
                 tokenizer: Tokenizer) -> dict[str, dict]:
    """Move what is held out from train.bin, which has all documents, to val.bin in the same folder.

    ends (n,): how many tokens there are up to the end of each document; digests (n,): hashes of
    their texts, 64 bits each. Returns for each split its documents, tokens, bytes of text and the
    sha256 of its file. Raises ValueError if there is too little text for two splits.
    """
    tokens = np.memmap(folder / "train.bin", token_dtype(tokenizer), mode="r")
    cuts = hold_out(tokens, ends, digests, val_fraction, tokenizer)
    del tokens  # Windows does not truncate a file that is mapped into memory
    if (cuts == ends).all():
        raise ValueError(f"{ends[-1]} tokens of text are too few to hold out some: add more text")
    return divide(folder, ends, cuts, tokenizer)


def hold_out(tokens: np.ndarray, ends: np.ndarray, digests: np.ndarray, val_fraction: float,
             tokenizer: Tokenizer) -> np.ndarray:
    """At which token the held-out part of each document begins: (n,). If it has none, its end.

    Wanted is val_fraction of all tokens. Each side must get SEQUENCE tokens or, if that is not
    possible, a quarter. The first of these choices is taken that gives from half to twice of what
    is wanted, and leaves at least half of the other tokens:
    1. The documents with a digest below val_fraction * 2**64, whatever the others are.
    2. Documents in the order of their digests until it is enough, without those that are too long.
    3. The ends of those that are too long.
    """
    begins, total = np.concatenate([[0], ends[:-1]]), int(ends[-1])
    lengths = ends - begins
    least = SEQUENCE if total >= 2 * SEQUENCE else total // 4
    wanted = max(val_fraction * total, least)
    low, high = max(wanted / 2, least), min(2 * wanted, (total + wanted) / 2, total - least)
    chosen = digests < val_fraction * 2**64
    if low <= lengths[chosen].sum() <= high:
        return np.where(chosen, begins, ends)
    chosen[:], n_held = False, 0
    for i in np.argsort(digests):
        if n_held < wanted and lengths[i] <= high:
            if n_held + lengths[i] > high:  # it is enough alone
                chosen[:], n_held = False, 0
            chosen[i] = True
            n_held += lengths[i]
    if n_held >= low:
        return np.where(chosen, begins, ends)
    long = lengths > high
    if not long.any():
        long[:] = True
    share = wanted / lengths[long].sum()
    near = min(0.02, share, 1 - (wanted + least) / total)  # how far a line end may be
    cuts = ends.copy()
    for i in np.flatnonzero(long):
        text = tokens[begins[i] : ends[i] - 1]
        cuts[i] = begins[i] + find_cut(text, share, near, tokenizer)
    return cuts


def find_cut(text: np.ndarray, share: float, near: float, tokenizer: Tokenizer) -> int:
    """Before which token to cut a text so that the fraction `share` of it, or more, comes after.

    That is at the last line end before the place after which exactly `share` comes. If this line
    end is further from there than the fraction `near` of the text, or than CHUNK tokens, the cut is
    between two characters. A text that is too short is not cut: then the place after its
    end-of-text token is returned.
    """
    place = int(len(text) * (1 - share))
    lowest = max(1, place - min(int(near * len(text)), CHUNK))
    first = max(1, lowest - 3)  # a character has at most four bytes, so at most four tokens
    words = tokenizer.decode_tokens_bytes(text[first - 1 : place + 1].tolist())
    for cut in range(place, lowest - 1, -1):
        if words[cut - first].endswith(b"\n"):
            return cut
    for cut in range(place, first - 1, -1):
        if words[cut - first + 1][0] & 0xC0 != 0x80:  # bits that mark all but first bytes
            return cut
    return len(text) + 1


def divide(folder: Path, ends: np.ndarray, cuts: np.ndarray,
           tokenizer: Tokenizer) -> dict[str, dict]:
    """Move the tokens from cuts[i] to ends[i] of each document i from train.bin to val.bin."""
    dtype = token_dtype(tokenizer)
    eot = dtype.type(tokenizer.eot_token)

    def read(file: BinaryIO) -> Iterator[tuple[str, np.ndarray]]:
        bounds = chain([0], chain.from_iterable(zip(cuts, ends, strict=True)))
        parts = ((split, int(stop - start)) for split, (start, stop)
                 in zip(cycle(SPLITS), pairwise(bounds)) if start < stop)
        for split, group in groupby(parts, key=itemgetter(0)):
            rest = sum(length for _, length in group)
            while rest:
                ids = np.frombuffer(file.read(min(rest, CHUNK) * dtype.itemsize), dtype)
                rest -= len(ids)
                # a document that is cut ends twice, once on either side
                yield split, ids if rest or ids[-1] == eot else np.append(ids, eot)

    sizes = text_sizes(tokenizer)
    counts = {split: Counter(documents=0, tokens=0, bytes=0) for split in SPLITS}
    hashes = {split: hashlib.sha256() for split in SPLITS}
    with (open(folder / "train.bin", "rb") as source, open(folder / "train.bin", "r+b") as train,
          open(folder / "val.bin", "wb") as val,
          tqdm(total=int(ends[-1]), desc="dividing", unit_scale=True, disable=None) as bar):
        files = dict(zip(SPLITS, (train, val), strict=True))
        # train.bin is written over what has been read of it. With an added end-of-text token a
        # piece reaches one token further, so the next piece is read before this one is written.
        for (split, ids), _ in pairwise(chain(read(source), [None])):
            files[split].write(ids)
            hashes[split].update(ids)
            counts[split].update(documents=int((ids == eot).sum()), tokens=len(ids),
                                 bytes=int(sizes[ids].sum()))
            bar.update(len(ids))
        train.truncate()
    return {split: dict(counts[split], sha256=hashes[split].hexdigest()) for split in SPLITS}
