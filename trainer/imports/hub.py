"""The Hugging Face hub as the rest sees it: one file of a repository, and what it answers instead of one."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.errors import first_line


def fetch(repo: str, name: str) -> Path:
    """Where the file is now; it is downloaded where the cache lacks it.

    Raises:
        FileNotFoundError: the repository has no such file.
        ValueError: there is no such repository, it is closed, or it cannot be reached.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    with asking(repo, f"{name} of {repo}", "downloaded"):
        try:
            return Path(hf_hub_download(repo, name))
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError as error:
            raise FileNotFoundError(f"{repo} has no file {name}") from error


@contextmanager
def asking(repo: str, what: str, done: str) -> Iterator[None]:
    """Inside, the hub is asked something; whatever it answers instead is one sentence.

    Args:
        repo: whom.
        what: is asked for or given.
        done: what would be done with it.

    Raises:
        ValueError: there is no such repository or revision, it is closed, or it cannot be reached.
        FileNotFoundError: as it was raised inside.
    """
    import requests
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
        XetError,
    )

    try:
        yield
    except GatedRepoError as error:
        raise ValueError(
            f"{repo} is gated on the Hugging Face hub: accept its terms there and log in with `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"the Hugging Face hub has no repository {repo}, or only for those who log in with `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise ValueError(f"{repo} has no such revision on the Hugging Face hub") from error
    except LocalEntryNotFoundError as error:
        raise ValueError(
            f"{what} is not in the cache and the Hugging Face hub cannot be reached: download it where it can"
        ) from error
    except FileNotFoundError:
        raise
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        reasons = {
            401: "the hub does not accept the token: log in with `hf auth login`",
            403: f"{repo} does not permit it to this token: take one that may, with `hf auth login`",
            412: f"{repo} was changed meanwhile: try again",
        }
        raise ValueError(f"{what} could not be {done}: {reasons.get(status or 0, first_line(error))}") from error
    except (requests.ConnectionError, requests.Timeout, OfflineModeIsEnabled) as error:
        raise ValueError(f"{what} could not be {done}: the Hugging Face hub cannot be reached") from error
    except (OSError, ValueError, RuntimeError, XetError) as error:
        raise ValueError(f"{what} could not be {done}: {first_line(error)}") from error
