"""The protocol of the Hub: one function for each kind of request."""

import base64
import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs

from tests.hub_card import card_errors
from tests.hub_store import Answer, Blob, Refusal, Repo, Store

LARGE = (".safetensors", ".bin", ".pt", ".pth", ".parquet", ".arrow", ".gguf", ".model")


@dataclass(frozen=True)
class Call:
    """A request, with what its route found in the path."""

    path: Mapping[str, str]
    body: bytes
    headers: Mapping[str, str]
    recursive: bool

    @property
    def json(self) -> Any:
        """The body."""
        return json.loads(self.body)

    @property
    def kind(self) -> str:
        """Model or dataset."""
        return (self.path.get("kind") or "model").removesuffix("s")

    def repo(self, store: Store) -> Repo:
        """The repository that the path names."""
        return store.repo(self.kind, self.path["repo"])


def ok(value: object, headers: Mapping[str, str] | None = None) -> Answer:
    """A JSON answer."""
    return Answer(200, json.dumps(value).encode(), headers or {})


def whoami(store: Store, call: Call) -> Answer:
    """Who the token belongs to."""
    token = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
    return ok(
        {
            "type": "user",
            "id": "0",
            "name": store.user,
            "fullname": store.user,
            "orgs": [],
            "auth": token,
        }
    )


def validate_card(store: Store, call: Call) -> Answer:
    """Refuse a model card that the Hub would refuse."""
    if call.json.get("repoType", "model") == "model":
        refuse_bad_card(call.json["content"])
    return ok({"errors": [], "warnings": []})


def refuse_bad_card(content: str) -> None:
    """Raise what is wrong with the metadata of a card."""
    errors = card_errors(content)
    if errors:
        raise Refusal(
            400, "\n".join(errors), errors=[{"message": error} for error in errors], warnings=[]
        )


def create(store: Store, call: Call) -> Answer:
    """Make a repository; one that exists is a conflict, which the client may accept."""
    kind, name = (
        call.json.get("type") or "model",
        f"{call.json.get('organization') or store.user}/{call.json['name']}",
    )
    url = f"{store.url}/{'' if kind == 'model' else kind + 's/'}{name}"
    if (kind, name) in store.repos:
        raise Refusal(409, "You already created this repo", url=url)
    store.repos[kind, name] = Repo()
    return ok({"url": url, "name": name, "id": name})


def branch(store: Store, call: Call) -> Answer:
    """A branch at the head of main."""
    branches = call.repo(store).branches
    branches[call.path["rev"]] = branches["main"]
    return ok({})


def preupload(store: Store, call: Call) -> Answer:
    """How each file should travel."""
    call.repo(store)
    modes = {True: "lfs", False: "regular"}
    files = [
        (f["path"], modes[f["path"].endswith(LARGE) or f["size"] > 10_000_000])
        for f in call.json["files"]
    ]
    return ok(
        {
            "files": [
                {"path": p, "uploadMode": mode, "shouldIgnore": False, "oid": None}
                for p, mode in files
            ]
        }
    )


def lfs_batch(store: Store, call: Call) -> Answer:
    """Where to put the large files that are not here yet."""
    objects = [{"oid": o["oid"], "size": o["size"]} for o in call.json["objects"]]
    for entry in objects:
        if entry["oid"] not in store.uploads:
            entry["actions"] = {"upload": {"href": f"{store.url}/_lfs/{entry['oid']}"}}
    answer = ok({"transfer": "basic", "objects": objects})
    return Answer(200, answer.body, {"Content-Type": "application/vnd.git-lfs+json"})


def lfs_upload(store: Store, call: Call) -> Answer:
    """Take a large file."""
    if hashlib.sha256(call.body).hexdigest() != call.path["oid"]:
        raise Refusal(400, "sha256 mismatch")
    store.uploads[call.path["oid"]] = call.body
    return ok({})


def xet_token(store: Store, call: Call) -> Answer:
    """Point the client's Xet library at the store on disk."""
    if store.xet is None:
        raise Refusal(404, "this hub has no Xet store")
    expiration = int(time.time()) + 3600
    cas = f"local://{store.xet}"
    headers = {
        "X-Xet-Cas-Url": cas,
        "X-Xet-Access-Token": "x",
        "X-Xet-Token-Expiration": str(expiration),
    }
    return ok({"casUrl": cas, "accessToken": "x", "exp": expiration}, headers)


