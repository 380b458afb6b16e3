"""
Rows or windows of tokens on disk and in batches; shared by every prepare.py and by train.py.

A data set is a folder: meta.json, train.bin, val.bin and, where there is one, test.bin.

meta.json
  task          what it is, in words
  vocab         list of strings, one a token; or
  encoding      what makes a tiktoken.Encoding: "gpt2", or its pattern and mergeable ranks
  level         what a row's level counts ("operations", "digits"): short problems come first
  think_after   tokens that a thought may follow; absent is all
and where the data are rows with answers, not one long text
  row_end       the token that ends a row
  answer_after  the token behind which the answer begins: that is what is graded
  thoughts      list of strings, the demonstrated thoughts: thought k of the model is called
                thoughts[k]; absent if no row has one
  revisions     true if a row has a wrong first guess

Some rows demonstrate how to think. They carry tags, which are no tokens:
  3+4<think>2</think>*2<think>4</think>=4   a thought behind +4 and one behind *2; several
                                            between the tags are thoughts in a row
  3+4=1<revise>2                            1 is a wrong first guess, one character, in the
                                            answer; 2 is the right token

A .bin file is a header of 56 bytes (magic, version, rows, tokens, SHA-256 of meta.json and of the
rest), the ids of all rows one behind the other (uint16), and the level of each row (uint16).
Thought k is written as id V + k, REVISE as V + len(thoughts), right behind the wrong guess; V is
len(vocab). A text has no rows.

B rows in a batch, N in all, T real tokens a row, at most R demonstrated thoughts behind a token.
"""

import base64
import contextlib
import hashlib
import json
import re
import struct
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

MAGIC, VERSION = b"nanothnk", 2
HEADER = struct.Struct("<8sIIQ32s")  # magic, version, rows, tokens, SHA-256


class DataError(Exception):
    """A file or a text that cannot be used; the message is one sentence for who gave it."""


def check_range(said: str, value, low, high) -> None:
    """Raises DataError if a value, as it was `said`, is not from low to high; None: no limit."""
    if low is not None and not value >= low or high is not None and not value <= high:
        allowed = f"at least {low}" if high is None else f"{low} to {high}"
        raise DataError(f"{said} is not allowed: {allowed}")


def add_option(parser, name: str, default, help: str, low=None, high=None, **more) -> None:
    """
    Give a prepare.py an option of its default's type (None: a whole number; False: a flag), a
    number from low to high. Any other value ends the program with one sentence.
    """
    if default is False:
        parser.add_argument(name, action="store_true", help=help, **more)
        return
    kind = int if default is None else type(default)

    def parse(text: str):
        value = kind(text)
        with one_sentence(""):
            check_range(f"{name}={text}", value, low, high)
        return value

    parse.__name__ = kind.__name__  # argparse says it
    parser.add_argument(name, type=parse, default=default, help=help, **more)


@contextlib.contextmanager
def one_sentence(out: str):
    """What the user of a prepare.py that writes to `out` can mend: one sentence, exit 1."""
    try:
        yield
    except DataError as error:
        sys.exit(f"prepare.py: {error}")
    except OSError as error:
        sys.exit(f"prepare.py: cannot write to {out} ({error.strerror})")


# ----------------------------------------------------------------------------------------------
# tags

THOUGHT = re.compile(r"<think>(.*?)</think>")
TAGGED = re.compile(r"(<think>.*?</think>|.<revise>)")  # what a row carries besides real tokens
MISTAKES = {  # a pattern, and what is wrong with a row in which it is found
    r"<think>((?!</think>).)*<think>": "a <think> inside another, or one that is not closed",
    r"<think>((?!</think>).)*$": "a <think> that is not closed",
    r"(^|</think>)((?!<think>).)*</think>": "a </think> without its <think>",
    r"<think></think>": "an empty <think></think>",
    r"^<think>": "a <think> before the first token",
    r"<think>((?!</think>).)*<revise>": "a <revise> inside a thought",
    r"</think><revise>": "a thought between a wrong first guess and its <revise>",
    r"<revise>.?<revise>": "two <revise> in a row",
    r"<revise>($|<think>)": "no token behind <revise>",
    r"(.)<revise>\1": "a wrong first guess that is right",
}


