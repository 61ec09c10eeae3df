"""PatchGAN against the published implementation (discriminator.*)."""

import pytest
import torch
from parity.fill import fill, tensors

from repae_core.models import build_discriminator

T = tensors("discriminator")


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_logits_gradient_and_buffers(mode):
    model = fill(build_discriminator()).train(mode == "train")
    image = T["in.image"].clone().requires_grad_()
    logits = model(image)
    (-logits.mean()).backward()
    torch.testing.assert_close(logits.detach(), T[f"logits.{mode}"], atol=1e-5, rtol=0)
    torch.testing.assert_close(image.grad, T[f"grad_image.{mode}"], atol=1e-6, rtol=1e-4)
    if mode == "train":
        state = model.state_dict()
        for key, value in T.items():
            if key.startswith("after_train."):
                torch.testing.assert_close(state[key.removeprefix("after_train.")], value, atol=1e-5, rtol=0)
