"""The activation cache: harvested ahead of any training, or by the training that lacks it.

    python -m trainer.cache --model=gpt2-small --hook_layer=[4,5] --distinct_tokens=100000000
    torchrun --nproc_per_node=8 -m trainer.cache ...     # each process harvests its share

A training on the same model, text and layers finds it. Stopped or killed, the same command goes on. Each layer's folder
has `meta.json` (what the activations are) and, once it is whole, `manifest.json` (its files with rows, bytes and
checksums); `--verify` reads every file and compares.
"""

import sys
from dataclasses import asdict, dataclass, fields, replace
from math import inf
from pathlib import Path

import jsonargparse
from safetensors import safe_open
from tqdm import tqdm

from trainer import cli, ranks
from trainer.config import ActivationsConfig, layers_of, require
from trainer.cost import duration, seconds_per_token
from trainer.data.buffer import CachedActivations, bytes_per_row, open_source
from trainer.data.text import Corpus, open_text
from trainer.files import cache_dir, load_tensors, read_json, write_json
from trainer.model.lm import LanguageModel, pick_device
from trainer.model.loading import n_layers
from trainer.precision import tf32 as matmuls_in_tf32
from trainer.room import gb, require_disk


@dataclass(frozen=True)
class Shard:
    """One file of a layer's folder."""

    file: str
    rows: int
    bytes: int
    checksum: str
    """CRC-32 of what is in it, as `trainer.files.save_tensors` writes it"""


@dataclass(frozen=True)
class Manifest:
    """manifest.json of a folder that is whole."""

    tokens: int
    bytes: int
    shards: list[Shard]


def harvest_missing(source: CachedActivations, lm: LanguageModel, corpus: Corpus) -> None:
    """Fill a cache, with a progress bar, and write its manifests.

    Raises:
        ValueError: the disk is full, the activations do not fit in float16, or the text is too short.
    """
    if not ranks.any_of(bool(source.missing())):
        print(f"Activations: from the cache {', '.join(map(str, source.keys))}", flush=True)
        return
    quiet = not ranks.is_first()
    with tqdm(unit="tok", unit_scale=True, desc="Harvesting activations", dynamic_ncols=True, disable=quiet) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        source.fill(lm, corpus, progress)
    for folder in source.keys if ranks.is_first() else ():
        shards = [_shard(path) for path in sorted(folder.glob("shard-*.safetensors"))]
        tokens, size = sum(each.rows for each in shards), sum(each.bytes for each in shards)
        write_json(folder / "manifest.json", asdict(Manifest(tokens, size, shards)))


def harvest(
    activations: ActivationsConfig, layers: list[int], device: str = "auto", tf32: bool = True, verify: bool = False
) -> list[Path]:
    """Head outputs of some layers to the cache; returns the folder of each.

    Args:
        activations: which; `cache_gb` does not bound them, the disk does.
        tf32: on a GPU, as the training that is to read them.
        verify: read what is there, and compare it with its manifest.

    Raises:
        Lost: another process is gone.
        ValueError: the model, a layer or the text cannot be used, the disk is too small, or a file is not what the
            manifest says.
    """
    with ranks.joined():
        device = ranks.own_device(pick_device(device))
        print(f"Loading {activations.model} on {device}", flush=True)
        lm = LanguageModel.load(activations.model, device, activations.model_dtype)
        for layer in layers:
            lm.layer(layer)
        corpus = open_text(activations, lm)
        print(f"Text: {corpus.describe()}", flush=True)
        n_tokens = activations.distinct_tokens or (corpus.n_train_contexts or 0) * (corpus.context_size - 1)
        require(n_tokens > 0, f"{corpus.name} is streamed: --distinct_tokens says how much of it")
        with matmuls_in_tf32(device, tf32):
            source = open_source(lm, replace(activations, cache_gb=inf), layers, corpus, n_tokens, n_tokens, seed=0)
            assert isinstance(source, CachedActivations)
            per_token, missing = bytes_per_row(lm, len(layers)), source.to_harvest()
            print(
                f"{per_token:,} bytes a token: {source.distinct_tokens:,} tokens of {len(layers)} layers take "
                f"{gb(per_token * source.distinct_tokens)}, of which {gb(missing.bytes)} are missing"
            )
            if verify:
                _verify(source, missing.tokens)
                return list(source.keys)
            if missing.tokens:
                seconds, _ = seconds_per_token(lm, layers, corpus.held_out(1))
                print(f"It takes about {duration(missing.tokens * seconds / ranks.size())}", flush=True)
                require_disk(cache_dir(), missing.bytes, "harvest fewer --distinct_tokens or layers")
            harvest_missing(source, lm, corpus)
        return list(source.keys)


def _shard(path: Path) -> Shard:
    with safe_open(path, framework="pt") as file:
        rows, meta = file.get_slice("z").get_shape()[0], file.metadata()
    return Shard(path.name, rows, path.stat().st_size, meta["checksum"])


def _verify(source: CachedActivations, missing: int) -> None:
    """Read all files, of which each process has its share."""
    require(not missing, f"{missing:,} tokens are still to be harvested: run the command without --verify")
    for folder in source.keys:
        try:
            manifest = read_json(folder / "manifest.json", Manifest)
        except FileNotFoundError:
            raise ValueError(f"{folder} has no manifest.json: it was harvested by an older version") from None
        shards = list(enumerate(manifest.shards))[ranks.index() :: ranks.size()]
        for index, shard in tqdm(shards, f"Reading {folder.name}", disable=not ranks.is_first()):
            load_tensors(folder / shard.file, f"{folder.name} {index}")
            require(_shard(folder / shard.file) == shard, f"{folder / shard.file} is not the one of manifest.json")
        print(f"{folder}: {manifest.tokens:,} tokens in {len(manifest.shards)} files, {gb(manifest.bytes)}, as written")
    ranks.wait()


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog="python -m trainer.cache", description="Harvest activations to the cache."
    )
    parser.add_class_arguments(ActivationsConfig, skip={"cache_gb"})
    which = "Attention layer; several as [4,5] or 0-5,8, or all."
    parser.add_argument("--hook_layer", type=list[int] | int | str, required=True, help=which)
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps or auto.")
    parser.add_argument("--tf32", type=bool, default=True, help="On a GPU: as the training that is to read them.")
    parser.add_argument("--verify", action="store_true", help="Read what is there, and compare it with its manifest.")
    options = parser.parse_args(argv)

    def run() -> None:
        given = {each.name: options[each.name] for each in fields(ActivationsConfig) if each.name in options}
        activations = ActivationsConfig(**given)
        layers = layers_of(options.hook_layer, lambda: n_layers(activations.model))
        harvest(activations, layers, options.device, options.tf32, options.verify)

    return cli.status(run, "Stopped. Activations harvested so far are kept.", many_processes=True)


if __name__ == "__main__":
    sys.exit(main())
