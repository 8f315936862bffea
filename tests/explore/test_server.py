"""The server over real HTTP, and what it says when it cannot start."""

import asyncio
import http.client
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from dataclasses import replace
from types import SimpleNamespace

import pytest
import uvicorn
from PIL import Image

from shallowdeep.errors import ConfigError, DataError, MissingExtra
from shallowdeep.explore import app as app_module
from shallowdeep.explore.app import Desk
from shallowdeep.explore.evolution import Answered, Looked
from shallowdeep.explore.guard import is_open, names_of
from shallowdeep.explore.page import render
from shallowdeep.explore.server import address_of, listen, serve
from shallowdeep.explore.uploads import Refused

ANSWER = Answered(0, (1,), (1.0,), 0.5)


def ask(address, path="/", method="GET", body=None, **headers):
    """Status, headers and body."""
    host, port = re.fullmatch(r"http://([^:/]+):(\d+)/", address).groups()
    connection = http.client.HTTPConnection(host, int(port), timeout=30)
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response.status, dict(response.getheaders()), content


def error_of(answer):
    status, headers, content = answer
    assert headers["content-type"] == "application/json"
    return status, json.loads(content)["error"]


def events_of(answer):
    status, headers, content = answer
    assert (status, headers["content-type"]) == (200, "application/x-ndjson")
    return [json.loads(line) for line in content.splitlines()]


def png(size=(32, 32), mode="RGB", colour=(90, 140, 20)):
    file = io.BytesIO()
    Image.new(mode, size, colour).save(file, "PNG")
    return file.getvalue()


def test_the_page_asks_nobody_else(address):
    status, headers, content = ask(address)
    assert status == 200
    assert "default-src 'none'" in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert not any(name.startswith("access-control") for name in headers)
    text = content.decode()
    for path, kind in (("/page.css", "text/css"), ("/page.js", "text/javascript")):
        status, headers, content = ask(address, path)
        assert status == 200
        assert headers["content-type"].startswith(kind)
        text += content.decode()
    addresses = set(re.findall(r"https?://[^\s\"']+", text))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name, which nobody opens
    for path in ("/docs", "/redoc", "/openapi.json"):
        assert error_of(ask(address, path)) == (404, "Not Found.")


def test_names_from_outside_are_text_and_no_markup(setting):
    evil = "</script><img src=x onerror=alert(1)>"
    source = replace(setting, class_names=(evil,) * 10, source=evil)
    assert evil not in render(source, too_large="", max_upload_mb=10.0)


def test_samples_come_in_pages(address, setting):
    shown = json.loads(ask(address, "/samples?group=never&start=1&count=2")[2])
    never = next(group for group in setting.shelf.groups if group.key == "never")
    assert shown["total"] == len(never.ids)
    assert [one["id"] for one in shown["samples"]] == list(never.ids[1:3])
    assert error_of(ask(address, "/samples?group=nevr"))[1].startswith(
        "no group of samples 'nevr'. Did you mean 'never'?"
    )
    assert error_of(ask(address, "/samples?start=-1")) == (422, "start: input should be greater than or equal to 0.")
    assert error_of(ask(address, "/samples?count=1000"))[0] == 422


def test_a_sample_and_its_file_get_the_same_answers(address, setting):
    id = int(setting.test.ids[5])
    picked = events_of(ask(address, f"/evolve?sample={id}", "POST"))
    assert [event["event"] for event in picked] == ["begun", *3 * ["answered"], "confused", *3 * ["looked"], "done"]
    assert [event["classes"][0] for event in picked[1:4]] == setting.test.predictions[5].tolist()
    file = io.BytesIO()
    Image.fromarray(setting.shelf.pixels(id).permute(1, 2, 0).numpy()).save(file, "PNG")
    sent = events_of(ask(address, "/evolve", "POST", file.getvalue()))
    assert sent[0]["words"] == "your image, 32 × 32 pixels"
    assert sent[0]["label"] is None
    assert picked[0]["label"] == int(setting.test.labels[5])
    assert sent[0]["image"] == picked[0]["image"]
    for one, other in zip(picked[1:], sent[1:], strict=True):
        one.pop("elapsed_ms", None), other.pop("elapsed_ms", None)
        assert one == other


def test_a_single_pixel_is_an_image(address):
    events = events_of(ask(address, "/evolve", "POST", png((1, 1))))
    assert events[0]["words"] == "your image, 1 × 1 pixels, as the network sees it: 32 × 32"
    assert events[-1] == {"event": "done"}


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/evolve", b"words, and no image", 415, "no PNG, JPEG, WebP, GIF or BMP image, whatever its name says"),
        ("/evolve", png()[:60], 422, "This PNG image cannot be read"),
        ("/evolve", b"", 422, "The file is empty"),
        ("/evolve", png((9000, 9000), "1", 0), 413, "at most 50 million are read"),
        ("/evolve?sample=100000", None, 422, "no sample 100000"),
        ("/evolve?sample=one", None, 422, "sample: input should be a valid integer"),
    ],
)
def test_what_is_refused_is_refused_in_words(address, path, body, status, words):
    found = error_of(ask(address, path, "POST", body))
    assert found[0] == status
    assert words in found[1]


