"""
What a run is made of beside the idea: its config, its processes, its checkpoints.

A config is a dataclass; its values come from a TOML file and from --key=value on the command line. A checkpoint is a dictionary of plain values and tensors,
written atomically and read with weights_only=True.

Not here: the loss (loss.py), the loop (train.py).
"""

import dataclasses
import difflib
import os
import sys
import tomllib
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.nn  # noqa: F401 (imported after `join`, its default arguments would hold the group past `leave`, whose threads can abort an exit)
from torch import Tensor

from data.dataset import DataError, Vocabulary, load_vocabulary
from model import GPT, GPTConfig, from_gpt2
from stream import Thinking

# ----------------------------------------------------------------------------------------------
# config


@dataclass
class Config:
    data: str = "data/arithmetic"  # folder with meta.json, train.bin, val.bin
    block: int = 64  # tokens in a window of a text; rows have lengths of their own
    demonstrate: float = 1.0  # share of the rows with demonstrated thoughts whose thoughts are kept and supervised; in the rest they are left to be discovered
    out: str = "out/chain"  # folder for everything that is written
    plain: str = ""  # folder of a finished plain run, shown beside this one in the report
    init_from: str = ""  # begin with the weights in this folder, of a model without thoughts, or with as many bits; or hf:NAME, GPT-2 weights of Hugging Face
    resume: bool = False  # go on from the checkpoint in `out`
    seed: int = 1
    device: str = "auto"  # auto | cpu | cuda | mps
    threads: int = 0  # CPU threads, 0 for torch's choice
    compile: bool = False  # torch.compile the two parallel passes; on a GPU a column of the sequential rollout becomes a CUDA graph
    precision: str = "auto"  # of the matrix products in training: float32 | bfloat16 | auto: bfloat16 on a GPU that has it
    shown_share: float = 0.0  # share of each batch, at least, that is drawn from the rows whose thoughts are demonstrated
    # the network
    n_bits: int = 8  # bits of a thought, one of K = 2^n_bits; 0 trains a plain GPT
    n_layer: int = 2
    n_head: int = 4
    n_embd: int = 64
    dropout: float = 0.0
    rope_base: float = 100.0
    n_positions: int = 0  # 0: rotary positions; above: learned ones, for so many columns, as GPT-2 has
    observer: str = ""  # layers that the observer head watches: "quarters" of the depth, or "0,1"; "" is no observer
    observer_shapes: bool = False  # gradients that reach the observer go on into the layers it watches
    window: int = 0  # columns in view, in training and after; 0 for all
    done: bool = False  # a run of thoughts ends with DONE, a decision of its own; else by the gate
    recall: bool = False  # RECALL, a column that sees past the window and past a cut
    revise: bool = False  # REVISE, a word that takes the last word back
    # optimisation
    steps: int = 1500
    batch_tokens: int = 1536  # real tokens a step and process, all rollouts counted: many short rows or few long ones
    lr: float = 1e-3
    gate_lr: float = 5e-3  # of the gate and the observer; they start late and have few weights
    warmup: int = 100  # steps of linear warm-up
    final_lr: float = 0.1  # cosine decay to this share of lr
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0  # gradient norm, the observer's apart from all others'
    prompt_weight: float = 0.0  # weight of the prompt's own tokens in the loss; the answer's is 1
    curriculum: bool = True  # shortest levels first, the next when the longest is mastered
    # thoughts
    max_run: int = 1  # thoughts in a row, at most
    hold: float = 1.0  # probability of a run of thoughts behind a token, as long as thoughts are free
    gate_init: float = 0.95  # the gate's own, when it takes over
    thought_grad: str = "echo"  # echo | reinforce
    forget: float = 1.0  # share of rows that forget, while thoughts are free
    forget_paid: float = 0.8  # the same, once they are paid
    cuts: int = 1  # looks at each row behind a cut in pass 2: the first as cut_late says, the others all late
    cut_late: float = 0.7  # share of cuts shortly before the answer, behind which no thought is left but the one at the cut
    charge_thinking: float = 1.0  # weight of the word that a column that thinks would have said
    imitate: float = 0.01  # weight of thinking in pass 2, behind the cut, what was thought in full view
    free: float = 0.4  # share of the steps, at least, in which thoughts are free and the gate is not trained
    think_cost: float = 0.05  # price of a thought, in nats
    recall_cost: float = 0.2  # price of a RECALL, in nats
    hold_recall: float = 0.3  # probability of a RECALL, as long as it is free
    gate_weight: float = 1.0  # weight of the gate's policy gradient
    horizon: int = 0  # real tokens whose loss a thought is rewarded by; 0 is all that follow
    explore: float = 0.0  # in the paid phase, probability at which the gate does the one thing, and the other, whatever it says
    baseline: str = "leave_one_out"  # of the gate's policy gradient: leave_one_out | observer | both
    observer_weight: float = 1.0  # weight of the observer's error in what it reads off
    corrupt: float = 0.1  # with REVISE: share of the answer's tokens that are tried with a wrong word in their place, to be taken back
    rollouts: int = 4  # rollouts of each row in the paid phase, each the baseline of the others
    rollout: str = "auto"  # sequential | parallel, one and the same rollout found in two ways | auto: parallel on a GPU, or where words are few
    # habits
    eval_every: int = 100
    eval_rows: int = 200  # validation rows a level
    log_every: int = 50
    save_every: int = 500
    report: bool = True

    @property
    def n_think(self) -> int:
        """K, how many different thoughts there are."""
        return 2**self.n_bits if self.n_bits else 0


