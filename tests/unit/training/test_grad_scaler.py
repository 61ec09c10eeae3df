"""fp16's gradient scaler, one an optimizer, on the CPU (torch's scaler is the same code on a GPU)."""

import torch

from repae_core.training.optim import Network


def linear(*, grad_scale: bool, value: float = 1.0) -> Network:
    layer = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.constant_(layer.weight, value)
    return Network(layer, layer, learning_rate=0.1, grad_scale=grad_scale)


def loss_of(network: Network, factor: float = 3.0) -> torch.Tensor:
    return factor * network.forward(torch.ones(1, 2)).sum()


def test_the_gradient_is_unscaled_before_it_is_clipped():
    scaled, plain = linear(grad_scale=True), linear(grad_scale=False)
    norms = []
    for network in (scaled, plain):
        network.backward(loss_of(network))
        norms.append(float(network.step(1.0)))
    assert norms[0] == norms[1]
    assert torch.equal(scaled.module.weight, plain.module.weight)


def test_small_gradients_are_scaled_up_in_the_backward_pass():
    network = linear(grad_scale=True)
    network.backward(loss_of(network))
    assert float(network.module.weight.grad[0, 0]) == 3.0 * network.scaler.get_scale()


def test_an_overflow_skips_this_optimizer_and_lowers_only_its_scale():
    hurt, fine = linear(grad_scale=True), linear(grad_scale=True)
    for network, factor in ((hurt, float("inf")), (fine, 3.0)):
        network.backward(loss_of(network, factor))
    before, scale = hurt.module.weight.clone(), hurt.scaler.get_scale()
    hurt.step(1.0)
    fine.step(1.0)
    assert torch.equal(hurt.module.weight, before)
    assert not torch.equal(fine.module.weight, before)
    assert hurt.scaler.get_scale() == scale / 2
    assert fine.scaler.get_scale() == scale
    assert hurt.module.weight.grad is None
