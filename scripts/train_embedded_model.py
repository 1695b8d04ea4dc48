"""Trains the small language model that the package carries, from the six novels of Jane Austen.

The novels come from Debian's package `r-cran-janeaustenr` (`apt-get install r-cran-janeaustenr`, or unpack
the package anywhere and pass `--data`). The published weights took one thread about 20 minutes:

    python scripts/train_embedded_model.py --steps 1600 --threads 1

What it does: reads R's lazy-load database, joins lines into paragraphs, trains a byte-level BPE tokenizer and
a Llama with grouped-query attention, and writes both as a Hugging Face folder in the classic format, which
transformers 4.34 and 5 both read. Neither the tokenizer nor the model sees the held-out chapters. The result
is a function of the arguments, the versions of torch and tokenizers, and the processor's rounding.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import re
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM

DEBIAN_DATA = Path("/usr/lib/R/site-library/janeaustenr/data")
PACKAGED = Path(__file__).resolve().parents[1] / "src" / "kwaainet_bridge" / "models" / "austen"

BOS, EOS = "<s>", "</s>"
SPECIAL_TOKENS = ("<unk>", BOS, EOS)  # ids 0, 1 and 2, where Llama has them
HELD_OUT_CHAPTER = 10  # of each novel

# Written key by key: transformers 5 would write `dtype` and `rope_parameters`, which older readers ignore.
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": SPECIAL_TOKENS.index(BOS),
    "eos_token_id": SPECIAL_TOKENS.index(EOS),
    "hidden_act": "silu",
    "hidden_size": 192,
    "initializer_range": 0.02,
    "intermediate_size": 512,
    "max_position_embeddings": 2048,
    "model_type": "llama",
    "num_attention_heads": 6,
    "num_hidden_layers": 8,
    "num_key_value_heads": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.34.1",
    "use_cache": True,
    "vocab_size": 2048,
}


# --- R's lazy-load database ---------------------------------------------------------------------------------


class RReader:
    """Reads R's binary (XDR) serialisation, versions 2 and 3: what character vectors and indices need of it.

    Source: "R Internals", section "Serialization Formats". Raises ValueError for any other type.
    """

    def __init__(self, data: bytes) -> None:
        if data[:2] != b"X\n":
            raise ValueError("not R's binary serialisation")
        self._data, self._offset, self._symbols = data, 2, []
        version, _writer, _reader = self._integers(3)
        if version == 3:
            self._bytes(self._integer())  # the native encoding's name

    def _bytes(self, count: int) -> bytes:
        start, self._offset = self._offset, self._offset + count
        return self._data[start : self._offset]

    def _integers(self, count: int) -> list[int]:
        return np.frombuffer(self._bytes(4 * count), ">i4").tolist()

    def _integer(self) -> int:
        return self._integers(1)[0]

    def value(self) -> object:
        flags = self._integer()
        kind, has_attributes, has_tag = flags & 0xFF, bool(flags & 0x200), bool(flags & 0x400)
        if kind == 0xFE:  # NULL
            return None
        if kind == 0x01:  # symbol
            self._symbols.append(self.value())
            return self._symbols[-1]
        if kind == 0xFF:  # symbol seen before
            return self._symbols[(flags >> 8) - 1]
        if kind == 0x09:  # string
            length = self._integer()
            return None if length < 0 else self._bytes(length).decode()
        if kind == 0x02:  # pairlist
            attributes = self.value() if has_attributes else None
            tag, head, tail = self.value() if has_tag else None, self.value(), self.value()
            return {tag: head, **(tail or {}), **(attributes or {})}
        if kind in {0x0A, 0x0D}:  # logical or integer vector
            vector = self._integers(self._integer())
        elif kind in {0x10, 0x13}:  # character vector, list
            vector = [self.value() for _ in range(self._integer())]
        else:
            raise ValueError(f"R type {kind:#x} is not supported")
        attributes = self.value() if has_attributes else {}
        return dict(zip(attributes["names"], vector, strict=True)) if "names" in attributes else vector


def read_novels(folder: Path) -> dict[str, list[str]]:
    """The data sets of an R package as lists of lines; `folder` holds Rdata.rdx (the index) and Rdata.rdb."""
    index = RReader(gzip.decompress((folder / "Rdata.rdx").read_bytes())).value()
    records = (folder / "Rdata.rdb").read_bytes()
    novels = {}
    for name, (offset, length) in sorted(index["variables"].items()):
        record = records[offset : offset + length]  # a 4-byte length, then zlib
        novels[name] = RReader(zlib.decompress(record[4:])).value()
    return novels


# --- text ---------------------------------------------------------------------------------------------------

CHAPTER = re.compile(r"chapter ([0-9]+|[ivxl]+)", re.IGNORECASE)
NOT_AUSTEN = re.compile(r"\[|\(End of|\*|volume [ivx]+$|finis$|the end$", re.IGNORECASE)
END_MATTER = "A NOTE ON THE TEXT"  # a modern editor's


def chapters(lines: list[str]) -> Iterator[str]:
    """The chapters of a novel, a paragraph a line; without front matter, headings and editors' notes."""
    paragraphs: list[str] | None = None
    for block in "\n".join(lines).split("\n\n"):
        paragraph = " ".join(block.replace("_", "").split())
        if paragraph == END_MATTER:
            break
        if CHAPTER.fullmatch(paragraph):
            if paragraphs:
                yield "\n".join(paragraphs)
            paragraphs = []
        elif paragraphs is not None and paragraph and not NOT_AUSTEN.match(paragraph):
            paragraphs.append(paragraph.replace("*", ""))
    if paragraphs:
        yield "\n".join(paragraphs)


