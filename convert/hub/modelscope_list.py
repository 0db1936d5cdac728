"""List a ModelScope repository: every folder of a branch, and the commit that it is."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlencode

from ..files.parse import is_object, one_line, path_fault, short, take, take_list
from .http import Client, HubError
from .listing import COMMIT, LISTING_LIMIT, MOST_FILES, Listing, RepoFile, RepoSpec, listed, parse

CUT = 3000  # ModelScope lists so many entries at most, without saying so


def list_files(client: Client, spec: RepoSpec) -> Listing:
    """List the revision, and name the commit that it is."""
    what = str(spec)
    entries, short_id = _entries(client, spec, "")
    files = {file.path: file for file in files_of(entries, what)}
    return Listing(spec, _head(spec, short_id, _revisions(entries, what)), files)


def files_of(entries: list[dict[str, Any]], what: str) -> list[RepoFile]:
    """The files among ModelScope's entries. Raises HubError or InputError for anything else."""
    return [
        listed(
            what, take(e, "Path", str, what), take(e, "Size", int, what, 0), take(e, "Sha256", str, what, None) or None
        )
        for e in entries
        if e.get("Type") != "tree"
    ]


def _revisions(entries: list[dict[str, Any]], what: str) -> dict[str, int]:
    """The commits that last changed a file, and when."""
    found: dict[str, int] = {}
    for entry in entries:
        revision = take(entry, "Revision", str, what, "")
        if entry.get("Type") != "tree" and COMMIT.fullmatch(revision):
            found[revision] = max(found.get(revision, 0), take(entry, "CommittedDate", int, what, 0))
    return found


def _head(spec: RepoSpec, short_id: str, revisions: dict[str, int]) -> str:
    """The commit behind a ModelScope branch.

    The API names it only abbreviated (LatestCommitter.ShortId), and in full as the last change of each file: the one
    that fits, or the newest (after a commit that only deletes no file carries the head's id; then every listed file is
    still the same at the newest of theirs).
    """
    if COMMIT.fullmatch(spec.revision):
        return spec.revision
    fitting = [r for r in revisions if short_id and r.startswith(short_id)]
    if not revisions:
        raise HubError(f"{spec}: the hub names no commit, expected one of 40 hexadecimal digits")
    return fitting[0] if fitting else max(revisions, key=lambda r: revisions[r])


def _entries(client: Client, spec: RepoSpec, root: str) -> tuple[list[dict[str, Any]], str]:
    """(entries under `root`, the head's id or its abbreviation), folder by folder where the hub cuts the list off."""
    entries, head = _page(client, spec, root, recursive=True)
    if len(entries) < CUT:
        return entries, head
    direct, _ = _page(client, spec, root, recursive=False)
    if len(direct) >= CUT:
        raise HubError(f"{spec}: {root or 'the root'} holds {CUT} files or more, which ModelScope does not list")
    found = list(direct)
    for folder in (take(e, "Path", str, str(spec)) for e in direct if e.get("Type") == "tree"):
        if path_fault(folder) or not folder.startswith(f"{root}/" if root else ""):  # else it might never end
            raise HubError(f"{spec}: the listing of {root or 'the root'} names the folder {short(folder)}")
        found += _entries(client, spec, folder)[0]
        if len(found) > MOST_FILES:
            raise HubError(f"{spec}: the listing does not end, expected at most {MOST_FILES:,} files")
    return found, head


def _page(client: Client, spec: RepoSpec, root: str, recursive: bool) -> tuple[list[dict[str, Any]], str]:
    query = {"Revision": spec.revision, "Recursive": str(recursive)} | ({"Root": root} if root else {})
    url = f"{client.endpoint.url}/api/v1/models/{spec.repo}/repo/files?" + urlencode(query)
    data, _ = client.get(url, what=str(spec), limit=LISTING_LIMIT)
    return page_of(data, str(spec))


def page_of(data: bytes, what: str) -> tuple[list[dict[str, Any]], str]:
    """(entries, the head's id or its abbreviation) of ModelScope's answer. Raises HubError or InputError."""
    answer = parse(data, what)
    found = answer.get("Data")
    if answer.get("Success") is False or not is_object(found):
        raise HubError(f"{what}: {one_line(answer.get('Message') or 'no file list')}, expected a list of files")
    latest = take(found, "LatestCommitter", dict, what, {})
    head = take(latest, "Id", str, what, "") or take(latest, "ShortId", str, what, "")
    return take_list(found, "Files", dict, what, []), head