def check_tags(row: str, answer_after: str) -> None:
    """Raises DataError that says which tag stands where it cannot."""
    if "<" not in row:
        return
    wrong = next((what for pattern, what in MISTAKES.items() if re.search(pattern, row)), None)
    question, _, answer = THOUGHT.sub("", row).partition(answer_after)
    if not wrong and "<revise>" in question:
        wrong = f"a <revise> before {answer_after!r}: only an answer is revised"
    if not wrong and answer.startswith("<revise>"):
        wrong = "no wrong first guess before <revise> in the answer"
    if wrong:
        raise DataError(f"{row.strip()[:200]!r} has {wrong}")


def untagged(row: str) -> str:
    """The real tokens of a row: without tags, thoughts and wrong guesses."""
    return TAGGED.sub("", row)


# ----------------------------------------------------------------------------------------------
# .bin files


def checksum(meta: dict, body: bytes) -> bytes:
    """Of both together: a file that was made for another meta.json is noticed, too."""
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode() + body).digest()


def write_bin(path: Path, tokens: list[int], levels: list[int], meta: dict) -> None:
    """Write token ids, row ends included, and one level a row."""
    body = np.array(tokens, np.uint16).tobytes() + np.array(levels, np.uint16).tobytes()
    header = HEADER.pack(MAGIC, VERSION, len(levels), len(tokens), checksum(meta, body))
    Path(path).write_bytes(header + body)


def read_bin(path: Path, meta: dict) -> tuple[np.ndarray, np.ndarray]:
    """-> ids (tokens,), levels (N,). Raises DataError if the file is missing, damaged, not ours."""
    try:
        blob = Path(path).read_bytes()
    except OSError as error:
        message = f"cannot read {path} ({error.strerror}): make it with the prepare.py beside it"
        raise DataError(message) from None
    if len(blob) < HEADER.size or not blob.startswith(MAGIC):
        raise DataError(f"{path} is not a nanothink data file, or its beginning is lost")
    _, version, n_rows, n_tokens, digest = HEADER.unpack_from(blob)
    body = blob[HEADER.size :]
    if version != VERSION:
        message = f"{path} has format version {version}, this program reads {VERSION}"
        raise DataError(f"{message}: run prepare.py again")
    if len(body) != 2 * (n_tokens + n_rows) or checksum(meta, body) != digest:
        what = "is damaged, cut short, or does not belong to the meta.json beside it"
        raise DataError(f"{path} {what}: run prepare.py again")
    numbers = np.frombuffer(body, np.uint16)
    return numbers[:n_tokens], numbers[n_tokens:]


# ----------------------------------------------------------------------------------------------
# batches


class Batch(NamedTuple):
    """B rows, padded at the end. Everything but `shown` is long."""

    real: Tensor  # (B, T) token ids
    length: Tensor  # (B,) real tokens in the row, row end included
    prompt: Tensor  # (B,) tokens up to and with `answer_after`; a text is all prompt
    level: Tensor  # (B,)
    thoughts: Tensor  # (B, T, R) demonstrated behind each real token, 0 .. K-1; -1 is none
    wrong: Tensor  # (B, T) the wrong first guess that stood in this token's place, or -1
    shown: Tensor  # (B,) bool: the row demonstrates thoughts, to be followed and supervised

    @staticmethod
    def plain(real: Tensor, length: Tensor, prompt: Tensor, level: Tensor) -> "Batch":
        """Rows without thoughts and wrong guesses: R = 0."""
        thoughts, wrong = real.new_empty(*real.shape, 0), torch.full_like(real, -1)
        return Batch(real, length, prompt, level, thoughts, wrong, torch.zeros_like(length).bool())

    def to(self, device) -> "Batch":
        return Batch(*(part.to(device) for part in self))

    @property
    def is_text(self) -> Tensor:  # (B,) bool: all prompt, there is no answer
        return self.prompt == self.length

    def rows(self, index: Tensor) -> "Batch":
        """The rows of these numbers, in their order, some more than once."""
        return Batch(*(part[index] for part in self))