def parse_value(name: str, text, kind: type):
    """A value from the command line or a TOML file as the field's type."""
    try:
        if kind is bool:
            return {"true": True, "false": False}[str(text).lower()]
        return kind(text)
    except (ValueError, KeyError):
        raise DataError(f"{name} = {text!r} is not a {kind.__name__}") from None


def load_config(argv: list[str], kind=Config):
    """[FILE.toml] [--key=value ...] -> kind. Raises DataError that names the nearest key for an unknown one."""
    fields = {f.name: f.type for f in dataclasses.fields(kind)}
    values = {}
    for argument in argv:
        if argument.startswith("--"):
            name, equals, text = argument[2:].partition("=")
            values[name] = text if equals else "true"
            continue
        try:
            values |= tomllib.loads(Path(argument).read_text())
        except OSError as error:
            raise DataError(f"cannot read config {argument} ({error.strerror})") from None
        except tomllib.TOMLDecodeError as error:
            raise DataError(f"{argument} is not TOML: {error}") from None
    for name in values:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1, cutoff=0)[0]
            raise DataError(f"there is no config key {name!r}; the nearest is {near!r}")
    return kind(**{name: parse_value(name, value, fields[name]) for name, value in values.items()})


def model_config(vocab_size: int, config: Config) -> GPTConfig:
    shared = {f.name for f in dataclasses.fields(GPTConfig)} & {f.name for f in dataclasses.fields(Config)}
    return GPTConfig(vocab_size, **{name: getattr(config, name) for name in shared})


def pick_device(name: str) -> str:
    mps = torch.backends.mps.is_available() and WORLD == 1  # it has no all_reduce
    there = [d for d, here in (("cuda", torch.cuda.is_available()), ("mps", mps), ("cpu", True)) if here]
    if name not in ("auto", *there):
        raise DataError(f"device = {name!r} is not here; this machine has {', '.join(there)}")
    return there[0] if name == "auto" else name


def autocast(precision: str, device: str):
    """A context in which matrix products are worked out in that precision; weights, their moments and the losses stay float32. Raises DataError."""
    if precision not in ("float32", "bfloat16", "auto"):
        raise DataError(f"precision = {precision!r} is none of float32, bfloat16, auto")
    half = precision == "bfloat16" or precision == "auto" and device == "cuda" and torch.cuda.is_bf16_supported()
    return torch.autocast(device, torch.bfloat16) if half else nullcontext()


def run(entry, name: str) -> None:
    """Call a main with the command line; what the user can mend becomes one sentence and exit code 1."""
    try:
        entry(sys.argv[1:])
    except (DataError, FloatingPointError) as error:
        sys.exit(f"{name}: {error}")


# ----------------------------------------------------------------------------------------------
# several processes

# Every process has the same weights, the same generators in the same state, and draws the same whole batch, with all its noise; each works on its own share of
# the rows. What they share is what `total` adds up: the sums and counts that losses are means of, the gradients, what the curriculum and the splits go by, and
# the wish to stop. So all of them do the same next, and the first alone writes and speaks.
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun


def join(device: str) -> None:
    """Meet the other processes. Raises DataError where they are more than there are GPUs."""
    if device == "cuda":
        if int(os.environ["LOCAL_WORLD_SIZE"]) > torch.cuda.device_count():
            raise DataError(f"{os.environ['LOCAL_WORLD_SIZE']} processes need as many GPUs, and here are {torch.cuda.device_count()}; or --device=cpu")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    dist.all_reduce(torch.zeros(1, device=device))  # processes that cannot talk say why here; later it means that one is gone


