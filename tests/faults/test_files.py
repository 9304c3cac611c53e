"""Files from strangers: mutations of everything that a checkpoint directory holds, each read as the app reads it."""

import json
import os
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from analysis.__main__ import main as analyse
from analysis.comments import Comments
from analysis.labels import Labels
from analysis.lists import Lists
from analysis.match.__main__ import main as match
from analysis.match.read import Match
from analysis.runs import progress, tables
from analysis.store import Analysis
from trainer.__main__ import main as train
from trainer.checkpoint import Checkpoint, CheckpointError, list_checkpoints

NAME, OTHER = "batchtopk", "block-l1_1"
_METAS = ("analysis/meta.json", f"matches/{OTHER}/meta.json")
_TABLES = (
    "features", "examples", "contexts", "heads", "patterns", "copying", "pairs", "merging", "detection", "counts",
    "tokens",
)  # fmt: skip
_VALUES = [
    None, True, -1, 0, 1.5, 10**9, 2**63, 10**40, -(10**12), 1e300, "", "9", "\ud800", "\0", "x" * 10_000, [], {}, [[]],
    [None], {"a": 1}, float("nan"), float("inf"),
]  # fmt: skip


@pytest.fixture(scope="module")
def analysed(trained, tmp_path_factory) -> Path:
    """Two matched checkpoints, one with an analysis and labels."""
    folder = tmp_path_factory.mktemp("strangers")
    for name in (NAME, OTHER):
        shutil.copytree(trained / name, folder / name)
    options = ["--tokens=300", "--device=cpu"]
    assert analyse([str(folder / NAME), *options, "--examples=2", "--quantile_examples=1"]) == 0
    assert match([str(folder / NAME), str(folder / OTHER), *options]) == 0
    Labels(folder / NAME).put(1, "of", "", seen=0.0)
    return folder


def look_at_weights(folder: Path) -> Checkpoint:
    readable, errors = list_checkpoints(folder)
    assert OTHER in [each.name for each in readable]
    if errors:
        raise errors[0]
    checkpoint = next(each for each in readable if each.name == NAME)
    checkpoint.sae(torch.zeros(2, checkpoint.n_heads, checkpoint.config.model.d_head))
    return checkpoint


def look(folder: Path) -> None:
    checkpoint = look_at_weights(folder)
    assert checkpoint.recipe and checkpoint.site and isinstance(checkpoint.sparsity, str)
    progress.progress([checkpoint], now=0.0)
    tables.summary([checkpoint]).to_csv()
    tables.summary([checkpoint], repeated=True, head=0).to_csv()
    curves = tables.curves([checkpoint])
    for figure in set(curves) & {"FVU", "L0", "loss"}:
        tables.thinned(curves, figure).to_json()
    if checkpoint.eval:
        tables.binned(tables.histograms(checkpoint.eval).assign(name="a"))


def look_at_analysis(folder: Path) -> None:
    checkpoint = Checkpoint(folder / NAME)
    analysis = Analysis(checkpoint)
    strings = analysis.strings
    analysis.search(fires_on="a", reads="a", promotes="a", role="self", head=0, density=(0, 1))
    analysis.search(in_examples="a", in_text="a", order="description_auroc")
    for feature in (1, len(analysis.features) - 1):
        row = analysis.feature(feature)
        _ = [strings[int(i)] for i in row["top_logit_ids"]], row["top_logits"][0] + row["bottom_logits"][0]
        for example in analysis.examples(feature).itertuples():
            _ = [strings[int(i)] for i in example.token_ids][example.position], example.dfa.argmax()
        _ = [strings[int(i)] for ids in analysis.detection(feature)["token_ids"] for i in ids]
        analysis.neighbours(feature).join(analysis.features[["head", "description"]], on="other")
    for on, pictures in analysis.patterns.items():
        assert len(pictures) == len(analysis.heads) and analysis.meta["patterns"][on]["contexts"]
        assert all(picture.size**2 == len(picture.values) for picture in pictures)
    for row in analysis.heads.itertuples():
        _ = analysis.features.loc[row.mono_deviants], f"{row.copying:.2f}", analysis.heads.iloc[row.head]
    for pair in analysis.copying.itertuples():
        _ = strings[int(analysis.contexts([pair.context])[pair.context][pair.source])]
    _ = analysis.merging["L0"] / analysis.meta["redundancy"]["l0"]


