"""The held-out loss."""

import math

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from data.device import on_device
from data.tokenizer_json import Tokenizer
from data.tokens import CHUNK, sequences, text_sizes


@torch.no_grad()
def evaluate(model: nn.Module, tokens: np.ndarray, length: int, micro_batch: int, device: str,
             rank: int = 0, n_process: int = 1, shows: bool = False) -> Tensor:
    """This process's share of the mean loss, in nats a token, of sequences of `length` tokens side
    by side, `micro_batch` of them at a time: a scalar. The shares of all processes add up to the
    mean. With `shows` a terminal shows a bar."""
    starts = range(0, len(tokens) - length, length)  # of the sequences
    n_batch = -(-len(starts) // micro_batch)
    was_training = model.training
    model.eval()
    total = torch.zeros((), device=device)
    # All processes take equally many turns, because FSDP needs them all in each. In the last turn
    # some may have no rows of their own: they compute the last rows, and do not count them.
    turns = range(0, n_batch, n_process)
    for turn in tqdm(turns, disable=None if shows else True):  # None: shown on a terminal only
        i = min(turn + rank, n_batch - 1)
        own = starts[i * micro_batch : (i + 1) * micro_batch]
        rows = on_device(sequences(tokens, own, length), device)  # (B, T + 1)
        loss = model(rows[:, :-1], rows[:, 1:])
        total += loss * len(rows) * (i == turn + rank)
    model.train(was_training)
    return total / len(starts)


def n_predicted(tokens: np.ndarray, length: int) -> int:
    """How many tokens `evaluate` predicts: none of a last sequence that is cut short."""
    return (len(tokens) - 1) // length * length


def bits_per_byte(tokens: np.ndarray, length: int, tokenizer: Tokenizer) -> float:
    """What a loss of one nat a token is in bits a byte, for the tokens that `evaluate` predicts. An
    end-of-text token counts as a token and has no bytes."""
    n_token, sizes = n_predicted(tokens, length), text_sizes(tokenizer)
    predicted, starts = tokens[1 : n_token + 1], range(0, n_token, CHUNK)
    n_byte = sum(int(sizes[predicted[start : start + CHUNK]].sum()) for start in starts)
    return n_token / max(n_byte, 1) / math.log(2)
