"""The command in this process."""

import pytest

from mmicl_kernels.cli import main


@pytest.fixture
def run(capsys):
    """Runs ``mmicl``; its exit code, output and errors."""

    def run(*arguments):
        capsys.readouterr()
        code = main([*map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
