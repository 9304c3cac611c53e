"""One file of a repository of the Hugging Face hub, from its cache where it is there."""

from pathlib import Path

from trainer.errors import first_line


def fetch(repo: str, name: str) -> Path:
    """Where the file is now; it is downloaded where the cache lacks it.

    Raises:
        FileNotFoundError: the repository has no such file.
        ValueError: there is no such repository, it is closed, or it cannot be reached.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(hf_hub_download(repo, name))
    except GatedRepoError as error:
        raise ValueError(
            f"{repo} is gated on the Hugging Face hub: accept its terms there and log in with `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"the Hugging Face hub has no repository {repo}, or only for those who log in with `hf auth login`"
        ) from error
    except LocalEntryNotFoundError as error:
        raise ValueError(
            f"{name} of {repo} is not in the cache and the Hugging Face hub cannot be reached: download it where it can"
        ) from error
    except EntryNotFoundError as error:
        raise FileNotFoundError(f"{repo} has no file {name}") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{name} of {repo} could not be downloaded: {first_line(error)}") from error
