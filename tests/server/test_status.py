"""The status page over HTTP: its numbers, its headers, and what it keeps to itself."""

import doctest
import http.client
import json
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from fedpeft.errors import RunError
from server import page
from server.snapshot import view
from server.status import Snapshot, StatusPage
from tests.snapshots import CLIENT_LEVEL, PRIVACY, record, snapshot

PATHS = ("/", "/status.json", "/metrics", "/healthz")
Serve = Callable[[Snapshot], int]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Serves a snapshot on a free port of loopback; returns the port."""
    pages: list[StatusPage] = []

    def start(shown: Snapshot) -> int:
        pages.append(StatusPage(lambda: shown, "127.0.0.1", 0))
        return pages[-1].start()

    yield start
    for served in pages:
        served.close()


def _ask(
    port: int, path: str = "/", method: str = "GET", **headers: str
) -> tuple[http.client.HTTPResponse, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer, text


def _metrics(text: str) -> dict[tuple[str, str], float]:
    """Returns every sample by its name and its label's value."""
    return {
        (sample.name, "".join(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_json_holds_the_numbers_of_the_snapshot(serve):
    answer, text = _ask(serve(snapshot()), "/status.json")
    found = json.loads(text)
    assert answer.getheader("content-type") == "application/json"
    assert found.pop("format") == "fedpeft-status/1"
    assert found == {
        "run": "5f0c9a12d4e84b71",
        "state": "running",
        "server_round": 2,
        "rounds": 20,
        "metric": "accuracy",
        "value": 0.51,
        "records": [record(1), record(2)],
        "connected": ["hospital-a", "hospital-b"],
        "expected": 3,
        "codes": {"late": 5, "unknown-client": 2},
        "privacy": PRIVACY,
        "started": 1_000_000_000.0,
        "seconds_left": 126.0,
        "hides_clients": False,
        "bytes_up": 60,
        "bytes_down": 800,
    }


def test_the_page_shows_them(serve):
    answer, text = _ask(serve(snapshot()))
    assert answer.getheader("content-type") == "text/html; charset=utf-8"
    for words in (
        "<title>Round 2 of 20, running",
        "2 <small>of 20 rounds</small>",
        '<rect class="done" width="10.0"',  # of the rounds
        '<rect class="done" width="25.0"',  # of the target epsilon
        '<span id="spent">2.000</span> <small>of epsilon 8 spent',
        "epsilon 7.500",
        'one example, <span class="whole">add-or-remove-one',
        "<dd>1e-05</dd>",
        '<dd id="left">2 min 6 s</dd>',
        "<dd>2001-09-09 01:46 UTC</dd>",
        '<dd id="up">60 B</dd>',
        '<dd id="down">800 B</dd>',
        "<li>hospital-a</li>",
        "<td>3 of 4</td>",
        "<code>unknown-client</code></th><td>2</td>",
        'aria-label="accuracy by round: 0.5000 after round 1, 0.5100 after round 2',
    ):
        assert words in text, words


def test_metrics_are_prometheus_and_of_the_run_alone(serve):
    answer, text = _ask(serve(snapshot()), "/metrics")
    assert answer.getheader("content-type").startswith("text/plain; version=0.0.4")
    others = ("waiting", "stopping", "complete", "stopped")
    assert _metrics(text) == {
        ("fedpeft_run_info", "5f0c9a12d4e84b71"): 1,
        **{("fedpeft_state", name): 0 for name in others},
        ("fedpeft_state", "running"): 1,
        ("fedpeft_round", ""): 2,
        ("fedpeft_rounds", ""): 20,
        ("fedpeft_clients_connected", ""): 2,
        ("fedpeft_clients_expected", ""): 3,
        ("fedpeft_cohort_size", ""): 4,
        ("fedpeft_replies", ""): 3,
        ("fedpeft_round_seconds", ""): 7,
        ("fedpeft_epsilon_target", ""): 8,
        ("fedpeft_epsilon_planned", ""): 7.5,
        ("fedpeft_epsilon_spent", ""): 2,
        ("fedpeft_metric", "accuracy"): 0.51,
        ("fedpeft_bytes_up_total", ""): 60,
        ("fedpeft_bytes_down_total", ""): 800,
        ("fedpeft_refusals_total", "late"): 5,
        ("fedpeft_refusals_total", "unknown-client"): 2,
        ("fedpeft_start_time_seconds", ""): 1_000_000_000,
    }


def test_at_client_level_nothing_that_depends_on_a_cohort_leaves(serve):
    """Two runs that differ in all that is secret give the same bytes, in every form."""
    secrets = record(2, cohort_size=97, replies=96, failures=95, who="hospital-a")
    told = snapshot(
        privacy=CLIENT_LEVEL,
        seconds_left=92.0,
        codes={"failed": 91, "late": 90},
        records=[record(1), secrets],
    )
    hidden = dict.fromkeys(record(1))
    untold = snapshot(
        privacy=CLIENT_LEVEL,
        seconds_left=None,
        codes={},
        records=[{**hidden, "round": n, "metric": record(n)["metric"]} for n in (1, 2)],
    )
    assert page.render(view(told), 1e9) == page.render(view(untold), 1e9)
    ports = serve(told), serve(untold)
    for path in ("/status.json", "/metrics"):
        texts = [_ask(port, path)[1] for port in ports]
        assert texts[0] == texts[1]
    assert "How many answered is the server" in _ask(ports[0])[1]
    metrics = _metrics(_ask(ports[0], "/metrics")[1])
    assert ("fedpeft_bytes_up_total", "") not in metrics
    assert ("fedpeft_epsilon_spent", "") in metrics


def test_at_client_level_codes_of_clients_never_asked_stay(serve):
    codes = {"unknown-client": 2, "superseded": 1, "too-large": 1, "no-slot": 3}
    _, text = _ask(serve(snapshot(privacy=CLIENT_LEVEL, codes=codes)), "/status.json")
    assert json.loads(text)["codes"] == {"no-slot": 3, "unknown-client": 2}


def test_keys_that_are_not_known_to_be_public_are_dropped():
    privacy = {**PRIVACY, "seed": 7}
    shown = view(snapshot(privacy=privacy, records=[record(1, who=["hospital-a"])]))
    assert "seed" not in shown["privacy"]
    assert "who" not in shown["records"][0]


def test_names_and_codes_are_escaped(serve):
    bad = "<script>alert('&')</script>"
    shown = snapshot(run=bad, metric=bad, connected=[bad], codes={bad: 1})
    port = serve(shown)
    assert "<script" not in _ask(port)[1].lower()
    assert _metrics(_ask(port, "/metrics")[1])["fedpeft_refusals_total", bad] == 1


@pytest.mark.parametrize("path", PATHS)
def test_every_answer_has_the_headers(serve, path):
    port = serve(snapshot())
    for method, expected in (("GET", 200), ("HEAD", 200), ("POST", 405), ("PUT", 405)):
        answer, text = _ask(port, path, method)
        assert answer.status == expected
        assert (text != "") == (method != "HEAD")
        headers = dict(answer.getheaders())
        policy = headers["content-security-policy"]
        assert policy.startswith(f"default-src 'none'; style-src {page.STYLE_HASH};")
        assert headers["cache-control"] == "no-store"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert "server" not in headers
        assert "access-control-allow-origin" not in headers


@pytest.mark.parametrize("path", ["/docs", "/redoc", "/openapi.json", "/x", "//"])
def test_there_is_nothing_else(serve, path):
    assert _ask(serve(snapshot()), path)[0].status == 404


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200),
        ("localhost:9000", 200),
        ("LOCALHOST", 200),
        ("[::1]", 200),
        ("[::1]:8080", 200),
        ("evil.example", 421),
        ("evil.example:8080", 421),
        ("127.0.0.1.evil.example", 421),
        ("", 421),
    ],
)
def test_on_loopback_only_its_own_names_are_answered(serve, host, status):
    answer, _ = _ask(serve(snapshot()), "/status.json", Host=host)
    assert answer.status == status
    assert answer.getheader("cache-control") == "no-store"


