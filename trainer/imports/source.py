"""From what one types to an SAE: a folder, a file, a name of SAELens' table, or a repository of the hub."""

import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.config import require
from trainer.imports import hub, kissane, saelens
from trainer.imports.trained import Trained

if TYPE_CHECKING:
    from sae_lens.loading.pretrained_saes_directory import PretrainedSAELookup


def read(source: str) -> Trained:
    """Read an SAE of hook_z that another program trained.

    Args:
        source: a folder that SAELens wrote; NAME.pt beside NAME_cfg.json (Kissane et al.) or their folder if it holds
            one; RELEASE/SAE_ID of SAELens' table of pretrained SAEs; OWNER/REPO[:FOLDER or :NAME.pt] of the hub.

    Raises:
        ValueError: it is none of these, cannot be read, or cannot be expressed.
    """
    try:
        return _read(source)
    except (ValueError, OSError) as error:
        raise ValueError(f"{source} cannot be imported: {error}") from error


def _read(source: str) -> Trained:
    path = Path(source)
    if path.is_dir():
        pairs = sorted(path.glob("*_cfg.json"))
        if (path / "cfg.json").exists() or not pairs:
            return saelens.read(path.joinpath)
        require(len(pairs) == 1, f"it holds {len(pairs)} SAEs: name one of its .pt files")
        return kissane.read(path.joinpath, pairs[0].name.replace("_cfg.json", ".pt"))
    if path.exists():
        require(path.suffix == ".pt", "it is no folder and no .pt file")
        return kissane.read(path.parent.joinpath, path.name)
    named = re.fullmatch(r"(\w[\w.-]*)/([^:]+)", source)
    if named is not None:
        from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

        release = get_pretrained_saes_directory().get(named[1])
        if release is not None:
            return _from_table(release, named[2])
    repo = re.fullmatch(r"(\w[\w.-]*/[\w.-]+)(?::(.*))?", source)
    if repo is None:
        raise ValueError(
            "it is no folder or file here, no RELEASE/SAE_ID of SAELens' pretrained SAEs and no OWNER/REPO[:FOLDER] "
            "of the Hugging Face hub"
        )
    return _from_hub(repo[1], repo[2] or "")


def _from_hub(repo: str, within: str, overrides: dict[str, Any] | None = None, scale: float | None = None) -> Trained:
    if within.endswith(".pt"):
        return kissane.read(partial(hub.fetch, repo), within)
    folder = f"{within.strip('/')}/" if within else ""
    return saelens.read(lambda name: hub.fetch(repo, folder + name), overrides, scale)


def _from_table(release: "PretrainedSAELookup", sae_id: str) -> Trained:
    """An SAE of SAELens' table: as it or Kissane et al. save them, else of another program and read by SAELens."""
    from sae_lens.loading import pretrained_sae_loaders as loaders
    from sae_lens.loading.pretrained_saes_directory import get_config_overrides

    ids = list(release.saes_map)
    require(sae_id in ids, f"SAELens' release {release.release} has {', '.join(ids[:3])} and so on, not {sae_id!r}")
    within, scale = release.saes_map[sae_id], release.norm_scaling_factor.get(sae_id)
    overrides, conversion = get_config_overrides(release.release, sae_id), release.conversion_func
    if conversion in (None, "connor_rob_hook_z"):
        return _from_hub(release.repo_id, within, overrides, scale)
    arguments = (release.repo_id, within, "cpu", False, overrides)
    try:
        saelens.expressible(loaders.NAMED_PRETRAINED_SAE_CONFIG_GETTERS[conversion](*arguments))
        cfg, weights, _ = loaders.NAMED_PRETRAINED_SAE_LOADERS[conversion](*arguments)
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"SAELens cannot read it: {error!r}") from error
    return saelens.trained(cfg, {name: value.detach().float() for name, value in weights.items()}, scale)