def split_corpus(novels: dict[str, list[str]]) -> tuple[list[str], list[str]]:
    """Chapters to train on and chapters held out."""
    training, held_out = [], []
    for lines in novels.values():
        for number, chapter in enumerate(chapters(lines), 1):
            (held_out if number == HELD_OUT_CHAPTER else training).append(chapter)
    return training, held_out


def train_tokenizer(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=CONFIG["vocab_size"],
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


@dataclass(frozen=True)
class Tokens:
    """Chapters as one row of ids, each closed by EOS, and where sentences start in it."""

    ids: torch.Tensor
    starts: torch.Tensor
    characters: int

    @classmethod
    def of(cls, texts: list[str], tokenizer: Tokenizer) -> Tokens:
        ids: list[int] = []
        starts: list[int] = []
        for encoding, text in zip(
            tokenizer.encode_batch(texts, add_special_tokens=False), texts, strict=True
        ):
            sentences = {0} | {m.end() for m in re.finditer(r'\n|(?<!Mr)(?<!Mrs)(?<!Dr)[.!?]"?(?= )', text)}
            starts += [len(ids) + i for i, (at, _) in enumerate(encoding.offsets) if at in sentences]
            ids += [*encoding.ids, tokenizer.token_to_id(EOS)]
        return cls(torch.tensor(ids), torch.tensor(starts), sum(map(len, texts)))

    def sample(self, count: int, length: int, generator: torch.Generator) -> torch.Tensor:
        """BOS and `length` - 1 ids from a random sentence on, `count` times: [count, length], int64."""
        fitting = self.starts[self.starts <= len(self.ids) - length]
        chosen = fitting[torch.randint(len(fitting), (count,), generator=generator)]
        rows = self.ids[chosen[:, None] + torch.arange(length - 1)]
        return torch.cat([torch.full((count, 1), CONFIG["bos_token_id"]), rows], dim=1)


# --- training -----------------------------------------------------------------------------------------------


def optimizers(model: LlamaForCausalLM, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for embeddings and norms.

    After 150 steps Muon's held-out loss is 4.5 where AdamW's alone is 5.3, and a step costs a tenth more.
    """
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and ".layers." in name else others).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=learning_rate, weight_decay=0.0, betas=(0.9, 0.95), fused=True),
    ]


def learning_rate_factor(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then half a cosine down to a fiftieth."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, tokens: Tokens, length: int) -> float:
    """Mean cross-entropy (nats a token) over consecutive windows of `length` ids."""
    rows = tokens.ids[: len(tokens.ids) // length * length].reshape(-1, length)
    losses = [
        model(input_ids=part, labels=part, use_cache=False).loss.item() * len(part) for part in rows.split(8)
    ]
    return sum(losses) / len(rows)


def train(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    training_texts, held_out_texts = split_corpus(read_novels(args.data))
    tokenizer = train_tokenizer(training_texts)
    training, held_out = Tokens.of(training_texts, tokenizer), Tokens.of(held_out_texts, tokenizer)
    print(
        f"{len(training.ids):,} ids of {training.characters:,} characters, {len(held_out.ids):,} ids held out"
    )
    model = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in CONFIG.items() if k != "torch_dtype"}))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    chosen = optimizers(model, args.learning_rate)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda s: learning_rate_factor(s, args.steps, args.warmup))
        for o in chosen
    ]
    began, recent = time.monotonic(), 0.0
    for step in range(1, args.steps + 1):
        batch = training.sample(args.batch, args.length, generator)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.bfloat16):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(chosen, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
        recent = loss.item() if step == 1 else 0.98 * recent + 0.02 * loss.item()
        if step % args.report_every == 0 or step == args.steps:
            print(
                f"step {step}/{args.steps}: training loss {recent:.3f}, held-out loss "
                f"{mean_loss(model, held_out, args.length):.3f}, {time.monotonic() - began:.0f} s",
                flush=True,
            )
        if step % args.export_every == 0 or step == args.steps:
            export(model, tokenizer, args.out)
            print(f"wrote {args.out}", flush=True)


# --- the folder ---------------------------------------------------------------------------------------------


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, object]:
    """The tokenizer's file as tokenizers 0.14 reads it: merges as "a b", no keys that came later."""
    content = json.loads(tokenizer.to_str())
    bpe = content["model"]
    bpe["merges"] = [pair if isinstance(pair, str) else " ".join(pair) for pair in bpe["merges"]]
    bpe.pop("ignore_merges", None)
    return content


def export(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes weights (bfloat16), tokenizer and configs; the README beside them is written by hand."""
    folder.mkdir(parents=True, exist_ok=True)
    tied = {"lm_head.weight"} if CONFIG["tie_word_embeddings"] else set()
    weights = {
        k: v.detach().to(torch.bfloat16).contiguous() for k, v in model.state_dict().items() if k not in tied
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    ends = {"bos_token_id": CONFIG["bos_token_id"], "eos_token_id": CONFIG["eos_token_id"]}
    write_json(folder / "config.json", CONFIG)
    write_json(folder / "generation_config.json", {**ends, "pad_token_id": CONFIG["eos_token_id"]})
    special = {"bos_token": BOS, "eos_token": EOS, "unk_token": SPECIAL_TOKENS[0]}
    write_json(folder / "special_tokens_map.json", special)
    write_json(folder / "tokenizer.json", tokenizer_json(tokenizer))
    write_json(
        folder / "tokenizer_config.json",
        {
            **special,
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": CONFIG["max_position_embeddings"],
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the language model that the package carries.")
    parser.add_argument("--data", type=Path, default=DEBIAN_DATA, help="folder of janeaustenr's Rdata.rdb")
    parser.add_argument("--out", type=Path, default=PACKAGED, help="folder to write")
    parser.add_argument(
        "--steps", type=int, default=1600, help="beyond about three epochs the held-out loss rises"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1811)
    parser.add_argument("--batch", type=int, default=8, help="sequences a step")
    parser.add_argument("--length", type=int, default=256, help="tokens a sequence")
    parser.add_argument("--learning-rate", type=float, default=6e-3)
    parser.add_argument("--warmup", type=int, default=100, help="steps")
    parser.add_argument(
        "--bfloat16", action=argparse.BooleanOptionalAction, default=True, help="compute, not weights"
    )
    parser.add_argument("--report-every", type=int, default=250, help="steps")
    parser.add_argument("--export-every", type=int, default=1000, help="steps")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
