"""Fetch a model repository from the Hugging Face hub: only what serving needs."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .errors import PullError
from .progress import Progress, ProgressCallback, ignore_progress

_SMALL_FILES = frozenset(
    {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "chat_template.json",
        "model.safetensors.index.json",
    }
)
# Not `consolidated.safetensors` or `original/`: some publishers put the same weights up twice.
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")


def download_repo(
    repo_id: str, directory: Path, progress: ProgressCallback = ignore_progress, *, endpoint: str | None = None
) -> None:
    """Download ORG/NAME into `directory`, going on where an earlier call stopped.

    A token is taken from the environment (HF_TOKEN) or from what `hf auth login` stored. `endpoint` is another hub.
    Raises PullError for a repository that is missing, gated, without safetensors or tokenizer.json, and for a network
    that fails.
    """
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise PullError(f"pulling {repo_id} needs the package huggingface_hub: pip install 'octavo[models]'") from error
    # The HTTP library under the hub's client has changed more than once; its base error is the base of this one.
    http_error: type[BaseException] = errors.HfHubHTTPError.__bases__[0]
    api = huggingface_hub.HfApi(endpoint=endpoint)
    try:
        info = api.model_info(repo_id, files_metadata=True)
        sizes = wanted_files(repo_id, {file.rfilename: file.size or 0 for file in info.siblings or []})
        report = _Total(sum(sizes.values()), progress)
        for name in sizes:
            api.hf_hub_download(
                repo_id, name, revision=info.sha, local_dir=directory, tqdm_class=_progress_bar(report.add)
            )
    except errors.GatedRepoError as error:
        shutil.rmtree(directory / ".cache", ignore_errors=True)
        raise PullError(
            f"{repo_id} is gated: accept its licence on its page, then set HF_TOKEN to a token of that account"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise PullError(f"{repo_id} does not exist on the hub, or is private and HF_TOKEN gives no access") from error
    except (OSError, http_error) as error:
        raise PullError(f"could not download {repo_id} from {api.endpoint}: {error}") from error
    shutil.rmtree(directory / ".cache", ignore_errors=True)  # the hub client's notes about partial files
    for path in directory.iterdir():
        if path.name not in sizes:  # from an earlier attempt, at another revision
            path.unlink()
    report.finish()


def wanted_files(repo_id: str, sizes: Mapping[str, int]) -> dict[str, int]:
    """Of a repository's files (name to bytes) those to download. Raises PullError when it cannot be served from them."""
    wanted = {name: size for name, size in sizes.items() if name in _SMALL_FILES or _WEIGHTS.fullmatch(name)}
    # Both layouts at once would be the weights twice; an index says that the shards are the ones to take.
    if "model.safetensors.index.json" in wanted:
        wanted.pop("model.safetensors", None)
    for name in ("config.json", "tokenizer.json"):
        if name not in wanted:
            raise PullError(f"{repo_id} has no {name}")
    if not any(_WEIGHTS.fullmatch(name) for name in wanted):
        raise PullError(f"{repo_id} has no weights as model*.safetensors; pickled or GGUF weights are not downloaded")
    return dict(sorted(wanted.items(), key=lambda item: item[1]))  # small first: errors show before the long wait


class _Total:
    """Bytes over all files of one download."""

    def __init__(self, total: int, progress: ProgressCallback) -> None:
        self._done, self._total, self._progress = 0, total, progress

    def add(self, n_bytes: int) -> None:
        self._done = min(self._done + n_bytes, self._total)
        self._progress(Progress("download", self._done, self._total, "bytes"))

    def finish(self) -> None:
        self.add(self._total - self._done)


def _progress_bar(add: Callable[[int], None]) -> type[Any]:
    """A tqdm class that draws nothing and passes its counts on: the interface that huggingface_hub offers."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            super().__init__(*args, **(kwargs | {"disable": True}))
            add(int(kwargs.get("initial") or 0))

        def update(self, n: float | None = 1) -> None:
            add(int(n or 0))

    return Bar