def test_elsewhere_any_name_is_answered():
    served = StatusPage(snapshot, "0.0.0.0", 0)
    try:
        assert _ask(served.start(), Host="fl.example.org")[0].status == 200
    finally:
        served.close()


def test_a_server_that_cannot_read_its_run_says_no_more_than_that():
    def broken() -> Snapshot:
        raise ValueError("a record of hospital-a")

    served = StatusPage(broken, "127.0.0.1", 0)
    try:
        answer, text = _ask(served.start(), "/status.json")
    finally:
        served.close()
    assert (answer.status, text) == (500, "Internal Server Error")
    assert answer.getheader("cache-control") == "no-store"


def test_a_port_in_use_is_one_clear_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        second = StatusPage(snapshot, "127.0.0.1", port)
        with pytest.raises(RunError, match=f"port {port}, got: Address already in use"):
            second.start()
        second.close()


def test_closing_ends_the_thread_and_frees_the_port():
    first = StatusPage(snapshot, "127.0.0.1", 0)
    port = first.start()
    assert "status-page" in {thread.name for thread in threading.enumerate()}
    kept = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    kept.request("GET", "/healthz")  # and stays open
    assert kept.getresponse().read() == b"ok\n"
    first.close()
    first.close()
    kept.close()
    assert "status-page" not in {thread.name for thread in threading.enumerate()}
    second = StatusPage(snapshot, "127.0.0.1", port)
    assert second.start() == port
    second.close()


