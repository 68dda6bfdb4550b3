"""Which hosts there are, whether they answer, and how long that may take: against a hub on localhost."""

import io
import socket
import time

import pytest
from stub_server import StubHub

from embedding_tutorial import network
from embedding_tutorial.files import TutorialError

pytestmark = pytest.mark.usefixtures("no_hub")


@pytest.fixture
def hf(monkeypatch):
    with StubHub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub


@pytest.fixture
def modelscope(monkeypatch):
    with StubHub() as hub:
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", hub.url)
        yield hub


def test_can_reach_hub_hugging_face_first(hf, modelscope):
    assert network.can_reach_hub() == (True, f"{hf.url} answers")
    assert hf.requests == [("HEAD", "/", None)] and not modelscope.requests


def test_can_reach_hub_modelscope_second(hf, modelscope):
    hf.down = True
    assert network.can_reach_hub() == (True, f"{modelscope.url} answers")


def test_can_reach_hub_neither():
    reachable, reason = network.can_reach_hub()
    assert not reachable and reason.count("Connection refused") == 2


def test_can_reach_hub_offline_makes_no_call(monkeypatch, hf):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert network.can_reach_hub() == (False, "HF_HUB_OFFLINE is set")
    assert not hf.requests


def test_can_reach_hub_silent_host_costs_no_more_than_the_timeout(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts and never answers
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.monotonic()
        reachable, reason = network.can_reach_hub(timeout=0.5)
        assert not reachable and time.monotonic() - start < 1.5


def test_can_reach_hub_slow_name_server_costs_no_more_than_the_timeout(monkeypatch):
    from threading import Event

    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: Event().wait(3))
    start = time.monotonic()
    reachable, reason = network.can_reach_hub(timeout=0.3)
    assert not reachable and time.monotonic() - start < 1
    assert reason.count("no answer within 0.3 s") == 2


def test_endpoints_without_variables_are_the_public_ones(monkeypatch):
    for name in ("HF_ENDPOINT", "MODELSCOPE_ENDPOINT"):
        monkeypatch.delenv(name)
    assert network.hf_endpoint() == "https://huggingface.co"
    assert network.modelscope_endpoint() == "https://www.modelscope.cn"
    monkeypatch.setenv("MODELSCOPE_DOMAIN", "www.modelscope.ai")
    assert network.modelscope_endpoint() == "https://www.modelscope.ai"


@pytest.mark.parametrize(
    ("name", "value", "offline"),
    [
        ("HF_HUB_OFFLINE", "1", True),
        ("HF_HUB_OFFLINE", "true", True),
        ("TRANSFORMERS_OFFLINE", "yes", True),
        ("HF_HUB_OFFLINE", "0", False),
        ("HF_HUB_OFFLINE", "", False),
    ],
)
def test_hub_offline_reads_the_switches_of_the_clients(monkeypatch, name, value, offline):
    assert not network.hub_offline()
    monkeypatch.setenv(name, value)
    assert network.hub_offline() is offline


def test_the_cache_is_where_the_clients_look(monkeypatch, tmp_path):
    assert network.hf_cache() == network.hf_home() / "hub" == tmp_path / "home" / "hf_home" / "hub"
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    assert network.hf_cache() == tmp_path / "cache"
    monkeypatch.delenv("HF_HOME")
    assert network.hf_home() == tmp_path / "home" / "xdg_cache_home" / "huggingface"


def test_a_small_file_that_takes_too_long_is_given_up(monkeypatch):
    with StubHub(raw={"/file": b"x" * 1000}) as hub:
        network.fetch_small(f"{hub.url}/file", out := io.BytesIO())
        assert out.getvalue() == b"x" * 1000
        monkeypatch.setattr(network, "HTTP_TOTAL_S", -1)
        with pytest.raises(TimeoutError, match="not finished after -1 s"):
            network.fetch_small(f"{hub.url}/file", io.BytesIO())


def test_one_line_says_what_went_wrong():
    class Listed(Exception):
        failed_files = {"weights.bin": ValueError("wrong\n  length.")}

    assert network.cause_of(Listed()) == "weights.bin: ValueError: wrong length"
    assert network.cause_of(TutorialError("the remedy.")) == "the remedy"
    assert network.cause_of(KeyError()) == "KeyError: "
