"""What the tour of the Circuit page says one should see, on the embedded model and the shipped set."""

import pytest

from analysis.prompt.circuit import group
from analysis.prompt.circuit.graph import Circuit, trace
from analysis.prompt.circuit.nodes import Nodes
from analysis.prompt.circuit.target import Target
from pages.sections.circuit_choices import TOUR
from tests.helpers import ROOT
from trainer import embedded
from trainer.checkpoint import Checkpoint


@pytest.fixture(scope="module")
def lm():
    from trainer.model.lm import LanguageModel

    return LanguageModel.load(embedded.NAME)


@pytest.fixture(scope="module")
def saes():
    layers = {layer: f"smollm2-135m-L{layer}-batchtopk-x4-k32" for layer in range(30)}
    return {layer: Checkpoint(ROOT / "checkpoints" / name).sae for layer, name in layers.items()}


class Seen:
    """A circuit of the tour as the page draws it: heads as nodes, MLPs of a token as one."""

    def __init__(self, lm, saes, name: str) -> None:
        from trainer.model.frozen import Frozen

        example = TOUR[name]
        right, wrong = (lm.single_token(f" {example.chosen[key]}") for key in ("next", "against"))
        nodes = Nodes(Frozen(lm, lm.to_tokens(example.prompt)[0]), saes)
        self.strings = lm.token_strings(nodes.frozen.tokens.tolist())
        self.last = len(self.strings) - 1
        self.whole: Circuit = trace(nodes, Target(self.last, right, wrong), {}, features=8, depth=2)
        self.circuit = group.grouped(self.whole, [*group.heads(self.whole), *group.mlps(self.whole)])

    def strongest(self):
        return max(
            (node for node in self.whole.nodes if node.kind == "feature"), key=lambda node: abs(node.attribution or 0)
        )

    def into(self, head: str, position: int, by: str) -> dict[tuple[str, int], float]:
        """What goes into a head at a token: (name, position) of each node, and how much."""
        nodes = self.circuit.nodes
        (reader,) = [i for i, node in enumerate(nodes) if (node.name, node.position) == (head, position)]
        found: dict[tuple[str, int], float] = {}
        for edge in self.circuit.edges:
            if edge.reader == reader and edge.by == by and edge.writer is not None:
                key = (nodes[edge.writer].name or nodes[edge.writer].kind, nodes[edge.writer].position)
                found[key] = found.get(key, 0.0) + edge.value
        return found

    def read(self, head: str, position: int) -> str:
        """The token of which a head reads most."""
        of_token: dict[int, float] = {}
        for (_, source), value in self.into(head, position, "OV").items():
            of_token[source] = of_token.get(source, 0.0) + value
        return self.strings[max(of_token, key=lambda source: of_token[source])]


def test_induction(lm, saes):
    seen = Seen(lm, saes, "Induction")
    mat = seen.strings.index(" mat")
    assert seen.read("18.6", seen.last) == " mat"
    keys = seen.into("18.6", seen.last, "K")
    first, second = sorted(keys, key=lambda node: -keys[node])[:2]
    assert first == ("16.0", mat) and second == ("17.8", mat) and keys[first] > 1.5 * keys[second]
    assert seen.read("16.0", mat) == " the" == seen.strings[mat - 1]
    assert {position for _, position in seen.into("16.0", mat, "OV")} == {mat - 1}


def test_indirect_object(lm, saes):
    seen = Seen(lm, saes, "Indirect object")
    second = max(position for position, text in enumerate(seen.strings) if text == " John")
    for head in ("20.0", "23.3"):
        sources = seen.into(head, seen.last, "OV")
        assert {position for _, position in sources} == {second}, head
    assert seen.read("23.7", seen.last) == " Mary"
    queries = seen.into("23.7", seen.last, "Q")
    of_heads = {name: value for (name, _), value in queries.items() if name != "MLPs"}
    assert max(of_heads, key=lambda name: of_heads[name]) == "20.0"


def test_previous_token(lm, saes):
    seen = Seen(lm, saes, "Previous token")
    there = seen.strings.index(" Representatives")
    assert seen.read("18.6", seen.last) == " Representatives"
    keys = seen.into("18.6", seen.last, "K")
    assert max(keys, key=lambda node: keys[node]) == ("16.0", there)
    assert seen.read("16.0", there) == " of" == seen.strings[there - 1] == seen.strings[seen.last]


def test_agreement(lm, saes):
    seen = Seen(lm, saes, "Agreement")
    node = seen.strongest()
    assert (node.layer, node.head, seen.strings[node.position]) == (26, 0, " cabinet")
    assert seen.read("26.0", seen.last) == " keys"
    assert seen.whole.value == pytest.approx(1.2, abs=0.05)
    assert node.effect > seen.whole.value  # without it the target is below 0
    assert node.direct > 0.9 * node.effect
