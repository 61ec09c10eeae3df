"""The network of FID without its published weights: every weight is filled from its name."""

import math
import zlib

import numpy as np
import pytest
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from repae_core.evaluation import build_extractor
from repae_core.evaluation.inception import INCEPTION_SHA256, load_inception
from repae_core.remote_files import sha256_of


@torch.no_grad()
def filled(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Normals drawn from the crc32 of each name, at the scale that keeps activations alive."""
    for name, tensor in module.state_dict().items():
        if not tensor.is_floating_point():
            continue
        x = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()))).standard_normal(tuple(tensor.shape))
        if tensor.ndim >= 2:
            x *= math.sqrt(2 / tensor[0].numel())
        elif name.endswith(("running_var", "weight")):
            x = 1 + 0.1 * abs(x)
        tensor.copy_(torch.from_numpy(np.asarray(x, dtype=np.float32)))
    return module.state_dict()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A weights file, made without the download that the class does where it gets no file."""
    folder = tmp_path_factory.mktemp("inception")
    load = FeatureExtractorInceptionV3.load_state_dict
    FeatureExtractorInceptionV3.load_state_dict = lambda self, state: None
    try:
        torch.save({}, folder / "empty.pth")
        blank = FeatureExtractorInceptionV3("x", ["2048"], str(folder / "empty.pth"))
    finally:
        FeatureExtractorInceptionV3.load_state_dict = load
    torch.save(filled(blank), folder / "inception.pth")
    return folder / "inception.pth"


@pytest.fixture(autouse=True)
def no_download(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a download was tried")

    monkeypatch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", refuse)
    monkeypatch.setattr("socket.socket.connect", refuse)


@pytest.fixture(scope="module")
def images():
    return torch.randint(0, 256, (3, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_pool_and_logits_are_torch_fidelitys(weights, images):
    theirs = FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], str(weights))
    with torch.no_grad():
        pool, logits = theirs(images)
    ours = build_extractor("inception", str(weights))([images])
    assert torch.equal(ours.features, pool)
    assert torch.equal(ours.logits, logits)
    assert pool.std() > 0.01


def test_spatial_features_are_the_first_channels_of_the_1x1_branch(weights, images):
    """By hand up to Mixed_6c, then the branch: convolution, batch norm, ReLU; channels last, flattened."""
    network = load_inception(str(weights))
    inputs = []
    network.Mixed_6d.register_forward_pre_hook(lambda module, args: inputs.append(args[0].clone()))
    _, _, spatial = network(images)
    branch = network.Mixed_6d.branch1x1
    expected = torch.relu(branch.bn(branch.conv(inputs[0])))
    assert expected.shape == (3, 192, 17, 17)
    assert spatial.shape == (3, 2023)
    grid = spatial.view(3, 17, 17, 7)
    for row, column, channel in ((0, 0, 0), (3, 11, 6), (16, 5, 2)):
        assert torch.equal(grid[:, row, column, channel], expected[:, channel, row, column])
    assert spatial.min() == 0
    assert spatial.std() > 0.01


def test_batches_do_not_mix(weights, images):
    extractor = build_extractor("inception", str(weights))
    together, apart = extractor([images]), extractor(images.split(1))
    for name in ("features", "logits", "spatial"):
        # One image a batch takes another convolution kernel: the last bits differ.
        assert torch.allclose(getattr(together, name), getattr(apart, name), rtol=1e-3, atol=1e-4)


def test_the_weights_file_is_known_by_its_hash(weights):
    extractor = build_extractor("inception", str(weights))
    assert extractor.weights_sha256 == sha256_of(str(weights)) != INCEPTION_SHA256
    assert not extractor.published_weights
    assert extractor.distance_name == "fid"


def test_without_a_file_the_command_that_fetches_it():
    with pytest.raises(ValueError, match=r"extractor_weights: inception needs .*6726825d\.pth; fetch it with `curl"):
        build_extractor("inception")


def test_other_files_are_refused(tmp_path):
    torch.save({}, tmp_path / "empty.pth")
    with pytest.raises(ValueError, match=r"empty\.pth: holds no plain state dict"):
        build_extractor("inception", str(tmp_path / "empty.pth"))
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth: not an Inception file"):
        build_extractor("inception", str(tmp_path / "other.pth"))