def look_at_match(folder: Path) -> None:
    a, b = Checkpoint(folder / NAME), Checkpoint(folder / OTHER)
    found = Match(a, b)
    for side, checkpoint in (("a", a), ("b", b)):
        of_side = np.zeros(checkpoint.sae.d_sae)
        _ = of_side[found.alone(side)["feature"]], of_side[found.pairs[side]]
    found.per_head()


def look_at_metas(folder: Path) -> None:
    a, b = Checkpoint(folder / NAME), Checkpoint(folder / OTHER)
    of_analysis, of_match = Analysis(a).meta, Match(a, b).meta
    for each in (of_analysis["head_tokens"], of_analysis["n_tokens"], of_match["min_firings"], of_match["n_tokens"]):
        assert f"{each:,}"
    assert np.isfinite(of_match["threshold"]) and of_match["greedy"] in (True, False)
    redundancy = of_analysis["redundancy"]
    assert redundancy["n_tokens"] >= 0 and redundancy["l0"] >= 0
    assert len(np.array(redundancy["heads"], dtype=float)) == a.n_heads


def one_sentence(error: Exception) -> None:
    said = str(error)
    assert 0 < len(said) < 500 and "\n" not in said and said.isprintable(), said
    said.encode()


def trial(looks: list[Callable[[Path], None]], folder: Path) -> str:
    """What came of it: read, or refused by a sentence of a documented kind."""
    for look_at in looks:
        try:
            look_at(folder)
        except ValueError as error:
            if type(error) not in (CheckpointError, ValueError):
                raise
            one_sentence(error)
            return "refused"
    return "read"


def trials(n: int, seed: int, files: list[Path], looks, folder: Path, mutate) -> str:
    """Mutate one file at a time and put it back; the counts of what came of it."""
    came: dict[str, int] = {"refused": 0, "read": 0}
    whole = {file: file.read_bytes() for file in files}
    for i in range(n):
        rng = random.Random(f"{seed} {i}")
        file = rng.choice(files)
        file.write_bytes(mutate(rng, whole[file]))
        try:
            came[trial(looks, folder)] += 1
        except Exception as error:
            raise AssertionError(f"mutation {i} of {file.name} (seed {seed}): {error!r}") from error
        finally:
            file.write_bytes(whole[file])
    assert came["refused"], "mutations that are never refused test nothing"
    return f"{came['refused']:,} a sentence, {came['read']:,} read"


def damage(rng: random.Random, data: bytes) -> bytes:
    """Bits flipped, cut, repeated, overwritten, emptied."""
    at = rng.randrange(len(data))
    kind = rng.randrange(7)
    if kind < 2:
        flipped = bytearray(data)
        for _ in range(rng.choice([1, 1, 4, 64])):
            flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(flipped)
    some = rng.choice(
        [b"\xff", b"\0" * 16, b"[" * 3000, b'{"a":' * 2000, b"9" * 5000, b"NaN", b"1e999", b"\xed\xa0\x80"]
    )
    end = at + rng.randrange(len(data))
    return [data[:at], data[:at] + some + data[at:], data[:at] + data[end:], b"", b"\0" * len(data)][kind - 2]


def mutated_json(rng: random.Random, data: bytes) -> bytes:
    """Damage, or a value of it deleted, replaced by one of another kind, or written twice."""
    if rng.random() < 0.3:
        return damage(rng, data)
    lines = data.splitlines()
    single = len(lines) > 1 and lines[0].endswith(b"}")  # metrics.jsonl
    at = rng.randrange(len(lines)) if single else 0
    value = json.loads(lines[at] if single else data)
    places = list(_places(value))
    holder, key = rng.choice(places)
    what = rng.randrange(5)
    if what == 0:
        del holder[key]
    elif what == 1 and isinstance(holder, dict):
        holder[rng.choice(["name", "recipe", "x", "L0", "FVU", "step"])] = rng.choice(_VALUES)
    elif what == 2:
        other, other_key = rng.choice(places)
        holder[key] = json.loads(json.dumps(other[other_key])) if other_key in other or isinstance(other, list) else 0
    else:
        holder[key] = rng.choice(_VALUES)
    text = json.dumps(value).encode()
    return b"\n".join([*lines[:at], text, *lines[at + 1 :], b""]) if single else text


