"""One dataset repository of the hub, through the huggingface_hub client and its session.

The client's own download keeps what came in pieces of 10 MB only, and empties a file where a server
answers with another page; `Hub.stream` hands over every piece as it arrives, after a look at what
the server says it is.
"""

import contextlib
import email.utils
import os
import re
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import catalogue

PIECE_BYTES = 1 << 16  # at most so much is lost when a connection breaks
TIMEOUT_SECONDS = 30.0  # without a byte
ASK_TRIES = 5  # of a question that the hub is too busy to answer
RETRY_SECONDS = 1.0  # doubled after each try that brings nothing, unless Retry-After says more
MAX_WAIT_SECONDS = 300.0  # that Retry-After may ask for; longer: the user is told instead
BUSY = (408, 429, 500, 502, 503, 504)
# By name: the client's errors differ between its versions. Not those of a connection never made
BROKEN = ("ReadError", "ReadTimeout", "ReadTimeoutError", "RemoteProtocolError", "ProtocolError",
          "ChunkedEncodingError", "WrongAnswer")


class DownloadError(Exception):
    """A fault the user can act on; main prints it as one line."""


class WrongAnswer(Exception):
    """A server sent something else than what was asked for; nothing of it was taken."""


class Remote(NamedTuple):
    """One file as the hub announces it."""

    url: str
    size_bytes: int
    announced: str  # "sha256:<hex>" (large files) or "git:<hex>"


class Hub:
    """One dataset repository, at one commit, through the huggingface_hub client."""

    def __init__(self, repository: str):
        import huggingface_hub
        from huggingface_hub import utils
        self.repository, self.prefix = repository, os.environ.get(
            "MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", catalogue.REMOTE_PREFIX).strip("/")
        self.endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
        self.utils = utils
        self.hub_url = huggingface_hub.hf_hub_url
        self.api = huggingface_hub.HfApi(endpoint=self.endpoint)
        # What is sent is what is stored: a compressed answer could not be resumed
        self.headers = {**utils.build_hf_headers(), "Accept-Encoding": "identity"}
        self.revision = str(self.ask(self.api.repo_info, repo_type="dataset").sha)

    def ask(self, call, *args, **options) -> Any:
        """Return call(repository, …), a generator as a list; DownloadError says what failed.

        A hub that is busy, or hangs up, is asked again: when it says, or later each time.
        """
        for tries in range(1, ASK_TRIES + 1):
            try:
                found = call(self.repository, *args, **options)
                return list(found) if isinstance(found, Iterator) else found
            except self.utils.EntryNotFoundError:
                return []
            except Exception as error:  # network errors share no base over the client's versions
                is_passing = status_of(error) in BUSY or type(error).__name__ in BROKEN
                if tries == ASK_TRIES or not is_passing:
                    raise DownloadError(self.explain(error)) from error
                time.sleep(self.pause(error, tries - 1))

    def pause(self, error: Exception, fruitless: int) -> float:
        """Return how many seconds to wait after an error: what the server says, or 1, 2, 4, …

        DownloadError where it asks for more than MAX_WAIT_SECONDS.
        """
        told = getattr(getattr(error, "response", None), "headers", {}).get("Retry-After", "")
        wait = retry_after(told, time.time())
        if wait > MAX_WAIT_SECONDS:
            raise DownloadError(f"{self.repository} at {self.endpoint}: asks to wait {wait:.0f} s, "
                                f"more than the limit of {MAX_WAIT_SECONDS:.0f} s; run the same "
                                "line again after that: what is here stays")
        return max(wait, RETRY_SECONDS * 2 ** fruitless)

    def explain(self, error: Exception) -> str:
        """Return one line about an error of the client."""
        where = f"{self.repository} at {self.endpoint}"
        if isinstance(error, self.utils.GatedRepoError):
            return f"{where}: asks for access; accept its terms there and set HF_TOKEN"
        if isinstance(error, self.utils.RepositoryNotFoundError):
            return f"{where}: no such dataset repository (or private: set HF_TOKEN)"
        text = " ".join(str(error).split())[:300] or type(error).__name__
        stays = "run the same line again; what is here stays (HF_HUB_OFFLINE=1 checks it)"
        if status_of(error) in (401, 403):
            return f"{where}: {text}; check HF_TOKEN and {stays}"
        if isinstance(error, WrongAnswer) or status_of(error):
            return f"{where}: {text}; try later or another HF_ENDPOINT: {stays}"
        if proxy := proxy_of(self.endpoint):
            return (f"{where}: {text}; it was asked through the proxy {proxy}: check that one, or "
                    f"unset it or add the host to NO_PROXY, and {stays}")
        return f"{where}: {text}; check the network or HF_ENDPOINT and {stays}"

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
        return b"".join(self.ask(lambda _: self.stream(remote, 0)))

    def stream(self, remote: Remote, start: int) -> Iterator[bytes]:
        """Yield a file's bytes from `start` on, as they arrive, to its end and never beyond.

        Raises WrongAnswer before the first where the server sends another page or place; the
        client's errors otherwise. A server that cannot begin inside a file sends it whole: what
        is here already is passed over.
        """
        headers = {**self.headers, **({"Range": f"bytes={start}-"} if start else {})}
        with self.open(remote.url, headers) as (response, pieces):
            if response.status_code >= 400:
                self.utils.hf_raise_for_status(response)
            passed = begin_of(response.status_code, response.headers, remote.size_bytes, start)
            place = passed
            for piece in pieces:
                fresh = piece[max(0, start - place):max(0, remote.size_bytes - place)]
                place += len(piece)
                if fresh:
                    yield fresh
        if place < remote.size_bytes:
            raise WrongAnswer(f"the answer ends after {place} of {remote.size_bytes} bytes")

    @contextlib.contextmanager
    def open(self, url: str, headers: dict[str, str]) -> Iterator[tuple[Any, Iterator[bytes]]]:
        """Yield the response to a GET and its pieces; credentials stay with the first host."""
        session: Any = self.utils.get_session()
        if callable(session.stream):  # httpx, since client 1.0; a bool of requests before
            with session.stream("GET", url, headers=headers, timeout=TIMEOUT_SECONDS,
                                follow_redirects=True) as response:
                if response.status_code >= 400:
                    response.read()  # for its error message
                yield response, response.iter_raw()
        else:
            with session.get(url, headers=headers, timeout=TIMEOUT_SECONDS,
                             stream=True) as response:
                # read1, of urllib3 2, gives what is there; iter_content would wait for a whole one
                read = getattr(response.raw, "read1", response.raw.read)
                yield response, iter(lambda: read(PIECE_BYTES), b"")