def untangle(tokens: np.ndarray, V: int, n_thoughts: int) -> tuple[np.ndarray, ...]:
    """
    Ids of a .bin file -> of its n real tokens: ids (n,), thoughts behind each (n, R) int16, wrong
    guess before each (n,) int32; -1 is none.
    """
    thought = (tokens >= V) & (tokens < V + n_thoughts)
    revise = tokens == V + n_thoughts
    guess = np.append(revise[1:], False)
    real = ~(thought | revise | guess)
    count, last = real.sum(), np.cumsum(real) - 1  # at each id, which real token was the last one
    since = np.arange(len(tokens)) - np.flatnonzero(real)[last]  # 1, 2, .. for thoughts behind it
    thoughts = np.full((count, since[thought].max(initial=0)), -1, np.int16)
    thoughts[last[thought], since[thought] - 1] = tokens[thought] - V
    wrong = np.full(count, -1, np.int32)
    wrong[last[guess] + 1] = tokens[guess]
    return tokens[real], thoughts, wrong


class Rows:
    """All rows of one split, sorted by level."""

    def __init__(
        self,
        tokens: np.ndarray,
        levels: np.ndarray,
        row_end: int,
        answer_after: int,
        V: int = 1 << 16,
        n_thoughts: int = 0,
    ):
        """tokens, levels: of a .bin file. V tokens, n_thoughts demonstrated. Raises DataError."""
        tokens, thoughts, wrong = untangle(tokens.astype(np.int32), V, n_thoughts)
        ends = np.flatnonzero(tokens == row_end) + 1
        if len(ends) != len(levels) or len(ends) == 0 or ends[-1] != len(tokens):
            message = f"{len(ends)} row ends but {len(levels)} levels"
            raise DataError(f"{message}: the data do not fit their meta.json")
        starts = np.concatenate([[0], ends[:-1]])
        length = ends - starts
        order = np.argsort(levels, kind="stable")
        starts, length, levels = starts[order], length[order], levels[order]
        column = np.arange(length.max())
        padding = column >= length[:, None]  # (N, T)
        index = np.minimum(starts[:, None] + column, len(tokens) - 1)
        table, thoughts, wrong = tokens[index].astype(np.int64), thoughts[index], wrong[index]
        table[padding], thoughts[padding], wrong[padding] = row_end, -1, -1
        prompt = (table == answer_after).argmax(axis=1) + 1
        shown = (thoughts >= 0).any(axis=(1, 2))
        self.levels, counts = (x.tolist() for x in np.unique(levels, return_counts=True))
        self.count = dict(zip(self.levels, counts))
        self.start = dict(zip(self.levels, np.cumsum([0] + counts[:-1]).tolist()))
        length, prompt, levels = (part.astype(np.int64) for part in (length, prompt, levels))
        parts = (table, length, prompt, levels, thoughts, wrong, shown)
        self.all = Batch(*map(torch.from_numpy, parts))  # thoughts and wrong are still short here

    def longest(self, level: int) -> int:
        """Real tokens in the longest row of a level."""
        start = self.start[level]
        return int(self.all.length[start : start + self.count[level]].max())

    def draw(self, size: int, levels: list[int], generator, newest: int = 0) -> Batch:
        """
        `size` rows: a level drawn evenly from `levels`, in half of them from the last `newest` of
        those (0: all); then a row of that level. generator: a torch.Generator, or None.
        """
        n_levels = len(levels)
        lowest = (torch.rand(size, generator=generator) < 0.5) * (n_levels - (newest or n_levels))
        which = torch.rand(size, generator=generator) * (n_levels - lowest)
        which = lowest + which.long()  # (size,) indices into levels
        count = torch.tensor([self.count[level] for level in levels])[which]
        start = torch.tensor([self.start[level] for level in levels])[which]
        chance = torch.rand(size, generator=generator, dtype=torch.double)
        return self._take(start + (chance * count).long())

    def first(self, size: int, level: int) -> Batch:
        """The first `size` rows of a level, or all there are."""
        return self._take(self.start[level] + torch.arange(min(size, self.count[level])))

    def _take(self, index: Tensor) -> Batch:
        batch = Batch(*(part[index] for part in self.all))
        longest = int(batch.length.max())
        return batch._replace(
            real=batch.real[:, :longest],
            thoughts=batch.thoughts[:, :longest].long(),
            wrong=batch.wrong[:, :longest].long(),
        )


