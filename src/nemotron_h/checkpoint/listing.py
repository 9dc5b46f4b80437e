"""What the Hub says of a name: the commit it stands for, the files we want of it, the licence; or why it says nothing.

The answer is a stranger's: a commit, a size or a digest that is not plainly one is refused, a file whose name we do
not know is left where it is, and no word of the server's gets into an error.
"""

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import constants, get_session, get_token, hf_raise_for_status
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from nemotron_h.checkpoint.hub import COMMIT, DEFAULT_REVISION, HubName
from nemotron_h.errors import CheckpointError

# What we read, and what a person should: nothing else is fetched. No name has a slash, so none leaves its folder.
WANTED = re.compile(
    r"(generation_|tokenizer_|hf_quant_)?config\.json|tokenizer\.json|chat_template\.jinja"
    r"|model[\w.-]*\.safetensors(\.index\.json)?|(LICEN[CS]E|NOTICE)[\w.-]*|README\.md",
    re.ASCII,
)
SHA256, GIT_SHA1 = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")
HTTPError: Any = HfHubHTTPError.__bases__[0]  # of the HTTP client that huggingface_hub stands on, whichever it is


@dataclass(frozen=True)
class HubFile:
    """A file of a commit. digest: sha256 in 64 hex digits, or git's sha1 of a blob in 40."""

    name: str
    size_bytes: int
    digest: str

    def is_intact(self, path: Path) -> bool:
        """Are these the bytes the listing promised?"""
        with path.open("rb") as file:
            if len(self.digest) == 64:
                return hashlib.file_digest(file, "sha256").hexdigest() == self.digest
            hasher = hashlib.sha1(b"blob %d\0" % self.size_bytes, usedforsecurity=False)
            return hashlib.file_digest(file, lambda: hasher).hexdigest() == self.digest


@dataclass(frozen=True)
class Listing:
    """What the Hub says of a name."""

    commit: str
    licence: str
    files: tuple[HubFile, ...]


def read_listing(name: HubName) -> Listing:
    """Ask for the commit, the files we want, and the licence. Raises: CheckpointError, also where the answer is odd."""
    with asking(name):
        answer = _describe(name)
    commit, files = _matching(COMMIT, answer.get("sha")), answer.get("siblings")
    if commit is None or not isinstance(files, list):
        raise CheckpointError(
            f"{name}: must be described by {constants.ENDPOINT} with a commit and files; got another answer; "
            "is HF_ENDPOINT a Hub?"
        )
    if COMMIT.fullmatch(name.revision) and commit != name.revision:
        raise CheckpointError(f"{name}: must be that commit; {constants.ENDPOINT} gave {commit}; is HF_ENDPOINT a Hub?")
    wanted = [file for file in files if isinstance(file, dict) and _matching(WANTED, file.get("rfilename"))]
    card = answer.get("cardData")
    facts = (
        [card.get("license_name") or card.get("license"), card.get("license_link")] if isinstance(card, dict) else []
    )
    return Listing(
        commit=commit,
        licence=plain(" ".join(str(fact) for fact in facts if fact)) or "none stated",
        files=tuple(sorted((_file(name, file) for file in wanted), key=lambda file: file.size_bytes)),
    )


def _describe(name: HubName) -> dict[str, Any]:
    """The Hub's answer, empty where it is no JSON object."""
    response = get_session().get(
        f"{constants.ENDPOINT}/api/models/{name.repository}/revision/{quote(name.revision, safe='')}",
        params={"blobs": "true"},
        headers=request_headers(),
        timeout=constants.HF_HUB_ETAG_TIMEOUT,
    )
    hf_raise_for_status(response)
    try:
        answer = response.json()
    except (ValueError, RecursionError):
        return {}
    return answer if isinstance(answer, dict) else {}


def _file(name: HubName, listed: dict[str, Any]) -> HubFile:
    large = listed.get("lfs")
    given, key, rule = (large, "sha256", SHA256) if isinstance(large, dict) else (listed, "blobId", GIT_SHA1)
    size, digest = given.get("size"), _matching(rule, given.get(key))
    if not isinstance(size, int) or size < 0 or digest is None:
        raise CheckpointError(
            f"{name}: {listed['rfilename']} must be listed with its size and digest; {constants.ENDPOINT} gave others"
        )
    return HubFile(listed["rfilename"], size, digest)


def _matching(rule: re.Pattern[str], value: object) -> str | None:
    """The value where it is text that the whole rule describes."""
    return value if isinstance(value, str) and rule.fullmatch(value) else None


def request_headers() -> dict[str, str]:
    """Who asks: this library, and the user by HF_TOKEN or `hf auth login`. huggingface_hub's own headers would tell
    more of the machine, and cost a request of their own."""
    token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
    if token is not None and not token.isascii():
        raise CheckpointError("HF_TOKEN: must be letters of ASCII, as the Hub gives it; got others")
    return {"User-Agent": "nemotron-h"} | ({"Authorization": f"Bearer {token}"} if token else {})


def plain(text: str) -> str:
    """A stranger's words as a terminal only shows them: printable ASCII, one line, not long."""
    return re.sub(r"[^ -~]+", "?", " ".join(text.split()))[:200]


@contextmanager
def asking(name: HubName) -> Iterator[None]:
    """Say in one line why the Hub does not give what it is asked for. Raises: CheckpointError."""
    hub = constants.ENDPOINT
    try:
        yield
    except GatedRepoError as error:
        token = "no token" if "Authorization" not in request_headers() else "a token that has not been let in"
        raise CheckpointError(
            f"{name}: is gated; got {token}; accept its licence at {hub}/{name.repository}, "
            "then set HF_TOKEN or run `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(
            f"{name}: must be a revision of {name.repository}; got none such; "
            f"{hub}/{name.repository}/tree/{DEFAULT_REVISION} lists branches and tags"
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{name}: must be a model at {hub}; got none of that name, or a private one; "
            "check the name, or set HF_TOKEN"
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        advice = "check HF_TOKEN" if status in (401, 403) else "try again later"
        raise CheckpointError(f"{name}: must be given by {hub}; got HTTP {status}; {advice}") from error
    except HTTPError as error:
        raise CheckpointError(
            f"{name}: must be asked of {hub}, which cannot be reached ({type(error).__name__}); "
            "try again, or use what is in the cache: nemotron-h ls"
        ) from error