def _places(value):
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])


def mutated_weights(rng: random.Random, data: bytes) -> bytes:
    """Damage, or another header over the same bytes."""
    if rng.random() < 0.4:
        return damage(rng, data)
    n = struct.unpack("<Q", data[:8])[0]
    header = mutated_json(rng, data[8 : 8 + n]) if rng.random() < 0.8 else data[8 : 8 + n]
    size = rng.choice([len(header)] * 8 + [0, 2**40, 2**63, len(header) + 1])
    return struct.pack("<Q", size) + header + data[8 + n :]


def mutated_table(rng: random.Random, data: bytes) -> bytes:
    """Damage, or a column dropped, of another type, or with cells that cannot be."""
    if rng.random() < 0.4:
        return damage(rng, data)
    table = pq.read_table(pa.BufferReader(data))
    at = rng.randrange(table.num_columns)
    name, column, n = table.column_names[at], table.column(at), table.num_rows
    what = rng.randrange(6)
    if what == 0:
        table = table.drop_columns([name])
    elif what == 1:
        table = table.slice(0, rng.choice([0, n // 2, max(0, n - 1)]))
    elif what == 2:
        table = table.take(pa.array(np.random.default_rng(rng.randrange(2**30)).integers(0, max(n, 1), n)))
    else:
        new = rng.choice(
            [["x"] * n, [10**9] * n, [-1] * n, [[1]] * n, [[]] * n, [None] * n, [1.5] * n, [float("nan")] * n,
             [b"\xff"] * n, [[-1, 10**9]] * n, [{"a": 1}] * n]
        )  # fmt: skip
        kinds = [None, column.type]
        array = None
        for kind in rng.sample(kinds, 2):
            try:
                array = pa.array(new, kind)
                break
            except (pa.ArrowException, TypeError, ValueError):
                continue
        table = table.set_column(at, name, array if array is not None else pa.array([None] * n))
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=rng.choice([1, 64, 2**16]))
    return sink.getvalue().to_pybytes()


@pytest.fixture
def folder(analysed, tmp_path) -> Path:
    return shutil.copytree(analysed, tmp_path / "checkpoints")


def test_json_of_a_checkpoint(folder, tries, fault):
    n = tries(60, 900)
    files = [folder / NAME / name for name in ("config.json", "eval.json", "metrics.jsonl")]
    fault(
        "files", "config.json, eval.json, metrics.jsonl mutated", n, trials(n, 1, files, [look], folder, mutated_json)
    )


def test_weights(folder, tries, fault):
    n = tries(40, 600)
    fault(
        "files", "sae.safetensors mutated", n,
        trials(n, 2, [folder / NAME / "sae.safetensors"], [look_at_weights], folder, mutated_weights),
    )  # fmt: skip


@pytest.mark.slow
def test_tables_of_an_analysis(folder, tries, fault):
    n = tries(40, 420)
    files = [folder / NAME / "analysis" / f"{name}.parquet" for name in _TABLES]
    came = trials(n, 3, files, [look_at_analysis], folder, mutated_table)
    fault("files", "tables of an analysis mutated", n, came)


def test_tables_of_a_match(folder, tries, fault):
    n = tries(20, 300)
    files = [folder / NAME / "matches" / OTHER / f"{name}.parquet" for name in ("pairs", "features")]
    came = trials(n, 4, files, [look_at_match], folder, mutated_table)
    fault("files", "tables of a match mutated", n, came)


def test_meta_of_an_analysis_and_a_match(folder, tries, fault):
    n = tries(20, 300)
    came = trials(n, 5, [folder / NAME / name for name in _METAS], [look_at_metas], folder, mutated_json)
    fault("files", "meta.json of an analysis, a match mutated", n, came)


def test_labels(folder, tries, fault):
    def look_at_labels(folder: Path) -> None:
        labels = Labels(folder / NAME)
        labels.table().to_csv()
        labels.put(2, "mine", "", seen=labels.get(2).changed)

    def look_at_lists(folder: Path) -> None:
        lists = Lists(folder / NAME)
        lists.put(3, [*lists.all(), "another"])

    def look_at_comments(folder: Path) -> None:
        comments = Comments(folder / NAME)
        comments.table().to_csv()
        comments.add(2, "Ada", "text")

    Lists(folder / NAME).put(1, ["mine"])
    Comments(folder / NAME).add(1, "Ada", "a comment")
    n = tries(30, 200)
    for name, look_at in (("labels", look_at_labels), ("lists", look_at_lists), ("comments", look_at_comments)):
        files = [folder / NAME / f"{name}.sqlite"]
        fault("files", f"{name}.sqlite mutated", n, trials(n, 6, files, [look_at], folder, damage))
    for kind, text in (("json", '[{"feature": 1, "label": "a", "note": "b"}]'), ("csv", "feature,label,note\n1,a,b\n")):
        file = folder / f"labels.{kind}"
        file.write_text(text)
        looks = [lambda folder, file=file: Labels(folder / OTHER).load(file.read_bytes(), 4)]
        mutate = mutated_json if kind == "json" else damage
        n = tries(30, 100)
        fault("files", f"labels as {kind} mutated", n, trials(n, 7, [file], looks, folder, mutate))


def test_run_yaml(folder, tries, fault, monkeypatch, capsys):
    def look_at_options(folder: Path) -> None:
        try:
            done = train([f"--config={folder / NAME / 'run.yaml'}"])
        except SystemExit as stop:
            done = stop.code
        if done:
            said = capsys.readouterr().err
            assert done == 2 and "Traceback" not in said
            raise ValueError(said.splitlines()[-1][:400])

    monkeypatch.setattr("trainer.train.train", lambda *decided: None)
    n = tries(5, 60)
    files = [folder / NAME / "run.yaml"]
    fault("files", "run.yaml mutated", n, trials(n, 8, files, [look_at_options], folder, damage))


_LIMITED = """
import resource, sys
from pathlib import Path
from analysis.store import Analysis
from trainer.checkpoint import Checkpoint, CheckpointError, list_checkpoints
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**29, -1))
listing = list_checkpoints(sys.argv[1])
print(*listing.errors, sep="\\n")
for checkpoint in listing.readable:
    try:
        Analysis(checkpoint).features
    except ValueError as error:
        print(error)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited as on Linux")
def test_sizes_that_lie_cost_no_memory(analysed, tmp_path, fault):
    copies = {
        name: shutil.copytree(analysed / NAME, tmp_path / name)
        for name in ("config", "header", "table", "eval", "lists", "packed")
    }
    config = json.loads((copies["config"] / "config.json").read_text())
    config["sae"]["features_per_block"] = 10**9
    (copies["config"] / "config.json").write_text(json.dumps(config))
    weights = (copies["header"] / "sae.safetensors").read_bytes()
    n = struct.unpack("<Q", weights[:8])[0]
    header = weights[8 : 8 + n].replace(b'"shape":[', b'"shape":[1000000000,', 1)
    (copies["header"] / "sae.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + weights[8 + n :])
    table = pa.table({"feature": pa.array(np.zeros(50_000_000, dtype=np.int8))})
    pq.write_table(table, copies["table"] / "analysis" / "features.parquet")
    packed = np.concatenate([np.random.default_rng(0).integers(2**62, size=1000), np.zeros(200_000, dtype=int)])
    pq.write_table(pa.table({"feature": packed}), copies["packed"] / "analysis" / "features.parquet")
    os.truncate(copies["eval"] / "eval.json", 2**36)
    (copies["lists"] / "eval.json").write_text('{"L0": [' + ",".join(["[" * 40 + "]" * 40] * 100_000) + "]}")
    done = subprocess.run([sys.executable, "-c", _LIMITED, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for said in (
        "but config.json describes",
        "sae.safetensors is damaged",
        "unpack to 50,000,000",
        "unpack to 201,000",
        "larger than 8 MB",
        "lists/eval.json is damaged",
    ):
        assert said in done.stdout, done.stdout
    fault("files", "sizes that lie, with 512 MB to spare", len(copies), "a sentence")
