"""Write text with a trained model: python sample.py [--checkpoint out/toy] [--prompt "def "]

The checkpoint holds model, config and the tokenizer's name. The prompt is read once; after that each step feeds one
new token per sample and finds the past in a key/value cache. Text appears as it is written.
"""

import argparse
import codecs
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import tiktoken
import torch

from data.checkpoint import load_checkpoint
from data.hf import export_hf
from data.script import parse_args, run_script
from data.tokens import load_tokenizer
from kha import Transformer, fold


def pick_device(name: str) -> str:
    """The device to run on: `name`, or for "auto" the best there is. Raises ValueError if it is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(device for device, available in there.items() if available)
    if not there.get(name, False):
        choices = ", ".join(device for device, available in there.items() if available)
        hint = " (CUDA_VISIBLE_DEVICES says which GPU)" if there["cuda"] else ""
        raise ValueError(f"device {name!r} is not available here: choose from {choices}{hint}")
    return name


def sample_logits(
    logits: torch.Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator
) -> torch.Tensor:
    """Draw a token from each row of logits (B, V): (B,). Temperature 0 takes the likeliest.

    top_k > 0 keeps the k likeliest tokens; top_p < 1 the fewest likeliest that together have at least probability p.
    """
    if temperature == 0:
        return logits.argmax(-1)
    values = logits.float() / temperature
    if top_k or top_p < 1:
        values, tokens = values.sort(dim=-1, descending=True)  # (B, V), likeliest first
        values = values[:, : top_k or None]
    probs = values.softmax(-1)
    if top_p < 1:
        probs = probs.masked_fill(probs.cumsum(-1) - probs >= top_p, 0)  # before it there is enough already
    # The first of exponential clocks with these rates to ring: torch.multinomial would wait for the device.
    drawn = (probs / torch.empty_like(probs).exponential_(generator=generator)).argmax(-1, keepdim=True)  # (B, 1)
    return (tokens.gather(-1, drawn) if top_k or top_p < 1 else drawn).squeeze(-1)


def can_capture(model: Transformer) -> bool:
    """Whether a CUDA graph can take what the model does. It cannot where FSDP gathers weights on streams of its own, nor
    where F.grouped_mm asks the CPU how many rows each expert has: it does except for bfloat16 on Hopper and its successor.
    """
    weight = model.embed.weight
    if not weight.is_cuda or hasattr(weight, "full_tensor"):
        return False
    native = torch.cuda.get_device_capability(weight.device)[0] in (9, 10)
    return not model.moes() or native and (model.compute_dtype or weight.dtype) == torch.bfloat16


def capture(step: Callable[[], Any], generator: torch.Generator | None = None) -> Callable[[], Any]:
    """`step` as a CUDA graph, replayed by each call: the same kernels on the same memory, launched all at once. The result
    is the same tensors each time. `step` must have run before; capturing does not run it. It may draw from `generator`.
    """
    graph = torch.cuda.CUDAGraph()
    if generator is not None:
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        result = step()

    def replay() -> Any:
        graph.replay()
        return result

    return replay


@torch.inference_mode()
def generate(
    model: Transformer, prompt: list[int], n_samples: int = 1, max_new_tokens: int = 200, temperature: float = 0.8,
    top_k: int = 0, top_p: float = 1.0, seed: int = 0, n_vocab: int | None = None, eot: int | None = None,
) -> Iterator[list[int | None]]:
    """Continue `prompt`, token ids, n_samples times as one batch. Yields the next token of every sample, None for one
    that has ended with token `eot`; stops when all have. Ids from n_vocab on are never drawn.

    Raises ValueError, before anything is computed, for a prompt or a length that the model cannot take.
    """
    config = model.config
    if not prompt:
        raise ValueError("the prompt is empty: give at least one token")
    if max(prompt) >= config.vocab_size or min(prompt) < 0:
        raise ValueError(f"the prompt has a token outside the model's vocabulary of {config.vocab_size}")
    if min(n_samples, max_new_tokens) < 1:
        raise ValueError("n_samples and max_new_tokens must be at least 1")
    if not (temperature >= 0 and top_k >= 0 and 0 < top_p <= 1):
        raise ValueError("temperature and top_k must not be negative, and top_p must be above 0 and at most 1")
    length = len(prompt) + max_new_tokens
    if length > config.block_size:
        raise ValueError(
            f"a prompt of {len(prompt)} tokens and {max_new_tokens} new ones are more than the model's context of"
            f" {config.block_size}: give a shorter prompt or a smaller --max_new_tokens"
        )
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    draw = partial(sample_logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
    cache = model.new_cache(length)
    with torch.compiler.set_stance("force_eager"):  # each length of a prompt would compile anew
        logits = model(torch.tensor([prompt], device=device), cache=cache)[:, -1, :n_vocab]  # (1, V)
    for past in cache:
        past.repeat(n_samples)
    tokens = draw(logits.repeat(n_samples, 1))  # (B,)
    position = torch.tensor([len(prompt)], device=device)

    def step() -> None:
        logits = model(tokens[:, None], cache=cache, positions=position)[:, -1, :n_vocab]  # (B, V)
        tokens.copy_(draw(logits))
        position.add_(1)

    ended = [False] * n_samples
    on_gpu = device.type == "cuda"
    for i in range(max_new_tokens):
        new = tokens.to("cpu", non_blocking=on_gpu, copy=True)
        if on_gpu:
            arrived = torch.cuda.current_stream().record_event()
        if i + 1 < max_new_tokens:  # the device goes on while this token is read
            if i == 1 and can_capture(model):
                step = capture(step, generator)
            step()
        if on_gpu:
            arrived.synchronize()
        new = new.tolist()
        ended = [end or token == eot for token, end in zip(new, ended)]
        yield [None if end else token for token, end in zip(new, ended)]
        if all(ended):
            return


def lighten(model: Transformer) -> Transformer:
    """Make a trained model, in place, one for sampling only: its knocks folded, and on CUDA its parameters in bfloat16;
    not the balancing bias, of which a step is finer. Returns it."""
    fold(model)
    if model.embed.weight.is_cuda:
        for p in model.parameters():
            p.data = p.data.bfloat16()
    return model


def compile_steps(model: Transformer, n_samples: int) -> None:
    """Compile the model for `generate`'s steps of one token for each of n_samples: kernels are tuned, and launched before
    the last one ends. In a dense model small ones become one, and the long sums of one sample are spread over the chip."""
    # A mixture gains nothing by these, and torch, up to 2.13 at least, fails to combine kernels of which one sorts.
    dense = not model.moes()
    options = {
        "coordinate_descent_tuning": True, "triton.enable_pdl": True, "combo_kernels": dense,
        "triton.cooperative_reductions": dense and n_samples == 1,
    }
    for part in (*model.blocks, model.head):
        part.compile(dynamic=False, options=options)


def token_bytes(tokenizer: tiktoken.Encoding, token: int) -> bytes:
    """The bytes that a token stands for. Some tokenizers have gaps: an id that is no token is U+FFFD."""
    try:
        return tokenizer.decode_single_token_bytes(token)
    except KeyError:
        return "\ufffd".encode()


def write_samples(model: Transformer, tokenizer: tiktoken.Encoding, prompt: str, n_samples: int = 1, **options) -> None:
    """Print the prompt (an empty one: the start of a document) and its continuations by `generate`.

    One sample streams as it is written; of several, each is printed when all are ready, under a ruler.
    """
    ids = tokenizer.encode(prompt, disallowed_special=()) or [tokenizer.eot_token]
    steps = generate(model, ids, n_samples, n_vocab=tokenizer.n_vocab, eot=tokenizer.eot_token, **options)
    # A token may end within a UTF-8 character: the decoder waits for the rest.
    decoders = [codecs.getincrementaldecoder("utf-8")(errors="replace") for _ in range(n_samples)]
    texts = [prompt] * n_samples
    for step, new in enumerate(steps):
        if n_samples == 1 and step == 0:
            print(prompt, end="", flush=True)
        for i, token in enumerate(new):
            text = "" if token is None else decoders[i].decode(token_bytes(tokenizer, token))
            texts[i] += text
            if n_samples == 1:
                print(text, end="", flush=True)
    rests = [decoder.decode(b"", final=True) for decoder in decoders]
    if n_samples == 1:
        print(rests[0])
        return
    for i, (text, rest) in enumerate(zip(texts, rests), start=1):
        print(f"--- {i} of {n_samples} ---\n{text}{rest}")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("sample.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("--checkpoint", default="out/toy", help="a run's folder, or one file of it")
    parser.add_argument("--prompt", default="", help="text to continue; - reads standard input; default: a new document")
    parser.add_argument("--n_samples", type=int, default=1)
    parser.add_argument("--max_new_tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token")
    parser.add_argument("--top_k", type=int, default=0, help="draw from the k likeliest tokens; 0: from all")
    parser.add_argument("--top_p", type=float, default=1.0, help="draw from the likeliest tokens of probability p")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    parser.add_argument("--compile", action="store_true", help="a minute first, then faster: for long texts on CUDA")
    parser.add_argument("--export_hf", metavar="FOLDER", help="write a model for transformers there, instead of text")
    options = vars(parse_args(parser, argv))

    device, folder = pick_device(options.pop("device")), options.pop("export_hf")
    if (compiled := options.pop("compile")) and not device.startswith("cuda"):
        raise ValueError(f"--compile is for CUDA: leave it out on {device}")
    model, checkpoint = load_checkpoint(options.pop("checkpoint"), device)
    tokenizer = load_tokenizer(checkpoint["tokenizer"])
    if folder is not None:
        export_hf(model, folder, tokenizer.eot_token)
        print(f"wrote {folder}")
        return
    lighten(model)
    if compiled:
        compile_steps(model, options["n_samples"])
    if options["prompt"] == "-":
        options["prompt"] = sys.stdin.read()
    write_samples(model, tokenizer, **options)


if __name__ == "__main__":
    run_script(main)
