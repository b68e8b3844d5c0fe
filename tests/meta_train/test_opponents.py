"""Muon as its authors advise, and our rule without its LSTM."""

import copy

import pytest
import torch
from torch import nn

from meta_train.judging.baselines import NOMINAL, Setting
from meta_train.judging.opponents import MuonAndAdamW, nominal_rule
from meta_train.tasks.modules import CharTransformer, conv_net


def _with_grads(module: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for param in module.parameters():
        param.grad = torch.randn(param.shape, generator=generator)
    return module


def test_muon_moves_hidden_matrices_and_adamw_the_rest() -> None:
    module = CharTransformer(7, 6, 16, 1)
    optimizer = MuonAndAdamW(module.named_parameters(), lr=0.1)
    hidden, rest = ({id(param) for param in group["params"]} for group in optimizer.param_groups)
    names = {name for name, param in module.named_parameters() if id(param) in hidden}
    assert names == {f"blocks.0.{layer}.weight" for layer in ("qkv", "out", "up", "down")}
    assert len(hidden) + len(rest) == len(list(module.parameters()))


def test_a_convolution_moves_as_torch_s_muon_moves_it_flattened() -> None:
    module = conv_net([3, 4, 5], 8, 10, batch_norm=False)
    matrices = [param for param in module.parameters() if param.dim() >= 2]
    alone = [nn.Parameter(param.detach().clone().flatten(1)) for param in matrices[:-1]]
    others = [
        nn.Parameter(param.detach().clone()) for param in (matrices[-1], *(p for p in module.parameters() if p.dim() < 2))
    ]
    optimizer = MuonAndAdamW(module.named_parameters(), lr=0.1)
    muon = torch.optim.Muon(alone, lr=0.1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, lr=0.1, weight_decay=0.0)
    for step in range(3):
        _with_grads(module, step)
        for mine, theirs in zip(matrices[:-1], alone, strict=True):
            theirs.grad = mine.grad.flatten(1)
        for mine, theirs in zip((matrices[-1], *(p for p in module.parameters() if p.dim() < 2)), others, strict=True):
            theirs.grad = mine.grad
        for one in (optimizer, muon, adamw):
            one.step()
    for mine, theirs in zip(matrices[:-1], alone, strict=True):
        assert torch.equal(mine.flatten(1), theirs)
    assert torch.equal(matrices[-1], others[0])


def test_a_decay_reaches_both_parts_of_muon() -> None:
    module = _with_grads(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))
    setting = Setting("Muon+cosine", 0.1)
    optimizer = setting.make(module.named_parameters())
    assert setting.schedule is not None
    scheduler = setting.schedule(optimizer, 1)
    optimizer.step()
    scheduler.step()
    before = [param.clone() for param in module.parameters()]
    optimizer.step()
    assert all(torch.equal(param, old) for param, old in zip(module.parameters(), before, strict=True))


def test_a_model_of_one_matrix_is_all_readout() -> None:
    line, other = (_with_grads(nn.Linear(3, 1)) for _ in range(2))
    other.load_state_dict(line.state_dict())
    MuonAndAdamW(line.named_parameters(), lr=0.1).step()
    torch.optim.AdamW(other.parameters(), lr=0.1, weight_decay=0.0).step()
    assert torch.equal(line.weight, other.weight)


def test_the_nominal_opponent_is_default_with_nothing_learned_and_known_by_its_rule() -> None:
    weights = nominal_rule()
    assert not any(param.any() for param in weights.rule.parameters())
    assert weights.fingerprint in Setting(NOMINAL, 1.0).identity
    assert Setting("Adam", 1.0).identity == "Adam lr=1"
    module = _with_grads(nn.Linear(4, 4))
    twice, before = copy.deepcopy(module), copy.deepcopy(module.weight)
    for one, lr in ((module, 1.0), (twice, 2.0)):
        _with_grads(one)
        Setting(NOMINAL, lr).make(one.named_parameters()).step()
    torch.testing.assert_close(twice.weight - before, 2 * (module.weight - before), rtol=1e-4, atol=1e-7)
    assert (module.weight != before).all()


@pytest.mark.parametrize("name", ["Muon", "Muon+cosine", NOMINAL])
def test_parameters_without_names_are_taken_too(name: str) -> None:
    module = _with_grads(nn.Linear(3, 1))
    before = module.weight.clone()
    Setting(name, 0.1).make(module.parameters()).step()
    assert not torch.equal(module.weight, before)