def test_numbers_that_json_does_not_know_are_named(serve):
    records = [record(1, metric=float("nan"))]
    endless = {**PRIVACY, "spent_epsilon": float("inf")}
    port = serve(snapshot(records=records, privacy=endless))
    found = json.loads(_ask(port, "/status.json")[1])
    assert (found["value"], found["privacy"]["spent_epsilon"]) == ("nan", "inf")
    text = _ask(port)[1]
    assert '<span id="spent">unbounded</span>' in text
    assert '<rect class="over" width="100.0"' in text
    assert "Nothing judged yet." in text


@pytest.mark.parametrize("state", ["waiting", "running", "stopping"])
def test_a_page_asks_to_be_loaded_again_while_something_can_change(state):
    assert '<meta http-equiv="refresh"' in page.render(view(snapshot(state=state)), 1e9)


@pytest.mark.parametrize("state", ["complete", "stopped"])
def test_the_last_page_stays_after_the_server_has_gone(state):
    text = page.render(view(snapshot(20, state=state)), 1e9)
    assert '<meta http-equiv="refresh"' not in text
    assert "Time left" not in text


def test_a_run_without_privacy_says_so_in_red():
    for privacy in (None, {"unit": "none", "relation": "none"}):
        text = page.render(view(snapshot(0, privacy=privacy)), 1e9)
        assert '<p class="red">This run has no differential privacy' in text


def test_seeded_noise_is_red():
    text = page.render(view(snapshot(privacy={**PRIVACY, "noise": "seeded"})), 1e9)
    assert '<dd id="noise" class="red">seeded: whoever knows the seed' in text


def test_of_many_rounds_the_latest_twenty_are_listed_newest_first():
    text = page.render(view(snapshot(50)), 1e9)
    rows = [f'<th scope="row">{number}</th><td>' for number in range(50, 30, -1)]
    assert [text.index(row) for row in rows] == sorted(text.index(row) for row in rows)
    assert '<th scope="row">30</th><td>' not in text
    assert "The latest 20 of 50 rounds" in text


def test_the_curve_of_a_long_run_is_thinned_and_keeps_its_end():
    records = [{"round": n, "metric": n / 1000} for n in range(1, 1001)]
    curve = page.draw("accuracy", records, 1000)
    assert 300 <= len(curve.points) <= 400
    assert curve.points[-1] == "100,0"
    assert curve.dots == ["100,0"]


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0, -3.25, 1e6])
def test_one_value_makes_a_curve_too(value):
    (point,) = page.draw("loss", [{"round": 1, "metric": value}], 2).points
    x, y = map(float, point.split(","))
    assert x == 50
    assert 0 <= y <= 100


def _luminance(colour: str) -> float:
    """WCAG 2.2's relative luminance of ``#rrggbb``."""
    shares = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (
        share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4
        for share in shares
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_text_has_the_contrast_of_wcag_aa_in_light_dark_and_print():
    text = page.render(view(snapshot()), 1e9)
    palettes = [
        dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", block))
        for block in re.findall(r":root \{(.*?)\}", text, re.DOTALL)
    ]
    assert len(palettes) == 3
    for palette in palettes:
        paper = _luminance(palette["paper"])
        for name in ("ink", "quiet", "blue", "red"):
            light, dark = sorted((paper, _luminance(palette[name])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, name


def test_examples_in_the_page_hold():
    assert doctest.testmod(page).failed == 0


def _status(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from fedpeft.cli import main; main()", "status"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True)


def test_the_command_prints_a_short_table(serve):
    done = _status(f"http://127.0.0.1:{serve(snapshot(codes={}))}/")
    assert done.returncode == 0, done.stderr
    rows = [line.strip("│").split("│") for line in done.stdout.splitlines()[1:-1]]
    assert [(left.strip(), right.strip()) for left, right in rows] == [
        ("run", "5f0c9a12d4e84b71"),
        ("state", "running"),
        ("round", "2 of 20"),
        ("accuracy", "0.5100"),
        ("time left, about", "2 min 6 s"),
        ("unit of privacy", "one example, add-or-remove-one"),
        ("epsilon spent", "2.000 of 8"),
        ("epsilon planned", "7.500"),
        ("delta", "1e-05"),
        ("clients connected", "2 of 3"),
        ("bytes up", "60 B"),
        ("bytes down", "800 B"),
    ]


def test_the_command_prints_the_json_as_it_came(serve):
    done = _status(f"http://127.0.0.1:{serve(snapshot())}", "--json")
    assert json.loads(done.stdout) == json.loads(json.dumps(view(snapshot())))


def test_the_command_says_in_one_line_when_nobody_answers(serve):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        free = taken.getsockname()[1]
    port = serve(snapshot())
    for url, words in (
        (f"http://127.0.0.1:{free}", "(Connection refused); start `fedpeft server`"),
        (f"http://127.0.0.1:{port}/healthz", "is no fedpeft server of this version"),
        ("file:///etc/passwd", "Expected an address such as http://127.0.0.1:8080"),
    ):
        done = _status(url)
        assert (done.returncode, done.stdout) == (2, "")
        (line,) = done.stderr.splitlines()
        assert words in line
