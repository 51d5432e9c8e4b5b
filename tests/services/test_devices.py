import pytest
import torch

from medssl_cli.core.errors import ConfigError, ResourceError
from medssl_cli.services.devices import resolve_device


def test_an_absent_device_is_an_error_never_a_fallback() -> None:
    with pytest.raises(ResourceError, match="absent") as caught:
        resolve_device("cuda:99")
    assert caught.value.exit_code == 6
    assert resolve_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cpu:1", ""])
def test_unknown_names_are_wrong_usage(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_device(name)
    assert caught.value.where == f"--device {name}"
