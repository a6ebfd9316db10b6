"""Token files of other trainers, used in place: memory-mapped, neither copied nor tokenised again.

    nanoGPT     train.bin          uint16 without a header, or uint32 for a vocabulary above 65,536
    llm.c       *.bin              256 int32 (magic, version, number of tokens), then uint16, or uint32 for Llama 3;
                                   modded-nanogpt's shards are the same
    Megatron    *.bin and *.idx    the .idx holds type, lengths and offsets of the sequences in the .bin

All are little-endian. None names its tokenizer, so the only check is that all ids are in the vocabulary. No torch here.
"""

import glob
import os
import re
import struct
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from nanochin.base.cli import UserError
from nanochin.data import formats
from nanochin.data.formats import TOKENS
from nanochin.data.text import BLOCK, File, Stage, Tokens, spaced
from nanochin.data.tokenizer import Tokenizer

HEADER = 1024  # bytes of llm.c's header
LLM_C = {20240520: (1, "<u2"), 20240801: (7, "<u4")}  # magic -> version, type; the second is for Llama 3
LLM_C_EVAL = 20240522
MEGATRON = b"MMIDIDX\0\0"
MEGATRON_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # 6 and 7 are floats
SCAN = 1 << 24  # ids that a thread checks at a time


@dataclass(frozen=True)
class TokenFile:
    path: str
    format: str  # nanoGPT, llm.c or Megatron
    ids: np.ndarray  # (tokens,) memory-mapped
    note: str = ""