def leave() -> None:
    """Leave, but not before all have heard the last thing that matters: whoever is gone first may cut the others short."""
    try:
        total(torch.zeros(()))
    except ConnectionError:
        pass
    dist.destroy_process_group()


def total(x: Tensor) -> Tensor:
    """
    The sum of x over all processes, the same to the last bit in each. Backward, x is the process's own and the rest a constant: a function of totals has
    the same value everywhere, and its gradients, added up over the processes, are those of one process with all rows. Raises ConnectionError.
    """
    if WORLD == 1:
        return x
    everyone = x.detach().clone()
    try:
        dist.all_reduce(everyone)
    except RuntimeError as error:
        raise ConnectionError("another process is gone or out of reach") from error
    return everyone + (x - x.detach())


def mean(x: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean over all columns of all processes -> scalar; 0 where nothing has weight."""
    return total((x * weight).sum()) / total(weight.sum()).clamp(min=1)


def add_up_gradients(model: GPT) -> None:
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    together = total(torch.cat([g.flatten() for g in gradients]))  # one message, not one a parameter
    for gradient, part in zip(gradients, together.split([g.numel() for g in gradients])):
        gradient.copy_(part.view_as(gradient))


# ----------------------------------------------------------------------------------------------
# checkpoints


def save_checkpoint(path: Path, state: dict) -> None:
    """Written beside and renamed: a reader, or a crash midway, finds the old file or the new one, never a part."""
    temporary = path.with_suffix(".partial")
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_checkpoint(folder: str, device="cpu") -> dict:
    path = Path(folder) / "checkpoint.pt"
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise DataError(f"there is no checkpoint in {folder}: train first") from None
    except Exception as error:
        raise DataError(f"{path} cannot be read as a checkpoint ({type(error).__name__}): it is damaged or not ours") from None


def load_weights(model: GPT, weights: dict) -> None:
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        detail = " ".join(str(error).split(":", 1)[-1].split())
        raise DataError(f"the checkpoint is of another shape than the config asks for: {detail}") from None


def begin_with(model: GPT, source: str, vocabulary: Vocabulary) -> None:
    """Adopt the weights that `init_from` names. Raises DataError."""
    if source.startswith("hf:"):
        try:
            from transformers import GPT2LMHeadModel

            weights = from_gpt2(GPT2LMHeadModel.from_pretrained(source[3:]).state_dict())
        except ImportError:
            raise DataError("GPT-2 weights need the package transformers: pip install transformers") from None
        except (OSError, ValueError) as error:
            raise DataError(f"no GPT-2 weights from {source}: {str(error).splitlines()[0]}") from None
    else:
        state = load_checkpoint(source)
        weights = state["model"]
        if load_vocabulary(state["meta"]).tokens != vocabulary.tokens:
            raise DataError(f"the model in {source} has another vocabulary: it was trained on {state['meta']['task']}")
    try:
        model.adopt(weights)
    except ValueError as error:
        raise DataError(f"init_from = {source!r}: {error}") from None


def load_model(folder: str, device: str = "cpu") -> tuple[GPT, Vocabulary, dict]:
    """A trained model from its checkpoint alone -> model in evaluation mode, vocabulary, the checkpoint."""
    state = load_checkpoint(folder, device)
    try:
        vocabulary = load_vocabulary(state["meta"])
        model = GPT(model_config(len(vocabulary.tokens), Config(**state["config"]))).to(device)
        load_weights(model, state["model"])
        return model.eval(), vocabulary, state
    except (KeyError, TypeError):
        raise DataError(f"the checkpoint in {folder} was written by another program or version") from None


def how_to_think(config: Config, vocabulary: Vocabulary, paid: bool) -> Thinking:
    """As the model was trained to: by its gate or, as long as neither price nor demonstrations have taught it anything, as often as it is made to."""
    taught = paid or config.demonstrate and vocabulary.meta.get("thoughts")
    hold = {} if taught else {"hold": config.hold}
    return Thinking(max_run=config.max_run, after=vocabulary.think_after(), window=config.window, hold_recall=None if paid else config.hold_recall, **hold)


def as_trained(state: dict, vocabulary: Vocabulary) -> Thinking:
    """How the model of a checkpoint thinks."""
    return how_to_think(Config(**state["config"]), vocabulary, state["progress"]["paid"])
