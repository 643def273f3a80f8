"""Coverage-guided fuzzing of the headers that whit reads: python tests/fuzz/headers.py --minutes 60 --out FOLDER

Each kind of file gets its share of the time in a child process, whose memory is capped; atheris (libFuzzer) must be
installed. Inputs that break a promise of checks.py end the child, are kept, and the next child starts with another
seed. The seeds, executions and finds are written to FOLDER/report.json; those worth keeping go to tests/fuzz/found.
corpus.zip holds what an hour found interesting (report.json here says how much it ran), and each run begins with it.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import resource
import struct
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import ZipFile

HERE = Path(__file__).parent
SHARES = {"gguf": 0.45, "safetensors": 0.4, "imatrix": 0.15}
MEMORY = 768 << 20  # bytes above what the imports take
INTERESTING = (
    0, 1, 2, 3, 4, 7, 8, 9, 12, 13, 24, 31, 32, 33, 255, 256, 1 << 16, 1 << 18, (1 << 31) - 1, 1 << 31, (1 << 32) - 1,
    1 << 32, 1 << 40, 1 << 60, 1 << 61, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 32, (1 << 64) - 8, (1 << 64) - 1,
)  # fmt: skip
WORDS = [
    b'"dtype":"F32"', b'"dtype":"F8_E8M0"', b'"dtype":"C64"', b'"shape":[]', b'"shape":[0]', b'"shape":[1,1]',
    b'"data_offsets":[0,4]', b'"data_offsets":[4,0]', b'"data_offsets":[0,0]', b'"__metadata__":{}', b"[[[[", b"{{",
    b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}', b"18446744073709551615", b"1e99", b"-1", b"NaN",
    b"Infinity", b"\\ud800", b"\\u0000", b"4611686018427387904", b"null", b"true", b"0.0", b",", b"  ",
]  # fmt: skip


def seeds(kind: str) -> list[bytes]:
    """Whole files to begin with."""
    import torch
    from safetensors.torch import save

    from whit.export.gguf.header import Info, gguf_shard
    from whit.export.gguf.imatrix import Imatrix, dat_bytes, gguf_bytes
    from whit.tensor import TensorSpec

    if kind == "safetensors":
        tensors = {"a": torch.zeros(3, 5), "b.weight": torch.ones(4, dtype=torch.int8), "c": torch.zeros(0, 2)}
        return [save(tensors, {"format": "pt"}), save({"x": torch.tensor(1.0)}), save({})]
    if kind == "imatrix":
        imatrix = Imatrix({"a": torch.ones(4), "b": torch.ones(2)}, {"a": 4.0, "b": 1.0}, "t", 2)
        return [dat_bytes(imatrix), gguf_bytes(imatrix)]
    metadata = {
        "general.architecture": "llama", "general.alignment": 32, "n": -3, "l": 1 << 40, "r": 0.5, "f": True,
        "w": ["x", "", "ü"], "v": [1, -2], "s": [0.25],
    }  # fmt: skip
    infos = [
        Info("one", (3, 4), 0, TensorSpec((3, 4), torch.float32)),
        Info("two", (2, 64), 2, TensorSpec((2, 36), torch.uint8)),
        Info("three", (1, 1, 5), 1, TensorSpec((5,), torch.float16)),
    ]
    shard = gguf_shard("m.gguf", metadata, {}, infos)
    empty = gguf_shard("m.gguf", {}, {}, [])
    return [shard.header + bytes(shard.size - len(shard.header)), empty.header]


def changed(data: bytearray, chance: random.Random, text: bool) -> bytearray:
    """One change that knows what headers are made of: counts, lengths, words of JSON, pieces told twice or left out."""
    place = chance.randrange(len(data) + 1)
    kind = chance.randrange(6)
    if kind == 0:
        width, form = chance.choice([(4, "<I"), (8, "<Q")])
        limit = (1 << 8 * width) - 1
        near = chance.choice([*INTERESTING, len(data) + chance.randrange(-9, 9), chance.randrange(64)])
        data[place : place + width] = struct.pack(form, near & limit)
    elif kind == 1:
        piece = data[place : place + chance.randrange(1, 80)]
        at = chance.randrange(len(data) + 1)
        data[at:at] = piece
    elif kind == 2:
        del data[place : place + chance.randrange(1, 40)]
    elif kind == 3:
        del data[place:]
    elif kind == 4 and text:
        data[place : place + chance.choice([0, 0, 5])] = chance.choice(WORDS)
    else:
        data[place : place + 1] = bytes([chance.randrange(256)])
    return data


def mutate(kind: str, data: bytes, most: int, seed: int) -> bytes:
    """libFuzzer's own change, or some of ours; the length before a safetensors header is mostly set right."""
    import atheris

    chance = random.Random(seed)
    head, body = (data[:8], data[8:]) if kind == "safetensors" else (b"", data)
    if chance.random() < 0.4:
        body = atheris.Mutate(body or b"{", max(most - len(head), 1))
    else:
        buffer = bytearray(body)
        for _ in range(chance.randrange(1, 5)):
            buffer = changed(buffer, chance, kind == "safetensors")
        body = bytes(buffer)
    if kind == "safetensors":
        length = body.rfind(b"}") + 1
        near = chance.choice([length, length, length, length, len(body), len(body) + 1, chance.choice(INTERESTING)])
        head = struct.pack("<Q", near)
        if chance.random() < 0.5:
            body = body[:length] + bytes(chance.choice([0, 1, 4, 60, 64]))
    return (head + body)[:most]


