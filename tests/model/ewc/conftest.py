import pytest

from tests.model.ewc.tiny_ewc import write_model


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))
