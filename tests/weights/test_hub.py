"""The Hugging Face Hub, played by a server on this machine."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, constants, errors
from huggingface_hub.utils import disable_progress_bars

from learned_optim import LearnedOptimizer, Weights, WeightsError, WeightsNotFoundError
from learned_optim.weights import read_weights
from learned_optim.weights import weights as weights_module
from learned_optim.weights.file_format import MAX_BYTES, to_bytes
from tests.cases import make_params, small_rule
from tests.hub_stand_in import NEW, OLD, REPO, Hub, ask, close_session, redirect, serve

NOWHERE = "http://127.0.0.1:9"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    disable_progress_bars()
    with serve() as running:
        redirect(monkeypatch, running.url, tmp_path / "home")
        yield running
        close_session()  # Or its open connections would outlive the server.


@pytest.fixture
def published(hub: Hub) -> Weights:
    weights = Weights(small_rule(), "mine", "schema = 1\n", {"commit": "abc"})
    hub.files["model.safetensors"] = to_bytes(weights)
    return weights


def cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the network away: nobody answers, and no connection is left open."""
    ask(monkeypatch, NOWHERE)


def test_weights_are_named_by_the_commit_they_came_from(hub: Hub, published: Weights) -> None:
    (param,) = make_params([(3,)])
    optimizer = LearnedOptimizer([param], weights=REPO)
    group = optimizer.param_groups[0]
    assert (group["weights"], group["fingerprint"]) == (f"{REPO}@{OLD}", published.fingerprint)
    again = Weights.from_pretrained(group["weights"])
    assert (again.title, again.recipe, dict(again.metadata)) == ("mine", "schema = 1\n", {"commit": "abc"})
    assert again is next(iter(optimizer._weights.values()))


@pytest.mark.parametrize("pinned", [(f"{REPO}@{OLD}", {}), (REPO, {"revision": OLD}), (f"{REPO}@{OLD}", {"revision": OLD})])
def test_a_pinned_commit_needs_no_request_once_cached(
    hub: Hub, published: Weights, pinned: tuple[str, dict[str, Any]]
) -> None:
    name, options = pinned
    first = Weights.from_pretrained(name, **options)
    assert hub.requests
    hub.requests.clear()
    assert Weights.from_pretrained(name, **options) is first
    assert hub.requests == []


def test_a_branch_is_looked_up_each_time_and_followed(hub: Hub, published: Weights) -> None:
    assert Weights.from_pretrained(REPO).name == f"{REPO}@{OLD}"
    hub.commits[NEW] = {"model.safetensors": to_bytes(Weights(small_rule(seed=1)))}
    hub.branches |= {"main": NEW, "v1": OLD}
    assert Weights.from_pretrained(f"{REPO}@v1").fingerprint == published.fingerprint
    latest = Weights.from_pretrained(REPO)
    assert latest.name == f"{REPO}@{NEW}"
    assert latest.fingerprint != published.fingerprint


def test_options_reach_the_client(hub: Hub, published: Weights, tmp_path: Path) -> None:
    hub.token = "secret"
    options: dict[str, Any] = {"token": "secret", "cache_dir": tmp_path / "cache"}
    first = LearnedOptimizer.from_pretrained(REPO, make_params([(3,)]), lr=0.5, revision=OLD, **options)
    assert first.param_groups[0]["lr"] == 0.5
    assert (tmp_path / "cache").is_dir()
    assert not (tmp_path / "home" / "hub").exists()
    hub.requests.clear()
    Weights.from_pretrained(REPO, revision=OLD, force_download=True, **options)
    assert f"GET /{REPO}/resolve/{OLD}/model.safetensors" in hub.requests


