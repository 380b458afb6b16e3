"""
Where a run lives: its processes and device, its folder, its checkpoints, its first weights.

Nothing here knows how a model is trained (train.py). A checkpoint holds the config, the network's
sizes, the data's meta.json, the weights, and where training stands; it is written atomically and
read without running any code of its own.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from data.dataset import DataError, Vocabulary, load_vocabulary
from model import GPT, GPTConfig

# ----------------------------------------------------------------------------------------------
# processes and devices

# Each process draws a batch of its own; gradients are averaged, so all have the same weights.
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # by torchrun


def total(x: Tensor) -> Tensor:
    """The sum of x over all processes."""
    if WORLD > 1:
        dist.all_reduce(x)
    return x


def average_gradients(model: GPT) -> None:
    for p in model.parameters():  # what one process has no gradient for another may have
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    gradients = [p.grad for p in model.parameters()]
    flat = total(torch.cat([g.flatten() for g in gradients])) / WORLD  # one message
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients])):
        gradient.copy_(part.view_as(gradient))


@contextlib.contextmanager
def processes(device: str):
    """What torchrun has started finds each other, and leaves together."""
    if WORLD == 1:
        yield
        return
    if pick_device(device) == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def pick_device(name: str) -> str:
    """The device of that name, or for "auto" the best that is here. Raises DataError."""
    mps = torch.backends.mps.is_available() and WORLD == 1
    here = ["cuda"] * torch.cuda.is_available() + ["mps"] * mps + ["cpu"]
    if name not in ("auto", *here):
        raise DataError(f"device = {name!r} is not here; this machine has {', '.join(here)}")
    return here[0] if name == "auto" else name


@contextlib.contextmanager
def interruptible():
    """-> a function that says whether Ctrl-C, or a request to end, has come to any process."""
    caught = []
    signals = (signal.SIGINT, signal.SIGTERM)
    former = {s: signal.signal(s, lambda *_: caught.append(1)) for s in signals}
    try:
        yield lambda: bool(total(torch.tensor(len(caught))))  # one is stopped, all stop
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


# ----------------------------------------------------------------------------------------------
# checkpoints


def save_checkpoint(path: Path, state: dict) -> None:
    """
    Written beside and renamed: a crash midway leaves the old file or the new, never a part. Raises
    DataError.
    """
    partial = path.with_suffix(".partial")
    try:
        with open(partial, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError):  # RuntimeError: torch.save in the middle of a file
        advice = "is the disk full? what was saved before is as it was"
        raise DataError(f"cannot write {path}: {advice}") from None


def load_checkpoint(folder: str, device: str = "cpu") -> dict:
    """Raises DataError."""
    path = Path(folder) / "checkpoint.pt"
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(damaged)
        state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise DataError(f"there is no checkpoint in {folder}: train first") from None
    except Exception as error:
        reason = f"({type(error).__name__}): it is damaged or not ours"
        raise DataError(f"{path} cannot be read as a checkpoint {reason}") from None
    parts = {"config", "network", "meta", "model", "optimisers", "progress", "curriculum"}
    if not isinstance(state, dict) or not parts <= set(state):
        raise other_version(folder)
    return state


def same(a, b) -> bool:
    """Whether two states are equal bit for bit, through dicts and lists."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def other_version(folder: str) -> DataError:
    return DataError(f"the checkpoint in {folder} was written by another program or version")


def load_model(folder: str, device: str = "cpu") -> tuple[GPT, Vocabulary, dict]:
    """-> model in evaluation mode, vocabulary, the checkpoint. Raises DataError."""
    state = load_checkpoint(folder, device)
    try:
        model = GPT(GPTConfig(**state["network"])).to(device)
        model.load_state_dict(state["model"])
        return model.eval(), load_vocabulary(state["meta"]), state
    except (KeyError, TypeError, RuntimeError):
        raise other_version(folder) from None


def load_plain(folder: str, beside: Vocabulary, device: str) -> tuple[GPT, Vocabulary, dict]:
    """As load_model, of a plain model to stand beside one of that vocabulary. Raises DataError."""
    model, vocabulary, state = load_model(folder, device)
    if vocabulary.tokens != beside.tokens:
        trained = f"it was trained on {state['meta']['task']}"
        raise DataError(f"the plain model in {folder} has another vocabulary: {trained}")
    return model, vocabulary, state


# ----------------------------------------------------------------------------------------------
# first weights


def warm_start(model: GPT, weights: dict[str, Tensor]) -> None:
    """
    Begin with the weights of another model, which may lack thoughts, observer or control tokens
    that this one has. Overlapping slices are copied; rows beyond them keep their initial value,
    columns beyond them become zero, so that what is new has no effect yet: it emits what it
    did. Raises ValueError if the weights do not fit.
    """
    own = model.state_dict()  # shares memory with the parameters
    new = ("gate.", "recall_gate.", "thoughts.")
    missing = [n for n in own if n not in weights and not n.startswith(new)]
    missing = [n for n in missing if ".observer." not in n]
    wrong = [n for n, w in weights.items() if n not in own or not fits(w, own[n], model.config)]
    if missing or wrong:
        names = ", ".join((missing + wrong)[:3])
        raise ValueError(f"weights of another shape: {names}")
    with torch.no_grad():
        for name, w in weights.items():
            if w.ndim == 2:
                own[name][: len(w)] = 0
            own[name][tuple(slice(size) for size in w.shape)] = w


