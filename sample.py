"""Use a trained model: python sample.py [--checkpoint out/toy] [--prompt TEXT]

Writes text: the prompt is read once; then each step feeds one new token per sample and finds the
past in a key/value cache. A single text appears while it is written. With --evaluate it measures
the model on prepared data instead, with --export_hf it writes the model for transformers.
"""

import codecs
import os
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import partial

# As in train.py: waiting threads sleep soon. torch reads these variables when it is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "10000"}

import torch
from torch import Tensor

from data.checkpoint import load_checkpoint
from data.device import can_capture, capture, copy_to_cpu, pick_device
from data.evaluation import bits_per_byte, evaluate, n_predicted
from data.hf import export_hf
from data.loss import chunked_loss
from data.script import new_parser, parse_args, run_script
from data.tokenizer_json import Tokenizer
from data.tokens import check_tokenizer, load_tokenizer, open_tokens, token_bytes, verify_tokens
from kha import Common, Transformer, fold

# --------------------------------------------------------------------------------------------------
# The cache


class LayerCache:
    """What one layer keeps of the past: tensors (B, length, ...)."""

    def __init__(self, length: int):
        self.length, self.buffers = length, []

    def update(self, common: Common, *new: Tensor) -> Iterable[Tensor]:
        """Store `new` (B, T, ...) at the positions; returns what these tokens attend to (B, S, ..).

        At the start of a text that is `new` itself (S = T), later the whole buffers (S = length).
        Shapes never change after the start, and the positions are on the device: so a CUDA graph of
        one step serves every later step.
        """
        if not self.buffers:
            self.buffers = [x.new_zeros(len(x), self.length, *x.shape[2:]) for x in new]
        for buffer, x in zip(self.buffers, new, strict=True):
            buffer.index_copy_(1, common.position, x)
        return new if common.mask is None else self.buffers


class Cache:
    """What a model keeps of the past, for texts of up to `length` tokens: a LayerCache a layer.

    Raises ValueError if the model's context is shorter than `length`.
    """

    def __init__(self, model: Transformer, length: int):
        if length > model.config.block_size:
            raise ValueError(
                f"{length} tokens are more than the model's context of {model.config.block_size}"
            )
        self.length = length
        self.layers = [LayerCache(length) for _ in model.blocks]

    def repeat(self, n: int) -> None:
        """Let each sequence be n sequences that share this past."""
        for layer in self.layers:
            layer.buffers = [buffer.repeat_interleave(n, dim=0) for buffer in layer.buffers]


# --------------------------------------------------------------------------------------------------
# Writing


def sample_logits(
    logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator
) -> Tensor:
    """Draw a token from each row of logits (B, V): (B,). Temperature 0 takes the likeliest.

    top_k > 0 keeps the k likeliest tokens; top_p < 1 keeps the fewest likeliest tokens that
    together have at least probability p.
    """
    if temperature == 0:
        return logits.argmax(-1)
    values = logits.float() / max(temperature, 1e-30)  # divided by less, float32 could overflow
    cuts = top_k > 0 or top_p < 1
    if cuts:
        values, tokens = values.sort(dim=-1, descending=True)  # (B, V), likeliest first
        values = values[:, : top_k or None]
    probs = values.softmax(-1)
    if top_p < 1:
        enough_before = probs.cumsum(-1) - probs >= top_p
        probs = probs.masked_fill(enough_before, 0)
    # This is the Gumbel-max trick in its exponential form. torch.multinomial would wait for the
    # device.
    noise = torch.empty_like(probs).exponential_(generator=generator)
    drawn = (probs / noise).argmax(-1, keepdim=True)  # (B, 1)
    return (tokens.gather(-1, drawn) if cuts else drawn).squeeze(-1)


def check_sampling(
    n_samples: int, max_new_tokens: int, temperature: float, top_k: int, top_p: float, seed: int
) -> None:
    """Raises ValueError for an option of `generate` that is impossible with any model."""
    if min(n_samples, max_new_tokens) < 1:
        raise ValueError("n_samples and max_new_tokens must be at least 1")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must be from -2^63 to 2^64 - 1, not {seed}")
    if not (temperature >= 0 and top_k >= 0 and 0 < top_p <= 1):
        raise ValueError(
            "temperature and top_k must not be negative, and top_p must be above 0 and at most 1"
        )


