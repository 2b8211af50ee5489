"""What people run next, on models that this project exported: python tests/clients.py [FOLDER]

Trains four small models for a minute each (dense and mixture, linear and MLP knocks, GPT-2's
tokens), exports them, and lets each client compute what we compute: the pipeline of transformers,
`transformers serve`, lm_eval, llama.cpp. Prints what each of them did, and fails if one differs.

Not a part of the test suite: it takes 15 minutes on two cores, and 5 GB from PyPI and npm, which
are kept in FOLDER (default: clients). It needs node and Linux on x86-64. GPT-2's vocabulary comes
from npm as well, byte for byte OpenAI's.
"""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tarfile
import time
import urllib.error
import urllib.request
from pathlib import Path

if __name__ == "__main__":  # Python looks for modules in this file's folder, not in the one above
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from data.checkpoint import load_checkpoint
from data.script import new_parser, parse_args, run_script
from data.tokens import TOKENIZERS, load_tokenizer, open_tokens
from sample import generate
from tests.peers import ROOT

SHAPE = "toy --n_layer 2 --n_embd 64 --d_ff 128 --vocab_size 50304 --block_size 128".split()
SHORT = "--steps 60 --batch_tokens 512 --micro_batch 4 --eval_every 60 --save_every 60".split()
MIXTURE, DENSE = "--n_expert 8 --top_k 2".split(), "--n_expert 0 --top_k 0".split()
LINEAR = "--knock_q linear --knock_k linear --knock_v linear".split()
MODELS = {
    "dense, linear knocks": DENSE + LINEAR,
    "mixture, linear knocks": MIXTURE + LINEAR,
    "dense, MLP knock": DENSE,
    "mixture, MLP knock": MIXTURE,
}
PROMPTS = ["def forward(self, x", "The knocks", "naïve 日本語\n"]
N_NEW = 20

PIPELINE = """
import json, sys, transformers
pipeline = transformers.pipeline("text-generation", sys.argv[1], trust_remote_code=True)
for prompt in json.loads(sys.argv[2]):
    (out,) = pipeline(prompt, max_new_tokens=int(sys.argv[3]), do_sample=False)
    print(json.dumps(out["generated_text"]))
"""

TASK = """
task: held_out
dataset_path: json
dataset_kwargs: {data_files: {test: DOCS}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
"""