class Text:
    """Windows of one long text, with the interface of Rows: one level, each window all prompt."""

    def __init__(self, tokens: np.ndarray, block: int):
        if block < 1 or len(tokens) <= block:
            raise DataError(f"block = {block} does not fit a text of {len(tokens)} tokens")
        self.tokens = torch.from_numpy(tokens.astype(np.int64))
        self.block, self.levels, self.count = block, [block], {block: len(tokens) - block}

    def longest(self, level: int) -> int:
        """Predicted tokens in a window: its first token is given."""
        return self.block

    def draw(self, size: int, levels: list[int], generator, newest: int = 0) -> Batch:
        """`size` windows that begin anywhere."""
        last = len(self.tokens) - self.block
        return self._take(torch.randint(last, (size,), generator=generator))

    def spread(self, size: int) -> Tensor:
        """Where `size` windows begin, evenly spread, or as many as do not overlap -> (N,)."""
        count = min(size, (len(self.tokens) - 1) // self.block)
        return torch.arange(count) * ((len(self.tokens) - 1) // count)

    def first(self, size: int, level: int) -> Batch:
        """`size` windows spread evenly."""
        return self._take(self.spread(size))

    def _take(self, start: Tensor) -> Batch:
        real = self.tokens[start[:, None] + torch.arange(self.block + 1)]
        length = torch.full_like(start, self.block + 1)
        return Batch.plain(real, length, length, torch.full_like(start, self.block))


# ----------------------------------------------------------------------------------------------
# vocabularies


class Vocabulary:
    """Strings to ids and back. Reads the longest token that fits: `+3` can be one token or two."""

    def __init__(self, meta: dict):
        self.meta, self.tokens = meta, meta["vocab"]
        self.pieces = [token.encode() for token in self.tokens]
        self.index = {token: i for i, token in enumerate(self.tokens)}
        names = meta.get("thoughts", [])
        self.thought = {name: len(self.tokens) + k for k, name in enumerate(names)}
        self.longest = max(map(len, self.tokens))
        self.row_end = self.index[meta["row_end"]] if "row_end" in meta else -1
        self.answer_after = self.index[meta["answer_after"]] if "answer_after" in meta else -1

    @property
    def is_text(self) -> bool:
        """Running text, without rows and answers."""
        return self.row_end < 0

    def encode(self, text: str) -> list[int]:
        """Raises DataError that names a character outside the vocabulary."""
        ids, at = [], 0
        while at < len(text):
            sizes = range(self.longest, 0, -1)
            size = next((n for n in sizes if text[at : at + n] in self.index), 0)
            if not size:
                raise self._unknown(text, at)
            ids.append(self.index[text[at : at + size]])
            at += size
        return ids

    def _unknown(self, text: str, at: int) -> DataError:
        """The error for a text in which no token fits at a character."""
        characters, near = "".join(self.tokens), range(at, min(at + self.longest, len(text)))
        bad = next((i for i in near if text[i] not in characters), at)
        known = " ".join(repr(token)[1:-1] for token in self.tokens)
        where = f"{text[bad]!r} in {text[:200]!r} (character {bad + 1})"
        return DataError(f"{where} does not fit the vocabulary: {known}")

    def thoughts_in(self, row: str) -> list[str]:
        """
        The demonstrated thoughts of a row: what stands between its tags is one if it is a token of
        the vocabulary, else each character is.
        """
        contents = THOUGHT.findall(row)
        return [name for c in contents for name in ([c] if c in self.index else c)]

    def encode_row(self, row: str) -> list[int]:
        """A row that may have tags -> the ids of a .bin file. Raises DataError."""
        check_tags(row, self.meta["answer_after"])
        V, ids = len(self.tokens), []
        for part in TAGGED.split(row):
            if part.endswith("</think>"):
                before = self.tokens[next(i for i in reversed(ids) if i < V)]
                ids += self._thoughts(part, before, row.strip()[:200])
            elif part.endswith("<revise>"):
                ids += self.encode(part[0]) + [V + len(self.thought)]
            else:
                ids += self.encode(part)
        return ids

    def _thoughts(self, tagged: str, before: str, row: str) -> list[int]:
        """The ids of <think>..</think> behind the token `before`. Raises DataError."""
        names = self.thoughts_in(tagged)
        if unknown := [name for name in names if name not in self.thought]:
            known = " ".join(self.thought)
            message = f"{unknown[0]!r} in {row!r} is none of the demonstrated thoughts: {known}"
            raise DataError(message)
        if before not in (self.meta.get("think_after") or self.tokens):
            message = f"{row!r} has a thought behind {before!r}, which think_after does not allow"
            raise DataError(message)
        return [self.thought[name] for name in names]

    def decode(self, ids) -> str:
        """A piece of a text may end inside a character: what is left of it becomes U+FFFD."""
        return b"".join(self.pieces[i] for i in ids).decode("utf-8", "replace")

    def think_after(self) -> Tensor | None:
        """(V,) bool, or None where a thought may follow anything."""
        if not self.meta.get("think_after"):
            return None
        return torch.tensor([token in self.meta["think_after"] for token in self.tokens])


class ByteVocabulary(Vocabulary):
    """Byte pairs through tiktoken."""

    def __init__(self, meta: dict):
        self.meta, self.encoding = meta, make_encoding(meta["encoding"])
        self.row_end, self.answer_after, self.thought = -1, -1, {}
        count = self.encoding.n_vocab
        self.pieces = [self.encoding.decode_single_token_bytes(i) for i in range(count)]
        self.tokens = [piece.decode("utf-8", "replace") for piece in self.pieces]

    def encode(self, text: str) -> list[int]:
        return self.encoding.encode_ordinary(text)


def make_encoding(recipe):
    """
    "gpt2" or {"pattern", "ranks": base64 strings in order of rank} -> tiktoken.Encoding. Raises
    DataError without tiktoken or network.
    """
    try:
        import tiktoken

        if recipe == "gpt2":
            return tiktoken.get_encoding("gpt2")
        ranks = {base64.b64decode(piece): i for i, piece in enumerate(recipe["ranks"])}
        how = {"pat_str": recipe["pattern"], "mergeable_ranks": ranks, "special_tokens": {}}
        return tiktoken.Encoding("nanothink", **how)
    except ImportError:
        raise DataError("byte pairs need the package tiktoken: pip install tiktoken") from None
    except OSError as error:  # what requests raises without a network is one, too
        message = f"tiktoken cannot fetch GPT-2's byte pairs ({type(error).__name__})"
        advice = "run this once with a network, or set TIKTOKEN_CACHE_DIR to where that was done"
        raise DataError(f"{message}: {advice}; --tokenizer=bpe needs none") from None


# ----------------------------------------------------------------------------------------------
# folders


def load_vocabulary(meta: dict) -> Vocabulary:
    """Raises DataError."""
    try:
        return ByteVocabulary(meta) if "encoding" in meta else Vocabulary(meta)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"({type(error).__name__}: {error})"
        raise DataError(f"meta.json is damaged {reason}: prepare the data again") from None


def load_meta(folder: str) -> dict:
    """Raises DataError."""
    path = Path(folder) / "meta.json"
    try:
        return json.loads(path.read_text())
    except OSError as error:
        advice = "prepare the data first, see README.md"
        raise DataError(f"cannot read {path} ({error.strerror}): {advice}") from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}): prepare the data again") from None


