"""Downloads from a server on 127.0.0.1 that breaks off, corrupts, changes or refuses."""

import hashlib
import json
import re
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from dbdiffusion.data.download import download
from dbdiffusion.runtime.errors import UserError

DATA = np.random.default_rng(1).bytes(3_000_000)
SHA = hashlib.sha256(DATA).hexdigest()
LIBRARY = Path(__file__).resolve().parents[3] / "workflow_scripts"


class Server(ThreadingHTTPServer):
    """Serves `data`; `plan` holds how many bytes each next answer sends before it breaks off (None: all)."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.data, self.etag, self.ranges, self.statuses, self.plan = DATA, '"v1"', True, [], []
        self.honest = True
        self.content_type, self.content_length, self.pause, self.requests, self.headers = "application/octet-stream", True, 0.0, [], {}

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/file.h5ad"

    def handle_error(self, *_):
        """A client that goes away is part of the tests."""


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        server = self.server
        server.requests.append(dict(self.headers))
        if server.statuses and (status := server.statuses.pop(0)) != 200:
            self.send_error(status)
            return
        start, data = 0, server.data
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked and server.ranges and self.headers.get("If-Range", server.etag) == server.etag:
            start = int(asked[1]) if server.honest else 0
            if start >= len(data):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("Content-Type", server.content_type)
        if server.etag:
            self.send_header("ETag", server.etag)
        for name, value in server.headers.items():
            self.send_header(name, value)
        if server.content_length:
            self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        stop = server.plan.pop(0) if server.plan else None
        body = data[start:] if stop is None else data[start : start + stop]
        for at in range(0, len(body), 1 << 16):
            self.wfile.write(body[at : at + (1 << 16)])
            time.sleep(server.pause)


@pytest.fixture
def server():
    instance = Server()
    thread = threading.Thread(target=instance.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield instance
    instance.shutdown()
    instance.server_close()


@pytest.fixture
def second(server):
    instance = Server()
    threading.Thread(target=instance.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield instance
    instance.shutdown()
    instance.server_close()


def fetch(tmp_path, *urls, sha256=None, **options):
    return download(
        list(urls), tmp_path / "out.h5ad", sha256=sha256, record=tmp_path / "record.json", **{"retries": 2, "backoff": 0.0} | options
    )


def left(tmp_path):
    return sorted(path.name for path in tmp_path.iterdir())


def test_whole_file_and_record(tmp_path, server):
    record = fetch(tmp_path, server.url, sha256=SHA.upper())
    assert (tmp_path / "out.h5ad").read_bytes() == DATA
    assert record == json.loads((tmp_path / "record.json").read_text())
    assert record["sha256"] == SHA
    assert record["bytes"] == len(DATA)
    assert record["address"] == server.url
    assert left(tmp_path) == ["out.h5ad", "record.json"]


def test_file_that_is_there_is_not_fetched_again(tmp_path, server):
    fetch(tmp_path, server.url)
    fetch(tmp_path, server.url)
    assert len(server.requests) == 1


def test_truncated_answers_are_resumed(tmp_path, server):
    server.plan = [1_000_000, 500_000]
    fetch(tmp_path, server.url, sha256=SHA, retries=1)
    assert (tmp_path / "out.h5ad").read_bytes() == DATA
    assert [r.get("Range") for r in server.requests] == [None, "bytes=1000000-", "bytes=1500000-"]
    assert server.requests[1]["If-Range"] == '"v1"'


def test_answers_without_a_new_byte_end_the_attempts(tmp_path, server):
    server.plan = [1000] + [0] * 20
    with pytest.raises(UserError, match=r"gave up after 2 retries") as error:
        fetch(tmp_path, server.url)
    assert "1000 of 3000000" in str(error.value) or "IncompleteRead" in str(error.value)
    assert len(server.requests) == 1 + 2
    assert left(tmp_path) == ["out.h5ad.part", "out.h5ad.part.json"]
    server.plan = []
    fetch(tmp_path, server.url, sha256=SHA)
    assert server.requests[-1]["Range"] == "bytes=1000-"


def test_server_without_ranges_starts_anew(tmp_path, server):
    server.ranges, server.plan = False, [1_000_000]
    fetch(tmp_path, server.url, sha256=SHA)
    assert (tmp_path / "out.h5ad").read_bytes() == DATA


def test_wrong_range_is_not_glued_to_the_beginning(tmp_path, server):
    server.honest, server.plan = False, [1_000_000]
    fetch(tmp_path, server.url)
    assert (tmp_path / "out.h5ad").read_bytes() == DATA
    assert [r.get("Range") for r in server.requests] == [None, "bytes=1000000-", None]


def test_changed_file_is_not_glued_to_the_old_beginning(tmp_path, server):
    server.plan = [1_000_000] + [0] * 9
    with pytest.raises(UserError):
        fetch(tmp_path, server.url)
    server.plan, server.etag, server.data = [], '"v2"', DATA[::-1]
    fetch(tmp_path, server.url)
    assert (tmp_path / "out.h5ad").read_bytes() == DATA[::-1]


def test_changed_size_without_validators_starts_anew(tmp_path, server):
    server.etag, server.plan = "", [1_000_000] + [0] * 9
    with pytest.raises(UserError):
        fetch(tmp_path, server.url)
    server.plan, server.data = [], DATA[::-1] + b"more"
    fetch(tmp_path, server.url)
    assert (tmp_path / "out.h5ad").read_bytes() == server.data


def test_shorter_file_at_the_server_starts_anew(tmp_path, server):
    server.etag, server.plan = "", [1_000_000] + [0] * 9
    with pytest.raises(UserError):
        fetch(tmp_path, server.url)
    server.plan, server.data = [], DATA[:500]
    fetch(tmp_path, server.url)
    assert (tmp_path / "out.h5ad").read_bytes() == DATA[:500]


def test_weak_etags_are_not_used_to_resume(tmp_path, server):
    server.etag, server.plan = 'W/"v1"', [1_000_000]
    server.headers = {"Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT"}
    fetch(tmp_path, server.url, sha256=SHA)
    assert server.requests[1]["If-Range"] == "Mon, 01 Jan 2024 00:00:00 GMT"


def test_partial_file_of_unknown_origin_is_not_used(tmp_path, server):
    (tmp_path / "out.h5ad.part").write_bytes(b"x" * 100)
    fetch(tmp_path, server.url, sha256=SHA)
    assert "Range" not in server.requests[0]


def test_partial_file_of_another_address_is_not_used(tmp_path, server, second):
    server.plan = [1_000_000] + [0] * 9
    fetch(tmp_path, server.url, second.url, sha256=SHA)
    assert "Range" not in second.requests[0]


def test_partial_file_outlives_a_dead_second_address(tmp_path, server, second):
    server.plan, second.statuses = [1_000_000] + [0] * 9, [404]
    with pytest.raises(UserError):
        fetch(tmp_path, server.url, second.url)
    server.plan = []
    fetch(tmp_path, server.url, second.url, sha256=SHA)
    assert server.requests[-1]["Range"] == "bytes=1000000-"


def test_corrupted_file_is_removed_and_named(tmp_path, server):
    server.data = DATA[:-1] + bytes([DATA[-1] ^ 1])
    found = hashlib.sha256(server.data).hexdigest()
    with pytest.raises(UserError) as error:
        fetch(tmp_path, server.url, sha256=SHA)
    assert found in str(error.value)
    assert SHA in str(error.value)
    assert "published" in str(error.value)
    assert left(tmp_path) == []


def test_corrupted_first_address_goes_on_to_the_next(tmp_path, server, second):
    server.data = b"\x89HDF" + DATA[4:]
    record = fetch(tmp_path, server.url, second.url, sha256=SHA)
    assert record["address"] == second.url
    assert (tmp_path / "out.h5ad").read_bytes() == DATA


def test_recorded_checksum_is_met_later(tmp_path, server):
    first = fetch(tmp_path, server.url)
    before = (tmp_path / "record.json").read_bytes()
    (tmp_path / "out.h5ad").unlink()
    assert fetch(tmp_path, server.url) == first
    assert (tmp_path / "record.json").read_bytes() == before
    (tmp_path / "out.h5ad").unlink()
    server.data = DATA[::-1]
    with pytest.raises(UserError) as error:
        fetch(tmp_path, server.url)
    assert f"recorded on {first['date']} from {server.url}" in str(error.value)
    assert "remove" in error.value.fix
    assert (tmp_path / "record.json").read_bytes() == before


def test_broken_record_is_named(tmp_path, server):
    (tmp_path / "record.json").write_text("{")
    with pytest.raises(UserError, match="not a download record"):
        fetch(tmp_path, server.url)


def test_dead_first_address(tmp_path, server, second):
    server.server_close()
    assert fetch(tmp_path, server.url, second.url, sha256=SHA)["address"] == second.url


@pytest.mark.parametrize(("status", "requests"), [(404, 1), (403, 1), (503, 3), (429, 3)])
def test_http_errors(tmp_path, server, status, requests):
    server.statuses = [status] * 9
    with pytest.raises(UserError, match=f"HTTP {status}"):
        fetch(tmp_path, server.url)
    assert len(server.requests) == requests
    assert left(tmp_path) == []


def test_busy_server_is_tried_again(tmp_path, server):
    server.statuses = [503, 503]
    fetch(tmp_path, server.url, sha256=SHA)


@pytest.mark.parametrize("content_type", ["text/html; charset=utf-8", "application/octet-stream"])
def test_web_page_instead_of_data(tmp_path, server, content_type):
    server.data, server.content_type = b"\n <!DOCTYPE html><html>please log in</html>", content_type
    with pytest.raises(UserError, match="web page"):
        fetch(tmp_path, server.url)
    assert left(tmp_path) == []


def test_web_page_does_not_stay_as_a_partial_file(tmp_path, server, second):
    server.data = b"<html>" + DATA
    fetch(tmp_path, server.url, second.url, sha256=SHA)
    assert left(tmp_path) == ["out.h5ad", "record.json"]


def test_unknown_length(tmp_path, server):
    server.content_length = False
    fetch(tmp_path, server.url, sha256=SHA)


def test_stored_gzip_files_stay_compressed(tmp_path, server):
    server.headers = {"Content-Encoding": "gzip"}
    fetch(tmp_path, server.url, sha256=SHA)
    assert server.requests[0]["Accept-Encoding"] == "identity"


def test_unusable_address(tmp_path, server):
    with pytest.raises(UserError, match="not a usable address"):
        fetch(tmp_path, "ftp://127.0.0.1/file")
    fetch(tmp_path, "nonsense", server.url, sha256=SHA)


def test_an_older_file_survives_a_failure(tmp_path, server):
    (tmp_path / "out.h5ad").write_text("older")
    server.statuses = [404]
    with pytest.raises(UserError):
        fetch(tmp_path, server.url)
    assert (tmp_path / "out.h5ad").read_text() == "older"


def test_killed_run_is_resumed(tmp_path, server):
    server.pause = 0.05
    code = (
        f"import sys; sys.path.insert(0, {str(LIBRARY)!r})\n"
        "from dbdiffusion.data.download import download\n"
        f"download([{server.url!r}], {str(tmp_path / 'out.h5ad')!r}, sha256=None, record={str(tmp_path / 'record.json')!r})"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    part = tmp_path / "out.h5ad.part"
    end = time.monotonic() + 20
    while (not part.exists() or part.stat().st_size == 0) and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    size = part.stat().st_size
    assert 0 < size < len(DATA)
    assert not (tmp_path / "out.h5ad").exists()
    server.pause = 0.0
    fetch(tmp_path, server.url, sha256=SHA)
    assert server.requests[-1]["Range"] == f"bytes={size}-"
    assert (tmp_path / "out.h5ad").read_bytes() == DATA