def test_groups_use_the_token_but_not_the_revision(hub: Hub, published: Weights) -> None:
    hub.token = "secret"
    hub.branches["v1"] = OLD
    hub.commits[NEW] = {"model.safetensors": to_bytes(Weights(small_rule("paper-raw")))}
    hub.branches["main"] = NEW
    first, second = make_params([(3,), (2,)])
    groups: list[dict[str, Any]] = [{"params": [first]}, {"params": [second], "weights": REPO}]
    optimizer = LearnedOptimizer(groups, weights=REPO, revision="v1", token="secret")
    assert [group["weights"] for group in optimizer.param_groups] == [f"{REPO}@{OLD}", f"{REPO}@{NEW}"]


def test_an_outage_does_not_take_away_what_is_cached(hub: Hub, published: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    Weights.from_pretrained(REPO)
    cut_off(monkeypatch)
    for name in (f"{REPO}@{OLD}", REPO):
        assert Weights.from_pretrained(name).fingerprint == published.fingerprint
    with pytest.raises(WeightsError, match="could not be used"):
        Weights.from_pretrained(REPO, force_download=True)
    assert Weights.from_pretrained(REPO).fingerprint == published.fingerprint


NOT_FOUND = {
    "repository": (
        "me/nothing",
        {},
        "no repository me/nothing on the Hub.*nor a file here.*token",
        "RepositoryNotFoundError",
    ),
    "revision": (f"{REPO}@v9", {}, "me/rule on the Hub has no revision 'v9'", "RevisionNotFoundError"),
    "revision apart": (REPO, {"revision": "v9"}, "me/rule on the Hub has no revision 'v9'", "RevisionNotFoundError"),
    "file": (REPO, {}, r"me/rule on the Hub holds no model\.safetensors", "EntryNotFoundError"),
    "local": (
        REPO,
        {"local_files_only": True},
        "not in the Hub cache, and local_files_only=True",
        "LocalEntryNotFoundError",
    ),
}


@pytest.mark.parametrize("kind", NOT_FOUND)
def test_what_is_not_there_is_explained(hub: Hub, kind: str) -> None:
    name, options, message, cause = NOT_FOUND[kind]
    with pytest.raises(WeightsNotFoundError, match=message) as caught:
        LearnedOptimizer(make_params([(3,)]), weights=name, **options)
    assert isinstance(caught.value.__cause__, getattr(errors, cause))


@pytest.mark.parametrize("forced", [False, True])
def test_a_model_on_the_hub_is_not_fetched(hub: Hub, published: Weights, forced: bool) -> None:
    if forced:
        Weights.from_pretrained(REPO)
        hub.requests.clear()
    hub.files["model.safetensors"] = bytes(MAX_BYTES + 1)
    with pytest.raises(WeightsError, match=f"model.safetensors of {REPO}@main has 16,777,217 bytes.*may hold a model"):
        Weights.from_pretrained(REPO, force_download=forced)
    assert hub.requests == [f"HEAD /{REPO}/resolve/main/model.safetensors"]


def test_a_pickle_on_the_hub_is_not_even_asked_for(hub: Hub) -> None:
    hub.files["pytorch_model.bin"] = b"\x80\x02."
    with pytest.raises(WeightsNotFoundError, match=r"holds no model\.safetensors"):
        Weights.from_pretrained(REPO)
    assert not any("pytorch_model" in request for request in hub.requests)


def test_no_network_is_explained(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_off(monkeypatch)
    start = time.monotonic()
    with pytest.raises(WeightsNotFoundError, match=r"cannot be reached \(Connect(ion)?Error.*available_weights") as caught:
        Weights.from_pretrained(REPO)
    assert time.monotonic() - start < 5, "the Hub's own client tries again for half a minute"
    assert isinstance(caught.value.__cause__, errors.LocalEntryNotFoundError)
    with pytest.raises(WeightsError, match=r"could not be used.*no file was changed, try again"):
        Weights(small_rule()).push_to_hub(REPO, token="t")


def test_offline_mode_is_explained(hub: Hub, published: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    close_session()
    with pytest.raises(WeightsNotFoundError, match=r"offline mode.*HF_HUB_OFFLINE"):
        Weights.from_pretrained(REPO)
    with pytest.raises(WeightsError, match=r"offline mode.*HF_HUB_OFFLINE"):
        Weights.from_pretrained(REPO, force_download=True)
    with pytest.raises(WeightsError, match=r"offline mode.*HF_HUB_OFFLINE"):
        published.push_to_hub(REPO, token="t")
    assert hub.requests == []


REFUSED = {
    "gated": ((403, "GatedRepo"), {}, "me/rule is gated: ask for access"),
    "forbidden": ((403, "No"), {"token": "right"}, "me/rule: the token may not do this"),
    "broken": ((500, "No"), {}, "cannot be reached"),
    "no token": (None, {"token": True}, "wants a valid token.*hf auth login"),
    "wrong token": (None, {"token": "wrong"}, "wants a valid token.*hf auth login"),
    "wrong token, forced": (None, {"token": "wrong", "force_download": True}, "wants a valid token.*hf auth login"),
    "contradiction": (None, {"local_files_only": True, "force_download": True}, "drop one"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_refused_download_is_explained(hub: Hub, published: Weights, kind: str) -> None:
    hub.error, options, message = REFUSED[kind]
    hub.token = "right"
    with pytest.raises(WeightsError, match=message):
        Weights.from_pretrained(REPO, **options)


def test_a_refused_push_is_explained(hub: Hub, published: Weights) -> None:
    hub.token = "right"
    with pytest.raises(WeightsError, match="me/rule: the Hub wants a valid token"):
        published.push_to_hub(REPO, token="wrong")
    hub.error = (403, "No")
    with pytest.raises(WeightsError, match="me/rule: the token may not do this"):
        published.push_to_hub(REPO, token="right")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (f"{REPO}@a", {"revision": "b"}, "names revision 'a', but revision='b' was given too"),
        ("default", {"revision": "b"}, "revision='b' is for weights on the Hub, and 'default' is not there"),
        ("me/a--b", {}, "'me/a--b' is not a Hub id"),
    ],
)
def test_impossible_ids_are_refused_without_a_request(hub: Hub, name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        Weights.from_pretrained(name, **options)
    assert hub.requests == []


def test_what_the_hub_holds_is_checked_like_any_file(hub: Hub) -> None:
    hub.files["model.safetensors"] = b"not weights"
    with pytest.raises(WeightsError, match=f"model.safetensors of {REPO}@{OLD} is truncated.*force_download=True"):
        Weights.from_pretrained(REPO)


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # The client's own, at its LFS upload.
@pytest.mark.parametrize("mode", ["regular", "lfs"])
def test_pushed_weights_come_back(hub: Hub, tmp_path: Path, mode: str) -> None:
    hub.upload_mode, hub.token = mode, "secret"
    Weights(small_rule(), "mine", "schema = 1\n", {"commit": "abc"}).save(tmp_path / "private-place.safetensors")
    weights = Weights.from_pretrained(tmp_path / "private-place.safetensors")
    pinned = weights.push_to_hub(REPO, token="secret")
    assert pinned == f"{REPO}@{NEW}"
    assert set(hub.files) == {"model.safetensors", "config.json", "README.md"}
    assert bool(hub.uploads) == (mode == "lfs")
    assert hub.message == "Publish update rule mine"
    assert not any(b"private-place" in content for content in hub.files.values())
    assert json.loads(hub.files["config.json"]) == {
        "format_version": 1,
        "family": "adam-modulation",
        **json.loads(json.dumps(weights.rule.config.to_dict())),
    }
    back = Weights.from_pretrained(pinned, token="secret")
    assert (back.fingerprint, back.title, back.recipe) == (weights.fingerprint, "mine", "schema = 1\n")
    assert back.metadata == weights.metadata
    assert read_weights(tmp_path / "private-place.safetensors").rule.config == back.rule.config


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # The client's own, at its LFS upload.
@pytest.mark.parametrize(("mode", "storage", "message"), [("nonsense", 200, "could not be used"), ("lfs", 403, "me/rule: ")])
def test_a_failed_upload_leaves_the_repository_as_it_was(
    hub: Hub, published: Weights, mode: str, storage: int, message: str
) -> None:
    hub.upload_mode, hub.storage_status = mode, storage
    before = dict(hub.files)
    with pytest.raises(WeightsError, match=message):
        Weights(small_rule(seed=1)).push_to_hub(REPO, token="t")
    assert hub.files == before


def test_a_card_that_cannot_be_made_is_not_blamed_on_the_hub(
    hub: Hub, published: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = dict(hub.files)
    monkeypatch.setattr(weights_module, "model_card", lambda *_: {}["no such row"])
    with pytest.raises(KeyError, match="no such row"):
        Weights(small_rule(seed=1)).push_to_hub(REPO, token="t")
    assert hub.files == before


def test_unusable_weights_are_not_pushed(hub: Hub) -> None:
    rule = small_rule()
    torch.nn.init.constant_(rule.readout.bias, float("inf"))
    with pytest.raises(WeightsError, match="NaN or Inf"):
        Weights(rule).push_to_hub(REPO, token="t")
    assert hub.requests == []


def test_the_card_says_what_the_rule_costs_and_where_it_comes_from(hub: Hub) -> None:
    recipe = '# a "fence": ```\nschema = 1'
    weights = Weights(small_rule(), "a | b\nc", recipe, {"commit": "abc", "license": "mit", "note": "x|y\nz"})
    weights.push_to_hub(REPO, token="t")
    text = hub.files["README.md"].decode()
    head = ModelCard(text).data.to_dict()
    assert (head["library_name"], head["license"]) == ("learned-optim", "mit")
    assert {"learned-optimizer", "pytorch"} <= set(head["tags"])
    for expected in (
        "# a \\| b c: a learned update rule",
        f'weights="{REPO}")',
        f'weights="{REPO}@<40 hex',
        "| family | adam-modulation |",
        "| hidden_size | 8 |",
        "| note | x\\|y z |",
        f"| fingerprint | {weights.fingerprint} |",
        f"````toml\n{recipe}\n````\n",
    ):
        assert expected in text
    for dtype, sentence in (
        (torch.float32, "{} bytes, or"),
        (torch.bfloat16, "{} with `state_dtype=torch.bfloat16`"),
        (torch.int8, "{} with `state_dtype=torch.int8`"),
    ):
        (param,) = make_params([(10,)])
        optimizer = LearnedOptimizer([param], weights=weights, state_dtype=dtype)
        param.grad = torch.ones(10)
        optimizer.step()
        held = sum(value.nbytes for name, value in optimizer.state[param].items() if name != "step")
        assert sentence.format(held // 10) in text.replace("\n", " ")


def test_a_licence_that_nobody_stated_is_not_invented(hub: Hub) -> None:
    Weights(small_rule()).push_to_hub(REPO, token="t")
    assert ModelCard(hub.files["README.md"].decode()).data.to_dict()["license"] == "unknown"


def test_a_fresh_process_works_offline_from_the_cache(hub: Hub, published: Weights, tmp_path: Path) -> None:
    Weights.from_pretrained(f"{REPO}@{OLD}")
    hub.requests.clear()
    code = f"""
import sys
import time
import torch
from learned_optim import LearnedOptimizer, Weights, WeightsNotFoundError
LearnedOptimizer([torch.nn.Parameter(torch.ones(2))])
assert "huggingface_hub" not in sys.modules, "bundled weights need no Hub"
print(Weights.from_pretrained("{REPO}@{OLD}").fingerprint)
try:
    Weights.from_pretrained("{REPO}@{NEW}")
except WeightsNotFoundError as error:
    print(error)
"""
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.url}
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**kept, **environment}, capture_output=True, text=True, timeout=60, check=True
    )
    first, second = done.stdout.splitlines()
    assert first == published.fingerprint
    assert "offline mode (HF_HUB_OFFLINE)" in second
    assert hub.requests == []