@torch.inference_mode()
def generate(
    model: Transformer,
    prompt: list[int],
    n_samples: int = 1,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    n_vocab: int | None = None,
    eot: int | None = None,
) -> Iterator[list[int | None]]:
    """Continue `prompt`, token ids, n_samples times as one batch. Yields the next token of every
    sample, None for one that has ended with token `eot`; stops when all have ended. Ids from
    n_vocab on are never drawn.

    The model sees at most its context, block_size tokens; of a longer prompt it sees the end. When
    a text fills the context, its last half becomes the start of the cache and writing goes on.
    Call model.eval() first, or a mixture counts these tokens into its load. Raises ValueError at
    the first next(), for an impossible prompt or option.
    """
    config, device = model.config, model.embed.weight.device
    if not prompt:
        raise ValueError("the prompt is empty: give at least one token")
    if max(prompt) >= config.vocab_size or min(prompt) < 0:
        raise ValueError(
            f"the prompt has a token outside the model's vocabulary of {config.vocab_size}"
        )
    check_sampling(n_samples, max_new_tokens, temperature, top_k, top_p, seed)
    prompt = prompt[-config.block_size :]
    length = min(config.block_size, len(prompt) + max_new_tokens)
    generator = torch.Generator(device).manual_seed(seed)
    draw = partial(
        sample_logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator
    )
    cache = Cache(model, length)
    texts = torch.zeros(n_samples, length, dtype=torch.long, device=device)  # tokens by position

    def prefill(text: Tensor) -> Tensor:
        """Begin the cache with text (B, T); returns the logits of the next token, (B, V)."""
        with torch.compiler.set_stance("force_eager"):  # each T would be compiled for itself
            return model(text, cache=cache)[:, -1, :n_vocab]

    n_cached = len(prompt)  # tokens in the cache; on the device this number is `position`
    texts[:, :n_cached] = torch.tensor(prompt, device=device)
    logits = prefill(texts[:1, :n_cached])  # (1, V)
    cache.repeat(n_samples)
    tokens = draw(logits.repeat(n_samples, 1))  # (B,)
    position = torch.tensor([n_cached], device=device)

    def decode() -> None:
        """Put the drawn tokens into the cache, and draw the next."""
        texts.index_copy_(1, position, tokens[:, None])
        logits = model(tokens[:, None], position=position, cache=cache)[:, -1, :n_vocab]  # (B, V)
        tokens.copy_(draw(logits))
        position.add_(1)

    ended, n_step = [False] * n_samples, 0
    for i in range(max_new_tokens):
        arrive = copy_to_cpu(tokens)
        if i + 1 < max_new_tokens:  # the device goes on while this token is read
            if n_cached == length:
                n_cached = max(1, length // 2)
                rest = texts[:, length - n_cached + 1 :]  # one token less: the new one comes too
                text = torch.cat((rest, tokens[:, None]), dim=1)  # (B, n_cached)
                tokens.copy_(draw(prefill(text)))
                position.fill_(n_cached)
            else:
                if n_step == 1 and can_capture(model):  # it has run once, as `capture` needs
                    decode = capture(decode, generator)
                decode()
                n_cached, n_step = n_cached + 1, n_step + 1
        new, _ = arrive()
        ended = [end or token == eot for token, end in zip(new, ended, strict=True)]
        yield [None if end else token for token, end in zip(new, ended, strict=True)]
        if all(ended):
            return


def lighten(model: Transformer) -> Transformer:
    """Make a trained model, in place, one for sampling only; returns it. Its knocks are folded, and
    on CUDA its parameters become bfloat16, except the routers, so that each token has the experts
    that it has in training. The balancing bias is no parameter, and has finer steps."""
    fold(model)
    if model.embed.weight.is_cuda:
        for name, p in model.named_parameters():
            if not name.endswith("router"):
                p.data = p.data.bfloat16()
    return model


def compile_steps(model: Transformer, n_samples: int) -> None:
    """Compile the model for `generate`'s steps of one token for each of n_samples.

    Kernels are tuned, and launched before the last one ends. In a dense model small kernels become
    one, and the long sums of one sample are spread over the chip.
    """
    # A mixture gains nothing by these two, and torch, up to 2.13 at least, fails to combine kernels
    # of which one sorts.
    dense = not model.moes()
    options = {
        "coordinate_descent_tuning": True,
        "triton.enable_pdl": True,
        "combo_kernels": dense,
        "triton.cooperative_reductions": dense and n_samples == 1,
    }
    for block in model.blocks:
        block.compile(dynamic=False, options=options)
    model.logits = torch.compile(model.logits, dynamic=False, options=options)


def write_samples(
    model: Transformer, tokenizer: Tokenizer, prompt: str, n_samples: int = 1, **options
) -> None:
    """Print the prompt (an empty one: the start of a document) and its continuations by `generate`.

    One sample streams as it is written; of several, each is printed when all are ready, under a
    ruler.
    """
    ids = tokenizer.encode(prompt, disallowed_special=()) or [tokenizer.eot_token]
    if len(ids) > model.config.block_size:
        print(
            f"note: the model sees the last {model.config.block_size} of the prompt's {len(ids)}"
            " tokens, which is its context",
            file=sys.stderr,
        )
    steps = generate(
        model, ids, n_samples, n_vocab=tokenizer.n_vocab, eot=tokenizer.eot_token, **options
    )
    # A token may end within a UTF-8 character: the decoder waits for the rest. A text's decoder is
    # made when it begins, so that for too many texts the model finds first that there is no room.
    decoders = defaultdict(partial(codecs.getincrementaldecoder("utf-8"), errors="replace"))
    texts, n_shown = [prompt] * n_samples, 0
    for new in steps:
        for j, token in enumerate(new):
            if token is not None:
                texts[j] += decoders[j].decode(token_bytes(tokenizer, token))
        if n_samples == 1:
            print(texts[0][n_shown:], end="", flush=True)
            n_shown = len(texts[0])
    texts = [text + decoders[j].decode(b"", final=True) for j, text in enumerate(texts)]
    if n_samples == 1:
        print(texts[0][n_shown:])
        return
    for j, text in enumerate(texts, start=1):
        print(f"--- {j} of {n_samples} ---\n{text}")


# --------------------------------------------------------------------------------------------------
# Measuring


def measure(model: Transformer, tokenizer: Tokenizer, folder: str, device: str) -> None:
    """Print a model's held-out loss on prepared data, which are in its tokens. Raises ValueError if
    the data have changed or are too few."""
    tokens = open_tokens(folder, "val")
    length = min(model.config.block_size, len(tokens) - 1)
    if length < 1:
        raise ValueError(f"{folder} holds out {len(tokens)} tokens: prepare more text")
    verify_tokens(folder)
    model.loss = chunked_loss(compiles=False)  # logits of many token ids need much memory
    micro_batch = max(1, 8192 // length)
    loss = evaluate(model, tokens, length, micro_batch, device, shows=True).item()
    bits = loss * bits_per_byte(tokens, length, tokenizer)
    print(
        f"{loss:.4f} nats per token, {bits:.4f} bits per byte"
        f" ({n_predicted(tokens, length):,} of {len(tokens):,} held-out tokens of {folder},"
        f" in sequences of {length})"
    )


def main(argv: list[str]) -> None:
    """The command line. Raises ValueError or OSError for bad input."""
    parser = new_parser("sample.py", __doc__)
    add = parser.add_argument
    add("--checkpoint", default="out/toy", help="a run's folder (then its best.pt, if it has"
        " one), or a file (default: out/toy)")
    add("--prompt", default="", help="text to continue, - for standard input; default: none")
    add("--n_samples", type=int, default=1, help="texts to write (default: 1)")
    add("--max_new_tokens", type=int, default=200, help="tokens of each text (default: 200)")
    add("--temperature", type=float, default=0.8, help="0 takes the likeliest (default: 0.8)")
    add("--top_k", type=int, default=0, help="draw from the k likeliest tokens; 0: from all"
        " (default: 0)")
    add("--top_p", type=float, default=1.0, help="draw from the likeliest tokens that together"
        " have this probability (default: 1)")
    add("--seed", type=int, default=0, help="the same seed draws the same text (default: 0)")
    add("--device", default="auto", help="auto, cuda, mps or cpu (default: auto)")
    add("--compile", action="store_true", help="compile the model: it takes a minute to start, then"
        " writes faster; CUDA only")
    add("--evaluate", metavar="DATA", help="print the held-out loss on this prepared data instead")
    add("--export_hf", metavar="FOLDER", help="write the model for transformers there instead")
    options = vars(parse_args(parser, argv))

    device, path = pick_device(options.pop("device")), options.pop("checkpoint")
    data, folder = options.pop("evaluate"), options.pop("export_hf")
    if folder and data:
        raise ValueError("--evaluate and --export_hf are two tasks: give one of them")
    if data or folder:
        task = "--evaluate" if data else "--export_hf"
        for name, value in options.items():  # all others are for writing
            if value != parser.get_default(name):
                raise ValueError(f"--{name} changes nothing in {task}: leave it out")
    compiled, prompt = options.pop("compile"), options.pop("prompt")
    if compiled and not device.startswith("cuda"):
        raise ValueError(f"--compile is for CUDA: leave it out on {device}")
    check_sampling(**options)  # before a large model is loaded
    if prompt == "-":
        try:
            prompt = sys.stdin.buffer.read().decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"the prompt is not UTF-8 text ({error}): convert it") from error
    model, checkpoint = load_checkpoint(path, device)
    loss = checkpoint.get("val_loss")
    held_out = f", held-out loss {loss:.4f}" if loss is not None else ""
    print(f"{checkpoint['path']}: step {checkpoint['step']}{held_out}", file=sys.stderr)
    tokenizer = load_tokenizer(checkpoint["tokenizer"])
    if folder:
        export_hf(model, folder, tokenizer)
        print(f"wrote {folder}")
        return
    if data:
        check_tokenizer(data, checkpoint["tokenizer"])
        if device.startswith("cuda"):
            model.compute_dtype = torch.bfloat16  # as in training
        measure(model, tokenizer, data, device)
        return
    lighten(model)
    if compiled:
        compile_steps(model, options["n_samples"])
    write_samples(model, tokenizer, prompt, **options)


if __name__ == "__main__":
    run_script(main)
