"""The folder of a harvest at a URL: what machines without a common file system share, and what outlives them.

Any URL that fsspec knows: s3://bucket/prefix (with s3fs installed), gs://, file:///..., memory://. Files are uploaded
when they are whole, a shard's tar before its sidecar and the index last, so that at the URL, too, a shard with a
sidecar is whole. Object stores show a file when all of it is there; elsewhere (file://) checksums find a cut one.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs

from data.errors import DamagedShardError, StoreError
from data.files import RECORD_BYTES, read_bytes
from data.index import changing, parse_sidecar
from data.records import Sidecar
from scr_runtime.files import replace_file, temporary_path, write_file

_SINGLE = 4  # up to this many files are looked up one by one; for more, the folder is listed


class Store:
    """Files under one URL.

    Args:
        url: folder; credentials and endpoints come from where its file system looks (environment, config files).

    Raises:
        StoreError: no such kind of URL, or its package is not installed; also from each method, if the store fails.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        with self._failing("opened"):
            found: Any = url_to_fs(self.url, use_listings_cache=False)
        self._fs, root = found
        self._root = str(root).rstrip("/")

    def sizes(self, names: Sequence[str] | None = None) -> dict[str, int]:
        """Bytes of the files that are there, by name: of all, or of these."""
        with self._failing("listed"):
            if names is not None and len(names) <= _SINGLE:
                entries = []
                for name in names:
                    with contextlib.suppress(FileNotFoundError):
                        entries.append(self._fs.info(self._path(name)))
            else:
                try:
                    entries = self._fs.ls(self._root, detail=True)
                except FileNotFoundError:
                    entries = []
        found = {str(e["name"]).rsplit("/", 1)[-1]: int(e["size"] or 0) for e in entries if self._is_file(e)}
        return found if names is None else {name: found[name] for name in names if name in found}

    def read(self, names: Sequence[str]) -> dict[str, bytes]:
        """Contents of those of the files that are there; small records all, of bounded size."""
        sizes = self.sizes(names) if names else {}
        if not sizes:
            return {}
        with self._failing("read"):
            if large := [name for name, size in sizes.items() if size > RECORD_BYTES]:
                raise ValueError(f"{large[0]} has {sizes[large[0]]:,} bytes, at most {RECORD_BYTES:,} are expected")
            contents = self._fs.cat([self._path(name) for name in sizes], on_error="return")
            for content in contents.values():
                if isinstance(content, Exception) and not isinstance(content, FileNotFoundError):
                    raise content
        return {path.rsplit("/", 1)[-1]: value for path, value in contents.items() if isinstance(value, bytes)}

    def write(self, name: str, content: bytes) -> None:
        """Writes a small file."""
        with self._failing("written"):
            self._make_folder()
            self._check_free(name)
            self._fs.pipe_file(self._path(name), content)

    def upload_shard(self, directory: Path, name: str) -> None:
        """Uploads a shard: its tar, then its sidecar."""
        with self._failing("written"):
            self._make_folder()
            self._check_free(f"{name}.tar")
            self._fs.put_file(str(directory / f"{name}.tar"), self._path(f"{name}.tar"))
        self.write(f"{name}.json", read_bytes(directory / f"{name}.json", RECORD_BYTES))

    def download_shard(self, directory: Path, name: str) -> Sidecar:
        """Downloads a shard; nothing has its name before every byte has been compared with its sidecar.

        Returns:
            The sidecar.

        Raises:
            DamagedShardError: it is not what its sidecar says, or it vanished.
        """
        content = self.read([f"{name}.json"]).get(f"{name}.json")
        if content is None:
            raise DamagedShardError(name, "its sidecar is missing")
        sidecar = parse_sidecar(name, content)
        target = directory / f"{name}.tar"
        temporary = temporary_path(target)
        size = self.sizes([target.name]).get(target.name)
        if size is not None and size != sidecar["bytes"]:
            raise DamagedShardError(name, f"{target.name} has {size:,} bytes instead of {sidecar['bytes']:,}")
        try:
            try:
                with self._failing("read"):
                    self._fs.get_file(self._path(target.name), str(temporary))
            except FileNotFoundError:
                raise DamagedShardError(name, f"{target.name} is missing") from None
            with temporary.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            if digest != sidecar["sha256"]:
                raise DamagedShardError(name, f"the checksum of {target.name} is wrong")
            with changing(directory):
                (directory / f"{name}.json").unlink(missing_ok=True)  # it belongs to the tar that goes
                replace_file(temporary, target)
                write_file(directory / f"{name}.json", content)
        finally:
            temporary.unlink(missing_ok=True)
        return sidecar

    def remove(self, names: Sequence[str]) -> None:
        """Removes those of the files that are there, in order."""
        present = self.sizes(names)
        with self._failing("changed"):
            for name in names:
                if name in present:
                    with contextlib.suppress(FileNotFoundError):
                        self._fs.rm_file(self._path(name))

    def _is_file(self, entry: dict[str, Any]) -> bool:
        if entry.get("islink") and entry.get("type") != "file":  # a listing does not follow links, a look-up does
            try:
                entry = self._fs.info(entry["name"])
            except OSError:
                return False
        return entry.get("type", "file") == "file"

    def _check_free(self, name: str) -> None:
        """Checks that a file can be written: a FIFO in its place would be waited for."""
        with contextlib.suppress(FileNotFoundError):
            if (kind := self._fs.info(self._path(name)).get("type", "file")) != "file":
                raise ValueError(f"{name} is no file there ({kind})")

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _make_folder(self) -> None:
        if "file" in (self._fs.protocol if isinstance(self._fs.protocol, tuple) else (self._fs.protocol,)):
            self._fs.makedirs(self._root, exist_ok=True)  # object stores have no folders, and would make buckets

    @contextlib.contextmanager
    def _failing(self, verb: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except Exception as error:  # stores raise errors of many kinds (credentials, network, no package for the URL)
            raise StoreError(
                f"harvest.output: {self.url} cannot be {verb}: {type(error).__name__}: {error}\nFinished shards are "
                "kept in runs_dir, and uploaded when the harvest is started again."
            ) from error