def fits(weight: Tensor, own: Tensor, config: GPTConfig) -> bool:
    """Same shape, or one row more (of RECALL or REVISE), or a head's columns more (observer)."""
    more = [a - b for a, b in zip(own.shape, weight.shape)]
    head = config.n_embd // config.n_head
    return own.ndim == weight.ndim and more[0] in (0, 1) and all(m in (0, head) for m in more[1:])


def from_gpt2(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state_dict of Hugging Face's GPT2LMHeadModel -> ours. Its Conv1D keeps its matrices
    transposed; its head is tied to its embedding."""
    names = {
        "ln_1": "norm1",
        "ln_2": "norm2",
        "attn.c_attn": "attention.qkv",
        "attn.c_proj": "attention.proj",
        "mlp.c_fc": "up",
        "mlp.c_proj": "down",
    }
    word = weights["transformer.wte.weight"]
    ours = {"embedding.weight": word, "head.weight": word, "head.bias": torch.zeros(len(word))}
    ours["position.weight"] = weights["transformer.wpe.weight"]
    for name, value in weights.items():
        if name.startswith("transformer.ln_f."):
            ours[name.replace("transformer.ln_f", "norm")] = value
        if name.startswith("transformer.h."):
            layer, _, rest = name.removeprefix("transformer.h.").partition(".")
            module, _, kind = rest.rpartition(".")
            if module in names:
                value = value.T if value.ndim == 2 else value
                ours[f"blocks.{layer}.{names[module]}.{kind}"] = value
    return ours


def from_pretrained(name: str, **changes) -> GPT:
    """
    GPT-2 weights of Hugging Face, e.g. "gpt2", in a model with `changes` to its GPTConfig.
    Raises ImportError without transformers, OSError or ValueError if there are none to be had.
    """
    from transformers import GPT2LMHeadModel

    theirs = GPT2LMHeadModel.from_pretrained(name)
    c = theirs.config
    sizes = {"n_layer": c.n_layer, "n_head": c.n_head, "n_embd": c.n_embd}
    sizes |= {"vocab_size": c.vocab_size, "n_positions": c.n_positions}
    model = GPT(GPTConfig(**(changes | sizes)))
    warm_start(model, from_gpt2(theirs.state_dict()))
    return model


def first_model(config, vocabulary: Vocabulary) -> GPT:
    """The model that a train.Config asks for, with its first weights. Raises DataError."""
    shared = {f.name for f in dataclasses.fields(GPTConfig)}
    sizes = {k: v for k, v in dataclasses.asdict(config).items() if k in shared}
    sizes |= {"vocab_size": len(vocabulary.tokens), "revise": config.revise > 0}
    source = config.init_from
    try:
        if source.startswith("hf:"):
            return from_pretrained(source[3:], **sizes)
        model = GPT(GPTConfig(**sizes))
        if source:
            state = load_checkpoint(source)
            if load_vocabulary(state["meta"]).tokens != vocabulary.tokens:
                raise DataError(f"the model in {source} has another vocabulary")
            warm_start(model, state["model"])
        return model
    except ImportError:
        message = "GPT-2 weights need the package transformers: pip install transformers"
        raise DataError(message) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{source} {str(error).splitlines()[0]}".strip()) from None


# ----------------------------------------------------------------------------------------------
# folders


def prepare_data(folder: str) -> None:
    """Make the data of a task that comes with the program, if they are not there yet."""
    script = Path(folder) / "prepare.py"
    if RANK == 0 and script.exists() and not (Path(folder) / "meta.json").exists():
        print(f"{folder} holds no data yet: python {script}", flush=True)
        if subprocess.run([sys.executable, str(script)], check=False).returncode:
            raise DataError(f"{script} failed")
    total(torch.zeros(()))  # other processes wait for the data


def prepare_out(config, step: int) -> None:
    """
    The folder of a run that goes on at `step`, or begins: a checkpoint of another run is moved
    aside, metrics of steps that are taken again are dropped. Raises DataError.
    """
    out, metrics = Path(config.out), Path(config.out) / "metrics.jsonl"
    if not config.out:
        raise DataError("out is empty: name a folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot write to {out} ({error.strerror})") from None
    lines = metrics.read_text().splitlines() if config.resume and metrics.exists() else []
    lines = [line + "\n" for line in lines if json.loads(line)["step"] < step]
    metrics.write_text("".join(lines))
    if config.resume:
        print(f"resumed {out} at step {step}")
    elif (out / "checkpoint.pt").exists():
        numbered = (out / f"checkpoint.{n}.pt" for n in itertools.count(1))
        aside = next(path for path in numbered if not path.exists())
        os.replace(out / "checkpoint.pt", aside)
        print(f"{out} held a checkpoint: moved to {aside.name}")
    (out / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=1) + "\n")
