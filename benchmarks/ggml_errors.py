"""ggml's types on the weights of a real model: errors and bytes beside llama.cpp's own quantizer.

python benchmarks/ggml_errors.py MODEL [--matrices 6]

llama.cpp (`pip install --no-deps xllamacpp`) quantizes the same matrices, plainly and with the importance that
`whit imatrix` measures. Errors are squared errors divided by llama.cpp's, weighed where importance was given: the sum
over the matrices, and the worst of them. Nothing here depends on how busy the machine is.
"""

from __future__ import annotations

import argparse

from whit.calibration import Calibration
from whit.checkpoint.hub import resolve_model
from whit.formats.ggml import KINDS
from whit.pipeline.importance import measure_importance
from whit.pipeline.job import open_source

import harness
from ggml_encoders import lost, ours, theirs

GROUP = 256  # columns that every type can take


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--matrices", type=int, default=6)
    parser.add_argument("--samples", type=int, default=8)
    args = parser.parse_args()
    imatrix = measure_importance(args.model, Calibration(samples=args.samples, context=512))
    source = open_source(resolve_model(args.model))
    blocks = source.model.config.num_hidden_layers
    found = {
        f"model.layers.{tensor.split('.')[1]}.mlp.down_proj.weight": sums / imatrix.counts[tensor]
        for tensor, sums in imatrix.sums.items()
        if ".ffn_down." in tensor and len(sums) % GROUP == 0
    }
    chosen = list(found)[:: max(blocks // args.matrices, 1)][: args.matrices]
    rows, result = [], {}
    for name, kind in KINDS.items():
        errors: dict[str, list[tuple[float, float]]] = {"plain": [], "weighted": []}
        same = True
        for parameter in chosen:
            weight = source.read(parameter).float()
            for case, given in (("plain", None), ("weighted", found[parameter])):
                mine, peer = ours(weight, name, given), theirs(weight, name, given)
                same &= mine.shape == peer.shape
                errors[case].append((lost(weight, mine, name, given), lost(weight, peer, name, given)))
        ratios = {case: sum(a for a, _ in pairs) / sum(b for _, b in pairs) for case, pairs in errors.items()}
        worst = {case: max(a / b for a, b in pairs) for case, pairs in errors.items()}
        result[name] = {"ratio": ratios, "worst": worst, "same size": same}
        cells = [f"{ratios[case]:.3f} (worst {worst[case]:.3f})" for case in ("plain", "weighted")]
        rows.append((name, f"{kind.bits_per_weight:.4g}", *cells, "yes" if same else "no"))
        print(name, *cells, flush=True)
    header = ("type", "bits", "error / llama.cpp's", "weighted by importance", "same bytes")
    shape = "x".join(map(str, source.origins[chosen[0]].spec.shape))
    note = f"\n{len(chosen)} matrices ({shape}, mlp.down_proj of every {max(blocks // args.matrices, 1)}th block) of "
    note += f"{args.model.rpartition('/')[2]}; importance from {args.samples} windows of 512 tokens."
    harness.save("ggml_errors", {"matrices": chosen, "types": result}, harness.markdown(header, rows) + "\n" + note)


if __name__ == "__main__":
    main()
