import os
import shutil

import pytest
import torch

compiler = pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="needs a C++ compiler")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def failing(main):
    """A function (capsys, *arguments) -> the one line that the command prints before it exits with another status than 0."""
    def fails(capsys, *args):
        with pytest.raises(SystemExit) as exit:
            main(args)
        assert exit.value.code not in (0, None)
        line = exit.value.code if isinstance(exit.value.code, str) else capsys.readouterr().err.strip().splitlines()[-1]
        assert "\n" not in line
        return line
    return fails
