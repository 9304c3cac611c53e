"""The analysis against the bare forward, against sae-vis, and its memory; on the embedded model.

python -m benchmarks.analysis [checkpoint]
"""

import shutil
import sys
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from copy import copy
from dataclasses import replace
from io import StringIO
from pathlib import Path

import torch

from analysis.attribution import Reader
from analysis.corpus.passes import feed
from analysis.corpus.run import AnalysisConfig, analyse
from analysis.corpus.running_statistics import FeatureStatistics
from analysis.store import Analysis
from benchmarks.data import report
from benchmarks.timing import peak_mb, rounds
from trainer.block_diag import BlockDiagSAE
from trainer.checkpoint import Checkpoint, Sizes, save
from trainer.model.lm import LanguageModel, Layer

DEFAULT = "checkpoints/smollm2-135m-L17-batchtopk-x8-k32"
TOKENS, ROUNDS = 8_192, 4
WIDE, WIDE_L0 = 24_576, 60


def wide_sae(sae: BlockDiagSAE, z: torch.Tensor) -> BlockDiagSAE:
    """A random SAE of about 24,576 features of which about 60 fire on a token."""
    torch.manual_seed(0)
    wide = BlockDiagSAE(sae.n_blocks, sae.width, -(-WIDE // sae.n_blocks), "jumprelu").requires_grad_(False)
    pre = wide.pre_activations(z[:512].float()).transpose(0, 1).flatten(0, 1)  # one threshold for all
    wide.threshold.fill_(pre.flatten().kthvalue(int(pre.numel() * (1 - WIDE_L0 / wide.d_sae))).values.item())
    return wide


def against_the_forward(layer: Layer, saes: dict[str, BlockDiagSAE], contexts: torch.Tensor) -> None:
    n = contexts[:, 1:].numel()
    for name, sae in saes.items():

        def bare(sae: BlockDiagSAE = sae) -> None:
            for chunk in contexts.split(4096 // contexts.shape[1]):
                for z in layer.z(chunk).split(1024 // contexts.shape[1]):
                    sae.encode(z)

        def full(sae: BlockDiagSAE = sae) -> None:
            statistics = FeatureStatistics(Reader(sae, layer), layer.lm.d_vocab, 20)
            for _ in feed(layer.lm, contexts, torch.arange(len(contexts)), {layer.index: [statistics]}):
                pass

        seconds = rounds({"truncated forward and encode": bare, "first pass": full}, ROUNDS)
        report(f"First pass, {n:,} tokens, {name}", seconds, "truncated forward and encode", n)


def against_sae_vis(lm: LanguageModel, saved: Checkpoint, contexts: torch.Tensor, per_head: int) -> None:
    """Dashboards a second: all live features here, the first of each head there; both from the loaded model on."""
    from sae_lens.analysis.hooked_sae_transformer import HookedSAETransformer
    from sae_vis.data_config_classes import SaeVisConfig
    from sae_vis.data_storing_fns import SaeVisData

    from trainer.saelens import to_saelens

    sae, hooked = saved.sae, saved.config.model
    features = [h * sae.features_per_block + i for h in range(sae.n_blocks) for i in range(per_head)]
    dense = to_saelens(saved)
    dense.cfg.hook_name, dense.cfg.hook_layer = hooked.hook_name, hooked.hook_layer
    model = HookedSAETransformer(copy(lm.model.cfg), lm.tokenizer, move_to_device=False)
    model.load_state_dict(lm.model.state_dict(), strict=False)
    model.set_ungroup_grouped_query_attention(True)  # sae-vis wants as many values as heads
    started = time.perf_counter()
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        SaeVisData.create(sae=dense, model=model, tokens=contexts, cfg=SaeVisConfig(features=features))
    theirs = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as folder:
        beside = Path(folder) / "checkpoint"
        shutil.copytree(saved.path, beside, ignore=shutil.ignore_patterns("analysis"))
        started = time.perf_counter()
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            analyse([beside], AnalysisConfig(tokens=contexts[:, 1:].numel(), score_tokens=0))
        ours = time.perf_counter() - started
        artefacts = Analysis(Checkpoint(beside))
        live = artefacts.search()["feature"]
        reading = []
        for feature in live[:: max(1, len(live) // 100)]:
            fresh = time.perf_counter()
            artefacts.feature(feature), artefacts.examples(feature), artefacts.neighbours(feature)
            reading.append(time.perf_counter() - fresh)
    reading.sort()
    print(f"Dashboards, {contexts[:, 1:].numel():,} tokens\n\n| | features | s | dashboards/s |\n|---|---|---|---|")
    print(f"| sae-vis | {len(features)} | {theirs:.0f} | {len(features) / theirs:.2f} |")
    print(f"| python -m analysis, loading included | {len(live)} live | {ours:.0f} | {len(live) / ours:.1f} |")
    print(
        f"\nRatio {len(live) / ours / (len(features) / theirs):.0f}. Reading one feature's dashboard: median ", end=""
    )
    print(f"{reading[len(reading) // 2] * 1e3:.1f} ms, slowest of {len(reading)} {reading[-1] * 1e3:.1f} ms.\n")


class Memory:
    """The analysis of a wide SAE, in a process of its own."""

    def __init__(self, folder: str, tokens: int) -> None:
        self.path, self.tokens, self.ran = Path(folder), tokens, False

    def __call__(self) -> None:
        if not self.ran:  # `peak_mb` calls three times
            analyse([self.path], AnalysisConfig(tokens=self.tokens, score_tokens=0))
        self.ran = True


def memory(wide: BlockDiagSAE, like: Checkpoint, tokens: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder), wide, replace(like.config, sae=Sizes.of(wide)))
        started = time.perf_counter()
        peak = peak_mb(Memory, folder, tokens)
        size = sum(file.stat().st_size for file in (Path(folder) / "analysis").iterdir()) / 1e6
        l0 = Analysis(Checkpoint(folder)).meta["L0"]
        print(
            f"{wide.d_sae:,} features, {tokens:,} tokens, L0 {l0:.0f}: peak {peak:,.0f} MB, model ",
            end="",
        )
        print(f"included; {time.perf_counter() - started:.0f} s; artefacts {size:.0f} MB")


def main(path: Path) -> None:
    saved = Checkpoint(path)
    sae, lm = saved.sae, saved.open_model()
    layer, corpus = lm.layer(saved.layer), saved.open_text(lm.tokenizer)
    contexts = corpus.held_out(TOKENS // (corpus.context_size - 1))
    wide = wide_sae(sae, layer.z(contexts[:8])[:, 1:].flatten(0, 1))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {path.name}\n")
    saes = {f"{sae.d_sae:,} features": sae, f"{wide.d_sae:,} features, L0 about {WIDE_L0}": wide}
    against_the_forward(layer, saes, contexts)
    against_sae_vis(lm, saved, contexts, per_head=2)
    memory(wide, saved, 100_000)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else DEFAULT))