def test_fifty_megabytes_are_refused(address):
    status, words = error_of(ask(address, "/evolve", "POST", b"\x89PNG\r\n\x1a\n" + bytes(50_000_000)))
    assert status == 413
    assert words == (
        "The file is larger than 10 MB, so it is not used. Choose a smaller one, or start with a larger --max-upload."
    )
    assert events_of(ask(address, "/evolve", "POST", png()))[-1] == {"event": "done"}


def test_a_refused_upload_is_never_held(setting, monkeypatch):
    sent = 0

    async def stream():
        nonlocal sent
        for _ in range(100):
            sent += 100_000
            yield bytes(100_000)

    def read(most_mb):
        nonlocal sent
        sent = 0
        return asyncio.run(Desk(setting, most_mb).read(SimpleNamespace(stream=stream)))

    assert len(read(10.0)) == 10_000_000
    monkeypatch.setattr(app_module, "DRAINED", 3_000_000)
    tracemalloc.start()
    with pytest.raises(Refused, match="larger than 1 MB"):
        read(1.0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000
    assert sent == 4_100_000  # whoever sends on and on is not listened to


@pytest.mark.parametrize(
    ("host", "known"),
    [
        ("127.0.0.1:8000", True),
        ("localhost:8000", True),
        ("LOCALHOST", True),
        ("192.168.1.7:8000", True),
        ("[::1]:8000", True),
        ("evil.example:8000", False),
        ("127.0.0.1.evil.example", False),
        ("localhost.evil.example", False),
        ("[", False),
    ],
)
def test_other_names_are_not_answered(address, host, known):
    answer = ask(address, Host=host)
    assert answer[0] == (200 if known else 403)
    if not known:
        assert "This server is not called" in error_of(answer)[1]


def test_other_sites_are_not_answered(address):
    own = address.rstrip("/")
    assert error_of(ask(address, "/evolve?sample=1", "POST", Origin="http://evil.example"))[0] == 403
    assert error_of(ask(address, "/samples", Origin="null"))[0] == 403
    assert error_of(ask(address, "/samples", Origin="http://["))[0] == 403
    assert ask(address, "/samples", Origin=own)[0] == 200
    assert error_of(ask(address, "/samples", "OPTIONS", Origin=own))[0] == 405


def test_names_and_openness():
    assert names_of("127.0.0.1") == {"127.0.0.1", "localhost"}
    assert socket.gethostname() in names_of("0.0.0.0")
    assert [is_open(host) for host in ("127.0.0.2", "::1", "localhost", "::", "0.0.0.0", "10.0.0.1", "box")] == [
        False, False, False, True, True, True, True,
    ]  # fmt: skip


def test_an_exit_is_told_before_the_next_is_computed(setting, serve_page, monkeypatch):
    go_on = threading.Event()

    def slow(*args):
        yield ANSWER
        assert go_on.wait(20)
        yield ANSWER

    monkeypatch.setattr(app_module, "evolve", slow)
    host, port = serve_page(setting)[7:-1].split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=20)
    connection.request("POST", "/evolve", png())
    response = connection.getresponse()
    assert json.loads(response.readline())["event"] == "answered"
    go_on.set()
    assert [json.loads(line)["event"] for line in response.read().splitlines()] == ["answered", "done"]
    connection.close()


def test_one_image_at_a_time(setting, serve_page, monkeypatch):
    inside, most = 0, 0

    def counted(*args):
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        for _ in range(3):
            time.sleep(0.05)
            yield ANSWER
        inside -= 1

    monkeypatch.setattr(app_module, "evolve", counted)
    address, answers = serve_page(setting), []
    threads = [
        threading.Thread(target=lambda: answers.append(events_of(ask(address, "/evolve", "POST", png()))))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert [len(events) for events in answers] == [4, 4, 4]
    assert most == 1


def test_nobody_reads_on(setting, serve_page, monkeypatch):
    """The work ends, and the next visitor has a turn."""
    ended = threading.Event()

    def endless(*args):
        try:
            while True:
                time.sleep(0.01)
                yield ANSWER
        finally:
            ended.set()

    monkeypatch.setattr(app_module, "evolve", endless)
    address = serve_page(setting)
    host, port = address[7:-1].split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=20)
    connection.request("POST", "/evolve", png())
    connection.getresponse().readline()
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    assert ended.wait(10)
    monkeypatch.setattr(app_module, "evolve", lambda *_: (event for event in [ANSWER]))
    assert len(events_of(ask(address, "/evolve", "POST", png()))) == 2


