"""One dataset repository of the hub, through the huggingface_hub client."""

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import catalogue


class DownloadError(Exception):
    """A fault the user can act on; main prints it as one line."""


class Remote(NamedTuple):
    """One file as the hub announces it."""

    url: str
    size_bytes: int
    announced: str  # "sha256:<hex>" (large files) or "git:<hex>"


class Hub:
    """One dataset repository, at one commit, through the huggingface_hub client."""

    def __init__(self, repository: str):
        import huggingface_hub
        from huggingface_hub import file_download, utils
        self.repository, self.prefix = repository, os.environ.get(
            "MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", catalogue.REMOTE_PREFIX).strip("/")
        self.endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
        self.utils, self.http_get = utils, file_download.http_get
        self.hub_url = huggingface_hub.hf_hub_url
        self.api = huggingface_hub.HfApi(endpoint=self.endpoint)
        # What is sent is what is stored: a compressed answer could not be resumed
        self.headers = {**utils.build_hf_headers(), "Accept-Encoding": "identity"}
        self.revision = str(self.ask(self.api.repo_info, repo_type="dataset").sha)

    def ask(self, call, *args, **options) -> Any:
        """Return call(repository, …), a generator as a list; DownloadError says what failed."""
        try:
            found = call(self.repository, *args, **options)
            return list(found) if isinstance(found, Iterator) else found
        except self.utils.EntryNotFoundError:
            return []
        except Exception as error:  # the client's network errors share no base over its versions
            raise DownloadError(self.explain(error)) from error

    def explain(self, error: Exception) -> str:
        """Return one line about an error of the client."""
        where = f"{self.repository} at {self.endpoint}"
        if isinstance(error, self.utils.GatedRepoError):
            return f"{where}: asks for access; accept its terms there and set HF_TOKEN"
        if isinstance(error, self.utils.RepositoryNotFoundError):
            return f"{where}: no such dataset repository (or private: set HF_TOKEN)"
        text = " ".join(str(error).split())[:300] or type(error).__name__
        return (f"{where}: {text}; check the network or HF_ENDPOINT and run the same line again: "
                "what is here stays (HF_HUB_OFFLINE=1 checks it)")

    def path(self, below: str) -> str:
        """Return a path in the repository from one below its top folder."""
        return f"{self.prefix}/{below}".lstrip("/")

    def remote(self, info) -> Remote:
        url = self.hub_url(self.repository, info.path, repo_type="dataset",
                           revision=self.revision, endpoint=self.endpoint)
        known = f"sha256:{info.lfs.sha256}" if info.lfs else f"git:{info.blob_id}"
        return Remote(url, info.size, known)

    def folder(self, below: str) -> dict[str, Remote]:
        """Return the files right inside a folder by name; {} where there is no such folder."""
        found = self.ask(self.api.list_repo_tree, self.path(below), repo_type="dataset",
                         revision=self.revision)
        return {Path(info.path).name: self.remote(info) for info in found
                if hasattr(info, "blob_id")}

    def files(self, *below: str) -> dict[str, Remote]:
        """Return those of the given files that exist."""
        found = self.ask(self.api.get_paths_info, [self.path(name) for name in below],
                         repo_type="dataset", revision=self.revision)
        existing = {info.path: self.remote(info) for info in found}
        return {name: existing[self.path(name)] for name in below if self.path(name) in existing}

    def read(self, remote: Remote) -> bytes:
        """Return the content of a small file."""
        content = io.BytesIO()
        try:
            self.http_get(remote.url, content, headers=self.headers,
                          expected_size=remote.size_bytes)
        except Exception as error:
            raise DownloadError(self.explain(error)) from error
        return content.getvalue()