def load_split(folder: str, split: str, vocabulary: Vocabulary, block: int) -> Rows | Text:
    """block: tokens in a window of a text; rows have their own lengths. Raises DataError."""
    tokens, levels = read_bin(Path(folder) / f"{split}.bin", vocabulary.meta)
    if vocabulary.is_text:
        return Text(tokens, block)
    sizes = len(vocabulary.tokens), len(vocabulary.thought)
    return Rows(tokens, levels, vocabulary.row_end, vocabulary.answer_after, *sizes)


def write_rows(out: Path, meta: dict, splits: dict[str, list[tuple[str, int]]]) -> Vocabulary:
    """
    Rows without their ends, each with its level -> a .bin file a split, and meta.json. Raises
    DataError before anything is written.
    """
    rows = [row for part in splits.values() for row, _ in part if "<" in row]
    plain = Vocabulary(meta)
    if thoughts := sorted({name for row in rows for name in plain.thoughts_in(row)}):
        meta["thoughts"] = thoughts
    if any("<revise>" in row for row in rows):
        meta["revisions"] = True
    vocabulary, ids = Vocabulary(meta), {}
    for name, part in splits.items():
        ids[name] = [i for row, _ in part for i in vocabulary.encode_row(row + meta["row_end"])]
    out.mkdir(parents=True, exist_ok=True)
    for name in ("train", "val", "test"):
        if not splits.get(name):
            (out / f"{name}.bin").unlink(missing_ok=True)
            continue
        write_bin(out / f"{name}.bin", ids[name], [level for _, level in splits[name]], meta)
        print(f"{name}.bin: {len(splits[name]):,} rows, {len(ids[name]):,} tokens")
    (out / "probe.json").unlink(missing_ok=True)
    (out / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
    return vocabulary
