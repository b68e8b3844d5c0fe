import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from learned_optim import Weights
from tests.cases import small_rule
from tests.hub_stand_in import COMMIT, Hub, serve

PRELUDE = """
from learned_optim import LearnedOptimizer, Weights, WeightsError
def attempt(make):
    try:
        print("ok", make().fingerprint)
    except WeightsError as error:
        print("WeightsError", error)
"""

Run = Callable[..., str]


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve() as running:
        yield running


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run code in a process of its own: the Hub's settings are read when it is imported."""

    def run_code(code: str, url: str, **environment: str) -> str:
        settings = {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        done = subprocess.run(
            [sys.executable, "-c", PRELUDE + code],
            env={**os.environ, **settings, **environment},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    return run_code


@pytest.fixture
def published(hub: Hub, tmp_path: Path) -> Weights:
    weights = Weights(small_rule(), "mine")
    weights.save(tmp_path / "w.safetensors")
    hub.files["model.safetensors"] = (tmp_path / "w.safetensors").read_bytes()
    return weights


def test_a_pinned_revision_needs_no_request_once_cached(hub: Hub, run: Run, published: Weights) -> None:
    load = f"attempt(lambda: Weights.from_pretrained('me/rule@{COMMIT}'))"
    assert run(load, hub.url) == f"ok {published.fingerprint}\n"
    assert hub.requests
    hub.requests.clear()
    assert run(load, hub.url) == f"ok {published.fingerprint}\n"
    assert run(load, hub.url, HF_HUB_OFFLINE="1") == f"ok {published.fingerprint}\n"
    assert hub.requests == []


def test_the_optimizer_loads_a_branch_with_a_token(hub: Hub, run: Run, published: Weights) -> None:
    hub.token = "secret"
    code = """
import torch
p = torch.nn.Parameter(torch.ones(2))
opt = LearnedOptimizer([p], weights="me/rule", token="secret")
print(opt.param_groups[0]["fingerprint"], opt.param_groups[0]["weights"])
attempt(lambda: Weights.from_pretrained("me/rule", token="wrong", force_download=True))
"""
    output = run(code, hub.url)
    assert output.startswith(f"{published.fingerprint} me/rule\nWeightsError 'me/rule' cannot be fetched: 401")


FAILURES = [
    ("me/nothing", "", "there is no Hub repository 'me/nothing' that you may see"),
    ("me/rule@feature", "", "'me/rule' has no revision 'feature'"),
    ("me/rule", ", revision='feature'", "'me/rule' has no revision 'feature'"),
    ("me/rule", "", "holds no model.safetensors: not learned-optim weights"),
    ("me/rule", ", local_files_only=True", "is not cached and the Hub cannot be reached"),
    ("me/rule@a", ", revision='b'", "names revision 'a', but revision='b' was given too"),
]


def test_every_failure_says_what_to_do(hub: Hub, run: Run) -> None:
    code = "\n".join(f"attempt(lambda: Weights.from_pretrained({w!r}{options}))" for w, options, _ in FAILURES)
    lines = run(code, hub.url).splitlines()
    for line, (_, _, message) in zip(lines, FAILURES, strict=True):
        assert line.startswith("WeightsError")
        assert message in line


def test_offline_and_not_cached(run: Run) -> None:
    output = run("attempt(lambda: Weights.from_pretrained('me/rule'))", "http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    assert "is not cached and the Hub cannot be reached" in output


def test_pushed_weights_come_back_with_a_card(hub: Hub, run: Run, tmp_path: Path) -> None:
    weights = Weights(small_rule(), "mine", recipe='schema = 1\n', metadata={"commit": "abc"})
    weights.save(tmp_path / "mine.safetensors")
    code = f"""
oid = Weights.from_pretrained({str(tmp_path / "mine.safetensors")!r}).push_to_hub("me/rule", token="t")
attempt(lambda: Weights.from_pretrained("me/rule@" + oid))
"""
    assert run(code, hub.url) == f"ok {weights.fingerprint}\n"
    assert json.loads(hub.files["config.json"])["family"] == "adam-modulation"
    card = hub.files["README.md"].decode()
    for expected in ("library_name: learned-optim", "license: mit", "schema = 1", weights.fingerprint, 'weights="me/rule"'):
        assert expected in card
