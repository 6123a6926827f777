"""Download of one file: resumed after a break, checked, whole or absent."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import requests
import urllib3

from dbdiffusion.runtime.errors import UserError
from dbdiffusion.runtime.files import read_json, write_json
from dbdiffusion.runtime.progress import Progress

logger = logging.getLogger(__name__)

CHUNK = 1 << 20
TIMEOUT = (30.0, 120.0)
"""Seconds to connect, and to wait for the next bytes."""
_TRY_AGAIN = {408, 425, 429, 500, 502, 503, 504}
_HTML = (b"<!doctype html", b"<html")


class _Broken(Exception):
    """The answer broke off or the server is busy: try the same address again."""


class _Refused(Exception):
    """This address does not serve the file: go on to the next."""


@dataclass(frozen=True)
class _Partial:
    """A partial download and what is known of the file it belongs to."""

    part: Path

    @property
    def notes(self) -> Path:
        return self.part.with_name(self.part.name + ".json")

    def size(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def known(self, url: str) -> dict[str, Any] | None:
        """Notes on the partial file when it stems from `url`; one of another or unknown origin is not used, and
        only replaced once this address serves something."""
        try:
            notes = read_json(self.notes)
        except (OSError, ValueError):
            notes = None
        if self.size() and isinstance(notes, dict) and notes.get("url") == url:
            return notes
        return None

    def begin(self, url: str, response: requests.Response, total: int | None) -> None:
        """Start anew with the validators of this answer."""
        self.remove()
        etag = response.headers.get("ETag", "")
        # A weak ETag says nothing about single bytes and must not be used to resume (RFC 9110, 13.1.5).
        validator = etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified", "")
        self.part.parent.mkdir(parents=True, exist_ok=True)
        self.part.touch()
        write_json(self.notes, {"url": url, "validator": validator, "total": total})

    def remove(self) -> None:
        self.part.unlink(missing_ok=True)
        self.notes.unlink(missing_ok=True)


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def download(
    urls: Sequence[str],
    out: str | Path,
    *,
    sha256: str | None,
    record: str | Path,
    retries: int = 3,
    backoff: float = 2.0,
) -> dict[str, Any]:
    """Fetch a file from the first address that serves it.

    urls: addresses of the same file, in order of preference. out: written by rename when whole and checked; until then
    the bytes are in `out` + `.part`, from where a later call goes on (HTTP Range, with If-Range so that a file that has
    changed at the server starts anew). sha256: published checksum, or none. record: JSON file with address, sha256,
    bytes and date of the download; where no checksum is published the recorded one must be met by every later download.
    retries: further attempts at one address that bring no new byte; backoff: seconds before the first of them, doubled each time.

    Returns the record. Raises UserError, naming every address and what was wrong with it, when none serves the right file.
    """
    out, record = Path(out), Path(record)
    expected, origin = _expected(sha256, record)
    if expected and out.exists() and sha256_of(out) == expected:
        logger.info("%s is there already, with the right checksum", out)
        return _write_record(record, {"address": urls[0], "sha256": expected, "bytes": out.stat().st_size})
    partial = _Partial(out.with_name(out.name + ".part"))
    failures = []
    for url in urls:
        try:
            _fetch_with_retries(url, partial, retries=retries, backoff=backoff)
            found = sha256_of(partial.part)
            if expected and found != expected:
                partial.remove()
                raise _Refused(f"wrong checksum: found sha256 {found}, expected {expected} ({origin}); the file was removed")
        except (_Broken, _Refused) as error:
            logger.warning("%s: %s", url, error)
            if partial.size() == 0:
                partial.remove()
            failures.append(f"\n  {url}: {error}")
            continue
        entry = {"address": url, "sha256": found, "bytes": partial.size()}
        os.replace(partial.part, out)
        partial.notes.unlink(missing_ok=True)
        logger.info("%s: %d bytes, sha256 %s", out, entry["bytes"], found)
        return _write_record(record, entry)
    raise UserError(
        f"no address served the file:{''.join(failures)}",
        where=str(out),
        fix="check the network and proxy settings (https_proxy) and run again: a partial download is resumed. If the publisher replaced "
        f"the file, remove {record}. Or fetch it by hand and use a dataset of kind h5ad, 10x_h5 or 10x_mtx",
    )


def _expected(sha256: str | None, record: Path) -> tuple[str | None, str]:
    """The checksum to meet and where it is from."""
    if sha256:
        return sha256.lower(), "published"
    if record.exists():
        try:
            earlier = read_json(record)
            return str(earlier["sha256"]), f"recorded on {earlier.get('date')} from {earlier.get('address')}"
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"not a download record: {error!r}", where=str(record), fix="remove the file") from error
    return None, ""


def _write_record(record: Path, entry: dict[str, Any]) -> dict[str, Any]:
    """Keep the first record of a file as it is, so that it says when and where the bytes came from."""
    if record.exists():
        try:
            earlier = read_json(record)
            if earlier.get("sha256") == entry["sha256"]:
                return earlier
        except (ValueError, AttributeError):
            logger.warning("%s was not a download record and is replaced", record)
    entry = {**entry, "date": datetime.now(UTC).strftime("%Y-%m-%d")}
    write_json(record, entry)
    return entry


def _fetch_with_retries(url: str, partial: _Partial, *, retries: int, backoff: float) -> None:
    """Fetch all bytes of `url`, going on where an answer broke off. Attempts that bring new bytes do not count."""
    failed, furthest = 0, 0
    while True:
        try:
            return _fetch(url, partial)
        except _Broken as error:
            if partial.size() > furthest:
                furthest, failed = partial.size(), 0
            failed += 1
            if failed > retries:
                raise _Broken(f"{error} (gave up after {retries} retries without a new byte)") from None
            wait = min(backoff * 2 ** (failed - 1), 60.0)
            logger.warning("%s: %s; trying again in %.0f s from byte %d", url, error, wait, partial.size())
            time.sleep(wait)


def _fetch(url: str, partial: _Partial) -> None:
    """One request, appended to the partial file. Raises _Broken or _Refused."""
    # Bytes as they are stored: with a transfer compression neither lengths nor ranges would fit the file.
    headers = {"Accept-Encoding": "identity"}
    notes, offset = partial.known(url), 0
    if notes is not None:
        offset = partial.size()
        if notes["total"] == offset:
            return
        headers["Range"] = f"bytes={offset}-"
        if notes["validator"]:
            headers["If-Range"] = notes["validator"]
    try:
        with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
            total = _check_answer(url, response, partial, offset, notes)
            offset = partial.size()
            _store(response, partial.part, offset, total)
    except (requests.exceptions.InvalidSchema, requests.exceptions.InvalidURL, requests.exceptions.MissingSchema) as error:
        raise _Refused(f"not a usable address ({error})") from error
    except (requests.RequestException, urllib3.exceptions.HTTPError, ConnectionError, TimeoutError) as error:
        raise _Broken(f"{type(error).__name__}: {error}") from error
    size = partial.size()
    if total is not None and size < total:
        raise _Broken(f"answer broke off after {size} of {total} bytes")
    if total is not None and size > total:
        partial.remove()
        raise _Broken(f"answer of {size} bytes is longer than the announced {total}")


def _check_answer(url: str, response: requests.Response, partial: _Partial, offset: int, notes: dict[str, Any] | None) -> int | None:
    """Decide from status and headers whether to go on at `offset` or start anew; returns the file's size where announced."""
    status = response.status_code
    if status == 416:
        # Nothing lies behind the offset: the file at the server is shorter than what we have, or changed.
        partial.remove()
        raise _Broken("the partial download does not fit the file; starting anew")
    if status in _TRY_AGAIN:
        raise _Broken(f"HTTP {status} {response.reason}")
    if status not in (200, 206):
        raise _Refused(f"HTTP {status} {response.reason}")
    if "text/html" in response.headers.get("Content-Type", "").lower():
        raise _Refused("a web page (text/html) was served instead of data")
    if status == 206:
        if notes is None:
            raise _Refused("a part of the file was served although all of it was asked for")
        start, total = _content_range(response)
        if start != offset or (notes and notes["total"] not in (None, total)):
            partial.remove()
            raise _Broken("the server's range does not fit the partial download; starting anew")
        return total
    length = response.headers.get("Content-Length")
    total = int(length) if length and length.isdigit() else None
    if offset:
        logger.info("%s: the file changed or the server cannot resume; starting anew", url)
    partial.begin(url, response, total)
    return total


