"""Nodes of a circuit drawn as one: those of a head at a token, or some that belong together, under a name."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from analysis.prompt.circuit.graph import Circuit, Edge, Node

_OF_HEAD = ("feature", "error", "bias")


class Group(NamedTuple):
    """Nodes under a name, by their index in the circuit."""

    name: str
    members: list[int]


def heads(circuit: Circuit) -> list[Group]:
    """Every head at every token that has a node: its features, and what its SAE leaves out there."""
    found: dict[tuple[int, int, int], list[int]] = {}
    for index, node in enumerate(circuit.nodes):
        if node.kind in _OF_HEAD and node.head >= 0:
            found.setdefault((node.layer, node.head, node.position), []).append(index)
    return [Group(f"{layer}.{head}", members) for (layer, head, _), members in found.items()]


def mlps(circuit: Circuit) -> list[Group]:
    """The MLPs of all layers at a token, where it has several."""
    found: dict[int, list[int]] = {}
    for index, node in enumerate(circuit.nodes):
        if node.kind == "mlp":
            found.setdefault(node.position, []).append(index)
    return [Group("MLPs", members) for members in found.values() if len(members) > 1]


def grouped(circuit: Circuit, groups: Sequence[Group]) -> Circuit:
    """The circuit with every group as one node; a node of several groups is the first one's.

    A group stands where its strongest member does, and has the sum of their attributions. Edges into it sum to what
    its members' edges sum to: an OV edge is what the writer gives to the sum of their pre-activations. Features of one
    head at one token look at a source because of one score: such a K or Q edge counts once. An edge within a group
    leads from it to itself.
    """
    owner = {index: group for group in reversed(range(len(groups))) for index in groups[group].members}
    nodes: list[Node] = []
    new: list[int] = []  # of every node of the circuit
    made: dict[int | None, int] = {}
    for index, node in enumerate(circuit.nodes):
        group = owner.get(index)
        if group in made:
            new.append(made[group])
            continue
        if group is not None:
            made[group] = len(nodes)
            node = _joined(circuit, groups[group].name, [i for i in groups[group].members if owner[i] == group])
        new.append(len(nodes))
        nodes.append(node)

    members: dict[tuple, list[int]] = {}
    counted: set[tuple] = set()
    for place, edge in enumerate(circuit.edges):
        writer = None if edge.writer is None else new[edge.writer]
        reader = None if edge.reader is None else new[edge.reader]
        if edge.reader is not None and edge.by in ("K", "Q"):
            looks = circuit.nodes[edge.reader]
            score = (edge.writer, reader, edge.by, edge.source, looks.layer, looks.head, looks.position)
            if score in counted:
                continue
            counted.add(score)
        members.setdefault((writer, reader, edge.by, edge.source), []).append(place)
    edges = []
    for (writer, reader, by, source), places in members.items():
        value = sum(circuit.edges[place].value for place in places)
        of_group = any(end is not None and nodes[end].members for end in (writer, reader))
        edges.append(Edge(writer, reader, by, value, source, places if of_group else []))
    return replace(circuit, nodes=nodes, edges=edges)


def _joined(circuit: Circuit, name: str, members: list[int]) -> Node:
    nodes = [circuit.nodes[each] for each in members]
    strongest = max(nodes, key=lambda node: abs(node.attribution or 0.0))
    known = [node.attribution for node in nodes if node.attribution is not None]
    same = {(node.layer, node.head) for node in nodes}
    head = strongest.head if len(same) == 1 else -1
    attribution = sum(known) if known else None
    kind = "mlp" if {node.kind for node in nodes} == {"mlp"} else "group"
    place = (strongest.layer, head, -1, strongest.position)
    return Node(kind, *place, attribution=attribution, name=name, members=members)