# llama.cpp's converter takes every Glm4Moe for GLM-4.5, and asks for special tokens of that.
CONVERT_MIXTURE = """
import runpy, sys
from conversion import base
base.TextModel._set_vocab_glm = base.TextModel._set_vocab_gpt2
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""

NODE = """
import {createInterface} from "readline";
import {getLlama, LlamaLogLevel} from "node-llama-cpp";
const llama = await getLlama({gpu: false, build: "never", logLevel: LlamaLogLevel.error});
const model = await llama.loadModel({modelPath: process.argv[2]});
const cache = {experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32"};
const context = await model.createContext({contextSize: 128, threads: 1, ...cache});
for await (const line of createInterface({input: process.stdin})) {
    const sequence = context.getSequence(), ids = [];
    for await (const id of sequence.evaluate(JSON.parse(line), {temperature: 0})) {
        ids.push(id);
        if (ids.length == Number(process.argv[3])) break;
    }
    console.log(JSON.stringify(ids));
    sequence.dispose();
}
process.exit(0);
"""


def run(*words, **how) -> str:
    """The output of a command, which must succeed."""
    words = [str(word) for word in words]
    done = subprocess.run(words, capture_output=True, text=True, timeout=1800, **how)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)[:500]}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done.stdout


def report(client: str, model: str, same: bool, what: str) -> None:
    """Print what a client did with a model. Ends the script if it differs from ours."""
    print(f"{client:18} {model:24} {'same' if same else 'DIFFERENT':10} {what}", flush=True)
    if not same:
        raise SystemExit(f"{client} does not compute what we compute")


# --------------------------------------------------------------------------------------------------
# Getting ready


def install(folder: Path) -> tuple[Path, Path]:
    """The clients, in `folder`: their Python, and the sources of llama.cpp."""
    python, llama = folder / "venv" / "bin" / "python", folder / "llama.cpp"
    if not python.exists():
        run(sys.executable, "-m", "venv", folder / "venv")
        run(python, "-m", "pip", "install", "torch==2.13.0")  # first, so that a CPU build suffices
        run(python, "-m", "pip", "install", "transformers[serving]", "accelerate", "datasets",
            "lm_eval", "sentencepiece", "protobuf")
    if not (folder / "node_modules").exists():
        run("npm", "install", "--prefix", folder, "--ignore-scripts", "gpt-3-encoder@1.1.4",
            "node-llama-cpp@3.22.1", "@node-llama-cpp/linux-x64@3.22.1")
    if not llama.exists():
        package = "llama-cpp-python"
        run(python, "-m", "pip", "download", "--no-deps", "--no-binary", package,
            f"{package}==0.3.36", "--dest", folder)
        with tarfile.open(next(folder.glob("llama_cpp_python-*.tar.gz"))) as archive:
            archive.extractall(folder, filter="data")
        next(folder.glob("llama_cpp_python-*/vendor/llama.cpp")).rename(llama)
    return python, llama


def keep_gpt2(folder: Path) -> None:
    """Put GPT-2's two files where tiktoken looks for them. It checks their hashes itself."""
    cache = folder / "tiktoken"
    cache.mkdir(exist_ok=True)
    for url in TOKENIZERS["gpt2"]:
        source = folder / "node_modules" / "gpt-3-encoder" / url.rsplit("/", 1)[-1]
        (cache / hashlib.sha1(url.encode()).hexdigest()).write_bytes(source.read_bytes())
    os.environ["TIKTOKEN_CACHE_DIR"] = str(cache)


def export_models(folder: Path) -> dict[str, tuple[Path, Path]]:
    """Train and export MODELS, as a user does: name -> the run's folder, the exported folder."""
    data, made = folder / "data", {}
    if not data.exists():
        texts = [*ROOT.glob("*.py"), *ROOT.glob("data/*.py"), ROOT / "README.md"]
        words = ["--tokenizer", "gpt2", "--val_fraction", "0.1", "--out", data]
        run(sys.executable, ROOT / "data" / "prepare.py", *texts, *words)
    for name, options in MODELS.items():
        out = folder / "runs" / name.replace(", ", "-").replace(" ", "-")
        exported = out / "exported"
        if not exported.exists():
            where = ["--data", data, "--out", out, "--device", "cpu", "--resume"]
            run(sys.executable, ROOT / "train.py", *SHAPE, *SHORT, *options, *where)
            run(sys.executable, ROOT / "sample.py", "--checkpoint", out, "--export_hf", exported,
                "--device", "cpu")
        made[name] = out, exported
    return made


def greedy(out: Path, prompt: list[int]) -> list[int]:
    """Our own continuation: N_NEW ids."""
    model, checkpoint = load_checkpoint(str(out))
    n_vocab = load_tokenizer(checkpoint["tokenizer"]).n_vocab
    steps = generate(model, prompt, max_new_tokens=N_NEW, temperature=0, n_vocab=n_vocab)
    return [new[0] for new in steps]


def greedy_text(out: Path, prompt: str) -> str:
    """Our own continuation of a text."""
    tokenizer = load_tokenizer("gpt2")
    return tokenizer.decode(greedy(out, tokenizer.encode(prompt)))


# --------------------------------------------------------------------------------------------------
# The clients


def try_pipeline(python: Path, name: str, out: Path, exported: Path) -> None:
    """The pipeline of transformers writes the likeliest tokens after some prompts, as ours does."""
    words = [exported, json.dumps(PROMPTS), N_NEW]
    written = [json.loads(line) for line in run(python, "-c", PIPELINE, *words).splitlines()]
    ours = [prompt + greedy_text(out, prompt) for prompt in PROMPTS]
    report("pipeline", name, written == ours, repr(written[0]))


def try_serve(python: Path, name: str, out: Path, exported: Path) -> None:
    """So does the server of transformers, over HTTP."""
    port = 8123
    words = [python.with_name("transformers"), "serve", exported, "--device", "cpu", "--port",
             port, "--trust-remote-code"]
    with open(out / "serve.log", "w") as log:
        server = subprocess.Popen([str(word) for word in words], stdout=log, stderr=log)
    try:
        for _ in range(180):
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            if server.poll() is not None:
                raise SystemExit(f"transformers serve has ended: see {out / 'serve.log'}")
            time.sleep(1)
        written = []
        for prompt in PROMPTS:
            body = {"model": str(exported), "prompt": prompt, "max_tokens": N_NEW, "temperature": 0}
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(),
                {"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=300) as answer:
                written.append(json.load(answer)["choices"][0]["text"])
    finally:
        server.terminate()
        server.wait()
    ours = [greedy_text(out, prompt) for prompt in PROMPTS]
    report("transformers serve", name, written == ours, repr(written[0]))


@torch.no_grad()
def try_lm_eval(python: Path, name: str, out: Path, exported: Path, data: Path) -> None:
    """Log-likelihoods of held-out texts, each after the token that ends a document."""
    model, _ = load_checkpoint(str(out))
    tokenizer = load_tokenizer("gpt2")
    held_out = open_tokens(str(data), "val")
    held_out = held_out[held_out != tokenizer.eot_token][:2000].tolist()
    texts = [tokenizer.decode(held_out[i : i + 100]) for i in range(0, len(held_out), 100)]
    ours = []
    for text in texts:
        ids = torch.tensor([[tokenizer.eot_token, *tokenizer.encode_ordinary(text)]])
        ours.append(-model(ids[:, :-1], ids[:, 1:]).item() * (ids.numel() - 1))
    task = out / "task"
    task.mkdir(exist_ok=True)
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (task / "docs.jsonl").write_text(rows)
    (task / "held_out.yaml").write_text(TASK.replace("DOCS", str(task / "docs.jsonl")))
    run(python, "-m", "lm_eval", "run", "--model", "hf", "--model_args",
        f"pretrained={exported},dtype=float32,trust_remote_code=True", "--tasks", "held_out",
        "--include_path", task, "--device", "cpu", "--batch_size", 4, "--log_samples",
        "--output_path", out / "lm_eval")
    newest = max((out / "lm_eval").rglob("samples_held_out_*.jsonl"), key=os.path.getmtime)
    samples = [json.loads(line) for line in newest.read_text().splitlines()]
    theirs = {sample["doc"]["text"]: float(sample["filtered_resps"][0]) for sample in samples}
    worst = max(abs(theirs[text] - mine) for text, mine in zip(texts, ours, strict=True))
    what = f"log-likelihood {sum(theirs.values()):.3f}, ours {sum(ours):.3f} nats"
    report("lm_eval", name, worst < 0.01, f"{what}; largest difference of a text {worst:.1e}")


def try_llama_cpp(
    python: Path, llama: Path, name: str, out: Path, exported: Path, folder: Path
) -> None:
    """The folder becomes a GGUF file, with which llama.cpp writes the tokens that ours writes."""
    gguf = out / "model.gguf"
    words = [exported, "--outtype", "f32", "--outfile", gguf]
    converter = llama / "convert_hf_to_gguf.py"
    how = ["-c", CONVERT_MIXTURE] if "mixture" in name else []
    path = {"PYTHONPATH": f"{llama}:{llama / 'gguf-py'}"}
    run(python, *how, converter, *words, env=os.environ | path)
    prompts = [load_tokenizer("gpt2").encode(prompt) for prompt in PROMPTS]
    (folder / "greedy.mjs").write_text(NODE)
    lines = run("node", folder / "greedy.mjs", gguf, N_NEW,
                input="\n".join(json.dumps(prompt) for prompt in prompts))
    written = [json.loads(line) for line in lines.splitlines() if line.startswith("[")]
    ours = [greedy(out, prompt) for prompt in prompts]
    text = load_tokenizer("gpt2").decode(written[0])
    report("llama.cpp", name, written == ours, repr(text))


def main(argv: list[str]) -> None:
    """The command line."""
    parser = new_parser("clients.py", __doc__)
    parser.add_argument("folder", nargs="?", default="clients", metavar="FOLDER",
                        help="what is downloaded and made (default: clients)")
    folder = Path(parse_args(parser, argv).folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    python, llama = install(folder)
    keep_gpt2(folder)
    for name, (out, exported) in export_models(folder).items():
        try_pipeline(python, name, out, exported)
        try_serve(python, name, out, exported)
        try_lm_eval(python, name, out, exported, folder / "data")
        if "linear" in name:
            try_llama_cpp(python, llama, name, out, exported, folder)


if __name__ == "__main__":
    run_script(main)