def _content_range(response: requests.Response) -> tuple[int, int | None]:
    """First byte and size of the whole file from `Content-Range: bytes first-last/size`."""
    unit, _, rest = response.headers.get("Content-Range", "").partition(" ")
    span, _, size = rest.partition("/")
    first = span.partition("-")[0]
    if unit != "bytes" or not first.isdigit():
        return -1, None
    return int(first), int(size) if size.isdigit() else None


def _store(response: requests.Response, part: Path, offset: int, total: int | None) -> None:
    """Append the body to the partial file; refuse a web page by its first bytes."""
    bar = Progress(total // CHUNK, f"download {part.stem} (MiB)", start=offset // CHUNK) if total else None
    written = offset
    try:
        with open(part, "ab") as handle:
            for chunk in _body(response):
                if written == 0 and chunk.lstrip()[:15].lower().startswith(_HTML):
                    raise _Refused("a web page was served instead of data")
                _write(handle, chunk, part)
                if bar is not None:
                    bar.update((written + len(chunk)) // CHUNK - written // CHUNK)
                written += len(chunk)
    finally:
        if bar is not None:
            bar.close()


def _body(response: requests.Response) -> Iterator[bytes]:
    # The raw stream: some servers label stored .gz files with a content encoding, which must stay on.
    yield from response.raw.stream(CHUNK, decode_content=False)


def _write(handle: Any, chunk: bytes, part: Path) -> None:
    try:
        handle.write(chunk)
    except OSError as error:
        fix = "free space on this disk, or choose another folder" if error.errno == errno.ENOSPC else "check the folder"
        raise UserError(f"cannot write: {error.strerror}", where=str(part), fix=fix) from error
