"""The yardstick: an interpolated modified Kneser-Ney n-gram over the same tokens (Chen and Goodman, 1999).

    p_n(w | h) = max(c(hw) - D(c(hw)), 0) / c(h*) + gamma(h) p_{n-1}(w | h')     h' = h less its first token

c is the count at the highest order and, below it, the number of different tokens seen before `hw`; D takes
three values per order, for counts 1, 2, and 3 or more; gamma(h) = sum of D over all hw / c(h*);
below the unigram lies 1 / V. Every n-gram has an integer id, its rank among the sorted keys
`id of its prefix * V + token`, so that a lookup is one binary search per order.

    python recipes/shipped_model/kneser_ney.py --data build/shipped_model
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scoring import summary

VOCAB_SIZE = 8192


@dataclass(frozen=True)
class Order:
    """The n-grams of one length; the first two arrays run over n-grams, the others over their prefixes."""

    keys: np.ndarray  # sorted: id of the prefix * V + last token
    discounted: np.ndarray  # max(c - D(c), 0)
    total: np.ndarray  # c(h*)
    backoff: np.ndarray  # gamma(h)


def discounts(counts: np.ndarray) -> np.ndarray:
    """D(0) = 0, D(1), D(2), D(3+) from the numbers of n-grams counted once to four times."""
    n1, n2, n3, n4 = (max(1, int((counts == k).sum())) for k in (1, 2, 3, 4))
    y = n1 / (n1 + 2 * n2)
    values = [0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]
    return np.clip(values, 0.0, [0.0, 1.0, 2.0, 3.0])


def smooth(keys: np.ndarray, counts: np.ndarray, prefixes: int, vocab_size: int) -> Order:
    prefix = keys // vocab_size
    discount = discounts(counts)[np.minimum(counts, 3)]
    total = np.bincount(prefix, weights=counts, minlength=prefixes)
    removed = np.bincount(prefix, weights=discount, minlength=prefixes)
    backoff = np.divide(removed, total, out=np.ones(prefixes), where=total > 0)
    return Order(keys, counts - discount, np.maximum(total, 1.0), backoff)


def train(stream: np.ndarray, length: int = 5, vocab_size: int = VOCAB_SIZE) -> list[Order]:
    """stream (n,) of tokens -> the orders 1 to `length`."""
    tokens = stream.astype(np.int64)
    ids = np.zeros(len(tokens) + 1, dtype=np.int64)  # of the k-gram that starts at each token; all empty for k = 0
    orders: list[Order] = []
    keys, prefixes = np.zeros(1, dtype=np.int64), 0
    for k in range(length):
        grams = ids[:-1] * vocab_size + tokens[k:]
        longer, first, inverse, counts = np.unique(grams, True, True, True)
        if k > 0:
            continuations = np.bincount(ids[1:][first], minlength=len(keys))
            orders.append(smooth(keys, continuations, prefixes, vocab_size))
        prefixes = len(keys)
        keys, ids = longer, inverse
    return [*orders, smooth(keys, counts, prefixes, vocab_size)]


def token_losses(orders: list[Order], stream: np.ndarray, vocab_size: int = VOCAB_SIZE) -> np.ndarray:
    """stream (n + 1,) -> nats of each of its n predicted tokens; every token is seen, nothing is reset."""
    tokens = stream.astype(np.int64)
    probability = np.full(len(tokens), 1 / vocab_size)
    prefix = np.zeros(len(tokens), dtype=np.int64)  # id of the k-gram before each token; -1: never seen
    for order in orders:
        key = prefix * vocab_size + tokens
        place = np.minimum(np.searchsorted(order.keys, key), len(order.keys) - 1)
        hit = (prefix >= 0) & (order.keys[place] == key)
        seen = np.where(hit, order.discounted[place], 0.0) / order.total[prefix]
        probability = np.where(prefix >= 0, seen + order.backoff[prefix] * probability, probability)
        prefix = np.concatenate(([-1], np.where(hit, place, -1)[:-1]))
    return -np.log(probability[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="what prepare.py wrote")
    parser.add_argument("--length", type=int, default=5)
    args = parser.parse_args()

    orders = train(np.load(args.data / "train.npy"), args.length)
    sizes = json.loads((args.data / "sizes.json").read_text())
    scores = {}
    for name in ("wiki_valid", "heldout"):
        losses = token_losses(orders, np.load(args.data / f"{name}.npy"))
        np.save(args.data / f"{name}.kneser_ney.npy", losses.astype(np.float32))
        scores[name] = summary(float(losses.sum()), len(losses), sizes[name]["bytes"])
    report = {"length": args.length, "ngrams": [len(order.keys) for order in orders], "scores": scores}
    (args.data / "kneser_ney.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