def status_of(error: Exception) -> int:
    """Return the HTTP status of the answer behind an error, 0 where there was no answer."""
    return getattr(getattr(error, "response", None), "status_code", 0)


def begin_of(status: int, headers: Any, size_bytes: int, start: int) -> int:
    """Return at which byte of a file of size_bytes an answer begins, asked for from `start` on.

    Raises WrongAnswer where its headers say that it is no part of that file.
    """
    kind = headers.get("Content-Type", "no type").partition(";")[0]
    if headers.get("Content-Encoding", "identity") != "identity":
        raise WrongAnswer(f"the answer is compressed ({headers['Content-Encoding']}), which was "
                          "not asked for")
    if status == 206:
        told = headers.get("Content-Range", "nothing")
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", told)
        if not found or int(found[1]) != start or found[2] not in ("*", str(size_bytes)):
            raise WrongAnswer(f"the answer is {told}, must be bytes {start}-{size_bytes - 1}/"
                              f"{size_bytes}")
        return start
    length = headers.get("Content-Length")
    if status != 200 or (length or str(size_bytes)) != str(size_bytes):
        raise WrongAnswer(f"the answer (status {status}, {kind}) has {length or 'unknown'} bytes, "
                          f"must have {size_bytes}")
    if length is None and (start or kind == "text/html"):
        raise WrongAnswer(f"the answer ({kind}) does not say its length, so it may be any page")
    return 0


def retry_after(told: str, now: float) -> float:
    """Return the seconds that a Retry-After header asks for, a number or a date; 0 for neither."""
    if re.fullmatch(r"\d{1,9}", told.strip()):
        return float(told)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(told).timestamp() - now)
    except (TypeError, ValueError, IndexError, OverflowError):
        return 0.0


def proxy_of(url: str) -> str:
    """Return the proxy that the environment sets for a URL, without its password; "" for none."""
    parts = urlsplit(url)
    proxies = urllib.request.getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all", "")
    if not proxy or urllib.request.proxy_bypass(parts.hostname or ""):
        return ""
    return re.sub(r"//[^@/]*@", "//", proxy)