def test_who_does_not_read_keeps_nobody_waiting(setting, serve_page, monkeypatch):
    large = Looked(0, "x" * 2_000_000)
    monkeypatch.setattr(app_module, "evolve", lambda *_: (large for _ in range(8)))
    address = serve_page(setting)
    host, port = address[7:-1].split(":")
    with socket.socket() as idle:
        idle.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        idle.connect((host, int(port)))
        idle.sendall(b"POST /evolve?sample=%d HTTP/1.1\r\nHost: localhost\r\n\r\n" % int(setting.test.ids[0]))
        assert idle.recv(15) == b"HTTP/1.1 200 OK"
        monkeypatch.setattr(app_module, "evolve", lambda *_: (event for event in [ANSWER]))
        assert len(events_of(ask(address, "/evolve", "POST", png()))) == 2


def test_an_upload_that_breaks_off_is_nothing_to_speak_of(setting, serve_page, capfd):
    address = serve_page(setting)
    host, port = address[7:-1].split(":")
    with socket.create_connection((host, int(port))) as torn:
        torn.sendall(b"POST /evolve HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nabc")
        time.sleep(0.2)
    assert ask(address)[0] == 200
    time.sleep(0.2)
    assert "ClientDisconnect" not in capfd.readouterr().err


def test_what_goes_wrong_on_the_way_is_told(setting, serve_page, monkeypatch):
    def failing(*args):
        yield ANSWER
        raise DataError("the network fell over. Set it up again.")

    monkeypatch.setattr(app_module, "evolve", failing)
    address = serve_page(setting)
    for _ in range(2):  # and it is the next one's turn
        events = events_of(ask(address, "/evolve", "POST", png()))
        assert events[-1] == {"event": "failed", "error": "the network fell over. Set it up again."}


def test_a_port_in_use_is_one_line(digits, shell):
    with listen("127.0.0.1", 0) as door:
        port = door.getsockname()[1]
        code, _, err = shell("explore", digits.folder, "--port", port)
    assert code == 2
    assert err == f"error: port {port} on 127.0.0.1 is in use. Choose another: --port 0\n"


@pytest.mark.parametrize(
    ("host", "port", "words"),
    [
        ("127.0.0.1", 70000, "no port 70000"),
        ("no such host", 0, "cannot listen on no such host"),
        ("203.0.113.9", 0, "cannot listen on 203.0.113.9"),
        ("", 0, "no host to listen on"),
        ("\0", 0, "cannot listen on"),
        ("ü" * 70, 0, "cannot listen on"),
    ],
)
def test_where_one_cannot_listen(host, port, words):
    with pytest.raises(ConfigError, match=words):
        listen(host, port)


def test_addresses_to_open():
    for host, wanted in (("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("localhost", "127.0.0.1")):
        with listen(host, 0) as door:
            assert address_of(door) == f"http://{wanted}:{door.getsockname()[1]}/"
    try:
        door = listen("::1", 0)
    except ConfigError:
        pytest.skip("this machine has no IPv6")
    with door:
        assert address_of(door).startswith("http://[::1]:")


def test_what_is_said_at_the_start(digits, monkeypatch):
    def interrupt(self, sockets):
        raise KeyboardInterrupt

    monkeypatch.setattr(uvicorn.Server, "run", interrupt)
    said = []
    serve(digits, port=0, say=said.append)
    assert len(said) == 2
    assert re.fullmatch(rf"{digits.folder} is at http://127\.0\.0\.1:\d+/ \(Ctrl-C ends it\)", said[0])
    assert said[1] == "ended"
    said.clear()
    serve(digits, host="0.0.0.0", port=0, say=said.append)
    assert said[0] == "warning: anyone who reaches this machine can use the page, for it listens on 0.0.0.0."
    opened = threading.Event()
    monkeypatch.setattr("webbrowser.open", lambda address: address.startswith("http://127.0.0.1:") and opened.set())
    serve(digits, port=0, open_browser=True, say=said.append)
    assert opened.wait(10)
    with pytest.raises(ConfigError, match="the largest upload is 0 MB"):
        serve(digits, port=0, max_upload_mb=0.0)


@pytest.mark.parametrize("module", ["fastapi", "uvicorn", "jinja2"])
def test_a_missing_library_is_named(digits, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtra, match=r"shallowdeep\[explore\]"):
        serve(digits, port=0)


@pytest.mark.slow
def test_ctrl_c_ends_it(digits, repository):
    """As a person starts it, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(repository / "tests"), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "shallowdeep", "explore", str(digits.folder), "--port", "0"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            line = process.stdout.readline()
            address = re.search(r"http://127\.0\.0\.1:\d+/", line)[0]
            assert "Watch a prediction evolve" in ask(address)[2].decode()
            assert events_of(ask(address, "/evolve", "POST", png()))[-1] == {"event": "done"}
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=30)
        finally:
            process.kill()
    assert (process.returncode, out, err) == (0, "ended\n", "")
    with pytest.raises(ConnectionRefusedError):
        ask(address)