def child(kind: str, corpus: Path, seconds: int, seed: int) -> None:
    """Fuzz one kind of file; libFuzzer ends the process at the first broken promise."""
    import atheris
    import torch

    with atheris.instrument_imports(include=["whit.checkpoint", "whit.export.gguf.imatrix"]):
        from checks import check
    corpus.mkdir(parents=True, exist_ok=True)
    with ZipFile(HERE / "corpus.zip") as earlier:
        known = [earlier.read(name) for name in earlier.namelist() if name.startswith(f"{kind}/")]
    for index, content in enumerate([*seeds(kind), *known]):
        (corpus / f"seed{index}").write_bytes(content)
    torch.set_num_threads(1)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with TemporaryDirectory(prefix="fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        path = Path(folder) / "m"

        def one(content: bytes) -> None:
            check(kind, content, path)

        options = [f"-max_total_time={seconds}", f"-seed={seed}", "-timeout=20", "-rss_limit_mb=0", "-max_len=4096"]
        options += [f"-artifact_prefix={corpus.parent}/{kind}-", "-print_final_stats=1"]
        atheris.Setup(
            [sys.argv[0], *options, str(corpus)], one,
            custom_mutator=lambda data, most, s: mutate(kind, data, most, s),
        )  # fmt: skip
        atheris.Fuzz()


def fuzz(kind: str, seconds: float, out: Path, seed: int) -> list[dict[str, object]]:
    """Children of one kind until the time is up; a row for each."""
    rows, stop = [], time.monotonic() + seconds
    while (left := int(stop - time.monotonic())) > 10:
        log = out / f"{kind}-{seed}.log"
        with log.open("w") as file:
            command = [sys.executable, __file__, "--child", kind, "--out", str(out), "--seed", str(seed)]
            status = subprocess.call([*command, "--seconds", str(left)], stdout=file, stderr=subprocess.STDOUT)
        text = log.read_text(errors="replace")
        done = re.findall(r"^(?:Done|stat::number_of_executed_units:) *(\d+)|^#(\d+)\t", text, re.MULTILINE)
        runs = max((int(a or b) for a, b in done), default=0)
        broken = re.findall(r"^(?:E?[A-Za-z]*(?:Error|Exception)\b.*|==\d+== ERROR: .*)$", text, re.MULTILINE)
        rows.append({
            "kind": kind, "seed": seed, "executions": runs, "status": status, "broken": broken[:2],
            "corpus": len(list((out / kind).iterdir())),
        })  # fmt: skip
        seed += 1
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--child", choices=SHARES, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(given.child, given.out / given.child, given.seconds, given.seed)
        return
    given.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, object]] = []
    for kind, share in SHARES.items():
        rows += fuzz(kind, share * given.minutes * 60, given.out, given.seed)
        (given.out / "report.json").write_text(json.dumps({"minutes": given.minutes, "runs": rows}, indent=1) + "\n")
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
