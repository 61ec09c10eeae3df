import os
from unittest import mock

import pytest

from flows.environment import THREADS_AND_MEMORY, prepare_environment

SPIN = THREADS_AND_MEMORY["GOMP_SPINCOUNT"]


@pytest.mark.parametrize(("given", "policy", "spins"), [
    ({}, "passive", SPIN),
    ({"GOMP_SPINCOUNT": "9"}, "passive", "9"),
    ({"OMP_WAIT_POLICY": "active"}, "active", None),
    ({"OMP_WAIT_POLICY": "passive"}, "passive", None),
])  # fmt: skip
def test_how_threads_wait_is_the_users_choice(tmp_path, given, policy, spins):
    """OpenMP follows the number of spins where both are set."""
    with mock.patch.dict(os.environ, given | {"REPAE_HOME": str(tmp_path)}, clear=True):
        prepare_environment()
        assert (os.environ["OMP_WAIT_POLICY"], os.environ.get("GOMP_SPINCOUNT")) == (policy, spins)
        assert os.environ["GLIBC_TUNABLES"] == THREADS_AND_MEMORY["GLIBC_TUNABLES"]
