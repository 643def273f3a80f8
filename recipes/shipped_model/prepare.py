"""Split the texts, train the tokenizer, write the token streams of the shipped model.

The novels give three parts that never mix: one whole novel is held out, three whole novels are for
calibration, the rest is for training with the Wikipedia articles; other articles are for validation.
A stream is uint16, `eos doc eos doc ... eos`: every document is predicted after an `eos`.

    python recipes/shipped_model/prepare.py --text ~/.cache/whit-shared/data/text --out build/shipped_model
"""

import argparse
import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

EOS = "<|endoftext|>"
VOCAB_SIZE = 8192
HELD_OUT = ("Through the Postern Gate",)
CALIBRATION = (
    "ALMAYER'S FOLLY",
    "LITTLE LORD FAUNTLEROY",
    "A NIGHTMARE",
)  # A Nightmare: The Man Who Was Thursday


def read_documents(path: Path) -> list[str]:
    documents = (document.strip() for document in path.read_text(encoding="utf-8").split(EOS))
    return [document for document in documents if document]


def take(documents: list[str], titles: tuple[str, ...]) -> list[str]:
    """The one document that starts with each title, in the order of the titles."""
    found = [[document for document in documents if document.startswith(title)] for title in titles]
    counts = {title: len(matches) for title, matches in zip(titles, found, strict=True)}
    if set(counts.values()) != {1}:
        raise ValueError(f"novels_train.txt: every title must start exactly one document, found {counts}")
    return [matches[0] for matches in found]


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text encodes, and decodes to the same bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer, length=len(documents))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=EOS,
        eos_token=EOS,
        pad_token=EOS,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that transformers 4 knows as well as 5
    path.write_text(json.dumps(config, indent=2) + "\n")


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[str], chunk: int = 256) -> np.ndarray:
    """documents -> uint16 stream; in chunks, since encodings take far more memory than their ids."""
    eos = np.array([tokenizer.eos_token_id], dtype=np.uint16)
    parts = [eos]
    for start in range(0, len(documents), chunk):
        encodings = tokenizer.backend_tokenizer.encode_batch_fast(documents[start : start + chunk])
        for encoding in encodings:
            parts += [np.array(encoding.ids, dtype=np.uint16), eos]
    return np.concatenate(parts)


def byte_count(documents: list[str]) -> int:
    return sum(len(document.encode()) for document in documents)


def write_streams(tokenizer: PreTrainedTokenizerFast, splits: dict[str, list[str]], out: Path) -> dict:
    sizes = {}
    for name, documents in splits.items():
        stream = encode(tokenizer, documents)
        np.save(out / f"{name}.npy", stream)
        sizes[name] = {"documents": len(documents), "bytes": byte_count(documents), "tokens": len(stream) - 1}
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="folder of wiki_train.txt, novels_train.txt, ...")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    novels = read_documents(args.text / "novels_train.txt")
    held_out, calibration = take(novels, HELD_OUT), take(novels, CALIBRATION)
    apart = {*held_out, *calibration}
    train = read_documents(args.text / "wiki_train.txt") + [novel for novel in novels if novel not in apart]
    valid = read_documents(args.text / "wiki_valid.txt")

    for name, documents in (("heldout", held_out), ("calibration", calibration)):
        (args.out / f"{name}.txt").write_text("\n\n\n\n".join(documents) + "\n", encoding="utf-8", newline="\n")

    save_tokenizer(train_tokenizer(train), args.out / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(args.out / "tokenizer")
    sizes = write_streams(tokenizer, {"train": train, "wiki_valid": valid, "heldout": held_out}, args.out)
    (args.out / "sizes.json").write_text(json.dumps(sizes, indent=2) + "\n")
    print(json.dumps(sizes, indent=2))


if __name__ == "__main__":
    main()
