"""How long a circuit takes: a row of "Circuits" in benchmarks/README.md for each length of prompt.

    python -m benchmarks.circuit_time CHECKPOINT ... [--tokens 64 256] [--repeats 5]

The checkpoints are one SAE on several layers. The prompt is the beginning of a held-out document, the target what the
model predicts after its last token against what it holds for second; sizes are those with which the Circuit page opens.
"""

import argparse
import time
from pathlib import Path

import torch

from analysis.prompt.circuit.graph import trace
from analysis.prompt.circuit.nodes import Nodes
from analysis.prompt.circuit.target import Number, Target
from benchmarks.timing import spread
from trainer.checkpoint import Checkpoint
from trainer.model.frozen import Frozen

_FEATURES, _DEPTH = 8, 2  # of the page


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.circuit_time", description=__doc__)
    parser.add_argument("checkpoints", nargs="+", type=Path, metavar="CHECKPOINT")
    parser.add_argument("--tokens", nargs="+", type=int, default=[64, 256], help="of the prompt, with BOS (64 256)")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    checkpoints = {each.layer: each for each in map(Checkpoint, options.checkpoints)}
    first, saes = next(iter(checkpoints.values())), {layer: each.sae for layer, each in checkpoints.items()}
    lm = first.open_model("cpu")
    text = first.open_text(lm.tokenizer).held_out(8).flatten()
    print(f"{len(saes)} layers, {_FEATURES} features, {_DEPTH} steps back; {torch.get_num_threads()} threads\n")
    print("| tokens | circuit, s | of it forward and nodes, s | gradient, s | nodes |\n|---|---|---|---|---|")
    for n in options.tokens:
        tokens = torch.cat([text[:1], text[text != text[0]][: n - 1]])
        rows = [once(lm, saes, tokens) for _ in range(options.repeats + 1)][1:]
        columns = [spread([row[i] for row in rows]) for i in range(3)]
        figures = " | ".join("{:.1f} ({:.1f} to {:.1f})".format(*each) for each in columns)
        print(f"| {n} | {figures} | {rows[0][3]} |")


def once(lm, saes, tokens) -> tuple[float, float, float, int]:  # type: ignore[no-untyped-def]
    """Seconds in all, of the nodes and of the gradient, and how many nodes the circuit has."""
    started = time.perf_counter()
    nodes = Nodes(Frozen(lm, tokens), saes)
    prepared = time.perf_counter()
    last = len(tokens) - 1
    with torch.no_grad():
        best = lm.logits(nodes.frozen.final[None, last:].to(lm.weights_dtype))[0, 0].topk(2).indices.tolist()
    target = Target(last, *best)
    circuit = trace(nodes, target, {}, _FEATURES, _DEPTH)
    done = time.perf_counter()
    Number(nodes, target).gradient()
    return done - started, prepared - started, time.perf_counter() - done, len(circuit.nodes)


if __name__ == "__main__":
    main()