def open_tokens(path: str, vocab_size: int) -> TokenFile:
    """Open a token file of any of these formats. Raises UserError for a file that fits none of them."""
    size, idx = os.path.getsize(path), os.path.splitext(path)[0] + ".idx"
    if not path.lower().endswith(TOKENS):
        raise UserError(f"{path}: unpack it first; token files are used in place")
    if not size:
        raise UserError(f"{path}: empty")
    if os.path.exists(idx):
        return TokenFile(path, "Megatron", _megatron(path, idx))
    with open(path, "rb") as file:
        header = file.read(HEADER)
    magic, version, count = struct.unpack_from("<3i", header.ljust(12, b"\0"))
    if magic == LLM_C_EVAL:
        raise UserError(f"{path}: magic {magic} is llm.c's format for evaluation sets (HellaSwag), not training tokens")
    if magic in LLM_C:
        return TokenFile(path, "llm.c", _llm_c(path, magic, version, count, size))
    if formats.packed(header) or header.startswith(b"PK\3\4") or _is_ascii(header):
        raise UserError(f"{path}: packed or plain text, not token ids; unpack or rename it")
    if _is_header(header):
        known = " or ".join(map(str, LLM_C))
        raise UserError(f"{path}: magic {magic} is not llm.c's for training tokens ({known})")
    if size % 2:
        raise UserError(f"{path}: an odd number of bytes ({size}): not nanoGPT's uint16; no llm.c magic, no .idx file")
    ids = np.memmap(path, "<u2", mode="r").view(np.ndarray)
    quarters = [np.count_nonzero(ids[i:SCAN:4]) for i in range(4)]  # of 64-bit ids: the low one, then zeros
    if size % 8 == 0 and 16 < quarters[0] > 8 * sum(quarters[1:]):
        raise UserError(f"{path}: three of four uint16 are 0, as in 64-bit ids; write them as uint16 or uint32")
    low, high = quarters[0] + quarters[2], quarters[1] + quarters[3]  # of uint32
    scanned = len(ids[:SCAN])
    if vocab_size > 1 << 16:
        why = f"ids of a vocabulary of {vocab_size} do not fit into uint16"
    elif high < 0.1 * (scanned // 2) and low > 0.5 * ((scanned + 1) // 2) > 16:
        why = "nearly every second uint16 is 0"
    else:
        return TokenFile(path, "nanoGPT", ids)
    if size % 4:
        raise UserError(f"{path}: {why}, but {size} bytes are no whole number of uint32; no llm.c magic, no .idx file")
    return TokenFile(path, "nanoGPT, uint32", ids.view("<u4"), f"read as uint32, since {why}")


def _is_ascii(header: bytes) -> bool:
    """Whether this looks like text: token ids have other bytes."""
    return len(header) >= 64 and header.isascii() and not re.search(rb"[\0-\x08]", header)


def _llm_c(path: str, magic: int, version: int, count: int, size: int) -> np.ndarray:
    expected, kind = LLM_C[magic]
    needed = HEADER + np.dtype(kind).itemsize * count
    if version != expected:
        raise UserError(f"{path}: version {version} of llm.c's magic {magic}; only {expected} is supported")
    if count < 1 or size != needed:
        raise UserError(f"{path}: corrupted: {size} bytes, but its header says {count} tokens, so {needed} bytes")
    return np.memmap(path, kind, mode="r", offset=HEADER).view(np.ndarray)


def _is_header(header: bytes) -> bool:
    """Whether this looks like another llm.c file (model, state): a date as magic, then mostly zeros, unlike tokens."""
    date = int.from_bytes(header[:4], "little")  # such as 20240326
    is_date = 2023 <= date // 10_000 <= 2040 and 1 <= date // 100 % 100 <= 12 and 1 <= date % 100 <= 31
    return is_date and len(header) == HEADER and not any(header[HEADER // 2 :])


def _megatron(path: str, idx: str) -> np.ndarray:
    """The ids of the .bin, after a check that its .idx describes it: contiguous sequences that fill the file."""

    def disagree(what: str):
        raise UserError(f"{idx}: {what}; it does not belong to {path}, or one of them is corrupted")

    content = np.memmap(idx, np.uint8, mode="r") if os.path.getsize(idx) else np.zeros(0, np.uint8)
    if content[: len(MEGATRON)].tobytes() != MEGATRON:
        raise UserError(f"{idx}: not a Megatron index (starts without {MEGATRON!r}); move it away to read {path} alone")
    if len(content) < 34:
        disagree(f"{len(content)} bytes, less than its header")
    version, code, sequences, documents = struct.unpack("<QBQQ", content[9:34].tobytes())
    if version != 1:
        raise UserError(f"{idx}: version {version} of Megatron's index; only 1 is supported")
    if code not in MEGATRON_TYPES:
        raise UserError(f"{idx}: type code {code} is not an integer type; expected one of {list(MEGATRON_TYPES)}")
    size = 34 + 12 * sequences + 8 * documents
    if len(content) not in (size, size + sequences):  # a mode byte per sequence is optional
        disagree(f"{len(content)} bytes, but {sequences} sequences and {documents} document bounds take {size}")
    lengths = content[34 : 34 + 4 * sequences].view("<i4")
    offsets = content[34 + 4 * sequences : 34 + 12 * sequences].view("<i8")
    kind = np.dtype(MEGATRON_TYPES[code])
    sizes = lengths.astype(np.int64) * kind.itemsize
    if sizes.sum() != os.path.getsize(path):
        disagree(f"its sequences add up to {sizes.sum()} bytes, but {path} has {os.path.getsize(path)}")
    if (lengths < 0).any():
        disagree(f"sequence {int(np.argmax(lengths < 0))} has a negative length")
    wrong = np.flatnonzero(offsets != np.cumsum(sizes) - sizes)
    if len(wrong):
        disagree(f"sequence {wrong[0]} starts at byte {offsets[wrong[0]]}, not where the previous one ends")
    return np.memmap(path, kind, mode="r").view(np.ndarray)


# ---------------------------------------------------------------------------------------------------------------------
# Contents


def are_token_files(files: list[File]) -> bool:
    """Whether these are token files. Raises UserError if some are and some are not."""
    kinds = {file.format == TOKENS: file.path for file in files}
    if len(kinds) > 1:
        raise UserError(f"`data`, `val`: {kinds[True]} has tokens, {kinds[False]} has text; give only one kind")
    return True in kinds


def check_ids(files: list[TokenFile], tokenizer: Tokenizer, stage: Stage) -> None:
    """Raises UserError for the first id outside the vocabulary, naming file, position and value."""
    V = tokenizer.vocab_size
    limit = f"`vocab_size` {V}" if tokenizer.numbers else f"`tokenizer` {tokenizer.name} has {V}"

    def check_block(block: tuple[TokenFile, int]) -> None:
        file, start = block
        ids = file.ids[start : start + SCAN]
        stage.add(ids.nbytes)
        if ids.max() >= V or ids.min() < 0:
            i = int(np.argmax((ids >= V) | (ids < 0)))
            where = f"{file.path}: token id {ids[i]} at position {start + i}"
            raise UserError(f"{where} is outside the vocabulary ({limit}); read as {file.format} format")

    for _ in stage.map(check_block, [(file, start) for file in files for start in range(0, len(file.ids), SCAN)]):
        pass


def sibling_val_files(files: list[File]) -> list[str]:
    """Validation files in the same folder: val.bin for train.bin, fineweb_val_*.bin for fineweb_train_*.bin."""
    found = set()
    for file in files:
        folder, name = os.path.split(file.path)
        if "train" in name:
            pattern = re.sub(r"\d+", "[0-9]*", glob.escape(name).replace("train", "val", 1))
            found |= set(glob.glob(os.path.join(glob.escape(folder), pattern)))
    return sorted(found - {file.path for file in files})


def hold_out(tokens: Tokens, keep: int) -> tuple[Tokens, Tokens]:
    """(the rest, about `keep` held-out tokens): evenly spaced blocks of at most 64k, from the start to the end."""
    total, block = len(tokens), min(BLOCK, keep)
    edges = [0, *(edge for start in spaced(total, block, keep) for edge in (start, start + block)), total]
    pieces = [tokens.views(a, b) for a, b in pairwise(edges)]
    return Tokens(sum(pieces[::2], [])), Tokens(sum(pieces[1::2], []))