def commit(store: Store, call: Call) -> Answer:
    """Add and delete files: lines of JSON, each with a key and a value."""
    repo, rev = call.repo(store), call.path["rev"]
    parent, tree = repo.at(rev)
    tree = dict(tree)
    for line in filter(None, call.body.splitlines()):
        key, value = (part := json.loads(line))["key"], part["value"]
        if key == "header" and value.get("parentCommit", parent) != parent:
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        if key == "file":
            tree[value["path"]] = Blob.small(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            tree[value["path"]] = store.large(value["oid"], value["path"])
        elif key in ("deletedFile", "deletedFolder"):
            gone = [
                p
                for p in tree
                if p == value["path"] or p.startswith(value["path"].rstrip("/") + "/")
            ]
            tree = {path: blob for path, blob in tree.items() if path not in gone}
    if call.kind == "model" and "README.md" in tree:
        refuse_bad_card((tree["README.md"].content or b"").decode())
    sha = repo.commit(tree, rev)
    return ok(
        {
            "success": True,
            "commitOid": sha,
            "commitUrl": f"{store.url}/{call.path['repo']}/commit/{sha}",
        }
    )


def info(store: Store, call: Call) -> Answer:
    """A repository at a revision."""
    sha, tree = call.repo(store).at(call.path.get("rev") or "main")
    name, when = call.path["repo"], "2026-01-01T00:00:00.000Z"
    basics = {
        "_id": "0",
        "id": name,
        "author": name.split("/")[0],
        "sha": sha,
        "private": False,
        "gated": False,
    }
    counts = {
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": [],
        "createdAt": when,
        "lastModified": when,
    }
    return ok({**basics, **counts, "siblings": [{"rfilename": path} for path in tree]})


def refs(store: Store, call: Call) -> Answer:
    """The branches."""
    heads = call.repo(store).branches.items()
    branches = [
        {"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha} for name, sha in heads
    ]
    return ok({"branches": branches, "tags": [], "converts": []})


def listing(store: Store, call: Call) -> Answer:
    """The files below a folder, with all that is below them or with their folders."""
    _, tree = call.repo(store).at(call.path["rev"])
    folder = f"{call.path['file']}/" if call.path.get("file") else ""
    files = {path.removeprefix(folder): path for path in tree if path.startswith(folder)}
    if not files:
        raise Refusal(404, f"{folder} does not exist", "EntryNotFound")
    shown = [
        tree[path].entry(path)
        for below, path in files.items()
        if call.recursive or "/" not in below
    ]
    folders = (
        []
        if call.recursive
        else sorted({folder + below.split("/")[0] for below in files if "/" in below})
    )
    return ok(
        shown
        + [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in folders]
    )


def paths_info(store: Store, call: Call) -> Answer:
    """The entries of some paths; the client sends a form."""
    _, tree = call.repo(store).at(call.path["rev"])
    asked = parse_qs(call.body.decode()).get("paths", [])
    return ok([tree[path].entry(path) for path in asked if path in tree])


def download(store: Store, call: Call) -> Answer:
    """A file, or a part of it.

    What came by Xet is said to be on another host, so that the client asks its store instead.
    """
    sha, tree = call.repo(store).at(call.path["rev"])
    blob = tree.get(call.path["file"])
    if blob is None:
        refusal = Refusal(404, f"{call.path['file']} does not exist", "EntryNotFound").answer
        return Answer(404, refusal.body, {**refusal.headers, "X-Repo-Commit": sha})
    tag = f'"{blob.oid}"'
    headers = {
        "ETag": tag,
        "X-Linked-Etag": tag,
        "X-Linked-Size": str(blob.size),
        "X-Repo-Commit": sha,
    }
    if blob.content is None:
        route = f"{store.url}/api/{call.kind}s/{call.path['repo']}/xet-read-token/{sha}"
        elsewhere = f"{store.url}/_xet/{blob.oid}".replace("127.0.0.1", "localhost")
        headers |= {
            "X-Xet-Hash": blob.xet or "",
            "X-Xet-Refresh-Route": route,
            "Location": elsewhere,
        }
        return Answer(302, b"", headers)
    headers |= {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"}
    part = re.fullmatch(r"bytes=(\d+)-(\d*)", call.headers.get("Range") or "")
    if part is None:
        return Answer(200, blob.content, headers)
    first, last = int(part[1]), min(int(part[2] or blob.size), blob.size - 1)
    headers["Content-Range"] = f"bytes {first}-{last}/{blob.size}"
    return Answer(206, blob.content[first : last + 1], headers)


REPO = r"(?P<repo>[^/]+/[^/]+?)"
API = rf"/api/(?P<kind>model|dataset)s/{REPO}"
ROUTES: tuple[tuple[str, str, Callable[[Store, Call], Answer]], ...] = (
    ("GET", r"/api/whoami-v2", whoami),
    ("POST", r"/api/validate-yaml", validate_card),
    ("POST", r"/api/repos/create", create),
    ("POST", rf"{API}/branch/(?P<rev>.+)", branch),
    ("POST", rf"{API}/preupload/(?P<rev>.+)", preupload),
    ("POST", rf"/(?:(?P<kind>datasets)/)?{REPO}\.git/info/lfs/objects/batch", lfs_batch),
    ("PUT", r"/_lfs/(?P<oid>[0-9a-f]{64})", lfs_upload),
    ("GET", rf"{API}/xet-(?:read|write)-token/(?P<rev>.+)", xet_token),
    ("POST", rf"{API}/commit/(?P<rev>.+)", commit),
    ("GET", rf"{API}(?:/revision/(?P<rev>.+))?", info),
    ("GET", rf"{API}/refs", refs),
    ("GET", rf"{API}/tree/(?P<rev>[^/]+)(?:/(?P<file>.+?))?/?", listing),
    ("POST", rf"{API}/paths-info/(?P<rev>[^/]+)", paths_info),
    (
        "GET HEAD",
        rf"/(?:(?P<kind>datasets)/)?{REPO}/(?:resolve|raw)/(?P<rev>[^/]+)/(?P<file>.+)",
        download,
    ),
)
