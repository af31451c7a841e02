"""From an installed wheel, in a folder of the reader's own: the README's ten lines and commands, killed."""

import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import venv
from pathlib import Path

import pytest

from mmicl_kernels.testing import real_processors
from tests.support.ten_lines import prepare, shortened

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PROCESSORS = {
    "smolvlm": real_processors.smolvlm_processor,
    "qwen2_5_vl": real_processors.qwen2_5_vl_processor,
}
pytestmark = pytest.mark.slow
pytest.importorskip("accelerate")


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """Of an environment with the wheel, which has its dependencies from this one."""
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"
    ignored = shutil.ignore_patterns(".*", "build", "*.so", "*.egg-info", "results", "__pycache__")
    shutil.copytree(ROOT, source, ignore=ignored)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheel = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source]
    subprocess.run(list(map(str, wheel)), check=True)
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    (wheel,) = folder.glob("mmicl_kernels-*.whl")
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    install = [*pip, "install", "--no-deps", "--target", site, wheel]
    subprocess.run(list(map(str, install)), check=True)
    line = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})"
    (Path(site) / "dependencies.pth").write_text(line)
    return python


@pytest.fixture(scope="module", params=sorted(PROCESSORS))
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    prepare(folder, real_processors.tiny_vlm(request.param), PROCESSORS[request.param]())
    return folder


def run(command, folder):
    environment = {name: x for name, x in os.environ.items() if name != "PYTHONPATH"}
    made = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return made.stdout


def test_ten_lines(python, folder):
    block = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]
    assert len([line for line in block.splitlines() if line.strip()]) <= 10
    script = f"{shortened(block)}\nassert 'site-packages' in mk.__file__, mk.__file__\n"
    (folder / "mine.py").write_text(script)
    out = run([python, "mine.py"], folder)
    assert re.search(r"^\W*zero-shot", out, re.MULTILINE) and re.search(r"^\W*8-shot", out, re.MULTILINE)
    assert re.search(r"^\W*mine", out, re.MULTILINE) and "gap" in out
    assert (folder / "adapters" / "mine" / "mmicl_adapter.safetensors").is_file()


def test_commands_killed_and_resumed(python, folder):
    """The README's commands give the adapter of the script, also where the training was killed with -9."""
    commands = [x for x in re.findall(r"^mmicl .*$", README, re.MULTILINE) if "my-lvlm" in x]
    dry, train, score = (shortened(x).replace("adapters/mine", "adapters/again").split() for x in commands)
    mmicl = [str(python), "-m", "mmicl_kernels.cli"]
    assert "One episode" in run([*mmicl, *dry[1:]], folder)

    train = [*mmicl, *train[1:], "--resume", "--set", "save_steps=1"]
    with subprocess.Popen(train, cwd=folder, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not (folder / "adapters" / "again" / "checkpoint-3").exists():
            time.sleep(0.005)
        assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    run(train, folder)
    whole, again = (folder / "adapters" / x / "mmicl_adapter.safetensors" for x in ("mine", "again"))
    assert again.read_bytes() == whole.read_bytes()
    out = run([*mmicl, *score[1:]], folder)
    assert re.search(r"^\W*again", out, re.MULTILINE) and "gap" in out
